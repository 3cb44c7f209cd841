//! `verify`: a model's outputs against a saved set.

use std::io::Write;

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, Dictionary, Value};
use serde::Serialize;

use crate::args::VerifyArgs;
use crate::failure::{DONE, FAILED, Failure, Outcome};
use crate::inputs::{self, Values};
use crate::predict::predict;
use crate::{npy, terminal};

const INPUTS: &str = "inputs/";
const OUTPUTS: &str = "outputs/";

/// How an output differs from the saved one.
#[derive(Debug, Serialize)]
struct Difference {
    output: String,
    ok: bool,
    /// Elements outside the tolerance.
    wrong: usize,
    elements: usize,
    /// The element that is farthest outside its tolerance.
    worst: Vec<usize>,
    got: f64,
    wanted: f64,
    largest_error: f64,
    /// Signal to noise, in decibels; absent when there is no error.
    snr_db: Option<f64>,
    /// Why the two cannot be compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

pub fn run(args: &VerifyArgs) -> Outcome {
    if args.atol.is_nan() || args.rtol.is_nan() || args.atol < 0.0 || args.rtol < 0.0 {
        return Err(Failure::usage("--atol and --rtol are numbers from 0 on"));
    }
    let model = inputs::open(&args.model, args.function.as_deref(), &args.engine)?;
    if args.record {
        record(&model, args)
    } else {
        verify(&model, args)
    }
}

fn record(model: &CoreMLModel, args: &VerifyArgs) -> Outcome {
    let values = inputs::read(model, &args.inputs)?;
    let outputs = predict(model, &values)?;
    let mut arrays = Vec::new();
    for (prefix, values) in [(INPUTS, values), (OUTPUTS, outputs)] {
        for (name, value) in values {
            arrays.push((format!("{prefix}{name}"), array(&name, value)?));
        }
    }
    npy::write_npz(&args.golden, &arrays)?;
    terminal::note(&format!("{}: {} arrays", args.golden.display(), arrays.len()));
    Ok(DONE)
}

fn verify(model: &CoreMLModel, args: &VerifyArgs) -> Outcome {
    let (values, wanted) = saved(model, args)?;
    let outputs = predict(model, &values)?;
    let mut differences = Vec::new();
    for (name, wanted) in wanted {
        let got = outputs.iter().find(|(n, _)| *n == name);
        let difference = match got {
            Some((_, value)) => compare(&name, &array(&name, value.clone())?, &wanted, args)?,
            None => refused(&name, "the model has no such output".to_owned()),
        };
        differences.push(difference);
    }
    let ok = differences.iter().all(|d| d.ok);
    let mut out = terminal::out();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&differences)?)?;
    } else {
        for difference in &differences {
            writeln!(out, "{}", line(difference))?;
        }
    }
    Ok(if ok { DONE } else { FAILED })
}

/// Inputs as the model takes them, and the outputs to compare with. Inputs of the command line replace saved ones.
fn saved(model: &CoreMLModel, args: &VerifyArgs) -> Result<(Values, Vec<(String, Tensor)>), Failure> {
    let mut values = inputs::read(model, &args.inputs)?;
    let mut wanted = Vec::new();
    for (name, tensor) in npy::read_all(&args.golden)? {
        if let Some(name) = name.strip_prefix(OUTPUTS) {
            wanted.push((name.to_owned(), tensor));
        } else if let Some(name) = name.strip_prefix(INPUTS)
            && values.iter().all(|(n, _)| n != name)
        {
            values.push((name.to_owned(), inputs::from_array(model, name, tensor)?));
        }
    }
    if wanted.is_empty() {
        return Err(Failure::new(format!(
            "{}: no arrays {OUTPUTS}NAME; `verify --record` makes a set",
            args.golden.display()
        )));
    }
    Ok((values, wanted))
}

/// A value as an array: numbers of dictionaries in the order of their labels, texts as UTF-8.
fn array(name: &str, value: Value) -> Result<Tensor, Failure> {
    let cpu = &Device::Cpu;
    let vector = |numbers: Vec<f64>| Tensor::new(numbers, cpu);
    Ok(match value {
        Value::Tensor(tensor) => tensor,
        Value::Image(image) => image.to_tensor()?,
        Value::String(text) => Tensor::new(text.as_bytes(), cpu)?,
        Value::Int64(number) => Tensor::new(&[number], cpu)?,
        Value::Double(number) => vector(vec![number])?,
        Value::Dictionary(Dictionary::Strings(pairs)) => vector(pairs.into_values().collect())?,
        Value::Dictionary(Dictionary::Integers(pairs)) => vector(pairs.into_values().collect())?,
        other => {
            return Err(Failure::new(format!(
                "{name}: {} cannot be saved as an array",
                other.kind()
            )));
        }
    })
}

fn refused(name: &str, reason: String) -> Difference {
    Difference {
        output: name.to_owned(),
        ok: false,
        wrong: 0,
        elements: 0,
        worst: Vec::new(),
        got: f64::NAN,
        wanted: f64::NAN,
        largest_error: f64::NAN,
        snr_db: None,
        reason: Some(reason),
    }
}

