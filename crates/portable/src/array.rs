//! Values at the border of the engine: row-major elements with a shape.

use half::f16;

/// A borrowed value.
#[derive(Debug, Clone, Copy)]
pub struct Array<'a> {
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Elements, row-major.
    pub data: Data<'a>,
}

/// Elements of an [`Array`].
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit floats.
    F16(&'a [f16]),
    /// 32-bit integers; every integer type and truth values are given so.
    I32(&'a [i32]),
}

/// A value of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedArray {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub data: Buffer,
}

/// Elements of an [`OwnedArray`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Buffer {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 16-bit floats.
    F16(Vec<f16>),
    /// 32-bit integers.
    I32(Vec<i32>),
    /// 64-bit integers: the label of a classifier whose classes are numbers.
    I64(Vec<i64>),
    /// Texts.
    Strings(Vec<String>),
    /// Numbers by label: the probabilities of a classifier, in the order of its classes.
    Dictionary(Vec<(Label, f64)>),
}

/// A class of a classifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Label {
    /// By name.
    Text(String),
    /// By number.
    Number(i64),
}

impl Data<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::F16(v) => v.len(),
            Data::I32(v) => v.len(),
        }
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl OwnedArray {
    /// The same value, borrowed; `None` for texts, labels and dictionaries.
    pub fn as_array(&self) -> Option<Array<'_>> {
        let data = match &self.data {
            Buffer::F32(v) => Data::F32(v),
            Buffer::F16(v) => Data::F16(v),
            Buffer::I32(v) => Data::I32(v),
            Buffer::I64(_) | Buffer::Strings(_) | Buffer::Dictionary(_) => return None,
        };
        Some(Array {
            shape: &self.shape,
            data,
        })
    }

    /// The elements as 32-bit floats; empty for texts and dictionaries.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            Buffer::F32(v) => v.clone(),
            Buffer::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Buffer::I32(v) => v.iter().map(|&x| x as f32).collect(),
            Buffer::I64(v) => v.iter().map(|&x| x as f32).collect(),
            Buffer::Strings(_) | Buffer::Dictionary(_) => Vec::new(),
        }
    }
}
