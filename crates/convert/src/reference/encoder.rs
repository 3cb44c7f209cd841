//! An encoder in 32-bit floats, by candle-transformers from the original weights.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Activation as Function, VarBuilder};
use candle_transformers::models::{bert, xlm_roberta};

use super::candle::tensor;
use super::checked;
use crate::encoder::{Activation, EncoderConfig, Pooling, root_of};
use crate::error::{Error, Result};
use crate::weights::Checkpoint;

/// An encoder of candle-transformers with the weights of a checkpoint: what conversions of encoders are measured against.
pub struct EncoderReference {
    model: Model,
    config: EncoderConfig,
}

enum Model {
    Bert(bert::BertModel),
    Roberta(xlm_roberta::XLMRobertaModel),
}

impl std::fmt::Debug for EncoderReference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncoderReference")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl EncoderReference {
    /// Opens a checkpoint as [`crate::convert_encoder`] does and reads its weights.
    ///
    /// # Errors
    /// As [`crate::convert_encoder`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let config = EncoderConfig::open(folder)?;
        let weights = weights(&Checkpoint::open(folder)?)?;
        let model = if config.first_position == 0 {
            Model::Bert(checked(bert::BertModel::load(weights, &bert_config(&config)))?)
        } else {
            let config = roberta_config(&config);
            Model::Roberta(checked(xlm_roberta::XLMRobertaModel::new(&config, weights))?)
        };
        Ok(EncoderReference { model, config })
    }

    /// What the encoder looks like.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// The last hidden state after `tokens`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Option`] for none or too many tokens; [`Error::Tensor`] for token ids outside the vocabulary.
    pub fn hidden(&self, tokens: &[u32]) -> Result<Tensor> {
        let (count, most) = (tokens.len(), self.config.max_tokens);
        if count == 0 || count > most {
            return Err(Error::Option {
                option: "tokens",
                problem: format!("{count}; the model takes 1 to {most}"),
            });
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= self.config.vocabulary) {
            let problem = format!("token {token} of {}", self.config.vocabulary);
            return Err(Error::tensor("embeddings.word_embeddings.weight", problem));
        }
        checked(self.forward(tokens))
    }

    fn forward(&self, tokens: &[u32]) -> candle_core::Result<Tensor> {
        let ids = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let (types, mask) = (ids.zeros_like()?, ids.ones_like()?);
        let hidden = match &self.model {
            Model::Bert(model) => model.forward(&ids, &types, Some(&mask))?,
            Model::Roberta(model) => model.forward(&ids, &mask, &types, None, None, None)?,
        };
        hidden.squeeze(0)
    }

    /// The text's vector, `[hidden]`, of a last hidden state: pooled as the checkpoint says, or the mean.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `hidden` is no matrix.
    pub fn pooled(&self, hidden: &Tensor) -> Result<Tensor> {
        let pooled = match self.config.pooling {
            Some(Pooling::First) => hidden.get(0),
            Some(Pooling::Mean) | None => hidden.mean(0),
        };
        let unit = |v: Tensor| v.broadcast_div(&v.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?);
        checked(pooled.and_then(|v| if self.config.normalize { unit(v) } else { Ok(v) }))
    }
}

/// Every weight without the prefix that some checkpoints have, and by the names of today.
fn weights(checkpoint: &Checkpoint) -> Result<VarBuilder<'static>> {
    let root = root_of(checkpoint)?;
    let mut tensors = HashMap::new();
    for name in checkpoint.names() {
        let Some(rest) = name.strip_prefix(root) else {
            continue;
        };
        if !["embeddings.", "encoder."]
            .iter()
            .any(|part| rest.starts_with(part))
            || rest.ends_with("position_ids")
        {
            continue;
        }
        let rest = rest.replace("LayerNorm.gamma", "LayerNorm.weight");
        let rest = rest.replace("LayerNorm.beta", "LayerNorm.bias");
        tensors.insert(rest, tensor(checkpoint, name)?);
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

fn bert_config(c: &EncoderConfig) -> bert::Config {
    bert::Config {
        vocab_size: c.vocabulary,
        hidden_size: c.hidden,
        num_hidden_layers: c.layers,
        num_attention_heads: c.heads,
        intermediate_size: c.intermediate,
        hidden_act: match c.activation {
            Activation::Gelu => bert::HiddenAct::Gelu,
            Activation::GeluTanh => bert::HiddenAct::GeluApproximate,
            Activation::Relu => bert::HiddenAct::Relu,
        },
        max_position_embeddings: c.max_tokens,
        type_vocab_size: c.token_types,
        layer_norm_eps: f64::from(c.eps),
        model_type: None,
        ..bert::Config::default()
    }
}

fn roberta_config(c: &EncoderConfig) -> xlm_roberta::Config {
    xlm_roberta::Config {
        hidden_size: c.hidden,
        layer_norm_eps: f64::from(c.eps),
        attention_probs_dropout_prob: 0.0,
        hidden_dropout_prob: 0.0,
        num_attention_heads: c.heads,
        position_embedding_type: "absolute".to_owned(),
        intermediate_size: c.intermediate,
        hidden_act: match c.activation {
            Activation::Gelu => Function::Gelu,
            Activation::GeluTanh => Function::NewGelu,
            Activation::Relu => Function::Relu,
        },
        num_hidden_layers: c.layers,
        vocab_size: c.vocabulary,
        max_position_embeddings: c.max_tokens + c.first_position,
        type_vocab_size: c.token_types,
        // The first position is the one behind the padding token's number.
        pad_token_id: u32::try_from(c.first_position - 1).unwrap_or(u32::MAX),
    }
}
