//! Checkpoints that are cut, changed or lie give errors that say where, never panics, and leave nothing behind.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

mod support;

use std::path::{Path, PathBuf};

use candle_coreml_convert::{
    Checkpoint, EncoderOptions, LanguageModelOptions, PartialFolder, Result, convert_encoder,
    convert_language_model,
};
use support::gguf::{byte_level, gguf};
use support::{Numbers, checkpoint};

const CONFIG: &str = "config.json";
const TENSORS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Converts to a folder that must not exist when that fails.
fn convert(from: &Path, to: &Path) -> Result<()> {
    let options = LanguageModelOptions {
        context: 8,
        batch: 4,
        ..LanguageModelOptions::default()
    };
    let done = convert_language_model(from, to, &options, &mut |_| {});
    settle(to, done.is_ok());
    done.map(|_| ())
}

fn settle(to: &Path, done: bool) {
    assert_eq!(to.exists(), done, "{}", to.display());
    assert!(!PartialFolder::place(to).exists());
    if done {
        std::fs::remove_dir_all(to).unwrap();
    }
}

fn good(folder: &Path) {
    checkpoint(folder, "llama", ", \"tie_word_embeddings\": true");
}

fn edit(file: PathBuf, from: &str, to: &str) {
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(file, text.replace(from, to)).unwrap();
}

