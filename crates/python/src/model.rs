//! Models as Python objects.

use crate::describe::{Feature, features};
use crate::state::State;
use crate::value::{Taken, give};
use crate::{Error, failed};
use candle_coreml::{
    ComputeUnits, CoreMLModel, CoreMLModelBuilder, EngineKind, FeatureType, Given, ModelKind, Numerics,
    Outputs, Source,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A Core ML model ready to run one of its functions. It may be used by several threads at once.
#[pyclass(frozen, module = "candle_coreml")]
pub(crate) struct Model {
    inner: CoreMLModel,
}

/// The names of a choice and what they mean.
fn choice<T: Copy>(what: &str, given: &str, allowed: &[(&str, T)]) -> PyResult<T> {
    let found = allowed.iter().find(|(name, _)| *name == given);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = allowed.iter().map(|(name, _)| format!("{name:?}")).collect();
        PyValueError::new_err(format!("{what} {given:?}; allowed: {}", names.join(", ")))
    })
}

fn built(
    builder: CoreMLModelBuilder,
    function: Option<&str>,
    choices: [&str; 3],
    threads: usize,
    wide: bool,
) -> PyResult<CoreMLModelBuilder> {
    let [numerics, compute_units, engine] = choices;
    let builder = builder
        .numerics(choice(
            "numerics",
            numerics,
            &[
                ("default", Numerics::Default),
                ("faithful", Numerics::Faithful),
                ("fast", Numerics::Fast),
            ],
        )?)
        .compute_units(choice(
            "compute_units",
            compute_units,
            &[
                ("all", ComputeUnits::All),
                ("cpu_only", ComputeUnits::CpuOnly),
                ("cpu_and_gpu", ComputeUnits::CpuAndGpu),
                ("cpu_and_ne", ComputeUnits::CpuAndNeuralEngine),
            ],
        )?)
        .engine(choice(
            "engine",
            engine,
            &[
                ("auto", EngineKind::Auto),
                ("portable", EngineKind::Portable),
                ("apple", EngineKind::Apple),
            ],
        )?)
        .threads(threads)
        .wide(wide);
    Ok(match function {
        Some(name) => builder.function(name),
        None => builder,
    })
}

