//! Times predictions of one model for a program that compares engines: `timed MODEL INPUT.npy OUTPUT.npy THREADS NUMERICS`.
//!
//! The function's only input gets INPUT, its only output is compared with OUTPUT. A line of JSON tells what opening and the
//! first prediction took; then each number N read from standard input makes N predictions and gives a line with the
//! milliseconds of each. An empty line gives the peak memory.

use candle_core::{Device, Tensor};
use candle_coreml::{CoreMLModel, CoreMLModelBuilder, EngineKind, Numerics};
use std::error::Error;
use std::io::BufRead;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, input, output, threads, numerics] = arguments.as_slice() else {
        return Err("timed MODEL INPUT.npy OUTPUT.npy THREADS NUMERICS".into());
    };
    let (input, wanted) = (Tensor::read_npy(input)?, Tensor::read_npy(output)?);
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
    let got = predict(&model, &input)?;
    let first = milliseconds(start);
    let error = ((&got - &wanted)?.sqr()?.sum_all()?.to_scalar::<f32>()?
        / wanted.sqr()?.sum_all()?.to_scalar::<f32>()?)
    .sqrt();
    println!("{{\"load_ms\": {loaded:.3}, \"first_ms\": {first:.3}, \"error\": {error:e}}}");
    for line in std::io::stdin().lock().lines() {
        match line?.trim().parse::<usize>() {
            Ok(count) => {
                let mut times = Vec::new();
                for _ in 0..count {
                    let start = Instant::now();
                    predict(&model, &input)?;
                    times.push(milliseconds(start));
                }
                println!("{times:?}");
            }
            Err(_) => println!("{}", peak_kilobytes()?),
        }
    }
    Ok(())
}

fn predict(model: &CoreMLModel, input: &Tensor) -> Result<Tensor, Box<dyn Error>> {
    Ok(model.forward(&[input])?.to_device(&Device::Cpu)?)
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
