//! GGUF files: configuration, tokenizer and tensors in the words of Hugging Face.

mod tokenizer;

use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use serde_json::{Map, json};

use crate::config::RopeScaling;
use crate::error::{Error, Result};
use crate::weights::SharedFile;

/// The tensor with one divisor for each rotary frequency.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// An opened GGUF file; tensors stay in the mapped file until they are read.
pub(crate) struct GgufFile {
    name: String,
    file: SharedFile,
    content: Content,
}

impl std::fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} tensors)", self.name, self.content.tensor_infos.len())
    }
}

/// A tensor of the file and what has to be undone to get the original.
#[derive(Debug, Clone)]
pub(crate) struct GgufTensor {
    /// The name Hugging Face gives it.
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    stored: String,
    undo: Undo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Undo {
    Nothing,
    /// llama.cpp orders the rows of each head's query and key by pairs; the number of heads.
    Pairs(usize),
    /// llama.cpp adds 1 to Gemma's norms.
    One,
}

impl GgufFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(Error::io(path))?;
        let mut reader = BufReader::new(file);
        let content = Content::read(&mut reader).map_err(|e| Error::malformed(&name, e.to_string()))?;
        let file = reader.into_inner();
        let length = file.metadata().map_err(Error::io(path))?.len();
        for (tensor, info) in &content.tensor_infos {
            if !fits(info, length.saturating_sub(content.tensor_data_offset)) {
                return Err(Error::malformed(
                    &name,
                    format!(
                        "tensor {tensor:?}: {:?} of shape {:?} at {} is not in the {length} bytes of the file",
                        info.ggml_dtype, info.shape, info.offset
                    ),
                ));
            }
        }
        let file = SharedFile::new(name.clone(), file);
        Ok(GgufFile { name, file, content })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn architecture(&self) -> Result<&str> {
        self.text("general.architecture")
            .ok_or_else(|| self.missing("general.architecture"))
    }

    fn missing(&self, key: &str) -> Error {
        Error::malformed(
            &self.name,
            format!("metadata {key:?} is missing or of another type"),
        )
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.to_string().ok().map(String::as_str)
    }

