//! The Apple engine without a Mac: the real target checked from Linux, and the stand-in framework on GNUstep.
//!
//! The stable toolchain has no standard library for Apple systems here; Debian's `rustc-web` carries its sources, from which
//! cargo builds one (`-Zbuild-std`).

mod patch;
mod sdk;

use std::path::Path;
use std::process::Command;
use std::time::Instant;

pub(crate) type Result<T> = std::result::Result<T, String>;

/// Debian packages that the real target needs: a compiler with its library's sources, clang for one file of objc2's, and a
/// linker for Mach-O files.
const TARGET_PACKAGES: &[&str] = &[
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "rust-web-clippy",
    "clang",
    "llvm",
    "lld",
];

/// Debian packages that the stand-in needs: Foundation, its runtime, blocks, and GCC's Objective-C for one file of
/// objc2's: what clang makes of it for this runtime catches no exception.
const FAKE_PACKAGES: &[&str] = &[
    "libgnustep-base-dev",
    "libobjc-12-dev",
    "libblocksruntime-dev",
    "gobjc",
];

/// The target that is linked.
const LINKED: &str = "aarch64-apple-darwin";

const TARGETS: &[&str] = &["aarch64-apple-darwin", "x86_64-apple-darwin", "aarch64-apple-ios"];

/// Nothing is run here, so that the optimisations that tests need would be minutes for nothing.
const UNOPTIMISED: &[&str] = &[
    "profile.dev.debug=0",
    // Without debug information cargo would strip the rest, by a program that Debian's packages have not.
    "profile.dev.strip=\"none\"",
    "profile.dev.package.\"*\".opt-level=0",
    "profile.dev.package.candle-coreml-kernels.opt-level=0",
    "profile.dev.package.candle-coreml-convert.opt-level=0",
];

/// `apple-check`: all of it; `--quick` checks one target only; `--no-install` leaves apt alone.
pub fn check(arguments: &[String]) -> Result<()> {
    let quick = arguments.iter().any(|a| a == "--quick");
    if !arguments.iter().any(|a| a == "--no-install") {
        install(TARGET_PACKAGES)?;
        install(FAKE_PACKAGES)?;
    }
    let targets = if quick { &TARGETS[..1] } else { TARGETS };
    for target in targets {
        timed(&format!("check {target}"), || cross("check", target, &[]))?;
        if !quick {
            let deny = ["--", "-D", "warnings"];
            timed(&format!("clippy {target}"), || cross("clippy", target, &deny))?;
        }
    }
    if !quick {
        timed(&format!("build and link {LINKED}"), || {
            cross("build", LINKED, &[])
        })?;
    }
    timed("stand-in", || fake(&[]))
}

/// `apple-fake`: patches the bindings and runs cargo in the stand-in's workspace.
pub fn fake(arguments: &[String]) -> Result<()> {
    patch::bindings()?;
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

/// One cargo command for a target with the standard library built from source: for every crate of the workspace but this
/// one, so that a new one is checked from its first day.
fn cross(command: &str, target: &str, more: &[&str]) -> Result<()> {
    let underscored = target.replace('-', "_");
    let sdk = sdk::write(&root().join("target/apple-sdk"))?;
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
        .env("PATH", format!("{}/bin:/usr/bin:/bin", sdk.display()))
        .args([command, "-Zbuild-std=std", "--target", target])
        .args(["--workspace", "--exclude", "xtask", "--locked"])
        .args(UNOPTIMISED.iter().flat_map(|setting| ["--config", setting]))
        .args(more);
    cargo
        .env("RUSTC", "/usr/bin/rustc")
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTC_WRAPPER");
    cargo.env("CARGO_TARGET_DIR", root().join("target/apple"));
    // One set of flags, so that the commands share what they compile; apart by a character that paths have not.
    let deny = ["-D", "warnings"].map(String::from);
    let flags = [&deny[..], &sdk::link_flags(&sdk)].concat();
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    let linker = format!("CARGO_TARGET_{}_LINKER", underscored.to_uppercase());
    cargo.env(linker, "clang");
    // The C file of objc2 has no headers, so an SDK without any does; without the variable a Mac's tool is asked for one.
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
