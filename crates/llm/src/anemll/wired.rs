//! Packages wired into one model: which function runs when, what feeds it, which state it has.

use candle_core::{Device, Tensor};
use candle_coreml_mil::Feature;

use super::chunks::{Call, Chunk, Mode, wire_chunks, wrong};
use super::masks::Masks;
use super::rotation::Rotation;
use super::step::{Renamed, Step};
use super::{Components, Facts};
use crate::Error;
use crate::part::head::{Head, Vocabulary};
use crate::part::interface::{Place, Role, array, only_input, takes};
use crate::part::{Part, number, take};

/// The package that turns ids into hidden states.
pub(super) struct Embeddings<P> {
    pub(super) part: P,
    pub(super) input: String,
    pub(super) output: String,
}

/// What conversations share: packages, wiring, masks.
pub(super) struct Wired<P> {
    pub(super) embeddings: Option<Embeddings<P>>,
    pub(super) chunks: Vec<Chunk<P>>,
    pub(super) head: Option<(P, Place)>,
    pub(super) head_kind: Head,
    masks: Masks,
    /// Rows of a prefill batch; `None` when tokens are computed one by one.
    pub(super) batch: Option<usize>,
    /// Rows of batches of other sizes that all packages take, the smallest first.
    pub(super) further: Vec<usize>,
    renamed: Renamed,
    /// Why they are.
    pub(super) one_by_one: Option<String>,
    pub(super) rotation: Option<Rotation>,
    pub(super) slots: usize,
    pub(super) context: usize,
    /// What bounds the context.
    pub(super) bound: &'static str,
    pub(super) vocabulary: usize,
}

impl<P: Part> Wired<P> {
    pub(super) fn new(components: Components<P>) -> Result<Self, Error> {
        let Components {
            embeddings,
            chunks,
            head,
            mut facts,
        } = components;
        let chunks = wire_chunks(chunks, &facts.renamed)?;
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else {
            return Err(none("chunks"));
        };
        let (slots, mask_dtype) = (first.infer.step.width, first.infer.step.mask_dtype);
        note_vocabulary(
            &mut facts.vocabulary,
            head.as_ref().unwrap_or(&last.infer.part),
            &first.infer.part,
        );
        let embeddings = embeddings.map(Embeddings::read).transpose()?;
        let head = head.map(|head| read_head(head, &facts.renamed)).transpose()?;
        let given = match &head {
            Some((head, _)) => head,
            None => &last.infer.part,
        };
        let head_kind = Head::read(given.name(), given.interface(), &facts.vocabulary)?;
        let vocabulary = head_kind.vocabulary(given.name(), given.interface(), &facts.vocabulary)?;
        check_widths(embeddings.as_ref(), &chunks, head.as_ref())?;
        let rotation = Rotation::read(&chunks, facts.window, slots)?;
        let (context, bound) = limit(&chunks, &facts, rotation.is_some(), slots);
        let batch = match facts.one_by_one {
            Some(why) => Err(why),
            None => common_batch(&chunks, embeddings.as_ref(), slots)?,
        };
        let rotation = rotation.map(|rotation| Rotation {
            rows: rotation.rows.filter(|&rows| batch == Ok(rows)),
            ..rotation
        });
        let further = match (&batch, &rotation) {
            (Ok(batch), None) => common_further(&chunks, embeddings.as_ref(), slots, *batch),
            _ => Vec::new(),
        };
        Ok(Wired {
            further,
            renamed: facts.renamed,
            masks: Masks::new(slots, mask_dtype)?,
            embeddings,
            chunks,
            head,
            head_kind,
            one_by_one: batch.as_ref().err().cloned(),
            batch: batch.ok(),
            rotation,
            slots,
            context,
            bound,
            vocabulary,
        })
    }

    /// The part that made state number `index`.
    pub(super) fn owner(&self, index: usize) -> &P {
        let chunk = self.chunks.iter().find(|chunk| chunk.state == index);
        &chunk
            .expect("every state was made by a chunk that uses it")
            .infer
            .part
    }

