//! ANEMLL's layout: embeddings, chunks of layers with `prefill` and `infer` over one state, and a head in parts.
//!
//! Shapes and operators are those the Neural Engine runs: projections as 1x1 convolutions on [1, channels, 1, tokens], a
//! fixed number of tokens a call, norms as layer norms, logits in parts that fit its memory.

use std::collections::BTreeSet;
use std::ops::Range;

use candle_coreml_mil::{DType, Dim, Flexibility, TensorType};

use super::decoder::{Rotary, RotaryTables, activate, add_residual, norm, parts, within_window};
use super::tensors::{LayerWeights, Projection, Shapes};
use super::{Job, LanguageModelOptions, head_splits};
use crate::builder::{ProgramBuilder, Weight};
use crate::compress::Compression;
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::function::{Arg, FunctionBuilder, Var};
use crate::literal;

const STATE: &str = "model_model_kv_cache_0";

/// Names of the packages.
pub(super) struct Names<'a> {
    prefix: &'static str,
    options: &'a LanguageModelOptions,
}

impl<'a> Names<'a> {
    pub(super) fn new(config: &DecoderConfig, options: &'a LanguageModelOptions) -> Self {
        Names {
            prefix: config.family.prefix(),
            options,
        }
    }

    fn lut(how: &Compression) -> String {
        how.palette_bits()
            .map_or_else(String::new, |bits| format!("_lut{bits}"))
    }

    pub(super) fn embeddings(&self) -> String {
        format!(
            "{}_embeddings{}.mlpackage",
            self.prefix,
            Self::lut(&self.options.embeddings)
        )
    }

    pub(super) fn chunk(&self, chunk: usize) -> String {
        let lut = Self::lut(&self.options.layers);
        format!(
            "{}_FFN_PF{lut}_chunk_{:02}of{:02}.mlpackage",
            self.prefix,
            chunk + 1,
            self.options.chunks
        )
    }

    pub(super) fn head(&self) -> String {
        format!(
            "{}_lm_head{}.mlpackage",
            self.prefix,
            Self::lut(&self.options.head)
        )
    }
}

/// Layers of one chunk: the first ones have one more where they do not divide.
pub(super) fn layers_of(layers: usize, chunks: usize, chunk: usize) -> Range<usize> {
    let (each, more) = (layers / chunks, layers % chunks);
    let start = chunk * each + chunk.min(more);
    start..start + each + usize::from(chunk < more)
}

/// Rows of the vocabulary in each part of the head: the first ones have one more where they do not divide.
pub(super) fn head_parts(config: &DecoderConfig, options: &LanguageModelOptions) -> Vec<Range<usize>> {
    let splits = head_splits(config, options);
    (0..splits)
        .map(|part| layers_of(config.vocabulary, splits, part))
        .collect()
}

pub(super) fn write(job: &mut Job<'_>) -> Result<()> {
    let names = Names::new(job.config, job.options);
    embeddings(job, &names.embeddings())?;
    for chunk in 0..job.options.chunks {
        write_chunk(job, chunk, &names.chunk(chunk))?;
    }
    head(job, &names.head())
}

/// Tokens that the functions of a chunk take: `infer`, `prefill` and the further ones, the smallest first.
fn call_sizes(o: &LanguageModelOptions) -> Vec<usize> {
    let further = o.further_batches.iter().copied();
    let further: BTreeSet<usize> = further
        .filter(|&rows| rows != o.batch && rows <= o.context)
        .collect();
    [1, o.batch].into_iter().chain(further).collect()
}

fn embeddings(job: &mut Job<'_>, name: &str) -> Result<()> {
    let (c, o) = (job.config, job.options);
    let mut package = ProgramBuilder::create(job.to.join(name))?;
    let table = job.tensors.embeddings(&mut package, &o.embeddings)?;
    job.stored((c.vocabulary * c.hidden) as u64);
    let mut f = FunctionBuilder::new("main");
    let shapes = Flexibility::Enumerated(call_sizes(o).into_iter().map(|rows| vec![1, rows]).collect());
    let ids = f.flexible_input("input_ids", DType::Int32, &[1, 1], shapes)?;
    let table = f.weight(&table)?;
    let mut hidden = f.gather(&table, &ids, 0)?;
    if let Some(scale) = c.embedding_scale {
        hidden = f.scale(&hidden, scale)?;
    }
    f.output("hidden_states", &hidden)?;
    package.function(f)?;
    package.metadata(job.metadata("Embeddings", &[]));
    package.finish()
}

