//! Candle tensors to the arrays engines read: the tensor's own memory where dtype and layout allow, else one copy.
//!
//! | declared | taken as it is | converted |
//! |---|---|---|
//! | fp16 | f16 | other floats rounded to nearest (beyond 65,504: infinite); integers that fp16 holds exactly |
//! | fp32 | f32 | other floats rounded to nearest; integers that fp32 holds exactly |
//! | fp64 | f64 | other floats; integers below 2^53 |
//! | int32 | i32 | integers in range; floats that are whole numbers in range |
//! | int8 | | as int32 |

use crate::allowed;
use crate::engine::{Array, Data};
use crate::error::{Error, FeatureRole};
use crate::value::{ArrayView, Elements};
use candle_core::{CpuStorage, DType, Device, DeviceLocation, Storage, StorageRef, Tensor, WithDType};
use candle_coreml_mil::{ArrayDescription, DType as Declared};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::borrow::Cow;
use std::ops::Range;

/// Most elements a left-out input is filled with: 1 GiB of f32, far beyond any default that a file means.
const MAX_DEFAULT_ELEMENTS: usize = 1 << 28;

/// 2^53: integers below it are exact in f64, and an integer at it may have been rounded.
const EXACT_BELOW: f64 = 9_007_199_254_740_992.0;

const CONVERTIBLE: &str = "u8, u32, i16, i32, i64, bf16, f16, f32, f64, f8e4m3";

/// Where an array is to go.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub role: FeatureRole,
    pub name: &'a str,
    pub array: &'a ArrayDescription,
}

/// An array in the declared dtype, contiguous and on the CPU.
pub(crate) struct Prepared<'a> {
    shape: Cow<'a, [usize]>,
    held: Held<'a>,
}

