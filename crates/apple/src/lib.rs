//! CoreML.framework for candle-coreml, thin: the calls are in `framework`, every decision about them in the modules
//! beside it, which compile and are tested on every system.
//!
//! | module | decides |
//! |---|---|
//! | [`mod@array`], [`strided`] | element types, and how elements get into and out of buffers with gaps |
//! | [`cache`] | where a compiled model is kept, and when it may be used again |
//! | [`options`] | which settings a model is loaded with, and which system each of them needs |
//! | [`describe`] | the description of a model from what Core ML says about it |
//! | [`reuse`] | which arrays live from one prediction to the next |
//! | [`pixels`] | pictures as rows of BGRA with gaps |
//! | [`plan`] | what runs where, as data |

pub mod array;
pub mod cache;
pub mod describe;
mod error;
#[cfg(any(target_vendor = "apple", feature = "gnustep"))]
pub mod framework;
pub mod options;
pub mod pixels;
pub mod plan;
pub mod reuse;
pub mod strided;
mod value;

pub use array::{Array, ArrayRef, Buffer, Element, Owner};
pub use error::Error;
pub use options::{ComputeUnits, LoadOptions, OsVersion, ReshapeFrequency, Specialization};
pub use value::{OwnedValue, Picture, PixelFormat, Pixels, Value};
