//! A model's description from what Core ML says about it.
//!
//! Core ML's descriptions come in dictionaries, which have no order, without default values and without the functions'
//! names. So the description read from the files is the one that counts, and Core ML's is what it is checked against, and
//! what stands in for it where the files cannot be read.

use crate::array::Element;
use crate::error::Error;
use crate::reuse;
use candle_coreml_mil::{ArrayDescription, DType, Feature, FeatureType, Flexibility, FunctionDescription};

/// The element type as descriptions write it.
pub fn dtype(element: Element) -> DType {
    match element {
        Element::F16 => DType::Fp16,
        Element::F32 => DType::Fp32,
        Element::F64 => DType::Fp64,
        Element::I32 => DType::Int32,
        Element::I8 => DType::Int8,
    }
}

/// A shape constraint as Core ML gives it: its kind (1 unspecified, 2 enumerated, 3 ranges), shapes, and ranges as
/// (smallest, number of sizes).
pub fn flexibility(kind: isize, shapes: Vec<Vec<usize>>, ranges: &[(usize, usize)]) -> Flexibility {
    match kind {
        2 if shapes.len() > 1 => Flexibility::Enumerated(shapes),
        3 if ranges.iter().any(|&(_, sizes)| sizes != 1) => {
            // An NSRange holds first and length; an upper bound beyond any array means there is none.
            let range = |&(low, sizes): &(usize, usize)| {
                let high = low.checked_add(sizes.saturating_sub(1));
                (low, high.filter(|&h| h < isize::MAX as usize / 2))
            };
            Flexibility::Ranges(ranges.iter().map(range).collect())
        }
        _ => Flexibility::Fixed,
    }
}

/// In the order of their names, since dictionaries have none.
pub fn sorted(mut features: Vec<Feature>) -> Vec<Feature> {
    features.sort_by(|a, b| a.name.cmp(&b.name));
    features
}

/// Refuses a loaded model whose features are not those of the description: a name, a kind, an element type or a shape.
///
/// # Errors
/// [`Error::Feature`] for the first that differs.
pub fn check(read: &FunctionDescription, loaded: &FunctionDescription) -> Result<(), Error> {
    let sides = [
        ("input", &read.inputs, &loaded.inputs),
        ("output", &read.outputs, &loaded.outputs),
        ("state", &read.states, &loaded.states),
    ];
    for (side, ours, theirs) in sides {
        for feature in ours {
            let found = theirs.iter().find(|f| f.name == feature.name);
            let found =
                found.ok_or_else(|| Error::feature(&feature.name, format!("Core ML has no such {side}")))?;
            if !agree(&feature.ty, &found.ty) {
                let problem = format!("the file declares {:?}, Core ML {:?}", feature.ty, found.ty);
                return Err(Error::feature(&feature.name, problem));
            }
        }
        if let Some(more) = theirs.iter().find(|f| ours.iter().all(|o| o.name != f.name)) {
            return Err(Error::feature(
                &more.name,
                format!("the file declares no such {side}"),
            ));
        }
    }
    Ok(())
}

/// True when both mean the same kind of value. Shapes are compared where both are known: Core ML fills in those of
/// outputs that a file leaves out.
fn agree(a: &FeatureType, b: &FeatureType) -> bool {
    use FeatureType::{Dictionary, Image, MultiArray, Sequence, State};
    let arrays = |a: &ArrayDescription, b: &ArrayDescription| {
        let known = !a.shape.is_empty() && !b.shape.is_empty();
        reuse::element(a.dtype) == reuse::element(b.dtype) && (!known || a.shape == b.shape)
    };
    match (a, b) {
        (MultiArray(a), MultiArray(b)) | (State(a), State(b)) => arrays(a, b),
        // Core ML does not say in which order the model wants colours, nor always what keys and elements are.
        (Image(a), Image(b)) => (a.width, a.height) == (b.width, b.height),
        (Dictionary { .. }, Dictionary { .. }) | (Sequence { .. }, Sequence { .. }) => true,
        (a, b) => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(name: &str, dtype: DType, shape: &[usize]) -> Feature {
        Feature {
            name: name.into(),
            description: String::new(),
            ty: FeatureType::MultiArray(ArrayDescription {
                dtype,
                shape: shape.to_vec(),
                flexibility: Flexibility::Fixed,
                default_value: None,
            }),
            optional: false,
        }
    }

    #[test]
    fn constraints_of_core_ml_become_flexible_shapes() {
        let shapes = vec![vec![1, 1], vec![1, 64]];
        let rows = [
            (1, vec![], vec![], Flexibility::Fixed),
            (2, shapes.clone(), vec![], Flexibility::Enumerated(shapes)),
            (2, vec![vec![1, 1]], vec![], Flexibility::Fixed),
            (3, vec![], vec![(1, 1), (4, 1)], Flexibility::Fixed),
            (
                3,
                vec![],
                vec![(1, 1), (1, 512)],
                Flexibility::Ranges(vec![(1, Some(1)), (1, Some(512))]),
            ),
            (
                3,
                vec![],
                vec![(1, isize::MAX as usize)],
                Flexibility::Ranges(vec![(1, None)]),
            ),
            (
                3,
                vec![],
                vec![(2, usize::MAX)],
                Flexibility::Ranges(vec![(2, None)]),
            ),
        ];
        for (kind, shapes, ranges, wanted) in rows {
            assert_eq!(flexibility(kind, shapes, &ranges), wanted);
        }
    }

    #[test]
    fn a_model_that_is_not_the_one_described_is_refused_by_name() {
        let function = |outputs| FunctionDescription {
            name: "main".into(),
            inputs: vec![array("x", DType::Fp16, &[1, 4])],
            outputs,
            states: vec![],
        };
        let read = function(vec![array("y", DType::Fp16, &[])]);
        let rows = [
            (vec![array("y", DType::Fp16, &[1, 4])], None),
            (
                vec![array("z", DType::Fp16, &[1, 4])],
                Some(r#""y": Core ML has no such output"#),
            ),
            (vec![array("y", DType::Fp32, &[1, 4])], Some("the file declares")),
            (
                vec![array("y", DType::Fp16, &[1]), array("z", DType::Fp16, &[1])],
                Some(r#""z": the file declares no such output"#),
            ),
        ];
        for (outputs, wanted) in rows {
            let found = check(&read, &function(outputs)).map_err(|e| e.to_string());
            match wanted {
                None => assert_eq!(found, Ok(())),
                Some(words) => assert!(found.clone().is_err_and(|e| e.contains(words)), "{found:?}"),
            }
        }
    }

    #[test]
    fn element_types_have_one_name_on_each_side() {
        for element in Element::ALL {
            assert_eq!(reuse::element(dtype(element)), Some(element));
        }
    }
}
