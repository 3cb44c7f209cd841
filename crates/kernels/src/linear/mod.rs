//! Linear layers: activations times a stored weight matrix, with bias, activation and residual fused.
//!
//! Few tokens go vector by vector, reading the weights as stored; more go through the blocked product in `gemm`.

mod few;
mod many;
#[cfg(test)]
mod tests;

pub use few::expect;

use crate::elementwise::{Unary, apply_slice};
use crate::gemm::{
    Arithmetic, Gemm, Rows, SQUARE, block_space, int8, opening, pack_pairs, pack_panels, panel_width,
};
use crate::loops::Shared;
use crate::matvec::far::{self, Count, STREAMS};
use crate::matvec::{self, Prepared};
use crate::pool::{More, Pool};
use crate::scratch::{Own, Scratch};
use crate::simd::{Kernel, Simd, dispatch, dispatch_pairs};
use crate::strided::{View, ViewMut};
use crate::weights::{Lines, Read, Weights};
use std::cell::RefCell;
use std::ops::Range;

use few::{few, few_space};
use many::{Form, Tokens, many, pack_tokens, products};

/// Up to this many tokens are multiplied one by one.
const FEW_TOKENS: usize = 4;

/// Rows handled between two looks at the output.
const ROW_BLOCK: usize = 256;

/// Weight bytes a thread should read before a second one is worth waking.
const CHUNK_BYTES: usize = 16 * 1024;

/// Rows of weights decoded together, and tokens they are multiplied with, in the blocked product.
const GEMM_ROWS: usize = 48;
const GEMM_TOKENS: usize = 256;

/// Layers dispatched together at most; more go in turns.
const TOGETHER: usize = 8;

/// How a result is made, and what happens to it before it is stored: `activation(sum + bias) + residual`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// One value per output, N of them.
    pub bias: Option<&'a [f32]>,
    /// Applied after the bias.
    pub activation: Option<Unary>,
    /// Added last, `[m, n]`.
    pub residual: Option<View<'a, f32>>,
    /// How sums are made when there are many rows of `x`; few are multiplied as the weights are stored.
    pub arithmetic: Arithmetic,
}

/// One weight matrix applied to the common input.
#[derive(Debug, Clone, Copy)]
struct Layer<'a> {
    w: Read<'a>,
    /// Multiplies the activated result.
    up: Option<Read<'a>>,
    bias: Option<&'a [f32]>,
    activation: Option<Unary>,
    residual: Option<(Shared<f32>, [isize; 2])>,
    y: Shared<f32>,
    steps: [isize; 2],
    /// How sums of many tokens are made.
    arithmetic: Arithmetic,
    /// Results of many tokens go into these panels of the next product, not into `y`.
    panels: Option<Shared<f32>>,
}

impl<'a> Layer<'a> {
    fn new(w: &'a Weights, x: &View<'_, f32>, y: &mut ViewMut<'_, f32>, epilogue: &Epilogue<'a>) -> Self {
        let &[m, k] = x.shape() else {
            panic!("a linear layer takes matrices")
        };
        Layer::of(w, (m, k), y, epilogue)
    }

    /// Of an input of `m` tokens of `k`.
    fn of(w: &'a Weights, (m, k): (usize, usize), y: &mut ViewMut<'_, f32>, epilogue: &Epilogue<'a>) -> Self {
        let &[ym, n] = y.shape() else {
            panic!("a linear layer gives a matrix")
        };
        assert!(
            m == ym && k == w.cols() && n == w.rows(),
            "linear: x is {m} x {k}, weights {} x {}, y {ym} x {n}",
            w.rows(),
            w.cols()
        );
        assert!(
            epilogue.bias.is_none_or(|bias| bias.len() == n),
            "linear: one bias per output"
        );
        let residual = epilogue.residual.map(|r| {
            assert_eq!(r.shape(), [m, n], "linear: residual shape");
            (Shared::of(r.ptr()), [r.strides()[0], r.strides()[1]])
        });
        Layer {
            residual,
            y: Shared(y.ptr()),
            steps: [y.strides()[0], y.strides()[1]],
            ..Layer::bare(w, epilogue)
        }
    }

    /// Without an output and a residual.
    fn bare(w: &'a Weights, epilogue: &Epilogue<'a>) -> Self {
        Layer {
            w: Read::of(w),
            up: None,
            bias: epilogue.bias,
            activation: epilogue.activation,
            residual: None,
            y: Shared(std::ptr::null_mut()),
            steps: [0, 1],
            arithmetic: epilogue.arithmetic,
            panels: None,
        }
    }