    /// The part whose outputs end a run through the chunks.
    pub(super) fn last_part(&self) -> &P {
        &self.chunks.last().expect("a model has a chunk").infer.part
    }

    /// The output of it that has the hidden state.
    pub(super) fn last_output(&self) -> Option<&str> {
        self.chunks.last()?.infer.step.output.as_deref()
    }

    /// Opens the functions of `mode`, where they are not open.
    ///
    /// # Errors
    /// [`Error::Wiring`] where they do not fit the others.
    pub(super) fn open(&self, mode: Mode) -> Result<(), Error> {
        let Mode::Further(rows) = mode else { return Ok(()) };
        self.chunks
            .iter()
            .try_for_each(|chunk| chunk.open_further(rows, &self.renamed))
    }

    /// Tokens a call takes.
    pub(super) fn rows(&self, mode: Mode) -> usize {
        let first = self.chunks.first().and_then(|chunk| chunk.at(mode));
        first.map_or(1, |call| call.step.rows)
    }

    /// One state for each set of buffers; chunks that declare the same buffers share one.
    pub(super) fn make_states(&self) -> Result<Vec<P::State>, Error> {
        let mut states = Vec::new();
        for chunk in &self.chunks {
            if chunk.state == states.len() {
                states.push(chunk.infer.part.make_state()?);
            }
        }
        Ok(states)
    }

    /// Runs `ids` from position `start` on through embeddings and chunks; gives the outputs of the last chunk.
    pub(super) fn run(
        &self,
        states: &mut [P::State],
        ids: &[i32],
        start: usize,
        mode: Mode,
    ) -> Result<Vec<(String, Tensor)>, Error> {
        let mut carried = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu)?;
        if let Some(embeddings) = &self.embeddings {
            let embedded = embeddings.part.predict(&[(&embeddings.input, &carried)], None)?;
            carried = take(embeddings.part.name(), embedded, &embeddings.output)?;
        }
        let mut feeds: Vec<Tensor> = Vec::new();
        let mut wired_for: Option<&Step> = None;
        let mut chunks = self.chunks.iter().peekable();
        while let Some(chunk) = chunks.next() {
            let Call { part, step } = chunk.at(mode).ok_or_else(|| none("functions for this call"))?;
            if wired_for.is_none_or(|before| before.inputs != step.inputs) {
                feeds = self.feeds(step, start, &carried)?;
                wired_for = Some(step);
            }
            let inputs = step.inputs.iter().zip(&feeds);
            let inputs: Vec<(&str, &Tensor)> = inputs
                .map(|((place, role), feed)| match role {
                    Role::Hidden | Role::Ids => (place.name(), &carried),
                    _ => (place.name(), feed),
                })
                .collect();
            let outputs = part.predict(&inputs, states.get_mut(chunk.state))?;
            if chunks.peek().is_none() {
                return Ok(outputs);
            }
            carried = take(part.name(), outputs, step.output.as_deref().unwrap_or_default())?;
        }
        Err(none("chunks"))
    }

    /// The tensors of a step's inputs; that of what is carried is a stand-in.
    fn feeds(&self, step: &Step, start: usize, carried: &Tensor) -> Result<Vec<Tensor>, Error> {
        let feed = |(place, role): &(Place, Role)| match role {
            Role::Hidden | Role::Ids => Ok(carried.clone()),
            Role::Positions => self.masks.positions(start, place, step.rows),
            Role::Mask => self.masks.causal(start, place, step.rows),
            Role::Current => self.masks.positions(start, place, 1),
            Role::Update => self.masks.update(start, place, step.rows),
        };
        step.inputs.iter().map(feed).collect()
    }
}

