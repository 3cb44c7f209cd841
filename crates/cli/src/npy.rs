//! Arrays in `.npy` and `.npz` files, as Candle tensors.

use std::io::{self, Read, Seek, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::f16;
use npyz::{Deserialize, NpyFile, NpyWriter, Order, TypeChar, WriterBuilder};
use zip::result::ZipError;
use zip::write::{SimpleFileOptions, ZipWriter};
use zip::{CompressionMethod, ZipArchive};

use crate::failure::Failure;

/// Files larger than this are refused, unpacked ones included.
const LIMIT_BYTES: u64 = 16 << 30;
/// Headers have some hundred bytes; those of records may have more.
const HEADER_LIMIT_BYTES: u64 = 1 << 20;

/// Reads one `.npy` file.
pub fn read_npy(path: &Path) -> Result<Tensor, Failure> {
    let file = std::fs::File::open(path).map_err(|e| at(path, &e))?;
    tensor(file, &path.display().to_string())
}

/// Reads the array `name` of a `.npz` file.
pub fn read_npz(path: &Path, name: &str) -> Result<Tensor, Failure> {
    let mut archive = open(path)?;
    let has = names(&archive);
    let place = format!("{}:{name}", path.display());
    match archive.by_name(&file_name(name)) {
        Ok(array) => tensor(array, &place),
        Err(ZipError::FileNotFound) => Err(Failure::new(format!(
            "{}: no array `{name}`; it has {}",
            path.display(),
            has.join(", ")
        ))),
        Err(error) => Err(Failure::new(format!("{place}: {error}"))),
    }
}

/// Reads all arrays of a `.npz` file.
pub fn read_all(path: &Path) -> Result<Vec<(String, Tensor)>, Failure> {
    let archive = open(path)?;
    names(&archive)
        .into_iter()
        .map(|name| Ok((name.clone(), read_npz(path, &name)?)))
        .collect()
}

/// Runs `$body` with `$element` as the Rust type of the tensor's elements.
macro_rules! typed {
    ($tensor:expr, $element:ident => $body:expr) => {
        typed!(@rows $tensor, $element => $body; F16 f16, F32 f32, F64 f64, U8 u8, U32 u32, I16 i16, I32 i32, I64 i64)
    };
    (@rows $tensor:expr, $element:ident => $body:expr; $($dtype:ident $rust:ty),*) => {
        match $tensor.dtype() {
            $(DType::$dtype => {
                type $element = $rust;
                $body
            })*
            other => Err(Failure::new(format!(
                "a tensor of {other:?} cannot be written; allowed: f16, f32, f64, u8, u32, i16, i32, i64"
            ))),
        }
    };
}

/// Writes one `.npy` file.
pub fn write_npy(path: &Path, tensor: &Tensor) -> Result<(), Failure> {
    let file = io::BufWriter::new(std::fs::File::create(path).map_err(|e| at(path, &e))?);
    let shape = sizes(tensor);
    typed!(tensor, T => {
        let options = npyz::WriteOptions::<T>::new().default_dtype().shape(&shape);
        put(options.writer(file).begin_nd()?, tensor)
    })
}

/// Writes all tensors into one `.npz` file.
pub fn write_npz(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), Failure> {
    let file = io::BufWriter::new(std::fs::File::create(path).map_err(|e| at(path, &e))?);
    let mut archive = ZipWriter::new(file);
    // Stored, as numpy's `savez` does; more than 4 GiB need the larger headers.
    let stored = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .large_file(true);
    for (name, tensor) in tensors {
        archive.start_file(file_name(name), stored)?;
        let shape = sizes(tensor);
        typed!(tensor, T => {
            let options = npyz::WriteOptions::<T>::new().default_dtype().shape(&shape);
            put(options.writer(&mut archive).begin_nd()?, tensor)
        })?;
    }
    archive.finish()?;
    Ok(())
}

/// The place of an array in a `.npz` file.
fn file_name(array: &str) -> String {
    format!("{array}.npy")
}

fn open(path: &Path) -> Result<ZipArchive<io::BufReader<std::fs::File>>, Failure> {
    let file = std::fs::File::open(path).map_err(|e| at(path, &e))?;
    ZipArchive::new(io::BufReader::new(file)).map_err(|e| Failure::new(format!("{}: {e}", path.display())))
}

fn put<T, W>(mut file: NpyWriter<T, W>, tensor: &Tensor) -> Result<(), Failure>
where
    T: candle_core::WithDType + npyz::Serialize,
    W: Write,
{
    file.extend(tensor.flatten_all()?.to_vec1::<T>()?)?;
    Ok(file.finish()?)
}

fn names<R: Read + Seek>(archive: &ZipArchive<R>) -> Vec<String> {
    let array = |name: Result<std::borrow::Cow<'_, str>, ZipError>| {
        let name = name.ok()?;
        name.strip_suffix(".npy").map(str::to_owned)
    };
    let mut names: Vec<String> = archive.file_names().filter_map(array).collect();
    names.sort();
    names
}

