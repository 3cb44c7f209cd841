//! Every operator against numpy: the cases of `testdata/golden`, in four configurations.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_coreml_mil::{Model as File, Source};
use candle_coreml_portable::op::Support;
use candle_coreml_portable::{Array, Buffer, Data, Model, Numerics, Options, OwnedArray, ops};
use half::f16;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

/// Share of fp16 numbers' distance that rounding a result, or the intermediate values of a faithful run, may cost.
const HALF: f64 = 1.0 / 512.0;

/// How a case is run.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Optimised,
    Plain,
    /// fp16 rounded after every operation.
    Faithful,
    /// All inputs written into the program, so that everything is evaluated while it is lowered.
    Folded,
}

/// One use of an operator.
struct Case {
    family: String,
    row: Value,
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/golden")
}

fn cases() -> Vec<Case> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    let mut all = Vec::new();
    for file in files {
        let family = file.file_stem().unwrap().to_string_lossy().into_owned();
        let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        all.extend(rows.into_iter().map(|row| Case {
            family: family.clone(),
            row,
        }));
    }
    all
}

/// A tensor of a case.
struct Tensor<'a> {
    name: &'a str,
    dtype: &'a str,
    shape: Vec<usize>,
    data: Vec<f64>,
}

fn tensors<'a>(row: &'a Value, key: &str) -> Vec<Tensor<'a>> {
    let number = |v: &Value| v.as_f64().unwrap_or_else(|| v.as_str().unwrap().parse().unwrap());
    let list = |v: &Value| v.as_array().unwrap().iter().map(number).collect::<Vec<f64>>();
    row[key]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| Tensor {
            name: t["name"].as_str().unwrap(),
            dtype: t["dtype"].as_str().unwrap(),
            shape: list(&t["shape"]).into_iter().map(|d| d as usize).collect(),
            data: list(&t["data"]),
        })
        .collect()
}

impl Tensor<'_> {
    fn ty(&self) -> String {
        if self.shape.is_empty() {
            self.dtype.to_string()
        } else {
            format!("tensor<{}, {:?}>", self.dtype, self.shape)
        }
    }

    /// The elements as MIL text.
    fn literal(&self) -> String {
        let mut text = String::new();
        self.nest(&mut text, 0, 0);
        format!("{}({text})", self.ty())
    }

    fn nest(&self, out: &mut String, axis: usize, at: usize) {
        if axis == self.shape.len() {
            let v = self.data[at];
            let text = match self.dtype {
                "bool" => (v != 0.0).to_string(),
                d if d.starts_with("fp") => hex(v),
                _ => (v as i64).to_string(),
            };
            return out.push_str(&text);
        }
        let step: usize = self.shape[axis + 1..].iter().product();
        out.push('[');
        for i in 0..self.shape[axis] {
            if i > 0 {
                out.push_str(", ");
            }
            self.nest(out, axis + 1, at + i * step);
        }
        out.push(']');
    }

    fn is_half(&self) -> bool {
        self.dtype == "fp16"
    }
}

/// A number as MIL text writes it: hexadecimal, nothing lost.
fn hex(v: f64) -> String {
    if v.is_nan() {
        return "nan".into();
    }
    if v.is_infinite() {
        return if v > 0.0 { "inf" } else { "-inf" }.into();
    }
    let bits = (v as f32 as f64).to_bits();
    let (exponent, fraction) = ((bits >> 52) & 0x7FF, bits & ((1 << 52) - 1));
    let sign = if v.is_sign_negative() { "-" } else { "" };
    if exponent == 0 {
        return format!("{sign}0x0p+0");
    }
    format!("{sign}0x1.{fraction:013x}p{:+}", exponent as i64 - 1023)
}

/// The program's text; inputs are parameters or constants.
fn program(row: &Value, folded: bool) -> String {
    let inputs = tensors(row, "inputs");
    let mut parameters: Vec<String> = Vec::new();
    let mut body = String::new();
    for t in &inputs {
        if folded {
            let (ty, name) = (t.ty(), t.name);
            writeln!(body, "{ty} {name} = const()[val = {}];", t.literal()).unwrap();
        } else {
            parameters.push(format!("{} {}", t.ty(), t.name));
        }
    }
    if let Some(states) = row.get("states").and_then(Value::as_str) {
        parameters.insert(0, states.to_string());
    }
    body += row["body"].as_str().unwrap();
    let names: Vec<&str> = tensors(row, "outputs").iter().map(|t| t.name).collect();
    let opset = row["opset"].as_str().unwrap();
    format!(
        "program(1.3) {{ func main<{opset}>({}) {{ {body} }} -> ({}); }}",
        parameters.join(", "),
        names.join(", ")
    )
}

