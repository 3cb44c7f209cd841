//! Which input of a chunk's function takes what, read from the package's own description.

use std::collections::BTreeMap;

use candle_core::DType;
use candle_coreml_mil::{ArrayDescription, Feature, FunctionDescription};

use crate::Error;
use crate::part::interface::{Place, Role, array, float_dtype, names};

/// What inputs of other names stand for: the name in the package, the name by convention.
pub(crate) type Renamed = BTreeMap<String, String>;

/// One function of a chunk, wired.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Step {
    /// The inputs in the order of the package, with what each takes.
    pub(crate) inputs: Vec<(Place, Role)>,
    /// Name of the output with the hidden states; `None` where it gives logits or nothing that is used.
    pub(crate) output: Option<String>,
    /// Tokens a call takes.
    pub(crate) rows: usize,
    /// Width of the hidden states it takes; `None` for token ids.
    pub(crate) hidden: Option<usize>,
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
    pub(crate) fn read(part: &str, function: &FunctionDescription, renamed: &Renamed) -> Result<Self, Error> {
        let wrong = |what| Error::Wiring {
            part: part.to_owned(),
            function: function.name.clone(),
            what,
        };
        let inputs = read_inputs(function, renamed).map_err(wrong)?;
        let shape_of = |wanted: Role| {
            let found = inputs.iter().find(|(_, role)| *role == wanted);
            found.map(|(place, _)| place.shape())
        };
        let (rows, hidden) = match (shape_of(Role::Hidden), shape_of(Role::Ids)) {
            (Some(&[_, rows, hidden]), None) if rows > 0 => (rows, Some(hidden)),
            (None, Some(&[_, rows])) if rows > 0 => (rows, None),
            (hidden, ids) => {
                return Err(wrong(format!(
                    "an input `hidden_states` [1, tokens, width] or `input_ids` [1, tokens] is needed, found {:?}",
                    hidden.or(ids)
                )));
            }
        };
        let (width, mask_dtype) = read_mask(function, &inputs, rows).map_err(wrong)?;
        let output = match hidden {
            Some(_) => Some(hidden_output(function).map_err(wrong)?),
            None => None,
        };
        Ok(Step {
            inputs,
            output,
            rows,
            hidden,
            width,
            mask_dtype,
        })
    }
}

/// Every input with its role: by the bundle's word, by name, or by shape where only one thing has it.
fn read_inputs(function: &FunctionDescription, renamed: &Renamed) -> Result<Vec<(Place, Role)>, String> {
    let told = |input: &Feature| Role::of(renamed.get(&input.name).unwrap_or(&input.name));
    let mut taken: Vec<Role> = function.inputs.iter().filter_map(told).collect();
    let mut inputs = Vec::new();
    for input in &function.inputs {
        let array = array(input)?;
        match told(input).or_else(|| by_shape(array, &taken)) {
            Some(role) => {
                taken.push(role);
                inputs.push((Place::new(&input.name, &array.shape), role));
            }
            None if input.optional => {}
            None => {
                let (name, known) = (&input.name, Role::known());
                return Err(format!("no role is known for the input `{name}`; known: {known}"));
            }
        }
    }
    Ok(inputs)
}

/// Floats of rank 3 are hidden states, floats of rank 4 a mask, where no other input is.
fn by_shape(array: &ArrayDescription, taken: &[Role]) -> Option<Role> {
    float_dtype(array.dtype)?;
    let role = match array.shape.len() {
        3 if !taken.contains(&Role::Ids) => Role::Hidden,
        4 => Role::Mask,
        _ => return None,
    };
    (!taken.contains(&role)).then_some(role)
}

/// Slots and element type of the mask.
fn read_mask(
    function: &FunctionDescription,
    inputs: &[(Place, Role)],
    rows: usize,
) -> Result<(usize, DType), String> {
    let place = inputs
        .iter()
        .find(|(_, role)| *role == Role::Mask)
        .map(|(place, _)| place);
    let place = place.ok_or("an input `causal_mask` is needed")?;
    let width = match place.shape() {
        [.., mask_rows, width] if *mask_rows == rows && *width > 0 => *width,
        shape => {
            let name = place.name();
            return Err(format!("`{name}` is {shape:?}, needed: [1, 1, {rows}, slots]"));
        }
    };
    let input = function.inputs.iter().find(|input| input.name == place.name());
    let dtype = input.and_then(|input| array(input).ok()).map(|array| array.dtype);
    let floats = dtype.and_then(float_dtype);
    let floats = floats.ok_or_else(|| {
        let held = dtype.map(|dtype| dtype.to_string()).unwrap_or_default();
        format!("`{}` holds {held}, needed: floats", place.name())
    })?;
    Ok((width, floats))
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
        Step::read("x_FFN.mlpackage", &infer, &Renamed::new())
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
        assert_eq!(
            (step.rows, step.width, step.output.as_deref()),
            (1, 32, Some("out"))
        );
        assert_eq!(step.hidden, Some(8));
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
                "an input `hidden_states` [1, tokens, width] or `input_ids`",
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
