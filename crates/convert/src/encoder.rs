//! Encoders of the BERT family: from a checkpoint to one package, with a sentence embedding where the checkpoint says how.

use std::path::Path;

use candle_coreml_mil::{DType, Dim, Flexibility, Metadata, TensorType};
use serde_json::Value;

use crate::builder::{ProgramBuilder, Weight};
use crate::compress::{Compression, Progress};
use crate::config::Reader;
use crate::error::{Error, Result};
use crate::folder::PartialFolder;
use crate::function::{Arg, FunctionBuilder, Var};
use crate::layers::as_i32;
use crate::literal;
use crate::weights::Checkpoint;

/// Sizes and switches of an encoder.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the words of the checkpoints' own configurations")]
pub struct EncoderConfig {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub intermediate: usize,
    pub vocabulary: usize,
    /// Tokens a text may have.
    pub max_tokens: usize,
    /// Row of the position table that the first token takes: not 0 in RoBERTa.
    pub first_position: usize,
    pub token_types: usize,
    pub eps: f32,
    /// The activation of the MLP as the program spells it.
    pub activation: Activation,
    /// How the text's vector is made, where the checkpoint says so.
    pub pooling: Option<Pooling>,
    /// The text's vector has length 1.
    pub normalize: bool,
}

/// What the MLP's inner values go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Activation {
    Gelu,
    GeluTanh,
    Relu,
}

/// How a text's vector is made of those of its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over the tokens that the attention mask shows.
    Mean,
    /// The first token's.
    First,
}

/// How an encoder is converted.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EncoderOptions {
    /// Tokens of every text; `None` for any number up to what the model has.
    pub tokens: Option<usize>,
    /// How the layers' projections are stored.
    pub layers: Compression,
    /// How the table of words is stored.
    pub embeddings: Compression,
}

/// Files beside the package, copied as they are where they exist.
const COPIED: [&str; 9] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
];

/// The model's kind as its `config.json` names it, or nothing where it is no folder with one.
pub fn model_type(folder: impl AsRef<Path>) -> Option<String> {
    let text = std::fs::read(folder.as_ref().join("config.json")).ok()?;
    let json: Value = serde_json::from_slice(&text).ok()?;
    json.get("model_type")?.as_str().map(str::to_owned)
}

impl EncoderConfig {
    /// True for kinds that [`convert_encoder`] takes.
    pub fn is_encoder(model_type: &str) -> bool {
        matches!(model_type, "bert" | "roberta" | "xlm-roberta" | "camembert")
    }

