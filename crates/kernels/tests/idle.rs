//! What a pool costs when nothing runs, as Linux counts it.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_coreml_kernels::pool::Pool;
use std::fs;
use std::time::{Duration, Instant};

/// Time that the workers of all pools have been on a core.
fn busy() -> Duration {
    let mut total = 0;
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let file = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        if file("comm").starts_with("kernels-") {
            let nanoseconds = file("schedstat");
            total += nanoseconds
                .split(' ')
                .next()
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(0);
        }
    }
    Duration::from_nanos(total)
}

#[test]
fn a_pool_without_work_leaves_the_cores_alone() {
    let pool = Pool::new(4);
    pool.run(64, &|chunk| {
        std::hint::black_box((0..100_000_u64).fold(chunk as u64, u64::wrapping_add));
    });
    // Workers spin for a moment after a job, then sleep.
    std::thread::sleep(Duration::from_millis(100));
    let (before, start) = (busy(), Instant::now());
    std::thread::sleep(Duration::from_millis(500));
    let (used, passed) = (busy() - before, start.elapsed());
    assert!(
        used * 500 < passed,
        "three idle workers used {used:?} in {passed:?}"
    );
    drop(pool);
    assert_eq!(busy(), Duration::ZERO, "workers are left behind");
}
