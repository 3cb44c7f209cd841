//! Working memory that is kept between calls.

use bytemuck::{Pod, Zeroable};

/// One cache line; what the buffer is made of, so that it is aligned for the widest vectors.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A buffer that grows to what the largest call needs and is reused by the next one. Make one per thread of
/// evaluation; a call that fits allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    /// An empty buffer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
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
            self.lines.resize(lines, Line::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..len]
    }
}
