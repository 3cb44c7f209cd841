//! The buffers a model keeps between predictions.

use super::array;
use super::call::{call, string};
use crate::array::{Array, ArrayRef};
use crate::error::Error;
use block2::RcBlock;
use objc2::rc::Retained;
use objc2_core_ml::{MLModel, MLMultiArray, MLState};
use std::cell::RefCell;
use std::ptr::NonNull;

/// A state of a model. Used by one call at a time: `Send`, not `Sync`, and changed through `&mut` only. Apple's
/// documentation of MLState: a state must not be used by two predictions at once, nor read or written during one.
pub struct State {
    pub(super) inner: Retained<MLState>,
    /// What makes another one like it.
    model: Retained<MLModel>,
    names: Vec<String>,
}

// SAFETY: The state belongs to nobody else and has no thread of its own. The model beside it is only asked for further
// states, which Core ML allows on every thread (see `Model`).
unsafe impl Send for State {}

impl State {
    /// A state of zeros.
    pub(super) fn new(model: &Retained<MLModel>, names: Vec<String>) -> Result<State, Error> {
        call("making a state", || {
            // SAFETY: The caller checked that the system has states.
            let inner = unsafe { model.newState() };
            Ok(State {
                inner,
                model: model.clone(),
                names,
            })
        })
    }

    /// A copy of a buffer.
    ///
    /// # Errors
    /// [`Error::Feature`] for a name that is not the state's, and for memory that is not what it should be.
    pub fn read(&self, name: &str) -> Result<Array, Error> {
        self.with(name, |array| array::read(name, array))
    }

    /// Replaces a buffer by elements of its shape and type.
    ///
    /// # Errors
    /// [`Error::Feature`] for a name that is not the state's, and for memory that is not what it should be.
    pub fn write(&mut self, name: &str, source: ArrayRef<'_>) -> Result<(), Error> {
        self.with(name, |array| array::write(name, array, source))
    }

    /// Zeros in all buffers.
    ///
    /// # Errors
    /// What Core ML says.
    pub fn reset(&mut self) -> Result<(), Error> {
        *self = State::new(&self.model, std::mem::take(&mut self.names))?;
        Ok(())
    }

    /// A state of its own with the same contents.
    ///
    /// # Errors
    /// What Core ML says.
    pub fn fork(&self) -> Result<State, Error> {
        let mut other = State::new(&self.model, self.names.clone())?;
        for name in &self.names {
            other.write(name, self.read(name)?.as_ref())?;
        }
        Ok(other)
    }

    fn with<R>(&self, name: &str, body: impl Fn(&MLMultiArray) -> Result<R, Error>) -> Result<R, Error> {
        // Core ML throws when asked for a name it does not have.
        if !self.names.iter().any(|n| n == name) {
            return Err(Error::feature(
                name,
                format!("no such state; the states are {:?}", self.names),
            ));
        }
        call(&format!("state {name:?}"), || {
            let result = RefCell::new(None);
            let handler = RcBlock::new(|array: NonNull<MLMultiArray>| {
                // SAFETY: Core ML gives a valid array for the time of the handler.
                let found = body(unsafe { array.as_ref() });
                result.replace(Some(found));
            });
            // SAFETY: The handler is called before the method returns, and no prediction uses the state: `&self` and
            // `&mut self` of a type that is not `Sync` see to it.
            unsafe {
                self.inner
                    .getMultiArrayForStateNamed_handler(&string(name), &handler)
            };
            drop(handler);
            let given = result.into_inner();
            given.unwrap_or_else(|| Err(Error::feature(name, "Core ML gave no access to the state")))
        })
    }
}
