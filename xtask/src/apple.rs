//! The Apple engine without a Mac: the real target checked from Linux, and the stand-in framework on GNUstep.
//!
//! The stable toolchain has no standard library for Apple systems here; Debian's `rustc-web` carries its sources, from which
//! cargo builds one (`-Zbuild-std`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

pub(crate) type Result<T> = std::result::Result<T, String>;

/// Debian packages that the real target needs: a compiler with its library's sources, and clang for one file of objc2's.
const TARGET_PACKAGES: &[&str] = &[
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "rust-web-clippy",
    "clang",
    "llvm",
];

/// Debian packages that the stand-in needs: Foundation, its runtime, blocks, and GCC's Objective-C for one file of
/// objc2's: what clang makes of it for this runtime catches no exception.
const FAKE_PACKAGES: &[&str] = &[
    "libgnustep-base-dev",
    "libobjc-12-dev",
    "libblocksruntime-dev",
    "gobjc",
];

/// What is checked for each target. Crates that ship there; those that do not exist yet are left out by name.
const SHIPPED: &[&str] = &[
    "candle-coreml-apple",
    "candle-coreml",
    "candle-coreml-llm",
    "candle-coreml-cli",
    "candle-coreml-server",
];

const TARGETS: &[&str] = &["aarch64-apple-darwin", "x86_64-apple-darwin", "aarch64-apple-ios"];

/// `apple-check`: all of it; `--quick` checks one target only; `--no-install` leaves apt alone.
pub fn check(arguments: &[String]) -> Result<()> {
    let quick = arguments.iter().any(|a| a == "--quick");
    if !arguments.iter().any(|a| a == "--no-install") {
        install(TARGET_PACKAGES)?;
        install(FAKE_PACKAGES)?;
    }
    let packages: Vec<&str> = SHIPPED.iter().copied().filter(|p| exists(p)).collect();
    let targets = if quick { &TARGETS[..1] } else { TARGETS };
    for target in targets {
        timed(&format!("check {target}"), || {
            cross("check", target, &packages, &[])
        })?;
        if !quick {
            timed(&format!("clippy {target}"), || {
                cross("clippy", target, &packages, &["--", "-D", "warnings"])
            })?;
        }
    }
    if !quick {
        timed("build aarch64-apple-darwin", || {
            cross("build", TARGETS[0], &libraries(&packages), &[])
        })?;
    }
    timed("stand-in", || fake(&[]))
}

/// `apple-fake`: patches the bindings and runs cargo in the stand-in's workspace.
pub fn fake(arguments: &[String]) -> Result<()> {
    patch_bindings()?;
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root().join("crates/apple/fake"));
    match arguments {
        [] => cargo.args(["test", "--", "--test-threads=1"]),
        given => cargo.args(given),
    };
    cargo.env("CARGO_TARGET_DIR", root().join("target"));
    cargo.env("CC", "gcc").env("CFLAGS", "");
    run(&mut cargo)
}