fn head(job: &mut Job<'_>, name: &str) -> Result<()> {
    let (c, o) = (job.config, job.options);
    let mut package = ProgramBuilder::create(job.to.join(name))?;
    let mut weights = Vec::new();
    for (i, rows) in head_parts(c, o).into_iter().enumerate() {
        let part = job.tensors.head_rows(rows.clone())?;
        let how = o.head.relaxed(&[rows.len(), c.hidden]);
        weights.push(package.weight(
            &format!("lm_head_{}", i + 1),
            &[rows.len(), c.hidden, 1, 1],
            &part,
            &how,
        )?);
        job.stored(part.len() as u64);
    }
    let mut f = FunctionBuilder::new("main");
    let x = f.input("hidden_states", DType::Fp16, &[1, 1, c.hidden])?;
    let x = to_channels(&mut f, &x)?;
    let (mut best, mut values) = (Vec::new(), Vec::new());
    for (i, weight) in weights.iter().enumerate() {
        let weight = f.weight(weight)?;
        let logits = f.conv1x1(&x, &weight, None)?;
        let logits = from_channels(&mut f, &logits)?;
        if !o.argmax {
            f.output(&format!("logits{}", i + 1), &logits)?;
            continue;
        }
        let (index, value) = best_of(&mut f, &logits)?;
        best.push(index);
        values.push(value);
    }
    if o.argmax {
        let best = f.concat(&best.iter().collect::<Vec<_>>(), 0)?;
        let values = f.concat(&values.iter().collect::<Vec<_>>(), 0)?;
        f.output("argmax_idx", &best)?;
        f.output("argmax_val", &values)?;
    }
    package.function(f)?;
    let sizes: Vec<String> = head_parts(c, o).iter().map(|r| r.len().to_string()).collect();
    let more = [
        ("com.anemll.vocab_size", c.vocabulary.to_string()),
        ("com.anemll.lm_head_chunk_sizes", sizes.join(",")),
    ];
    package.metadata(job.metadata("Language head", &more));
    package.finish()
}

/// Index and value of the largest of `logits` [1, 1, n], each [1].
fn best_of(f: &mut FunctionBuilder, logits: &Var) -> Result<(Var, Var)> {
    let flat = f.reshape(logits, &[1, -1])?;
    let index_ty = TensorType::fixed(DType::Int32, &[1]);
    let args = [
        ("x", (&flat).into()),
        ("axis", literal::int(1).into()),
        ("keep_dims", literal::flag(false).into()),
    ];
    let index = f.op("reduce_argmax", &args, &index_ty)?;
    let args = [
        ("x", (&flat).into()),
        ("axes", literal::ints(&[1]).into()),
        ("keep_dims", literal::flag(false).into()),
    ];
    let value = f.op("reduce_max", &args, &TensorType::fixed(DType::Fp16, &[1]))?;
    Ok((index, value))
}

/// [1, n, C] to [1, C, 1, n].
fn to_channels(f: &mut FunctionBuilder, x: &Var) -> Result<Var> {
    let x = f.transpose(x, &[0, 2, 1])?;
    f.expand_dims(&x, 2)
}

/// [1, C, 1, n] to [1, n, C].
fn from_channels(f: &mut FunctionBuilder, x: &Var) -> Result<Var> {
    let x = f.squeeze(x, 2)?;
    f.transpose(&x, &[0, 2, 1])
}

/// The weights of one chunk.
struct Chunk {
    layers: Vec<(usize, LayerWeights)>,
    rotary: RotaryTables,
    /// The last chunk ends with the norm before the head.
    norm: Option<Weight>,
}

fn write_chunk(job: &mut Job<'_>, chunk: usize, name: &str) -> Result<()> {
    let (c, o) = (job.config, job.options);
    let mut package = ProgramBuilder::create(job.to.join(name))?;
    let mut layers = Vec::new();
    for layer in layers_of(c.layers, o.chunks, chunk) {
        layers.push((
            layer,
            job.tensors
                .layer(&mut package, layer, Shapes::Conv, o.layer(layer))?,
        ));
        job.stored(super::layer_values(c));
    }
    let last = chunk + 1 == o.chunks;
    let weights = Chunk {
        layers,
        // The last batch of a prompt may be padded past the context.
        rotary: RotaryTables::write(&mut package, c, o.context + o.batch)?,
        norm: if last {
            Some(job.tensors.final_norm(&mut package)?)
        } else {
            None
        },
    };
    for tokens in call_sizes(o) {
        package.function(chunk_function(c, o, &weights, tokens)?)?;
    }
    let more = [
        ("com.anemll.num_chunks", o.chunks.to_string()),
        ("com.anemll.chunk_no", (chunk + 1).to_string()),
        ("com.anemll.state_length", o.context.to_string()),
    ];
    package.metadata(job.metadata("Layers: prefill and infer", &more));
    package.finish()
}

