//! The code for ARM processors from Linux on another one: compiled with Debian's compiler, its tests run under QEMU.
//!
//! The stable toolchain has no standard library for aarch64 here. Debian's archive has the one of its `rustc-web`, which is
//! unpacked beside the compiler's own; nothing of another architecture is installed.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::apple::{Result, install, root, run};

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Debian packages: compiler, linker with the C library, and what runs the result.
const PACKAGES: &[&str] = &[
    "rustc-web",
    "cargo-web",
    "gcc-aarch64-linux-gnu",
    "libc6-dev-arm64-cross",
    "qemu-user",
];

/// The standard library for the target, as Debian has it.
const LIBRARY: &str = "libstd-rust-web-dev:arm64";

/// `arm-check [CARGO ARGUMENTS]`: clippy and tests of the kernels, and clippy of the engine over them.
pub fn check(arguments: &[String]) -> Result<()> {
    install(PACKAGES)?;
    let sysroot = sysroot()?;
    if arguments.is_empty() {
        cargo(
            &sysroot,
            &["check", "--package", "candle-coreml-kernels", "--all-targets"],
        )?;
        cargo(&sysroot, &["check", "--package", "candle-coreml-portable"])?;
        return cargo(&sysroot, &["test", "--package", "candle-coreml-kernels", "--lib"]);
    }
    let given: Vec<&str> = arguments.iter().map(String::as_str).collect();
    cargo(&sysroot, &given)
}

/// A folder with the libraries of both architectures, as the compiler looks for them.
fn sysroot() -> Result<PathBuf> {
    let folder = root().join("target/arm");
    let libraries = folder.join("sysroot/lib/rustlib");
    if libraries.join(TARGET).exists() {
        return Ok(folder.join("sysroot"));
    }
    // Lists of its own: the system's package manager is not told about another architecture.
    let lists = folder.join("lists");
    for path in [&libraries, &lists.join("partial")] {
        fs::create_dir_all(path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let apt = |words: &[&str]| {
        let mut apt = Command::new("apt-get");
        apt.current_dir(&folder)
            .args([
                "-o",
                "APT::Architectures::=amd64",
                "-o",
                "APT::Architectures::=arm64",
            ])
            .arg("-o")
            .arg(format!("Dir::State::Lists={}", lists.display()))
            .args(["-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache="])
            .args(words);
        run(&mut apt)
    };
    apt(&["--quiet", "update"])?;
    apt(&["download", LIBRARY])?;
    let archive = fs::read_dir(&folder)
        .map_err(|e| format!("{}: {e}", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| format!("{}: apt-get downloaded no archive", folder.display()))?;
    run(Command::new("dpkg")
        .arg("--extract")
        .arg(&archive)
        .arg(folder.join("unpacked")))?;
    let own = fs::read_dir("/usr/lib/rustlib").map_err(|e| format!("/usr/lib/rustlib: {e}"))?;
    for entry in own.flatten() {
        link(&entry.path(), &libraries.join(entry.file_name()))?;
    }
    link(
        &folder.join("unpacked/usr/lib/rustlib").join(TARGET),
        &libraries.join(TARGET),
    )?;
    Ok(folder.join("sysroot"))
}

#[cfg(unix)]
fn link(to: &std::path::Path, at: &std::path::Path) -> Result<()> {
    std::os::unix::fs::symlink(to, at).map_err(|e| format!("{}: {e}", at.display()))
}

#[cfg(not(unix))]
fn link(_: &std::path::Path, _: &std::path::Path) -> Result<()> {
    Err("this needs Debian".to_string())
}

fn cargo(sysroot: &std::path::Path, words: &[&str]) -> Result<()> {
    let mut cargo = Command::new("/usr/bin/cargo");
    // By full path: another compiler may come first, and the library fits this one only.
    cargo
        .current_dir(root())
        .env("RUSTC", "/usr/bin/rustc")
        .env("RUSTFLAGS", format!("--sysroot {}", sysroot.display()))
        .env("CARGO_TARGET_DIR", root().join("target/arm/build"))
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
            "aarch64-linux-gnu-gcc",
        )
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
            "qemu-aarch64 -L /usr/aarch64-linux-gnu",
        )
        .arg(words.first().copied().unwrap_or("check"))
        .args(["--target", TARGET])
        .args(words.get(1..).unwrap_or_default());
    run(&mut cargo)
}
