//! Convolutions of pictures with channels last: the form in which networks for pictures run.

use super::{ConvParams, output_sizes};
use crate::error::OpResult;
use crate::graph::{Storage, ValueId};
use crate::layout::{Layout, Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, In, Op};
use candle_coreml_kernels::{self as kernels, ConvBeside, PackedConv, Unary};
use std::sync::Arc;

/// `y[n, h, w, o] = last(activation(conv(x[n, h, w, c]) + bias) + residual)`; the optional second input is the residual.
#[derive(Clone)]
pub struct ConvLast {
    /// The weights and the window.
    pub packed: Arc<PackedConv>,
    /// `[o]`.
    pub bias: Option<Arc<[f32]>>,
    /// Applied before the residual.
    pub activation: Option<Unary>,
    /// Applied at the end.
    pub last: Option<Unary>,
}

impl ConvLast {
    /// As the kernel takes it.
    pub fn call<'a>(&'a self, residual: ConvBeside<'a>) -> kernels::ConvLast<'a> {
        kernels::ConvLast {
            packed: &self.packed,
            bias: self.bias.as_deref(),
            activation: self.activation,
            residual,
            last: self.last,
        }
    }
}

impl std::fmt::Debug for ConvLast {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = self.packed.params();
        let (kernel, stride) = (&p.kernel[1..], &p.stride[1..]);
        write!(f, "ConvLast{kernel:?} stride {stride:?} {}", self.packed.method())?;
        if self.bias.is_some() {
            f.write_str("+bias")?;
        }
        self.activation.map_or(Ok(()), |a| write!(f, "+{a:?}"))?;
        self.last.map_or(Ok(()), |a| write!(f, "+residual+{a:?}"))
    }
}

impl Op for ConvLast {
    fn name(&self) -> &'static str {
        "conv"
    }

    fn accepts(&self, index: usize, layout: &Layout, storage: Storage) -> bool {
        let dense = match index {
            0 => {
                self.packed.gathers() || layout.shape.last() == Some(&1) || layout.strides.last() == Some(&1)
            }
            _ => layout.is_contiguous(),
        };
        storage == Storage::F32 && dense
    }

    fn in_place(&self) -> &'static [usize] {
        &[1]
    }

    fn flops(&self, _inputs: &[&Layout], outputs: &[&Layout]) -> u64 {
        let p = self.packed.params();
        let cells = p.kernel[1] * p.kernel[2] * self.packed.channels() / p.groups;
        2 * (elements(&outputs[0].shape) * cells) as u64
    }

    fn weight_bytes(&self) -> usize {
        self.packed.bytes()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        let residual = match args.inputs.get(1) {
            Some(In::F32(r)) => ConvBeside::In(
                r.as_slice()
                    .ok_or("internal: the residual is not row-major memory")?,
            ),
            Some(In::Result) => ConvBeside::Result,
            _ => ConvBeside::None,
        };
        kernels::conv_last(args.pool, x, &self.call(residual), y, args.scratch);
        Ok(())
    }
}

/// The convolution with channels last, where there is a way for it: pictures and sequences, constant weights. A bias that
/// is not constant is left to the caller.
pub(super) fn lower(
    cx: &mut OpCx<'_, '_>,
    (x, w, bias): (ValueId, ValueId, Option<ValueId>),
    params: &ConvParams,
) -> OpResult<Option<ValueId>> {
    let (have, weight) = (cx.shape(x), cx.shape(w));
    let rank = have.len();
    let Some(constant) = cx.constant(w) else {
        return Ok(None);
    };
    let bias = match bias {
        None => None,
        Some(b) => match cx.constant(b) {
            Some(c) => Some(c.dense()),
            None => return Ok(None),
        },
    };
    if !(3..=4).contains(&rank) || !kernels::has_conv_last(params, have[1], weight[0]) {
        return Ok(None);
    }
    let mut sizes = output_sizes(&have[2..], params)?;
    let arithmetic = cx.arithmetic();
    let matrix = (weight[0], elements(&weight[1..]));
    let height = if rank == 4 { sizes[0] } else { 1 };
    let packed = constant.packed(matrix, params, [height, sizes[sizes.len() - 1]], arithmetic)?;
    cx.release(&constant);
    let op = ConvLast {
        packed,
        bias,
        activation: None,
        last: None,
    };
    let dtype = cx.dtype(x);
    let x = channels_last(cx, x)?;
    if rank == 3 {
        sizes.insert(0, 1);
    }
    let y = cx.emit(op, &[x], dtype, &[have[0], sizes[0], sizes[1], weight[0]])?;
    channels_first(cx, y, rank).map(Some)
}

/// `[n, c, w]` or `[n, c, h, w]` as `[n, h, w, c]`, without moving anything.
pub(in crate::ops) fn channels_last(cx: &mut OpCx<'_, '_>, x: ValueId) -> OpResult<ValueId> {
    let have = cx.shape(x);
    if have.len() == 4 {
        return cx.permute(x, &[0, 2, 3, 1]);
    }
    let x = cx.permute(x, &[0, 2, 1])?;
    cx.reshape(x, &[have[0], 1, have[2], have[1]])
}

/// `[n, h, w, c]` back in the form of `rank` dimensions.
pub(in crate::ops) fn channels_first(cx: &mut OpCx<'_, '_>, y: ValueId, rank: usize) -> OpResult<ValueId> {
    if rank == 4 {
        return cx.permute(y, &[0, 3, 1, 2]);
    }
    let have = cx.shape(y);
    let flat: Shape = smallvec::smallvec![have[0], have[2], have[3]];
    let y = cx.reshape(y, &flat)?;
    cx.permute(y, &[0, 2, 1])
}
