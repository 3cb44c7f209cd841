//! The program as it is written in a file: functions, blocks, operations and values, names kept, nothing interpreted.

use bytes::Bytes;

/// A MIL program: the functions of one model file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Program {
    /// `program(1.0)` or `program(1.3)` of MIL text; 1 for the protobuf form.
    pub version: ProgramVersion,
    /// In file order for text, sorted by name for protobuf (whose map has no order).
    pub functions: Vec<Function>,
    /// Program attributes, for instance `buildInfo`.
    pub attributes: Attributes,
}

/// The dialect of MIL text a program was written in, or is written in when it comes from the protobuf form: from specification
/// version 9 on with bare scalars.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProgramVersion {
    /// Scalars are rank-0 tensors: `tensor<int32, []>(1)`.
    #[default]
    V1_0,
    /// Scalars are bare: `int32(1)`.
    V1_3,
}

/// Named values in the order they were written.
pub type Attributes = Vec<(String, Value)>;

/// A function: what a model runs when it predicts.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    /// The name callers choose it by; `main` where there is one only.
    pub name: String,
    /// The operation set it is written in, `CoreML5` to `CoreML9` (text `ios15` to `ios26` is mapped to these).
    pub opset: String,
    /// Parameters, states included.
    pub inputs: Vec<NamedType>,
    /// Function attributes, for instance `FlexibleShapeInformation`.
    pub attributes: Attributes,
    /// The operations; its outputs are the function's outputs.
    pub body: Block,
}

/// A basic block: operations in order, values defined once.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Block {
    /// Block parameters (loop variables); empty for a function's body.
    pub inputs: Vec<NamedType>,
    /// In the order they run.
    pub operations: Vec<Operation>,
    /// Names of the values the block gives.
    pub outputs: Vec<String>,
    /// Block attributes; empty in every file seen.
    pub attributes: Attributes,
}

/// A name and its type.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedType {
    /// The value's name, unique among those visible: blocks side by side may use the same ones (the two blocks of a
    /// `while_loop` from coremltools do).
    pub name: String,
    /// Its type as declared.
    pub ty: ValueType,
}

/// One operation as written.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Operation {
    /// The operator's name: `conv`, `const`, `while_loop`.
    pub op_type: String,
    /// Argument lists by parameter name; variadic parameters (`concat.values`) have several.
    pub inputs: Vec<(String, Vec<Argument>)>,
    /// Results; empty for `write_state`.
    pub outputs: Vec<NamedType>,
    /// Attributes: `val` of `const`, everything of the iOS16 `constexpr_*`, and `name`.
    pub attributes: Attributes,
    /// Nested blocks of `cond` and `while_loop`.
    pub blocks: Vec<Block>,
}

/// What an operation's input is bound to.
#[derive(Debug, Clone, PartialEq)]
pub enum Argument {
    /// A value defined earlier.
    Name(String),
    /// A value written in place.
    Value(Value),
}

/// A literal or a reference into a weight file, with its type.
#[derive(Debug, Clone, PartialEq)]
pub struct Value {
    /// Declared type.
    pub ty: ValueType,
    /// What it holds.
    pub data: ValueData,
}

/// What a [`Value`] holds.
#[derive(Debug, Clone, PartialEq)]
pub enum ValueData {
    /// Tensor elements, row-major, little-endian, in the dtype's own width; `bool` is one byte an element, types under
    /// 8 bits are packed with the first element in the lowest bits.
    Tensor(Bytes),
    /// Elements of a string tensor.
    Strings(Vec<String>),
    /// Elements in a weight file.
    Blob(BlobRef),
    /// Elements of a list.
    List(Vec<Value>),
    /// Elements of a tuple.
    Tuple(Vec<Value>),
    /// Pairs of a dictionary in the order they were written.
    Dictionary(Vec<(Value, Value)>),
}

/// A place in a weight file: the offset is that of the blob's metadata record, as files have it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BlobRef {
    /// As written, for instance `@model_path/weights/weight.bin`.
    pub path: String,
    /// Byte offset of the metadata record in that file.
    pub offset: u64,
}

