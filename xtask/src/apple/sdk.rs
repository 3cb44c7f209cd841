//! A folder that stands in for Apple's SDK when a Mach-O file is linked on Linux: libraries and frameworks by name, empty.
//!
//! What they would define is left to be found when the program starts (`dynamic_lookup`), so a link here proves that the
//! objects fit together and that nothing is defined twice or asked for from an unknown library; not that Apple's libraries
//! have every name.

use super::Result;
use std::fs;
use std::path::{Path, PathBuf};

/// Flags of rustc with which clang links by lld. Apple's linker reads files that are older than this version of it.
pub const LINK: &[&str] = &[
    "-Clink-arg=-fuse-ld=/usr/bin/ld64.lld",
    "-Clink-arg=-mlinker-version=705",
    "-Clink-arg=-Wl,-undefined,dynamic_lookup",
];

const LIBRARIES: &[(&str, &str)] = &[
    ("libSystem", "/usr/lib/libSystem.B.dylib"),
    ("libc", "/usr/lib/libSystem.B.dylib"),
    ("libm", "/usr/lib/libSystem.B.dylib"),
    ("libobjc", "/usr/lib/libobjc.A.dylib"),
    ("libiconv", "/usr/lib/libiconv.2.dylib"),
];

const FRAMEWORKS: &[&str] = &[
    "CoreFoundation",
    "CoreML",
    "CoreVideo",
    "Foundation",
    "Metal",
    "Security",
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
