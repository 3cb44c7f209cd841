//! Options of `convert` and `compress`.

use std::ops::Range;
use std::path::PathBuf;

use candle_coreml_convert::{Compression, Kept, LanguageModelOptions, Layout, Palette, Table};
use clap::{Args, ValueEnum};

use crate::failure::Failure;

const HOW: &str = "HOW is none, palette:BITS[:group=N][:vector=N][:table=int8], int8, int4[:block=N] or \
                   sparse:SHARE[+palette:BITS | +int8 | +int4].";

#[derive(Debug, Args)]
#[command(after_help = HOW)]
pub struct ConvertArgs {
    /// A folder with config.json and safetensors, or a .gguf file.
    pub model: PathBuf,
    /// The folder to write; it is made.
    #[arg(required_unless_present_any = ["dry_run", "sensitivity"])]
    pub out: Option<PathBuf>,
    /// Packages to write.
    #[arg(long, value_enum, default_value = "anemll")]
    pub layout: LayoutName,
    /// Positions of the cache; without it 512, or what the model has if that is less.
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Tokens a prefill call takes; without it 64, or the context if that is less.
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Tokens of further prefill functions, as 32,256 for shorter and longer prompts: the portable engine calls those that suit.
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pub further_batches: Vec<usize>,
    /// Tokens of every text (encoders); without it any number up to what the model has.
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
    /// Packages the layers are divided into.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub chunks: usize,
    /// Outputs the head is divided into; 0 chooses by the vocabulary.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub head_splits: usize,
    /// The head gives the best token of each of its parts instead of logits.
    #[arg(long)]
    pub argmax: bool,
    /// The model's name in meta.yaml; without it the folder's.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub name: String,
    #[command(flatten)]
    pub how: HowArgs,
    /// How the head is stored; without it as the layers.
    #[arg(long, value_name = "HOW")]
    pub head: Option<Compression>,
    /// How the embeddings are stored.
    #[arg(long, value_name = "HOW", default_value_t = Compression::None)]
    pub embeddings: Compression,
    /// Layers that are stored in another way: 0=int8, 0,29=int8, 4-9=palette:6. Repeat for several.
    #[arg(long, value_name = "LAYERS=HOW", value_parser = mix)]
    pub mix: Vec<Mix>,
    /// Print what would be written, with sizes, and write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Run the result beside a float32 forward pass of the original on a text and report how far they are apart.
    #[arg(long, conflicts_with_all = ["dry_run", "sensitivity"])]
    pub check: bool,
    /// Report how much each layer suffers from its compression on a text, and write nothing.
    #[arg(long, conflicts_with = "dry_run")]
    pub sensitivity: bool,
    /// The text of --check and --sensitivity; without it a short one inside this program.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens of the text that are used.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub text_tokens: usize,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = HOW)]
pub struct CompressArgs {
    /// A .mlpackage, or a folder of them.
    pub model: PathBuf,
    /// Where the result goes; without it beside MODEL, with the form in its name.
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub how: HowArgs,
    /// Weights with fewer values stay as they are.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub least: usize,
    /// Weights whose names contain TEXT are stored so: lm_head=int8, embed=none. Repeat for several; the first that fits counts.
    #[arg(long, value_name = "TEXT=HOW", value_parser = only)]
    pub only: Vec<Only>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// How weights are stored.
#[derive(Debug, Args)]
pub struct HowArgs {
    /// Indices of 1, 2, 3, 4, 6 or 8 bits into tables.
    #[arg(long, value_name = "BITS")]
    pub palettize: Option<u32>,
    /// Output channels that share a table; without it one table a weight.
    #[arg(long, value_name = "N", requires = "palettize")]
    pub group: Option<usize>,
    /// Output channels that one index stands for.
    #[arg(long, value_name = "N", requires = "palettize")]
    pub vector: Option<usize>,
    /// Tables of 8-bit integers.
    #[arg(long, requires = "palettize")]
    pub int8_tables: bool,
    /// Integers of 4 or 8 bits with a scale for each output channel.
    #[arg(long, value_name = "BITS", conflicts_with = "palettize")]
    pub quantize: Option<u32>,
    /// Inputs that share a scale.
    #[arg(long, value_name = "N", requires = "quantize", conflicts_with = "prune")]
    pub block: Option<usize>,
    /// The share of the values, the smallest, that become 0 and are left out; goes with --palettize or --quantize.
    #[arg(long, value_name = "SHARE", conflicts_with_all = ["group", "vector"])]
    pub prune: Option<f32>,
    /// Where the clustering of vectors starts.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl HowArgs {
    /// The form these options ask for.
    pub fn compression(&self) -> Result<Compression, Failure> {
        let table = if self.int8_tables {
            Table::Int8
        } else {
            Table::Half
        };
        let how = match (self.prune, self.palettize, self.quantize) {
            (Some(zeros), palettize, quantize) => Compression::Sparse {
                zeros,
                kept: match (palettize, quantize) {
                    (Some(bits), _) => Kept::Palette { bits, table },
                    (None, Some(bits)) => Kept::Linear { bits },
                    (None, None) => Kept::Half,
                },
            },
            (None, Some(bits), _) => Compression::Palette(Palette {
                bits,
                group: self.group,
                vector: self.vector.unwrap_or(1),
                table,
                seed: self.seed,
            }),
            (None, None, Some(bits)) => Compression::Linear {
                bits,
                block: self.block,
            },
            (None, None, None) => Compression::None,
        };
        how.check().map_err(|e| Failure::usage(e.to_string()))?;
        Ok(how)
    }
}

impl ConvertArgs {
    /// The options of a language model that has `positions` of them.
    pub fn options(&self, positions: usize) -> Result<LanguageModelOptions, Failure> {
        let layers = self.how.compression()?;
        let context = self.context.unwrap_or(positions.min(512));
        Ok(LanguageModelOptions {
            layout: match self.layout {
                LayoutName::Anemll => Layout::Anemll,
                LayoutName::Stateful => Layout::Stateful,
            },
            context,
            batch: self.batch.unwrap_or(context.min(64)),
            further_batches: self.further_batches.clone(),
            chunks: self.chunks,
            head_splits: self.head_splits,
            argmax: self.argmax,
            embeddings: self.embeddings,
            layers,
            mixed: self
                .mix
                .iter()
                .flat_map(|m| m.layers.iter().map(|range| (range.clone(), m.how)))
                .collect(),
            head: self.head.unwrap_or(layers),
            name: self.name.clone(),
        })
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LayoutName {
    /// Embeddings, chunks of layers with prefill and infer, head in parts: what ANEMLL's programs run.
    Anemll,
    /// One package with two states that takes any number of tokens a call.
    Stateful,
}

/// Layers and how they are stored.
#[derive(Debug, Clone)]
pub struct Mix {
    pub layers: Vec<Range<usize>>,
    pub how: Compression,
}

/// Weights by a part of their names and how they are stored.
#[derive(Debug, Clone)]
pub struct Only {
    pub part: String,
    pub how: Compression,
}

fn mix(text: &str) -> Result<Mix, String> {
    let (layers, how) = text
        .split_once('=')
        .ok_or("LAYERS=HOW is needed, for instance 0,4-9=int8")?;
    let range = |word: &str| -> Option<Range<usize>> {
        let (from, to) = word.split_once('-').unwrap_or((word, word));
        let (from, to): (usize, usize) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        (from <= to).then(|| from..to + 1)
    };
    let layers: Option<Vec<_>> = layers.split(',').map(range).collect();
    Ok(Mix {
        layers: layers.ok_or("layers are numbers and ranges with commas: 0,4-9")?,
        how: how.parse().map_err(|e| format!("{e}"))?,
    })
}

fn only(text: &str) -> Result<Only, String> {
    let (part, how) = text
        .split_once('=')
        .ok_or("TEXT=HOW is needed, for instance lm_head=int8")?;
    Ok(Only {
        part: part.to_owned(),
        how: how.parse().map_err(|e| format!("{e}"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_numbers_and_ranges() {
        let found = mix("0,4-9=palette:6:group=8").unwrap();
        assert_eq!(found.layers, [0..1, 4..10]);
        assert_eq!(found.how, Compression::palette(6, Some(8)));
        for wrong in ["0", "9-4=int8", "a=int8", "0=int9"] {
            assert!(mix(wrong).is_err(), "{wrong}");
        }
    }
}
