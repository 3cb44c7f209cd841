//! Finds Debian's Objective-C runtime and GNUstep's Foundation, whose packages lack the names linkers look for.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let folders = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
    ];
    for (name, library) in [
        ("libobjc.so", "libobjc.so.4"),
        ("libgnustep-base.so", "libgnustep-base.so"),
    ] {
        let found = folders
            .iter()
            .map(|f| Path::new(f).join(library))
            .find(|p| p.exists());
        let found = found
            .unwrap_or_else(|| panic!("{library} is not installed; `cargo xtask apple-check` installs it"));
        let link = out.join(name);
        if !link.exists() {
            symlink(&found, &link).unwrap_or_else(|e| panic!("{}: {e}", link.display()));
        }
    }
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rerun-if-changed=build.rs");
}