/// The type of a value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ValueType {
    /// A tensor; rank 0 is a scalar.
    Tensor(TensorType),
    /// A list of `len` elements (`None`: any number).
    List {
        /// Type of each element.
        element: Box<ValueType>,
        /// Number of elements where it is fixed.
        len: Option<usize>,
    },
    /// A fixed sequence of types.
    Tuple(Vec<ValueType>),
    /// A mapping.
    Dictionary {
        /// Type of the keys.
        key: Box<ValueType>,
        /// Type of the values.
        value: Box<ValueType>,
    },
    /// A buffer that persists between predictions.
    State(Box<ValueType>),
}

/// Element type and shape of a tensor.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Outermost dimension first; empty for a scalar.
    pub shape: Vec<Dim>,
}

/// One dimension of a tensor type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dim {
    /// A known size.
    Fixed(usize),
    /// Known when the model runs.
    Unknown,
    /// Any number of dimensions, known when the model runs: only in the declared type of a result.
    Variadic,
}

/// Element types of MIL. The names are those of MIL text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum DType {
    Bool,
    String,
    Fp16,
    Fp32,
    Fp64,
    Bf16,
    Int4,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint1,
    Uint2,
    Uint3,
    Uint4,
    Uint6,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Fp8E4M3FN,
    Fp8E5M2,
}

impl DType {
    /// Bits one element takes in a weight file or a tensor literal; `None` for strings.
    pub fn bits(self) -> Option<usize> {
        Some(match self {
            DType::String => return None,
            DType::Uint1 => 1,
            DType::Uint2 => 2,
            DType::Uint3 => 3,
            DType::Int4 | DType::Uint4 => 4,
            DType::Uint6 => 6,
            DType::Bool | DType::Int8 | DType::Uint8 | DType::Fp8E4M3FN | DType::Fp8E5M2 => 8,
            DType::Fp16 | DType::Bf16 | DType::Int16 | DType::Uint16 => 16,
            DType::Fp32 | DType::Int32 | DType::Uint32 => 32,
            DType::Fp64 | DType::Int64 | DType::Uint64 => 64,
        })
    }

    /// Bytes that `count` elements take, packed; `None` for strings and sizes that overflow.
    pub fn byte_len(self, count: usize) -> Option<usize> {
        let bits = self.bits()?;
        if bits >= 8 {
            count.checked_mul(bits / 8)
        } else {
            Some(count.checked_mul(bits)?.div_ceil(8))
        }
    }

    /// The dtype with that name in MIL text.
    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == name)
    }

    /// Every dtype.
    pub const ALL: [DType; 22] = [
        DType::Bool,
        DType::String,
        DType::Fp16,
        DType::Fp32,
        DType::Fp64,
        DType::Bf16,
        DType::Int4,
        DType::Int8,
        DType::Int16,
        DType::Int32,
        DType::Int64,
        DType::Uint1,
        DType::Uint2,
        DType::Uint3,
        DType::Uint4,
        DType::Uint6,
        DType::Uint8,
        DType::Uint16,
        DType::Uint32,
        DType::Uint64,
        DType::Fp8E4M3FN,
        DType::Fp8E5M2,
    ];

    /// The name in MIL text: `fp16`, `int32`, `bool`.
    pub fn name(self) -> &'static str {
        match self {
            DType::Bool => "bool",
            DType::String => "string",
            DType::Fp16 => "fp16",
            DType::Fp32 => "fp32",
            DType::Fp64 => "fp64",
            DType::Bf16 => "bf16",
            DType::Int4 => "int4",
            DType::Int8 => "int8",
            DType::Int16 => "int16",
            DType::Int32 => "int32",
            DType::Int64 => "int64",
            DType::Uint1 => "uint1",
            DType::Uint2 => "uint2",
            DType::Uint3 => "uint3",
            DType::Uint4 => "uint4",
            DType::Uint6 => "uint6",
            DType::Uint8 => "uint8",
            DType::Uint16 => "uint16",
            DType::Uint32 => "uint32",
            DType::Uint64 => "uint64",
            DType::Fp8E4M3FN => "fp8e4m3fn",
            DType::Fp8E5M2 => "fp8e5m2",
        }
    }

    /// True for the floating-point types.
    pub fn is_float(self) -> bool {
        use DType::*;
        matches!(self, Fp16 | Fp32 | Fp64 | Bf16 | Fp8E4M3FN | Fp8E5M2)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// As bare MIL text: `tensor<fp16, [1, ?]>`.
impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tensor<{}, [", self.dtype)?;
        for (i, dim) in self.shape.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            match dim {
                Dim::Fixed(n) => write!(f, "{comma}{n}")?,
                Dim::Unknown => write!(f, "{comma}?")?,
                Dim::Variadic => write!(f, "{comma}*")?,
            }
        }
        f.write_str("]>")
    }
}

