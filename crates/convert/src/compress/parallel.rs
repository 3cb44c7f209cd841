//! Work shared between the machine's cores, results in order.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `work` with every index below `count` on all cores; results come in the order of the indices.
pub(crate) fn map_parallel<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let cores = std::thread::available_parallelism()
        .map_or(1, |n| n.get())
        .min(count);
    if cores <= 1 {
        return (0..count).map(work).collect();
    }
    // Groups take about the same time, so pieces of a few keep the threads from waiting on the counter.
    let piece = (count / (cores * 8)).max(1);
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Vec<T>)>> = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let from = next.fetch_add(piece, Ordering::Relaxed);
                    if from >= count {
                        return;
                    }
                    let results: Vec<T> = (from..(from + piece).min(count)).map(&work).collect();
                    if let Ok(mut done) = done.lock() {
                        done.push((from, results));
                    }
                }
            });
        }
    });
    let mut pieces = done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    pieces.sort_unstable_by_key(|(from, _)| *from);
    pieces.into_iter().flat_map(|(_, results)| results).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_indices() {
        for count in [0, 1, 2, 3, 100, 1001] {
            assert_eq!(
                map_parallel(count, |i| i * i),
                (0..count).map(|i| i * i).collect::<Vec<_>>(),
                "{count}"
            );
        }
    }
}