/// Tokens a conversation may have, and what bounds them.
fn limit<P: Part>(chunks: &[Chunk<P>], facts: &Facts, rotates: bool, slots: usize) -> (usize, &'static str) {
    let noted = |key: &str| number(&chunks.first()?.infer.part, key);
    let local = |limit: Option<usize>| limit.filter(|_| !rotates);
    let limits = [
        (Some(slots), "the mask"),
        (facts.context, "the bundle's description"),
        (noted("com.anemll.context_length"), "the package's description"),
        (noted("com.anemll.state_length"), "the package's state_length"),
        (local(facts.window), "sliding_window, without rotation functions"),
        (
            local(shortest_cache(chunks, slots)),
            "the shortest cache, without rotation functions",
        ),
    ];
    let given = limits.into_iter().filter_map(|(limit, why)| Some((limit?, why)));
    given
        .min_by_key(|(limit, _)| *limit)
        .unwrap_or((slots, "the mask"))
}

/// Slots of the shortest cache, where it is shorter than the mask: [.., slots, width of a head].
pub(super) fn shortest_cache<P: Part>(chunks: &[Chunk<P>], slots: usize) -> Option<usize> {
    let states = chunks
        .iter()
        .flat_map(|chunk| &chunk.infer.part.interface().states);
    let length = |state: &Feature| match array(state).ok()?.shape.as_slice() {
        shape if shape.contains(&slots) => None,
        [_, .., length, _] => Some(*length),
        _ => None,
    };
    states
        .filter_map(length)
        .filter(|&length| 0 < length && length < slots)
        .min()
}

impl<P: Part> Embeddings<P> {
    fn read(part: P) -> Result<Self, Error> {
        let input = only_input(part.name(), part.interface())?.name.clone();
        let output = part.interface().outputs.first().ok_or_else(|| none("outputs"))?;
        let output = output.name.clone();
        Ok(Embeddings { part, input, output })
    }
}

fn read_head<P: Part>(head: P, renamed: &Renamed) -> Result<(P, Place), Error> {
    let inputs = &head.interface().inputs;
    let hidden = |input: &&Feature| {
        let name = renamed.get(&input.name).unwrap_or(&input.name);
        Role::of(name) == Some(Role::Hidden)
    };
    let place = match inputs.iter().find(hidden) {
        Some(input) if inputs.len() == 1 => Place::new(&input.name, &[]),
        _ => Place::new(&only_input(head.name(), head.interface())?.name, &[]),
    };
    Ok((head, place))
}

/// Takes from the packages what the bundle does not say about its vocabulary.
fn note_vocabulary<P: Part>(vocabulary: &mut Vocabulary, head: &P, chunk: &P) {
    let written = |key: &str| head.written(key).or_else(|| chunk.written(key));
    if vocabulary.size.is_none() {
        vocabulary.size = written("com.anemll.vocab_size").and_then(|size| size.trim().parse().ok());
    }
    if vocabulary.part_sizes.is_none() {
        let sizes = written("com.anemll.lm_head_chunk_sizes");
        let numbers = |text: String| {
            let inner = text
                .trim()
                .trim_start_matches('[')
                .trim_end_matches(']')
                .to_owned();
            inner
                .split(',')
                .map(|n| n.trim().parse().ok())
                .collect::<Option<Vec<usize>>>()
        };
        vocabulary.part_sizes = sizes.and_then(numbers);
    }
}

