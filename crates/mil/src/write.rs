//! Writing packages: weights streamed to disk first, then the program that refers to them.

mod compiled;
mod interface;
mod program;
mod weights;

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use prost::Message;

use crate::description::{Description, ModelKind};
use crate::error::{Error, Result, problem};
use crate::model::{Model, visit_blobs};
use crate::package::{DATA, MANIFEST};
use crate::program::{
    Argument, Attributes, BlobRef, Block, Program, TensorType, Value, ValueData, ValueType,
};
use crate::same::FLEXIBLE_SHAPES;
use weights::WeightWriter;

const FOLDER: &str = "com.apple.CoreML";
const SPEC: &str = "model.mlmodel";
const WEIGHTS: &str = "weights";
const WEIGHT_FILE: &str = "weight.bin";
/// Identifiers in a manifest are only compared within it; fixed ones make equal models equal files.
const SPEC_ID: &str = "6D1C1C3E-5E3A-4B3B-9C63-0B0D6A2F7A01";
const WEIGHTS_ID: &str = "6D1C1C3E-5E3A-4B3B-9C63-0B0D6A2F7A02";

/// Writes one `.mlpackage`.
///
/// Weights go to disk as they come, equal ones once; the program that uses them follows at the end. Until
/// [`PackageWriter::finish`] everything is in a folder beside the target whose name ends in `.partial`; it is removed when
/// the writer is dropped before.
///
/// ```
/// use candle_coreml_mil::*;
///
/// let folder = std::env::temp_dir().join(format!("candle-coreml-doc-{}", std::process::id()));
/// std::fs::create_dir_all(&folder).unwrap();
/// let path = folder.join("add.mlpackage");
///
/// let ty = TensorType::fixed(DType::Fp16, &[2]);
/// let mut writer = PackageWriter::create(&path)?;
/// let weight = writer.weight(&ty, &[0, 0x3c, 0, 0x40])?;
///
/// let x = NamedType { name: "x".into(), ty: ValueType::Tensor(ty.clone()) };
/// let y = NamedType { name: "y".into(), ty: ValueType::Tensor(ty.clone()) };
/// let add = Operation {
///     op_type: "add".into(),
///     inputs: vec![
///         ("x".into(), vec![Argument::Name("x".into())]),
///         ("y".into(), vec![Argument::Value(weight)]),
///     ],
///     outputs: vec![y],
///     ..Operation::default()
/// };
/// let body = Block { operations: vec![add], outputs: vec!["y".into()], ..Block::default() };
/// let main = Function {
///     name: "main".into(),
///     opset: "CoreML8".into(),
///     inputs: vec![x],
///     attributes: vec![],
///     body,
/// };
/// let version = ProgramVersion::V1_3; // that of opset CoreML8
/// let program = Program { functions: vec![main], version, ..Program::default() };
/// writer.finish(&program, &Description::from_program(&program))?;
///
/// let model = Model::open(&path)?;
/// assert_eq!(model.program(), Some(&program));
/// # std::fs::remove_dir_all(&folder).unwrap();
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct PackageWriter {
    target: PathBuf,
    partial: PathBuf,
    weights: Option<WeightWriter>,
    finished: bool,
}

impl PackageWriter {
    /// Starts a package at `target`.
    ///
    /// # Errors
    /// [`Error::Io`] when there is something at `target` already or the folder cannot be made.
    pub fn create(target: impl Into<PathBuf>) -> Result<PackageWriter> {
        let target = target.into();
        if target.exists() {
            return Err(io(&target)(std::io::ErrorKind::AlreadyExists.into()));
        }
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(".partial");
        let partial = target.with_file_name(name);
        if partial.exists() {
            // Left by a process that was killed.
            std::fs::remove_dir_all(&partial).map_err(io(&partial))?;
        }
        let folder = partial.join(DATA).join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(io(&folder))?;
        Ok(PackageWriter {
            target,
            partial,
            weights: None,
            finished: false,
        })
    }

