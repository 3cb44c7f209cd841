//! Core ML files to [`Program`] and back.
//!
//! [`Model::open`] reads a package (`.mlpackage`), a specification (`.mlmodel`) or a compiled model (`.mlmodelc`) from disk
//! and [`Model::open_source`] from memory. [`parse_program`] and [`print_program`] convert MIL text. Nothing here knows
//! what an operator means.
//!
//! ```
//! let text = "program(1.0) { func main<ios16>(tensor<fp16, [2]> x) {
//!     tensor<fp16, [2]> y = mul(x = x, y = tensor<fp16, []>(0x1p+1)); } -> (y); }";
//! let program = candle_coreml_mil::parse_program(text, "example.mil")?;
//! program.check().unwrap();
//! assert_eq!(program.functions[0].opset, "CoreML6");
//! let printed = candle_coreml_mil::print_program(&program);
//! assert_eq!(candle_coreml_mil::parse_program(&printed, "printed")?, program);
//! # Ok::<(), candle_coreml_mil::Error>(())
//! ```

mod blob;
mod check;
mod compiled;
pub mod description;
mod element;
mod error;
mod model;
mod package;
pub mod program;
mod same;
mod source;
mod spec;
mod text;
mod wire;
mod write;

pub use check::ProgramError;
pub use description::*;
pub use error::{Error, Result};
pub use model::Model;
pub use program::*;
pub use same::{Difference, same_program};
pub use source::{Mapped, Source};
pub use text::{parse_program, print_program};
pub use write::PackageWriter;
