//! A toy model behind the same packages' interfaces, which checks every call and whose answer depends on every token.
//!
//! The embeddings give the token id as hidden state. A chunk writes what it got into its own lane of the shared cache
//! and gives, per row, a digest of all slots the mask shows. The head spreads the digest over the vocabulary. A wrong
//! mask, position, cache slot, order of chunks or order of parts changes the token.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use candle_coreml_mil::{
    self as mil, ArrayDescription, Feature, FeatureType, Flexibility, FunctionDescription,
};

use super::{AnemllModel, ChunkParts, Components, Facts, Vocabulary};
use crate::Error;
use crate::part::{Part, interface};

pub(crate) const WIDTH: usize = 4;
pub(crate) const VOCABULARY: usize = 300;
const MODULUS: i64 = 1021;

/// What a toy model is built like.
#[derive(Debug, Clone)]
pub(crate) struct Toy {
    pub(crate) batch: usize,
    pub(crate) slots: usize,
    pub(crate) chunks: usize,
    pub(crate) head_parts: usize,
    pub(crate) argmax: bool,
    pub(crate) update_mask: bool,
    pub(crate) batched_prefill: bool,
    /// Batches of other sizes.
    pub(crate) further: &'static [usize],
}

impl Default for Toy {
    fn default() -> Self {
        Toy {
            batch: 64,
            slots: 256,
            chunks: 2,
            head_parts: 4,
            argmax: false,
            update_mask: false,
            batched_prefill: true,
            further: &[],
        }
    }
}

/// One call of a chunk's function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) part: String,
    pub(crate) function: String,
    pub(crate) start: usize,
}

pub(crate) type Calls = Arc<Mutex<Vec<Call>>>;

/// The caches of all lanes: what each slot was given, `None` before it is written.
#[derive(Debug, Clone)]
pub(crate) struct Cache(Vec<Vec<Option<i64>>>);

#[derive(Debug, Clone)]
enum Kind {
    Embeddings,
    Chunk(usize),
    Head,
}

#[derive(Debug, Clone)]
pub(crate) struct ToyPart {
    toy: Toy,
    name: String,
    kind: Kind,
    functions: Vec<FunctionDescription>,
    at: usize,
    calls: Calls,
}

impl Toy {
    /// The wired model, and a list that fills with its chunks' calls.
    pub(crate) fn model(&self) -> (AnemllModel<ToyPart>, Calls) {
        let calls = Calls::default();
        let components = self.components(&calls);
        (AnemllModel::new(components).unwrap(), calls)
    }

    pub(crate) fn components(&self, calls: &Calls) -> Components<ToyPart> {
        let part = |name: String, kind, functions| ToyPart {
            toy: self.clone(),
            name,
            kind,
            functions,
            at: 0,
            calls: Arc::clone(calls),
        };
        Components {
            embeddings: Some(part(
                "embeddings".to_owned(),
                Kind::Embeddings,
                vec![self.embeddings()],
            )),
            chunks: (0..self.chunks)
                .map(|i| ChunkParts {
                    infer: part(format!("chunk{i}"), Kind::Chunk(i), self.functions()),
                    prefill: None,
                    rotated: None,
                })
                .collect(),
            head: Some(part("head".to_owned(), Kind::Head, vec![self.head()])),
            facts: Facts {
                context: Some(self.slots),
                vocabulary: Vocabulary {
                    size: Some(VOCABULARY),
                    ..Vocabulary::default()
                },
                one_by_one: (!self.batched_prefill).then(|| "the converter does not vouch for it".to_owned()),
                ..Facts::default()
            },
        }
    }

    fn functions(&self) -> Vec<FunctionDescription> {
        let further = self.further.iter();
        let mut all: Vec<_> = further
            .map(|&rows| self.chunk(&format!("prefill_{rows}"), rows))
            .collect();
        all.extend([self.chunk("prefill", self.batch), self.chunk("infer", 1)]);
        all
    }

    fn embeddings(&self) -> FunctionDescription {
        let mut embeddings = function("main", &[("input_ids", &[1, 1])], &[("hidden_states", &[])]);
        if let FeatureType::MultiArray(array) = &mut embeddings.inputs[0].ty {
            let rows = [1, self.batch].into_iter().chain(self.further.iter().copied());
            array.flexibility = Flexibility::Enumerated(rows.map(|rows| vec![1, rows]).collect());
        }
        embeddings
    }

