//! What can go wrong, said so that it can be put right: where, what was found, what is allowed.

use crate::engine::EngineKind;

/// The error of this crate.
///
/// It converts into [`candle_core::Error`], so `?` works in functions that return [`candle_core::Result`]. `Debug` prints
/// the same words as `Display`, as Candle's error does: that is what `main` and `unwrap` show.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The files could not be read as a Core ML model.
    #[error("the model cannot be opened: {source}")]
    Open {
        /// The file, the place in it and what is wrong there.
        source: candle_coreml_mil::Error,
    },

    /// The engine asked for does not exist on this system or in this build.
    #[error("the {engine} engine is not available: {reason}")]
    EngineUnavailable {
        /// The engine asked for.
        engine: EngineKind,
        /// Why it is not.
        reason: String,
    },

    /// The engine refused the model or failed while it ran.
    #[error("{engine} engine: {source}")]
    Engine {
        /// Which engine.
        engine: EngineKind,
        /// What it said.
        source: BoxError,
    },

    /// Neither engine could open the model.
    #[error("no engine could open the model: apple: {apple}; portable: {portable}")]
    NoEngine {
        /// What CoreML.framework said.
        apple: Box<Error>,
        /// What the portable engine said.
        portable: Box<Error>,
    },

    /// The model has no function of that name.
    #[error("the model has no function {name:?}; it has: {}", quoted(allowed))]
    UnknownFunction {
        /// The name that was given.
        name: String,
        /// The functions there are.
        allowed: Vec<String>,
    },

    /// The function has no input of that name.
    #[error("function {function:?} has no input {name:?}; it takes: {}", quoted(allowed))]
    UnknownInput {
        /// The function that was to run.
        function: String,
        /// The name that was given.
        name: String,
        /// The inputs there are.
        allowed: Vec<String>,
    },

    /// Inputs without which the function cannot run were not given.
    #[error("function {function:?} was not given: {}; given: {}", missing.join(", "), quoted(given))]
    MissingInputs {
        /// The function that was to run.
        function: String,
        /// The absent inputs, each with what it takes.
        missing: Vec<String>,
        /// The names that were given.
        given: Vec<String>,
    },

    /// One input was given twice.
    #[error("input {name:?} was given more than once")]
    DuplicateInput {
        /// Its name.
        name: String,
    },

    /// The number of tensors does not fit the names of the configuration.
    #[error("{found} tensors were given to forward; it takes {}: {}", expected.len(), quoted(expected))]
    InputCount {
        /// How many were given.
        found: usize,
        /// The names the configuration lists.
        expected: Vec<String>,
    },

    /// A tensor has a shape its feature does not allow.
    #[error("{what} {name:?}: shape {found:?} is not allowed; allowed: {allowed}")]
    Shape {
        /// Input or state.
        what: FeatureRole,
        /// The feature's name.
        name: String,
        /// The tensor's shape.
        found: Vec<usize>,
        /// The shapes the model accepts: `[1, 64]`, `one of [1, 1], [1, 64]`, `[1, 1..=512]`.
        allowed: String,
    },

    /// A tensor has an element type that cannot become the feature's.
    #[error("{what} {name:?} ({expected}): dtype {found} cannot be converted; allowed: {allowed}")]
    DType {
        /// Input or state.
        what: FeatureRole,
        /// The feature's name.
        name: String,
        /// The element type the model declares.
        expected: String,
        /// The tensor's dtype.
        found: &'static str,
        /// The dtypes that can be converted.
        allowed: &'static str,
    },

    /// An element has no exact counterpart in the feature's element type.
    #[error("{what} {name:?} ({expected}): element {index} is {value}; allowed: {allowed}")]
    Element {
        /// Input or state.
        what: FeatureRole,
        /// The feature's name.
        name: String,
        /// The element type the model declares.
        expected: String,
        /// The element's place in the tensor, row-major, from 0.
        index: usize,
        /// The element as it prints.
        value: String,
        /// What the element type can hold.
        allowed: String,
    },

    /// A value of another kind than the input takes.
    #[error("input {name:?}: {found} was given; allowed: {allowed}")]
    Kind {
        /// The input's name.
        name: String,
        /// The kind that was given: `a tensor`, `a string`.
        found: String,
        /// What the input takes.
        allowed: String,
    },

    /// A tensor lives where no engine can read it.
    #[error("{what} {name:?}: the tensor is on {device}; allowed: CPU and Metal tensors")]
    Device {
        /// Input or state.
        what: FeatureRole,
        /// The feature's name.
        name: String,
        /// Where the tensor is.
        device: String,
    },

    /// Pixels, width and height of a picture do not belong together.
    #[error("image: {found}; allowed: {allowed}")]
    Image {
        /// What was given.
        found: String,
        /// What can be made into an image.
        allowed: String,
    },

    /// Elements that do not fill their shape.
    #[error("{found} elements were given for the shape {shape:?}")]
    ElementCount {
        /// The shape that was given.
        shape: Vec<usize>,
        /// How many elements there are.
        found: usize,
    },

    /// There is no output of that name.
    #[error("no output {name:?}; the outputs are: {}", quoted(allowed))]
    UnknownOutput {
        /// The name that was asked for.
        name: String,
        /// The outputs there are.
        allowed: Vec<String>,
    },

    /// The output is not a tensor.
    #[error("output {name:?} is {found}, not a tensor")]
    NotATensor {
        /// The output's name.
        name: String,
        /// What it is.
        found: &'static str,
    },

    /// A function with states was run without one.
    #[error(
        "function {function:?} keeps state ({}); make one with make_state and call predict_with_state",
        quoted(states)
    )]
    StateNeeded {
        /// The function that was to run.
        function: String,
        /// Its states.
        states: Vec<String>,
    },

    /// The state was made by a model that declares other states.
    #[error("the state does not fit function {function:?}: it holds {found}; allowed: {allowed}")]
    StateMismatch {
        /// The function that was to run.
        function: String,
        /// What the state holds.
        found: String,
        /// What the function declares.
        allowed: String,
    },

    /// The state has no buffer of that name.
    #[error("no state {name:?}; the states are: {}", quoted(allowed))]
    UnknownState {
        /// The name that was asked for.
        name: String,
        /// The states there are.
        allowed: Vec<String>,
    },

    /// A Candle operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Any error, kept as the source of one of ours.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Which side of a model an error speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureRole {
    /// A function's input.
    Input,
    /// A state's buffer.
    State,
}

