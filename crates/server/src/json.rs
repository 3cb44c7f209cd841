//! Bodies: read with their limits, and refused with the place of the mistake.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::app::App;
use crate::refusal::Refusal;
/// A body too large is read on to here, so that clients which send before they listen see the refusal.
const DRAINED_BYTES: usize = 64 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// A JSON object from a request's body.
#[derive(Debug)]
pub(crate) struct Json(pub Value);

impl FromRequest<Arc<App>> for Json {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Refusal> {
        check_type(request.headers())?;
        let (most, patience) = (app.options.max_body_bytes, app.options.io_timeout);
        let waits = request.headers().contains_key(header::EXPECT);
        let announced = length(request.headers());
        if waits && announced.is_some_and(|length| length > most) {
            return Err(too_large(most));
        }
        let bytes = tokio::time::timeout(patience, read(request.into_body(), most))
            .await
            .map_err(|_| {
                let message = format!("the body took longer than {} s", patience.as_secs_f32());
                Refusal::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
            })??;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| {
            let message = format!("the body is no JSON: {e}");
            Refusal::new(StatusCode::BAD_REQUEST, "invalid_json", message)
        })?;
        if !value.is_object() {
            let message = "the body is JSON, but no object";
            return Err(Refusal::new(StatusCode::BAD_REQUEST, "invalid_json", message));
        }
        Ok(Json(value))
    }
}

impl Json {
    /// Reads what `T` knows of it; a mistake is refused with its place.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        serde_path_to_error::deserialize(&self.0).map_err(|error| {
            let path = error.path().to_string();
            let inner = error.into_inner().to_string();
            // serde names a missing field in its message alone.
            let missing = inner
                .strip_prefix("missing field `")
                .and_then(|rest| rest.strip_suffix('`'));
            match missing {
                Some(field) => {
                    let param = if path == "." {
                        field.to_owned()
                    } else {
                        format!("{path}.{field}")
                    };
                    let message = format!("`{param}` is missing");
                    Refusal::param(param, "missing_parameter", message)
                }
                None => Refusal::param(path.clone(), "invalid_type", format!("`{path}`: {inner}")),
            }
        })
    }

    /// Refuses parameters of OpenAI's that are not followed here, unless they say what is done anyway.
    pub fn refuse(&self, rows: &[Unsupported]) -> Result<(), Refusal> {
        for row in rows {
            let value = self.0.get(row.param).unwrap_or(&Value::Null);
            if !value.is_null() && !(row.harmless)(value) {
                return Err(Refusal::unsupported(row.param, row.why));
            }
        }
        Ok(())
    }
}

/// A response of JSON.
pub(crate) fn reply(value: &impl Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => Refusal::internal(format!("the response is no JSON: {error}")).into_response(),
    }
}

/// A parameter that is not followed.
pub(crate) struct Unsupported {
    pub param: &'static str,
    pub why: &'static str,
    /// Values that ask for nothing.
    pub harmless: fn(&Value) -> bool,
}

/// A page on another origin can have a browser send other types without asking first.
fn check_type(headers: &HeaderMap) -> Result<(), Refusal> {
    let found = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let kind = found.and_then(|value| value.split(';').next()).map(str::trim);
    if kind.is_some_and(|kind| kind.eq_ignore_ascii_case("application/json")) {
        return Ok(());
    }
    let message = format!(
        "the content type is {}, allowed: application/json",
        found.unwrap_or("not given")
    );
    Err(Refusal::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "invalid_content_type",
        message,
    ))
}

fn length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn read(mut body: Body, most: usize) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                "invalid_body",
                format!("the body broke off: {e}"),
            )
        })?;
        let Some(data) = frame.data_ref() else { continue };
        if bytes.len() + data.len() > most {
            let already = bytes.len() + data.len();
            drop(bytes);
            // Whether it ends or not, the answer is the same.
            let _ = tokio::time::timeout(DRAIN_TIME, drain(body, already)).await;
            return Err(too_large(most));
        }
        bytes.extend_from_slice(data);
    }
    Ok(bytes)
}

async fn drain(mut body: Body, mut read: usize) {
    while let Some(Ok(frame)) = body.frame().await {
        read += frame.data_ref().map_or(0, |data| data.len());
        if read > DRAINED_BYTES {
            return;
        }
    }
}

fn too_large(most: usize) -> Refusal {
    let message = format!("the body is larger than {most} bytes");
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Debug, serde::Deserialize)]
    struct Asked {
        #[allow(dead_code)]
        messages: Vec<Message>,
    }

    #[derive(Debug, serde::Deserialize)]
    struct Message {
        #[allow(dead_code)]
        role: String,
    }

    #[test]
    fn mistakes_are_named_by_their_place() {
        let mut failures = Vec::new();
        for (body, param, code) in [
            (json!({}), "messages", "missing_parameter"),
            (
                json!({"messages": [{"role": "user"}, {}]}),
                "messages[1].role",
                "missing_parameter",
            ),
            (
                json!({"messages": [{"role": 4}]}),
                "messages[0].role",
                "invalid_type",
            ),
            (json!({"messages": "hi"}), "messages", "invalid_type"),
        ] {
            let refusal = Json(body.clone()).read::<Asked>().unwrap_err();
            if (refusal.body.param.as_deref(), refusal.body.code) != (Some(param), Some(code)) {
                failures.push(format!("{body}: {refusal:?}"));
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
    }

    #[test]
    fn parameters_that_ask_for_nothing_are_let_through() {
        let rows = [Unsupported {
            param: "suffix",
            why: "no model here fills gaps",
            harmless: |value| value == "",
        }];
        for (body, refused) in [
            (json!({}), false),
            (json!({"suffix": null}), false),
            (json!({"suffix": ""}), false),
            (json!({"suffix": "end"}), true),
        ] {
            assert_eq!(Json(body.clone()).refuse(&rows).is_err(), refused, "{body}");
        }
    }
}
