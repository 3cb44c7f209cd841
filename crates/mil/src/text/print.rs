//! [`Program`] to MIL text, laid out as Apple's compiler does.

use std::fmt::Write;

use super::float::print_float;
use super::{OPSETS, is_plain_name};
use crate::element::{float_value, int_value, nan_bits, raw_bits};
use crate::program::*;

const FUNCTION_INDENT: usize = 4;
const BODY_INDENT: usize = 12;
/// What a nested block is further in than its operation, and its operations than the block.
const STEP: usize = 4;

/// The program as MIL text, in the dialect of its version.
///
/// For a program that [`Program::check`] accepts, [`crate::parse_program`] gives the same program back. Names that MIL
/// text cannot have are written in backquotes and unusual NaNs as `nan(0x7e01)`; Apple's compiler writes neither.
pub fn print_program(program: &Program) -> String {
    let mut p = Printer {
        out: String::new(),
        version: program.version,
    };
    p.program(program);
    p.out
}

struct Printer {
    out: String,
    version: ProgramVersion,
}

impl Printer {
    fn push(&mut self, text: &str) {
        self.out.push_str(text);
    }

    fn number(&mut self, n: impl std::fmt::Display) {
        write!(self.out, "{n}").expect("writing to a string cannot fail");
    }

    fn line(&mut self, indent: usize) {
        self.out.push('\n');
        self.out.extend(std::iter::repeat_n(' ', indent));
    }

    /// Puts `, ` between the items.
    fn list<T>(&mut self, items: impl IntoIterator<Item = T>, mut each: impl FnMut(&mut Self, T)) {
        for (i, item) in items.into_iter().enumerate() {
            if i > 0 {
                self.push(", ");
            }
            each(self, item);
        }
    }

    fn program(&mut self, program: &Program) {
        self.push(match program.version {
            ProgramVersion::V1_0 => "program(1.0)\n",
            ProgramVersion::V1_3 => "program(1.3)\n",
        });
        self.attributes(&program.attributes);
        self.push("\n{");
        for f in &program.functions {
            self.function(f);
        }
        self.push("\n}");
    }

    fn function(&mut self, f: &Function) {
        self.line(FUNCTION_INDENT);
        self.push("func ");
        self.name(&f.name);
        self.push("<");
        let opset = OPSETS
            .iter()
            .find(|(_, name)| *name == f.opset)
            .map_or(f.opset.as_str(), |(text, _)| text);
        self.name(opset);
        self.push(">");
        self.parameters(&f.inputs);
        if !f.attributes.is_empty() {
            self.push(" ");
            self.attributes(&f.attributes);
        }
        self.push(" ");
        self.block(&f.body, BODY_INDENT, BODY_INDENT - STEP);
        self.push(";");
    }

    /// The operations at `indent`, the closing brace at `close`.
    fn block(&mut self, b: &Block, indent: usize, close: usize) {
        self.push("{");
        for op in &b.operations {
            self.line(indent);
            self.operation(op, indent);
        }
        self.line(close);
        self.push("} -> (");
        self.list(&b.outputs, |p, name| p.name(name));
        self.push(")");
        if !b.attributes.is_empty() {
            self.attributes(&b.attributes);
        }
    }

    fn parameters(&mut self, list: &[NamedType]) {
        self.push("(");
        self.list(list, Self::named_type);
        self.push(")");
    }

    fn named_type(&mut self, named: &NamedType) {
        self.value_type(&named.ty);
        self.push(" ");
        self.name(&named.name);
    }

    fn operation(&mut self, op: &Operation, indent: usize) {
        if !op.outputs.is_empty() {
            self.list(&op.outputs, Self::named_type);
            self.push(" = ");
        }
        self.name(&op.op_type);
        self.push("(");
        self.list(&op.inputs, |p, (name, arguments)| {
            p.name(name);
            p.push(" = ");
            p.arguments(arguments);
        });
        self.push(")");
        if !op.attributes.is_empty() {
            self.attributes(&op.attributes);
        }
        for block in &op.blocks {
            self.line(indent + STEP);
            self.parameters(&block.inputs);
            self.push(" ");
            self.block(block, indent + 2 * STEP, indent + STEP);
        }
        self.push(";");
    }

    fn arguments(&mut self, arguments: &[Argument]) {
        if let [argument] = arguments {
            return self.argument(argument);
        }
        self.push("(");
        self.list(arguments, Self::argument);
        self.push(")");
    }

    fn argument(&mut self, argument: &Argument) {
        match argument {
            Argument::Name(name) => self.name(name),
            Argument::Value(value) => self.value(value),
        }
    }

    fn attributes(&mut self, list: &Attributes) {
        self.push("[");
        self.list(list, |p, (name, value)| {
            p.name(name);
            p.push(" = ");
            p.value(value);
        });
        self.push("]");
    }

    fn name(&mut self, name: &str) {
        if is_plain_name(name) {
            self.push(name)
        } else {
            self.quoted(name, '`')
        }
    }

