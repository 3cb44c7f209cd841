//! The response to a chat, whole or in chunks.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::response::Response;
use candle_coreml_llm::{Completion, Logprobs, Piece, Tokenizer, ToolCall};
use serde::Serialize;

use crate::json::reply;
use crate::models::TextModel;
use crate::refusal::Refusal;
use crate::routes::completions::finite;
use crate::run::{Texts, Usage, finish_reason, is_timeout, new_id, now};
use crate::scheduler::Event;
use crate::sse::{Chunks, Out};

/// What is known of the answers to one request.
pub(super) struct Answer {
    id: String,
    created: i64,
    model: String,
    tokenizer: Arc<Tokenizer>,
    texts: usize,
    pub include_usage: bool,
    usage: Usage,
    given: BTreeMap<usize, Given>,
}

/// What a stream has shown of one answer.
#[derive(Debug, Default)]
struct Given {
    text_bytes: usize,
    thinking_bytes: usize,
    calls: usize,
}

#[derive(Serialize)]
struct Body<'a, C> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    system_fingerprint: &'static str,
    choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Debug, Serialize)]
struct WholeChoice {
    index: usize,
    message: Parts,
    logprobs: Option<Content>,
    finish_reason: &'static str,
}

#[derive(Debug, Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Parts,
    logprobs: Option<Content>,
    finish_reason: Option<&'static str>,
}

/// A message, or what is new of it.
#[derive(Debug, Default, Serialize)]
struct Parts {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refusal: Option<Option<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
}

#[derive(Debug, Serialize)]
struct Call {
    /// Its place, in chunks.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: Function,
}

#[derive(Debug, Serialize)]
struct Function {
    name: String,
    /// JSON as a string.
    arguments: String,
}

/// Log probabilities of an answer's tokens.
#[derive(Debug, Default, Serialize)]
struct Content {
    content: Vec<TokenLogprob>,
    refusal: Option<String>,
}

#[derive(Debug, Serialize)]
struct TokenLogprob {
    #[serde(flatten)]
    token: OneLogprob,
    top_logprobs: Vec<OneLogprob>,
}

#[derive(Debug, Serialize)]
struct OneLogprob {
    token: String,
    logprob: f32,
    /// Of the text; none for a token that is a part of a character.
    bytes: Option<Vec<u8>>,
}

impl Answer {
    pub fn new(model: &TextModel, texts: usize) -> Result<Self, Refusal> {
        Ok(Answer {
            id: new_id("chatcmpl")?,
            created: now(),
            model: model.id.clone(),
            tokenizer: Arc::clone(&model.tokenizer),
            texts,
            include_usage: false,
            usage: Usage::default(),
            given: BTreeMap::new(),
        })
    }

