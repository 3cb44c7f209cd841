//! The package of an encoder: finding it, opening it, its inputs.

use std::collections::BTreeMap;
use std::path::Path;

use candle_coreml::{CoreMLModel, CoreMLModelBuilder, Feature, FeatureType, Source};
use candle_coreml_mil as mil;

use super::Role;
use super::outputs::{bare, is_head};
use super::sizes::Sizes;
use crate::Error;
use crate::bundle::{Files, LoadOptions};

/// A compiled model comes first: it needs no compiling.
const ENDINGS: [&str; 3] = [".mlmodelc", ".mlpackage", ".mlmodel"];
/// What only models have in their folders.
const MARKS: [&str; 3] = ["Manifest.json", "model.mil", "coremldata.bin"];

/// The files of a path, and the package where the path is one.
pub(super) fn locate(path: &Path) -> Result<(Files, Option<String>), Error> {
    let metadata = std::fs::metadata(path).map_err(|source| Error::Read {
        file: path.display().to_string(),
        source,
    })?;
    if metadata.is_dir() && !MARKS.iter().any(|mark| path.join(mark).exists()) {
        return Ok((Files::directory(path), None));
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    Ok((Files::directory(folder), name))
}

/// The one package of a folder.
pub(super) fn only_one(files: &Files) -> Result<String, Error> {
    let entries = files.entries()?;
    let mut stems: Vec<&str> = entries
        .iter()
        .filter_map(|name| ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)))
        .collect();
    stems.dedup();
    let stem = match stems.as_slice() {
        [stem] => stem,
        [] => {
            return Err(Error::MissingPart {
                bundle: files.name(),
                part: "encoder".to_owned(),
                tried: ENDINGS.iter().map(|ending| format!("`*{ending}`")).collect(),
            });
        }
        several => {
            return Err(Error::Unsupported {
                file: files.name(),
                what: format!(
                    "several packages ({}); give the path of one of them",
                    several.join(", ")
                ),
            });
        }
    };
    let mut incomplete = None;
    for name in ENDINGS.map(|ending| format!("{stem}{ending}")) {
        if !files.contains(&name) {
            continue;
        }
        let has = |mark: &str| files.contains(&format!("{name}/{mark}"));
        let missing = match name.rsplit_once('.') {
            Some((_, "mlpackage")) if !has("Manifest.json") => "Manifest.json",
            Some((_, "mlmodelc")) if !has("model.mil") && !has("coremldata.bin") => "model.mil",
            _ => return Ok(name),
        };
        incomplete.get_or_insert(Error::IncompletePart {
            file: files.full_name(&name),
            missing,
        });
    }
    Err(incomplete.unwrap_or_else(|| Error::MissingPart {
        bundle: files.name(),
        part: "encoder".to_owned(),
        tried: vec![format!("`{stem}.*`")],
    }))
}

/// True when the package at `path` takes token ids, keeps no state and gives no logits.
pub(super) fn recognize(path: &Path) -> Result<bool, Error> {
    let (files, package) = locate(path)?;
    let package = match package {
        Some(package) => package,
        None => only_one(&files)?,
    };
    let file = files.full_name(&package);
    let model = mil::Model::open(&file).map_err(|e| Error::Engine {
        part: file,
        source: Box::new(e),
    })?;
    let description = model.description();
    let function = description
        .functions
        .iter()
        .find(|f| f.name == description.default_function);
    Ok(function.is_some_and(|f| {
        f.states.is_empty()
            && f.inputs.iter().any(|input| role(&input.name) == Some(Role::Ids))
            && f.inputs
                .iter()
                .all(|input| input.optional || role(&input.name).is_some())
            && !f.outputs.iter().any(is_head)
    }))
}

/// Opens a package of the bundle.
pub(super) fn load(files: &Files, package: &str, options: &LoadOptions) -> Result<CoreMLModel, Error> {
    let builder = match (files.path(), files.below(package)) {
        (None, Some(inside)) => {
            let rooted: BTreeMap<_, _> = inside
                .into_iter()
                .map(|(path, bytes)| (format!("{package}/{path}"), bytes))
                .collect();
            CoreMLModelBuilder::from_source(Source::memory(rooted), package)
        }
        (path, _) => CoreMLModelBuilder::new(path.unwrap_or(Path::new("")).join(package)),
    };
    let builder = builder
        .engine(options.engine)
        .compute_units(options.compute_units)
        .numerics(options.numerics)
        // Vectors of tokens are added up: rounded to 16 bits they lose what the sum would keep.
        .wide(true)
        .threads(options.threads);
    builder.load().map_err(|e| Error::Engine {
        part: files.full_name(package),
        source: Box::new(e),
    })
}

