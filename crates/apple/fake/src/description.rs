//! MLModelDescription, MLFeatureDescription and the constraints of each kind of feature.

use crate::Live;
use crate::array::numbers;
use candle_coreml_apple::{PixelFormat, reuse};
use candle_coreml_mil::{
    ArrayDescription, ColorSpace, Feature, FeatureType, Flexibility, FunctionDescription, ImageDescription,
};
use objc2::rc::Retained;
use objc2::runtime::NSObject;
use objc2::{DefinedClass, define_class};
use objc2_core_ml::{
    MLDictionaryConstraint, MLFeatureDescription, MLFeatureType, MLImageConstraint, MLImageSize,
    MLImageSizeConstraint, MLImageSizeConstraintType, MLModelDescription, MLMultiArrayConstraint,
    MLMultiArrayDataType, MLMultiArrayShapeConstraint, MLMultiArrayShapeConstraintType, MLSequenceConstraint,
    MLStateConstraint,
};
use objc2_foundation::{NSArray, NSDictionary, NSInteger, NSNumber, NSRange, NSString, NSValue};

type Descriptions = NSDictionary<NSString, MLFeatureDescription>;

fn data_type(array: &ArrayDescription) -> MLMultiArrayDataType {
    MLMultiArrayDataType(reuse::element(array.dtype).map_or(0, |e| e.code()))
}

fn by_name(features: &[Feature]) -> Retained<Descriptions> {
    let names: Vec<_> = features.iter().map(|f| NSString::from_str(&f.name)).collect();
    let names: Vec<&NSString> = names.iter().map(|n| &**n).collect();
    let made: Vec<Retained<MLFeatureDescription>> =
        features.iter().map(|f| made!(FakeFeature, f.clone())).collect();
    NSDictionary::from_retained_objects(&names, &made)
}

