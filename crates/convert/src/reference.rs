//! Models computed in 32-bit floats with Candle from the original weights: what conversions are measured against.

mod candle;
mod encoder;

use std::collections::HashMap;

use candle_core::{D, DType, Device, IndexOp, Tensor};

use crate::compress::{Compression, Progress};
use crate::config::{DecoderConfig, Family};
use crate::error::{Error, Result};
use crate::lm::Input;

pub use encoder::EncoderReference;

/// Whose code computes a decoder in 32-bit floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForwardPass {
    /// candle-transformers', with all weights in memory.
    CandleTransformers,
    /// This crate's, which reads the weights anew for every call: slow, plain, and small in memory.
    LayerByLayer,
}

impl std::fmt::Display for ForwardPass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ForwardPass::CandleTransformers => "candle-transformers",
            ForwardPass::LayerByLayer => "layer by layer",
        })
    }
}

/// A decoder with the original weights.
#[derive(Debug)]
pub struct Reference {
    input: Input,
    root: &'static str,
}

/// What [`Reference::sensitivity`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct SensitivityReport {
    /// Perplexity of the text with the weights as they are.
    pub perplexity: f64,
    /// One a layer, in order.
    pub layers: Vec<LayerSensitivity>,
}

/// What a model loses when the projections of one layer alone are compressed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerSensitivity {
    /// Which layer.
    pub layer: usize,
    /// How its projections were stored.
    pub how: Compression,
    /// Mean Kullback-Leibler divergence of the predictions from those of the original, in nats.
    pub divergence: f64,
    /// Perplexity of the text.
    pub perplexity: f64,
    /// Root of the mean squared error of the weights as a share of the root of their mean square.
    pub weight_error: f64,
}

/// Projections of one layer as they are after compression, by name.
type Replaced = HashMap<String, Tensor>;

impl Reference {
    /// Opens a checkpoint as [`crate::convert_language_model`] does.
    ///
    /// # Errors
    /// As [`crate::plan_language_model`].
    pub fn open(path: impl AsRef<std::path::Path>) -> Result<Self> {
        let input = Input::open(path.as_ref())?;
        let root = crate::lm::root_of(&input.checkpoint)?;
        Ok(Reference { input, root })
    }

    /// The content of the checkpoint's `tokenizer.json`, rebuilt for GGUF files.
    ///
    /// # Errors
    /// [`Error::Io`] when there is none.
    pub fn tokenizer(&self) -> Result<Vec<u8>> {
        self.input.tokenizer()
    }

    /// The pass for a text of `tokens` tokens: candle-transformers' where it has the model and up to 2 billion values, else
    /// this crate's. It has no attention biases in Llama, no rope scaling but Llama 3's, no window that a text outgrows (Gemma's
    /// local layers apart).
    pub fn pass(&self, tokens: usize) -> ForwardPass {
        if candle::has(&self.input, self.root, tokens) {
            ForwardPass::CandleTransformers
        } else {
            ForwardPass::LayerByLayer
        }
    }

    /// Logits after each of `tokens`, [tokens, vocabulary], by the pass that [`Reference::pass`] names.
    ///
    /// # Errors
    /// [`Error::Tensor`] for tensors that do not fit and token ids outside the vocabulary.
    pub fn logits(&self, tokens: &[u32]) -> Result<Tensor> {
        match self.pass(tokens.len()) {
            ForwardPass::LayerByLayer => self.layer_by_layer(tokens),
            ForwardPass::CandleTransformers => {
                self.check_tokens(tokens)?;
                let mut decoder = candle::Decoder::open(&self.input, self.root, tokens.len())?;
                checked(decoder.logits(tokens))
            }
        }
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.config().vocabulary;
        match tokens.iter().find(|t| **t as usize >= vocabulary) {
            Some(token) => {
                let name = format!("{}embed_tokens.weight", self.root);
                Err(Error::tensor(&name, format!("token {token} of {vocabulary}")))
            }
            None => Ok(()),
        }
    }

    /// As [`Reference::logits`], by this crate's pass whatever the model.
    ///
    /// # Errors
    /// As [`Reference::logits`].
    pub fn layer_by_layer(&self, tokens: &[u32]) -> Result<Tensor> {
        let (mut x, masks) = self.embed(tokens)?;
        for layer in 0..self.config().layers {
            x = self.layer(&x, layer, &masks, &Replaced::new())?;
        }
        self.head(&x)
    }

