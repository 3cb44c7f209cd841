//! A text that was asked for, and the same while it is generated.

use std::time::Instant;

use candle_coreml_llm::{Completion, Error, FinishReason, GenerateOptions, Generation, Piece, Session, Step};
use self_cell::{MutBorrow, self_cell};
use tokio::sync::mpsc::UnboundedSender;

use crate::metrics::{Metrics, Text};

/// A text to generate.
#[derive(Debug)]
pub(crate) struct Task {
    /// Place of the model among those served.
    pub model: usize,
    /// Its number among the texts of one request.
    pub index: usize,
    pub prompt: Vec<u32>,
    pub options: GenerateOptions,
    pub arrived: Instant,
    /// The text ends here, finished or not.
    pub deadline: Instant,
    /// Where the text goes. When nobody listens any more it ends.
    pub events: UnboundedSender<(usize, Event)>,
}

/// What happens to a text.
#[derive(Debug)]
pub(crate) enum Event {
    /// It has a state and its prompt was accepted.
    Started,
    /// A token came.
    Token(Piece),
    /// The text is complete, or its time is up (`Cancelled`).
    Finished(Box<Completion>),
    /// There is no more, and this is why.
    Failed(Failure),
}

/// Why a text failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The model or the engine said so.
    Model(Error),
    /// Its step panicked.
    Panic,
    /// The server stops.
    Stopping,
}

impl Task {
    /// True when nobody waits for the text.
    pub fn is_abandoned(&self) -> bool {
        self.events.is_closed()
    }

    pub fn tell(&self, event: Event) {
        // A listener that left is seen before the next step.
        let _ = self.events.send((self.index, event));
    }
}

type Held<'s> = Option<Generation<'s>>;

self_cell!(
    /// A session and the generation that borrows it.
    struct Cell {
        owner: MutBorrow<Session>,
        #[not_covariant]
        dependent: Held,
    }
);

/// A text being generated in a session of its own.
pub(crate) struct Running {
    pub task: Task,
    cell: Cell,
    first_token: Option<Instant>,
}

/// What a step led to.
pub(crate) enum Turn {
    /// There is more to do.
    Again(Box<Running>),
    /// The text ended; its session is given back where it is fit for further use. What is to be told of the end is told when
    /// the session is in its place, for the next turn of the conversation may follow at once.
    Ended(Option<Session>, Task, Event),
}

impl Running {
    /// Accepts the prompt, or gives the session back and says why not.
    pub fn start(task: Task, session: Session) -> Turn {
        let owner = MutBorrow::new(session);
        let made = Cell::try_new_or_recover(owner, |owner| {
            let generation = owner.borrow_mut().generate(&task.prompt, &task.options)?;
            Ok(Some(generation))
        });
        match made {
            Ok(cell) => {
                task.tell(Event::Started);
                Turn::Again(Box::new(Running {
                    task,
                    cell,
                    first_token: None,
                }))
            }
            Err((owner, error)) => {
                let failed = Event::Failed(Failure::Model(error));
                Turn::Ended(Some(owner.into_inner()), task, failed)
            }
        }
    }

    /// Does one thing: a batch of the prompt or one token.
    pub fn step(mut self: Box<Self>, metrics: &Metrics, model: &str) -> Turn {
        let step = self.cell.with_dependent_mut(|_, held| match held {
            Some(generation) => generation.step(),
            None => Ok(Step::Finished(FinishReason::Cancelled)),
        });
        match step {
            Ok(Step::Token(piece)) => {
                if self.first_token.is_none() {
                    let now = Instant::now();
                    self.first_token = Some(now);
                    metrics.first_token(now - self.task.arrived);
                }
                self.task.tell(Event::Token(piece));
                Turn::Again(self)
            }
            Ok(Step::Finished(_)) => self.finish(metrics, model, false),
            Ok(_) => Turn::Again(self),
            Err(error) => Turn::Ended(None, self.task, Event::Failed(Failure::Model(error))),
        }
    }

    /// Ends the text where it is: nobody listens, or its time is up.
    pub fn cancel(self: Box<Self>, metrics: &Metrics, model: &str) -> Turn {
        self.finish(metrics, model, true)
    }

    fn finish(mut self: Box<Self>, metrics: &Metrics, model: &str, cancelled: bool) -> Turn {
        let held = self.cell.with_dependent_mut(|_, held| held.take());
        let event = match held.map(Generation::completion) {
            Some(done) => {
                let text = Text {
                    prompt_tokens: done.prompt_tokens,
                    reused_tokens: done.reused_tokens,
                    tokens: done.tokens.len(),
                    tokens_per_s: done.timings.decode_tokens_per_s(),
                    cancelled,
                };
                metrics.text(model, &text);
                Event::Finished(Box::new(done))
            }
            None => Event::Failed(Failure::Panic),
        };
        Turn::Ended(Some(self.cell.into_owner().into_inner()), self.task, event)
    }
}
