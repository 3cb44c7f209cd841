//! From prompts to texts: tasks for the scheduler, and the events of one request as they come.

use std::sync::Arc;
use std::time::Instant;

use candle_coreml_llm::{Completion, FinishReason, GenerateOptions};
use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::app::{App, denied};
use crate::models::TextModel;
use crate::refusal::Refusal;
use crate::scheduler::{Event, Failure, Task};

/// The texts of one request, being generated.
#[derive(Debug)]
pub(crate) struct Texts {
    events: UnboundedReceiver<(usize, Event)>,
    first: Option<(usize, Event)>,
    /// The parameter the prompts came in.
    prompt_param: &'static str,
}

/// What was computed for a request, as clients read it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct PromptDetails {
    pub cached_tokens: usize,
}

impl Usage {
    /// Adds a text; its prompt counts for the first of the texts it has.
    pub fn add(&mut self, text: &Completion, counts_prompt: bool) {
        if counts_prompt {
            self.prompt_tokens += text.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += text.reused_tokens;
        }
        self.completion_tokens += text.tokens.len();
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// What to generate: each prompt `texts` times, seeds counting up.
pub(crate) struct Work {
    pub prompts: Vec<Vec<u32>>,
    pub texts: usize,
    pub options: GenerateOptions,
    pub prompt_param: &'static str,
    pub arrived: Instant,
}

impl Texts {
    /// Puts the texts in line and waits until the first one is accepted, so that a refusal still has a status of its own.
    pub async fn start(app: &Arc<App>, model: &TextModel, work: Work) -> Result<Self, Refusal> {
        for prompt in &work.prompts {
            check_length(model, prompt, work.prompt_param)?;
        }
        let (sender, events) = unbounded_channel();
        let deadline = work.arrived + app.options.request_timeout;
        let mut tasks = Vec::new();
        for prompt in work.prompts {
            for text in 0..work.texts {
                let mut options = work.options.clone();
                let more = u64::try_from(text).unwrap_or_default();
                options.sampling.seed = options.sampling.seed.wrapping_add(more);
                tasks.push(Task {
                    model: model.place,
                    index: tasks.len(),
                    prompt: prompt.clone(),
                    options,
                    arrived: work.arrived,
                    deadline,
                    events: sender.clone(),
                });
            }
        }
        drop(sender);
        app.scheduler.submit(tasks).map_err(denied)?;
        let mut texts = Texts {
            events,
            first: None,
            prompt_param: work.prompt_param,
        };
        let first = tokio::time::timeout_at(deadline.into(), texts.events.recv()).await;
        match first.map_err(|_| Refusal::timeout())? {
            Some((_, Event::Failed(failure))) => Err(texts.refusal(&failure)),
            first => {
                texts.first = first;
                Ok(texts)
            }
        }
    }

    /// The next event and the text it belongs to; none when all have ended.
    pub fn poll(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<(usize, Event)>> {
        match self.first.take() {
            Some(first) => std::task::Poll::Ready(Some(first)),
            None => self.events.poll_recv(context),
        }
    }

    /// As [`Texts::poll`], waiting.
    pub async fn next(&mut self) -> Option<(usize, Event)> {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    /// What a client is told of a failure.
    pub fn refusal(&self, failure: &Failure) -> Refusal {
        match failure {
            Failure::Model(error) => Refusal::of(error, self.prompt_param),
            Failure::Panic => Refusal::internal("the engine made a mistake"),
            Failure::Stopping => Refusal::stopping(),
        }
    }
}

fn check_length(model: &TextModel, prompt: &[u32], param: &str) -> Result<(), Refusal> {
    if prompt.len() <= model.context_tokens {
        return Ok(());
    }
    let error = candle_coreml_llm::Error::PromptTooLong {
        tokens: prompt.len(),
        context: model.context_tokens,
    };
    Err(Refusal::of(&error, param))
}

/// Why a text ended, in OpenAI's words. A text whose time was up is as incomplete as one of its full length.
pub(crate) fn finish_reason(text: &Completion) -> &'static str {
    match text.finish_reason {
        FinishReason::Stop if !text.tool_calls.is_empty() => "tool_calls",
        FinishReason::Stop => "stop",
        _ => "length",
    }
}

/// True for a text that got no token in its time.
pub(crate) fn is_timeout(text: &Completion) -> bool {
    text.finish_reason == FinishReason::Cancelled && text.tokens.is_empty()
}

/// A new id: `kind` and 24 random letters.
pub(crate) fn new_id(kind: &str) -> Result<String, Refusal> {
    let mut bytes = [0u8; 12];
    getrandom::fill(&mut bytes).map_err(|e| Refusal::internal(format!("no random id: {e}")))?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{kind}-{hex}"))
}

/// Seconds since 1970.
pub(crate) fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}
