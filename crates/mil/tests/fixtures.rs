//! The models in `testdata` (see `make_fixtures.py` there), each as a package and as a compiled form of the same program.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use candle_coreml_mil::{
    DType, Description, Dim, FeatureType, Flexibility, Model, PackageWriter, Source, TensorType, ValueData,
    parse_program, print_program, same_program,
};

const TESTDATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata");

fn open(name: &str) -> Model {
    Model::open(Path::new(TESTDATA).join(name)).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn package_and_compiled_form_hold_the_same_program() {
    for name in ["control_flow", "stateful"] {
        let (a, b) = (
            open(&format!("{name}.mlpackage")),
            open(&format!("{name}.mlmodelc")),
        );
        assert_eq!(same_program(&a, &b), Ok(()), "{name}");
        assert_eq!(same_program(&b, &a), Ok(()), "{name}");
    }
    let different = same_program(&open("stateful.mlpackage"), &open("control_flow.mlmodelc"));
    assert!(different.is_err());
}

#[test]
fn compiled_text_prints_byte_for_byte_and_packages_survive_printing() {
    for name in ["control_flow", "stateful", "every_dtype"] {
        let path = format!("{TESTDATA}/{name}.mlmodelc/model.mil");
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            print_program(&parse_program(&text, &path).unwrap()),
            text,
            "{name}"
        );
    }
    for name in ["control_flow", "stateful", "flexible"] {
        let model = open(&format!("{name}.mlpackage"));
        let program = model.program().unwrap();
        assert_eq!(
            parse_program(&print_program(program), name).unwrap(),
            *program,
            "{name}"
        );
    }
}

#[test]
fn packages_of_ios_18_print_in_the_dialect_of_bare_scalars_and_older_ones_do_not() {
    for (name, beginning) in [
        ("control_flow", "program(1.0)\n"),
        ("flexible", "program(1.0)\n"),
        ("stateful", "program(1.3)\n"),
    ] {
        let text = print_program(open(&format!("{name}.mlpackage")).program().unwrap());
        assert!(text.starts_with(beginning), "{name}: {}", &text[..20]);
        assert_eq!(
            text.contains("tensor<string, []>"),
            beginning == "program(1.0)\n",
            "{name}"
        );
    }
}

#[test]
fn memory_gives_the_same_model_as_the_disk() {
    let mut files = BTreeMap::new();
    for file in [
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    ] {
        let bytes = std::fs::read(format!("{TESTDATA}/stateful.mlpackage/{file}")).unwrap();
        files.insert(format!("models/stateful.mlpackage/{file}"), Bytes::from(bytes));
    }
    let memory = Model::open_source(Source::memory(files), "models/stateful.mlpackage/").unwrap();
    let disk = open("stateful.mlpackage");
    assert_eq!(memory.name(), "stateful");
    assert_eq!(memory.description(), disk.description());
    assert_eq!(memory.program(), disk.program());
    assert_eq!(memory.content_size_bytes(), 864);
    assert_eq!(same_program(&memory, &disk), Ok(()));
}

#[test]
fn descriptions_tell_states_flexible_shapes_and_metadata() {
    let stateful = open("stateful.mlpackage");
    let main = &stateful.description().functions[0];
    let FeatureType::State(cache) = &main.states[0].ty else {
        panic!("{:?}", main.states)
    };
    assert_eq!((cache.dtype, cache.shape.as_slice()), (DType::Fp16, &[1, 16][..]));
    assert_eq!(stateful.description().metadata.author, "candle-coreml");
    assert_eq!(stateful.description().specification_version, 9);
    let flexible = open("flexible.mlpackage");
    let FeatureType::MultiArray(x) = &flexible.description().functions[0].inputs[0].ty else {
        panic!()
    };
    assert_eq!(x.shape, [2, 3]);
    assert_eq!(
        x.flexibility,
        Flexibility::Ranges(vec![(1, Some(8)), (3, Some(3))])
    );
    let input = &flexible.program().unwrap().functions[0].inputs[0];
    assert_eq!(input.ty.tensor().unwrap().shape, [Dim::Unknown, Dim::Fixed(3)]);
}

