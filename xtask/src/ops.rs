//! `docs/OPS.md`: the vocabulary of ML Programs joined with the engine's specifications and the golden cases.

use candle_coreml_portable::op::{OpSpec, Support};
use candle_coreml_portable::ops::{FAMILIES, spec};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// One operator of the vocabulary.
struct Word {
    name: String,
    since: String,
    family: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn table() -> PathBuf {
    root().join("docs/OPS.md")
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Writes the table.
pub fn write() -> Result<(), String> {
    let path = table();
    fs::write(&path, render()?).map_err(|e| format!("{}: {e}", path.display()))
}

/// Fails when the table is not what [`write()`] would write.
pub fn check() -> Result<(), String> {
    if read(&table())? == render()? {
        Ok(())
    } else {
        Err("docs/OPS.md is not up to date; run `cargo xtask ops`".into())
    }
}

fn vocabulary() -> Result<Vec<Word>, String> {
    let path = root().join("crates/portable/testdata/mil-ops.tsv");
    let text = read(&path)?;
    let word = |line: &str| match line.split('\t').collect::<Vec<_>>().as_slice() {
        [name, since, family] => Ok(Word {
            name: name.to_string(),
            since: since.to_string(),
            family: family.to_string(),
        }),
        _ => Err(format!("{}: {line:?} is not name, opset, family", path.display())),
    };
    text.lines().skip(1).map(word).collect()
}

/// Number of golden cases of each operator.
fn golden_counts() -> Result<BTreeMap<String, usize>, String> {
    let folder = root().join("crates/portable/testdata/golden");
    let entries = fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut counts = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(|e| e.to_string())?.path();
        let rows: Vec<serde_json::Value> =
            serde_json::from_str(&read(&path)?).map_err(|e| format!("{}: {e}", path.display()))?;
        for row in &rows {
            let op = row["op"].as_str().unwrap_or_default();
            *counts.entry(op.to_string()).or_insert(0) += 1;
        }
    }
    Ok(counts)
}

/// `const` and its symbolic form are read by the lowering itself and have no specification.
fn is_constant(name: &str) -> bool {
    matches!(name, "const" | "_const_symbolic")
}

fn support(name: &str, spec: Option<&OpSpec>) -> String {
    match spec.map(|s| s.support) {
        Some(Support::Full) => "full".into(),
        Some(Support::Partial(without)) => format!("all but {without}"),
        None if is_constant(name) => "full".into(),
        None => "none".into(),
    }
}

fn row(out: &mut String, word: &Word, counts: &BTreeMap<String, usize>) {
    let cases = counts.get(&word.name).copied().unwrap_or(0);
    let support = support(&word.name, spec(&word.name));
    let Word { name, since, family } = word;
    // Writing to a string cannot fail.
    let _ = writeln!(out, "| `{name}` | {family} | {since} | {support} | {cases} |");
}

fn render() -> Result<String, String> {
    let mut words = vocabulary()?;
    let counts = golden_counts()?;
    words.sort_by(|a, b| (&a.family, &a.name).cmp(&(&b.family, &b.name)));
    let total = words.len();
    let known = words
        .iter()
        .filter(|w| spec(&w.name).is_some() || is_constant(&w.name))
        .count();
    let cases: usize = counts.values().sum();
    let mut out = format!(
        "# Operators\n\n\
         The portable engine has {known} of the {total} operators of the vocabulary of ML Programs (coremltools 9.0, iOS15 to\n\
         iOS18), tested on {cases} golden cases. `cargo xtask ops` writes this file.\n\n\
         | operator | family | since | support | golden cases |\n\
         |---|---|---|---|---|\n"
    );
    words.iter().for_each(|w| row(&mut out, w, &counts));
    let listed = |name: &str| words.iter().any(|w| w.name == name);
    let mut others: Vec<Word> = FAMILIES
        .iter()
        .flat_map(|f| f.iter())
        .filter(|s| !listed(s.name))
        .map(|s| Word {
            name: s.name.into(),
            since: s.since.into(),
            family: s.family.into(),
        })
        .collect();
    others.sort_by(|a, b| a.name.cmp(&b.name));
    if !others.is_empty() {
        out += "\nOperators that are written to files and are not in that vocabulary:\n\n\
                | operator | family | since | support | golden cases |\n|---|---|---|---|---|\n";
        others.iter().for_each(|w| row(&mut out, w, &counts));
    }
    Ok(out)
}