    fn body<C>(&self, object: &'static str, choices: Vec<C>, usage: Option<Option<Usage>>) -> Body<'_, C> {
        Body {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: concat!("candle-coreml-", env!("CARGO_PKG_VERSION")),
            choices,
            usage,
        }
    }

    pub async fn whole(mut self, mut texts: Texts) -> Result<Response, Refusal> {
        let mut logprobs: BTreeMap<usize, Content> = BTreeMap::new();
        let mut choices = BTreeMap::new();
        while let Some((index, event)) = texts.next().await {
            match event {
                Event::Token(piece) => {
                    if let Some(found) = &piece.logprobs {
                        let content = logprobs.entry(index).or_default();
                        content.push(&self.tokenizer, piece.token, found);
                    }
                }
                Event::Finished(done) => {
                    self.finished(&done)?;
                    let choice = WholeChoice {
                        index,
                        finish_reason: finish_reason(&done),
                        message: Parts::whole(*done),
                        logprobs: logprobs.remove(&index),
                    };
                    choices.insert(index, choice);
                }
                Event::Failed(failure) => return Err(texts.refusal(&failure)),
                Event::Started => {}
            }
        }
        let choices = choices.into_values().collect();
        let body = self.body("chat.completion", choices, Some(Some(self.usage)));
        Ok(reply(&body))
    }

    fn finished(&mut self, done: &Completion) -> Result<(), Refusal> {
        if is_timeout(done) {
            return Err(Refusal::timeout());
        }
        let first = self.usage.prompt_tokens == 0;
        self.usage.add(done, first);
        Ok(())
    }

    fn chunk(&self, choice: ChunkChoice, out: &mut Out) {
        let usage = self.include_usage.then_some(None);
        out.push(&self.body("chat.completion.chunk", vec![choice], usage));
    }

    fn piece(&mut self, index: usize, piece: Piece, out: &mut Out) {
        let given = self.given.entry(index).or_default();
        given.text_bytes += piece.text.len();
        given.thinking_bytes += piece.thinking.len();
        let before = given.calls;
        given.calls += piece.tool_calls.len();
        let logprobs = piece.logprobs.as_ref().map(|found| {
            let mut content = Content::default();
            content.push(&self.tokenizer, piece.token, found);
            content
        });
        let delta = Parts {
            content: (!piece.text.is_empty()).then_some(Some(piece.text)),
            reasoning_content: (!piece.thinking.is_empty()).then_some(piece.thinking),
            tool_calls: calls(piece.tool_calls, Some(before)),
            ..Parts::default()
        };
        if delta.is_empty() && logprobs.is_none() {
            return;
        }
        let choice = ChunkChoice {
            index,
            delta,
            logprobs,
            finish_reason: None,
        };
        self.chunk(choice, out);
    }

    /// What the pieces have not shown, when an answer was cut short.
    fn rest(&self, index: usize, done: &Completion) -> Parts {
        let none = Given::default();
        let given = self.given.get(&index).unwrap_or(&none);
        let text = done.text.get(given.text_bytes..).unwrap_or_default();
        let thinking = done.thinking.get(given.thinking_bytes..).unwrap_or_default();
        let more = done.tool_calls.iter().skip(given.calls).cloned().collect();
        Parts {
            content: (!text.is_empty()).then(|| Some(text.to_owned())),
            reasoning_content: (!thinking.is_empty()).then(|| thinking.to_owned()),
            tool_calls: calls(more, Some(given.calls)),
            ..Parts::default()
        }
    }
}

impl Chunks for Answer {
    fn begin(&mut self, out: &mut Out) {
        for index in 0..self.texts {
            let delta = Parts {
                role: Some("assistant"),
                content: Some(Some(String::new())),
                ..Parts::default()
            };
            let choice = ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
            };
            self.chunk(choice, out);
        }
    }

    fn event(&mut self, index: usize, event: Event, out: &mut Out) -> Result<(), Refusal> {
        match event {
            Event::Token(piece) => self.piece(index, piece, out),
            Event::Finished(done) => {
                self.finished(&done)?;
                let choice = ChunkChoice {
                    index,
                    delta: self.rest(index, &done),
                    logprobs: None,
                    finish_reason: Some(finish_reason(&done)),
                };
                self.chunk(choice, out);
            }
            _ => {}
        }
        Ok(())
    }

    fn end(&mut self, out: &mut Out) {
        if self.include_usage {
            let none: Vec<ChunkChoice> = Vec::new();
            out.push(&self.body("chat.completion.chunk", none, Some(Some(self.usage))));
        }
    }
}

impl Parts {
    fn whole(done: Completion) -> Self {
        let silent = done.text.is_empty() && !done.tool_calls.is_empty();
        Parts {
            role: Some("assistant"),
            content: Some((!silent).then_some(done.text)),
            refusal: Some(None),
            reasoning_content: (!done.thinking.is_empty()).then_some(done.thinking),
            tool_calls: calls(done.tool_calls, None),
        }
    }

    fn is_empty(&self) -> bool {
        self.content.is_none() && self.reasoning_content.is_none() && self.tool_calls.is_empty()
    }
}

/// Calls in OpenAI's form, numbered from `first` on in chunks.
fn calls(calls: Vec<ToolCall>, first: Option<usize>) -> Vec<Call> {
    let each = |(at, call): (usize, ToolCall)| Call {
        index: first.map(|first| first + at),
        id: call.id,
        kind: "function",
        function: Function {
            name: call.name,
            arguments: serde_json::to_string(&call.arguments).unwrap_or_default(),
        },
    };
    calls.into_iter().enumerate().map(each).collect()
}

impl Content {
    fn push(&mut self, tokenizer: &Tokenizer, token: u32, logprobs: &Logprobs) {
        let one = |token: u32, logprob: f32| {
            let text = tokenizer.decode(&[token], true).unwrap_or_default();
            let whole = !text.contains(char::REPLACEMENT_CHARACTER);
            OneLogprob {
                bytes: whole.then(|| text.clone().into_bytes()),
                token: text,
                logprob: finite(logprob),
            }
        };
        self.content.push(TokenLogprob {
            token: one(token, logprobs.chosen),
            top_logprobs: logprobs.best.iter().map(|(t, p)| one(*t, *p)).collect(),
        });
    }
}
