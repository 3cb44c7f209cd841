//! MIL text to [`Program`]: a recursive-descent parser that takes both dialects everywhere.

use super::OPSETS;
use super::literal::parse_value;
use super::scan::{Fault, Result, Scanner};
use crate::check::{MAX_DEPTH, MAX_RANK};
use crate::program::*;

/// Reads a program from MIL text; `path` is how messages call the text.
///
/// Only the grammar is checked here; [`Program::check`] does the rest.
///
/// ```
/// let error = candle_coreml_mil::parse_program("program(1.0)\n{ func 7", "model.mil").unwrap_err();
/// assert_eq!(error.to_string(), r#"model.mil:2:8: found "7", expected a function's name"#);
/// ```
///
/// # Errors
/// [`crate::Error::Text`] with line and column.
pub fn parse_program(text: &str, path: &str) -> crate::Result<Program> {
    let mut scanner = Scanner::new(text.strip_prefix('\u{feff}').unwrap_or(text));
    program(&mut scanner).map_err(|fault| fault.in_text(text, path))
}

fn program(s: &mut Scanner) -> Result<Program> {
    if !s.accept_word("program") {
        return s.fail("MIL text starts with `program`");
    }
    s.expect("(")?;
    let at = s.here();
    let version = match s.number_word()? {
        "1.0" => ProgramVersion::V1_0,
        "1.3" => ProgramVersion::V1_3,
        other => {
            return Err(Fault::new(
                at,
                format!("program version {other}, 1.0 and 1.3 are supported"),
            ));
        }
    };
    s.expect(")")?;
    let attributes = optional_attributes(s)?;
    s.expect("{")?;
    let mut functions = Vec::new();
    while !s.accept("}") {
        functions.push(function(s)?);
    }
    match s.peek() {
        None => Ok(Program {
            version,
            functions,
            attributes,
        }),
        Some(_) => s.fail("text after the end of the program"),
    }
}

fn function(s: &mut Scanner) -> Result<Function> {
    if !s.accept_word("func") {
        return s.fail("expected `func` or `}`");
    }
    let name = s.name("a function's name")?.into_owned();
    s.expect("<")?;
    let opset = s.name("an operation set such as `ios18`")?;
    let opset = OPSETS
        .iter()
        .find(|(text, _)| *text == opset)
        .map_or(&*opset, |(_, name)| name)
        .to_string();
    s.expect(">")?;
    let inputs = parameters(s)?;
    let attributes = optional_attributes(s)?;
    let body = block(s, Vec::new(), 0)?;
    s.expect(";")?;
    Ok(Function {
        name,
        opset,
        inputs,
        attributes,
        body,
    })
}

fn parameters(s: &mut Scanner) -> Result<Vec<NamedType>> {
    s.expect("(")?;
    let mut list = Vec::new();
    while !s.accept(")") {
        separator(s, list.is_empty())?;
        list.push(named_type(s)?);
    }
    Ok(list)
}

fn separator(s: &mut Scanner, first: bool) -> Result<()> {
    if first { Ok(()) } else { s.expect(",") }
}

fn named_type(s: &mut Scanner) -> Result<NamedType> {
    let ty = value_type(s, 0)?;
    Ok(NamedType {
        ty,
        name: s.name("a name")?.into_owned(),
    })
}

fn optional_attributes(s: &mut Scanner) -> Result<Attributes> {
    let mut list = Vec::new();
    if !s.accept("[") {
        return Ok(list);
    }
    while !s.accept("]") {
        separator(s, list.is_empty())?;
        let name = s.name("an attribute's name")?.into_owned();
        s.expect("=")?;
        list.push((name, parse_value(s)?));
    }
    Ok(list)
}

fn block(s: &mut Scanner, inputs: Vec<NamedType>, depth: usize) -> Result<Block> {
    if depth > MAX_DEPTH {
        return s.fail(format!("blocks nested more than {MAX_DEPTH} deep"));
    }
    s.expect("{")?;
    let mut operations = Vec::new();
    while !s.accept("}") {
        operations.push(operation(s, depth)?);
    }
    s.expect("->")?;
    s.expect("(")?;
    let mut outputs = Vec::new();
    while !s.accept(")") {
        separator(s, outputs.is_empty())?;
        outputs.push(s.name("a name")?.into_owned());
    }
    Ok(Block {
        inputs,
        operations,
        outputs,
        attributes: optional_attributes(s)?,
    })
}

