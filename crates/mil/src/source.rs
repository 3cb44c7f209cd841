//! Where a model's files come from: a folder on disk, mapped, or bytes already in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

use crate::error::{Error, Result};

/// Files of at least this size are mapped, smaller ones read.
const MAP_FROM_BYTES: u64 = 64 * 1024;

/// A set of files by relative path, with `/` between folders.
///
/// ```
/// use candle_coreml_mil::Source;
/// use std::collections::BTreeMap;
///
/// let source = Source::memory(BTreeMap::from([("a/b.txt".to_string(), "hello".into())]));
/// assert_eq!(source.read("a/b.txt")?, "hello");
/// assert!(source.read("../b.txt").is_err());
/// # Ok::<(), candle_coreml_mil::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Source(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Directory(PathBuf),
    Memory(BTreeMap<String, Bytes>),
}

impl Source {
    /// The files under a folder.
    ///
    /// Symbolic links are followed: model caches store files as links. Large files are mapped into memory; a file that
    /// another process shortens while it is mapped makes reads of its lost part fatal, as with every mapped file.
    pub fn directory(path: impl Into<PathBuf>) -> Source {
        Source(Kind::Directory(path.into()))
    }

    /// Files held in memory, for instance by `include_bytes!` and [`Bytes::from_static`].
    ///
    /// The bytes are used where they are; a weight is as aligned as the file it is in.
    pub fn memory(files: BTreeMap<String, Bytes>) -> Source {
        Source(Kind::Memory(files))
    }

    /// The bytes of a file, without a copy where it is large or in memory.
    ///
    /// # Errors
    /// [`Error::OutsideModel`] for absolute paths and paths with `..`; [`Error::Io`] when the file cannot be read.
    pub fn read(&self, relative: &str) -> Result<Bytes> {
        self.contents(relative).map(|contents| contents.bytes)
    }

    /// As [`Source::read`], with the map behind the bytes.
    pub(crate) fn contents(&self, relative: &str) -> Result<Contents> {
        let path = normal(relative)?;
        match &self.0 {
            Kind::Directory(root) => {
                let path = root.join(path);
                read_file(&path).map_err(|source| Error::Io {
                    path: path.display().to_string(),
                    source,
                })
            }
            Kind::Memory(files) => match files.get(&slashed(&path)) {
                Some(bytes) => Ok(Contents::of(bytes.clone())),
                None => Err(Error::Io {
                    path: relative.to_string(),
                    source: std::io::Error::new(std::io::ErrorKind::NotFound, "no such file in memory"),
                }),
            },
        }
    }

    /// True when there is a file of that name.
    pub fn contains(&self, relative: &str) -> bool {
        let Ok(path) = normal(relative) else { return false };
        match &self.0 {
            Kind::Directory(root) => root.join(path).is_file(),
            Kind::Memory(files) => files.contains_key(&slashed(&path)),
        }
    }

    /// How messages call a file of this source.
    pub(crate) fn display(&self, relative: &str) -> String {
        match &self.0 {
            Kind::Directory(root) => root.join(relative).display().to_string(),
            Kind::Memory(_) => relative.to_string(),
        }
    }
}

/// The bytes of a file, and the map they are in if they are in one.
#[derive(Clone)]
pub(crate) struct Contents {
    pub(crate) bytes: Bytes,
    map: Option<Arc<Mmap>>,
}

impl Contents {
    fn of(bytes: Bytes) -> Contents {
        Contents { bytes, map: None }
    }

    /// Where `part` is in a mapped file; none for other bytes.
    pub(crate) fn mapped(&self, part: &Bytes) -> Option<Mapped> {
        let map = self.map.as_ref()?;
        let start = part.as_ptr().addr().checked_sub(map.as_ptr().addr())?;
        (start + part.len() <= map.len()).then(|| Mapped {
            map: map.clone(),
            start,
            len: part.len(),
        })
    }
}

/// A part of a mapped file.
#[derive(Debug, Clone)]
pub struct Mapped {
    map: Arc<Mmap>,
    start: usize,
    len: usize,
}

