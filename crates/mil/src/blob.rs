//! Weight files: the 64-byte records in front of each blob, checked against what the program declares.

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::program::{DType, TensorType};

/// Size of the file's header and of each blob's record, and the alignment of both.
pub(crate) const RECORD_BYTES: usize = 64;
pub(crate) const SENTINEL: u32 = 0xDEAD_BEEF;
/// Version 1 files belong to neural networks and have another layout.
pub(crate) const VERSION: u32 = 2;

/// Dtypes a weight file can hold, with their codes (coremltools 9, `mlmodel/src/MILBlob/Blob/BlobDataType.hpp`).
const CODES: [(u32, DType); 17] = [
    (1, DType::Fp16),
    (2, DType::Fp32),
    (3, DType::Uint8),
    (4, DType::Int8),
    (5, DType::Bf16),
    (6, DType::Int16),
    (7, DType::Uint16),
    (8, DType::Int4),
    (9, DType::Uint1),
    (10, DType::Uint2),
    (11, DType::Uint4),
    (12, DType::Uint3),
    (13, DType::Uint6),
    (14, DType::Int32),
    (15, DType::Uint32),
    (16, DType::Fp8E4M3FN),
    (17, DType::Fp8E5M2),
];

/// The code of a dtype in weight files; `None` for those that files cannot hold.
pub(crate) fn dtype_code(dtype: DType) -> Option<u32> {
    CODES.iter().find(|(_, d)| *d == dtype).map(|(code, _)| *code)
}

/// The data of the blob whose record is at `offset`, after checking it against the declared type.
///
/// `name` is how messages call the file.
pub(crate) fn read_blob(file: &Bytes, name: &str, offset: u64, expected: &TensorType) -> Result<Bytes> {
    check_header(file, name)?;
    let fail = |problem: String| Error::Blob {
        path: name.to_string(),
        offset,
        problem,
    };
    let record = usize::try_from(offset)
        .ok()
        .filter(|at| *at >= RECORD_BYTES)
        .and_then(|at| file.get(at..at.checked_add(RECORD_BYTES)?))
        .ok_or_else(|| fail(format!("no record there, the file has {} bytes", file.len())))?;
    let sentinel = u32_at(record, 0);
    if sentinel != SENTINEL {
        return Err(fail(format!(
            "the record starts with {sentinel:#010x}, not {SENTINEL:#010x}"
        )));
    }
    let code = u32_at(record, 4);
    let (_, dtype) = *CODES
        .iter()
        .find(|(c, _)| *c == code)
        .ok_or_else(|| fail(format!("unknown element type {code}, 1 to 17 are known")))?;
    if dtype != expected.dtype {
        return Err(fail(format!("holds {dtype}, the program declares {expected}")));
    }
    let size = u64_at(record, 8);
    let wanted = expected
        .byte_len()
        .ok_or_else(|| fail(format!("the declared type {expected} has no fixed size")))?;
    if size != wanted as u64 {
        return Err(fail(format!("holds {size} bytes, {expected} takes {wanted}")));
    }
    // Files of older converters have garbage in the padding field of whole-byte types.
    let padding = u64_at(record, 24);
    if dtype.bits().is_some_and(|bits| bits < 8) && padding != padding_bits(expected) {
        return Err(fail(format!(
            "{padding} bits of padding, {expected} takes {}",
            padding_bits(expected)
        )));
    }
    let start = u64_at(record, 16);
    usize::try_from(start)
        .ok()
        .and_then(|start| Some(start..start.checked_add(wanted)?))
        .filter(|range| range.end <= file.len())
        .map(|range| file.slice(range))
        .ok_or_else(|| {
            fail(format!(
                "data at {start} of {wanted} bytes, but the file has {} bytes",
                file.len()
            ))
        })
}

/// Unused bits at the end of a packed tensor, 0 to 7.
pub(crate) fn padding_bits(ty: &TensorType) -> u64 {
    match (ty.dtype.bits(), ty.element_count()) {
        (Some(bits @ 0..8), Some(count)) => (8 - (count % 8 * bits) as u64 % 8) % 8,
        _ => 0,
    }
}

