//! What a decoder looks like, from `config.json` or the header of a GGUF file.

use serde_json::Value;

use crate::error::{Error, Result};

/// Families of decoders that are converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen 2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: norms on queries and keys.
    Qwen3,
    /// Gemma 3: norms around attention and MLP, local and global layers.
    Gemma3,
}

impl Family {
    /// The architecture word and the file prefix that ANEMLL uses.
    pub fn anemll_name(self) -> &'static str {
        match self {
            Family::Llama | Family::Mistral => "llama",
            Family::Qwen2 => "qwen2.5",
            Family::Qwen3 => "qwen3",
            Family::Gemma3 => "gemma3",
        }
    }

    /// Prefix of the package names.
    pub fn prefix(self) -> &'static str {
        match self {
            Family::Llama | Family::Mistral => "llama",
            Family::Qwen2 => "qwen25",
            Family::Qwen3 => "qwen",
            Family::Gemma3 => "gemma3",
        }
    }

    pub(crate) fn from_model_type(word: &str) -> Option<Family> {
        Some(match word {
            "llama" => Family::Llama,
            "mistral" | "mistral3" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "gemma3_text" | "gemma3" => Family::Gemma3,
            _ => return None,
        })
    }
}

/// How rotary frequencies are stretched for contexts longer than the model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by a factor.
    Linear(f64),
    /// Llama 3.1: low frequencies divided, high ones kept, those between blended.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than the old context by this are divided.
        low: f64,
        /// Wavelengths shorter than the old context by this are kept.
        high: f64,
        /// The context the model was first trained on.
        context: f64,
    },
}

impl RopeScaling {
    /// The frequency that takes the place of `f`.
    pub(crate) fn apply(self, f: f64) -> f64 {
        match self {
            RopeScaling::Linear(factor) => f / factor,
            RopeScaling::Llama3 {
                factor,
                low,
                high,
                context,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / f;
                if wavelength < context / high {
                    f
                } else if wavelength > context / low {
                    f / factor
                } else {
                    let smooth = (context / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            }
        }
    }
}

/// Sizes and switches of a decoder.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the words of the checkpoints' own configurations")]
pub struct DecoderConfig {
    pub family: Family,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocabulary: usize,
    pub max_positions: usize,
    pub rope_theta: f64,
    pub rope_scaling: Option<RopeScaling>,
    pub rms_eps: f32,
    pub tied: bool,
    /// Gemma 3: rotary base of the local layers.
    pub local_rope_theta: Option<f64>,
    /// Positions a local layer looks back.
    pub sliding_window: Option<usize>,
    /// One a layer: true for local ones. Empty where there are none.
    pub local_layers: Vec<bool>,
    /// Scores are multiplied by this.
    pub attention_scale: f32,
    /// Gemma: embeddings are multiplied by this.
    pub embedding_scale: Option<f32>,
    pub end_tokens: Vec<u32>,
}

/// No decoder or encoder is wider than this.
const WIDEST: usize = 1 << 20;

/// The keys of a configuration, checked as they are read.
pub(crate) struct Reader<'a> {
    pub(crate) file: &'a str,
    pub(crate) json: &'a Value,
}

impl Reader<'_> {
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn wrong(&self, key: &str, wanted: &str) -> Error {
        let found = self.get(key).map_or("nothing".to_owned(), Value::to_string);
        Error::malformed(self.file, format!("{key:?}: {found} found, {wanted} needed"))
    }

    pub(crate) fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize> {
        /// No decoder has a dimension beyond this; sizes are multiplied with each other later.
        const MOST: u64 = 1 << 24;
        match self.get(key) {
            None => default.ok_or_else(|| self.wrong(key, "a size")),
            Some(v) => match v.as_u64() {
                Some(n @ 1..=MOST) => usize::try_from(n).map_err(|_| self.wrong(key, "a size")),
                _ => Err(self.wrong(key, "a size from 1 to 16,777,216")),
            },
        }
    }

    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        self.size_or(key, None)
    }

    pub(crate) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => {
                let n = v.as_f64().filter(|n| n.is_finite() && *n > 0.0);
                n.ok_or_else(|| self.wrong(key, "a positive number"))
            }
        }
    }

    /// Refuses sizes whose products would be too large to count with.
    pub(crate) fn check_sizes(&self, layers: usize, hidden: usize, intermediate: usize) -> Result<()> {
        const MOST_LAYERS: usize = 1 << 12;
        for (what, size, most) in [
            ("num_hidden_layers", layers, MOST_LAYERS),
            ("hidden_size", hidden, WIDEST),
            ("intermediate_size", intermediate, WIDEST),
        ] {
            if size > most {
                return Err(self.too_large(what, size, most));
            }
        }
        Ok(())
    }

    fn too_large(&self, what: &str, size: usize, most: usize) -> Error {
        Error::malformed(self.file, format!("{what} is {size}; {most} at most is allowed"))
    }

    pub(crate) fn flag(&self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(false)
    }
}

