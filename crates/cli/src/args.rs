//! The command line: commands, options and their help.

use std::path::PathBuf;

use candle_coreml::{ComputeUnits, EngineKind, Numerics};
use candle_coreml_llm::{ContextFull, LoadOptions, Pooling, Sampling, Shift};
use clap::{Args, Parser, Subcommand, ValueEnum};

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong use; 3 the model has operators the portable engine lacks \
                          (ops); 130 interrupted.";

/// Inspect, run, benchmark and chat with Core ML models on any machine.
#[derive(Debug, Parser)]
#[command(name = "candle-coreml", version, after_help = EXIT_CODES, propagate_version = true)]
pub struct Cli {
    /// Use the models that are on this machine, never the network (also HF_HUB_OFFLINE=1).
    #[cfg(feature = "hub")]
    #[arg(long, global = true)]
    pub offline: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show a model's functions, inputs, outputs, states, operators, weights and metadata.
    Inspect {
        /// A .mlpackage, .mlmodel or .mlmodelc, or a language-model folder.
        model: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Count a model's operators and name those the portable engine lacks.
    Ops {
        /// A .mlpackage, .mlmodel or .mlmodelc.
        model: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a model once on arrays and pictures from files.
    Predict(PredictArgs),
    /// Show every value a program computes on its way: smallest, largest, mean, NaN, infinity, fp16 overflow.
    Trace(TraceArgs),
    /// Compare a model's outputs with a saved set, or save one.
    Verify(VerifyArgs),
    /// Print the plan that runs for the default shapes: steps, merged operations, memory, arithmetic.
    Explain(ExplainArgs),
    /// Print which operation CoreML.framework runs on which device, and at what cost (Apple systems).
    Plan(ExplainArgs),
    /// Continue a prompt; without BUNDLE with the demo model inside this program.
    Generate(GenerateArgs),
    /// Talk with a model; without BUNDLE with the demo model inside this program.
    Chat(ChatArgs),
    /// Serve models over HTTP as OpenAI's clients speak it; without BUNDLE the demo model inside this program.
    Serve(crate::serve::ServeArgs),
    /// Measure prefill and decode; without BUNDLE those of the demo model inside this program.
    Bench(BenchArgs),
    /// Give texts their vectors with an encoder: printed, saved, or compared.
    Embed(EmbedArgs),
    #[cfg(feature = "hub")]
    /// Get the files of a model from the hub, once; they are kept where other programs of the hub keep theirs.
    Pull(PullArgs),
    #[cfg(feature = "hub")]
    /// Show the models of the hub that are on this machine.
    List(ListArgs),
    #[cfg(feature = "hub")]
    /// Remove a model of the hub from this machine.
    Rm(RmArgs),
    /// Measure what a model knows: the perplexity of a text, or right answers to multiple-choice questions.
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Make Core ML packages of a language model or an encoder: a Hugging Face folder or a GGUF file.
    Convert(crate::convert::args::ConvertArgs),
    /// Make the weights of a package, or of all packages in a folder, smaller.
    Compress(crate::convert::args::CompressArgs),
}

#[derive(Debug, Args)]
pub struct PredictArgs {
    /// A .mlpackage, .mlmodel or .mlmodelc.
    pub model: PathBuf,
    /// The function to run; without it the model's default.
    #[arg(long, value_name = "NAME")]
    pub function: Option<String>,
    #[command(flatten)]
    pub inputs: InputArgs,
    /// Folder for one file an output (.npy, .png for pictures), or a .npz file for all.
    #[arg(long, short = 'o', value_name = "DIR")]
    pub output: PathBuf,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// What a model is fed.
#[derive(Debug, Args)]
pub struct InputArgs {
    /// NAME=FILE.npy, NAME=FILE.npz:ARRAY, NAME=FILE.npz (its array NAME), FILE.npz (all its arrays), NAME=PICTURE
    /// (PNG, JPEG, BMP, WebP) for pictures, or NAME=VALUE for numbers and strings. Repeat for several.
    #[arg(long = "input", short = 'i', value_name = "INPUT")]
    pub inputs: Vec<String>,
    /// Fill the inputs that are not given with random values of their default shapes.
    #[arg(long, value_name = "SEED")]
    pub random: Option<u64>,
    /// Fit pictures of other sizes to the size the input takes.
    #[arg(long)]
    pub resize: bool,
}

#[derive(Debug, Args)]
pub struct TraceArgs {
    /// A .mlpackage, .mlmodel or .mlmodelc.
    pub model: PathBuf,
    /// The function to run; without it the model's default.
    #[arg(long, value_name = "NAME")]
    pub function: Option<String>,
    #[command(flatten)]
    pub inputs: InputArgs,
    /// Show the values whose names contain this.
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// Save the values shown: a folder for one .npy file each, or a .npz file for all.
    #[arg(long, short = 'o', value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Print one JSON object a line.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A .mlpackage, .mlmodel or .mlmodelc.
    pub model: PathBuf,
    /// The function to run; without it the model's default.
    #[arg(long, value_name = "NAME")]
    pub function: Option<String>,
    /// The saved set: a .npz file with arrays `inputs/NAME` and `outputs/NAME`.
    #[arg(long, value_name = "FILE")]
    pub golden: PathBuf,
    /// Run the model on the inputs given and save inputs and outputs to the file of --golden.
    #[arg(long)]
    pub record: bool,
    #[command(flatten)]
    pub inputs: InputArgs,
    /// Difference allowed in any case.
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    pub atol: f64,
    /// Difference allowed as a part of the saved value.
    #[arg(long, value_name = "X", default_value_t = 1e-3)]
    pub rtol: f64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// A .mlpackage, .mlmodel or .mlmodelc.
    pub model: PathBuf,
    /// The function; without it the model's default.
    #[arg(long, value_name = "NAME")]
    pub function: Option<String>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A language-model folder.
    pub bundle: Option<PathBuf>,
    /// The text to continue; `-` reads it from standard input.
    #[arg(long, short = 'p', value_name = "TEXT")]
    pub prompt: String,
    /// Feed the prompt as it is: special tokens written in it are recognised, no chat template is applied.
    #[arg(long)]
    pub raw: bool,
    /// A system message before the prompt.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Most tokens to generate.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 256)]
    pub max_tokens: usize,
    /// 0 takes the best token always.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Where the random numbers start: the same seed gives the same text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// The text is JSON that this schema accepts: a file, or the schema itself where it begins with `{`. A text that was cut short
    /// before it was whole is exit code 1.
    #[arg(long, value_name = "SCHEMA", conflicts_with = "regex")]
    pub json_schema: Option<String>,
    /// The whole text matches this regular expression.
    #[arg(long, value_name = "PATTERN")]
    pub regex: Option<String>,
    /// Let the model think first, or not, where its chat template has a switch for it.
    #[arg(long, value_enum, value_name = "SWITCH", conflicts_with = "raw")]
    pub think: Option<Switch>,
    /// What happens when the model's context is full: end, or drop the oldest tokens and go on.
    #[arg(long, value_enum, default_value = "stop")]
    pub context: ContextArg,
    /// Print one JSON object instead of the text.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct ChatArgs {
    /// A language-model folder.
    pub bundle: Option<PathBuf>,
    /// A system message before the first turn.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Most tokens of an answer.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 512)]
    pub max_tokens: usize,
    /// 0 takes the best token always.
    #[arg(long, value_name = "T", default_value_t = 0.7, allow_negative_numbers = true)]
    pub temperature: f32,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Where the random numbers start; without it they differ every time.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Let the model think first, or not, where its chat template has a switch for it.
    #[arg(long, value_enum, value_name = "SWITCH")]
    pub think: Option<Switch>,
    /// What happens when the model's context is full: end, or drop the oldest turns and go on.
    #[arg(long, value_enum, default_value = "shift")]
    pub context: ContextArg,
    /// Do not keep what is typed for the next time.
    #[arg(long)]
    pub no_history: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// A language-model folder.
    pub bundle: Option<PathBuf>,
    /// Prompt lengths to prefill, with commas.
    #[arg(
        long = "n-prompt",
        short = 'p',
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "64,256"
    )]
    pub prompts: Vec<usize>,
    /// Numbers of tokens to decode, with commas.
    #[arg(
        long = "n-gen",
        short = 'n',
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "64"
    )]
    pub generations: Vec<usize>,
    /// Tokens of context to measure after, with commas.
    #[arg(
        long = "n-depth",
        short = 'd',
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "0"
    )]
    pub depths: Vec<usize>,
    /// How often each is measured.
    #[arg(long = "repetitions", short = 'r', value_name = "N", default_value_t = 5,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub repetitions: usize,
    /// How to print the results.
    #[arg(long, short = 'o', value_enum, default_value = "md")]
    pub output: BenchOutput,
    /// Print JSON: short for `-o json`.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum BenchOutput {
    Md,
    Csv,
    Json,
}