fn check_header(file: &Bytes, name: &str) -> Result<()> {
    let fail = |problem: &str| {
        Err(Error::Content {
            path: name.to_string(),
            problem: problem.to_string(),
        })
    };
    if file.starts_with(b"version https://git-lfs") {
        return fail("a Git LFS pointer, not the weights: fetch them with `git lfs pull`");
    }
    if file.len() < RECORD_BYTES {
        return fail("not a weight file: shorter than its header of 64 bytes");
    }
    if u32_at(file, 4) != VERSION {
        let version = u32_at(file, 4);
        return fail(&format!("weight file version {version}, version 2 is supported"));
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(code: u32, size: u64, start: u64, padding: u64, data: &[u8]) -> Bytes {
        let mut out = Vec::new();
        out.extend(1u32.to_le_bytes());
        out.extend(VERSION.to_le_bytes());
        out.resize(64, 0);
        out.extend(SENTINEL.to_le_bytes());
        out.extend(code.to_le_bytes());
        for n in [size, start, padding] {
            out.extend(n.to_le_bytes());
        }
        out.resize(128, 0);
        out.extend(data);
        out.into()
    }

    #[test]
    fn every_dtype_is_read_and_every_other_declaration_refused() {
        for (code, dtype) in CODES {
            let ty = TensorType::fixed(dtype, &[3, 5]);
            let data: Vec<u8> = (0..ty.byte_len().unwrap()).map(|i| i as u8).collect();
            let blob = file(code, data.len() as u64, 128, padding_bits(&ty), &data);
            assert_eq!(read_blob(&blob, "w", 64, &ty).unwrap(), data, "{dtype}");
            let other = if dtype == DType::Int4 {
                DType::Uint4
            } else {
                DType::Int4
            };
            assert!(
                read_blob(&blob, "w", 64, &TensorType::fixed(other, &[3, 5])).is_err(),
                "{dtype}"
            );
            assert!(
                read_blob(&blob, "w", 64, &TensorType::fixed(dtype, &[3, 9])).is_err(),
                "{dtype}"
            );
        }
    }

    #[test]
    fn garbage_in_the_padding_field_of_whole_bytes_is_ignored() {
        let ty = TensorType::fixed(DType::Uint8, &[2]);
        assert_eq!(
            read_blob(&file(3, 2, 128, 99, b"ab"), "w", 64, &ty).unwrap(),
            "ab".as_bytes()
        );
        let ty = TensorType::fixed(DType::Uint4, &[3]);
        assert!(read_blob(&file(11, 2, 128, 99, b"ab"), "w", 64, &ty).is_err());
    }

    #[test]
    fn wrong_records_are_refused_with_the_reason() {
        let ty = TensorType::fixed(DType::Uint8, &[2]);
        let good = file(3, 2, 128, 0, b"ab");
        let cases: [(&str, Bytes, u64, &str); 9] = [
            ("header as record", good.clone(), 0, "no record"),
            ("past the end", good.clone(), 128, "no record"),
            ("absurd offset", good.clone(), u64::MAX, "no record"),
            ("inside a record", good.clone(), 65, "starts with"),
            ("no sentinel", file(3, 2, 128, 0, &[0; 128]), 128, "starts with"),
            (
                "unknown dtype",
                file(18, 2, 128, 0, b"ab"),
                64,
                "unknown element type 18",
            ),
            ("size", file(3, 3, 128, 0, b"abc"), 64, "holds 3 bytes"),
            ("data past the end", file(3, 2, 129, 0, b"ab"), 64, "data at 129"),
            (
                "absurd data offset",
                file(3, 2, u64::MAX, 0, b"ab"),
                64,
                "data at",
            ),
        ];
        for (what, bytes, offset, text) in cases {
            let found = read_blob(&bytes, "w.bin", offset, &ty).unwrap_err().to_string();
            assert!(
                found.contains(text) && found.starts_with("w.bin"),
                "{what}: {found}"
            );
        }
        for (what, bytes) in [
            ("version", file(3, 2, 128, 0, b"ab").slice(4..)),
            ("short", good.slice(..63)),
        ] {
            assert!(read_blob(&bytes, "w", 64, &ty).is_err(), "{what}");
        }
    }
}
