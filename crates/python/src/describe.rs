//! Inputs, outputs and states as Python objects.

use candle_coreml::{ColorSpace, Feature as Described, FeatureType, Flexibility};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// An input, output or state of a model.
#[pyclass(frozen, module = "candle_coreml")]
pub(crate) struct Feature(pub Described);

#[pymethods]
impl Feature {
    /// The name.
    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    /// What the author says of it.
    #[getter]
    fn description(&self) -> &str {
        &self.0.description
    }

    /// "multiarray", "image", "int64", "double", "string", "dictionary", "sequence" or "state".
    #[getter]
    fn kind(&self) -> &'static str {
        match self.0.ty {
            FeatureType::MultiArray(_) => "multiarray",
            FeatureType::State(_) => "state",
            FeatureType::Image(_) => "image",
            FeatureType::Int64 => "int64",
            FeatureType::Double => "double",
            FeatureType::String => "string",
            FeatureType::Dictionary { .. } => "dictionary",
            FeatureType::Sequence { .. } => "sequence",
        }
    }

    /// Element type of a multi-array or state as numpy names it: "float16", "float32", "float64", "int32", "int8".
    #[getter]
    fn dtype(&self) -> Option<&'static str> {
        let (FeatureType::MultiArray(array) | FeatureType::State(array)) = &self.0.ty else {
            return None;
        };
        crate::value::numpy_name(array.dtype)
    }

    /// The default shape of a multi-array or state; (height, width) of an image.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let shape = match &self.0.ty {
            FeatureType::MultiArray(array) | FeatureType::State(array) => array.shape.clone(),
            FeatureType::Image(image) => vec![image.height, image.width],
            _ => return Ok(None),
        };
        PyTuple::new(py, shape).map(Some)
    }

    /// The shapes that are allowed besides the default one, as a list; None where they are not listed.
    #[getter]
    fn enumerated_shapes<'py>(&self, py: Python<'py>) -> PyResult<Option<Vec<Bound<'py, PyTuple>>>> {
        let Some(Flexibility::Enumerated(shapes)) = self.flexibility() else {
            return Ok(None);
        };
        let shapes: PyResult<Vec<_>> = shapes.iter().map(|s| PyTuple::new(py, s)).collect();
        shapes.map(Some)
    }

    /// (lowest, highest) of each dimension, highest None where it is open; None where dimensions have no ranges.
    #[getter]
    fn shape_ranges(&self) -> Option<Vec<(usize, Option<usize>)>> {
        match self.flexibility() {
            Some(Flexibility::Ranges(ranges)) => Some(ranges.clone()),
            _ => None,
        }
    }

    /// Pixel layout of an image: "grayscale", "grayscale_float16", "rgb" or "bgr".
    #[getter]
    fn color(&self) -> Option<&'static str> {
        let FeatureType::Image(image) = &self.0.ty else {
            return None;
        };
        Some(match image.color {
            ColorSpace::Grayscale => "grayscale",
            ColorSpace::GrayscaleFp16 => "grayscale_float16",
            ColorSpace::Rgb => "rgb",
            ColorSpace::Bgr => "bgr",
        })
    }

    /// True when the input may be left out.
    #[getter]
    fn optional(&self) -> bool {
        self.0.optional
    }

    /// What an optional multi-array is filled with when it is left out.
    #[getter]
    fn default_value(&self) -> Option<f64> {
        match &self.0.ty {
            FeatureType::MultiArray(array) => array.default_value,
            _ => None,
        }
    }

    fn __repr__(&self) -> String {
        let kind = self.kind();
        let dtype = self.dtype().map(|d| format!(" {d}")).unwrap_or_default();
        let shape = match &self.0.ty {
            FeatureType::MultiArray(array) | FeatureType::State(array) => format!(" {:?}", array.shape),
            FeatureType::Image(image) => format!(" {} x {}", image.width, image.height),
            _ => String::new(),
        };
        format!("Feature({:?}, {kind}{dtype}{shape})", self.0.name)
    }
}

impl Feature {
    fn flexibility(&self) -> Option<&Flexibility> {
        match &self.0.ty {
            FeatureType::MultiArray(array) | FeatureType::State(array) => Some(&array.flexibility),
            FeatureType::Image(image) => Some(&image.flexibility),
            _ => None,
        }
    }
}

pub(crate) fn features(described: &[Described]) -> Vec<Feature> {
    described.iter().cloned().map(Feature).collect()
}
