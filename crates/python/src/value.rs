//! Values between Python and the library: numpy arrays are read and handed out where they are.

use crate::Error;
use candle_core::{CpuStorage, Storage, Tensor};
use candle_coreml::{
    ArrayView, Dictionary, ElementType, Elements, FeatureType, Given, Image, Pixels, Sequence, Value,
};
use half::f16;
use numpy::{
    PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use std::collections::BTreeMap;

/// An input as it came from Python, held for the time of a prediction.
pub(crate) enum Taken<'py> {
    Array(Vec<usize>, Held<'py>),
    Value(Value),
}

/// The elements of an array that came from Python.
pub(crate) enum Held<'py> {
    U8(PyReadonlyArrayDyn<'py, u8>),
    U32(PyReadonlyArrayDyn<'py, u32>),
    I16(PyReadonlyArrayDyn<'py, i16>),
    I32(PyReadonlyArrayDyn<'py, i32>),
    I64(PyReadonlyArrayDyn<'py, i64>),
    F16(PyReadonlyArrayDyn<'py, f16>),
    F32(PyReadonlyArrayDyn<'py, f32>),
    F64(PyReadonlyArrayDyn<'py, f64>),
}

/// numpy's name of an element type that features can have.
pub(crate) fn numpy_name(declared: ElementType) -> Option<&'static str> {
    Some(match declared {
        ElementType::Fp16 => "float16",
        ElementType::Fp32 => "float32",
        ElementType::Fp64 => "float64",
        ElementType::Int32 => "int32",
        ElementType::Int8 => "int8",
        _ => return None,
    })
}

impl<'py> Taken<'py> {
    /// What `value` is for a feature of type `ty`.
    pub(crate) fn new(ty: Option<&FeatureType>, value: &Bound<'py, PyAny>) -> PyResult<Self> {
        match ty {
            Some(FeatureType::MultiArray(array)) => {
                let taken = Taken::array(value)?;
                // A bare number is an array of one element.
                Ok(match taken {
                    Taken::Array(shape, held) if shape.is_empty() && array.shape == [1] => {
                        Taken::Array(vec![1], held)
                    }
                    other => other,
                })
            }
            Some(FeatureType::Image(_)) if value.hasattr("mode")? => picture(value).map(Taken::Value),
            _ => other(value),
        }
    }

    /// An array, or whatever numpy makes one of.
    pub(crate) fn array(value: &Bound<'py, PyAny>) -> PyResult<Self> {
        let py = value.py();
        let numpy = py.import("numpy")?;
        let mut array = match value.cast::<PyUntypedArray>() {
            Ok(array) => array.clone(),
            Err(_) => numpy
                .call_method1("asarray", (value,))?
                .cast_into::<PyUntypedArray>()?,
        };
        let dtype = array.dtype();
        // Types that neither Candle nor Core ML has are widened to ones they have.
        let wider = match (dtype.kind(), dtype.itemsize()) {
            (b'b', _) => Some("uint8"),
            (b'i', 1) | (b'u', 2) => Some("int32"),
            (b'u', 8) => Some("int64"),
            _ => None,
        };
        if let Some(wider) = wider {
            array = array.call_method1("astype", (wider,))?.cast_into()?;
        }
        // Byte order, alignment and gaps.
        if !array.is_c_contiguous() || !array.dtype().is_native_byteorder().unwrap_or(true) {
            let native = array.dtype().call_method1("newbyteorder", ("=",))?;
            array = numpy
                .call_method1("ascontiguousarray", (&array, native))?
                .cast_into()?;
        }
        let shape = array.shape().to_vec();
        Ok(Taken::Array(shape, held(&array)?))
    }

    /// The input for the length of a call.
    pub(crate) fn given(&self) -> PyResult<Given<'_>> {
        let (shape, held) = match self {
            Taken::Value(value) => return Ok(Given::Value(value)),
            Taken::Array(shape, held) => (shape, held),
        };
        Ok(Given::Array(
            ArrayView::new(shape, held.elements()?).map_err(crate::failed)?,
        ))
    }
}

impl Held<'_> {
    fn elements(&self) -> PyResult<Elements<'_>> {
        Ok(match self {
            Held::U8(a) => Elements::U8(a.as_slice()?),
            Held::U32(a) => Elements::U32(a.as_slice()?),
            Held::I16(a) => Elements::I16(a.as_slice()?),
            Held::I32(a) => Elements::I32(a.as_slice()?),
            Held::I64(a) => Elements::I64(a.as_slice()?),
            Held::F16(a) => Elements::F16(a.as_slice()?),
            Held::F32(a) => Elements::F32(a.as_slice()?),
            Held::F64(a) => Elements::F64(a.as_slice()?),
        })
    }
}

fn held<'py>(array: &Bound<'py, PyUntypedArray>) -> PyResult<Held<'py>> {
    let dtype = array.dtype();
    Ok(match (dtype.kind(), dtype.itemsize()) {
        (b'u', 1) => Held::U8(readonly(array)?),
        (b'u', 4) => Held::U32(readonly(array)?),
        (b'i', 2) => Held::I16(readonly(array)?),
        (b'i', 4) => Held::I32(readonly(array)?),
        (b'i', 8) => Held::I64(readonly(array)?),
        (b'f', 2) => Held::F16(readonly(array)?),
        (b'f', 4) => Held::F32(readonly(array)?),
        (b'f', 8) => Held::F64(readonly(array)?),
        _ => {
            let words = format!(
                "an array of {dtype} was given; allowed: booleans, integers and floats of 16 to 64 bits"
            );
            return Err(Error::new_err(words));
        }
    })
}

fn readonly<'py, T: numpy::Element>(
    array: &Bound<'py, PyUntypedArray>,
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    let array = array.as_any().cast::<PyArrayDyn<T>>()?;
    array.try_readonly().map_err(|e| Error::new_err(e.to_string()))
}

/// A tensor with a copy of the elements.
pub(crate) fn tensor_of(taken: &Taken<'_>) -> PyResult<Tensor> {
    match taken.given()? {
        Given::Array(view) => view.to_tensor().map_err(crate::failed),
        _ => Err(PyTypeError::new_err("not an array")),
    }
}

/// Strings, numbers, dictionaries, sequences; everything else as an array.
fn other<'py>(value: &Bound<'py, PyAny>) -> PyResult<Taken<'py>> {
    let one = if let Ok(text) = value.cast::<PyString>() {
        Value::String(text.extract()?)
    } else if value.is_instance_of::<PyBool>() {
        Value::Int64(i64::from(value.extract::<bool>()?))
    } else if value.is_instance_of::<PyInt>() {
        Value::Int64(value.extract()?)
    } else if value.is_instance_of::<PyFloat>() {
        Value::Double(value.extract()?)
    } else if let Ok(dict) = value.cast::<PyDict>() {
        Value::Dictionary(dictionary(dict)?)
    } else if let Some(sequence) = sequence(value) {
        Value::Sequence(sequence)
    } else if value.hasattr("mode")? && value.hasattr("tobytes")? {
        picture(value)?
    } else {
        return Taken::array(value);
    };
    Ok(Taken::Value(one))
}

