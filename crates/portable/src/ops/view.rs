//! Operations that move no elements: another shape, another order, a part, a repetition.

use crate::error::{OpError, OpResult};
use crate::graph::ValueId;
use crate::layout::{Layout, Shape, Strides};
use crate::lower::OpCx;
use crate::op::{Args, Op};
use candle_coreml_mil::DType;

/// A way to look at the elements of an input without moving them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum View {
    /// The same elements under another shape.
    Reshape(Shape),
    /// Dimensions in another order.
    Permute(Shape),
    /// Every `step`-th element from `begin`, `size` of them, along each dimension.
    Slice {
        /// First index.
        begin: Shape,
        /// Distance, negative to run backwards.
        step: Strides,
        /// Number of elements.
        size: Shape,
    },
    /// Repeated to a larger shape.
    Broadcast(Shape),
    /// The same elements under another type of the same storage.
    Same,
}

impl Op for View {
    fn name(&self) -> &'static str {
        match self {
            View::Reshape(_) => "reshape",
            View::Permute(_) => "permute",
            View::Slice { .. } => "slice",
            View::Broadcast(_) => "broadcast",
            View::Same => "same",
        }
    }

    fn is_view(&self) -> bool {
        true
    }

    fn view(&self, input: &Layout) -> Option<Layout> {
        match self {
            View::Reshape(shape) => input.reshape(shape),
            View::Permute(perm) => Some(input.permute(perm)),
            View::Slice { begin, step, size } => Some(input.slice(begin, step, size)),
            View::Broadcast(shape) => input.broadcast(shape),
            View::Same => Some(input.clone()),
        }
    }

    fn key(&self) -> Option<String> {
        Some(format!("{self:?}"))
    }

    fn run(&self, _args: &mut Args<'_>) -> OpResult<()> {
        Err(OpError::new("internal: a view is never run"))
    }
}

impl OpCx<'_, '_> {
    /// The same elements under another shape.
    pub fn reshape(&mut self, x: ValueId, shape: &[usize]) -> OpResult<ValueId> {
        if self.shape(x).as_slice() == shape {
            return Ok(x);
        }
        self.emit(View::Reshape(shape.into()), &[x], self.dtype(x), shape)
    }

    /// Dimensions in another order.
    pub fn permute(&mut self, x: ValueId, perm: &[usize]) -> OpResult<ValueId> {
        if perm.iter().enumerate().all(|(i, &p)| i == p) {
            return Ok(x);
        }
        let shape = self.shape(x);
        let out: Shape = perm.iter().map(|&p| shape[p]).collect();
        self.emit(View::Permute(perm.into()), &[x], self.dtype(x), &out)
    }

    /// A part.
    pub fn slice(
        &mut self,
        x: ValueId,
        begin: &[usize],
        step: &[isize],
        size: &[usize],
    ) -> OpResult<ValueId> {
        if self.shape(x).as_slice() == size && step.iter().all(|&s| s == 1) {
            return Ok(x);
        }
        let op = View::Slice {
            begin: begin.into(),
            step: step.into(),
            size: size.into(),
        };
        self.emit(op, &[x], self.dtype(x), size)
    }

    /// A repetition.
    pub fn broadcast(&mut self, x: ValueId, shape: &[usize]) -> OpResult<ValueId> {
        if self.shape(x).as_slice() == shape {
            return Ok(x);
        }
        self.emit(View::Broadcast(shape.into()), &[x], self.dtype(x), shape)
    }

    /// The same elements under another type that is stored alike.
    pub fn same(&mut self, x: ValueId, dtype: DType) -> OpResult<ValueId> {
        let shape = self.shape(x);
        self.emit(View::Same, &[x], dtype, &shape)
    }
}

/// The strides of a row-major value, for views made from shapes alone.
pub fn unit_steps(rank: usize) -> Strides {
    Strides::from_elem(1, rank)
}