fn operation(s: &mut Scanner, depth: usize) -> Result<Operation> {
    let mut outputs = Vec::new();
    let mut probe = *s;
    // An operator is followed by `(`, a type is not: only then are there results.
    if !(probe.name("an operation or `}`").is_ok() && probe.peek() == Some('(')) {
        outputs.push(named_type(s)?);
        while s.accept(",") {
            outputs.push(named_type(s)?);
        }
        s.expect("=")?;
    }
    let op_type = s.name("an operator")?.into_owned();
    let inputs = arguments(s)?;
    let attributes = optional_attributes(s)?;
    let mut blocks = Vec::new();
    while s.peek() == Some('(') {
        let parameters = parameters(s)?;
        blocks.push(block(s, parameters, depth + 1)?);
    }
    s.expect(";")?;
    Ok(Operation {
        op_type,
        inputs,
        outputs,
        attributes,
        blocks,
    })
}

fn arguments(s: &mut Scanner) -> Result<Vec<(String, Vec<Argument>)>> {
    s.expect("(")?;
    let mut list = Vec::new();
    while !s.accept(")") {
        separator(s, list.is_empty())?;
        let name = s.name("a parameter's name")?.into_owned();
        s.expect("=")?;
        list.push((name, bindings(s)?));
    }
    Ok(list)
}

/// One argument, or several in parentheses for parameters that take any number.
fn bindings(s: &mut Scanner) -> Result<Vec<Argument>> {
    if !s.accept("(") {
        return Ok(vec![argument(s)?]);
    }
    let mut list = Vec::new();
    while !s.accept(")") {
        separator(s, list.is_empty())?;
        list.push(argument(s)?);
    }
    Ok(list)
}

fn argument(s: &mut Scanner) -> Result<Argument> {
    let mut probe = *s;
    let name = probe.name("a name or a value")?;
    if matches!(probe.peek(), Some('(' | '<')) {
        return parse_value(s).map(Argument::Value);
    }
    *s = probe;
    Ok(Argument::Name(name.into_owned()))
}

pub(super) fn value_type(s: &mut Scanner, depth: usize) -> Result<ValueType> {
    if depth > MAX_DEPTH {
        return s.fail(format!("types nested more than {MAX_DEPTH} deep"));
    }
    let at = s.here();
    let name = s.name("a type")?;
    if let Some(dtype) = DType::from_name(&name) {
        return Ok(ValueType::Tensor(TensorType {
            dtype,
            shape: Vec::new(),
        }));
    }
    let ty = match &*name {
        "tensor" => {
            s.expect("<")?;
            ValueType::Tensor(tensor_type(s)?)
        }
        "list" => {
            s.expect("<")?;
            let element = Box::new(value_type(s, depth + 1)?);
            s.expect(",")?;
            ValueType::List {
                element,
                len: size(s)?,
            }
        }
        "dict" => {
            s.expect("<")?;
            let key = Box::new(value_type(s, depth + 1)?);
            s.expect(",")?;
            ValueType::Dictionary {
                key,
                value: Box::new(value_type(s, depth + 1)?),
            }
        }
        "tuple" => {
            s.expect("<")?;
            let mut types = Vec::new();
            while s.peek() != Some('>') {
                separator(s, types.is_empty())?;
                types.push(value_type(s, depth + 1)?);
            }
            ValueType::Tuple(types)
        }
        "state" => {
            s.expect("<")?;
            ValueType::State(Box::new(value_type(s, depth + 1)?))
        }
        other => return Err(Fault::new(at, format!("{other:?} is no type"))),
    };
    s.expect(">")?;
    Ok(ty)
}

fn tensor_type(s: &mut Scanner) -> Result<TensorType> {
    let at = s.here();
    let name = s.name("an element type")?;
    let dtype =
        DType::from_name(&name).ok_or_else(|| Fault::new(at, format!("{name:?} is no element type")))?;
    s.expect(",")?;
    s.expect("[")?;
    let mut shape = Vec::new();
    while !s.accept("]") {
        separator(s, shape.is_empty())?;
        if shape.len() == MAX_RANK {
            return s.fail(format!("more than {MAX_RANK} dimensions"));
        }
        let dim = if s.accept("*") {
            Dim::Variadic
        } else {
            size(s)?.map_or(Dim::Unknown, Dim::Fixed)
        };
        shape.push(dim);
    }
    Ok(TensorType { dtype, shape })
}

