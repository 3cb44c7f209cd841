//! What a model keeps between predictions, for instance the keys and values of a language model.

use crate::allowed;
use crate::convert::{self, Target};
use crate::engine::{EngineKind, EngineState};
use crate::error::{Error, FeatureRole};
use candle_core::{DType, Tensor};
use candle_coreml_mil::{DType as Declared, Feature, FeatureType, FunctionDescription};
use std::sync::Arc;

/// The state buffers of a model, made by [`CoreMLModel::make_state`](crate::CoreMLModel::make_state).
///
/// One state may serve several functions and several models, as long as they declare the same states and run on the same
/// engine: the prefill and the decode function of a language model, or the chunks it was cut into.
///
/// A state is used by one call at a time: a prediction borrows it mutably, and it is `Send` but not `Sync`, because
/// Core ML forbids even reading it while another thread does.
///
/// ```no_run
/// use candle_coreml::CoreMLModel;
/// # let token = candle_core::Tensor::new(&[[1i64]], &candle_core::Device::Cpu)?;
/// let model = CoreMLModel::load("model.mlpackage")?;
/// let mut state = model.make_state()?;
/// let before = state.fork()?;
/// model.predict_with_state(&[("input_ids", &token)], &mut state)?;
/// state = before; // as if the prediction had not been
/// # Ok::<(), candle_coreml::Error>(())
/// ```
///
/// ```compile_fail
/// fn shared<T: Sync>() {}
/// shared::<candle_coreml::CoreMLState>();
/// ```
pub struct CoreMLState {
    pub(crate) inner: Box<dyn EngineState>,
    engine: EngineKind,
    features: Arc<[Feature]>,
}

impl CoreMLState {
    pub(crate) fn new(inner: Box<dyn EngineState>, engine: EngineKind, features: &[Feature]) -> Self {
        CoreMLState {
            inner,
            engine,
            features: features.into(),
        }
    }

    /// The buffers as the model declares them: names, dtypes, shapes.
    pub fn features(&self) -> &[Feature] {
        &self.features
    }

