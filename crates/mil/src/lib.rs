//! Core ML files to [`Program`] and back.

pub mod description;
pub mod program;

pub use description::*;
pub use program::*;
