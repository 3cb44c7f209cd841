//! One package with states: `inputIds`, a mask and `logits`, as Apple's and Hugging Face's examples are converted.
//!
//! Calls take any number of tokens the package allows. Where the mask's width is free it ends at the last token, which tells
//! the package where to write; where it is not, an input has the position.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use candle_coreml_mil::Feature;

use super::{
    Input, PackageFacts, Sizes, find, least, named, positions, presence, read_head, read_tokens, wrong,
};
use crate::Error;
use crate::anemll::ports;
use crate::model::{LanguageModel, Prediction};
use crate::part::head::Head;
use crate::part::interface::{Role, array, float_dtype};
use crate::part::{Part, to_id};
use crate::wiring::{WiredCall, WiredState, Wiring};

/// Most tokens of one prefill call: a call gives logits for each, and large vocabularies have 100,000 and more.
const BATCH: usize = 64;

/// What conversations share.
struct Shared<P> {
    part: P,
    inputs: Vec<Input>,
    tokens: Sizes,
    /// Slots a mask may have; `None` where there is none that depends on tokens.
    slots: Option<Sizes>,
    head: Head,
    context: usize,
    /// What bounds the context.
    bound: &'static str,
    vocabulary: usize,
}

/// The model with the state of one conversation.
pub(crate) struct Stateful<P: Part> {
    shared: Arc<Shared<P>>,
    state: P::State,
    logits: Vec<f32>,
}

impl<P: Part> Stateful<P> {
    /// Wires the package.
    ///
    /// # Errors
    /// [`Error::Wiring`] with what does not fit.
    pub(crate) fn new(part: P, facts: &PackageFacts) -> Result<Self, Error> {
        let state = part.make_state()?;
        Ok(Stateful {
            shared: Arc::new(Shared::new(part, facts)?),
            state,
            logits: Vec::new(),
        })
    }

    /// How the package is wired.
    pub(crate) fn wiring(&self, layout: &str) -> Wiring {
        let shared = &self.shared;
        let function = shared.part.interface();
        let source = |name: &str| shared.inputs.iter().find(|input| input.name == name);
        let batch = shared.rows_at(0, BATCH.min(shared.context));
        Wiring {
            layout: layout.to_owned(),
            context_tokens: shared.context,
            context_bound_by: shared.bound.to_owned(),
            vocabulary: shared.vocabulary,
            gives_logits: shared.head.gives_logits(),
            batch_tokens: batch,
            further_batches: Vec::new(),
            no_batches_because: (batch == Some(1)).then(|| "a call takes one token".to_owned()),
            sliding_window: None,
            calls: vec![WiredCall {
                when: "every call".to_owned(),
                file: shared.part.name().to_owned(),
                function: function.name.clone(),
                inputs: ports(&function.inputs, |input| {
                    source(&input.name)
                        .map_or("optional, not fed", |input| input.role.source())
                        .to_owned()
                }),
                outputs: ports(&function.outputs, |output| shared.head.flow(&output.name)),
                state: Some(0),
            }],
            states: vec![WiredState::new(shared.part.name(), function)],
        }
    }

    fn run(&mut self, tokens: &[u32], start: usize) -> Result<Vec<(String, Tensor)>, Error> {
        let feeds = self.shared.feeds(tokens, start)?;
        let inputs = named(&self.shared.inputs, &feeds);
        self.shared.part.predict(&inputs, Some(&mut self.state))
    }
}

impl<P: Part> LanguageModel for Stateful<P> {
    fn context_tokens(&self) -> usize {
        self.shared.context
    }

    fn vocabulary(&self) -> usize {
        self.shared.vocabulary
    }

    fn gives_logits(&self) -> bool {
        self.shared.head.gives_logits()
    }

