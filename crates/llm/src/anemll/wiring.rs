//! Which input of a chunk takes what, read from the package's own description.

use candle_core::DType;
use candle_coreml_mil::{
    self as mil, ArrayDescription, Feature, FeatureType, Flexibility, FunctionDescription,
};

use crate::Error;

/// Roles of a chunk's inputs by the names converters give them. Everything else about an input (shape, dtype) is read
/// from the package.
const ROLES: &[(&str, Role)] = &[
    ("hidden_states", Role::Hidden),
    ("position_ids", Role::Positions),
    ("causal_mask", Role::Mask),
    ("attention_mask", Role::Mask),
    ("current_pos", Role::Current),
    ("update_mask", Role::Update),
];

/// What an input of a chunk is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The hidden states of the embeddings or of the chunk before.
    Hidden,
    /// The position of every row.
    Positions,
    /// What every row may look at.
    Mask,
    /// The first position.
    Current,
    /// The slots of the cache that are written.
    Update,
}

/// An input's name and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    name: String,
    shape: Vec<usize>,
}

impl Place {
    pub(crate) fn new(name: &str, shape: &[usize]) -> Self {
        Place {
            name: name.to_owned(),
            shape: shape.to_vec(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }
}

/// One function of a chunk, wired.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step {
    /// The inputs in the order of the package, with what each takes.
    pub(crate) inputs: Vec<(Place, Role)>,
    /// Name of the output with the hidden states.
    pub(crate) output: String,
    /// Tokens a call takes.
    pub(crate) rows: usize,
    /// Slots of the cache, the width of the mask.
    pub(crate) width: usize,
    /// Element type of the mask.
    pub(crate) mask_dtype: DType,
}

impl Step {
    /// Reads the wiring of one function of the package `part`.
    ///
    /// # Errors
    /// [`Error::Wiring`] with the input that does not fit.
    pub(crate) fn read(part: &str, function: &FunctionDescription) -> Result<Self, Error> {
        let wrong = |what| Error::Wiring {
            part: part.to_owned(),
            function: function.name.clone(),
            what,
        };
        let mut inputs = Vec::new();
        let (mut hidden, mut mask) = (None, None);
        for input in &function.inputs {
            let array = array(input).map_err(wrong)?;
            let Some(role) = role(&input.name) else {
                if input.optional {
                    continue;
                }
                return Err(wrong(format!(
                    "no role is known for the input `{}`; known: {}",
                    input.name,
                    known()
                )));
            };
            match role {
                Role::Hidden => hidden = Some(array),
                Role::Mask => mask = Some((array, input)),
                _ => {}
            }
            inputs.push((Place::new(&input.name, &array.shape), role));
        }
        let rows = match hidden.map(|h| h.shape.as_slice()) {
            Some(&[_, rows, _]) if rows > 0 => rows,
            other => {
                return Err(wrong(format!(
                    "an input `hidden_states` [1, tokens, width] is needed, found {other:?}"
                )));
            }
        };
        let (mask, mask_input) = mask.ok_or_else(|| wrong("an input `causal_mask` is needed".to_owned()))?;
        let (width, fits) = match mask.shape.as_slice() {
            [.., mask_rows, width] => (*width, *mask_rows == rows && *width > 0),
            _ => (0, false),
        };
        if !fits {
            let shape = &mask.shape;
            return Err(wrong(format!(
                "`{}` is {shape:?}, needed: [1, 1, {rows}, slots]",
                mask_input.name
            )));
        }
        let mask_dtype = float_dtype(mask.dtype).ok_or_else(|| {
            wrong(format!(
                "`{}` holds {}, needed: floats",
                mask_input.name, mask.dtype
            ))
        })?;
        let output = hidden_output(function).map_err(wrong)?;
        Ok(Step {
            inputs,
            output,
            rows,
            width,
            mask_dtype,
        })
    }
}

/// The output with hidden states: the only one, or the one called so.
fn hidden_output(function: &FunctionDescription) -> Result<String, String> {
    let named = function
        .outputs
        .iter()
        .find(|o| o.name == "output_hidden_states" || o.name == "hidden_states");
    match (named, function.outputs.as_slice()) {
        (Some(output), _) | (None, [output]) => Ok(output.name.clone()),
        _ => Err(format!(
            "an output `output_hidden_states` is needed, found {}",
            names(&function.outputs)
        )),
    }
}

fn role(name: &str) -> Option<Role> {
    ROLES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, role)| *role)
}

