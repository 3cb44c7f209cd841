//! `serve`: language models over HTTP.

mod args;
mod log;

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_coreml_llm::{EmbeddingModel, EmbeddingOptions};
use candle_coreml_server::{Model, Options, Server};

pub use args::ServeArgs;

use crate::failure::{DONE, Failure, INTERRUPTED, Outcome};
use crate::{demo, terminal};

/// Keys can be given here, where other people of the machine do not see them in the list of processes.
const KEY_VARIABLE: &str = "CANDLE_COREML_API_KEY";

pub fn run(args: &ServeArgs) -> Outcome {
    log::install(args.quiet);
    let models = open(args)?;
    let options = options(args)?;
    warn(&options);
    let names: Vec<String> = models.iter().map(|m| m.id().to_owned()).collect();
    let server = Server::bind(models, options)?;
    let handle = server.handle();
    let asked = AtomicBool::new(false);
    ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        handle.stop();
    })?;
    let mut out = terminal::out();
    writeln!(out, "http://{} serves {}", server.address(), names.join(", "))?;
    out.flush()?;
    drop(out);
    server.run()?;
    Ok(DONE)
}

fn options(args: &ServeArgs) -> Result<Options, Failure> {
    let mut options = args.options();
    match std::env::var(KEY_VARIABLE) {
        Ok(key) => options.api_keys.push(key),
        Err(std::env::VarError::NotPresent) => {}
        Err(error) => return Err(Failure::usage(format!("{KEY_VARIABLE}: {error}"))),
    }
    Ok(options)
}

fn warn(options: &Options) {
    if !options.address.ip().is_loopback() && options.api_keys.is_empty() {
        terminal::note(&format!(
            "everybody who reaches {} may use these models; --api-key or {KEY_VARIABLE} asks for a key",
            options.address
        ));
    }
}

/// Opens what was named; encoders are told from language models by their packages.
fn open(args: &ServeArgs) -> Result<Vec<Model>, Failure> {
    let load = args.engine.load_options();
    let mut models = Vec::new();
    for named in &args.bundles {
        let (name, path) = name_and_path(named);
        let model = if EmbeddingModel::recognizes(path) {
            encoder(name, path, args)?
        } else {
            let bundle = demo::bundle(Some(path))?;
            Model::open(name, &bundle, &load)?
        };
        models.push(model);
    }
    for named in &args.embedding {
        let (name, path) = name_and_path(named);
        models.push(encoder(name, path, args)?);
    }
    if models.is_empty() {
        let bundle = demo::bundle(None)?;
        models.push(Model::open("tales", &bundle, &load)?);
    }
    Ok(models)
}

fn encoder(name: String, path: &Path, args: &ServeArgs) -> Result<Model, Failure> {
    let options = EmbeddingOptions {
        load: args.engine.load_options(),
        ..EmbeddingOptions::default()
    };
    Ok(Model::encoder(name, EmbeddingModel::open(path, &options)?))
}

/// `NAME=PATH`, or a path whose last part is the name.
fn name_and_path(named: &str) -> (String, &Path) {
    if let Some((name, path)) = named.split_once('=')
        && !name.is_empty()
        && !Path::new(named).exists()
    {
        return (name.to_owned(), Path::new(path));
    }
    let path = Path::new(named);
    let last = path.canonicalize().ok();
    let last = last.as_deref().unwrap_or(path).file_stem();
    let name = last.map_or_else(|| named.to_owned(), |name| name.to_string_lossy().into_owned());
    (name, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_by_whoever_starts_the_server_or_by_their_folders() {
        for (given, name, path) in [
            ("story=models/tales", "story", "models/tales"),
            ("models/tales", "tales", "models/tales"),
            ("models/all.mlpackage", "all", "models/all.mlpackage"),
        ] {
            assert_eq!(
                name_and_path(given),
                (name.to_owned(), Path::new(path)),
                "{given}"
            );
        }
    }
}
