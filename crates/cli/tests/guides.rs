//! Every `candle-coreml` command in README.md and docs/ runs, on the demo model and on small files of the tree.
//!
//! A block that cannot run has a comment before it that says why: `<!-- not run: reason -->`. Files that a guide speaks of are named
//! by comments as well: `<!-- test: NAME is PATH -->` puts a copy of a file or folder of the tree in the folder where the guide's commands
//! run, `with words` adds a tokenizer of words to it, `<!-- test: NAME is words -->` makes a text of such words.

#![cfg(unix)]
// Helpers of tests are not seen as tests by the lint.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Commands that run until they are stopped; their own tests run them.
const ENDLESS: &str = "candle-coreml serve";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

/// A block of commands, and the line it begins at.
struct Block {
    line: usize,
    script: String,
    not_run: Option<String>,
}

/// Indented blocks, and fenced ones of `sh`, that have a command of ours.
fn blocks(text: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let (mut script, mut begin, mut fence, mut not_run) = (String::new(), 0, None, None);
    let lines: Vec<&str> = text.lines().chain([""]).collect();
    for (number, line) in lines.iter().enumerate() {
        let command = match (fence, line.strip_prefix("    ")) {
            (None, None) if line.starts_with("```") => {
                fence = Some(line.trim_start_matches('`').starts_with("sh"));
                None
            }
            (Some(_), _) if line.starts_with("```") => {
                fence = None;
                None
            }
            (Some(shell), _) => Some(*line).filter(|_| shell),
            (None, indented) => indented,
        };
        if let Some(command) = command {
            if script.is_empty() {
                begin = number + 1;
            }
            script.push_str(command);
            script.push('\n');
            continue;
        }
        if script.lines().any(|l| l.starts_with("candle-coreml ")) {
            found.push(Block {
                line: begin,
                script: std::mem::take(&mut script),
                not_run: not_run.take(),
            });
        }
        script.clear();
        if let Some(reason) = line.trim().strip_prefix("<!-- not run: ") {
            not_run = Some(reason.trim_end_matches("-->").trim().to_owned());
        } else if !line.is_empty() {
            not_run = None;
        }
    }
    found
}

/// Puts what the comments of a guide name into `folder`.
fn set_up(text: &str, folder: &Path) {
    std::os::unix::fs::symlink(root().join("models"), folder.join("models")).unwrap();
    for line in text.lines() {
        let Some(rest) = line.trim().strip_prefix("<!-- test: ") else {
            continue;
        };
        let (name, source) = rest.trim_end_matches("-->").trim().split_once(" is ").unwrap();
        let to = folder.join(name);
        if source == "words" {
            let words: Vec<String> = (3..30).map(|i| format!("w{i}")).collect();
            fs::write(&to, words.join(" ")).unwrap();
            continue;
        }
        let (source, words) = match source.strip_suffix(" with words") {
            Some(source) => (source, true),
            None => (source, false),
        };
        copy(&root().join(source), &to);
        if words {
            let vocabulary: Vec<String> = (0..64).map(|i| format!("\"w{i}\": {i}")).collect();
            let tokenizer = format!(
                r#"{{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {{"type": "Whitespace"}},
                "post_processor": null, "decoder": null,
                "model": {{"type": "WordLevel", "vocab": {{{}}}, "unk_token": "w0"}}}}"#,
                vocabulary.join(", ")
            );
            fs::write(to.join("tokenizer.json"), tokenizer).unwrap();
        }
    }
}

fn copy(from: &Path, to: &Path) {
    if !from.is_dir() {
        fs::copy(from, to).unwrap();
        return;
    }
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        copy(&entry.path(), &to.join(entry.file_name()));
    }
}

fn run(block: &Block, folder: &Path) -> Result<(), String> {
    let program = Path::new(env!("CARGO_BIN_EXE_candle-coreml"));
    let programs = format!(
        "{}:{}",
        program.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let script: String = block
        .script
        .lines()
        .filter(|l| !l.starts_with(ENDLESS))
        .map(|l| format!("{l}\n"))
        .collect();
    let output = Command::new("sh")
        .args(["-e", "-c", &script])
        .current_dir(folder)
        .env("PATH", programs)
        // A name that is no path is not to be asked for on the network.
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", folder.join("hub"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn every_command_of_the_guides_runs() {
    let mut guides: Vec<PathBuf> = fs::read_dir(root().join("docs"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    guides.retain(|path| path.extension().is_some_and(|e| e == "md"));
    guides.push(root().join("README.md"));
    guides.sort();
    let (mut failures, mut ran) = (Vec::new(), 0);
    for guide in guides {
        let text = fs::read_to_string(&guide).unwrap();
        let folder = tempfile::tempdir().unwrap();
        set_up(&text, folder.path());
        for block in blocks(&text) {
            let place = format!("{}:{}", guide.file_name().unwrap().to_string_lossy(), block.line);
            match &block.not_run {
                Some(reason) if reason.len() < 8 => {
                    failures.push(format!("{place}: not run for what reason?"))
                }
                Some(reason) => println!("{place}: not run: {reason}"),
                None => match run(&block, folder.path()) {
                    Ok(()) => ran += 1,
                    Err(error) => failures.push(format!("{place}:\n{}{error}", block.script)),
                },
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(ran >= 10, "{ran} blocks ran");
}

#[test]
fn blocks_are_found_with_their_marks() {
    let text = "a\n\n    candle-coreml ops x\n\n<!-- not run: no network here -->\n\n    candle-coreml pull a/b\n    echo\n\n```rust\n    candle-coreml no\n```\n\
                ```sh\ncandle-coreml list\n```\n    cargo test\n";
    let found: Vec<(usize, String, bool)> = blocks(text)
        .into_iter()
        .map(|b| (b.line, b.script, b.not_run.is_some()))
        .collect();
    let expected = [
        (3, "candle-coreml ops x\n".to_owned(), false),
        (7, "candle-coreml pull a/b\necho\n".to_owned(), true),
        (14, "candle-coreml list\n".to_owned(), false),
    ];
    assert_eq!(found, expected);
}
