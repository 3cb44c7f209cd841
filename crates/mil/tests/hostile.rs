//! Damaged and malicious files: an error with the file and the place, no panic, and memory bounded by the file's size.

use std::collections::BTreeMap;
use std::sync::Mutex;

use bytes::Bytes;
use candle_coreml_mil::{Error, Model, Source, parse_program, print_program};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The peak is the whole process's, so tests that measure it take turns.
static TURN: Mutex<()> = Mutex::new(());

const TESTDATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata");
const SPEC: &str = "Data/com.apple.CoreML/model.mlmodel";
const WEIGHTS: &str = "Data/com.apple.CoreML/weights/weight.bin";

type Files = BTreeMap<String, Bytes>;

fn files(folder: &str, names: &[&str]) -> Files {
    let read = |name: &&str| {
        let path = format!("{TESTDATA}/{folder}/{name}");
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        (name.to_string(), Bytes::from(bytes))
    };
    names.iter().map(read).collect()
}

fn packages() -> Vec<Files> {
    vec![
        files("control_flow.mlpackage", &["Manifest.json", SPEC, WEIGHTS]),
        files("stateful.mlpackage", &["Manifest.json", SPEC, WEIGHTS]),
        files("flexible.mlpackage", &["Manifest.json", SPEC]),
    ]
}

fn compiled() -> Vec<Files> {
    let names = ["model.mil", "weights/weight.bin"];
    vec![
        files("control_flow.mlmodelc", &names),
        files("stateful.mlmodelc", &names),
    ]
}

/// Opens the files and returns the error, if any. What opens in spite of the damage has to survive printing.
fn open(files: &Files) -> Result<(), Error> {
    let size: usize = files.values().map(Bytes::len).sum();
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let opened = Model::open_source(Source::memory(files.clone()), "");
    let used = MEMORY.peak_usage().saturating_sub(before);
    assert!(used < (1 << 20) + 100 * size, "{used} bytes for files of {size}");
    let model = opened?;
    if let Some(program) = model.program() {
        let printed = print_program(program);
        assert_eq!(
            parse_program(&printed, "printed").unwrap_or_else(|e| panic!("{e}\n{printed}")),
            *program
        );
    }
    Ok(())
}

fn check_error(error: &Error, files: &Files, what: &str) {
    let text = error.to_string();
    let names_file = files.keys().any(|name| text.contains(name.as_str())) || text.contains("Data/");
    let is_root = matches!(error, Error::NotAModel { .. } | Error::OutsideModel { .. });
    assert!(names_file || is_root, "{what}: {text}");
}

#[test]
fn flipped_bits_anywhere_are_survived() {
    let _turn = TURN.lock();
    let (mut refused, mut tried) = (0, 0);
    for files in packages().into_iter().chain(compiled()) {
        for (name, bytes) in &files {
            // A step without common factors with 8 flips every bit position; small files are flipped everywhere.
            let step = if name.ends_with("weight.bin") { 7 } else { 11 };
            for bit in (0..bytes.len() * 8).step_by(step) {
                let mut damaged = bytes.to_vec();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let mut damaged_files = files.clone();
                damaged_files.insert(name.clone(), damaged.into());
                tried += 1;
                if let Err(error) = open(&damaged_files) {
                    check_error(&error, &damaged_files, &format!("{name} bit {bit}"));
                    refused += 1;
                }
            }
        }
    }
    assert!(tried > 10_000 && refused > tried / 4, "{refused} of {tried}");
}

#[test]
fn files_cut_anywhere_are_refused() {
    let _turn = TURN.lock();
    for files in packages().into_iter().chain(compiled()) {
        for (name, bytes) in &files {
            for len in 0..bytes.trim_ascii_end().len() {
                let mut cut = files.clone();
                cut.insert(name.clone(), bytes.slice(..len));
                match open(&cut) {
                    Err(error) => check_error(&error, &cut, &format!("{name} cut at {len}")),
                    // The end of a protobuf message is only known from outside: a cut between the fields of the outermost
                    // message leaves a message.
                    Ok(()) => assert_eq!(name, SPEC, "cut at {len} of {}", bytes.len()),
                }
            }
        }
    }
}

#[test]
fn bytes_put_anywhere_into_text_are_survived() {
    let _turn = TURN.lock();
    for files in compiled() {
        let text = files["model.mil"].clone();
        for (at, byte) in (0..text.len())
            .step_by(5)
            .zip(b"(){}[]<>,;=\"\\0x-?/`\xff".iter().cycle())
        {
            let mut damaged = text.to_vec();
            damaged.insert(at, *byte);
            let mut damaged_files = files.clone();
            damaged_files.insert("model.mil".to_string(), damaged.into());
            if let Err(error) = open(&damaged_files) {
                check_error(&error, &damaged_files, &format!("byte {byte} at {at}"));
            }
        }
    }
}

