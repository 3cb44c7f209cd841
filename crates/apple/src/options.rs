//! How a model is loaded, as a list of settings, and which systems have what is asked for.

use crate::error::Error;
use std::fmt;

/// A version of macOS or of iOS; iOS and its kin count alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct OsVersion {
    /// True on macOS, false on iOS, iPadOS, tvOS and visionOS.
    pub mac: bool,
    /// 15 of 15.4.1.
    pub major: u32,
    /// 4 of 15.4.1.
    pub minor: u32,
}

impl fmt::Display for OsVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.mac { "macOS" } else { "iOS" };
        write!(f, "{name} {}.{}", self.major, self.minor)
    }
}

/// Parts of Core ML that came later than macOS 13 and iOS 16 (availability macros of the headers, SDK 26).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Part {
    Devices,
    ComputePlan,
    OptimizationHints,
    FunctionNames,
    States,
    SpecializationStrategy,
    Int8Arrays,
}

/// A part, its name in messages, and the first macOS and iOS that have it.
type PartRow = (Part, &'static str, (u32, u32), (u32, u32));

const PARTS: [PartRow; 7] = [
    (Part::Devices, "a list of compute devices", (14, 0), (17, 0)),
    (Part::ComputePlan, "a compute plan", (14, 4), (17, 4)),
    (
        Part::OptimizationHints,
        "the reshape frequency hint",
        (14, 4),
        (17, 4),
    ),
    (
        Part::FunctionNames,
        "choosing one of a model's functions",
        (15, 0),
        (18, 0),
    ),
    (Part::States, "a model with states", (15, 0), (18, 0)),
    (
        Part::SpecializationStrategy,
        "the specialization strategy hint",
        (15, 0),
        (18, 0),
    ),
    (Part::Int8Arrays, "an int8 multi-array", (26, 0), (26, 0)),
];

impl OsVersion {
    /// True where `part` exists.
    pub fn has(self, part: Part) -> bool {
        self.check(part).is_ok()
    }

    /// Refuses what came later than this system.
    ///
    /// # Errors
    /// [`Error::System`] with the first systems that have it.
    pub fn check(self, part: Part) -> Result<(), Error> {
        let row = PARTS.iter().find(|row| row.0 == part);
        let &(_, what, mac, ios) = row.expect("every part has its row; a test sees to it");
        let needed = if self.mac { mac } else { ios };
        if (self.major, self.minor) >= needed {
            return Ok(());
        }
        Err(Error::System {
            what: what.to_string(),
            needed: format!("macOS {}.{} or iOS {}.{}", mac.0, mac.1, ios.0, ios.1),
            found: self,
        })
    }
}

/// The processors Core ML may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub enum ComputeUnits {
    #[default]
    All,
    CpuOnly,
    CpuAndGpu,
    CpuAndNeuralEngine,
}

impl ComputeUnits {
    /// Core ML's number (MLModelConfiguration.h: `MLComputeUnits`).
    pub fn code(self) -> isize {
        match self {
            ComputeUnits::CpuOnly => 0,
            ComputeUnits::CpuAndGpu => 1,
            ComputeUnits::All => 2,
            ComputeUnits::CpuAndNeuralEngine => 3,
        }
    }
}

/// How often input shapes change (MLReshapeFrequencyHint).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReshapeFrequency {
    /// Often: changing shapes is to be cheap. Core ML's default.
    Frequent,
    /// Seldom: Core ML may spend time at each new shape to run faster afterwards.
    Infrequent,
}

/// What a model is prepared for (MLSpecializationStrategy).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specialization {
    /// Core ML's balance of loading time and speed.
    Default,
    /// Fast predictions, at the cost of loading time and disk space.
    FastPrediction,
}

/// What is asked of Core ML when it loads a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// The processors it may use.
    pub compute_units: ComputeUnits,
    /// The function to run, by its name; the model's default when absent.
    pub function: Option<String>,
    /// Whether the GPU may add up 16-bit floats in 16 bits.
    pub low_precision_accumulation: bool,
    /// How often shapes change; left to Core ML when absent.
    pub reshape_frequency: Option<ReshapeFrequency>,
    /// What to prepare for; left to Core ML when absent.
    pub specialization: Option<Specialization>,
}

