//! `rnn` and `gru`: layers with a hidden state and no cell.

use super::activation;
use crate::error::{OpError, OpResult};
use crate::graph::ValueId;
use crate::layout::Shape;
use crate::lower::OpCx;
use crate::op::{Args, Op};
use candle_coreml_kernels::{self as kernels, Epilogue, Unary, View, ViewMut, Walk, Weights};
use smallvec::smallvec;
use std::sync::Arc;

/// Parts of the rows of a `gru`'s weights, in their order.
const RESET: usize = 0;
const OUTPUT: usize = 1;
const UPDATE: usize = 2;

/// What follows the products with input and hidden state.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cell {
    /// `h = act(W x + R h + b)`
    Rnn,
    /// `z, r = gate(W x + R h + b)`, `h = (1 - z) o + z h` with `o = act(W x + b + R (r h))`, or, when the reset gate comes
    /// after the product, `o = act(W x + b_in + r (R h + b))`.
    Gru { gates: Unary, reset_after: bool },
}

impl Cell {
    fn parts(self) -> usize {
        match self {
            Cell::Rnn => 1,
            Cell::Gru { .. } => 3,
        }
    }
}

/// One layer over `x [T, B, I]` from `h0 [B, H]`: every step's hidden state `[T, B, H]`, and the last one `[B, H]`.
pub struct Recurrent {
    cell: Cell,
    /// `[parts * H, I]`.
    input: Weights,
    /// One `[H, H]` a part.
    hidden: Vec<Weights>,
    /// Added to the product with the input, `parts * H`.
    input_bias: Vec<f32>,
    /// Added to the product with the hidden state, `parts * H`.
    hidden_bias: Vec<f32>,
    activation: Unary,
    walk: Walk,
}

impl std::fmt::Debug for Recurrent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Recurrent({:?}, hidden {})", self.cell, self.size())
    }
}

impl Recurrent {
    fn size(&self) -> usize {
        self.hidden.first().map_or(0, Weights::cols)
    }

    /// `y[b, :] = x[b, :] wᵀ` for dense rows.
    fn product(args: &mut Args<'_>, w: &Weights, x: &[f32], y: &mut [f32]) -> OpResult<()> {
        let bad = "internal: recurrent memory";
        let (k, n) = (w.cols(), w.rows());
        let rows = x.len().checked_div(k).unwrap_or(0);
        let (from, to) = ([rows, k], [rows, n]);
        let (sx, sy) = ([k as isize, 1], [n as isize, 1]);
        let x = View::new(x, 0, &from, &sx).ok_or(bad)?;
        let y = ViewMut::new(y, 0, &to, &sy).ok_or(bad)?;
        kernels::linear(args.pool, x, w, y, &Epilogue::default(), args.scratch);
        Ok(())
    }

    /// One step: `gates` holds the products with the input, all parts of one row after the other.
    fn step(&self, args: &mut Args<'_>, gates: &mut [f32], h: &mut [f32], temp: &mut Temp) -> OpResult<()> {
        let (size, wide) = (self.size(), self.size() * self.cell.parts());
        let add = |part: usize, gates: &mut [f32], product: &[f32]| {
            for (row, p) in gates.chunks_exact_mut(wide).zip(product.chunks_exact(size)) {
                let bias = &self.hidden_bias[part * size..(part + 1) * size];
                for ((g, p), b) in row[part * size..].iter_mut().zip(p).zip(bias) {
                    *g += p + b;
                }
            }
        };
        let Cell::Gru {
            gates: act,
            reset_after,
        } = self.cell
        else {
            Self::product(args, &self.hidden[0], h, &mut temp.product)?;
            add(0, gates, &temp.product);
            h.iter_mut()
                .zip(gates)
                .for_each(|(h, g)| *h = self.activation.apply(*g));
            return Ok(());
        };
        for part in [RESET, UPDATE] {
            Self::product(args, &self.hidden[part], h, &mut temp.product)?;
            add(part, gates, &temp.product);
        }
        for row in gates.chunks_exact_mut(wide) {
            row[..size].iter_mut().for_each(|g| *g = act.apply(*g));
            row[UPDATE * size..].iter_mut().for_each(|g| *g = act.apply(*g));
        }
        let reset = |n: usize| n / size * wide + n % size;
        if reset_after {
            Self::product(args, &self.hidden[OUTPUT], h, &mut temp.product)?;
            let bias = &self.hidden_bias[OUTPUT * size..UPDATE * size];
            for (n, p) in temp.product.iter_mut().enumerate() {
                *p = gates[reset(n)] * (*p + bias[n % size]);
            }
            for (n, p) in temp.product.iter().enumerate() {
                gates[reset(n) + OUTPUT * size] += p;
            }
        } else {
            for (n, (t, h)) in temp.state.iter_mut().zip(h.iter()).enumerate() {
                *t = gates[reset(n)] * h;
            }
            Self::product(args, &self.hidden[OUTPUT], &temp.state, &mut temp.product)?;
            add(OUTPUT, gates, &temp.product);
        }
        for (n, h) in h.iter_mut().enumerate() {
            let z = gates[reset(n) + UPDATE * size];
            let o = self.activation.apply(gates[reset(n) + OUTPUT * size]);
            *h = (1.0 - z) * o + z * *h;
        }
        Ok(())
    }
}

