//! Convolutions whose weights the model computes.

use crate::error::OpResult;
use crate::graph::Storage;
use crate::layout::{Layout, elements};
use crate::op::{Args, Op};
use bytes::Bytes;
use candle_coreml_kernels::{self as kernels, ConvParams, Weights};
use std::sync::Arc;

/// As [`super::Conv`] with the weights as second input.
pub struct ComputedConv {
    /// `[O]`.
    pub bias: Option<Arc<[f32]>>,
    /// Window geometry.
    pub params: ConvParams,
    /// Whether it is `conv_transpose`.
    pub transposed: bool,
}

impl std::fmt::Debug for ComputedConv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let p = &self.params;
        write!(
            f,
            "ComputedConv{:?} stride {:?} groups {}",
            p.kernel, p.stride, p.groups
        )
    }
}

impl Op for ComputedConv {
    fn name(&self) -> &'static str {
        if self.transposed {
            "computed_conv_transpose"
        } else {
            "computed_conv"
        }
    }

    fn accepts(&self, index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && (index == 0 || layout.is_contiguous())
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let shape = args.f32(1)?.shape();
        let rows = shape.first().copied().unwrap_or(1);
        let bytes = Bytes::copy_from_slice(bytemuck::cast_slice(args.f32s(1)?));
        let cols = elements(shape.get(1..).unwrap_or_default());
        let weights = Weights::from_f32(rows, cols, bytes).map_err(|e| e.to_string())?;
        let call = kernels::Conv {
            weights: &weights,
            bias: self.bias.as_deref(),
            activation: None,
            residual: None,
            params: self.params,
        };
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        if self.transposed {
            kernels::conv_transpose(args.pool, x, &call, y, args.scratch);
        } else {
            kernels::conv(args.pool, x, &call, y, args.scratch);
        }
        Ok(())
    }
}
