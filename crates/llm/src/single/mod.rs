//! Models in one package: with states that take any number of tokens, and without states, computing their window anew.

mod stateful;
mod stateless;

use candle_core::{DType, Device, Tensor};
use candle_coreml_mil::{ArrayDescription, Feature, Flexibility, FunctionDescription};

use crate::Error;
use crate::part::head::{Head, Vocabulary};
use crate::part::interface::{Role, array, float_dtype};
pub(crate) use stateful::Stateful;
pub(crate) use stateless::Stateless;

/// What a bundle says about its only package.
#[derive(Debug, Clone, Default)]
pub(crate) struct PackageFacts {
    /// Tokens a conversation may have, where the bundle says so.
    pub(crate) context: Option<usize>,
    /// Tokens the checkpoint was made for, where neither bundle nor package bounds them.
    pub(crate) positions: Option<usize>,
    pub(crate) vocabulary: Vocabulary,
}

/// An input of the package with what it takes.
#[derive(Debug, Clone)]
struct Input {
    name: String,
    array: ArrayDescription,
    role: Role,
}

/// The inputs with their roles.
fn read_inputs(part: &str, function: &FunctionDescription) -> Result<Vec<Input>, Error> {
    let mut inputs = Vec::new();
    for feature in &function.inputs {
        let array = array(feature).map_err(|what| wrong(part, function, what))?;
        match Role::of(&feature.name).or_else(|| lone_ids(function, feature)) {
            Some(role) => inputs.push(Input {
                name: feature.name.clone(),
                array: array.clone(),
                role,
            }),
            None if feature.optional => {}
            None => {
                let (name, known) = (&feature.name, Role::known());
                let what = format!("no role is known for the input `{name}`; known: {known}");
                return Err(wrong(part, function, what));
            }
        }
    }
    if find(&inputs, Role::Ids).is_none() {
        let what = format!(
            "an input of token ids [1, tokens] is needed, found {}",
            crate::part::interface::names(&function.inputs)
        );
        return Err(wrong(part, function, what));
    }
    Ok(inputs)
}

/// The inputs with their roles, and how many tokens a call takes.
fn read_tokens(part: &str, function: &FunctionDescription) -> Result<(Vec<Input>, Sizes), Error> {
    let inputs = read_inputs(part, function)?;
    let tokens = find(&inputs, Role::Ids).and_then(|ids| Sizes::of(&ids.array, 0));
    let tokens =
        tokens.ok_or_else(|| wrong(part, function, "token ids [1, tokens] are needed".to_owned()))?;
    Ok((inputs, tokens))
}

/// The head with the size of its vocabulary.
fn read_head(
    part: &str,
    function: &FunctionDescription,
    facts: &PackageFacts,
) -> Result<(Head, usize), Error> {
    let head = Head::read(part, function, &facts.vocabulary)?;
    let vocabulary = head.vocabulary(part, function, &facts.vocabulary)?;
    Ok((head, vocabulary))
}

/// What each input is given, as a prediction takes it.
fn named<'a>(inputs: &'a [Input], feeds: &'a [Tensor]) -> Vec<(&'a str, &'a Tensor)> {
    let names = inputs.iter().map(|input| input.name.as_str());
    names.zip(feeds).collect()
}

/// The only input of a package is its token ids, whatever its name.
fn lone_ids(function: &FunctionDescription, feature: &Feature) -> Option<Role> {
    let ids = array(feature).is_ok_and(|a| a.shape.len() == 2 && float_dtype(a.dtype).is_none());
    (function.inputs.len() == 1 && ids).then_some(Role::Ids)
}