fn at(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}

fn tensor(mut reader: impl Read, place: &str) -> Result<Tensor, Failure> {
    let failed = |what: String| Failure::new(format!("{place}: {what}"));
    let start = checked_start(&mut reader).map_err(failed)?;
    let file = NpyFile::new(io::Cursor::new(start).chain(reader)).map_err(|e| failed(e.to_string()))?;
    from_file(file, place)
}

/// Reads a file up to its data and checks what the library takes on trust: the length of the header, and that the
/// number of elements is a number.
fn checked_start(reader: &mut impl Read) -> Result<Vec<u8>, String> {
    let mut start = vec![0; 10];
    reader
        .read_exact(&mut start)
        .map_err(|_| "shorter than the start of a .npy file".to_owned())?;
    let [b'\x93', b'N', b'U', b'M', b'P', b'Y', major, _, low, high] = start[..] else {
        return Err("not a .npy file".to_owned());
    };
    let mut length = u64::from(u16::from_le_bytes([low, high]));
    if major >= 2 {
        let mut rest = [0; 2];
        reader.read_exact(&mut rest).map_err(|e| e.to_string())?;
        start.extend(rest);
        length |= u64::from(u16::from_le_bytes(rest)) << 16;
    }
    if length > HEADER_LIMIT_BYTES {
        return Err(format!(
            "a header of {length} bytes, at most {HEADER_LIMIT_BYTES} are read"
        ));
    }
    let before = start.len();
    reader
        .take(length)
        .read_to_end(&mut start)
        .map_err(|e| e.to_string())?;
    let header = String::from_utf8_lossy(&start[before..]).into_owned();
    let shape = header
        .split_once("'shape':")
        .and_then(|(_, rest)| rest.split_once('(')?.1.split_once(')'));
    let sizes = shape
        .map_or("", |(sizes, _)| sizes)
        .split(',')
        .map(str::trim)
        .filter(|size| !size.is_empty());
    let mut elements = Some(1u64);
    for size in sizes {
        let size = size
            .trim_end_matches('L')
            .parse::<u64>()
            .map_err(|_| format!("the shape has a size {size}"))?;
        elements = elements.and_then(|elements| elements.checked_mul(size));
    }
    match elements {
        Some(_) => Ok(start),
        None => Err("the shape has more elements than can be counted".to_owned()),
    }
}

fn from_file<R: Read>(file: NpyFile<R>, place: &str) -> Result<Tensor, Failure> {
    let npyz::DType::Plain(kind) = file.dtype() else {
        return Err(Failure::new(format!("{place}: records are no tensor")));
    };
    let elements = file
        .shape()
        .iter()
        .try_fold(1u64, |product, &n| product.checked_mul(n));
    let bytes = elements.and_then(|n| n.checked_mul(kind.size_field()));
    if bytes.is_none_or(|bytes| bytes > LIMIT_BYTES) {
        return Err(Failure::new(format!(
            "{place}: shape {:?} is too large",
            file.shape()
        )));
    }
    use TypeChar::{Bool, Float, Int, Uint};
    match (kind.type_char(), kind.size_field()) {
        (Float, 2) => collect::<f16, _>(file, place),
        (Float, 4) => collect::<f32, _>(file, place),
        (Float, 8) => collect::<f64, _>(file, place),
        (Int, 1) => convert::<i8, i32, _>(file, place, i32::from),
        (Int, 2) => collect::<i16, _>(file, place),
        (Int, 4) => collect::<i32, _>(file, place),
        (Int, 8) => collect::<i64, _>(file, place),
        (Uint, 1) => collect::<u8, _>(file, place),
        (Uint, 2) => convert::<u16, u32, _>(file, place, u32::from),
        (Uint, 4) => collect::<u32, _>(file, place),
        (Bool, 1) => convert::<bool, u8, _>(file, place, u8::from),
        _ => Err(Failure::new(format!(
            "{place}: element type {kind} is not read; allowed: bool, int8 to int64, uint8 to uint32, float16 to float64"
        ))),
    }
}

