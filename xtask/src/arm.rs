//! The code for ARM processors from Linux on another one: compiled with Debian's compiler, its tests run under QEMU.
//!
//! The stable toolchain has no standard library for aarch64 here; cargo builds one from the sources in Debian's archive, as for
//! Apple's systems.

use std::process::Command;

use crate::apple::{Result, install, root, run};

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Debian packages: compiler with its library's sources, linker with the C library, and what runs the result.
const PACKAGES: &[&str] = &[
    "rustc-web",
    "cargo-web",
    "rust-web-src",
    "gcc-aarch64-linux-gnu",
    "libc6-dev-arm64-cross",
    "qemu-user",
];

/// QEMU is slow enough without unoptimised kernels; nothing else is worth the time.
const PROFILE: &[&str] = &[
    "profile.dev.debug=0",
    // Without debug information cargo would strip the rest, by a program that Debian's packages have not.
    "profile.dev.strip=\"none\"",
    "profile.dev.package.\"*\".opt-level=1",
    "profile.dev.package.candle-coreml-kernels.opt-level=1",
];

/// `arm-check`: checks the kernels and the engine over them, and runs the kernels' tests; with arguments, one cargo command.
pub fn check(arguments: &[String]) -> Result<()> {
    install(PACKAGES)?;
    if !arguments.is_empty() {
        let given: Vec<&str> = arguments.iter().map(String::as_str).collect();
        return cargo(&given);
    }
    cargo(&["test", "--package", "candle-coreml-kernels", "--lib"])?;
    cargo(&["check", "--package", "candle-coreml-portable"])
}

fn cargo(words: &[&str]) -> Result<()> {
    let (command, rest) = words.split_first().ok_or("arm-check CARGO COMMAND")?;
    let mut cargo = Command::new("/usr/bin/cargo");
    // By full path: another compiler may come first, and the sources fit this one only.
    cargo
        .current_dir(root())
        .args([command, "-Zbuild-std=std", "--target", TARGET, "--locked"])
        .args(PROFILE.iter().flat_map(|setting| ["--config", setting]))
        .args(rest);
    cargo
        .env("CARGO", "/usr/bin/cargo")
        .env("RUSTC", "/usr/bin/rustc")
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTC_WRAPPER")
        .env("CARGO_TARGET_DIR", root().join("target/arm"))
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
            "aarch64-linux-gnu-gcc",
        )
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
            "qemu-aarch64 -L /usr/aarch64-linux-gnu",
        );
    run(&mut cargo)
}
