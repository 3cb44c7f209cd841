//! Packages made of functions written in Rust.

use std::io::Read;
use std::path::Path;

use candle_core::Tensor;
use candle_coreml_mil::{
    ArrayDescription, DType, Description, Feature, FeatureType, Flexibility, Metadata, Operation,
    PackageWriter, Program, TensorType, Value,
};
use half::f16;

use crate::compress::{Compression, Encoded};
use crate::error::{Error, Result};
use crate::function::FunctionBuilder;

/// The operation set of the programs made here: iOS 18 and macOS 15, the first with states and grouped palettes.
pub(crate) const OPSET: &str = "CoreML8";

/// Writes a package: weights as they come, then functions that use them.
///
/// ```
/// use candle_coreml_convert::{Compression, FunctionBuilder, ProgramBuilder, literal};
/// use candle_coreml_mil::{DType, Model};
/// use half::f16;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("scale.mlpackage");
/// let mut package = ProgramBuilder::create(&path)?;
/// let weight = package.weight("layer.weight", &[3, 2], &[1.0; 6].map(f16::from_f32), &Compression::None)?;
///
/// let mut f = FunctionBuilder::new("main");
/// let x = f.input("x", DType::Fp16, &[1, 2])?;
/// let w = f.weight(&weight)?;
/// let y = f.linear(&x, &w, None)?;
/// // Any operator by its name: parameters are checked, the type of the result is given.
/// let y = f.op("clip", &[("x", (&y).into()), ("alpha", literal::half(0.0).into()), ("beta", literal::half(6.0).into())], y.ty())?;
/// f.output("y", &y)?;
/// package.function(f)?;
/// package.finish()?;
///
/// assert_eq!(Model::open(&path)?.description().functions[0].outputs[0].name, "y");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ProgramBuilder {
    writer: PackageWriter,
    program: Program,
    flexible: Vec<(String, String, Vec<usize>, Flexibility)>,
    default_function: Option<String>,
    metadata: Metadata,
}

/// A weight in a package's weight file, perhaps compressed; functions use it through [`FunctionBuilder::weight`].
#[derive(Debug, Clone)]
pub struct Weight {
    pub(crate) name: String,
    pub(crate) ty: TensorType,
    pub(crate) steps: Vec<WeightStep>,
}

/// One operation of a weight: `const`, or a `constexpr_*` that takes values and results of the step before.
#[derive(Debug, Clone)]
pub(crate) struct WeightStep {
    pub(crate) op: &'static str,
    pub(crate) inputs: Vec<(&'static str, StepInput)>,
    pub(crate) outputs: Vec<TensorType>,
}

#[derive(Debug, Clone)]
pub(crate) enum StepInput {
    Value(Value),
    /// Result of the step before.
    Before(usize),
}

impl Weight {
    /// Element type and shape of the weight as operators see it.
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }
}

