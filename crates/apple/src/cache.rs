//! Where compiled models are kept: folders named after what they were made from, so that a source that changed, moved or
//! was only touched is told apart by its bytes and by nothing else.
//!
//! An entry appears whole or not at all: it is compiled beside its place and renamed to it. Two processes may compile the
//! same model at once; the first rename wins, the second finds the entry there and uses it.

use crate::error::Error;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Most files and folders a model's folder is searched for: packages have a dozen.
const MAX_FILES: usize = 10_000;

/// Deepest folder of a package that is looked into.
const MAX_DEPTH: usize = 32;

/// Changes whenever entries made by earlier versions must not be used.
const FORMAT: &str = "candle-coreml compiled 1";

/// A folder of compiled models.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
    /// What entries depend on besides the source: the version of the system that compiles.
    compiler: String,
}

/// Numbers the folders that one process compiles in.
static WORKS: AtomicU64 = AtomicU64::new(0);

impl Cache {
    /// The cache in `folder`, which is made when needed, for models compiled by `compiler`.
    pub fn new(folder: impl Into<PathBuf>, compiler: impl Into<String>) -> Cache {
        Cache {
            folder: folder.into(),
            compiler: compiler.into(),
        }
    }

    /// The compiled form of the model at `source`: the entry that is there, or what `compile` makes of it.
    ///
    /// `compile` is given the source and gives the place of the compiled folder, which is moved from there.
    ///
    /// # Errors
    /// [`Error::Io`] for unreadable sources and an unwritable cache, and what `compile` says.
    pub fn get(
        &self,
        source: &Path,
        compile: impl FnOnce(&Path) -> Result<PathBuf, Error>,
    ) -> Result<PathBuf, Error> {
        let entry = self.folder.join(format!("{}.mlmodelc", self.key(source)?));
        if entry.is_dir() {
            return Ok(entry);
        }
        fs::create_dir_all(&self.folder).map_err(|e| Error::io(&self.folder, e))?;
        let compiled = compile(source)?;
        let number = WORKS.fetch_add(1, Ordering::Relaxed);
        let work = self.folder.join(format!(".{}-{number}.part", std::process::id()));
        let moved = move_folder(&compiled, &work).and_then(|()| publish(&work, &entry));
        let left = fs::remove_dir_all(&work);
        drop(left); // Gone already when it became the entry.
        moved.map(|()| entry)
    }

    /// The name of a source's entry: of its bytes, its inner paths, and the compiler.
    ///
    /// # Errors
    /// [`Error::Io`] for unreadable files, [`Error::NotAModel`] for folders too large to be a model.
    pub fn key(&self, source: &Path) -> Result<String, Error> {
        let mut hash = Sha256::new();
        put(&mut hash, FORMAT.as_bytes());
        put(&mut hash, self.compiler.as_bytes());
        let mut files = Vec::new();
        list(source, source, 0, &mut files)?;
        files.sort();
        for relative in files {
            put(&mut hash, relative.as_bytes());
            let path = if relative.is_empty() {
                source.to_path_buf()
            } else {
                source.join(&relative)
            };
            put(&mut hash, &file_digest(&path)?);
        }
        let digest = hash.finalize();
        Ok(digest.iter().map(|b| format!("{b:02x}")).collect())
    }
}

/// Puts `bytes` into the hash with their length before them, so that no two lists of strings look alike.
fn put(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// The files under `path`, relative to `root` with `/` between folders; the empty name for `root` itself if it is a file.
fn list(root: &Path, path: &Path, depth: usize, files: &mut Vec<String>) -> Result<(), Error> {
    let metadata = fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !metadata.is_dir() {
        let relative = path.strip_prefix(root).unwrap_or(path);
        let parts: Vec<_> = relative.iter().map(|p| p.to_string_lossy()).collect();
        files.push(parts.join("/"));
    } else if depth == MAX_DEPTH {
        return Err(too_large(root));
    } else {
        for entry in fs::read_dir(path).map_err(|e| Error::io(path, e))? {
            let entry = entry.map_err(|e| Error::io(path, e))?;
            // The Finder's notes about a folder are no part of the model.
            if entry.file_name() != ".DS_Store" {
                list(root, &entry.path(), depth + 1, files)?;
            }
        }
    }
    if files.len() > MAX_FILES {
        return Err(too_large(root));
    }
    Ok(())
}

fn too_large(root: &Path) -> Error {
    Error::NotAModel {
        path: root.display().to_string(),
        problem: format!("more than {MAX_FILES} files, or folders deeper than {MAX_DEPTH}"),
    }
}

fn file_digest(path: &Path) -> Result<[u8; 32], Error> {
    let mut file = fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut block).map_err(|e| Error::io(path, e))?;
        if read == 0 {
            return Ok(hash.finalize().into());
        }
        hash.update(&block[..read]);
    }
}

/// Renames, or copies where the two are on different file systems: Core ML compiles into the system's temporary folder.
fn move_folder(from: &Path, to: &Path) -> Result<(), Error> {
    if fs::rename(from, to).is_ok() {
        return Ok(());
    }
    copy_folder(from, to)?;
    let left = fs::remove_dir_all(from);
    drop(left); // The system clears its temporary folder itself.
    Ok(())
}

