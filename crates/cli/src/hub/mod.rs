//! Models of the Hugging Face hub by name: found on this machine, otherwise fetched.

mod cache;
mod client;
mod commands;
mod fetch;
mod name;
mod select;
mod settings;

use std::path::{Path, PathBuf};

use crate::args::Command;
use crate::failure::Failure;
use cache::{Cache, Complete};
pub use commands::{list, pull, rm};
use name::Name;
use select::Wanted;
use settings::Settings;

/// Puts the folder on this machine where a command names a model of the hub; fetches it when it is not there.
pub fn resolve(command: &mut Command, offline: bool) -> Result<(), Failure> {
    let one = |path: &mut PathBuf, wanted| -> Result<(), Failure> {
        if let Some(found) = find(path, wanted, offline)? {
            *path = found;
        }
        Ok(())
    };
    match command {
        Command::Inspect { model, .. } | Command::Ops { model, .. } => single(model, offline),
        Command::Predict(args) => single(&mut args.model, offline),
        Command::Trace(args) => single(&mut args.model, offline),
        Command::Verify(args) => single(&mut args.model, offline),
        Command::Explain(args) | Command::Plan(args) => single(&mut args.model, offline),
        Command::Generate(args) => args.bundle.as_mut().map_or(Ok(()), |p| one(p, Wanted::Packages)),
        Command::Chat(args) => args.bundle.as_mut().map_or(Ok(()), |p| one(p, Wanted::Packages)),
        Command::Bench(args) => args.bundle.as_mut().map_or(Ok(()), |p| one(p, Wanted::Packages)),
        Command::Serve(args) => {
            let models = args.bundles.iter_mut().chain(&mut args.embedding);
            models
                .map(|named| &mut named.path)
                .try_for_each(|path| one(path, Wanted::Packages))
        }
        Command::Embed(args) => one(&mut args.model, Wanted::Packages),
        Command::Convert(args) => one(&mut args.model, Wanted::Checkpoint),
        _ => Ok(()),
    }
}

/// As `find`, and for a folder with one package that is no language model the package itself.
fn single(path: &mut PathBuf, offline: bool) -> Result<(), Failure> {
    let Some(folder) = find(path, Wanted::Packages, offline)? else {
        return Ok(());
    };
    let mut packages = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        packages.extend(select::is_package(&name).then_some(name));
    }
    *path = match packages.as_slice() {
        [one] if !folder.join("meta.yaml").exists() => folder.join(one),
        _ => folder,
    };
    Ok(())
}

/// The folder of the model that `path` names on the hub; `None` where it is a path of this machine.
fn find(path: &Path, wanted: Wanted, offline: bool) -> Result<Option<PathBuf>, Failure> {
    let Some(name) = hub_name(path)? else {
        return Ok(None);
    };
    let settings = Settings::from_environment(offline)?;
    let cache = Cache::new(&settings.cache, &name);
    if let Some(found) = local(&cache, &name, wanted)? {
        return Ok(Some(found));
    }
    if settings.offline {
        return Err(Failure::new(format!(
            "{name}: not on this machine, or not all of it, and the network is not used (--offline); it would be in {}",
            cache.folder().display()
        )));
    }
    let found = fetch::model(&settings, &name, wanted, None)?;
    Ok(Some(found.folder()))
}

/// The name a path is, when nothing of this machine can be meant.
fn hub_name(path: &Path) -> Result<Option<Name>, Failure> {
    let Some(text) = path.to_str().filter(|_| !path.exists()) else {
        return Ok(None);
    };
    let first = text.split('/').next().unwrap_or_default();
    if !Name::looks_like(text) || Path::new(first).is_dir() {
        return Ok(None);
    }
    Name::parse(text).map(Some).map_err(Failure::usage)
}

/// The folder of a model that is on this machine and whole.
fn local(cache: &Cache, name: &Name, wanted: Wanted) -> Result<Option<PathBuf>, Failure> {
    let Some(commit) = cache.commit(&name.revision)? else {
        return Ok(None);
    };
    let mut whole: Vec<Complete> = cache.complete()?;
    whole.retain(|found| found.commit() == commit && found.wanted() == wanted && found.is_whole());
    match whole.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.folder())),
        several => {
            let folders: Vec<String> = several.iter().map(|f| f.folder().display().to_string()).collect();
            Err(Failure::usage(format!(
                "{name} has several models on this machine; give the path of one: {}",
                folders.join(", ")
            )))
        }
    }
}
