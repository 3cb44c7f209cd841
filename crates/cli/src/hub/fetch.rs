//! Fetching a model: every file from where it stopped, verified before it counts.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::cache::{Cache, Complete, Record, at};
use super::client::{Client, Hash, Listing, RemoteFile, Trouble};
use super::name::Name;
use super::select::{Selection, Wanted, select};
use super::settings::Settings;
use crate::failure::Failure;
use crate::terminal;

/// Attempts in a row that bring nothing before it is given up.
const ATTEMPTS: u32 = 6;
/// Pause after the first of them; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const BUFFER_BYTES: usize = 256 << 10;

/// What is to be fetched.
pub struct Order {
    pub record: Record,
    files: Vec<RemoteFile>,
}

/// Asks the hub what a model consists of.
pub fn order(
    client: &Client<'_>,
    name: &Name,
    wanted: Wanted,
    folder: Option<&str>,
) -> Result<Order, Failure> {
    let listing = patiently(|| client.listing(name))?;
    let paths: Vec<&str> = listing.files.iter().map(|f| f.path.as_str()).collect();
    let chosen = select(&paths, wanted, folder).map_err(|what| Failure::new(format!("{name}: {what}")))?;
    let Listing { commit, files } = listing;
    let Selection { folder, paths } = chosen;
    let files: Vec<RemoteFile> = files.into_iter().filter(|f| paths.contains(&f.path)).collect();
    let record = Record::new(name, &commit, wanted, &folder, &files);
    Ok(Order { record, files })
}

/// Fetches what is not here of a model.
pub fn model(
    settings: &Settings,
    name: &Name,
    wanted: Wanted,
    folder: Option<&str>,
) -> Result<Complete, Failure> {
    let client = Client::new(settings);
    let cache = Cache::new(&settings.cache, name);
    let order = order(&client, name, wanted, folder)?;
    let _lock = cache.lock()?;
    cache.begin(&order.record)?;
    let bar = bar(&order.files);
    let fetched = order.files.iter().try_for_each(|file| {
        bar.set_message(file.path.clone());
        blob(&client, &cache, name, &order.record.commit, file, &bar)
    });
    bar.finish_and_clear();
    fetched?;
    cache.finish(&order.record)
}

fn bar(files: &[RemoteFile]) -> ProgressBar {
    let style = "{wide_msg} {bar:24} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";
    let style =
        ProgressStyle::with_template(style).expect("the template is a constant that indicatif understands");
    ProgressBar::new(files.iter().map(|f| f.size).sum()).with_style(style)
}

/// Tries until it works, with growing pauses; gives up after [`ATTEMPTS`] or what is final.
fn patiently<T>(mut attempt: impl FnMut() -> Result<T, Trouble>) -> Result<T, Failure> {
    let mut failed = 0;
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(trouble) => pause(trouble, &mut failed)?,
        }
    }
}

/// Waits before the next attempt, or says that there is none.
fn pause(trouble: Trouble, failed: &mut u32) -> Result<(), Failure> {
    let (what, asked) = match trouble {
        Trouble::Final(failure) => return Err(failure),
        Trouble::StartOver => ("the server has another file than the list".to_owned(), None),
        Trouble::Later(what, asked) => (what, asked),
    };
    *failed += 1;
    if *failed >= ATTEMPTS {
        return Err(Failure::new(format!(
            "{what}; given up after {ATTEMPTS} attempts"
        )));
    }
    let pause = asked.unwrap_or(FIRST_PAUSE * 2u32.pow(*failed - 1));
    if pause > Duration::from_secs(2) {
        terminal::note(&format!("{what}; again in {} s", pause.as_secs()));
    }
    thread::sleep(pause);
    Ok(())
}

/// Fetches one content, unless it is here.
fn blob(
    client: &Client<'_>,
    cache: &Cache,
    name: &Name,
    commit: &str,
    file: &RemoteFile,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let (done, digits) = (bar.position(), file.hash.digits());
    let path = cache.blob(digits);
    let is_here = || fs::metadata(&path).is_ok_and(|m| m.len() == file.size);
    if !is_here() {
        let _lock = cache.lock_blob(digits)?;
        if !is_here() {
            let part = cache.incomplete_blob(digits);
            let folder = part.parent().unwrap_or(&part);
            fs::create_dir_all(folder).map_err(|e| at(folder, &e))?;
            let mut part = Part::open(&part, file)?;
            fill(&mut part, bar, done, |from| client.file(name, commit, file, from))?;
            part.keep(&path)?;
        }
    }
    bar.set_position(done + file.size);
    Ok(())
}

type Answer = Result<ureq::http::Response<ureq::Body>, Trouble>;

/// Gets the rest of a file until its hash is right. A part that came from an earlier attempt may be wrong, so a wrong
/// hash is tried once more from the start.
fn fill(
    part: &mut Part<'_>,
    bar: &ProgressBar,
    done: u64,
    request: impl Fn(u64) -> Answer,
) -> Result<(), Failure> {
    let (mut failed, mut wrong) = (0, 0);
    loop {
        while part.have < part.file.size {
            let before = part.have;
            let got = request(before).and_then(|answer| part.take(answer, bar, done));
            match got {
                Ok(()) => {}
                Err(Trouble::StartOver) => {
                    part.clear()?;
                    pause(Trouble::StartOver, &mut failed)?;
                }
                Err(trouble) => {
                    if part.have > before {
                        failed = 0;
                    }
                    pause(trouble, &mut failed)?;
                }
            }
        }
        if part.is_right() {
            return Ok(());
        }
        part.clear()?;
        wrong += 1;
        if wrong == 2 || part.file.size == 0 {
            return Err(Failure::new(format!(
                "{}: the hub sends another content than its list has (hash {}); nothing of it is kept",
                part.file.path,
                part.file.hash.digits()
            )));
        }
    }
}

