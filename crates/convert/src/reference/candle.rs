//! The forward passes of candle-transformers, on weights of a checkpoint of either kind.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{gemma3, llama, mistral, qwen2, qwen3};

use super::checked;
use crate::config::{DecoderConfig, Family, RopeScaling};
use crate::error::Result;
use crate::lm::Input;
use crate::weights::Checkpoint;

/// Above this many values a checkpoint is not read into memory as a whole; 8 GB in 32-bit floats.
const MOST_VALUES: u64 = 2_000_000_000;

/// A decoder of candle-transformers with its cache.
pub(super) enum Decoder {
    Llama(llama::Llama, llama::Cache),
    Mistral(mistral::Model),
    Qwen2(qwen2::ModelForCausalLM),
    Qwen3(qwen3::ModelForCausalLM),
    Gemma3(gemma3::Model),
}

/// True when candle-transformers computes this decoder as it is meant for a text of `tokens` tokens.
pub(super) fn has(input: &Input, root: &str, tokens: usize) -> bool {
    let c = &input.config;
    let holds = |part: &str| input.checkpoint.contains(&format!("{root}layers.0.{part}"));
    let biases = [
        "self_attn.q_proj.bias",
        "self_attn.o_proj.bias",
        "mlp.gate_proj.bias",
    ]
    .map(holds);
    // Windows count positions in another way there; a text within the window needs none.
    let seen = c.sliding_window.is_none_or(|window| tokens <= window);
    let plain = c.rope_scaling.is_none();
    let scaled = |size: usize| (c.attention_scale - 1.0 / (size as f32).sqrt()).abs() < 1e-6;
    let head = c.tied || head_name(&input.checkpoint).is_some();
    let fits = match c.family {
        Family::Llama => {
            let rope = !matches!(c.rope_scaling, Some(RopeScaling::Linear(_)));
            biases == [false; 3] && rope && seen && c.head_dim * c.heads == c.hidden && complete(input, root)
        }
        Family::Mistral => biases == [false; 3] && plain && seen && !c.tied,
        Family::Qwen2 => biases == [true, false, false] && plain && seen && c.head_dim * c.heads == c.hidden,
        Family::Qwen3 => biases == [false; 3] && plain && seen,
        Family::Gemma3 => {
            biases == [false; 3] && plain && c.tied && pattern(c).is_some() && c.local_rope_theta.is_some()
        }
    };
    fits && head && scaled(c.head_dim) && input.checkpoint.parameters() <= MOST_VALUES
}

impl Decoder {
    /// Reads all weights; only for what [`has`] is true of.
    pub(super) fn open(input: &Input, root: &str, tokens: usize) -> Result<Self> {
        let weights = weights(input, root)?;
        checked(Self::load(weights, &input.config, tokens))
    }

    fn load(weights: VarBuilder<'static>, c: &DecoderConfig, tokens: usize) -> candle_core::Result<Self> {
        Ok(match c.family {
            Family::Llama => {
                let config = llama_config(c, tokens);
                let cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
                Decoder::Llama(llama::Llama::load(weights, &config)?, cache)
            }
            Family::Mistral => Decoder::Mistral(mistral::Model::new(&mistral_config(c, tokens), weights)?),
            Family::Qwen2 => Decoder::Qwen2(qwen2::ModelForCausalLM::new(&qwen2_config(c, tokens), weights)?),
            Family::Qwen3 => Decoder::Qwen3(qwen3::ModelForCausalLM::new(&qwen3_config(c, tokens), weights)?),
            Family::Gemma3 => Decoder::Gemma3(gemma3::Model::new(false, &gemma3_config(c, tokens), weights)?),
        })
    }

    /// Logits after each token, [tokens, vocabulary]. The models give those of the last token only, so it is one a call.
    pub(super) fn logits(&mut self, tokens: &[u32]) -> candle_core::Result<Tensor> {
        let mut rows = Vec::with_capacity(tokens.len());
        for (position, &token) in tokens.iter().enumerate() {
            let token = Tensor::new(&[[token]], &Device::Cpu)?;
            let logits = match self {
                Decoder::Llama(model, cache) => model.forward(&token, position, cache)?,
                Decoder::Mistral(model) => model.forward(&token, position)?,
                Decoder::Qwen2(model) => model.forward(&token, position)?,
                Decoder::Qwen3(model) => model.forward(&token, position)?,
                Decoder::Gemma3(model) => model.forward(&token, position)?,
            };
            rows.push(logits.flatten_all()?);
        }
        Tensor::stack(&rows, 0)
    }
}

fn head_name(checkpoint: &Checkpoint) -> Option<&'static str> {
    ["lm_head.weight", "language_model.lm_head.weight"]
        .into_iter()
        .find(|name| checkpoint.contains(name))
}

