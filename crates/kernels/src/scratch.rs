//! Working memory that is kept between calls.

use crate::loops::Shared;
use bytemuck::{Pod, Zeroable};

/// One cache line; what the buffer is made of, so that it is aligned for the widest vectors.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// What new memory holds. Calls find there whatever others left, so tests begin with what cannot be overlooked.
const FRESH: Line = Line([if cfg!(test) { f32::NAN } else { 0.0 }; 16]);

/// A buffer that grows to what the largest call needs and is reused by the next one. Make one per thread of
/// evaluation; a call that fits allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    lines: Vec<Line>,
    own: Vec<Line>,
    /// Lines of `own` that each worker has.
    each: usize,
}

/// Working memory of the workers of a job, apart. A worker has the same memory in every job: to write where another core wrote
/// last takes as long as to fetch it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Own {
    first: Shared<f32>,
    step: usize,
    len: usize,
}

impl Own {
    /// The memory of a worker.
    ///
    /// # Safety
    /// It is among the workers that were asked for, no other thread is this worker, and nothing else of its memory is in use.
    #[allow(clippy::mut_from_ref)] // as said above
    pub(crate) unsafe fn of(&self, worker: usize) -> &mut [f32] {
        let first = self.first.at((worker * self.step) as isize);
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(first, self.len) }
    }
}

impl Scratch {
    /// An empty buffer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.lines.len() + self.own.len()) * size_of::<Line>()
    }

    /// The first `len` numbers, which were asked for before.
    pub(crate) fn as_f32(&self, len: usize) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..len]
    }

    /// `len` numbers of any content, aligned to a cache line.
    pub(crate) fn f32(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.lines.len() < lines {
            self.lines = Vec::new();
            self.lines.resize(lines, FRESH);
        }
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..len]
    }

    /// [`Scratch::f32`], and `each` numbers for each of `workers`.
    pub(crate) fn with_own(&mut self, len: usize, workers: usize, each: usize) -> (&mut [f32], Own) {
        // Two lines are fetched together.
        let lines = each.div_ceil(16).next_multiple_of(2);
        if self.each < lines || self.own.len() < self.each * workers {
            self.each = self.each.max(lines);
            self.own = Vec::new();
            self.own.resize(self.each * workers, FRESH);
        }
        let own = Own {
            first: Shared(self.own.as_mut_ptr().cast()),
            step: self.each * 16,
            len: each,
        };
        (self.f32(len), own)
    }
}
