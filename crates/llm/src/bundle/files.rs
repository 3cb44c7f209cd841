//! Where a bundle's files come from: a folder on disk or files in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::Error;

/// Text files of a bundle larger than this are refused; the largest tokenizers known have 40 MB.
const TEXT_FILE_LIMIT_BYTES: u64 = 512 << 20;

/// The files of one bundle.
#[derive(Debug, Clone)]
pub struct Files(Place);

#[derive(Debug, Clone)]
enum Place {
    Directory(PathBuf),
    Memory {
        name: String,
        files: Arc<BTreeMap<String, Bytes>>,
    },
}

impl Files {
    /// A folder on disk.
    pub fn directory(path: impl Into<PathBuf>) -> Self {
        Files(Place::Directory(path.into()))
    }

    /// Files in memory by their path inside the bundle, with `/` between folders; `name` is used in errors.
    pub fn memory(name: impl Into<String>, files: impl IntoIterator<Item = (String, Bytes)>) -> Self {
        Files(Place::Memory {
            name: name.into(),
            files: Arc::new(files.into_iter().collect()),
        })
    }

    /// The folder's path, or the name given to files in memory.
    pub fn name(&self) -> String {
        match &self.0 {
            Place::Directory(path) => path.display().to_string(),
            Place::Memory { name, .. } => name.clone(),
        }
    }

    /// The folder, where there is one.
    pub fn path(&self) -> Option<&Path> {
        match &self.0 {
            Place::Directory(path) => Some(path),
            Place::Memory { .. } => None,
        }
    }

    /// Calls `see` with path and content of every file below `folder`, in the order of their paths.
    pub(crate) fn visit(&self, folder: &str, see: &mut dyn FnMut(&str, &[u8])) -> Result<(), Error> {
        match &self.0 {
            Place::Memory { files, .. } => {
                let inside = |path: &str| {
                    path.strip_prefix(folder)
                        .is_some_and(|rest| rest.starts_with('/'))
                };
                for (path, bytes) in files.iter().filter(|(path, _)| inside(path)) {
                    see(path, bytes);
                }
                Ok(())
            }
            Place::Directory(root) => visit_below(&root.join(folder), folder, see),
        }
    }

    /// The files below `folder`, with their paths from there; `None` for a bundle on disk.
    pub fn below(&self, folder: &str) -> Option<BTreeMap<String, Bytes>> {
        let Place::Memory { files, .. } = &self.0 else {
            return None;
        };
        let inside = |path: &String| path.strip_prefix(folder)?.strip_prefix('/').map(str::to_owned);
        Some(
            files
                .iter()
                .filter_map(|(path, bytes)| Some((inside(path)?, bytes.clone())))
                .collect(),
        )
    }

    /// `file` with the bundle's name before it, for errors.
    pub(crate) fn full_name(&self, file: &str) -> String {
        match &self.0 {
            Place::Directory(path) => path.join(file).display().to_string(),
            Place::Memory { name, .. } => format!("{name}/{file}"),
        }
    }

    /// Names of the files and folders at the top, sorted.
    pub(crate) fn entries(&self) -> Result<Vec<String>, Error> {
        match &self.0 {
            Place::Directory(path) => {
                let failed = |source| Error::Read {
                    file: path.display().to_string(),
                    source,
                };
                let mut names = BTreeSet::new();
                for entry in std::fs::read_dir(path).map_err(failed)? {
                    names.extend(entry.map_err(failed)?.file_name().into_string());
                }
                Ok(names.into_iter().collect())
            }
            Place::Memory { files, .. } => {
                let tops: BTreeSet<_> = files.keys().filter_map(|path| path.split('/').next()).collect();
                Ok(tops.into_iter().map(str::to_owned).collect())
            }
        }
    }

