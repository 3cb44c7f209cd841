//! What Core ML says about a loaded model's function.

use super::call::sizes;
use crate::array::Element;
use crate::describe::{dtype, flexibility, sorted};
use crate::error::Error;
use crate::options::{OsVersion, Part};
use crate::value::PixelFormat;
use candle_coreml_mil::{
    ArrayDescription, ColorSpace, Feature, FeatureType, Flexibility, FunctionDescription, ImageDescription,
};
use objc2_core_ml::{
    MLFeatureDescription, MLFeatureType, MLImageConstraint, MLModel, MLMultiArrayConstraint,
    MLMultiArrayDataType, MLStateConstraint,
};
use objc2_foundation::{NSDictionary, NSString};

type Descriptions = NSDictionary<NSString, MLFeatureDescription>;

/// The interface of the function a model was loaded for.
pub(super) fn function(model: &MLModel, name: &str, system: OsVersion) -> Result<FunctionDescription, Error> {
    // SAFETY: A plain getter.
    let description = unsafe { model.modelDescription() };
    let states = if system.has(Part::States) {
        // SAFETY: The system has the getter.
        features(&*unsafe { description.stateDescriptionsByName() })?
    } else {
        Vec::new()
    };
    Ok(FunctionDescription {
        name: name.to_string(),
        // SAFETY: A plain getter.
        inputs: features(&*unsafe { description.inputDescriptionsByName() })?,
        // SAFETY: A plain getter.
        outputs: features(&*unsafe { description.outputDescriptionsByName() })?,
        states,
    })
}

fn features(descriptions: &Descriptions) -> Result<Vec<Feature>, Error> {
    let (names, descriptions) = descriptions.to_vecs();
    let features = names.iter().zip(&descriptions).map(|(name, description)| {
        let name = name.to_string();
        Ok(Feature {
            ty: kind(&name, description)?,
            // SAFETY: A plain getter.
            optional: unsafe { description.isOptional() },
            description: String::new(),
            name,
        })
    });
    features.collect::<Result<_, Error>>().map(sorted)
}

