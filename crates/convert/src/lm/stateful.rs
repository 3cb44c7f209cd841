//! One package with two states: any number of tokens a call, logits of all of them.

use candle_coreml_mil::{DType, Dim, Flexibility, TensorType};

use super::Job;
use super::decoder::{Rotary, RotaryTables, activate, add_residual, norm, parts, within_window};
use super::tensors::{LayerWeights, Projection, Shapes};
use crate::builder::ProgramBuilder;
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::function::{Arg, FunctionBuilder, Var};
use crate::layers::as_i32;
use crate::literal;

pub(super) fn write(job: &mut Job<'_>) -> Result<()> {
    let (c, o) = (job.config, job.options);
    let mut package = ProgramBuilder::create(job.to.join("model.mlpackage"))?;
    let embeddings = job.tensors.embeddings(&mut package, &o.embeddings)?;
    let table = (c.vocabulary * c.hidden) as u64;
    job.stored(table);
    let mut layers = Vec::new();
    for layer in 0..c.layers {
        layers.push(
            job.tensors
                .layer(&mut package, layer, Shapes::Matrix, o.layer(layer))?,
        );
        job.stored(super::layer_values(c));
    }
    let head = job.tensors.head(&mut package, &o.head)?;
    job.stored(table);
    let rotary = RotaryTables::write(&mut package, c, o.context)?;
    let final_norm = job.tensors.final_norm(&mut package)?;

    let mut f = FunctionBuilder::new("main");
    let call = Call::new(&mut f, c, o.context, &rotary)?;
    let table = f.weight(&embeddings)?;
    let mut x = f.gather(&table, &call.ids, 0)?;
    if let Some(scale) = c.embedding_scale {
        x = f.scale(&x, scale)?;
    }
    for (i, w) in layers.iter().enumerate() {
        x = call.layer(&mut f, &x, i, w)?;
    }
    let x = norm(&mut f, &x, &final_norm, c)?;
    let head = f.weight(&head)?;
    let logits = f.linear(&x, &head, None)?;
    f.output("logits", &logits)?;
    package.function(f)?;
    package.metadata(job.metadata("Language model with its cache", &[]));
    package.finish()
}

/// What the layers share.
struct Call<'a> {
    config: &'a DecoderConfig,
    ids: Var,
    mask: Var,
    /// The mask of the layers with a sliding window, where there are any.
    local_mask: Option<Var>,
    keys: Var,
    values: Var,
    /// Positions cached before this call, and after it, each [1].
    slots: (Var, Var),
    rotary: Rotary,
}

impl<'a> Call<'a> {
    fn new(
        f: &mut FunctionBuilder,
        c: &'a DecoderConfig,
        context: usize,
        tables: &RotaryTables,
    ) -> Result<Self> {
        let any = (1, Some(context));
        let ids = f.flexible_input(
            "inputIds",
            DType::Int32,
            &[1, 1],
            Flexibility::Ranges(vec![(1, Some(1)), any]),
        )?;
        let ranges = Flexibility::Ranges(vec![(1, Some(1)), (1, Some(1)), any, any]);
        let mask = f.flexible_input("causalMask", DType::Fp16, &[1, 1, 1, 1], ranges)?;
        let shape = [c.layers, 1, c.kv_heads, context, c.head_dim];
        let keys = f.state("keyCache", DType::Fp16, &shape)?;
        let values = f.state("valueCache", DType::Fp16, &shape)?;
        let new = size_of(f, &ids, 1)?;
        let after = size_of(f, &mask, 3)?;
        let before = f.binary("sub", &after, &new)?;
        let (start, end) = (f.squeeze(&before, 0)?, f.squeeze(&after, 0)?);
        let args = [
            ("start", (&start).into()),
            ("end", (&end).into()),
            ("step", literal::int(1).into()),
        ];
        let some = TensorType {
            dtype: DType::Int32,
            shape: vec![Dim::Unknown],
        };
        let positions = f.op("range_1d", &args, &some)?;
        let rotary = tables.at(f, &positions)?;
        let window = (0..c.layers).find_map(|layer| c.window(layer, context));
        let local_mask = match window {
            Some(window) => {
                let args = [
                    ("start", literal::int(0).into()),
                    ("end", (&end).into()),
                    ("step", literal::int(1).into()),
                ];
                let keys = f.op("range_1d", &args, &some)?;
                let keys = f.reshape(&keys, &[1, 1, 1, -1])?;
                Some(within_window(f, &mask, &positions, (&keys).into(), window)?)
            }
            None => None,
        };
        Ok(Call {
            config: c,
            ids,
            mask,
            local_mask,
            keys,
            values,
            slots: (before, after),
            rotary,
        })
    }

    fn layer(&self, f: &mut FunctionBuilder, x: &Var, layer: usize, w: &LayerWeights) -> Result<Var> {
        let c = self.config;
        let normed = norm(f, x, &w.before_attention, c)?;
        let attended = self.attention(f, &normed, layer, w)?;
        let attended = project(f, &attended, &w.output)?;
        let x = add_residual(f, x, &attended, w.after_attention.as_ref(), c)?;
        let normed = norm(f, &x, &w.before_mlp, c)?;
        let gate = project(f, &normed, &w.gate)?;
        let gate = activate(f, &gate, c)?;
        let up = project(f, &normed, &w.up)?;
        let both = f.mul(&gate, &up)?;
        let down = project(f, &both, &w.down)?;
        add_residual(f, &x, &down, w.after_mlp.as_ref(), c)
    }

