//! Models of the Hugging Face hub by name: found on this machine, otherwise fetched.

mod cache;
mod client;
mod commands;
mod fetch;
mod name;
mod select;
mod settings;

use std::path::{Path, PathBuf};

use crate::args::{Command, EvalCommand};
use crate::failure::Failure;
use cache::{Cache, Complete};
pub use commands::{list, pull, rm};
use name::Name;
use select::Wanted;
use settings::Settings;

/// Puts the folder on this machine where a command names a model of the hub; fetches it when it is not there.
pub fn resolve(command: &mut Command, offline: bool) -> Result<(), Failure> {
    if let Command::Compress(args) = command
        && args.out.is_none()
        && hub_name(&args.model)?.is_some()
    {
        return Err(Failure::usage(
            "a model of the hub is not compressed beside itself: give the folder to write after it",
        ));
    }
    for (path, place) in places(command) {
        match place {
            Place::Package => single(path, offline)?,
            Place::Folder(wanted) => {
                if let Some(found) = find(path, wanted, offline)? {
                    *path = found;
                }
            }
        }
    }
    Ok(())
}

/// What a command wants where a name of the hub may stand.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    /// A package: of a folder with one that is no language model, that one.
    Package,
    /// A folder with these files.
    Folder(Wanted),
}

/// Every path of a command that a name of the hub may stand for.
fn places(command: &mut Command) -> Vec<(&mut PathBuf, Place)> {
    const BUNDLE: Place = Place::Folder(Wanted::Packages);
    match command {
        Command::Inspect { model, .. } | Command::Ops { model, .. } => vec![(model, Place::Package)],
        Command::Predict(args) => vec![(&mut args.model, Place::Package)],
        Command::Trace(args) => vec![(&mut args.model, Place::Package)],
        Command::Verify(args) => vec![(&mut args.model, Place::Package)],
        Command::Explain(args) | Command::Plan(args) => vec![(&mut args.model, Place::Package)],
        Command::Compress(args) => vec![(&mut args.model, Place::Package)],
        Command::Embed(args) => vec![(&mut args.model, BUNDLE)],
        Command::Convert(args) => vec![(&mut args.model, Place::Folder(Wanted::Checkpoint))],
        Command::Generate(args) => given([&mut args.bundle]),
        Command::Chat(args) => given([&mut args.bundle]),
        Command::Bench(args) => given([&mut args.bundle]),
        Command::Eval(EvalCommand::Perplexity(args)) => given([&mut args.bundle, &mut args.compare]),
        Command::Eval(EvalCommand::Choices(args)) => given([&mut args.bundle, &mut args.compare]),
        Command::Serve(args) => {
            let models = args.bundles.iter_mut().chain(&mut args.embedding);
            models.map(|named| (&mut named.path, BUNDLE)).collect()
        }
        Command::Pull(_) | Command::List(_) | Command::Rm(_) => Vec::new(),
    }
}

/// Folders of bundles, where they were given.
fn given<const N: usize>(paths: [&mut Option<PathBuf>; N]) -> Vec<(&mut PathBuf, Place)> {
    let given = paths.into_iter().filter_map(Option::as_mut);
    given
        .map(|path| (path, Place::Folder(Wanted::Packages)))
        .collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Cli;
    use clap::Parser;

    #[test]
    fn names_of_the_hub_stand_in_every_command_that_takes_a_path() {
        let mut failures = Vec::new();
        for (line, expected) in [
            ("inspect o/n", vec!["o/n"]),
            ("ops o/n", vec!["o/n"]),
            ("predict o/n -o out", vec!["o/n"]),
            ("trace o/n", vec!["o/n"]),
            ("verify o/n --golden g.npz", vec!["o/n"]),
            ("explain o/n", vec!["o/n"]),
            ("plan o/n", vec!["o/n"]),
            ("generate o/n -p hi", vec!["o/n"]),
            ("generate -p hi", vec![]),
            ("chat o/n", vec!["o/n"]),
            ("bench o/n", vec!["o/n"]),
            ("embed o/n --text hi", vec!["o/n"]),
            (
                "eval perplexity t.txt o/n --compare o/m@v1",
                vec!["o/n", "o/m@v1"],
            ),
            ("eval choices q.jsonl o/n --compare o/m", vec!["o/n", "o/m"]),
            ("eval choices q.jsonl --compare o/m", vec!["o/m"]),
            ("serve o/n story=o/m --embedding o/e", vec!["o/n", "o/m", "o/e"]),
            ("convert o/n out", vec!["o/n"]),
            ("compress o/n out --palettize 4", vec!["o/n"]),
            ("rm o/n", vec![]),
        ] {
            let words = std::iter::once("candle-coreml").chain(line.split(' '));
            let mut cli = Cli::try_parse_from(words).unwrap();
            let found: Vec<String> = places(&mut cli.command)
                .into_iter()
                .map(|(path, _)| path.display().to_string())
                .collect();
            if found != expected {
                failures.push(format!("{line}: {found:?}"));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn a_model_of_the_hub_is_not_compressed_in_its_cache() {
        let words = ["candle-coreml", "compress", "o/n", "--palettize", "4"];
        let mut cli = Cli::try_parse_from(words).unwrap();
        let error = resolve(&mut cli.command, true).unwrap_err();
        assert!(error.message().contains("the folder to write"), "{error:?}");
    }
}
