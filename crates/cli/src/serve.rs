//! `serve`: language models over HTTP.

mod args;
mod log;

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_coreml_llm::{EmbeddingModel, EmbeddingOptions, LoadOptions};
use candle_coreml_server::{Model, Options, Server};

use args::Named;
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
        let model = if EmbeddingModel::recognizes(&named.path) {
            encoder(named, args)?
        } else {
            language_model(named.name.as_str(), Some(&named.path), &load)?
        };
        models.push(model);
    }
    for named in &args.embedding {
        models.push(encoder(named, args)?);
    }
    if models.is_empty() {
        models.push(language_model("tales", None, &load)?);
    }
    Ok(models)
}

fn language_model(id: &str, path: Option<&Path>, load: &LoadOptions) -> Result<Model, Failure> {
    let (bundle, model) = demo::model(path, load)?;
    let template = bundle.template().ok().cloned();
    Ok(Model::new(id, bundle.session_of(model), template))
}

fn encoder(named: &Named, args: &ServeArgs) -> Result<Model, Failure> {
    let options = EmbeddingOptions {
        load: args.engine.load_options(),
        ..EmbeddingOptions::default()
    };
    let model = EmbeddingModel::open(&named.path, &options)?;
    Ok(Model::encoder(named.name.as_str(), model))
}