    fn attention(&self, f: &mut FunctionBuilder, x: &Var, layer: usize, w: &LayerWeights) -> Result<Var> {
        let c = self.config;
        let mut heads =
            |p: &Projection, heads: usize, norm_weight: Option<&crate::builder::Weight>| -> Result<Var> {
                let y = project(f, x, p)?;
                let mut y = f.reshape(&y, &[1, -1, as_i32(&[heads])?[0], as_i32(&[c.head_dim])?[0]])?;
                if let Some(weight) = norm_weight {
                    y = norm(f, &y, weight, c)?;
                }
                f.transpose(&y, &[0, 2, 1, 3])
            };
        let norms = w.head_norms.as_ref();
        let q = heads(&w.query, c.heads, norms.map(|n| &n.0))?;
        let k = heads(&w.key, c.kv_heads, norms.map(|n| &n.1))?;
        let v = heads(&w.value, c.kv_heads, None)?;
        let local = c.is_local(layer);
        let mut q = self.rotary.turn(f, &q, c.head_dim, local)?;
        let k = self.rotary.turn(f, &k, c.head_dim, local)?;
        // The operator scales by 1 / sqrt(head_dim) itself.
        let extra = c.attention_scale * (c.head_dim as f32).sqrt();
        if (extra - 1.0).abs() > 1e-6 {
            q = f.scale(&q, extra)?;
        }
        let mask = self.local_mask.as_ref().filter(|_| local).unwrap_or(&self.mask);
        let k = self.cached(f, &self.keys, layer, &k)?;
        let v = self.cached(f, &self.values, layer, &v)?;
        let args = [
            ("query", (&q).into()),
            ("key", (&k).into()),
            ("value", (&v).into()),
            ("attn_mask", mask.into()),
        ];
        let out = f.op("scaled_dot_product_attention", &args, q.ty())?;
        let out = f.transpose(&out, &[0, 2, 1, 3])?;
        f.reshape(&out, &[1, -1, as_i32(&[c.heads * c.head_dim])?[0]])
    }

    /// Writes `rows` [1, kv_heads, n, d] behind what the state holds of `layer` and gives all of it, each head repeated
    /// for its query heads: [1, heads, k, d].
    fn cached(&self, f: &mut FunctionBuilder, state: &Var, layer: usize, rows: &Var) -> Result<Var> {
        let c = self.config;
        let old = f.read_state(state)?;
        let begin = slot(f, layer, &self.slots.0)?;
        let end = slot(f, layer + 1, &self.slots.1)?;
        let squeeze = [true, false, false, false, false];
        let args = [
            ("x", (&old).into()),
            ("update", rows.into()),
            ("begin", (&begin).into()),
            ("end", (&end).into()),
            ("stride", literal::ints(&[1; 5]).into()),
            ("begin_mask", literal::flags(&[false; 5]).into()),
            (
                "end_mask",
                literal::flags(&[false, true, true, false, true]).into(),
            ),
            ("squeeze_mask", literal::flags(&squeeze).into()),
        ];
        let updated = f.op("slice_update", &args, old.ty())?;
        f.write_state(state, &updated)?;
        let now = f.read_state(state)?;
        let mut shape = now.dims().get(1..).unwrap_or_default().to_vec();
        shape[2] = Dim::Unknown;
        let first = literal::ints(&[as_i32(&[layer])?[0], 0, 0, 0, 0]);
        let args = [
            ("x", (&now).into()),
            ("begin", first.into()),
            ("end", (&end).into()),
            ("begin_mask", literal::flags(&[false; 5]).into()),
            (
                "end_mask",
                literal::flags(&[false, true, true, false, true]).into(),
            ),
            ("squeeze_mask", literal::flags(&squeeze).into()),
        ];
        let all = f.op(
            "slice_by_index",
            &args,
            &TensorType {
                dtype: DType::Fp16,
                shape,
            },
        )?;
        if c.heads == c.kv_heads {
            return Ok(all);
        }
        let all = f.expand_dims(&all, 2)?;
        let wide = f.tile(&all, &[1, 1, c.heads / c.kv_heads, 1, 1])?;
        f.reshape(&wide, &[1, as_i32(&[c.heads])?[0], -1, as_i32(&[c.head_dim])?[0]])
    }
}

fn project(f: &mut FunctionBuilder, x: &Var, p: &Projection) -> Result<Var> {
    let (weight, bias) = parts(f, p)?;
    f.linear(x, &weight, bias.as_ref())
}

/// The size of dimension `axis` of `x`, [1].
fn size_of(f: &mut FunctionBuilder, x: &Var, axis: usize) -> Result<Var> {
    let ty = TensorType::fixed(DType::Int32, &[x.dims().len()]);
    let shape = f.op("shape", &[("x", x.into())], &ty)?;
    f.slice(&shape, 0, axis, axis + 1)
}

/// The place [layer, 0, 0, position, 0] as a vector of five.
fn slot(f: &mut FunctionBuilder, layer: usize, position: &Var) -> Result<Var> {
    let layer = literal::ints(&as_i32(&[layer])?);
    let zero = || Arg::from(literal::ints(&[0]));
    let values = vec![layer.into(), zero(), zero(), position.into(), zero()];
    let args = [
        ("values", values.into()),
        ("axis", literal::int(0).into()),
        ("interleave", literal::flag(false).into()),
    ];
    f.op("concat", &args, &TensorType::fixed(DType::Int32, &[5]))
}
