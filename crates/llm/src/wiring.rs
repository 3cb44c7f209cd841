//! How a bundle's packages are wired into one model, for people to read.

use candle_coreml_mil::{Feature, FunctionDescription};
use serde::Serialize;

use crate::part::interface::array;

/// What [`Bundle::wiring`](crate::Bundle::wiring) finds: every call that is made, what feeds it, and what follows for prefill.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Wiring {
    /// Name of the layout: `anemll`, `anemll-monolithic`, `model-config`, `stateful-package`, `stateless-package`.
    pub layout: String,
    /// Most tokens a conversation may have.
    pub context_tokens: usize,
    /// What bounds them.
    pub context_bound_by: String,
    /// Number of token ids.
    pub vocabulary: usize,
    /// False where the model chooses the best token itself.
    pub gives_logits: bool,
    /// Most tokens prefill computes with one call; 1 where tokens go one by one, none where nothing is kept between calls.
    pub batch_tokens: Option<usize>,
    /// Tokens that functions for batches of other sizes compute with one call; they are opened when a prompt wants them.
    pub further_batches: Vec<usize>,
    /// Why tokens are not prefilled in batches, where they are not.
    pub no_batches_because: Option<String>,
    /// Tokens that local layers see, where rotation functions move them on.
    pub sliding_window: Option<usize>,
    /// The calls in the order they are made.
    pub calls: Vec<WiredCall>,
    /// The states, each made once for a conversation.
    pub states: Vec<WiredState>,
}

/// One function of one package and when it runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct WiredCall {
    /// `every call`, `prefill`, `decode`, `prefill past the window`, `decode past the window`.
    pub when: String,
    /// The package.
    pub file: String,
    /// Its function.
    pub function: String,
    /// Inputs and where they come from.
    pub inputs: Vec<WiredPort>,
    /// Outputs and where they go.
    pub outputs: Vec<WiredPort>,
    /// Which of the states it works on.
    pub state: Option<usize>,
}

/// One input or output.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct WiredPort {
    /// Its name in the package.
    pub name: String,
    /// Element type; empty where the description does not say.
    pub dtype: String,
    /// Shape as described; empty where the description does not say.
    pub shape: Vec<usize>,
    /// For an input what feeds it, for an output what takes it.
    pub flow: String,
}

/// One state.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct WiredState {
    /// The package that makes it.
    pub made_by: String,
    /// Its buffers.
    pub buffers: Vec<WiredPort>,
}

impl WiredPort {
    pub(crate) fn new(feature: &Feature, flow: impl Into<String>) -> Self {
        let described = array(feature).ok();
        WiredPort {
            name: feature.name.clone(),
            dtype: described.map(|a| a.dtype.name().to_owned()).unwrap_or_default(),
            shape: described.map(|a| a.shape.clone()).unwrap_or_default(),
            flow: flow.into(),
        }
    }
}

impl WiredState {
    pub(crate) fn new(made_by: &str, function: &FunctionDescription) -> Self {
        let buffer = |state: &Feature| WiredPort::new(state, "kept between calls");
        WiredState {
            made_by: made_by.to_owned(),
            buffers: function.states.iter().map(buffer).collect(),
        }
    }
}
