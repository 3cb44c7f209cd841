//! What this machine reads from memory: `bandwidth [THREADS]` prints gigabytes a second, several times.

use candle_coreml_kernels::Pool;
use std::hint::black_box;
use std::time::Instant;

/// Far beyond every cache.
const BYTES: usize = 1 << 30;
const CHUNK: usize = 1 << 16;

fn main() {
    let threads = std::env::args().nth(1).and_then(|t| t.parse().ok()).unwrap_or(2);
    let pool = Pool::new(threads);
    let numbers = vec![1u64; BYTES / 8];
    for _ in 0..8 {
        let start = Instant::now();
        pool.run(numbers.len() / CHUNK, &|chunk| {
            let part = &numbers[chunk * CHUNK..(chunk + 1) * CHUNK];
            // Eight sums, so that no addition waits for the one before.
            let mut sums = [0u64; 8];
            for eight in part.chunks_exact(8) {
                for (sum, n) in sums.iter_mut().zip(eight) {
                    *sum = sum.wrapping_add(*n);
                }
            }
            black_box(sums);
        });
        println!("{:.2}", BYTES as f64 / start.elapsed().as_secs_f64() / 1e9);
    }
}
