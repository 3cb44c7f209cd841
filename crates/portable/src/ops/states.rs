//! Buffers that persist between predictions. Source: coremltools 9.0, `mil/ops/defs/iOS18/states.py`.

use crate::error::OpResult;
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, req};

fn lower_read_state(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let slot = cx.state("input")?;
    let now = cx.current_state(slot);
    let dtype = cx.dtype(now);
    let y = cx.same(now, dtype)?;
    cx.result(y)
}

fn lower_write_state(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let slot = cx.state("input")?;
    let data = cx.value("data")?;
    let now = cx.current_state(slot);
    let (have, want) = (cx.shape(data), cx.shape(now));
    if have != want {
        let text = format!(
            "data {:?} does not fit the state's {:?}",
            have.as_slice(),
            want.as_slice()
        );
        return Err(text.into());
    }
    cx.set_state(slot, data);
    Ok(())
}

fn lower_update_state(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let slot = cx.state("state")?;
    let value = cx.value("value")?;
    cx.set_state(slot, value);
    let dtype = cx.dtype(value);
    let y = cx.same(value, dtype)?;
    cx.result(y)
}

macro_rules! row {
    ($name:literal, $inputs:expr, $outputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "states",
            since: "iOS18",
            inputs: $inputs,
            outputs: Some($outputs),
            support: Support::Full,
            tolerance: 0.0,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!(
        "coreml_update_state",
        &[req("state"), req("value")],
        1,
        lower_update_state
    ),
    row!("read_state", &[req("input")], 1, lower_read_state),
    row!("write_state", &[req("input"), req("data")], 0, lower_write_state),
];
