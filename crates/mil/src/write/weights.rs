//! `weight.bin`: blobs behind their records, written as they come, equal ones once.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::io;
use crate::blob::{RECORD_BYTES, SENTINEL, VERSION, dtype_code, padding_bits};
use crate::error::{Result, problem};
use crate::program::TensorType;

const PIECE_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct WeightWriter {
    path: PathBuf,
    file: File,
    /// End of the last blob's data.
    end: u64,
    blobs: Vec<Blob>,
    /// Blobs by the hash of their type and data.
    by_hash: HashMap<u64, Vec<usize>>,
    piece: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Blob {
    code: u32,
    record: u64,
    data: u64,
    size: u64,
}

impl WeightWriter {
    pub(super) fn create(path: &Path) -> Result<WeightWriter> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(io(path))?;
        Ok(WeightWriter {
            path: path.to_path_buf(),
            file,
            end: RECORD_BYTES as u64,
            blobs: Vec::new(),
            by_hash: HashMap::new(),
            piece: vec![0; PIECE_BYTES],
        })
    }

    /// True when the record of a blob is at that offset.
    pub(super) fn holds(&self, offset: u64) -> bool {
        self.blobs.binary_search_by_key(&offset, |b| b.record).is_ok()
    }

    /// Appends a blob, or finds its equal, and gives the offset of its record.
    pub(super) fn write(&mut self, ty: &TensorType, source: &mut impl Read) -> Result<u64> {
        let name = self.path.display().to_string();
        let code = dtype_code(ty.dtype).ok_or_else(|| {
            problem!("weight files cannot hold {}, only the program can", ty.dtype).in_file(&name)
        })?;
        let size = ty
            .byte_len()
            .ok_or_else(|| problem!("{ty} has no fixed size").in_file(&name))? as u64;
        let record = self.end.next_multiple_of(RECORD_BYTES as u64);
        let blob = Blob {
            code,
            record,
            data: record + RECORD_BYTES as u64,
            size,
        };
        let hash = self.copy(&blob, source)?.ok_or_else(|| {
            problem!("the weight has another number of bytes than the {size} of {ty}").in_file(&name)
        })?;
        if let Some(equal) = self.find_equal(hash, &blob)? {
            return Ok(equal.record);
        }
        self.write_at(record, &record_bytes(&blob, ty))?;
        self.end = blob.data + size;
        self.by_hash.entry(hash).or_default().push(self.blobs.len());
        self.blobs.push(blob);
        Ok(record)
    }

    /// Writes the header. The file ends with the last blob's data.
    pub(super) fn finish(mut self) -> Result<()> {
        let count = u32::try_from(self.blobs.len()).map_err(|_| {
            problem!("{} blobs in one file", self.blobs.len()).in_file(self.path.display().to_string())
        })?;
        let mut header = [0; RECORD_BYTES];
        put(&mut header, 0, &count.to_le_bytes());
        put(&mut header, 4, &VERSION.to_le_bytes());
        self.write_at(0, &header)?;
        self.file.set_len(self.end).map_err(io(&self.path))
    }

    /// Copies the data to where the blob will be; its hash, or nothing when the source has another length.
    fn copy(&mut self, blob: &Blob, source: &mut impl Read) -> Result<Option<u64>> {
        let fail = io(&self.path);
        self.file.seek(SeekFrom::Start(blob.data)).map_err(&fail)?;
        let mut hasher = DefaultHasher::new();
        hasher.write_u32(blob.code);
        let mut left = blob.size;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let got = source.read(&mut self.piece[..want]).map_err(&fail)?;
            if got == 0 {
                return Ok(None);
            }
            hasher.write(&self.piece[..got]);
            self.file.write_all(&self.piece[..got]).map_err(&fail)?;
            left -= got as u64;
        }
        let ended = source.read(&mut self.piece[..1]).map_err(&fail)? == 0;
        Ok(ended.then(|| hasher.finish()))
    }

    /// A blob of the same type and bytes as the one just copied.
    fn find_equal(&mut self, hash: u64, new: &Blob) -> Result<Option<Blob>> {
        let candidates = self.by_hash.get(&hash).cloned().unwrap_or_default();
        for index in candidates {
            let Some(old) = self.blobs.get(index).copied() else {
                continue;
            };
            if old.code == new.code && old.size == new.size && self.equal(&old, new)? {
                return Ok(Some(old));
            }
        }
        Ok(None)
    }

    fn equal(&mut self, old: &Blob, new: &Blob) -> Result<bool> {
        let fail = io(&self.path);
        let mut other = vec![0; PIECE_BYTES];
        let mut done = 0;
        while done < old.size {
            let len = usize::try_from(old.size - done)
                .unwrap_or(PIECE_BYTES)
                .min(PIECE_BYTES);
            for (start, piece) in [(old.data, &mut self.piece), (new.data, &mut other)] {
                self.file.seek(SeekFrom::Start(start + done)).map_err(&fail)?;
                self.file.read_exact(&mut piece[..len]).map_err(&fail)?;
            }
            if self.piece[..len] != other[..len] {
                return Ok(false);
            }
            done += len as u64;
        }
        Ok(true)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let fail = io(&self.path);
        self.file.seek(SeekFrom::Start(offset)).map_err(&fail)?;
        self.file.write_all(bytes).map_err(&fail)
    }
}