fn compare(name: &str, got: &Tensor, wanted: &Tensor, args: &VerifyArgs) -> Result<Difference, Failure> {
    if got.dims() != wanted.dims() {
        return Ok(refused(
            name,
            format!("its shape is {:?}, saved {:?}", got.dims(), wanted.dims()),
        ));
    }
    let numbers =
        |t: &Tensor| -> Result<Vec<f64>, Failure> { Ok(t.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?) };
    let (g, w) = (numbers(got)?, numbers(wanted)?);
    let judged = judge(&g, &w, args.atol, args.rtol);
    Ok(Difference {
        output: name.to_owned(),
        ok: judged.wrong == 0,
        wrong: judged.wrong,
        elements: g.len(),
        worst: place(judged.worst, got.dims()),
        got: g.get(judged.worst).copied().unwrap_or(f64::NAN),
        wanted: w.get(judged.worst).copied().unwrap_or(f64::NAN),
        largest_error: judged.largest,
        snr_db: judged.snr_db,
        reason: None,
    })
}

struct Judged {
    wrong: usize,
    worst: usize,
    largest: f64,
    snr_db: Option<f64>,
}

/// Equal numbers, infinities of one sign and two NaN are no error; a NaN beside a number is an infinite one.
fn judge(got: &[f64], wanted: &[f64], atol: f64, rtol: f64) -> Judged {
    let (mut wrong, mut worst, mut largest) = (0, 0, 0.0f64);
    let (mut excess, mut noise, mut signal) = (f64::NEG_INFINITY, 0.0, 0.0);
    for (i, (g, w)) in got.iter().zip(wanted).enumerate() {
        let same = g == w || (g.is_nan() && w.is_nan());
        let error = if same { 0.0 } else { (g - w).abs() };
        let error = if error.is_nan() { f64::INFINITY } else { error };
        let allowed = atol + rtol * w.abs();
        // Infinity less infinity is no number.
        let beyond = if error.is_infinite() {
            error
        } else {
            error - allowed
        };
        wrong += usize::from(beyond > 0.0);
        if beyond > excess {
            (excess, worst) = (beyond, i);
        }
        largest = largest.max(error);
        if w.is_finite() {
            signal += w * w;
            noise += error * error;
        }
    }
    Judged {
        wrong,
        worst,
        largest,
        snr_db: (noise > 0.0).then(|| 10.0 * (signal / noise).log10()),
    }
}

/// The coordinates of a flat index.
fn place(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut coordinates = vec![0; shape.len()];
    for (c, &n) in coordinates.iter_mut().zip(shape).rev() {
        *c = flat % n.max(1);
        flat /= n.max(1);
    }
    coordinates
}

fn line(d: &Difference) -> String {
    let (style, verdict) = if d.ok {
        (terminal::GOOD, "ok")
    } else {
        (terminal::BAD, "differs")
    };
    let verdict = terminal::styled(style, verdict);
    if let Some(reason) = &d.reason {
        return format!("{} {verdict}: {reason}", d.output);
    }
    let snr = d.snr_db.map_or("exact".to_owned(), |db| format!("{db:.1} dB"));
    format!(
        "{} {verdict}: {} of {} elements outside, largest error {:.3e}, signal to noise {snr}, worst at {:?}: {} instead of {}",
        d.output, d.wrong, d.elements, d.largest_error, d.worst, d.got, d.wanted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_judged_by_their_own_tolerance() {
        const INF: f64 = f64::INFINITY;
        const NAN: f64 = f64::NAN;
        // got, wanted, atol, rtol, elements outside, the worst
        struct Row(&'static [f64], &'static [f64], f64, f64, usize, usize);
        let rows = [
            Row(&[1.0, 2.0], &[1.0, 2.0], 0.0, 0.0, 0, 0),
            Row(&[1.0, 2.5], &[1.0, 2.0], 0.1, 0.1, 1, 1),
            Row(&[100.5, 0.5], &[100.0, 0.0], 0.1, 0.01, 1, 1),
            Row(&[1.05], &[1.0], 0.0, 0.1, 0, 0),
            Row(&[NAN, INF], &[NAN, INF], 0.0, 0.0, 0, 0),
            Row(&[0.0, NAN], &[0.0, 1.0], 1.0, 1.0, 1, 1),
            Row(&[-INF, 0.0], &[INF, 0.0], 1.0, 0.0, 1, 0),
            Row(&[0.0, 3.0], &[INF, 3.0], 0.0, 0.5, 1, 0),
        ];
        for Row(got, wanted, atol, rtol, wrong, worst) in rows {
            let judged = judge(got, wanted, atol, rtol);
            assert_eq!((judged.wrong, judged.worst), (wrong, worst), "{got:?} {wanted:?}");
        }
    }

    #[test]
    fn a_flat_index_has_coordinates() {
        assert_eq!(place(7, &[2, 3, 2]), [1, 0, 1]);
        assert!(place(0, &[]).is_empty());
    }
}
