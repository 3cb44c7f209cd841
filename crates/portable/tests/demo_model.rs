//! The demo language model with passes on and off: a batch of prefill, then decode steps over the cache it wrote.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_coreml_mil as mil;
use candle_coreml_portable::{Array, Data, Model, Numerics, Options, State};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const CONTEXT: usize = 512;
const BATCH: usize = 64;
const HIDDEN: usize = 256;

fn part(word: &str) -> PathBuf {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tales"));
    let mut files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    files.find(|p| p.to_string_lossy().contains(word)).unwrap()
}

fn open(word: &str, function: Option<&str>, passes: bool, numerics: Numerics) -> Model {
    let file = mil::Model::open(part(word)).unwrap();
    let options = Options {
        passes,
        numerics,
        wide_outputs: true,
        ..Options::default()
    };
    Model::load(Arc::new(file), function, options).unwrap()
}

struct Parts {
    embeddings: Model,
    infer: Model,
    prefill: Model,
    head: Model,
}

impl Parts {
    fn open(passes: bool, numerics: Numerics) -> Parts {
        let infer = open("FFN_PF", Some("infer"), passes, numerics);
        Parts {
            embeddings: open("embeddings", None, passes, numerics),
            prefill: infer.with_function("prefill").unwrap(),
            infer,
            head: open("lm_head", None, passes, numerics),
        }
    }

    /// Runs the layers on `ids` at `start`; the hidden state they give.
    fn layers(&self, ids: &[i32], start: usize, state: &mut State) -> Vec<f32> {
        let n = ids.len();
        let shape = [1, n];
        let hidden = self.embeddings.predict(
            &[(
                "input_ids",
                Array {
                    shape: &shape,
                    data: Data::I32(ids),
                },
            )],
            None,
        );
        let hidden = hidden.unwrap().remove(0).1;
        let row = |p: usize| (0..CONTEXT).map(move |k| if k <= p { 0.0 } else { f32::NEG_INFINITY });
        let mask: Vec<f32> = (start..start + n).flat_map(row).collect();
        let positions: Vec<i32> = (start as i32..(start + n) as i32).collect();
        let at = [start as i32];
        let inputs = [
            ("hidden_states", hidden.as_array().unwrap()),
            (
                "position_ids",
                Array {
                    shape: &[n],
                    data: Data::I32(&positions),
                },
            ),
            (
                "causal_mask",
                Array {
                    shape: &[1, 1, n, CONTEXT],
                    data: Data::F32(&mask),
                },
            ),
            (
                "current_pos",
                Array {
                    shape: &[1],
                    data: Data::I32(&at),
                },
            ),
        ];
        let model = if n == 1 { &self.infer } else { &self.prefill };
        model.predict(&inputs, Some(state)).unwrap().remove(0).1.to_f32()
    }

    fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let shape = [1, 1, HIDDEN];
        let parts = self.head.predict(
            &[(
                "hidden_states",
                Array {
                    shape: &shape,
                    data: Data::F32(hidden),
                },
            )],
            None,
        );
        parts.unwrap().iter().flat_map(|(_, a)| a.to_f32()).collect()
    }
}

#[test]
fn merged_and_plain_operations_give_the_same_logits() {
    let (on, off) = (
        Parts::open(true, Numerics::Default),
        Parts::open(false, Numerics::Default),
    );
    let (mut a, mut b) = (on.infer.make_state(), off.infer.make_state());
    let prompt: Vec<i32> = (0..BATCH as i32).map(|i| (i * 61 + 7) % 4096).collect();
    on.layers(&prompt, 0, &mut a);
    off.layers(&prompt, 0, &mut b);
    for (step, token) in [494, 275, 201, 634].into_iter().enumerate() {
        let x = on.logits(&on.layers(&[token], BATCH + step, &mut a));
        let y = off.logits(&off.layers(&[token], BATCH + step, &mut b));
        let worst = x.iter().zip(&y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        // Logits reach about 20; palettes in 16-bit fixed point and sums in another order stay below this.
        assert!(
            x.len() == 4096 && worst < 0.02,
            "step {step}: logits differ by {worst}"
        );
        assert!(
            x.iter().any(|v| v.abs() > 1.0),
            "step {step}: the logits are all small"
        );
    }
}

#[test]
fn fast_numerics_change_logits_by_what_eight_bits_hold() {
    let exact = Parts::open(true, Numerics::Default);
    let fast = Parts::open(true, Numerics::Fast);
    let (mut a, mut b) = (exact.infer.make_state(), fast.infer.make_state());
    let prompt: Vec<i32> = (0..BATCH as i32).map(|i| (i * 61 + 7) % 4096).collect();
    let x = exact.layers(&prompt, 0, &mut a);
    let y = fast.layers(&prompt, 0, &mut b);
    // Where the processor has no products of bf16, both are the same.
    let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let error = norm(&mut x.iter().zip(&y).map(|(x, y)| x - y)) / norm(&mut x.iter().copied());
    assert!(error < 0.03, "hidden states differ by {error}");
    // One token at a time, both compute the same; what differs is the cache that the batch wrote.
    let x = exact.logits(&exact.layers(&[494], BATCH, &mut a));
    let y = fast.logits(&fast.layers(&[494], BATCH, &mut b));
    let error = norm(&mut x.iter().zip(&y).map(|(x, y)| x - y)) / norm(&mut x.iter().copied());
    assert!(error < 0.03, "logits differ by {error}");
}