pub fn description(function: &FunctionDescription) -> Retained<MLModelDescription> {
    made!(FakeDescription, function.clone())
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelDescription"]
    #[ivars = (FunctionDescription, Live)]
    pub struct FakeDescription;

    impl FakeDescription {
        #[unsafe(method_id(inputDescriptionsByName))]
        fn inputs(&self) -> Retained<Descriptions> {
            by_name(&self.ivars().0.inputs)
        }

        #[unsafe(method_id(outputDescriptionsByName))]
        fn outputs(&self) -> Retained<Descriptions> {
            by_name(&self.ivars().0.outputs)
        }

        #[unsafe(method_id(stateDescriptionsByName))]
        fn states(&self) -> Retained<Descriptions> {
            by_name(&self.ivars().0.states)
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLFeatureDescription"]
    #[ivars = (Feature, Live)]
    pub struct FakeFeature;

    impl FakeFeature {
        #[unsafe(method(type))]
        fn kind(&self) -> MLFeatureType {
            match self.ivars().0.ty {
                FeatureType::MultiArray(_) => MLFeatureType::MultiArray,
                FeatureType::State(_) => MLFeatureType::State,
                FeatureType::String => MLFeatureType::String,
                FeatureType::Int64 => MLFeatureType::Int64,
                FeatureType::Double => MLFeatureType::Double,
                FeatureType::Image(_) => MLFeatureType::Image,
                FeatureType::Dictionary { .. } => MLFeatureType::Dictionary,
                FeatureType::Sequence { .. } => MLFeatureType::Sequence,
            }
        }

        #[unsafe(method(isOptional))]
        fn is_optional(&self) -> bool {
            self.ivars().0.optional
        }

        #[unsafe(method_id(multiArrayConstraint))]
        fn array(&self) -> Option<Retained<MLMultiArrayConstraint>> {
            match &self.ivars().0.ty {
                FeatureType::MultiArray(array) => Some(made!(FakeConstraint, array.clone())),
                _ => None,
            }
        }

        #[unsafe(method_id(imageConstraint))]
        fn image(&self) -> Option<Retained<MLImageConstraint>> {
            match &self.ivars().0.ty {
                FeatureType::Image(image) => Some(made!(FakeImage, image.clone())),
                _ => None,
            }
        }

        #[unsafe(method_id(dictionaryConstraint))]
        fn dictionary(&self) -> Option<Retained<MLDictionaryConstraint>> {
            match self.ivars().0.ty {
                FeatureType::Dictionary { integer_keys } => Some(made!(FakeKeys, integer_keys)),
                _ => None,
            }
        }

        #[unsafe(method_id(sequenceConstraint))]
        fn sequence(&self) -> Option<Retained<MLSequenceConstraint>> {
            match self.ivars().0.ty {
                FeatureType::Sequence { integer_elements } => Some(made!(FakeElements, integer_elements)),
                _ => None,
            }
        }

        #[unsafe(method_id(stateConstraint))]
        fn state(&self) -> Option<Retained<MLStateConstraint>> {
            match &self.ivars().0.ty {
                FeatureType::State(array) => Some(made!(FakeStateConstraint, array.clone())),
                _ => None,
            }
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLMultiArrayConstraint"]
    #[ivars = (ArrayDescription, Live)]
    pub struct FakeConstraint;

    impl FakeConstraint {
        #[unsafe(method_id(shape))]
        fn shape(&self) -> Retained<NSArray<NSNumber>> {
            numbers(&self.ivars().0.shape)
        }

        #[unsafe(method(dataType))]
        fn data_type(&self) -> MLMultiArrayDataType {
            data_type(&self.ivars().0)
        }

        #[unsafe(method_id(shapeConstraint))]
        fn shapes(&self) -> Retained<MLMultiArrayShapeConstraint> {
            made!(FakeShapes, self.ivars().0.flexibility.clone())
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLStateConstraint"]
    #[ivars = (ArrayDescription, Live)]
    pub struct FakeStateConstraint;

    impl FakeStateConstraint {
        #[unsafe(method_id(bufferShape))]
        fn shape(&self) -> Retained<NSArray<NSNumber>> {
            numbers(&self.ivars().0.shape)
        }

        #[unsafe(method(dataType))]
        fn data_type(&self) -> MLMultiArrayDataType {
            data_type(&self.ivars().0)
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLMultiArrayShapeConstraint"]
    #[ivars = (Flexibility, Live)]
    pub struct FakeShapes;

    impl FakeShapes {
        #[unsafe(method(type))]
        fn kind(&self) -> MLMultiArrayShapeConstraintType {
            match self.ivars().0 {
                Flexibility::Fixed => MLMultiArrayShapeConstraintType::Unspecified,
                Flexibility::Enumerated(_) => MLMultiArrayShapeConstraintType::Enumerated,
                Flexibility::Ranges(_) => MLMultiArrayShapeConstraintType::Range,
            }
        }

        #[unsafe(method_id(enumeratedShapes))]
        fn enumerated(&self) -> Retained<NSArray<NSArray<NSNumber>>> {
            let shapes = match &self.ivars().0 {
                Flexibility::Enumerated(shapes) => shapes.iter().map(|s| numbers(s)).collect(),
                _ => Vec::new(),
            };
            NSArray::from_retained_slice(&shapes)
        }

        #[unsafe(method_id(sizeRangeForDimension))]
        fn ranges(&self) -> Retained<NSArray<NSValue>> {
            let values: Vec<Retained<NSValue>> = match &self.ivars().0 {
                Flexibility::Ranges(ranges) => ranges.iter().map(|&r| NSValue::new(range(r))).collect(),
                _ => Vec::new(),
            };
            NSArray::from_retained_slice(&values)
        }
    }
);

/// An NSRange is first and length.
fn range((low, high): (usize, Option<usize>)) -> NSRange {
    NSRange::new(low, high.map_or(isize::MAX as usize, |h| h - low + 1))
}

/// The class of a label or an element.
fn whole_or_text(whole: bool) -> MLFeatureType {
    if whole {
        MLFeatureType::Int64
    } else {
        MLFeatureType::String
    }
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLDictionaryConstraint"]
    #[ivars = (bool, Live)]
    pub struct FakeKeys;

    impl FakeKeys {
        #[unsafe(method(keyType))]
        fn keys(&self) -> MLFeatureType {
            whole_or_text(self.ivars().0)
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLSequenceConstraint"]
    #[ivars = (bool, Live)]
    pub struct FakeElements;

    impl FakeElements {
        #[unsafe(method_id(valueDescription))]
        fn value(&self) -> Retained<MLFeatureDescription> {
            let ty = if self.ivars().0 { FeatureType::Int64 } else { FeatureType::String };
            let element = Feature {
                name: String::new(),
                description: String::new(),
                ty,
                optional: false,
            };
            made!(FakeFeature, element)
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLImageConstraint"]
    #[ivars = (ImageDescription, Live)]
    pub struct FakeImage;

    impl FakeImage {
        #[unsafe(method(pixelsHigh))]
        fn height(&self) -> NSInteger {
            self.ivars().0.height as NSInteger
        }

        #[unsafe(method(pixelsWide))]
        fn width(&self) -> NSInteger {
            self.ivars().0.width as NSInteger
        }

        /// Colours are BGRA whatever order the model computes with.
        #[unsafe(method(pixelFormatType))]
        fn format(&self) -> u32 {
            let format = match self.ivars().0.color {
                ColorSpace::Grayscale => PixelFormat::Gray,
                ColorSpace::GrayscaleFp16 => PixelFormat::GrayF16,
                ColorSpace::Rgb | ColorSpace::Bgr => PixelFormat::Bgra,
            };
            format.code()
        }

        #[unsafe(method_id(sizeConstraint))]
        fn sizes(&self) -> Retained<MLImageSizeConstraint> {
            made!(FakeImageSizes, self.ivars().0.flexibility.clone())
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLImageSizeConstraint"]
    #[ivars = (Flexibility, Live)]
    pub struct FakeImageSizes;

    impl FakeImageSizes {
        #[unsafe(method(type))]
        fn kind(&self) -> MLImageSizeConstraintType {
            match self.ivars().0 {
                Flexibility::Fixed => MLImageSizeConstraintType::Unspecified,
                Flexibility::Enumerated(_) => MLImageSizeConstraintType::Enumerated,
                Flexibility::Ranges(_) => MLImageSizeConstraintType::Range,
            }
        }

        #[unsafe(method_id(enumeratedImageSizes))]
        fn enumerated(&self) -> Retained<NSArray<MLImageSize>> {
            let sizes: Vec<Retained<MLImageSize>> = match &self.ivars().0 {
                Flexibility::Enumerated(sizes) => sizes.iter().map(|s| made!(FakeImageSize, s.clone())).collect(),
                _ => Vec::new(),
            };
            NSArray::from_retained_slice(&sizes)
        }

        #[unsafe(method(pixelsHighRange))]
        fn heights(&self) -> NSRange {
            self.side(0)
        }

        #[unsafe(method(pixelsWideRange))]
        fn widths(&self) -> NSRange {
            self.side(1)
        }
    }
);

impl FakeImageSizes {
    fn side(&self, side: usize) -> NSRange {
        match &self.ivars().0 {
            Flexibility::Ranges(ranges) => ranges.get(side).map_or(NSRange::new(0, 0), |&r| range(r)),
            _ => NSRange::new(0, 0),
        }
    }
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLImageSize"]
    #[ivars = (Vec<usize>, Live)]
    pub struct FakeImageSize;

    impl FakeImageSize {
        #[unsafe(method(pixelsHigh))]
        fn height(&self) -> NSInteger {
            self.ivars().0[0] as NSInteger
        }

        #[unsafe(method(pixelsWide))]
        fn width(&self) -> NSInteger {
            self.ivars().0[1] as NSInteger
        }
    }
);
