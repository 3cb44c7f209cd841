//! What an engine is to this crate: something that runs one function on inputs already checked and converted.
//!
//! Everything that can be decided without the engine is decided before it: names, shapes, dtypes, defaults, devices.
//! An engine may rely on it: each input is one the function declares, at most once, in the declared order and dtype.

#[cfg(any(target_vendor = "apple", feature = "gnustep"))]
mod apple;
#[cfg(test)]
pub(crate) mod fake;
mod portable;

use crate::builder::{Options, Origin};
use crate::error::Error;
use crate::trace::TracedStep;
use crate::value::Value;
use candle_core::Tensor;
use candle_coreml_apple::plan::{ComputeDevice, ComputePlan};
use candle_coreml_mil::{Description, FunctionDescription, Model};
use half::f16;
use std::any::Any;
use std::sync::Arc;

/// Which engine runs a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EngineKind {
    /// CoreML.framework on Apple systems when it opens the model, the portable engine everywhere else.
    #[default]
    Auto,
    /// The engine in Rust that reads the same files; it runs on every system.
    Portable,
    /// CoreML.framework: Neural Engine, GPU and CPU of Apple systems.
    Apple,
}

impl std::fmt::Display for EngineKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            EngineKind::Auto => "auto",
            EngineKind::Portable => "portable",
            EngineKind::Apple => "apple",
        })
    }
}

/// One function of an opened model. Predictions may run at once on several threads.
pub(crate) trait Engine: Send + Sync {
    /// `Portable` or `Apple`.
    fn kind(&self) -> EngineKind;

    /// The whole model's interface and metadata.
    fn description(&self) -> &Description;

    /// The interface of the function this engine runs.
    fn function(&self) -> &FunctionDescription;

    /// The same model ready to run another function; weights are shared where the engine can.
    fn with_function(&self, name: &str) -> Result<Arc<dyn Engine>, Error>;

    /// Buffers for the function's states, zero.
    fn make_state(&self) -> Result<Box<dyn EngineState>, Error>;

