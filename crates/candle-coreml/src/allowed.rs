//! What a feature accepts: the test for shapes, and the words for messages.

use candle_coreml_mil::{ArrayDescription, ColorSpace, Feature, FeatureType, Flexibility, ImageDescription};

/// True when `shape` is one the description allows. A description without a shape allows every shape.
pub(crate) fn allows(default: &[usize], flexibility: &Flexibility, shape: &[usize]) -> bool {
    match flexibility {
        Flexibility::Fixed => default.is_empty() || shape == default,
        Flexibility::Enumerated(shapes) => shape == default || shapes.iter().any(|s| s == shape),
        Flexibility::Ranges(ranges) => {
            ranges.len() == shape.len()
                && ranges
                    .iter()
                    .zip(shape)
                    .all(|(&(low, high), &n)| n >= low && high.is_none_or(|h| n <= h))
        }
    }
}

/// The allowed shapes for a message: `[1, 64]`, `one of [1, 1], [1, 64]`, `[1, 1..=512, 3..]`.
pub(crate) fn shapes(default: &[usize], flexibility: &Flexibility) -> String {
    match flexibility {
        Flexibility::Fixed if default.is_empty() => "any shape".to_string(),
        Flexibility::Fixed => format!("{default:?}"),
        Flexibility::Enumerated(shapes) => {
            let listed = shapes.iter().any(|s| s == default) || default.is_empty();
            let all = (!listed)
                .then_some(default)
                .into_iter()
                .chain(shapes.iter().map(Vec::as_slice));
            format!(
                "one of {}",
                all.map(|s| format!("{s:?}")).collect::<Vec<_>>().join(", ")
            )
        }
        Flexibility::Ranges(ranges) => {
            let dims = ranges.iter().map(|&(low, high)| match high {
                Some(high) if high == low => low.to_string(),
                Some(high) => format!("{low}..={high}"),
                None => format!("{low}.."),
            });
            format!("[{}]", dims.collect::<Vec<_>>().join(", "))
        }
    }
}

/// What a feature takes, with its article: `a tensor fp16 [1, 64]`.
pub(crate) fn kind(ty: &FeatureType) -> String {
    match ty {
        FeatureType::MultiArray(array) | FeatureType::State(array) => array_kind(array),
        FeatureType::Image(image) => image_kind(image),
        FeatureType::Int64 => "an integer".to_string(),
        FeatureType::Double => "a double".to_string(),
        FeatureType::String => "a string".to_string(),
        FeatureType::Dictionary { integer_keys } => {
            format!(
                "a dictionary with {} keys",
                if *integer_keys { "integer" } else { "string" }
            )
        }
        FeatureType::Sequence { integer_elements } => {
            format!(
                "a sequence of {}",
                if *integer_elements { "integers" } else { "strings" }
            )
        }
    }
}

/// A feature with its name and what it takes: `"x" (a tensor fp16 [1, 64])`.
pub(crate) fn named(feature: &Feature) -> String {
    format!("{:?} ({})", feature.name, kind(&feature.ty))
}

fn array_kind(array: &ArrayDescription) -> String {
    format!(
        "a tensor {} {}",
        array.dtype,
        shapes(&array.shape, &array.flexibility)
    )
}

fn image_kind(image: &ImageDescription) -> String {
    let layout = match image.color {
        ColorSpace::Grayscale => "an 8-bit grey",
        ColorSpace::GrayscaleFp16 => "a 16-bit grey",
        ColorSpace::Rgb | ColorSpace::Bgr => "an RGB",
    };
    let size = shapes(&[image.height, image.width], &image.flexibility);
    format!("{layout} image of height and width {size}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use Flexibility::*;

    #[test]
    fn shapes_are_allowed_as_described_and_described_as_allowed() {
        let enumerated = || Enumerated(vec![vec![1, 1], vec![1, 64]]);
        let ranges = || Ranges(vec![(1, Some(1)), (1, Some(512)), (3, None)]);
        type Row<'a> = (&'a [usize], Flexibility, &'a str, &'a [usize], bool);
        let rows: [Row<'_>; 13] = [
            (&[1, 64], Fixed, "[1, 64]", &[1, 64], true),
            (&[1, 64], Fixed, "[1, 64]", &[64], false),
            (&[], Fixed, "any shape", &[5, 5], true),
            (&[1, 1], enumerated(), "one of [1, 1], [1, 64]", &[1, 64], true),
            (&[1, 1], enumerated(), "one of [1, 1], [1, 64]", &[1, 2], false),
            (
                &[1, 7],
                enumerated(),
                "one of [1, 7], [1, 1], [1, 64]",
                &[1, 7],
                true,
            ),
            (&[], enumerated(), "one of [1, 1], [1, 64]", &[1, 1], true),
            (&[1, 1, 3], ranges(), "[1, 1..=512, 3..]", &[1, 512, 99], true),
            (&[1, 1, 3], ranges(), "[1, 1..=512, 3..]", &[1, 513, 3], false),
            (&[1, 1, 3], ranges(), "[1, 1..=512, 3..]", &[1, 0, 3], false),
            (&[1, 1, 3], ranges(), "[1, 1..=512, 3..]", &[1, 1, 2], false),
            (&[1, 1, 3], ranges(), "[1, 1..=512, 3..]", &[1, 1], false),
            (&[], ranges(), "[1, 1..=512, 3..]", &[], false),
        ];
        for (default, flexibility, words, shape, allowed) in rows {
            assert_eq!(shapes(default, &flexibility), words);
            assert_eq!(
                allows(default, &flexibility, shape),
                allowed,
                "{shape:?} in {words}"
            );
        }
    }
}
