//! `meta.yaml`: what the converter wrote down about a bundle.

use serde_json::{Map, Value};

use crate::Error;

/// The `model_info` of a `meta.yaml`. Values are kept as written, because converters write numbers, words and
/// lists into the same keys.
#[derive(Debug, Clone, Default)]
pub struct Meta {
    info: Map<String, Value>,
    parameters: Map<String, Value>,
}

impl Meta {
    /// Reads the text of a `meta.yaml`; `file` is used in errors.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it is not YAML or has no `model_info` mapping.
    pub fn parse(file: &str, text: &[u8]) -> Result<Self, Error> {
        let malformed = |reason: String| Error::Malformed {
            file: file.to_owned(),
            reason,
        };
        let root: Value = serde_saphyr::from_slice(text).map_err(|e| malformed(e.to_string()))?;
        let info = root.get("model_info").and_then(Value::as_object);
        let info = info
            .ok_or_else(|| malformed("no mapping `model_info`".to_owned()))?
            .clone();
        let parameters = match info.get("parameters") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(parameters)) => parameters.clone(),
            Some(_) => return Err(malformed("`model_info.parameters` is not a mapping".to_owned())),
        };
        Ok(Meta { info, parameters })
    }

    /// The model's name.
    pub fn name(&self) -> Option<String> {
        text(self.info.get("name"))
    }

    /// The converter's version as numbers: `0.3.4` is `[0, 3, 4]`.
    pub fn version(&self) -> Option<[u32; 3]> {
        let version = text(self.info.get("version"))?;
        let mut parts = version.trim_start_matches('v').split('.').map(leading_number);
        Some([
            parts.next()??,
            parts.next().flatten().unwrap_or(0),
            parts.next().flatten().unwrap_or(0),
        ])
    }

    /// The architecture, for people to read: `qwen3`, `llama`.
    pub fn architecture(&self) -> Option<String> {
        text(self.info.get("architecture"))
    }

    /// `monolithic` for bundles of one file.
    pub fn model_type(&self) -> Option<String> {
        text(self.info.get("model_type")).or_else(|| self.word("model_type"))
    }

    /// A parameter as text; `None` when it is absent or says `none`.
    pub fn word(&self, key: &str) -> Option<String> {
        text(self.parameters.get(key)).filter(|word| !word.is_empty() && !word.eq_ignore_ascii_case("none"))
    }

    /// A parameter as a number.
    pub fn number(&self, key: &str) -> Option<usize> {
        self.word(key)?.parse().ok()
    }

    /// A yes-or-no parameter; absent is `false`.
    pub fn flag(&self, key: &str) -> bool {
        match self.parameters.get(key) {
            Some(Value::Bool(set)) => *set,
            other => text(other).is_some_and(|word| matches!(word.as_str(), "1" | "yes" | "True" | "true")),
        }
    }

    /// A parameter as a list of numbers, written as a list or with commas.
    pub fn numbers(&self, key: &str) -> Option<Vec<usize>> {
        match self.parameters.get(key)? {
            Value::Array(items) => items.iter().map(|v| text(Some(v))?.parse().ok()).collect(),
            other => text(Some(other))?
                .split(',')
                .map(|n| n.trim().parse().ok())
                .collect(),
        }
    }

    /// Bits of a lookup table: `6` and `6,4` (with the group size) are both 6.
    pub fn lut_bits(&self, key: &str) -> Option<u32> {
        leading_number(&self.word(key)?)
    }
}

fn text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.trim().to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(set) => Some(set.to_string()),
        _ => None,
    }
}

fn leading_number(text: &str) -> Option<u32> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(parameters: &str) -> Meta {
        let text = format!("model_info:\n  name: x\n  version: 0.3.4\n  parameters:\n{parameters}");
        Meta::parse("meta.yaml", text.as_bytes()).unwrap()
    }

    #[test]
    fn values_are_read_however_they_are_written() {
        let meta = meta(
            "    context_length: 512\n    num_chunks: '2'\n    lut_ffn: '6,4'\n    lut_lmhead: none\n    \
             lut_embeddings: 8\n    update_mask_prefill: true\n    single_cache: false\n    \
             lm_head_chunk_sizes: [3, 4]\n    odd_sizes: 1, 2\n",
        );
        assert_eq!(meta.version(), Some([0, 3, 4]));
        assert_eq!(
            (meta.number("context_length"), meta.number("num_chunks")),
            (Some(512), Some(2))
        );
        assert_eq!(
            (
                meta.lut_bits("lut_ffn"),
                meta.lut_bits("lut_lmhead"),
                meta.lut_bits("lut_embeddings")
            ),
            (Some(6), None, Some(8))
        );
        assert!(meta.flag("update_mask_prefill") && !meta.flag("single_cache") && !meta.flag("absent"));
        assert_eq!(meta.numbers("lm_head_chunk_sizes"), Some(vec![3, 4]));
        assert_eq!(meta.numbers("odd_sizes"), Some(vec![1, 2]));
    }

    #[test]
    fn versions_of_every_spelling_compare() {
        for (version, expected) in [
            ("0.3.4", Some([0, 3, 4])),
            ("v0.3.5-beta", Some([0, 3, 5])),
            ("1.0", Some([1, 0, 0])),
            ("2", Some([2, 0, 0])),
            ("next", None),
        ] {
            let text = format!("model_info:\n  version: {version}\n");
            assert_eq!(
                Meta::parse("m", text.as_bytes()).unwrap().version(),
                expected,
                "{version}"
            );
        }
    }

    #[test]
    fn a_file_that_is_not_a_meta_file_is_refused_by_name() {
        for text in [
            "",
            "- 1\n",
            "model_info: 3\n",
            "model_info:\n  parameters: [1]\n",
            "a: [",
            "\u{0}",
        ] {
            let error = Meta::parse("b/meta.yaml", text.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("b/meta.yaml: "), "{text:?}: {error}");
        }
    }
}