    fn number(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::I32(n) => u64::try_from(*n).ok(),
            Value::I64(n) => u64::try_from(*n).ok(),
            Value::U16(n) => Some(u64::from(*n)),
            other => other.to_u64().ok(),
        }
    }

    fn float(&self, key: &str) -> Option<f64> {
        let value = self.get(key)?;
        value.to_f32().map(f64::from).or_else(|_| value.to_f64()).ok()
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.get(key)?.to_bool().ok()
    }

    fn floats(&self, key: &str) -> Option<Vec<f32>> {
        let list = self.get(key)?.to_vec().ok()?;
        list.iter().map(|v| v.to_f32().ok()).collect()
    }

    fn strings(&self, key: &str) -> Option<Vec<&str>> {
        let list = self.get(key)?.to_vec().ok()?;
        list.iter()
            .map(|v| v.to_string().ok().map(String::as_str))
            .collect()
    }

    /// The text of the `config.json` this file stands for.
    pub(crate) fn config(&self) -> Result<String> {
        let arch = self.architecture()?;
        let model_type = match arch {
            "gemma3" => "gemma3_text",
            other => other,
        };
        let key = |name: &str| format!("{arch}.{name}");
        let size = |name: &str| self.number(&key(name)).ok_or_else(|| self.missing(&key(name)));
        let mut config = Map::new();
        config.insert("model_type".into(), model_type.into());
        for (to, from) in [
            ("hidden_size", "embedding_length"),
            ("num_hidden_layers", "block_count"),
            ("num_attention_heads", "attention.head_count"),
            ("intermediate_size", "feed_forward_length"),
            ("max_position_embeddings", "context_length"),
        ] {
            config.insert(to.into(), size(from)?.into());
        }
        for (to, from) in [
            ("num_key_value_heads", "attention.head_count_kv"),
            ("head_dim", "attention.key_length"),
            ("sliding_window", "attention.sliding_window"),
        ] {
            if let Some(n) = self.number(&key(from)) {
                config.insert(to.into(), n.into());
            }
        }
        for (to, from) in [
            ("rope_theta", "rope.freq_base"),
            ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        ] {
            if let Some(x) = self.float(&key(from)) {
                config.insert(to.into(), x.into());
            }
        }
        match self.text(&key("rope.scaling.type")) {
            None | Some("none") => {}
            Some(kind) => {
                let factor = self.float(&key("rope.scaling.factor")).unwrap_or(1.0);
                config.insert(
                    "rope_scaling".into(),
                    json!({ "rope_type": kind, "factor": factor }),
                );
            }
        }
        if self.content.tensor_infos.contains_key(ROPE_FACTORS) {
            let theta = self.float(&key("rope.freq_base")).unwrap_or(1e4);
            config.insert("rope_scaling".into(), self.llama3_scaling(theta)?);
        }
        let vocabulary = self
            .strings("tokenizer.ggml.tokens")
            .ok_or_else(|| self.missing("tokenizer.ggml.tokens"))?;
        config.insert("vocab_size".into(), vocabulary.len().into());
        config.insert(
            "tie_word_embeddings".into(),
            (!self.content.tensor_infos.contains_key("output.weight")).into(),
        );
        for (to, from) in [
            ("bos_token_id", "tokenizer.ggml.bos_token_id"),
            ("eos_token_id", "tokenizer.ggml.eos_token_id"),
        ] {
            if let Some(n) = self.number(from) {
                config.insert(to.into(), n.into());
            }
        }
        Ok(format!("{:#}\n", serde_json::Value::Object(config)))
    }

    /// The scaling of Llama 3.1 and later, which comes as one divisor for each frequency here.
    fn llama3_scaling(&self, theta: f64) -> Result<serde_json::Value> {
        let info = self.content.tensor_infos.get(ROPE_FACTORS);
        let tensor = GgufTensor {
            name: ROPE_FACTORS.to_owned(),
            shape: info.map(|i| i.shape.dims().to_vec()).unwrap_or_default(),
            stored: ROPE_FACTORS.to_owned(),
            undo: Undo::Nothing,
        };
        let count = tensor.shape.first().copied().unwrap_or(0);
        let factors = self.read(&tensor, 0..count)?;
        let factor = f64::from(factors.iter().fold(1f32, |m, &v| m.max(v)));
        let scaling = RopeScaling::Llama3 {
            factor,
            low: 1.0,
            high: 4.0,
            context: 8192.0,
        };
        let plain = |i: usize| theta.powf(-(i as f64) / count as f64);
        let same = |(i, &stored): (usize, &f32)| {
            let expected = plain(i) / scaling.apply(plain(i));
            (expected - f64::from(stored)).abs() <= 1e-3 * expected
        };
        if !factors.iter().enumerate().all(same) {
            return Err(Error::Unsupported {
                file: self.name.clone(),
                what: format!("the factors of {ROPE_FACTORS}; those of Llama 3.1 and later are supported"),
            });
        }
        Ok(json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }))
    }

    /// All tensors that a decoder has.
    pub(crate) fn tensors(&self) -> Result<Vec<GgufTensor>> {
        let arch = self.architecture()?;
        let heads = |key: &str| {
            self.number(&format!("{arch}.{key}"))
                .and_then(|n| usize::try_from(n).ok())
        };
        let query = heads("attention.head_count").unwrap_or(1);
        let key = heads("attention.head_count_kv").unwrap_or(query);
        let mut tensors = Vec::new();
        for (stored, info) in &self.content.tensor_infos {
            let Some(name) = hugging_face_name(stored, arch) else {
                continue;
            };
            let undo = match () {
                () if arch == "llama" && stored.contains(".attn_q.") => Undo::Pairs(query),
                () if arch == "llama" && stored.contains(".attn_k.") => Undo::Pairs(key),
                () if arch == "gemma3" && stored.ends_with("norm.weight") => Undo::One,
                () => Undo::Nothing,
            };
            let shape = info.shape.dims().to_vec();
            tensors.push(GgufTensor {
                name,
                shape,
                stored: stored.clone(),
                undo,
            });
        }
        Ok(tensors)
    }

    /// Rows of a tensor as 32-bit floats.
    pub(crate) fn read(&self, tensor: &GgufTensor, rows: Range<usize>) -> Result<Vec<f32>> {
        let all = tensor.shape.first().copied().unwrap_or(1);
        if rows.start > rows.end || rows.end > all {
            return Err(Error::tensor(
                &tensor.stored,
                format!("no rows {rows:?} of {all}"),
            ));
        }
        match tensor.undo {
            Undo::Nothing => self.rows(tensor, rows),
            Undo::One => Ok(self.rows(tensor, rows)?.into_iter().map(|v| v - 1.0).collect()),
            Undo::Pairs(heads) => {
                if heads == 0 || all % (2 * heads) != 0 {
                    return Err(Error::tensor(
                        &tensor.stored,
                        format!("{all} rows are not {heads} heads of pairs"),
                    ));
                }
                let values = without_pairs(&self.rows(tensor, 0..all)?, all, heads);
                let row = values.len() / all;
                Ok(values[rows.start * row..rows.end * row].to_vec())
            }
        }
    }

    /// Rows as they are stored, widened.
    fn rows(&self, tensor: &GgufTensor, rows: Range<usize>) -> Result<Vec<f32>> {
        let wrong = |e: candle_core::Error| Error::tensor(&tensor.stored, e.to_string());
        let info = self.content.tensor_infos.get(&tensor.stored);
        let info = info.ok_or_else(|| Error::tensor(&tensor.stored, "not in the file"))?;
        let (block, size) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        let row: usize = tensor.shape.iter().skip(1).product();
        // A row is whole blocks, or the tensor is read whole: vectors.
        let (shape, skip, take) = if row.is_multiple_of(block) {
            let mut shape = tensor.shape.clone();
            if let Some(first) = shape.first_mut() {
                *first = rows.len();
            }
            (shape, rows.start * (row / block) * size, 0..rows.len() * row)
        } else {
            (tensor.shape.clone(), 0, rows.start * row..rows.end * row)
        };
        let part = TensorInfo {
            ggml_dtype: info.ggml_dtype,
            shape: shape.into(),
            offset: info.offset + skip as u64,
        };
        let read = |file: &mut File| part.read(file, self.content.tensor_data_offset, &Device::Cpu);
        let dense = self.file.with(read).and_then(|t| t.dequantize(&Device::Cpu));
        let values = dense
            .and_then(|t| t.flatten_all()?.to_vec1::<f32>())
            .map_err(wrong)?;
        Ok(values.get(take).unwrap_or_default().to_vec())
    }

    /// `tokenizer.json` and `tokenizer_config.json`.
    pub(crate) fn tokenizer_files(&self) -> Result<[(&'static str, String); 2]> {
        tokenizer::files(self)
    }
}