    /// Reads `config.json` in a folder, and the files of sentence-transformers where there are any.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other models, [`Error::Malformed`] with the key that is wrong, [`Error::Io`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let file = path.display().to_string();
        let text = std::fs::read(&path).map_err(Error::io(&path))?;
        let json: Value =
            serde_json::from_slice(&text).map_err(|e| Error::malformed(&file, e.to_string()))?;
        let mut config = Self::parse(&Reader {
            file: &file,
            json: &json,
        })?;
        let read = |name: &str| -> Option<Value> {
            serde_json::from_slice(&std::fs::read(folder.join(name)).ok()?).ok()
        };
        if let Some(pooling) = read("1_Pooling/config.json") {
            let set = |key: &str| pooling.get(key).and_then(Value::as_bool).unwrap_or(false);
            config.pooling = match (set("pooling_mode_mean_tokens"), set("pooling_mode_cls_token")) {
                (true, false) => Some(Pooling::Mean),
                (false, true) => Some(Pooling::First),
                _ => {
                    return Err(Error::Unsupported {
                        file: folder.join("1_Pooling/config.json").display().to_string(),
                        what: "this pooling; supported: the mean or the first token".to_owned(),
                    });
                }
            };
        }
        let modules = read("modules.json");
        let kinds = modules.iter().flat_map(|m| m.as_array().into_iter().flatten());
        let mut kinds = kinds.filter_map(|m| m.get("type")?.as_str());
        config.normalize = kinds.any(|kind| kind.ends_with("Normalize"));
        Ok(config)
    }

    fn parse(config: &Reader<'_>) -> Result<Self> {
        let unsupported = |what: String| Error::Unsupported {
            file: config.file.to_owned(),
            what,
        };
        let word = |key: &str, default: &str| {
            let found = config.get(key).and_then(Value::as_str);
            found.unwrap_or(default).to_owned()
        };
        let kind = word("model_type", "");
        if !Self::is_encoder(&kind) {
            return Err(unsupported(format!(
                "model_type {kind:?}; encoders: bert, roberta, xlm-roberta, camembert"
            )));
        }
        let positions = word("position_embedding_type", "absolute");
        if positions != "absolute" {
            return Err(unsupported(format!(
                "position_embedding_type {positions:?}; supported: \"absolute\""
            )));
        }
        let activation = match word("hidden_act", "gelu").as_str() {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => {
                return Err(unsupported(format!(
                    "hidden_act {other:?}; supported: gelu, gelu_new, relu"
                )));
            }
        };
        let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
        let (layers, intermediate) = (
            config.size("num_hidden_layers")?,
            config.size("intermediate_size")?,
        );
        config.check_sizes(layers, hidden, intermediate)?;
        if hidden % heads != 0 {
            return Err(Error::malformed(
                config.file,
                format!("{heads} heads do not divide {hidden}"),
            ));
        }
        // RoBERTa counts positions from behind the padding token.
        let first_position = match kind.as_str() {
            "bert" => 0,
            _ => {
                let padding = config.get("pad_token_id").and_then(Value::as_u64).unwrap_or(1);
                usize::try_from(padding).unwrap_or(usize::MAX).saturating_add(1)
            }
        };
        let table = config.size_or("max_position_embeddings", Some(512))?;
        let max_tokens = table.checked_sub(first_position).filter(|&n| n > 0);
        Ok(EncoderConfig {
            hidden,
            layers,
            heads,
            intermediate,
            vocabulary: config.size("vocab_size")?,
            max_tokens: max_tokens
                .ok_or_else(|| config.wrong("max_position_embeddings", "more positions"))?,
            first_position,
            token_types: config.size_or("type_vocab_size", Some(2))?,
            eps: config.number_or("layer_norm_eps", 1e-12)? as f32,
            activation,
            pooling: None,
            normalize: false,
        })
    }
}

/// Converts an encoder in the folder `from` to `model.mlpackage` in the folder `to`, with its tokenizer files.
///
/// The program takes `input_ids` and `attention_mask`, [1, n] integers, and gives `last_hidden_state` [1, n, hidden];
/// with it `pooler_output` [1, hidden] where the checkpoint has a pooler and `sentence_embedding` [1, hidden] where it
/// says how texts are pooled. Every token is of the first type.
///
/// # Errors
/// As [`crate::convert_language_model`].
pub fn convert_encoder(
    from: impl AsRef<Path>,
    to: impl AsRef<Path>,
    options: &EncoderOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<EncoderConfig> {
    let (from, to) = (from.as_ref(), to.as_ref());
    let config = EncoderConfig::open(from)?;
    options.layers.check()?;
    options.embeddings.check()?;
    if let Some(n) = options.tokens.filter(|&n| n == 0 || n > config.max_tokens) {
        return Err(Error::Option {
            option: "tokens",
            problem: format!("{n}; the model has 1 to {} positions", config.max_tokens),
        });
    }
    let checkpoint = Checkpoint::open(from)?;
    let tensors = Tensors::new(&checkpoint)?;
    let folder = PartialFolder::create(to)?;
    let to = folder.path();
    let mut package = ProgramBuilder::create(to.join("model.mlpackage"))?;
    let total = config.layers as u64 + 1;
    let mut f = FunctionBuilder::new("main");
    let input = Input::new(&mut f, &config, options)?;
    let mut x = tensors.embed(&mut package, &mut f, &config, options, &input)?;
    for layer in 0..config.layers {
        progress(Progress {
            done: layer as u64 + 1,
            total,
        });
        x = tensors.layer((&mut package, &mut f), &config, options, &input, (layer, &x))?;
    }
    f.output("last_hidden_state", &x)?;
    tensors.pooler(&mut package, &mut f, &config, &x)?;
    if let Some(pooling) = config.pooling {
        let pooled = pool(&mut f, &config, pooling, &input, &x)?;
        f.output("sentence_embedding", &pooled)?;
    }
    package.function(f)?;
    package.metadata(Metadata {
        short_description: "Text encoder".to_owned(),
        author: "candle-coreml".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Metadata::default()
    });
    package.finish()?;
    progress(Progress { done: total, total });
    for name in COPIED {
        let path = from.join(name);
        if path.exists() {
            let copy = to.join(name);
            if let Some(folder) = copy.parent() {
                std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            }
            std::fs::copy(&path, copy).map_err(Error::io(&path))?;
        }
    }
    folder.finish()?;
    Ok(config)
}

/// What every layer uses of the inputs.
struct Input {
    ids: Var,
    /// 1 for tokens that count, [1, n] in 16-bit floats.
    shown: Var,
    /// What is added to scores, [1, 1, 1, n].
    mask: Var,
}

impl Input {
    fn new(f: &mut FunctionBuilder, c: &EncoderConfig, o: &EncoderOptions) -> Result<Self> {
        let mut input = |name: &str| match o.tokens {
            Some(n) => f.input(name, DType::Int32, &[1, n]),
            None => {
                let any = vec![(1, Some(1)), (1, Some(c.max_tokens))];
                f.flexible_input(name, DType::Int32, &[1, 1], Flexibility::Ranges(any))
            }
        };
        let (ids, mask) = (input("input_ids")?, input("attention_mask")?);
        let shown = f.cast(&mask, DType::Fp16)?;
        let args = [("x", (&shown).into()), ("y", literal::half(1.0).into())];
        let hidden = f.op("sub", &args, shown.ty())?;
        // Enough to leave nothing of a score, and far from the largest 16-bit float.
        let mask = f.scale(&hidden, 30_000.0)?;
        let mask = f.expand_dims(&mask, 1)?;
        let mask = f.expand_dims(&mask, 1)?;
        Ok(Input { ids, shown, mask })
    }
}

struct Tensors<'a> {
    checkpoint: &'a Checkpoint,
    root: &'static str,
}