    /// Writes a weight and gives the value that refers to it. A weight with the same type and bytes as an earlier one is
    /// not written again.
    ///
    /// `bytes` are the elements in order, little-endian, packed where smaller than a byte.
    ///
    /// # Errors
    /// [`Error::Content`] for a number of bytes that is not the type's and for dtypes that weight files cannot hold (bool,
    /// string, fp64, int64, uint64: those are written in the program); [`Error::Io`].
    pub fn weight(&mut self, ty: &TensorType, bytes: &[u8]) -> Result<Value> {
        self.weight_from(ty, &mut &bytes[..])
    }

    /// As [`PackageWriter::weight`], with the bytes read from `source` piece by piece, so that a weight need not be in
    /// memory.
    ///
    /// # Errors
    /// As [`PackageWriter::weight`]; a source that ends early or late is an error too.
    pub fn weight_from(&mut self, ty: &TensorType, source: &mut impl Read) -> Result<Value> {
        let writer = match &mut self.weights {
            Some(writer) => writer,
            None => {
                let folder = self.partial.join(DATA).join(FOLDER).join(WEIGHTS);
                std::fs::create_dir_all(&folder).map_err(io(&folder))?;
                self.weights
                    .insert(WeightWriter::create(&folder.join(WEIGHT_FILE))?)
            }
        };
        let offset = writer.write(ty, source)?;
        let path = format!("@model_path/{WEIGHTS}/{WEIGHT_FILE}");
        Ok(Value {
            ty: ValueType::Tensor(ty.clone()),
            data: ValueData::Blob(BlobRef { path, offset }),
        })
    }

    /// Writes the program and its description and puts the package in place.
    ///
    /// References into weight files have to be those that [`PackageWriter::weight`] gave. Blocks, types and values
    /// nested more than some 30 levels deep are written, but protobuf readers stop at 100 messages inside each other.
    ///
    /// # Errors
    /// [`Error::Program`] when the program breaks a rule of [`Program::check`]; [`Error::Content`] for references to other
    /// weight files and for descriptions of functions that are not there; [`Error::Io`].
    pub fn finish(mut self, program: &Program, description: &Description) -> Result<()> {
        let name = self.target.display().to_string();
        program.check().map_err(|source| Error::Program {
            path: name.clone(),
            source,
        })?;
        self.check_references(program)?;
        check_description(program, description).map_err(|p| p.in_file(&name))?;
        let model = interface::model(description, program::convert(program));
        let has_weights = self.weights.is_some();
        if let Some(weights) = self.weights.take() {
            weights.finish()?;
        }
        let spec = self.partial.join(DATA).join(FOLDER).join(SPEC);
        write_file(&spec, &model.encode_to_vec())?;
        write_file(&self.partial.join(MANIFEST), manifest(has_weights).as_bytes())?;
        std::fs::rename(&self.partial, &self.target).map_err(io(&self.target))?;
        self.finished = true;
        Ok(())
    }

    fn check_references(&self, program: &Program) -> Result<()> {
        let name = self.target.display().to_string();
        let mut result = Ok(());
        visit_blobs(program, &mut |blob, _| {
            let known = self.weights.as_ref().is_some_and(|w| w.holds(blob.offset));
            if result.is_ok() && !(known && blob.path == format!("@model_path/{WEIGHTS}/{WEIGHT_FILE}")) {
                result = Err(
                    problem!("no weight was written for {} at {}", blob.path, blob.offset).in_file(&name),
                );
            }
        });
        result
    }
}

impl Drop for PackageWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing more can be done about a folder that cannot be removed.
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}

