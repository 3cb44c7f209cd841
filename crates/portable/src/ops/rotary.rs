//! Rotary position embedding: made by a pass, not an operator of MIL.

use crate::error::OpResult;
use crate::graph::Storage;
use crate::layout::{Layout, elements};
use crate::op::{Args, Op};
use crate::ops::linear::layout_of;
use crate::ops::normalization::last_is_inner;
use candle_coreml_kernels as kernels;

/// `y = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]` for the halves x1, x2 of the last dimension of `x [.., H, S, D]`; `cos` and
/// `sin` are `[.., S, D / 2]`, or `[.., S, D]` with a value of their own for the second half.
#[derive(Debug, Clone)]
pub struct Rotary;

impl Op for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn accepts(&self, index: usize, layout: &Layout, storage: Storage) -> bool {
        let heads_flat = index > 0 || layout.shape[..layout.shape.len() - 3].iter().all(|&d| d == 1);
        storage == Storage::F32 && heads_flat && last_is_inner(layout)
    }

    fn output_layout(&self, inputs: &[&Layout], _shape: &[usize]) -> Layout {
        inputs[0].dense_like()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, cos, sin) = (args.f32(0)?, args.f32(1)?, args.f32(2)?);
        let y = args.out_f32(0)?;
        let tail = |l: Layout, keep: usize| {
            let from = l.shape.len() - keep;
            Layout {
                offset: l.offset,
                shape: l.shape[from..].into(),
                strides: l.strides[from..].into(),
            }
        };
        let (lx, lc, ls) = (
            tail(layout_of(&x), 3),
            tail(layout_of(&cos), 2),
            tail(layout_of(&sin), 2),
        );
        let ly = tail(
            Layout {
                offset: y.offset(),
                shape: y.shape().into(),
                strides: y.strides().into(),
            },
            3,
        );
        debug_assert_eq!(elements(&lx.shape), elements(x.shape()));
        let bad = "internal: a rotary view failed";
        kernels::rotate_half(
            args.pool,
            kernels::View::new(x.data(), lx.offset, &lx.shape, &lx.strides).ok_or(bad)?,
            kernels::View::new(cos.data(), lc.offset, &lc.shape, &lc.strides).ok_or(bad)?,
            kernels::View::new(sin.data(), ls.offset, &ls.shape, &ls.strides).ok_or(bad)?,
            kernels::ViewMut::new(y.into_data(), ly.offset, &ly.shape, &ly.strides).ok_or(bad)?,
        );
        Ok(())
    }
}
