//! Compressing the weights of a package that exists.

use std::collections::HashMap;
use std::path::Path;

use candle_coreml_mil::{
    Argument, BlobRef, Block, DType, Model, Operation, PackageWriter, Program, TensorType, Value, ValueData,
    ValueType,
};
use half::f16;

use super::{Compression, decode};
use crate::builder::{StepInput, WeightStep, named, write_step};
use crate::error::{Error, Result};

/// Weights with fewer values are left as they are, as coremltools does by default.
const LEAST_VALUES: usize = 2048;

/// What [`compress_package`] does.
#[derive(Debug, Clone)]
pub struct CompressOptions {
    /// How weights are stored.
    pub compression: Compression,
    /// Weights with fewer values stay as they are.
    pub least_values: usize,
    /// Weights whose names contain a text are stored in another way; the first that fits counts.
    pub only: Vec<(String, Compression)>,
}

impl CompressOptions {
    fn how(&self, name: &str) -> &Compression {
        let special = self.only.iter().find(|(part, _)| name.contains(part.as_str()));
        special.map_or(&self.compression, |(_, how)| how)
    }
}

impl From<Compression> for CompressOptions {
    fn from(compression: Compression) -> Self {
        CompressOptions {
            compression,
            least_values: LEAST_VALUES,
            only: Vec::new(),
        }
    }
}

/// How far a long job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Values stored so far.
    pub done: u64,
    /// Values in all.
    pub total: u64,
}

/// What became of a package's weights.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CompressReport {
    /// Weights that were compressed.
    pub compressed: usize,
    /// Weights that stayed, with the reason.
    pub kept: Vec<(String, &'static str)>,
    /// Values in the compressed weights.
    pub values: u64,
    /// Size of the weight files before and after.
    pub bytes: (u64, u64),
    /// Summed squares of the compressed weights, and of what they differ from their originals by.
    pub squares: (f64, f64),
}

impl CompressReport {
    /// Root of the mean squared error as a share of the root of the mean squared weight.
    pub fn relative_error(&self) -> f64 {
        if self.squares.0 > 0.0 {
            (self.squares.1 / self.squares.0).sqrt()
        } else {
            0.0
        }
    }
}

/// Writes the package `from` to `to` with its weights compressed: `const` tensors of 16-bit floats with two or more dimensions.
/// Everything else is written as it is.
///
/// # Errors
/// [`Error::Unsupported`] for programs older than iOS 18, which have no operators for it; [`Error::Mil`].
pub fn compress_package(
    from: impl AsRef<Path>,
    to: impl AsRef<Path>,
    options: &CompressOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<CompressReport> {
    let model = Model::open(from)?;
    let program = model.program().ok_or_else(|| Error::Unsupported {
        file: model.name().to_owned(),
        what: "a model that is no ML Program".to_owned(),
    })?;
    if let Some(old) = program
        .functions
        .iter()
        .find(|f| matches!(f.opset.as_str(), "CoreML5" | "CoreML6" | "CoreML7"))
    {
        return Err(Error::Unsupported {
            file: model.name().to_owned(),
            what: format!(
                "function {:?} is written for {}; CoreML8 (iOS 18) or later is needed",
                old.name, old.opset
            ),
        });
    }
    let mut work = Work {
        model: &model,
        options,
        writer: PackageWriter::create(to.as_ref())?,
        done: HashMap::new(),
        copied: HashMap::new(),
        report: CompressReport::default(),
        progress,
        total: total_values(program, options),
    };
    let mut program = program.clone();
    for f in &mut program.functions {
        f.attributes
            .retain(|(name, _)| name != "FlexibleShapeInformation");
        work.block(&mut f.body)?;
    }
    let Work {
        writer, mut report, ..
    } = work;
    writer.finish(&program, model.description())?;
    report.bytes = (model.content_size_bytes(), Model::open(to)?.content_size_bytes());
    Ok(report)
}

struct Work<'a> {
    model: &'a Model,
    options: &'a CompressOptions,
    writer: PackageWriter,
    /// Compressed weights by where they were: functions share them.
    done: HashMap<BlobRef, Vec<WeightStep>>,
    copied: HashMap<BlobRef, Value>,
    report: CompressReport,
    progress: &'a mut dyn FnMut(Progress),
    total: u64,
}

