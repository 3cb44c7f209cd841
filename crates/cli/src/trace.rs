//! `trace`: every value a program computes on its way, for whoever looks for the operation where a conversion goes wrong.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Tensor};
use candle_coreml::{CoreMLModel, TracedStep};
use serde::Serialize;

use crate::args::TraceArgs;
use crate::failure::{DONE, Failure, Outcome};
use crate::predict::file_name;
use crate::{inputs, npy, terminal};

/// What there is to know of one value.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    operation: &'static str,
    dtype: String,
    shape: Vec<usize>,
    min: f64,
    max: f64,
    mean: f64,
    nan: usize,
    inf: usize,
    overflow: usize,
}

pub fn run(args: &TraceArgs) -> Outcome {
    let model = inputs::open(&args.model, args.function.as_deref(), &args.engine)?;
    let values = inputs::read(&model, &args.inputs)?;
    let mut traced = Traced::new(args);
    let mut state = if model.states().is_empty() {
        None
    } else {
        Some(model.make_state()?)
    };
    let outputs = model.trace(&inputs::borrowed(&values), state.as_mut(), |step| {
        traced.see(step)
    });
    traced.finish()?;
    outputs?;
    traced.summary(&model)?;
    Ok(DONE)
}

/// Rows as they come; a value computed in parts is shown when its last part is.
struct Traced<'a> {
    args: &'a TraceArgs,
    pending: Option<TracedStep>,
    saved: Vec<(String, Tensor)>,
    /// How often a name was saved, so that the turns of a loop do not overwrite each other.
    seen: HashMap<String, usize>,
    shown: usize,
    overflow: Option<(String, usize)>,
    not_a_number: Option<String>,
    failure: Option<Failure>,
}

impl<'a> Traced<'a> {
    fn new(args: &'a TraceArgs) -> Self {
        Traced {
            args,
            pending: None,
            saved: Vec::new(),
            seen: HashMap::new(),
            shown: 0,
            overflow: None,
            not_a_number: None,
            failure: None,
        }
    }

    fn see(&mut self, mut step: TracedStep) {
        if let Some(before) = self.pending.take() {
            if before.name == step.name {
                step.overflows += before.overflows;
            } else {
                self.put(before);
            }
        }
        self.pending = Some(step);
    }

    fn put(&mut self, step: TracedStep) {
        if self.failure.is_none()
            && let Err(failure) = self.show(step)
        {
            self.failure = Some(failure);
        }
    }

    fn show(&mut self, step: TracedStep) -> Result<(), Failure> {
        let many = step.values.len() > 1;
        for (index, (tensor, dtype)) in step.values.into_iter().zip(step.dtypes).enumerate() {
            let name = if many {
                format!("{}.{index}", step.name)
            } else {
                step.name.clone()
            };
            let overflow = if index == 0 { step.overflows } else { 0 };
            let row = row(name, step.operation, dtype.to_string(), &tensor, overflow)?;
            if row.overflow > 0 && self.overflow.is_none() {
                self.overflow = Some((row.name.clone(), row.overflow));
            }
            if row.nan > 0 && self.not_a_number.is_none() {
                self.not_a_number = Some(row.name.clone());
            }
            if self
                .args
                .only
                .as_ref()
                .is_some_and(|text| !row.name.contains(text))
            {
                continue;
            }
            self.print(&row)?;
            if self.args.output.is_some() {
                let count = self.seen.entry(row.name.clone()).or_insert(0);
                *count += 1;
                let name = if *count == 1 {
                    row.name
                } else {
                    format!("{}@{count}", row.name)
                };
                self.saved.push((name, tensor));
            }
        }
        Ok(())
    }

    fn print(&mut self, row: &Row) -> Result<(), Failure> {
        let mut out = terminal::out();
        if self.args.json {
            writeln!(out, "{}", serde_json::to_string(row)?)?;
        } else {
            if self.shown == 0 {
                let head = format!(
                    "{:<40} {:<14} {:<20} {:>11} {:>11} {:>11} {:>6} {:>6} {:>8}",
                    "value", "operation", "type", "min", "max", "mean", "NaN", "inf", "overflow"
                );
                writeln!(out, "{}", terminal::styled(terminal::STRONG, head))?;
            }
            let ty = format!("{} {:?}", row.dtype, row.shape);
            let line = format!(
                "{:<40} {:<14} {ty:<20} {:>11.4e} {:>11.4e} {:>11.4e} {:>6} {:>6} {:>8}",
                row.name, row.operation, row.min, row.max, row.mean, row.nan, row.inf, row.overflow
            );
            let line = if row.nan + row.overflow > 0 {
                terminal::styled(terminal::BAD, line)
            } else {
                line
            };
            writeln!(out, "{line}")?;
        }
        self.shown += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Failure> {
        if let Some(last) = self.pending.take() {
            self.put(last);
        }
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        let Some(place) = &self.args.output else {
            return Ok(());
        };
        save(place, &self.saved)
    }

    fn summary(&self, model: &CoreMLModel) -> Result<(), Failure> {
        if self.args.json {
            return Ok(());
        }
        terminal::note(&format!(
            "{} values of function {:?}",
            self.shown,
            model.function().name
        ));
        match &self.overflow {
            Some((name, count)) => {
                terminal::note(&format!("fp16 overflows first in {name:?}: {count} values"))
            }
            None => terminal::note("no value is beyond what fp16 holds"),
        }
        if let Some(name) = &self.not_a_number {
            terminal::note(&format!("NaN comes first in {name:?}"));
        }
        Ok(())
    }
}

fn row(
    name: String,
    operation: &'static str,
    dtype: String,
    tensor: &Tensor,
    overflow: usize,
) -> Result<Row, Failure> {
    let values: Vec<f64> = tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
    let numbers = || values.iter().copied().filter(|v| !v.is_nan());
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let count = finite().count();
    Ok(Row {
        name,
        operation,
        dtype,
        shape: tensor.dims().to_vec(),
        min: numbers().reduce(f64::min).unwrap_or(f64::NAN),
        max: numbers().reduce(f64::max).unwrap_or(f64::NAN),
        mean: finite().sum::<f64>() / count as f64,
        nan: values.len() - numbers().count(),
        inf: values.iter().filter(|v| v.is_infinite()).count(),
        overflow,
    })
}

fn save(place: &Path, values: &[(String, Tensor)]) -> Result<(), Failure> {
    if place.extension().is_some_and(|ending| ending == "npz") {
        return npy::write_npz(place, values);
    }
    std::fs::create_dir_all(place).map_err(|e| Failure::new(format!("{}: {e}", place.display())))?;
    for (name, tensor) in values {
        npy::write_npy(&place.join(format!("{}.npy", file_name(name))), tensor)?;
    }
    Ok(())
}
