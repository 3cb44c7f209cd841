//! MLSequence.

use crate::Live;
use objc2::rc::Retained;
use objc2::runtime::NSObject;
use objc2::{DefinedClass, define_class};
use objc2_core_ml::{MLFeatureType, MLSequence};
use objc2_foundation::{NSArray, NSNumber, NSString};

use crate::value::retained;

pub enum Items {
    Strings(Retained<NSArray<NSString>>),
    Integers(Retained<NSArray<NSNumber>>),
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLSequence"]
    #[ivars = (Items, Live)]
    pub struct FakeSequence;

    impl FakeSequence {
        #[unsafe(method_id(sequenceWithStringArray:))]
        fn strings(values: &NSArray<NSString>) -> Retained<MLSequence> {
            made!(FakeSequence, Items::Strings(retained(values)))
        }

        #[unsafe(method_id(sequenceWithInt64Array:))]
        fn integers(values: &NSArray<NSNumber>) -> Retained<MLSequence> {
            made!(FakeSequence, Items::Integers(retained(values)))
        }

        #[unsafe(method(type))]
        fn kind(&self) -> MLFeatureType {
            match self.ivars().0 {
                Items::Strings(_) => MLFeatureType::String,
                Items::Integers(_) => MLFeatureType::Int64,
            }
        }

        #[unsafe(method_id(stringValues))]
        fn string_values(&self) -> Retained<NSArray<NSString>> {
            match &self.ivars().0 {
                Items::Strings(values) => values.clone(),
                Items::Integers(_) => NSArray::new(),
            }
        }

        #[unsafe(method_id(int64Values))]
        fn integer_values(&self) -> Retained<NSArray<NSNumber>> {
            match &self.ivars().0 {
                Items::Integers(values) => values.clone(),
                Items::Strings(_) => NSArray::new(),
            }
        }
    }
);