impl ProgramBuilder {
    /// Starts a package at `path`, which must not exist.
    ///
    /// # Errors
    /// [`Error::Mil`] when it exists or cannot be made.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        Ok(ProgramBuilder {
            writer: PackageWriter::create(path.as_ref())?,
            program: Program::default(),
            flexible: Vec::new(),
            default_function: None,
            metadata: Metadata::default(),
        })
    }

    /// Writes a weight, row-major with the outermost dimension first; equal ones are in the file once.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the number of values is not the shape's or the compression does not fit the shape.
    pub fn weight(
        &mut self,
        name: &str,
        shape: &[usize],
        values: &[f16],
        compression: &Compression,
    ) -> Result<Weight> {
        let ty = TensorType::fixed(DType::Fp16, shape);
        if ty.element_count() != Some(values.len()) {
            return Err(Error::tensor(name, format!("{} values for {ty}", values.len())));
        }
        let encoded = compression
            .encode(shape, values)
            .map_err(|problem| Error::tensor(name, problem))?;
        self.encoded(name, &ty, &encoded)
    }

    /// Writes a weight of 16-bit floats as it comes from `source`, little-endian, so that it need not be in memory.
    ///
    /// # Errors
    /// [`Error::Mil`] when the source fails or has another number of bytes than the shape asks for.
    pub fn weight_from(&mut self, name: &str, shape: &[usize], source: &mut impl Read) -> Result<Weight> {
        let ty = TensorType::fixed(DType::Fp16, shape);
        let value = self.writer.weight_from(&ty, source)?;
        Ok(Weight {
            name: identifier(name),
            ty: ty.clone(),
            steps: vec![WeightStep {
                op: "const",
                inputs: vec![("val", StepInput::Value(value))],
                outputs: vec![ty],
            }],
        })
    }

    /// Writes a tensor as [`ProgramBuilder::weight`] does: what a `VarBuilder` gives, a checkpoint or a computation. It is
    /// rounded to 16-bit floats.
    ///
    /// # Errors
    /// [`Error::Tensor`] when its values are no floats or beyond 65,504, or the compression does not fit its shape.
    pub fn tensor(&mut self, name: &str, tensor: &Tensor, compression: &Compression) -> Result<Weight> {
        let wrong = |e: candle_core::Error| Error::tensor(name, e.to_string());
        if !tensor.dtype().is_float() {
            return Err(Error::tensor(
                name,
                format!("{:?}, floats are needed", tensor.dtype()),
            ));
        }
        let values = tensor
            .to_dtype(candle_core::DType::F16)
            .and_then(|t| t.flatten_all());
        let values: Vec<f16> = values.and_then(|t| t.to_vec1()).map_err(wrong)?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(Error::tensor(
                name,
                format!("element {at} is beyond 65,504, the largest 16-bit float"),
            )),
            None => self.weight(name, tensor.dims(), &values, compression),
        }
    }

    /// Writes a weight that is compressed already.
    pub(crate) fn encoded(&mut self, name: &str, ty: &TensorType, encoded: &[Encoded]) -> Result<Weight> {
        let steps = encoded
            .iter()
            .map(|e| write_step(&mut self.writer, e))
            .collect::<Result<_>>()?;
        Ok(Weight {
            name: identifier(name),
            ty: ty.clone(),
            steps,
        })
    }

    /// Adds a function. The first one is what a model runs when no function is named.
    ///
    /// # Errors
    /// [`Error::Op`] when it has no outputs.
    pub fn function(&mut self, function: FunctionBuilder) -> Result<()> {
        let (function, flexible) = function.finish()?;
        self.default_function.get_or_insert(function.name.clone());
        let named = |(input, shape, how)| (function.name.clone(), input, shape, how);
        self.flexible.extend(flexible.into_iter().map(named));
        self.program.functions.push(function);
        Ok(())
    }

    /// Author, licence, version and keys of one's own.
    pub fn metadata(&mut self, metadata: Metadata) {
        self.metadata = metadata;
    }

    /// Checks the program and puts the package in place.
    ///
    /// # Errors
    /// [`Error::Mil`] when a name is used before its definition or the package cannot be written.
    pub fn finish(mut self) -> Result<()> {
        // The protobuf keeps functions in a map sorted by name.
        self.program.functions.sort_by(|a, b| a.name.cmp(&b.name));
        let mut description = Description::from_program(&self.program);
        description.metadata = self.metadata;
        description.default_function = self.default_function.unwrap_or_default();
        for (function, input, shape, flexibility) in self.flexible {
            let functions = description.functions.iter_mut().filter(|f| f.name == function);
            for feature in functions.flat_map(|f| &mut f.inputs).filter(|i| i.name == input) {
                if let FeatureType::MultiArray(array) = &mut feature.ty {
                    array.shape = shape.clone();
                    array.flexibility = flexibility.clone();
                }
            }
        }
        for output in description.functions.iter_mut().flat_map(|f| &mut f.outputs) {
            forget_unknown_shape(output);
        }
        self.writer.finish(&self.program, &description)?;
        Ok(())
    }
}

/// Outputs whose shape follows the inputs have none in the description, as coremltools writes it.
fn forget_unknown_shape(output: &mut Feature) {
    if let FeatureType::MultiArray(array) = &mut output.ty
        && array.flexibility != Flexibility::Fixed
    {
        *array = ArrayDescription {
            shape: Vec::new(),
            flexibility: Flexibility::Fixed,
            ..array.clone()
        };
    }
}

pub(crate) fn write_step(writer: &mut PackageWriter, encoded: &Encoded) -> Result<WeightStep> {
    let mut inputs = Vec::new();
    for (name, part) in &encoded.inputs {
        let input = match part {
            crate::compress::Part::Tensor(ty, bytes) => StepInput::Value(writer.weight(ty, bytes)?),
            crate::compress::Part::Literal(value) => StepInput::Value(value.clone()),
            crate::compress::Part::Before(index) => StepInput::Before(*index),
        };
        inputs.push((*name, input));
    }
    Ok(WeightStep {
        op: encoded.op,
        inputs,
        outputs: encoded.outputs.clone(),
    })
}

/// A name MIL text allows: letters, digits and underscores, not starting with a digit.
pub(crate) fn identifier(name: &str) -> String {
    let clean = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
    let first_is_digit = name.starts_with(|c: char| c.is_ascii_digit());
    first_is_digit.then_some('_').into_iter().chain(clean).collect()
}

/// The `name` attribute that coremltools gives every operation.
pub(crate) fn named(mut op: Operation, name: &str) -> Operation {
    op.attributes
        .push(("name".to_owned(), crate::literal::text(name)));
    op
}
