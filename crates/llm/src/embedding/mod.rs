//! Text encoders: from texts to one vector each.

mod outputs;
mod package;
mod pooling;
mod settings;
mod sizes;
mod words;

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use candle_coreml::CoreMLModel;

use crate::bundle::{Files, LoadOptions};
use crate::{Error, Tokenizer};
use outputs::Output;
pub use pooling::{Pooling, cosine_similarity};
use settings::Settings;
use sizes::Sizes;

/// A text encoder: tokenizer, Core ML package, pooling.
///
/// It opens a folder with one package and `tokenizer.json` (or BERT's `vocab.txt`), as `candle-coreml convert` writes it
/// and as sentence-transformers keeps it, with the files of the latter where they exist: `modules.json`,
/// `1_Pooling/config.json`, `sentence_bert_config.json`, `config_sentence_transformers.json`.
///
/// The package takes token ids and, where it declares them, attention mask, token types and positions, each `[texts,
/// tokens]` or `[tokens]`; sizes may be fixed, enumerated or ranges. It gives the vectors of all tokens, `[texts, tokens,
/// width]` (`last_hidden_state`), which are pooled here, or those of the texts, `[texts, width]` (`sentence_embedding`).
///
/// ```no_run
/// use candle_coreml_llm::{EmbeddingModel, cosine_similarity};
///
/// let model = EmbeddingModel::open("minilm", &Default::default())?;
/// let found = model.embed(&["A cat sits.", "A kitten is sitting."])?;
/// println!("{}", cosine_similarity(&found[0].vector, &found[1].vector));
/// # Ok::<(), candle_coreml_llm::Error>(())
/// ```
pub struct EmbeddingModel {
    name: String,
    model: CoreMLModel,
    tokenizer: Arc<Tokenizer>,
    settings: Settings,
    inputs: Vec<(String, Role)>,
    sizes: Sizes,
    output: Output,
    max_tokens: usize,
}

/// How an encoder is opened, and what is done differently from what its files say.
#[derive(Debug, Clone, Default)]
pub struct EmbeddingOptions {
    /// The engine and how it computes.
    pub load: LoadOptions,
    /// How the vectors of tokens become one. Without it: the package's own text vector where it gives one, otherwise
    /// what `1_Pooling/config.json` says, otherwise the mean.
    pub pooling: Option<Pooling>,
    /// Whether vectors are scaled to length 1. Without it: as `modules.json` says, and yes where there is none.
    pub normalize: Option<bool>,
    /// Tokens of a text that are read, special tokens included; at most what the model takes.
    pub max_tokens: Option<usize>,
    /// The package's output to use; without it one is found by its name.
    pub output: Option<String>,
}

/// The vector of one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// As many numbers as the model is wide.
    pub vector: Vec<f32>,
    /// Tokens that were read, special tokens included.
    pub tokens: usize,
    /// Tokens at the end of the text that did not fit the model and were left out.
    pub tokens_cut: usize,
}

impl Embedding {
    /// Keeps the first `width` numbers and scales them to length 1, for models trained so that a beginning is enough
    /// (Matryoshka representations). A width of 0 or beyond the vector's changes nothing.
    pub fn shorten(&mut self, width: usize) {
        if (1..self.vector.len()).contains(&width) {
            self.vector.truncate(width);
            pooling::normalize(&mut self.vector);
        }
    }
}

/// What an input of the package is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Ids,
    Mask,
    Types,
    Positions,
}

/// One text as the package takes it.
struct Encoded {
    ids: Vec<u32>,
    types: Vec<u32>,
    cut: usize,
}

impl EmbeddingModel {
    /// Opens a folder, or a package with the tokenizer beside it.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::MissingPart`], [`Error::IncompletePart`] and [`Error::Malformed`] for files,
    /// [`Error::Wiring`] for a package whose inputs and outputs are not those of an encoder, [`Error::Unsupported`] for
    /// pooling and layers this version does not have, [`Error::Option`] for options that do not fit the model,
    /// [`Error::Engine`] when the package cannot be run.
    pub fn open(path: impl AsRef<Path>, options: &EmbeddingOptions) -> Result<Self, Error> {
        let (files, package) = package::locate(path.as_ref())?;
        Self::build(&files, package, options)
    }

    /// Opens files from wherever they are.
    ///
    /// # Errors
    /// As [`EmbeddingModel::open`].
    pub fn from_files(files: &Files, options: &EmbeddingOptions) -> Result<Self, Error> {
        Self::build(files, None, options)
    }