enum Held<'a> {
    /// A tensor that can be read where it is.
    Tensor(Cow<'a, Tensor>),
    /// A caller's memory that can be read where it is.
    Borrowed(Data<'a>),
    F16(Vec<f16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    I32(Vec<i32>),
    I8(Vec<i8>),
}

/// The elements of a [`Prepared`], readable as long as this lives.
pub(crate) struct Locked<'p> {
    shape: &'p [usize],
    elements: Readable<'p>,
    tensor: Option<&'p Tensor>,
}

enum Readable<'p> {
    Storage(StorageRef<'p>, Range<usize>),
    Slice(Data<'p>),
}

/// Checks shape, device and dtype of `tensor` and converts what has to be converted.
pub(crate) fn prepare<'a>(target: Target<'_>, tensor: &'a Tensor) -> Result<Prepared<'a>, Error> {
    let array = target.array;
    if !allowed::allows(&array.shape, &array.flexibility, tensor.dims()) {
        return Err(target.wrong_shape(tensor.dims()));
    }
    let shape = Cow::Borrowed(tensor.dims());
    check_device(target.role, target.name, tensor.device().location())?;
    let mut tensor = match tensor.device() {
        Device::Cpu => Cow::Borrowed(tensor),
        _ => Cow::Owned(tensor.to_device(&Device::Cpu)?),
    };
    if matches!(
        tensor.dtype(),
        DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0
    ) {
        return Err(target.wrong_dtype(tensor.dtype()));
    }
    if tensor.dtype() == DType::F8E4M3 {
        // Exact; and in candle-core 0.11 `WithDType::to_f64` of this type never returns.
        tensor = Cow::Owned(tensor.to_dtype(DType::F32)?);
    }
    if !tensor.is_contiguous() {
        tensor = Cow::Owned(tensor.contiguous()?);
    }
    if read_as_it_is(array.dtype) == Some(tensor.dtype()) {
        return Ok(Prepared {
            shape,
            held: Held::Tensor(tensor),
        });
    }
    let (storage, layout) = tensor.storage_and_layout();
    let range = offsets(layout)?;
    let Storage::Cpu(storage) = &*storage else {
        return Err(target.wrong_dtype(tensor.dtype()));
    };
    Ok(Prepared {
        shape,
        held: convert_storage(target, storage, range)?,
    })
}

/// Checks the shape of `view` and converts the elements where their type is not the declared one.
pub(crate) fn prepare_view<'a>(target: Target<'_>, view: ArrayView<'a>) -> Result<Prepared<'a>, Error> {
    let array = target.array;
    if !allowed::allows(&array.shape, &array.flexibility, view.shape) {
        return Err(target.wrong_shape(view.shape));
    }
    let held = match (view.elements, array.dtype) {
        (Elements::F16(v), Declared::Fp16) => Held::Borrowed(Data::F16(v)),
        (Elements::F32(v), Declared::Fp32) => Held::Borrowed(Data::F32(v)),
        (Elements::F64(v), Declared::Fp64) => Held::Borrowed(Data::F64(v)),
        (Elements::I32(v), Declared::Int32) => Held::Borrowed(Data::I32(v)),
        (Elements::F32(v), Declared::Fp16) => Held::F16(narrowed(v)),
        (Elements::F16(v), Declared::Fp32) => Held::F32(widened(v)),
        (Elements::U8(v), _) => convert(target, v)?,
        (Elements::U32(v), _) => convert(target, v)?,
        (Elements::I16(v), _) => convert(target, v)?,
        (Elements::I32(v), _) => convert(target, v)?,
        (Elements::I64(v), _) => convert(target, v)?,
        (Elements::F16(v), _) => convert(target, v)?,
        (Elements::F32(v), _) => convert(target, v)?,
        (Elements::F64(v), _) => convert(target, v)?,
    };
    Ok(Prepared {
        shape: Cow::Borrowed(view.shape),
        held,
    })
}

/// Refuses tensors that no engine can read.
pub(crate) fn check_device(what: FeatureRole, name: &str, location: DeviceLocation) -> Result<(), Error> {
    match location {
        DeviceLocation::Cpu | DeviceLocation::Metal { .. } => Ok(()),
        DeviceLocation::Cuda { gpu_id } => Err(Error::Device {
            what,
            name: name.to_string(),
            device: format!("CUDA device {gpu_id}"),
        }),
    }
}

/// The value of an input that is left out, in the default shape; `None` where the description gives no shape.
pub(crate) fn filled<'a>(target: Target<'a>, value: f64) -> Result<Option<Prepared<'a>>, Error> {
    let shape = &target.array.shape;
    if shape.is_empty() {
        return Ok(None);
    }
    let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    let Some(count) = count.filter(|&n| n <= MAX_DEFAULT_ELEMENTS) else {
        return Err(target.wrong_shape(shape));
    };
    let held = match convert(target, &[value])? {
        held @ (Held::Tensor(_) | Held::Borrowed(_)) => held,
        Held::F16(v) => Held::F16(v.repeat(count)),
        Held::F32(v) => Held::F32(v.repeat(count)),
        Held::F64(v) => Held::F64(v.repeat(count)),
        Held::I32(v) => Held::I32(v.repeat(count)),
        Held::I8(v) => Held::I8(v.repeat(count)),
    };
    Ok(Some(Prepared {
        shape: Cow::Borrowed(shape),
        held,
    }))
}

/// The Candle dtype in which outputs and states of a declared element type come.
pub(crate) fn candle_dtype(declared: Declared) -> Option<DType> {
    Some(match declared {
        Declared::Fp16 => DType::F16,
        Declared::Fp32 => DType::F32,
        Declared::Fp64 => DType::F64,
        Declared::Int32 | Declared::Int8 => DType::I32,
        _ => return None,
    })
}

/// The tensor in the dtype that belongs to the declared element type.
pub(crate) fn as_declared(tensor: Tensor, declared: Declared) -> Result<Tensor, Error> {
    match candle_dtype(declared) {
        Some(dtype) if dtype != tensor.dtype() => Ok(tensor.to_dtype(dtype)?),
        _ => Ok(tensor),
    }
}