/// A header of safetensors with data behind it.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn checkpoints_that_lie_are_refused_with_the_file_or_tensor() {
    type Change = fn(&Path);
    let changes: [(&str, Change, &str); 15] = [
        (
            "no configuration",
            |f| std::fs::remove_file(f.join(CONFIG)).unwrap(),
            CONFIG,
        ),
        (
            "no tensors",
            |f| std::fs::remove_file(f.join(TENSORS)).unwrap(),
            TENSORS,
        ),
        (
            "a width that is not that of the tensors",
            |f| {
                edit(f.join(CONFIG), "\"hidden_size\": 32", "\"hidden_size\": 64");
            },
            "tensor \"model.embed_tokens.weight\": shape [50, 32], [50, 64] is needed",
        ),
        (
            "more layers than there are",
            |f| {
                edit(
                    f.join(CONFIG),
                    "\"num_hidden_layers\": 3",
                    "\"num_hidden_layers\": 4",
                );
            },
            "model.layers.3.",
        ),
        (
            "sizes whose product has no 64 bits",
            |f| {
                let config = std::fs::read_to_string(f.join(CONFIG)).unwrap();
                let large = ["hidden_size", "num_hidden_layers", "intermediate_size"]
                    .map(|k| format!("\"{k}\": 16777216"));
                std::fs::write(
                    f.join(CONFIG),
                    format!(
                        "{},{}}}",
                        config.trim_end().trim_end_matches('}'),
                        large.join(",")
                    ),
                )
                .unwrap();
            },
            "num_hidden_layers is 16777216; 4096 at most",
        ),
        (
            "an infinite number",
            |f| {
                edit(
                    f.join(CONFIG),
                    "\"max_position",
                    "\"rope_theta\": 1e999, \"max_position",
                );
            },
            CONFIG,
        ),
        (
            "a header longer than the file",
            |f| {
                std::fs::write(f.join(TENSORS), [0xff; 64]).unwrap();
            },
            TENSORS,
        ),
        (
            "a header that is no JSON",
            |f| {
                std::fs::write(f.join(TENSORS), safetensors("{\"a\": ", 8)).unwrap();
            },
            TENSORS,
        ),
        (
            "a tensor beyond the data",
            |f| {
                let header = r#"{"model.embed_tokens.weight": {"dtype": "F32", "shape": [50, 32], "data_offsets": [0, 6400]}}"#;
                std::fs::write(f.join(TENSORS), safetensors(header, 100)).unwrap();
            },
            TENSORS,
        ),
        (
            "a shape that is not that of the data",
            |f| {
                let header = r#"{"model.embed_tokens.weight": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 16]}}"#;
                std::fs::write(f.join(TENSORS), safetensors(header, 16)).unwrap();
            },
            TENSORS,
        ),
        (
            "an index without a map",
            |f| std::fs::write(f.join(INDEX), "{}").unwrap(),
            "weight_map",
        ),
        (
            "an index of numbers",
            |f| {
                std::fs::write(f.join(INDEX), r#"{"weight_map": {"x": 3}}"#).unwrap();
            },
            "tensor \"x\" is in 3",
        ),
        (
            "an index that leads out of the folder",
            |f| {
                std::fs::write(f.join(INDEX), r#"{"weight_map": {"x": "../x.safetensors"}}"#).unwrap();
            },
            "../x.safetensors",
        ),
        (
            "an index with an absolute path",
            |f| {
                std::fs::write(f.join(INDEX), r#"{"weight_map": {"x": "/etc/hostname"}}"#).unwrap();
            },
            "/etc/hostname",
        ),
        (
            "an index of a file that is not there",
            |f| {
                std::fs::write(f.join(INDEX), r#"{"weight_map": {"x": "none.safetensors"}}"#).unwrap();
            },
            "none.safetensors",
        ),
    ];
    let mut failures = Vec::new();
    for (name, change, expected) in changes {
        let folder = tempfile::tempdir().unwrap();
        good(folder.path());
        change(folder.path());
        match convert(folder.path(), &folder.path().join("out")) {
            Ok(()) => failures.push(format!("{name}: converted")),
            Err(e) if e.to_string().contains(expected) => {}
            Err(e) => failures.push(format!("{name}: {e}, without {expected:?}")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Tensors without values may claim any other dimensions.
#[test]
fn empty_tensors_of_enormous_shapes_are_read_as_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let header =
        r#"{"x": {"dtype": "F32", "shape": [0, 4294967296, 4294967296, 4], "data_offsets": [0, 0]}}"#;
    std::fs::write(folder.path().join(TENSORS), safetensors(header, 0)).unwrap();
    // Refusing them is as good.
    let Ok(checkpoint) = Checkpoint::open(folder.path()) else {
        return;
    };
    let shape = checkpoint.shape("x").unwrap().to_vec();
    assert_eq!(checkpoint.parameters(), 0);
    assert!(checkpoint.read("x", &shape).unwrap().is_empty());
}

/// A GGUF file of version 3 that says how much it has, and then has `rest`.
fn gguf_header(tensors: u64, metadata: u64, rest: &[u8]) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(metadata.to_le_bytes());
    bytes.extend(rest);
    bytes
}

fn gguf_text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// One 32-bit tensor with these dimensions at this offset.
fn gguf_tensor(dimensions: &[u64], offset: u64) -> Vec<u8> {
    let mut bytes = gguf_text("token_embd.weight");
    bytes.extend(u32::try_from(dimensions.len()).unwrap().to_le_bytes());
    bytes.extend(dimensions.iter().flat_map(|d| d.to_le_bytes()));
    bytes.extend(0u32.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes.resize(bytes.len() + 128, 0);
    bytes
}

#[test]
fn gguf_files_with_enormous_numbers_are_refused() {
    let long = u64::MAX.to_le_bytes();
    let array = [
        gguf_text("k"),
        9u32.to_le_bytes().to_vec(),
        4u32.to_le_bytes().to_vec(),
        long.to_vec(),
    ]
    .concat();
    let mut failures = Vec::new();
    for (name, bytes) in [
        ("nothing", Vec::new()),
        ("another format", b"GGML".to_vec()),
        ("tensors", gguf_header(u64::MAX, 0, &[0; 64])),
        ("metadata", gguf_header(0, u64::MAX, &[0; 64])),
        ("a key", gguf_header(0, 1, &long)),
        ("an array", gguf_header(0, 1, &array)),
        ("values", gguf_header(1, 0, &gguf_tensor(&[u64::MAX / 2, 8], 0))),
        (
            "dimensions",
            gguf_header(1, 0, &gguf_tensor(&[u64::MAX, u64::MAX], 0)),
        ),
        (
            "no values",
            gguf_header(1, 0, &gguf_tensor(&[u64::MAX, u64::MAX, 0], 0)),
        ),
        (
            "an offset",
            gguf_header(1, 0, &gguf_tensor(&[4, 4], u64::MAX - 8)),
        ),
        (
            "an offset behind the end",
            gguf_header(1, 0, &gguf_tensor(&[4, 4], 4096)),
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.gguf");
        std::fs::write(&file, bytes).unwrap();
        match convert(&file, &folder.path().join("out")) {
            Ok(()) => failures.push(format!("{name}: converted")),
            Err(e) if e.to_string().contains("model.gguf") => {}
            Err(e) => failures.push(format!("{name}: {e}")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Lengths at which a file is cut: many near its start, where the structure is.
fn cuts(length: usize) -> impl Iterator<Item = usize> {
    (0..64)
        .chain((64..length.min(4096)).step_by(61))
        .chain((4096..length).step_by(4093))
        .chain([length - 1])
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    good(folder.path());
    let single = gguf(folder.path(), "llama", byte_level());
    let out = folder.path().join("out");
    let mut failures = Vec::new();
    for (file, from) in [
        (folder.path().join(TENSORS), folder.path()),
        (folder.path().join(CONFIG), folder.path()),
        (single.clone(), single.as_path()),
    ] {
        let whole = std::fs::read(&file).unwrap();
        for length in cuts(whole.len()) {
            std::fs::write(&file, &whole[..length]).unwrap();
            if convert(from, &out).is_ok() {
                failures.push(format!("{} of {length} bytes is converted", file.display()));
            }
        }
        std::fs::write(&file, whole).unwrap();
    }
    assert!(convert(folder.path(), &out).is_ok() && convert(&single, &out).is_ok());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Bytes of the structure are changed; what comes of it is a conversion or an error.
#[test]
fn changed_bytes_never_make_a_conversion_panic() {
    const ROUNDS: usize = 150;
    let folder = tempfile::tempdir().unwrap();
    good(folder.path());
    let single = gguf(folder.path(), "llama", byte_level());
    let out = folder.path().join("out");
    let mut numbers = Numbers(11);
    let mut below = |most: usize| (f64::from(numbers.next().abs()) * most as f64) as usize;
    let (mut refused, mut tried) = (0, 0);
    for (file, from) in [
        (folder.path().join(TENSORS), folder.path()),
        (folder.path().join(CONFIG), folder.path()),
        (single.clone(), single.as_path()),
    ] {
        let whole = std::fs::read(&file).unwrap();
        for _ in 0..ROUNDS {
            let mut bytes = whole.clone();
            for _ in 0..=below(4) {
                let at = below(bytes.len().min(6000));
                bytes[at] = match below(4) {
                    0 => 0xff,
                    1 => b'9',
                    2 => 0,
                    _ => bytes[at] ^ (1 << below(8)),
                };
            }
            std::fs::write(&file, &bytes).unwrap();
            refused += usize::from(convert(from, &out).is_err());
            tried += 1;
        }
        std::fs::write(&file, whole).unwrap();
    }
    // Most changes break something: the rounds reach the readers.
    assert!(refused > tried / 4, "{refused} of {tried} refused");
}

#[test]
fn encoders_are_read_as_carefully() {
    let from = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/roberta"));
    let folder = tempfile::tempdir().unwrap();
    let files =
        [CONFIG, TENSORS].map(|name| (folder.path().join(name), std::fs::read(from.join(name)).unwrap()));
    let write_all = || {
        files
            .iter()
            .for_each(|(file, whole)| std::fs::write(file, whole).unwrap())
    };
    let out = folder.path().join("out");
    let convert = || {
        let done = convert_encoder(folder.path(), &out, &EncoderOptions::default(), &mut |_| {});
        settle(&out, done.is_ok());
        done
    };
    let mut failures = Vec::new();
    for (file, whole) in &files {
        write_all();
        for length in cuts(whole.len()) {
            std::fs::write(file, &whole[..length]).unwrap();
            // The configuration ends with a line feed that nothing needs.
            if convert().is_ok() && whole[length..] != *b"\n" {
                failures.push(format!("{} of {length} bytes is converted", file.display()));
            }
        }
    }
    write_all();
    edit(
        folder.path().join(CONFIG),
        "\"pad_token_id\": 1",
        "\"pad_token_id\": 18446744073709551615",
    );
    let error = convert().unwrap_err().to_string();
    assert!(error.contains("max_position_embeddings"), "{error}");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
