//! One block of memory for all intermediate values of a plan, lent out as disjoint slices.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;

/// Every value starts at a multiple of this many elements (64 bytes), so that vector loads are aligned.
pub const ALIGN_ELEMENTS: usize = 16;

const ALIGN_BYTES: usize = 64;

/// A 64-byte aligned, zeroed block of 4-byte elements.
///
/// Values of a plan live at fixed ranges of it; [`Arena::lend`] gives the slices one step reads and writes at once and
/// refuses ranges that overlap, so callers need no unsafe code.
pub struct Arena {
    data: NonNull<f32>,
    len: usize,
}

// SAFETY: the arena owns its memory and gives access through `&mut self` only.
unsafe impl Send for Arena {}
// SAFETY: a shared reference gives no access to the memory at all.
unsafe impl Sync for Arena {}

impl Arena {
    /// An arena of `len` elements, zeroed.
    ///
    /// # Panics
    /// When `len` elements do not fit the address space.
    pub fn new(len: usize) -> Arena {
        if len == 0 {
            return Arena {
                data: NonNull::dangling(),
                len,
            };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout has a size above zero.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(data) = NonNull::new(raw.cast::<f32>()) else {
            handle_alloc_error(layout)
        };
        Arena { data, len }
    }

    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(4).expect("a plan's arena fits the address space");
        Layout::from_size_align(bytes, ALIGN_BYTES).expect("64 is a power of two and the size was checked")
    }

    /// Number of 4-byte elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for an arena without elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        // SAFETY: `data` points to `len` initialised elements that this arena owns, borrowed by `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }

    /// Lends the slices one step uses: `reads` may overlap each other, `writes` overlap nothing.
    ///
    /// Gives `None` when a range is outside the arena or overlaps a written one.
    pub fn lend<'a>(
        &'a mut self,
        reads: &[Range<usize>],
        writes: &[Range<usize>],
        mut on_read: impl FnMut(usize, &'a [f32]),
        mut on_write: impl FnMut(usize, &'a mut [f32]),
    ) -> Option<()> {
        let inside = |r: &Range<usize>| r.start <= r.end && r.end <= self.len;
        let apart = |a: &Range<usize>, b: &Range<usize>| {
            a.start >= b.end || b.start >= a.end || a.is_empty() || b.is_empty()
        };
        if !reads.iter().chain(writes).all(inside) {
            return None;
        }
        for (i, w) in writes.iter().enumerate() {
            let free = reads.iter().all(|r| apart(r, w)) && writes[..i].iter().all(|o| apart(o, w));
            if !free {
                return None;
            }
        }
        for (i, r) in reads.iter().enumerate() {
            // SAFETY: the range was checked to be inside the arena and apart from every written range.
            on_read(i, unsafe {
                std::slice::from_raw_parts(self.data.as_ptr().add(r.start), r.len())
            });
        }
        for (i, w) in writes.iter().enumerate() {
            // SAFETY: the range was checked to be inside the arena and apart from every other lent range.
            on_write(i, unsafe {
                std::slice::from_raw_parts_mut(self.data.as_ptr().add(w.start), w.len())
            });
        }
        Some(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `new` with the same layout.
            unsafe { dealloc(self.data.as_ptr().cast(), Self::layout(self.len)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lend(arena: &mut Arena, reads: &[Range<usize>], writes: &[Range<usize>]) -> Option<()> {
        arena.lend(reads, writes, |_, _| {}, |_, s| s.fill(1.0))
    }

    #[test]
    fn overlapping_or_outside_ranges_are_refused() {
        let mut arena = Arena::new(64);
        assert!(lend(&mut arena, &[0..16, 8..24], &[32..48, 48..64]).is_some());
        for (reads, writes) in [
            (vec![0..17], vec![16..32]),
            (vec![], vec![0..17, 16..32]),
            (vec![], vec![60..65]),
            (vec![0..65], vec![]),
        ] {
            assert!(
                lend(&mut arena, &reads, &writes).is_none(),
                "{reads:?} {writes:?}"
            );
        }
    }

    #[test]
    fn written_values_are_read_back() {
        let mut arena = Arena::new(32);
        lend(&mut arena, &[], &[16..32]).expect("inside");
        let mut seen = Vec::new();
        arena
            .lend(&[8..24], &[], |_, s| seen = s.to_vec(), |_, _| {})
            .expect("inside");
        assert_eq!(seen[..8], [0.0; 8]);
        assert_eq!(seen[8..], [1.0; 8]);
    }
}
