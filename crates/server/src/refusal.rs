//! What a client is told when its request is refused: a status and OpenAI's error body.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use candle_coreml_llm::Error as ModelError;
use serde::Serialize;

/// A refused request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Refusal {
    pub status: StatusCode,
    pub body: Body,
    pub retry_after_s: Option<u64>,
}

/// The part of the body named `error`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Body {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

/// As clients read it.
#[derive(Serialize)]
pub(crate) struct Envelope<'a> {
    error: &'a Body,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let body = Body {
            message: message.into(),
            kind,
            param: None,
            code: Some(code),
        };
        Refusal {
            status,
            body,
            retry_after_s: None,
        }
    }

    /// A parameter that cannot be meant, or that this server does not know to follow.
    pub fn param(param: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        let mut refusal = Refusal::new(StatusCode::BAD_REQUEST, code, message);
        refusal.body.param = Some(param.into());
        refusal
    }

    /// A value outside its range.
    pub fn value(param: &str, found: impl std::fmt::Display, allowed: &str) -> Self {
        Refusal::param(
            param,
            "invalid_value",
            format!("`{param}` is {found}, allowed: {allowed}"),
        )
    }

    /// A parameter of OpenAI's that is not followed here.
    pub fn unsupported(param: impl Into<String>, why: &str) -> Self {
        let param = param.into();
        let message = format!("`{param}` is not supported: {why}");
        Refusal::param(param, "unsupported_parameter", message)
    }

    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    pub fn unknown_model(id: &str, known: &[&str]) -> Self {
        let message = format!(
            "the model `{id}` is not served here; there is {}",
            known.join(", ")
        );
        let mut refusal = Refusal::new(StatusCode::NOT_FOUND, "model_not_found", message);
        refusal.body.param = Some("model".to_owned());
        refusal
    }

    pub fn queue_full(waiting: usize) -> Self {
        let message = format!("{waiting} texts wait already; try again later");
        Refusal::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message).retry_after(1)
    }

    pub fn stopping() -> Self {
        Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "stopping",
            "the server is stopping",
        )
        .retry_after(5)
    }

    /// The time was up before a token came.
    pub fn timeout() -> Self {
        let message = "the time for this request was up before its first token";
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "timeout", message).retry_after(5)
    }

    /// Nothing the client can do about.
    pub fn internal(message: impl Into<String>) -> Self {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// What the model's side said of a request. `prompt` is the parameter the prompt came in.
    pub fn of(error: &ModelError, prompt: &str) -> Self {
        let message = error.to_string();
        match error {
            ModelError::PromptTooLong { .. } => Refusal::param(prompt, "context_length_exceeded", message),
            ModelError::EmptyPrompt
            | ModelError::EmptyText { .. }
            | ModelError::TokenOutside { .. }
            | ModelError::Template(_)
            | ModelError::Tokenizer(_) => Refusal::param(prompt, "invalid_value", message),
            ModelError::Grammar(_) => Refusal::param("response_format", "invalid_value", message),
            ModelError::NoTemplate { .. } => Refusal::param("model", "no_chat_template", message),
            ModelError::NoLogits => Refusal::param("temperature", "unsupported_value", message),
            ModelError::Option { option, .. } => Refusal::param(*option, "invalid_value", message),
            _ => {
                tracing::error!(%error, "a model failed");
                Refusal::internal(message)
            }
        }
    }

    /// The body as JSON.
    pub fn json(&self) -> String {
        let envelope = Envelope { error: &self.body };
        serde_json::to_string(&envelope).unwrap_or_default()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let json = HeaderValue::from_static("application/json");
        let mut response = (self.status, [(header::CONTENT_TYPE, json)], self.json()).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_have_the_four_fields_clients_read() {
        let refusal = Refusal::value("temperature", -1, "0 to 2");
        assert_eq!(
            refusal.json(),
            r#"{"error":{"message":"`temperature` is -1, allowed: 0 to 2","type":"invalid_request_error","param":"temperature","code":"invalid_value"}}"#
        );
        let full = Refusal::queue_full(3).into_response();
        assert_eq!(full.status(), 429);
        assert_eq!(full.headers()["retry-after"], "1");
        assert!(Refusal::stopping().json().contains(r#""param":null"#));
    }

    #[test]
    fn what_models_say_gets_the_status_it_deserves() {
        let long = ModelError::PromptTooLong {
            tokens: 9,
            context: 8,
        };
        let cases = [
            (long, 400, Some("messages")),
            (ModelError::EmptyPrompt, 400, Some("messages")),
            (ModelError::NoLogits, 400, Some("temperature")),
            (
                ModelError::AllNan {
                    position: 1,
                    vocabulary: 2,
                },
                500,
                None,
            ),
        ];
        for (error, status, param) in cases {
            let refusal = Refusal::of(&error, "messages");
            assert_eq!(
                (refusal.status.as_u16(), refusal.body.param.as_deref()),
                (status, param),
                "{error}"
            );
        }
    }
}
