//! `ModelConfig`: the JSON by which candle-coreml 0.3 was told what the files of a model are.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::files::Files;
use super::parts::{ChunkFiles, PartFiles, find_named};
use crate::Error;

/// JSON files of other purposes, some of them large.
const OTHERS: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "golden.json",
    "model.safetensors.index.json",
];

/// Configurations have a few kilobytes; what is larger is something else.
const LARGEST_BYTES: usize = 4 << 20;

/// What a `ModelConfig` says: which file is which part, and what their inputs are called.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfiguredFiles {
    /// The JSON file.
    pub config: String,
    /// The files.
    pub parts: PartFiles,
    /// Tokens a conversation may have.
    pub context_tokens: Option<usize>,
    /// Number of token ids.
    pub vocabulary: Option<usize>,
    /// Names of inputs in the packages, with what they are by convention.
    pub inputs: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Written {
    #[serde(default)]
    shapes: Shapes,
    components: BTreeMap<String, Component>,
    #[serde(default)]
    ffn_execution: Option<String>,
}

#[derive(Default, Deserialize)]
struct Shapes {
    #[serde(default)]
    context_length: Option<usize>,
    #[serde(default)]
    vocab_size: Option<usize>,
}

#[derive(Deserialize)]
struct Component {
    #[serde(default)]
    file_path: Option<String>,
    #[serde(default)]
    inputs: BTreeMap<String, Tensor>,
}

#[derive(Deserialize)]
struct Tensor {
    #[serde(default)]
    name: Option<String>,
}

impl ConfiguredFiles {
    /// Finds the `ModelConfig` of a bundle; `None` where it has none.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for several of them, and as [`ConfiguredFiles::read`].
    pub(crate) fn find(files: &Files) -> Result<Option<Self>, Error> {
        let entries = files.entries()?;
        let candidates = entries
            .iter()
            .filter(|name| name.ends_with(".json") && !OTHERS.contains(&name.as_str()));
        let mut found = Vec::new();
        for name in candidates {
            let Some(bytes) = files.read(name)?.filter(|bytes| bytes.len() <= LARGEST_BYTES) else {
                continue;
            };
            // Files of other purposes may be anything, JSON that is not whole too.
            let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let components = value.get("components").and_then(serde_json::Value::as_object);
            if components.is_some_and(|all| all.values().any(|c| c.get("file_path").is_some())) {
                found.push(name.as_str());
            }
        }
        match found.as_slice() {
            [] => Ok(None),
            [name] => Self::read(files, name).map(Some),
            several => Err(Error::Unsupported {
                file: files.name(),
                what: format!(
                    "several model configurations ({}); open the one you mean",
                    several.join(", ")
                ),
            }),
        }
    }