/// What stands before the names of an encoder's tensors.
pub(crate) fn root_of(checkpoint: &Checkpoint) -> Result<&'static str> {
    const ROOTS: [&str; 4] = ["", "bert.", "roberta.", "model."];
    let has = |root: &&str| checkpoint.contains(&format!("{root}embeddings.word_embeddings.weight"));
    let root = ROOTS.into_iter().find(has);
    root.ok_or_else(|| Error::tensor("embeddings.word_embeddings.weight", "not in the checkpoint"))
}

impl<'a> Tensors<'a> {
    fn new(checkpoint: &'a Checkpoint) -> Result<Self> {
        Ok(Tensors {
            checkpoint,
            root: root_of(checkpoint)?,
        })
    }

    fn weight(
        &self,
        package: &mut ProgramBuilder,
        name: &str,
        shape: &[usize],
        how: &Compression,
    ) -> Result<Weight> {
        let name = format!("{}{name}", self.root);
        package.weight(&name, shape, &self.checkpoint.read(&name, shape)?, how)
    }

    fn linear(
        &self,
        (package, f): (&mut ProgramBuilder, &mut FunctionBuilder),
        name: &str,
        x: &Var,
        shape: [usize; 2],
        how: &Compression,
    ) -> Result<Var> {
        let weight = self.weight(package, &format!("{name}.weight"), &shape, how)?;
        let bias = self.weight(package, &format!("{name}.bias"), &shape[..1], &Compression::None)?;
        let (weight, bias) = (f.weight(&weight)?, f.weight(&bias)?);
        f.linear(x, &weight, Some(&bias))
    }

    fn norm(
        &self,
        (package, f): (&mut ProgramBuilder, &mut FunctionBuilder),
        name: &str,
        x: &Var,
        c: &EncoderConfig,
    ) -> Result<Var> {
        // Files of the first years call them gamma and beta.
        let old = self.checkpoint.contains(&format!("{}{name}.gamma", self.root));
        let (gamma, beta) = if old {
            ("gamma", "beta")
        } else {
            ("weight", "bias")
        };
        let mut part = |part: &str| {
            self.weight(
                package,
                &format!("{name}.{part}"),
                &[c.hidden],
                &Compression::None,
            )
        };
        let (gamma, beta) = (part(gamma)?, part(beta)?);
        let (gamma, beta) = (f.weight(&gamma)?, f.weight(&beta)?);
        // The usual 1e-12 is 0 in 16 bits.
        f.layer_norm(x, &gamma, &beta, c.eps.max(1e-7))
    }

