//! Models of several functions with fixed shapes: ANEMLL's embeddings, chunks of layers and language head, its monoliths, and
//! the same parts described by a `ModelConfig`.

mod batches;
mod chunks;
mod masks;
pub(crate) mod report;
mod rotation;
mod step;
#[cfg(test)]
pub(crate) mod toy;
mod wired;

use std::sync::Arc;

use candle_core::Tensor;

use crate::Error;
use crate::model::{LanguageModel, Prediction};
use crate::part::head::Vocabulary;
use crate::part::{Part, take, to_id};
use chunks::Mode;
pub(crate) use report::ports;
pub(crate) use step::Renamed;
use wired::Wired;

/// Token that fills the last batch of a prompt; its rows are hidden by the mask and overwritten later.
const PADDING_TOKEN: i32 = 0;

/// The opened packages of a bundle and what its description says about them.
pub(crate) struct Components<P> {
    /// Token ids to hidden states; `None` where the chunks take ids.
    pub(crate) embeddings: Option<P>,
    pub(crate) chunks: Vec<ChunkParts<P>>,
    /// Hidden state to logits; `None` where the last chunk gives them.
    pub(crate) head: Option<P>,
    pub(crate) facts: Facts,
}

/// The packages of one chunk.
pub(crate) struct ChunkParts<P> {
    /// Holds `infer`, and the other functions unless they are elsewhere.
    pub(crate) infer: P,
    /// Holds `prefill` where that is a package of its own.
    pub(crate) prefill: Option<P>,
    /// Holds rotation functions where those are in a package of their own.
    pub(crate) rotated: Option<P>,
}

/// What a bundle says about its packages.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// Tokens a conversation may have, where the bundle says so; the cache's slots otherwise.
    pub(crate) context: Option<usize>,
    /// Tokens that local layers see, where the bundle says so.
    pub(crate) window: Option<usize>,
    pub(crate) vocabulary: Vocabulary,
    /// Why prefill in batches is not valid, where it is not known to be.
    pub(crate) one_by_one: Option<String>,
    /// Names of inputs that are not the convention's.
    pub(crate) renamed: Renamed,
}

/// A model with the state of one conversation.
pub(crate) struct AnemllModel<P: Part> {
    wired: Arc<Wired<P>>,
    states: Vec<P::State>,
    logits: Vec<f32>,
    /// Tokens the states hold, `None` after a failure; kept where caches roll.
    held: Option<usize>,
}

impl<P: Part> AnemllModel<P> {
    /// Wires the packages of a bundle.
    ///
    /// # Errors
    /// [`Error::Wiring`] where packages do not fit each other.
    pub(crate) fn new(components: Components<P>) -> Result<Self, Error> {
        let wired = Arc::new(Wired::new(components)?);
        let states = wired.make_states()?;
        Ok(AnemllModel {
            wired,
            states,
            logits: Vec::new(),
            held: Some(0),
        })
    }

    /// Runs one token through the chunks and gives the outputs of the last.
    fn infer(&mut self, token: u32, position: usize) -> Result<Vec<(String, Tensor)>, Error> {
        let mode = match &self.wired.rotation {
            Some(rotation) if position >= rotation.window => Mode::RotateOne,
            _ => Mode::One,
        };
        self.wired.run(&mut self.states, &[to_id(token)?], position, mode)
    }

    /// Computes tokens from `cached` on with one call of the packages, and says how many are computed then.
    fn advance(&mut self, tokens: &[u32], cached: usize) -> Result<usize, Error> {
        self.held = None;
        let now = match self.wired.batch_after(cached, tokens.len()) {
            Some((Mode::RotateBatch, batch)) => self.rotated_batch(tokens, batch)?,
            Some((mode, batch)) => {
                self.wired.open(mode)?;
                let rows = self.wired.rows(mode);
                let mut ids = Vec::with_capacity(rows);
                for &token in tokens.get(batch.start..batch.end()).unwrap_or_default() {
                    ids.push(to_id(token)?);
                }
                ids.resize(rows, PADDING_TOKEN);
                self.wired.run(&mut self.states, &ids, batch.start, mode)?;
                batch.end()
            }
            None => match tokens.get(cached) {
                Some(&token) => {
                    self.infer(token, cached)?;
                    cached + 1
                }
                None => cached,
            },
        };
        self.held = Some(now);
        Ok(now)
    }
}

impl<P: Part> LanguageModel for AnemllModel<P> {
    fn context_tokens(&self) -> usize {
        self.wired.context
    }

    fn vocabulary(&self) -> usize {
        self.wired.vocabulary
    }

    fn gives_logits(&self) -> bool {
        self.wired.head_kind.gives_logits()
    }