fn kind(name: &str, description: &MLFeatureDescription) -> Result<FeatureType, Error> {
    let none = || Error::feature(name, "Core ML gives no constraint of the feature's kind");
    // SAFETY: A plain getter.
    Ok(match unsafe { description.r#type() } {
        MLFeatureType::Int64 => FeatureType::Int64,
        MLFeatureType::Double => FeatureType::Double,
        MLFeatureType::String => FeatureType::String,
        MLFeatureType::MultiArray => {
            // SAFETY: A plain getter.
            let constraint = unsafe { description.multiArrayConstraint() }.ok_or_else(none)?;
            FeatureType::MultiArray(array(name, &constraint)?)
        }
        MLFeatureType::Image => {
            // SAFETY: A plain getter.
            let constraint = unsafe { description.imageConstraint() }.ok_or_else(none)?;
            FeatureType::Image(image(&constraint))
        }
        MLFeatureType::State => {
            // SAFETY: A feature of this kind exists only where the getter does.
            let constraint = unsafe { description.stateConstraint() }.ok_or_else(none)?;
            FeatureType::State(state(name, &constraint)?)
        }
        MLFeatureType::Dictionary => {
            // SAFETY: A plain getter.
            let constraint = unsafe { description.dictionaryConstraint() }.ok_or_else(none)?;
            // SAFETY: A plain getter.
            let integer_keys = unsafe { constraint.keyType() } == MLFeatureType::Int64;
            FeatureType::Dictionary { integer_keys }
        }
        MLFeatureType::Sequence => {
            // SAFETY: A plain getter.
            let constraint = unsafe { description.sequenceConstraint() }.ok_or_else(none)?;
            // SAFETY: A plain getter.
            let value = unsafe { constraint.valueDescription() };
            // SAFETY: A plain getter.
            let integer_elements = unsafe { value.r#type() } == MLFeatureType::Int64;
            FeatureType::Sequence { integer_elements }
        }
        other => {
            return Err(Error::feature(
                name,
                format!("feature type {} is unknown", other.0),
            ));
        }
    })
}

fn array(name: &str, constraint: &MLMultiArrayConstraint) -> Result<ArrayDescription, Error> {
    // SAFETY: A plain getter.
    let shape = sizes(&*unsafe { constraint.shape() });
    // SAFETY: A plain getter.
    let allowed = unsafe { constraint.shapeConstraint() };
    // SAFETY: A plain getter.
    let enumerated = unsafe { allowed.enumeratedShapes() };
    // SAFETY: A plain getter.
    let ranges = unsafe { allowed.sizeRangeForDimension() };
    let ranges: Vec<_> = ranges.iter().filter_map(|r| r.get_range()).collect();
    let ranges: Vec<_> = ranges.iter().map(|r| (r.location, r.length)).collect();
    // SAFETY: A plain getter.
    let kind = unsafe { allowed.r#type() }.0;
    let shapes = enumerated.iter().filter_map(|s| sizes(&s)).collect();
    // SAFETY: A plain getter.
    described(
        name,
        unsafe { constraint.dataType() },
        shape,
        flexibility(kind, shapes, &ranges),
    )
}

fn state(name: &str, constraint: &MLStateConstraint) -> Result<ArrayDescription, Error> {
    // SAFETY: A plain getter.
    let shape = sizes(&*unsafe { constraint.bufferShape() });
    // SAFETY: A plain getter.
    described(name, unsafe { constraint.dataType() }, shape, Flexibility::Fixed)
}

fn described(
    name: &str,
    data_type: MLMultiArrayDataType,
    shape: Option<Vec<usize>>,
    flexibility: Flexibility,
) -> Result<ArrayDescription, Error> {
    let element = Element::from_code(data_type.0);
    let element =
        element.ok_or_else(|| Error::feature(name, format!("element type {:#x} is unknown", data_type.0)))?;
    Ok(ArrayDescription {
        dtype: dtype(element),
        shape: shape.ok_or_else(|| Error::feature(name, "a negative size"))?,
        flexibility,
        default_value: None,
    })
}

fn image(constraint: &MLImageConstraint) -> ImageDescription {
    let size = |n: isize| usize::try_from(n).unwrap_or(0);
    // SAFETY: A plain getter.
    let format = PixelFormat::from_code(unsafe { constraint.pixelFormatType() });
    // SAFETY: A plain getter.
    let allowed = unsafe { constraint.sizeConstraint() };
    // SAFETY: A plain getter.
    let enumerated = unsafe { allowed.enumeratedImageSizes() };
    let sizes = enumerated.iter().map(|s| {
        // SAFETY: Plain getters.
        let (height, width) = unsafe { (s.pixelsHigh(), s.pixelsWide()) };
        vec![size(height), size(width)]
    });
    // SAFETY: Plain getters.
    let (high, wide) = unsafe { (allowed.pixelsHighRange(), allowed.pixelsWideRange()) };
    let ranges = [(high.location, high.length), (wide.location, wide.length)];
    ImageDescription {
        // SAFETY: A plain getter.
        width: size(unsafe { constraint.pixelsWide() }),
        // SAFETY: A plain getter.
        height: size(unsafe { constraint.pixelsHigh() }),
        color: match format {
            Some(PixelFormat::Gray) => ColorSpace::Grayscale,
            Some(PixelFormat::GrayF16) => ColorSpace::GrayscaleFp16,
            // Core ML takes 32-bit BGRA and turns it itself.
            Some(PixelFormat::Bgra) | None => ColorSpace::Rgb,
        },
        // SAFETY: A plain getter.
        flexibility: flexibility(unsafe { allowed.r#type() }.0, sizes.collect(), &ranges),
    }
}
