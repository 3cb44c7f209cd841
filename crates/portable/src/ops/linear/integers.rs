//! Products of integers.

use super::batch;
use crate::error::OpResult;
use crate::graph::Storage;
use crate::layout::{Layout, Shape, Strides, elements};
use crate::op::{Args, Op};

/// `z[.., m, n] = sum_k x[.., m, k] * y[.., k, n]` in 32-bit integers, which wrap; leading dimensions broadcast. Indices and
/// shapes are multiplied so: nothing here is large.
#[derive(Debug)]
pub struct IntegerMatMul;

impl Op for IntegerMatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn accepts(&self, _index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::I32
    }

    fn flops(&self, inputs: &[&Layout], outputs: &[&Layout]) -> u64 {
        let depth = inputs[0].shape.last().copied().unwrap_or(1);
        2 * (elements(&outputs[0].shape) * depth) as u64
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y, z) = (args.i32(0)?, args.i32(1)?, args.out_i32(0)?);
        let lz = Layout {
            offset: z.offset(),
            shape: z.shape().into(),
            strides: z.strides().into(),
        };
        let z = z.into_data();
        let lead = lz.shape.len() - 2;
        let batched = |offset: usize, shape: &[usize], strides: &[isize]| {
            let mut wanted: Shape = lz.shape[..lead].into();
            wanted.extend_from_slice(&shape[shape.len() - 2..]);
            let layout = Layout {
                offset,
                shape: shape.into(),
                strides: Strides::from(strides),
            };
            layout
                .broadcast(&wanted)
                .ok_or("internal: batches do not broadcast")
        };
        let lx = batched(x.offset(), x.shape(), x.strides())?;
        let ly = batched(y.offset(), y.shape(), y.strides())?;
        let outer = elements(&lz.shape[..lead.saturating_sub(1)]);
        for i in 0..outer {
            let (lx, ly, lz) = (batch(&lx, lead, i), batch(&ly, lead, i), batch(&lz, lead, i));
            let depth = lx.shape[2];
            for at in 0..elements(&lz.shape) {
                let (b, rest) = (at / (lz.shape[1] * lz.shape[2]), at % (lz.shape[1] * lz.shape[2]));
                let (m, n) = (rest / lz.shape[2], rest % lz.shape[2]);
                let sum = (0..depth).fold(0_i32, |sum, k| {
                    let (a, b) = (x.data()[place(&lx, [b, m, k])], y.data()[place(&ly, [b, k, n])]);
                    sum.wrapping_add(a.wrapping_mul(b))
                });
                z[place(&lz, [b, m, n])] = sum;
            }
        }
        Ok(())
    }
}

/// Where an element lies; the view was checked when it was made.
fn place(layout: &Layout, index: [usize; 3]) -> usize {
    let steps = index.iter().zip(&layout.strides);
    let offset: isize = steps.map(|(&i, &stride)| i as isize * stride).sum();
    (layout.offset as isize + offset) as usize
}