    /// True for a folder, or a package, that holds a text encoder: its package takes token ids and gives no logits.
    /// Reads the description of the package only.
    pub fn recognizes(path: impl AsRef<Path>) -> bool {
        package::recognize(path.as_ref()).unwrap_or(false)
    }

    fn build(files: &Files, package: Option<String>, options: &EmbeddingOptions) -> Result<Self, Error> {
        let settings = Settings::read(files)?;
        let tokenizer = words::read(files)?;
        let package = match package {
            Some(package) => package,
            None => package::only_one(files)?,
        };
        let model = package::load(files, &package, &options.load)?;
        let place = package::Place::new(&package, &model);
        let (inputs, sizes) = place.inputs()?;
        let output = Output::choose(&place, options, &settings)?;
        let positions = settings.longest(sizes.most_tokens());
        let least = tokenizer.added_tokens() + 1;
        let max_tokens = match options.max_tokens {
            None => positions,
            Some(n) if (least..=positions).contains(&n) => n,
            Some(n) => {
                return Err(Error::Option {
                    option: "max_tokens",
                    value: format!("{n}; this model takes {least} to {positions}"),
                    allowed: "what the model takes",
                });
            }
        };
        tracing::info!(package, max_tokens, "opened a text encoder");
        Ok(EmbeddingModel {
            name: settings.name(files),
            model,
            tokenizer: Arc::new(tokenizer),
            settings: settings.with(options),
            inputs,
            sizes,
            output,
            max_tokens,
        })
    }

    /// The model's name: that of its folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens of a text that are read, special tokens included.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The pooling done here; `None` where the package gives the vector of the text itself.
    pub fn pooling(&self) -> Option<Pooling> {
        self.output.pooling()
    }

    /// True when vectors are scaled to length 1.
    pub fn normalizes(&self) -> bool {
        self.settings.normalize()
    }

