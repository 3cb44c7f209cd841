//! Caches that roll: local layers keep the last tokens of a window, and functions of their own move them on.
//!
//! Before the window is full, functions write at the position. From there on `infer_rotate` drops the oldest token for each new
//! one, and `prefill_rotate` as many as a batch has. A cache that has rolled cannot go back: what it dropped is computed anew.

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};

use super::AnemllModel;
use super::batches::{Batch, size_for};
use super::chunks::{Call, Chunk, Mode, wrong};
use super::wired::{Wired, shortest_cache};
use crate::Error;
use crate::part::{Part, to_id};

/// In a snapshot, how many tokens the rolling caches hold.
const HELD: &str = "held";

/// Batches whose cache is further than this (root of the mean square, relative) from that of single tokens are not used.
/// Rounding to fp16 makes 0.001 at most, rows that see what comes after them ten times this and more.
const AGREE: f64 = 0.01;

/// How a model's caches roll.
#[derive(Debug)]
pub(super) struct Rotation {
    /// Tokens that local layers see: the slots of their caches.
    pub(super) window: usize,
    /// Rows of a batch past the window, where there is a function for them.
    pub(super) rows: Option<usize>,
    /// Whether such batches give what single tokens give; found out with the first.
    pub(super) trusted: OnceLock<bool>,
}

impl Rotation {
    /// How caches roll, where every chunk has a function for it.
    ///
    /// # Errors
    /// [`Error::Wiring`] where the window is not known or does not fit the caches.
    pub(super) fn read<P: Part>(
        chunks: &[Chunk<P>],
        window: Option<usize>,
        slots: usize,
    ) -> Result<Option<Self>, Error> {
        let Some(rotated) = chunks
            .iter()
            .map(|c| c.infer_rotate.as_ref())
            .collect::<Option<Vec<_>>>()
        else {
            return Ok(None);
        };
        let Some(last) = rotated.last() else {
            return Ok(None);
        };
        let shortest = shortest_cache(chunks, slots);
        let window = match (window.or(shortest), shortest) {
            (Some(window), Some(cache)) if window > cache => {
                let what = format!("the window is {window} tokens, a cache that rolls has {cache} slots");
                return Err(wrong(&last.part, what));
            }
            (Some(window), _) if window > 0 => window,
            _ => {
                let what = "nothing says how wide the window is: `sliding_window` in meta.yaml, or a cache that is shorter \
                            than the mask";
                return Err(wrong(&last.part, what.to_owned()));
            }
        };
        let batches = chunks.iter().map(|chunk| chunk.prefill_rotate.as_ref());
        for call in rotated.into_iter().chain(batches.clone().flatten()) {
            check(call, slots)?;
        }
        let rows = batches.map(|call| call.map(|call| call.step.rows));
        Ok(Some(Rotation {
            window,
            rows: rows.reduce(|a, b| if a == b { a } else { None }).flatten(),
            trusted: OnceLock::new(),
        }))
    }
}

fn check<P: Part>(call: &Call<P>, slots: usize) -> Result<(), Error> {
    if call.step.width == slots {
        return Ok(());
    }
    let what = format!("the mask has {} slots, that of `infer` {slots}", call.step.width);
    Err(wrong(&call.part, what))
}

/// The part of a batch up to which tokens are computed one by one: of SmolLM2-135M a batch of 64 takes as long as 15 single tokens on
/// two processors, and a Neural Engine, which computes rows at once, as long as a few.
const FEW_PART: usize = 16;

impl<P: Part> Wired<P> {
    /// The call that computes tokens after `cached` of `total`; `None` for a single one.
    pub(super) fn batch_after(&self, cached: usize, total: usize) -> Option<(Mode, Batch)> {
        match &self.rotation {
            Some(rotation) if cached >= rotation.window => {
                let rows = rotation.rows.filter(|&rows| cached + rows <= total)?;
                let usable = *rotation.trusted.get().unwrap_or(&true);
                // Padding would push tokens out of the window: only full batches are possible.
                let batch = Batch {
                    start: cached,
                    tokens: rows,
                };
                usable.then_some((Mode::RotateBatch, batch))
            }
            rotation => {
                let end = rotation.as_ref().map_or(self.slots, |r| r.window.min(self.slots));
                let (usual, total) = (self.batch?, total.min(end));
                // Other sizes are for batches that start where the last one ended.
                let further = self.further.iter().copied().filter(|rows| cached + rows <= end);
                let rows = size_for(total.saturating_sub(cached), further.chain([usual]))?;
                let mode = if rows == usual {
                    Mode::Batch
                } else {
                    Mode::Further(rows)
                };
                let batch = Batch::next(cached, total, rows, end)?;
                // Padding is computed too, so that a few tokens are sooner computed one by one.
                let few = usual / FEW_PART;
                (batch.end() - cached > few).then_some((mode, batch))
            }
        }
    }
}

