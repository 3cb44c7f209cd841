//! Weights pass through the writer and the reader without being held in memory.

use std::io::Read;

use candle_coreml_mil::*;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const WEIGHT_BYTES: usize = 96 << 20;

#[test]
fn a_large_weight_is_written_shared_and_read_in_little_memory() {
    let folder = std::env::temp_dir().join(format!("candle-coreml-streaming-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (path, copy) = (folder.join("large.mlpackage"), folder.join("copy.mlpackage"));
    let ty = TensorType::fixed(DType::Int8, &[WEIGHT_BYTES]);
    let source = || std::io::repeat(7).take(WEIGHT_BYTES as u64);

    MEMORY.reset_peak_usage();
    let mut writer = PackageWriter::create(&path).unwrap();
    let weight = writer.weight_from(&ty, &mut source()).unwrap();
    assert_eq!(writer.weight_from(&ty, &mut source()).unwrap(), weight);
    let output = NamedType {
        name: "w".to_string(),
        ty: ValueType::Tensor(ty.clone()),
    };
    let op = Operation {
        op_type: "const".to_string(),
        outputs: vec![output],
        attributes: vec![("val".to_string(), weight.clone())],
        ..Operation::default()
    };
    let body = Block {
        operations: vec![op],
        outputs: vec!["w".to_string()],
        ..Block::default()
    };
    let (name, opset) = ("main".to_string(), "CoreML8".to_string());
    let main = Function {
        name,
        opset,
        inputs: Vec::new(),
        attributes: Vec::new(),
        body,
    };
    let program = Program {
        functions: vec![main],
        ..Program::default()
    };
    writer
        .finish(&program, &Description::from_program(&program))
        .unwrap();

    let model = Model::open(&path).unwrap();
    model.save_package(&copy).unwrap();
    let saved = Model::open(&copy).unwrap();
    assert_eq!(same_program(&model, &saved), Ok(()));
    assert_eq!(saved.content_size_bytes(), 128 + WEIGHT_BYTES as u64);
    assert_eq!(saved.tensor_bytes(&weight).unwrap().unwrap().last(), Some(&7));
    let peak = MEMORY.peak_usage();
    assert!(peak < WEIGHT_BYTES / 10, "{peak} bytes at the peak");
    std::fs::remove_dir_all(&folder).unwrap();
}
