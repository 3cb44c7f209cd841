//! Numeric kernels on slices.
//!
//! Everything here works on strided [`View`]s of plain numbers and on [`Weights`] kept
//! as a model stores them. Work is spread over a [`Pool`]. The crate knows no model format and no
//! tensor library.

// Kernels index registers and several operands by one number; iterators would hide which.
#![allow(clippy::needless_range_loop)]
// Lists of key ranges are lists of ranges.
#![allow(clippy::single_range_in_vec_init)]

mod ahead;
mod arena;
pub mod attention;
pub mod conv;
pub mod copy;
pub mod elementwise;
pub mod gather;
mod gemm;
pub mod linear;
mod loops;
pub mod matmul;
mod matvec;
pub mod norm;
pub mod pool;
pub mod pooling;
pub mod recurrent;
pub mod reduce;
pub mod resize;
pub mod rope;
pub mod scratch;
mod simd;
pub mod strided;
#[cfg(target_arch = "x86_64")]
mod tiles;
pub mod weights;

pub use ahead::ask;
pub use arena::{ALIGN_ELEMENTS, Arena};
pub use attention::{Attention, attention};
pub use conv::{
    Conv, ConvBeside, ConvChain, ConvLast, ConvParams, PackedConv, conv, conv_chain, conv_last,
    conv_transpose, has_conv_chain, has_conv_last,
};
pub use copy::{ConvertTo, copy, f16_to_f32, f32_to_f16, round_to_f16};
pub use elementwise::*;
pub use gather::{gather, gather_rows, wrap_index};
pub use gemm::Arithmetic;
pub use linear::{Epilogue, Mlp, expect as linear_expect, gated, linear, linear_many, mlp};
pub use matmul::{Operand, matmul_f32};
pub use norm::*;
pub use pool::Pool;
pub use pooling::{Pooling, pool as pool_windows, pool_last};
pub use recurrent::{Gate, Lstm, Walk, lstm};
pub use reduce::{Reduce, arg_extreme, reduce, reduce_i32};
pub use resize::{Beside, Sampler, Tap, resize, resize_last, sample};
pub use rope::rotate_half;
pub use scratch::Scratch;
pub use strided::{View, ViewMut};
pub use weights::{Weights, WeightsError};
