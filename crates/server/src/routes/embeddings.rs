//! `/v1/embeddings`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use candle_coreml_llm::{Embedding, EmbeddingModel};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::App;
use crate::json::{Json, reply};
use crate::refusal::Refusal;
use crate::routes::aside;

/// Texts computed between two looks at whether anybody still waits.
const TOGETHER: usize = 16;

#[derive(Debug, Deserialize)]
struct Asked {
    model: Option<String>,
    input: Input,
    encoding_format: Option<String>,
    dimensions: Option<usize>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "a string, a list of strings, a list of token ids or a list of such lists is allowed"
)]
enum Input {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    Many(Vec<Vec<u32>>),
}

/// Gives the vectors of texts.
pub(crate) async fn embed(State(app): State<Arc<App>>, json: Json) -> Result<Response, Refusal> {
    let asked: Asked = json.read()?;
    let encoder = app.models.encoder(asked.model.as_deref())?;
    let base64 = match asked.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            let found = format!("{other:?}");
            return Err(Refusal::value("encoding_format", found, "float, base64"));
        }
    };
    if asked.dimensions == Some(0) {
        return Err(Refusal::value("dimensions", 0, "1 or more"));
    }
    if app.is_stopping() {
        return Err(Refusal::stopping());
    }
    let parts = parts(asked.input, app.options.max_inputs)?;
    let turn = tokio::time::timeout(app.options.request_timeout, encoder.turn.acquire());
    let _turn = turn.await.map_err(|_| Refusal::timeout())?;
    let mut found = Vec::new();
    for part in parts {
        let model = Arc::clone(&encoder.model);
        found.extend(aside(move || compute(&model, part)).await?);
    }
    let tokens: usize = found.iter().map(|e| e.tokens).sum();
    let data: Vec<Value> = found
        .into_iter()
        .enumerate()
        .map(|(index, mut embedding)| {
            embedding.shorten(asked.dimensions.unwrap_or(0));
            let vector = if base64 {
                encoded(&embedding.vector)
            } else {
                json!(embedding.vector)
            };
            json!({"object": "embedding", "index": index, "embedding": vector})
        })
        .collect();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(reply(&json!({
        "object": "list",
        "data": data,
        "model": encoder.id,
        "usage": usage,
    })))
}

/// Inputs computed together.
enum Part {
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

fn parts(input: Input, most: usize) -> Result<Vec<Part>, Refusal> {
    let input = match input {
        Input::Text(text) => Input::Texts(vec![text]),
        Input::Ids(ids) => Input::Many(vec![ids]),
        input => input,
    };
    let count = match &input {
        Input::Texts(texts) => texts.len(),
        Input::Many(ids) => ids.len(),
        _ => 0,
    };
    if count == 0 || count > most {
        let allowed = format!("1 to {most} inputs");
        return Err(Refusal::value("input", format!("{count} inputs"), &allowed));
    }
    Ok(match input {
        Input::Texts(texts) => texts
            .chunks(TOGETHER)
            .map(|texts| Part::Texts(texts.to_vec()))
            .collect(),
        Input::Many(ids) => ids.chunks(TOGETHER).map(|ids| Part::Ids(ids.to_vec())).collect(),
        _ => Vec::new(),
    })
}

fn compute(model: &EmbeddingModel, part: Part) -> Result<Vec<Embedding>, Refusal> {
    let found = match part {
        Part::Texts(texts) => model.embed(&texts),
        Part::Ids(ids) => model.embed_ids(&ids),
    };
    found.map_err(|e| Refusal::of(&e, "input"))
}

/// Little-endian 32-bit floats in base64, as OpenAI's clients read them.
fn encoded(vector: &[f32]) -> Value {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    Value::String(STANDARD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_of_every_form_are_taken_in_parts() {
        let many: Vec<String> = (0..40).map(|i| i.to_string()).collect();
        for (input, expected) in [
            (json!("a"), Some(1)),
            (json!(["a", "b"]), Some(1)),
            (json!([1, 2]), Some(1)),
            (json!([[1], [2, 3]]), Some(1)),
            (json!(many), Some(3)),
            (json!([]), None),
            (json!(vec!["a"; 41]), None),
        ] {
            let input: Input = serde_json::from_value(input.clone()).unwrap();
            assert_eq!(
                parts(input.clone(), 40).ok().map(|p| p.len()),
                expected,
                "{input:?}"
            );
        }
        assert_eq!(encoded(&[1.0]), json!("AACAPw=="));
    }
}
