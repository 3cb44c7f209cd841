//! What the files beside an encoder's package say: pooling, normalisation, lengths, prompts.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::Value;

use super::EmbeddingOptions;
use super::outputs::poolings;
use super::pooling::Pooling;
use crate::bundle::Files;
use crate::{Error, Tokenizer};

/// Tokens of a text where neither the package nor a file bounds them: positions of BERT.
const USUAL_TOKENS: usize = 512;

#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    config: Value,
    tokenizer: Value,
    pooling: Value,
    pooling_file: String,
    sentence: Value,
    prompts: BTreeMap<String, String>,
    default_prompt: String,
    /// Types of `modules.json`, `None` where there is no such file.
    modules: Option<Vec<String>>,
    modules_file: String,
    normalize: bool,
}

impl Settings {
    pub(super) fn read(files: &Files) -> Result<Self, Error> {
        let modules = match files.json("modules.json")? {
            Value::Array(modules) => Some(modules),
            _ => None,
        };
        let named = |module: &Value, key: &str| module.get(key)?.as_str().map(str::to_owned);
        let kind = |module: &Value| {
            let name = named(module, "type")?;
            Some(name.rsplit('.').next().unwrap_or(&name).to_owned())
        };
        let listed = modules.iter().flatten();
        let folder = listed
            .filter(|module| kind(module).as_deref() == Some("Pooling"))
            .find_map(|module| named(module, "path"));
        let pooling_file = format!("{}/config.json", folder.as_deref().unwrap_or("1_Pooling"));
        let more = files.json("config_sentence_transformers.json")?;
        let prompts: BTreeMap<String, String> = match more.get("prompts") {
            Some(Value::Object(prompts)) => prompts
                .iter()
                .filter_map(|(kind, text)| Some((kind.clone(), text.as_str()?.to_owned())))
                .collect(),
            _ => BTreeMap::new(),
        };
        let default = more.get("default_prompt_name").and_then(Value::as_str);
        let modules: Option<Vec<String>> = modules.map(|m| m.iter().filter_map(kind).collect());
        Ok(Settings {
            config: files.json("config.json")?,
            tokenizer: files.json("tokenizer_config.json")?,
            pooling: files.json(&pooling_file)?,
            pooling_file: files.full_name(&pooling_file),
            sentence: files.json("sentence_bert_config.json")?,
            default_prompt: default
                .and_then(|kind| prompts.get(kind))
                .cloned()
                .unwrap_or_default(),
            prompts,
            normalize: modules
                .as_ref()
                .is_none_or(|m| m.iter().any(|kind| kind == "Normalize")),
            modules,
            modules_file: files.full_name("modules.json"),
        })
    }

    /// These settings with what the options say otherwise.
    pub(super) fn with(mut self, options: &EmbeddingOptions) -> Self {
        self.normalize = options.normalize.unwrap_or(self.normalize);
        self
    }

    pub(super) fn name(&self, files: &Files) -> String {
        let folder = files.path().and_then(|p| p.canonicalize().ok());
        let name = folder.and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        name.unwrap_or_else(|| files.name())
    }

    pub(super) fn normalize(&self) -> bool {
        self.normalize
    }

    /// The pooling of the pooling file, `None` where there is none.
    pub(super) fn pooling(&self) -> Result<Option<Pooling>, Error> {
        const KEYS: [(&str, Pooling); 6] = [
            ("pooling_mode_cls_token", Pooling::Cls),
            ("pooling_mode_mean_tokens", Pooling::Mean),
            ("pooling_mode_max_tokens", Pooling::Max),
            ("pooling_mode_mean_sqrt_len_tokens", Pooling::MeanSqrtLength),
            ("pooling_mode_weightedmean_tokens", Pooling::WeightedMean),
            ("pooling_mode_lasttoken", Pooling::Last),
        ];
        let Value::Object(said) = &self.pooling else {
            return Ok(None);
        };
        // Newer files have one word, older ones a flag for each.
        if let Some(word) = said.get("pooling_mode").and_then(Value::as_str) {
            let found = match word {
                "lasttoken" => Some(Pooling::Last),
                "mean_sqrt_len_tokens" => Some(Pooling::MeanSqrtLength),
                "weightedmean" => Some(Pooling::WeightedMean),
                word => word.parse().ok().filter(|&p| p != Pooling::Pooler),
            };
            return found
                .map(Some)
                .ok_or_else(|| self.unsupported(format!("pooling_mode {word:?}")));
        }
        let set = KEYS
            .into_iter()
            .filter(|(key, _)| said.get(*key).and_then(Value::as_bool) == Some(true));
        match set.collect::<Vec<_>>().as_slice() {
            [(_, one)] => Ok(Some(*one)),
            [] => Err(self.unsupported("no pooling that is known".to_owned())),
            several => {
                let names: Vec<&str> = several.iter().map(|(key, _)| *key).collect();
                Err(self.unsupported(format!("several poolings joined ({})", names.join(", "))))
            }
        }
    }

