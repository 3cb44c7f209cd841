//! Waiting for a completion handler, which Core ML calls on a thread of its own choosing.

use crate::error::Error;
use objc2::Message;
use objc2::rc::Retained;
use objc2_foundation::NSError;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

/// Longest wait: compiling and specializing large models takes minutes.
const PATIENCE: Duration = Duration::from_secs(60 * 60);

/// What a completion handler was given: an object or an error.
type Given<T> = Result<Retained<T>, Option<Retained<NSError>>>;

/// An answer on its way from the handler's thread to the one that waits.
struct Crossing<T>(Given<T>);

// SAFETY: The handler gives its only reference away and the waiting thread alone uses it, after the handler sent it;
// reference counts are atomic. Only immutable results of Core ML and Foundation go this way.
unsafe impl<T> Send for Crossing<T> {}

/// Where a completion handler puts its answer.
pub(super) struct Answer<T>(SyncSender<Crossing<T>>);

/// Where the answer is waited for.
pub(super) struct Question<T>(Receiver<Crossing<T>>);

pub(super) fn question<T>() -> (Answer<T>, Question<T>) {
    // Room for one, so that the handler never waits, even when nobody does any more.
    let (sender, receiver) = sync_channel(1);
    (Answer(sender), Question(receiver))
}

impl<T: Message> Answer<T> {
    /// Takes what the handler was given. A second call is ignored.
    ///
    /// # Safety
    /// Both are valid objects or null.
    pub(super) unsafe fn give(&self, object: *mut T, error: *mut NSError) {
        // SAFETY: By this function's own condition.
        let object = unsafe { Retained::retain(object) };
        // SAFETY: By this function's own condition.
        let error = unsafe { Retained::retain(error) };
        let full = self.0.try_send(Crossing(object.ok_or(error)));
        drop(full);
    }
}

impl<T> Question<T> {
    /// Waits for the handler; `describe` makes an error of what it was given.
    pub(super) fn answer(
        self,
        what: &str,
        describe: impl Fn(Retained<NSError>) -> Error,
    ) -> Result<Retained<T>, Error> {
        let silent = |problem: &str| Error::Silent {
            what: what.to_string(),
            problem: problem.to_string(),
        };
        match self.0.recv_timeout(PATIENCE) {
            Ok(Crossing(Ok(object))) => Ok(object),
            Ok(Crossing(Err(Some(error)))) => Err(describe(error)),
            Ok(Crossing(Err(None))) => Err(silent("Core ML gave neither a result nor an error")),
            Err(RecvTimeoutError::Timeout) => Err(silent("Core ML did not answer within an hour")),
            Err(RecvTimeoutError::Disconnected) => {
                Err(silent("Core ML dropped its completion handler uncalled"))
            }
        }
    }
}