/// A size, or `?` for an unknown one.
fn size(s: &mut Scanner) -> Result<Option<usize>> {
    if s.accept("?") {
        return Ok(None);
    }
    let at = s.here();
    let n = s.unsigned("size or `?`")?;
    usize::try_from(n)
        .map(Some)
        .map_err(|_| Fault::new(at, format!("size {n} is too large")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_blocks_several_results_and_variadic_arguments_are_read() {
        let text = r#"program(1.3) [buildInfo = dict<string, string>({{"a", "b"}})] {
            func main<ios18>(int32 n, tensor<fp32, [2]> x) {
                int32 i, tensor<fp32, [2]> y = while_loop(loop_vars = (n, x))
                    (int32 a, tensor<fp32, [2]> b) { bool go = less(x = a, y = int32(4)); } -> (go)
                    (int32 c, tensor<fp32, [2]> d) { int32 e = add(x = c, y = c)[name = string("e")]; } -> (e, d);
                write_state(data = y, input = y);
            } -> (y);
        }"#;
        let program = parse_program(text, "t").unwrap();
        let ops = &program.functions[0].body.operations;
        assert_eq!(ops.len(), 2);
        assert_eq!(ops[0].outputs.len(), 2);
        assert_eq!(ops[0].input("loop_vars").unwrap().len(), 2);
        assert_eq!(ops[0].blocks[1].outputs, ["e", "d"]);
        assert!(ops[1].outputs.is_empty());
    }

    #[test]
    fn a_result_of_any_rank_stays_one() {
        let text = "program(1.0)\n{\n    func f<ios16>(tensor<int32, [?]> s) {\n            tensor<fp32, [*]> y = fill(shape = s);\n        } -> (y);\n}";
        let program = parse_program(text, "t").unwrap();
        let again = parse_program(&crate::text::print_program(&program), "t").unwrap();
        assert_eq!(program, again);
        let ty = program.functions[0].body.operations[0].outputs[0]
            .ty
            .tensor()
            .unwrap();
        assert!(ty.is_variadic() && ty.admits(&[]) && ty.admits(&[2, 3]));
    }

    #[test]
    fn faults_are_told_with_line_and_column() {
        let body = |op: &str| format!("program(1.0)\n{{ func f<ios16>() {{\n  {op} }} -> ();\n}}");
        let cases = [
            (String::new(), "t:1:1: MIL text starts"),
            ("program(2.0)".into(), "t:1:9: program version 2.0"),
            (
                "program(1.0) { func f<ios16>() { } -> (); } x".into(),
                "t:1:45: text after",
            ),
            (body("relu(x = y)"), "t:3:15: found \"}\", expected `;`"),
            (body("quux y = relu();"), "t:3:3: \"quux\" is no type"),
            (
                body("tensor<fp17, [1]> y = relu();"),
                "t:3:10: \"fp17\" is no element type",
            ),
            (body("tensor<fp16, [-1]> y = relu();"), "expected size or `?`"),
            (
                body("tensor<fp16, [99999999999999999999]> y = relu();"),
                "is no size or `?` of 64 bits",
            ),
            (body("fp16 y = relu(x = (a, b);"), "expected `,`"),
            (
                body("fp16 y = const()[val = string(\"a];"),
                "the text ends inside",
            ),
        ];
        for (text, expected) in cases {
            let found = parse_program(&text, "t").unwrap_err().to_string();
            assert!(found.contains(expected), "{text}: {found}");
        }
    }

    #[test]
    fn deep_nesting_is_refused() {
        let types = "tuple<".repeat(100_000);
        let blocks = "cond(p = p) () { ".repeat(100_000);
        let lists = format!("f(x = tensor<int32, [1]>({}", "[".repeat(100_000));
        for op in [format!("{types} x = f();"), blocks, lists] {
            let text = format!("program(1.0) {{ func f<ios16>() {{ {op}");
            assert!(parse_program(&text, "t").is_err());
        }
    }
}