/// An opened package and its name, for errors.
pub(super) struct Place<'a> {
    package: &'a str,
    model: &'a CoreMLModel,
}

impl<'a> Place<'a> {
    pub(super) fn new(package: &'a str, model: &'a CoreMLModel) -> Self {
        Place { package, model }
    }

    /// The package and its function.
    pub(super) fn names(&self) -> (String, String) {
        (self.package.to_owned(), self.model.function().name.clone())
    }

    pub(super) fn outputs(&self) -> &'a [Feature] {
        self.model.outputs()
    }

    pub(super) fn wrong(&self, what: String) -> Error {
        Error::Wiring {
            part: self.package.to_owned(),
            function: self.model.function().name.clone(),
            what,
        }
    }

    /// The inputs by what they are for, and the sizes they all take.
    pub(super) fn inputs(&self) -> Result<(Vec<(String, Role)>, Sizes), Error> {
        if let Some(state) = self.model.states().first() {
            return Err(self.wrong(format!("it keeps a state `{}`; encoders have none", state.name)));
        }
        let mut found: Vec<(String, Role)> = Vec::new();
        let mut sizes: Option<Sizes> = None;
        for input in self.model.inputs() {
            let Some(role) = role(&input.name) else {
                if input.optional {
                    continue;
                }
                return Err(self.wrong(format!(
                    "input `{}` is not an encoder's; known are `input_ids`, `attention_mask`, `token_type_ids`, `position_ids`",
                    input.name
                )));
            };
            if let Some((other, _)) = found.iter().find(|(_, r)| *r == role) {
                return Err(self.wrong(format!("inputs `{other}` and `{}` are for the same", input.name)));
            }
            let FeatureType::MultiArray(array) = &input.ty else {
                return Err(self.wrong(format!("input `{}` is no array", input.name)));
            };
            let own =
                Sizes::of(array).map_err(|what| self.wrong(format!("input `{}` {what}", input.name)))?;
            sizes = Some(match sizes {
                None => own,
                Some(sizes) => sizes.both(&own).ok_or_else(|| {
                    self.wrong(format!(
                        "input `{}` takes none of the sizes of the others",
                        input.name
                    ))
                })?,
            });
            found.push((input.name.clone(), role));
        }
        match sizes {
            Some(sizes) if found.iter().any(|(_, role)| *role == Role::Ids) => Ok((found, sizes)),
            _ => Err(self.wrong("it has no input `input_ids`".to_owned())),
        }
    }
}

/// What an input of this name is for.
fn role(name: &str) -> Option<Role> {
    Some(match bare(name).as_str() {
        "inputids" | "inputs" | "inputwords" | "ids" | "tokens" | "tokenids" | "wordids" => Role::Ids,
        "attentionmask" | "mask" | "inputmask" => Role::Mask,
        "tokentypeids" | "segmentids" | "typeids" | "tokentypes" | "segments" | "wordtypes" => Role::Types,
        "positionids" | "positions" => Role::Positions,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn files(names: &[&str]) -> Files {
        Files::memory("m", names.iter().map(|name| ((*name).to_owned(), Bytes::new())))
    }

    #[test]
    fn the_package_is_found_whatever_its_name() {
        let rows: [(&[&str], Result<&str, &str>); 6] = [
            (
                &["a.mlpackage/Manifest.json", "tokenizer.json"],
                Ok("a.mlpackage"),
            ),
            (
                &["a.mlpackage/Manifest.json", "a.mlmodelc/model.mil"],
                Ok("a.mlmodelc"),
            ),
            (
                &["a.mlpackage/Manifest.json", "a.mlmodelc/weights"],
                Ok("a.mlpackage"),
            ),
            (&["a.mlpackage/Data"], Err("Manifest.json")),
            (
                &["a.mlpackage/Manifest.json", "b.mlpackage/Manifest.json"],
                Err("a, b"),
            ),
            (&["tokenizer.json"], Err("*.mlpackage")),
        ];
        for (names, expected) in rows {
            match (only_one(&files(names)), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{names:?}"),
                (Err(error), Err(words)) => assert!(error.to_string().contains(words), "{names:?}: {error}"),
                (found, _) => panic!("{names:?}: {found:?}"),
            }
        }
    }

    #[test]
    fn inputs_are_known_in_every_spelling() {
        for (name, expected) in [
            ("input_ids", Some(Role::Ids)),
            ("inputIds", Some(Role::Ids)),
            ("attention_mask", Some(Role::Mask)),
            ("token_type_ids", Some(Role::Types)),
            ("segment_ids", Some(Role::Types)),
            ("position_ids", Some(Role::Positions)),
            ("pixel_values", None),
        ] {
            assert_eq!(role(name), expected, "{name}");
        }
    }
}
