//! What inputs and outputs of packages are for, read from their descriptions: roles by name, arrays, shapes.

use candle_core::DType;
use candle_coreml_mil::{
    self as mil, ArrayDescription, Feature, FeatureType, Flexibility, FunctionDescription,
};

use crate::Error;

/// Roles of inputs by the names converters give them, in lower case and without underscores. Everything else about an
/// input (shape, dtype) is read from the package.
const ROLES: &[(&str, Role)] = &[
    ("hiddenstates", Role::Hidden),
    ("inputsembeds", Role::Hidden),
    ("inputembeds", Role::Hidden),
    ("inputids", Role::Ids),
    ("tokenids", Role::Ids),
    ("tokens", Role::Ids),
    ("positionids", Role::Positions),
    ("positions", Role::Positions),
    ("inputpos", Role::Positions),
    ("cacheposition", Role::Positions),
    ("causalmask", Role::Mask),
    ("attentionmask", Role::Mask),
    ("mask", Role::Mask),
    ("currentpos", Role::Current),
    ("currentposition", Role::Current),
    ("startpos", Role::Current),
    ("updatemask", Role::Update),
];

/// What an input is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Token ids.
    Ids,
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

impl Role {
    /// The role an input's name tells.
    pub(crate) fn of(name: &str) -> Option<Self> {
        let plain: String = name
            .chars()
            .filter(|&c| c != '_')
            .flat_map(char::to_lowercase)
            .collect();
        ROLES
            .iter()
            .find(|(known, _)| *known == plain)
            .map(|(_, role)| *role)
    }

    /// What comes in, for people.
    pub(crate) fn source(self) -> &'static str {
        match self {
            Role::Ids => "token ids",
            Role::Hidden => "hidden states",
            Role::Positions => "position of each token",
            Role::Mask => "mask of what each token sees",
            Role::Current => "position of the first token",
            Role::Update => "mask of the slots written",
        }
    }

    /// Names that are known, for errors.
    pub(crate) fn known() -> &'static str {
        "`hidden_states`, `input_ids`, `position_ids`, `causal_mask`, `attention_mask`, `current_pos`, `update_mask`"
    }
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

/// The tensor type of floats; `None` for other elements.
pub(crate) fn float_dtype(dtype: mil::DType) -> Option<DType> {
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

    #[test]
    fn roles_are_told_by_names_in_every_spelling() {
        for (name, role) in [
            ("input_ids", Some(Role::Ids)),
            ("inputIds", Some(Role::Ids)),
            ("causalMask", Some(Role::Mask)),
            ("attention_mask", Some(Role::Mask)),
            ("position_ids", Some(Role::Positions)),
            ("current_pos", Some(Role::Current)),
            ("hidden_states", Some(Role::Hidden)),
            ("mystery", None),
        ] {
            assert_eq!(Role::of(name), role, "{name}");
        }
    }
}
