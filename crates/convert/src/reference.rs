//! A decoder computed in 32-bit floats with Candle from the original weights: what conversions are measured against.

use candle_core::{D, DType, Device, IndexOp, Tensor};

use crate::config::{DecoderConfig, Family};
use crate::error::{Error, Result};
use crate::lm::Input;
use crate::weights::Checkpoint;

/// A decoder that reads its weights anew for every call: slow, plain, and small in memory.
#[derive(Debug)]
pub struct Reference {
    checkpoint: Checkpoint,
    config: DecoderConfig,
    root: &'static str,
}

impl Reference {
    /// Opens a checkpoint as [`crate::convert_language_model`] does.
    ///
    /// # Errors
    /// As [`crate::plan_language_model`].
    pub fn open(path: impl AsRef<std::path::Path>) -> Result<Self> {
        let Input {
            checkpoint, config, ..
        } = Input::open(path.as_ref())?;
        let root = crate::lm::root_of(&checkpoint)?;
        Ok(Reference {
            checkpoint,
            config,
            root,
        })
    }

    /// Logits after each of `tokens`, [tokens, vocabulary].
    ///
    /// # Errors
    /// [`Error::Tensor`] for tensors that do not fit and token ids outside the vocabulary.
    pub fn logits(&self, tokens: &[u32]) -> Result<Tensor> {
        let c = &self.config;
        let table = self.matrix(
            &format!("{}embed_tokens.weight", self.root),
            &[c.vocabulary, c.hidden],
        )?;
        let ids = checked(Tensor::new(tokens, &Device::Cpu))?;
        let mut x = checked(table.index_select(&ids, 0))?;
        if let Some(scale) = c.embedding_scale {
            x = checked(x.affine(f64::from(scale), 0.0))?;
        }
        let masks = [None, c.sliding_window].map(|window| causal(tokens.len(), window));
        let [whole, window] = masks;
        let (whole, window) = (checked(whole)?, checked(window)?);
        for layer in 0..c.layers {
            let mask = if c.is_local(layer) { &window } else { &whole };
            x = self.layer(&x, layer, mask)?;
        }
        let x = self.norm(&x, &format!("{}norm.weight", self.root))?;
        let head = ["lm_head.weight", "language_model.lm_head.weight"]
            .into_iter()
            .find(|n| !c.tied && self.checkpoint.contains(n));
        let head = match head {
            Some(name) => self.matrix(name, &[c.vocabulary, c.hidden])?,
            None => table,
        };
        checked(head.t().and_then(|h| x.matmul(&h)))
    }

    fn layer(&self, x: &Tensor, layer: usize, mask: &Tensor) -> Result<Tensor> {
        let name = |part: &str| format!("{}layers.{layer}.{part}", self.root);
        let gemma = self.config.family == Family::Gemma3;
        let normed = self.norm(x, &name("input_layernorm.weight"))?;
        let mut attended = self.attention(&normed, layer, mask)?;
        if gemma {
            attended = self.norm(&attended, &name("post_attention_layernorm.weight"))?;
        }
        let x = checked(x + attended)?;
        let before = if gemma {
            "pre_feedforward_layernorm.weight"
        } else {
            "post_attention_layernorm.weight"
        };
        let normed = self.norm(&x, &name(before))?;
        let (h, inner) = (self.config.hidden, self.config.intermediate);
        let gate = self.linear(&normed, &name("mlp.gate_proj"), [inner, h])?;
        let gate = checked(if gemma { gate.gelu() } else { gate.silu() })?;
        let up = self.linear(&normed, &name("mlp.up_proj"), [inner, h])?;
        let mut down = self.linear(&checked(gate * up)?, &name("mlp.down_proj"), [h, inner])?;
        if gemma {
            down = self.norm(&down, &name("post_feedforward_layernorm.weight"))?;
        }
        checked(x + down)
    }