impl std::fmt::Display for FeatureRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FeatureRole::Input => "input",
            FeatureRole::State => "state",
        })
    }
}

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

/// Names for a message: `"a", "b"`, or `none`.
pub(crate) fn quoted(names: &[String]) -> String {
    if names.is_empty() {
        return "none".to_string();
    }
    names
        .iter()
        .map(|n| format!("{n:?}"))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_where_what_was_found_and_what_is_allowed() {
        let error = Error::UnknownInput {
            function: "main".into(),
            name: "y".into(),
            allowed: vec!["x".into(), "mask".into()],
        };
        assert_eq!(
            error.to_string(),
            r#"function "main" has no input "y"; it takes: "x", "mask""#
        );
        let error = Error::Shape {
            what: FeatureRole::Input,
            name: "x".into(),
            found: vec![1, 3],
            allowed: "[1, 1..=2]".into(),
        };
        assert_eq!(
            error.to_string(),
            r#"input "x": shape [1, 3] is not allowed; allowed: [1, 1..=2]"#
        );
    }

    #[test]
    fn an_error_becomes_a_candle_error_with_the_same_words() {
        fn in_candle_code() -> candle_core::Result<()> {
            Err(Error::DuplicateInput { name: "x".into() })?
        }
        let words = in_candle_code().unwrap_err().to_string();
        assert!(words.contains(r#"input "x" was given more than once"#), "{words}");
    }

    #[test]
    fn a_candle_error_passes_through_unwrapped() {
        let inner = candle_core::Error::Msg("inner".into());
        let outer: candle_core::Error = Error::from(inner).into();
        assert!(matches!(outer, candle_core::Error::Msg(m) if m == "inner"));
    }
}
