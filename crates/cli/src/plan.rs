//! `plan`: what CoreML.framework runs where.

use std::io::Write;

use candle_coreml::{Error, compute_devices};

use crate::args::ExplainArgs;
use crate::failure::{DONE, Failure, Outcome};
use crate::{inputs, terminal};

pub fn run(args: &ExplainArgs) -> Outcome {
    let plan = inputs::builder(&args.model, args.function.as_deref(), &args.engine).compute_plan();
    let plan = plan.map_err(|error| match error {
        Error::EngineUnavailable { .. } => Failure::new(format!(
            "{error}; `candle-coreml explain` prints the plan of the portable engine"
        )),
        other => other.into(),
    })?;
    let mut out = terminal::out();
    // Systems before macOS 14 have no list.
    if let Ok(devices) = compute_devices() {
        let devices: Vec<String> = devices.iter().map(ToString::to_string).collect();
        writeln!(out, "devices: {}", devices.join(", "))?;
    }
    write!(out, "{plan}")?;
    Ok(DONE)
}
