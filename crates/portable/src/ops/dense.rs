//! Row-major memory of a run: what operations that compute element by element on slices read and write.

use crate::error::{OpError, OpResult};
use crate::op::{Args, In, Out};
use candle_coreml_kernels::ViewMut;

/// Input 0 and result 0 of one type, row-major.
pub enum Pair<'a> {
    /// Floats.
    F32(&'a [f32], &'a mut [f32]),
    /// Integers and truth values.
    I32(&'a [i32], &'a mut [i32]),
}

/// The elements of a row-major result.
///
/// # Errors
/// When the result is not row-major, which is a mistake of the engine.
pub fn elements_mut<'a, T>(view: ViewMut<'a, T>) -> OpResult<&'a mut [T]> {
    let (offset, len, dense) = (view.offset(), view.len(), view.is_contiguous());
    view.into_data()
        .get_mut(offset..offset + len)
        .filter(|_| dense)
        .ok_or_else(|| OpError::new("internal: a result is not row-major"))
}

impl<'a> Args<'a> {
    /// Takes input 0 and result 0, which have one type.
    ///
    /// # Errors
    /// When they differ or are not row-major, which is a mistake of the engine.
    pub fn pair(&mut self) -> OpResult<Pair<'a>> {
        match self.inputs.first() {
            Some(In::F32(_)) => Ok(Pair::F32(self.f32s(0)?, self.result_f32(0)?)),
            _ => Ok(Pair::I32(self.i32s(0)?, self.result_i32(0)?)),
        }
    }

    /// Takes result `index` as row-major floats.
    ///
    /// # Errors
    /// As [`Args::pair`].
    pub fn result_f32(&mut self, index: usize) -> OpResult<&'a mut [f32]> {
        elements_mut(self.out_f32(index)?)
    }

    /// Takes result `index` as row-major integers.
    ///
    /// # Errors
    /// As [`Args::pair`].
    pub fn result_i32(&mut self, index: usize) -> OpResult<&'a mut [i32]> {
        elements_mut(self.out_i32(index)?)
    }

    /// True when result `index` holds floats and was not taken yet.
    pub fn gives_f32(&self, index: usize) -> bool {
        matches!(self.outputs.get(index), Some(Some(Out::F32(_))))
    }
}
