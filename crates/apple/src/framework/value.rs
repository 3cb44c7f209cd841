//! Values to and from MLFeatureValue.

use super::array;
use super::call::{core_ml, string};
use super::image;
use crate::array::ArrayRef;
use crate::error::Error;
use crate::value::{OwnedValue, Value};
use objc2::rc::Retained;
use objc2::runtime::AnyObject;
use objc2_core_ml::{MLFeatureType, MLFeatureValue, MLSequence};
use objc2_foundation::{NSArray, NSDictionary, NSNumber, NSString};
use std::collections::BTreeMap;

/// A value that is no array, for Core ML; arrays are made by their own functions.
pub(super) fn other(name: &str, value: Value<'_>) -> Result<Retained<MLFeatureValue>, Error> {
    Ok(match value {
        Value::Array(source) => copied(name, source)?,
        Value::Picture(picture) => image::feature_value(name, picture)?,
        // SAFETY: A valid string, which is copied.
        Value::String(text) => unsafe { MLFeatureValue::featureValueWithString(&string(text)) },
        // SAFETY: A plain number.
        Value::Int64(v) => unsafe { MLFeatureValue::featureValueWithInt64(v) },
        // SAFETY: A plain number.
        Value::Double(v) => unsafe { MLFeatureValue::featureValueWithDouble(v) },
        Value::Strings(pairs) => {
            let keys: Vec<_> = pairs.keys().map(|k| string(k)).collect();
            let keys: Vec<&NSString> = keys.iter().map(|k| &**k).collect();
            let counts: Vec<_> = pairs.values().map(|v| NSNumber::new_f64(*v)).collect();
            dictionary(name, NSDictionary::from_retained_objects(&keys, &counts))?
        }
        Value::Integers(pairs) => {
            let keys: Vec<_> = pairs.keys().map(|k| NSNumber::new_i64(*k)).collect();
            let keys: Vec<&NSNumber> = keys.iter().map(|k| &**k).collect();
            let counts: Vec<_> = pairs.values().map(|v| NSNumber::new_f64(*v)).collect();
            dictionary(name, NSDictionary::from_retained_objects(&keys, &counts))?
        }
        Value::StringSequence(texts) => {
            let texts: Vec<_> = texts.iter().map(|t| string(t)).collect();
            let texts = NSArray::from_retained_slice(&texts);
            // SAFETY: An array of strings.
            let sequence = unsafe { MLSequence::sequenceWithStringArray(&texts) };
            // SAFETY: A valid sequence.
            unsafe { MLFeatureValue::featureValueWithSequence(&sequence) }
        }
        Value::IntegerSequence(values) => {
            let values: Vec<_> = values.iter().map(|&v| NSNumber::new_i64(v)).collect();
            let values = NSArray::from_retained_slice(&values);
            // SAFETY: An array of integers.
            let sequence = unsafe { MLSequence::sequenceWithInt64Array(&values) };
            // SAFETY: A valid sequence.
            unsafe { MLFeatureValue::featureValueWithSequence(&sequence) }
        }
    })
}

/// An array that is copied.
fn copied(name: &str, source: ArrayRef<'_>) -> Result<Retained<MLFeatureValue>, Error> {
    let array = array::new(source.element, source.shape)?;
    array::write(name, &array, source)?;
    // SAFETY: A valid array.
    Ok(unsafe { MLFeatureValue::featureValueWithMultiArray(&array) })
}

fn dictionary<K: objc2::Message>(
    name: &str,
    counts: Retained<NSDictionary<K, NSNumber>>,
) -> Result<Retained<MLFeatureValue>, Error> {
    // SAFETY: Keys are objects; only the static type of the keys is forgotten.
    let counts = unsafe { Retained::cast_unchecked::<NSDictionary<AnyObject, NSNumber>>(counts) };
    // SAFETY: Keys are all strings or all integers, values are numbers.
    let made = unsafe { MLFeatureValue::featureValueWithDictionary_error(&counts) };
    made.map_err(core_ml(&format!("input {name:?}")))
}

/// The value of an output.
pub(super) fn owned(name: &str, value: &MLFeatureValue) -> Result<OwnedValue, Error> {
    // SAFETY: A plain getter.
    if unsafe { value.isUndefined() } {
        return Err(Error::feature(name, "Core ML left the output undefined"));
    }
    // SAFETY: A plain getter.
    let kind = unsafe { value.r#type() };
    let empty = || Error::feature(name, "Core ML gave no value of the kind it says");
    Ok(match kind {
        // SAFETY: The getter of the value's kind.
        MLFeatureType::Int64 => OwnedValue::Int64(unsafe { value.int64Value() }),
        // SAFETY: The getter of the value's kind.
        MLFeatureType::Double => OwnedValue::Double(unsafe { value.doubleValue() }),
        // SAFETY: The getter of the value's kind.
        MLFeatureType::String => OwnedValue::String(unsafe { value.stringValue() }.to_string()),
        MLFeatureType::MultiArray => {
            // SAFETY: The getter of the value's kind.
            let array = unsafe { value.multiArrayValue() }.ok_or_else(empty)?;
            OwnedValue::Array(array::read(name, &array)?)
        }
        MLFeatureType::Image => OwnedValue::Picture(image::picture(name, value)?),
        // SAFETY: The getter of the value's kind.
        MLFeatureType::Dictionary => pairs(name, &*unsafe { value.dictionaryValue() })?,
        MLFeatureType::Sequence => {
            // SAFETY: The getter of the value's kind.
            let sequence = unsafe { value.sequenceValue() }.ok_or_else(empty)?;
            // SAFETY: A plain getter.
            if unsafe { sequence.r#type() } == MLFeatureType::String {
                // SAFETY: The getter of the sequence's kind.
                let texts = unsafe { sequence.stringValues() };
                OwnedValue::StringSequence(texts.iter().map(|t| t.to_string()).collect())
            } else {
                // SAFETY: The getter of the sequence's kind.
                let values = unsafe { sequence.int64Values() };
                OwnedValue::IntegerSequence(values.iter().map(|v| v.as_i64()).collect())
            }
        }
        other => {
            return Err(Error::feature(
                name,
                format!("feature type {} is unknown", other.0),
            ));
        }
    })
}

/// A dictionary by the type of its keys. An empty one counts as one of strings.
fn pairs(name: &str, counts: &NSDictionary<AnyObject, NSNumber>) -> Result<OwnedValue, Error> {
    let (keys, values) = counts.to_vecs();
    let (mut strings, mut integers) = (BTreeMap::new(), BTreeMap::new());
    for (key, value) in keys.iter().zip(&values) {
        if let Some(text) = key.downcast_ref::<NSString>() {
            strings.insert(text.to_string(), value.as_f64());
        } else if let Some(number) = key.downcast_ref::<NSNumber>() {
            integers.insert(number.as_i64(), value.as_f64());
        } else {
            return Err(Error::feature(
                name,
                "a key that is neither a string nor a number",
            ));
        }
    }
    match (strings.is_empty(), integers.is_empty()) {
        (_, true) => Ok(OwnedValue::Strings(strings)),
        (true, false) => Ok(OwnedValue::Integers(integers)),
        (false, false) => Err(Error::feature(name, "keys of two kinds")),
    }
}
