//! Choices and loops. Source: coremltools 9.0, `mil/ops/defs/iOS15/control_flow.py`.
//!
//! A `cond` whose predicate is constant becomes part of the graph. Every other use is run by `crate::staged`, which asks
//! [`control`] what an operation is.

use crate::error::OpResult;
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, req};

/// How an operation runs its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// The first block where the parameter `pred` holds, the second where not.
    Choice,
    /// While the first block gives true, the second gives the next values of `loop_vars`.
    Loop,
}

/// What the operator `name` does with its blocks; `None` for operators without.
pub fn control(name: &str) -> Option<Control> {
    match name {
        "cond" => Some(Control::Choice),
        "while_loop" => Some(Control::Loop),
        _ => None,
    }
}

fn check_blocks(cx: &OpCx<'_, '_>, inputs: usize, outputs: [usize; 2]) -> OpResult<()> {
    let blocks = &cx.operation().blocks;
    if blocks.len() != 2 {
        return Err(format!("it has {} blocks, 2 are needed", blocks.len()).into());
    }
    for (i, (block, want)) in blocks.iter().zip(outputs).enumerate() {
        let have = (block.inputs.len(), block.outputs.len());
        if have != (inputs, want) {
            let text = format!(
                "block {i} has {} inputs and {} results, {inputs} and {want} are needed",
                have.0, have.1
            );
            return Err(text.into());
        }
    }
    Ok(())
}

fn lower_cond(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let results = cx.operation().outputs.len();
    check_blocks(cx, 0, [results; 2])?;
    let holds = cx.flag("pred", false)?;
    for id in cx.inline(usize::from(!holds))? {
        cx.result(id)?;
    }
    Ok(())
}

fn lower_while(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let results = cx.operation().outputs.len();
    let variables = cx.operation().input("loop_vars").map_or(0, <[_]>::len);
    if variables != results {
        return Err(format!("{variables} loop_vars give {results} results").into());
    }
    check_blocks(cx, results, [1, results])?;
    Err(crate::OpError::Dynamic("loop_vars".into()))
}

macro_rules! row {
    ($name:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "control_flow",
            since: "iOS15",
            inputs: $inputs,
            outputs: None,
            support: Support::Full,
            tolerance: 0.0,
            lower: $lower,
        }
    };
}

/// This file's rows.
pub const OPS: &[&OpSpec] = &[
    row!("cond", &[req("pred")], lower_cond),
    row!("while_loop", &[req("loop_vars")], lower_while),
];
