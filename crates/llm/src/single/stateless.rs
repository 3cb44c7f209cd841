//! One package without states: every step computes the whole window, as the first converters for Swift did.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{
    Input, PackageFacts, Sizes, find, least, named, positions, presence, read_head, read_tokens, wrong,
};
use crate::Error;
use crate::anemll::ports;
use crate::model::{LanguageModel, Prediction};
use crate::part::head::Head;
use crate::part::interface::Role;
use crate::part::{Part, to_id};
use crate::wiring::{WiredCall, Wiring};

/// Token that fills a window up; it comes after all that is looked at.
const PADDING_TOKEN: i32 = 0;

/// Windows that cannot be smaller than this are taken for a mistake in a package.
const MOST_TOKENS: usize = 1 << 20;

/// What conversations share.
struct Shared<P> {
    part: P,
    inputs: Vec<Input>,
    tokens: Sizes,
    head: Head,
    context: usize,
    /// What bounds the context.
    bound: &'static str,
    vocabulary: usize,
}

/// The model; it keeps nothing of a conversation.
pub(crate) struct Stateless<P> {
    shared: Arc<Shared<P>>,
    logits: Vec<f32>,
}

impl<P: Part> Stateless<P> {
    /// Wires the package.
    ///
    /// # Errors
    /// [`Error::Wiring`] with what does not fit.
    pub(crate) fn new(part: P, facts: &PackageFacts) -> Result<Self, Error> {
        Ok(Stateless {
            shared: Arc::new(Shared::new(part, facts)?),
            logits: Vec::new(),
        })
    }

    /// How the package is wired.
    pub(crate) fn wiring(&self, layout: &str) -> Wiring {
        let shared = &self.shared;
        let function = shared.part.interface();
        let source = |name: &str| shared.inputs.iter().find(|input| input.name == name);
        Wiring {
            layout: layout.to_owned(),
            context_tokens: shared.context,
            context_bound_by: shared.bound.to_owned(),
            vocabulary: shared.vocabulary,
            gives_logits: shared.head.gives_logits(),
            batch_tokens: None,
            further_batches: Vec::new(),
            no_batches_because: Some(
                "the package keeps nothing: every step computes the whole window".to_owned(),
            ),
            sliding_window: None,
            calls: vec![WiredCall {
                when: "decode".to_owned(),
                file: shared.part.name().to_owned(),
                function: function.name.clone(),
                inputs: ports(&function.inputs, |input| {
                    match source(&input.name).map(|i| i.role) {
                        Some(Role::Ids) => "token ids of the window".to_owned(),
                        Some(Role::Mask) => "1 for tokens, 0 for padding".to_owned(),
                        Some(role) => role.source().to_owned(),
                        None => "optional, not fed".to_owned(),
                    }
                }),
                outputs: ports(&function.outputs, |output| shared.head.flow(&output.name)),
                state: None,
            }],
            states: Vec::new(),
        }
    }
}

impl<P: Part> LanguageModel for Stateless<P> {
    fn context_tokens(&self) -> usize {
        self.shared.context
    }

    fn vocabulary(&self) -> usize {
        self.shared.vocabulary
    }

    fn gives_logits(&self) -> bool {
        self.shared.head.gives_logits()
    }

    fn prefill(&mut self, tokens: &[u32], _cached: usize) -> Result<usize, Error> {
        Ok(tokens.len())
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, Error> {
        let shared = &self.shared;
        let last = tokens.len().checked_sub(1).ok_or(Error::EmptyPrompt)?;
        let window = shared.tokens.at_least(tokens.len()).ok_or(Error::PromptTooLong {
            tokens: tokens.len(),
            context: shared.context,
        })?;
        let mut ids = Vec::with_capacity(window);
        for &token in tokens {
            ids.push(to_id(token)?);
        }
        ids.resize(window, PADDING_TOKEN);
        let ids = Tensor::from_vec(ids, (1, window), &Device::Cpu)?;
        let feed = |input: &Input| match input.role {
            Role::Positions => positions(input, 0, window),
            Role::Mask => presence(input, tokens.len(), window),
            _ => Ok(ids.clone()),
        };
        let feeds = shared.inputs.iter().map(feed).collect::<Result<Vec<_>, _>>()?;
        let inputs = named(&shared.inputs, &feeds);
        let outputs = shared.part.predict(&inputs, None)?;
        let outputs = outputs
            .into_iter()
            .map(|(name, tensor)| Ok((name, shared.row(&tensor, last, window)?)))
            .collect::<Result<Vec<_>, Error>>()?;
        shared
            .head
            .predict(shared.part.name(), &outputs, shared.vocabulary, &mut self.logits)
    }

    fn fork(&self) -> Result<Box<dyn LanguageModel>, Error> {
        Ok(Box::new(Stateless {
            shared: Arc::clone(&self.shared),
            logits: Vec::new(),
        }))
    }

    fn snapshot(&self) -> Result<Vec<(String, Tensor)>, Error> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _buffers: &[(String, Tensor)]) -> Result<(), Error> {
        Ok(())
    }
}

impl<P: Part> Shared<P> {
    fn new(part: P, facts: &PackageFacts) -> Result<Self, Error> {
        let function = part.interface().clone();
        let wrong = |what| wrong(part.name(), &function, what);
        let (inputs, tokens) = read_tokens(part.name(), &function)?;
        if let Some(least) = tokens.at_least(1).filter(|&least| least > MOST_TOKENS) {
            return Err(wrong(format!(
                "it takes {least} tokens and not fewer, allowed: {MOST_TOKENS}"
            )));
        }
        let odd = |input: &&Input| !matches!(input.role, Role::Ids | Role::Mask | Role::Positions);
        if let Some(odd) = inputs.iter().find(odd) {
            let name = &odd.name;
            return Err(wrong(format!(
                "`{name}` belongs to a cache, and the package has no states"
            )));
        }
        if let Some(mask) = find(&inputs, Role::Mask).filter(|mask| mask.array.shape.len() > 2) {
            let (name, shape) = (&mask.name, &mask.array.shape);
            return Err(wrong(format!(
                "`{name}` is {shape:?}, needed without states: [1, tokens]"
            )));
        }
        let limits = [
            (facts.context, "the bundle's description"),
            (tokens.most(), "the token ids"),
        ];
        let nothing = || wrong("nothing says how many tokens it takes".to_owned());
        let (context, bound) = least(limits, facts).ok_or_else(nothing)?;
        let (head, vocabulary) = read_head(part.name(), &function, facts)?;
        Ok(Shared {
            part,
            inputs,
            tokens,
            head,
            context,
            bound,
            vocabulary,
        })
    }

    /// Of logits of all positions those of `position`; an output without positions as it is, where nothing is padded.
    fn row(&self, tensor: &Tensor, position: usize, window: usize) -> Result<Tensor, Error> {
        let rows = tensor
            .rank()
            .checked_sub(2)
            .map(|axis| (axis, tensor.dims()[axis]));
        match rows {
            Some((axis, rows)) if rows == window => Ok(tensor.narrow(axis, position, 1)?),
            _ if position + 1 == window => Ok(tensor.clone()),
            _ => Err(wrong(
                self.part.name(),
                self.part.interface(),
                format!(
                    "an output is {:?}, needed: logits of all {window} positions, the last tokens being padding",
                    tensor.dims()
                ),
            )),
        }
    }
}