    fn attention(&self, x: &Tensor, layer: usize, mask: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (n, d) = (checked(x.dim(0))?, c.head_dim);
        let name = |part: &str| format!("{}layers.{layer}.self_attn.{part}", self.root);
        let heads = |part: &str, heads: usize| -> Result<Tensor> {
            let y = self.linear(x, &name(part), [heads * d, c.hidden])?;
            checked(
                y.reshape((n, heads, d))
                    .and_then(|y| y.transpose(0, 1)?.contiguous()),
            )
        };
        let (mut q, mut k, v) = (
            heads("q_proj", c.heads)?,
            heads("k_proj", c.kv_heads)?,
            heads("v_proj", c.kv_heads)?,
        );
        if matches!(c.family, Family::Qwen3 | Family::Gemma3) {
            q = self.norm(&q, &name("q_norm.weight"))?;
            k = self.norm(&k, &name("k_norm.weight"))?;
        }
        let angles = c.rope_frequencies(c.is_local(layer));
        let attended = checked(attend(c, &q, &k, &v, mask, &angles))?;
        self.linear(&attended, &name("o_proj"), [c.hidden, c.heads * d])
    }

    fn linear(&self, x: &Tensor, name: &str, shape: [usize; 2]) -> Result<Tensor> {
        let weight = self.matrix(&format!("{name}.weight"), &shape)?;
        let y = checked(weight.t().and_then(|w| x.matmul(&w)))?;
        let bias = format!("{name}.bias");
        if !self.checkpoint.contains(&bias) {
            return Ok(y);
        }
        let bias = self.matrix(&bias, &shape[..1])?;
        checked(y.broadcast_add(&bias))
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let width = checked(x.dim(D::Minus1))?;
        let weight = self.matrix(name, &[width])?;
        let offset = if self.config.family == Family::Gemma3 {
            1.0
        } else {
            0.0
        };
        let normed = |x: &Tensor| {
            let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(self.config.rms_eps))?;
            x.broadcast_div(&mean.sqrt()?)?
                .broadcast_mul(&(&weight + offset)?)
        };
        checked(normed(x))
    }

    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let values = self.checkpoint.read_f32(name, shape)?;
        checked(Tensor::from_vec(values, shape, &Device::Cpu))
    }
}

fn checked<T>(result: candle_core::Result<T>) -> Result<T> {
    result.map_err(|e| Error::tensor("(reference)", e.to_string()))
}

fn causal(n: usize, window: Option<usize>) -> candle_core::Result<Tensor> {
    let hidden = |query: usize, key: usize| key > query || window.is_some_and(|w| query - key >= w);
    let mask: Vec<f32> = (0..n * n)
        .map(|i| {
            if hidden(i / n, i % n) {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    Tensor::from_vec(mask, (n, n), &Device::Cpu)
}

/// Heads [heads, n, d] to [n, heads * d].
fn attend(
    c: &DecoderConfig,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Tensor,
    frequencies: &[f64],
) -> candle_core::Result<Tensor> {
    let (q, k) = (rotate(q, frequencies)?, rotate(k, frequencies)?);
    let n = q.dim(1)?;
    let mut heads = Vec::with_capacity(c.heads);
    for head in 0..c.heads {
        let shared = head / (c.heads / c.kv_heads);
        let scores = (q.i(head)?.matmul(&k.i(shared)?.t()?)? * f64::from(c.attention_scale))?;
        let scores = (scores + mask)?;
        let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let shares = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
        heads.push(shares.matmul(&v.i(shared)?)?);
    }
    Tensor::stack(&heads, 1)?.reshape((n, c.heads * c.head_dim))
}

fn rotate(x: &Tensor, frequencies: &[f64]) -> candle_core::Result<Tensor> {
    let (n, half) = (x.dim(1)?, frequencies.len());
    let angles: Vec<f64> = (0..n)
        .flat_map(|p| frequencies.iter().map(move |f| p as f64 * f))
        .collect();
    let angles = Tensor::from_vec(angles, (n, half), &Device::Cpu)?;
    let (cos, sin) = (
        angles.cos()?.to_dtype(DType::F32)?,
        angles.sin()?.to_dtype(DType::F32)?,
    );
    let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let first = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let second = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)
}
