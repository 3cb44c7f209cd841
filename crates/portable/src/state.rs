//! Buffers that persist between predictions.

use crate::Error;
use crate::array::{Array, Buffer, Data, OwnedArray};
use crate::layout::{Shape, elements};
use candle_coreml_kernels as kernels;
use candle_coreml_mil::DType;

/// The states of a model, zero at first: a KV-cache, typically. Cloning copies every buffer.
///
/// A state belongs to every function that declares states of the same names, shapes and types: `prefill` and `infer` of one
/// package, or all chunks of a model, may share one.
#[derive(Debug, Clone)]
pub struct State {
    pub(crate) buffers: Vec<StateBuffer>,
}

/// One buffer.
#[derive(Debug, Clone)]
pub(crate) struct StateBuffer {
    pub name: String,
    pub dtype: DType,
    pub shape: Shape,
    pub data: StateData,
}

/// Elements as they are kept: fp16 states in 32 bits too, since a KV-cache rounded to fp16 is the largest error of a language model
/// that is otherwise computed in 32 bits, and changes close decisions.
#[derive(Debug, Clone)]
pub(crate) enum StateData {
    F32(Vec<f32>),
    I32(Vec<i32>),
}

impl StateData {
    fn zeroed(dtype: DType, count: usize) -> StateData {
        if crate::graph::Storage::of(dtype) == crate::graph::Storage::I32 {
            StateData::I32(vec![0; count])
        } else {
            StateData::F32(vec![0.0; count])
        }
    }
}

impl State {
    pub(crate) fn new(declared: &[(String, DType, Shape)]) -> State {
        let buffer = |(name, dtype, shape): &(String, DType, Shape)| StateBuffer {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
            data: StateData::zeroed(*dtype, elements(shape)),
        };
        State {
            buffers: declared.iter().map(buffer).collect(),
        }
    }

    /// Names in the order of the function's declaration.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.buffers.iter().map(|b| b.name.as_str())
    }

    /// Type and shape of a state.
    pub fn describe(&self, name: &str) -> Option<(DType, &[usize])> {
        self.buffers
            .iter()
            .find(|b| b.name == name)
            .map(|b| (b.dtype, b.shape.as_slice()))
    }

    /// A copy of a state's elements.
    pub fn get(&self, name: &str) -> Option<OwnedArray> {
        let b = self.buffers.iter().find(|b| b.name == name)?;
        let data = match &b.data {
            StateData::F32(v) => Buffer::F32(v.clone()),
            StateData::I32(v) => Buffer::I32(v.clone()),
        };
        Some(OwnedArray {
            shape: b.shape.to_vec(),
            data,
        })
    }

    /// Replaces a state's elements.
    ///
    /// # Errors
    /// When there is no such state, or shape or kind differ.
    pub fn set(&mut self, name: &str, value: Array<'_>) -> Result<(), Error> {
        let names: Vec<String> = self.names().map(String::from).collect();
        let fail = |message| Error::Value {
            what: "state",
            name: name.into(),
            message,
        };
        let Some(b) = self.buffers.iter_mut().find(|b| b.name == name) else {
            return Err(fail(format!(
                "there is none of that name; the states are: {}",
                names.join(", ")
            )));
        };
        if value.shape != b.shape.as_slice() || value.data.len() != elements(&b.shape) {
            return Err(fail(format!(
                "shape {:?} came, it has {:?}",
                value.shape,
                b.shape.as_slice()
            )));
        }
        match (&mut b.data, value.data) {
            (StateData::F32(to), Data::F16(from)) => kernels::f16_to_f32(from, to),
            (StateData::F32(to), Data::F32(from)) => to.copy_from_slice(from),
            (StateData::I32(to), Data::I32(from)) => to.copy_from_slice(from),
            _ => return Err(fail(format!("elements of another kind came, it has {}", b.dtype))),
        }
        Ok(())
    }

    /// Sets every element to zero, as after creation.
    pub fn reset(&mut self) {
        for b in &mut self.buffers {
            match &mut b.data {
                StateData::F32(v) => v.fill(0.0),
                StateData::I32(v) => v.fill(0),
            }
        }
    }

    /// Position of each declared state in this one.
    ///
    /// # Errors
    /// When one is missing or has another type or shape: the state belongs to another model.
    pub(crate) fn match_declared(&self, declared: &[(String, DType, Shape)]) -> Result<Vec<usize>, Error> {
        let find = |(name, dtype, shape): &(String, DType, Shape)| {
            let at = self.buffers.iter().position(|b| &b.name == name);
            let same = |b: &StateBuffer| b.dtype == *dtype && b.shape == *shape;
            match at {
                Some(i) if same(&self.buffers[i]) => Ok(i),
                Some(i) => {
                    let b = &self.buffers[i];
                    let have = format!("{}{:?}", b.dtype, b.shape.as_slice());
                    let message = format!(
                        "this state belongs to another model: it is {have}, {dtype}{:?} is needed",
                        shape.as_slice()
                    );
                    Err(Error::Value {
                        what: "state",
                        name: name.clone(),
                        message,
                    })
                }
                None => {
                    let have: Vec<&str> = self.names().collect();
                    let message = format!(
                        "this state belongs to another model: it has only: {}",
                        have.join(", ")
                    );
                    Err(Error::Value {
                        what: "state",
                        name: name.clone(),
                        message,
                    })
                }
            }
        };
        declared.iter().map(find).collect()
    }
}
