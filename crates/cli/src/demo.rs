//! The demo model this program carries, and how a bundle is chosen.

use std::path::Path;

use bytes::Bytes;
use candle_coreml_llm::{Bundle, Error, Files, LanguageModel, LoadOptions};

use crate::terminal;

/// What the model inside is called.
const DEMO: &str = "demo model";

include!(concat!(env!("OUT_DIR"), "/demo_files.rs"));

/// The bundle at `path`, or the demo model, and its packages, opened at once behind a spinner.
pub fn model(path: Option<&Path>, options: &LoadOptions) -> Result<(Bundle, Box<dyn LanguageModel>), Error> {
    let name = path.and_then(Path::file_name).unwrap_or(DEMO.as_ref());
    let spinner = terminal::spinner(format!("opening {}", name.display()));
    let opened = match path {
        Some(path) => Bundle::open_model(path, options),
        None => Bundle::model_from_files(Files::memory(DEMO, files()), options),
    };
    spinner.finish_and_clear();
    opened
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
        let (bundle, _) = model(None, &LoadOptions::default()).unwrap();
        assert_eq!(bundle.context_tokens(), Some(512));
        assert!(bundle.template().is_ok() && !bundle.end_tokens().is_empty());
        assert!(FILES.iter().any(|(name, _)| *name == "MODEL_CARD.md"));
    }
}
