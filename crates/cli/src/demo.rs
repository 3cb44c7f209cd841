//! The demo model this program carries, and how a bundle is chosen.

use std::path::Path;

use bytes::Bytes;
use candle_coreml_llm::{Bundle, Error, Files};

include!(concat!(env!("OUT_DIR"), "/demo_files.rs"));

/// The bundle at `path`, or the demo model.
pub fn bundle(path: Option<&Path>) -> Result<Bundle, Error> {
    match path {
        Some(path) => Bundle::open(path),
        None => Bundle::from_files(Files::memory("demo model", files())),
    }
}

fn files() -> impl Iterator<Item = (String, Bytes)> {
    FILES
        .iter()
        .map(|(name, contents)| ((*name).to_owned(), Bytes::from_static(contents)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_model_is_whole() {
        let bundle = bundle(None).unwrap();
        assert_eq!(bundle.context_tokens(), Some(512));
        assert!(bundle.template().is_ok() && !bundle.end_tokens().is_empty());
        assert!(FILES.iter().any(|(name, _)| *name == "MODEL_CARD.md"));
    }
}