    /// Compresses one layer at a time as `how` says and measures what that changes on `tokens`.
    ///
    /// # Errors
    /// As [`Reference::logits`], and for compressions that do not fit a projection.
    pub fn sensitivity(
        &self,
        tokens: &[u32],
        how: impl Fn(usize) -> Compression,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<SensitivityReport> {
        let layers = self.config().layers;
        let original = Predictions::new(&self.layer_by_layer(tokens)?, tokens)?;
        let (mut x, masks) = self.embed(tokens)?;
        let mut found = Vec::with_capacity(layers);
        for layer in 0..layers {
            let how = how(layer);
            let (replaced, weight_error) = self.compressed(layer, &how)?;
            let mut y = self.layer(&x, layer, &masks, &replaced)?;
            drop(replaced);
            for after in layer + 1..layers {
                y = self.layer(&y, after, &masks, &Replaced::new())?;
            }
            let changed = Predictions::new(&self.head(&y)?, tokens)?;
            found.push(LayerSensitivity {
                layer,
                how,
                divergence: original.divergence(&changed),
                perplexity: changed.perplexity,
                weight_error,
            });
            x = self.layer(&x, layer, &masks, &Replaced::new())?;
            progress(Progress {
                done: layer as u64 + 1,
                total: layers as u64,
            });
        }
        Ok(SensitivityReport {
            perplexity: original.perplexity,
            layers: found,
        })
    }

    /// The projections of a layer after compression, and how far they are from the original.
    fn compressed(&self, layer: usize, how: &Compression) -> Result<(Replaced, f64)> {
        let c = self.config();
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let (mut replaced, mut size, mut error) = (Replaced::new(), 0.0, 0.0);
        for (part, shape) in [
            ("self_attn.q_proj", [q, c.hidden]),
            ("self_attn.k_proj", [kv, c.hidden]),
            ("self_attn.v_proj", [kv, c.hidden]),
            ("self_attn.o_proj", [c.hidden, q]),
            ("mlp.gate_proj", [c.intermediate, c.hidden]),
            ("mlp.up_proj", [c.intermediate, c.hidden]),
            ("mlp.down_proj", [c.hidden, c.intermediate]),
        ] {
            let name = format!("{}layers.{layer}.{part}.weight", self.root);
            let values = self.input.checkpoint.read(&name, &shape)?;
            let back = how
                .round_trip(&shape, &values)
                .map_err(|e| Error::tensor(&name, e))?;
            for (v, b) in values.iter().zip(&back) {
                let v = f64::from(v.to_f32());
                size += v * v;
                error += (v - f64::from(*b)).powi(2);
            }
            let tensor = checked(Tensor::from_vec(back, &shape, &Device::Cpu))?;
            replaced.insert(name, tensor);
        }
        Ok((replaced, (error / f64::max(size, f64::MIN_POSITIVE)).sqrt()))
    }

    fn config(&self) -> &DecoderConfig {
        &self.input.config
    }

    /// Embedded tokens, and the masks of layers that look at everything and of those with a window.
    fn embed(&self, tokens: &[u32]) -> Result<(Tensor, [Tensor; 2])> {
        let c = self.config();
        let name = format!("{}embed_tokens.weight", self.root);
        let mut rows = Vec::with_capacity(tokens.len() * c.hidden);
        for &token in tokens {
            let row = token as usize;
            let shape = [c.vocabulary, c.hidden];
            rows.extend(self.input.checkpoint.read_rows_f32(&name, &shape, row..row + 1)?);
        }
        let mut x = checked(Tensor::from_vec(rows, (tokens.len(), c.hidden), &Device::Cpu))?;
        if let Some(scale) = c.embedding_scale {
            x = checked(x.affine(f64::from(scale), 0.0))?;
        }
        let whole = checked(causal(tokens.len(), None))?;
        let window = checked(causal(tokens.len(), c.sliding_window))?;
        Ok((x, [whole, window]))
    }

    fn head(&self, x: &Tensor) -> Result<Tensor> {
        let c = self.config();
        let x = self.norm(x, &format!("{}norm.weight", self.root))?;
        let head = ["lm_head.weight", "language_model.lm_head.weight"]
            .into_iter()
            .find(|n| !c.tied && self.input.checkpoint.contains(n));
        let name = head.map_or_else(|| format!("{}embed_tokens.weight", self.root), str::to_owned);
        let head = self.matrix(&name, &[c.vocabulary, c.hidden])?;
        checked(head.t().and_then(|h| x.matmul(&h)))
    }

    fn layer(&self, x: &Tensor, layer: usize, masks: &[Tensor; 2], replaced: &Replaced) -> Result<Tensor> {
        let mask = &masks[usize::from(self.config().is_local(layer))];
        let name = |part: &str| format!("{}layers.{layer}.{part}", self.root);
        let gemma = self.config().family == Family::Gemma3;
        let normed = self.norm(x, &name("input_layernorm.weight"))?;
        let mut attended = self.attention(&normed, layer, mask, replaced)?;
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
        let (h, inner) = (self.config().hidden, self.config().intermediate);
        let gate = self.linear(&normed, &name("mlp.gate_proj"), [inner, h], replaced)?;
        let gate = checked(if gemma { gate.gelu() } else { gate.silu() })?;
        let up = self.linear(&normed, &name("mlp.up_proj"), [inner, h], replaced)?;
        let mut down = self.linear(&checked(gate * up)?, &name("mlp.down_proj"), [h, inner], replaced)?;
        if gemma {
            down = self.norm(&down, &name("post_feedforward_layernorm.weight"))?;
        }
        checked(x + down)
    }

    fn attention(&self, x: &Tensor, layer: usize, mask: &Tensor, replaced: &Replaced) -> Result<Tensor> {
        let c = self.config();
        let (n, d) = (checked(x.dim(0))?, c.head_dim);
        let name = |part: &str| format!("{}layers.{layer}.self_attn.{part}", self.root);
        let heads = |part: &str, heads: usize| -> Result<Tensor> {
            let y = self.linear(x, &name(part), [heads * d, c.hidden], replaced)?;
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
        self.linear(&attended, &name("o_proj"), [c.hidden, c.heads * d], replaced)
    }

    fn linear(&self, x: &Tensor, name: &str, shape: [usize; 2], replaced: &Replaced) -> Result<Tensor> {
        let weight = format!("{name}.weight");
        let weight = match replaced.get(&weight) {
            Some(weight) => weight.clone(),
            None => self.matrix(&weight, &shape)?,
        };
        let y = checked(weight.t().and_then(|w| x.matmul(&w)))?;
        let bias = format!("{name}.bias");
        if !self.input.checkpoint.contains(&bias) {
            return Ok(y);
        }
        let bias = self.matrix(&bias, &shape[..1])?;
        checked(y.broadcast_add(&bias))
    }

    fn norm(&self, x: &Tensor, name: &str) -> Result<Tensor> {
        let width = checked(x.dim(D::Minus1))?;
        let weight = self.matrix(name, &[width])?;
        let offset = if self.config().family == Family::Gemma3 {
            1.0
        } else {
            0.0
        };
        let normed = |x: &Tensor| {
            let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(self.config().rms_eps))?;
            x.broadcast_div(&mean.sqrt()?)?
                .broadcast_mul(&(&weight + offset)?)
        };
        checked(normed(x))
    }

    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let values = self.input.checkpoint.read_f32(name, shape)?;
        checked(Tensor::from_vec(values, shape, &Device::Cpu))
    }
}