    /// What `config_sentence_transformers.json` wants before texts of a kind (`query`, `passage`), with the kinds.
    pub fn prompts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.settings.prompts()
    }

    /// Text to ids and back.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The vectors of texts, in their order. A text of more than [`max_tokens`](Self::max_tokens) is read up to there:
    /// its last tokens are left out, the special tokens around it stay. Texts of similar length are computed together
    /// where the package takes several.
    ///
    /// # Errors
    /// [`Error::EmptyText`] for a text without tokens, [`Error::Tokenizer`], [`Error::Engine`].
    pub fn embed(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Embedding>, Error> {
        self.embed_as(self.settings.default_prompt(), texts)
    }

    /// As [`embed`](Self::embed), with the model's prompt `kind` before every text.
    ///
    /// # Errors
    /// [`Error::Option`] when the model has no such prompt; those of [`embed`](Self::embed).
    pub fn embed_with_prompt(&self, kind: &str, texts: &[impl AsRef<str>]) -> Result<Vec<Embedding>, Error> {
        self.embed_as(self.settings.prompt(kind)?, texts)
    }

    fn embed_as(&self, prompt: &str, texts: &[impl AsRef<str>]) -> Result<Vec<Embedding>, Error> {
        self.settings.check_prompt(prompt, self.pooling())?;
        let encoded = texts.iter().map(|text| self.encode(prompt, text.as_ref()));
        self.run(encoded.collect::<Result<_, _>>()?)
    }

    /// The vectors of texts that are token ids already, special tokens included.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] and [`Error::TokenOutside`] for ids the model does not take; those of
    /// [`embed`](Self::embed).
    pub fn embed_ids(&self, texts: &[impl AsRef<[u32]>]) -> Result<Vec<Embedding>, Error> {
        let vocabulary = self.tokenizer.vocabulary();
        let checked = texts.iter().map(|ids| {
            let ids = ids.as_ref();
            if ids.len() > self.max_tokens {
                return Err(Error::PromptTooLong {
                    tokens: ids.len(),
                    context: self.max_tokens,
                });
            }
            let outside = ids.iter().position(|&id| id as usize >= vocabulary);
            if let Some((index, &token)) = outside.and_then(|i| Some((i, ids.get(i)?))) {
                return Err(Error::TokenOutside {
                    index,
                    token,
                    vocabulary,
                });
            }
            Ok(Encoded {
                ids: ids.to_vec(),
                types: vec![0; ids.len()],
                cut: 0,
            })
        });
        self.run(checked.collect::<Result<_, _>>()?)
    }

    fn encode(&self, prompt: &str, text: &str) -> Result<Encoded, Error> {
        let text = self.settings.cased(text);
        let whole = match prompt {
            "" => text,
            prompt => format!("{prompt}{text}").into(),
        };
        let (ids, types, cut) = self.tokenizer.encode_whole(&whole, self.max_tokens)?;
        Ok(Encoded { ids, types, cut })
    }

    /// Computes the longest texts first: a batch is as long as its first.
    fn run(&self, texts: Vec<Encoded>) -> Result<Vec<Embedding>, Error> {
        if let Some(index) = texts.iter().position(|text| text.ids.is_empty()) {
            return Err(Error::EmptyText { index });
        }
        let mut order: Vec<(usize, &Encoded)> = texts.iter().enumerate().collect();
        order.sort_by_key(|(_, text)| std::cmp::Reverse(text.ids.len()));
        let mut found = vec![None; texts.len()];
        let mut rest = order.as_slice();
        while let Some((_, longest)) = rest.first() {
            let (rows, tokens) = self.sizes.choose(rest.len(), longest.ids.len());
            let (batch, after) = rest.split_at(rows.min(rest.len()));
            let encoded: Vec<&Encoded> = batch.iter().map(|(_, text)| *text).collect();
            let vectors = self.predict(&encoded, rows, tokens)?;
            for ((index, text), vector) in batch.iter().zip(vectors) {
                if let Some(slot) = found.get_mut(*index) {
                    *slot = Some(Embedding {
                        vector,
                        tokens: text.ids.len(),
                        tokens_cut: text.cut,
                    });
                }
            }
            rest = after;
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// One prediction of `rows` texts of `tokens`; rows beyond the texts repeat the last one.
    fn predict(&self, texts: &[&Encoded], rows: usize, tokens: usize) -> Result<Vec<Vec<f32>>, Error> {
        let shape = self.sizes.shape(rows, tokens);
        let filled = texts.iter().chain(texts.last().into_iter().cycle()).take(rows);
        let filled: Vec<&Encoded> = filled.copied().collect();
        let tensors: Vec<(&str, Tensor)> = self
            .inputs
            .iter()
            .map(|(name, role)| {
                let values: Vec<i32> = filled
                    .iter()
                    .flat_map(|text| self.row(*role, text, tokens))
                    .collect();
                let tensor = Tensor::from_vec(values, shape.as_slice(), &Device::Cpu)?;
                Ok((name.as_str(), tensor))
            })
            .collect::<Result<_, Error>>()?;
        let given: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
        let failed = |e: candle_coreml::Error| Error::Engine {
            part: self.name.clone(),
            source: Box::new(e),
        };
        let outputs = self.model.predict(&given).map_err(failed)?;
        let output = outputs.tensor(self.output.name()).map_err(failed)?;
        let lengths: Vec<usize> = filled.iter().map(|text| text.ids.len()).collect();
        let mut vectors = self.output.vectors(&output, &lengths, tokens)?;
        if self.normalizes() {
            vectors.iter_mut().for_each(|vector| pooling::normalize(vector));
        }
        Ok(vectors)
    }

    /// A row of an input: the text's values, then padding.
    fn row(&self, role: Role, text: &Encoded, tokens: usize) -> Vec<i32> {
        // Ids fit: vocabularies and lengths are far below 2^31.
        let number = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
        let (pad, used) = (self.settings.pad(&self.tokenizer), text.ids.len());
        let first = self.settings.first_position();
        let value = |i: usize| match role {
            Role::Ids => number(text.ids.get(i).copied().unwrap_or(pad) as usize),
            Role::Mask => i32::from(i < used),
            Role::Types => number(text.types.get(i).copied().unwrap_or(0) as usize),
            Role::Positions if i < used => number(first + i),
            Role::Positions => number(first.saturating_sub(1)),
        };
        (0..tokens).map(value).collect()
    }
}

impl std::fmt::Debug for EmbeddingModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddingModel")
            .field("name", &self.name)
            .field("max_tokens", &self.max_tokens)
            .field("output", &self.output)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortened_vector_has_length_1() {
        let mut found = Embedding {
            vector: vec![3.0, 4.0, 12.0],
            tokens: 1,
            tokens_cut: 0,
        };
        found.shorten(3);
        assert_eq!(found.vector, [3.0, 4.0, 12.0]);
        found.shorten(0);
        found.shorten(2);
        assert_eq!(found.vector, [0.6, 0.8]);
    }
}