fn dictionary(dict: &Bound<'_, PyDict>) -> PyResult<Dictionary> {
    let integers: PyResult<BTreeMap<i64, f64>> = dict.extract();
    if let (Ok(integers), false) = (integers, dict.is_empty()) {
        return Ok(Dictionary::Integers(integers));
    }
    dict.extract().map(Dictionary::Strings)
}

fn sequence(value: &Bound<'_, PyAny>) -> Option<Sequence> {
    if !(value.is_instance_of::<PyList>() || value.is_instance_of::<PyTuple>()) {
        return None;
    }
    if let Ok(texts) = value.extract::<Vec<String>>() {
        return Some(Sequence::Strings(texts));
    }
    value.extract().ok().map(Sequence::Integers)
}

/// A `PIL.Image` in a mode that Core ML has.
fn picture(image: &Bound<'_, PyAny>) -> PyResult<Value> {
    let mode: String = image.getattr("mode")?.extract()?;
    let (width, height): (usize, usize) = image.getattr("size")?.extract()?;
    let bytes = |image: &Bound<'_, PyAny>| -> PyResult<Vec<u8>> {
        Ok(image
            .call_method0("tobytes")?
            .cast_into::<PyBytes>()?
            .as_bytes()
            .to_vec())
    };
    let pixels = match mode.as_str() {
        "RGB" => Pixels::Rgb(bytes(image)?),
        "L" => Pixels::Gray(bytes(image)?),
        "RGBA" | "RGBX" => Pixels::Rgb(bytes(&image.call_method1("convert", ("RGB",))?)?),
        "F" => {
            let floats = bytes(image)?;
            let element = |b: &[u8]| f16::from_f32(f32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
            Pixels::GrayF16(floats.chunks_exact(4).map(element).collect())
        }
        _ => {
            let words =
                format!("an image of mode {mode:?} was given; allowed: \"RGB\", \"RGBA\", \"L\" and \"F\"");
            return Err(Error::new_err(words));
        }
    };
    Image::new(width, height, pixels)
        .map(Value::Image)
        .map_err(crate::failed)
}