/// A file as far as it came.
struct Part<'a> {
    file: &'a RemoteFile,
    path: &'a Path,
    handle: File,
    have: u64,
    sum: Sum,
}

/// The hash of what came.
#[derive(Clone)]
enum Sum {
    Sha256(Sha256),
    GitSha1(Sha1),
}

impl Sum {
    fn of(file: &RemoteFile) -> Self {
        match file.hash {
            Hash::Sha256(_) => Sum::Sha256(Sha256::new()),
            Hash::GitSha1(_) => Sum::GitSha1(Sha1::new_with_prefix(format!("blob {}\0", file.size))),
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        match self {
            Sum::Sha256(sum) => sum.update(bytes),
            Sum::GitSha1(sum) => sum.update(bytes),
        }
    }

    fn digits(&self) -> String {
        let bytes = match self.clone() {
            Sum::Sha256(sum) => sum.finalize().to_vec(),
            Sum::GitSha1(sum) => sum.finalize().to_vec(),
        };
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl<'a> Part<'a> {
    /// Opens what is here and sums it up.
    fn open(path: &'a Path, file: &'a RemoteFile) -> Result<Self, Failure> {
        let handle = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path);
        let handle = handle.map_err(|e| at(path, &e))?;
        let sum = Sum::of(file);
        let mut part = Part {
            file,
            path,
            handle,
            have: 0,
            sum,
        };
        let length = part.handle.metadata().map_err(|e| at(path, &e))?.len();
        if length > file.size {
            part.clear()?;
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let n = part.handle.read(&mut buffer).map_err(|e| at(path, &e))?;
            let Some(read) = buffer.get(..n).filter(|b| !b.is_empty()) else {
                return Ok(part);
            };
            part.sum.add(read);
            part.have += read.len() as u64;
        }
    }

    /// Forgets what came.
    fn clear(&mut self) -> Result<(), Failure> {
        self.handle.set_len(0).map_err(|e| at(self.path, &e))?;
        self.handle
            .seek(SeekFrom::Start(0))
            .map_err(|e| at(self.path, &e))?;
        (self.have, self.sum) = (0, Sum::of(self.file));
        Ok(())
    }

    /// Appends what an answer brings.
    fn take(
        &mut self,
        answer: ureq::http::Response<ureq::Body>,
        bar: &ProgressBar,
        done: u64,
    ) -> Result<(), Trouble> {
        self.check(&answer)?;
        let mut body = answer.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            bar.set_position(done + self.have);
            let n = match body.read(&mut buffer) {
                Ok(n) => n,
                Err(e) => return Err(Trouble::Later(format!("{}: {e}", self.file.path), None)),
            };
            let came = buffer.get(..n).unwrap_or_default();
            if came.is_empty() {
                break;
            }
            if self.have + came.len() as u64 > self.file.size {
                self.clear()?;
                return Err(self.wrong_size("more"));
            }
            self.handle.write_all(came).map_err(|e| at(self.path, &e))?;
            self.sum.add(came);
            self.have += came.len() as u64;
        }
        match self.have < self.file.size {
            true => Err(Trouble::Later(
                format!("{}: the connection was cut", self.file.path),
                None,
            )),
            false => Ok(()),
        }
    }

    /// Tells an answer with the rest from one with the whole, and either from those of another size.
    fn check(&mut self, answer: &ureq::http::Response<ureq::Body>) -> Result<(), Trouble> {
        let header = |key: &str| answer.headers().get(key).and_then(|v| v.to_str().ok());
        if answer.status() == ureq::http::StatusCode::PARTIAL_CONTENT {
            // bytes FROM-TO/TOTAL
            let range = header("content-range").and_then(|r| r.strip_prefix("bytes "));
            let (span, total) = range.and_then(|r| r.split_once('/')).ok_or(Trouble::StartOver)?;
            let from = span.split('-').next().and_then(|from| from.parse::<u64>().ok());
            if from != Some(self.have) {
                return Err(Trouble::StartOver);
            }
            return match total.parse::<u64>() {
                Ok(total) if total != self.file.size => Err(self.wrong_size(&total.to_string())),
                _ => Ok(()),
            };
        }
        if self.have > 0 {
            self.clear()?;
        }
        match header("content-length").and_then(|l| l.parse::<u64>().ok()) {
            Some(length) if length != self.file.size => Err(self.wrong_size(&length.to_string())),
            _ => Ok(()),
        }
    }

    fn wrong_size(&self, found: &str) -> Trouble {
        Trouble::Final(Failure::new(format!(
            "{}: the hub's list says {} bytes, it sends {found}",
            self.file.path, self.file.size
        )))
    }

    fn is_right(&self) -> bool {
        self.have == self.file.size && self.sum.digits() == self.file.hash.digits()
    }

    /// Gives the file its name, once it is on the disk.
    fn keep(self, path: &Path) -> Result<(), Failure> {
        self.handle.sync_all().map_err(|e| at(self.path, &e))?;
        drop(self.handle);
        fs::rename(self.path, path).map_err(|e| at(path, &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_have_the_hash_git_gives_them() {
        let file = RemoteFile {
            path: "a".to_owned(),
            size: 6,
            hash: Hash::GitSha1(String::new()),
        };
        let mut sum = Sum::of(&file);
        sum.add(b"hel");
        sum.add(b"lo\n");
        // printf 'hello\n' | git hash-object --stdin
        assert_eq!(sum.digits(), "ce013625030ba8dba906f756967f9e9ca394464a");
    }
}
