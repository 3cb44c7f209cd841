//! Numeric kernels on slices.
