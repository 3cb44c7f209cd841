//! What a prediction computes on its way: every intermediate value, and the plan that runs.

use candle_core::Tensor;
use candle_coreml_mil::DType as ElementType;
use std::time::Duration;

/// One operation of the program after it ran; [`CoreMLModel::trace`](crate::CoreMLModel::trace) shows them in order.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TracedStep {
    /// The operation's name in the file.
    pub name: String,
    /// What it did: `linear`, `softmax`, `reshape`. An operation that is computed in parts comes once for each.
    pub operation: &'static str,
    /// The time it took.
    pub elapsed: Duration,
    /// The types of the results in the file.
    pub dtypes: Vec<ElementType>,
    /// The results: `f32` for every floating-point type, `i32` for integers and truth values.
    pub values: Vec<Tensor>,
    /// Finite numbers among fp16 results that fp16 cannot hold. [`Numerics::Faithful`](crate::Numerics::Faithful) goes on
    /// with infinity in their place, as fp16 hardware does.
    pub overflows: usize,
}