impl Work<'_> {
    fn block(&mut self, block: &mut Block) -> Result<()> {
        for mut op in std::mem::take(&mut block.operations) {
            for inner in &mut op.blocks {
                self.block(inner)?;
            }
            let candidate = candidate(&op, self.options).map(|(blob, ty)| (blob.clone(), ty.clone()));
            match candidate {
                Some((blob, ty)) => self.compress(&op, &blob, &ty, &mut block.operations)?,
                None => {
                    self.copy(&mut op)?;
                    block.operations.push(op);
                }
            }
        }
        Ok(())
    }

    fn compress(
        &mut self,
        op: &Operation,
        blob: &BlobRef,
        ty: &TensorType,
        out: &mut Vec<Operation>,
    ) -> Result<()> {
        let name = op.outputs.first().map(|o| o.name.clone()).unwrap_or_default();
        if !self.done.contains_key(blob) {
            let steps = self.encode(&name, blob, ty)?;
            self.done.insert(blob.clone(), steps);
        }
        let steps = self.done.get(blob).map(Vec::as_slice).unwrap_or_default();
        if steps.is_empty() {
            let mut op = op.clone();
            self.copy(&mut op)?;
            out.push(op);
            return Ok(());
        }
        out.extend(operations(steps, op, &name));
        Ok(())
    }

    /// The operations of a weight; none when it stays as it is.
    fn encode(&mut self, name: &str, blob: &BlobRef, ty: &TensorType) -> Result<Vec<WeightStep>> {
        let shape = ty.fixed_shape().unwrap_or_default();
        let how = self.options.how(name);
        let kept = match how {
            Compression::None => Some("asked for"),
            _ if !how.fits(&shape) => Some("its shape is not divided by the groups"),
            _ => None,
        };
        if let Some(why) = kept {
            self.report.kept.push((name.to_owned(), why));
            return Ok(Vec::new());
        }
        let values = floats(&self.model.blob(blob, ty)?);
        let encoded = how.encode(&shape, &values).map_err(|e| Error::tensor(name, e))?;
        let (size, error) = squares(&values, &decode(&encoded).unwrap_or_default());
        self.report.squares.0 += size;
        self.report.squares.1 += error;
        let steps = encoded
            .iter()
            .map(|e| write_step(&mut self.writer, e))
            .collect::<Result<Vec<_>>>()?;
        self.report.compressed += 1;
        self.report.values += values.len() as u64;
        (self.progress)(Progress {
            done: self.report.values,
            total: self.total,
        });
        Ok(steps)
    }

    fn copy(&mut self, op: &mut Operation) -> Result<()> {
        for argument in op.inputs.iter_mut().flat_map(|(_, list)| list) {
            if let Argument::Value(value) = argument {
                self.copy_value(value)?;
            }
        }
        op.attributes
            .iter_mut()
            .try_for_each(|(_, value)| self.copy_value(value))
    }

    fn copy_value(&mut self, value: &mut Value) -> Result<()> {
        if let (ValueData::Blob(blob), ValueType::Tensor(ty)) = (&value.data, &value.ty) {
            if !self.copied.contains_key(blob) {
                let bytes = self.model.blob(blob, ty)?;
                let written = self.writer.weight(ty, &bytes)?;
                self.copied.insert(blob.clone(), written);
            }
            if let Some(new) = self.copied.get(blob) {
                *value = new.clone();
            }
        }
        Ok(())
    }
}

/// The operations of compressed steps in place of the `const` they stand for.
fn operations(steps: &[WeightStep], op: &Operation, name: &str) -> Vec<Operation> {
    let mut out: Vec<Operation> = Vec::new();
    let mut before: Vec<String> = Vec::new();
    for (i, step) in steps.iter().enumerate() {
        let last = i + 1 == steps.len();
        let names: Vec<String> = (0..step.outputs.len())
            .map(|n| {
                if last {
                    name.to_owned()
                } else {
                    format!("{name}_{}_{n}", step.op)
                }
            })
            .collect();
        let bind = |input: &StepInput| match input {
            StepInput::Value(value) => Argument::Value(value.clone()),
            StepInput::Before(n) => Argument::Name(before.get(*n).cloned().unwrap_or_default()),
        };
        let inputs = step
            .inputs
            .iter()
            .map(|(p, input)| ((*p).to_owned(), vec![bind(input)]))
            .collect();
        let outputs = names
            .iter()
            .zip(&step.outputs)
            .map(|(name, ty)| candle_coreml_mil::NamedType {
                name: name.clone(),
                ty: if last {
                    op.outputs
                        .first()
                        .map_or(ValueType::Tensor(ty.clone()), |o| o.ty.clone())
                } else {
                    ValueType::Tensor(ty.clone())
                },
            });
        let made = Operation {
            op_type: step.op.to_owned(),
            inputs,
            outputs: outputs.collect(),
            ..Operation::default()
        };
        out.push(named(made, &names[0]));
        before = names;
    }
    out
}

/// The weight of a `const` that is worth compressing.
fn candidate<'o>(op: &'o Operation, options: &CompressOptions) -> Option<(&'o BlobRef, &'o TensorType)> {
    let value = op.attribute("val").filter(|_| op.op_type == "const")?;
    let (ValueData::Blob(blob), ValueType::Tensor(ty)) = (&value.data, &value.ty) else {
        return None;
    };
    let worth = ty.dtype == DType::Fp16 && ty.shape.len() >= 2 && ty.element_count()? >= options.least_values;
    worth.then_some((blob, ty))
}

fn total_values(program: &Program, options: &CompressOptions) -> u64 {
    let mut seen = HashMap::new();
    for op in program.functions.iter().flat_map(|f| &f.body.operations) {
        if let Some((blob, ty)) = candidate(op, options) {
            seen.insert(blob, ty.element_count().unwrap_or(0) as u64);
        }
    }
    seen.values().sum()
}

/// Summed squares of values, and of what they differ from `back` by.
fn squares(values: &[f16], back: &[f32]) -> (f64, f64) {
    let add = |(size, error): (f64, f64), (v, b): (&f16, &f32)| {
        let v = v.to_f32();
        (size + f64::from(v * v), error + f64::from((v - b) * (v - b)))
    };
    values.iter().zip(back).fold((0.0, 0.0), add)
}

fn floats(bytes: &[u8]) -> Vec<f16> {
    bytes
        .as_chunks::<2>()
        .0
        .iter()
        .map(|b| f16::from_le_bytes(*b))
        .collect()
}
