//! Checkpoints: tensors by the names Hugging Face gives them, from safetensors files or a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use candle_coreml_mil::Source;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, GgufTensor};

/// The tensors of a model, mapped from its files; nothing is read before it is asked for.
#[derive(Debug)]
pub struct Checkpoint {
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug)]
struct Stored {
    shape: Vec<usize>,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Bytes(Dtype, Bytes),
    Gguf(Arc<GgufFile>, GgufTensor),
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards `model.safetensors.index.json` names, in `folder`.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the file that is not what it should be, [`Error::Mil`] for files that cannot be read.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        const SINGLE: &str = "model.safetensors";
        const INDEX: &str = "model.safetensors.index.json";
        let source = Source::directory(folder.as_ref());
        let files = if source.contains(INDEX) {
            shards(&source.read(INDEX)?, INDEX)?
        } else {
            vec![SINGLE.to_owned()]
        };
        let mut tensors = BTreeMap::new();
        for file in files {
            let bytes = source.read(&file)?;
            read_file(&file, &bytes, &mut tensors)?;
        }
        Ok(Checkpoint { tensors })
    }

    /// The tensors of a GGUF file under the names of Hugging Face.
    pub(crate) fn from_gguf(file: &Arc<GgufFile>) -> Result<Self> {
        let stored = |tensor: GgufTensor| {
            let shape = tensor.shape.clone();
            (
                tensor.name.clone(),
                Stored {
                    shape,
                    place: Place::Gguf(Arc::clone(file), tensor),
                },
            )
        };
        Ok(Checkpoint {
            tensors: file.tensors()?.into_iter().map(stored).collect(),
        })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// True when there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Number of elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors
            .values()
            .map(|t| t.shape.iter().map(|&d| d as u64).product::<u64>())
            .sum()
    }

    /// The tensor `name`, which has to have this shape, rounded to 16-bit floats.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another shape, holds no floats or a value beyond 65,504.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>> {
        let values: Vec<f16> = match &self.find(name, shape)?.place {
            Place::Bytes(Dtype::F16, b) => b
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b))
                .collect(),
            place => read_f32(name, place)?.into_iter().map(f16::from_f32).collect(),
        };
        match values.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(Error::tensor(
                name,
                format!("element {at} is beyond 65,504, the largest 16-bit float"),
            )),
            None => Ok(values),
        }
    }

    /// The tensor `name`, which has to have this shape, as 32-bit floats.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another shape or holds no floats.
    pub fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        read_f32(name, &self.find(name, shape)?.place)
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<&Stored> {
        let stored = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::tensor(name, "not in the checkpoint"))?;
        if stored.shape != shape {
            return Err(Error::tensor(
                name,
                format!("shape {:?}, {shape:?} is needed", stored.shape),
            ));
        }
        Ok(stored)
    }
}

fn read_f32(name: &str, place: &Place) -> Result<Vec<f32>> {
    Ok(match place {
        Place::Bytes(Dtype::F16, b) => b
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        Place::Bytes(Dtype::BF16, b) => b
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| bf16::from_le_bytes(*b).to_f32())
            .collect(),
        Place::Bytes(Dtype::F32, b) => b
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Place::Bytes(other, _) => return Err(Error::tensor(name, format!("{other:?}, floats are needed"))),
        Place::Gguf(file, tensor) => file.read(tensor)?,
    })
}

fn shards(index: &[u8], name: &str) -> Result<Vec<String>> {
    let json: serde_json::Value =
        serde_json::from_slice(index).map_err(|e| Error::malformed(name, e.to_string()))?;
    let map = json.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.ok_or_else(|| Error::malformed(name, "no object \"weight_map\""))?;
    let mut files: Vec<String> = map
        .values()
        .filter_map(|v| v.as_str())
        .map(str::to_owned)
        .collect();
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

fn read_file(file: &str, bytes: &Bytes, tensors: &mut BTreeMap<String, Stored>) -> Result<()> {
    let wrong = |e: safetensors::SafeTensorError| Error::malformed(file, e.to_string());
    let parsed = SafeTensors::deserialize(bytes).map_err(wrong)?;
    for (name, view) in parsed.iter() {
        let stored = Stored {
            shape: view.shape().to_vec(),
            place: Place::Bytes(view.dtype(), bytes.slice_ref(view.data())),
        };
        if tensors.insert(name.to_owned(), stored).is_some() {
            return Err(Error::malformed(file, format!("tensor {name:?} is in two files")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::{TensorView, serialize};

    fn view(dtype: Dtype, shape: &[usize], data: &'static [u8]) -> TensorView<'static> {
        TensorView::new(dtype, shape.to_vec(), data).unwrap()
    }

    #[test]
    fn shards_are_one_checkpoint_and_every_float_type_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let first = [
            ("half", view(Dtype::F16, &[2], &[0, 0x3c, 0, 0xc0])),
            ("brain", view(Dtype::BF16, &[1], &[0x80, 0x3f])),
        ];
        let second = [
            ("full", view(Dtype::F32, &[1], &[0, 0, 0x80, 0x3f])),
            ("large", view(Dtype::F32, &[1], &[0, 0, 0x80, 0x7e])),
            ("whole", view(Dtype::I32, &[1], &[0; 4])),
        ];
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        write("a.safetensors", &serialize(first, None).unwrap());
        write("b.safetensors", &serialize(second, None).unwrap());
        let index = br#"{"weight_map": {"half": "a.safetensors", "brain": "a.safetensors", "full": "b.safetensors"}}"#;
        write("model.safetensors.index.json", index);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(
            checkpoint.read("half", &[2]).unwrap(),
            [1.0, -2.0].map(f16::from_f32)
        );
        assert_eq!(checkpoint.read("brain", &[1]).unwrap(), [f16::ONE]);
        assert_eq!(checkpoint.read_f32("full", &[1]).unwrap(), [1.0]);
        assert_eq!((checkpoint.parameters(), checkpoint.names().count()), (6, 5));
        for (name, shape, expected) in [
            ("large", 1, "beyond 65,504"),
            ("whole", 1, "floats are needed"),
            ("half", 3, "shape [2], [3] is needed"),
            ("none", 1, "not in the checkpoint"),
        ] {
            let error = checkpoint.read(name, &[shape]).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(name), "{error}");
        }
    }
}
