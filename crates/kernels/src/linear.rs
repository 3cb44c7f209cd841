//! Linear layers: activations times a stored weight matrix, with bias, activation and residual fused.

use crate::elementwise::Unary;
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut};
use crate::weights::Weights;

/// What happens to a result before it is stored: `activation(sum + bias) + residual`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// One value per output, N of them.
    pub bias: Option<&'a [f32]>,
    /// Applied after the bias.
    pub activation: Option<Unary>,
    /// Added last, `[m, n]`.
    pub residual: Option<View<'a, f32>>,
}

/// `y[m, n] = activation(sum_k x[m, k] * w[n, k] + bias[n]) + residual[m, n]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn linear(
    pool: &Pool,
    x: View<'_, f32>,
    w: &Weights,
    mut y: ViewMut<'_, f32>,
    epilogue: &Epilogue<'_>,
    _scratch: &mut Scratch,
) {
    let (&[m, k], &[ym, n]) = (x.shape(), y.shape()) else {
        panic!("a linear layer takes matrices")
    };
    assert!(
        m == ym && k == w.cols() && n == w.rows(),
        "linear: {m} x {k} by {} x {}",
        w.rows(),
        w.cols()
    );
    let (xs, ys) = ([x.strides()[0], x.strides()[1]], [y.strides()[0], y.strides()[1]]);
    let (px, py) = (Shared::of(x.ptr()), Shared(y.ptr()));
    let residual = epilogue
        .residual
        .map(|r| (Shared::of(r.ptr()), [r.strides()[0], r.strides()[1]]));
    pool.run_ranges(n, 16, &|rows| {
        let mut row = vec![0.0; k];
        for r in rows {
            w.row(r, &mut row);
            for i in 0..m {
                let mut sum = 0.0;
                for (c, w) in row.iter().enumerate() {
                    // SAFETY: `x` holds every index of its shape `[m, k]`.
                    sum += w * unsafe { *px.at(i as isize * xs[0] + c as isize * xs[1]) };
                }
                sum += epilogue.bias.map_or(0.0, |bias| bias[r]);
                sum = epilogue.activation.map_or(sum, |op| op.apply(sum));
                if let Some((p, s)) = residual {
                    // SAFETY: checked to have the shape `[m, n]`.
                    sum += unsafe { *p.at(i as isize * s[0] + r as isize * s[1]) };
                }
                // SAFETY: `y` holds `[m, n]`, and each row of weights is one thread's.
                unsafe { *py.at(i as isize * ys[0] + r as isize * ys[1]) = sum };
            }
        }
    });
}

/// `y[m, n] = act(sum_k x[m, k] * gate[n, k]) * sum_k x[m, k] * up[n, k]`.
///
/// # Panics
/// When the shapes do not fit.
pub fn gated(
    pool: &Pool,
    x: View<'_, f32>,
    (gate, up): (&Weights, &Weights),
    act: Unary,
    mut y: ViewMut<'_, f32>,
    scratch: &mut Scratch,
) {
    let epilogue = Epilogue {
        activation: Some(act),
        ..Epilogue::default()
    };
    linear(pool, x, gate, y.reborrow(), &epilogue, scratch);
    let shape = [y.shape()[0], y.shape()[1]];
    let strides = [shape[1] as isize, 1];
    let mut other = vec![0.0; y.len()];
    let view = ViewMut::new(&mut other, 0, &shape, &strides).expect("a dense view of its own buffer");
    linear(pool, x, up, view, &Epilogue::default(), scratch);
    let view = View::new(&other, 0, &shape, &strides).expect("a dense view of its own buffer");
    crate::elementwise::binary_inplace(pool, crate::elementwise::Binary::Mul, y, view);
}

/// Several linear layers on one `x`, dispatched together: `outputs[i] = x * layers[i].0^T + layers[i].1`.
///
/// # Panics
/// When the shapes do not fit, or there are not as many outputs as layers.
pub fn linear_many(
    pool: &Pool,
    x: View<'_, f32>,
    layers: &[(&Weights, Option<&[f32]>)],
    outputs: &mut [ViewMut<'_, f32>],
    scratch: &mut Scratch,
) {
    assert_eq!(layers.len(), outputs.len(), "as many outputs as layers");
    for ((weights, bias), y) in layers.iter().zip(outputs) {
        linear(
            pool,
            x,
            weights,
            y.reborrow(),
            &Epilogue {
                bias: *bias,
                ..Epilogue::default()
            },
            scratch,
        );
    }
}
