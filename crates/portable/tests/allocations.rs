//! The decode loop allocates nothing: every step of a plan runs in memory that was there before, on every thread.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_coreml_kernels::Pool;
use candle_coreml_mil as mil;
use candle_coreml_portable::{Array, Data, Done, Model, Observer, Options, State};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use std::alloc::System;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const CONTEXT: usize = 512;
const HIDDEN: usize = 256;

fn part(word: &str) -> PathBuf {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tales"));
    let mut files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    files.find(|p| p.to_string_lossy().contains(word)).unwrap()
}

fn open(word: &str, function: Option<&str>, threads: usize) -> Model {
    let file = mil::Model::open(part(word)).unwrap();
    let options = Options {
        pool: Some(Pool::new(threads)),
        wide_outputs: true,
        ..Options::default()
    };
    Model::load(Arc::new(file), function, options).unwrap()
}

/// Allocations so far, of all threads.
fn allocations() -> usize {
    let stats = ALLOCATOR.stats();
    stats.allocations + stats.reallocations
}

/// Notes the steps during which something was allocated.
struct Steps {
    before: usize,
    guilty: Vec<(String, usize)>,
}

impl Observer for Steps {
    fn wants_results(&self) -> bool {
        false
    }

    fn after(&mut self, done: &Done<'_>) {
        let made = allocations() - self.before;
        if made > 0 {
            self.guilty.push((format!("{:?}", done.step.op), made));
        }
        self.before = allocations();
    }
}

/// Runs one token at `position`. `seen` gets the steps that allocate.
fn decode(model: &Model, state: &mut State, position: usize, seen: &mut Vec<(String, usize)>) -> usize {
    let hidden: Vec<f32> = (0..HIDDEN).map(|i| (i as f32 * 0.37).sin()).collect();
    let mask: Vec<f32> = (0..CONTEXT)
        .map(|k| if k <= position { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    let at = [position as i32];
    let positions = Array {
        shape: &[1],
        data: Data::I32(&at),
    };
    let inputs = [
        (
            "hidden_states",
            Array {
                shape: &[1, 1, HIDDEN],
                data: Data::F32(&hidden),
            },
        ),
        ("position_ids", positions),
        (
            "causal_mask",
            Array {
                shape: &[1, 1, 1, CONTEXT],
                data: Data::F32(&mask),
            },
        ),
        ("current_pos", positions),
    ];
    let start = allocations();
    let mut steps = Steps {
        before: start,
        guilty: Vec::with_capacity(64),
    };
    if position.is_multiple_of(2) {
        // What is allocated before the first step and after the last is the call's, not the loop's.
        steps.before = usize::MAX / 2;
        let outputs = model
            .observe(&inputs, Some(state), &mut Started(&mut steps))
            .unwrap();
        drop(outputs);
        seen.append(&mut steps.guilty);
        0
    } else {
        drop(model.predict(&inputs, Some(state)).unwrap());
        allocations() - start
    }
}

/// Begins to count behind the first step.
struct Started<'a>(&'a mut Steps);

impl Observer for Started<'_> {
    fn wants_results(&self) -> bool {
        false
    }

    fn after(&mut self, done: &Done<'_>) {
        if self.0.before == usize::MAX / 2 {
            self.0.before = allocations();
        } else {
            self.0.after(done);
        }
    }
}

#[test]
fn steps_allocate_nothing_and_a_prediction_a_few_times() {
    let mut failures = Vec::new();
    for threads in [1, 2] {
        let model = open("FFN_PF", Some("infer"), threads);
        let mut state = model.make_state();
        let mut guilty = Vec::new();
        // The first tokens make the plan, the workspace and each thread's own memory.
        for position in 0..8 {
            decode(&model, &mut state, position, &mut guilty);
        }
        guilty.clear();
        let mut most = 0;
        for position in 8..CONTEXT {
            most = most.max(decode(&model, &mut state, position, &mut guilty));
        }
        // A thread makes its own memory when it first gets work, which may be late where others are busy.
        let own = guilty.iter().take_while(|(_, made)| *made == 1).count();
        if guilty.len() == own && own <= 2 * threads {
            guilty.clear();
        }
        for (step, made) in guilty {
            failures.push(format!("{threads} threads: {made} allocations in {step}"));
        }
        // Names and elements of the results, and the lists that hold them: the same for every model.
        if most > 24 {
            failures.push(format!(
                "{threads} threads: {most} allocations around the steps of a prediction"
            ));
        }
    }
    failures.dedup();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
