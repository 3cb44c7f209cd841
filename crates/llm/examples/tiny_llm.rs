//! A Core ML language model on two screens: every step from the files to the text, with nothing hidden in the engine.
//!
//! `cargo run --release --example tiny_llm -p candle-coreml-llm -- [BUNDLE] [PROMPT]`
//!
//! An ANEMLL bundle is three packages. *Embeddings* turn token ids into hidden states. The *FFN* package holds the layers and
//! their KV-cache, a state that lives between calls; its function `prefill` takes 64 positions at once, `infer` takes one. The
//! *head* turns the last hidden state into logits, here in several parts. `candle_coreml_llm::Session` does the same for every
//! layout, with sampling, stop tokens and streaming; this is the loop inside it.

use candle_core::{DType, Device, Tensor};
use candle_coreml::{CoreMLModel, CoreMLState, Outputs};
use std::io::Write;
use std::path::Path;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Positions a prefill takes at once, and positions the KV-cache has: what these packages were converted with.
const BATCH: usize = 64;
const CONTEXT: usize = 512;

struct TinyLlm {
    embeddings: CoreMLModel,
    prefill: CoreMLModel,
    infer: CoreMLModel,
    head: CoreMLModel,
    state: CoreMLState,
    mask: Tensor,
}

impl TinyLlm {
    fn open(folder: &Path) -> Result<Self> {
        let part = |word: &str| -> Result<CoreMLModel> {
            let files = std::fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path()));
            let named = |path: &std::path::PathBuf| path.to_string_lossy().contains(word);
            let path = files.filter(|p| p.extension().is_some()).find(named);
            Ok(CoreMLModel::load(path.ok_or_else(|| {
                format!("no {word} package in {}", folder.display())
            })?)?)
        };
        let infer = part("FFN_PF")?.with_function("infer")?;
        // Row p lets position p see positions 0 to p: 0 there, minus infinity behind. Made once, sliced ever after.
        let row = |p: usize| (0..CONTEXT).map(move |k| if k <= p { 0.0 } else { f32::NEG_INFINITY });
        let mask: Vec<f32> = (0..CONTEXT).flat_map(row).collect();
        Ok(TinyLlm {
            embeddings: part("embeddings")?,
            prefill: infer.with_function("prefill")?,
            state: infer.make_state()?,
            infer,
            head: part("lm_head")?,
            mask: Tensor::from_vec(mask, (1, 1, CONTEXT, CONTEXT), &Device::Cpu)?.to_dtype(DType::F16)?,
        })
    }

    /// Runs `ids` at positions `start..`, which fills the KV-cache there; `function` takes as many ids as there are.
    fn layers(&mut self, ids: &[u32], start: usize) -> Result<Outputs> {
        let n = ids.len();
        let ids = Tensor::new(ids, &Device::Cpu)?.reshape((1, n))?;
        let hidden = self.embeddings.predict(&[("input_ids", &ids)])?;
        let positions = Tensor::arange(start as u32, (start + n) as u32, &Device::Cpu)?;
        let at = Tensor::new(&[start as u32], &Device::Cpu)?;
        let mask = self.mask.narrow(2, start, n)?;
        let inputs = [
            ("hidden_states", &hidden.tensor("hidden_states")?),
            ("position_ids", &positions),
            ("causal_mask", &mask),
            ("current_pos", &at),
        ];
        let function = if n == 1 { &self.infer } else { &self.prefill };
        Ok(function.predict_with_state(&inputs, &mut self.state)?)
    }

    /// Fills the KV-cache with a prompt, 64 positions at a time; the last batch is padded with token 0, whose entries the mask
    /// hides and later tokens overwrite.
    fn read(&mut self, prompt: &[u32]) -> Result<()> {
        for (i, batch) in prompt.chunks(BATCH).enumerate() {
            let mut ids = batch.to_vec();
            ids.resize(BATCH, 0);
            self.layers(&ids, i * BATCH)?;
        }
        Ok(())
    }

    /// The most likely token after `token` at position `at`.
    fn next(&mut self, token: u32, at: usize) -> Result<u32> {
        let hidden = self.layers(&[token], at)?;
        let logits = self
            .head
            .predict(&[("hidden_states", &hidden.tensor("output_hidden_states")?)])?;
        // logits1, logits2, ... are parts of the vocabulary: joined by number, not by the order of the file.
        let parts = (1..=logits.len()).map(|i| logits.tensor(&format!("logits{i}")));
        let parts = parts.collect::<std::result::Result<Vec<_>, _>>()?;
        let best = Tensor::cat(&parts, 2)?
            .to_dtype(DType::F32)?
            .flatten_all()?
            .argmax(0)?;
        Ok(best.to_scalar()?)
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tales");
    let folder = arguments.next().unwrap_or_else(|| demo.into());
    let prompt = arguments
        .next()
        .unwrap_or_else(|| "Tell me a story about a brave mouse.".into());
    let text = format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n");

    let tokenizer = tokenizers::Tokenizer::from_file(Path::new(&folder).join("tokenizer.json"))?;
    let mut model = TinyLlm::open(Path::new(&folder))?;
    let mut tokens = tokenizer.encode(text, false)?.get_ids().to_vec();
    let end = tokenizer.token_to_id("<|im_end|>");
    model.read(&tokens)?;
    // A token may be a part of a character: the stream gives text when it is whole.
    let mut stream = tokenizer.decode_stream(true);
    while tokens.len() < CONTEXT {
        // The last token of the prompt runs once more, to get its hidden state: prefill gives none.
        let last = tokens.len() - 1;
        let token = model.next(tokens[last], last)?;
        if Some(token) == end {
            break;
        }
        tokens.push(token);
        if let Some(text) = stream.step(token)? {
            print!("{text}");
            std::io::stdout().flush()?;
        }
    }
    println!();
    Ok(())
}
