//! A model file opened: its description, its program and its weights.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;

use crate::blob::read_blob;
use crate::compiled::{self, read_compiled};
use crate::description::Description;
use crate::error::{Error, Result, problem};
use crate::package;
use crate::program::{
    Argument, Attributes, BlobRef, Block, Program, TensorType, Value, ValueData, ValueType,
};
use crate::source::{Contents, Mapped, Source, join, parent};
use crate::spec::read_spec;

/// A Core ML model as it is on disk or in memory.
///
/// A package (`.mlpackage`), a specification (`.mlmodel`) and a compiled model (`.mlmodelc`) give the same things here.
/// Weights stay where they are: in the mapped file or in the memory they came in.
///
/// ```
/// use candle_coreml_mil::{Model, Source};
/// use std::collections::BTreeMap;
///
/// let text = r#"program(1.3) {
///     func main<ios18>(tensor<fp16, [2]> x) { tensor<fp16, [2]> y = relu(x = x); } -> (y);
/// }"#;
/// let files = BTreeMap::from([("tiny.mlmodelc/model.mil".to_string(), text.into())]);
/// let model = Model::open_source(Source::memory(files), "tiny.mlmodelc")?;
/// assert_eq!(model.name(), "tiny");
/// assert_eq!(model.description().functions[0].outputs[0].name, "y");
/// assert_eq!(model.program().unwrap().functions[0].body.operations[0].op_type, "relu");
/// # Ok::<(), candle_coreml_mil::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Model {
    name: String,
    description: Description,
    program: Option<Program>,
    weights: BTreeMap<String, WeightFile>,
    content_size_bytes: u64,
}

#[derive(Clone)]
struct WeightFile {
    display: String,
    contents: Contents,
}

/// The size instead of the weights, which are too many to print.
impl std::fmt::Debug for WeightFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", self.display, self.contents.bytes.len())
    }
}

/// What the parts of an opened model come from.
struct Parts {
    description: Description,
    program: Option<Program>,
    /// Folder that `@model_path` stands for.
    folder: String,
    /// The file with the program, for messages.
    file: String,
    size_bytes: u64,
}