    fn chunk(&self, name: &str, rows: usize) -> FunctionDescription {
        let hidden = [1, rows, WIDTH];
        let mut chunk = function(
            name,
            &[
                ("hidden_states", &hidden),
                ("position_ids", &[rows]),
                ("causal_mask", &[1, 1, rows, self.slots]),
                ("current_pos", &[1]),
            ],
            &[("output_hidden_states", &hidden)],
        );
        if self.update_mask {
            chunk
                .inputs
                .push(feature("update_mask", &[1, 1, self.slots, rows]));
        }
        chunk
            .states
            .push(feature("kv_cache_0", &[self.chunks, 1, self.slots, WIDTH]));
        chunk
    }

    fn head(&self) -> FunctionDescription {
        if self.argmax {
            let parts: &[usize] = &[self.head_parts];
            return function(
                "main",
                &[("hidden_states", &[1, 1, WIDTH])],
                &[("argmax_idx", parts), ("argmax_val", parts)],
            );
        }
        let size = [1, 1, VOCABULARY / self.head_parts];
        let names: Vec<String> = (1..=self.head_parts)
            .rev()
            .map(|n| format!("logits{n}"))
            .collect();
        let outputs: Vec<(&str, &[usize])> = names.iter().map(|n| (n.as_str(), &size[..])).collect();
        function("main", &[("hidden_states", &[1, 1, WIDTH])], &outputs)
    }
}

impl ToyPart {
    fn embed(&self, inputs: &[(&str, &Tensor)]) -> Tensor {
        let ids = integers(input(inputs, "input_ids"));
        let rows: Vec<f32> = ids.iter().flat_map(|&id| [id as f32; WIDTH]).collect();
        Tensor::from_vec(rows, (1, ids.len(), WIDTH), &Device::Cpu).unwrap()
    }

    fn layers(&self, lane: usize, inputs: &[(&str, &Tensor)], cache: &mut Cache) -> Tensor {
        let hidden = integers(&input(inputs, "hidden_states").narrow(2, 0, 1).unwrap());
        let rows = hidden.len();
        let start = usize::try_from(integers(input(inputs, "current_pos"))[0]).unwrap();
        let positions: Vec<i64> = (start..start + rows).map(|p| p as i64).collect();
        assert_eq!(
            integers(input(inputs, "position_ids")),
            positions,
            "positions of {}",
            self.name
        );
        assert!(
            start + rows <= self.toy.slots,
            "{start} + {rows} passes the {} slots",
            self.toy.slots
        );
        let mask = input(inputs, "causal_mask")
            .reshape((rows, self.toy.slots))
            .unwrap();
        let mask = mask.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        if self.toy.update_mask {
            let update = input(inputs, "update_mask")
                .reshape((self.toy.slots, rows))
                .unwrap();
            let update = update.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            for (slot, columns) in update.iter().enumerate() {
                for (row, &value) in columns.iter().enumerate() {
                    assert_eq!(value, f32::from(u8::from(slot == start + row)), "update mask");
                }
            }
        }
        let call = Call {
            part: self.name.clone(),
            function: self.functions[self.at].name.clone(),
            start,
        };
        self.calls.lock().unwrap().push(call);
        let slots = &mut cache.0[lane];
        for (row, &value) in hidden.iter().enumerate() {
            slots[start + row] = Some(value);
        }
        let digests: Vec<f32> = mask
            .iter()
            .map(|row| {
                let seen = row
                    .iter()
                    .zip(slots.iter())
                    .enumerate()
                    .filter(|(_, (m, _))| **m == 0.0);
                let digest = seen.fold(lane as i64, |sum, (slot, (_, value))| {
                    let value = value.expect("the mask shows slots that were written only");
                    (sum + (value + 1) * (slot as i64 + 3)) % MODULUS
                });
                digest as f32
            })
            .flat_map(|digest| [digest; WIDTH])
            .collect();
        Tensor::from_vec(digests, (1, rows, WIDTH), &Device::Cpu).unwrap()
    }

    fn logits(&self, inputs: &[(&str, &Tensor)]) -> Vec<(String, Tensor)> {
        let digest = integers(&input(inputs, "hidden_states").narrow(2, 0, 1).unwrap())[0];
        let logit = |token: usize| ((token as i64 * 37 + digest) % MODULUS) as f32 / 64.0;
        let size = VOCABULARY / self.toy.head_parts;
        let parts: Vec<Vec<f32>> = (0..self.toy.head_parts)
            .map(|p| (p * size..(p + 1) * size).map(logit).collect())
            .collect();
        if !self.toy.argmax {
            let tensor = |part: &Vec<f32>| Tensor::from_slice(part, (1, 1, size), &Device::Cpu).unwrap();
            return parts
                .iter()
                .enumerate()
                .map(|(i, part)| (format!("logits{}", i + 1), tensor(part)))
                .collect();
        }
        let best: Vec<usize> = parts
            .iter()
            .map(|p| (0..size).fold(0, |b, i| if p[i] > p[b] { i } else { b }))
            .collect();
        let values: Vec<f32> = parts.iter().zip(&best).map(|(part, &i)| part[i]).collect();
        let indices: Vec<i32> = best.iter().map(|&i| i as i32).collect();
        let count = self.toy.head_parts;
        vec![
            (
                "argmax_idx".to_owned(),
                Tensor::from_vec(indices, count, &Device::Cpu).unwrap(),
            ),
            (
                "argmax_val".to_owned(),
                Tensor::from_vec(values, count, &Device::Cpu).unwrap(),
            ),
        ]
    }
}

