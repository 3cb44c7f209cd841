//! Golden cases on two engines: `compare_engines [FOLDER]`.
//!
//! Each case of the portable engine's golden files becomes a package on disk, runs on CoreML.framework (where there is one)
//! and on the portable engine, and both results are compared. Off Apple systems the packages run on the portable engine alone.
//! What Core ML has no inputs or outputs for (truth values, small integers, no dimensions, states) is counted and left out.

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, CoreMLModelBuilder, EngineKind, Error, Source};
use candle_coreml_mil::Model;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

type Failure = Box<dyn std::error::Error>;

/// Largest difference allowed, as a part of the largest result: Core ML may compute in fp16.
const ALLOWED: f32 = 2e-2;

fn main() -> Result<(), Failure> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../portable/testdata/golden");
    let folder = std::env::args().nth(1).unwrap_or_else(|| default.to_string());
    let work = std::env::temp_dir().join(format!("compare-engines-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for file in files(Path::new(&folder))? {
        let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&file)?)?;
        for row in &rows {
            let verdict = match compare(row, &work) {
                Ok(verdict) => verdict,
                Err(error) => {
                    println!("{} ({}): {error}", text(row, "op"), text(row, "name"));
                    "different or failed"
                }
            };
            *counts.entry(verdict).or_insert(0) += 1;
        }
    }
    std::fs::remove_dir_all(&work)?;
    for (verdict, count) in &counts {
        println!("{count} {verdict}");
    }
    match counts.get("different or failed") {
        None => Ok(()),
        Some(count) => Err(format!("{count} cases differ or failed").into()),
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        files.push(entry?.path());
    }
    files.sort();
    Ok(files)
}

fn text<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_default()
}

/// Runs one case; says what came of it.
fn compare(row: &Value, work: &Path) -> Result<&'static str, Failure> {
    let fits = |key: &str| {
        row[key].as_array().is_some_and(|tensors| {
            tensors.iter().all(|t| {
                let rank = t["shape"].as_array().map_or(0, Vec::len);
                matches!(text(t, "dtype"), "fp16" | "fp32" | "int32") && (1..=5).contains(&rank)
            })
        })
    };
    if row.get("states").is_some() || !fits("inputs") || !fits("outputs") {
        return Ok("left out");
    }
    let files = [("case.mlmodelc/model.mil".to_string(), program(row).into())];
    let file = Model::open_source(Source::memory(files.into()), "case.mlmodelc")?;
    let package = work.join("case.mlpackage");
    if package.exists() {
        std::fs::remove_dir_all(&package)?;
    }
    file.save_package(&package)?;
    let portable = open(&package, EngineKind::Portable)?;
    let given = inputs(row)?;
    let given: Vec<(&str, &Tensor)> = given
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let wanted = portable.predict(&given)?;
    let apple = match open(&package, EngineKind::Apple) {
        Ok(apple) => apple,
        Err(Error::EngineUnavailable { .. }) => return Ok("run on the portable engine alone"),
        Err(error) => return Err(error.into()),
    };
    let found = apple.predict(&given)?;
    for name in wanted.names() {
        check(name, &found.tensor(name)?, &wanted.tensor(name)?)?;
    }
    Ok("the same on both engines")
}

fn open(package: &Path, engine: EngineKind) -> Result<CoreMLModel, Error> {
    CoreMLModelBuilder::new(package).engine(engine).load()
}

fn program(row: &Value) -> String {
    let tensors = |key: &str| row[key].as_array().cloned().unwrap_or_default();
    let parameter = |t: &Value| format!("tensor<{}, {}> {}", text(t, "dtype"), t["shape"], text(t, "name"));
    let parameters: Vec<String> = tensors("inputs").iter().map(parameter).collect();
    let names: Vec<String> = tensors("outputs")
        .iter()
        .map(|t| text(t, "name").to_string())
        .collect();
    format!(
        "program(1.3) {{ func main<{}>({}) {{ {} }} -> ({}); }}",
        text(row, "opset"),
        parameters.join(", "),
        text(row, "body"),
        names.join(", ")
    )
}

fn inputs(row: &Value) -> Result<Vec<(String, Tensor)>, Failure> {
    let mut inputs = Vec::new();
    for t in row["inputs"].as_array().ok_or("no inputs")? {
        let number = |v: &Value| v.as_f64().or_else(|| v.as_str()?.parse().ok()).ok_or("no number");
        let list = |key: &str| {
            t[key]
                .as_array()
                .ok_or("no list")?
                .iter()
                .map(number)
                .collect::<Result<Vec<f64>, _>>()
        };
        let shape: Vec<usize> = list("shape")?.into_iter().map(|d| d as usize).collect();
        let dtype = match text(t, "dtype") {
            "fp16" => DType::F16,
            "int32" => DType::I64,
            _ => DType::F32,
        };
        let tensor = Tensor::from_vec(list("data")?, shape, &Device::Cpu)?.to_dtype(dtype)?;
        inputs.push((text(t, "name").to_string(), tensor));
    }
    Ok(inputs)
}

fn check(name: &str, found: &Tensor, wanted: &Tensor) -> Result<(), Failure> {
    if found.dims() != wanted.dims() {
        return Err(format!("{name}: shape {:?}, not {:?}", found.dims(), wanted.dims()).into());
    }
    let numbers = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>();
    let (found, wanted) = (numbers(found)?, numbers(wanted)?);
    let most = wanted
        .iter()
        .filter(|v| v.is_finite())
        .fold(1.0f32, |m, v| m.max(v.abs()));
    let wrong =
        |(f, w): (&f32, &f32)| !(f == w || (f.is_nan() && w.is_nan()) || (f - w).abs() <= ALLOWED * most);
    match found.iter().zip(&wanted).position(wrong) {
        Some(at) => Err(format!("{name}: element {at} is {}, not {}", found[at], wanted[at]).into()),
        None => Ok(()),
    }
}
