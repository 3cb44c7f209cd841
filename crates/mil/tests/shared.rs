//! Real model files, where a folder of them is at hand: they open, and their text prints as Apple's compiler wrote it.

use std::path::{Path, PathBuf};

use candle_coreml_mil::{FunctionDescription, Model, ModelKind, parse_program, print_program, same_program};

fn shared_models() -> Option<PathBuf> {
    let shared = std::env::var_os("CANDLE_COREML_SHARED").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")),
        PathBuf::from,
    );
    let models = shared.join("models");
    if models.is_dir() {
        return Some(models);
    }
    println!("skipped: {} absent", models.display());
    None
}

/// Everything under `folder` whose name ends in one of `endings`; packages and compiled models are not entered.
fn find(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).expect("a readable folder");
    let mut entries: Vec<_> = entries.map(|e| e.expect("a readable entry").path()).collect();
    entries.sort();
    for path in entries {
        let ending = path
            .extension()
            .map(|e| e.to_string_lossy().into_owned())
            .unwrap_or_default();
        if endings.contains(&ending.as_str()) {
            found.push(path);
        } else if path.is_dir() {
            find(&path, endings, found);
        }
    }
}

#[test]
fn every_real_model_opens() {
    let Some(models) = shared_models() else { return };
    let mut paths = Vec::new();
    find(&models, &["mlpackage", "mlmodelc", "mlmodel"], &mut paths);
    assert!(paths.len() > 30, "{paths:?}");
    let mut failed = Vec::new();
    for path in paths {
        match Model::open(&path) {
            Ok(model) => {
                let is_program = model.description().kind == ModelKind::Program;
                assert_eq!(is_program, model.program().is_some(), "{}", path.display());
                for f in &model.description().functions {
                    assert!(
                        !f.inputs.is_empty() && !f.outputs.is_empty(),
                        "{}: {}",
                        path.display(),
                        f.name
                    );
                    let defined = model.program().is_none_or(|p| p.function(&f.name).is_some());
                    assert!(defined, "{}: {}", path.display(), f.name);
                }
            }
            Err(error) => failed.push(error.to_string()),
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn compiled_programs_print_byte_for_byte_as_the_compiler_wrote_them() {
    let Some(models) = shared_models() else { return };
    let mut paths = Vec::new();
    find(&models, &["mil", "mlpackage"], &mut paths);
    let paths: Vec<_> = paths.into_iter().filter(|p| p.ends_with("model.mil")).collect();
    assert!(paths.len() >= 14, "{paths:?}");
    let mut differing = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        let program = parse_program(&text, &path.display().to_string()).unwrap();
        let printed = print_program(&program);
        assert_eq!(
            parse_program(&printed, "printed").unwrap(),
            program,
            "{}",
            path.display()
        );
        // One of the files ends with a line break that an editor has put there.
        if printed != text.trim_end() {
            let line = printed.lines().zip(text.lines()).find(|(a, b)| a != b);
            differing.push(format!("{}: {line:?}", path.display()));
        }
    }
    assert!(differing.is_empty(), "{differing:#?}");
}

#[test]
fn programs_of_packages_survive_printing() {
    let Some(models) = shared_models() else { return };
    let mut paths = Vec::new();
    find(&models, &["mlpackage", "mlmodel"], &mut paths);
    for path in paths {
        let model = Model::open(&path).unwrap();
        let Some(program) = model.program() else { continue };
        let printed = print_program(program);
        assert_eq!(
            parse_program(&printed, "printed").unwrap(),
            *program,
            "{}",
            path.display()
        );
    }
}

#[test]
fn descriptions_of_compiled_models_say_what_metadata_json_says() {
    let Some(models) = shared_models() else { return };
    let mut paths = Vec::new();
    find(&models, &["mlmodelc"], &mut paths);
    for path in paths {
        let full = Model::open(&path).unwrap();
        let folder = std::env::temp_dir().join(format!("candle-coreml-meta-{}", std::process::id()));
        let copy = folder.join(path.file_name().unwrap());
        std::fs::create_dir_all(copy.join("weights")).unwrap();
        for name in [
            "model.mil",
            "metadata.json",
            "weights/weight.bin",
            "weights/weights.bin",
        ] {
            if path.join(name).is_file() {
                std::fs::copy(path.join(name), copy.join(name)).unwrap();
            }
        }
        let other = Model::open(&copy).unwrap();
        assert_eq!(full.description(), other.description(), "{}", path.display());
        std::fs::remove_file(copy.join("metadata.json")).ok();
        let bare = Model::open(&copy).unwrap();
        // The signature has the inputs in another order.
        let names = |m: &Model| -> Vec<Vec<String>> {
            let of = |f: &FunctionDescription| {
                let mut names: Vec<_> = f
                    .inputs
                    .iter()
                    .chain(&f.outputs)
                    .map(|x| x.name.clone())
                    .collect();
                names.sort();
                names
            };
            m.description().functions.iter().map(of).collect()
        };
        assert_eq!(names(&full), names(&bare), "{}", path.display());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

#[test]
fn packages_and_their_compiled_forms_hold_the_same_program() {
    let Some(models) = shared_models() else { return };
    let real = models.join("real");
    let mut pairs = vec![(
        real.join("silero-vad-unified.mlpackage"),
        real.join("silero-vad-unified.mlmodelc"),
    )];
    for entry in std::fs::read_dir(real.join("compiler-pairs")).unwrap() {
        let folder = entry.unwrap().path();
        pairs.push((
            folder.join("input.mlmodel"),
            folder.join("expected-macos.mlmodelc"),
        ));
    }
    assert!(pairs.len() >= 6);
    for (package, compiled) in pairs {
        let (a, b) = (Model::open(&package).unwrap(), Model::open(&compiled).unwrap());
        same_program(&a, &b).unwrap_or_else(|e| panic!("{}: {e}", package.display()));
        same_program(&b, &a).unwrap_or_else(|e| panic!("{}: {e}", package.display()));
        assert_eq!(
            a.description().functions,
            b.description().functions,
            "{}",
            package.display()
        );
    }
}

/// The compressed forms of silero-vad were compiled from another revision than the packages published beside them: the
/// first operations differ. The comparison has to notice.
#[test]
fn compiled_forms_of_another_revision_are_told_apart() {
    let Some(models) = shared_models() else { return };
    for form in ["int8", "palette_4bit", "palette_6bit", "pruned_int8"] {
        let open =
            |ending: &str| Model::open(models.join(format!("real/silero-vad-{form}.{ending}"))).unwrap();
        let found = same_program(&open("mlpackage"), &open("mlmodelc"))
            .unwrap_err()
            .to_string();
        assert!(
            found.contains("operator: \"expand_dims\" and \"pad\""),
            "{form}: {found}"
        );
    }
}

#[test]
fn saved_packages_of_real_models_hold_the_same_program() {
    let Some(models) = shared_models() else { return };
    let folder = std::env::temp_dir().join(format!("candle-coreml-resave-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut paths = Vec::new();
    find(&models.join("real"), &["mlpackage", "mlmodelc"], &mut paths);
    find(&models.join("tales-lut6"), &["mlpackage"], &mut paths);
    for path in paths {
        let model = Model::open(&path).unwrap();
        let copy = folder.join("copy.mlpackage");
        model.save_package(&copy).unwrap();
        let saved = Model::open(&copy).unwrap();
        assert_eq!(same_program(&model, &saved), Ok(()), "{}", path.display());
        assert_eq!(model.description(), saved.description(), "{}", path.display());
        assert!(
            saved.content_size_bytes() <= model.content_size_bytes(),
            "{}",
            path.display()
        );
        std::fs::remove_dir_all(&copy).unwrap();
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
