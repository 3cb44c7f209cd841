//! Checkpoints: tensors by the names Hugging Face gives them, from safetensors files or a GGUF file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use candle_coreml_mil::Source;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::gguf::{GgufFile, GgufTensor};

/// Values that are read at once where a tensor is streamed.
const PIECE_VALUES: usize = 1 << 20;

/// The tensors of a model; nothing is read before it is asked for.
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
    /// Little-endian elements from a place in a file on.
    File(Dtype, Arc<SharedFile>, u64),
    Gguf(Arc<GgufFile>, GgufTensor),
}

/// A file that several readers use in turn.
#[derive(Debug)]
pub(crate) struct SharedFile {
    name: String,
    file: Mutex<File>,
}

impl SharedFile {
    pub(crate) fn new(name: String, file: File) -> Self {
        SharedFile {
            name,
            file: Mutex::new(file),
        }
    }

    /// Uses the file, wherever its position is.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut File) -> T) -> T {
        // Every use seeks first: what a reader that panicked left behind does not matter.
        work(&mut self.file.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn read_at(&self, offset: u64, count: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        let read = self.with(|file| {
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(&mut bytes)
        });
        read.map_err(Error::io(Path::new(&self.name)))?;
        Ok(bytes)
    }
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
            read_header(&source, folder.as_ref(), &file, &mut tensors)?;
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

    /// The shape of the tensor `name`.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// Number of elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors
            .values()
            .map(|t| t.shape.iter().fold(1u64, |n, &d| n.saturating_mul(d as u64)))
            .fold(0, u64::saturating_add)
    }

    /// The tensor `name`, which has to have this shape, rounded to 16-bit floats.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another shape, holds no floats or a value beyond 65,504.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>> {
        self.read_rows(name, shape, 0..shape.first().copied().unwrap_or(1))
    }

    /// Rows of the tensor `name`, which has to have this shape: a range of its first dimension, as [`Checkpoint::read`].
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and when the tensor has fewer rows.
    pub fn read_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f16>> {
        let place = &self.find(name, shape)?.place;
        let first = rows.start.saturating_mul(row_values(shape));
        let values: Vec<f16> = match place {
            Place::File(Dtype::F16, file, offset) => {
                let bytes = elements(name, file, *offset, shape, rows, 2)?;
                let halves = bytes.as_chunks::<2>().0;
                halves.iter().map(|b| f16::from_le_bytes(*b)).collect()
            }
            place => {
                let values = read_f32(name, place, shape, rows)?;
                values.into_iter().map(f16::from_f32).collect()
            }
        };
        match values.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(Error::tensor(
                name,
                format!(
                    "element {} is beyond 65,504, the largest 16-bit float",
                    first + at
                ),
            )),
            None => Ok(values),
        }
    }

    /// The bytes of the tensor `name` as 16-bit floats, read a few rows at a time.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing or has another shape; values are checked while they are read.
    pub fn stream(&self, name: &str, shape: &[usize]) -> Result<TensorStream<'_>> {
        self.find(name, shape)?;
        Ok(TensorStream {
            checkpoint: self,
            name: name.to_owned(),
            shape: shape.to_vec(),
            row: 0,
            piece: io::Cursor::default(),
        })
    }

    /// The tensor `name`, which has to have this shape, as 32-bit floats.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another shape or holds no floats.
    pub fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let rows = 0..shape.first().copied().unwrap_or(1);
        read_f32(name, &self.find(name, shape)?.place, shape, rows)
    }

    /// Rows of the tensor `name`, which has to have this shape, as 32-bit floats.
    ///
    /// # Errors
    /// As [`Checkpoint::read_f32`], and when the tensor has fewer rows.
    pub fn read_rows_f32(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        read_f32(name, &self.find(name, shape)?.place, shape, rows)
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

/// The bytes of a tensor, made as they are read. Its errors name the tensor.
#[derive(Debug)]
pub struct TensorStream<'a> {
    checkpoint: &'a Checkpoint,
    name: String,
    shape: Vec<usize>,
    row: usize,
    piece: io::Cursor<Vec<u8>>,
}

impl Read for TensorStream<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let rows = self.shape.first().copied().unwrap_or(1);
        if self.piece.position() == self.piece.get_ref().len() as u64 && self.row < rows {
            let some = (PIECE_VALUES / row_values(&self.shape).max(1)).max(1);
            let until = rows.min(self.row + some);
            let read = self
                .checkpoint
                .read_rows(&self.name, &self.shape, self.row..until);
            let values = read.map_err(io::Error::other)?;
            self.row = until;
            self.piece = io::Cursor::new(crate::compress::f16_bytes(&values));
        }
        self.piece.read(out)
    }
}