    /// Words, positions and the first token type, added and normed.
    fn embed(
        &self,
        package: &mut ProgramBuilder,
        f: &mut FunctionBuilder,
        c: &EncoderConfig,
        o: &EncoderOptions,
        input: &Input,
    ) -> Result<Var> {
        let name = |part: &str| format!("{}embeddings.{part}.weight", self.root);
        let words = [c.vocabulary, c.hidden];
        let table = if o.embeddings == Compression::None {
            let mut stream = self.checkpoint.stream(&name("word_embeddings"), &words)?;
            package.weight_from("word_embeddings", &words, &mut stream)?
        } else {
            let values = self.checkpoint.read(&name("word_embeddings"), &words)?;
            package.weight("word_embeddings", &words, &values, &o.embeddings)?
        };
        let rows = c.max_tokens + c.first_position;
        let positions = self
            .checkpoint
            .read_f32(&name("position_embeddings"), &[rows, c.hidden])?;
        let types = self
            .checkpoint
            .read_f32(&name("token_type_embeddings"), &[c.token_types, c.hidden])?;
        let count = o.tokens.unwrap_or(c.max_tokens);
        let used = positions
            .iter()
            .skip(c.first_position * c.hidden)
            .take(count * c.hidden);
        let sums: Vec<half::f16> = used
            .zip(types.iter().take(c.hidden).cycle())
            .map(|(p, t)| half::f16::from_f32(p + t))
            .collect();
        let positions = package.weight(
            "position_embeddings",
            &[count, c.hidden],
            &sums,
            &Compression::None,
        )?;
        let table = f.weight(&table)?;
        let x = f.gather(&table, &input.ids, 0)?;
        let positions = f.weight(&positions)?;
        let positions = match o.tokens {
            Some(_) => positions,
            None => first_rows(f, &positions, &input.ids)?,
        };
        let positions = f.expand_dims(&positions, 0)?;
        let x = f.add(&x, &positions)?;
        self.norm((package, f), "embeddings.LayerNorm", &x, c)
    }

    fn layer(
        &self,
        (package, f): (&mut ProgramBuilder, &mut FunctionBuilder),
        c: &EncoderConfig,
        o: &EncoderOptions,
        input: &Input,
        (layer, x): (usize, &Var),
    ) -> Result<Var> {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let (h, inner, how) = (c.hidden, c.intermediate, &o.layers);
        let mut heads = |part: &str| -> Result<Var> {
            let y = self.linear((package, f), &name(part), x, [h, h], how)?;
            let [heads, width] = as_i32(&[c.heads, h / c.heads])?[..] else {
                return Err(Error::op("reshape", "two sizes"));
            };
            let y = f.reshape(&y, &[1, -1, heads, width])?;
            f.transpose(&y, &[0, 2, 1, 3])
        };
        let (q, k, v) = (
            heads("attention.self.query")?,
            heads("attention.self.key")?,
            heads("attention.self.value")?,
        );
        let args = [
            ("query", (&q).into()),
            ("key", (&k).into()),
            ("value", (&v).into()),
            ("attn_mask", (&input.mask).into()),
        ];
        let out = f.op("scaled_dot_product_attention", &args, q.ty())?;
        let out = f.transpose(&out, &[0, 2, 1, 3])?;
        let out = f.reshape(&out, &[1, -1, as_i32(&[h])?[0]])?;
        let out = self.linear((package, f), &name("attention.output.dense"), &out, [h, h], how)?;
        let x = f.add(x, &out)?;
        let x = self.norm((package, f), &name("attention.output.LayerNorm"), &x, c)?;
        let y = self.linear((package, f), &name("intermediate.dense"), &x, [inner, h], how)?;
        let y = match c.activation {
            Activation::Gelu => f.gelu(&y, "EXACT")?,
            Activation::GeluTanh => f.gelu(&y, "TANH_APPROXIMATION")?,
            Activation::Relu => f.unary("relu", &y)?,
        };
        let y = self.linear((package, f), &name("output.dense"), &y, [h, inner], how)?;
        let x = f.add(&x, &y)?;
        self.norm((package, f), &name("output.LayerNorm"), &x, c)
    }

