//! Numeric kernels on slices.
//!
//! Everything here works on strided [`View`](strided::View)s of plain numbers and on [`Weights`](weights::Weights) kept
//! as a model stores them. Work is spread over a [`Pool`](pool::Pool). The crate knows no model format and no
//! tensor library.

// Kernels index registers and several operands by one number; iterators would hide which.
#![allow(clippy::needless_range_loop)]
// Lists of key ranges are lists of ranges.
#![allow(clippy::single_range_in_vec_init)]

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
pub mod rope;
pub mod scratch;
mod simd;
pub mod strided;
pub mod weights;