    fn prefill(&mut self, tokens: &[u32], cached: usize) -> Result<usize, Error> {
        let wanted = tokens.len().saturating_sub(cached).min(BATCH);
        let Some(rows) = self.shared.rows_at(cached, wanted) else {
            return Ok(cached);
        };
        let batch = tokens.get(cached..cached + rows).unwrap_or_default();
        self.run(batch, cached)?;
        Ok(cached + rows)
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, Error> {
        let Some((&token, before)) = tokens.split_last() else {
            return Err(Error::EmptyPrompt);
        };
        let outputs = self.run(&[token], before.len())?;
        let shared = &self.shared;
        shared
            .head
            .predict(shared.part.name(), &outputs, shared.vocabulary, &mut self.logits)
    }

    fn fork(&self) -> Result<Box<dyn LanguageModel>, Error> {
        Ok(Box::new(Stateful {
            shared: Arc::clone(&self.shared),
            state: self.shared.part.fork_state(&self.state)?,
            logits: Vec::new(),
        }))
    }

    fn snapshot(&self) -> Result<Vec<(String, Tensor)>, Error> {
        self.shared.part.snapshot_state(&self.state)
    }

    fn restore(&mut self, buffers: &[(String, Tensor)]) -> Result<(), Error> {
        self.shared.part.restore_state(&mut self.state, buffers)
    }
}

impl<P: Part> Shared<P> {
    fn new(part: P, facts: &PackageFacts) -> Result<Self, Error> {
        let function = part.interface().clone();
        let wrong = |what| wrong(part.name(), &function, what);
        let (inputs, tokens) = read_tokens(part.name(), &function)?;
        if let Some(odd) = inputs
            .iter()
            .find(|i| matches!(i.role, Role::Hidden | Role::Update))
        {
            return Err(wrong(format!("a package of this layout takes no `{}`", odd.name)));
        }
        let slots = find(&inputs, Role::Mask).and_then(|mask| Sizes::of(&mask.array, 0));
        let told = inputs
            .iter()
            .any(|i| matches!(i.role, Role::Positions | Role::Current));
        if !told && !matches!(slots, Some(Sizes::Range(..))) {
            let what = "nothing says where a token is written: neither a mask of free width nor a position"
                .to_owned();
            return Err(wrong(what));
        }
        if tokens.at_least(1) != Some(1) {
            return Err(wrong(format!("single tokens are needed, it takes {tokens:?}")));
        }
        let widest = slots.as_ref().and_then(Sizes::most);
        // [.., slots, width of a head], unless the mask's slots are found elsewhere.
        let length = |state: &Feature| match array(state).ok()?.shape.as_slice() {
            shape if widest.is_some_and(|widest| shape.contains(&widest)) => None,
            [_, .., length, _] => Some(*length),
            _ => None,
        };
        let limits = [
            (facts.context, "the bundle's description"),
            (widest, "the mask"),
            (function.states.iter().filter_map(length).min(), "the states"),
        ];
        let nothing = || wrong("nothing says how many tokens the states hold".to_owned());
        let (context, bound) = least(limits, facts).ok_or_else(nothing)?;
        let (head, vocabulary) = read_head(part.name(), &function, facts)?;
        Ok(Shared {
            part,
            inputs,
            tokens,
            slots,
            head,
            context,
            bound,
            vocabulary,
        })
    }

    /// Tokens the next call takes, `wanted` at most.
    fn rows_at(&self, start: usize, wanted: usize) -> Option<usize> {
        let fits =
            |&rows: &usize| self.tokens.at_most(rows) == Some(rows) && self.width_of(start + rows).is_some();
        (1..=wanted).rev().find(fits)
    }

    /// Width of the mask of a call that ends before position `end`: as wide where that is possible, else the next wider.
    fn width_of(&self, end: usize) -> Option<usize> {
        self.slots.as_ref().map_or(Some(end), |slots| slots.at_least(end))
    }

    fn feeds(&self, tokens: &[u32], start: usize) -> Result<Vec<Tensor>, Error> {
        let end = start + tokens.len();
        let width = self.width_of(end).unwrap_or(end);
        let feed = |input: &Input| match input.role {
            Role::Positions if many(input) => positions(input, start, end),
            Role::Positions | Role::Current => positions(input, start, start + 1),
            Role::Mask => mask(input, start, tokens.len(), width),
            Role::Ids | Role::Hidden | Role::Update => {
                let ids = tokens
                    .iter()
                    .map(|&token| to_id(token))
                    .collect::<Result<Vec<_>, _>>()?;
                Ok(Tensor::from_vec(ids, (1, tokens.len()), &Device::Cpu)?)
            }
        };
        self.inputs.iter().map(feed).collect()
    }
}

/// True for an input that may have several elements.
fn many(input: &Input) -> bool {
    Sizes::of(&input.array, 0).is_some_and(|sizes| sizes.most() != Some(1))
}

/// What the tokens see: zeros and -inf for each, or which slots are taken.
fn mask(input: &Input, start: usize, rows: usize, width: usize) -> Result<Tensor, Error> {
    let Some(dtype) = float_dtype(input.array.dtype).filter(|_| input.array.shape.len() >= 3) else {
        return presence(input, start + rows, width);
    };
    let mut values = vec![0f32; rows * width];
    for (row, line) in values.chunks_mut(width.max(1)).enumerate() {
        let seen = (start + row + 1).min(width);
        line.iter_mut()
            .skip(seen)
            .for_each(|value| *value = f32::NEG_INFINITY);
    }
    let tensor = Tensor::from_vec(values, (rows, width), &Device::Cpu)?.to_dtype(dtype)?;
    super::shaped(&tensor, input.array.shape.len())
}