    fn unsupported(&self, what: String) -> Error {
        Error::Unsupported {
            file: self.pooling_file.clone(),
            what: format!("{what}; supported is one of {}", poolings()),
        }
    }

    /// Refuses layers behind the pooling, which are not in the package when that gives the vectors of tokens.
    pub(super) fn check_modules(&self) -> Result<(), Error> {
        let known = ["Transformer", "Pooling", "Normalize"];
        let other = self
            .modules
            .iter()
            .flatten()
            .find(|kind| !known.contains(&kind.as_str()));
        match other {
            None => Ok(()),
            Some(kind) => Err(Error::Unsupported {
                file: self.modules_file.clone(),
                what: format!(
                    "a module {kind:?} outside the package; supported: {}, or a package with the output `sentence_embedding`",
                    known.join(", ")
                ),
            }),
        }
    }

    /// The longest text of a package that takes `package` tokens at most.
    pub(super) fn longest(&self, package: usize) -> usize {
        let number =
            |value: &Value, key: &str| usize::try_from(value.get(key)?.as_u64()?).ok().filter(|&n| n > 0);
        // Files without a bound have a number like 1e30, which is no whole number here.
        let bounds = [
            Some(package).filter(|&n| n != usize::MAX),
            number(&self.sentence, "max_seq_length"),
            number(&self.tokenizer, "model_max_length"),
            number(&self.config, "max_position_embeddings").map(|n| n.saturating_sub(self.first_position())),
        ];
        bounds.into_iter().flatten().min().unwrap_or(USUAL_TOKENS)
    }

    /// The position of the first token: RoBERTa counts from behind the padding token.
    pub(super) fn first_position(&self) -> usize {
        match self.config.get("model_type").and_then(Value::as_str) {
            Some("roberta" | "xlm-roberta" | "camembert") => {
                let pad = self.config.get("pad_token_id").and_then(Value::as_u64);
                1 + usize::try_from(pad.unwrap_or(1)).unwrap_or(1)
            }
            _ => 0,
        }
    }

    /// The id that fills rows: `pad_token` of the tokenizer, `pad_token_id` of the model, 0.
    pub(super) fn pad(&self, tokenizer: &Tokenizer) -> u32 {
        let token = self.tokenizer.get("pad_token");
        let token = token.and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
        let id = self.config.get("pad_token_id").and_then(Value::as_u64);
        let id = || id.and_then(|id| u32::try_from(id).ok());
        token.and_then(|t| tokenizer.id(t)).or_else(id).unwrap_or(0)
    }

