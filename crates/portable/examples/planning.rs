//! What opening and planning cost: `planning [STATEFUL_PACKAGE]`.
//!
//! Without a package: one load and first prediction of a model with one operation. With one that has the inputs `inputIds`
//! and `causalMask` (a language model with states): a plan for each of many lengths, as in decoding token by token.

use candle_coreml_kernels::Pool;
use candle_coreml_mil::{Model as File, Source};
use candle_coreml_portable::lower::{Constants, LowerOptions, Lowered, lower};
use candle_coreml_portable::plan::Plan;
use candle_coreml_portable::{Array, Data, Model, Options, passes};
use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

const ONE_OPERATION: &str = r#"program(1.3) { func main<ios18>(tensor<fp32, [2, 3]> x) {
    tensor<fp32, [2, 3]> y = relu(x = x); } -> (y); }"#;

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1) {
        Some(path) => stateful(&path),
        None => one_operation(),
    }
}

fn one_operation() -> Result<(), Box<dyn Error>> {
    let data = Data::F32(&[1.0, -1.0, 2.0, -2.0, 3.0, -3.0]);
    let shape = &[2, 3];
    for round in 0..5 {
        let start = Instant::now();
        let files = [(
            "m.mlmodelc/model.mil".to_string(),
            ONE_OPERATION.to_string().into(),
        )];
        let file = Arc::new(File::open_source(Source::memory(files.into()), "m.mlmodelc")?);
        let read = start.elapsed();
        let model = Model::load(file, None, Options::default())?;
        let loaded = start.elapsed();
        model.predict(&[("x", Array { shape, data })], None)?;
        println!(
            "round {round}: read {read:?}, loaded {loaded:?}, predicted {:?}",
            start.elapsed()
        );
    }
    Ok(())
}

fn stateful(path: &str) -> Result<(), Box<dyn Error>> {
    let file = File::open(path)?;
    let function = &file.program().ok_or("no program")?.functions[0];
    let options = LowerOptions {
        faithful: false,
        fast: false,
        pool: Pool::shared(),
        constants: Arc::new(Constants::default()),
    };
    let mut best = [Duration::MAX; 3];
    let mut first = None;
    for k in 64..104 {
        let shapes = HashMap::from([
            ("inputIds", [1, 1].as_slice().into()),
            ("causalMask", [1, 1, 1, k].as_slice().into()),
        ]);
        let start = Instant::now();
        let Lowered::Whole(graph) = lower(&file, function, &shapes, &options)? else {
            return Err("the function runs in stages".into());
        };
        let lowered = start.elapsed();
        let graph = passes::optimize(graph, options.arithmetic(false), 2);
        let optimized = start.elapsed();
        let plan = Plan::new(&graph)?;
        let times = [lowered, optimized - lowered, start.elapsed() - optimized];
        first.get_or_insert((times, plan.steps.len()));
        for (best, time) in best.iter_mut().zip(times) {
            *best = (*best).min(time);
        }
    }
    println!("first: lower, passes, plan {:?}", first);
    println!("best:  lower, passes, plan {best:?}");
    Ok(())
}