    /// The pooler's output, where the checkpoint has one.
    fn pooler(
        &self,
        package: &mut ProgramBuilder,
        f: &mut FunctionBuilder,
        c: &EncoderConfig,
        x: &Var,
    ) -> Result<()> {
        if !self
            .checkpoint
            .contains(&format!("{}pooler.dense.weight", self.root))
        {
            return Ok(());
        }
        let first = first_token(f, x)?;
        let y = self.linear(
            (package, f),
            "pooler.dense",
            &first,
            [c.hidden; 2],
            &Compression::None,
        )?;
        let y = f.unary("tanh", &y)?;
        f.output("pooler_output", &y)
    }
}

/// As many first rows of `table` [m, h] as there are tokens in `ids` [1, n].
fn first_rows(f: &mut FunctionBuilder, table: &Var, ids: &Var) -> Result<Var> {
    let ty = TensorType::fixed(DType::Int32, &[2]);
    let sizes = f.op("shape", &[("x", ids.into())], &ty)?;
    let count = f.slice(&sizes, 0, 1, 2)?;
    let values: Vec<Arg> = vec![(&count).into(), literal::ints(&[0]).into()];
    let args = [
        ("values", values.into()),
        ("axis", literal::int(0).into()),
        ("interleave", literal::flag(false).into()),
    ];
    let end = f.op("concat", &args, &TensorType::fixed(DType::Int32, &[2]))?;
    let args = [
        ("x", table.into()),
        ("begin", literal::ints(&[0, 0]).into()),
        ("end", (&end).into()),
        ("end_mask", literal::flags(&[false, true]).into()),
    ];
    let mut shape = table.dims().to_vec();
    if let Some(rows) = shape.first_mut() {
        *rows = Dim::Unknown;
    }
    let ty = TensorType {
        dtype: table.dtype(),
        shape,
    };
    f.op("slice_by_index", &args, &ty)
}

/// The first token of `x` [1, n, h], as [1, h].
fn first_token(f: &mut FunctionBuilder, x: &Var) -> Result<Var> {
    let first = f.slice(x, 1, 0, 1)?;
    f.squeeze(&first, 1)
}

/// The text's vector [1, h] of `x` [1, n, h].
fn pool(f: &mut FunctionBuilder, c: &EncoderConfig, how: Pooling, input: &Input, x: &Var) -> Result<Var> {
    let one = |f: &mut FunctionBuilder, op: &str, x: &Var| {
        let args = [
            ("x", x.into()),
            ("axes", literal::ints(&[1]).into()),
            ("keep_dims", literal::flag(true).into()),
        ];
        f.op(op, &args, &TensorType::fixed(DType::Fp16, &[1, 1]))
    };
    let pooled = match how {
        Pooling::First => first_token(f, x)?,
        Pooling::Mean => {
            // Shares of 1 / n keep the sum small.
            let count = one(f, "reduce_sum", &input.shown)?;
            let shares = f.binary("real_div", &input.shown, &count)?;
            let shares = f.expand_dims(&shares, 1)?;
            let mean = f.matmul(&shares, x, false)?;
            f.squeeze(&mean, 1)?
        }
    };
    if !c.normalize {
        return f.unary("identity", &pooled);
    }
    let length = one(f, "reduce_l2_norm", &pooled)?;
    f.binary("real_div", &pooled, &length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &str) -> Result<EncoderConfig> {
        let text = format!(
            r#"{{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
            "vocab_size": 64, {extra}}}"#
        );
        EncoderConfig::parse(&Reader {
            file: "config.json",
            json: &serde_json::from_str(&text).unwrap(),
        })
    }

    #[test]
    fn positions_of_roberta_start_behind_the_padding() {
        let bert = parse(r#""model_type": "bert""#).unwrap();
        assert_eq!((bert.first_position, bert.max_tokens), (0, 512));
        let roberta = parse(r#""model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": 514"#);
        let roberta = roberta.unwrap();
        assert_eq!((roberta.first_position, roberta.max_tokens), (2, 512));
    }

    #[test]
    fn what_is_not_converted_is_refused_by_name() {
        for (extra, expected) in [
            (r#""model_type": "distilbert""#, "\"distilbert\""),
            (
                r#""model_type": "bert", "hidden_act": "silu""#,
                "hidden_act \"silu\"",
            ),
            (
                r#""model_type": "bert", "position_embedding_type": "relative_key""#,
                "relative_key",
            ),
            (r#""model_type": "bert", "num_attention_heads": 3"#, "3 heads"),
        ] {
            let error = parse(extra).unwrap_err().to_string();
            assert!(error.contains(expected), "{extra}: {error}");
        }
    }
}