/// Every weight of the decoder under the name that candle-transformers has for it.
fn weights(input: &Input, root: &str) -> Result<VarBuilder<'static>> {
    let (checkpoint, mut tensors) = (&input.checkpoint, HashMap::new());
    let head = head_name(checkpoint).filter(|_| !input.config.tied);
    let parts = ["embed_tokens.", "layers.", "norm."];
    let wanted = |name: &&str| {
        let inside = name.strip_prefix(root);
        inside.is_some_and(|rest| parts.iter().any(|part| rest.starts_with(part)))
    };
    for name in checkpoint.names().filter(wanted) {
        let rest = name.strip_prefix(root).unwrap_or(name);
        tensors.insert(format!("model.{rest}"), tensor(checkpoint, name)?);
    }
    if let Some(name) = head {
        tensors.insert("lm_head.weight".to_owned(), tensor(checkpoint, name)?);
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// A tensor of a checkpoint in 32-bit floats.
pub(super) fn tensor(checkpoint: &Checkpoint, name: &str) -> Result<Tensor> {
    let shape = checkpoint.shape(name).unwrap_or_default().to_vec();
    let values = checkpoint.read_f32(name, &shape)?;
    checked(Tensor::from_vec(values, shape, &Device::Cpu))
}

/// True when every layer has its weights in the shapes of the configuration: Llama's loader there panics otherwise.
fn complete(input: &Input, root: &str) -> bool {
    let c = &input.config;
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let parts: [(&str, &[usize]); 9] = [
        ("input_layernorm", &[c.hidden]),
        ("post_attention_layernorm", &[c.hidden]),
        ("self_attn.q_proj", &[q, c.hidden]),
        ("self_attn.k_proj", &[kv, c.hidden]),
        ("self_attn.v_proj", &[kv, c.hidden]),
        ("self_attn.o_proj", &[c.hidden, q]),
        ("mlp.gate_proj", &[c.intermediate, c.hidden]),
        ("mlp.up_proj", &[c.intermediate, c.hidden]),
        ("mlp.down_proj", &[c.hidden, c.intermediate]),
    ];
    (0..c.layers).all(|layer| {
        parts.iter().all(|(part, shape)| {
            let name = format!("{root}layers.{layer}.{part}.weight");
            input.checkpoint.shape(&name) == Some(*shape)
        })
    })
}

/// Every how many layers one looks at everything, where that is regular.
fn pattern(c: &DecoderConfig) -> Option<usize> {
    let first = (0..c.layers).find(|&layer| !c.is_local(layer));
    let every = first.map_or(c.layers, |layer| layer) + 1;
    let regular = (0..c.layers).all(|layer| c.is_local(layer) == ((layer + 1) % every > 0));
    regular.then_some(every)
}

fn llama_config(c: &DecoderConfig, tokens: usize) -> llama::Config {
    let rope_scaling = match c.rope_scaling {
        Some(RopeScaling::Llama3 {
            factor,
            low,
            high,
            context,
        }) => Some(llama::Llama3RopeConfig {
            factor: factor as f32,
            low_freq_factor: low as f32,
            high_freq_factor: high as f32,
            original_max_position_embeddings: context as usize,
            rope_type: llama::Llama3RopeType::Llama3,
        }),
        Some(RopeScaling::Linear(_)) | None => None,
    };
    llama::Config {
        hidden_size: c.hidden,
        intermediate_size: c.intermediate,
        vocab_size: c.vocabulary,
        num_hidden_layers: c.layers,
        num_attention_heads: c.heads,
        num_key_value_heads: c.kv_heads,
        use_flash_attn: false,
        rms_norm_eps: f64::from(c.rms_eps),
        rope_theta: c.rope_theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling,
        max_position_embeddings: tokens,
        tie_word_embeddings: c.tied,
    }
}

fn mistral_config(c: &DecoderConfig, tokens: usize) -> mistral::Config {
    mistral::Config {
        vocab_size: c.vocabulary,
        hidden_size: c.hidden,
        intermediate_size: c.intermediate,
        num_hidden_layers: c.layers,
        num_attention_heads: c.heads,
        head_dim: Some(c.head_dim),
        num_key_value_heads: c.kv_heads,
        hidden_act: Activation::Silu,
        max_position_embeddings: tokens,
        rms_norm_eps: f64::from(c.rms_eps),
        rope_theta: c.rope_theta,
        sliding_window: None,
        use_flash_attn: false,
    }
}

fn qwen2_config(c: &DecoderConfig, tokens: usize) -> qwen2::Config {
    qwen2::Config {
        vocab_size: c.vocabulary,
        hidden_size: c.hidden,
        intermediate_size: c.intermediate,
        num_hidden_layers: c.layers,
        num_attention_heads: c.heads,
        num_key_value_heads: c.kv_heads,
        max_position_embeddings: tokens,
        sliding_window: tokens,
        max_window_layers: c.layers,
        tie_word_embeddings: c.tied,
        rope_theta: c.rope_theta,
        rms_norm_eps: f64::from(c.rms_eps),
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

fn qwen3_config(c: &DecoderConfig, tokens: usize) -> qwen3::Config {
    qwen3::Config {
        vocab_size: c.vocabulary,
        hidden_size: c.hidden,
        intermediate_size: c.intermediate,
        num_hidden_layers: c.layers,
        num_attention_heads: c.heads,
        head_dim: c.head_dim,
        attention_bias: false,
        num_key_value_heads: c.kv_heads,
        max_position_embeddings: tokens,
        sliding_window: None,
        max_window_layers: c.layers,
        tie_word_embeddings: c.tied,
        rope_theta: c.rope_theta,
        rms_norm_eps: f64::from(c.rms_eps),
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

fn gemma3_config(c: &DecoderConfig, tokens: usize) -> gemma3::Config {
    gemma3::Config {
        attention_bias: false,
        head_dim: c.head_dim,
        hidden_activation: Activation::GeluPytorchTanh,
        hidden_size: c.hidden,
        intermediate_size: c.intermediate,
        num_attention_heads: c.heads,
        num_hidden_layers: c.layers,
        num_key_value_heads: c.kv_heads,
        rms_norm_eps: f64::from(c.rms_eps),
        rope_theta: c.rope_theta,
        rope_local_base_freq: c.local_rope_theta.unwrap_or(c.rope_theta),
        vocab_size: c.vocabulary,
        final_logit_softcapping: None,
        attn_logit_softcapping: None,
        query_pre_attn_scalar: c.head_dim,
        sliding_window: c.sliding_window.unwrap_or(tokens),
        sliding_window_pattern: pattern(c).unwrap_or(1),
        max_position_embeddings: tokens,
    }
}
