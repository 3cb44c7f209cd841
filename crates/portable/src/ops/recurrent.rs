//! Recurrent layers. Source: coremltools 9.0, `mil/ops/defs/iOS15/recurrent.py`, iOS17.

mod simple;

use crate::error::{OpError, OpResult};
use crate::layout::Shape;
use crate::lower::OpCx;
use crate::op::{Args, Op, OpSpec, Support, opt, req};
use candle_coreml_kernels::{self as kernels, Gate, Unary, ViewMut, Walk, Weights};
use std::sync::Arc;

/// Gates in the order of the file's weights.
const ORDER: [Gate; 4] = [Gate::Input, Gate::Forget, Gate::Output, Gate::Cell];

/// One direction: weights as stored.
struct Direction {
    input: Weights,
    hidden: Weights,
    bias: Option<Arc<[f32]>>,
    peephole: Option<Arc<[f32]>>,
    walk: Walk,
}

/// `lstm` over `x [T, B, I]` from `h0, c0 [B, D * H]` (D directions): every step's hidden state `[T, B, D * H]`, and the last
/// hidden and cell state `[B, D * H]`.
pub struct Lstm {
    directions: Vec<Direction>,
    gates: Unary,
    cell: Unary,
    output: Unary,
    clip: Option<f32>,
}

impl std::fmt::Debug for Lstm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let size = self.directions.first().map_or(0, |d| d.hidden.cols());
        write!(f, "Lstm(hidden {size}, directions {})", self.directions.len())
    }
}

impl Op for Lstm {
    fn name(&self) -> &'static str {
        "lstm"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let bad = "internal: lstm memory";
        let (x, h0, c0) = (args.f32(0)?, args.f32s(1)?, args.f32s(2)?);
        let (mut y, mut h, mut c) = (args.out_f32(0)?, args.out_f32(1)?, args.out_f32(2)?);
        let (steps, batch) = (x.shape()[0], x.shape()[1]);
        let size = self.directions.first().map_or(0, |d| d.hidden.cols());
        let wide = size * self.directions.len();
        let (y, h, c) = (
            y.as_slice().ok_or(bad)?,
            h.as_slice().ok_or(bad)?,
            c.as_slice().ok_or(bad)?,
        );
        let shape = [steps, batch, size];
        let strides = [(batch * wide) as isize, wide as isize, 1];
        for (n, d) in self.directions.iter().enumerate() {
            let part = |all: &[f32]| -> Vec<f32> {
                all.chunks_exact(wide)
                    .flat_map(|row| &row[n * size..(n + 1) * size])
                    .copied()
                    .collect()
            };
            let (mut hidden, mut cell) = (part(h0), part(c0));
            let peephole = d
                .peephole
                .as_ref()
                .map(|p| [&p[..size], &p[size..2 * size], &p[2 * size..3 * size]]);
            let layer = kernels::Lstm {
                input: &d.input,
                hidden: &d.hidden,
                bias: d.bias.as_deref(),
                order: ORDER,
                gates: self.gates,
                cell: self.cell,
                output: self.output,
                clip: self.clip,
                peephole,
                walk: d.walk,
            };
            let out = ViewMut::new(y, n * size, &shape, &strides).ok_or(bad)?;
            kernels::lstm(args.pool, x, &layer, (&mut hidden, &mut cell), out, args.scratch);
            for (from, to) in [(&hidden, &mut *h), (&cell, &mut *c)] {
                for (row, last) in from.chunks_exact(size).zip(to.chunks_exact_mut(wide)) {
                    last[n * size..(n + 1) * size].copy_from_slice(row);
                }
            }
        }
        Ok(())
    }
}

/// An activation by the name recurrent layers use.
pub fn activation_named(name: &str) -> OpResult<Unary> {
    Ok(match name {
        "tanh" => Unary::Tanh,
        "sigmoid" => Unary::Sigmoid,
        "relu" => Unary::Relu,
        "linear" => Unary::LinearActivation {
            alpha: 1.0,
            beta: 0.0,
        },
        "scaled_tanh" => Unary::ScaledTanh {
            alpha: 1.0,
            beta: 1.0,
        },
        "hard_sigmoid" | "sigmoid_hard" => Unary::SigmoidHard {
            alpha: 0.2,
            beta: 0.5,
        },
        other => return Err(format!("activation {other:?} is not one that recurrent layers know").into()),
    })
}

fn activation(cx: &mut OpCx<'_, '_>, param: &str, default: &str) -> OpResult<Unary> {
    activation_named(&cx.text(param)?.unwrap_or_else(|| default.into()).to_lowercase())
}

