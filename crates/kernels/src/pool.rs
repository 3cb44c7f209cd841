//! A persistent thread pool for very short jobs.
//!
//! Workers spin for a moment after a job, then sleep. A job is a number of chunks in as many lanes as there are threads (up to
//! a few); each thread takes those of its own lane from its start, one by one, then what is left at the ends of the others. A worker
//! that the system has taken off its core costs its own chunk at most, one that wakes late finds nothing left and costs nothing, and
//! what a thread wrote in one job is mostly what it reads in the next, from its own cache. Who has a lane alone may take its next
//! chunk in the middle of the one before (`Pool::run_lanes`): a stream of memory is then not interrupted.
//!
//! A thread that waits may know what it will read (`Pool::announce`) and asks memory for it.
//!
//! Where cores share no cache, every line that one writes and another reads takes as long as hundreds of additions, so a job
//! passes few of them: the job itself with its number, a lane for each worker, and the count of what the worker has done.
//! Nothing says which workers take part. A worker that has taken a chunk knows by this alone that the job is not over, since
//! the caller waits until as many chunks are done as there were, and only then looks what the job is.

use crate::ahead::{Announced, Walk};
use crate::weights::Lines;
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker without work keeps its core before it sleeps. Longer than the gaps between the kernels of
/// one model evaluation, short enough to be invisible when nothing runs.
const SPIN: Duration = Duration::from_micros(150);

/// More threads than this are not started, whatever is asked for.
const MAX_THREADS: usize = 256;

/// Is told the worker, the chunk, and how to take the chunk after it.
type Task<'a> = dyn Fn(usize, usize, &mut More<'_>) + Sync + 'a;

/// Takes the chunk behind the last one for the caller, if it can be had.
pub(crate) type More<'a> = dyn FnMut() -> bool + 'a;

/// The job being run.
#[derive(Clone, Copy)]
struct Job {
    task: *const Task<'static>,
    chunks: usize,
}

/// What the caller tells the workers, in one line of cache (processors fetch two).
#[repr(align(128))]
struct Board {
    /// The number of the job: workers wait for another one.
    number: AtomicU64,
    /// Written by the caller while no chunk is left or under way, read by those who have taken one.
    job: UnsafeCell<Option<Job>>,
}

/// Chunks of a part of the job that nobody has taken, alone in its lines of cache: the first one in the upper half, in the lower
/// half the end, both counted from [`Lane::ZERO`]. They pass each other when several find none.
#[repr(align(128))]
struct Lane(AtomicU64);

impl Lane {
    /// More than there are threads: the end never falls below 0.
    const ZERO: u64 = 1 << 16;
    const NONE: u64 = Lane::ZERO << 32 | Lane::ZERO;

    /// The first chunk that is left and the end of them.
    fn bounds(value: u64) -> (u64, u64) {
        let half = |value: u64| value & u64::from(u32::MAX);
        (half(value >> 32), half(value))
    }

    /// Chunks that are left.
    fn left(value: u64) -> usize {
        let (first, end) = Lane::bounds(value);
        end.saturating_sub(first) as usize
    }

    /// Takes the first chunk that is left, or the last.
    fn take(&self, first: bool) -> Option<usize> {
        // To look at another one's lane costs that one less than to write to it.
        if !first && Lane::left(self.0.load(Ordering::Relaxed)) == 0 {
            return None;
        }
        // Acquires the job, which was there before the lane was set.
        let (start, end) = Lane::bounds(if first {
            self.0.fetch_add(1 << 32, Ordering::Acquire)
        } else {
            self.0.fetch_sub(1, Ordering::Acquire)
        });
        let chunk = if first { start } else { end.wrapping_sub(1) };
        (start < end).then(|| (chunk - Lane::ZERO) as usize)
    }
}

/// Chunks that a worker has run since it was started, alone in its lines of cache.
#[derive(Default)]
#[repr(align(128))]
struct Ran(AtomicUsize);

/// Lanes of a job at most: each is set anew for every job.
const MOST_LANES: usize = 8;

/// Chunks of a job at most, so that a lane counts them; more run on the caller.
const MOST_CHUNKS: usize = 1 << 31;

struct Shared {
    board: Board,
    lanes: Vec<Lane>,
    /// For the threads of each lane.
    announced: Vec<Announced>,
    /// Of the caller that holds `Pool::busy`.
    walk: Mutex<Walk>,
    /// Of each worker; that of the caller, worker 0, is not used.
    ran: Vec<Ran>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

// SAFETY: `job` is the one field that is not Sync. It is written only by the caller that holds `Pool::busy`, when all chunks of
// the job before have been run, and read only by threads that have taken a chunk of the job and not yet counted it.
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
            board: Board {
                number: AtomicU64::new(0),
                job: UnsafeCell::new(None),
            },
            lanes: (0..threads.clamp(1, MOST_LANES))
                .map(|_| Lane(AtomicU64::new(Lane::NONE)))
                .collect(),
            announced: (0..threads.clamp(1, MOST_LANES))
                .map(|_| Announced::default())
                .collect(),
            walk: Mutex::default(),
            ran: (0..threads.clamp(1, MAX_THREADS))
                .map(|_| Ran::default())
                .collect(),
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
    pub fn run_indexed(&self, chunks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        self.run_task(chunks, &|worker, chunk, _| task(worker, chunk));
    }

