//! Who may use the processor next: texts take turns of one step, a batch of a prompt or one token.
//!
//! Texts that were asked for wait in one line. As many as there are states are active; those are in a ring from which a
//! worker takes the first, steps it once and puts it back as the last. So each gets the same number of steps, however
//! long its prompt or its text is, and a text whose client went away ends before its next step. Sessions of finished
//! texts are kept, because the next turn of a conversation begins with all of it.

mod states;
mod task;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use candle_coreml_llm::Session;

use crate::metrics::{Load, Metrics};
use states::{Idle, Place, States};
pub(crate) use task::{Event, Failure, Task};
use task::{Running, Turn};

/// A model that texts are generated with.
#[derive(Debug)]
pub(crate) struct Source {
    pub id: String,
    /// A session that is never used itself: every state begins as its copy.
    pub fresh: Mutex<Session>,
}

/// How much is done at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub active: usize,
    pub waiting: usize,
    pub workers: usize,
}

/// Why texts were not taken on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    /// The line is full; so many wait.
    Full(usize),
    /// The server stops.
    Stopping,
}

/// The line, the ring and the workers.
pub(crate) struct Scheduler {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    sources: Vec<Source>,
    limits: Limits,
    metrics: Metrics,
    board: Mutex<Board>,
    /// Something changed on the board.
    changed: Condvar,
}

#[derive(Default)]
struct Board {
    waiting: VecDeque<Task>,
    ring: VecDeque<Active>,
    /// Texts in the ring and in workers' hands.
    active: usize,
    /// States being copied.
    lent: usize,
    idle: States,
    stopping: bool,
    aborting: bool,
}

enum Active {
    /// It has a place and no session yet; what goes for it is dropped outside the lock.
    Placed(Task, Place, Option<Idle>),
    Running(Box<Running>),
}

/// What a worker gives back after a turn.
struct Outcome {
    again: Option<Active>,
    idle: Vec<Idle>,
    /// Told when the states are in their places.
    last: Option<(Task, Event)>,
}

impl Scheduler {
    /// Starts the workers.
    ///
    /// # Errors
    /// The system's, when it gives no thread.
    pub fn start(sources: Vec<Source>, limits: Limits, metrics: Metrics) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            sources,
            limits,
            metrics,
            board: Mutex::default(),
            changed: Condvar::new(),
        });
        let scheduler = Scheduler {
            shared,
            workers: Mutex::default(),
        };
        for number in 0..limits.workers {
            let shared = Arc::clone(&scheduler.shared);
            let thread = std::thread::Builder::new().name(format!("texts-{number}"));
            let worker = thread.spawn(move || shared.work())?;
            lock(&scheduler.workers).push(worker);
        }
        Ok(scheduler)
    }

    /// Puts texts in line, all of them or none.
    pub fn submit(&self, tasks: Vec<Task>) -> Result<(), Denied> {
        let mut board = self.shared.board();
        board.admits(tasks.len(), &self.shared.limits)?;
        board.waiting.extend(tasks);
        drop(board);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// What [`Scheduler::submit`] would say, before the work of making `count` tasks.
    pub fn would_take(&self, count: usize) -> Result<(), Denied> {
        self.shared.board().admits(count, &self.shared.limits)
    }

    /// What is going on.
    pub fn load(&self) -> Load {
        let mut board = self.shared.board();
        board.waiting.retain(|task| !task.is_abandoned());
        Load {
            waiting: board.waiting.len(),
            active: board.active,
            states: board.states(),
        }
    }

    /// Takes on nothing more, and fails what waits; active texts go on.
    pub fn stop(&self) {
        let waiting = {
            let mut board = self.shared.board();
            board.stopping = true;
            std::mem::take(&mut board.waiting)
        };
        for task in waiting {
            task.tell(Event::Failed(Failure::Stopping));
        }
        self.shared.changed.notify_all();
    }

    /// Stops, and fails active texts before their next step.
    pub fn abort(&self) {
        self.shared.board().aborting = true;
        self.stop();
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.abort();
        for worker in lock(&self.workers).drain(..) {
            // A worker catches the panics of what it runs.
            let _ = worker.join();
        }
    }
}

impl Board {
    fn states(&self) -> usize {
        self.idle.len() + self.active + self.lent
    }

    fn admits(&mut self, count: usize, limits: &Limits) -> Result<(), Denied> {
        if self.stopping {
            return Err(Denied::Stopping);
        }
        let free = limits.active.saturating_sub(self.active);
        if self.waiting.len() + count > limits.waiting + free {
            self.waiting.retain(|task| !task.is_abandoned());
            if self.waiting.len() + count > limits.waiting + free {
                return Err(Denied::Full(self.waiting.len()));
            }
        }
        Ok(())
    }

