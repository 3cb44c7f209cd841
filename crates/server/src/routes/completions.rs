//! `/v1/completions`: texts continued as they are, without a chat template.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::response::Response;
use candle_coreml_llm::{Completion, Logprobs, Piece, Tokenizer};
use serde::{Deserialize, Serialize};

use crate::app::App;
use crate::asked::{Asked, UNSUPPORTED, top_logprobs};
use crate::json::{Json, reply};
use crate::models::TextModel;
use crate::refusal::Refusal;
use crate::routes::aside;
use crate::run::{Texts, Usage, Work, finish_reason, is_timeout, new_id, now};
use crate::scheduler::Event;
use crate::sse::{self, Chunks, Out};

/// Length of a text where none is asked for; OpenAI's.
const DEFAULT_TOKENS: usize = 16;
const PROMPT: &str = "prompt";

#[derive(Debug, Deserialize)]
struct More {
    prompt: Prompt,
    echo: Option<bool>,
    logprobs: Option<usize>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "a string, a list of strings, a list of token ids or a list of such lists is allowed"
)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    Many(Vec<Vec<u32>>),
}

/// Continues texts.
pub(crate) async fn complete(State(app): State<Arc<App>>, json: Json) -> Result<Response, Refusal> {
    let arrived = Instant::now();
    json.refuse(UNSUPPORTED)?;
    let (asked, more): (Asked, More) = (json.read()?, json.read()?);
    let model = app.models.text(asked.model.as_deref())?;
    let mut options = asked.options(&app, &model.tokenizer, DEFAULT_TOKENS)?;
    options.logprobs = more
        .logprobs
        .map(|count| top_logprobs("logprobs", count))
        .transpose()?;
    let echo = more.echo.unwrap_or(false);
    if echo && options.logprobs.is_some() {
        let why = "together with `logprobs`: those of the prompt are not computed";
        return Err(Refusal::unsupported("echo", why));
    }
    let count = more.prompt.count();
    if count == 0 || count > app.options.max_inputs {
        let allowed = format!("1 to {}", app.options.max_inputs);
        return Err(Refusal::value(PROMPT, format!("{count} prompts"), &allowed));
    }
    app.admits(asked.check_texts(&app, count)?)?;
    let tokenizer = Arc::clone(&model.tokenizer);
    let prompts = aside(move || more.prompt.encode(&tokenizer)).await?;
    let texts = asked.texts()?;
    let mut answer = Answer::new(model, texts)?;
    if echo {
        answer.echo = prompts
            .iter()
            .map(|ids| model.tokenizer.decode(ids, false))
            .collect::<Result<_, _>>()
            .map_err(|e| Refusal::of(&e, PROMPT))?;
    }
    let work = Work {
        prompts,
        texts,
        options,
        prompt_param: PROMPT,
        arrived,
    };
    let texts = Texts::start(&app, model, work).await?;
    if asked.is_stream() {
        answer.include_usage = asked.wants_usage();
        return Ok(sse::response(texts, answer));
    }
    answer.whole(texts).await
}

impl Prompt {
    fn count(&self) -> usize {
        match self {
            Prompt::Text(_) => 1,
            // No list of strings has no strings: JSON does not say what an empty list is of.
            Prompt::Texts(texts) => texts.len(),
            Prompt::Ids(_) => 1,
            Prompt::Many(many) => many.len(),
        }
    }

    fn encode(self, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, Refusal> {
        let texts = match self {
            Prompt::Ids(ids) => return Ok(vec![ids]),
            Prompt::Many(many) => return Ok(many),
            Prompt::Text(text) => vec![text],
            Prompt::Texts(texts) => texts,
        };
        let beginning = tokenizer.beginning().map_err(|e| Refusal::of(&e, PROMPT))?;
        let each = |text: &String| {
            let ids = tokenizer.encode(text).map_err(|e| Refusal::of(&e, PROMPT))?;
            Ok(if ids.starts_with(&beginning) {
                ids
            } else {
                [&beginning[..], &ids].concat()
            })
        };
        texts.iter().map(each).collect()
    }
}

/// The response, whole or in chunks.
struct Answer {
    id: String,
    created: i64,
    model: String,
    tokenizer: Arc<Tokenizer>,
    /// Texts for each prompt.
    texts: usize,
    /// The prompts, where they are to be given back before the texts.
    echo: Vec<String>,
    include_usage: bool,
    usage: Usage,
    /// Characters given of each text.
    lengths: BTreeMap<usize, usize>,
}

#[derive(Serialize)]
struct Body<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

#[derive(Debug, Default, Serialize)]
struct Choice {
    text: String,
    index: usize,
    logprobs: Option<Lists>,
    finish_reason: Option<&'static str>,
}

/// Log probabilities as this route has always had them.
#[derive(Debug, Default, Serialize)]
struct Lists {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<BTreeMap<String, f32>>,
    text_offset: Vec<usize>,
}

impl Answer {
    fn new(model: &TextModel, texts: usize) -> Result<Self, Refusal> {
        Ok(Answer {
            id: new_id("cmpl")?,
            created: now(),
            model: model.id.clone(),
            tokenizer: Arc::clone(&model.tokenizer),
            texts,
            echo: Vec::new(),
            include_usage: false,
            usage: Usage::default(),
            lengths: BTreeMap::new(),
        })
    }