#[pymethods]
impl Model {
    /// Opens a `.mlpackage`, `.mlmodel` or `.mlmodelc`. The files are not needed afterwards unless they are large: weights
    /// are mapped, not read, and a mapped file may be deleted but not changed. With `wide`, inputs and outputs that are
    /// float16 are float32 and not rounded (portable engine).
    #[new]
    #[pyo3(signature = (path, function=None, *, numerics="default", compute_units="all", engine="auto", threads=0, wide=false))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        function: Option<&str>,
        numerics: &str,
        compute_units: &str,
        engine: &str,
        threads: usize,
        wide: bool,
    ) -> PyResult<Self> {
        let choices = [numerics, compute_units, engine];
        let builder = built(CoreMLModelBuilder::new(path), function, choices, threads, wide)?;
        let inner = py.detach(|| builder.load()).map_err(failed)?;
        Ok(Model { inner })
    }

    /// Opens a model whose files are in memory: `files` maps relative paths to their bytes, `root` is the model's own file
    /// or folder among them.
    #[staticmethod]
    #[pyo3(signature = (files, root, function=None, *, numerics="default", threads=0, wide=false))]
    fn from_memory(
        py: Python<'_>,
        files: BTreeMap<String, Bound<'_, PyBytes>>,
        root: &str,
        function: Option<&str>,
        numerics: &str,
        threads: usize,
        wide: bool,
    ) -> PyResult<Self> {
        let files = files
            .into_iter()
            .map(|(name, bytes)| (name, bytes.as_bytes().to_vec().into()))
            .collect();
        let builder = CoreMLModelBuilder::from_source(Source::memory(files), root);
        let builder = built(builder, function, [numerics, "all", "portable"], threads, wide)?;
        let inner = py.detach(|| builder.load()).map_err(failed)?;
        Ok(Model { inner })
    }

    /// Runs the function: a dictionary of inputs by name gives one of outputs by name.
    ///
    /// Arrays come in as numpy arrays or whatever numpy makes one of, and go out as numpy arrays of the declared dtype;
    /// images as `PIL.Image`, or as arrays [height, width, 3] and [height, width] of uint8; labels as str or int,
    /// probabilities as a dictionary. Arrays must not be written to by another thread while this runs.
    #[pyo3(signature = (inputs, state=None))]
    fn predict<'py>(
        &self,
        py: Python<'py>,
        inputs: &Bound<'py, PyDict>,
        state: Option<&State>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let taken = self.taken(inputs)?;
        let given = borrowed(&taken)?;
        let outputs = py.detach(|| match state {
            Some(state) => self.inner.predict_given(&given, Some(&mut state.lock())),
            None => self.inner.predict_given(&given, None),
        });
        drop(given);
        self.given(py, outputs.map_err(failed)?)
    }

    /// Makes the buffers that the function keeps between predictions, zero.
    fn make_state(&self, py: Python<'_>) -> PyResult<State> {
        py.detach(|| self.inner.make_state())
            .map(State::new)
            .map_err(failed)
    }

    /// The same model ready to run its function `name`; the weights are shared.
    fn with_function(&self, py: Python<'_>, name: &str) -> PyResult<Self> {
        let inner = py.detach(|| self.inner.with_function(name)).map_err(failed)?;
        Ok(Model { inner })
    }

    /// The inputs of the function.
    #[getter]
    fn inputs(&self) -> Vec<Feature> {
        features(self.inner.inputs())
    }

    /// The outputs of the function.
    #[getter]
    fn outputs(&self) -> Vec<Feature> {
        features(self.inner.outputs())
    }

    /// The states of the function; none for most models.
    #[getter]
    fn states(&self) -> Vec<Feature> {
        features(self.inner.states())
    }

    /// The name of the function that runs.
    #[getter]
    fn function(&self) -> &str {
        &self.inner.function().name
    }

    /// The names of all functions.
    #[getter]
    fn functions(&self) -> Vec<&str> {
        self.inner.functions().iter().map(|f| f.name.as_str()).collect()
    }

    /// "portable" or "apple".
    #[getter]
    fn engine(&self) -> String {
        self.inner.engine().to_string()
    }

    /// Specification version: 6 for iOS 15 and so on.
    #[getter]
    fn specification_version(&self) -> i32 {
        self.inner.description().specification_version
    }

    /// Author, license, version, description ("short_description") and the author's own keys.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let metadata = self.inner.metadata();
        let dict = PyDict::new(py);
        for (key, value) in &metadata.user {
            dict.set_item(key, value)?;
        }
        let known = [
            ("short_description", &metadata.short_description),
            ("author", &metadata.author),
            ("license", &metadata.license),
            ("version", &metadata.version),
        ];
        for (key, value) in known {
            dict.set_item(key, value)?;
        }
        Ok(dict)
    }

    /// The plan that runs, as text for people.
    fn explain(&self) -> PyResult<String> {
        self.inner.explain().map_err(failed)
    }

    fn __repr__(&self) -> String {
        let names = |features: &[candle_coreml::Feature]| {
            features
                .iter()
                .map(|f| f.name.clone())
                .collect::<Vec<_>>()
                .join(", ")
        };
        format!(
            "Model({}({}) -> {})",
            self.function(),
            names(self.inner.inputs()),
            names(self.inner.outputs())
        )
    }
}

impl Model {
    fn taken<'py>(&self, inputs: &Bound<'py, PyDict>) -> PyResult<Vec<(String, Taken<'py>)>> {
        let described = self.inner.inputs();
        inputs
            .iter()
            .map(|(name, value)| {
                let name: String = name.extract()?;
                let ty = described.iter().find(|f| f.name == name).map(|f| &f.ty);
                let taken = Taken::new(ty, &value).map_err(|error| {
                    match error.is_instance_of::<Error>(value.py()) {
                        true => Error::new_err(format!("input {name:?}: {}", error.value(value.py()))),
                        false => error,
                    }
                })?;
                Ok((name, taken))
            })
            .collect()
    }

    fn given<'py>(&self, py: Python<'py>, outputs: Outputs) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, value) in outputs {
            let described = self.inner.outputs().iter().find(|f| f.name == name);
            let ty: Option<&FeatureType> = described.map(|f| &f.ty);
            dict.set_item(&name, give(py, value, ty)?)?;
        }
        Ok(dict)
    }
}

fn borrowed<'a>(taken: &'a [(String, Taken<'_>)]) -> PyResult<Vec<(&'a str, Given<'a>)>> {
    let given = taken
        .iter()
        .map(|(name, taken)| Ok((name.as_str(), taken.given()?)));
    given.collect()
}

/// Writes the model at `path` as a folder `destination` in the form of compiled models (`.mlmodelc`).
#[pyfunction]
pub(crate) fn compile_model(py: Python<'_>, path: PathBuf, destination: PathBuf) -> PyResult<()> {
    py.detach(|| compiled(&path, &destination))
        .map_err(|error| Error::new_err(error.to_string()))
}

fn compiled(path: &Path, destination: &Path) -> Result<(), candle_coreml_mil::Error> {
    let model = candle_coreml_mil::Model::open(path)?;
    debug_assert!(matches!(model.description().kind, ModelKind::Program) || model.program().is_none());
    model.write_compiled(destination)
}
