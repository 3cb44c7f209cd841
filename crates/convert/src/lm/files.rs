//! The files around the packages: what is read beside the tensors, `meta.yaml`, tokenizer and configuration.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::anemll::{Names, head_parts};
use super::{LanguageModelOptions, Layout};
use crate::compress::Compression;
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::weights::Checkpoint;

/// Files a tokenizer and a chat need, copied as they are where they exist.
const COPIED: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// A checkpoint with its configuration.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) config: DecoderConfig,
    path: PathBuf,
    /// Files rebuilt from the header of a GGUF file, by name.
    made: Vec<(&'static str, String)>,
}

impl Input {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Self::open_gguf(path);
        }
        let file = path.join("config.json");
        let text = std::fs::read(&file).map_err(Error::io(&file))?;
        Ok(Input {
            config: DecoderConfig::parse(&file.display().to_string(), &text)?,
            checkpoint: Checkpoint::open(path)?,
            path: path.to_owned(),
            made: Vec::new(),
        })
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let file = Arc::new(GgufFile::open(path)?);
        let text = file.config()?;
        let config = DecoderConfig::parse(file.name(), text.as_bytes())?;
        let beside = path.with_file_name("tokenizer.json").exists();
        let mut made = vec![("config.json", text)];
        if !beside {
            made.extend(file.tokenizer_files()?);
        }
        Ok(Input {
            checkpoint: Checkpoint::from_gguf(&file)?,
            config,
            path: path.to_owned(),
            made,
        })
    }

    /// The content of `tokenizer.json`, in the folder or rebuilt.
    pub(crate) fn tokenizer(&self) -> Result<Vec<u8>> {
        const NAME: &str = "tokenizer.json";
        match self.made.iter().find(|(made, _)| *made == NAME) {
            Some((_, text)) => Ok(text.as_bytes().to_vec()),
            None => {
                let path = self.folder().join(NAME);
                std::fs::read(&path).map_err(Error::io(&path))
            }
        }
    }

    /// The folder whose files are copied.
    fn folder(&self) -> &Path {
        if self.path.is_dir() {
            &self.path
        } else {
            self.path.parent().unwrap_or(Path::new(""))
        }
    }

    fn name(&self) -> String {
        let whole = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        whole
            .file_stem()
            .map_or_else(|| "model".to_owned(), |n| n.to_string_lossy().into_owned())
    }
}

/// Writes everything but the packages.
pub(super) fn write(input: &Input, to: &Path, options: &LanguageModelOptions) -> Result<()> {
    for name in COPIED {
        let from = input.folder().join(name);
        if let Some((_, text)) = input.made.iter().find(|(made, _)| *made == name) {
            std::fs::write(to.join(name), text).map_err(Error::io(&to.join(name)))?;
        } else if from.exists() {
            std::fs::copy(&from, to.join(name)).map_err(Error::io(&from))?;
        }
    }
    if options.layout == Layout::Anemll {
        let name = if options.name.is_empty() {
            input.name()
        } else {
            options.name.clone()
        };
        let path = to.join("meta.yaml");
        std::fs::write(&path, meta(&input.config, options, &name)).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// The text of `meta.yaml`. Version 0.3.4 is the one whose prefill works as that of these packages.
fn meta(config: &DecoderConfig, o: &LanguageModelOptions, name: &str) -> String {
    let names = Names::new(config, o);
    let lut = |how: &Compression| {
        how.palette_bits()
            .map_or("none".to_owned(), |bits| bits.to_string())
    };
    let parts = head_parts(config, o);
    let quoted = serde_json::Value::from(name).to_string();
    let mut text = String::new();
    let _ = write!(
        text,
        "model_info:\n  name: {quoted}\n  version: 0.3.4\n  description: |\n    Converted by candle-coreml \
         to Core ML in the ANEMLL layout\n    Context length: {context}\n    Batch size: {batch}\n    Chunks: {chunks}\n  \
         framework: Core ML\n  language: Rust\n  architecture: {architecture}\n  parameters:\n    \
         context_length: {context}\n    batch_size: {batch}\n    lut_embeddings: {lut_e}\n    lut_ffn: {lut_f}\n    \
         lut_lmhead: {lut_h}\n    num_chunks: {chunks}\n    model_prefix: {prefix}\n    embeddings: {embeddings}\n    \
         lm_head: {head}\n    ffn: {ffn}\n    split_lm_head: {splits}\n    vocab_size: {vocabulary}\n",
        context = o.context,
        batch = o.batch,
        chunks = o.chunks,
        architecture = config.family.anemll_name(),
        lut_e = lut(&o.embeddings),
        lut_f = lut(&o.layers),
        lut_h = lut(&o.head),
        prefix = config.family.prefix(),
        embeddings = names.embeddings(),
        head = names.head(),
        ffn = names.chunk(0),
        splits = parts.len(),
        vocabulary = config.vocabulary,
    );
    let sizes: Vec<String> = parts.iter().map(|p| p.len().to_string()).collect();
    let _ = writeln!(text, "    lm_head_chunk_sizes: [{}]", sizes.join(", "));
    let _ = writeln!(text, "    argmax_in_model: {}", o.argmax);
    text
}