    /// Parts of a job that [`Pool::run_lanes`] makes.
    pub(crate) fn lanes(&self) -> usize {
        self.shared.lanes.len()
    }

    /// Runs `each` chunks in each of [`Pool::lanes`]: `task` is told lane and chunk, and may take the chunk of the same lane that
    /// follows, again and again, by calling what it is given: then that chunk is its own as well.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub(crate) fn run_lanes(&self, each: usize, task: &(dyn Fn(usize, usize, &mut More<'_>) + Sync)) {
        let chunks = each * self.lanes();
        self.run_task(chunks, &|_, chunk, more| {
            let (lane, mut at) = (chunk / each, chunk % each);
            // A caller that is alone would be given the next lane's as well.
            task(lane, at, &mut || {
                let next = at + 1 < each && more();
                at += usize::from(next);
                next
            });
        });
    }

    /// Says what a thread whose own lane is `lane` reads first in the next job.
    pub(crate) fn announce(&self, lane: usize, sets: [Lines; 2]) {
        self.shared.announced[lane].announce(sets);
    }

    fn run_task(&self, chunks: usize, task: &Task<'_>) {
        let alone = chunks <= 1 || chunks > MOST_CHUNKS || self.workers.is_empty();
        if alone
            || self
                .busy
                .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
        {
            let next = Cell::new(0);
            let take = || {
                let chunk = next.get();
                next.set(chunk + usize::from(chunk < chunks));
                chunk < chunks
            };
            while take() {
                task(0, next.get() - 1, &mut { take });
            }
            return;
        }
        // SAFETY: only the lifetime changes. The pointer is used for chunks of this job alone, and this function does not return
        // before all of them are done.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        self.shared.lead(Job { task, chunks });
        let panic = self.shared.panic.lock();
        let panic = panic.unwrap_or_else(PoisonError::into_inner).take();
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
    /// The first chunk of a lane, and the end of the one before.
    fn start(&self, chunks: usize, lane: usize) -> usize {
        // Jobs have far fewer chunks than would overflow, but nothing forbids more.
        (chunks as u128 * lane as u128 / self.lanes.len() as u128) as usize
    }

    /// The lane a thread takes chunks of first.
    fn lane_of(&self, worker: usize) -> usize {
        worker * self.lanes.len() / self.ran.len()
    }

    /// Chunks that workers have run, of all jobs.
    fn ran(&self) -> usize {
        // Acquires what they wrote.
        let counts = self.ran.iter().map(|ran| ran.0.load(Ordering::Acquire));
        counts.fold(0, usize::wrapping_add)
    }

    /// Publishes a job, takes part in it, and waits until all of it is done; the caller holds `Pool::busy`.
    fn lead(&self, job: Job) {
        // All chunks of the job before were counted, so what is counted from now on is of this one.
        let before = self.ran();
        // SAFETY: `busy` is held, and no chunk of the job before is under way, so nobody reads the cell.
        unsafe { *self.board.job.get() = Some(job) };
        for (lane, left) in self.lanes.iter().enumerate() {
            let chunks = self.start(job.chunks, lane + 1) - self.start(job.chunks, lane);
            // Releases the job to whoever takes a chunk.
            left.0.store(Lane::NONE + chunks as u64, Ordering::Release);
        }
        let number = self.board.number.load(Ordering::Relaxed);
        self.board.number.store(number.wrapping_add(1), Ordering::Release);
        // This may miss a worker that falls asleep right now. Waiting for the stores to arrive would find it, but costs more than
        // many jobs take, so that is done later, when they have.
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            self.rouse(job.chunks - 1);
        }
        let mine = Cell::new(0_usize);
        let count = |ran: usize| mine.set(mine.get() + ran);
        self.claim(0, count, || {
            fence(Ordering::SeqCst);
            if self.sleepers.load(Ordering::Relaxed) > 0 {
                self.rouse(job.chunks - 1);
            }
        });
        let theirs = job.chunks - mine.get();
        let mut spins = 0_u32;
        if self.ran().wrapping_sub(before) == theirs {
            return;
        }
        let mut walk = self.walk.lock().unwrap_or_else(PoisonError::into_inner);
        walk.look(&self.announced[0]);
        while self.ran().wrapping_sub(before) != theirs {
            if walk.step() {
                continue;
            }
            spins += 1;
            if spins.is_multiple_of(4096) {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
    }

    /// Runs chunks until none is left, and tells `count` how many, as often as it changes lanes. A chunk that panics is the last
    /// one: what is left is counted as run. `first` is called behind the first chunk.
    fn claim(&self, worker: usize, count: impl Fn(usize), first: impl Fn()) {
        let lanes = self.lanes.len();
        let own = self.lane_of(worker);
        // Nobody else takes what is next in a lane of one's own.
        let alone = lanes == self.ran.len();
        let (begun, any) = (Cell::new(0_usize), Cell::new(false));
        let once = || {
            if !any.replace(true) {
                first();
            }
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            for lane in (own..lanes).chain(0..own) {
                let take = || {
                    let chunk = self.lanes[lane].take(lane == own);
                    begun.set(begun.get() + usize::from(chunk.is_some()));
                    chunk
                };
                while let Some(chunk) = take() {
                    // SAFETY: a chunk was taken and is not counted, so the job is the one it belongs to, and stays.
                    if let Some(job) = unsafe { *self.board.job.get() } {
                        // SAFETY: as above: the caller of `run` is on the stack.
                        let task = unsafe { &*job.task };
                        let mut more = || {
                            once();
                            lane == own && alone && take().is_some()
                        };
                        task(worker, self.start(job.chunks, lane) + chunk, &mut more);
                    }
                    once();
                }
                if begun.get() > 0 {
                    count(begun.replace(0));
                }
            }
        }));
        if let Err(payload) = result {
            let mut dropped = begun.get();
            for lane in &self.lanes {
                dropped += Lane::left(lane.0.swap(Lane::NONE, Ordering::Relaxed));
            }
            self.panic
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(payload);
            count(dropped);
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

    /// The life of a worker: wait for a job not seen yet, take part in what is left of it.
    fn work(&self, worker: usize) {
        let mut seen = 0;
        let mut walk = Walk::default();
        let announced = &self.announced[self.lane_of(worker)];
        let ran = &self.ran[worker].0;
        // No other thread writes the count.
        let count = |chunks| {
            let all = ran.load(Ordering::Relaxed).wrapping_add(chunks);
            ran.store(all, Ordering::Release);
        };
        while let Some(number) = self.wait(seen, (&mut walk, announced)) {
            seen = number;
            self.claim(worker, count, || ());
        }
    }

    /// Asks memory for what was announced, spins, then sleeps, until there is a job other than `seen`; gives its number, or none to
    /// end the thread.
    fn wait(&self, seen: u64, (walk, announced): (&mut Walk, &Announced)) -> Option<u64> {
        let fresh = |number: u64| (number != seen).then_some(number);
        walk.look(announced);
        while walk.step() {
            if let Some(number) = fresh(self.board.number.load(Ordering::Acquire)) {
                return Some(number);
            }
        }
        loop {
            let start = Instant::now();
            while start.elapsed() < SPIN {
                for _ in 0..32 {
                    if let Some(number) = fresh(self.board.number.load(Ordering::Acquire)) {
                        return Some(number);
                    }
                    std::hint::spin_loop();
                }
            }
            let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            // Either this sees the number of a job just published, or who published it sees the sleeper.
            fence(Ordering::SeqCst);
            let idle = || {
                !self.stop.load(Ordering::SeqCst)
                    && fresh(self.board.number.load(Ordering::Acquire)).is_none()
            };
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
    fn jobs_that_follow_each_other_at_once_are_not_mixed() {
        for threads in [2, 3, 9] {
            let pool = Pool::new(threads);
            for job in 1..5000 {
                // A worker still busy with the job before finds another task and another number of chunks.
                let (chunks, sum) = (2 + job % 13, AtomicUsize::new(0));
                let square = job * job;
                pool.run(chunks, &|chunk| {
                    sum.fetch_add(square + chunk, Ordering::Relaxed);
                });
                assert_eq!(sum.into_inner(), chunks * square + chunks * (chunks - 1) / 2);
            }
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
    fn chunks_taken_in_the_middle_of_others_run_once_and_follow_them() {
        for threads in [1, 2, 5, 9] {
            let pool = Pool::new(threads);
            for each in [1, 2, 7, 40] {
                let hits: Vec<AtomicUsize> = (0..each * pool.lanes()).map(|_| AtomicUsize::new(0)).collect();
                for round in 0..50 {
                    pool.run_lanes(each, &|lane, chunk, more| {
                        let mut at = chunk;
                        loop {
                            hits[lane * each + at].fetch_add(1, Ordering::Relaxed);
                            at += 1;
                            if at % 4 == round % 4 || !more() {
                                break;
                            }
                        }
                    });
                    assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == round + 1));
                }
            }
        }
    }

    #[test]
    fn a_panic_in_a_chunk_taken_in_the_middle_leaves_the_pool_usable() {
        let pool = Pool::new(2);
        let mut panics = 0;
        for _ in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run_lanes(8, &|lane, chunk, more| {
                    let mut at = chunk;
                    while more() {
                        at += 1;
                        assert!((lane, at) != (0, 5), "chunk five");
                    }
                });
            }));
            // The other thread may have taken that chunk as a first one.
            panics += usize::from(result.is_err());
            count(&pool, 40);
        }
        assert!(panics > 0);
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
