//! Lists the files of the demo model, so that the binary carries them.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let crate_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?);
    // A published package holds a copy, because a package cannot reach outside its own folder.
    let places = [crate_dir.join("demo"), crate_dir.join("../../models/tales")];
    let model = places.iter().find(|place| place.join("meta.yaml").exists());
    let model =
        model.ok_or_else(|| io::Error::other("the demo model is neither in demo nor in models/tales"))?;
    let mut files = Vec::new();
    list(model, model, &mut files)?;
    files.sort();
    let rows: String = files
        .iter()
        .map(|(name, path)| format!("    ({name:?}, include_bytes!({path:?})),\n"))
        .collect();
    let table =
        format!("/// Path in the bundle and contents.\nconst FILES: &[(&str, &[u8])] = &[\n{rows}];\n");
    let out = PathBuf::from(env::var("OUT_DIR").map_err(io::Error::other)?);
    fs::write(out.join("demo_files.rs"), table)?;
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", model.display());
    Ok(())
}

fn list(root: &Path, folder: &Path, files: &mut Vec<(String, String)>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            list(root, &path, files)?;
            continue;
        }
        let inner = path.strip_prefix(root).map_err(io::Error::other)?;
        let name: Vec<_> = inner.iter().map(|part| part.to_string_lossy()).collect();
        files.push((name.join("/"), fs::canonicalize(&path)?.display().to_string()));
    }
    Ok(())
}
