//! ANEMLL bundles of several components: embeddings, chunks of layers with `prefill` and `infer`, a language head.

mod batches;
mod coreml;
mod head;
mod masks;
mod part;
#[cfg(test)]
pub(crate) mod toy;
mod wiring;

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::Error;
use crate::model::{LanguageModel, Prediction};
use batches::Batch;
pub(crate) use coreml::CoreMlPart;
use head::Head;
pub(crate) use head::Vocabulary;
use masks::Masks;
pub(crate) use part::Part;
use wiring::{Place, Role, Step};

/// Token that fills the last batch of a prompt; its rows are hidden by the mask and overwritten later.
const PADDING_TOKEN: i32 = 0;
const PREFILL: &str = "prefill";
const INFER: &str = "infer";

/// The opened packages of a bundle and what its description says about them.
pub(crate) struct Components<P> {
    pub(crate) embeddings: P,
    pub(crate) chunks: Vec<P>,
    pub(crate) head: P,
    /// Tokens a conversation may have, where the bundle says so; the cache's slots otherwise.
    pub(crate) context: Option<usize>,
    pub(crate) vocabulary: Vocabulary,
    /// False where the converter's version is known to prefill wrongly in batches.
    pub(crate) batched_prefill: bool,
}

/// A chunk at both of its functions.
struct Chunk<P> {
    infer: P,
    infer_step: Step,
    prefill: Option<(P, Step)>,
    /// Which of the states it uses.
    state: usize,
}

/// What conversations share: packages, wiring, masks.
struct Wired<P> {
    embeddings: P,
    ids_input: String,
    embeddings_output: String,
    chunks: Vec<Chunk<P>>,
    head: P,
    head_input: Place,
    head_kind: Head,
    masks: Masks,
    /// Rows of a prefill batch; `None` when tokens are computed one by one.
    batch: Option<usize>,
    slots: usize,
    context: usize,
    vocabulary: usize,
}

