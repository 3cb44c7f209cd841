//! Which inputs and which output `forward` means, in the form earlier versions of this crate used.

use crate::error::Error;
use candle_coreml_mil::{FeatureType, Flexibility, FunctionDescription};
use serde::{Deserialize, Serialize};

/// The names that [`CoreMLModel::forward`](crate::CoreMLModel::forward) gives its tensors, and notes about the model.
///
/// ```
/// use candle_coreml::Config;
/// let config = Config::new(["input_ids", "attention_mask"], "logits").with_vocab_size(32_000);
/// assert_eq!(config.input_names.len(), 2);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Names of the inputs in the order `forward` takes them.
    pub input_names: Vec<String>,
    /// Name of the output `forward` returns.
    pub output_name: String,
    /// Longest sequence in tokens; 0 where it is unknown. A note for callers: nothing here depends on it.
    pub max_sequence_length: usize,
    /// Number of tokens in the vocabulary; 0 where it is unknown. A note for callers too.
    pub vocab_size: usize,
    /// Name of the architecture. A note for callers too.
    pub model_type: String,
}

impl Config {
    /// A configuration from names alone; the notes stay unknown.
    pub fn new<I>(input_names: I, output_name: impl Into<String>) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        Config {
            input_names: input_names.into_iter().map(Into::into).collect(),
            output_name: output_name.into(),
            max_sequence_length: 0,
            vocab_size: 0,
            model_type: "coreml".to_string(),
        }
    }

    /// `input_ids`, `token_type_ids` and `attention_mask`, as BERT models take them.
    pub fn bert_config(output_name: &str, max_sequence_length: usize, vocab_size: usize) -> Self {
        let mut config = Config::new(["input_ids", "token_type_ids", "attention_mask"], output_name)
            .with_max_sequence_length(max_sequence_length)
            .with_vocab_size(vocab_size);
        config.model_type = "bert".to_string();
        config
    }

    /// What a function suggests: its required inputs in their order, and its first output, or the one called `logits`.
    /// The notes are read from the shapes where these are fixed: the last dimension of the first input and of the output.
    pub fn from_function(function: &FunctionDescription) -> Self {
        let required = function.inputs.iter().filter(|f| !f.optional);
        let output = function
            .outputs
            .iter()
            .find(|f| f.name == "logits")
            .or(function.outputs.first());
        let mut config = Config::new(
            required.map(|f| f.name.clone()),
            output.map_or("", |f| f.name.as_str()),
        );
        config.max_sequence_length = function.inputs.first().map_or(0, |f| last_dimension(&f.ty));
        config.vocab_size = output.map_or(0, |f| last_dimension(&f.ty));
        config
    }

    /// Notes the longest sequence in tokens.
    pub fn with_max_sequence_length(mut self, tokens: usize) -> Self {
        self.max_sequence_length = tokens;
        self
    }

    /// Notes the number of tokens in the vocabulary.
    pub fn with_vocab_size(mut self, tokens: usize) -> Self {
        self.vocab_size = tokens;
        self
    }

    /// Refuses names the function does not have.
    pub(crate) fn check(&self, function: &FunctionDescription) -> Result<(), Error> {
        let names = |features: &[candle_coreml_mil::Feature]| {
            features.iter().map(|f| f.name.clone()).collect::<Vec<_>>()
        };
        let inputs = names(&function.inputs);
        for (i, name) in self.input_names.iter().enumerate() {
            if !inputs.contains(name) {
                return Err(Error::UnknownInput {
                    function: function.name.clone(),
                    name: name.clone(),
                    allowed: inputs,
                });
            }
            if self.input_names.iter().take(i).any(|n| n == name) {
                return Err(Error::DuplicateInput { name: name.clone() });
            }
        }
        let outputs = names(&function.outputs);
        if !outputs.contains(&self.output_name) {
            return Err(Error::UnknownOutput {
                name: self.output_name.clone(),
                allowed: outputs,
            });
        }
        Ok(())
    }
}

/// `input_ids` to `logits`, the notes those of a small language model.
impl Default for Config {
    fn default() -> Self {
        Config::new(["input_ids"], "logits")
            .with_max_sequence_length(128)
            .with_vocab_size(32_000)
    }
}

fn last_dimension(ty: &FeatureType) -> usize {
    match ty {
        FeatureType::MultiArray(array) if array.flexibility == Flexibility::Fixed => {
            array.shape.last().copied().unwrap_or(0)
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::{array, feature, optional};
    use candle_coreml_mil::DType;

    fn function() -> FunctionDescription {
        FunctionDescription {
            name: "main".into(),
            inputs: vec![
                feature("ids", array(DType::Int32, &[1, 64])),
                optional("bias", array(DType::Fp16, &[1]), None),
            ],
            outputs: vec![
                feature("hidden", array(DType::Fp16, &[1, 8])),
                feature("logits", array(DType::Fp16, &[1, 100])),
            ],
            states: vec![],
        }
    }

    #[test]
    fn a_function_suggests_its_required_inputs_and_its_logits() {
        let config = Config::from_function(&function());
        assert_eq!(config.input_names, ["ids"]);
        assert_eq!(config.output_name, "logits");
        assert_eq!((config.max_sequence_length, config.vocab_size), (64, 100));
        config.check(&function()).unwrap();
    }

    #[test]
    fn names_the_function_lacks_are_refused() {
        let f = function();
        assert!(matches!(
            Config::new(["x"], "logits").check(&f),
            Err(Error::UnknownInput { .. })
        ));
        assert!(matches!(
            Config::new(["ids"], "y").check(&f),
            Err(Error::UnknownOutput { .. })
        ));
        assert!(matches!(
            Config::new(["ids", "ids"], "logits").check(&f),
            Err(Error::DuplicateInput { .. })
        ));
    }

    #[test]
    fn the_defaults_are_those_of_the_published_crate() {
        let config = Config::default();
        assert_eq!(
            (config.input_names, config.output_name),
            (vec!["input_ids".to_string()], "logits".into())
        );
        assert_eq!((config.max_sequence_length, config.vocab_size), (128, 32_000));
    }
}