fn record_bytes(blob: &Blob, ty: &TensorType) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    put(&mut record, 0, &SENTINEL.to_le_bytes());
    put(&mut record, 4, &blob.code.to_le_bytes());
    put(&mut record, 8, &blob.size.to_le_bytes());
    put(&mut record, 16, &blob.data.to_le_bytes());
    put(&mut record, 24, &padding_bits(ty).to_le_bytes());
    record
}

fn put(record: &mut [u8; RECORD_BYTES], at: usize, bytes: &[u8]) {
    record[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::read_blob;
    use crate::program::DType;
    use bytes::Bytes;

    fn in_file(name: &str, test: impl FnOnce(WeightWriter) -> Vec<(u64, TensorType, Vec<u8>)>) -> Bytes {
        let path = std::env::temp_dir().join(format!("candle-coreml-{name}-{}", std::process::id()));
        let written = test(WeightWriter::create(&path).unwrap());
        let file = Bytes::from(std::fs::read(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        for (offset, ty, data) in written {
            assert_eq!(read_blob(&file, name, offset, &ty).unwrap(), data, "{ty}");
        }
        file
    }

    #[test]
    fn every_dtype_reads_back_aligned_and_equal_weights_are_written_once() {
        let mut count = 0;
        let file = in_file("dtypes", |mut writer| {
            let mut written = Vec::new();
            for dtype in DType::ALL {
                let ty = TensorType::fixed(dtype, &[3, 7]);
                let data: Vec<u8> = (0..ty.byte_len().unwrap_or(0)).map(|i| i as u8).collect();
                if dtype_code(dtype).is_none() {
                    assert!(writer.write(&ty, &mut &data[..]).is_err(), "{dtype}");
                    continue;
                }
                let offset = writer.write(&ty, &mut &data[..]).unwrap();
                assert_eq!(offset % 64, 0);
                assert_eq!(writer.write(&ty, &mut &data[..]).unwrap(), offset, "{dtype}");
                assert_eq!(
                    writer
                        .write(&TensorType::fixed(dtype, &[21]), &mut &data[..])
                        .unwrap(),
                    offset
                );
                written.push((offset, ty, data));
            }
            count = written.len();
            writer.finish().unwrap();
            written
        });
        assert_eq!((count, file[0], file[4]), (17, 17, 2));
        assert!(file.len() < 17 * 192 + 64);
    }

    #[test]
    fn sources_of_the_wrong_length_leave_no_trace() {
        in_file("lengths", |mut writer| {
            let ty = TensorType::fixed(DType::Uint8, &[4]);
            for data in [&b"abc"[..], b"abcde"] {
                assert!(writer.write(&ty, &mut &data[..]).is_err());
            }
            let offset = writer.write(&ty, &mut &b"abcd"[..]).unwrap();
            assert_eq!(offset, 64);
            // Duplicates at the end are cut off.
            writer.write(&ty, &mut &b"abcd"[..]).unwrap();
            writer.finish().unwrap();
            vec![(offset, ty, b"abcd".to_vec())]
        });
    }

    #[test]
    fn weights_of_the_same_hash_are_told_apart_by_their_bytes() {
        in_file("hashes", |mut writer| {
            let ty = TensorType::fixed(DType::Uint8, &[4]);
            let offset = writer.write(&ty, &mut &b"abcd"[..]).unwrap();
            let old = writer.blobs[0];
            let new = Blob {
                record: 192,
                data: 256,
                ..old
            };
            for (data, equal) in [(b"abce", false), (b"abcd", true)] {
                let hash = writer.copy(&new, &mut &data[..]).unwrap().unwrap();
                writer.by_hash.insert(hash, vec![0]);
                assert_eq!(
                    writer.find_equal(hash, &new).unwrap().is_some(),
                    equal,
                    "{data:?}"
                );
            }
            writer.finish().unwrap();
            vec![(offset, ty, b"abcd".to_vec())]
        });
    }

    #[test]
    fn weights_larger_than_a_piece_are_compared_whole() {
        let size = PIECE_BYTES + 5;
        let ty = TensorType::fixed(DType::Int8, &[size]);
        let file = in_file("pieces", |mut writer| {
            let (a, mut b) = (vec![1; size], vec![1; size]);
            b[size - 1] = 2;
            let first = writer.write(&ty, &mut &a[..]).unwrap();
            let second = writer.write(&ty, &mut &b[..]).unwrap();
            assert_ne!(first, second);
            assert_eq!(writer.write(&ty, &mut &a[..]).unwrap(), first);
            writer.finish().unwrap();
            vec![(first, ty.clone(), a), (second, ty.clone(), b)]
        });
        assert!(file.len() < 2 * size + 512);
    }
}