/// True when the tensor has values, whole blocks of them, and ends within `room` bytes.
fn fits(info: &TensorInfo, room: u64) -> bool {
    let values = info
        .shape
        .dims()
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d));
    let blocks = values.filter(|n| n.is_multiple_of(info.ggml_dtype.block_size()));
    let end = blocks
        .and_then(|n| (n / info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size()))
        .and_then(|bytes| info.offset.checked_add(bytes as u64));
    values.is_some_and(|n| n > 0) && end.is_some_and(|end| end <= room)
}

/// Row `(head, half, i)` of the original is row `(head, i, half)` of the file.
fn without_pairs(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (width, half) = (values.len() / rows, rows / heads / 2);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for side in 0..2 {
            for i in 0..half {
                let row = (head * half + i) * 2 + side;
                out.extend_from_slice(&values[row * width..(row + 1) * width]);
            }
        }
    }
    out
}

fn hugging_face_name(stored: &str, arch: &str) -> Option<String> {
    let whole = match stored {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output.weight" => Some("lm_head.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        _ => None,
    };
    if let Some(name) = whole {
        return Some(name.to_owned());
    }
    let (layer, part) = stored.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = part.rsplit_once('.')?;
    let gemma = arch == "gemma3";
    let part = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_norm" if gemma => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_attention_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{part}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};

    fn open(metadata: &[(&str, Value)], tensors: &[(&str, QTensor)]) -> GgufFile {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
        gguf_file::write(&mut File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        GgufFile::open(&path).unwrap()
    }

    fn wave(shape: &[usize]) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn rows_of_every_quantisation_are_those_of_the_whole_tensor() {
        use GgmlDType::*;
        for dtype in [
            F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K,
        ] {
            let stored = QTensor::quantize(&wave(&[6, 512]), dtype).unwrap();
            let whole = stored.dequantize(&Device::Cpu).unwrap();
            let whole: Vec<f32> = whole.flatten_all().unwrap().to_vec1().unwrap();
            let file = open(
                &[("general.architecture", Value::String("qwen2".into()))],
                &[("blk.0.ffn_up.weight", stored)],
            );
            let tensor = file.tensors().unwrap().remove(0);
            assert_eq!(tensor.name, "model.layers.0.mlp.up_proj.weight");
            assert_eq!(file.read(&tensor, 0..6).unwrap(), whole, "{dtype:?}");
            assert_eq!(
                file.read(&tensor, 2..4).unwrap(),
                whole[2 * 512..4 * 512],
                "{dtype:?}"
            );
            assert!(file.read(&tensor, 5..7).is_err());
        }
    }

    #[test]
    fn the_factors_of_llama_3_become_its_scaling_and_others_are_refused() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low: 1.0,
            high: 4.0,
            context: 8192.0,
        };
        let plain = |i: usize| 500_000f64.powf(-(i as f64) / 32.0);
        let factors: Vec<f32> = (0..32)
            .map(|i| (plain(i) / scaling.apply(plain(i))) as f32)
            .collect();
        let file = |factors: Vec<f32>| {
            let tensor = Tensor::from_vec(factors, 32, &Device::Cpu).unwrap();
            let stored = QTensor::quantize(&tensor, GgmlDType::F32).unwrap();
            open(&[], &[(ROPE_FACTORS, stored)])
        };
        let found = file(factors.clone()).llama3_scaling(500_000.0).unwrap();
        assert_eq!(
            (found["rope_type"].as_str(), found["factor"].as_f64()),
            (Some("llama3"), Some(32.0))
        );
        let mut other = factors;
        other[3] = 2.0;
        let error = file(other).llama3_scaling(500_000.0).unwrap_err().to_string();
        assert!(error.contains("the factors of rope_freqs.weight"), "{error}");
    }

    #[test]
    fn pairs_go_back_to_halves() {
        // Two heads of four rows, one column: the file has (0, 2, 1, 3) where the original has (0, 1, 2, 3).
        let file = [0.0, 2.0, 1.0, 3.0, 10.0, 12.0, 11.0, 13.0];
        assert_eq!(
            without_pairs(&file, 8, 2),
            [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]
        );
    }

    #[test]
    fn names_are_those_of_the_original() {
        for (stored, arch, expected) in [
            (
                "blk.3.attn_q.bias",
                "qwen2",
                Some("model.layers.3.self_attn.q_proj.bias"),
            ),
            (
                "blk.0.ffn_norm.weight",
                "llama",
                Some("model.layers.0.post_attention_layernorm.weight"),
            ),
            (
                "blk.0.ffn_norm.weight",
                "gemma3",
                Some("model.layers.0.pre_feedforward_layernorm.weight"),
            ),
            ("output.weight", "llama", Some("lm_head.weight")),
            ("rope_freqs.weight", "llama", None),
        ] {
            assert_eq!(hugging_face_name(stored, arch).as_deref(), expected, "{stored}");
        }
    }
}
