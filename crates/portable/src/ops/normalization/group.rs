//! Group norm, which programs spell out.

use crate::error::OpResult;
use crate::graph::Storage;
use crate::layout::{Layout, elements};
use crate::op::{Args, Op};
use crate::ops::linear::layout_of;
use candle_coreml_kernels::{self as kernels, Unary};
use std::sync::Arc;

/// `y = activation((x - mean) / sqrt(variance + eps) * gamma + beta)` for `x [n, c, ..]`, mean and variance over the channels of
/// a group and all positions.
#[derive(Clone)]
pub struct GroupNorm {
    /// Groups of channels side by side.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
    /// One a channel.
    pub gamma: Option<Arc<[f32]>>,
    /// One a channel.
    pub beta: Option<Arc<[f32]>>,
    /// Applied to the result.
    pub activation: Option<Unary>,
}

impl std::fmt::Debug for GroupNorm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GroupNorm {{ groups: {}, eps: {:?}", self.groups, self.eps)?;
        if self.gamma.is_some() || self.beta.is_some() {
            write!(f, ", weighted")?;
        }
        write!(f, " }}")?;
        self.activation.map_or(Ok(()), |op| write!(f, "+{op:?}"))
    }
}

/// The value as samples, channels and positions, where it is dense with channels or positions inside.
fn collapsed(layout: &Layout) -> Option<Layout> {
    let (samples, channels) = (*layout.shape.first()?, *layout.shape.get(1)?);
    let shape = [samples, channels, elements(&layout.shape[2..])];
    let three = layout.reshape(&shape)?;
    let dense = three.is_contiguous() || three.permute(&[0, 2, 1]).is_contiguous();
    dense.then_some(three)
}

impl Op for GroupNorm {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && collapsed(layout).is_some()
    }

    fn output_layout(&self, inputs: &[&Layout], _shape: &[usize]) -> Layout {
        inputs[0].dense_like()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        let bad = "internal: a picture is not dense";
        let lx = collapsed(&layout_of(&x)).ok_or(bad)?;
        let ly = Layout {
            offset: y.offset(),
            shape: y.shape().into(),
            strides: y.strides().into(),
        };
        let ly = collapsed(&ly).ok_or(bad)?;
        let norm = kernels::GroupNorm {
            groups: self.groups,
            eps: self.eps,
            gamma: self.gamma.as_deref(),
            beta: self.beta.as_deref(),
            activation: self.activation,
        };
        let x = kernels::View::new(x.data(), lx.offset, &lx.shape, &lx.strides).ok_or(bad)?;
        let y = kernels::ViewMut::new(y.into_data(), ly.offset, &ly.shape, &ly.strides).ok_or(bad)?;
        kernels::group_norm(args.pool, x, &norm, y, args.scratch);
        Ok(())
    }
}
