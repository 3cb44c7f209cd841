//! `convert`: packages from a checkpoint, with progress; the folder of its parts.

pub mod args;
mod check;
pub mod compress;
mod memory;
mod sensitivity;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_coreml_convert::{
    EncoderConfig, EncoderOptions, LanguageModelOptions, PartialFolder, Plan, Progress, convert_encoder,
    convert_language_model, model_type, plan_language_model, read_config,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::failure::{DONE, Failure, Outcome};
use crate::interrupt;
use crate::terminal::{self, FAINT, STRONG, styled};
use args::ConvertArgs;

pub fn run(args: &ConvertArgs) -> Outcome {
    if model_type(&args.model).is_some_and(|kind| EncoderConfig::is_encoder(&kind)) {
        return encoder(args);
    }
    let config = read_config(&args.model)?;
    let options = args.options(config.max_positions)?;
    if args.sensitivity {
        return sensitivity::run(args, &options);
    }
    let plan = plan_language_model(&args.model, &options)?;
    let Some(out) = args.out.as_deref().filter(|_| !args.dry_run) else {
        return print_plan(args, &plan, &options);
    };
    interrupt::remove_at_end(PartialFolder::place(out))?;
    let start = Instant::now();
    let bar = Bar::new("converting", plan.values);
    let done = convert_language_model(&args.model, out, &options, &mut |p| bar.show(p));
    bar.finish();
    done?;
    let packages: Vec<PathBuf> = plan.packages.iter().map(|(name, _, _)| out.join(name)).collect();
    print_written(args.json, out, &packages, start.elapsed())?;
    if args.check {
        check::run(args, out, &options)?;
    }
    Ok(DONE)
}

fn encoder(args: &ConvertArgs) -> Outcome {
    let config = EncoderConfig::open(&args.model)?;
    let options = EncoderOptions {
        tokens: args.tokens,
        layers: args.how.compression()?,
        embeddings: args.embeddings,
    };
    if args.sensitivity {
        return Err(Failure::usage(
            "--sensitivity is for language models; this is an encoder",
        ));
    }
    let Some(out) = args.out.as_deref().filter(|_| !args.dry_run) else {
        let c = &config;
        let (projections, words) = (4 * c.hidden + 2 * c.intermediate, c.vocabulary + c.max_tokens);
        let bytes = options
            .layers
            .estimated_bytes((c.layers * c.hidden * projections) as u64)
            + options.embeddings.estimated_bytes((words * c.hidden) as u64);
        let mut out = terminal::out();
        writeln!(
            out,
            "encoder: {} layers of {}, {} heads, vocabulary {}, {} tokens at most\n  {} about {}",
            c.layers,
            c.hidden,
            c.heads,
            c.vocabulary,
            options.tokens.unwrap_or(c.max_tokens),
            styled(STRONG, "model.mlpackage"),
            terminal::bytes(bytes)
        )?;
        return Ok(DONE);
    };
    interrupt::remove_at_end(PartialFolder::place(out))?;
    let start = Instant::now();
    let bar = Bar::new("converting", 0);
    let done = convert_encoder(&args.model, out, &options, &mut |p| bar.show(p));
    bar.finish();
    done?;
    print_written(args.json, out, &[out.join("model.mlpackage")], start.elapsed())?;
    if args.check {
        check::run_encoder(args, out)?;
    }
    Ok(DONE)
}

/// A bar with the time left and the memory this process holds; nothing where standard error is no terminal.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new(what: &'static str, values: u64) -> Self {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {percent} % {msg}, {eta} left");
        let style = style.expect("the template is a constant that indicatif understands");
        let bar = ProgressBar::new(values).with_style(style).with_prefix(what);
        bar.enable_steady_tick(Duration::from_millis(500));
        Bar(bar)
    }

    pub fn show(&self, progress: Progress) {
        self.0.set_length(progress.total);
        self.0.set_position(progress.done);
        if let Some(memory) = memory::now() {
            self.0
                .set_message(format!("{} of memory", terminal::bytes(memory.now)));
        }
    }

    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

fn print_plan(args: &ConvertArgs, plan: &Plan, options: &LanguageModelOptions) -> Outcome {
    let mut out = terminal::out();
    let total: u64 = plan.packages.iter().map(|(_, _, bytes)| bytes).sum();
    let c = &plan.config;
    if args.json {
        let packages: Vec<_> = plan
            .packages
            .iter()
            .map(|(name, what, bytes)| json!({ "name": name, "holds": what, "weight_bytes": bytes }))
            .collect();
        let facts = json!({
            "family": format!("{:?}", c.family), "layers": c.layers, "hidden": c.hidden, "heads": c.heads,
            "kv_heads": c.kv_heads, "head_dim": c.head_dim, "vocabulary": c.vocabulary, "values": plan.values,
            "context": options.context, "batch": options.batch, "state_bytes": plan.state_bytes,
            "packages": packages, "weight_bytes": total,
        });
        writeln!(out, "{}", serde_json::to_string_pretty(&facts)?)?;
        return Ok(DONE);
    }
    writeln!(
        out,
        "{:?}: {} layers of {}, {} heads of {} ({} for keys), vocabulary {}, {} values",
        c.family, c.layers, c.hidden, c.heads, c.head_dim, c.kv_heads, c.vocabulary, plan.values
    )?;
    writeln!(
        out,
        "context {}, batch {}, state {}",
        options.context,
        options.batch,
        terminal::bytes(plan.state_bytes)
    )?;
    let (layers, head, embeddings) = (options.layers, options.head, options.embeddings);
    writeln!(out, "layers {layers}, head {head}, embeddings {embeddings}")?;
    for (range, how) in &options.mixed {
        writeln!(out, "layers {} to {}: {how}", range.start, range.end - 1)?;
    }
    for (name, what, bytes) in &plan.packages {
        let size = terminal::bytes(*bytes);
        writeln!(out, "  {} {what}, {size}", styled(STRONG, name))?;
    }
    writeln!(
        out,
        "{} of weights; tables, scales and rotary tables not counted",
        terminal::bytes(total)
    )?;
    Ok(DONE)
}

/// What was written, how large it is, how long it took and how much memory.
pub fn print_written(json: bool, folder: &Path, packages: &[PathBuf], took: Duration) -> Result<(), Failure> {
    let sizes: Vec<(String, u64)> = packages
        .iter()
        .map(|p| Ok((p.display().to_string(), size_of(p)?)))
        .collect::<Result<_, Failure>>()?;
    let most = memory::now().map(|m| m.most);
    let mut out = terminal::out();
    if json {
        let list: Vec<_> = sizes
            .iter()
            .map(|(path, bytes)| json!({ "path": path, "bytes": bytes }))
            .collect();
        let facts = json!({ "folder": folder, "packages": list, "seconds": took.as_secs_f64(), "peak_memory_bytes": most });
        writeln!(out, "{}", serde_json::to_string_pretty(&facts)?)?;
        return Ok(());
    }
    for (path, bytes) in &sizes {
        writeln!(
            out,
            "{} {}",
            styled(STRONG, path),
            styled(FAINT, terminal::bytes(*bytes))
        )?;
    }
    let memory = most.map_or(String::new(), |m| {
        format!(", {} of memory at most", terminal::bytes(m))
    });
    terminal::note(&format!("{:.1} s{memory}", took.as_secs_f64()));
    Ok(())
}

/// Bytes of all files in a folder and the folders in it.
fn size_of(folder: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        bytes += match entry.file_type()?.is_dir() {
            true => size_of(&entry.path())?,
            false => entry.metadata()?.len(),
        };
    }
    Ok(bytes)
}
