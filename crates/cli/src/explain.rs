//! `explain`: the plan that runs.

use std::io::Write;

use crate::args::ExplainArgs;
use crate::failure::{DONE, Outcome};
use crate::{inputs, terminal};

pub fn run(args: &ExplainArgs) -> Outcome {
    let model = inputs::open(&args.model, args.function.as_deref(), &args.engine)?;
    write!(terminal::out(), "{}", model.explain()?)?;
    Ok(DONE)
}
