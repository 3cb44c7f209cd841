//! Memory for what weights are packed into: large pieces, in large pages where the system has them.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What a piece begins at a multiple of: a large page.
const PAGE: usize = 2 << 20;

/// Bytes of a piece that several parts share.
const SHARED: usize = 32 << 20;

/// The piece that the next part is taken from, as long as a part of it is alive, and how much of it is taken.
static OPEN: Mutex<(Weak<Slab>, usize)> = Mutex::new((Weak::new(), 0));

#[derive(Debug)]
struct Slab {
    data: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory; who has a part of it says who reads and writes.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `Part::new`.
        unsafe { dealloc(self.data.as_ptr(), self.layout) };
    }
}

/// Some bytes of a piece, from a multiple of 64 on, not initialised.
#[derive(Debug)]
pub(crate) struct Part {
    first: NonNull<u8>,
    _slab: Arc<Slab>,
}

// SAFETY: as for `Slab`.
unsafe impl Send for Part {}
// SAFETY: as for `Slab`.
unsafe impl Sync for Part {}

impl Part {
    /// `len` bytes.
    pub(crate) fn new(len: usize) -> Part {
        let len = len.next_multiple_of(64);
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slab) = open.0.upgrade()
            && slab.layout.size() - open.1 >= len
        {
            let first = slab.data;
            // SAFETY: inside the piece, as was asked above.
            let first = unsafe { first.add(open.1) };
            open.1 += len;
            return Part { first, _slab: slab };
        }
        let size = len.next_multiple_of(PAGE).max(SHARED);
        let layout = Layout::from_size_align(size, PAGE).expect("weights fit the address space");
        // SAFETY: the size is above zero.
        let Some(data) = NonNull::new(unsafe { alloc(layout) }) else {
            handle_alloc_error(layout)
        };
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        // SAFETY: whole pages that were allocated just now. Advice that is not taken leaves the memory as it was.
        unsafe {
            libc::madvise(data.as_ptr().cast(), size, libc::MADV_HUGEPAGE);
        }
        let slab = Arc::new(Slab { data, layout });
        *open = (Arc::downgrade(&slab), len);
        Part {
            first: data,
            _slab: slab,
        }
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.first.as_ptr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_apart_and_large_ones_have_their_own_piece() {
        let parts: Vec<(Part, usize)> = [1, 100, SHARED, 64, SHARED + 1, 65]
            .into_iter()
            .map(|len| (Part::new(len), len))
            .collect();
        for (i, (part, len)) in parts.iter().enumerate() {
            assert!(part.as_ptr().addr().is_multiple_of(64));
            // SAFETY: the bytes of the part.
            unsafe { part.as_ptr().write_bytes(i as u8, *len) };
        }
        for (i, (part, len)) in parts.iter().enumerate() {
            // SAFETY: written above.
            let bytes = unsafe { std::slice::from_raw_parts(part.as_ptr(), *len) };
            assert!(bytes.iter().all(|b| usize::from(*b) == i), "part {i}");
        }
    }
}
