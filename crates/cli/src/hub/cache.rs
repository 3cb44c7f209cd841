//! The folder of a model in the hub's cache, laid out as the hub's own tools lay it out:
//!
//! `blobs/HASH` contents, `snapshots/COMMIT/PATH` links to them, `refs/REVISION` the commit a branch or tag is at. Beside
//! them `.candle-coreml` has a record of every model that was fetched to its end; a model without one is not complete.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::client::{RemoteFile, stays_inside};
use super::name::{Name, is_commit, is_hex};
use super::select::Wanted;
use crate::failure::Failure;
use crate::terminal;

const RECORDS: &str = ".candle-coreml";
const COMPLETE: &str = "json";
const INCOMPLETE: &str = "incomplete";

/// The folder of one model.
pub struct Cache {
    root: PathBuf,
    name: String,
}

/// What was fetched, or is being fetched.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// `ORG/NAME`.
    pub name: String,
    /// What was asked for: a branch, a tag or the commit.
    pub revision: String,
    pub commit: String,
    pub wanted: Wanted,
    /// The folder of the repository that the model is in.
    pub folder: String,
    pub files: Vec<RecordedFile>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RecordedFile {
    pub path: String,
    pub size: u64,
    pub hash: String,
}

/// A record and where it lies.
#[derive(Debug)]
pub struct Complete {
    record: Record,
    file: PathBuf,
    model: PathBuf,
}

impl Complete {
    pub fn record(&self) -> &Record {
        &self.record
    }

    pub fn commit(&self) -> &str {
        &self.record.commit
    }

    pub fn wanted(&self) -> Wanted {
        self.record.wanted
    }

    /// The model's folder on this machine.
    pub fn folder(&self) -> PathBuf {
        let snapshot = self.model.join("snapshots").join(self.commit());
        match self.record.folder.as_str() {
            "" => snapshot,
            folder => snapshot.join(folder),
        }
    }

    pub fn bytes(&self) -> u64 {
        self.record.files.iter().map(|f| f.size).sum()
    }

    /// True when every file is there in its size.
    pub fn is_whole(&self) -> bool {
        let snapshot = self.model.join("snapshots").join(self.commit());
        let there = |f: &RecordedFile| fs::metadata(snapshot.join(&f.path)).is_ok_and(|m| m.len() == f.size);
        self.file.extension().is_some_and(|e| e == COMPLETE) && self.record.files.iter().all(there)
    }

    /// Bytes that are there, those of files half fetched included.
    pub fn bytes_here(&self) -> u64 {
        let blobs = self.model.join("blobs");
        let size = |f: &RecordedFile| {
            let whole = fs::metadata(blobs.join(&f.hash)).map(|m| m.len());
            let part = || fs::metadata(blobs.join(format!("{}.incomplete", f.hash))).map(|m| m.len());
            whole.or_else(|_| part()).unwrap_or(0).min(f.size)
        };
        let mut seen = BTreeSet::new();
        let files = self.record.files.iter().filter(|f| seen.insert(&f.hash));
        files.map(size).sum()
    }
}

impl Cache {
    pub fn new(root: &Path, name: &Name) -> Self {
        Cache {
            root: root.to_owned(),
            name: format!("models--{}--{}", name.organisation, name.model),
        }
    }

    /// All models of the cache.
    pub fn all(root: &Path) -> Result<Vec<Cache>, Failure> {
        let mut names = BTreeSet::new();
        for entry in entries(root)? {
            names.extend(
                entry
                    .file_name()
                    .into_string()
                    .ok()
                    .filter(|n| n.starts_with("models--")),
            );
        }
        let one = |name| Cache {
            root: root.to_owned(),
            name,
        };
        Ok(names.into_iter().map(one).collect())
    }

