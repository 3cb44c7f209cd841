//! What goes into a model and comes out of it, whichever engine runs it.

use crate::error::Error;
use candle_core::{DType, Device, Tensor};
use half::f16;
use std::collections::BTreeMap;

/// One input or output of a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Value {
    /// A multi-array.
    Tensor(Tensor),
    /// A picture.
    Image(Image),
    /// Text, for instance a predicted label.
    String(String),
    /// A 64-bit integer.
    Int64(i64),
    /// A double.
    Double(f64),
    /// A number for each label, for instance class probabilities.
    Dictionary(Dictionary),
    /// Integers or strings in order.
    Sequence(Sequence),
}

/// What a caller gives for an input, borrowed for the time of the call.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Given<'a> {
    /// A tensor, on the CPU or on Metal.
    Tensor(&'a Tensor),
    /// A value of any kind.
    Value(&'a Value),
    /// Elements in memory that is not Candle's.
    Array(ArrayView<'a>),
}

/// A multi-array in memory that is not Candle's, for instance numpy's: row-major, without gaps.
#[derive(Debug, Clone, Copy)]
pub struct ArrayView<'a> {
    pub(crate) shape: &'a [usize],
    pub(crate) elements: Elements<'a>,
}

/// The elements of an [`ArrayView`].
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Elements<'a> {
    U8(&'a [u8]),
    U32(&'a [u32]),
    I16(&'a [i16]),
    I32(&'a [i32]),
    I64(&'a [i64]),
    F16(&'a [f16]),
    F32(&'a [f32]),
    F64(&'a [f64]),
}

/// A number for each label.
#[derive(Debug, Clone, PartialEq)]
pub enum Dictionary {
    /// Labels that are strings.
    Strings(BTreeMap<String, f64>),
    /// Labels that are integers.
    Integers(BTreeMap<i64, f64>),
}

/// Integers or strings in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sequence {
    /// Strings.
    Strings(Vec<String>),
    /// 64-bit integers.
    Integers(Vec<i64>),
}

/// A picture: rows from the top, pixels from the left, red before green before blue.
///
/// Models that want blue first (`ColorSpace::Bgr`) are given it by the engine; the order here never changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    width: usize,
    height: usize,
    pixels: Pixels,
}

/// The pixels of an [`Image`], row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Pixels {
    /// One byte a pixel.
    Gray(Vec<u8>),
    /// One 16-bit float a pixel.
    GrayF16(Vec<f16>),
    /// Three bytes a pixel: red, green, blue.
    Rgb(Vec<u8>),
}

impl<'a> ArrayView<'a> {
    /// Elements of the type the model declares are read where they are; others are converted as those of tensors.
    ///
    /// # Errors
    /// [`Error::ElementCount`] when there are not as many elements as the shape has.
    ///
    /// ```
    /// use candle_coreml::{ArrayView, Elements};
    /// assert!(ArrayView::new(&[2, 2], Elements::F32(&[1.0, 2.0, 3.0, 4.0])).is_ok());
    /// assert!(ArrayView::new(&[2, 2], Elements::F32(&[1.0])).is_err());
    /// ```
    pub fn new(shape: &'a [usize], elements: Elements<'a>) -> Result<Self, Error> {
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if count != Some(elements.len()) {
            return Err(Error::ElementCount {
                shape: shape.to_vec(),
                found: elements.len(),
            });
        }
        Ok(ArrayView { shape, elements })
    }

    /// A tensor with a copy of the elements, on the CPU.
    ///
    /// # Errors
    /// Only those of Candle.
    pub fn to_tensor(self) -> Result<Tensor, Error> {
        let (shape, cpu) = (self.shape, &Device::Cpu);
        Ok(match self.elements {
            Elements::U8(v) => Tensor::from_slice(v, shape, cpu)?,
            Elements::U32(v) => Tensor::from_slice(v, shape, cpu)?,
            Elements::I16(v) => Tensor::from_slice(v, shape, cpu)?,
            Elements::I32(v) => Tensor::from_slice(v, shape, cpu)?,
            Elements::I64(v) => Tensor::from_slice(v, shape, cpu)?,
            Elements::F16(v) => Tensor::from_slice(v, shape, cpu)?,
            Elements::F32(v) => Tensor::from_slice(v, shape, cpu)?,
            Elements::F64(v) => Tensor::from_slice(v, shape, cpu)?,
        })
    }
}

impl Elements<'_> {
    fn len(&self) -> usize {
        match self {
            Elements::U8(v) => v.len(),
            Elements::U32(v) => v.len(),
            Elements::I16(v) => v.len(),
            Elements::I32(v) => v.len(),
            Elements::I64(v) => v.len(),
            Elements::F16(v) => v.len(),
            Elements::F32(v) => v.len(),
            Elements::F64(v) => v.len(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Elements::U8(_) => "u8",
            Elements::U32(_) => "u32",
            Elements::I16(_) => "i16",
            Elements::I32(_) => "i32",
            Elements::I64(_) => "i64",
            Elements::F16(_) => "f16",
            Elements::F32(_) => "f32",
            Elements::F64(_) => "f64",
        }
    }
}

impl<'a> Given<'a> {
    pub(crate) fn tensor(self) -> Option<&'a Tensor> {
        match self {
            Given::Tensor(tensor) => Some(tensor),
            Given::Value(value) => value.as_tensor(),
            Given::Array(_) => None,
        }
    }

    /// What it is, for messages.
    pub(crate) fn describe(self) -> String {
        match self {
            Given::Tensor(t) | Given::Value(Value::Tensor(t)) => {
                format!("a {} tensor of shape {:?}", t.dtype().as_str(), t.dims())
            }
            Given::Value(Value::Image(image)) => image.describe(),
            Given::Value(value) => value.kind().to_string(),
            Given::Array(a) => format!("a {} array of shape {:?}", a.elements.name(), a.shape),
        }
    }
}

impl Value {
    /// The tensor, if it is one.
    pub fn as_tensor(&self) -> Option<&Tensor> {
        if let Value::Tensor(t) = self {
            Some(t)
        } else {
            None
        }
    }

    /// The kind with its article, for messages: `a tensor`, `an image`.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Tensor(_) => "a tensor",
            Value::Image(_) => "an image",
            Value::String(_) => "a string",
            Value::Int64(_) => "an integer",
            Value::Double(_) => "a double",
            Value::Dictionary(Dictionary::Strings(_)) => "a dictionary with string keys",
            Value::Dictionary(Dictionary::Integers(_)) => "a dictionary with integer keys",
            Value::Sequence(Sequence::Strings(_)) => "a sequence of strings",
            Value::Sequence(Sequence::Integers(_)) => "a sequence of integers",
        }
    }
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Self {
        Value::Tensor(tensor)
    }
}

impl From<Image> for Value {
    fn from(image: Image) -> Self {
        Value::Image(image)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::String(text.to_string())
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Value::Int64(number)
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Value::Double(number)
    }
}

impl Image {
    /// A picture of `width` by `height` pixels.
    ///
    /// # Errors
    /// [`Error::Image`] when the number of elements is not `width * height` times the channels, or is zero.
    ///
    /// ```
    /// use candle_coreml::{Image, Pixels};
    /// let red = Image::new(2, 1, Pixels::Rgb(vec![255, 0, 0, 255, 0, 0]))?;
    /// assert_eq!((red.width(), red.height()), (2, 1));
    /// # Ok::<(), candle_coreml::Error>(())
    /// ```
    pub fn new(width: usize, height: usize, pixels: Pixels) -> Result<Self, Error> {
        let (len, channels) = match &pixels {
            Pixels::Gray(p) => (p.len(), 1),
            Pixels::GrayF16(p) => (p.len(), 1),
            Pixels::Rgb(p) => (p.len(), 3),
        };
        let wanted = width.checked_mul(height).and_then(|n| n.checked_mul(channels));
        if wanted != Some(len) || len == 0 {
            return Err(Error::Image {
                found: format!("{len} elements for {width} x {height} pixels of {channels} channels"),
                allowed: "width * height * channels elements, at least one".to_string(),
            });
        }
        Ok(Image {
            width,
            height,
            pixels,
        })
    }

    /// A picture from a `u8` tensor of shape [H, W, 3] or [3, H, W] (red first), [1, H, W] or [H, W], with or without a
    /// leading batch dimension of 1; a `f16` tensor of shape [1, H, W] or [H, W] gives 16-bit grey. Where the first dimension
    /// is 3 or 1 it is the channels.
    ///
    /// # Errors
    /// [`Error::Image`] for other shapes and dtypes.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self, Error> {
        let refuse = || {
            Error::Image {
            found: format!(
                "a {} tensor of shape {:?}",
                tensor.dtype().as_str(),
                tensor.dims()
            ),
            allowed: "u8 [H, W, 3] or [3, H, W], u8 or f16 [1, H, W] or [H, W], perhaps with a batch dimension of 1"
                .to_string(),
        }
        };
        let (channels, height, width) = match *tensor.dims() {
            [h, w] => (1, h, w),
            [h, w, 3] | [1, h, w, 3] if h != 3 && h != 1 && tensor.dtype() == DType::U8 => {
                let pixels = tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
                return Image::new(w, h, Pixels::Rgb(pixels));
            }
            [c, h, w] | [1, c, h, w] => (c, h, w),
            _ => return Err(refuse()),
        };
        let tensor = tensor.to_device(&Device::Cpu)?;
        let pixels = match (channels, tensor.dtype()) {
            (3, DType::U8) => Pixels::Rgb(
                tensor
                    .reshape((3, height, width))?
                    .permute((1, 2, 0))?
                    .flatten_all()?
                    .to_vec1()?,
            ),
            (1, DType::U8) => Pixels::Gray(tensor.flatten_all()?.to_vec1()?),
            (1, DType::F16) => Pixels::GrayF16(tensor.flatten_all()?.to_vec1()?),
            _ => return Err(refuse()),
        };
        Image::new(width, height, pixels)
    }

    /// The pixels as a tensor of shape [3, H, W] (red first) or [1, H, W] on the CPU; `u8`, or `f16` for 16-bit grey.
    ///
    /// # Errors
    /// Only those of Candle.
    pub fn to_tensor(&self) -> Result<Tensor, Error> {
        let (h, w) = (self.height, self.width);
        Ok(match &self.pixels {
            Pixels::Gray(p) => Tensor::from_slice(p, (1, h, w), &Device::Cpu)?,
            Pixels::GrayF16(p) => Tensor::from_slice(p, (1, h, w), &Device::Cpu)?,
            Pixels::Rgb(p) => Tensor::from_slice(p, (h, w, 3), &Device::Cpu)?
                .permute((2, 0, 1))?
                .contiguous()?,
        })
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The pixels, row-major.
    pub fn pixels(&self) -> &Pixels {
        &self.pixels
    }

    /// Size and layout for messages: `an RGB image of 4 x 2 pixels`.
    pub(crate) fn describe(&self) -> String {
        let layout = match self.pixels {
            Pixels::Gray(_) => "an 8-bit grey",
            Pixels::GrayF16(_) => "a 16-bit grey",
            Pixels::Rgb(_) => "an RGB",
        };
        format!("{layout} image of {} x {} pixels", self.width, self.height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_survives_the_way_to_a_tensor_and_back() {
        let planes: Vec<u8> = (0..18).collect();
        let tensor = Tensor::from_vec(planes.clone(), (3, 2, 3), &Device::Cpu).unwrap();
        let image = Image::from_tensor(&tensor).unwrap();
        assert_eq!((image.width(), image.height()), (3, 2));
        let Pixels::Rgb(pixels) = image.pixels() else {
            panic!("not RGB")
        };
        assert_eq!(&pixels[..6], &[0, 6, 12, 1, 7, 13], "pixels are interleaved");
        assert_eq!(
            image
                .to_tensor()
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<u8>()
                .unwrap(),
            planes
        );
        let last = tensor.permute((1, 2, 0)).unwrap();
        assert_eq!(Image::from_tensor(&last).unwrap(), image, "channels last");
        let batched = Image::from_tensor(&tensor.unsqueeze(0).unwrap()).unwrap();
        assert_eq!(batched, image);
    }

    #[test]
    fn grey_pictures_keep_their_element_type() {
        for dtype in [DType::U8, DType::F16] {
            let tensor = Tensor::ones((2, 4), dtype, &Device::Cpu).unwrap();
            let back = Image::from_tensor(&tensor).unwrap().to_tensor().unwrap();
            assert_eq!((back.dims(), back.dtype()), (&[1, 2, 4][..], dtype));
        }
    }

    #[test]
    fn pixels_that_do_not_fill_the_picture_are_refused() {
        let rows = [
            (2, 2, Pixels::Gray(vec![0; 3])),
            (2, 2, Pixels::Rgb(vec![0; 4])),
            (0, 2, Pixels::Gray(vec![])),
            (usize::MAX, 3, Pixels::Gray(vec![0; 3])),
        ];
        for (w, h, pixels) in rows {
            assert!(
                matches!(Image::new(w, h, pixels), Err(Error::Image { .. })),
                "{w} x {h}"
            );
        }
        for (shape, dtype) in [
            (vec![2, 2, 2], DType::U8),
            (vec![3, 2, 2], DType::F32),
            (vec![4], DType::U8),
        ] {
            let tensor = Tensor::ones(shape.clone(), dtype, &Device::Cpu).unwrap();
            assert!(Image::from_tensor(&tensor).is_err(), "{shape:?} {dtype:?}");
        }
    }
}
