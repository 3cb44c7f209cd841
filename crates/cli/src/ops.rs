//! `ops`: which operators a model uses, and which of them the portable engine lacks.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use candle_coreml_mil as mil;
use serde_json::json;

use crate::failure::{DONE, Failure, LACKING, Outcome};
use crate::model_facts;
use crate::terminal::{self, BAD, FAINT, GOOD, styled};

pub fn run(path: &Path, json: bool) -> Outcome {
    let model = mil::Model::open(path)?;
    let mil::ModelKind::Program = &model.description().kind else {
        let mil::ModelKind::Other(kind) = &model.description().kind else {
            return Ok(DONE);
        };
        return Err(Failure::new(format!(
            "{}: a model of kind {kind} has no operators; ML Programs have",
            path.display()
        )));
    };
    let program = model
        .program()
        .ok_or_else(|| Failure::new(format!("{}: no program", path.display())))?;
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for function in &program.functions {
        for (operator, count) in model_facts::operators(&function.body) {
            *counts.entry(operator).or_insert(0) += count;
        }
    }
    let missing: Vec<&String> = counts.keys().filter(|operator| !portable_has(operator)).collect();
    let mut out = terminal::out();
    if json {
        writeln!(out, "{}", json!({ "operators": counts, "missing": missing }))?;
    } else {
        table(&mut out, &counts, &missing)?;
    }
    Ok(if missing.is_empty() { DONE } else { LACKING })
}

/// True when the portable engine knows the operator.
fn portable_has(operator: &str) -> bool {
    candle_coreml_portable::ops::spec(operator).is_some()
}

fn table(out: &mut impl Write, counts: &BTreeMap<String, usize>, missing: &[&String]) -> std::io::Result<()> {
    let mut rows: Vec<(&String, &usize)> = counts.iter().collect();
    rows.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), *name));
    for (name, count) in rows {
        let mark = if missing.contains(&name) {
            styled(BAD, "missing")
        } else {
            styled(GOOD, "ok")
        };
        writeln!(out, "{count:>7}  {name:<40} {mark}")?;
    }
    let total: usize = counts.values().sum();
    let verdict = match missing.len() {
        0 => "the portable engine has all of them".to_owned(),
        some => format!("the portable engine lacks {some}"),
    };
    writeln!(
        out,
        "{}",
        styled(
            FAINT,
            format!("{total} operations, {} operators; {verdict}", counts.len())
        )
    )
}