/// One setter of MLModelConfiguration or MLOptimizationHints to be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setting {
    /// `computeUnits`
    ComputeUnits(isize),
    /// `allowLowPrecisionAccumulationOnGPU`
    LowPrecision,
    /// `functionName`
    Function(String),
    /// `optimizationHints.reshapeFrequency`
    Reshape(ReshapeFrequency),
    /// `optimizationHints.specializationStrategy`
    Specialization(Specialization),
}

impl LoadOptions {
    /// The setters to call on `system`: none that it lacks, since calling one would end the process. `functions` are the
    /// names the model has; a model with one function is loaded without naming it, which every system can.
    ///
    /// # Errors
    /// [`Error::System`] for what the system is too old for.
    pub fn settings(&self, system: OsVersion, functions: usize) -> Result<Vec<Setting>, Error> {
        let mut settings = vec![Setting::ComputeUnits(self.compute_units.code())];
        if self.low_precision_accumulation {
            settings.push(Setting::LowPrecision);
        }
        if let Some(name) = self.function.as_ref().filter(|_| functions > 1) {
            system.check(Part::FunctionNames)?;
            settings.push(Setting::Function(name.clone()));
        }
        if let Some(hint) = self.reshape_frequency {
            system.check(Part::OptimizationHints)?;
            settings.push(Setting::Reshape(hint));
        }
        if let Some(hint) = self.specialization {
            system.check(Part::SpecializationStrategy)?;
            settings.push(Setting::Specialization(hint));
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn mac(major: u32, minor: u32) -> OsVersion {
        OsVersion {
            mac: true,
            major,
            minor,
        }
    }

    #[test]
    fn every_part_has_its_first_system_and_is_refused_just_before_it() {
        let first = |mac_version, ios, part| {
            for (on_mac, (major, minor)) in [(true, mac_version), (false, ios)] {
                let at = OsVersion {
                    mac: on_mac,
                    major,
                    minor,
                };
                assert!(at.has(part), "{part:?} at {at}");
                let before = match minor {
                    0 => OsVersion {
                        major: major - 1,
                        minor: 9,
                        ..at
                    },
                    _ => OsVersion {
                        minor: minor - 1,
                        ..at
                    },
                };
                assert!(!before.has(part), "{part:?} at {before}");
            }
        };
        for (part, _, mac_version, ios) in PARTS {
            first(mac_version, ios, part);
        }
        let parts = [
            Part::Devices,
            Part::ComputePlan,
            Part::OptimizationHints,
            Part::FunctionNames,
            Part::States,
            Part::SpecializationStrategy,
            Part::Int8Arrays,
        ];
        assert!(parts.iter().all(|p| PARTS.iter().any(|row| row.0 == *p)));
        let words = mac(14, 7).check(Part::States).unwrap_err().to_string();
        assert_eq!(
            words,
            "a model with states needs macOS 15.0 or iOS 18.0; this is macOS 14.7"
        );
    }

    #[test]
    fn a_function_is_named_to_core_ml_only_where_there_are_several() {
        let options = LoadOptions {
            function: Some("main".into()),
            ..LoadOptions::default()
        };
        let units = Setting::ComputeUnits(2);
        assert_eq!(
            options.settings(mac(13, 0), 1).unwrap(),
            std::slice::from_ref(&units)
        );
        assert!(options.settings(mac(14, 9), 2).is_err());
        let both = options.settings(mac(15, 0), 2).unwrap();
        assert_eq!(both, [units, Setting::Function("main".into())]);
    }

    #[test]
    fn hints_are_set_where_they_exist_and_refused_elsewhere() {
        let options = LoadOptions {
            compute_units: ComputeUnits::CpuAndNeuralEngine,
            low_precision_accumulation: true,
            reshape_frequency: Some(ReshapeFrequency::Infrequent),
            specialization: Some(Specialization::FastPrediction),
            ..LoadOptions::default()
        };
        let settings = options.settings(mac(15, 0), 1).unwrap();
        assert_eq!(settings.len(), 4);
        assert_eq!(settings[0], Setting::ComputeUnits(3));
        assert!(options.settings(mac(14, 4), 1).is_err(), "no strategy there");
        let reshape_only = LoadOptions {
            specialization: None,
            ..options
        };
        assert!(reshape_only.settings(mac(14, 4), 1).is_ok());
        assert!(reshape_only.settings(mac(14, 3), 1).is_err());
    }
}