fn copy_folder(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to).map_err(|e| Error::io(to, e))?;
    for entry in fs::read_dir(from).map_err(|e| Error::io(from, e))? {
        let entry = entry.map_err(|e| Error::io(from, e))?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_folder(&path, &target)?;
        } else {
            fs::copy(&path, &target).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// Gives the finished folder its name. When another process was first, its entry is as good.
fn publish(work: &Path, entry: &Path) -> Result<(), Error> {
    match fs::rename(work, entry) {
        Err(error) if !entry.is_dir() => Err(Error::io(entry, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path =
                std::env::temp_dir().join(format!("candle-coreml-cache-{name}-{}", std::process::id()));
            let left = fs::remove_dir_all(&path);
            drop(left);
            fs::create_dir_all(&path).unwrap();
            Folder(path)
        }

        fn package(&self, name: &str, weights: &[u8]) -> PathBuf {
            let package = self.0.join(name);
            fs::create_dir_all(package.join("Data")).unwrap();
            fs::write(package.join("Manifest.json"), "{}").unwrap();
            fs::write(package.join("Data/weight.bin"), weights).unwrap();
            package
        }

        /// A compiler that writes where Core ML would, and counts.
        fn compiled(&self, calls: &AtomicU64) -> Result<PathBuf, Error> {
            let number = calls.fetch_add(1, Ordering::Relaxed);
            let made = self.0.join(format!("temporary-{number}.mlmodelc"));
            fs::create_dir_all(made.join("weights")).unwrap();
            fs::write(made.join("weights/weight.bin"), vec![7; 100_000]).unwrap();
            Ok(made)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let left = fs::remove_dir_all(&self.0);
            drop(left);
        }
    }

    #[test]
    fn an_entry_is_used_again_while_the_bytes_are_the_same_and_no_longer() {
        let folder = Folder::new("reuse");
        let cache = Cache::new(folder.0.join("cache"), "macOS 15.0");
        let calls = AtomicU64::new(0);
        let get = |cache: &Cache, source: &Path| cache.get(source, |_| folder.compiled(&calls)).unwrap();
        let first = get(&cache, &folder.package("a.mlpackage", b"one"));
        assert!(first.join("weights/weight.bin").is_file());
        // Written again, and in another place: the same bytes.
        assert_eq!(get(&cache, &folder.package("a.mlpackage", b"one")), first);
        assert_eq!(get(&cache, &folder.package("b.mlpackage", b"one")), first);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert_ne!(get(&cache, &folder.package("a.mlpackage", b"two")), first);
        let newer = Cache::new(folder.0.join("cache"), "macOS 15.1");
        assert_ne!(get(&newer, &folder.package("b.mlpackage", b"one")), first);
        assert_eq!(calls.load(Ordering::Relaxed), 3);
        let names = fs::read_dir(folder.0.join("cache")).unwrap();
        let names: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "nothing but entries stays: {names:?}");
    }

    #[test]
    fn the_same_bytes_under_other_inner_names_are_another_model() {
        let folder = Folder::new("names");
        let cache = Cache::new(folder.0.join("cache"), "");
        let a = folder.package("a.mlpackage", b"one");
        let b = folder.package("b.mlpackage", b"one");
        fs::rename(b.join("Data/weight.bin"), b.join("Data/other.bin")).unwrap();
        assert_ne!(cache.key(&a).unwrap(), cache.key(&b).unwrap());
        fs::write(a.join(".DS_Store"), "noise").unwrap();
        let again = folder.package("c.mlpackage", b"one");
        assert_eq!(cache.key(&a).unwrap(), cache.key(&again).unwrap());
    }

    #[test]
    fn a_failed_compilation_leaves_nothing_and_may_be_repeated() {
        let folder = Folder::new("failure");
        let cache = Cache::new(folder.0.join("cache"), "");
        let source = folder.package("a.mlpackage", b"one");
        let refuse = |_: &Path| {
            Err(Error::NotAModel {
                path: "a".into(),
                problem: "no".into(),
            })
        };
        assert!(cache.get(&source, refuse).is_err());
        assert_eq!(fs::read_dir(folder.0.join("cache")).unwrap().count(), 0);
        assert!(
            cache
                .get(&source, |_| folder.compiled(&AtomicU64::new(0)))
                .is_ok()
        );
    }

    #[test]
    fn compiling_twice_at_once_gives_one_whole_entry() {
        let folder = Folder::new("race");
        let source = folder.package("a.mlpackage", b"one");
        let cache = Cache::new(folder.0.join("cache"), "");
        let (calls, barrier) = (AtomicU64::new(0), std::sync::Barrier::new(4));
        let both_compiled = |_: &Path| {
            let made = folder.compiled(&calls);
            barrier.wait();
            made
        };
        let entries: Vec<_> = std::thread::scope(|scope| {
            let run = || scope.spawn(|| cache.get(&source, both_compiled).unwrap());
            let threads = [run(), run(), run(), run()];
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(entries.iter().all(|e| e == &entries[0]));
        assert_eq!(
            fs::read(entries[0].join("weights/weight.bin")).unwrap().len(),
            100_000
        );
        assert_eq!(fs::read_dir(folder.0.join("cache")).unwrap().count(), 1);
    }
}