    /// The names of the buffers in the declared order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.features.iter().map(|f| f.name.as_str())
    }

    /// A copy of the buffer `name`, in the declared shape, on the CPU; fp16 buffers come as `f16`, fp32 as `f32`,
    /// int32 and int8 as `i32`.
    ///
    /// # Errors
    /// [`Error::UnknownState`] with the names there are; [`Error::Engine`] when the engine fails.
    pub fn read(&self, name: &str) -> Result<Tensor, Error> {
        let target = self.target(name)?;
        convert::as_declared(self.inner.read(name)?, target.array.dtype)
    }

    /// Replaces the buffer `name`. The tensor has the declared shape; dtypes convert as those of inputs do.
    ///
    /// # Errors
    /// [`Error::UnknownState`], [`Error::Shape`], [`Error::DType`], [`Error::Element`], [`Error::Device`];
    /// [`Error::Engine`] when the engine fails. The buffer is then as it was.
    pub fn write(&mut self, name: &str, tensor: &Tensor) -> Result<(), Error> {
        let prepared = convert::prepare(self.target(name)?, tensor)?;
        let locked = prepared.lock()?;
        self.inner.write(name, locked.array())
    }

    /// Every buffer by name, as the engine keeps it: 32-bit floats where the portable engine has them for a declared fp16, so
    /// that nothing is lost when they are saved and [restored](Self::restore).
    ///
    /// # Errors
    /// [`Error::Engine`] when the engine fails.
    pub fn snapshot(&self) -> Result<Vec<(String, Tensor)>, Error> {
        self.names()
            .map(|name| Ok((name.to_string(), self.inner.read(name)?)))
            .collect()
    }

    /// Replaces every buffer by those of a [`snapshot`](Self::snapshot), of this engine or another.
    ///
    /// # Errors
    /// [`Error::UnknownState`] for a name there is no buffer of, or for a buffer that is not among them; otherwise as
    /// [`write`](Self::write). Buffers may then be replaced in part.
    pub fn restore(&mut self, buffers: &[(String, Tensor)]) -> Result<(), Error> {
        let found = |name: &str| buffers.iter().find(|(n, _)| n == name).map(|(_, t)| t);
        if let Some((name, _)) = buffers.iter().find(|(n, _)| !self.names().any(|own| own == n)) {
            self.target(name)?;
        }
        let features = self.features.clone();
        for feature in features.iter() {
            let tensor = found(&feature.name).ok_or_else(|| Error::UnknownState {
                name: feature.name.clone(),
                allowed: buffers.iter().map(|(n, _)| n.clone()).collect(),
            })?;
            let target = self.target(&feature.name)?;
            let mut wide = target.array.clone();
            if self.engine == EngineKind::Portable
                && tensor.dtype() == DType::F32
                && wide.dtype == Declared::Fp16
            {
                wide.dtype = Declared::Fp32;
            }
            let prepared = convert::prepare(
                Target {
                    array: &wide,
                    ..target
                },
                tensor,
            )?;
            let locked = prepared.lock()?;
            self.inner.write(&feature.name, locked.array())?;
        }
        Ok(())
    }

    /// Sets every buffer to zero, as `make_state` gave it.
    ///
    /// # Errors
    /// [`Error::Engine`] when the engine fails.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.inner.reset()
    }

    /// An independent copy: predictions with one leave the other as it is.
    ///
    /// # Errors
    /// [`Error::Engine`] when the engine fails.
    pub fn fork(&self) -> Result<Self, Error> {
        Ok(CoreMLState {
            inner: self.inner.fork()?,
            engine: self.engine,
            features: self.features.clone(),
        })
    }

    /// Refuses a state that was made for other declarations or by another engine.
    pub(crate) fn check(&self, engine: EngineKind, function: &FunctionDescription) -> Result<(), Error> {
        let same = |a: &Feature| {
            function
                .states
                .iter()
                .any(|b| a.name == b.name && same_buffer(a, b))
        };
        let fits = self.features.len() == function.states.len() && self.features.iter().all(same);
        if fits && engine == self.engine {
            return Ok(());
        }
        Err(Error::StateMismatch {
            function: function.name.clone(),
            found: describe(self.engine, &self.features),
            allowed: describe(engine, &function.states),
        })
    }

    fn target(&self, name: &str) -> Result<Target<'_>, Error> {
        let found = self.features.iter().find(|f| f.name == name);
        match found.map(|f| (f, &f.ty)) {
            Some((feature, FeatureType::State(array) | FeatureType::MultiArray(array))) => Ok(Target {
                role: FeatureRole::State,
                name: &feature.name,
                array,
            }),
            _ => Err(Error::UnknownState {
                name: name.to_string(),
                allowed: self.names().map(str::to_string).collect(),
            }),
        }
    }
}

impl std::fmt::Debug for CoreMLState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CoreMLState({})", describe(self.engine, &self.features))
    }
}

/// True when both declare the same shape and dtype; the author's words about them do not matter.
fn same_buffer(a: &Feature, b: &Feature) -> bool {
    match (&a.ty, &b.ty) {
        (FeatureType::State(a), FeatureType::State(b)) => a.shape == b.shape && a.dtype == b.dtype,
        (a, b) => a == b,
    }
}