impl DecoderConfig {
    /// Reads the text of a `config.json`; `file` is used in errors.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the key that is wrong, [`Error::Unsupported`] for what is not converted.
    pub fn parse(file: &str, text: &[u8]) -> Result<Self> {
        let json: Value = serde_json::from_slice(text).map_err(|e| Error::malformed(file, e.to_string()))?;
        let unsupported = |what: String| Error::Unsupported {
            file: file.to_owned(),
            what,
        };
        let word = json.get("model_type").and_then(Value::as_str).unwrap_or("");
        let family = Family::from_model_type(word).ok_or_else(|| {
            unsupported(format!(
                "model_type {word:?}; supported: llama, mistral, qwen2, qwen3, gemma3_text"
            ))
        })?;
        let json = match json.get("text_config") {
            Some(text) if family == Family::Gemma3 => text,
            _ => &json,
        };
        let config = Reader { file, json };
        for (key, plain) in [("hidden_act", "silu"), ("hidden_activation", "gelu_pytorch_tanh")] {
            let found = config.get(key).and_then(Value::as_str).unwrap_or(plain);
            if found != plain && (family == Family::Gemma3) == (key == "hidden_activation") {
                return Err(unsupported(format!("{key} {found:?}; supported: {plain:?}")));
            }
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if config.get(key).is_some() {
                return Err(unsupported(format!(
                    "{key}; supported: logits without a soft cap"
                )));
            }
        }
        for (key, what) in [
            ("quantization_config", "checkpoints of floats or GGUF"),
            ("num_local_experts", "dense MLPs"),
        ] {
            if config.get(key).is_some() {
                return Err(unsupported(format!("{key}; supported: {what}")));
            }
        }
        Self::read(&config, family)
    }

    fn read(config: &Reader<'_>, family: Family) -> Result<Self> {
        let gemma = family == Family::Gemma3;
        let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
        let layers = config.size("num_hidden_layers")?;
        let head_dim = config.size_or("head_dim", (hidden % heads == 0).then_some(hidden / heads))?;
        let kv_heads = config.size_or("num_key_value_heads", Some(heads))?;
        let intermediate = config.size("intermediate_size")?;
        config.check_sizes(layers, hidden, intermediate)?;
        let width = heads.saturating_mul(head_dim);
        if width > WIDEST {
            return Err(config.too_large("num_attention_heads times head_dim", width, WIDEST));
        }
        if heads % kv_heads != 0 || head_dim % 2 != 0 {
            return Err(Error::malformed(
                config.file,
                format!(
                    "{heads} heads of {head_dim} do not fit {kv_heads} key/value heads, or the head is odd"
                ),
            ));
        }
        let query_scale = config.number_or("query_pre_attn_scalar", head_dim as f64)?;
        let sliding = config.get("sliding_window").is_some()
            && (family == Family::Mistral || gemma || config.flag("use_sliding_window"));
        Ok(DecoderConfig {
            family,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            intermediate,
            vocabulary: config.size("vocab_size")?,
            max_positions: config.size_or("max_position_embeddings", Some(2048))?,
            rope_theta: rope_theta(config, if gemma { 1e6 } else { 1e4 })?,
            rope_scaling: rope_scaling(config)?,
            rms_eps: config.number_or("rms_norm_eps", 1e-6)? as f32,
            tied: config
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(gemma),
            local_rope_theta: if gemma {
                Some(local_rope_theta(config)?)
            } else {
                None
            },
            sliding_window: if sliding {
                Some(config.size("sliding_window")?)
            } else {
                None
            },
            local_layers: if sliding || gemma {
                local_layers(config, family, layers)?
            } else {
                Vec::new()
            },
            attention_scale: (1.0 / query_scale.sqrt()) as f32,
            embedding_scale: gemma.then(|| (hidden as f64).sqrt() as f32),
            end_tokens: end_tokens(config),
        })
    }