impl Prepared<'_> {
    /// Takes the read lock of a tensor's storage where its memory is used directly.
    pub(crate) fn lock(&self) -> Result<Locked<'_>, Error> {
        let elements = match &self.held {
            Held::Tensor(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                Readable::Storage(storage, offsets(layout)?)
            }
            Held::Borrowed(data) => Readable::Slice(*data),
            Held::F16(v) => Readable::Slice(Data::F16(v)),
            Held::F32(v) => Readable::Slice(Data::F32(v)),
            Held::F64(v) => Readable::Slice(Data::F64(v)),
            Held::I32(v) => Readable::Slice(Data::I32(v)),
            Held::I8(v) => Readable::Slice(Data::I8(v)),
        };
        let tensor = match &self.held {
            Held::Tensor(tensor) => Some(&**tensor),
            _ => None,
        };
        Ok(Locked {
            shape: &self.shape,
            elements,
            tensor,
        })
    }
}

impl Locked<'_> {
    pub(crate) fn array(&self) -> Array<'_> {
        let data = match &self.elements {
            Readable::Slice(data) => *data,
            Readable::Storage(storage, range) => {
                let range = range.clone();
                match &**storage {
                    Storage::Cpu(CpuStorage::F16(v)) => Data::F16(&v[range]),
                    Storage::Cpu(CpuStorage::F32(v)) => Data::F32(&v[range]),
                    Storage::Cpu(CpuStorage::F64(v)) => Data::F64(&v[range]),
                    Storage::Cpu(CpuStorage::I32(v)) => Data::I32(&v[range]),
                    _ => unreachable!("prepare keeps tensors of these dtypes on the CPU only"),
                }
            }
        };
        Array {
            shape: self.shape,
            data,
            tensor: self.tensor,
        }
    }
}

impl Target<'_> {
    fn wrong_shape(&self, found: &[usize]) -> Error {
        Error::Shape {
            what: self.role,
            name: self.name.to_string(),
            found: found.to_vec(),
            allowed: allowed::shapes(&self.array.shape, &self.array.flexibility),
        }
    }

    fn wrong_dtype(&self, found: DType) -> Error {
        let convertible = candle_dtype(self.array.dtype).is_some();
        Error::DType {
            what: self.role,
            name: self.name.to_string(),
            expected: self.array.dtype.to_string(),
            found: found.as_str(),
            allowed: if convertible { CONVERTIBLE } else { "none" },
        }
    }

    fn wrong_element(&self, index: usize, value: impl ToString, allowed: String) -> Error {
        Error::Element {
            what: self.role,
            name: self.name.to_string(),
            expected: self.array.dtype.to_string(),
            index,
            value: value.to_string(),
            allowed,
        }
    }
}

/// The dtype of tensors an engine can read in place.
fn read_as_it_is(declared: Declared) -> Option<DType> {
    // Candle has no int8, so no tensor of it exists to be read.
    candle_dtype(declared).filter(|_| declared != Declared::Int8)
}

fn offsets(layout: &candle_core::Layout) -> Result<Range<usize>, Error> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::Msg(format!("a contiguous tensor has the layout {layout:?}")))?;
    Ok(start..end)
}

fn convert_storage(
    target: Target<'_>,
    storage: &CpuStorage,
    range: Range<usize>,
) -> Result<Held<'static>, Error> {
    use CpuStorage as S;
    match (storage, target.array.dtype) {
        // The two conversions that every fp16 model fed with f32 needs have vector instructions.
        (S::F32(v), Declared::Fp16) => Ok(Held::F16(narrowed(&v[range]))),
        (S::F16(v), Declared::Fp32) => Ok(Held::F32(widened(&v[range]))),
        (S::U8(v), _) => convert(target, &v[range]),
        (S::U32(v), _) => convert(target, &v[range]),
        (S::I16(v), _) => convert(target, &v[range]),
        (S::I32(v), _) => convert(target, &v[range]),
        (S::I64(v), _) => convert(target, &v[range]),
        (S::BF16(v), _) => convert(target, &v[range]),
        (S::F16(v), _) => convert(target, &v[range]),
        (S::F32(v), _) => convert(target, &v[range]),
        (S::F64(v), _) => convert(target, &v[range]),
        (other, _) => Err(target.wrong_dtype(candle_core::backend::BackendStorage::dtype(other))),
    }
}