impl Model {
    /// Opens a package, a specification or a compiled model, whichever is at `path`; the ending does not matter.
    ///
    /// The program is checked ([`Program::check`]) and so is the record of every weight it refers to.
    ///
    /// # Errors
    /// What is wrong and in which file, for missing and malformed files alike.
    pub fn open(path: impl AsRef<Path>) -> Result<Model> {
        let path = path.as_ref();
        let io = |source| Error::Io {
            path: path.display().to_string(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(io)?;
        // A path that ends in `..` or is `.` has no name of its own until it is resolved.
        let named = if path.file_name().is_some() {
            path.to_path_buf()
        } else {
            path.canonicalize().map_err(io)?
        };
        let file_name = named
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let stem = stem(&file_name);
        if metadata.is_dir() {
            return open_in(&Source::directory(path), "", stem);
        }
        let folder = named.parent().unwrap_or(Path::new(""));
        open_in(&Source::directory(folder), &file_name, stem)
    }

    /// Opens the model at `root`, a file or folder of `source` (empty: the source's top folder).
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_source(source: Source, root: &str) -> Result<Model> {
        let root = root.trim_end_matches('/');
        let file_name = root.rsplit('/').next().unwrap_or_default();
        open_in(
            &source,
            root,
            if file_name.is_empty() {
                "model"
            } else {
                stem(file_name)
            },
        )
    }

    /// Inputs, outputs, states, functions and metadata.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The program; `None` for models of other kinds (see [`Description::kind`]).
    pub fn program(&self) -> Option<&Program> {
        self.program.as_ref()
    }

    /// The file's name without its ending.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes of the weight files that the program refers to; of other kinds of models, of the specification.
    pub fn content_size_bytes(&self) -> u64 {
        self.content_size_bytes
    }

    /// The weight files by the paths the program has for them.
    pub(crate) fn weight_files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.weights
            .iter()
            .map(|(path, file)| (path.as_str(), file.contents.bytes.as_ref()))
    }

    /// The elements of a weight as they are in the file: row-major, little-endian, packed where smaller than a byte.
    ///
    /// No copy is made: the result keeps the file mapped.
    ///
    /// # Errors
    /// [`Error::Blob`] when there is no such blob or when its dtype or size is not that of `expected`.
    pub fn blob(&self, blob: &BlobRef, expected: &TensorType) -> Result<Bytes> {
        let file = self.weights.get(&blob.path).ok_or_else(|| Error::Blob {
            path: blob.path.clone(),
            offset: blob.offset,
            problem: "the program refers to no such file".to_string(),
        })?;
        read_blob(&file.contents.bytes, &file.display, blob.offset, expected)
    }

    /// Says that bytes from [`Model::blob`] are not needed in memory for now, because they were copied in another form. The
    /// system may take the memory back; the bytes are read from the file again when they are looked at again.
    pub fn release(&self, blob: &Bytes) {
        if let Some(mapped) = self.mapped(blob) {
            mapped.release();
        }
    }

    /// The part of a mapped file that bytes from [`Model::blob`] are, for who wants to release it later; none for other bytes.
    pub fn mapped(&self, blob: &Bytes) -> Option<Mapped> {
        self.weights.values().find_map(|file| file.contents.mapped(blob))
    }

    /// The elements of a tensor value, whether they are written in the program or in a weight file; `None` for strings
    /// and for values that are no tensors.
    ///
    /// # Errors
    /// As [`Model::blob`].
    pub fn tensor_bytes(&self, value: &Value) -> Result<Option<Bytes>> {
        match (&value.ty, &value.data) {
            (ValueType::Tensor(_), ValueData::Tensor(bytes)) => Ok(Some(bytes.clone())),
            (ValueType::Tensor(ty), ValueData::Blob(blob)) => self.blob(blob, ty).map(Some),
            _ => Ok(None),
        }
    }
}

fn stem(file_name: &str) -> &str {
    match file_name.rsplit_once('.') {
        Some((stem, _)) if !stem.is_empty() => stem,
        _ => file_name,
    }
}

fn open_in(source: &Source, root: &str, name: &str) -> Result<Model> {
    let parts = read_parts(source, root)?;
    let mut weights = BTreeMap::new();
    if let Some(program) = &parts.program {
        program.check().map_err(|source| Error::Program {
            path: parts.file.clone(),
            source,
        })?;
        weights = open_weights(source, &parts, program)?;
    }
    let mapped: u64 = weights
        .values()
        .map(|w: &WeightFile| w.contents.bytes.len() as u64)
        .sum();
    Ok(Model {
        name: name.to_string(),
        content_size_bytes: if parts.program.is_some() {
            mapped
        } else {
            parts.size_bytes
        },
        description: parts.description,
        program: parts.program,
        weights,
    })
}

fn read_parts(source: &Source, root: &str) -> Result<Parts> {
    if source.contains(&join(root, package::MANIFEST)) {
        return read_spec_file(source, &package::spec_path(source, root)?);
    }
    for file in [compiled::PROGRAM, compiled::DESCRIPTION, compiled::METADATA] {
        if source.contains(&join(root, file)) {
            let (description, program) = read_compiled(source, root)?;
            let file = source.display(&join(root, compiled::PROGRAM));
            return Ok(Parts {
                description,
                program,
                folder: root.to_string(),
                file,
                size_bytes: 0,
            });
        }
    }
    if !source.contains(root) {
        let problem =
            "no model: a folder has Manifest.json (.mlpackage), or model.mil and coremldata.bin (.mlmodelc)";
        return Err(Error::NotAModel {
            path: source.display(root),
            problem: problem.to_string(),
        });
    }
    let bytes = source.read(root)?;
    match bytes.iter().find(|b| !b.is_ascii_whitespace()) {
        Some(b'p') if bytes.trim_ascii_start().starts_with(b"program") => {
            let program = compiled::read_text(source, root)?;
            Ok(Parts {
                description: Description::from_program(&program),
                program: Some(program),
                folder: parent(root).to_string(),
                file: source.display(root),
                size_bytes: 0,
            })
        }
        _ => read_spec_file(source, root),
    }
}

fn read_spec_file(source: &Source, path: &str) -> Result<Parts> {
    let bytes = source.read(path)?;
    let file = source.display(path);
    let (description, program) = read_spec(&bytes, &file)?;
    Ok(Parts {
        description,
        program,
        folder: parent(path).to_string(),
        file,
        size_bytes: bytes.len() as u64,
    })
}

/// Maps the weight files and checks the record of every weight.
fn open_weights(source: &Source, parts: &Parts, program: &Program) -> Result<BTreeMap<String, WeightFile>> {
    let mut files: BTreeMap<String, WeightFile> = BTreeMap::new();
    let mut blobs = Vec::new();
    visit_blobs(program, &mut |blob, ty| blobs.push((blob, ty)));
    for (blob, ty) in blobs {
        if !files.contains_key(&blob.path) {
            let path = blob_path(&parts.folder, &blob.path);
            let display = source.display(&path);
            let contents = source.contents(&path).map_err(|error| match error {
                Error::Io { source, .. } => Error::Weights {
                    program: parts.file.clone(),
                    weights: blob.path.clone(),
                    source,
                },
                other => other,
            })?;
            files.insert(blob.path.clone(), WeightFile { display, contents });
        }
        let Some(file) = files.get(&blob.path) else {
            continue;
        };
        let ValueType::Tensor(ty) = ty else {
            return Err(problem!("the blob at {} is no tensor", blob.offset).in_file(&file.display));
        };
        read_blob(&file.contents.bytes, &file.display, blob.offset, ty)?;
    }
    Ok(files)
}

/// `@model_path` stands for the folder of the program's file.
fn blob_path(folder: &str, written: &str) -> String {
    join(folder, written.strip_prefix("@model_path/").unwrap_or(written))
}

/// Calls `visit` with every reference into a weight file, in the order they are written.
pub(crate) fn visit_blobs<'p>(program: &'p Program, visit: &mut impl FnMut(&'p BlobRef, &'p ValueType)) {
    visit_attributes(&program.attributes, visit);
    for function in &program.functions {
        visit_attributes(&function.attributes, visit);
        visit_block(&function.body, visit);
    }
}

