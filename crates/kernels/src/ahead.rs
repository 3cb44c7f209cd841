//! What a thread that waits for its next job asks of memory: the weights that this job is expected to read first.
//!
//! Between two products of a decoded token one thread rotates, normalises and attends while the others wait, and memory with them.

use crate::simd::ask_line;
use crate::weights::Lines;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Asks memory for a value that is needed soon, as far as the processor can be told.
#[inline]
pub fn ask<T: ?Sized>(value: &T) {
    let first = std::ptr::from_ref(value).cast::<u8>();
    for line in (0..size_of_val(value)).step_by(64) {
        ask_line::<false>(first.wrapping_add(line));
    }
}

/// Sets of streams that one job reads side by side, at most: a matrix, or a gate and what it multiplies.
const SETS: usize = 2;

/// What one thread's part of the next job is expected to read, alone in its lines of cache. A reader may see one announcement mixed
/// with the next: it asks for lines that nobody reads, and nothing else comes of it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Announced {
    number: AtomicUsize,
    sets: [[AtomicUsize; 4]; SETS],
}

impl Announced {
    pub(crate) fn announce(&self, sets: [Lines; SETS]) {
        for (words, set) in self.sets.iter().zip(sets) {
            let values = [set.first.addr(), set.step, set.rows, set.bytes];
            for (word, value) in words.iter().zip(values) {
                word.store(value, Ordering::Relaxed);
            }
        }
        let number = self.number.load(Ordering::Relaxed);
        self.number.store(number.wrapping_add(1), Ordering::Release);
    }
}

/// A thread's way through what was announced.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    number: usize,
    sets: [Lines; SETS],
    /// Bytes of each stream that were asked for.
    at: usize,
}

impl Walk {
    /// Begins anew where something new was announced.
    pub(crate) fn look(&mut self, announced: &Announced) {
        let number = announced.number.load(Ordering::Acquire);
        if number == self.number {
            return;
        }
        let read = |words: &[AtomicUsize; 4]| {
            let [first, step, rows, bytes] = std::array::from_fn(|i| words[i].load(Ordering::Relaxed));
            Lines {
                first: std::ptr::without_provenance(first),
                step,
                rows,
                bytes,
            }
        };
        *self = Walk {
            number,
            sets: std::array::from_fn(|i| read(&announced.sets[i])),
            at: 0,
        };
    }

    /// Asks for the next line of every stream; gives false when all were asked for.
    #[inline]
    pub(crate) fn step(&mut self) -> bool {
        let mut any = false;
        for set in self.sets.iter().filter(|set| self.at < set.bytes) {
            any = true;
            for stream in 0..set.rows {
                let line = set.first.wrapping_add(stream.wrapping_mul(set.step));
                ask_line::<true>(line.wrapping_add(self.at));
            }
        }
        self.at += 64;
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_ends_with_the_longest_stream_and_begins_anew_with_an_announcement() {
        let announced = Announced::default();
        let mut walk = Walk::default();
        walk.look(&announced);
        assert!(!walk.step(), "nothing was announced");
        let memory = [0_u8; 1024];
        let set = |bytes| Lines {
            first: memory.as_ptr(),
            step: 512,
            rows: 2,
            bytes,
        };
        announced.announce([set(256), set(100)]);
        for _ in 0..2 {
            walk.look(&announced);
            assert_eq!((0..9).filter(|_| walk.step()).count(), 4);
            announced.announce([set(256), Lines::default()]);
        }
    }
}