/// One call of a chunk: what the layers share.
struct Call<'a> {
    config: &'a DecoderConfig,
    tokens: usize,
    context: usize,
    mask: Var,
    /// The mask of the layers with a sliding window, where there are any.
    local_mask: Option<Var>,
    state: Var,
    /// First position written, and the one after the last, each [1].
    slots: (Var, Var),
    rotary: Rotary,
}

fn chunk_function(
    c: &DecoderConfig,
    o: &LanguageModelOptions,
    weights: &Chunk,
    tokens: usize,
) -> Result<FunctionBuilder> {
    let name = match tokens {
        1 => "infer".to_owned(),
        rows if rows == o.batch => "prefill".to_owned(),
        rows => format!("prefill_{rows}"),
    };
    let mut f = FunctionBuilder::new(&name);
    let hidden = f.input("hidden_states", DType::Fp16, &[1, tokens, c.hidden])?;
    let positions = f.input("position_ids", DType::Int32, &[tokens])?;
    let mask = f.input("causal_mask", DType::Fp16, &[1, 1, tokens, o.context])?;
    let from = f.input("current_pos", DType::Int32, &[1])?;
    let state = f.state(
        STATE,
        DType::Fp16,
        &[2 * c.layers, c.kv_heads, o.context, c.head_dim],
    )?;
    let count = literal::int(i32::try_from(tokens).map_err(|_| Error::Option {
        option: "batch",
        problem: format!("{tokens} is too large"),
    })?);
    let to = f.op("add", &[("x", (&from).into()), ("y", count.into())], from.ty())?;
    let rotary = weights.rotary.at(&mut f, &positions)?;
    let window = weights
        .layers
        .iter()
        .find_map(|(layer, _)| c.window(*layer, o.context));
    let local_mask = match window {
        Some(window) => {
            let keys: Vec<usize> = (0..o.context).collect();
            let keys = literal::int_tensor(&crate::layers::as_i32(&keys)?, &[1, 1, 1, o.context]);
            Some(within_window(&mut f, &mask, &positions, keys.into(), window)?)
        }
        None => None,
    };
    let call = Call {
        config: c,
        tokens,
        context: o.context,
        mask,
        local_mask,
        state,
        slots: (from, to),
        rotary,
    };
    let mut x = hidden;
    for (layer, w) in &weights.layers {
        x = call.layer(&mut f, &x, *layer, w)?;
    }
    match (&weights.norm, tokens) {
        (Some(weight), 1) => x = norm(&mut f, &x, weight, c)?,
        // Nobody reads the last chunk's prefill output: one row keeps it small.
        (Some(_), _) => x = f.slice(&x, 1, 0, 1)?,
        (None, _) => {}
    }
    f.output("output_hidden_states", &x)?;
    Ok(f)
}

