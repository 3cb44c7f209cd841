//! The JSON files beside a model: sizes, end tokens, suggested sampling, special tokens and the chat template.

use serde_json::Value;

use super::files::Files;
use crate::Error;

/// `config.json`, `generation_config.json`, `tokenizer_config.json` and `chat_template.jinja`, as far as a
/// language-model loop needs them. Every one of them may be absent.
#[derive(Debug, Clone, Default)]
pub struct Configs {
    model: Value,
    generation: Value,
    tokenizer: Value,
    template_file: Option<String>,
}

impl Configs {
    pub(crate) fn read(files: &Files) -> Result<Self, Error> {
        let template_file = match files.read("chat_template.jinja")? {
            None => None,
            Some(bytes) => Some(String::from_utf8(bytes.to_vec()).map_err(|e| Error::Malformed {
                file: files.full_name("chat_template.jinja"),
                reason: e.to_string(),
            })?),
        };
        Ok(Configs {
            model: files.json("config.json")?,
            generation: files.json("generation_config.json")?,
            tokenizer: files.json("tokenizer_config.json")?,
            template_file,
        })
    }

    /// A whole number of `config.json`, looked up in `text_config` too, where multimodal models keep it.
    pub fn number(&self, key: &str) -> Option<usize> {
        let found = self.model.get(key).filter(|v| !v.is_null());
        let found = found.or_else(|| self.model.get("text_config")?.get(key));
        usize::try_from(found?.as_u64()?).ok()
    }

    /// End tokens by id, from `generation_config.json` and `config.json`.
    pub fn end_token_ids(&self) -> Vec<u32> {
        let nested = self.model.get("text_config").and_then(|c| c.get("eos_token_id"));
        let sources = [
            self.generation.get("eos_token_id"),
            self.model.get("eos_token_id"),
            nested,
        ];
        sources.into_iter().flatten().flat_map(ids).collect()
    }

    /// A special token of `tokenizer_config.json` by its key (`bos_token`, `eos_token`), which is a string or an
    /// object with `content`.
    pub fn special_token(&self, key: &str) -> Option<&str> {
        let value = self.tokenizer.get(key)?;
        value.as_str().or_else(|| value.get("content")?.as_str())
    }

    /// The chat template: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`, of several the one
    /// named `default`.
    pub fn chat_template(&self) -> Option<&str> {
        if let Some(text) = &self.template_file {
            return Some(text);
        }
        match self.tokenizer.get("chat_template")? {
            Value::String(text) => Some(text),
            Value::Array(named) => {
                let is_default = |v: &&Value| v.get("name").and_then(Value::as_str) == Some("default");
                named
                    .iter()
                    .find(is_default)
                    .or(named.first())?
                    .get("template")?
                    .as_str()
            }
            _ => None,
        }
    }

    /// A number of `generation_config.json`: `temperature`, `top_p`, `top_k`, `min_p`.
    pub fn suggested(&self, key: &str) -> Option<f64> {
        self.generation.get(key)?.as_f64()
    }
}

fn ids(value: &Value) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(items) => items.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn configs(files: &[(&str, &str)]) -> Result<Configs, Error> {
        let own = |&(n, t): &(&str, &str)| (n.to_owned(), Bytes::copy_from_slice(t.as_bytes()));
        Configs::read(&Files::memory("b", files.iter().map(own)))
    }

    #[test]
    fn end_tokens_come_from_every_file_that_names_them() {
        for (files, expected) in [
            (vec![], vec![]),
            (vec![("config.json", r#"{"eos_token_id": 2}"#)], vec![2]),
            (vec![("config.json", r#"{"eos_token_id": null}"#)], vec![]),
            (
                vec![
                    ("generation_config.json", r#"{"eos_token_id": [1, 106]}"#),
                    ("config.json", r#"{"text_config": {"eos_token_id": 7}}"#),
                ],
                vec![1, 106, 7],
            ),
        ] {
            assert_eq!(configs(&files).unwrap().end_token_ids(), expected, "{files:?}");
        }
    }

    #[test]
    fn templates_and_special_tokens_are_found_in_each_spelling() {
        let named = r#"{"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}],
                        "eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": null}"#;
        let found = configs(&[("tokenizer_config.json", named)]).unwrap();
        assert_eq!(found.chat_template(), Some("D"));
        assert_eq!(found.special_token("eos_token"), Some("</s>"));
        assert_eq!(found.special_token("bos_token"), Some("<s>"));
        assert_eq!(found.special_token("pad_token"), None);
        let file = configs(&[("tokenizer_config.json", named), ("chat_template.jinja", "J")]).unwrap();
        assert_eq!(file.chat_template(), Some("J"));
        assert_eq!(configs(&[]).unwrap().chat_template(), None);
    }

    #[test]
    fn broken_json_names_its_file() {
        let error = configs(&[("config.json", "{")]).unwrap_err().to_string();
        assert!(error.starts_with("b/config.json: "), "{error}");
    }
}