impl Model {
    /// Writes the model as a package, whatever form it was opened from.
    ///
    /// Only weights that the program refers to are written, equal ones once.
    ///
    /// # Errors
    /// As [`PackageWriter`]; [`Error::NotAModel`] for models without a program.
    pub fn save_package(&self, target: impl AsRef<Path>) -> Result<()> {
        let target = target.as_ref();
        let program = self.program().ok_or_else(|| Error::NotAModel {
            path: self.name().to_string(),
            problem: "only ML Programs can be written".to_string(),
        })?;
        let mut writer = PackageWriter::create(target)?;
        let mut moved = HashMap::new();
        let mut blobs = Vec::new();
        visit_blobs(program, &mut |blob, ty| blobs.push((blob, ty)));
        for (blob, ty) in blobs {
            let ValueType::Tensor(ty) = ty else { continue };
            if !moved.contains_key(blob) {
                let written = writer.weight(ty, &self.blob(blob, ty)?)?;
                if let ValueData::Blob(new) = written.data {
                    moved.insert(blob.clone(), new);
                }
            }
        }
        let mut program = program.clone();
        replace_blobs(&mut program, &moved);
        for f in &mut program.functions {
            // What the compiler adds: the description says the same, and coremltools refuses functions with attributes.
            f.attributes.retain(|(name, _)| name != FLEXIBLE_SHAPES);
        }
        writer.finish(&program, self.description())
    }
}

fn replace_blobs(program: &mut Program, moved: &HashMap<BlobRef, BlobRef>) {
    replace_in_attributes(&mut program.attributes, moved);
    for function in &mut program.functions {
        replace_in_attributes(&mut function.attributes, moved);
        replace_in_block(&mut function.body, moved);
    }
}

fn replace_in_block(block: &mut Block, moved: &HashMap<BlobRef, BlobRef>) {
    replace_in_attributes(&mut block.attributes, moved);
    for op in &mut block.operations {
        for argument in op.inputs.iter_mut().flat_map(|(_, arguments)| arguments) {
            if let Argument::Value(value) = argument {
                replace_in_value(value, moved);
            }
        }
        replace_in_attributes(&mut op.attributes, moved);
        op.blocks.iter_mut().for_each(|b| replace_in_block(b, moved));
    }
}

fn replace_in_attributes(list: &mut Attributes, moved: &HashMap<BlobRef, BlobRef>) {
    list.iter_mut()
        .for_each(|(_, value)| replace_in_value(value, moved));
}

fn replace_in_value(value: &mut Value, moved: &HashMap<BlobRef, BlobRef>) {
    match &mut value.data {
        ValueData::Blob(blob) => {
            if let Some(new) = moved.get(blob) {
                *blob = new.clone();
            }
        }
        ValueData::List(values) | ValueData::Tuple(values) => {
            values.iter_mut().for_each(|v| replace_in_value(v, moved));
        }
        ValueData::Dictionary(pairs) => pairs.iter_mut().for_each(|(k, v)| {
            replace_in_value(k, moved);
            replace_in_value(v, moved);
        }),
        ValueData::Tensor(_) | ValueData::Strings(_) => {}
    }
}

fn check_description(program: &Program, d: &Description) -> Result<(), crate::error::Problem> {
    if d.kind != ModelKind::Program {
        return Err(problem!(
            "the description is of a {:?}, only ML Programs can be written",
            d.kind
        ));
    }
    for f in &program.functions {
        if !d.functions.iter().any(|g| g.name == f.name) {
            return Err(problem!("function {:?} is not described", f.name));
        }
    }
    for f in &d.functions {
        if program.function(&f.name).is_none() {
            return Err(problem!(
                "function {:?} is described but not in the program",
                f.name
            ));
        }
    }
    if !d.functions.iter().any(|f| f.name == d.default_function) {
        return Err(problem!(
            "default function {:?} is not described",
            d.default_function
        ));
    }
    Ok(())
}

fn manifest(has_weights: bool) -> String {
    let item = |name: &str, description: &str| {
        serde_json::json!({
            "author": FOLDER,
            "description": description,
            "name": name,
            "path": format!("{FOLDER}/{name}"),
        })
    };
    let mut entries = serde_json::Map::new();
    entries.insert(SPEC_ID.to_string(), item(SPEC, "CoreML Model Specification"));
    if has_weights {
        entries.insert(WEIGHTS_ID.to_string(), item(WEIGHTS, "CoreML Model Weights"));
    }
    let manifest = serde_json::json!({
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": SPEC_ID,
    });
    format!("{manifest:#}\n")
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(io(path))
}

/// Turns a system error into ours, with the path.
fn io(path: &Path) -> impl Fn(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::Io {
        path: path.clone(),
        source,
    }
}
