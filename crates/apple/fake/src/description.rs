//! MLModelDescription, MLFeatureDescription and the constraints of multi-arrays and states.

use crate::Live;
use crate::array::numbers;
use candle_coreml_apple::reuse;
use candle_coreml_mil::{ArrayDescription, Feature, FeatureType, Flexibility, FunctionDescription};
use objc2::rc::Retained;
use objc2::runtime::NSObject;
use objc2::{DefinedClass, define_class};
use objc2_core_ml::{
    MLFeatureDescription, MLFeatureType, MLModelDescription, MLMultiArrayConstraint, MLMultiArrayDataType,
    MLMultiArrayShapeConstraint, MLMultiArrayShapeConstraintType, MLStateConstraint,
};
use objc2_foundation::{NSArray, NSDictionary, NSNumber, NSRange, NSString, NSValue};

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
                _ => MLFeatureType::Invalid,
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
            let value = |&(low, high): &(usize, Option<usize>)| {
                let length = high.map_or(isize::MAX as usize, |h| h - low + 1);
                NSValue::new(NSRange::new(low, length))
            };
            let values: Vec<Retained<NSValue>> = match &self.ivars().0 {
                Flexibility::Ranges(ranges) => ranges.iter().map(value).collect(),
                _ => Vec::new(),
            };
            NSArray::from_retained_slice(&values)
        }
    }
);
