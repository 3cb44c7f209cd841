//! Runs a plan: binds each step's memory and calls its operation.

use crate::Error;
use crate::array::{Array, Buffer, Data, OwnedArray};
use crate::constant::{Const, ConstData};
use crate::graph::Storage;
use crate::layout::{Layout, elements};
use crate::op::{Args, In, Op, Out};
use crate::plan::{Operand, Place, Plan, Slot, Step};
use crate::state::{StateBuffer, StateData};
use candle_coreml_kernels::{self as kernels, Arena, Pool, Scratch, View, ViewMut};
use candle_coreml_mil::DType;
use half::f16;
use smallvec::SmallVec;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Memory one run needs; reused by the next.
pub struct Workspace {
    arena: Arena,
    scratch: Scratch,
}

/// Sees every step after it ran.
pub trait Observer {
    /// Whether results are wanted; copying them costs far more than most steps.
    fn wants_results(&self) -> bool {
        true
    }

    /// Called after each step.
    fn after(&mut self, done: &Done<'_>);
}

/// A step that ran.
#[derive(Debug)]
pub struct Done<'a> {
    /// The step.
    pub step: &'a Step,
    /// The time it took.
    pub elapsed: Duration,
    /// Its results, none when they are not wanted: fp16 ones as 32-bit floats, rounded where the run is faithful.
    pub results: &'a [OwnedArray],
    /// Finite numbers among fp16 results that fp16 cannot hold; a faithful run goes on with infinity in their place.
    pub overflows: usize,
}

/// What a run is done with.
pub struct RunOptions<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Round every fp16 result to fp16.
    pub faithful: bool,
    /// Sees every step.
    pub observer: Option<&'a mut dyn Observer>,
}

/// The smallest magnitude that rounds to infinity in fp16.
const F16_OVERFLOW: f32 = 65520.0;

/// Where a step's fp16 results lie that are computed as 32-bit floats, without the padding behind them.
fn halves(step: &Step) -> impl Iterator<Item = Range<usize>> + '_ {
    step.outputs.iter().zip(&step.dtypes).filter_map(|(o, dtype)| {
        let (Place::Arena(r), Storage::F32, DType::Fp16) = (&o.place, o.storage, dtype) else {
            return None;
        };
        // Results are written without gaps from the start of their range.
        let end = r.start + elements(&o.layout.shape);
        Some(r.start..end.min(r.end))
    })
}

impl Default for Workspace {
    fn default() -> Self {
        Workspace::new()
    }
}

impl Workspace {
    /// Memory for runs of any plan; it grows to what the largest needs.
    pub fn new() -> Workspace {
        Workspace {
            arena: Arena::new(0),
            scratch: Scratch::default(),
        }
    }

    /// Makes room for a run of `plan`; what is there is lost when the memory is too small.
    pub fn fit(&mut self, plan: &Plan) {
        if self.arena.len() < plan.arena_elements {
            self.arena = Arena::new(plan.arena_elements);
        }
    }

    /// Copies a value of the caller into its place.
    pub fn write_input(&mut self, slot: &Slot, value: Array<'_>) -> Result<(), Error> {
        let fail = |message: String| Error::Value {
            what: "input",
            name: slot.name.clone(),
            message,
        };
        let Place::Arena(range) = &slot.operand.place else {
            return Err(internal("an input outside the arena"));
        };
        let count = elements(&slot.operand.layout.shape);
        if value.data.len() != count {
            return Err(fail(format!(
                "{} elements came, {count} are needed",
                value.data.len()
            )));
        }
        let memory = self
            .arena
            .as_mut_slice()
            .get_mut(range.start..range.start + count);
        let memory = memory.ok_or_else(|| internal("an input outside the arena"))?;
        match (value.data, slot.operand.storage) {
            (Data::F32(from), Storage::F32) => memory.copy_from_slice(from),
            (Data::F16(from), Storage::F32) => kernels::f16_to_f32(from, memory),
            (Data::I32(from), Storage::I32) => bytemuck::cast_slice_mut(memory).copy_from_slice(from),
            _ => {
                return Err(fail(format!(
                    "elements of another kind came, {} is needed",
                    slot.dtype
                )));
            }
        }
        Ok(())
    }

    /// Runs every step.
    pub(crate) fn run(
        &mut self,
        plan: &Plan,
        states: &mut [&mut StateBuffer],
        mut options: RunOptions<'_>,
    ) -> Result<(), Error> {
        for (i, step) in plan.steps.iter().enumerate() {
            // Weights that stream through the caches leave nothing else there.
            if let [next, behind, ..] = &plan.steps[i + 1..] {
                kernels::ask(&*next.op);
                kernels::ask(behind);
            }
            let then = step
                .then
                .and_then(|next| plan.steps.get(next))
                .map(|next| &*next.op);
            if let Some(then) = then {
                then.expect(options.pool);
            }
            let start = options.observer.as_ref().map(|_| Instant::now());
            self.step((step, then), states, options.pool)?;
            let elapsed = start.map(|s| s.elapsed());
            let wanted = options.observer.as_ref().is_some_and(|o| o.wants_results());
            let overflows = if wanted { self.overflows(step) } else { 0 };
            if options.faithful {
                self.round(step);
            }
            if let (Some(observer), Some(elapsed)) = (options.observer.as_deref_mut(), elapsed) {
                let mut results = Vec::new();
                for (o, dtype) in step.outputs.iter().zip(&step.dtypes).filter(|_| wanted) {
                    let dtype = if dtype.is_float() { DType::Fp32 } else { *dtype };
                    results.push(self.read(options.pool, o, dtype, states)?);
                }
                observer.after(&Done {
                    step,
                    elapsed,
                    results: &results,
                    overflows,
                });
            }
        }
        Ok(())
    }