    /// Adds the bias of row `row` and activates, for the sums of one row.
    fn finish_row(&self, row: usize, sums: &mut [f32]) {
        if let Some(bias) = self.bias {
            sums.iter_mut().for_each(|sum| *sum += bias[row]);
        }
        if let Some(op) = self.activation {
            apply_slice(op, sums);
        }
    }

    /// Adds the biases of `rows` and activates, for one sum per row.
    fn finish_token(&self, rows: Range<usize>, sums: &mut [f32]) {
        if let Some(bias) = self.bias {
            sums.iter_mut()
                .zip(&bias[rows])
                .for_each(|(sum, bias)| *sum += bias);
        }
        if let Some(op) = self.activation {
            apply_slice(op, sums);
        }
    }

    /// Adds the residual and stores `sums`, which are of rows `rows.start..` for token `token`.
    ///
    /// # Safety
    /// `token` and the rows are inside the output, and no other thread has them.
    unsafe fn store_token(&self, token: usize, first: usize, sums: impl Iterator<Item = f32>) {
        let to = self
            .y
            .at(token as isize * self.steps[0] + first as isize * self.steps[1]);
        match self.residual {
            None if self.steps[1] == 1 => {
                for (i, sum) in sums.enumerate() {
                    // SAFETY: the caller's.
                    unsafe { *to.wrapping_add(i) = sum };
                }
            }
            None => {
                for (i, sum) in sums.enumerate() {
                    // SAFETY: the caller's.
                    unsafe { *to.wrapping_offset(i as isize * self.steps[1]) = sum };
                }
            }
            Some((residual, [line, 1])) if self.steps[1] == 1 => {
                let from = residual.at(token as isize * line + first as isize);
                for (i, sum) in sums.enumerate() {
                    // SAFETY: the caller's; the residual has the shape of the output.
                    unsafe { *to.wrapping_add(i) = sum + *from.wrapping_add(i) };
                }
            }
            Some((residual, steps)) => {
                let from = residual.at(token as isize * steps[0] + first as isize * steps[1]);
                for (i, sum) in sums.enumerate() {
                    // SAFETY: the residual has the shape of the output.
                    let sum = sum + unsafe { *from.wrapping_offset(i as isize * steps[1]) };
                    // SAFETY: the caller's.
                    unsafe { *to.wrapping_offset(i as isize * self.steps[1]) = sum };
                }
            }
        }
    }
}

/// `y[m, n] = activation(sum_k x[m, k] * w[n, k] + bias[n]) + residual[m, n]`.
///
/// Weights of 4- and 6-bit palettes are multiplied in 16-bit fixed point when `m` is small: an activation is then off
/// by at most `2^-15` of the greatest magnitude among its 64 neighbours. Everything else is `f32`.
///
/// # Panics
/// When the shapes do not fit.
pub fn linear(
    pool: &Pool,
    x: View<'_, f32>,
    w: &Weights,
    mut y: ViewMut<'_, f32>,
    epilogue: &Epilogue<'_>,
    scratch: &mut Scratch,
) {
    let tokens = x.shape()[0];
    if tokens <= FEW_TOKENS {
        w.used(pool, None);
    }
    let layer = Layer::new(w, &x, &mut y, epilogue);
    if tokens <= FEW_TOKENS {
        few(pool, x, &[layer], scratch.f32(few_space(tokens, x.shape()[1])));
    } else {
        many(pool, x, &[layer], scratch);
    }
}

/// `y[m, n] = act(sum_k x[m, k] * gate[n, k]) * sum_k x[m, k] * up[n, k]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn gated(
    pool: &Pool,
    x: View<'_, f32>,
    (gate, up): (&Weights, &Weights),
    (act, arithmetic): (Unary, Arithmetic),
    mut y: ViewMut<'_, f32>,
    scratch: &mut Scratch,
) {
    assert!(
        up.rows() == gate.rows() && up.cols() == gate.cols(),
        "gated: two matrices of one shape"
    );
    let epilogue = Epilogue {
        activation: Some(act),
        arithmetic,
        ..Epilogue::default()
    };
    let tokens = x.shape()[0];
    if tokens <= FEW_TOKENS {
        gate.used(pool, Some(up));
    }
    let layer = Layer {
        up: Some(Read::of(up)),
        ..Layer::new(gate, &x, &mut y, &epilogue)
    };
    if tokens <= FEW_TOKENS {
        few(pool, x, &[layer], scratch.f32(few_space(tokens, x.shape()[1])));
    } else {
        many(pool, x, &[layer], scratch);
    }
}

