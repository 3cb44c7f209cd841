//! MLFeatureValue.

use crate::Live;
use objc2::rc::Retained;
use objc2::runtime::{AnyObject, NSObject};
use objc2::{AnyThread, DefinedClass, define_class, msg_send};
use objc2_core_ml::{MLFeatureType, MLFeatureValue, MLMultiArray, MLSequence};
use objc2_core_video::CVPixelBuffer;
use objc2_foundation::{CopyingHelper, NSCopying, NSDictionary, NSError, NSNumber, NSString};

pub enum Held {
    Array(Retained<MLMultiArray>),
    String(Retained<NSString>),
    Int64(i64),
    Double(f64),
    Dictionary(Retained<Counts>),
    Sequence(Retained<MLSequence>),
    Pixels(Retained<CVPixelBuffer>),
}

type Counts = NSDictionary<AnyObject, NSNumber>;

pub struct Ivars {
    held: Held,
    _live: Live,
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLFeatureValue"]
    #[ivars = Ivars]
    pub struct FakeValue;

    impl FakeValue {
        #[unsafe(method_id(featureValueWithMultiArray:))]
        fn array(value: &MLMultiArray) -> Retained<Self> {
            FakeValue::new(Held::Array(retained(value)))
        }

        #[unsafe(method_id(featureValueWithString:))]
        fn string(value: &NSString) -> Retained<Self> {
            FakeValue::new(Held::String(retained(value)))
        }

        #[unsafe(method_id(featureValueWithInt64:))]
        fn int64(value: i64) -> Retained<Self> {
            FakeValue::new(Held::Int64(value))
        }

        #[unsafe(method_id(featureValueWithDouble:))]
        fn double(value: f64) -> Retained<Self> {
            FakeValue::new(Held::Double(value))
        }

        #[unsafe(method_id(featureValueWithDictionary:error:))]
        fn dictionary(value: &Counts, _error: *mut *mut NSError) -> Option<Retained<Self>> {
            Some(FakeValue::new(Held::Dictionary(retained(value))))
        }

        #[unsafe(method_id(featureValueWithSequence:))]
        fn sequence(value: &MLSequence) -> Retained<Self> {
            FakeValue::new(Held::Sequence(retained(value)))
        }

        #[unsafe(method_id(featureValueWithPixelBuffer:))]
        fn pixels(value: &CVPixelBuffer) -> Retained<Self> {
            FakeValue::new(Held::Pixels(retained(value)))
        }

        #[unsafe(method_id(imageBufferValue))]
        fn pixels_value(&self) -> Option<Retained<CVPixelBuffer>> {
            match &self.ivars().held {
                Held::Pixels(buffer) => Some(buffer.clone()),
                _ => None,
            }
        }

        #[unsafe(method_id(dictionaryValue))]
        fn dictionary_value(&self) -> Retained<Counts> {
            match &self.ivars().held {
                Held::Dictionary(counts) => counts.clone(),
                _ => NSDictionary::new(),
            }
        }

        #[unsafe(method_id(sequenceValue))]
        fn sequence_value(&self) -> Option<Retained<MLSequence>> {
            match &self.ivars().held {
                Held::Sequence(sequence) => Some(sequence.clone()),
                _ => None,
            }
        }

        #[unsafe(method(type))]
        fn kind(&self) -> MLFeatureType {
            match self.ivars().held {
                Held::Array(_) => MLFeatureType::MultiArray,
                Held::String(_) => MLFeatureType::String,
                Held::Int64(_) => MLFeatureType::Int64,
                Held::Double(_) => MLFeatureType::Double,
                Held::Dictionary(_) => MLFeatureType::Dictionary,
                Held::Sequence(_) => MLFeatureType::Sequence,
                Held::Pixels(_) => MLFeatureType::Image,
            }
        }

        #[unsafe(method(isUndefined))]
        fn is_undefined(&self) -> bool {
            false
        }

        #[unsafe(method_id(multiArrayValue))]
        fn array_value(&self) -> Option<Retained<MLMultiArray>> {
            match &self.ivars().held {
                Held::Array(array) => Some(array.clone()),
                _ => None,
            }
        }

        #[unsafe(method_id(stringValue))]
        fn string_value(&self) -> Retained<NSString> {
            match &self.ivars().held {
                Held::String(text) => text.clone(),
                _ => NSString::new(),
            }
        }

        #[unsafe(method(int64Value))]
        fn int64_value(&self) -> i64 {
            match self.ivars().held {
                Held::Int64(v) => v,
                _ => 0,
            }
        }

        #[unsafe(method(doubleValue))]
        fn double_value(&self) -> f64 {
            match self.ivars().held {
                Held::Double(v) => v,
                _ => 0.0,
            }
        }
    }
);

impl FakeValue {
    fn new(held: Held) -> Retained<Self> {
        let this = FakeValue::alloc().set_ivars(Ivars {
            held,
            _live: Live::new(),
        });
        // SAFETY: The super class's own initializer.
        unsafe { msg_send![super(this), init] }
    }

    pub fn made(held: Held) -> Retained<MLFeatureValue> {
        // SAFETY: The same class under the name of the bindings.
        unsafe { Retained::cast_unchecked(FakeValue::new(held)) }
    }
}

/// Another reference to an object.
pub fn retained<T: objc2::Message>(object: &T) -> Retained<T> {
    object.retain()
}

/// A dictionary of numbers by labels, which are strings or numbers.
pub fn counts<K>(keys: &[Retained<K>], numbers: &[f64]) -> Retained<Counts>
where
    K: objc2::Message + NSCopying + CopyingHelper<Result = K>,
{
    let keys: Vec<&K> = keys.iter().map(|k| &**k).collect();
    let numbers: Vec<_> = numbers.iter().map(|&v| NSNumber::new_f64(v)).collect();
    let counts: Retained<NSDictionary<K, NSNumber>> = NSDictionary::from_retained_objects(&keys, &numbers);
    // SAFETY: Keys are objects; only their static type is forgotten.
    unsafe { Retained::cast_unchecked(counts) }
}