    /// Moves texts from the line into the ring while there are states for them.
    fn fill(&mut self, limits: &Limits) {
        while self.active + self.lent < limits.active {
            let Some(task) = self.waiting.pop_front() else {
                return;
            };
            if task.is_abandoned() {
                continue;
            }
            let room = self.states() < limits.active;
            let (place, gone) = self.idle.place(task.model, &task.prompt, room);
            self.active += 1;
            if matches!(place, Place::Copy(_)) {
                self.lent += 1;
            }
            self.ring.push_back(Active::Placed(task, place, gone));
        }
    }
}

impl Shared {
    fn board(&self) -> MutexGuard<'_, Board> {
        lock(&self.board)
    }

    /// A worker's life.
    fn work(&self) {
        let mut board = self.board();
        loop {
            board.fill(&self.limits);
            if let Some(active) = board.ring.pop_front() {
                let (more, aborting) = (!board.ring.is_empty(), board.aborting);
                let lent = matches!(active, Active::Placed(_, Place::Copy(_), _));
                drop(board);
                if more {
                    self.changed.notify_one();
                }
                let outcome = self.guarded_turn(active, aborting);
                board = self.board();
                board.lent -= usize::from(lent);
                outcome.idle.into_iter().for_each(|idle| board.idle.put(idle));
                match outcome.again {
                    Some(again) => board.ring.push_back(again),
                    None => {
                        board.active -= 1;
                        self.changed.notify_all();
                    }
                }
                if let Some((task, event)) = outcome.last {
                    task.tell(event);
                }
            } else if board.stopping && board.active == 0 {
                return;
            } else {
                board = self.changed.wait(board).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// One text's turn; a panic in it ends that text alone.
    fn guarded_turn(&self, active: Active, aborting: bool) -> Outcome {
        let task = match &active {
            Active::Placed(task, ..) => task,
            Active::Running(running) => &running.task,
        };
        let (index, events) = (task.index, task.events.clone());
        catch_unwind(AssertUnwindSafe(|| self.turn(active, aborting))).unwrap_or_else(|_| {
            tracing::error!("a step panicked");
            let _ = events.send((index, Event::Failed(Failure::Panic)));
            Outcome::lost()
        })
    }

    fn turn(&self, active: Active, aborting: bool) -> Outcome {
        match active {
            Active::Placed(task, place, gone) => {
                drop(gone);
                self.open(task, place)
            }
            Active::Running(running) if aborting => Outcome::of(
                Turn::Ended(None, running.task, Event::Failed(Failure::Stopping)),
                0,
            ),
            Active::Running(running) => {
                let model = running.task.model;
                let id = self.sources.get(model).map_or("", |source| source.id.as_str());
                let ended = running.task.is_abandoned() || Instant::now() >= running.task.deadline;
                let turn = if ended {
                    running.cancel(&self.metrics, id)
                } else {
                    running.step(&self.metrics, id)
                };
                Outcome::of(turn, model)
            }
        }
    }

    /// Gives a text its session.
    fn open(&self, task: Task, place: Place) -> Outcome {
        let model = task.model;
        let (session, source) = match place {
            Place::Take(idle) => (Ok(idle.session), None),
            Place::Copy(idle) => (idle.session.fork(), Some(idle)),
            Place::Fresh => match self.sources.get(model) {
                Some(source) => (lock(&source.fresh).fork(), None),
                None => return Outcome::lost(),
            },
        };
        let mut outcome = match session {
            Ok(session) => Outcome::of(Running::start(task, session), model),
            Err(error) => {
                let failed = Event::Failed(Failure::Model(error));
                Outcome::of(Turn::Ended(None, task, failed), model)
            }
        };
        // It was used as well, before what was made of it.
        outcome.idle.splice(0..0, source);
        outcome
    }
}

impl Outcome {
    fn of(turn: Turn, model: usize) -> Self {
        match turn {
            Turn::Again(running) => Outcome {
                again: Some(Active::Running(running)),
                idle: Vec::new(),
                last: None,
            },
            Turn::Ended(session, task, event) => Outcome {
                again: None,
                idle: session
                    .map(|session| Idle { model, session })
                    .into_iter()
                    .collect(),
                last: Some((task, event)),
            },
        }
    }

    /// The text ended with nothing to give back and nothing more to say.
    fn lost() -> Self {
        Outcome {
            again: None,
            idle: Vec::new(),
            last: None,
        }
    }
}

/// A panic elsewhere leaves what these locks guard whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
