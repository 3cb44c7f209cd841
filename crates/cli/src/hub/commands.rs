//! `pull`, `list` and `rm`.

use std::io::Write;

use serde_json::json;

use super::cache::{Cache, Complete};
use super::client::Client;
use super::fetch;
use super::local;
use super::name::Name;
use super::select::Wanted;
use super::settings::Settings;
use crate::args::{ListArgs, PullArgs, RmArgs};
use crate::failure::{DONE, Failure, Outcome};
use crate::terminal::{self, BAD, FAINT, STRONG, styled};

/// `pull`: asks the hub for what the revision is now, and fetches what is not here.
pub fn pull(args: &PullArgs, offline: bool) -> Outcome {
    let name = Name::parse(&args.model).map_err(Failure::usage)?;
    let settings = Settings::from_environment(offline)?;
    let wanted = match args.checkpoint {
        true => Wanted::Checkpoint,
        false => Wanted::Packages,
    };
    if settings.offline {
        let cache = Cache::new(&settings.cache, &name);
        let found = local(&cache, &name, wanted)?.ok_or_else(|| {
            Failure::new(format!(
                "{name}: not on this machine, and the network is not used (--offline)"
            ))
        })?;
        writeln!(terminal::out(), "{}", found.display())?;
        return Ok(DONE);
    }
    if args.dry_run {
        let client = Client::new(&settings);
        let order = fetch::order(&client, &name, wanted, args.folder.as_deref())?;
        let mut out = terminal::out();
        if args.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&order.record)?)?;
            return Ok(DONE);
        }
        for file in &order.record.files {
            writeln!(out, "{:>12}  {}", terminal::bytes(file.size), file.path)?;
        }
        let total = order.record.files.iter().map(|f| f.size).sum();
        terminal::note(&format!("{} at {}", terminal::bytes(total), order.record.commit));
        return Ok(DONE);
    }
    let found = fetch::model(&settings, &name, wanted, args.folder.as_deref())?;
    if args.json {
        writeln!(terminal::out(), "{}", facts(&found))?;
    } else {
        writeln!(terminal::out(), "{}", found.folder().display())?;
        terminal::note(&format!(
            "{} at {}",
            terminal::bytes(found.bytes()),
            found.commit()
        ));
    }
    Ok(DONE)
}

fn facts(found: &Complete) -> serde_json::Value {
    let record = found.record();
    json!({
        "name": record.name, "revision": record.revision, "commit": record.commit, "wanted": record.wanted,
        "folder": record.folder, "path": found.folder(), "bytes": found.bytes(), "bytes_here": found.bytes_here(),
        "complete": found.is_whole(),
    })
}

/// `list`: what `pull` fetched, and what it began.
pub fn list(args: &ListArgs) -> Outcome {
    let settings = Settings::from_environment(true)?;
    let mut found = Vec::new();
    for cache in Cache::all(&settings.cache)? {
        found.extend(cache.complete()?);
        found.extend(cache.incomplete()?);
    }
    let mut out = terminal::out();
    if args.json {
        let rows: Vec<_> = found.iter().map(facts).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
        return Ok(DONE);
    }
    if found.is_empty() {
        terminal::note(&format!("no models in {}", settings.cache.display()));
    }
    for complete in &found {
        let record = complete.record();
        let name = format!("{}@{}", record.name, record.revision);
        let folder = match record.folder.as_str() {
            "" => String::new(),
            folder => format!(" {folder}"),
        };
        let kind = match record.wanted {
            Wanted::Packages => "",
            Wanted::Checkpoint => " checkpoint",
        };
        let state = match complete.is_whole() {
            true => terminal::bytes(complete.bytes()),
            false => {
                let (here, all) = (complete.bytes_here(), complete.bytes());
                let text = format!(
                    "incomplete, {} of {}",
                    terminal::bytes(here),
                    terminal::bytes(all)
                );
                styled(BAD, text)
            }
        };
        let commit = record.commit.get(..8).unwrap_or_default();
        writeln!(
            out,
            "{}{folder}{kind}  {state}  {}",
            styled(STRONG, name),
            styled(FAINT, commit)
        )?;
    }
    Ok(DONE)
}

/// `rm`: what `pull` fetched of models, or of single revisions.
pub fn rm(args: &RmArgs) -> Outcome {
    let settings = Settings::from_environment(true)?;
    for text in &args.models {
        let name = Name::parse(text).map_err(Failure::usage)?;
        let cache = Cache::new(&settings.cache, &name);
        let missing = || Failure::new(format!("{text}: not on this machine; `list` shows what is"));
        if cache.complete()?.is_empty() && cache.incomplete()?.is_empty() {
            return Err(missing());
        }
        let _lock = cache.lock()?;
        let commit = match text.contains('@') {
            true => Some(cache.commit(&name.revision)?.ok_or_else(missing)?),
            false => None,
        };
        let freed = cache.remove(commit.as_deref())?.ok_or_else(missing)?;
        terminal::note(&format!("{text}: {} freed", terminal::bytes(freed)));
    }
    Ok(DONE)
}
