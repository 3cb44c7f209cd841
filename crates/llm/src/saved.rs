//! Conversations on disk: the tokens, what the model has computed of them, and which model that was.
//!
//! The format is safetensors: the state's buffers as the engine keeps them, and in the metadata `format`, `model` (a hash of
//! the packages), `tokens` and `cached` as JSON, and whatever the program adds.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;

use crate::Error;

const FORMAT: &str = "candle-coreml session 1";
/// Longest file that is read: 16 GiB, the largest caches there are with room to spare.
const MAX_BYTES: u64 = 1 << 34;

/// What a file says of a conversation.
pub(crate) struct Saved {
    pub tokens: Vec<u32>,
    pub cached: usize,
    pub buffers: Vec<(String, Tensor)>,
    pub extra: BTreeMap<String, String>,
}

impl Saved {
    /// Writes to another name first: a file of this name is whole.
    pub fn write(&self, path: &Path, model: &str) -> Result<(), Error> {
        let failed = |reason: String| Error::Session {
            file: path.display().to_string(),
            reason,
        };
        let mut metadata: HashMap<String, String> = self.extra.clone().into_iter().collect();
        metadata.insert("format".to_string(), FORMAT.to_string());
        metadata.insert("model".to_string(), model.to_string());
        metadata.insert("tokens".to_string(), serde_json::json!(self.tokens).to_string());
        metadata.insert("cached".to_string(), self.cached.to_string());
        let views = self.buffers.iter().map(|(name, tensor)| (name, tensor));
        let file = safetensors::serialize(views, Some(metadata)).map_err(|e| failed(e.to_string()))?;
        let mut partial = path.as_os_str().to_os_string();
        partial.push(".partial");
        std::fs::write(&partial, file)
            .and_then(|()| std::fs::rename(&partial, path))
            .map_err(|e| failed(e.to_string()))
    }

    /// Reads a file that belongs to `model`.
    pub fn read(path: &Path, model: &str) -> Result<Self, Error> {
        let failed = |reason: String| Error::Session {
            file: path.display().to_string(),
            reason,
        };
        let length = std::fs::metadata(path).map_err(|e| failed(e.to_string()))?.len();
        if length > MAX_BYTES {
            return Err(failed(format!("{length} bytes; allowed: {MAX_BYTES}")));
        }
        let file = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&file).map_err(|e| failed(e.to_string()))?;
        let mut extra: BTreeMap<String, String> = header
            .metadata()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect();
        let mut take = |key: &str| {
            let found = extra.remove(key);
            found.ok_or_else(|| failed(format!("no {key:?}: not a conversation")))
        };
        let format = take("format")?;
        if format != FORMAT {
            return Err(failed(format!("the format is {format:?}; allowed: {FORMAT:?}")));
        }
        let found = take("model")?;
        if found != model {
            let reason = format!("it belongs to the model {found:.16}, this one is {model:.16}");
            return Err(failed(reason));
        }
        let tokens: Vec<u32> = serde_json::from_str(&take("tokens")?).map_err(|e| failed(e.to_string()))?;
        let cached: usize = take("cached")?
            .parse()
            .map_err(|_| failed("\"cached\" is no number".to_string()))?;
        if cached > tokens.len() {
            return Err(failed(format!(
                "{cached} of {} tokens are computed",
                tokens.len()
            )));
        }
        let tensors = SafeTensors::deserialize(&file).map_err(|e| failed(e.to_string()))?;
        let buffers = tensors
            .iter()
            .map(|(name, view)| Ok((name.to_string(), view.load(&Device::Cpu)?)))
            .collect::<Result<_, candle_core::Error>>()?;
        Ok(Saved {
            tokens,
            cached,
            buffers,
            extra,
        })
    }
}
