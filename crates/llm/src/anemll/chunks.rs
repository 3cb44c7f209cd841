//! Chunks of layers: which function of which package runs when, and that they fit each other.

use std::sync::OnceLock;

use candle_coreml_mil::Feature;

use super::ChunkParts;
use super::step::{Renamed, Step};
use crate::Error;
use crate::part::Part;
use crate::part::interface::array;

const PREFILL: &str = "prefill";
const INFER: &str = "infer";
const INFER_ROTATE: &str = "infer_rotate";
const PREFILL_ROTATE: &str = "prefill_rotate";
/// Begins the name of a function that prefills another number of tokens, which ends it.
const FURTHER: &str = "prefill_";

/// Which function of the chunks runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// One token, before a window is full or without one.
    One,
    /// A batch, likewise.
    Batch,
    /// A batch of another size, of so many rows.
    Further(usize),
    /// One token past the window.
    RotateOne,
    /// A batch past the window.
    RotateBatch,
}

/// A package at one of its functions.
pub(super) struct Call<P> {
    pub(super) part: P,
    pub(super) step: Step,
}

/// A chunk at each of its functions.
pub(super) struct Chunk<P> {
    pub(super) infer: Call<P>,
    pub(super) prefill: Option<Call<P>>,
    pub(super) infer_rotate: Option<Call<P>>,
    pub(super) prefill_rotate: Option<Call<P>>,
    /// Functions for batches of other sizes.
    pub(super) further: Vec<Further<P>>,
    /// Which of the states it uses.
    pub(super) state: usize,
}

/// A function for batches of another size, opened when it is called first.
pub(super) struct Further<P> {
    name: String,
    pub(super) rows: usize,
    call: OnceLock<Call<P>>,
}

impl<P: Part> Further<P> {
    /// Those of a package, the smallest first; none where opening one takes long.
    fn all(part: &P) -> Vec<Self> {
        if !part.opens_functions_fast() {
            return Vec::new();
        }
        let rows = |name: &str| name.strip_prefix(FURTHER)?.parse().ok();
        let functions = part.functions().into_iter();
        let mut all: Vec<Self> = functions
            .filter_map(|name| {
                Some(Further {
                    rows: rows(&name)?,
                    name,
                    call: OnceLock::new(),
                })
            })
            .collect();
        all.sort_by_key(|further| further.rows);
        all
    }
}

impl<P: Part> Chunk<P> {
    /// Opens the function for batches of `rows`, where it is not open.
    ///
    /// # Errors
    /// [`Error::Wiring`] where it does not fit the others.
    pub(super) fn open_further(&self, rows: usize, renamed: &Renamed) -> Result<(), Error> {
        let Some(further) = self.further.iter().find(|further| further.rows == rows) else {
            return Ok(());
        };
        if further.call.get().is_some() {
            return Ok(());
        }
        let part = self.infer.part.with_function(&further.name)?;
        let step = Step::read(part.name(), part.interface(), renamed)?;
        if step.rows != rows
            || step.width != self.infer.step.width
            || step.mask_dtype != self.infer.step.mask_dtype
        {
            let what = format!(
                "takes {} tokens over {} slots, needed: {rows} over {}",
                step.rows, step.width, self.infer.step.width
            );
            return Err(wrong(&part, what));
        }
        check_states(&self.infer.part, &part)?;
        // Another conversation may have been first.
        let _ = further.call.set(Call { part, step });
        Ok(())
    }
}

impl<P> Chunk<P> {
    pub(super) fn at(&self, mode: Mode) -> Option<&Call<P>> {
        match mode {
            Mode::Further(rows) => self
                .further
                .iter()
                .find(|further| further.rows == rows)?
                .call
                .get(),
            Mode::One => Some(&self.infer),
            Mode::Batch => self.prefill.as_ref(),
            Mode::RotateOne => self.infer_rotate.as_ref(),
            Mode::RotateBatch => self.prefill_rotate.as_ref(),
        }
    }
}

