//! Where a part of a value begins and ends, when only the running model knows.

use crate::error::OpResult;
use crate::op::Args;
use smallvec::SmallVec;

/// One number a dimension.
pub type Numbers = SmallVec<[i32; 6]>;

/// The numbers of `begin` or `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bounds {
    /// All of them in one input.
    Input(usize),
    /// Each by itself: [`crate::passes`] makes these of concatenated numbers.
    Each(SmallVec<[Bound; 6]>),
}

/// One number of a [`Bounds`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Known when the model is loaded.
    Known(i32),
    /// An input of one element.
    Input(usize),
}

impl std::fmt::Debug for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bound::Known(n) => write!(f, "{n}"),
            Bound::Input(index) => write!(f, "input {index}"),
        }
    }
}

impl Bounds {
    /// The numbers for a run.
    pub fn read(&self, args: &Args<'_>) -> OpResult<Numbers> {
        match self {
            Bounds::Input(index) => Ok(Numbers::from_slice(args.i32s(*index)?)),
            Bounds::Each(all) => all
                .iter()
                .map(|bound| match *bound {
                    Bound::Known(n) => Ok(n),
                    Bound::Input(index) => {
                        let first = args.i32s(index)?.first().copied();
                        first.ok_or_else(|| "internal: a bound without a number".into())
                    }
                })
                .collect(),
        }
    }
}
