//! Which files of a repository a model needs.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

/// What is wanted of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// Core ML packages with what lies beside them.
    Packages,
    /// Weights that `convert` takes.
    Checkpoint,
}

/// The files chosen, by their paths in the repository.
#[derive(Debug, PartialEq, Eq)]
pub struct Selection {
    /// The folder the model is in; empty for the repository itself.
    pub folder: String,
    pub paths: Vec<String>,
}

/// A compiled model comes first, as where packages are opened.
const ENDINGS: [&str; 3] = [".mlmodelc", ".mlpackage", ".mlmodel"];
/// Files of words: configurations, vocabularies, templates.
const WORDS: [&str; 5] = [".json", ".yaml", ".yml", ".jinja", ".txt"];
/// Of those, what no model needs.
const NEEDLESS: [&str; 5] = [
    "README",
    "requirements",
    "LICENSE",
    "data_config.json",
    "training_args",
];

/// True for a name of a package or compiled model.
pub fn is_package(name: &str) -> bool {
    ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// Chooses among `paths`; `folder` says which of several models. `Err` says why nothing can be chosen.
pub fn select(paths: &[&str], wanted: Wanted, folder: Option<&str>) -> Result<Selection, String> {
    let folders = match wanted {
        Wanted::Packages => package_folders(paths),
        Wanted::Checkpoint => checkpoint_folders(paths),
    };
    let what = match wanted {
        Wanted::Packages => "Core ML packages",
        Wanted::Checkpoint => "weights (.safetensors, .gguf)",
    };
    let listed = || folders.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let chosen = match folder.map(|f| f.trim_matches('/')) {
        Some(folder) if folders.contains(folder) => folder,
        Some(folder) => return Err(format!("no {what} in {folder:?}; they are in: {}", listed())),
        None if folders.contains("") => "",
        None => {
            let mut all = folders.iter();
            match (all.next(), all.next()) {
                (Some(one), None) => one,
                (None, _) => return Err(format!("no {what} among its {} files", paths.len())),
                _ => {
                    return Err(format!(
                        "{what} in several folders; choose with --folder: {}",
                        listed()
                    ));
                }
            }
        }
    };
    let inside = paths.iter().filter_map(|path| {
        let rest = match chosen {
            "" => path,
            _ => path.strip_prefix(chosen)?.strip_prefix('/')?,
        };
        Some((*path, rest))
    });
    let inside: Vec<(&str, &str)> = inside.collect();
    let below: Vec<&str> = inside.iter().map(|(_, rest)| *rest).collect();
    let kept = inside.iter().filter(|(_, rest)| match wanted {
        Wanted::Packages => is_word_file(rest) || in_package(rest).is_some_and(|p| !is_second(p, &below)),
        Wanted::Checkpoint => is_word_file(rest) || (!rest.contains('/') && is_weight(rest)),
    });
    Ok(Selection {
        folder: chosen.to_owned(),
        paths: kept.map(|(path, _)| (*path).to_owned()).collect(),
    })
}

/// Folders that have packages in them.
fn package_folders(paths: &[&str]) -> BTreeSet<String> {
    paths
        .iter()
        .filter_map(|path| Some(parent(first_package(path)?).to_owned()))
        .collect()
}

fn checkpoint_folders(paths: &[&str]) -> BTreeSet<String> {
    let weights = paths.iter().filter(|path| is_weight(path));
    weights.map(|path| parent(path).to_owned()).collect()
}

fn is_weight(path: &str) -> bool {
    path.ends_with(".safetensors") || path.ends_with(".gguf")
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// The path up to the outermost package in it.
fn first_package(path: &str) -> Option<&str> {
    let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    let mut starts = ends.filter_map(|end| path.get(..end));
    starts.find(|start| is_package(start))
}

/// The package at the top that a file belongs to.
fn in_package(rest: &str) -> Option<&str> {
    first_package(rest).filter(|package| !package.contains('/'))
}

/// True for a package of which the same model in a preferred form is there too.
fn is_second(package: &str, paths: &[&str]) -> bool {
    let Some((rank, stem)) = ENDINGS
        .iter()
        .enumerate()
        .find_map(|(i, e)| Some((i, package.strip_suffix(e)?)))
    else {
        return false;
    };
    ENDINGS.iter().take(rank).any(|better| {
        let other = format!("{stem}{better}");
        paths.iter().any(|path| in_package(path) == Some(other.as_str()))
    })
}

/// Configurations beside the packages, and those of sentence-transformers' modules (`1_Pooling/config.json`).
fn is_word_file(rest: &str) -> bool {
    let module = rest
        .strip_suffix("/config.json")
        .is_some_and(|folder| folder.starts_with(|c: char| c.is_ascii_digit()) && !folder.contains('/'));
    let top = !rest.contains('/')
        && WORDS.iter().any(|ending| rest.ends_with(ending))
        && !NEEDLESS.iter().any(|start| rest.starts_with(start));
    module || top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_model_needs_is_chosen() {
        let paths = [
            ".gitattributes",
            "1_Pooling/config.json",
            "README.md",
            "config.json",
            "chat_template.jinja",
            "images/cat.png",
            "meta.yaml",
            "onnx/model.onnx",
            "requirements.txt",
            "tokenizer.json",
            "weights.safetensors",
            "a.mlmodelc/model.mil",
            "a.mlmodelc/weights/weight.bin",
            "a.mlpackage/Manifest.json",
            "a.mlpackage/Data/com.apple.CoreML/model.mlmodel",
            "b.mlpackage/Manifest.json",
        ];
        let found = select(&paths, Wanted::Packages, None).unwrap();
        assert_eq!(found.folder, "");
        let expected = [
            "1_Pooling/config.json",
            "config.json",
            "chat_template.jinja",
            "meta.yaml",
            "tokenizer.json",
            "a.mlmodelc/model.mil",
            "a.mlmodelc/weights/weight.bin",
            "b.mlpackage/Manifest.json",
        ];
        assert_eq!(found.paths, expected);
        let found = select(&paths, Wanted::Checkpoint, None).unwrap();
        assert!(found.paths.contains(&"weights.safetensors".to_owned()));
        assert!(
            !found
                .paths
                .iter()
                .any(|p| p.contains("mlpackage") || p.contains("onnx"))
        );
    }

    #[test]
    fn of_several_folders_one_is_named() {
        let paths = [
            "lut4/a.mlpackage/Manifest.json",
            "lut6/a.mlpackage/Manifest.json",
            "lut6/meta.yaml",
            "meta.yaml",
        ];
        let error = select(&paths, Wanted::Packages, None).unwrap_err();
        assert!(error.contains("lut4, lut6"), "{error}");
        let found = select(&paths, Wanted::Packages, Some("lut6/")).unwrap();
        assert_eq!(found.paths, ["lut6/a.mlpackage/Manifest.json", "lut6/meta.yaml"]);
        let error = select(&paths, Wanted::Packages, Some("lut8")).unwrap_err();
        assert!(error.contains("\"lut8\"") && error.contains("lut4"), "{error}");
        assert_eq!(
            select(&paths[..1], Wanted::Packages, None).unwrap().folder,
            "lut4"
        );
        let error = select(&["a.bin"], Wanted::Packages, None).unwrap_err();
        assert!(error.contains("no Core ML packages"), "{error}");
    }
}