fn describe(engine: EngineKind, states: &[Feature]) -> String {
    if states.is_empty() {
        return "no states".to_string();
    }
    let states: Vec<String> = states.iter().map(allowed::named).collect();
    format!("{} of the {engine} engine", states.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CoreMLModel;
    use crate::engine::fake::{FakeEngine, state};
    use candle_core::Device;

    fn model(name: &str, states: Vec<Feature>) -> CoreMLModel {
        let function = FunctionDescription {
            name: name.into(),
            states,
            ..FunctionDescription::default()
        };
        // Each run adds one to every buffer.
        CoreMLModel::from_engine(FakeEngine::engine(vec![function], |_, state| {
            for buffer in state.ok_or("no state")?.buffers.values_mut() {
                *buffer = (&*buffer + 1.0)?;
            }
            Ok(vec![])
        }))
        .unwrap()
    }

    fn cache() -> Feature {
        state("cache", Declared::Fp16, &[2, 3])
    }

    fn sum(state: &CoreMLState, name: &str) -> f32 {
        let tensor = state.read(name).unwrap().to_dtype(DType::F32).unwrap();
        tensor.sum_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn a_state_changes_by_predictions_writes_and_resets_and_forks_do_not_follow() {
        let model = model("main", vec![cache()]);
        let mut state = model.make_state().unwrap();
        assert_eq!(sum(&state, "cache"), 0.0);
        model.predict_with_state(&[], &mut state).unwrap();
        let fork = state.fork().unwrap();
        model.predict_with_state(&[], &mut state).unwrap();
        assert_eq!((sum(&state, "cache"), sum(&fork, "cache")), (12.0, 6.0));
        let turned = Tensor::arange(0i64, 6, &Device::Cpu)
            .unwrap()
            .reshape((3, 2))
            .unwrap()
            .t()
            .unwrap();
        state.write("cache", &turned).unwrap();
        let read = state.read("cache").unwrap();
        assert_eq!((read.dtype(), read.dims()), (DType::F16, &[2, 3][..]));
        let read = read.to_dtype(DType::I64).unwrap().to_vec2::<i64>().unwrap();
        assert_eq!(read, [[0, 2, 4], [1, 3, 5]]);
        state.reset().unwrap();
        assert_eq!((sum(&state, "cache"), sum(&fork, "cache")), (0.0, 6.0));
    }

    #[test]
    fn wrong_names_and_shapes_of_buffers_are_refused() {
        let mut state = model("main", vec![cache()]).make_state().unwrap();
        let words = state.read("kv").unwrap_err().to_string();
        assert_eq!(words, r#"no state "kv"; the states are: "cache""#);
        let tensor = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
        let words = state.write("cache", &tensor).unwrap_err().to_string();
        assert_eq!(
            words,
            r#"state "cache": shape [3, 2] is not allowed; allowed: [2, 3]"#
        );
    }

    #[test]
    fn a_state_serves_every_model_that_declares_the_same_and_no_other() {
        let other = || state("other", Declared::Fp16, &[1]);
        let mut made = model("prefill", vec![cache(), other()]).make_state().unwrap();
        let rows = [
            (vec![cache(), other()], true),
            (vec![other(), cache()], true),
            (vec![cache()], false),
            (vec![cache(), state("renamed", Declared::Fp16, &[1])], false),
            (vec![cache(), state("other", Declared::Fp32, &[1])], false),
            (vec![cache(), state("other", Declared::Fp16, &[2])], false),
            (vec![], false),
        ];
        for (states, fits) in rows {
            let model = model("infer", states.clone());
            match model.predict_with_state(&[], &mut made) {
                Ok(_) => assert!(fits, "{states:?}"),
                Err(error) => {
                    let words = error.to_string();
                    assert!(
                        !fits && words.contains(r#""cache" (a tensor fp16 [2, 3])"#),
                        "{words}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_snapshot_is_the_whole_state_and_fits_its_own_declarations_only() {
        let mut made = model("main", vec![cache()]).make_state().unwrap();
        let third = Tensor::full(1.0f32 / 3.0, (2, 3), &Device::Cpu).unwrap();
        made.restore(&[("cache".to_string(), third)]).unwrap();
        let snapshot = made.snapshot().unwrap();
        assert_eq!(
            snapshot[0].1.to_vec2::<f32>().unwrap()[1],
            [1.0 / 3.0; 3],
            "not rounded to fp16"
        );
        made.reset().unwrap();
        made.restore(&snapshot).unwrap();
        assert!((sum(&made, "cache") - 2.0).abs() < 1e-3);
        let mut other = model("main", vec![state("kv", Declared::Fp16, &[2, 3])])
            .make_state()
            .unwrap();
        assert!(matches!(other.restore(&snapshot), Err(Error::UnknownState { name, .. }) if name == "cache"));
        assert!(matches!(made.restore(&[]), Err(Error::UnknownState { .. })));
        let wrong = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
        let wrong = made.restore(&[("cache".to_string(), wrong)]);
        assert!(matches!(wrong, Err(Error::Shape { .. })));
    }

    #[test]
    fn a_state_can_move_to_another_thread() {
        fn assert_send<T: Send>() {}
        assert_send::<CoreMLState>();
    }
}
