//! Core ML models as parts.

use std::cell::Cell;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use candle_coreml::{CoreMLModel, CoreMLState, EngineKind, Value};
use candle_coreml_mil::FunctionDescription;

use super::Part;
use crate::Error;

thread_local! {
    static PREDICTED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// What this thread has spent in predictions of packages: what is left of a step's time is the engine's own.
pub(crate) fn predict_time() -> Duration {
    PREDICTED.get()
}

/// A Core ML model with its file name.
#[derive(Clone)]
pub(crate) struct CoreMlPart {
    name: String,
    model: CoreMLModel,
}

impl CoreMlPart {
    pub(crate) fn new(name: impl Into<String>, model: CoreMLModel) -> Self {
        CoreMlPart {
            name: name.into(),
            model,
        }
    }

    fn failed(&self, source: candle_coreml::Error) -> Error {
        Error::Engine {
            part: self.name.clone(),
            source: Box::new(source),
        }
    }
}

impl Part for CoreMlPart {
    type State = CoreMLState;

    fn name(&self) -> &str {
        &self.name
    }

    fn functions(&self) -> Vec<String> {
        self.model.functions().iter().map(|f| f.name.clone()).collect()
    }

    fn written(&self, key: &str) -> Option<String> {
        let user = &self.model.metadata().user;
        user.iter()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value.clone())
    }

    fn with_function(&self, function: &str) -> Result<Self, Error> {
        let model = self.model.with_function(function).map_err(|e| self.failed(e))?;
        Ok(CoreMlPart {
            name: self.name.clone(),
            model,
        })
    }

    fn opens_functions_fast(&self) -> bool {
        // Core ML compiles each for the devices it may run on, which takes seconds.
        self.model.engine() == EngineKind::Portable
    }

    fn interface(&self) -> &FunctionDescription {
        self.model.function()
    }

    fn make_state(&self) -> Result<CoreMLState, Error> {
        self.model.make_state().map_err(|e| self.failed(e))
    }

    fn fork_state(&self, state: &CoreMLState) -> Result<CoreMLState, Error> {
        state.fork().map_err(|e| self.failed(e))
    }

    fn snapshot_state(&self, state: &CoreMLState) -> Result<Vec<(String, Tensor)>, Error> {
        state.snapshot().map_err(|e| self.failed(e))
    }

    fn restore_state(&self, state: &mut CoreMLState, buffers: &[(String, Tensor)]) -> Result<(), Error> {
        state.restore(buffers).map_err(|e| self.failed(e))
    }

    fn predict(
        &self,
        inputs: &[(&str, &Tensor)],
        state: Option<&mut CoreMLState>,
    ) -> Result<Vec<(String, Tensor)>, Error> {
        // A package without states of its own takes none, whatever its neighbours keep.
        let start = Instant::now();
        let outputs = match state {
            Some(state) if !self.model.states().is_empty() => self.model.predict_with_state(inputs, state),
            _ => self.model.predict(inputs),
        };
        PREDICTED.set(PREDICTED.get() + start.elapsed());
        let tensors =
            outputs
                .map_err(|e| self.failed(e))?
                .into_iter()
                .filter_map(|(name, value)| match value {
                    Value::Tensor(tensor) => Some((name, tensor)),
                    _ => None,
                });
        Ok(tensors.collect())
    }
}