    fn quoted(&mut self, text: &str, quote: char) {
        self.out.push(quote);
        for c in text.chars() {
            match c {
                '\n' => self.push("\\n"),
                '\t' => self.push("\\t"),
                '\r' => self.push("\\r"),
                '\\' => self.push("\\\\"),
                c if c == quote => self.out.extend(['\\', c]),
                c if c.is_ascii_control() => {
                    write!(self.out, "\\x{:02x}", u32::from(c)).expect("writing to a string cannot fail");
                }
                c => self.out.push(c),
            }
        }
        self.out.push(quote);
    }

    fn value_type(&mut self, ty: &ValueType) {
        match ty {
            ValueType::Tensor(t) if t.shape.is_empty() && self.version == ProgramVersion::V1_3 => {
                self.push(t.dtype.name());
            }
            ValueType::Tensor(t) => self.number(t),
            ValueType::List { element, len } => {
                self.push("list<");
                self.value_type(element);
                match len {
                    Some(n) => self.number(format_args!(", {n}>")),
                    None => self.push(", ?>"),
                }
            }
            ValueType::Tuple(types) => {
                self.push("tuple<");
                self.list(types, Self::value_type);
                self.push(">");
            }
            ValueType::Dictionary { key, value } => {
                self.push("dict<");
                self.value_type(key);
                self.push(", ");
                self.value_type(value);
                self.push(">");
            }
            ValueType::State(inner) => {
                self.push("state<");
                self.value_type(inner);
                self.push(">");
            }
        }
    }

    fn value(&mut self, value: &Value) {
        self.value_type(&value.ty);
        self.push("(");
        self.literal(value);
        self.push(")");
    }

    fn literal(&mut self, value: &Value) {
        match &value.data {
            ValueData::Tensor(_) | ValueData::Strings(_) => self.tensor(value),
            ValueData::Blob(blob) => self.blob(blob),
            ValueData::List(values) => {
                self.push("[");
                self.list(values, Self::literal);
                self.push("]");
            }
            ValueData::Tuple(values) => {
                self.push("(");
                self.list(values, Self::literal);
                self.push(")");
            }
            ValueData::Dictionary(pairs) => {
                self.push("{");
                self.list(pairs, |p, (key, value)| {
                    p.push("{");
                    p.literal(key);
                    p.push(", ");
                    p.literal(value);
                    p.push("}");
                });
                self.push("}");
            }
        }
    }

    fn blob(&mut self, blob: &BlobRef) {
        let (string, uint64) = match self.version {
            ProgramVersion::V1_0 => ("tensor<string, []>", "tensor<uint64, []>"),
            ProgramVersion::V1_3 => ("string", "uint64"),
        };
        self.number(format_args!("BLOBFILE(path = {string}("));
        self.quoted(&blob.path, '"');
        self.number(format_args!("), offset = {uint64}({})", blob.offset));
        self.push(")");
    }

    fn tensor(&mut self, value: &Value) {
        let ValueType::Tensor(ty) = &value.ty else { return };
        let count = match &value.data {
            ValueData::Strings(strings) => strings.len(),
            ValueData::Tensor(bytes) => match (ty.element_count(), ty.dtype.bits()) {
                (Some(count), _) => count,
                (None, Some(bits)) => bytes.len() * 8 / bits,
                (None, None) => 0,
            },
            _ => return,
        };
        if count == 0 {
            return self.push("[]");
        }
        self.elements(&value.data, ty.dtype, &sizes(ty, count), &mut 0);
    }

    fn elements(&mut self, data: &ValueData, dtype: DType, sizes: &[usize], next: &mut usize) {
        let Some((size, inner)) = sizes.split_first() else {
            self.element(data, dtype, *next);
            *next += 1;
            return;
        };
        self.push("[");
        self.list(0..*size, |p, _| p.elements(data, dtype, inner, next));
        self.push("]");
    }

    fn element(&mut self, data: &ValueData, dtype: DType, index: usize) {
        let raw = match data {
            ValueData::Strings(strings) => {
                return self.quoted(strings.get(index).map_or("", String::as_str), '"');
            }
            ValueData::Tensor(bytes) => raw_bits(dtype, bytes, index).unwrap_or(0),
            _ => return,
        };
        if dtype == DType::Bool {
            return self.push(if raw == 0 { "false" } else { "true" });
        }
        if !dtype.is_float() {
            return self.number(int_value(dtype, raw));
        }
        let x = float_value(dtype, raw);
        if !x.is_nan() {
            print_float(x, &mut self.out);
        } else if raw == nan_bits(dtype) {
            self.push("nan");
        } else {
            self.number(format_args!("nan({raw:#x})"));
        }
    }
}

/// The sizes of a tensor of `count` elements, an unknown dimension taken from the count.
fn sizes(ty: &TensorType, count: usize) -> Vec<usize> {
    let fixed: usize = ty
        .shape
        .iter()
        .map(|d| if let Dim::Fixed(n) = d { *n } else { 1 })
        .product();
    let mut unknown = count / fixed.max(1);
    let size = |d: &Dim| match d {
        Dim::Fixed(n) => *n,
        Dim::Unknown | Dim::Variadic => std::mem::replace(&mut unknown, 1),
    };
    ty.shape.iter().map(size).collect()
}
