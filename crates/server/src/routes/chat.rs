//! `/v1/chat/completions`: answers to messages, with thinking, calls of tools and forms of JSON.

mod answer;
mod tools;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::State;
use axum::response::Response;
use candle_coreml_llm::{
    AnswerFormat, ChatTemplate, Error as ModelError, GenerateOptions, Message, TemplateOptions, Tokenizer,
};
use serde::Deserialize;
use serde_json::Value;

use crate::app::App;
use crate::asked::{Asked, UNSUPPORTED, top_logprobs};
use crate::json::{Json, Unsupported};
use crate::models::TextModel;
use crate::refusal::Refusal;
use crate::routes::aside;
use crate::run::{Texts, Work};
use crate::sse;
use answer::Answer;
use tools::Choice;

const MESSAGES: &str = "messages";

#[derive(Debug, Deserialize)]
struct More {
    messages: Vec<Message>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    reasoning_effort: Option<String>,
    /// Variables of the template, as other servers name them: `{"enable_thinking": false}`.
    chat_template_kwargs: Option<BTreeMap<String, Value>>,
}

/// Parameters of this route that are refused.
const UNSUPPORTED_HERE: &[Unsupported] = &[
    Unsupported {
        param: "functions",
        why: "give `tools`",
        harmless: |value| value.as_array().is_some_and(Vec::is_empty),
    },
    Unsupported {
        param: "function_call",
        why: "give `tool_choice`",
        harmless: |value| value == "none" || value == "auto",
    },
    Unsupported {
        param: "audio",
        why: "answers are text",
        harmless: |_| false,
    },
    Unsupported {
        param: "modalities",
        why: "answers are text",
        harmless: |value| value.as_array().is_some_and(|m| m.iter().all(|m| m == "text")),
    },
    Unsupported {
        param: "web_search_options",
        why: "the server asks nobody",
        harmless: |_| false,
    },
];

/// Answers messages.
pub(crate) async fn complete(State(app): State<Arc<App>>, json: Json) -> Result<Response, Refusal> {
    let arrived = Instant::now();
    json.refuse(UNSUPPORTED)?;
    json.refuse(UNSUPPORTED_HERE)?;
    let (asked, more): (Asked, More) = (json.read()?, json.read()?);
    let model = app.models.text(asked.model.as_deref())?;
    let mut options = asked.options(&app, &model.tokenizer, model.context_tokens)?;
    options.logprobs = more.logprobs()?;
    app.admits(asked.check_texts(&app, 1)?)?;
    let (prompt, options) = prepare(model, more, options).await?;
    let texts = asked.texts()?;
    let mut answer = Answer::new(model, texts)?;
    let work = Work {
        prompts: vec![prompt],
        texts,
        options,
        prompt_param: MESSAGES,
        arrived,
    };
    let texts = Texts::start(&app, model, work).await?;
    if asked.is_stream() {
        answer.include_usage = asked.wants_usage();
        return Ok(sse::response(texts, answer));
    }
    answer.whole(texts).await
}

impl More {
    fn logprobs(&self) -> Result<Option<usize>, Refusal> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, count) => top_logprobs("top_logprobs", count.unwrap_or(0)).map(Some),
            (false, None | Some(0)) => Ok(None),
            (false, Some(count)) => Err(Refusal::value(
                "top_logprobs",
                count,
                "0, or more with `logprobs` true",
            )),
        }
    }
}

/// Messages as ids, and the options that follow from what the template and the tools ask for.
async fn prepare(
    model: &TextModel,
    more: More,
    mut options: GenerateOptions,
) -> Result<(Vec<u32>, GenerateOptions), Refusal> {
    if more.messages.is_empty() {
        return Err(Refusal::value(MESSAGES, "empty", "one message or more"));
    }
    let template = model.template.as_ref().ok_or_else(|| {
        let error = ModelError::NoTemplate {
            bundle: model.id.clone(),
        };
        Refusal::of(&error, "model")
    })?;
    let tools = tools::read(more.tools.unwrap_or_default())?;
    let choice = Choice::read(more.tool_choice.as_ref(), &tools)?;
    let asked_for_form = options.grammar.is_some();
    if asked_for_form && choice != Choice::None {
        let why = "together with tools the model may call; give `tool_choice` \"none\"";
        return Err(Refusal::unsupported("response_format", why));
    }
    let mut variables = more.chat_template_kwargs.unwrap_or_default();
    if let Some(effort) = more.reasoning_effort {
        if effort == "none" {
            variables
                .entry("enable_thinking".to_owned())
                .or_insert(Value::Bool(false));
        }
        variables.insert("reasoning_effort".to_owned(), Value::String(effort));
    }
    let template_options = TemplateOptions {
        tools: if choice == Choice::None {
            Vec::new()
        } else {
            tools.iter().map(|tool| tool.json.clone()).collect()
        },
        variables,
        ..TemplateOptions::default()
    };
    let (template, tokenizer) = (Arc::clone(template), Arc::clone(&model.tokenizer));
    let messages = known_roles(more.messages);
    let (ids, format) = aside(move || encode(&template, &tokenizer, &messages, &template_options)).await?;
    if let Some(grammar) = choice.grammar(&tools, format.tools, &model.tokenizer) {
        options.grammar = Some(grammar);
    }
    options.format = format;
    Ok((ids, options))
}

/// `developer` is the later name for `system`, which templates know.
fn known_roles(mut messages: Vec<Message>) -> Vec<Message> {
    for message in &mut messages {
        if message.role == "developer" {
            message.role = "system".to_owned();
        }
    }
    messages
}

fn encode(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Message],
    options: &TemplateOptions,
) -> Result<(Vec<u32>, AnswerFormat), Refusal> {
    let param = if options.tools.is_empty() {
        MESSAGES
    } else {
        "tools"
    };
    let prompt = template
        .prompt(messages, options)
        .map_err(|e| Refusal::of(&e, param))?;
    let ids = tokenizer
        .encode(&prompt.text)
        .map_err(|e| Refusal::of(&e, MESSAGES))?;
    Ok((ids, prompt.format))
}