    fn step(
        &mut self,
        (step, then): (&Step, Option<&dyn Op>),
        states: &mut [&mut StateBuffer],
        pool: &Pool,
    ) -> Result<(), Error> {
        let mut reads: SmallVec<[Range<usize>; 4]> = SmallVec::new();
        let mut writes: SmallVec<[Range<usize>; 4]> = SmallVec::new();
        for o in &step.inputs {
            if let Place::Arena(r) = &o.place {
                reads.push(r.clone());
            }
        }
        let mut written_state = None;
        for o in &step.outputs {
            match &o.place {
                Place::Arena(r) => writes.push(r.clone()),
                Place::State(i) => written_state = Some(*i),
                _ => return Err(internal("a result in a constant")),
            }
        }
        let mut read_slices: SmallVec<[&[f32]; 4]> = SmallVec::new();
        let mut write_slices: SmallVec<[Option<&mut [f32]>; 4]> = SmallVec::new();
        self.arena
            .lend(
                &reads,
                &writes,
                |_, s| read_slices.push(s),
                |_, s| write_slices.push(Some(s)),
            )
            .ok_or_else(|| internal(&format!("step {:?} reads what it writes", step.name)))?;
        let mut args = Args {
            inputs: SmallVec::new(),
            outputs: SmallVec::new(),
            pool,
            scratch: &mut self.scratch,
            then,
        };
        let (below, written, above) = split(states, written_state);
        let mut next_read = read_slices.iter();
        for (n, o) in step.inputs.iter().enumerate() {
            let input = match &o.place {
                Place::Arena(_) => arena_view(next_read.next().copied().unwrap_or(&[]), o),
                Place::Const(c) => const_view(c, o),
                Place::State(i) if *i < below.len() => state_view(&*below[*i], o),
                Place::State(i) => above.get(i - below.len() - 1).and_then(|s| state_view(s, o)),
                Place::Result => Some(In::Result),
            };
            args.inputs
                .push(input.ok_or_else(|| internal(&format!("step {:?}: input {n}", step.name)))?);
        }
        let mut written = written;
        let mut next_write = write_slices.iter_mut();
        for (n, o) in step.outputs.iter().enumerate() {
            let out = match &o.place {
                Place::State(_) => written.take().and_then(|s| state_view_mut(s, o)),
                _ => next_write
                    .next()
                    .and_then(Option::take)
                    .and_then(|s| arena_view_mut(s, o)),
            };
            let out = out.ok_or_else(|| internal(&format!("step {:?}: result {n}", step.name)))?;
            args.outputs.push(Some(out));
        }
        step.op.run(&mut args).map_err(|e| Error::Node {
            node: step.name.to_string(),
            op: step.op.name().into(),
            message: e.to_string(),
        })
    }

    /// Rounds fp16 results to what fp16 can hold.
    fn round(&mut self, step: &Step) {
        for r in halves(step) {
            if let Some(memory) = self.arena.as_mut_slice().get_mut(r) {
                kernels::round_to_f16(memory);
            }
        }
    }

    /// Finite numbers among a step's fp16 results that would be infinite in fp16.
    fn overflows(&mut self, step: &Step) -> usize {
        let arena = self.arena.as_mut_slice();
        let over = |r: Range<usize>| {
            let memory = arena.get(r).unwrap_or(&[]);
            memory
                .iter()
                .filter(|v| v.is_finite() && v.abs() >= F16_OVERFLOW)
                .count()
        };
        halves(step).map(over).sum()
    }

