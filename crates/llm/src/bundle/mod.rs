//! Bundles: the files that make one language model.

mod config;
mod files;
mod meta;
mod parts;

pub use config::Configs;
pub use files::Files;
pub use meta::Meta;
pub use parts::PartFiles;
