//! Values of MIL text: a type and a literal in parentheses, read as the type says.

use super::float::parse_float;
use super::parse::value_type;
use super::scan::{Fault, Result, Scanner};
use crate::check::MAX_DEPTH;
use crate::element::{Number, Packer};
use crate::program::*;

/// `type ( literal )`.
pub(super) fn parse_value(s: &mut Scanner) -> Result<Value> {
    nested_value(s, 0)
}

fn nested_value(s: &mut Scanner, depth: usize) -> Result<Value> {
    let ty = value_type(s, depth)?;
    s.expect("(")?;
    let value = literal(s, &ty, depth)?;
    s.expect(")")?;
    Ok(value)
}

fn literal(s: &mut Scanner, ty: &ValueType, depth: usize) -> Result<Value> {
    if depth > MAX_DEPTH {
        return s.fail(format!("values nested more than {MAX_DEPTH} deep"));
    }
    match ty {
        ValueType::Tensor(t) => tensor(s, t, depth),
        ValueType::List { element, .. } => {
            s.expect("[")?;
            let mut values = Vec::new();
            while !s.accept("]") {
                separator(s, values.is_empty())?;
                values.push(literal(s, element, depth + 1)?);
            }
            Ok(Value {
                ty: ty.clone(),
                data: ValueData::List(values),
            })
        }
        ValueType::Tuple(types) => {
            s.expect("(")?;
            let mut values = Vec::new();
            for ty in types {
                separator(s, values.is_empty())?;
                values.push(literal(s, ty, depth + 1)?);
            }
            s.expect(")")?;
            Ok(Value {
                ty: ty.clone(),
                data: ValueData::Tuple(values),
            })
        }
        ValueType::Dictionary { key, value } => {
            s.expect("{")?;
            let mut pairs = Vec::new();
            while !s.accept("}") {
                separator(s, pairs.is_empty())?;
                s.expect("{")?;
                let key = literal(s, key, depth + 1)?;
                s.expect(",")?;
                pairs.push((key, literal(s, value, depth + 1)?));
                s.expect("}")?;
            }
            Ok(Value {
                ty: ty.clone(),
                data: ValueData::Dictionary(pairs),
            })
        }
        ValueType::State(_) => s.fail("a state has no literal"),
    }
}

fn separator(s: &mut Scanner, first: bool) -> Result<()> {
    if first { Ok(()) } else { s.expect(",") }
}

fn tensor(s: &mut Scanner, ty: &TensorType, depth: usize) -> Result<Value> {
    if s.accept_word("BLOBFILE") {
        let data = ValueData::Blob(blob(s, depth)?);
        return Ok(Value {
            ty: ValueType::Tensor(ty.clone()),
            data,
        });
    }
    let mut reader = TensorReader::new(ty);
    reader.read(s, 0)?;
    // One unknown dimension follows from the number of elements, more of them are fixed here to keep the shape.
    let mut ty = ty.clone();
    if ty.shape.iter().filter(|d| **d == Dim::Unknown).count() > 1 {
        ty.shape = reader.dims.iter().map(|d| Dim::Fixed(d.unwrap_or(0))).collect();
    }
    let data = if ty.dtype == DType::String {
        ValueData::Strings(reader.strings)
    } else {
        ValueData::Tensor(reader.packer.finish().into())
    };
    Ok(Value {
        ty: ValueType::Tensor(ty),
        data,
    })
}

/// `( path = string , offset = integer )`.
fn blob(s: &mut Scanner, depth: usize) -> Result<BlobRef> {
    s.expect("(")?;
    let (mut path, mut offset) = (None, None);
    for i in 0..2 {
        separator(s, i == 0)?;
        let at = s.here();
        let name = s.name("`path` or `offset`")?;
        s.expect("=")?;
        let value = nested_value(s, depth + 1)?;
        match (&*name, value.data) {
            ("path", ValueData::Strings(strings)) if strings.len() == 1 => path = strings.into_iter().next(),
            ("offset", ValueData::Tensor(bytes)) if bytes.len() == 8 => {
                offset = bytes.as_ref().try_into().ok().map(u64::from_le_bytes);
            }
            _ => {
                return Err(Fault::new(
                    at,
                    format!("{name:?}: a blob has a string `path` and a uint64 `offset`"),
                ));
            }
        }
    }
    s.expect(")")?;
    match (path, offset) {
        (Some(path), Some(offset)) => Ok(BlobRef { path, offset }),
        _ => s.fail("a blob has a `path` and an `offset`"),
    }
}

/// Reads nested brackets and finds the sizes that the type leaves open.
struct TensorReader {
    dtype: DType,
    dims: Vec<Option<usize>>,
    /// True when the type has a dimension of size zero: `[]` then stands for it whatever its rank.
    empty: bool,
    packer: Packer,
    strings: Vec<String>,
}

impl TensorReader {
    fn new(ty: &TensorType) -> Self {
        let dims: Vec<_> = ty
            .shape
            .iter()
            .map(|d| match d {
                Dim::Fixed(n) => Some(*n),
                Dim::Unknown | Dim::Variadic => None,
            })
            .collect();
        TensorReader {
            dtype: ty.dtype,
            empty: dims.contains(&Some(0)),
            dims,
            packer: Packer::new(ty.dtype),
            strings: Vec::new(),
        }
    }

    fn read(&mut self, s: &mut Scanner, level: usize) -> Result<()> {
        if level == self.dims.len() {
            return self.element(s);
        }
        s.expect("[")?;
        let mut count = 0;
        while !s.accept("]") {
            separator(s, count == 0)?;
            self.read(s, level + 1)?;
            count += 1;
        }
        let Some(size) = self.dims.get_mut(level) else {
            return Ok(());
        };
        match *size {
            Some(n) if n == count || (count == 0 && self.empty) => Ok(()),
            Some(n) => s.fail(format!("{count} elements in dimension {level} of size {n}")),
            None => {
                *size = Some(count);
                Ok(())
            }
        }
    }