    fn prefill(&mut self, tokens: &[u32], cached: usize) -> Result<usize, Error> {
        self.settle(tokens, cached)?;
        self.advance(tokens, cached)
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, Error> {
        let Some((&token, before)) = tokens.split_last() else {
            return Err(Error::EmptyPrompt);
        };
        self.settle(tokens, before.len())?;
        self.held = None;
        let outputs = self.infer(token, before.len())?;
        self.held = Some(tokens.len());
        let wired = &self.wired;
        let (part, outputs) = match (&wired.head, wired.last_output()) {
            (Some((head, place)), Some(name)) => {
                let hidden = take(wired.last_part().name(), outputs, name)?;
                (head, head.predict(&[(place.name(), &hidden)], None)?)
            }
            _ => (wired.last_part(), outputs),
        };
        wired
            .head_kind
            .predict(part.name(), &outputs, wired.vocabulary, &mut self.logits)
    }

    fn fork(&self) -> Result<Box<dyn LanguageModel>, Error> {
        Ok(Box::new(AnemllModel {
            wired: Arc::clone(&self.wired),
            states: self.fork_states()?,
            logits: Vec::new(),
            held: self.held,
        }))
    }

    fn snapshot(&self) -> Result<Vec<(String, Tensor)>, Error> {
        let mut all = Vec::new();
        for (index, state) in self.states.iter().enumerate() {
            let buffers = self.wired.owner(index).snapshot_state(state)?;
            all.extend(
                buffers
                    .into_iter()
                    .map(|(name, tensor)| (format!("{index}/{name}"), tensor)),
            );
        }
        all.extend(self.held_as_tensor()?);
        Ok(all)
    }

    fn restore(&mut self, buffers: &[(String, Tensor)]) -> Result<(), Error> {
        self.held = None;
        for (index, state) in self.states.iter_mut().enumerate() {
            let prefix = format!("{index}/");
            let own = buffers
                .iter()
                .filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_string(), tensor.clone())));
            self.wired
                .owner(index)
                .restore_state(state, &own.collect::<Vec<_>>())?;
        }
        self.held = rotation::held_of(buffers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::toy::{Call, Calls, Toy, ToyPart, VOCABULARY};
    use super::*;

    fn prompt(tokens: usize) -> Vec<u32> {
        (0..tokens)
            .map(|i| (i as u32 * 31 + 7) % VOCABULARY as u32)
            .collect()
    }

    /// Prefills all but the last token and decodes it.
    fn answer(model: &mut AnemllModel<ToyPart>, tokens: &[u32]) -> Vec<f32> {
        let mut cached = 0;
        while cached + 1 < tokens.len() {
            cached = model.prefill(&tokens[..tokens.len() - 1], cached).unwrap();
        }
        logits(model, tokens)
    }

    fn logits(model: &mut AnemllModel<ToyPart>, tokens: &[u32]) -> Vec<f32> {
        match model.decode(tokens).unwrap() {
            Prediction::Logits(logits) => logits.to_vec(),
            Prediction::Token(token) => panic!("logits are needed, token {token} came"),
        }
    }

    fn one_by_one(toy: &Toy, tokens: &[u32]) -> Vec<f32> {
        let (mut model, _) = toy.model();
        (1..tokens.len()).for_each(|n| drop(logits(&mut model, &tokens[..n])));
        logits(&mut model, tokens)
    }

    fn starts(calls: &Calls, part: &str, function: &str) -> Vec<usize> {
        let calls = calls.lock().unwrap();
        calls
            .iter()
            .filter(|c| c.part == part && c.function == function)
            .map(|c| c.start)
            .collect()
    }

    #[test]
    fn n_tokens_prefilled_and_one_decoded_give_what_all_decoded_give() {
        for update_mask in [false, true] {
            let toy = Toy {
                update_mask,
                ..Toy::default()
            };
            for tokens in [1, 2, 63, 64, 65, 66, 128, 129, 130, 200, 255, 256] {
                let prompt = prompt(tokens);
                let (mut model, _) = toy.model();
                assert_eq!(
                    answer(&mut model, &prompt),
                    one_by_one(&toy, &prompt),
                    "{tokens} tokens"
                );
            }
        }
    }

    #[test]
    fn every_prompt_length_takes_the_fewest_batches_and_few_tokens_take_none() {
        for (tokens, batches, single) in [
            (1, &[][..], &[0][..]),
            (2, &[], &[0, 1]),
            (5, &[], &[0, 1, 2, 3, 4]),
            (6, &[0], &[5]),
            (64, &[0], &[63]),
            (65, &[0], &[64]),
            (66, &[0], &[64, 65]),
            (70, &[0, 64], &[69]),
            (129, &[0, 64], &[128]),
            (256, &[0, 64, 128, 192], &[255]),
        ] {
            let (mut model, calls) = Toy::default().model();
            answer(&mut model, &prompt(tokens));
            for part in ["chunk0", "chunk1"] {
                assert_eq!(starts(&calls, part, "prefill"), batches, "{tokens} tokens");
                assert_eq!(starts(&calls, part, "infer"), single, "{tokens} tokens");
            }
        }
    }

    #[test]
    fn batches_of_other_sizes_are_taken_where_they_suit_and_give_the_same() {
        let toy = Toy {
            further: &[128, 16],
            ..Toy::default()
        };
        for (tokens, expected) in [
            (4, &[][..]),
            (10, &[("prefill_16", 0)]),
            (65, &[("prefill", 0)]),
            (75, &[("prefill", 0), ("prefill_16", 64)]),
            (129, &[("prefill_128", 0)]),
            (200, &[("prefill_128", 0), ("prefill", 128), ("prefill_16", 192)]),
            // The last batch would reach past the last slot.
            (256, &[("prefill_128", 0), ("prefill_128", 128)]),
            (252, &[("prefill_128", 0), ("prefill_128", 128)]),
        ] {
            let (mut model, calls) = toy.model();
            let whole = prompt(tokens);
            assert_eq!(
                answer(&mut model, &whole),
                one_by_one(&toy, &whole),
                "{tokens} tokens"
            );
            for part in ["chunk0", "chunk1"] {
                let calls = calls.lock().unwrap();
                let batches = calls.iter().filter(|c| c.part == part && c.function != "infer");
                let found: Vec<_> = batches.map(|c| (c.function.as_str(), c.start)).collect();
                assert_eq!(found, expected, "{tokens} tokens");
            }
        }
        let (mut model, calls) = toy.model();
        let whole = prompt(250);
        answer(&mut model, &whole[..210]);
        calls.lock().unwrap().clear();
        assert_eq!(model.prefill(&whole[..249], 210).unwrap(), 249);
        assert_eq!(starts(&calls, "chunk0", "prefill"), [192]);
        assert_eq!(logits(&mut model, &whole), one_by_one(&toy, &whole));
    }

    #[test]
    fn a_later_prompt_computes_its_new_tokens_and_stays_inside_the_cache() {
        let toy = Toy::default();
        let whole = prompt(250);
        let (mut model, calls) = toy.model();
        answer(&mut model, &whole[..210]);
        calls.lock().unwrap().clear();
        assert_eq!(model.prefill(&whole[..249], 210).unwrap(), 249);
        assert_eq!(starts(&calls, "chunk0", "prefill"), [192]);
        assert_eq!(logits(&mut model, &whole), one_by_one(&toy, &whole));
    }

    #[test]
    fn where_batches_are_not_valid_tokens_go_one_by_one() {
        let whole = prompt(70);
        let slow = Toy {
            batched_prefill: false,
            ..Toy::default()
        };
        let small = Toy {
            slots: 80,
            batch: 100,
            ..Toy::default()
        };
        for toy in [slow, small] {
            let (mut model, calls) = toy.model();
            assert_eq!(answer(&mut model, &whole), one_by_one(&toy, &whole));
            assert_eq!(starts(&calls, "chunk1", "infer"), (0..70).collect::<Vec<_>>());
            assert!(starts(&calls, "chunk1", "prefill").is_empty());
        }
    }

    #[test]
    fn chunks_run_in_order_on_one_state() {
        let (mut model, calls) = Toy {
            chunks: 3,
            ..Toy::default()
        }
        .model();
        answer(&mut model, &prompt(2));
        let order: Vec<Call> = calls.lock().unwrap().clone();
        let parts: Vec<&str> = order.iter().map(|c| c.part.as_str()).collect();
        assert_eq!(
            parts,
            ["chunk0", "chunk1", "chunk2", "chunk0", "chunk1", "chunk2"]
        );
        assert_eq!(model.states.len(), 1);
    }

    #[test]
    fn heads_of_any_number_of_parts_agree_and_argmax_gives_the_first_best_token() {
        let whole = prompt(20);
        let expected = one_by_one(&Toy::default(), &whole);
        let best = (0..VOCABULARY).fold(0, |b, i| if expected[i] > expected[b] { i } else { b });
        for head_parts in [1, 3, 12] {
            let toy = Toy {
                head_parts,
                ..Toy::default()
            };
            assert_eq!(one_by_one(&toy, &whole), expected, "{head_parts} parts");
            let (mut model, _) = Toy { argmax: true, ..toy }.model();
            assert!(!model.gives_logits());
            model.prefill(&whole[..19], 0).unwrap();
            assert_eq!(
                model.decode(&whole).unwrap(),
                Prediction::Token(best as u32),
                "{head_parts} parts"
            );
        }
    }

    #[test]
    fn a_fork_goes_its_own_way() {
        let toy = Toy::default();
        let (mut model, _) = toy.model();
        let (left, right) = (prompt(30), [prompt(29), vec![5]].concat());
        answer(&mut model, &left[..29]);
        let mut fork = model.fork().unwrap();
        assert_eq!(logits(&mut model, &left), one_by_one(&toy, &left));
        match fork.decode(&right).unwrap() {
            Prediction::Logits(logits) => assert_eq!(logits, one_by_one(&toy, &right)),
            Prediction::Token(_) => panic!("logits are needed"),
        }
    }

    #[test]
    fn sizes_come_from_the_packages() {
        let (model, _) = Toy {
            slots: 96,
            ..Toy::default()
        }
        .model();
        assert_eq!((model.context_tokens(), model.vocabulary()), (96, VOCABULARY));
        let mut components = Toy::default().components(&Calls::default());
        components.facts.context = Some(100);
        components.facts.vocabulary.size = Some(290);
        let model = AnemllModel::new(components).unwrap();
        assert_eq!((model.context_tokens(), model.vocabulary()), (100, 290));
    }
}