/// An output as Python has it.
pub(crate) fn give<'py>(
    py: Python<'py>,
    value: Value,
    ty: Option<&FeatureType>,
) -> PyResult<Bound<'py, PyAny>> {
    Ok(match value {
        Value::Tensor(tensor) => array_from_tensor(py, tensor, ty)?,
        Value::Image(image) => pil_image(py, &image)?,
        Value::String(text) => PyString::new(py, &text).into_any(),
        Value::Int64(number) => number.into_pyobject(py)?.into_any(),
        Value::Double(number) => PyFloat::new(py, number).into_any(),
        Value::Dictionary(Dictionary::Strings(pairs)) => pairs.into_pyobject(py)?.into_any(),
        Value::Dictionary(Dictionary::Integers(pairs)) => pairs.into_pyobject(py)?.into_any(),
        Value::Sequence(Sequence::Strings(texts)) => texts.into_pyobject(py)?.into_any(),
        Value::Sequence(Sequence::Integers(numbers)) => numbers.into_pyobject(py)?.into_any(),
        other => return Err(Error::new_err(format!("{} has no form in Python", other.kind()))),
    })
}

/// Keeps a tensor alive that a numpy array looks into.
#[pyclass(frozen)]
struct Owner {
    /// Never used again: the array is its only way in.
    _tensor: Tensor,
}

/// A numpy array over the tensor's own memory.
pub(crate) fn array_from_tensor<'py>(
    py: Python<'py>,
    tensor: Tensor,
    ty: Option<&FeatureType>,
) -> PyResult<Bound<'py, PyAny>> {
    let tensor = tensor.contiguous().map_err(|e| Error::new_err(e.to_string()))?;
    let shape = tensor.dims().to_vec();
    let offset = tensor.layout().start_offset();
    let count = tensor.elem_count();
    macro_rules! over {
        ($elements:expr) => {{
            let elements = $elements[offset..offset + count].as_ptr();
            let owner = Bound::new(py, Owner { _tensor: tensor.clone() })?.into_any();
            // SAFETY: the elements belong to the tensor, which the array's owner keeps; nobody else writes to an output,
            // and the vector behind it is not resized.
            unsafe { looking_into(&shape, elements, owner) }
        }};
    }
    let array = {
        let (storage, _) = tensor.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            return Err(Error::new_err("a tensor is not on the CPU"));
        };
        match storage {
            CpuStorage::F16(v) => over!(v),
            CpuStorage::F32(v) => over!(v),
            CpuStorage::F64(v) => over!(v),
            CpuStorage::I32(v) => over!(v),
            CpuStorage::I64(v) => over!(v),
            CpuStorage::U32(v) => over!(v),
            CpuStorage::U8(v) => over!(v),
            _ => {
                return Err(Error::new_err(format!(
                    "{:?} has no form in numpy",
                    tensor.dtype()
                )));
            }
        }
    };
    // Candle has no int8; such outputs come as int32.
    let declared = match ty {
        Some(FeatureType::MultiArray(array) | FeatureType::State(array)) => Some(array.dtype),
        _ => None,
    };
    if declared == Some(ElementType::Int8) {
        return array.call_method1("astype", ("int8",));
    }
    Ok(array)
}

/// # Safety
/// `elements` points to as many elements as `shape` has, which live as long as `owner` and are not used by others.
unsafe fn looking_into<'py, T: numpy::Element>(
    shape: &[usize],
    elements: *const T,
    owner: Bound<'py, PyAny>,
) -> Bound<'py, PyAny> {
    // SAFETY: the caller's word.
    let view = unsafe { numpy::ndarray::ArrayViewD::from_shape_ptr(shape, elements) };
    // SAFETY: the caller's word; the owner is what numpy keeps.
    unsafe { PyArrayDyn::borrow_from_array(&view, owner) }.into_any()
}

/// A `PIL.Image`: mode "RGB", "L", or "F" for 16-bit grey, as coremltools has it.
fn pil_image<'py>(py: Python<'py>, image: &Image) -> PyResult<Bound<'py, PyAny>> {
    let (mode, bytes) = match image.pixels() {
        Pixels::Rgb(p) => ("RGB", PyBytes::new(py, p)),
        Pixels::Gray(p) => ("L", PyBytes::new(py, p)),
        Pixels::GrayF16(p) => {
            let floats: Vec<u8> = p.iter().flat_map(|v| v.to_f32().to_ne_bytes()).collect();
            ("F", PyBytes::new(py, &floats))
        }
    };
    let size = (image.width(), image.height());
    let pil = py.import("PIL.Image").map_err(|_| {
        Error::new_err("an output is an image, and Pillow is not installed: pip install pillow")
    })?;
    pil.call_method1("frombytes", (mode, size, bytes))
}
