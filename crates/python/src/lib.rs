//! The Python module `candle_coreml._native`: models, states and descriptions over numpy arrays.

mod describe;
mod model;
mod state;
mod value;

use pyo3::create_exception;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

create_exception!(
    candle_coreml,
    Error,
    PyRuntimeError,
    "What went wrong with a model, an input or a state: where, what was found, what is allowed."
);

/// An error of the library, with the causes that its own text does not tell.
fn failed(error: candle_coreml::Error) -> PyErr {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = inner.source();
    }
    Error::new_err(text)
}

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::Error;
    #[pymodule_export]
    use super::describe::Feature;
    #[pymodule_export]
    use super::model::Model;
    #[pymodule_export]
    use super::model::compile_model;
    #[pymodule_export]
    use super::state::State;

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
