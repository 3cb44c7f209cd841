//! `Manifest.json` of an `.mlpackage`: where the specification is.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::{Error, Result, problem};
use crate::source::{Source, join};

/// The folder inside a package that manifest paths are relative to.
pub(crate) const DATA: &str = "Data";
/// The manifest's file name.
pub(crate) const MANIFEST: &str = "Manifest.json";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    file_format_version: String,
    item_info_entries: BTreeMap<String, Item>,
    root_model_identifier: String,
}

#[derive(Debug, Deserialize)]
struct Item {
    path: String,
}

/// Path of the specification of the package in folder `root`.
pub(crate) fn spec_path(source: &Source, root: &str) -> Result<String> {
    let manifest_path = join(root, MANIFEST);
    let name = source.display(&manifest_path);
    let bytes = source.read(&manifest_path)?;
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
        path: name.clone(),
        source,
    })?;
    if !manifest.file_format_version.starts_with("1.") {
        let found = &manifest.file_format_version;
        return Err(problem!("file format version {found:?}, version 1 is supported").in_file(name));
    }
    let id = &manifest.root_model_identifier;
    let item = manifest.item_info_entries.get(id).ok_or_else(|| {
        problem!(
            "rootModelIdentifier {id:?} is none of the {} items",
            manifest.item_info_entries.len()
        )
        .in_file(&name)
    })?;
    let path = join(&join(root, DATA), &item.path);
    if !source.contains(&path) {
        // Reading tells a path that leaves the package from one that is missing.
        source.read(&path)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(manifest: &str) -> Result<String> {
        let files = [
            ("m/Manifest.json", manifest.to_string()),
            ("m/Data/a/model.mlmodel", String::new()),
        ];
        let files = files.map(|(name, text)| (name.to_string(), text.into()));
        spec_path(&Source::memory(BTreeMap::from(files)), "m")
    }

    fn manifest(version: &str, root: &str, path: &str) -> String {
        format!(
            r#"{{"fileFormatVersion": "{version}", "rootModelIdentifier": "{root}",
                "itemInfoEntries": {{"A": {{"path": "{path}", "name": "x"}}}}}}"#
        )
    }

    #[test]
    fn the_root_item_is_the_specification() {
        assert_eq!(
            find(&manifest("1.0.0", "A", "a/model.mlmodel")).unwrap(),
            "m/Data/a/model.mlmodel"
        );
    }

    #[test]
    fn broken_manifests_say_what_is_wrong() {
        let cases = [
            (
                manifest("1.0.0", "B", "a/model.mlmodel"),
                "rootModelIdentifier \"B\"",
            ),
            (manifest("2.0.0", "A", "a/model.mlmodel"), "version \"2.0.0\""),
            (manifest("1.0.0", "A", "a/none.mlmodel"), "none.mlmodel"),
            (
                manifest("1.0.0", "A", "../../secret"),
                "leaves the model's folder",
            ),
            (manifest("1.0.0", "A", "a"), "m/Data/a"),
            ("{".to_string(), "m/Manifest.json"),
            ("{}".to_string(), "missing field"),
            ("[1]".to_string(), "m/Manifest.json"),
        ];
        for (text, expected) in cases {
            let found = find(&text).unwrap_err().to_string();
            assert!(found.contains(expected), "{text}: {found}");
        }
    }
}
