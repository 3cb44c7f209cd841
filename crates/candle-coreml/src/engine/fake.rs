//! An engine for tests: its description is given, and what it computes is a closure.

use super::*;
use crate::error::BoxError;
use candle_core::{Device, Tensor};
use candle_coreml_mil::{ArrayDescription, DType, Feature, FeatureType, Flexibility};
use std::collections::BTreeMap;

/// What the fake computes: outputs in the declared order.
pub(crate) type Run =
    dyn Fn(&[Input<'_>], Option<&mut FakeState>) -> Result<Vec<(String, Value)>, BoxError> + Send + Sync;

#[derive(Clone)]
pub(crate) struct FakeEngine {
    description: Arc<Description>,
    function: usize,
    run: Arc<Run>,
}

/// Buffers as f32 tensors or whatever was written last.
#[derive(Clone, Default)]
pub(crate) struct FakeState {
    pub buffers: BTreeMap<String, Tensor>,
}

/// A multi-array of a fixed shape.
pub(crate) fn array(dtype: DType, shape: &[usize]) -> ArrayDescription {
    ArrayDescription {
        dtype,
        shape: shape.to_vec(),
        flexibility: Flexibility::Fixed,
        default_value: None,
    }
}

/// A required multi-array feature.
pub(crate) fn feature(name: &str, array: ArrayDescription) -> Feature {
    typed(name, FeatureType::MultiArray(array))
}

/// A required feature of any kind.
pub(crate) fn typed(name: &str, ty: FeatureType) -> Feature {
    Feature {
        name: name.into(),
        description: String::new(),
        ty,
        optional: false,
    }
}

/// An optional multi-array feature.
pub(crate) fn optional(name: &str, mut array: ArrayDescription, default_value: Option<f64>) -> Feature {
    array.default_value = default_value;
    Feature {
        optional: true,
        ..feature(name, array)
    }
}

/// A state of a fixed shape.
pub(crate) fn state(name: &str, dtype: DType, shape: &[usize]) -> Feature {
    typed(name, FeatureType::State(array(dtype, shape)))
}

impl FakeEngine {
    pub(crate) fn engine<F>(functions: Vec<FunctionDescription>, run: F) -> Arc<dyn Engine>
    where
        F: Fn(&[Input<'_>], Option<&mut FakeState>) -> Result<Vec<(String, Value)>, BoxError>
            + Send
            + Sync
            + 'static,
    {
        let description = Description {
            default_function: functions.first().map(|f| f.name.clone()).unwrap_or_default(),
            functions,
            specification_version: 9,
            ..Description::default()
        };
        Arc::new(FakeEngine {
            description: Arc::new(description),
            function: 0,
            run: Arc::new(run),
        })
    }
}

impl Engine for FakeEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Portable
    }

    fn description(&self) -> &Description {
        &self.description
    }

    fn function(&self) -> &FunctionDescription {
        &self.description.functions[self.function]
    }

    fn with_function(&self, name: &str) -> Result<Arc<dyn Engine>, Error> {
        let function = self
            .description
            .functions
            .iter()
            .position(|f| f.name == name)
            .unwrap();
        Ok(Arc::new(FakeEngine {
            function,
            ..self.clone()
        }))
    }

    fn make_state(&self) -> Result<Box<dyn EngineState>, Error> {
        let mut state = FakeState::default();
        for feature in &self.function().states {
            let FeatureType::State(array) = &feature.ty else {
                panic!("not a state")
            };
            let zeros = Tensor::zeros(array.shape.as_slice(), candle_core::DType::F32, &Device::Cpu)?;
            state.buffers.insert(feature.name.clone(), zeros);
        }
        Ok(Box::new(state))
    }

    fn predict(
        &self,
        inputs: &[Input<'_>],
        state: Option<&mut dyn EngineState>,
    ) -> Result<Vec<(String, Value)>, Error> {
        let state = state.map(|s| s.as_any_mut().downcast_mut::<FakeState>().unwrap());
        (self.run)(inputs, state).map_err(|source| Error::Engine {
            engine: EngineKind::Portable,
            source,
        })
    }
}

impl EngineState for FakeState {
    fn read(&self, name: &str) -> Result<Tensor, Error> {
        Ok(self.buffers[name].copy()?)
    }

    fn write(&mut self, name: &str, array: Array<'_>) -> Result<(), Error> {
        self.buffers.insert(name.to_string(), array.to_tensor()?);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        for buffer in self.buffers.values_mut() {
            *buffer = buffer.zeros_like()?;
        }
        Ok(())
    }

    fn fork(&self) -> Result<Box<dyn EngineState>, Error> {
        Ok(Box::new(self.clone()))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Array<'_> {
    pub(crate) fn to_tensor(self) -> candle_core::Result<Tensor> {
        match self.data {
            Data::F16(d) => Tensor::from_slice(d, self.shape, &Device::Cpu),
            Data::F32(d) => Tensor::from_slice(d, self.shape, &Device::Cpu),
            Data::F64(d) => Tensor::from_slice(d, self.shape, &Device::Cpu),
            Data::I32(d) => Tensor::from_slice(d, self.shape, &Device::Cpu),
            Data::I8(d) => {
                let wide: Vec<i32> = d.iter().map(|&v| v.into()).collect();
                Tensor::from_vec(wide, self.shape, &Device::Cpu)
            }
        }
    }

    /// Where the elements are, to see whether they were copied.
    pub(crate) fn address(self) -> usize {
        match self.data {
            Data::F16(d) => d.as_ptr().addr(),
            Data::F32(d) => d.as_ptr().addr(),
            Data::F64(d) => d.as_ptr().addr(),
            Data::I32(d) => d.as_ptr().addr(),
            Data::I8(d) => d.as_ptr().addr(),
        }
    }
}
