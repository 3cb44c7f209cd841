//! Compiled models (`.mlmodelc`): `model.mil`, and the description in `coremldata.bin` or `metadata.json`.

mod metadata;

use bytes::{Buf, Bytes};
use coreml_proto::proto::ModelDescription;
use prost::Message;

use crate::description::*;
use crate::error::{Error, Problem, Result, problem};
use crate::program::{Function, Program, ValueType};
use crate::source::{Source, join};
use crate::text::parse_program;

pub(crate) const PROGRAM: &str = "model.mil";
pub(crate) const DESCRIPTION: &str = "coremldata.bin";
pub(crate) const METADATA: &str = "metadata.json";

/// Reads the compiled model in folder `root`.
pub(crate) fn read_compiled(source: &Source, root: &str) -> Result<(Description, Option<Program>)> {
    let program_path = join(root, PROGRAM);
    let program = if source.contains(&program_path) {
        Some(read_text(source, &program_path)?)
    } else {
        None
    };
    let description = match (read_description(source, root), &program) {
        (Ok(description), _) => description,
        (Err(_), Some(program)) if !source.contains(&join(root, DESCRIPTION)) => {
            Description::from_program(program)
        }
        (Err(error), _) => return Err(error),
    };
    Ok((description, program))
}

/// Reads a file of MIL text.
pub(crate) fn read_text(source: &Source, path: &str) -> Result<Program> {
    let bytes = source.read(path)?;
    let name = source.display(path);
    let text = std::str::from_utf8(&bytes)
        .map_err(|e| problem!("not text: byte {} is not UTF-8", e.valid_up_to()).in_file(&name))?;
    parse_program(text, &name)
}

/// `coremldata.bin`, or `metadata.json` where the former is missing or not understood.
fn read_description(source: &Source, root: &str) -> Result<Description> {
    let read = |file: &str| {
        let path = join(root, file);
        source.read(&path).map(|bytes| (bytes, source.display(&path)))
    };
    let first = read(DESCRIPTION).and_then(|(bytes, name)| parse_description(&bytes, &name));
    first.or_else(|error| match read(METADATA) {
        Ok((bytes, name)) => metadata::parse(&bytes, &name),
        Err(_) => Err(error),
    })
}

/// The description in `coremldata.bin`. The layout was found by looking at files of many compilers: a header of 28
/// bytes that starts with the model type, a string, 32 bytes that start with the specification version, and a
/// `ModelDescription` message (for models that are kept as they were, the whole specification).
fn parse_description(file: &Bytes, name: &str) -> Result<Description> {
    let in_file = |p: Problem| p.in_file(name);
    let mut rest = file.clone();
    let short = |_| problem!("ends after {} bytes", file.len()).in_file(name);
    let kind = rest.try_get_u32_le().map_err(short)?;
    skip(&mut rest, 24).map_err(in_file)?;
    let target = sized(&mut rest).map_err(in_file)?;
    let version = rest.clone().try_get_u32_le().map_err(short)?;
    skip(&mut rest, 32).map_err(in_file)?;
    if target.as_ref() == b"spec" {
        return Ok(crate::spec::read_spec(&rest, name)?.0);
    }
    let message = sized(&mut rest).map_err(in_file)?;
    let message = ModelDescription::decode(message).map_err(|source| Error::Protobuf {
        path: name.to_string(),
        source,
    })?;
    let mut description = crate::spec::read_description(&message).map_err(in_file)?;
    description.specification_version =
        i32::try_from(version).map_err(|_| in_file(problem!("specification version {version}")))?;
    description.kind = crate::spec::kind(kind);
    Ok(description)
}

fn skip(rest: &mut Bytes, count: usize) -> std::result::Result<(), Problem> {
    if rest.len() < count {
        return Err(problem!("{} bytes left where {count} are needed", rest.len()));
    }
    rest.advance(count);
    Ok(())
}

/// Bytes behind their 64-bit length.
fn sized(rest: &mut Bytes) -> std::result::Result<Bytes, Problem> {
    let len = rest.try_get_u64_le().map_err(|_| problem!("no length"))?;
    match usize::try_from(len) {
        Ok(len) if len <= rest.len() => Ok(rest.split_to(len)),
        _ => Err(problem!("a part of {len} bytes where {} are left", rest.len())),
    }
}