fn direction(
    cx: &mut OpCx<'_, '_>,
    suffix: &str,
    (rows, inputs, size): (usize, usize, usize),
    walk: Walk,
) -> OpResult<Direction> {
    let mut matrix = |name: String, cols: usize| -> OpResult<Weights> {
        let w = cx.value(&name)?;
        let shape = cx.shape(w);
        if shape.as_slice() != [rows, cols] {
            return Err(format!("{name} {:?} must be [{rows}, {cols}]", shape.as_slice()).into());
        }
        cx.weights(w, rows, cols)?.ok_or(OpError::Dynamic(name))
    };
    let input = matrix(format!("weight_ih{suffix}"), inputs)?;
    let hidden = matrix(format!("weight_hh{suffix}"), size)?;
    let mut vector = |name: String, len: usize| -> OpResult<Option<Arc<[f32]>>> {
        match cx.floats(&name)? {
            Some(v) if v.len() != len => {
                Err(format!("{name} needs {len} elements, it has {}", v.len()).into())
            }
            v => Ok(v.map(Into::into)),
        }
    };
    let bias = vector(format!("bias{suffix}"), rows)?;
    let peephole = vector(format!("peephole{suffix}"), 3 * size)?;
    Ok(Direction {
        input,
        hidden,
        bias,
        peephole,
        walk,
    })
}

fn lower_lstm(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, h0, c0) = (cx.value("x")?, cx.value("initial_h")?, cx.value("initial_c")?);
    let (sx, sh, sc) = (cx.shape(x), cx.shape(h0), cx.shape(c0));
    let weights = cx.value("weight_ih")?;
    let rows = *cx.shape(weights).first().ok_or("weight_ih must have rank 2")?;
    let name = cx.text("direction")?.unwrap_or_else(|| "forward".into());
    let both = name == "bidirectional";
    if !both && name != "forward" && name != "reverse" {
        return Err(format!("direction {name:?} is not forward, reverse or bidirectional").into());
    }
    let (size, n) = (rows / 4, if both { 2 } else { 1 });
    if sx.len() != 3 || !rows.is_multiple_of(4) || sh != sc || sh.as_slice() != [sx[1], n * size] {
        let text =
            format!("x {sx:?}, initial_h {sh:?}, initial_c {sc:?} and {rows} rows of weights do not fit");
        return Err(text.into());
    }
    let sizes = (rows, sx[2], size);
    let walk = if name == "reverse" {
        Walk::Reverse
    } else {
        Walk::Forward
    };
    let mut directions = vec![direction(cx, "", sizes, walk)?];
    if both {
        directions.push(direction(cx, "_back", sizes, Walk::Backward)?);
    }
    let gates = activation(cx, "recurrent_activation", "sigmoid")?;
    let cell = activation(cx, "cell_activation", "tanh")?;
    let output = activation(cx, "activation", "tanh")?;
    let clip = cx.float("clip")?.filter(|c| c.is_finite());
    let dtype = cx.dtype(x);
    let lstm = Arc::new(Lstm {
        directions,
        gates,
        cell,
        output,
        clip,
    });
    let all: Shape = smallvec::smallvec![sx[0], sx[1], n * size];
    let ids = cx.emit_many(
        lstm,
        &[x, h0, c0],
        &[(dtype, all), (dtype, sh.clone()), (dtype, sh)],
    )?;
    let sequence = cx.flag("output_sequence", false)?;
    // Without the sequence the last hidden state stands for it, [1, B, D * H].
    let y = if sequence {
        ids[0]
    } else {
        cx.reshape(ids[1], &[1, sx[1], n * size])?
    };
    cx.result(y)?;
    cx.result(ids[1])?;
    cx.result(ids[2])
}

macro_rules! row {
    ($name:literal, $outputs:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "recurrent",
            since: "iOS15",
            inputs: $inputs,
            outputs: Some($outputs),
            support: Support::Full,
            tolerance: 1e-5,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "gru",
        2,
        &[
            req("x"),
            req("initial_h"),
            req("weight_ih"),
            req("weight_hh"),
            opt("bias"),
            opt("direction"),
            opt("output_sequence"),
            opt("recurrent_activation"),
            opt("activation"),
            opt("reset_after"),
            opt("input_bias"),
        ],
        simple::lower_gru
    ),
    row!(
        "lstm",
        3,
        &[
            req("x"),
            req("initial_h"),
            req("initial_c"),
            req("weight_ih"),
            req("weight_hh"),
            opt("bias"),
            opt("peephole"),
            opt("weight_ih_back"),
            opt("weight_hh_back"),
            opt("bias_back"),
            opt("peephole_back"),
            opt("direction"),
            opt("output_sequence"),
            opt("recurrent_activation"),
            opt("cell_activation"),
            opt("activation"),
            opt("clip"),
        ],
        lower_lstm
    ),
    row!(
        "rnn",
        2,
        &[
            req("x"),
            req("initial_h"),
            req("weight_ih"),
            req("weight_hh"),
            opt("bias"),
            opt("direction"),
            opt("output_sequence"),
            opt("activation"),
        ],
        simple::lower_rnn
    ),
];