    /// Runs the function. `state` is present exactly when the function declares states, and was made by an engine of
    /// the same kind for the same declarations. Gives the outputs in the declared order; tensors are on the CPU.
    fn predict(
        &self,
        inputs: &[Input<'_>],
        state: Option<&mut dyn EngineState>,
    ) -> Result<Vec<(String, Value)>, Error>;

    /// Runs the function, which has no states, on each set of inputs.
    fn predict_batch(&self, batch: &[Vec<Input<'_>>]) -> Result<Vec<Vec<(String, Value)>>, Error> {
        batch.iter().map(|inputs| self.predict(inputs, None)).collect()
    }

    /// As [`Engine::predict`], showing every value of the program on the way.
    fn trace(
        &self,
        _inputs: &[Input<'_>],
        _state: Option<&mut dyn EngineState>,
        _see: &mut dyn FnMut(TracedStep),
    ) -> Result<Vec<(String, Value)>, Error> {
        Err(shows_nothing(self.kind()))
    }

    /// The plan that runs for the default shapes, as text: steps, merged operations, memory, arithmetic.
    fn explain(&self) -> Result<String, Error> {
        Err(shows_nothing(self.kind()))
    }
}

fn shows_nothing(engine: EngineKind) -> Error {
    Error::EngineUnavailable {
        engine,
        reason: "it does not show what it computes; the portable engine does".to_string(),
    }
}

/// The buffers of one state. Not `Sync`: Core ML allows one call at a time, reading included.
pub(crate) trait EngineState: Send {
    /// A copy of the buffer `name`, on the CPU.
    fn read(&self, name: &str) -> Result<Tensor, Error>;

    /// Replaces the buffer `name`; shape and dtype are those declared.
    fn write(&mut self, name: &str, array: Array<'_>) -> Result<(), Error>;

    /// Sets every buffer to zero.
    fn reset(&mut self) -> Result<(), Error>;

    /// An independent copy.
    fn fork(&self) -> Result<Box<dyn EngineState>, Error>;

    /// For the engine that made it to recognise it by.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// One input of a prediction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a> {
    /// The declared name.
    pub name: &'a str,
    /// What was given for it.
    pub value: InputValue<'a>,
}

/// What was given for an input.
#[derive(Debug, Clone, Copy)]
pub(crate) enum InputValue<'a> {
    /// For multi-arrays.
    Array(Array<'a>),
    /// For every other kind of feature; of the declared kind, never [`Value::Tensor`].
    Value(&'a Value),
}

/// Elements in row-major order without gaps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Array<'a> {
    /// Outermost dimension first.
    pub shape: &'a [usize],
    /// As many elements as the shape has, of the declared dtype.
    pub data: Data<'a>,
    /// The tensor whose memory this is; none for converted elements.
    #[cfg_attr(not(any(target_vendor = "apple", feature = "gnustep")), allow(dead_code))]
    pub tensor: Option<&'a Tensor>,
}

/// Elements of the dtypes multi-arrays have.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub(crate) enum Data<'a> {
    F16(&'a [f16]),
    F32(&'a [f32]),
    F64(&'a [f64]),
    I32(&'a [i32]),
    I8(&'a [i8]),
}

/// Opens a model with the engine asked for.
pub(crate) fn open(origin: &Origin, options: &Options) -> Result<Arc<dyn Engine>, Error> {
    choose(
        options.engine,
        || open_apple(origin, options),
        || open_portable(origin, options),
    )
}

#[cfg(any(target_vendor = "apple", feature = "gnustep"))]
use apple::open as open_apple;

#[cfg(not(any(target_vendor = "apple", feature = "gnustep")))]
fn open_apple(_origin: &Origin, _options: &Options) -> Result<Arc<dyn Engine>, Error> {
    Err(not_apple())
}

/// Why the Apple engine is not there.
#[cfg(not(any(target_vendor = "apple", feature = "gnustep")))]
fn not_apple() -> Error {
    Error::EngineUnavailable {
        engine: EngineKind::Apple,
        reason: "CoreML.framework exists on Apple systems only; the portable engine runs here".to_string(),
    }
}

/// The processors that CoreML.framework can use.
pub(crate) fn compute_devices() -> Result<Vec<ComputeDevice>, Error> {
    #[cfg(any(target_vendor = "apple", feature = "gnustep"))]
    return apple::devices();
    #[cfg(not(any(target_vendor = "apple", feature = "gnustep")))]
    Err(not_apple())
}

/// CoreML.framework's plan of what runs where.
pub(crate) fn compute_plan(_origin: &Origin, _options: &Options) -> Result<ComputePlan, Error> {
    #[cfg(any(target_vendor = "apple", feature = "gnustep"))]
    return apple::plan(_origin, _options);
    #[cfg(not(any(target_vendor = "apple", feature = "gnustep")))]
    Err(not_apple())
}

fn open_portable(origin: &Origin, options: &Options) -> Result<Arc<dyn Engine>, Error> {
    portable::open(Arc::new(origin.open()?), options)
}

impl Origin {
    /// Reads the model's description and program.
    fn open(&self) -> Result<Model, Error> {
        let opened = match self {
            Origin::Path(path) => Model::open(path),
            Origin::Memory { source, root } => Model::open_source(source.clone(), root),
        };
        opened.map_err(|source| Error::Open { source })
    }
}

/// The rule by which an engine is taken. The two ways to open are given, so that the rule is the same on every system.
fn choose<T>(
    kind: EngineKind,
    apple: impl FnOnce() -> Result<T, Error>,
    portable: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    match kind {
        EngineKind::Portable => portable(),
        EngineKind::Apple => apple(),
        EngineKind::Auto => match apple() {
            Ok(model) => Ok(model),
            Err(Error::EngineUnavailable { .. }) => portable(),
            Err(refusal) => {
                tracing::warn!(%refusal, "CoreML.framework does not open the model; the portable engine does");
                portable().map_err(|error| Error::NoEngine {
                    apple: Box::new(refusal),
                    portable: Box::new(error),
                })
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn absent() -> Result<&'static str, Error> {
        Err(Error::EngineUnavailable {
            engine: EngineKind::Apple,
            reason: "not an Apple system".into(),
        })
    }

    fn refused() -> Result<&'static str, Error> {
        Err(Error::Engine {
            engine: EngineKind::Apple,
            source: "refused".into(),
        })
    }

    #[test]
    fn auto_takes_apple_when_it_opens_the_model_and_portable_otherwise() {
        use EngineKind::*;
        type Open = fn() -> Result<&'static str, Error>;
        let works: Open = || Ok("apple");
        let rows: [(EngineKind, Open, Option<&str>); 7] = [
            (Auto, works, Some("apple")),
            (Auto, absent, Some("portable")),
            (Auto, refused, Some("portable")),
            (Apple, works, Some("apple")),
            (Apple, absent, None),
            (Apple, refused, None),
            (Portable, works, Some("portable")),
        ];
        for (kind, apple, wanted) in rows {
            assert_eq!(choose(kind, apple, || Ok("portable")).ok(), wanted, "{kind}");
        }
    }

    #[test]
    fn when_no_engine_opens_the_model_both_refusals_are_said() {
        let words = choose(EngineKind::Auto, refused, || {
            Err(Error::Engine {
                engine: EngineKind::Portable,
                source: "no such op".into(),
            })
        })
        .unwrap_err()
        .to_string();
        assert!(
            words.contains("refused") && words.contains("no such op"),
            "{words}"
        );
    }
}
