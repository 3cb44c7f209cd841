//! A part of a block that was lowered and planned as one, and the store of those.

use super::outline::{BlockId, Id, Outline};
use crate::constant::Const;
use crate::item::Item;
use crate::layout::Shape;
use crate::plan::Plan;
use crate::recent::Recent;
use candle_coreml_mil::{self as mil, DType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Plans kept for one place of a program: as many different shapes may take turns there.
const KEPT_AT_ONE_PLACE: usize = 16;

/// Operations from one place up to the next that needs a computed value.
pub(super) struct Segment {
    /// The operation behind the last.
    pub end: usize,
    /// Values it reads, which the plan was made for.
    pub reads: Vec<(Id, Expected)>,
    /// None when there is nothing to compute.
    pub plan: Option<Plan>,
    /// Where the plan's outputs go.
    pub outputs: Vec<Id>,
    /// Results that are constant for these inputs.
    pub items: Vec<(Id, Item)>,
}

/// What a segment was lowered for.
pub(super) enum Expected {
    /// Any elements of this type and shape.
    Shaped(DType, Shape),
    /// This constant.
    Same(Arc<Const>),
}

impl Segment {
    /// True when the values at hand are what the segment was lowered for.
    pub fn fits(&self, values: &[Option<Item>]) -> bool {
        self.reads.iter().all(|(id, expected)| {
            let item = values.get(*id).and_then(Option::as_ref);
            let Some(Item::Tensor { value, fixed }) = item else {
                return false;
            };
            match expected {
                Expected::Shaped(dtype, shape) => !fixed && value.dtype == *dtype && value.shape == *shape,
                Expected::Same(constant) => *fixed && Arc::ptr_eq(value, constant),
            }
        })
    }
}

/// A function that runs in stages: its outline and the segments planned so far.
pub(crate) struct Staged {
    pub(super) outline: Outline,
    segments: Mutex<HashMap<(BlockId, usize), Recent<Segment>>>,
}

impl Staged {
    /// Nothing planned yet.
    pub fn new(function: &mil::Function) -> Staged {
        Staged {
            outline: Outline::of(function),
            segments: Mutex::default(),
        }
    }

    pub(super) fn find(&self, block: BlockId, at: usize, values: &[Option<Item>]) -> Option<Arc<Segment>> {
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        segments.get_mut(&(block, at))?.find(|s| s.fits(values))
    }

    pub(super) fn keep(&self, block: BlockId, at: usize, segment: Arc<Segment>) {
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        let place = segments.entry((block, at));
        place
            .or_insert_with(|| Recent::new(KEPT_AT_ONE_PLACE))
            .insert(segment);
    }

    /// Number of plans kept.
    pub fn plans(&self) -> usize {
        let segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        segments
            .values()
            .map(|kept| kept.count(|s| s.plan.is_some()))
            .sum()
    }
}