/// Values of one row: the product of all dimensions but the first. A tensor without values may have any dimensions.
fn row_values(shape: &[usize]) -> usize {
    shape.iter().skip(1).fold(1, |n, &d| n.saturating_mul(d))
}

/// The bytes of rows of a tensor that lies in a file from `offset` on.
fn elements(
    name: &str,
    file: &SharedFile,
    offset: u64,
    shape: &[usize],
    rows: Range<usize>,
    size: usize,
) -> Result<Vec<u8>> {
    if rows.start > rows.end || rows.end > shape.first().copied().unwrap_or(1) {
        return Err(Error::tensor(
            name,
            format!("no rows {rows:?} in shape {shape:?}"),
        ));
    }
    // The header was checked against the length of the file, so products are too large for tensors without values only.
    let row = row_values(shape).saturating_mul(size);
    let start = offset.saturating_add(rows.start.saturating_mul(row) as u64);
    file.read_at(start, rows.len().saturating_mul(row))
}

fn read_f32(name: &str, place: &Place, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
    Ok(match place {
        Place::File(Dtype::F16, file, offset) => {
            let bytes = elements(name, file, *offset, shape, rows, 2)?;
            let halves = bytes.as_chunks::<2>().0;
            halves.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
        }
        Place::File(Dtype::BF16, file, offset) => {
            let bytes = elements(name, file, *offset, shape, rows, 2)?;
            let halves = bytes.as_chunks::<2>().0;
            halves.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
        }
        Place::File(Dtype::F32, file, offset) => {
            let bytes = elements(name, file, *offset, shape, rows, 4)?;
            let words = bytes.as_chunks::<4>().0;
            words.iter().map(|b| f32::from_le_bytes(*b)).collect()
        }
        Place::File(other, _, _) => {
            return Err(Error::tensor(name, format!("{other:?}, floats are needed")));
        }
        Place::Gguf(file, tensor) => file.read(tensor, rows)?,
    })
}

fn shards(index: &[u8], name: &str) -> Result<Vec<String>> {
    let json: serde_json::Value =
        serde_json::from_slice(index).map_err(|e| Error::malformed(name, e.to_string()))?;
    let map = json.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.ok_or_else(|| Error::malformed(name, "no object \"weight_map\""))?;
    let file = |(tensor, file): (&String, &serde_json::Value)| {
        let name_of_file = file.as_str().map(str::to_owned);
        name_of_file
            .ok_or_else(|| Error::malformed(name, format!("tensor {tensor:?} is in {file}, not in a file")))
    };
    let mut files = map.iter().map(file).collect::<Result<Vec<String>>>()?;
    files.sort_unstable();
    files.dedup();
    Ok(files)
}

/// Where the tensors of a file are. It is mapped for its header only, and read later.
fn read_header(
    source: &Source,
    folder: &Path,
    name: &str,
    tensors: &mut BTreeMap<String, Stored>,
) -> Result<()> {
    /// Bytes before the header: its length.
    const LENGTH_BYTES: usize = 8;
    let wrong = |e: safetensors::SafeTensorError| Error::malformed(name, e.to_string());
    let (header, metadata) = SafeTensors::read_metadata(&source.read(name)?).map_err(wrong)?;
    let path = folder.join(name);
    let file = File::open(&path).map_err(Error::io(&path))?;
    let file = Arc::new(SharedFile::new(path.display().to_string(), file));
    for (tensor, info) in metadata.tensors() {
        let offset = (LENGTH_BYTES + header + info.data_offsets.0) as u64;
        let stored = Stored {
            shape: info.shape.clone(),
            place: Place::File(info.dtype, Arc::clone(&file), offset),
        };
        if tensors.insert(tensor.clone(), stored).is_some() {
            return Err(Error::malformed(
                name,
                format!("tensor {tensor:?} is in two files"),
            ));
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

    #[test]
    fn streams_and_rows_give_what_the_whole_tensor_has() {
        let folder = tempfile::tempdir().unwrap();
        // More than one piece.
        let shape = [3000, 700];
        let value = |i: usize| ((i % 1013) as f32 - 500.0) / 64.0;
        let bytes: Vec<u8> = (0..3000 * 700).flat_map(|i| value(i).to_le_bytes()).collect();
        let tensor = TensorView::new(Dtype::F32, shape.to_vec(), &bytes).unwrap();
        let file = serialize([("x", tensor)], None).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let whole = checkpoint.read("x", &shape).unwrap();
        let mut streamed = Vec::new();
        checkpoint
            .stream("x", &shape)
            .unwrap()
            .read_to_end(&mut streamed)
            .unwrap();
        assert!(streamed == crate::compress::f16_bytes(&whole));
        let rows = checkpoint.read_rows("x", &shape, 5..7).unwrap();
        assert_eq!(rows, whole[5 * 700..7 * 700]);
        assert!(checkpoint.read_rows("x", &shape, 2999..3001).is_err());
    }
}
