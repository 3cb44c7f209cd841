//! A folder that stands in for Apple's SDK when a Mach-O file is linked on Linux: libraries and frameworks by name, empty.
//!
//! What they would define is left to be found when the program starts (`dynamic_lookup`), so a link here proves that the
//! objects fit together and that nothing is defined twice or asked for from an unknown library; not that Apple's libraries
//! have every name.

use super::Result;
use std::fs;
#[cfg(unix)]
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Flags of rustc with which clang links for macOS by lld. The linker's version is one whose options lld knows.
pub fn link_flags(folder: &Path) -> Vec<String> {
    let linker = folder.join(LINKER);
    [
        "--target=arm64-apple-macos11".to_string(),
        format!("-fuse-ld={}", linker.display()),
        "-mlinker-version=705".to_string(),
        "-Wl,-undefined,dynamic_lookup".to_string(),
    ]
    .map(|argument| format!("-Clink-arg={argument}"))
    .to_vec()
}

/// lld under the name by which it links Mach-O files, which Debian gives with a version only.
const LINKER: &str = "bin/ld64.lld";

/// Programs under the names by which they are called, and Debian's. The compiler strips what is linked by the second one, which its
/// package has not.
const PROGRAMS: &[(&str, &str)] = &[
    (LINKER, "/usr/bin/lld"),
    ("bin/rust-objcopy", "/usr/bin/llvm-objcopy"),
];

const LIBRARIES: &[(&str, &str)] = &[
    ("libSystem", "/usr/lib/libSystem.B.dylib"),
    ("libc", "/usr/lib/libSystem.B.dylib"),
    ("libm", "/usr/lib/libSystem.B.dylib"),
    ("libobjc", "/usr/lib/libobjc.A.dylib"),
    ("libiconv", "/usr/lib/libiconv.2.dylib"),
];

const FRAMEWORKS: &[&str] = &[
    "Accelerate",
    "AppKit",
    "CoreFoundation",
    "CoreGraphics",
    "CoreML",
    "CoreServices",
    "CoreVideo",
    "Foundation",
    "IOKit",
    "IOSurface",
    "Metal",
    "MetalPerformanceShaders",
    "OpenDirectory",
    "Security",
    "SystemConfiguration",
];

/// Writes the folder and gives its path.
pub fn write(folder: &Path) -> Result<PathBuf> {
    for (name, install) in LIBRARIES {
        stub(&folder.join("usr/lib").join(format!("{name}.tbd")), install)?;
    }
    for name in FRAMEWORKS {
        let inside = format!("System/Library/Frameworks/{name}.framework/{name}");
        stub(&folder.join(format!("{inside}.tbd")), &format!("/{inside}"))?;
    }
    fs::create_dir_all(folder.join("bin")).map_err(|e| format!("{}: {e}", folder.display()))?;
    for (name, program) in PROGRAMS {
        let link = folder.join(name);
        if !link.is_symlink() {
            symlink(program, &link).map_err(|e| format!("{}: {e}", link.display()))?;
        }
    }
    Ok(folder.to_path_buf())
}

fn stub(file: &Path, install: &str) -> Result<()> {
    let text = format!(
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ x86_64-macos, arm64-macos ]\ninstall-name: '{install}'\n...\n"
    );
    let parent = file.parent().unwrap_or(file);
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(file, text))
        .map_err(|e| format!("{}: {e}", file.display()))
}

#[cfg(not(unix))]
fn symlink(_to: &str, at: &Path) -> std::io::Result<()> {
    Err(std::io::Error::other(format!("{}: no links here", at.display())))
}
