//! The portable engine: runs ML Programs in pure Rust on any machine.
//!
//! `Program` -> [`lower`] -> [`Graph`] -> [`passes`] -> [`plan::Plan`] -> run. [`Model`] does all of it for the input shapes
//! it meets and keeps the plans. Programs whose shapes or path depend on values run in stages: what can be
//! planned is, up to the operation that needs a value, and the rest when the value is there.

mod array;
pub mod constant;
mod error;
mod explain;
pub mod graph;
pub mod item;
pub mod layout;
pub mod lower;
mod model;
pub mod op;
pub mod ops;
pub mod passes;
pub mod plan;
mod recent;
pub mod run;
mod staged;
mod state;

pub use array::{Array, Buffer, Data, Label, OwnedArray};
pub use error::{Error, OpError, OpResult};
pub use explain::{Explanation, MissReport, StepReport};
pub use graph::Graph;
pub use lower::missing_ops_of as missing_ops;
pub use model::{Model, Numerics, Options};
pub use run::{Done, Observer};
pub use state::State;
