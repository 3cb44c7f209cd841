//! A configuration with the settings that were decided on.

use super::call::string;
use crate::options::{ReshapeFrequency, Setting, Specialization};
use objc2::rc::Retained;
use objc2_core_ml::{MLComputeUnits, MLModelConfiguration, MLReshapeFrequencyHint, MLSpecializationStrategy};

/// Calls one setter for each setting and no other: those a system lacks must not be called.
pub(super) fn configuration(settings: &[Setting]) -> Retained<MLModelConfiguration> {
    // SAFETY: A plain object; nothing else refers to it yet.
    let configuration = unsafe { MLModelConfiguration::new() };
    for setting in settings {
        match setting {
            // SAFETY: A number of the enumeration.
            Setting::ComputeUnits(code) => unsafe { configuration.setComputeUnits(MLComputeUnits(*code)) },
            // SAFETY: A plain setter.
            Setting::LowPrecision => unsafe { configuration.setAllowLowPrecisionAccumulationOnGPU(true) },
            // SAFETY: The system has the setter, or the setting would not be in the list; the string is copied.
            Setting::Function(name) => unsafe { configuration.setFunctionName(Some(&string(name))) },
            Setting::Reshape(hint) => {
                let hint = match hint {
                    ReshapeFrequency::Frequent => MLReshapeFrequencyHint::Frequent,
                    ReshapeFrequency::Infrequent => MLReshapeFrequencyHint::Infrequent,
                };
                // SAFETY: The system has the hints, or the setting would not be in the list.
                let hints = unsafe { configuration.optimizationHints() };
                // SAFETY: A number of the enumeration.
                unsafe { hints.setReshapeFrequency(hint) };
                // SAFETY: The hints came from this configuration; the property is copied.
                unsafe { configuration.setOptimizationHints(&hints) };
            }
            Setting::Specialization(hint) => {
                let hint = match hint {
                    Specialization::Default => MLSpecializationStrategy::Default,
                    Specialization::FastPrediction => MLSpecializationStrategy::FastPrediction,
                };
                // SAFETY: The system has the hints, or the setting would not be in the list.
                let hints = unsafe { configuration.optimizationHints() };
                // SAFETY: A number of the enumeration.
                unsafe { hints.setSpecializationStrategy(hint) };
                // SAFETY: The hints came from this configuration; the property is copied.
                unsafe { configuration.setOptimizationHints(&hints) };
            }
        }
    }
    configuration
}