fn run(row: &Value, way: Way) -> Result<Vec<(String, OwnedArray)>, String> {
    let text = program(row, way == Way::Folded);
    let files = BTreeMap::from([("case.mlmodelc/model.mil".to_string(), text.into())]);
    let file = File::open_source(Source::memory(files), "case.mlmodelc").map_err(|e| e.to_string())?;
    let numerics = if way == Way::Faithful {
        Numerics::Faithful
    } else {
        Numerics::Default
    };
    let options = Options {
        numerics,
        passes: way != Way::Plain,
        ..Options::default()
    };
    let model = Model::load(Arc::new(file), None, options).map_err(|e| e.to_string())?;
    let inputs = tensors(row, "inputs");
    let given: Vec<Buffer> = inputs
        .iter()
        .map(|t| match t.dtype {
            "fp32" => Buffer::F32(t.data.iter().map(|&v| v as f32).collect()),
            "fp16" => Buffer::F16(t.data.iter().map(|&v| f16::from_f64(v)).collect()),
            _ => Buffer::I32(t.data.iter().map(|&v| v as i32).collect()),
        })
        .collect();
    let arrays = inputs
        .iter()
        .zip(&given)
        .filter(|_| way != Way::Folded)
        .map(|(t, b)| {
            let data = match b {
                Buffer::F32(v) => Data::F32(v),
                Buffer::F16(v) => Data::F16(v),
                Buffer::I32(v) => Data::I32(v),
                _ => unreachable!("inputs are numbers"),
            };
            let shape = &t.shape;
            (t.name, Array { shape, data })
        });
    let arrays: Vec<(&str, Array<'_>)> = arrays.collect();
    let mut state = model.make_state();
    model
        .predict(&arrays, Some(&mut state))
        .map_err(|e| e.to_string())
}

/// What is wrong with a result.
fn difference(want: &Tensor<'_>, got: &OwnedArray, tolerance: f64) -> Option<String> {
    if got.shape != want.shape {
        return Some(format!("shape {:?}, not {:?}", got.shape, want.shape));
    }
    let values: Vec<f64> = match &got.data {
        Buffer::F32(v) => v.iter().map(|&x| x.into()).collect(),
        Buffer::F16(v) => v.iter().map(|x| x.to_f64()).collect(),
        Buffer::I32(v) => v.iter().map(|&x| x.into()).collect(),
        Buffer::I64(v) => v.iter().map(|&x| x as f64).collect(),
        Buffer::Dictionary(v) => v.iter().map(|(_, x)| *x).collect(),
        _ => return Some("a result that is not a number".into()),
    };
    // Sums may cancel: what counts is the size of the values around.
    let as_held = |v: &f64| match want.dtype {
        "fp16" => f16::from_f64(*v).to_f64(),
        "fp32" => f64::from(*v as f32),
        _ => *v,
    };
    let wanted: Vec<f64> = want.data.iter().map(as_held).collect();
    let finite = wanted.iter().filter(|v| v.is_finite());
    let typical = finite.clone().map(|v| v.abs()).sum::<f64>() / finite.count().max(1) as f64;
    let wrong = |(w, g): (&f64, &f64)| {
        let same = w == g || (w.is_nan() && g.is_nan());
        let near = (w - g).abs() <= tolerance * w.abs().max(typical);
        !same && !near
    };
    let at = wanted.iter().zip(&values).position(wrong)?;
    Some(format!("element {at} is {}, not {}", values[at], wanted[at]))
}

fn check(row: &Value, way: Way) -> Result<(), String> {
    let op = row["op"].as_str().unwrap();
    let spec = ops::spec(op).ok_or("the operator is in no list")?;
    let results = run(row, way)?;
    let half = tensors(row, "inputs").iter().any(Tensor::is_half);
    for want in tensors(row, "outputs") {
        let found = results.iter().find(|(n, _)| n == want.name);
        let (_, got) = found.ok_or_else(|| format!("no result {:?}", want.name))?;
        let rounding = if want.is_half() || (half && way == Way::Faithful) {
            HALF
        } else {
            0.0
        };
        if let Some(text) = difference(&want, got, f64::from(spec.tolerance) + rounding) {
            return Err(format!("{}: {text}", want.name));
        }
    }
    Ok(())
}

#[test]
fn every_case_gives_what_numpy_gives() {
    let mut failures = String::new();
    let (mut count, mut failed) = (0, 0);
    for case in cases() {
        for way in [Way::Optimised, Way::Plain, Way::Faithful, Way::Folded] {
            let half = tensors(&case.row, "outputs").iter().any(Tensor::is_half);
            let states = case.row.get("states").is_some();
            if (way == Way::Faithful && !half) || (way == Way::Folded && states) {
                continue;
            }
            count += 1;
            if let Err(text) = check(&case.row, way) {
                failed += 1;
                let (op, name) = (case.row["op"].as_str(), case.row["name"].as_str());
                let half = if half { " fp16" } else { "" };
                let (op, name) = (op.unwrap(), name.unwrap());
                writeln!(failures, "{}/{op} ({name}{half}) {way:?}: {text}", case.family).unwrap();
            }
        }
    }
    assert!(failed == 0, "{failed} of {count} runs differ:\n{failures}");
    assert!(count > 1000, "only {count} runs");
}

#[test]
fn an_operator_with_full_support_has_a_case() {
    let covered: BTreeSet<String> = cases()
        .iter()
        .map(|c| c.row["op"].as_str().unwrap().to_string())
        .collect();
    let rows = ops::FAMILIES.iter().flat_map(|f| f.iter());
    let bare: Vec<&str> = rows
        .filter(|s| s.support == Support::Full && !covered.contains(s.name))
        .map(|s| s.name)
        .collect();
    assert!(bare.is_empty(), "no golden case: {}", bare.join(", "));
}