    /// A copy of an operand's elements, as the type the file writes.
    pub(crate) fn read(
        &mut self,
        pool: &Pool,
        operand: &Operand,
        dtype: DType,
        states: &[&mut StateBuffer],
    ) -> Result<OwnedArray, Error> {
        let bad = || internal("a result outside its memory");
        let slices;
        let view = match &operand.place {
            Place::Arena(r) => {
                slices = self.arena.as_mut_slice().get(r.clone()).ok_or_else(bad)?;
                arena_view(slices, operand)
            }
            Place::Const(c) => {
                if let ConstData::Strings(texts) = &c.data {
                    let (shape, data) = (c.shape.to_vec(), Buffer::Strings(texts.to_vec()));
                    return Ok(OwnedArray { shape, data });
                }
                const_view(c, operand)
            }
            Place::State(i) => states.get(*i).and_then(|s| state_view(s, operand)),
            Place::Result => None,
        };
        let shape = operand.layout.shape.to_vec();
        let layout = Layout::contiguous(&shape);
        let n = elements(&shape);
        let data = match (view.ok_or_else(bad)?, dtype) {
            (In::F32(v), DType::Fp16) => Buffer::F16(collect(pool, v, &layout, n, f16::ZERO)?),
            (In::F32(v), _) => Buffer::F32(collect(pool, v, &layout, n, 0.0)?),
            (In::F16(v), DType::Fp16) => Buffer::F16(collect(pool, v, &layout, n, f16::ZERO)?),
            (In::F16(v), _) => Buffer::F32(collect(pool, v, &layout, n, 0.0)?),
            (In::I32(v), _) => Buffer::I32(collect(pool, v, &layout, n, 0)?),
            (In::Result, _) => return Err(bad()),
        };
        Ok(OwnedArray { shape, data })
    }
}

fn internal(message: &str) -> Error {
    Error::Internal {
        message: message.into(),
    }
}

fn collect<S, D>(pool: &Pool, v: View<'_, S>, layout: &Layout, n: usize, zero: D) -> Result<Vec<D>, Error>
where
    S: kernels::ConvertTo<D>,
    D: Copy + Send + Sync,
{
    let mut out = vec![zero; n];
    let to = ViewMut::new(&mut out, 0, &layout.shape, &layout.strides);
    kernels::copy(pool, v, to.ok_or_else(|| internal("a copy outside its memory"))?);
    Ok(out)
}

type Split<'s, 'b> = (
    &'s [&'b mut StateBuffer],
    Option<&'s mut StateBuffer>,
    &'s [&'b mut StateBuffer],
);

/// The states before the written one, the written one, and those after it.
fn split<'s, 'b>(states: &'s mut [&'b mut StateBuffer], written: Option<usize>) -> Split<'s, 'b> {
    match written.filter(|&i| i < states.len()) {
        None => (states, None, &[]),
        Some(i) => {
            let (below, rest) = states.split_at_mut(i);
            match rest.split_first_mut() {
                Some((one, above)) => (below, Some(one), above),
                None => (below, None, &[]),
            }
        }
    }
}

fn arena_view<'a>(slice: &'a [f32], o: &'a Operand) -> Option<In<'a>> {
    let l = &o.layout;
    Some(match o.storage {
        Storage::F32 => In::F32(View::new(slice, l.offset, &l.shape, &l.strides)?),
        Storage::I32 => In::I32(View::new(
            bytemuck::cast_slice(slice),
            l.offset,
            &l.shape,
            &l.strides,
        )?),
        Storage::F16 => In::F16(View::new(
            bytemuck::cast_slice(slice),
            l.offset,
            &l.shape,
            &l.strides,
        )?),
    })
}

fn arena_view_mut<'a>(slice: &'a mut [f32], o: &'a Operand) -> Option<Out<'a>> {
    let l = &o.layout;
    Some(match o.storage {
        Storage::F32 => Out::F32(ViewMut::new(slice, l.offset, &l.shape, &l.strides)?),
        Storage::I32 => Out::I32(ViewMut::new(
            bytemuck::cast_slice_mut(slice),
            l.offset,
            &l.shape,
            &l.strides,
        )?),
        Storage::F16 => Out::F16(ViewMut::new(
            bytemuck::cast_slice_mut(slice),
            l.offset,
            &l.shape,
            &l.strides,
        )?),
    })
}

fn const_view<'a>(c: &'a Const, o: &'a Operand) -> Option<In<'a>> {
    let l = &o.layout;
    Some(match (o.storage, &c.data) {
        (Storage::F16, _) => In::F16(View::new(c.halves()?, l.offset, &l.shape, &l.strides)?),
        (Storage::I32, ConstData::I32(v)) => In::I32(View::new(v, l.offset, &l.shape, &l.strides)?),
        (Storage::F32, _) => In::F32(View::new(c.floats(), l.offset, &l.shape, &l.strides)?),
        _ => return None,
    })
}

fn state_view<'a>(s: &'a StateBuffer, o: &'a Operand) -> Option<In<'a>> {
    let l = &o.layout;
    Some(match &s.data {
        StateData::F32(v) => In::F32(View::new(v, l.offset, &l.shape, &l.strides)?),
        StateData::I32(v) => In::I32(View::new(v, l.offset, &l.shape, &l.strides)?),
    })
}

fn state_view_mut<'a>(s: &'a mut StateBuffer, o: &'a Operand) -> Option<Out<'a>> {
    let l = &o.layout;
    Some(match &mut s.data {
        StateData::F32(v) => Out::F32(ViewMut::new(v, l.offset, &l.shape, &l.strides)?),
        StateData::I32(v) => Out::I32(ViewMut::new(v, l.offset, &l.shape, &l.strides)?),
    })
}
