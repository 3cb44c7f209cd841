//! `compress`: the weights of packages that exist, made smaller.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_coreml_convert::{CompressOptions, CompressReport, Compression, PartialFolder, compress_package};
use serde_json::json;

use super::args::CompressArgs;
use super::{Bar, memory};
use crate::failure::{DONE, Failure, Outcome};
use crate::interrupt;
use crate::terminal::{self, FAINT, STRONG, styled};

pub fn run(args: &CompressArgs) -> Outcome {
    let options = CompressOptions {
        compression: args.how.compression()?,
        least_values: args.least,
        only: args.only.iter().map(|o| (o.part.clone(), o.how)).collect(),
    };
    if options.compression == Compression::None && options.only.is_empty() {
        return Err(Failure::usage(
            "nothing to do: give --palettize, --quantize, --prune or --only",
        ));
    }
    let to = match &args.out {
        Some(out) => out.clone(),
        None => beside(&args.model, &options.compression),
    };
    interrupt::remove_at_end(PartialFolder::place(&to))?;
    let start = Instant::now();
    let done = if is_package(&args.model) {
        vec![(to.clone(), package(&args.model, &to, &options)?)]
    } else {
        folder(&args.model, &to, &options)?
    };
    print(args.json, &done, start.elapsed().as_secs_f64())?;
    Ok(DONE)
}

fn is_package(path: &Path) -> bool {
    !path.is_dir() || path.join("Manifest.json").exists()
}

/// `model.mlpackage` to `model-palette-4-group-8.mlpackage`.
fn beside(model: &Path, how: &Compression) -> PathBuf {
    let stem = model.file_stem().unwrap_or_default().to_string_lossy();
    let words: String = how
        .to_string()
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '.' {
                c
            } else {
                '-'
            }
        })
        .collect();
    let mut name = format!("{stem}-{words}");
    if let Some(extension) = model.extension() {
        name = format!("{name}.{}", extension.to_string_lossy());
    }
    model.with_file_name(name)
}

fn package(from: &Path, to: &Path, options: &CompressOptions) -> Result<CompressReport, Failure> {
    let bar = Bar::new("compressing", 0);
    let report = compress_package(from, to, options, &mut |p| bar.show(p));
    bar.finish();
    Ok(report?)
}

/// Compresses every package of a folder and copies its other files.
fn folder(
    from: &Path,
    to: &Path,
    options: &CompressOptions,
) -> Result<Vec<(PathBuf, CompressReport)>, Failure> {
    let mut entries = std::fs::read_dir(from)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    let packages = entries.iter().filter(|e| e.path().join("Manifest.json").exists());
    if packages.count() == 0 {
        return Err(Failure::new(format!(
            "{}: no .mlpackage in this folder",
            from.display()
        )));
    }
    let folder = PartialFolder::create(to)?;
    let mut done = Vec::new();
    for entry in entries {
        let (path, target) = (entry.path(), folder.path().join(entry.file_name()));
        if path.join("Manifest.json").exists() {
            done.push((to.join(entry.file_name()), package(&path, &target, options)?));
        } else if path.is_file() {
            std::fs::copy(&path, &target)?;
        }
    }
    folder.finish()?;
    Ok(done)
}

fn print(as_json: bool, done: &[(PathBuf, CompressReport)], seconds: f64) -> Result<(), Failure> {
    let most = memory::now().map(|m| m.most);
    let mut out = terminal::out();
    if as_json {
        let list: Vec<_> = done
            .iter()
            .map(|(path, r)| {
                json!({ "path": path, "compressed": r.compressed, "values": r.values, "bytes_before": r.bytes.0,
                        "bytes_after": r.bytes.1, "relative_error": r.relative_error(),
                        "kept": r.kept.iter().map(|(n, why)| json!({ "weight": n, "why": why })).collect::<Vec<_>>() })
            })
            .collect();
        let facts = json!({ "packages": list, "seconds": seconds, "peak_memory_bytes": most });
        writeln!(out, "{}", serde_json::to_string_pretty(&facts)?)?;
        return Ok(());
    }
    for (path, r) in done {
        let (before, after) = (terminal::bytes(r.bytes.0), terminal::bytes(r.bytes.1));
        let path = styled(STRONG, path.display());
        let error = r.relative_error() * 100.0;
        let (count, values) = (r.compressed, r.values);
        writeln!(
            out,
            "{path} {count} weights, {values} values: {before} to {after}; error {error:.2} % of the weights' size"
        )?;
        for (name, why) in &r.kept {
            writeln!(out, "  {} {}", name, styled(FAINT, format!("kept: {why}")))?;
        }
    }
    let memory = most.map_or(String::new(), |m| {
        format!(", {} of memory at most", terminal::bytes(m))
    });
    terminal::note(&format!("{seconds:.1} s{memory}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_lie_beside_the_model_with_the_form_in_their_names() {
        let how = "palette:4:group=8".parse().unwrap();
        for (model, expected) in [
            ("a/m.mlpackage", "a/m-palette-4-group-8.mlpackage"),
            ("a/bundle", "a/bundle-palette-4-group-8"),
        ] {
            assert_eq!(beside(Path::new(model), &how), Path::new(expected));
        }
        let how = "sparse:0.5+int8".parse().unwrap();
        assert_eq!(beside(Path::new("m"), &how), Path::new("m-sparse-0.5-int8"));
    }
}