    /// Inverse rotary frequencies, `head_dim / 2` of them; `local` for Gemma's local layers.
    pub fn rope_frequencies(&self, local: bool) -> Vec<f64> {
        let theta = self.local_rope_theta.filter(|_| local).unwrap_or(self.rope_theta);
        let plain = |i: usize| theta.powf(-2.0 * i as f64 / self.head_dim as f64);
        let other = local && self.local_rope_theta.is_some();
        let scaling = self.rope_scaling.filter(|_| !other);
        let scaled = |f: f64| scaling.map_or(f, |s| s.apply(f));
        (0..self.head_dim / 2).map(|i| scaled(plain(i))).collect()
    }

    /// The window of a layer that does not look at all of `context` positions.
    pub fn window(&self, layer: usize, context: usize) -> Option<usize> {
        self.sliding_window
            .filter(|&window| self.is_local(layer) && window < context)
    }

    /// True for layers that look at the sliding window only.
    pub fn is_local(&self, layer: usize) -> bool {
        self.local_layers.get(layer).copied().unwrap_or(false)
    }
}

/// Rotary parameters as transformers 5 writes them: one set, or one for each kind of layer; nothing in older files.
fn rope_parameters<'a>(config: &Reader<'a>, kind: &str) -> Option<Reader<'a>> {
    let all = config.json.get("rope_parameters").filter(|v| v.is_object())?;
    Some(Reader {
        file: config.file,
        json: all.get(kind).filter(|v| v.is_object()).unwrap_or(all),
    })
}

fn rope_theta(config: &Reader<'_>, default: f64) -> Result<f64> {
    match rope_parameters(config, "full_attention") {
        Some(parameters) if parameters.get("rope_theta").is_some() => {
            parameters.number_or("rope_theta", default)
        }
        _ => config.number_or("rope_theta", default),
    }
}

fn local_rope_theta(config: &Reader<'_>) -> Result<f64> {
    match rope_parameters(config, "sliding_attention") {
        Some(parameters) => parameters.number_or("rope_theta", 1e4),
        None => config.number_or("rope_local_base_freq", 1e4),
    }
}

fn rope_scaling(config: &Reader<'_>) -> Result<Option<RopeScaling>> {
    let old = config.get("rope_scaling").map(|json| Reader {
        file: config.file,
        json,
    });
    let Some(scaling) = old.or_else(|| rope_parameters(config, "full_attention")) else {
        return Ok(None);
    };
    let kind = scaling
        .get("rope_type")
        .or_else(|| scaling.get("type"))
        .and_then(Value::as_str);
    match kind.unwrap_or("default") {
        "default" => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear(scaling.number_or("factor", 1.0)?))),
        "llama3" => Ok(Some(RopeScaling::Llama3 {
            factor: scaling.number_or("factor", 8.0)?,
            low: scaling.number_or("low_freq_factor", 1.0)?,
            high: scaling.number_or("high_freq_factor", 4.0)?,
            context: scaling.number_or("original_max_position_embeddings", 8192.0)?,
        })),
        other => Err(Error::Unsupported {
            file: config.file.to_owned(),
            what: format!("rope scaling {other:?}; supported: default, linear, llama3"),
        }),
    }
}

/// The layers that look at the sliding window only.
fn local_layers(config: &Reader<'_>, family: Family, layers: usize) -> Result<Vec<bool>> {
    if let Some(types) = config.get("layer_types").and_then(Value::as_array) {
        if types.len() != layers {
            return Err(config.wrong("layer_types", "one entry a layer"));
        }
        return Ok(types.iter().map(|t| t == "sliding_attention").collect());
    }
    match family {
        Family::Gemma3 => {
            let every = config.size_or("sliding_window_pattern", Some(6))?;
            Ok((1..=layers).map(|layer| layer % every != 0).collect())
        }
        Family::Qwen2 | Family::Qwen3 => {
            let from = config
                .get("max_window_layers")
                .and_then(Value::as_u64)
                .unwrap_or(28);
            Ok((0..layers as u64).map(|layer| layer >= from).collect())
        }
        Family::Llama | Family::Mistral => Ok(vec![true; layers]),
    }
}

