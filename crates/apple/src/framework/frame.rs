//! What one prediction needs around it: arrays, the provider that names them, and the options.

use super::array;
use super::call::{core_ml, string};
use super::value;
use crate::array::Element;
use crate::error::Error;
use crate::reuse::{Candidate, Key, backing};
use crate::value::Value;
use candle_coreml_mil::Feature;
use objc2::AnyThread;
use objc2::rc::Retained;
use objc2::runtime::{AnyObject, ProtocolObject};
use objc2_core_ml::{
    MLDictionaryFeatureProvider, MLFeatureProvider, MLFeatureValue, MLMultiArray, MLPredictionOptions,
};
use objc2_foundation::{NSDictionary, NSString};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Inputs by name.
pub(super) type Inputs<'a> = [(&'a str, Value<'a>)];

/// The objects of one prediction. With a key its arrays are its own and it can serve again.
pub(super) struct Frame {
    pub key: Option<Key>,
    arrays: Vec<Retained<MLMultiArray>>,
    provider: Retained<MLDictionaryFeatureProvider>,
    pub options: Retained<MLPredictionOptions>,
    /// One for each array that is somebody else's memory.
    pub wrapped: Vec<Arc<AtomicBool>>,
}

// SAFETY: A frame is used by one thread at a time: it is moved out of the model's list for a prediction and back after
// it. Its objects have no thread of their own, and reference counts are atomic.
unsafe impl Send for Frame {}

/// Inputs as reuse looks at them.
pub(super) fn candidates<'a>(inputs: &'a Inputs<'a>) -> impl ExactSizeIterator<Item = Candidate<'a>> {
    inputs.iter().map(|(name, value)| Candidate {
        name,
        array: match value {
            Value::Array(a) => Some((a.element, a.shape, a.bytes.len())),
            _ => None,
        },
    })
}

impl Frame {
    /// A frame that can serve again, its arrays still empty.
    pub(super) fn kept(key: Key, inputs: &Inputs<'_>, outputs: &[Feature]) -> Result<Frame, Error> {
        let mut arrays = Vec::with_capacity(inputs.len());
        let mut values = Vec::with_capacity(inputs.len());
        for (name, value) in inputs {
            let Value::Array(source) = value else {
                return Err(Error::feature(name, "no array, though its key says so"));
            };
            let array = array::new(source.element, source.shape)?;
            // SAFETY: A valid array.
            values.push(unsafe { MLFeatureValue::featureValueWithMultiArray(&array) });
            arrays.push(array);
        }
        let backings = outputs
            .iter()
            .filter_map(|o| Some((o.name.as_str(), backing(o)?)));
        Ok(Frame {
            key: Some(key),
            arrays,
            provider: provider(inputs, &values)?,
            options: options(backings)?,
            wrapped: Vec::new(),
        })
    }

    /// A frame for one call. Arrays that have an owner are wrapped where they are when `wrap` says so, others copied.
    pub(super) fn once(inputs: &Inputs<'_>, wrap: bool) -> Result<Frame, Error> {
        let mut values = Vec::with_capacity(inputs.len());
        let mut wrapped = Vec::new();
        for (name, value) in inputs {
            let owner = match value {
                Value::Array(source) if wrap => source.owner,
                _ => None,
            };
            values.push(match (value, owner) {
                (Value::Array(source), Some(owner)) => {
                    // SAFETY: The owner is said to keep this memory, and inputs are not written to.
                    let made = unsafe { array::wrap(*source, owner) }?;
                    wrapped.push(made.released);
                    // SAFETY: A valid array.
                    unsafe { MLFeatureValue::featureValueWithMultiArray(&made.array) }
                }
                (other, _) => value::other(name, *other)?,
            });
        }
        Ok(Frame {
            key: None,
            arrays: Vec::new(),
            provider: provider(inputs, &values)?,
            options: options(std::iter::empty())?,
            wrapped,
        })
    }

    /// Copies the inputs into the arrays of a frame that can serve again.
    pub(super) fn fill(&self, inputs: &Inputs<'_>) -> Result<(), Error> {
        for ((name, value), array) in inputs.iter().zip(&self.arrays) {
            if let Value::Array(source) = value {
                array::write(name, array, *source)?;
            }
        }
        Ok(())
    }

    pub(super) fn provider(&self) -> &ProtocolObject<dyn MLFeatureProvider> {
        ProtocolObject::from_ref(&*self.provider)
    }
}

fn provider(
    inputs: &Inputs<'_>,
    values: &[Retained<MLFeatureValue>],
) -> Result<Retained<MLDictionaryFeatureProvider>, Error> {
    let names: Vec<_> = inputs.iter().map(|(name, _)| string(name)).collect();
    let names: Vec<&NSString> = names.iter().map(|n| &**n).collect();
    let values: Vec<Retained<AnyObject>> = values.iter().map(|v| v.clone().into()).collect();
    let dictionary: Retained<NSDictionary<NSString, AnyObject>> =
        NSDictionary::from_retained_objects(&names, &values);
    // SAFETY: Keys are strings, values are feature values.
    let made = unsafe {
        MLDictionaryFeatureProvider::initWithDictionary_error(
            MLDictionaryFeatureProvider::alloc(),
            &dictionary,
        )
    };
    made.map_err(core_ml("naming the inputs"))
}

/// Options with arrays for Core ML to write outputs into. It may use others; what it returns is what is read.
fn options<'a>(
    backings: impl Iterator<Item = (&'a str, (Element, &'a [usize]))>,
) -> Result<Retained<MLPredictionOptions>, Error> {
    // SAFETY: A plain object.
    let options = unsafe { MLPredictionOptions::new() };
    let (mut names, mut arrays) = (Vec::new(), Vec::<Retained<AnyObject>>::new());
    for (name, (element, shape)) in backings {
        names.push(string(name));
        arrays.push(array::new(element, shape)?.into());
    }
    if !names.is_empty() {
        let names: Vec<&NSString> = names.iter().map(|n| &**n).collect();
        let dictionary: Retained<NSDictionary<NSString, AnyObject>> =
            NSDictionary::from_retained_objects(&names, &arrays);
        // SAFETY: Keys are names of outputs, values multi-arrays of the declared type and shape.
        unsafe { options.setOutputBackings(&dictionary) };
    }
    Ok(options)
}
