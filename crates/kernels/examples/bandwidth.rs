//! What this machine reads from memory: `bandwidth [THREADS]` prints gigabytes a second, several times: in four streams a thread,
//! and in one that is asked for early. Which of them is faster depends on the processor.

use candle_coreml_kernels::Pool;
use std::hint::black_box;
use std::time::Instant;

/// Far beyond every cache.
const BYTES: usize = 1 << 30;
/// Numbers a thread takes at once: 8 megabytes.
const CHUNK: usize = 1 << 20;
/// Parts of a chunk that are read side by side: a processor waits for a few lines of one stream at a time.
const STREAMS: usize = 4;
/// Numbers in a line of the cache.
const LINE: usize = 8;
/// Bytes between what is read and what is asked of memory, where there is one stream.
const AHEAD: usize = 3584;

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(2);
    let pool = Pool::new(threads);
    let numbers = vec![1u64; BYTES / size_of::<u64>()];
    for round in 0..16 {
        let start = Instant::now();
        pool.run(numbers.len() / CHUNK, &|chunk| {
            let chunk = &numbers[chunk * CHUNK..(chunk + 1) * CHUNK];
            if round % 2 == 1 {
                return one_stream(chunk);
            }
            let (parts, _) = chunk.as_chunks::<{ CHUNK / STREAMS }>();
            let lines: [&[[u64; LINE]]; STREAMS] = std::array::from_fn(|i| parts[i].as_chunks().0);
            // A sum for each number of a line, so that no addition waits for the one before.
            let mut sums = [[0u64; LINE]; STREAMS];
            for at in 0..CHUNK / STREAMS / LINE {
                for (sums, lines) in sums.iter_mut().zip(lines) {
                    for (sum, n) in sums.iter_mut().zip(lines[at]) {
                        *sum = sum.wrapping_add(n);
                    }
                }
            }
            black_box(sums);
        });
        println!("{:.2}", BYTES as f64 / start.elapsed().as_secs_f64() / 1e9);
    }
}

fn one_stream(chunk: &[u64]) {
    let mut sums = [[0u64; LINE]; STREAMS];
    let (blocks, _) = chunk.as_chunks::<{ STREAMS * LINE }>();
    for block in blocks {
        for (sums, line) in sums.iter_mut().zip(block.as_chunks::<LINE>().0) {
            ask(line.as_ptr().wrapping_byte_add(AHEAD));
            for (sum, n) in sums.iter_mut().zip(line) {
                *sum = sum.wrapping_add(*n);
            }
        }
    }
    black_box(sums);
}

/// Asks memory for a line, where the processor can be told.
#[inline(always)]
fn ask(line: *const u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction; no address makes it fail.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}
