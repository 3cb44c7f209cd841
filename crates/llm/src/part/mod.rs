//! One package of a bundle, as the layouts see it.

mod coreml;
mod described;
pub(crate) mod head;
pub(crate) mod interface;

use candle_core::Tensor;
use candle_coreml_mil::FunctionDescription;

use crate::Error;
pub(crate) use coreml::{CoreMlPart, predict_time};
pub(crate) use described::Described;

/// An opened package at one of its functions. Core ML models are parts, and so are descriptions that are only looked at, and
/// the toy of the tests.
pub(crate) trait Part: Send + Sync + Sized + 'static {
    /// The buffers that persist between calls.
    type State: Send + 'static;

    /// The package's file name, for errors.
    fn name(&self) -> &str;

    /// Names of its functions.
    fn functions(&self) -> Vec<String>;

    /// What its author wrote down under `key`.
    fn written(&self, key: &str) -> Option<String>;

    /// The same package at another function; weights are shared.
    fn with_function(&self, function: &str) -> Result<Self, Error>;

    /// Whether another function may be opened in the middle of a conversation.
    fn opens_functions_fast(&self) -> bool {
        false
    }

    /// Inputs, outputs and states of the function it is at.
    fn interface(&self) -> &FunctionDescription;

    /// New buffers, all zero.
    fn make_state(&self) -> Result<Self::State, Error>;

    /// A copy of the buffers.
    fn fork_state(&self, state: &Self::State) -> Result<Self::State, Error>;

    /// The buffers by name, as the engine keeps them.
    fn snapshot_state(&self, state: &Self::State) -> Result<Vec<(String, Tensor)>, Error>;

    /// Replaces the buffers.
    fn restore_state(&self, state: &mut Self::State, buffers: &[(String, Tensor)]) -> Result<(), Error>;

    /// One prediction: all outputs by name.
    fn predict(
        &self,
        inputs: &[(&str, &Tensor)],
        state: Option<&mut Self::State>,
    ) -> Result<Vec<(String, Tensor)>, Error>;
}

/// The number a part's author wrote down under `key`.
pub(crate) fn number(part: &impl Part, key: &str) -> Option<usize> {
    part.written(key)?.trim().parse().ok()
}

/// A token id as packages take it.
pub(crate) fn to_id(token: u32) -> Result<i32, Error> {
    i32::try_from(token).map_err(|_| Error::TokenOutside {
        index: 0,
        token,
        vocabulary: i32::MAX as usize,
    })
}

/// The output `name` of a prediction of `part`.
pub(crate) fn take(part: &str, outputs: Vec<(String, Tensor)>, name: &str) -> Result<Tensor, Error> {
    outputs
        .into_iter()
        .find(|(n, _)| n == name)
        .map(|(_, tensor)| tensor)
        .ok_or_else(|| Error::Wiring {
            part: part.to_owned(),
            function: "outputs".to_owned(),
            what: format!("the output `{name}` did not come"),
        })
}