#[test]
fn wrong_offsets_and_types_of_weights_are_refused() {
    let _turn = TURN.lock();
    let files = &compiled()[1];
    let text = std::str::from_utf8(&files["model.mil"]).unwrap();
    let cases = [
        ("uint64(64)", "uint64(0)", "blob at offset 0: no record there"),
        ("uint64(64)", "uint64(63)", "blob at offset 63"),
        ("uint64(64)", "uint64(65)", "blob at offset 65"),
        ("uint64(64)", "uint64(18446744073709551615)", "no record there"),
        (
            "uint64(64)",
            "uint64(192)",
            "the program declares tensor<uint4, [16, 8]>",
        ),
        (
            "tensor<uint4, [16, 8]>",
            "tensor<uint4, [16, 9]>",
            "holds 64 bytes",
        ),
        (
            "tensor<uint4, [16, 8]>",
            "tensor<uint4, [1099511627776, 1099511627776]>",
            "more than",
        ),
        (
            "tensor<uint4, [16, 8]>",
            "tensor<uint4, [?, 8]>",
            "has no fixed size",
        ),
        ("tensor<uint4, [16, 8]>", "list<uint4, 128>", "model.mil"),
        (
            "@model_path/weights",
            "@model_path/../weights",
            "leaves the model's folder",
        ),
        ("@model_path/weights", "/weights", "leaves the model's folder"),
        ("weight.bin", "none.bin", "none.bin"),
        ("[1, 8]> x", "[1099511627776, 1099511627776]> x", "input \"x\""),
        ("y = linear", "updated = linear", "\"updated\" is defined already"),
    ];
    for (from, to, expected) in cases {
        let mut damaged = files.clone();
        damaged.insert("model.mil".to_string(), text.replace(from, to).into());
        let error = open(&damaged).unwrap_err().to_string();
        assert!(error.contains(expected), "{to}: {error}");
    }
}

/// A protobuf field with a length.
fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let varint = |mut n: u64| {
        let mut out = Vec::new();
        while n >= 0x80 {
            out.push(n as u8 | 0x80);
            n >>= 7;
        }
        out.push(n as u8);
        out
    };
    [
        varint(u64::from(number) << 3 | 2),
        varint(content.len() as u64),
        content.to_vec(),
    ]
    .concat()
}

#[test]
fn deep_nesting_and_false_lengths_in_the_protobuf_are_refused() {
    let _turn = TURN.lock();
    // A list of lists of lists as the type of a function's input.
    let mut ty = Vec::new();
    for _ in 0..100_000 {
        ty = field(1, &field(2, &ty));
        if ty.len() > 1 << 16 {
            break;
        }
    }
    let input = [field(1, b"x"), field(2, &ty)].concat();
    let function = [field(1, b"main"), field(2, &field(1, &input))].concat();
    let deep = field(502, &[vec![8, 1], field(2, &function)].concat());
    // A string that claims 2^60 bytes.
    let long = [
        &field(502, &[])[..],
        &[0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10],
    ]
    .concat();
    for (what, spec) in [("deep", deep), ("long", long)] {
        let files = BTreeMap::from([("a.mlmodel".to_string(), Bytes::from(spec))]);
        let source = Source::memory(files);
        let error = Model::open_source(source, "a.mlmodel").unwrap_err().to_string();
        assert!(error.starts_with("a.mlmodel"), "{what}: {error}");
    }
}

#[test]
fn manifests_that_point_nowhere_or_in_circles_are_refused() {
    let _turn = TURN.lock();
    let manifest = |path: &str| {
        format!(
            r#"{{"fileFormatVersion": "1.0.0", "rootModelIdentifier": "A",
                "itemInfoEntries": {{"A": {{"path": "{path}"}}, "B": {{"path": "{path}"}}}}}}"#
        )
    };
    for path in [
        "",
        ".",
        "..",
        "../Manifest.json",
        "none",
        "com.apple.CoreML",
        "/etc/passwd",
        "inner.mlpackage",
    ] {
        let mut files = packages().remove(0);
        files.insert("Manifest.json".to_string(), manifest(path).into());
        files.insert(
            "Data/inner.mlpackage/Manifest.json".to_string(),
            manifest("../..").into(),
        );
        let error = open(&files).expect_err(path);
        check_error(&error, &files, path);
    }
    // The manifest named as the specification is JSON, not protobuf.
    let mut files = packages().remove(0);
    files.insert("Data/Manifest.json".to_string(), manifest("Manifest.json").into());
    files.insert("Manifest.json".to_string(), manifest("Manifest.json").into());
    assert!(matches!(open(&files), Err(Error::NotAModel { .. })));
}