    fn body(&self, choices: Vec<Choice>, usage: Option<Option<Usage>>) -> Body<'_> {
        Body {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            choices,
            usage,
        }
    }

    async fn whole(mut self, mut texts: Texts) -> Result<Response, Refusal> {
        let mut choices: BTreeMap<usize, Choice> = BTreeMap::new();
        while let Some((index, event)) = texts.next().await {
            let choice = choices.entry(index).or_insert_with(|| Choice {
                index,
                ..Choice::default()
            });
            match event {
                Event::Token(piece) => {
                    if let Some(logprobs) = &piece.logprobs {
                        let lists = choice.logprobs.get_or_insert_default();
                        lists.push(&self.tokenizer, &piece, logprobs, choice.text.chars().count());
                    }
                    choice.text.push_str(&piece.text);
                }
                Event::Finished(done) => {
                    self.finished(index, &done)?;
                    choice.text = self.echoed(index) + &done.text;
                    choice.finish_reason = Some(finish_reason(&done));
                }
                Event::Failed(failure) => return Err(texts.refusal(&failure)),
                Event::Started => {}
            }
        }
        let body = self.body(choices.into_values().collect(), Some(Some(self.usage)));
        Ok(reply(&body))
    }

    fn finished(&mut self, index: usize, done: &Completion) -> Result<(), Refusal> {
        if is_timeout(done) {
            return Err(Refusal::timeout());
        }
        self.usage.add(done, index.is_multiple_of(self.texts));
        Ok(())
    }

    fn echoed(&self, index: usize) -> String {
        self.echo.get(index / self.texts).cloned().unwrap_or_default()
    }

    fn chunk(&self, choice: Choice, out: &mut Out) {
        out.push(&self.body(vec![choice], self.include_usage.then_some(None)));
    }

    fn piece(&mut self, index: usize, piece: &Piece, out: &mut Out) {
        let length = self.lengths.entry(index).or_default();
        let mut logprobs = None;
        if let Some(found) = &piece.logprobs {
            let mut lists = Lists::default();
            lists.push(&self.tokenizer, piece, found, *length);
            logprobs = Some(lists);
        }
        *length += piece.text.chars().count();
        if piece.text.is_empty() && logprobs.is_none() {
            return;
        }
        let choice = Choice {
            text: piece.text.clone(),
            index,
            logprobs,
            finish_reason: None,
        };
        self.chunk(choice, out);
    }
}

impl Chunks for Answer {
    fn begin(&mut self, out: &mut Out) {
        for index in 0..self.echo.len() * self.texts {
            let choice = Choice {
                text: self.echoed(index),
                index,
                ..Choice::default()
            };
            self.chunk(choice, out);
        }
    }

    fn event(&mut self, index: usize, event: Event, out: &mut Out) -> Result<(), Refusal> {
        match event {
            Event::Token(piece) => self.piece(index, &piece, out),
            Event::Finished(done) => {
                self.finished(index, &done)?;
                let given = self.lengths.get(&index).copied().unwrap_or_default();
                let choice = Choice {
                    text: done.text.chars().skip(given).collect(),
                    index,
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
            out.push(&self.body(Vec::new(), Some(Some(self.usage))));
        }
    }
}

impl Lists {
    /// `offset` is where the token's text begins, in characters.
    fn push(&mut self, tokenizer: &Tokenizer, piece: &Piece, logprobs: &Logprobs, offset: usize) {
        let name = |token| tokenizer.decode(&[token], true).unwrap_or_default();
        self.tokens.push(name(piece.token));
        self.token_logprobs.push(finite(logprobs.chosen));
        let best = logprobs.best.iter().map(|(t, p)| (name(*t), finite(*p)));
        self.top_logprobs.push(best.collect());
        self.text_offset.push(offset);
    }
}

/// JSON has no infinity; OpenAI writes this for the impossible.
pub(crate) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}
