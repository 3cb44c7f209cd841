//! States of models as Python objects.

use crate::describe::{Feature, features};
use crate::failed;
use crate::value::{Taken, array_from_tensor, tensor_of};
use candle_coreml::CoreMLState;
use pyo3::prelude::*;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a model keeps between predictions, made by `Model.make_state()`.
#[pyclass(frozen, module = "candle_coreml")]
pub(crate) struct State {
    inner: Mutex<CoreMLState>,
}

impl State {
    pub(crate) fn new(state: CoreMLState) -> Self {
        State {
            inner: Mutex::new(state),
        }
    }

    /// Waits for predictions that run with this state; without the interpreter lock, or they could not end.
    pub(crate) fn lock(&self) -> MutexGuard<'_, CoreMLState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl State {
    /// The buffers as the model declares them.
    #[getter]
    fn features(&self, py: Python<'_>) -> Vec<Feature> {
        py.detach(|| features(self.lock().features()))
    }

    /// The names of the buffers.
    #[getter]
    fn names(&self, py: Python<'_>) -> Vec<String> {
        py.detach(|| self.lock().names().map(str::to_string).collect())
    }

    /// A copy of the buffer `name`, in the declared shape and dtype.
    fn read<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let (tensor, dtype) = py
            .detach(|| {
                let state = self.lock();
                let dtype = state
                    .features()
                    .iter()
                    .find(|f| f.name == name)
                    .map(|f| f.ty.clone());
                state.read(name).map(|tensor| (tensor, dtype))
            })
            .map_err(failed)?;
        array_from_tensor(py, tensor, dtype.as_ref())
    }

    /// Replaces the buffer `name` by `value`, an array of the declared shape.
    fn write(&self, py: Python<'_>, name: &str, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let taken = Taken::array(value)?;
        let tensor = tensor_of(&taken)?;
        py.detach(|| self.lock().write(name, &tensor)).map_err(failed)
    }

    /// Sets every buffer to zero.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.lock().reset()).map_err(failed)
    }

    /// An independent copy: predictions with one leave the other as it is.
    fn fork(&self, py: Python<'_>) -> PyResult<State> {
        let copy = py.detach(|| self.lock().fork()).map_err(failed)?;
        Ok(State::new(copy))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("State({})", self.names(py).join(", "))
    }
}
