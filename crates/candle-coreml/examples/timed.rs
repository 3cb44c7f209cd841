//! Times predictions of one model for a program that compares engines: `timed MODEL INPUTS.npz OUTPUTS.npz THREADS NUMERICS`.
//!
//! The function gets the arrays of INPUTS by name, and its results are compared with those of OUTPUTS. A line of JSON tells what
//! opening and the first prediction took; then each number N read from standard input makes N predictions and gives a line
//! with the milliseconds of each. An empty line gives the peak memory.

use candle_core::Tensor;
use candle_coreml::{CoreMLModel, CoreMLModelBuilder, EngineKind, Numerics, Outputs};
use std::error::Error;
use std::io::BufRead;
use std::time::Instant;

type Arrays = Vec<(String, Tensor)>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, inputs, outputs, threads, numerics] = arguments.as_slice() else {
        return Err("timed MODEL INPUTS.npz OUTPUTS.npz THREADS NUMERICS".into());
    };
    let (inputs, wanted) = (Tensor::read_npz(inputs)?, Tensor::read_npz(outputs)?);
    let numerics = match numerics.as_str() {
        "fast" => Numerics::Fast,
        "faithful" => Numerics::Faithful,
        _ => Numerics::Default,
    };
    let start = Instant::now();
    let model = CoreMLModelBuilder::new(model)
        .engine(EngineKind::Portable)
        .threads(threads.parse()?)
        .numerics(numerics)
        .load()?;
    let loaded = milliseconds(start);
    let got = predict(&model, &inputs)?;
    let first = milliseconds(start);
    let error = error(&got, &wanted)?;
    println!("{{\"load_ms\": {loaded:.3}, \"first_ms\": {first:.3}, \"error\": {error:e}}}");
    for line in std::io::stdin().lock().lines() {
        match line?.trim().parse::<usize>() {
            Ok(count) => {
                let mut times = Vec::new();
                for _ in 0..count {
                    let start = Instant::now();
                    predict(&model, &inputs)?;
                    times.push(milliseconds(start));
                }
                println!("{times:?}");
            }
            Err(_) => println!("{}", peak_kilobytes()?),
        }
    }
    Ok(())
}

fn predict(model: &CoreMLModel, inputs: &Arrays) -> Result<Outputs, Box<dyn Error>> {
    let given: Vec<(&str, &Tensor)> = inputs
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    Ok(model.predict(&given)?)
}

/// The largest relative error among the results, in the Euclidean norm.
fn error(got: &Outputs, wanted: &Arrays) -> Result<f32, Box<dyn Error>> {
    let mut largest = 0.0;
    for (name, wanted) in wanted {
        let square = |tensor: Tensor| -> Result<f32, Box<dyn Error>> {
            Ok(tensor.sqr()?.sum_all()?.to_scalar::<f32>()?)
        };
        let difference = square((got.tensor(name)? - wanted)?)?;
        let relative = (difference / square(wanted.clone())?).sqrt();
        // A result that is not a number must not pass as the smaller one.
        if relative.is_nan() || relative > largest {
            largest = relative;
        }
    }
    Ok(largest)
}

fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// The most memory the process has had, as Linux counts it; 0 elsewhere.
fn peak_kilobytes() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    Ok(line.map_or(Ok(0), |l| l.trim().trim_end_matches(" kB").parse())?)
}
