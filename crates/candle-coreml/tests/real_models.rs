//! Core ML files that other people made, where they are at hand: every ML Program opens and runs, forms of one model agree.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, CoreMLModelBuilder, EngineKind, FeatureType};
use std::path::PathBuf;

fn folder() -> Option<PathBuf> {
    let shared = std::env::var_os("CANDLE_COREML_SHARED")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared")));
    let folder = shared.join("models/real");
    if !folder.is_dir() {
        println!("skipped: {} absent", folder.display());
        return None;
    }
    Some(folder)
}

fn open(path: PathBuf) -> CoreMLModel {
    CoreMLModelBuilder::new(path)
        .engine(EngineKind::Portable)
        .load()
        .unwrap()
}

/// Seeded noise under an envelope, the same for every call.
fn audio(count: usize) -> Vec<f32> {
    let mut s = 0x2545_F491_4F6C_DD1D_u64;
    (0..count)
        .map(|i| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            let noise = (s >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            let t = i as f32 / 16_000.0;
            0.02 * noise + 0.2 * (t * 2.0 * std::f32::consts::PI * 140.0).sin() * (t * 20.0).sin().abs()
        })
        .collect()
}

/// The probability of speech in each of 20 frames, the LSTM's state carried along, and the last state.
fn probabilities(model: &CoreMLModel) -> Vec<f32> {
    let signal = audio(64 + 512 * 20);
    let zeros = Tensor::zeros((1, 128), DType::F32, &Device::Cpu).unwrap();
    let (mut hidden, mut cell) = (zeros.clone(), zeros);
    let mut out = Vec::new();
    for frame in 0..20 {
        let part = &signal[frame * 512..frame * 512 + 576];
        let input = Tensor::from_slice(part, (1, 576), &Device::Cpu).unwrap();
        let inputs = [
            ("audio_input", &input),
            ("hidden_state", &hidden),
            ("cell_state", &cell),
        ];
        let result = model.predict(&inputs).unwrap();
        out.extend(
            result
                .tensor("vad_output")
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap(),
        );
        hidden = result.tensor("new_hidden_state").unwrap();
        cell = result.tensor("new_cell_state").unwrap();
    }
    out.extend(hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    out
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn package_and_compiled_form_of_one_model_agree_bit_for_bit() {
    let Some(folder) = folder() else { return };
    let package = probabilities(&open(folder.join("silero-vad-unified.mlpackage")));
    let compiled = probabilities(&open(folder.join("silero-vad-unified.mlmodelc")));
    let same = package
        .iter()
        .zip(&compiled)
        .all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same, "largest difference {}", worst(&package, &compiled));
}

/// The compressed compiled forms share the uncompressed one's network; the compressed packages are of another revision of it
/// and are compared among themselves.
#[test]
fn compressed_forms_agree_within_their_bits() {
    let Some(folder) = folder() else { return };
    // Half a step of 8 bits is 0.4% of a channel's largest weight, of 6-bit palettes about 1%, of 4-bit ones about 5%.
    let rows = [
        ("unified.mlmodelc", "int8.mlmodelc", 0.05),
        ("unified.mlmodelc", "palette_6bit.mlmodelc", 0.1),
        ("unified.mlmodelc", "palette_4bit.mlmodelc", 0.3),
        ("unified.mlmodelc", "pruned_int8.mlmodelc", 0.15),
        ("int8.mlpackage", "palette_6bit.mlpackage", 0.01),
        ("int8.mlpackage", "palette_4bit.mlpackage", 0.01),
        ("int8.mlpackage", "pruned_int8.mlpackage", 0.01),
    ];
    let mut failures = Vec::new();
    for (reference, compressed, limit) in rows {
        let file = |name: &str| probabilities(&open(folder.join(format!("silero-vad-{name}"))));
        let (a, b) = (file(reference), file(compressed));
        let error = worst(&a[..20], &b[..20]);
        println!(
            "{compressed} against {reference}: largest error of a probability {error:.4}, of a state {:.4}",
            worst(&a, &b)
        );
        if error.is_nan() || error > limit {
            failures.push(format!("{compressed}: {error} is above {limit}"));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn every_ml_program_opens_and_runs_on_zeros() {
    let Some(folder) = folder() else { return };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    for pair in std::fs::read_dir(folder.join("compiler-pairs")).unwrap() {
        let pair = pair.unwrap().path();
        paths.extend([pair.join("input.mlmodel"), pair.join("expected-macos.mlmodelc")]);
    }
    let (mut ran, mut failures) = (0, Vec::new());
    for path in paths {
        let name = path.display().to_string();
        let is_model = [".mlpackage", ".mlmodelc", ".mlmodel"]
            .iter()
            .any(|e| name.ends_with(e));
        // The classical models are no ML Programs: they must be refused by name.
        let classical = ["iris.mlmodel", "sleep-calculator.mlmodel", "mnist-cnn.mlmodel"]
            .iter()
            .any(|e| name.ends_with(e));
        if !is_model {
            continue;
        }
        match CoreMLModelBuilder::new(&path).engine(EngineKind::Portable).load() {
            Ok(_) if classical => failures.push(format!("{name} opened")),
            Ok(model) => match run_on_zeros(&model) {
                Ok(()) => ran += 1,
                Err(e) => failures.push(format!("{name}: {e}")),
            },
            Err(e) if classical && e.to_string().contains("ML Program") => {}
            Err(e) => failures.push(format!("{name}: {e}")),
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(ran >= 20, "{ran} models ran");
}

fn run_on_zeros(model: &CoreMLModel) -> Result<(), candle_coreml::Error> {
    let mut inputs = Vec::new();
    for feature in model.inputs() {
        if let FeatureType::MultiArray(array) = &feature.ty {
            let dtype = if array.dtype.is_float() {
                DType::F32
            } else {
                DType::I64
            };
            inputs.push((
                feature.name.clone(),
                Tensor::zeros(array.shape.as_slice(), dtype, &Device::Cpu).unwrap(),
            ));
        }
    }
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let outputs = model.predict(&inputs)?;
    assert_eq!(outputs.len(), model.outputs().len());
    Ok(())
}