/// A gated MLP: `down(act(x gateᵀ) * (x upᵀ))`.
#[derive(Debug, Clone, Copy)]
pub struct Mlp<'a> {
    /// `[n, k]`.
    pub gate: &'a Weights,
    /// `[n, k]`.
    pub up: &'a Weights,
    /// Applied to the gate's product.
    pub activation: Unary,
    /// `[l, n]`.
    pub down: &'a Weights,
}

/// `y[m, l] = mlp(x[m, k])` with the epilogue of its last product. What lies between the products is not stored where they read it from.
/// `next` is called when the last product begins, and may say with [`expect`] what is read after it.
///
/// # Panics
/// When the shapes do not fit.
pub fn mlp(
    pool: &Pool,
    x: View<'_, f32>,
    mlp: &Mlp<'_>,
    (mut y, epilogue): (ViewMut<'_, f32>, &Epilogue<'_>),
    next: &dyn Fn(),
    scratch: &mut Scratch,
) {
    let (&[m, k], n) = (x.shape(), mlp.gate.rows()) else {
        panic!("a linear layer takes matrices")
    };
    assert!(
        mlp.up.rows() == n && mlp.up.cols() == k && mlp.gate.cols() == k && mlp.down.cols() == n,
        "mlp: weights fit each other"
    );
    let between = Epilogue {
        activation: Some(mlp.activation),
        arithmetic: epilogue.arithmetic,
        ..Epilogue::default()
    };
    if m <= FEW_TOKENS {
        mlp.gate.used(pool, Some(mlp.up));
        mlp.down.used(pool, None);
        let space = scratch.f32(few_space(m, k) + few_space(m, n) + m * n);
        let (first, space) = space.split_at_mut(few_space(m, k));
        let (second, hidden) = space.split_at_mut(few_space(m, n));
        let gate = Layer {
            up: Some(Read::of(mlp.up)),
            y: Shared(hidden.as_mut_ptr()),
            steps: [n as isize, 1],
            ..Layer::bare(mlp.gate, &between)
        };
        expect(pool, std::iter::once((mlp.down, None)));
        few(pool, x, &[gate], first);
        let (shape, strides) = ([m, n], [n as isize, 1]);
        let hidden = View::new(hidden, 0, &shape, &strides).expect("so many numbers were asked for");
        let down = Layer::new(mlp.down, &hidden, &mut y, epilogue);
        next();
        return few(pool, hidden, &[down], second);
    }
    let gate = Layer {
        up: Some(Read::of(mlp.up)),
        ..Layer::bare(mlp.gate, &between)
    };
    let down = Layer::of(mlp.down, (m, n), &mut y, epilogue);
    let form = Form::of(pool, &[gate, down]);
    let [first, second] = [k, n].map(|k| Tokens::new(m, k, form));
    let (space, work) = scratch.with_own(first.len() + second.len(), pool.threads(), first.work());
    let (packed, hidden) = space.split_at_mut(first.len());
    pack_tokens(pool, &x, first, packed);
    let panels = Some(Shared(hidden.as_mut_ptr()));
    products(pool, (packed, first), &[Layer { panels, ..gate }], work);
    next();
    products(pool, (hidden, second), &[down], work);
}

/// Several linear layers on one `x`, dispatched together: `outputs[i] = x * layers[i].0^T + layers[i].1`.
///
/// # Panics
/// When the shapes do not fit, or there are not as many outputs as layers.
pub fn linear_many(
    pool: &Pool,
    x: View<'_, f32>,
    layers: &[(&Weights, Option<&[f32]>)],
    arithmetic: Arithmetic,
    outputs: &mut [ViewMut<'_, f32>],
    scratch: &mut Scratch,
) {
    assert_eq!(layers.len(), outputs.len(), "as many outputs as layers");
    for (layers, outputs) in layers.chunks(TOGETHER).zip(outputs.chunks_mut(TOGETHER)) {
        let tokens = x.shape()[0];
        if tokens <= FEW_TOKENS {
            layers.iter().for_each(|(w, _)| w.used(pool, None));
        }
        let mut parts: [Option<Layer<'_>>; TOGETHER] = [None; TOGETHER];
        for ((part, (w, bias)), y) in parts.iter_mut().zip(layers).zip(outputs) {
            *part = Some(Layer::new(
                w,
                &x,
                y,
                &Epilogue {
                    bias: *bias,
                    arithmetic,
                    ..Epilogue::default()
                },
            ));
        }
        let Some(first) = parts[0] else { return };
        let parts = parts.map(|part| part.unwrap_or(first));
        if tokens <= FEW_TOKENS {
            few(
                pool,
                x,
                &parts[..layers.len()],
                scratch.f32(few_space(tokens, x.shape()[1])),
            );
        } else {
            many(pool, x, &parts[..layers.len()], scratch);
        }
    }
}