fn visit_block<'p>(block: &'p Block, visit: &mut impl FnMut(&'p BlobRef, &'p ValueType)) {
    visit_attributes(&block.attributes, visit);
    for op in &block.operations {
        for argument in op.inputs.iter().flat_map(|(_, arguments)| arguments) {
            if let Argument::Value(value) = argument {
                visit_value(value, visit);
            }
        }
        visit_attributes(&op.attributes, visit);
        op.blocks.iter().for_each(|b| visit_block(b, visit));
    }
}

fn visit_attributes<'p>(list: &'p Attributes, visit: &mut impl FnMut(&'p BlobRef, &'p ValueType)) {
    list.iter().for_each(|(_, value)| visit_value(value, visit));
}

fn visit_value<'p>(value: &'p Value, visit: &mut impl FnMut(&'p BlobRef, &'p ValueType)) {
    match &value.data {
        ValueData::Blob(blob) => visit(blob, &value.ty),
        ValueData::List(values) | ValueData::Tuple(values) => {
            values.iter().for_each(|v| visit_value(v, visit))
        }
        ValueData::Dictionary(pairs) => pairs.iter().for_each(|(k, v)| {
            visit_value(k, visit);
            visit_value(v, visit);
        }),
        ValueData::Tensor(_) | ValueData::Strings(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(files: &[(&str, &str)], root: &str) -> std::result::Result<Model, String> {
        let files = files
            .iter()
            .map(|(n, t)| (n.to_string(), Bytes::copy_from_slice(t.as_bytes())));
        Model::open_source(Source::memory(files.collect()), root).map_err(|e| e.to_string())
    }

    #[test]
    fn incomplete_models_say_what_is_missing() {
        let weight = r#"program(1.3) { func main<ios18>() { tensor<fp16, [2]> w = const()[val = tensor<fp16, [2]>(
            BLOBFILE(path = string("@model_path/weights/w.bin"), offset = uint64(64)))]; } -> (w); }"#;
        let manifest = r#"{"fileFormatVersion": "1.0.0", "rootModelIdentifier": "A",
            "itemInfoEntries": {"A": {"path": "m/model.mlmodel"}}}"#;
        type Files<'a> = &'a [(&'a str, &'a str)];
        let cases: [(Files, &str, &str); 6] = [
            (&[], "a.mlpackage", "no model"),
            (&[("a/readme", "")], "a", "Manifest.json"),
            (&[("a/Manifest.json", manifest)], "a", "a/Data/m/model.mlmodel"),
            (
                &[("a/model.mil", weight)],
                "a",
                "a/model.mil: its weights @model_path/weights/w.bin",
            ),
            (
                &[("a/model.mil", weight), ("a/weights/w.bin", "short")],
                "a",
                "not a weight file",
            ),
            (&[("a/metadata.json", "")], "a", "a/metadata.json: EOF"),
        ];
        for (files, root, expected) in cases {
            let found = open(files, root).unwrap_err();
            assert!(found.contains(expected), "{root}: {found}");
        }
    }

    #[test]
    fn models_are_shared_between_threads() {
        fn shared<T: Send + Sync + 'static>() {}
        shared::<Model>();
    }

    #[test]
    fn a_file_of_mil_text_opens_by_its_content() {
        let model = open(
            &[("a/b.txt", "\n program(1.0) { func f<ios16>() {} -> (); }")],
            "a/b.txt",
        )
        .unwrap();
        assert_eq!((model.name(), model.content_size_bytes()), ("b", 0));
        assert_eq!(model.description().default_function, "f");
    }
}
