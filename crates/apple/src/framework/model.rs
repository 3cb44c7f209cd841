//! A loaded model, and running it.

use super::call::{call, core_ml, string, url};
use super::describe;
use super::frame::{Frame, Inputs, candidates};
use super::load::configuration;
use super::state::State;
use super::value;
use crate::error::Error;
use crate::options::{LoadOptions, OsVersion, Part};
use crate::reuse::{KEPT, Key};
use crate::value::OwnedValue;
use candle_coreml_mil::FunctionDescription;
use objc2::AnyThread;
use objc2::rc::Retained;
use objc2::runtime::ProtocolObject;
use objc2_core_ml::{MLArrayBatchProvider, MLBatchProvider, MLFeatureProvider, MLModel};
use objc2_foundation::{NSArray, NSString};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The outputs of one prediction, in the declared order.
pub type Outputs = Vec<(String, OwnedValue)>;

/// A model loaded by Core ML to run one of its functions.
///
/// `Send` and `Sync`: Apple's documentation of MLModel says that a model may be used on several threads at once as long as
/// its predictions are separate calls; each of them has a frame of its own here.
pub struct Model {
    inner: Retained<MLModel>,
    function: FunctionDescription,
    names: Vec<Retained<NSString>>,
    frames: Mutex<Vec<Frame>>,
    /// False once Core ML was seen to keep an array over memory that is not its own.
    wraps: AtomicBool,
}

// SAFETY: MLModel is documented to predict on several threads at once, its description does not change, and strings are
// immutable. Everything else is `Send` and behind a lock.
unsafe impl Send for Model {}
// SAFETY: As above.
unsafe impl Sync for Model {}

impl Model {
    /// Loads a compiled model. `functions` is how many functions it has; `function` is what the files say about the one
    /// that is to run, or nothing where they could not be read: Core ML's own words count then.
    ///
    /// # Errors
    /// [`Error::System`] for what the system is too old for, and what Core ML says.
    pub fn load(
        compiled: &Path,
        options: &LoadOptions,
        functions: usize,
        function: Option<&FunctionDescription>,
        system: OsVersion,
    ) -> Result<Model, Error> {
        let settings = options.settings(system, functions)?;
        if function.is_some_and(|f| !f.states.is_empty()) {
            system.check(Part::States)?;
        }
        let what = format!("loading {}", compiled.display());
        call(&what, || {
            let (url, configuration) = (url(compiled)?, configuration(&settings));
            // SAFETY: A valid URL and configuration.
            let loaded = unsafe { MLModel::modelWithContentsOfURL_configuration_error(&url, &configuration) };
            let inner = loaded.map_err(core_ml(&what))?;
            let function = match function {
                Some(function) => function.clone(),
                None => {
                    let name = options.function.as_deref().unwrap_or("main");
                    describe::function(&inner, name, system)?
                }
            };
            let names = function.outputs.iter().map(|o| string(&o.name)).collect();
            Ok(Model {
                inner,
                function,
                names,
                frames: Mutex::default(),
                wraps: AtomicBool::new(true),
            })
        })
    }

    /// The function that runs.
    pub fn function(&self) -> &FunctionDescription {
        &self.function
    }

    /// What Core ML itself says about the function, in the order of the names.
    ///
    /// # Errors
    /// [`Error::Feature`] for what has no counterpart here.
    pub fn described(&self, system: OsVersion) -> Result<FunctionDescription, Error> {
        call("describing a model", || {
            describe::function(&self.inner, &self.function.name, system)
        })
    }

    /// A state of zeros.
    ///
    /// # Errors
    /// [`Error::System`] before macOS 15 and iOS 18.
    pub fn make_state(&self, system: OsVersion) -> Result<State, Error> {
        system.check(Part::States)?;
        State::new(
            &self.inner,
            self.function.states.iter().map(|s| s.name.clone()).collect(),
        )
    }