fn known() -> String {
    ROLES
        .iter()
        .map(|(name, _)| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The only input of the embeddings or the head.
pub(crate) fn only_input<'a>(part: &str, function: &'a FunctionDescription) -> Result<&'a Feature, Error> {
    let mut needed = function.inputs.iter().filter(|input| !input.optional);
    match (needed.next(), needed.next()) {
        (Some(input), None) => Ok(input),
        _ => Err(Error::Wiring {
            part: part.to_owned(),
            function: function.name.clone(),
            what: format!("one input is needed, found {}", names(&function.inputs)),
        }),
    }
}

/// `a`, `b` for an error.
pub(crate) fn names(features: &[Feature]) -> String {
    if features.is_empty() {
        return "none".to_owned();
    }
    features
        .iter()
        .map(|f| format!("`{}`", f.name))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The array a feature holds.
pub(crate) fn array(feature: &Feature) -> Result<&ArrayDescription, String> {
    match &feature.ty {
        FeatureType::MultiArray(array) | FeatureType::State(array) => Ok(array),
        other => Err(format!("`{}` is {other:?}, needed: an array", feature.name)),
    }
}

/// True when `array` takes `shape`.
pub(crate) fn takes(array: &ArrayDescription, shape: &[usize]) -> bool {
    match &array.flexibility {
        Flexibility::Fixed => array.shape == shape,
        Flexibility::Enumerated(shapes) => array.shape == shape || shapes.iter().any(|s| s == shape),
        Flexibility::Ranges(ranges) => {
            ranges.len() == shape.len()
                && ranges
                    .iter()
                    .zip(shape)
                    .all(|(&(low, high), &n)| n >= low && high.is_none_or(|high| n <= high))
        }
    }
}

fn float_dtype(dtype: mil::DType) -> Option<DType> {
    match dtype {
        mil::DType::Fp16 => Some(DType::F16),
        mil::DType::Fp32 => Some(DType::F32),
        mil::DType::Fp64 => Some(DType::F64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anemll::toy::{feature, function};

    fn infer(change: impl FnOnce(&mut FunctionDescription)) -> Result<Step, Error> {
        let mut infer = function(
            "infer",
            &[
                ("hidden_states", &[1, 1, 8]),
                ("position_ids", &[1]),
                ("causal_mask", &[1, 1, 1, 32]),
            ],
            &[("out", &[1, 1, 8])],
        );
        change(&mut infer);
        Step::read("x_FFN.mlpackage", &infer)
    }

    #[test]
    fn wiring_follows_the_description() {
        let step = infer(|f| f.inputs.push(feature("current_pos", &[1]))).unwrap();
        let roles: Vec<_> = step
            .inputs
            .iter()
            .map(|(place, role)| (place.name(), *role))
            .collect();
        let expected = [
            ("hidden_states", Role::Hidden),
            ("position_ids", Role::Positions),
            ("causal_mask", Role::Mask),
            ("current_pos", Role::Current),
        ];
        assert_eq!(roles, expected);
        assert_eq!((step.rows, step.width, step.output.as_str()), (1, 32, "out"));
    }

    #[test]
    fn what_does_not_fit_is_named_with_part_and_function() {
        type Change = fn(&mut FunctionDescription);
        let cases: &[(Change, &str)] = &[
            (
                |f| f.inputs.push(feature("mystery", &[1])),
                "no role is known for the input `mystery`",
            ),
            (|f| f.inputs.truncate(2), "an input `causal_mask` is needed"),
            (
                |f| drop(f.inputs.remove(0)),
                "`hidden_states` [1, tokens, width] is needed",
            ),
            (
                |f| f.inputs[2] = feature("causal_mask", &[1, 1, 2, 32]),
                "`causal_mask` is [1, 1, 2, 32], needed: [1, 1, 1",
            ),
            (
                |f| f.outputs.push(feature("more", &[1])),
                "an output `output_hidden_states` is needed, found `out`, `more`",
            ),
        ];
        for (change, expected) in cases {
            let error = infer(change).unwrap_err().to_string();
            assert!(
                error.starts_with("x_FFN.mlpackage, function `infer`: "),
                "{error}"
            );
            assert!(error.contains(expected), "{error}");
        }
        let optional = |f: &mut FunctionDescription| {
            f.inputs.push(Feature {
                optional: true,
                ..feature("mystery", &[1])
            });
        };
        assert_eq!(infer(optional).unwrap().inputs.len(), 3);
    }
}