fn end_tokens(config: &Reader<'_>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotary_parameters_may_differ_by_the_kind_of_layer() {
        let gemma = parse(
            r#""model_type": "gemma3_text", "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}"#,
        )
        .unwrap();
        assert_eq!((gemma.rope_theta, gemma.local_rope_theta), (2e6, Some(5e3)));
        assert_eq!(gemma.rope_scaling, Some(RopeScaling::Linear(8.0)));
        assert_eq!(gemma.rope_frequencies(true)[0], 1.0);
        assert_eq!(gemma.rope_frequencies(false)[0], 0.125);
    }

    #[test]
    fn windows_belong_to_the_layers_that_have_them() {
        let mistral = parse(r#""model_type": "mistral", "sliding_window": 8"#).unwrap();
        assert_eq!((mistral.window(0, 9), mistral.window(6, 8)), (Some(8), None));
        let qwen = r#""model_type": "qwen2", "sliding_window": 8, "max_window_layers": 5"#;
        let plain = parse(&format!(r#"{qwen}, "use_sliding_window": false"#)).unwrap();
        assert_eq!(plain.window(6, 64), None);
        let some = parse(&format!(r#"{qwen}, "use_sliding_window": true"#)).unwrap();
        assert_eq!((some.window(4, 64), some.window(5, 64)), (None, Some(8)));
    }

    const BASE: &str = r#""hidden_size": 64, "num_hidden_layers": 7, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 100"#;

    fn parse(extra: &str) -> Result<DecoderConfig> {
        DecoderConfig::parse("config.json", format!("{{{BASE}, {extra}}}").as_bytes())
    }

    #[test]
    fn families_fill_in_their_own_defaults() {
        let llama =
            parse(r#""model_type": "llama", "num_key_value_heads": 2, "eos_token_id": [2, 5]"#).unwrap();
        assert_eq!((llama.head_dim, llama.kv_heads, llama.tied), (16, 2, false));
        assert_eq!((llama.attention_scale, llama.end_tokens), (0.25, vec![2, 5]));
        let gemma =
            parse(r#""model_type": "gemma3_text", "query_pre_attn_scalar": 256, "sliding_window": 8"#)
                .unwrap();
        assert_eq!(
            (gemma.tied, gemma.embedding_scale, gemma.attention_scale),
            (true, Some(8.0), 0.0625)
        );
        assert_eq!(gemma.local_layers, [true, true, true, true, true, false, true]);
        assert_eq!(gemma.rope_frequencies(true)[1], 1e4f64.powf(-1.0 / 8.0));
    }

    #[test]
    fn what_is_not_converted_is_refused_by_name() {
        for (extra, expected) in [
            (r#""model_type": "gpt2""#, "model_type \"gpt2\""),
            (
                r#""model_type": "llama", "rope_scaling": {"type": "yarn"}"#,
                "rope scaling \"yarn\"",
            ),
            (
                r#""model_type": "llama", "hidden_act": "gelu""#,
                "hidden_act \"gelu\"",
            ),
            (
                r#""model_type": "gemma3_text", "final_logit_softcapping": 30"#,
                "final_logit_softcapping",
            ),
            (r#""model_type": "llama", "head_dim": 0"#, "\"head_dim\": 0 found"),
            (r#""model_type": "llama", "num_key_value_heads": 3"#, "4 heads"),
            (r#""model_type": "llama", "rope_theta": "x""#, "\"rope_theta\""),
        ] {
            let error = parse(extra).unwrap_err().to_string();
            assert!(
                error.contains(expected) && error.starts_with("config.json"),
                "{extra}: {error}"
            );
        }
    }

    #[test]
    fn llama_3_scaling_divides_low_frequencies_only() {
        let config = parse(
            r#""model_type": "llama", "rope_theta": 500000, "head_dim": 64, "rope_scaling": {"rope_type": "llama3",
            "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}"#,
        )
        .unwrap();
        let plain = |i: usize| 500000f64.powf(-2.0 * i as f64 / 64.0);
        let found = config.rope_frequencies(false);
        assert_eq!((found[0], found[31]), (1.0, plain(31) / 32.0));
        assert!(found[16] < plain(16) && found[16] > plain(16) / 32.0);
    }
}