/// The least of the limits there are, with its name.
fn least<const N: usize>(
    limits: [(Option<usize>, &'static str); N],
    facts: &PackageFacts,
) -> Option<(usize, &'static str)> {
    let given = limits.into_iter().filter_map(|(limit, why)| Some((limit?, why)));
    let least = given.min_by_key(|(limit, _)| *limit);
    least.or_else(|| Some((facts.positions?, "max_position_embeddings of config.json")))
}

fn find(inputs: &[Input], role: Role) -> Option<&Input> {
    inputs.iter().find(|input| input.role == role)
}

fn wrong(part: &str, function: &FunctionDescription, what: String) -> Error {
    Error::Wiring {
        part: part.to_owned(),
        function: function.name.clone(),
        what,
    }
}

/// Sizes an axis may have.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Sizes {
    /// These, in rising order.
    Some(Vec<usize>),
    /// From the first to the second, which may be open.
    Range(usize, Option<usize>),
}

impl Sizes {
    /// The sizes of the axis `from_end` places before the last.
    fn of(array: &ArrayDescription, from_end: usize) -> Option<Self> {
        let axis = |shape: &[usize]| shape.len().checked_sub(1 + from_end);
        let at = |shape: &Vec<usize>| shape.get(axis(shape)?).copied();
        match &array.flexibility {
            Flexibility::Fixed => Some(Sizes::Some(vec![at(&array.shape)?])),
            Flexibility::Enumerated(shapes) => {
                let mut sizes: Vec<usize> = shapes.iter().chain([&array.shape]).filter_map(at).collect();
                sizes.sort_unstable();
                sizes.dedup();
                Some(Sizes::Some(sizes))
            }
            Flexibility::Ranges(ranges) => {
                let index = ranges.len().checked_sub(1 + from_end)?;
                let (low, high) = *ranges.get(index)?;
                Some(Sizes::Range(low, high))
            }
        }
    }

    /// The largest; `None` where there is no end.
    fn most(&self) -> Option<usize> {
        match self {
            Sizes::Some(sizes) => sizes.last().copied(),
            Sizes::Range(_, high) => *high,
        }
    }

    /// The smallest that is `wanted` or more.
    fn at_least(&self, wanted: usize) -> Option<usize> {
        match self {
            Sizes::Some(sizes) => sizes.iter().copied().find(|&size| size >= wanted),
            Sizes::Range(low, high) => {
                let size = wanted.max(*low);
                high.is_none_or(|high| size <= high).then_some(size)
            }
        }
    }

    /// The largest that is `wanted` or less.
    fn at_most(&self, wanted: usize) -> Option<usize> {
        match self {
            Sizes::Some(sizes) => sizes.iter().rev().copied().find(|&size| size <= wanted),
            Sizes::Range(low, high) => {
                let size = high.map_or(wanted, |high| wanted.min(high));
                (size >= *low).then_some(size)
            }
        }
    }
}

/// Positions `start..end` in the shape [1, n] or [n], as the input has it.
fn positions(input: &Input, start: usize, end: usize) -> Result<Tensor, Error> {
    let numbers: Vec<i32> = (start..end)
        .map(|p| i32::try_from(p).unwrap_or(i32::MAX))
        .collect();
    let count = numbers.len();
    let tensor = Tensor::from_vec(numbers, count, &Device::Cpu)?;
    shaped(&tensor, input.array.shape.len())
}

/// Ones for `seen` tokens and zeros up to `slots`, as masks that say which tokens are there.
fn presence(input: &Input, seen: usize, slots: usize) -> Result<Tensor, Error> {
    let ones: Vec<f32> = (0..slots).map(|slot| f32::from(u8::from(slot < seen))).collect();
    let tensor = Tensor::from_vec(ones, slots, &Device::Cpu)?;
    let tensor = match float_dtype(input.array.dtype).is_none() {
        true => tensor.to_dtype(DType::I64)?,
        false => tensor,
    };
    shaped(&tensor, input.array.shape.len())
}

/// `tensor` with axes of 1 before it until its rank is `rank`.
fn shaped(tensor: &Tensor, rank: usize) -> Result<Tensor, Error> {
    let mut tensor = tensor.clone();
    while tensor.rank() < rank {
        tensor = tensor.unsqueeze(0)?;
    }
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found_near_what_is_wanted() {
        let some = Sizes::Some(vec![1, 16, 64]);
        let range = Sizes::Range(2, Some(8));
        let open = Sizes::Range(1, None);
        for (sizes, wanted, below, above) in [
            (&some, 1, Some(1), Some(1)),
            (&some, 20, Some(16), Some(64)),
            (&some, 65, Some(64), None),
            (&range, 1, None, Some(2)),
            (&range, 5, Some(5), Some(5)),
            (&range, 9, Some(8), None),
            (&open, 999, Some(999), Some(999)),
        ] {
            assert_eq!(sizes.at_most(wanted), below, "{sizes:?} {wanted}");
            assert_eq!(sizes.at_least(wanted), above, "{sizes:?} {wanted}");
        }
    }
}
