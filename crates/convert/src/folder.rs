//! A folder of results that appears whole or not at all.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A folder that is filled under another name, beside its target, and renamed when it is complete.
///
/// What is dropped before [`PartialFolder::finish`] is removed. A process that is killed leaves a folder whose name ends in
/// `.partial`, which the next one with the same target removes.
///
/// ```
/// use candle_coreml_convert::PartialFolder;
///
/// let somewhere = tempfile::tempdir()?;
/// let target = somewhere.path().join("bundle");
/// let folder = PartialFolder::create(&target)?;
/// std::fs::write(folder.path().join("meta.yaml"), "model_info: {}\n")?;
/// assert!(!target.exists());
/// folder.finish()?;
/// assert!(target.join("meta.yaml").exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PartialFolder {
    target: PathBuf,
    partial: PathBuf,
    finished: bool,
}

impl PartialFolder {
    /// Starts the folder that will be at `target`; an empty folder may be there.
    ///
    /// # Errors
    /// [`Error::Occupied`] when anything else is at `target`; [`Error::Io`] when the folder cannot be made.
    pub fn create(target: impl AsRef<Path>) -> Result<Self> {
        let target = absolute(target.as_ref())?;
        if target.exists() && !is_empty_folder(&target)? {
            return Err(Error::Occupied {
                path: target.display().to_string(),
            });
        }
        let partial = beside(&target);
        if partial.exists() {
            // Left by a process that was killed.
            std::fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
        }
        std::fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
        Ok(PartialFolder {
            target,
            partial,
            finished: false,
        })
    }

    /// Where the folder is until it is complete. A target that has no absolute path gives an error of
    /// [`PartialFolder::create`]; here it is taken as it is.
    pub fn place(target: impl AsRef<Path>) -> PathBuf {
        let target = target.as_ref();
        beside(&absolute(target).unwrap_or_else(|_| target.to_owned()))
    }

    /// Where files go now.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Puts the folder at its target.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be renamed, for instance because something is at the target by now.
    pub fn finish(mut self) -> Result<()> {
        if self.target.exists() {
            std::fs::remove_dir(&self.target).map_err(Error::io(&self.target))?;
        }
        std::fs::rename(&self.partial, &self.target).map_err(Error::io(&self.target))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing more can be done about a folder that cannot be removed.
            let _ = std::fs::remove_dir_all(&self.partial);
        }
    }
}

/// The path with a last component to add to, which `.` and `..` do not have.
fn absolute(path: &Path) -> Result<PathBuf> {
    if path.exists() {
        path.canonicalize().map_err(Error::io(path))
    } else {
        std::path::absolute(path).map_err(Error::io(path))
    }
}

fn beside(target: &Path) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    target.with_file_name(name)
}

fn is_empty_folder(path: &Path) -> Result<bool> {
    if !path.is_dir() {
        return Ok(false);
    }
    let mut entries = std::fs::read_dir(path).map_err(Error::io(path))?;
    Ok(entries.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_when_it_is_finished_and_leaves_nothing_when_it_is_dropped() {
        let somewhere = tempfile::tempdir().unwrap();
        for there in [false, true] {
            let target = somewhere.path().join(format!("out{there}"));
            if there {
                std::fs::create_dir(&target).unwrap();
            }
            let dropped = PartialFolder::create(&target).unwrap();
            let partial = PartialFolder::place(&target);
            assert_eq!(dropped.path(), partial);
            std::fs::write(partial.join("a"), "1").unwrap();
            drop(dropped);
            assert!(!partial.exists() && !target.join("a").exists());

            // As a killed process leaves it.
            std::fs::create_dir(&partial).unwrap();
            std::fs::write(partial.join("old"), "0").unwrap();
            let folder = PartialFolder::create(&target).unwrap();
            std::fs::write(folder.path().join("a"), "1").unwrap();
            folder.finish().unwrap();
            let names: Vec<_> = std::fs::read_dir(&target).unwrap().collect();
            assert_eq!(names.len(), 1);
            assert!(target.join("a").exists() && !partial.exists());
        }
    }

    #[test]
    fn what_is_there_already_is_not_touched() {
        let somewhere = tempfile::tempdir().unwrap();
        let file = somewhere.path().join("file");
        std::fs::write(&file, "x").unwrap();
        for target in [somewhere.path(), &file] {
            let error = PartialFolder::create(target).unwrap_err().to_string();
            assert!(error.contains("something is there already"), "{error}");
        }
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }
}
