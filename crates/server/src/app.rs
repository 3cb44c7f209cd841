//! What all requests share, the table of routes, and what stands before it: who may come in, from where, and the count.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, http};
use subtle::{Choice, ConstantTimeEq};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::metrics::Metrics;
use crate::models::Models;
use crate::refusal::Refusal;
use crate::routes;
use crate::scheduler::{Denied, Scheduler};
use crate::{Error, Options};

/// What all requests share.
pub(crate) struct App {
    pub options: Options,
    pub models: Models,
    pub scheduler: Scheduler,
    pub metrics: Metrics,
    /// When the server started, in seconds since 1970.
    pub created: i64,
    pub stopping: AtomicBool,
    /// Names a browser may know this server by; any where it is empty.
    pub hosts: Hosts,
}

/// Which `Host` headers are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hosts {
    Any,
    /// `localhost` and addresses that are this machine.
    Loopback,
}

impl App {
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Refuses what the scheduler would refuse, before work is put into it.
    pub fn admits(&self, texts: usize) -> Result<(), Refusal> {
        self.scheduler.would_take(texts).map_err(denied)
    }
}

/// The scheduler's refusal in the words of HTTP.
pub(crate) fn denied(denied: Denied) -> Refusal {
    match denied {
        Denied::Full(waiting) => Refusal::queue_full(waiting),
        Denied::Stopping => Refusal::stopping(),
    }
}

/// The routes with everything before them.
pub(crate) fn router(app: &Arc<App>) -> Result<Router, Error> {
    let guarded = Router::new()
        .route("/v1/models", get(routes::models::all))
        .route("/v1/models/{*id}", get(routes::models::one))
        .route("/v1/chat/completions", post(routes::chat::complete))
        .route("/v1/completions", post(routes::completions::complete))
        .route("/v1/embeddings", post(routes::embeddings::embed))
        .route("/metrics", get(routes::health::metrics))
        .route_layer(middleware::from_fn_with_state(Arc::clone(app), key));
    let open = Router::new()
        .route("/", get(routes::page))
        .route("/health", get(routes::health::health));
    let all = guarded
        .merge(open)
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .with_state(Arc::clone(app));
    let all = match cors(&app.options)? {
        Some(cors) => all.layer(cors),
        None => all,
    };
    Ok(all
        .layer(middleware::from_fn_with_state(Arc::clone(app), host))
        .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
            tracing::error!("a request panicked");
            Refusal::internal("the server made a mistake").into_response()
        }))
        .layer(middleware::from_fn_with_state(Arc::clone(app), count)))
}

fn cors(options: &Options) -> Result<Option<CorsLayer>, Error> {
    let origins = options.origins()?;
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = if origins.iter().any(|o| o == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers(tower_http::cors::AllowHeaders::mirror_request())
        .max_age(Duration::from_secs(600));
    Ok(Some(layer))
}

/// Lets requests with a key in.
async fn key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = &app.options.api_keys;
    if keys.is_empty() || has_key(request.headers(), keys) {
        return next.run(request).await;
    }
    let message = "a key is needed as `Authorization: Bearer KEY`, and the one given is none";
    Refusal::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).into_response()
}

/// Compares with every key, each in a time that does not depend on where it differs.
fn has_key(headers: &HeaderMap, keys: &[String]) -> bool {
    let value = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let Some((scheme, given)) = value.and_then(|v| v.split_at_checked("Bearer ".len())) else {
        return false;
    };
    if !scheme.eq_ignore_ascii_case(b"Bearer ") {
        return false;
    }
    let given = given.trim_ascii();
    let found = keys
        .iter()
        .fold(Choice::from(0), |found, key| found | key.as_bytes().ct_eq(given));
    found.into()
}

/// Refuses names that are not this machine's where only this machine may ask: a page can give its own name this address.
async fn host(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let found = request
        .headers()
        .get(header::HOST)
        .map(|value| value.to_str().unwrap_or("?"));
    match found {
        Some(found) if app.hosts == Hosts::Loopback && !is_loopback(found) => {
            let message = format!(
                "the host is {found}, allowed without an API key: localhost and this machine's loopback addresses"
            );
            Refusal::new(StatusCode::FORBIDDEN, "host_not_allowed", message).into_response()
        }
        _ => next.run(request).await,
    }
}

fn is_loopback(host: &str) -> bool {
    let Ok(authority) = host.parse::<http::uri::Authority>() else {
        return false;
    };
    let name = authority
        .host()
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Counts and logs.
async fn count(
    State(app): State<Arc<App>>,
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let start = Instant::now();
    // Only known words become labels, or anybody could fill the memory with them.
    let route = path.as_ref().map_or("other", MatchedPath::as_str).to_owned();
    let method = match request.method().as_str() {
        known @ ("GET" | "POST" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "PATCH") => known.to_owned(),
        _ => "other".to_owned(),
    };
    let response = next.run(request).await;
    let (status, took) = (response.status().as_u16(), start.elapsed());
    app.metrics.request(&route, &method, status, took);
    let took_ms = took.as_secs_f64() * 1000.0;
    if matches!(route.as_str(), "/health" | "/metrics") && status == 200 {
        tracing::debug!(method, route, status, took_ms, "request");
    } else {
        tracing::info!(method, route, status, took_ms, "request");
    }
    response
}

async fn unknown_route(request: Request) -> Refusal {
    let message = format!("there is no {} {}", request.method(), request.uri().path());
    Refusal::new(StatusCode::NOT_FOUND, "unknown_route", message)
}

async fn wrong_method(request: Request) -> Refusal {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "wrong_method", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_ones_given_and_no_part_of_them() {
        let keys = ["first".to_owned(), "second".to_owned()];
        let mut failures = Vec::new();
        for (value, expected) in [
            (Some("Bearer first"), true),
            (Some("bearer second"), true),
            (Some("Bearer  second "), true),
            (Some("Bearer firs"), false),
            (Some("Bearer first2"), false),
            (Some("Bearer "), false),
            (Some("Basic first"), false),
            (Some("é"), false),
            (None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(
                    header::AUTHORIZATION,
                    HeaderValue::from_bytes(value.as_bytes()).unwrap(),
                );
            }
            if has_key(&headers, &keys) != expected {
                failures.push(value);
            }
        }
        assert!(failures.is_empty(), "{failures:?}");
    }

    #[test]
    fn names_of_this_machine_are_told_from_others() {
        let mut failures = Vec::new();
        for (name, expected) in [
            ("localhost:8080", true),
            ("LOCALHOST", true),
            ("app.localhost:1", true),
            ("127.0.0.1:8080", true),
            ("127.3.2.1", true),
            ("[::1]:8080", true),
            ("example.org", false),
            ("localhost.example.org:8080", false),
            ("10.0.0.1", false),
            ("127.0.0.1.example.org", false),
            ("", false),
        ] {
            if is_loopback(name) != expected {
                failures.push(name);
            }
        }
        assert!(failures.is_empty(), "{failures:?}");
    }
}
