//! The wiring as a report.

use candle_coreml_mil::Feature;

use super::AnemllModel;
use super::chunks::{Call, Mode};
use super::wired::{Embeddings, Wired};
use crate::part::Part;
use crate::part::head::Head;
use crate::part::interface::Role;
use crate::wiring::{WiredCall, WiredPort, WiredState, Wiring};

const MODES: [(Mode, &str); 4] = [
    (Mode::Batch, "prefill"),
    (Mode::One, "decode"),
    (Mode::RotateBatch, "prefill past the window"),
    (Mode::RotateOne, "decode past the window"),
];

impl<P: Part> AnemllModel<P> {
    /// How the packages are wired.
    pub(crate) fn wiring(&self, layout: &str) -> Wiring {
        self.wired.report(layout)
    }
}

impl<P: Part> Wired<P> {
    fn report(&self, layout: &str) -> Wiring {
        let mut calls = Vec::new();
        calls.extend(
            self.embeddings
                .as_ref()
                .map(|embeddings| self.embedding_call(embeddings)),
        );
        for (mode, when) in MODES {
            let used = match mode {
                Mode::One => true,
                Mode::Batch => self.batch.is_some(),
                // Not open before it is called; the rows say it all.
                Mode::Further(_) => false,
                Mode::RotateOne => self.rotation.is_some(),
                Mode::RotateBatch => self.rotation.as_ref().is_some_and(|r| r.rows.is_some()),
            };
            if used {
                calls.extend(self.chunk_calls(mode, when));
            }
        }
        calls.extend(self.head.as_ref().map(|(head, place)| {
            let inputs = ports(&head.interface().inputs, |input| {
                let hidden = input.name == place.name();
                if hidden {
                    format!("hidden states of {}", self.last_part().name())
                } else {
                    "not fed".to_owned()
                }
            });
            WiredCall {
                when: "decode".to_owned(),
                file: head.name().to_owned(),
                function: head.interface().name.clone(),
                inputs,
                outputs: ports(&head.interface().outputs, |o| self.head_flow(o)),
                state: None,
            }
        }));
        let count = self.chunks.iter().map(|chunk| chunk.state + 1).max().unwrap_or(0);
        let states = (0..count).map(|index| {
            let owner = self.owner(index);
            WiredState::new(owner.name(), owner.interface())
        });
        Wiring {
            layout: layout.to_owned(),
            context_tokens: self.context,
            context_bound_by: self.bound.to_owned(),
            vocabulary: self.vocabulary,
            gives_logits: self.head_kind.gives_logits(),
            batch_tokens: Some(self.batch.unwrap_or(1)),
            further_batches: self.further.clone(),
            no_batches_because: self.one_by_one.clone(),
            sliding_window: self.rotation.as_ref().map(|rotation| rotation.window),
            calls,
            states: states.filter(|state| !state.buffers.is_empty()).collect(),
        }
    }

    fn embedding_call(&self, embeddings: &Embeddings<P>) -> WiredCall {
        let function = embeddings.part.interface();
        let next = self.chunks.first().map_or("", |chunk| chunk.infer.part.name());
        WiredCall {
            when: "every call".to_owned(),
            file: embeddings.part.name().to_owned(),
            function: function.name.clone(),
            inputs: ports(&function.inputs, |_| Role::Ids.source().to_owned()),
            outputs: ports(&function.outputs, |_| format!("hidden states for {next}")),
            state: None,
        }
    }

    fn chunk_calls(&self, mode: Mode, when: &str) -> Vec<WiredCall> {
        let mut calls = Vec::new();
        let mut before = self.embeddings.as_ref().map(|embeddings| embeddings.part.name());
        for (index, chunk) in self.chunks.iter().enumerate() {
            let Some(Call { part, step }) = chunk.at(mode) else {
                continue;
            };
            let source = |input: &Feature| {
                let role = step.inputs.iter().find(|(place, _)| place.name() == input.name);
                match (role.map(|(_, role)| *role), before) {
                    (Some(Role::Hidden), Some(before)) => format!("hidden states of {before}"),
                    (Some(role), _) => role.source().to_owned(),
                    (None, _) => "optional, not fed".to_owned(),
                }
            };
            let next = self.chunks.get(index + 1).map(|chunk| chunk.infer.part.name());
            let one = matches!(mode, Mode::One | Mode::RotateOne);
            let next = next.or(self.head.as_ref().map(|(head, _)| head.name()).filter(|_| one));
            let flow = |output: &Feature| match (next, &step.output) {
                (Some(next), Some(name)) if &output.name == name => format!("hidden states for {next}"),
                (_, None) if one => self.head_flow(output),
                _ => "not used".to_owned(),
            };
            calls.push(WiredCall {
                when: when.to_owned(),
                file: part.name().to_owned(),
                function: part.interface().name.clone(),
                inputs: ports(&part.interface().inputs, source),
                outputs: ports(&part.interface().outputs, flow),
                state: (!part.interface().states.is_empty()).then_some(chunk.state),
            });
            before = Some(part.name());
        }
        calls
    }

    fn head_flow(&self, output: &Feature) -> String {
        self.head_kind.flow(&output.name)
    }
}

impl Head {
    /// What an output of a head is taken for.
    pub(crate) fn flow(&self, output: &str) -> String {
        match self {
            Head::Logits(names) => match names.iter().position(|name| name == output) {
                Some(_) if names.len() == 1 => "logits".to_owned(),
                Some(index) => format!("logits, part {} of {}", index + 1, names.len()),
                None => "not used".to_owned(),
            },
            Head::Argmax { idx, .. } if idx == output => "best token of each part".to_owned(),
            Head::Argmax { val, .. } if val == output => "its logit".to_owned(),
            Head::Argmax { .. } => "not used".to_owned(),
        }
    }
}

pub(crate) fn ports(features: &[Feature], flow: impl Fn(&Feature) -> String) -> Vec<WiredPort> {
    features
        .iter()
        .map(|feature| WiredPort::new(feature, flow(feature)))
        .collect()
}