    fn element(&mut self, s: &mut Scanner) -> Result<()> {
        if self.dtype == DType::String {
            self.strings.push(s.string()?);
            return Ok(());
        }
        let at = s.here();
        let word = s.number_word()?;
        let number = self.number(s, word).ok_or(());
        match number.map(|n| self.packer.push(n)) {
            Ok(true) => Ok(()),
            _ => Err(Fault::new(
                at,
                format!("{word:?} is no value of type {}", self.dtype),
            )),
        }
    }

    fn number(&self, s: &mut Scanner, word: &str) -> Option<Number> {
        if self.dtype == DType::Bool {
            return match word {
                "true" => Some(Number::Int(1)),
                "false" => Some(Number::Int(0)),
                _ => None,
            };
        }
        if self.dtype.is_float() {
            // `nan(0x7e01)` keeps the bits of unusual NaNs; this crate's addition.
            if word == "nan" && s.accept("(") {
                let bits = s.number_word().ok()?.strip_prefix("0x")?;
                s.expect(")").ok()?;
                return u64::from_str_radix(bits, 16).ok().map(Number::Bits);
            }
            return parse_float(word).map(Number::Float);
        }
        match word.strip_prefix("0x") {
            Some(hex) => i128::from_str_radix(hex, 16).ok().map(Number::Int),
            None => word.parse().ok().map(Number::Int),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> std::result::Result<Value, String> {
        let mut s = Scanner::new(text);
        parse_value(&mut s).map_err(|f| f.in_text(text, "t").to_string())
    }

    fn bytes(text: &str) -> Vec<u8> {
        match value(text).unwrap_or_else(|e| panic!("{text}: {e}")).data {
            ValueData::Tensor(bytes) => bytes.to_vec(),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn literals_become_bytes_of_their_type() {
        let cases: [(&str, &[u8]); 12] = [
            ("fp16(0x1p-24)", &[1, 0]),
            ("tensor<fp16, []>(-inf)", &[0, 0xfc]),
            ("tensor<fp16, [2]>([nan, -0x0p+0])", &[0, 0x7e, 0, 0x80]),
            ("fp16(nan(0x7e01))", &[1, 0x7e]),
            ("fp32(0x1p-149)", &[1, 0, 0, 0]),
            ("tensor<bf16, [1]>([0x1p+0])", &[0x80, 0x3f]),
            ("tensor<fp8e4m3fn, [2]>([0x1p+0, 0x1.cp+8])", &[0x38, 0x7e]),
            ("tensor<bool, [2]>([true, false])", &[1, 0]),
            ("tensor<int4, [3]>([-1, 2, -8])", &[0x2f, 8]),
            ("tensor<int8, [2, 2]>([[1, 2], [-1, -2]])", &[1, 2, 255, 254]),
            ("tensor<int32, [2, 0]>([[], []])", &[]),
            ("tensor<int32, [1099511627776, 0]>([])", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(bytes(text), expected, "{text}");
        }
    }

    #[test]
    fn unknown_sizes_follow_from_the_literal() {
        let shape = |text: &str| match value(text).unwrap().ty {
            ValueType::Tensor(t) => t.shape,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            shape("tensor<int32, [?, 2]>([[1, 2]])"),
            [Dim::Unknown, Dim::Fixed(2)]
        );
        assert_eq!(
            shape("tensor<int32, [?, ?]>([[1], [2]])"),
            [Dim::Fixed(2), Dim::Fixed(1)]
        );
        assert!(value("tensor<int32, [?, ?]>([[1], [2, 3]])").is_err());
    }

    #[test]
    fn containers_and_blobs_are_read() {
        let text = r#"tuple<string, dict<string, list<tensor<int32, [2]>, ?>>>(("a", {{"x\n\"", [[0, 4], [1, 2]]}}))"#;
        let ValueData::Tuple(parts) = value(text).unwrap().data else {
            panic!()
        };
        let ValueData::Dictionary(pairs) = &parts[1].data else {
            panic!()
        };
        assert_eq!(pairs[0].0.data, ValueData::Strings(vec!["x\n\"".to_string()]));
        let ValueData::List(ranges) = &pairs[0].1.data else {
            panic!()
        };
        assert_eq!(ranges.len(), 2);
        let blob =
            r#"tensor<fp16, [9]>(BLOBFILE(path = tensor<string, []>("w"), offset = tensor<uint64, []>(64)))"#;
        let expected = BlobRef {
            path: "w".to_string(),
            offset: 64,
        };
        assert_eq!(value(blob).unwrap().data, ValueData::Blob(expected));
    }

    #[test]
    fn values_that_do_not_fit_are_refused() {
        for text in [
            "int8(128)",
            "int32(0x1p+0)",
            "int32(true)",
            "bool(1)",
            "fp16(0x1p+16)",
            "fp16(nan(0x3c00))",
            "fp16(nan(0x7e01)",
            "tensor<int32, [2]>([1])",
            "tensor<int32, [1]>(1)",
            "tensor<int32, []>([1])",
            "tensor<int32, [2]>([1 2])",
            "string(a)",
            "state<fp16>(1)",
            "fp16(BLOBFILE(path = string(\"w\")))",
            "fp16(BLOBFILE(path = string(\"w\"), offset = string(\"w\")))",
            "fp16(BLOBFILE(path = string(\"w\"), path = string(\"w\")))",
        ] {
            assert!(value(text).is_err(), "{text}");
        }
    }
}
