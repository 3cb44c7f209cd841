//! Where a prediction's time goes: `profile MODEL [FUNCTION] [THREADS] [fast]`, for the default shapes and zeros as inputs.

use candle_coreml_kernels::Pool;
use candle_coreml_mil::{Model as File, ValueType};
use candle_coreml_portable::{Array, Data, Done, Model, Numerics, Observer, Options};
use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

/// Least time of each step over all runs.
#[derive(Default)]
struct Times {
    at: usize,
    steps: Vec<(Duration, String)>,
}

impl Observer for Times {
    fn wants_results(&self) -> bool {
        false
    }

    fn after(&mut self, done: &Done<'_>) {
        if let Some(known) = self.steps.get_mut(self.at) {
            known.0 = known.0.min(done.elapsed);
        } else {
            let shapes: Vec<_> = done
                .step
                .inputs
                .iter()
                .map(|i| i.layout.shape.as_slice())
                .collect();
            let text = format!("{:?} {shapes:?}", done.step.op);
            self.steps.push((done.elapsed, text));
        }
        self.at += 1;
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments
        .first()
        .ok_or("profile MODEL [FUNCTION] [THREADS] [fast]")?;
    let threads = arguments.get(2).map_or(Ok(2), |t| t.parse())?;
    let file = Arc::new(File::open(path)?);
    let options = Options {
        pool: Some(Pool::new(threads)),
        numerics: if arguments.get(3).is_some_and(|word| word == "fast") {
            Numerics::Fast
        } else {
            Numerics::Default
        },
        ..Options::default()
    };
    let model = Model::load(file.clone(), arguments.get(1).map(String::as_str), options)?;
    let function = file
        .program()
        .and_then(|p| p.function(model.name()))
        .ok_or("no function")?;
    let shapes = model.default_shapes().ok_or("the shapes are open")?;
    let tensors = function.inputs.iter().filter_map(|i| {
        Some((i.name.as_str(), i.ty.tensor()?)).filter(|_| matches!(i.ty, ValueType::Tensor(_)))
    });
    let (mut floats, mut integers) = (Vec::new(), Vec::new());
    let most = shapes
        .iter()
        .map(|s| s.iter().product::<usize>())
        .max()
        .unwrap_or(0);
    floats.resize(most, 0.5f32);
    integers.resize(most, 0);
    let inputs: Vec<(&str, Array<'_>)> = tensors
        .zip(&shapes)
        .map(|((name, ty), shape)| {
            let count = shape.iter().product();
            let data = if ty.dtype.is_float() {
                Data::F32(&floats[..count])
            } else {
                Data::I32(&integers[..count])
            };
            (name, Array { shape, data })
        })
        .collect();
    let mut times = Times::default();
    let mut state = model.make_state();
    for _ in 0..30 {
        times.at = 0;
        model.observe(&inputs, Some(&mut state), &mut times)?;
    }
    let mut kinds: BTreeMap<&str, (Duration, usize)> = BTreeMap::new();
    let mut steps = times.steps.clone();
    steps.sort();
    for (time, text) in steps.iter().rev().take(40) {
        println!("{:9.1} us  {text}", time.as_secs_f64() * 1e6);
    }
    for (time, text) in &times.steps {
        let kind = text.split(['[', '(', ' ', '{']).next().unwrap_or_default();
        let entry = kinds.entry(kind).or_default();
        *entry = (entry.0 + *time, entry.1 + 1);
    }
    println!();
    let total: Duration = times.steps.iter().map(|s| s.0).sum();
    for (kind, (time, count)) in kinds {
        println!("{:9.1} us in {count:4} {kind}", time.as_secs_f64() * 1e6);
    }
    println!("{:9.1} us in all", total.as_secs_f64() * 1e6);
    Ok(())
}