impl Description {
    /// What a program's own signatures tell: names, element types, and shapes where they are fixed.
    ///
    /// Features are multi-arrays and states, none optional. The default function is `main`, or the first one. The
    /// specification version is that of the newest operation set.
    pub fn from_program(program: &Program) -> Description {
        let functions: Vec<_> = program.functions.iter().map(signature).collect();
        let default = functions.iter().find(|f| f.name == "main").or(functions.first());
        let default_function = default.map(|f| f.name.clone()).unwrap_or_default();
        let versions = program
            .functions
            .iter()
            .filter_map(|f| f.opset.strip_prefix("CoreML")?.parse::<i32>().ok());
        // Operation set CoreML5 came with specification version 6, and so on.
        let specification_version = versions.max().map_or(0, |v| v.saturating_add(1));
        Description {
            functions,
            default_function,
            specification_version,
            ..Description::default()
        }
    }
}

fn signature(f: &Function) -> FunctionDescription {
    let mut described = FunctionDescription {
        name: f.name.clone(),
        ..FunctionDescription::default()
    };
    for input in &f.inputs {
        let list = if matches!(input.ty, ValueType::State(_)) {
            &mut described.states
        } else {
            &mut described.inputs
        };
        list.extend(feature(&input.name, &input.ty));
    }
    let defined = f
        .body
        .operations
        .iter()
        .flat_map(|op| &op.outputs)
        .chain(&f.inputs);
    let types: std::collections::HashMap<_, _> = defined.map(|n| (n.name.as_str(), &n.ty)).collect();
    for name in &f.body.outputs {
        described
            .outputs
            .extend(types.get(name.as_str()).and_then(|ty| feature(name, ty)));
    }
    described
}

/// A tensor or state as a feature; `None` for what predictions cannot pass, such as lists.
fn feature(name: &str, ty: &ValueType) -> Option<Feature> {
    let tensor = ty.tensor()?;
    let shape = tensor.fixed_shape();
    let flexibility = match shape {
        Some(_) => Flexibility::Fixed,
        None => Flexibility::Ranges(
            tensor
                .shape
                .iter()
                .map(|d| match d {
                    crate::Dim::Fixed(n) => (*n, Some(*n)),
                    crate::Dim::Unknown | crate::Dim::Variadic => (0, None),
                })
                .collect(),
        ),
    };
    let array = ArrayDescription {
        dtype: tensor.dtype,
        shape: shape.unwrap_or_default(),
        flexibility,
        default_value: None,
    };
    let ty = if matches!(ty, ValueType::State(_)) {
        FeatureType::State(array)
    } else {
        FeatureType::MultiArray(array)
    };
    Some(Feature {
        name: name.to_string(),
        description: String::new(),
        ty,
        optional: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::DType;

    fn sample(target: &[u8], message: &[u8]) -> Bytes {
        let mut out = Vec::new();
        out.extend(502u32.to_le_bytes());
        out.extend([0; 24]);
        out.extend((target.len() as u64).to_le_bytes());
        out.extend(target);
        out.extend(9u32.to_le_bytes());
        out.extend([0; 28]);
        out.extend((message.len() as u64).to_le_bytes());
        out.extend(message);
        out.extend([0; 16]);
        out.into()
    }

    #[test]
    fn the_description_is_found_behind_the_header() {
        // Input "a" of type Int64.
        let message = [0x0a, 7, 0x0a, 1, b'a', 0x1a, 2, 0x0a, 0];
        let found = parse_description(&sample(b"generic", &message), "f").unwrap();
        assert_eq!((found.specification_version, found.kind), (9, ModelKind::Program));
        assert_eq!(found.functions[0].inputs[0].name, "a");
    }

    #[test]
    fn every_cut_of_the_description_is_an_error() {
        let message = [0x0a, 7, 0x0a, 1, b'a', 0x1a, 2, 0x0a, 0];
        let file = sample(b"generic", &message);
        for len in 0..file.len() - 16 {
            assert!(parse_description(&file.slice(..len), "f").is_err(), "{len}");
        }
    }

    #[test]
    fn without_a_description_the_signature_serves() {
        let text = "program(1.3) { func main<ios18>(state<tensor<fp16, [2]>> s, tensor<fp32, [?, 3]> x) {
            tensor<fp32, [?, 3]> y = relu(x = x); } -> (y); }";
        let found = Description::from_program(&parse_program(text, "m").unwrap());
        let main = &found.functions[0];
        let array = |dtype, shape: &[usize], flexibility| ArrayDescription {
            dtype,
            shape: shape.to_vec(),
            flexibility,
            default_value: None,
        };
        let flexible = || Flexibility::Ranges(vec![(0, None), (3, Some(3))]);
        assert_eq!(
            main.states[0].ty,
            FeatureType::State(array(DType::Fp16, &[2], Flexibility::Fixed))
        );
        assert_eq!(
            main.inputs[0].ty,
            FeatureType::MultiArray(array(DType::Fp32, &[], flexible()))
        );
        assert_eq!(main.outputs[0].name, "y");
        assert_eq!(
            (found.default_function.as_str(), found.specification_version),
            ("main", 9)
        );
    }
}