impl Call<'_> {
    fn layer(&self, f: &mut FunctionBuilder, x: &Var, layer: usize, w: &LayerWeights) -> Result<Var> {
        let c = self.config;
        let normed = norm(f, x, &w.before_attention, c)?;
        let input = to_channels(f, &normed)?;
        let attended = self.attention(f, &input, layer, w)?;
        let attended = self.project(f, &attended, &w.output)?;
        let attended = from_channels(f, &attended)?;
        let x = add_residual(f, x, &attended, w.after_attention.as_ref(), c)?;
        let normed = norm(f, &x, &w.before_mlp, c)?;
        let input = to_channels(f, &normed)?;
        let gate = self.project(f, &input, &w.gate)?;
        let gate = activate(f, &gate, c)?;
        let up = self.project(f, &input, &w.up)?;
        let both = f.mul(&gate, &up)?;
        let down = self.project(f, &both, &w.down)?;
        let down = from_channels(f, &down)?;
        add_residual(f, &x, &down, w.after_mlp.as_ref(), c)
    }

    fn project(&self, f: &mut FunctionBuilder, x: &Var, p: &Projection) -> Result<Var> {
        let (weight, bias) = parts(f, p)?;
        f.conv1x1(x, &weight, bias.as_ref())
    }

    /// [1, heads * d, 1, n] to [1, heads, n, d].
    fn heads(&self, f: &mut FunctionBuilder, x: &Var, heads: usize) -> Result<Var> {
        let (d, n) = (self.config.head_dim, self.tokens);
        if n == 1 {
            return f.reshape(x, &crate::layers::as_i32(&[1, heads, 1, d])?);
        }
        let x = f.reshape(x, &crate::layers::as_i32(&[1, heads, d, n])?)?;
        f.transpose(&x, &[0, 1, 3, 2])
    }

    /// From [1, hidden, 1, n] to the heads' results, [1, heads * d, 1, n].
    fn attention(&self, f: &mut FunctionBuilder, x: &Var, layer: usize, w: &LayerWeights) -> Result<Var> {
        let c = self.config;
        let (q, k, v) = (
            self.project(f, x, &w.query)?,
            self.project(f, x, &w.key)?,
            self.project(f, x, &w.value)?,
        );
        let mut q = self.heads(f, &q, c.heads)?;
        let mut k = self.heads(f, &k, c.kv_heads)?;
        let v = self.heads(f, &v, c.kv_heads)?;
        if let Some((query, key)) = &w.head_norms {
            q = norm(f, &q, query, c)?;
            k = norm(f, &k, key, c)?;
        }
        let local = c.is_local(layer);
        let q = self.rotary.turn(f, &q, c.head_dim, local)?;
        let k = self.rotary.turn(f, &k, c.head_dim, local)?;
        self.write(f, layer, &k)?;
        let cache = self.write(f, c.layers + layer, &v)?;
        let keys = self.cached(f, &cache, layer)?;
        let values = self.cached(f, &cache, c.layers + layer)?;
        let scores = f.matmul(&q, &keys, true)?;
        let scores = f.scale(&scores, c.attention_scale)?;
        let mask = self.local_mask.as_ref().filter(|_| local).unwrap_or(&self.mask);
        let scores = f.add(&scores, mask)?;
        let shares = f.softmax(&scores)?;
        let out = f.matmul(&shares, &values, false)?;
        let width = c.heads * c.head_dim;
        let out = if self.tokens == 1 {
            out
        } else {
            f.transpose(&out, &[0, 1, 3, 2])?
        };
        f.reshape(&out, &crate::layers::as_i32(&[1, width, 1, self.tokens])?)
    }

    /// Writes `rows` [1, kv_heads, n, d] to the call's slots of entry `index` and gives the cache as it is then.
    fn write(&self, f: &mut FunctionBuilder, index: usize, rows: &Var) -> Result<Var> {
        let cache = f.read_state(&self.state)?;
        let begin = slot(f, index, &self.slots.0)?;
        let end = slot(f, index + 1, &self.slots.1)?;
        let args = [
            ("x", (&cache).into()),
            ("update", rows.into()),
            ("begin", (&begin).into()),
            ("end", (&end).into()),
            ("stride", literal::ints(&[1; 4]).into()),
            ("begin_mask", literal::flags(&[false; 4]).into()),
            ("end_mask", literal::flags(&[false, true, false, true]).into()),
            ("squeeze_mask", literal::flags(&[false; 4]).into()),
        ];
        let updated = f.op("slice_update", &args, cache.ty())?;
        f.write_state(&self.state, &updated)?;
        f.read_state(&self.state)
    }

    /// Entry `index` of the cache with each key/value head repeated for its query heads, [1, heads, context, d].
    fn cached(&self, f: &mut FunctionBuilder, cache: &Var, index: usize) -> Result<Var> {
        let c = self.config;
        let entry = f.slice(cache, 0, index, index + 1)?;
        if c.heads == c.kv_heads {
            return Ok(entry);
        }
        let entry = f.squeeze(&entry, 0)?;
        let entry = f.expand_dims(&entry, 1)?;
        let wide = f.tile(&entry, &[1, c.heads / c.kv_heads, 1, 1])?;
        f.reshape(
            &wide,
            &crate::layers::as_i32(&[1, c.heads, self.context, c.head_dim])?,
        )
    }
}

/// The place [index, 0, position, 0] as a vector of four.
fn slot(f: &mut FunctionBuilder, index: usize, position: &Var) -> Result<Var> {
    let index = literal::ints(&crate::layers::as_i32(&[index])?);
    let zero = || Arg::from(literal::ints(&[0]));
    let values = vec![index.into(), zero(), position.into(), zero()];
    let args = [
        ("values", values.into()),
        ("axis", literal::int(0).into()),
        ("interleave", literal::flag(false).into()),
    ];
    let ty = TensorType {
        dtype: DType::Int32,
        shape: vec![Dim::Fixed(4)],
    };
    f.op("concat", &args, &ty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_all_layers_in_order() {
        for (layers, chunks) in [(8, 1), (8, 2), (28, 3), (7, 7), (5, 4)] {
            let all: Vec<usize> = (0..chunks).flat_map(|i| layers_of(layers, chunks, i)).collect();
            assert_eq!(all, (0..layers).collect::<Vec<_>>(), "{layers} in {chunks}");
        }
    }
}