    /// The text in lower case, where sentence-transformers writes it so before the tokenizer sees it.
    pub(super) fn cased<'a>(&self, text: &'a str) -> Cow<'a, str> {
        match self.sentence.get("do_lower_case").and_then(Value::as_bool) {
            Some(true) => text.to_lowercase().into(),
            _ => text.into(),
        }
    }

    pub(super) fn prompts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.prompts
            .iter()
            .map(|(kind, text)| (kind.as_str(), text.as_str()))
    }

    pub(super) fn default_prompt(&self) -> &str {
        &self.default_prompt
    }

    pub(super) fn prompt(&self, kind: &str) -> Result<&str, Error> {
        let kinds = || match self.prompts.is_empty() {
            true => "it has none".to_owned(),
            false => self
                .prompts
                .keys()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", "),
        };
        self.prompts
            .get(kind)
            .map(String::as_str)
            .ok_or_else(|| Error::Option {
                option: "prompt",
                value: format!("{kind:?}; {}", kinds()),
                allowed: "the prompts of the model",
            })
    }

    /// Refuses prompts whose tokens the pooling is to leave out.
    pub(super) fn check_prompt(&self, prompt: &str, pooling: Option<Pooling>) -> Result<(), Error> {
        let left_out = self.pooling.get("include_prompt").and_then(Value::as_bool) == Some(false);
        if left_out && !prompt.is_empty() && pooling.is_some() {
            let what = "include_prompt false together with a prompt".to_owned();
            return Err(Error::Unsupported {
                file: self.pooling_file.clone(),
                what,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn settings(files: &[(&str, &str)]) -> Settings {
        let files = files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), Bytes::from((*text).to_owned())));
        Settings::read(&Files::memory("m", files)).unwrap()
    }

    #[test]
    fn the_pooling_file_is_read_in_its_old_and_its_new_form() {
        let rows = [
            (
                r#"{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}"#,
                Ok(Pooling::Mean),
            ),
            (r#"{"pooling_mode_cls_token": true}"#, Ok(Pooling::Cls)),
            (r#"{"pooling_mode_lasttoken": true}"#, Ok(Pooling::Last)),
            (r#"{"pooling_mode": "mean"}"#, Ok(Pooling::Mean)),
            (r#"{"pooling_mode": "lasttoken"}"#, Ok(Pooling::Last)),
            (r#"{"pooling_mode": "median"}"#, Err("\"median\"")),
            (
                r#"{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}"#,
                Err("joined"),
            ),
            (r#"{"word_embedding_dimension": 3}"#, Err("no pooling")),
        ];
        for (text, expected) in rows {
            let found = settings(&[("1_Pooling/config.json", text)]).pooling();
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, Some(expected), "{text}"),
                (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{text}: {error}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        }
        assert_eq!(settings(&[]).pooling().unwrap(), None);
    }

    #[test]
    fn modules_say_whether_vectors_are_normalized_and_what_is_missing() {
        let modules = |kinds: &[&str]| {
            let rows: Vec<String> = kinds
                .iter()
                .map(|kind| {
                    format!(r#"{{"type": "sentence_transformers.models.{kind}", "path": "p_{kind}"}}"#)
                })
                .collect();
            let text = format!("[{}]", rows.join(","));
            settings(&[
                ("modules.json", &text),
                ("p_Pooling/config.json", r#"{"pooling_mode": "cls"}"#),
            ])
        };
        assert!(settings(&[]).normalize());
        assert!(modules(&["Transformer", "Pooling", "Normalize"]).normalize());
        let plain = modules(&["Transformer", "Pooling"]);
        assert!(!plain.normalize());
        assert_eq!(plain.pooling().unwrap(), Some(Pooling::Cls));
        assert!(plain.check_modules().is_ok());
        let error = modules(&["Transformer", "Pooling", "Dense"])
            .check_modules()
            .unwrap_err()
            .to_string();
        assert!(error.contains("\"Dense\""), "{error}");
    }

    #[test]
    fn the_smallest_bound_is_the_longest_text() {
        let files = [
            ("sentence_bert_config.json", r#"{"max_seq_length": 256}"#),
            (
                "tokenizer_config.json",
                r#"{"model_max_length": 1000000000000000019884624838656}"#,
            ),
            (
                "config.json",
                r#"{"model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 130}"#,
            ),
        ];
        assert_eq!(settings(&files[..1]).longest(usize::MAX), 256);
        assert_eq!(settings(&files[..2]).longest(512), 256);
        assert_eq!(settings(&files).longest(512), 128);
        assert_eq!(settings(&files).longest(16), 16);
        assert_eq!(settings(&[]).longest(usize::MAX), USUAL_TOKENS);
    }

    #[test]
    fn prompts_are_found_by_kind() {
        let text =
            r#"{"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "query"}"#;
        let settings = settings(&[("config_sentence_transformers.json", text)]);
        assert_eq!(settings.default_prompt(), "query: ");
        assert_eq!(settings.prompt("passage").unwrap(), "passage: ");
        let error = settings.prompt("code").unwrap_err().to_string();
        assert!(error.contains("passage, query"), "{error}");
    }
}
