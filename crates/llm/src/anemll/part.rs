//! One package of a bundle, as the adapter sees it.

use candle_core::Tensor;
use candle_coreml_mil::FunctionDescription;

use crate::Error;

/// An opened package at one of its functions. Two kinds exist: Core ML models, and the toy of the tests.
pub(crate) trait Part: Send + Sync + Sized + 'static {
    /// The buffers that persist between calls.
    type State: Send + 'static;

    /// The package's file name, for errors.
    fn name(&self) -> &str;

    /// Names of its functions.
    fn functions(&self) -> Vec<String>;

    /// The same package at another function; weights are shared.
    fn with_function(&self, function: &str) -> Result<Self, Error>;

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