impl Mapped {
    /// Lets go of the memory that holds this part; it is read from the file again when it is looked at again.
    pub fn release(&self) {
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice;
            let (map, start, len) = (&self.map, self.start, self.len);
            // SAFETY: the map is only read and shows a file, so the same bytes come back from it, by the condition stated at
            // `Source::directory`.
            let done = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, len) };
            // Advice that is not taken leaves the memory as it was.
            let _ = done;
        }
    }
}

/// A map as the owner of bytes.
struct Owner(Arc<Mmap>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// `folder/file`, where the folder may be empty.
pub(crate) fn join(folder: &str, file: &str) -> String {
    if folder.is_empty() {
        file.to_string()
    } else {
        format!("{}/{file}", folder.trim_end_matches('/'))
    }
}

/// The folder of a file, empty at the top.
pub(crate) fn parent(file: &str) -> &str {
    file.rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn normal(relative: &str) -> Result<PathBuf> {
    let outside = || Error::OutsideModel {
        path: relative.to_string(),
    };
    let mut path = PathBuf::new();
    for component in Path::new(relative).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return Err(outside()),
        }
    }
    if relative.contains('\0') {
        Err(outside())
    } else {
        Ok(path)
    }
}

fn slashed(path: &Path) -> String {
    let parts: Vec<_> = path.iter().map(|part| part.to_string_lossy()).collect();
    parts.join("/")
}

fn read_file(path: &Path) -> std::io::Result<Contents> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(std::io::Error::new(
            std::io::ErrorKind::IsADirectory,
            "is a folder, not a file",
        ));
    }
    if metadata.len() < MAP_FROM_BYTES {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        return Ok(Contents::of(bytes.into()));
    }
    // SAFETY: The map is read-only and private to `Bytes`; that nobody shortens or rewrites the file while it is open is
    // the condition every reader of mapped model files has, stated at `Source::directory`.
    let map = Arc::new(unsafe { Mmap::map(&file)? });
    // A file that is not in memory yet comes in large pages, where the system has them: weights are then read up to a tenth faster
    // for as long as they stay. Advice that is not taken changes nothing.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(Contents {
        bytes: Bytes::from_owner(Owner(map.clone())),
        map: Some(map),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Source {
        Source::memory(BTreeMap::from([("a/b".to_string(), Bytes::from_static(b"ab"))]))
    }

    #[test]
    fn paths_out_of_the_folder_are_refused() {
        let folder = Source::directory(std::env::temp_dir());
        for path in ["../x", "a/../../x", "/etc/passwd", "a/\0b", ".."] {
            for source in [&memory(), &folder] {
                assert!(
                    matches!(source.read(path), Err(Error::OutsideModel { .. })),
                    "{path:?}"
                );
                assert!(!source.contains(path), "{path:?}");
            }
        }
    }

    #[test]
    fn dots_and_doubled_slashes_name_the_same_file() {
        for path in ["a/b", "./a/b", "a//b", "a/./b"] {
            assert_eq!(memory().read(path).unwrap(), "ab", "{path}");
        }
        assert!(memory().read("a").is_err());
    }

    #[test]
    fn files_on_disk_are_read_whether_mapped_or_not() {
        let folder = std::env::temp_dir().join(format!("candle-coreml-source-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let big = vec![7u8; MAP_FROM_BYTES as usize + 3];
        std::fs::write(folder.join("small"), b"s").unwrap();
        std::fs::write(folder.join("big"), &big).unwrap();
        let source = Source::directory(&folder);
        assert_eq!(source.read("small").unwrap(), "s");
        assert_eq!(source.read("big").unwrap(), big);
        let contents = source.contents("big").unwrap();
        let part = contents.bytes.slice(100..MAP_FROM_BYTES as usize);
        contents.mapped(&part).unwrap().release();
        assert!(contents.mapped(&Bytes::from_static(b"elsewhere")).is_none());
        assert_eq!(contents.bytes, big, "what was let go is read again");
        assert!(source.read("").unwrap_err().to_string().contains("folder"));
        assert!(matches!(source.read("none"), Err(Error::Io { .. })));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
