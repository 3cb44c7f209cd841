//! Language models: from a checkpoint to packages in one of two layouts.

mod anemll;
mod decoder;
mod files;
mod stateful;
mod tensors;

use std::ops::Range;
use std::path::Path;

use candle_coreml_mil::Metadata;

use crate::compress::{Compression, Progress};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::folder::PartialFolder;
pub(crate) use files::Input;
use tensors::Tensors;
pub(crate) use tensors::root_of;

/// Which packages a language model becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// ANEMLL's: embeddings, chunks of layers with a function for prefill and one for decode, and a split head.
    #[default]
    Anemll,
    /// One package with two states; any number of tokens a call.
    Stateful,
}

/// How a language model is converted.
#[derive(Debug, Clone, PartialEq)]
pub struct LanguageModelOptions {
    /// Packages to write.
    pub layout: Layout,
    /// Positions of the cache.
    pub context: usize,
    /// Tokens a prefill call takes (ANEMLL layout).
    pub batch: usize,
    /// Tokens that further functions take, `prefill_32` and so on (ANEMLL layout): this crate's engine calls them for prompts that are shorter
    /// or longer, others leave them alone. Each is parsed when the package is opened. What is [`LanguageModelOptions::batch`] or above the context is left out.
    pub further_batches: Vec<usize>,
    /// Packages the layers are divided into (ANEMLL layout).
    pub chunks: usize,
    /// Outputs the head is divided into (ANEMLL layout); 0 chooses: 16 from 32,768 tokens of vocabulary on, else 8.
    pub head_splits: usize,
    /// The head gives the best token of each part instead of logits (ANEMLL layout).
    pub argmax: bool,
    /// How embeddings are stored.
    pub embeddings: Compression,
    /// How the layers' projections are stored.
    pub layers: Compression,
    /// Layers that are stored in another way; the first range that has a layer counts.
    pub mixed: Vec<(Range<usize>, Compression)>,
    /// How the head is stored.
    pub head: Compression,
    /// The model's name in `meta.yaml`; empty for the folder's.
    pub name: String,
}

impl Default for LanguageModelOptions {
    fn default() -> Self {
        LanguageModelOptions {
            layout: Layout::Anemll,
            context: 512,
            batch: 64,
            further_batches: Vec::new(),
            chunks: 1,
            head_splits: 0,
            argmax: false,
            embeddings: Compression::None,
            layers: Compression::None,
            mixed: Vec::new(),
            head: Compression::None,
            name: String::new(),
        }
    }
}

impl LanguageModelOptions {
    /// How the projections of a layer are stored.
    pub fn layer(&self, layer: usize) -> &Compression {
        let special = self.mixed.iter().find(|(range, _)| range.contains(&layer));
        special.map_or(&self.layers, |(_, how)| how)
    }
}

/// What a conversion will write.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The decoder as its configuration describes it.
    pub config: DecoderConfig,
    /// Package names with what they hold and the size of their weights in bytes, tables and scales not counted.
    pub packages: Vec<(String, String, u64)>,
    /// Values in all weights.
    pub values: u64,
    /// Bytes the state takes in memory.
    pub state_bytes: u64,
}

