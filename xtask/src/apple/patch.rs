//! Copies of the bindings' crates, changed so that they compile and link against GNUstep.

use super::{Result, root};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Copies of three crates of the bindings, changed so that they compile and link off Apple systems. Each edit must change
/// something: when a new version makes one pointless or impossible, that is said here and not by a linker.
pub fn bindings() -> Result<()> {
    let target = root().join("target/apple-fake-patched");
    for (package, framework) in [("objc2-core-ml", "CoreML"), ("objc2-core-video", "CoreVideo")] {
        let link = format!("link(name = \"{framework}\", kind = \"framework\")");
        edit(
            &copy_of(package, &target)?.join("src/generated/mod.rs"),
            &format!("#[{link}]"),
            &format!("#[cfg_attr(target_vendor = \"apple\", {link})]"),
        )?;
    }
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