/// Logarithms of the probabilities after each token, and how well they foretell the text.
struct Predictions {
    rows: Vec<Vec<f32>>,
    perplexity: f64,
}

impl Predictions {
    fn new(logits: &Tensor, tokens: &[u32]) -> Result<Self> {
        let mut rows: Vec<Vec<f32>> = checked(logits.to_vec2())?;
        for row in &mut rows {
            let most = row.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
            let sum: f64 = row.iter().map(|&v| f64::from(v - most).exp()).sum();
            let shift = most + sum.ln() as f32;
            row.iter_mut().for_each(|v| *v -= shift);
        }
        let next = tokens.iter().skip(1).zip(&rows);
        let surprise =
            |(&token, row): (&u32, &Vec<f32>)| row.get(token as usize).map_or(0.0, |&v| -f64::from(v));
        let total: f64 = next.map(surprise).sum();
        let perplexity = (total / (tokens.len().max(2) - 1) as f64).exp();
        Ok(Predictions { rows, perplexity })
    }

    /// Mean over the positions of the sum of p (ln p - ln q).
    fn divergence(&self, other: &Predictions) -> f64 {
        let one = |(p, q): (&Vec<f32>, &Vec<f32>)| -> f64 {
            let terms = p
                .iter()
                .zip(q)
                .map(|(p, q)| f64::from(*p).exp() * f64::from(p - q));
            terms.sum()
        };
        let sum: f64 = self.rows.iter().zip(&other.rows).map(one).sum();
        sum / self.rows.len().max(1) as f64
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