/// Finds the functions of every chunk and the states they share.
///
/// # Errors
/// [`Error::Wiring`] with the package and the function that do not fit.
pub(super) fn wire_chunks<P: Part>(
    parts: Vec<ChunkParts<P>>,
    renamed: &Renamed,
) -> Result<Vec<Chunk<P>>, Error> {
    let mut chunks: Vec<Chunk<P>> = Vec::with_capacity(parts.len());
    let mut states = 0;
    for parts in parts {
        let ChunkParts {
            infer,
            prefill,
            rotated,
        } = parts;
        let call = |part: P| -> Result<Call<P>, Error> {
            let step = Step::read(part.name(), part.interface(), renamed)?;
            Ok(Call { part, step })
        };
        let one = call(only_or(&infer, INFER)?)?;
        if one.step.rows != 1 {
            return Err(wrong(
                &one.part,
                format!("takes {} tokens at once, needed: 1", one.step.rows),
            ));
        }
        let batch = match &prefill {
            Some(prefill) => Some(only_or(prefill, PREFILL)?),
            None => named(&infer, &[PREFILL])?,
        };
        let either = |name: &str, plain: &str| -> Result<Option<P>, Error> {
            match named(&infer, &[name])? {
                Some(found) => Ok(Some(found)),
                None => rotated
                    .as_ref()
                    .map_or(Ok(None), |rotated| named(rotated, &[name, plain])),
            }
        };
        let infer_rotate = either(INFER_ROTATE, INFER)?.map(call).transpose()?;
        let prefill_rotate = either(PREFILL_ROTATE, PREFILL)?.map(call).transpose()?;
        let prefill = batch.map(call).transpose()?;
        for other in [&prefill, &infer_rotate, &prefill_rotate].into_iter().flatten() {
            check_states(&one.part, &other.part)?;
        }
        let same = |other: &&Chunk<P>| other.infer.part.interface().states == one.part.interface().states;
        let state = chunks.iter().find(same).map_or(states, |other| other.state);
        states = states.max(state + 1);
        check_against_first(chunks.first(), &one)?;
        let further = Further::all(&infer);
        chunks.push(Chunk {
            infer: one,
            prefill,
            infer_rotate,
            prefill_rotate,
            further,
            state,
        });
    }
    Ok(chunks)
}

/// The only function of a package, or the one of this name.
fn only_or<P: Part>(part: &P, name: &str) -> Result<P, Error> {
    let functions = part.functions();
    match functions.as_slice() {
        [only] => part.with_function(only),
        _ => named(part, &[name])?.ok_or_else(|| Error::Wiring {
            part: part.name().to_owned(),
            function: name.to_owned(),
            what: format!(
                "the package has no such function; it has {}",
                functions.join(", ")
            ),
        }),
    }
}

/// The first of these functions that a package has.
fn named<P: Part>(part: &P, names: &[&str]) -> Result<Option<P>, Error> {
    let functions = part.functions();
    let found = names.iter().find(|name| functions.iter().any(|f| f == *name));
    found.map(|name| part.with_function(name)).transpose()
}

/// Functions of one chunk work on one state.
fn check_states<P: Part>(first: &P, other: &P) -> Result<(), Error> {
    let (own, others) = (&first.interface().states, &other.interface().states);
    if own.len() == others.len()
        && own
            .iter()
            .all(|state| others.iter().any(|o| same_buffer(state, o)))
    {
        return Ok(());
    }
    let what = format!(
        "its states are {}, those of function `{}` of {} are {}",
        buffers(others),
        first.interface().name,
        first.name(),
        buffers(own)
    );
    Err(wrong(other, what))
}

fn same_buffer(a: &Feature, b: &Feature) -> bool {
    a.name == b.name
        && array(a).ok().map(|a| (a.dtype, &a.shape)) == array(b).ok().map(|b| (b.dtype, &b.shape))
}

fn buffers(states: &[Feature]) -> String {
    if states.is_empty() {
        return "none".to_owned();
    }
    let one = |state: &Feature| {
        let shape = array(state).map(|a| a.shape.clone()).unwrap_or_default();
        format!("`{}` {shape:?}", state.name)
    };
    states.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn check_against_first<P: Part>(first: Option<&Chunk<P>>, call: &Call<P>) -> Result<(), Error> {
    let Some(first) = first else { return Ok(()) };
    let expected = (first.infer.step.width, first.infer.step.mask_dtype);
    let found = (call.step.width, call.step.mask_dtype);
    if expected == found {
        return Ok(());
    }
    let what = format!(
        "the mask (slots, type) is {found:?}, in {} it is {expected:?}",
        first.infer.part.name()
    );
    Err(wrong(&call.part, what))
}

pub(super) fn wrong<P: Part>(part: &P, what: String) -> Error {
    Error::Wiring {
        part: part.name().to_owned(),
        function: part.interface().name.clone(),
        what,
    }
}
