//! Writing compiled models: the program as text, the description behind the header that compilers write, the weights.

use std::path::{Component, Path, PathBuf};

use prost::Message;

use super::{interface, io, write_file};
use crate::compiled::{DESCRIPTION, PROGRAM};
use crate::description::Description;
use crate::error::{Error, Result, problem};
use crate::model::Model;
use crate::text::print_program;

/// Number of the field that holds a program in `Model` messages: the kind of a model.
const PROGRAM_KIND: u32 = 502;

impl Model {
    /// Writes the model as a compiled one, a folder whose name ends in `.mlmodelc` by custom.
    ///
    /// This engine and others that read MIL text open it. Apple's compiler also lays weights out for its processors and writes
    /// analytics files; CoreML.framework is not known to open what is written here, and compiles packages by itself.
    ///
    /// # Errors
    /// [`Error::NotAModel`] for models without a program; [`Error::Io`], also when there is something at `target` already.
    ///
    /// ```no_run
    /// let model = candle_coreml_mil::Model::open("model.mlpackage")?;
    /// model.write_compiled("model.mlmodelc")?;
    /// # Ok::<(), candle_coreml_mil::Error>(())
    /// ```
    pub fn write_compiled(&self, target: impl AsRef<Path>) -> Result<()> {
        let target = target.as_ref();
        let program = self.program().ok_or_else(|| Error::NotAModel {
            path: self.name().to_string(),
            problem: "only ML Programs can be compiled".to_string(),
        })?;
        let weights = self
            .weight_files()
            .map(|(path, bytes)| Ok((inside(path)?, bytes)));
        let weights = weights.collect::<Result<Vec<_>>>()?;
        if target.exists() {
            return Err(io(target)(std::io::ErrorKind::AlreadyExists.into()));
        }
        // Under another name until it is whole.
        let mut name = target.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.partial", std::process::id()));
        let partial = target.with_file_name(name);
        std::fs::create_dir_all(&partial).map_err(io(&partial))?;
        let written = (|| {
            write_file(&partial.join(PROGRAM), print_program(program).as_bytes())?;
            write_file(&partial.join(DESCRIPTION), &description(self.description()))?;
            for (path, bytes) in weights {
                let path = partial.join(path);
                let folder = path.parent().unwrap_or(&partial);
                std::fs::create_dir_all(folder).map_err(io(folder))?;
                write_file(&path, bytes)?;
            }
            std::fs::rename(&partial, target).map_err(io(target))
        })();
        if written.is_err() {
            // Nothing more can be done about a folder that cannot be removed.
            let _ = std::fs::remove_dir_all(&partial);
        }
        written
    }
}

/// The path of a weight file within the model's folder.
fn inside(path: &str) -> Result<PathBuf> {
    let relative = path.strip_prefix("@model_path/").map(Path::new);
    let plain = |p: &&Path| p.components().all(|c| matches!(c, Component::Normal(_)));
    let relative = relative.filter(plain);
    relative
        .map(Path::to_path_buf)
        .ok_or_else(|| problem!("weights outside the model's folder").in_file(path))
}

/// `coremldata.bin`, in the layout that reading expects.
fn description(d: &Description) -> Vec<u8> {
    let message = interface::description(d).encode_to_vec();
    let mut out = PROGRAM_KIND.to_le_bytes().to_vec();
    out.extend([0; 24]);
    let target = b"generic";
    out.extend((target.len() as u64).to_le_bytes());
    out.extend(target);
    out.extend(d.specification_version.to_le_bytes());
    out.extend([0; 28]);
    out.extend((message.len() as u64).to_le_bytes());
    out.extend(message);
    out.extend([0; 16]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::*;

    /// `y = x + weight` in a package.
    fn package(folder: &Path) -> Model {
        let ty = TensorType::fixed(DType::Fp16, &[2]);
        let path = folder.join("add.mlpackage");
        let mut writer = PackageWriter::create(&path).unwrap();
        let weight = writer.weight(&ty, &[0, 0x3c, 0, 0x40]).unwrap();
        let named = |name: &str| NamedType {
            name: name.into(),
            ty: ValueType::Tensor(ty.clone()),
        };
        let add = Operation {
            op_type: "add".into(),
            inputs: vec![
                ("x".into(), vec![Argument::Name("x".into())]),
                ("y".into(), vec![Argument::Value(weight)]),
            ],
            outputs: vec![named("y")],
            ..Operation::default()
        };
        let main = Function {
            name: "main".into(),
            opset: "CoreML8".into(),
            inputs: vec![named("x")],
            attributes: vec![],
            body: Block {
                operations: vec![add],
                outputs: vec!["y".into()],
                ..Block::default()
            },
        };
        let program = Program {
            functions: vec![main],
            ..Program::default()
        };
        writer
            .finish(&program, &Description::from_program(&program))
            .unwrap();
        Model::open(&path).unwrap()
    }

    #[test]
    fn a_compiled_model_is_the_model_it_was_made_from() {
        let folder = tempfile::tempdir().unwrap();
        let model = package(folder.path());
        let target = folder.path().join("add.mlmodelc");
        model.write_compiled(&target).unwrap();
        let compiled = Model::open(&target).unwrap();
        assert_eq!(compiled.program(), model.program());
        assert_eq!(compiled.description(), model.description());
        let blob = |m: &Model| {
            let mut found = vec![];
            crate::model::visit_blobs(m.program().unwrap(), &mut |blob, ty| {
                found.push((blob.clone(), ty.clone()))
            });
            let ValueType::Tensor(ty) = &found[0].1 else {
                panic!("not a tensor")
            };
            m.blob(&found[0].0, ty).unwrap()
        };
        assert_eq!(blob(&compiled), blob(&model));
        let words = model.write_compiled(&target).unwrap_err().to_string();
        assert!(words.contains("exist"), "{words}");
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            2,
            "nothing is left behind"
        );
    }

    #[test]
    fn weights_elsewhere_are_not_copied() {
        for path in [
            "@model_path/../w.bin",
            "/etc/w.bin",
            "@model_path//etc/w.bin",
            "w.bin",
        ] {
            assert!(inside(path).is_err(), "{path}");
        }
        assert!(inside("@model_path/weights/w.bin").is_ok());
    }
}