impl TensorType {
    /// A type with every dimension fixed.
    pub fn fixed(dtype: DType, shape: &[usize]) -> Self {
        TensorType {
            dtype,
            shape: shape.iter().map(|&n| Dim::Fixed(n)).collect(),
        }
    }

    /// Number of elements: the product of the dimensions; `None` where one is unknown or the product overflows.
    pub fn element_count(&self) -> Option<usize> {
        let mut count = 1usize;
        for dim in &self.shape {
            let Dim::Fixed(n) = dim else { return None };
            count = count.checked_mul(*n)?;
        }
        Some(count)
    }

    /// True when the number of dimensions is known only when the model runs.
    pub fn is_variadic(&self) -> bool {
        self.shape.contains(&Dim::Variadic)
    }

    /// True when a tensor of this shape has this type: known sizes are equal, unknown ones are whatever they are.
    ///
    /// ```
    /// use candle_coreml_mil::{DType, Dim, TensorType};
    ///
    /// let rows = TensorType { dtype: DType::Fp32, shape: vec![Dim::Unknown, Dim::Fixed(3)] };
    /// assert!(rows.admits(&[5, 3]));
    /// assert!(!rows.admits(&[5, 4]));
    /// ```
    pub fn admits(&self, shape: &[usize]) -> bool {
        let fits = |(d, n): (&Dim, &usize)| match d {
            Dim::Fixed(size) => size == n,
            Dim::Unknown | Dim::Variadic => true,
        };
        self.is_variadic() || self.shape.len() == shape.len() && self.shape.iter().zip(shape).all(fits)
    }

    /// Bytes the elements take, packed where they are smaller than a byte; `None` for strings, unknown dimensions and
    /// sizes that overflow.
    pub fn byte_len(&self) -> Option<usize> {
        self.dtype.byte_len(self.element_count()?)
    }

    /// The shape where every dimension is fixed.
    pub fn fixed_shape(&self) -> Option<Vec<usize>> {
        self.shape
            .iter()
            .map(|d| if let Dim::Fixed(n) = d { Some(*n) } else { None })
            .collect()
    }
}

impl ValueType {
    /// The tensor type, of a state its buffer's.
    pub fn tensor(&self) -> Option<&TensorType> {
        match self {
            ValueType::Tensor(t) => Some(t),
            ValueType::State(inner) => inner.tensor(),
            _ => None,
        }
    }
}

impl Operation {
    /// The argument list bound to parameter `name`.
    pub fn input(&self, name: &str) -> Option<&[Argument]> {
        self.inputs
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, a)| a.as_slice())
    }

    /// The attribute `name`.
    pub fn attribute(&self, name: &str) -> Option<&Value> {
        self.attributes.iter().find(|(n, _)| n == name).map(|(_, v)| v)
    }
}

impl Program {
    /// The function `name`.
    pub fn function(&self, name: &str) -> Option<&Function> {
        self.functions.iter().find(|f| f.name == name)
    }
}