    /// Reads the `ModelConfig` called `name`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for JSON that is none, [`Error::MissingPart`] for files that are not there.
    pub(crate) fn read(files: &Files, name: &str) -> Result<Self, Error> {
        let malformed = |reason: String| Error::Malformed {
            file: files.full_name(name),
            reason,
        };
        let bytes = files.read(name)?.ok_or_else(|| Error::MissingFile {
            bundle: files.name(),
            file: name.to_owned(),
            purpose: "which file is which part",
        })?;
        let written: Written = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
        let path = |key: &str| written.components.get(key).and_then(|c| c.file_path.as_deref());
        let needed = |key: &str| {
            let path =
                path(key).ok_or_else(|| malformed(format!("`components.{key}.file_path` is missing")))?;
            find_named(files, key, path)
        };
        let embeddings = needed("embeddings")?;
        let prefill = needed("ffn_prefill")?;
        let infer = match path("ffn_infer") {
            Some(path) => find_named(files, "ffn_infer", path)?,
            None => prefill.clone(),
        };
        match written.ffn_execution.as_deref() {
            None | Some("unified" | "split") => {}
            Some(other) => {
                return Err(malformed(format!(
                    "`ffn_execution` is `{other}`, allowed: unified, split"
                )));
            }
        }
        if written.ffn_execution.as_deref() == Some("split") && infer == prefill {
            let what = "`ffn_execution` is split, and `ffn_prefill` and `ffn_infer` are one file".to_owned();
            return Err(malformed(what));
        }
        let chunk = match infer == prefill {
            true => ChunkFiles::one(infer),
            false => ChunkFiles {
                infer,
                prefill: Some(prefill),
                rotated: None,
            },
        };
        let inputs = written
            .components
            .values()
            .flat_map(|component| &component.inputs);
        let inputs = inputs
            .filter_map(|(key, tensor)| Some((tensor.name.clone()?, key.clone())))
            .filter(|(name, key)| name != key);
        Ok(ConfiguredFiles {
            config: name.to_owned(),
            inputs: inputs.collect(),
            context_tokens: written.shapes.context_length.filter(|&n| n > 0),
            vocabulary: written.shapes.vocab_size.filter(|&n| n > 0),
            parts: PartFiles {
                embeddings,
                chunks: vec![chunk],
                head: needed("lm_head")?,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const PACKAGES: [&str; 4] = ["e", "p", "i", "h"];

    fn read(json: &str) -> Result<Option<ConfiguredFiles>, Error> {
        let packages = PACKAGES.map(|p| (format!("{p}.mlpackage/Manifest.json"), Bytes::new()));
        let config = ("x.json".to_owned(), Bytes::copy_from_slice(json.as_bytes()));
        ConfiguredFiles::find(&Files::memory("b", packages.into_iter().chain([config])))
    }

    fn config(components: &str, more: &str) -> String {
        format!("{{\"components\": {{{components}}}{more}}}")
    }

    const ALL: &str = r#""embeddings": {"file_path": "/elsewhere/e.mlmodelc", "inputs": {}},
        "ffn_prefill": {"file_path": "p.mlpackage", "inputs": {"causal_mask": {"name": "m", "shape": [1]}}},
        "lm_head": {"file_path": "./h"}"#;

    #[test]
    fn files_are_found_by_place_or_name() {
        let found = read(&config(
            ALL,
            r#", "shapes": {"context_length": 64, "vocab_size": 9}"#,
        ))
        .unwrap()
        .unwrap();
        let packages: Vec<_> = found.parts.packages().collect();
        assert_eq!(packages, ["e.mlpackage", "p.mlpackage", "h.mlpackage"]);
        assert_eq!((found.context_tokens, found.vocabulary), (Some(64), Some(9)));
        assert_eq!(found.inputs.get("m").map(String::as_str), Some("causal_mask"));
        let split = config(
            &format!(r#"{ALL}, "ffn_infer": {{"file_path": "i.mlpackage"}}"#),
            "",
        );
        let chunk = &read(&split).unwrap().unwrap().parts.chunks[0];
        assert_eq!(
            (chunk.infer.as_str(), chunk.prefill.as_deref()),
            ("i.mlpackage", Some("p.mlpackage"))
        );
        assert_eq!(read("{}").unwrap(), None);
        assert_eq!(read("not json").unwrap(), None);
    }

    #[test]
    fn what_does_not_hold_is_said() {
        for (json, expected) in [
            (
                config(r#""embeddings": {"file_path": "e"}"#, ""),
                "`components.ffn_prefill.file_path` is missing",
            ),
            (
                config(&ALL.replace("./h", "../h2"), ""),
                "the lm_head is missing; looked for `h2`",
            ),
            (
                config(ALL, r#", "ffn_execution": "twice""#),
                "`ffn_execution` is `twice`, allowed: unified, split",
            ),
            (config(ALL, r#", "ffn_execution": "split""#), "are one file"),
            (config(ALL, r#", "shapes": {"vocab_size": -1}"#), "b/x.json: "),
        ] {
            let error = read(&json).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