    /// True when `path` is a file of the bundle, or a folder that holds one.
    pub(crate) fn contains(&self, path: &str) -> bool {
        match &self.0 {
            Place::Directory(root) => root.join(path).exists(),
            Place::Memory { files, .. } => {
                let folder = format!("{path}/");
                files.contains_key(path)
                    || files
                        .range(folder.clone()..)
                        .next()
                        .is_some_and(|(file, _)| file.starts_with(&folder))
            }
        }
    }

    /// The JSON in `file`; null where there is no such file.
    ///
    /// # Errors
    /// As [`Files::read`]; [`Error::Malformed`] for anything but JSON.
    pub(crate) fn json(&self, file: &str) -> Result<serde_json::Value, Error> {
        match self.read(file)? {
            None => Ok(serde_json::Value::Null),
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::Malformed {
                file: self.full_name(file),
                reason: e.to_string(),
            }),
        }
    }

    /// The bytes of a file at the top, `None` when it is not there.
    pub(crate) fn read(&self, file: &str) -> Result<Option<Bytes>, Error> {
        match &self.0 {
            Place::Directory(root) => read_file(&root.join(file)),
            Place::Memory { files, .. } => Ok(files.get(file).cloned()),
        }
    }
}

fn read_file(path: &Path) -> Result<Option<Bytes>, Error> {
    let failed = |source| Error::Read {
        file: path.display().to_string(),
        source,
    };
    match std::fs::metadata(path) {
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(source)),
        Ok(metadata) if metadata.len() > TEXT_FILE_LIMIT_BYTES => {
            return Err(Error::Malformed {
                file: path.display().to_string(),
                reason: format!(
                    "{} bytes, at most {TEXT_FILE_LIMIT_BYTES} are read",
                    metadata.len()
                ),
            });
        }
        Ok(_) => {}
    }
    std::fs::read(path)
        .map(|bytes| Some(Bytes::from(bytes)))
        .map_err(failed)
}

fn visit_below(path: &Path, name: &str, see: &mut dyn FnMut(&str, &[u8])) -> Result<(), Error> {
    let failed = |source| Error::Read {
        file: path.display().to_string(),
        source,
    };
    if !path.is_dir() {
        see(name, &std::fs::read(path).map_err(failed)?);
        return Ok(());
    }
    let entries = std::fs::read_dir(path).map_err(failed)?;
    let mut names: Vec<String> = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, std::io::Error>>()
        .map_err(failed)?;
    names.sort();
    names
        .iter()
        .try_for_each(|inner| visit_below(&path.join(inner), &format!("{name}/{inner}"), see))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_memory_behave_like_a_folder() {
        let contents = [
            ("meta.yaml", "a"),
            ("x.mlpackage/Manifest.json", "b"),
            ("x.mlpackage/Data/w.bin", "c"),
        ];
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in contents {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let memory = Files::memory(
            "m",
            contents.map(|(p, t)| (p.to_owned(), Bytes::from_static(t.as_bytes()))),
        );
        for files in [Files::directory(dir.path()), memory] {
            assert_eq!(files.entries().unwrap(), ["meta.yaml", "x.mlpackage"]);
            for (path, there) in [
                ("meta.yaml", true),
                ("x.mlpackage", true),
                ("x.mlpackage/Manifest.json", true),
                ("x.mlp", false),
                ("x.mlpackage/Data", true),
                ("x.mlpackage/Data/v.bin", false),
            ] {
                assert_eq!(files.contains(path), there, "{path} in {files:?}");
            }
            assert_eq!(files.read("meta.yaml").unwrap().unwrap(), "a");
            assert!(files.read("config.json").unwrap().is_none());
        }
    }

    #[test]
    fn files_below_a_folder_keep_their_inner_paths() {
        let files = Files::memory(
            "m",
            ["x/a", "x/b/c", "xy/d"].map(|p| (p.to_owned(), Bytes::from_static(p.as_bytes()))),
        );
        let below = files.below("x").unwrap();
        assert_eq!(below.keys().collect::<Vec<_>>(), ["a", "b/c"]);
    }
}
