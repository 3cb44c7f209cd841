//! `/v1/models`.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Value, json};

use crate::app::App;
use crate::json::reply;
use crate::refusal::Refusal;

/// All models.
pub(crate) async fn all(State(app): State<Arc<App>>) -> Response {
    let data: Vec<Value> = app.models.ids().map(|id| describe(&app, id)).collect();
    reply(&json!({"object": "list", "data": data}))
}

/// One model.
pub(crate) async fn one(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, Refusal> {
    if app.models.ids().any(|known| known == id) {
        return Ok(reply(&describe(&app, &id)));
    }
    let known: Vec<&str> = app.models.ids().collect();
    Err(Refusal::unknown_model(&id, &known))
}

fn describe(app: &App, id: &str) -> Value {
    // The tasks as the hub names them.
    let (task, context) = match app.models.texts.iter().find(|m| m.id == id) {
        Some(text) => ("text-generation", json!(text.context_tokens)),
        None => {
            let encoder = app.models.encoder(Some(id));
            (
                "feature-extraction",
                json!(encoder.map(|e| e.model.max_tokens()).ok()),
            )
        }
    };
    json!({
        "id": id,
        "object": "model",
        "created": app.created,
        "owned_by": "candle-coreml",
        "task": task,
        "context_length": context,
    })
}
