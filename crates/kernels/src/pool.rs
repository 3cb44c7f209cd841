//! A persistent thread pool for very short jobs.
//!
//! Workers spin for a moment after a job, then sleep. A job is a number of chunks in as many ranges as there are threads (up
//! to a few); each thread claims those of its own range one by one through an atomic counter, then those that are left of the
//! others. A worker that the system has taken off its core costs its own chunk at most, one that wakes late finds the job
//! closed and costs nothing, and what a thread wrote in one job is mostly what it reads in the next, from its own cache.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker without work keeps its core before it sleeps. Longer than the gaps between the kernels of
/// one model evaluation, short enough to be invisible when nothing runs.
const SPIN: Duration = Duration::from_micros(150);

/// More threads than this are not started, whatever is asked for.
const MAX_THREADS: usize = 256;

/// Set in `Shared::state` while a job may be joined; the bits below count the workers inside, those above the jobs.
const OPEN: u64 = 1 << 31;
const ACTIVE: u64 = OPEN - 1;
const EPOCH: u64 = 1 << 32;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The job being run: written by the caller while the pool is closed, read by workers that joined it.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    chunks: usize,
}

/// The next chunk of a range, alone in its lines of cache.
#[derive(Default)]
#[repr(align(128))]
struct Next(AtomicUsize);

/// Ranges of a job at most: each is set anew for every job.
const MOST_RANGES: usize = 8;

struct Shared {
    state: AtomicU64,
    ranges: Vec<Next>,
    threads: usize,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

// SAFETY: `job` is the one field that is not Sync. It is written only by the caller that holds `Pool::busy` while
// `state` is closed and has no workers inside, and read only by workers counted in `state`.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is dereferenced only while the call of `Pool::run` that stored it is on the stack.
unsafe impl Send for Shared {}

/// A set of worker threads that run the chunks of one job at a time.
///
/// ```
/// use candle_coreml_kernels::pool::Pool;
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// let pool = Pool::new(4);
/// let sum = AtomicUsize::new(0);
/// pool.run(100, &|chunk| { sum.fetch_add(chunk, Ordering::Relaxed); });
/// assert_eq!(sum.into_inner(), 4950);
/// ```
pub struct Pool {
    shared: Arc<Shared>,
    busy: AtomicBool,
    workers: Vec<JoinHandle<()>>,
}

static SHARED_THREADS: AtomicUsize = AtomicUsize::new(0);
static SHARED: OnceLock<Arc<Pool>> = OnceLock::new();

/// Sets the number of threads of [`Pool::shared`]; gives false when that pool exists already.
pub fn set_shared_threads(threads: usize) -> bool {
    SHARED_THREADS.store(threads, Ordering::SeqCst);
    SHARED.get().is_none()
}

impl Pool {
    /// A pool of `threads` threads, the calling one included: `new(1)` starts none. Threads that the system
    /// refuses to start are left out.
    pub fn new(threads: usize) -> Arc<Pool> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            ranges: (0..threads.clamp(1, MOST_RANGES))
                .map(|_| Next::default())
                .collect(),
            threads: threads.clamp(1, MAX_THREADS),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let workers = (1..threads.min(MAX_THREADS))
            .filter_map(|worker| {
                let shared = shared.clone();
                let thread = std::thread::Builder::new().name(format!("kernels-{worker}"));
                thread.spawn(move || shared.work(worker)).ok()
            })
            .collect();
        Arc::new(Pool {
            shared,
            busy: AtomicBool::new(false),
            workers,
        })
    }

    /// The pool of the process: one thread per available core unless [`set_shared_threads`] said otherwise first.
    pub fn shared() -> Arc<Pool> {
        let pool = SHARED.get_or_init(|| {
            let asked = SHARED_THREADS.load(Ordering::SeqCst);
            let cores = || std::thread::available_parallelism().map_or(1, usize::from);
            Pool::new(if asked == 0 { cores() } else { asked })
        });
        pool.clone()
    }

    /// Threads that take part in a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once for every chunk in `0..chunks`, in any order and on any thread, and returns when all are
    /// done. With one chunk, and when the pool runs another job (of this thread or of another one), all chunks
    /// run on the calling thread.
    ///
    /// # Panics
    /// When a chunk panics, with its payload; the chunks not begun by then are left out.
    pub fn run(&self, chunks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.run_indexed(chunks, &|_, chunk| task(chunk));
    }