/// An ANEMLL model with the state of one conversation.
pub(crate) struct AnemllModel<P: Part> {
    wired: Arc<Wired<P>>,
    states: Vec<P::State>,
    logits: Vec<f32>,
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
        })
    }

    /// Runs one token through the chunks and gives its hidden state.
    fn infer(&mut self, token: u32, position: usize) -> Result<Tensor, Error> {
        let ids = [to_id(token)?];
        self.wired.run(&mut self.states, &ids, position, |chunk| {
            Some((&chunk.infer, &chunk.infer_step))
        })
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
        matches!(self.wired.head_kind, Head::Logits(_))
    }

    fn prefill(&mut self, tokens: &[u32], cached: usize) -> Result<usize, Error> {
        let wired = Arc::clone(&self.wired);
        let batch = wired
            .batch
            .and_then(|rows| Some((rows, Batch::next(cached, tokens.len(), rows, wired.slots)?)));
        let Some((rows, batch)) = batch else {
            let Some(&token) = tokens.get(cached) else {
                return Ok(cached);
            };
            self.infer(token, cached)?;
            return Ok(cached + 1);
        };
        let mut ids = Vec::with_capacity(rows);
        for &token in &tokens[batch.start..batch.end()] {
            ids.push(to_id(token)?);
        }
        ids.resize(rows, PADDING_TOKEN);
        wired.run(&mut self.states, &ids, batch.start, |chunk| {
            chunk.prefill.as_ref().map(|(part, step)| (part, step))
        })?;
        Ok(batch.end())
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, Error> {
        let Some((&token, before)) = tokens.split_last() else {
            return Err(Error::EmptyPrompt);
        };
        let hidden = self.infer(token, before.len())?;
        let wired = &self.wired;
        let outputs = wired.head.predict(&[(wired.head_input.name(), &hidden)], None)?;
        wired
            .head_kind
            .predict(wired.head.name(), &outputs, wired.vocabulary, &mut self.logits)
    }

    fn fork(&self) -> Result<Box<dyn LanguageModel>, Error> {
        let wired = Arc::clone(&self.wired);
        let mut states = Vec::with_capacity(self.states.len());
        for (index, state) in self.states.iter().enumerate() {
            states.push(wired.owner(index).fork_state(state)?);
        }
        Ok(Box::new(AnemllModel {
            wired,
            states,
            logits: Vec::new(),
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
        Ok(all)
    }

    fn restore(&mut self, buffers: &[(String, Tensor)]) -> Result<(), Error> {
        for (index, state) in self.states.iter_mut().enumerate() {
            let prefix = format!("{index}/");
            let own = buffers
                .iter()
                .filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_string(), tensor.clone())));
            self.wired
                .owner(index)
                .restore_state(state, &own.collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

impl<P: Part> Wired<P> {
    /// The part that made state number `index`.
    fn owner(&self, index: usize) -> &P {
        let chunk = self.chunks.iter().find(|chunk| chunk.state == index);
        &chunk.expect("every state was made by a chunk that uses it").infer
    }

    fn new(components: Components<P>) -> Result<Self, Error> {
        let Components {
            embeddings,
            chunks,
            head,
            context,
            vocabulary,
            batched_prefill,
        } = components;
        let chunks = wire_chunks(chunks)?;
        let first = &chunks.first().ok_or_else(|| none("chunks"))?.infer_step;
        let (slots, mask_dtype) = (first.width, first.mask_dtype);
        let batch = if batched_prefill {
            common_batch(&chunks, &embeddings, slots)?
        } else {
            None
        };
        let ids_input = wiring::only_input(embeddings.name(), embeddings.interface())?
            .name
            .clone();
        let embeddings_output = embeddings
            .interface()
            .outputs
            .first()
            .ok_or_else(|| none("outputs"))?
            .name
            .clone();
        let head_input = wiring::only_input(head.name(), head.interface())?;
        let head_input = Place::new(&head_input.name, &[]);
        let head_kind = Head::read(head.name(), head.interface(), &vocabulary)?;
        let vocabulary = vocabulary_size(&head, &head_kind, &vocabulary)?;
        let context = context.map_or(slots, |context| context.min(slots));
        let masks = Masks::new(slots, mask_dtype)?;
        Ok(Wired {
            embeddings,
            ids_input,
            embeddings_output,
            chunks,
            head,
            head_input,
            head_kind,
            masks,
            batch,
            slots,
            context,
            vocabulary,
        })
    }

    /// One state for each set of buffers; chunks that declare the same buffers share one.
    fn make_states(&self) -> Result<Vec<P::State>, Error> {
        let mut states = Vec::new();
        for chunk in &self.chunks {
            if chunk.state == states.len() {
                states.push(chunk.infer.make_state()?);
            }
        }
        Ok(states)
    }

    /// Runs `ids` from position `start` on through embeddings and chunks.
    fn run<'a>(
        &'a self,
        states: &mut [P::State],
        ids: &[i32],
        start: usize,
        at: impl Fn(&'a Chunk<P>) -> Option<(&'a P, &'a Step)>,
    ) -> Result<Tensor, Error> {
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu)?;
        let embedded = self.embeddings.predict(&[(&self.ids_input, &ids)], None)?;
        let mut hidden = take(self.embeddings.name(), embedded, &self.embeddings_output)?;
        let mut feeds: Option<Vec<Tensor>> = None;
        let mut wired_for: Option<&Step> = None;
        for chunk in &self.chunks {
            let (part, step) = at(chunk).ok_or_else(|| none(PREFILL))?;
            if wired_for.is_none_or(|before| before.inputs != step.inputs) {
                feeds = Some(self.feeds(step, start, &hidden)?);
                wired_for = Some(step);
            }
            let feeds = feeds.get_or_insert_default();
            let inputs: Vec<(&str, &Tensor)> = step
                .inputs
                .iter()
                .zip(feeds.iter())
                .map(|((place, role), feed)| {
                    (place.name(), if *role == Role::Hidden { &hidden } else { feed })
                })
                .collect();
            let outputs = part.predict(&inputs, states.get_mut(chunk.state))?;
            hidden = take(part.name(), outputs, &step.output)?;
        }
        Ok(hidden)
    }

    /// The tensors of a step's inputs, the hidden state's being a stand-in.
    fn feeds(&self, step: &Step, start: usize, hidden: &Tensor) -> Result<Vec<Tensor>, Error> {
        let feed = |(place, role): &(Place, Role)| match role {
            Role::Hidden => Ok(hidden.clone()),
            Role::Positions => self.masks.positions(start, place, step.rows),
            Role::Mask => self.masks.causal(start, place, step.rows),
            Role::Current => self.masks.positions(start, place, 1),
            Role::Update => self.masks.update(start, place, step.rows),
        };
        step.inputs.iter().map(feed).collect()
    }
}

fn wire_chunks<P: Part>(parts: Vec<P>) -> Result<Vec<Chunk<P>>, Error> {
    let mut chunks: Vec<Chunk<P>> = Vec::with_capacity(parts.len());
    let mut states = 0;
    for part in parts {
        let functions = part.functions();
        let infer = match functions.as_slice() {
            [_] => part,
            several if several.iter().any(|f| f == INFER) => part.with_function(INFER)?,
            several => {
                return Err(Error::Wiring {
                    part: part.name().to_owned(),
                    function: INFER.to_owned(),
                    what: format!("the package has no such function; it has {}", several.join(", ")),
                });
            }
        };
        let infer_step = Step::read(infer.name(), infer.interface())?;
        if infer_step.rows != 1 {
            let what = format!("takes {} tokens at once, needed: 1", infer_step.rows);
            return Err(Error::Wiring {
                part: infer.name().to_owned(),
                function: INFER.to_owned(),
                what,
            });
        }
        let prefill = match functions.iter().any(|f| f == PREFILL) {
            false => None,
            true => {
                let part = infer.with_function(PREFILL)?;
                let step = Step::read(part.name(), part.interface())?;
                Some((part, step))
            }
        };
        let same = |other: &&Chunk<P>| other.infer.interface().states == infer.interface().states;
        let state = chunks.iter().find(same).map_or(states, |other| other.state);
        states = states.max(state + 1);
        check_against_first(chunks.first(), &infer, &infer_step)?;
        chunks.push(Chunk {
            infer,
            infer_step,
            prefill,
            state,
        });
    }
    Ok(chunks)
}

fn check_against_first<P: Part>(first: Option<&Chunk<P>>, part: &P, step: &Step) -> Result<(), Error> {
    let Some(first) = first else { return Ok(()) };
    let expected = (first.infer_step.width, first.infer_step.mask_dtype);
    if expected == (step.width, step.mask_dtype) {
        return Ok(());
    }
    let found = (step.width, step.mask_dtype);
    let what = format!(
        "the mask (slots, type) is {found:?}, in {} it is {expected:?}",
        first.infer.name()
    );
    Err(Error::Wiring {
        part: part.name().to_owned(),
        function: INFER.to_owned(),
        what,
    })
}

/// Rows of a prefill batch, when every chunk prefills and the embeddings take as many ids at once.
fn common_batch<P: Part>(chunks: &[Chunk<P>], embeddings: &P, slots: usize) -> Result<Option<usize>, Error> {
    let steps: Option<Vec<&Step>> = chunks
        .iter()
        .map(|chunk| chunk.prefill.as_ref().map(|(_, step)| step))
        .collect();
    let Some([first, rest @ ..]) = steps.as_deref() else {
        return Ok(None);
    };
    if let Some(other) = rest
        .iter()
        .find(|step| step.rows != first.rows || step.width != first.width)
    {
        let what = format!(
            "chunks prefill {} and {} tokens at once, over {} and {} slots",
            first.rows, other.rows, first.width, other.width
        );
        return Err(Error::Wiring {
            part: chunks[0].infer.name().to_owned(),
            function: PREFILL.to_owned(),
            what,
        });
    }
    let ids = wiring::only_input(embeddings.name(), embeddings.interface())?;
    let embeds = wiring::array(ids).is_ok_and(|array| wiring::takes(array, &[1, first.rows]));
    if !embeds {
        tracing::warn!(
            rows = first.rows,
            "the embeddings do not take a whole batch; tokens are computed one by one"
        );
    }
    Ok((embeds && first.rows > 1 && first.width == slots && first.rows <= slots).then_some(first.rows))
}

/// Tokens of the vocabulary: what the head gives, cut to what the bundle says.
fn vocabulary_size<P: Part>(head: &P, kind: &Head, vocabulary: &Vocabulary) -> Result<usize, Error> {
    let given: Option<usize> = match kind {
        Head::Argmax { .. } => None,
        Head::Logits(names) => {
            let outputs = &head.interface().outputs;
            let last_dim = |name: &String| {
                let output = outputs.iter().find(|o| &o.name == name)?;
                wiring::array(output).ok()?.shape.last().copied()
            };
            names.iter().map(last_dim).sum()
        }
    };
    match (given, vocabulary.size) {
        (Some(given), Some(size)) => Ok(given.min(size)),
        (Some(size), None) | (None, Some(size)) => Ok(size),
        (None, None) => Err(Error::Wiring {
            part: head.name().to_owned(),
            function: head.interface().name.clone(),
            what: "the size of the vocabulary is in neither the head's outputs nor config.json nor meta.yaml"
                .to_owned(),
        }),
    }
}

fn to_id(token: u32) -> Result<i32, Error> {
    i32::try_from(token).map_err(|_| Error::TokenOutside {
        index: 0,
        token,
        vocabulary: i32::MAX as usize,
    })
}

fn take(part: &str, outputs: Vec<(String, Tensor)>, name: &str) -> Result<Tensor, Error> {
    outputs
        .into_iter()
        .find(|(n, _)| n == name)
        .map(|(_, tensor)| tensor)
        .ok_or_else(|| Error::Wiring {
            part: part.to_owned(),
            function: "outputs".to_owned(),
            what: format!("the output `{name}` did not come"),
        })
}

fn none(what: &str) -> Error {
    Error::Wiring {
        part: "bundle".to_owned(),
        function: INFER.to_owned(),
        what: format!("there are no {what}"),
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
    fn every_prompt_length_takes_the_fewest_batches() {
        for (tokens, batches) in [
            (1, &[][..]),
            (2, &[0]),
            (64, &[0]),
            (65, &[0]),
            (66, &[0, 64]),
            (129, &[0, 64]),
            (256, &[0, 64, 128, 192]),
        ] {
            let (mut model, calls) = Toy::default().model();
            answer(&mut model, &prompt(tokens));
            for part in ["chunk0", "chunk1"] {
                assert_eq!(starts(&calls, part, "prefill"), batches, "{tokens} tokens");
                assert_eq!(starts(&calls, part, "infer"), [tokens - 1], "{tokens} tokens");
            }
        }
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
        answer(&mut model, &prompt(3));
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
        components.context = Some(100);
        components.vocabulary.size = Some(290);
        let model = AnemllModel::new(components).unwrap();
        assert_eq!((model.context_tokens(), model.vocabulary()), (100, 290));
    }
}