#[test]
fn packed_weights_come_out_of_the_file_as_they_are() {
    let model = open("stateful.mlpackage");
    let op = &model.program().unwrap().functions[0].body.operations[0];
    let candle_coreml_mil::Argument::Value(indices) = &op.input("indices").unwrap()[0] else {
        panic!()
    };
    let bytes = model.tensor_bytes(indices).unwrap().unwrap();
    assert_eq!(bytes.len(), 16 * 8 / 2);
    let file = std::fs::read(format!(
        "{TESTDATA}/stateful.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    ));
    assert_eq!(bytes, file.unwrap()[128..192]);
    let ValueData::Blob(blob) = &indices.data else {
        panic!("{indices:?}")
    };
    let error = model
        .blob(blob, &TensorType::fixed(DType::Uint8, &[64]))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("weight.bin: blob at offset 64: holds uint4"),
        "{error}"
    );
}

#[test]
fn weights_that_coremltools_wrote_are_read_whatever_their_type() {
    let model = open("every_dtype.mlmodelc");
    let ops = &model.program().unwrap().functions[0].body.operations;
    assert_eq!(ops.len(), 2 * 14);
    for pair in ops.chunks_exact(2) {
        let bytes =
            |op: &candle_coreml_mil::Operation| model.tensor_bytes(op.attribute("val").unwrap()).unwrap();
        assert_eq!(bytes(&pair[0]), bytes(&pair[1]), "{}", pair[0].outputs[0].name);
    }
}

#[test]
fn saved_packages_hold_the_same_program_and_equal_files_each_time() {
    let folder = std::env::temp_dir().join(format!("candle-coreml-save-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for name in [
        "control_flow.mlpackage",
        "control_flow.mlmodelc",
        "stateful.mlpackage",
        "flexible.mlpackage",
    ] {
        let model = open(name);
        let (first, second) = (folder.join("first.mlpackage"), folder.join("second.mlpackage"));
        model.save_package(&first).unwrap();
        let saved = Model::open(&first).unwrap();
        assert_eq!(same_program(&model, &saved), Ok(()), "{name}");
        assert_eq!(model.description(), saved.description(), "{name}");
        model.save_package(&second).unwrap();
        let spec = "Data/com.apple.CoreML/model.mlmodel";
        assert_eq!(
            std::fs::read(first.join(spec)).unwrap(),
            std::fs::read(second.join(spec)).unwrap(),
            "{name}"
        );
        assert!(
            model.save_package(&first).is_err(),
            "an existing package is not overwritten"
        );
        std::fs::remove_dir_all(&first).unwrap();
        std::fs::remove_dir_all(&second).unwrap();
    }
    // The two biases of zeros are one weight now.
    let (model, path) = (open("stateful.mlpackage"), folder.join("s.mlpackage"));
    model.save_package(&path).unwrap();
    assert!(Model::open(&path).unwrap().content_size_bytes() < model.content_size_bytes());
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn an_unfinished_package_leaves_nothing_behind() {
    let folder = std::env::temp_dir().join(format!("candle-coreml-unfinished-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let program = open("stateful.mlpackage").program().unwrap().clone();
    let description = Description::from_program(&program);
    let path = folder.join("a.mlpackage");
    let start = || PackageWriter::create(&path).unwrap();
    let mut writer = start();
    writer
        .weight(&TensorType::fixed(DType::Fp16, &[1]), &[0, 0])
        .unwrap();
    drop(writer);
    let error = start().finish(&program, &description).unwrap_err().to_string();
    assert!(
        error.contains("no weight was written for @model_path/weights/weight.bin at 64"),
        "{error}"
    );
    let mut broken = program.clone();
    broken.functions[0].body.outputs.push("nothing".to_string());
    assert!(start().finish(&broken, &description).is_err());
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    std::fs::remove_dir_all(&folder).unwrap();
}