/// Hidden states have one width from the embeddings to the head, and ids go to the first chunk alone.
fn check_widths<P: Part>(
    embeddings: Option<&Embeddings<P>>,
    chunks: &[Chunk<P>],
    head: Option<&(P, Place)>,
) -> Result<(), Error> {
    let last_dim = |features: &[Feature], name: &str| {
        let feature = features.iter().find(|f| f.name == name)?;
        array(feature).ok()?.shape.last().copied()
    };
    let mut before: Option<(&P, usize)> = None;
    if let Some(Embeddings { part, output, .. }) = embeddings {
        before = last_dim(&part.interface().outputs, output).map(|width| (part, width));
    }
    for (index, chunk) in chunks.iter().enumerate() {
        let Call { part, step } = &chunk.infer;
        let ids = embeddings.is_none() && index == 0;
        match (step.hidden, before) {
            (None, _) if !ids => {
                return Err(wrong(part, "takes token ids, needed: hidden states".to_owned()));
            }
            (Some(_), _) if ids => {
                let what = "takes hidden states, and there are no embeddings; needed: token ids".to_owned();
                return Err(wrong(part, what));
            }
            (Some(width), Some((earlier, given))) if width != given => {
                return Err(misfit(part, width, earlier, given));
            }
            _ => {}
        }
        before = step
            .output
            .as_deref()
            .and_then(|output| last_dim(&part.interface().outputs, output))
            .map(|width| (part, width));
    }
    if let (Some((head, place)), Some((earlier, given))) = (head, before)
        && let Some(width) = last_dim(&head.interface().inputs, place.name())
        && width != given
    {
        return Err(misfit(head, width, earlier, given));
    }
    Ok(())
}

fn misfit<P: Part>(part: &P, width: usize, before: &P, given: usize) -> Error {
    let what = format!(
        "takes hidden states of width {width}, {} gives {given}",
        before.name()
    );
    wrong(part, what)
}

/// Rows of a prefill batch, when every chunk prefills and the embeddings take as many ids at once; otherwise why not.
fn common_batch<P: Part>(
    chunks: &[Chunk<P>],
    embeddings: Option<&Embeddings<P>>,
    slots: usize,
) -> Result<Result<usize, String>, Error> {
    let calls: Option<Vec<&Call<P>>> = chunks.iter().map(|chunk| chunk.prefill.as_ref()).collect();
    let Some([first, rest @ ..]) = calls.as_deref() else {
        return Ok(Err("the packages have no function `prefill`".to_owned()));
    };
    let step = &first.step;
    if let Some(other) = rest
        .iter()
        .find(|call| call.step.rows != step.rows || call.step.width != step.width)
    {
        let what = format!(
            "chunks prefill {} and {} tokens at once, over {} and {} slots",
            step.rows, other.step.rows, step.width, other.step.width
        );
        return Err(wrong(&first.part, what));
    }
    if let Some(Embeddings { part, .. }) = embeddings {
        let ids = only_input(part.name(), part.interface())?;
        if !array(ids).is_ok_and(|array| takes(array, &[1, step.rows])) {
            let (name, rows) = (part.name(), step.rows);
            return Ok(Err(format!("{name} does not take the {rows} tokens of a batch")));
        }
    }
    if step.rows == 1 {
        return Ok(Err("`prefill` takes one token a call".to_owned()));
    }
    if step.width != slots {
        let width = step.width;
        return Ok(Err(format!(
            "the mask of `prefill` has {width} slots, that of `infer` {slots}"
        )));
    }
    Ok(match step.rows <= slots {
        true => Ok(step.rows),
        false => Err(format!("a batch of {} is more than the {slots} slots", step.rows)),
    })
}

/// Rows of batches of other sizes that every chunk and the embeddings take.
fn common_further<P: Part>(
    chunks: &[Chunk<P>],
    embeddings: Option<&Embeddings<P>>,
    slots: usize,
    batch: usize,
) -> Vec<usize> {
    let takes_ids = |rows: usize| match embeddings {
        Some(Embeddings { part, .. }) => only_input(part.name(), part.interface())
            .is_ok_and(|ids| array(ids).is_ok_and(|array| takes(array, &[1, rows]))),
        None => true,
    };
    let Some((first, rest)) = chunks.split_first() else {
        return Vec::new();
    };
    let sizes = first.further.iter().map(|further| further.rows);
    sizes
        .filter(|&rows| rows > 1 && rows != batch && rows <= slots && takes_ids(rows))
        .filter(|&rows| {
            rest.iter()
                .all(|chunk| chunk.further.iter().any(|f| f.rows == rows))
        })
        .collect()
}

fn none(what: &str) -> Error {
    Error::Wiring {
        part: "bundle".to_owned(),
        function: "infer".to_owned(),
        what: format!("there are no {what}"),
    }
}
