//! `/health` and `/metrics`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::app::App;
use crate::json::reply;
use crate::metrics::CONTENT_TYPE;
use crate::refusal::Refusal;

/// Whether requests are taken.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    if app.is_stopping() {
        return Refusal::stopping().into_response();
    }
    let load = app.scheduler.load();
    reply(&json!({"status": "ok", "active": load.active, "queue_length": load.waiting}))
}

/// The counters.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, Refusal> {
    let text = app.metrics.print(app.scheduler.load());
    let text = text.map_err(|_| Refusal::internal("the counters cannot be printed"))?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}
