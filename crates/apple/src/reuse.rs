//! Which arrays live from one prediction to the next.
//!
//! Objects cost microseconds each, copies of small arrays less. So small inputs are copied into arrays that stay, together
//! with the objects around them, and large ones are wrapped where they are for one call. Outputs whose shape is fixed are
//! written by Core ML into arrays that stay.

use crate::array::Element;
use candle_coreml_mil::{ArrayDescription, DType, Feature, FeatureType, Flexibility};

/// Inputs of up to this size together are copied. A copy of 1 MiB takes some 100 microseconds; a model with such inputs
/// computes for milliseconds.
pub const COPY_UP_TO_BYTES: usize = 1 << 20;

/// Sets of arrays kept for one function: prefill and decode shapes for a few threads.
pub const KEPT: usize = 8;

/// What tells one set of inputs from another: the names in their order, with element types and shapes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Key(Vec<(String, Element, Vec<usize>)>);

/// An input as far as reuse is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// The input's name.
    pub name: &'a str,
    /// Element type and shape of an array, nothing for values of other kinds.
    pub array: Option<(Element, &'a [usize], usize)>,
}

impl Key {
    /// The key of inputs that may be copied into arrays that stay; `None` where one is no array or they are large.
    pub fn of<'a>(inputs: impl Iterator<Item = Candidate<'a>>) -> Option<Key> {
        let mut total = 0usize;
        let key = inputs.map(|input| {
            let (element, shape, bytes) = input.array?;
            total = total.saturating_add(bytes);
            (total <= COPY_UP_TO_BYTES).then(|| (input.name.to_string(), element, shape.to_vec()))
        });
        key.collect::<Option<Vec<_>>>().map(Key)
    }

    /// True when inputs have this key; allocates nothing.
    pub fn matches<'a>(&self, inputs: impl ExactSizeIterator<Item = Candidate<'a>>) -> bool {
        let same = |((name, element, shape), input): (&(String, Element, Vec<usize>), Candidate<'_>)| {
            let array = input
                .array
                .is_some_and(|(e, s, _)| e == *element && s == shape.as_slice());
            array && input.name == name
        };
        inputs.len() == self.0.len() && self.0.iter().zip(inputs).all(same)
    }
}

/// Element type and shape of the array an output may be written into: where its shape is fixed and known.
pub fn backing(output: &Feature) -> Option<(Element, &[usize])> {
    match &output.ty {
        FeatureType::MultiArray(ArrayDescription {
            dtype,
            shape,
            flexibility: Flexibility::Fixed,
            ..
        }) if !shape.is_empty() => Some((element(*dtype)?, shape)),
        _ => None,
    }
}

/// The element type of multi-arrays declared so.
pub fn element(dtype: DType) -> Option<Element> {
    Some(match dtype {
        DType::Fp16 => Element::F16,
        DType::Fp32 => Element::F32,
        DType::Fp64 => Element::F64,
        DType::Int32 => Element::I32,
        DType::Int8 => Element::I8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input<'a>(name: &'a str, shape: &'a [usize]) -> Candidate<'a> {
        let bytes = 2 * shape.iter().product::<usize>();
        Candidate {
            name,
            array: Some((Element::F16, shape, bytes)),
        }
    }

    #[test]
    fn small_arrays_are_kept_by_name_type_and_shape() {
        let step = [input("hidden", &[1, 1, 64]), input("mask", &[1, 1, 1, 512])];
        let key = Key::of(step.into_iter()).unwrap();
        assert!(key.matches(step.into_iter()));
        let rows: [&[Candidate<'_>]; 5] = [
            &step[..1],
            &[step[1], step[0]],
            &[step[0], input("mask", &[1, 1, 1, 513])],
            &[step[0], input("musk", &[1, 1, 1, 512])],
            &[
                step[0],
                Candidate {
                    name: "mask",
                    array: None,
                },
            ],
        ];
        for row in rows {
            assert!(!key.matches(row.iter().copied()), "{row:?}");
        }
    }

    #[test]
    fn large_arrays_and_other_values_are_not_kept() {
        let half = COPY_UP_TO_BYTES / 4;
        let (fits, exceeds) = ([half], [half + 1]);
        assert!(Key::of([input("a", &fits), input("b", &fits)].into_iter()).is_some());
        assert!(Key::of([input("a", &fits), input("b", &exceeds)].into_iter()).is_none());
        let text = Candidate {
            name: "text",
            array: None,
        };
        assert!(Key::of([input("a", &fits), text].into_iter()).is_none());
    }

    #[test]
    fn only_outputs_of_a_fixed_known_shape_have_an_array_of_their_own() {
        let output = |dtype, shape: &[usize], flexibility| Feature {
            name: "y".into(),
            description: String::new(),
            ty: FeatureType::MultiArray(ArrayDescription {
                dtype,
                shape: shape.to_vec(),
                flexibility,
                default_value: None,
            }),
            optional: false,
        };
        let fixed = output(DType::Fp16, &[1, 8], Flexibility::Fixed);
        assert_eq!(backing(&fixed), Some((Element::F16, &[1, 8][..])));
        assert_eq!(backing(&output(DType::Fp16, &[], Flexibility::Fixed)), None);
        assert_eq!(
            backing(&output(DType::Fp16, &[1], Flexibility::Ranges(vec![(1, None)]))),
            None
        );
        assert_eq!(backing(&output(DType::Bool, &[1], Flexibility::Fixed)), None);
    }
}