    pub fn folder(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    pub fn blob(&self, hash: &str) -> PathBuf {
        self.folder().join("blobs").join(hash)
    }

    /// The part of a file that is here.
    pub fn incomplete_blob(&self, hash: &str) -> PathBuf {
        self.folder().join("blobs").join(format!("{hash}.incomplete"))
    }

    /// The commit a revision was at when it was last fetched.
    pub fn commit(&self, revision: &str) -> Result<Option<String>, Failure> {
        if is_commit(revision) {
            return Ok(Some(revision.to_owned()));
        }
        let file = self.folder().join("refs").join(revision);
        match fs::read_to_string(&file) {
            Ok(text) => Ok(Some(text.trim().to_owned()).filter(|commit| is_commit(commit))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(at(&file, &e)),
        }
    }

    /// What was fetched to its end.
    pub fn complete(&self) -> Result<Vec<Complete>, Failure> {
        self.records(COMPLETE)
    }

    /// What was begun.
    pub fn incomplete(&self) -> Result<Vec<Complete>, Failure> {
        self.records(INCOMPLETE)
    }

    fn records(&self, ending: &str) -> Result<Vec<Complete>, Failure> {
        let mut found = BTreeMap::new();
        for entry in entries(&self.folder().join(RECORDS))? {
            let file = entry.path();
            if file.extension().is_none_or(|e| e != ending) {
                continue;
            }
            let text = fs::read(&file).map_err(|e| at(&file, &e))?;
            // A record that cannot be read, or leads elsewhere, says nothing.
            let Some(record) = serde_json::from_slice(&text).ok().filter(Record::is_sound) else {
                continue;
            };
            let complete = Complete {
                record,
                file: file.clone(),
                model: self.folder(),
            };
            found.insert(file, complete);
        }
        Ok(found.into_values().collect())
    }

    /// Waits until no other process changes this model; another ends when the file that is given is dropped.
    pub fn lock(&self) -> Result<File, Failure> {
        self.locked(
            "candle-coreml",
            "another process fetches or removes this model; waiting for it",
        )
    }

    /// The lock of a file's content, which the hub's own tools take too.
    pub fn lock_blob(&self, hash: &str) -> Result<File, Failure> {
        self.locked(hash, "another program fetches the same file; waiting for it")
    }

    fn locked(&self, what: &str, waiting: &str) -> Result<File, Failure> {
        let folder = self.locks();
        fs::create_dir_all(&folder).map_err(|e| at(&folder, &e))?;
        let path = folder.join(format!("{what}.lock"));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let file = file.map_err(|e| at(&path, &e))?;
        if file.try_lock().is_err() {
            terminal::note(waiting);
            file.lock().map_err(|e| at(&path, &e))?;
        }
        Ok(file)
    }

    fn locks(&self) -> PathBuf {
        self.root.join(".locks").join(&self.name)
    }

    /// Notes what is about to be fetched.
    pub fn begin(&self, record: &Record) -> Result<(), Failure> {
        self.write_record(record, INCOMPLETE)
    }

    /// Links the files where the hub's tools look for them, then says which commit the revision is at, then that the
    /// model is complete.
    pub fn finish(&self, record: &Record) -> Result<Complete, Failure> {
        let snapshot = self.folder().join("snapshots").join(&record.commit);
        for file in &record.files {
            let path = snapshot.join(&file.path);
            link(&self.blob(&file.hash), &path, file).map_err(|e| at(&path, &e))?;
        }
        if !is_commit(&record.revision) {
            write_whole(
                &self.folder().join("refs").join(&record.revision),
                record.commit.as_bytes(),
            )?;
        }
        self.write_record(record, COMPLETE)?;
        let begun = self.record_file(record, INCOMPLETE);
        fs::remove_file(&begun)
            .or_else(absent)
            .map_err(|e| at(&begun, &e))?;
        Ok(Complete {
            record: record.clone(),
            file: self.record_file(record, COMPLETE),
            model: self.folder(),
        })
    }

    fn write_record(&self, record: &Record, ending: &str) -> Result<(), Failure> {
        write_whole(
            &self.record_file(record, ending),
            serde_json::to_string_pretty(record)?.as_bytes(),
        )
    }

    fn record_file(&self, record: &Record, ending: &str) -> PathBuf {
        let kind = match record.wanted {
            Wanted::Packages => "packages",
            Wanted::Checkpoint => "checkpoint",
        };
        let folder = match record.folder.as_str() {
            "" => String::new(),
            folder => format!(".{}", folder.replace('/', "--")),
        };
        self.folder()
            .join(RECORDS)
            .join(format!("{}.{kind}{folder}.{ending}", record.commit))
    }

    /// Removes what was fetched here, of one commit or all: what other programs fetched stays. Gives the bytes freed.
    pub fn remove(&self, commit: Option<&str>) -> Result<Option<u64>, Failure> {
        let all = self.complete()?.into_iter().chain(self.incomplete()?);
        let (gone, kept): (Vec<_>, Vec<_>) =
            all.partition(|c| commit.is_none_or(|commit| c.commit() == commit));
        if gone.is_empty() {
            return Ok(None);
        }
        // The record goes first: whatever happens then, nothing half removed is taken for a model.
        for complete in &gone {
            remove_file(&complete.file)?;
        }
        let still: BTreeSet<String> = kept
            .iter()
            .flat_map(|c| &c.record.files)
            .map(|f| f.hash.clone())
            .collect();
        let kept_paths: BTreeSet<(&str, &str)> = kept
            .iter()
            .flat_map(|c| c.record.files.iter().map(|f| (c.commit(), f.path.as_str())))
            .collect();
        for complete in &gone {
            let snapshot = self.folder().join("snapshots").join(complete.commit());
            for file in &complete.record.files {
                if !kept_paths.contains(&(complete.commit(), file.path.as_str())) {
                    remove_file(&snapshot.join(&file.path))?;
                }
            }
        }
        remove_empty(&self.folder().join("snapshots"));
        let linked = self.linked()?;
        let mut freed = 0;
        for file in gone.iter().flat_map(|c| &c.record.files) {
            if still.contains(&file.hash) || linked.contains(&file.hash) {
                continue;
            }
            for path in [self.blob(&file.hash), self.incomplete_blob(&file.hash)] {
                freed += fs::metadata(&path).map_or(0, |m| m.len());
                remove_file(&path)?;
            }
        }
        self.forget_refs()?;
        remove_empty(&self.folder());
        Ok(Some(freed))
    }

    /// Contents that snapshots still link to.
    fn linked(&self) -> Result<BTreeSet<String>, Failure> {
        let mut found = BTreeSet::new();
        let mut folders = vec![self.folder().join("snapshots")];
        while let Some(folder) = folders.pop() {
            for entry in entries(&folder)? {
                let path = entry.path();
                if let Ok(target) = fs::read_link(&path) {
                    found.extend(target.file_name().and_then(|n| n.to_str()).map(str::to_owned));
                } else if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        Ok(found)
    }

    /// Removes the refs that lead to no snapshot.
    fn forget_refs(&self) -> Result<(), Failure> {
        let mut folders = vec![self.folder().join("refs")];
        while let Some(folder) = folders.pop() {
            for entry in entries(&folder)? {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Ok(commit) = fs::read_to_string(&path)
                    && !self.folder().join("snapshots").join(commit.trim()).exists()
                {
                    remove_file(&path)?;
                }
            }
        }
        Ok(())
    }
}

impl Record {
    /// What a model is recorded as, before it is fetched.
    pub fn new(name: &Name, commit: &str, wanted: Wanted, folder: &str, files: &[RemoteFile]) -> Self {
        let files = files.iter().map(|f| RecordedFile {
            path: f.path.clone(),
            size: f.size,
            hash: f.hash.digits().to_owned(),
        });
        Record {
            name: name.repository(),
            revision: name.revision.clone(),
            commit: commit.to_owned(),
            wanted,
            folder: folder.to_owned(),
            files: files.collect(),
        }
    }

    fn is_sound(&self) -> bool {
        let file = |f: &RecordedFile| stays_inside(&f.path) && is_hex(&f.hash);
        is_commit(&self.commit)
            && (self.folder.is_empty() || stays_inside(&self.folder))
            && self.files.iter().all(file)
    }
}

/// Makes `path` the content `blob`, unless it is that already.
fn link(blob: &Path, path: &Path, file: &RecordedFile) -> io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    if fs::read_link(path).is_ok_and(|target| target.file_name() == blob.file_name())
        && fs::metadata(path).is_ok_and(|m| m.len() == file.size)
    {
        return Ok(());
    }
    fs::remove_file(path).or_else(absent)?;
    // CoreML.framework compiles packages; packages made of symbolic links are not known to be safe with it.
    if cfg!(target_vendor = "apple") && fs::hard_link(blob, path).is_ok() {
        return Ok(());
    }
    let up: PathBuf = std::iter::repeat_n("..", file.path.split('/').count() + 1).collect();
    let target = up.join("blobs").join(&file.hash);
    symbolic(&target, path)
        .or_else(|_| fs::hard_link(blob, path))
        .or_else(|_| fs::copy(blob, path).map(|_| ()))
}

#[cfg(unix)]
fn symbolic(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn symbolic(target: &Path, path: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, path)
}

/// Writes a file so that it is there as a whole or not at all.
fn write_whole(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(|e| at(folder, &e))?;
    let new = path.with_file_name(format!(".{}.new", std::process::id()));
    fs::write(&new, content).map_err(|e| at(&new, &e))?;
    fs::rename(&new, path).map_err(|e| at(path, &e))
}

/// What is in a folder; nothing when there is none.
fn entries(folder: &Path) -> Result<Vec<fs::DirEntry>, Failure> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.collect::<Result<_, _>>().map_err(|e| at(folder, &e)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(at(folder, &e)),
    }
}

fn remove_file(path: &Path) -> Result<(), Failure> {
    fs::remove_file(path).or_else(absent).map_err(|e| at(path, &e))
}

/// Removes empty folders from the inside out; others stay.
fn remove_empty(folder: &Path) {
    for entry in entries(folder).unwrap_or_default() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove_empty(&entry.path());
        }
    }
    // A folder that is not empty refuses, which is meant.
    let _ = fs::remove_dir(folder);
}

fn absent(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

/// A failure with the place where it happened.
pub fn at(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}