    /// As [`Pool::run`]; `task` is told `(worker, chunk)`, where no two threads in this job share a `worker` and
    /// all are below [`Pool::threads`].
    pub fn run_indexed(&self, chunks: usize, task: &Task<'_>) {
        let alone = chunks <= 1 || self.workers.is_empty();
        if alone
            || self
                .busy
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
        {
            return (0..chunks).for_each(|chunk| task(0, chunk));
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used by workers that join below, and this function
        // does not return before the job is closed and all of them have left.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        let job = Job { task, chunks };
        // SAFETY: `busy` is held and the last job was closed and left by all, so nobody reads the cell.
        unsafe { *shared.job.get() = Some(job) };
        for (range, next) in shared.ranges.iter().enumerate() {
            next.0.store(shared.start(chunks, range), Ordering::Relaxed);
        }
        shared.state.fetch_add(EPOCH | OPEN, Ordering::SeqCst);
        shared.rouse(chunks - 1);
        shared.claim(job, 0);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0_u32;
        while shared.state.load(Ordering::Acquire) & ACTIVE != 0 {
            spins += 1;
            if spins.is_multiple_of(4096) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.busy.store(false, Ordering::Release);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Splits `0..items` into ranges of `grain` items or more (as many as keep the threads evenly loaded) and
    /// calls `task` with each.
    pub fn run_ranges(&self, items: usize, grain: usize, task: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
        let grain = grain.max(1);
        let chunks = (items / grain).clamp(1, self.threads() * 4);
        if chunks <= 1 {
            return task(0..items);
        }
        self.run(chunks, &|chunk| {
            task(items * chunk / chunks..items * (chunk + 1) / chunks)
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its chunks, so there is nothing to learn from the result.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The first chunk of a range, and the end of the one before.
    fn start(&self, chunks: usize, range: usize) -> usize {
        // Jobs have far fewer chunks than would overflow, but nothing forbids more.
        (chunks as u128 * range as u128 / self.ranges.len() as u128) as usize
    }

    /// Runs chunks until none is left, keeping the first panic.
    fn claim(&self, job: Job, worker: usize) {
        // SAFETY: the caller of `run` is on the stack until every thread has left this function.
        let task = unsafe { &*job.task };
        let result = catch_unwind(AssertUnwindSafe(|| {
            let count = self.ranges.len();
            let own = worker * count / self.threads;
            for range in (own..count).chain(0..own) {
                let end = self.start(job.chunks, range + 1);
                loop {
                    let chunk = self.ranges[range].0.fetch_add(1, Ordering::Relaxed);
                    if chunk >= end {
                        break;
                    }
                    task(worker, chunk);
                }
            }
        }));
        if let Err(payload) = result {
            for next in &self.ranges {
                next.0.store(job.chunks, Ordering::Relaxed);
            }
            self.panic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(payload);
        }
    }

    /// Wakes up to `wanted` sleeping workers.
    fn rouse(&self, wanted: usize) {
        let sleepers = self.sleepers.load(Ordering::SeqCst);
        if sleepers == 0 {
            return;
        }
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
        if wanted >= sleepers {
            self.wake.notify_all();
        } else {
            (0..wanted).for_each(|_| self.wake.notify_one());
        }
    }

    /// The life of a worker: wait for a job not seen yet, join it, leave it.
    fn work(&self, worker: usize) {
        let mut seen = 0;
        while let Some(epoch) = self.wait(seen) {
            seen = epoch;
            if !self.join(epoch) {
                continue;
            }
            // SAFETY: this worker is counted in `state`, so the caller keeps the job in place.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job {
                self.claim(job, worker);
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Counts this worker in when job `epoch` is still open.
    fn join(&self, epoch: u64) -> bool {
        let mut state = self.state.load(Ordering::Acquire);
        while state & OPEN != 0 && state / EPOCH == epoch {
            match self
                .state
                .compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    /// Spins, then sleeps, until a job other than `seen` is open; gives its epoch, or none to end the thread.
    fn wait(&self, seen: u64) -> Option<u64> {
        let fresh = |state: u64| (state & OPEN != 0 && state / EPOCH != seen).then_some(state / EPOCH);
        loop {
            let start = Instant::now();
            while start.elapsed() < SPIN {
                for _ in 0..32 {
                    if let Some(epoch) = fresh(self.state.load(Ordering::Acquire)) {
                        return Some(epoch);
                    }
                    std::hint::spin_loop();
                }
            }
            let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let idle =
                || !self.stop.load(Ordering::SeqCst) && fresh(self.state.load(Ordering::SeqCst)).is_none();
            let guard = self.wake.wait_while(guard, |()| idle());
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            drop(guard);
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(pool: &Pool, chunks: usize) {
        let hits: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(chunks, &|chunk| {
            hits[chunk].fetch_add(1, Ordering::Relaxed);
        });
        assert!(
            hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1),
            "{chunks} chunks"
        );
    }

    #[test]
    fn every_chunk_runs_exactly_once() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            (0..200).for_each(|round| count(&pool, round % 23));
        }
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let pool = Pool::new(3);
        for _ in 0..5 {
            std::thread::sleep(SPIN * 4);
            count(&pool, 50);
        }
    }

    #[test]
    fn a_job_inside_a_job_completes() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        pool.run(8, &|_| {
            pool.run(8, &|inner| {
                total.fetch_add(inner, Ordering::Relaxed);
            })
        });
        assert_eq!(total.into_inner(), 8 * 28);
    }

    #[test]
    fn callers_on_many_threads_do_not_mix_their_jobs() {
        let pool = Pool::new(3);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..300).for_each(|round| count(&pool, round % 17)));
            }
        });
    }

    #[test]
    fn workers_in_one_job_have_different_numbers() {
        let pool = Pool::new(4);
        let inside: Vec<AtomicBool> = (0..pool.threads()).map(|_| AtomicBool::new(false)).collect();
        pool.run_indexed(400, &|worker, _| {
            assert!(!inside[worker].swap(true, Ordering::SeqCst));
            std::hint::spin_loop();
            inside[worker].store(false, Ordering::SeqCst);
        });
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(16, &|chunk| assert!(chunk != 7, "chunk seven"));
            }));
            let payload = result.unwrap_err();
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| text.to_string()));
            assert!(text.unwrap().contains("chunk seven"));
            count(&pool, 40);
        }
    }
}