/// Working memory of one step, `[B, H]` each.
struct Temp {
    product: Vec<f32>,
    state: Vec<f32>,
}

impl Op for Recurrent {
    fn name(&self) -> &'static str {
        match self.cell {
            Cell::Rnn => "rnn",
            Cell::Gru { .. } => "gru",
        }
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (steps, x) = (args.f32(0)?.shape()[0], args.f32s(0)?);
        let mut h = args.f32s(1)?.to_vec();
        let (y, last) = (args.result_f32(0)?, args.result_f32(1)?);
        let wide = self.size() * self.cell.parts();
        let rows = h.len().checked_div(self.size()).unwrap_or(0);
        let mut gates = vec![0.0; steps * rows * wide];
        Self::product(args, &self.input, x, &mut gates)?;
        for row in gates.chunks_exact_mut(wide.max(1)) {
            row.iter_mut().zip(&self.input_bias).for_each(|(g, b)| *g += b);
        }
        let mut temp = Temp {
            product: vec![0.0; h.len()],
            state: vec![0.0; h.len()],
        };
        for step in 0..steps {
            let (t, place) = self.walk.places(step, steps);
            let gates = &mut gates[t * rows * wide..(t + 1) * rows * wide];
            self.step(args, gates, &mut h, &mut temp)?;
            y[place * h.len()..(place + 1) * h.len()].copy_from_slice(&h);
        }
        last.copy_from_slice(&h);
        Ok(())
    }
}

fn vector(cx: &mut OpCx<'_, '_>, param: &str, len: usize) -> OpResult<Vec<f32>> {
    match cx.floats(param)? {
        Some(v) if v.len() == len => Ok(v),
        Some(v) => Err(format!("{param} needs {len} elements, it has {}", v.len()).into()),
        None => Ok(vec![0.0; len]),
    }
}

/// The rows of `weight_hh` of each part as a matrix of its own.
fn split(cx: &mut OpCx<'_, '_>, parts: usize, size: usize) -> OpResult<Vec<Weights>> {
    let w = cx.value("weight_hh")?;
    if cx.shape(w).as_slice() != [parts * size, size] {
        let have = cx.shape(w);
        return Err(format!(
            "weight_hh {:?} must be [{}, {size}]",
            have.as_slice(),
            parts * size
        )
        .into());
    }
    let mut out = Vec::with_capacity(parts);
    for part in 0..parts {
        let rows = cx.slice(w, &[part * size, 0], &[1, 1], &[size, size])?;
        let matrix = cx.weights(rows, size, size)?;
        out.push(matrix.ok_or_else(|| OpError::Dynamic("weight_hh".into()))?);
    }
    Ok(out)
}

fn lower(cx: &mut OpCx<'_, '_>, cell: Cell) -> OpResult<()> {
    let (x, h0, w) = (cx.value("x")?, cx.value("initial_h")?, cx.value("weight_ih")?);
    let (sx, sh, sw) = (cx.shape(x), cx.shape(h0), cx.shape(w));
    let (size, parts) = (sh.last().copied().unwrap_or(0), cell.parts());
    let fits = sx.len() == 3 && sh.as_slice() == [sx[1], size] && sw.as_slice() == [parts * size, sx[2]];
    if !fits {
        return Err(format!("x {sx:?}, initial_h {sh:?} and weight_ih {sw:?} do not fit").into());
    }
    let input = cx.weights(w, parts * size, sx[2])?;
    let walk = match cx.text("direction")?.as_deref() {
        None | Some("forward") => Walk::Forward,
        Some("reverse") => Walk::Reverse,
        Some(other) => return Err(format!("direction {other:?} is not forward or reverse").into()),
    };
    let op = Recurrent {
        cell,
        input: input.ok_or_else(|| OpError::Dynamic("weight_ih".into()))?,
        hidden: split(cx, parts, size)?,
        input_bias: vector(cx, "input_bias", parts * size)?,
        hidden_bias: vector(cx, "bias", parts * size)?,
        activation: activation(cx, "activation", "tanh")?,
        walk,
    };
    finish(cx, op, x, h0, [sx[0], sx[1], size])
}

fn finish(
    cx: &mut OpCx<'_, '_>,
    op: Recurrent,
    x: ValueId,
    h0: ValueId,
    [t, b, size]: [usize; 3],
) -> OpResult<()> {
    let dtype = cx.dtype(x);
    let (all, one): (Shape, Shape) = (smallvec![t, b, size], smallvec![b, size]);
    let ids = cx.emit_many(Arc::new(op), &[x, h0], &[(dtype, all), (dtype, one)])?;
    // Without the sequence the last hidden state stands for it.
    let y = if cx.flag("output_sequence", false)? {
        ids[0]
    } else {
        cx.reshape(ids[1], &[1, b, size])?
    };
    cx.result(y)?;
    cx.result(ids[1])
}

/// Lowers `rnn`.
pub fn lower_rnn(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    lower(cx, Cell::Rnn)
}

/// Lowers `gru`.
pub fn lower_gru(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let gates = activation(cx, "recurrent_activation", "sigmoid")?;
    let reset_after = cx.flag("reset_after", false)?;
    lower(cx, Cell::Gru { gates, reset_after })
}
