//! A depthwise convolution together with those of one pixel before and behind it: made by a pass.

use super::last::ConvLast;
use crate::error::OpResult;
use crate::graph::Storage;
use crate::layout::{Layout, elements};
use crate::op::{Args, In, Op};
use candle_coreml_kernels::{self as kernels, ConvBeside};

/// `project(depthwise(expand(x[n, h, w, c]))) (+ residual)`, row by row; the optional second input is the residual.
#[derive(Clone)]
pub struct ConvChain {
    /// A window of one pixel.
    pub expand: Option<ConvLast>,
    /// One channel a group.
    pub depthwise: ConvLast,
    /// A window of one pixel.
    pub project: Option<ConvLast>,
}

impl std::fmt::Debug for ConvChain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConvChain")?;
        let parts = [self.expand.as_ref(), Some(&self.depthwise), self.project.as_ref()];
        f.debug_list().entries(parts.into_iter().flatten()).finish()
    }
}

impl ConvChain {
    /// As the kernel takes it, with what is beside the last result.
    pub fn call<'a>(&'a self, residual: ConvBeside<'a>) -> kernels::ConvChain<'a> {
        let none = ConvBeside::None;
        kernels::ConvChain {
            expand: self.expand.as_ref().map(|e| e.call(none)),
            depthwise: self.depthwise.call(none),
            project: self.project.as_ref().map(|p| p.call(residual)),
        }
    }
}

impl Op for ConvChain {
    fn name(&self) -> &'static str {
        "conv_chain"
    }

    fn accepts(&self, index: usize, layout: &Layout, storage: Storage) -> bool {
        let dense = match index {
            0 => layout.shape.last() == Some(&1) || layout.strides.last() == Some(&1),
            _ => layout.is_contiguous(),
        };
        storage == Storage::F32 && dense
    }

    fn flops(&self, inputs: &[&Layout], outputs: &[&Layout]) -> u64 {
        let (before, after) = (elements(&inputs[0].shape), elements(&outputs[0].shape));
        let window = self.depthwise.packed.params();
        let middle = self.depthwise.packed.channels();
        let pixels = after
            / self
                .project
                .as_ref()
                .map_or(middle, |p| p.packed.outputs())
                .max(1);
        let expand = self.expand.as_ref().map_or(0, |_| before * middle);
        let project = self.project.as_ref().map_or(0, |_| after * middle);
        2 * (expand + pixels * middle * window.kernel[1] * window.kernel[2] + project) as u64
    }

    fn weight_bytes(&self) -> usize {
        let parts = [self.expand.as_ref(), Some(&self.depthwise), self.project.as_ref()];
        parts.into_iter().flatten().map(Op::weight_bytes).sum()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        let residual = match args.inputs.get(1) {
            Some(In::F32(r)) => ConvBeside::In(
                r.as_slice()
                    .ok_or("internal: the residual is not row-major memory")?,
            ),
            _ => ConvBeside::None,
        };
        kernels::conv_chain(args.pool, x, &self.call(residual), y, args.scratch);
        Ok(())
    }
}