/// Converts `from`, a folder with safetensors and `config.json` or a GGUF file, to packages in the folder `to`.
///
/// `progress` is called after every layer. The folder appears when everything is written; see [`PartialFolder`].
///
/// ```no_run
/// use candle_coreml_convert::{Compression, LanguageModelOptions, convert_language_model};
///
/// let palette = Compression::palette(4, Some(8));
/// let options = LanguageModelOptions { context: 1024, layers: palette, ..Default::default() };
/// convert_language_model("Qwen3-0.6B", "qwen3-coreml", &options, &mut |p| {
///     eprintln!("{} of {} weights", p.done, p.total);
/// })?;
/// # Ok::<(), candle_coreml_convert::Error>(())
/// ```
///
/// # Errors
/// [`Error::Unsupported`], [`Error::Option`] and [`Error::Occupied`] before anything is written; [`Error::Tensor`] with the tensor that is
/// missing or does not fit; [`Error::Mil`] and [`Error::Io`] for files.
pub fn convert_language_model(
    from: impl AsRef<Path>,
    to: impl AsRef<Path>,
    options: &LanguageModelOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Plan> {
    let (from, to) = (from.as_ref(), to.as_ref());
    let source = files::Input::open(from)?;
    let plan = make_plan(&source.config, options)?;
    let tensors = Tensors::new(&source.checkpoint, &source.config)?;
    let folder = PartialFolder::create(to)?;
    let to = folder.path();
    let mut job = Job {
        tensors,
        config: &source.config,
        options,
        to,
        done: 0,
        total: plan.values,
        progress,
    };
    match options.layout {
        Layout::Anemll => anemll::write(&mut job)?,
        Layout::Stateful => stateful::write(&mut job)?,
    }
    files::write(&source, to, options)?;
    folder.finish()?;
    Ok(plan)
}

/// What [`convert_language_model`] would write, without reading a weight.
///
/// # Errors
/// [`Error::Unsupported`] and [`Error::Option`] as the conversion itself.
pub fn plan_language_model(from: impl AsRef<Path>, options: &LanguageModelOptions) -> Result<Plan> {
    let source = files::Input::open(from.as_ref())?;
    Tensors::new(&source.checkpoint, &source.config)?;
    make_plan(&source.config, options)
}

/// The configuration of a language model: a Hugging Face folder or a GGUF file.
///
/// # Errors
/// [`Error::Unsupported`] for models that are not converted, [`Error::Malformed`] and [`Error::Io`] for files.
pub fn read_config(from: impl AsRef<Path>) -> Result<DecoderConfig> {
    Ok(Input::open(from.as_ref())?.config)
}

/// One conversion under way.
struct Job<'a> {
    tensors: Tensors<'a>,
    config: &'a DecoderConfig,
    options: &'a LanguageModelOptions,
    to: &'a Path,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl Job<'_> {
    fn stored(&mut self, values: u64) {
        self.done += values;
        (self.progress)(Progress {
            done: self.done.min(self.total),
            total: self.total,
        });
    }

    /// Metadata of a package.
    fn metadata(&self, what: &str, more: &[(&str, String)]) -> Metadata {
        let mut user: Vec<(String, String)> = vec![
            (
                "com.anemll.context_length".to_owned(),
                self.options.context.to_string(),
            ),
            ("com.anemll.batch_size".to_owned(), self.options.batch.to_string()),
        ];
        user.extend(more.iter().map(|(k, v)| ((*k).to_owned(), v.clone())));
        user.sort();
        Metadata {
            short_description: what.to_owned(),
            author: "candle-coreml".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            user,
            ..Metadata::default()
        }
    }
}

fn check(config: &DecoderConfig, options: &LanguageModelOptions) -> Result<()> {
    let wrong = |option, problem: String| Err(Error::Option { option, problem });
    let forms = [&options.embeddings, &options.layers, &options.head];
    let mixed = options.mixed.iter().map(|(_, how)| how);
    forms.into_iter().chain(mixed).try_for_each(Compression::check)?;
    if let Some((range, _)) = options.mixed.iter().find(|(r, _)| r.end > config.layers) {
        return wrong(
            "mix",
            format!(
                "layer {}; the model has 0 to {}",
                range.end - 1,
                config.layers - 1
            ),
        );
    }
    let context = options.context;
    if context == 0 || context > config.max_positions {
        return wrong(
            "context",
            format!("{context}; the model has 1 to {} positions", config.max_positions),
        );
    }
    if options.layout == Layout::Stateful {
        return Ok(());
    }
    if options.batch < 2 || options.batch > context {
        return wrong(
            "batch",
            format!("{}; 2 to the context of {context} is allowed", options.batch),
        );
    }
    if options.further_batches.iter().any(|&rows| rows < 2) {
        return wrong(
            "further-batches",
            format!("{:?}; 2 tokens and more are allowed", options.further_batches),
        );
    }
    if options.chunks == 0 || options.chunks > config.layers {
        return wrong(
            "chunks",
            format!("{}; 1 to {} layers are allowed", options.chunks, config.layers),
        );
    }
    if head_splits(config, options) > config.vocabulary {
        return wrong(
            "head-splits",
            format!(
                "{}; the vocabulary has {}",
                options.head_splits, config.vocabulary
            ),
        );
    }
    Ok(())
}

fn head_splits(config: &DecoderConfig, options: &LanguageModelOptions) -> usize {
    match options.head_splits {
        0 if config.vocabulary >= 1 << 15 => 16,
        0 => 8,
        n => n,
    }
}

/// Values of one layer's projections.
fn layer_values(c: &DecoderConfig) -> u64 {
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    ((2 * q + 2 * kv + 3 * c.intermediate) * c.hidden) as u64
}

fn make_plan(config: &DecoderConfig, options: &LanguageModelOptions) -> Result<Plan> {
    check(config, options)?;
    let table = (config.vocabulary * config.hidden) as u64;
    let layers = layer_values(config);
    let layer_bytes = |range: Range<usize>| -> u64 {
        range
            .map(|layer| options.layer(layer).estimated_bytes(layers))
            .sum()
    };
    let state = 2 * 2 * config.layers * config.kv_heads * config.head_dim * options.context;
    let packages = match options.layout {
        Layout::Stateful => {
            let bytes = options.embeddings.estimated_bytes(table)
                + layer_bytes(0..config.layers)
                + options.head.estimated_bytes(table);
            vec![(
                "model.mlpackage".to_owned(),
                format!("{} layers", config.layers),
                bytes,
            )]
        }
        Layout::Anemll => {
            let names = anemll::Names::new(config, options);
            let mut list = vec![(
                names.embeddings(),
                "embeddings".to_owned(),
                options.embeddings.estimated_bytes(table),
            )];
            for chunk in 0..options.chunks {
                let range = anemll::layers_of(config.layers, options.chunks, chunk);
                let bytes = layer_bytes(range.clone());
                list.push((
                    names.chunk(chunk),
                    format!("layers {} to {}", range.start, range.end - 1),
                    bytes,
                ));
            }
            let splits = head_splits(config, options);
            list.push((
                names.head(),
                format!("head in {splits} parts"),
                options.head.estimated_bytes(table),
            ));
            list
        }
    };
    Ok(Plan {
        config: config.clone(),
        packages,
        values: 2 * table + layers * config.layers as u64,
        state_bytes: state as u64,
    })
}