/// What `eval` measures.
#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// The perplexity of a text, in overlapping windows: every token is scored once. Without BUNDLE with the demo model.
    Perplexity(PerplexityArgs),
    /// Multiple choice by summed log probabilities. FILE has one JSON object a line: {"prompt": "...", "choices": ["...", ...],
    /// "answer": 0}, or as HellaSwag, MMLU and ARC have them.
    Choices(ChoicesArgs),
}

#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// A text file.
    pub file: PathBuf,
    /// A language-model folder.
    pub bundle: Option<PathBuf>,
    /// Tokens of a window; without it the model's context.
    #[arg(long, value_name = "N")]
    pub window: Option<usize>,
    /// Tokens from one window's start to the next one's; without it half a window.
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,
    /// Score this many tokens at most.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Compare with this model, for instance the original of a compressed one: ratio of perplexities, KL divergence, same best token.
    #[arg(long, value_name = "BUNDLE")]
    pub compare: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Args)]
pub struct ChoicesArgs {
    /// Questions, one JSON object a line.
    pub file: PathBuf,
    /// A language-model folder.
    pub bundle: Option<PathBuf>,
    /// Ask this many questions at most.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Ask this model too.
    #[arg(long, value_name = "BUNDLE")]
    pub compare: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

impl Switch {
    pub fn is_on(self) -> bool {
        self == Switch::On
    }
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub enum ContextArg {
    Stop,
    Shift,
}

impl From<ContextArg> for ContextFull {
    fn from(arg: ContextArg) -> Self {
        match arg {
            ContextArg::Stop => ContextFull::Stop,
            ContextArg::Shift => ContextFull::Shift(Shift::default()),
        }
    }
}

#[derive(Debug, Args)]
pub struct EmbedArgs {
    /// A folder with an encoder's package and tokenizer, the package itself, or ORG/NAME[@REVISION] of the hub.
    pub model: PathBuf,
    /// A text. May be given several times.
    #[arg(long, value_name = "TEXT")]
    pub text: Vec<String>,
    /// A file with one text a line; `-` is standard input.
    #[arg(long, short = 'f', value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// How vectors of tokens become one: mean, cls, last, max, mean-sqrt-length, weighted-mean or pooler; without it as
    /// the model's files say.
    #[arg(long, value_name = "HOW")]
    pub pooling: Option<Pooling>,
    /// Whether vectors are scaled to length 1; without it as the model's files say.
    #[arg(long, value_name = "BOOL")]
    pub normalize: Option<bool>,
    /// Tokens of a text that are read.
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Keep the first N numbers of each vector, for models trained for that.
    #[arg(long, value_name = "N")]
    pub dimensions: Option<usize>,
    /// What the model wants before texts of a kind, by the kind's name (query, passage).
    #[arg(long, value_name = "KIND")]
    pub prompt: Option<String>,
    /// The package's output to use.
    #[arg(long, value_name = "NAME")]
    pub output_name: Option<String>,
    /// Save the vectors to a .npy file, [texts, width].
    #[arg(long, short = 'o', value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print the cosine similarity of every text with every other.
    #[arg(long)]
    pub similarity: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

#[cfg(feature = "hub")]
#[derive(Debug, Args)]
pub struct PullArgs {
    /// ORG/NAME, with @REVISION for a branch, tag or commit.
    pub model: String,
    /// Of several bundles in one repository, the one in this folder.
    #[arg(long, value_name = "FOLDER")]
    pub folder: Option<String>,
    /// Fetch weights for `convert` instead of Core ML packages.
    #[arg(long)]
    pub checkpoint: bool,
    /// Show what would be fetched.
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

#[cfg(feature = "hub")]
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[cfg(feature = "hub")]
#[derive(Debug, Args)]
pub struct RmArgs {
    /// ORG/NAME for all of it, with @REVISION for one revision.
    #[arg(required = true)]
    pub models: Vec<String>,
}

#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Choose among this many of the best tokens; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the best tokens that together have this probability.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Choose among tokens with at least this part of the best one's probability.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,
    /// Choose among the tokens nearest to what is to be expected that together have this probability.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub typical_p: f32,
    /// Make tokens of the text so far less likely: 1 leaves them, 1.1 is usual.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens that were generated before.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_hyphen_values = true)]
    pub presence_penalty: f32,
    /// Taken from the logits of tokens that were generated before, once for each time.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_hyphen_values = true)]
    pub frequency_penalty: f32,
    /// How many tokens back penalties look; 0 for the whole text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub penalty_tokens: usize,
    /// Added to the logit of a token id; -inf forbids it. May be given several times.
    #[arg(long, value_name = "ID=X", value_parser = bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// End before this text. May be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let parts = text.split_once('=').ok_or("a token id, =, and a number")?;
    let id = parts
        .0
        .parse()
        .map_err(|_| format!("{:?} is no token id", parts.0))?;
    let bias = parts
        .1
        .parse()
        .map_err(|_| format!("{:?} is no number", parts.1))?;
    Ok((id, bias))
}

impl SamplingArgs {
    pub fn with(&self, temperature: f32, seed: u64) -> Sampling {
        Sampling {
            temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            penalty_tokens: self.penalty_tokens,
            logit_bias: self.logit_bias.clone(),
            seed,
        }
    }
}

/// Which engine runs a model and how.
#[derive(Debug, Args)]
pub struct EngineArgs {
    /// The engine; auto is CoreML.framework on Apple systems, the portable engine elsewhere.
    #[arg(long, value_enum, default_value = "auto")]
    pub engine: EngineName,
    /// The processors CoreML.framework may use.
    #[arg(long, value_enum, default_value = "all")]
    pub compute_units: UnitsName,
    /// How the portable engine computes.
    #[arg(long, value_enum, default_value = "default")]
    pub numerics: NumericsName,
    /// Threads of the portable engine; 0 for one a core.
    #[arg(long, short = 't', value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum EngineName {
    Auto,
    Portable,
    Apple,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum UnitsName {
    All,
    Cpu,
    CpuGpu,
    CpuNe,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum NumericsName {
    /// fp16 programs are computed in f32
    Default,
    /// Every fp16 result is rounded to fp16
    Faithful,
    /// Factors of large products are rounded to 8-bit integers or bf16 where the processor multiplies them faster
    Fast,
}

impl EngineArgs {
    pub fn load_options(&self) -> LoadOptions {
        LoadOptions {
            engine: match self.engine {
                EngineName::Auto => EngineKind::Auto,
                EngineName::Portable => EngineKind::Portable,
                EngineName::Apple => EngineKind::Apple,
            },
            compute_units: match self.compute_units {
                UnitsName::All => ComputeUnits::All,
                UnitsName::Cpu => ComputeUnits::CpuOnly,
                UnitsName::CpuGpu => ComputeUnits::CpuAndGpu,
                UnitsName::CpuNe => ComputeUnits::CpuAndNeuralEngine,
            },
            numerics: match self.numerics {
                NumericsName::Default => Numerics::Default,
                NumericsName::Faithful => Numerics::Faithful,
                NumericsName::Fast => Numerics::Fast,
            },
            threads: self.threads,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[cfg(feature = "hub")]
    #[test]
    fn documented_calls_of_the_hub_parse() {
        for line in [
            "pull org/name@main --folder lut6 --dry-run",
            "pull org/name --checkpoint --json",
            "list --json",
            "rm org/name other/name@v1",
            "generate org/name --prompt hi --offline",
        ] {
            let words = std::iter::once("candle-coreml").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn documented_calls_parse() {
        for line in [
            "inspect m.mlpackage --json",
            "ops m.mlpackage",
            "predict m.mlpackage --function f --input x=a.npy --input y=b.npz --output out",
            "predict m.mlmodel -i image=cat.jpg --resize -o out.npz",
            "trace m.mlpackage --random 7 --numerics faithful --only conv -o values.npz --json",
            "verify m.mlpackage --golden g.npz --record --random 1",
            "verify m.mlpackage --golden g.npz --atol 0.01 --rtol 0 --json",
            "explain m.mlpackage --function prefill",
            "plan m.mlpackage --compute-units cpu-ne",
            "generate --prompt hi",
            "generate dir --prompt - --raw --max-tokens 3 --temperature 1 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 7 --json",
            "chat",
            "chat dir --seed 3 --context stop --think off --no-history",
            "generate -p hi --json-schema {} --context shift --think on",
            "generate -p hi --regex yes|no --raw",
            "eval perplexity story.txt dir --window 256 --stride 64 --limit 9 --compare other --json",
            "eval choices questions.jsonl --compare other --json",
            "bench -p 64,256 -n 64 -r 5 --json -t 2",
            "embed minilm --text hi --text you --similarity --normalize false --pooling cls",
            "embed org/name@v1 --file texts.txt -o vectors.npy --prompt query --dimensions 64",
            "convert hf-folder out --context 1024 --chunks 2 --palettize 4 --group 8 --head int8 --mix 0,29=int8",
            "convert model.gguf --dry-run --layout stateful",
            "convert hf-folder out --check --text story.txt",
            "convert hf-folder --sensitivity --palettize 4 --text story.txt",
            "convert minilm out --tokens 128 --quantize 8",
            "compress m.mlpackage --palettize 4 --group 8",
            "compress m.mlpackage out.mlpackage --prune 0.5 --quantize 8",
        ] {
            let words = std::iter::once("candle-coreml").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }
}