impl<P: Part> AnemllModel<P> {
    /// Makes the states hold `tokens[..cached]`. Positions are overwritten as they come, so that is nothing to do, except for
    /// caches that have rolled past what is asked for.
    pub(super) fn settle(&mut self, tokens: &[u32], cached: usize) -> Result<(), Error> {
        let Some(rotation) = &self.wired.rotation else {
            return Ok(());
        };
        let window = rotation.window;
        if self
            .held
            .is_some_and(|held| held == cached || (cached < held && held <= window))
        {
            return Ok(());
        }
        tracing::debug!(
            cached,
            held = self.held,
            "the window has rolled on; tokens are computed anew"
        );
        let mut at = 0;
        while at < cached {
            at = self.advance(tokens.get(..cached).unwrap_or(tokens), at)?;
        }
        Ok(())
    }

    /// Computes a full batch past the window.
    ///
    /// Some converters write functions that are wrong here: every row sees the whole batch, what comes after it too. So the
    /// first batch is computed twice, by the function for batches and by single tokens, which are right, and the two caches
    /// are compared.
    pub(super) fn rotated_batch(&mut self, tokens: &[u32], batch: Batch) -> Result<usize, Error> {
        let tokens = tokens.get(batch.start..batch.end()).unwrap_or_default();
        let ids = tokens
            .iter()
            .map(|&token| to_id(token))
            .collect::<Result<Vec<_>, _>>()?;
        let known = self
            .wired
            .rotation
            .as_ref()
            .and_then(|r| r.trusted.get().copied());
        if known == Some(true) {
            self.wired
                .run(&mut self.states, &ids, batch.start, Mode::RotateBatch)?;
            return Ok(batch.end());
        }
        let trial = self.fork_states();
        for (&token, position) in tokens.iter().zip(batch.start..) {
            self.infer(token, position)?;
        }
        let agree = trial.is_ok_and(|mut states| {
            let run = self.wired.run(&mut states, &ids, batch.start, Mode::RotateBatch);
            run.is_ok() && self.agrees_with(&states).unwrap_or(false)
        });
        if !agree {
            tracing::warn!(
                "prefill_rotate does not give what infer_rotate gives; tokens past the window go one by one"
            );
        }
        if let Some(rotation) = &self.wired.rotation {
            // Another conversation may have found out at the same time, to the same end.
            let _ = rotation.trusted.set(agree);
        }
        Ok(batch.end())
    }

    pub(super) fn fork_states(&self) -> Result<Vec<P::State>, Error> {
        let states = self.states.iter().enumerate();
        states
            .map(|(index, state)| self.wired.owner(index).fork_state(state))
            .collect()
    }

    fn agrees_with(&self, others: &[P::State]) -> Result<bool, Error> {
        for (index, (own, other)) in self.states.iter().zip(others).enumerate() {
            let owner = self.wired.owner(index);
            let (own, other) = (owner.snapshot_state(own)?, owner.snapshot_state(other)?);
            for ((_, right), (_, tried)) in own.iter().zip(&other) {
                let (right, tried) = (numbers(right)?, numbers(tried)?);
                let squares: f64 = right.iter().map(|x| x * x).sum();
                let apart: f64 = right.iter().zip(&tried).map(|(a, b)| (a - b) * (a - b)).sum();
                // NaN agrees with nothing.
                if apart.is_nan() || squares.is_nan() || apart > AGREE * AGREE * squares {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// What a snapshot says about a rolling cache besides its buffers.
    pub(super) fn held_as_tensor(&self) -> Result<Option<(String, Tensor)>, Error> {
        let held = self.held.filter(|_| self.wired.rotation.is_some());
        let Some(held) = held.and_then(|held| u32::try_from(held).ok()) else {
            return Ok(None);
        };
        Ok(Some((HELD.to_owned(), Tensor::new(&[held], &Device::Cpu)?)))
    }
}

/// How many tokens the buffers of a snapshot hold; `None` where it does not say.
pub(super) fn held_of(buffers: &[(String, Tensor)]) -> Option<usize> {
    let (_, tensor) = buffers.iter().find(|(name, _)| name == HELD)?;
    let held = tensor.to_dtype(DType::U32).ok()?.to_vec1::<u32>().ok()?;
    usize::try_from(*held.first()?).ok()
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>, Error> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?)
}
