//! The label and the probabilities of a classifier. Source: coremltools 9.0, `mil/ops/defs/iOS15/classify.py`.

use crate::array::Label;
use crate::constant::{Const, ConstData};
use crate::error::OpResult;
use crate::item::Item;
use crate::lower::OpCx;
use crate::op::{OpSpec, Support, req};
use candle_coreml_mil::{DType, Value, ValueData};
use std::sync::Arc;

/// `classify(probabilities [*, f32], classes list of n strings or integers)`: the class of the largest probability, the
/// first of them where there are several, and every class with its probability.
fn lower_classify(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let classes = labels(cx.written("classes").ok_or("classes must be constant")?)?;
    let p = cx.value("probabilities")?;
    let count = cx.shape(p).iter().product::<usize>();
    if count != classes.len() || count == 0 {
        return Err(format!("{} classes for {count} probabilities", classes.len()).into());
    }
    cx.needs_values("probabilities")?;
    let values = cx.floats("probabilities")?.unwrap_or_default();
    let best = (0..count).fold(0, |best, i| if values[i] > values[best] { i } else { best });
    match &classes[best] {
        Label::Text(text) => {
            let label = Const::new(DType::String, &[], ConstData::Strings([text.clone()].into()));
            let label = cx.add_const(label);
            cx.result(label)?;
        }
        Label::Number(n) => cx.result_item(Item::Number(*n))?,
    }
    let pairs: Vec<(Label, f64)> = classes
        .into_iter()
        .zip(values.into_iter().map(f64::from))
        .collect();
    cx.result_item(Item::Dictionary(Arc::from(pairs)))
}

/// The classes of a list, or of a tensor of strings.
fn labels(value: &Value) -> OpResult<Vec<Label>> {
    match &value.data {
        ValueData::List(each) => {
            let all = each.iter().map(labels).collect::<OpResult<Vec<Vec<Label>>>>()?;
            Ok(all.into_iter().flatten().collect())
        }
        ValueData::Strings(texts) => Ok(texts.iter().cloned().map(Label::Text).collect()),
        ValueData::Tensor(bytes) => match value.ty.tensor().map(|t| t.dtype) {
            Some(DType::Int64) => {
                let eight = |b: &[u8]| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
                Ok(bytes.chunks_exact(8).map(|b| Label::Number(eight(b))).collect())
            }
            Some(dtype) if crate::op::is_integer(dtype) => {
                let all = crate::constant::decode_i32(dtype, bytes, bytes.len());
                Ok(all.into_iter().map(|n| Label::Number(n.into())).collect())
            }
            _ => Err("classes must be strings or integers".into()),
        },
        _ => Err("classes must be a list of strings or integers".into()),
    }
}

/// This file's rows.
pub const OPS: &[&OpSpec] = &[&OpSpec {
    name: "classify",
    family: "classify",
    since: "iOS15",
    inputs: &[req("probabilities"), req("classes")],
    outputs: Some(2),
    support: Support::Full,
    tolerance: 0.0,
    lower: lower_classify,
}];
