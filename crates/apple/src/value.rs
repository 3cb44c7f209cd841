//! What goes in and comes out besides arrays, borrowed and owned.

use crate::array::{Array, ArrayRef};
use half::f16;
use std::collections::BTreeMap;

/// A picture, row-major without gaps.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// The pixels.
    pub pixels: Pixels,
}

/// The pixels of a [`Picture`].
#[derive(Debug, Clone, PartialEq)]
pub enum Pixels {
    /// One byte a pixel.
    Gray(Vec<u8>),
    /// One 16-bit float a pixel.
    GrayF16(Vec<f16>),
    /// Red, green, blue; a byte each.
    Rgb(Vec<u8>),
}

/// Formats of pixel buffers that Core ML takes and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PixelFormat {
    /// `kCVPixelFormatType_OneComponent8`
    Gray,
    /// `kCVPixelFormatType_OneComponent16Half`
    GrayF16,
    /// `kCVPixelFormatType_32BGRA`; Core ML turns it to the order the model wants.
    Bgra,
}

/// An input.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Value<'a> {
    Array(ArrayRef<'a>),
    Picture(&'a Picture),
    String(&'a str),
    Int64(i64),
    Double(f64),
    /// String keys.
    Strings(&'a BTreeMap<String, f64>),
    /// Integer keys.
    Integers(&'a BTreeMap<i64, f64>),
    StringSequence(&'a [String]),
    IntegerSequence(&'a [i64]),
}

/// An output.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum OwnedValue {
    Array(Array),
    Picture(Picture),
    String(String),
    Int64(i64),
    Double(f64),
    /// String keys.
    Strings(BTreeMap<String, f64>),
    /// Integer keys.
    Integers(BTreeMap<i64, f64>),
    StringSequence(Vec<String>),
    IntegerSequence(Vec<i64>),
}