fn collect<T: Deserialize + candle_core::WithDType, R: Read>(
    file: NpyFile<R>,
    place: &str,
) -> Result<Tensor, Failure> {
    convert::<T, T, R>(file, place, |element| element)
}

fn convert<T: Deserialize, U: candle_core::WithDType, R: Read>(
    file: NpyFile<R>,
    place: &str,
    element: impl Fn(T) -> U,
) -> Result<Tensor, Failure> {
    let failed = |error: String| Failure::new(format!("{place}: {error}"));
    let shape: Vec<usize> = file
        .shape()
        .iter()
        .map(|&n| usize::try_from(n))
        .collect::<Result<_, _>>()?;
    let order = file.order();
    let mut elements = Vec::new();
    for value in file.data::<T>().map_err(|e| failed(e.to_string()))? {
        elements.push(element(value.map_err(|e| failed(e.to_string()))?));
    }
    if order == Order::C || shape.len() < 2 {
        return Ok(Tensor::from_vec(elements, shape, &Device::Cpu)?);
    }
    // Fortran's order is that of the transposed array.
    let reversed: Vec<usize> = shape.iter().rev().copied().collect();
    let axes: Vec<usize> = (0..shape.len()).rev().collect();
    Ok(Tensor::from_vec(elements, reversed, &Device::Cpu)?
        .permute(axes)?
        .contiguous()?)
}

fn sizes(tensor: &Tensor) -> Vec<u64> {
    tensor.dims().iter().map(|&n| n as u64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_survives_both_kinds_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let whole = Tensor::arange(0i64, 6, &Device::Cpu)
            .unwrap()
            .reshape((2, 3))
            .unwrap();
        let all: Vec<(String, Tensor)> = [
            DType::F16,
            DType::F32,
            DType::F64,
            DType::U8,
            DType::U32,
            DType::I16,
            DType::I32,
            DType::I64,
        ]
        .map(|dtype| (format!("{dtype:?}"), whole.to_dtype(dtype).unwrap()))
        .to_vec();
        let archive = dir.path().join("all.npz");
        write_npz(&archive, &all).unwrap();
        assert_eq!(read_all(&archive).unwrap().len(), all.len());
        for (name, tensor) in &all {
            let path = dir.path().join(format!("{name}.npy"));
            write_npy(&path, &tensor.t().unwrap()).unwrap();
            let read = read_npy(&path).unwrap();
            assert_eq!(
                (read.dtype(), read.dims()),
                (tensor.dtype(), &[3, 2][..]),
                "{name}"
            );
            for (read, expected) in [
                (read.t().unwrap(), tensor),
                (read_npz(&archive, name).unwrap(), tensor),
            ] {
                let values = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
                assert_eq!(values(&read), values(expected), "{name}");
            }
        }
    }

    /// A version 1.0 file as numpy writes it.
    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(header.len()).unwrap().to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    }

    #[test]
    fn what_numpy_writes_besides_is_read() {
        let header = "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }";
        let data: Vec<u8> = [1f32, 2., 3., 4.].iter().flat_map(|v| v.to_le_bytes()).collect();
        let fortran = tensor(&file(header, &data)[..], "f").unwrap();
        assert_eq!(fortran.to_vec2::<f32>().unwrap(), [[1., 3.], [2., 4.]]);
        let header = "{'descr': '|b1', 'fortran_order': False, 'shape': (3,), }";
        assert_eq!(
            tensor(&file(header, &[1, 0, 1])[..], "b")
                .unwrap()
                .to_vec1::<u8>()
                .unwrap(),
            [1, 0, 1]
        );
        let header = "{'descr': '>i2', 'fortran_order': False, 'shape': (1,), }";
        assert_eq!(
            tensor(&file(header, &[1, 2])[..], "i")
                .unwrap()
                .to_vec1::<i16>()
                .unwrap(),
            [258]
        );
    }

    #[test]
    fn files_that_are_no_arrays_are_refused() {
        let shape = |shape: &str| format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
        for bytes in [
            vec![],
            b"hello".to_vec(),
            file(&shape("(4,)"), &[0; 8]),
            file(&shape("(-4,)"), &[0; 8]),
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff".to_vec(),
            file(&shape("(1000000000000, 1000000000000)"), &[]),
            file(
                "{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }",
                &[0; 8],
            ),
            file(
                "{'descr': '<U3', 'fortran_order': False, 'shape': (1,), }",
                &[0; 12],
            ),
        ] {
            let error = tensor(&bytes[..], "x.npy").unwrap_err();
            assert!(error.message().starts_with("x.npy: "), "{}", error.message());
        }
    }
}