    /// Runs the function; outputs come in the declared order.
    ///
    /// # Errors
    /// What Core ML says; [`Error::Feature`] for an output that is missing or cannot be.
    pub fn predict(&self, inputs: &Inputs<'_>, state: Option<&mut State>) -> Result<Outputs, Error> {
        let (outputs, wrapped) = call("prediction", || {
            let mut frame = self.frame(inputs)?;
            let outputs = self.outputs(&*self.run(&frame, state)?)?;
            let wrapped = std::mem::take(&mut frame.wrapped);
            self.keep(frame);
            Ok((outputs, wrapped))
        })?;
        // The pool is empty now and the arrays should be gone.
        if !wrapped.iter().all(|released| released.load(Ordering::Acquire)) {
            self.wraps.store(false, Ordering::Relaxed);
        }
        Ok(outputs)
    }

    /// Runs the function on each set of inputs in one call, which Core ML may do faster than one after another.
    ///
    /// # Errors
    /// As [`predict`](Self::predict).
    pub fn predict_batch(&self, batch: &[&Inputs<'_>]) -> Result<Vec<Outputs>, Error> {
        call("batch prediction", || {
            let frames = batch.iter().map(|inputs| Frame::once(inputs, false));
            let frames = frames.collect::<Result<Vec<_>, _>>()?;
            let providers: Vec<_> = frames.iter().map(Frame::provider).collect();
            let providers = NSArray::from_slice(&providers);
            // SAFETY: An array of feature providers.
            let provider = unsafe {
                MLArrayBatchProvider::initWithFeatureProviderArray(MLArrayBatchProvider::alloc(), &providers)
            };
            let provider: &ProtocolObject<dyn MLBatchProvider> = ProtocolObject::from_ref(&*provider);
            // SAFETY: A valid batch.
            let given = unsafe { self.inner.predictionsFromBatch_error(provider) };
            let given = given.map_err(core_ml("batch prediction"))?;
            // SAFETY: A plain getter.
            let count = unsafe { given.count() };
            if usize::try_from(count) != Ok(batch.len()) {
                let problem = format!("Core ML gave {count} results for {} inputs", batch.len());
                return Err(Error::Silent {
                    what: "batch prediction".to_string(),
                    problem,
                });
            }
            // SAFETY: The index is below the count.
            (0..count)
                .map(|i| self.outputs(&*unsafe { given.featuresAtIndex(i) }))
                .collect()
        })
    }

    /// A frame with these inputs in it.
    fn frame(&self, inputs: &Inputs<'_>) -> Result<Frame, Error> {
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |f: &Frame| f.key.as_ref().is_some_and(|k| k.matches(candidates(inputs)));
        let found = frames.iter().position(fits).map(|at| frames.remove(at));
        drop(frames);
        let frame = match found {
            Some(frame) => frame,
            None => match Key::of(candidates(inputs)) {
                Some(key) => Frame::kept(key, inputs, &self.function.outputs)?,
                None => {
                    let wrap = self.wraps.load(Ordering::Relaxed);
                    // Should Core ML keep an array longer than the call, no more are wrapped: their owners would stay, too.
                    return Frame::once(inputs, wrap);
                }
            },
        };
        frame.fill(inputs)?;
        Ok(frame)
    }

    fn keep(&self, frame: Frame) {
        if frame.key.is_none() {
            return;
        }
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        if frames.len() == KEPT {
            frames.remove(0);
        }
        frames.push(frame);
    }

    fn run(
        &self,
        frame: &Frame,
        state: Option<&mut State>,
    ) -> Result<Retained<ProtocolObject<dyn MLFeatureProvider>>, Error> {
        let (provider, options) = (frame.provider(), &frame.options);
        let given = match state {
            // SAFETY: Inputs and options are this call's own, and the state is borrowed mutably.
            Some(state) => unsafe {
                self.inner
                    .predictionFromFeatures_usingState_options_error(provider, &state.inner, options)
            },
            // SAFETY: Inputs and options are this call's own.
            None => unsafe { self.inner.predictionFromFeatures_options_error(provider, options) },
        };
        given.map_err(core_ml("prediction"))
    }

    fn outputs(&self, given: &ProtocolObject<dyn MLFeatureProvider>) -> Result<Outputs, Error> {
        let outputs = self
            .function
            .outputs
            .iter()
            .zip(&self.names)
            .map(|(feature, name)| {
                // SAFETY: A plain getter.
                let value = unsafe { given.featureValueForName(name) };
                let value =
                    value.ok_or_else(|| Error::feature(&feature.name, "Core ML gave no such output"))?;
                Ok((feature.name.clone(), value::owned(&feature.name, &value)?))
            });
        outputs.collect()
    }
}