fn narrowed(source: &[f32]) -> Vec<f16> {
    let mut out = vec![f16::ZERO; source.len()];
    out.convert_from_f32_slice(source);
    out
}

fn widened(source: &[f16]) -> Vec<f32> {
    let mut out = vec![0f32; source.len()];
    source.convert_to_f32_slice(&mut out);
    out
}

fn convert<T: WithDType>(target: Target<'_>, source: &[T]) -> Result<Held<'static>, Error> {
    Ok(match target.array.dtype {
        Declared::Fp16 => Held::F16(floats(target, source, f16::from_f64, f16::to_f64)?),
        // Rounds to nearest, which is what a narrower float means.
        Declared::Fp32 => Held::F32(floats(target, source, |v| v as f32, f64::from)?),
        Declared::Fp64 => Held::F64(floats(target, source, |v| v, |v| v)?),
        Declared::Int32 => Held::I32(integers(target, source, i32::MIN.into(), i32::MAX.into(), |v| {
            v as i32
        })?),
        Declared::Int8 => Held::I8(integers(target, source, i8::MIN.into(), i8::MAX.into(), |v| {
            v as i8
        })?),
        _ => return Err(target.wrong_dtype(T::DTYPE)),
    })
}

/// To a float type. Floats are rounded; an integer that would be is refused, because it is a token or a position and
/// a neighbouring one is another.
fn floats<T: WithDType, U: Copy>(
    target: Target<'_>,
    source: &[T],
    narrow: impl Fn(f64) -> U,
    widen: impl Fn(U) -> f64,
) -> Result<Vec<U>, Error> {
    if !T::DTYPE.is_int() {
        return Ok(source.iter().map(|v| narrow(v.to_f64())).collect());
    }
    let exact = |(index, element): (usize, &T)| {
        let value = element.to_f64();
        let narrowed = narrow(value);
        if value.abs() < EXACT_BELOW && widen(narrowed) == value {
            return Ok(narrowed);
        }
        let allowed = format!(
            "integers that {} holds exactly; a float tensor is rounded instead",
            target.array.dtype
        );
        Err(target.wrong_element(index, element, allowed))
    };
    source.iter().enumerate().map(exact).collect()
}

/// To an integer type that f64 holds exactly, `low` to `high`; `narrow` is called with whole numbers between them only.
fn integers<T: WithDType, U>(
    target: Target<'_>,
    source: &[T],
    low: f64,
    high: f64,
    narrow: impl Fn(f64) -> U,
) -> Result<Vec<U>, Error> {
    let exact = |(index, element): (usize, &T)| {
        // An i64 that f64 rounds is far outside these ranges before and after.
        let value = element.to_f64();
        if (low..=high).contains(&value) && value.fract() == 0.0 {
            return Ok(narrow(value));
        }
        Err(target.wrong_element(index, element, format!("whole numbers from {low} to {high}")))
    };
    source.iter().enumerate().map(exact).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake::array;

    fn target(array: &ArrayDescription) -> Target<'_> {
        Target {
            role: FeatureRole::Input,
            name: "x",
            array,
        }
    }

    /// What arrives, as a tensor, and whether it is the given tensor's own memory.
    fn arrives(declared: Declared, tensor: &Tensor) -> Result<(Tensor, bool), Error> {
        let description = array(declared, tensor.dims());
        let prepared = prepare(target(&description), tensor)?;
        let own = matches!(prepared.held, Held::Tensor(Cow::Borrowed(_)));
        let locked = prepared.lock()?;
        Ok((locked.array().to_tensor()?, own))
    }

    #[test]
    fn every_dtype_reaches_every_declared_type_with_its_value() {
        let sources = [
            DType::U8,
            DType::U32,
            DType::I16,
            DType::I32,
            DType::I64,
            DType::BF16,
            DType::F16,
            DType::F32,
            DType::F64,
            DType::F8E4M3,
        ];
        let targets = [
            (Declared::Fp16, DType::F16),
            (Declared::Fp32, DType::F32),
            (Declared::Fp64, DType::F64),
            (Declared::Int32, DType::I32),
            (Declared::Int8, DType::I32),
        ];
        let mut wrong = Vec::new();
        for source in sources {
            let tensor = Tensor::new(&[[0f32, 1.0], [64.0, 120.0]], &Device::Cpu).unwrap();
            let tensor = tensor.to_dtype(source).unwrap();
            for (declared, dtype) in targets {
                let (out, own) = arrives(declared, &tensor).unwrap();
                let values = out
                    .to_dtype(DType::F64)
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .to_vec1::<f64>()
                    .unwrap();
                let right = out.dtype() == dtype && values == [0.0, 1.0, 64.0, 120.0];
                let shared = declared != Declared::Int8 && source == dtype;
                if !right || own != shared {
                    wrong.push(format!("{source:?} to {declared}: {values:?} shared {own}"));
                }
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn contiguous_tensors_and_narrowed_views_are_read_in_place() {
        let tensor = Tensor::arange(0f32, 12.0, &Device::Cpu)
            .unwrap()
            .reshape((4, 3))
            .unwrap();
        let start = {
            let (storage, _) = tensor.storage_and_layout();
            let Storage::Cpu(CpuStorage::F32(v)) = &*storage else {
                panic!("not f32")
            };
            v.as_ptr().addr()
        };
        let rows = tensor.narrow(0, 1, 2).unwrap();
        let description = array(Declared::Fp32, &[2, 3]);
        let prepared = prepare(target(&description), &rows).unwrap();
        let locked = prepared.lock().unwrap();
        assert_eq!(locked.array().address(), start + 3 * 4);
    }

    #[test]
    fn strided_tensors_arrive_in_row_major_order() {
        let tensor = Tensor::arange(0i64, 6, &Device::Cpu)
            .unwrap()
            .reshape((2, 3))
            .unwrap();
        let turned = tensor.t().unwrap();
        let column = tensor.narrow(1, 1, 1).unwrap();
        let spread = column.broadcast_as((2, 2)).unwrap();
        let rows = [
            (turned, vec![0, 3, 1, 4, 2, 5]),
            (column, vec![1, 4]),
            (spread, vec![1, 1, 4, 4]),
        ];
        for (tensor, wanted) in rows {
            for (declared, dtype) in [(Declared::Int32, DType::I32), (Declared::Fp16, DType::F16)] {
                for source in [DType::I64, dtype] {
                    let (out, _) = arrives(declared, &tensor.to_dtype(source).unwrap()).unwrap();
                    let out = out.to_dtype(DType::I64).unwrap().flatten_all().unwrap();
                    assert_eq!(out.to_vec1::<i64>().unwrap(), wanted, "{source:?} to {declared}");
                }
            }
        }
    }

    #[test]
    fn what_a_type_cannot_hold_is_refused_by_index_and_value() {
        let cpu = &Device::Cpu;
        let rows: [(Declared, Tensor, Option<&str>); 15] = [
            (
                Declared::Int32,
                Tensor::new(&[0i64, 2_147_483_647], cpu).unwrap(),
                None,
            ),
            (
                Declared::Int32,
                Tensor::new(&[0i64, 2_147_483_648], cpu).unwrap(),
                Some("element 1 is 2147483648"),
            ),
            (
                Declared::Int32,
                Tensor::new(&[i64::MIN], cpu).unwrap(),
                Some("element 0 is -9223372036854775808"),
            ),
            (
                Declared::Int32,
                Tensor::new(&[u32::MAX], cpu).unwrap(),
                Some("element 0 is 4294967295"),
            ),
            (
                Declared::Int32,
                Tensor::new(&[1.0f32, 0.5], cpu).unwrap(),
                Some("element 1 is 0.5"),
            ),
            (
                Declared::Int32,
                Tensor::new(&[f32::NAN], cpu).unwrap(),
                Some("element 0 is NaN"),
            ),
            (
                Declared::Int32,
                Tensor::new(&[f64::INFINITY], cpu).unwrap(),
                Some("element 0 is inf"),
            ),
            (Declared::Int8, Tensor::new(&[-128i64], cpu).unwrap(), None),
            (
                Declared::Int8,
                Tensor::new(&[-129i64], cpu).unwrap(),
                Some("element 0 is -129"),
            ),
            (
                Declared::Int8,
                Tensor::new(&[200u8], cpu).unwrap(),
                Some("element 0 is 200"),
            ),
            (
                Declared::Fp16,
                Tensor::new(&[2048i64, 2049], cpu).unwrap(),
                Some("element 1 is 2049"),
            ),
            (
                Declared::Fp16,
                Tensor::new(&[70_000u32], cpu).unwrap(),
                Some("element 0 is 70000"),
            ),
            (
                Declared::Fp32,
                Tensor::new(&[16_777_217i64], cpu).unwrap(),
                Some("element 0 is 16777217"),
            ),
            (
                Declared::Fp64,
                Tensor::new(&[9_007_199_254_740_993i64], cpu).unwrap(),
                Some("element 0 is 900719925474"),
            ),
            (Declared::Fp16, Tensor::new(&[1e9f32, 0.1], cpu).unwrap(), None),
        ];
        for (declared, tensor, wanted) in rows {
            match (arrives(declared, &tensor).map_err(|e| e.to_string()), wanted) {
                (Ok(_), None) => {}
                (Err(words), Some(wanted)) if words.contains(wanted) => {
                    assert!(words.starts_with("input \"x\""))
                }
                (got, _) => panic!("{declared} from {tensor}: {got:?}, wanted {wanted:?}"),
            }
        }
    }

    #[test]
    fn floats_beyond_fp16_become_infinite_and_keep_their_sign() {
        let tensor = Tensor::new(&[-1e9f32, 70_000.0, f32::NEG_INFINITY], &Device::Cpu).unwrap();
        let (out, _) = arrives(Declared::Fp16, &tensor).unwrap();
        let wanted = [f16::NEG_INFINITY, f16::INFINITY, f16::NEG_INFINITY];
        assert_eq!(out.to_vec1::<f16>().unwrap(), wanted);
    }

    #[test]
    fn wrong_shapes_and_cuda_tensors_are_refused_by_name() {
        let description = array(Declared::Fp32, &[1, 4]);
        let tensor = Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap();
        let words = prepare(target(&description), &tensor).err().unwrap().to_string();
        assert_eq!(
            words,
            r#"input "x": shape [1, 3] is not allowed; allowed: [1, 4]"#
        );
        let check = |location| check_device(FeatureRole::Input, "x", location);
        let words = check(DeviceLocation::Cuda { gpu_id: 1 }).unwrap_err().to_string();
        assert_eq!(
            words,
            r#"input "x": the tensor is on CUDA device 1; allowed: CPU and Metal tensors"#
        );
        assert!(check(DeviceLocation::Metal { gpu_id: 0 }).is_ok());
    }

    #[test]
    fn a_left_out_input_is_filled_with_its_default_in_the_declared_type() {
        let description = array(Declared::Int32, &[2, 2]);
        let prepared = filled(target(&description), 7.0).unwrap().unwrap();
        let out = prepared.lock().unwrap().array().to_tensor().unwrap();
        assert_eq!(out.to_vec2::<i32>().unwrap(), [[7, 7], [7, 7]]);
        assert!(filled(target(&description), 0.5).is_err(), "0.5 is no int32");
        let absurd = array(Declared::Fp32, &[usize::MAX, 2]);
        assert!(matches!(filled(target(&absurd), 0.0), Err(Error::Shape { .. })));
    }
}