impl Part for ToyPart {
    type State = Cache;

    fn name(&self) -> &str {
        &self.name
    }

    fn functions(&self) -> Vec<String> {
        self.functions.iter().map(|f| f.name.clone()).collect()
    }

    fn written(&self, _key: &str) -> Option<String> {
        None
    }

    fn with_function(&self, function: &str) -> Result<Self, Error> {
        let at = self.functions.iter().position(|f| f.name == function).unwrap();
        Ok(ToyPart { at, ..self.clone() })
    }

    fn opens_functions_fast(&self) -> bool {
        true
    }

    fn interface(&self) -> &FunctionDescription {
        &self.functions[self.at]
    }

    fn make_state(&self) -> Result<Cache, Error> {
        Ok(Cache(vec![vec![None; self.toy.slots]; self.toy.chunks]))
    }

    fn fork_state(&self, state: &Cache) -> Result<Cache, Error> {
        Ok(state.clone())
    }

    fn snapshot_state(&self, state: &Cache) -> Result<Vec<(String, Tensor)>, Error> {
        // Slots that were never written are -1.
        let slots = state.0.iter().flatten().map(|v| v.unwrap_or(-1));
        let shape = (self.toy.chunks, self.toy.slots);
        Ok(vec![(
            "cache".to_string(),
            Tensor::from_iter(slots, &Device::Cpu)?.reshape(shape)?,
        )])
    }

    fn restore_state(&self, state: &mut Cache, buffers: &[(String, Tensor)]) -> Result<(), Error> {
        let rows = buffers[0].1.to_vec2::<i64>()?;
        let known = |v: i64| Some(v).filter(|&v| v >= 0);
        state.0 = rows
            .into_iter()
            .map(|row| row.into_iter().map(known).collect())
            .collect();
        Ok(())
    }

    fn predict(
        &self,
        inputs: &[(&str, &Tensor)],
        state: Option<&mut Cache>,
    ) -> Result<Vec<(String, Tensor)>, Error> {
        let declared: Vec<&str> = self.interface().inputs.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(inputs.iter().map(|(name, _)| *name).collect::<Vec<_>>(), declared);
        for ((name, tensor), feature) in inputs.iter().zip(&self.interface().inputs) {
            let array = interface::array(feature).unwrap();
            assert!(
                interface::takes(array, tensor.dims()),
                "`{name}` of {} is {:?}",
                self.name,
                tensor.dims()
            );
        }
        Ok(match self.kind {
            Kind::Embeddings => vec![("hidden_states".to_owned(), self.embed(inputs))],
            Kind::Chunk(lane) => {
                vec![(
                    "output_hidden_states".to_owned(),
                    self.layers(lane, inputs, state.expect("a state")),
                )]
            }
            Kind::Head => self.logits(inputs),
        })
    }
}

fn input<'a>(inputs: &[(&str, &'a Tensor)], name: &str) -> &'a Tensor {
    inputs.iter().find(|(n, _)| *n == name).unwrap().1
}

fn integers(tensor: &Tensor) -> Vec<i64> {
    tensor
        .flatten_all()
        .unwrap()
        .to_dtype(DType::I64)
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// An f16 feature of a fixed shape.
pub(crate) fn feature(name: &str, shape: &[usize]) -> Feature {
    let array = ArrayDescription {
        dtype: mil::DType::Fp16,
        shape: shape.to_vec(),
        flexibility: Flexibility::Fixed,
        default_value: None,
    };
    Feature {
        name: name.to_owned(),
        description: String::new(),
        ty: FeatureType::MultiArray(array),
        optional: false,
    }
}

/// A function of f16 features.
pub(crate) fn function(
    name: &str,
    inputs: &[(&str, &[usize])],
    outputs: &[(&str, &[usize])],
) -> FunctionDescription {
    let features =
        |list: &[(&str, &[usize])]| list.iter().map(|(name, shape)| feature(name, shape)).collect();
    FunctionDescription {
        name: name.to_owned(),
        inputs: features(inputs),
        outputs: features(outputs),
        states: vec![],
    }
}