/// `apple-report`: for the owner of a Mac; see docs/apple.md. Everything runs, whatever fails; the failures are told at the
/// end.
pub fn report(arguments: &[String]) -> Result<()> {
    if !cfg!(target_vendor = "apple") {
        return Err("this runs on a Mac; elsewhere there is `cargo xtask apple-fake`".to_string());
    }
    let demo = [
        "generate",
        "--prompt",
        "Tell me a story about a brave mouse.",
        "--max-tokens",
        "40",
    ];
    let engine = |name: &'static str| [&demo[..], &["--engine", name]].concat();
    let command_line = |rest: &[&str]| -> Vec<String> {
        let words = [
            "run",
            "--release",
            "--locked",
            "--package",
            "candle-coreml-cli",
            "--",
        ];
        words.iter().chain(rest).map(ToString::to_string).collect()
    };
    let words = |line: &[&str]| line.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut steps = vec![
        ("system", "sw_vers", vec![]),
        ("processor", "sysctl", words(&["-n", "machdep.cpu.brand_string"])),
        ("compiler", "rustc", words(&["-V"])),
        (
            "tests",
            env!("CARGO"),
            words(&[
                "test",
                "--locked",
                "-p",
                "candle-coreml-apple",
                "-p",
                "candle-coreml",
                "-p",
                "candle-coreml-llm",
            ]),
        ),
        (
            "golden cases on both engines",
            env!("CARGO"),
            words(&[
                "run",
                "--release",
                "--locked",
                "-p",
                "candle-coreml",
                "--example",
                "compare_engines",
            ]),
        ),
        (
            "demo model, Core ML",
            env!("CARGO"),
            command_line(&engine("apple")),
        ),
        (
            "demo model, portable",
            env!("CARGO"),
            command_line(&engine("portable")),
        ),
        (
            "speed, Core ML",
            env!("CARGO"),
            command_line(&["bench", "--engine", "apple"]),
        ),
        (
            "speed, portable",
            env!("CARGO"),
            command_line(&["bench", "--engine", "portable"]),
        ),
    ];
    if let Some(model) = arguments.first() {
        steps.push(("plan", env!("CARGO"), command_line(&["plan", model.as_str()])));
    }
    let mut failed = Vec::new();
    for (name, program, arguments) in &steps {
        println!("\n== {name}");
        if let Err(error) = run(Command::new(program).current_dir(root()).args(arguments)) {
            println!("failed: {error}");
            failed.push(*name);
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(format!("failed: {}", failed.join(", ")))
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

fn exists(package: &str) -> bool {
    let folder = package.strip_prefix("candle-coreml-").unwrap_or(package);
    root().join("crates").join(folder).join("Cargo.toml").is_file()
}

/// What can be built without a linker for Apple systems.
fn libraries<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    packages
        .iter()
        .copied()
        .filter(|p| *p != "candle-coreml-cli")
        .collect()
}

/// One cargo command for a target with the standard library built from source.
fn cross(command: &str, target: &str, packages: &[&str], more: &[&str]) -> Result<()> {
    let underscored = target.replace('-', "_");
    let sdk = root().join("target/apple-sdk");
    fs::create_dir_all(&sdk).map_err(|e| format!("{}: {e}", sdk.display()))?;
    // By full path: another cargo may come first, and the sources fit this compiler only.
    // Clippy, too, looks for its cargo and its compiler on the path.
    let program = if command == "clippy" {
        "/usr/bin/cargo-clippy"
    } else {
        "/usr/bin/cargo"
    };
    let mut cargo = Command::new(program);
    cargo
        .current_dir(root())
        .env("CARGO", "/usr/bin/cargo")
        .env("PATH", "/usr/bin:/bin")
        .args([command, "-Zbuild-std=std", "--target", target]);
    for package in packages {
        cargo.args(["--package", package]);
    }
    cargo.args(more);
    cargo
        .env("RUSTC", "/usr/bin/rustc")
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTC_WRAPPER");
    cargo.env("CARGO_TARGET_DIR", root().join("target/apple"));
    if command != "clippy" {
        cargo.env("RUSTFLAGS", "-D warnings");
    }
    // The C file of objc2 has no headers, so an empty SDK does; without the variable a Mac's tool is asked for one.
    cargo
        .env("SDKROOT", sdk)
        .env(format!("CC_{underscored}"), "clang")
        .env(format!("AR_{underscored}"), "llvm-ar");
    run(&mut cargo)
}

pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let installed = |package: &&str| {
        let status = Command::new("dpkg-query")
            .args(["--show", "--showformat=${db:Status-Status}", package])
            .output();
        status.is_ok_and(|o| o.stdout == b"installed")
    };
    if packages.iter().all(installed) {
        return Ok(());
    }
    run(Command::new("apt-get").arg("update"))?;
    run(Command::new("apt-get")
        .args(["install", "--yes", "--no-install-recommends"])
        .args(packages))
}

/// Copies of two crates of the bindings, changed so that they compile and link off Apple systems. Each edit must change
/// something: when a new version makes one pointless or impossible, that is said here and not by a linker.
fn patch_bindings() -> Result<()> {
    let target = root().join("target/apple-fake-patched");
    let core_ml = copy_of("objc2-core-ml", &target)?;
    edit(
        &core_ml.join("src/generated/mod.rs"),
        "#[link(name = \"CoreML\", kind = \"framework\")]",
        "#[cfg_attr(target_vendor = \"apple\", link(name = \"CoreML\", kind = \"framework\"))]",
    )?;
    let objc2 = copy_of("objc2", &target)?;
    let manifest = objc2.join("Cargo.toml");
    // GCC's runtime has no symbols for classes that the linker could find.
    edit(
        &manifest,
        "gnustep-1-7 = [\n    \"unstable-static-class\",",
        "gnustep-1-7 = [",
    )?;
    // The helper's C file is compiled for GCC's runtime instead.
    edit(&manifest, "    \"objc2-exception-helper?/gnustep-1-7\",\n", "")
}

fn edit(file: &Path, from: &str, to: &str) -> Result<()> {
    let name = file.display();
    let text = fs::read_to_string(file).map_err(|e| format!("{name}: {e}"))?;
    if text.contains(from) {
        return fs::write(file, text.replace(from, to)).map_err(|e| format!("{name}: {e}"));
    }
    if text.contains(to) && !to.is_empty() {
        return Ok(());
    }
    Err(format!("{name}: the text to change is not there: {from:?}"))
}

/// A fresh copy of a crate of the lock file, out of cargo's sources.
fn copy_of(package: &str, target: &Path) -> Result<PathBuf> {
    let from = source_of(package)?;
    let to = target.join(package);
    if to.exists() {
        fs::remove_dir_all(&to).map_err(|e| format!("{}: {e}", to.display()))?;
    }
    copy_folder(&from, &to)?;
    Ok(to)
}

/// Where cargo keeps the sources of a package at the version of the workspace's lock file.
fn source_of(package: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    let fetched = cargo
        .current_dir(root())
        .args(["fetch", "--locked"])
        .output()
        .map_err(|e| e.to_string())?;
    if !fetched.status.success() {
        return Err(format!(
            "cargo fetch: {}",
            String::from_utf8_lossy(&fetched.stderr)
        ));
    }
    let lock = root().join("Cargo.lock");
    let lock = fs::read_to_string(&lock).map_err(|e| format!("{}: {e}", lock.display()))?;
    let entry = format!("name = \"{package}\"\nversion = \"");
    let version = lock
        .split_once(&entry)
        .and_then(|(_, rest)| rest.split('"').next());
    let version = version.ok_or_else(|| format!("{package} is not in Cargo.lock"))?;
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|h| Path::new(&h).join(".cargo")));
    let registry = home
        .ok_or("neither CARGO_HOME nor HOME is set")?
        .join("registry/src");
    let indexes = fs::read_dir(&registry).map_err(|e| format!("{}: {e}", registry.display()))?;
    let folders = indexes
        .flatten()
        .map(|index| index.path().join(format!("{package}-{version}")));
    let found = folders.into_iter().find(|f| f.is_dir());
    found.ok_or_else(|| format!("{package} {version} is not among {}", registry.display()))
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let said = |path: &Path| {
        let path = path.display().to_string();
        move |e: std::io::Error| format!("{path}: {e}")
    };
    fs::create_dir_all(to).map_err(said(to))?;
    for entry in fs::read_dir(from).map_err(said(from))? {
        let entry = entry.map_err(said(from))?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_folder(&path, &target)?;
        } else {
            fs::copy(&path, &target).map_err(said(&path))?;
        }
    }
    Ok(())
}

fn timed(what: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    body()?;
    eprintln!("{what}: {:.1} minutes", start.elapsed().as_secs_f64() / 60.0);
    Ok(())
}

pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().map_err(|e| format!("{command:?}: {e}"))?;
    if status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {status}"))
}
