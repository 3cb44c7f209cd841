//! The rules every program keeps: names are defined once and before their use, values have the size their type says.

use std::collections::HashSet;

use crate::blob::padding_bits;
use crate::error::{Problem, problem};
use crate::program::*;

/// Blocks inside blocks, and types or values inside types or values.
pub(crate) const MAX_DEPTH: usize = 64;
/// Dimensions of one tensor.
pub(crate) const MAX_RANK: usize = 32;
/// Bytes of one tensor: no machine addresses more.
pub(crate) const MAX_TENSOR_BYTES: usize = 1 << 47;

/// Where a program breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("function {function:?}: {problem}")]
#[non_exhaustive]
pub struct ProgramError {
    /// The function; empty for the program's own attributes.
    pub function: String,
    /// The place in it, what was found and what is allowed.
    pub problem: String,
}

type Result<T, E = Problem> = std::result::Result<T, E>;

impl Program {
    /// Checks the rules that later stages rely on. [`crate::Model::open`] does it for every program it reads.
    ///
    /// - functions have different names; every name of a value is defined before it is used;
    /// - a name is defined once among those visible (blocks side by side may use the same ones);
    /// - the outputs of functions and blocks exist, and a function's body has no block inputs of its own;
    /// - values have the kind and the number of elements their types say; at most one dimension of a value is unknown;
    ///   booleans are 0 or 1, and bits behind the last packed element are 0;
    /// - nesting, ranks and the sizes of tensors are within limits (64 levels, 32 dimensions, 128 TiB).
    ///
    /// It does not know operators: whether `conv` has a weight is for those who run the program.
    ///
    /// ```
    /// let text = "program(1.0) { func main<ios16>(tensor<fp16, [2]> x) { } -> (y); }";
    /// let error = candle_coreml_mil::parse_program(text, "m").unwrap().check().unwrap_err();
    /// assert_eq!(error.to_string(), r#"function "main": output "y" is not defined"#);
    /// ```
    ///
    /// # Errors
    /// The first rule broken, with its place.
    pub fn check(&self) -> Result<(), ProgramError> {
        let fail = |function: &str, p: Problem| ProgramError {
            function: function.to_string(),
            problem: p.into_text(),
        };
        attributes(&self.attributes).map_err(|p| fail("", p))?;
        let mut names = HashSet::new();
        for f in &self.functions {
            if !names.insert(&f.name) {
                return Err(fail(&f.name, problem!("defined twice")));
            }
            function(f).map_err(|p| fail(&f.name, p))?;
        }
        Ok(())
    }
}

fn function(f: &Function) -> Result<()> {
    let mut scope = Scope::default();
    named_types(&f.inputs, &mut scope, "input")?;
    attributes(&f.attributes)?;
    if let Some(input) = f.body.inputs.first() {
        return Err(problem!(
            "its body has a block input of its own, {:?}",
            input.name
        ));
    }
    block(&f.body, &mut scope, 0)
}

/// Names visible at a place, and the order they came in so that a block's can be dropped at its end.
#[derive(Default)]
struct Scope<'p> {
    visible: HashSet<&'p str>,
    order: Vec<&'p str>,
}

impl<'p> Scope<'p> {
    fn define(&mut self, name: &'p str, what: &str) -> Result<()> {
        if name.is_empty() {
            return Err(problem!("{what} without a name"));
        }
        if !self.visible.insert(name) {
            return Err(problem!("{what} {name:?} is defined already"));
        }
        self.order.push(name);
        Ok(())
    }

    fn leave(&mut self, mark: usize) {
        for name in self.order.drain(mark..) {
            self.visible.remove(name);
        }
    }
}

fn named_types<'p>(list: &'p [NamedType], scope: &mut Scope<'p>, what: &str) -> Result<()> {
    for named in list {
        scope.define(&named.name, what)?;
        value_type(&named.ty, 0).map_err(|p| p.within(format!("{what} {:?}", named.name)))?;
    }
    Ok(())
}

fn block<'p>(b: &'p Block, scope: &mut Scope<'p>, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(problem!("blocks nested more than {MAX_DEPTH} deep"));
    }
    let mark = scope.order.len();
    named_types(&b.inputs, scope, "block input")?;
    attributes(&b.attributes)?;
    for (i, op) in b.operations.iter().enumerate() {
        operation(op, scope, depth).map_err(|p| {
            let output = op.outputs.first().map_or("", |o| o.name.as_str());
            p.within(format!("operation {i} {output:?} ({})", op.op_type))
        })?;
    }
    for name in &b.outputs {
        if !scope.visible.contains(name.as_str()) {
            return Err(problem!("output {name:?} is not defined"));
        }
    }
    scope.leave(mark);
    Ok(())
}

fn operation<'p>(op: &'p Operation, scope: &mut Scope<'p>, depth: usize) -> Result<()> {
    if op.op_type.is_empty() {
        return Err(problem!("no operator"));
    }
    unique(&op.inputs, "input")?;
    for (name, arguments) in &op.inputs {
        for argument in arguments {
            match argument {
                Argument::Name(value) if scope.visible.contains(value.as_str()) => {}
                Argument::Name(value) => {
                    return Err(problem!("input {name:?}: {value:?} is not defined before"));
                }
                Argument::Value(v) => value(v, 0).map_err(|p| p.within(format!("input {name:?}")))?,
            }
        }
    }
    attributes(&op.attributes)?;
    for (i, inner) in op.blocks.iter().enumerate() {
        block(inner, scope, depth + 1).map_err(|p| p.within(format!("block {i}")))?;
    }
    named_types(&op.outputs, scope, "output")
}

fn attributes(list: &Attributes) -> Result<()> {
    unique(list, "attribute")?;
    list.iter()
        .try_for_each(|(name, v)| value(v, 0).map_err(|p| p.within(format!("attribute {name:?}"))))
}

/// Lists of names are short as a rule; longer ones are not compared pair by pair.
const FEW_NAMES: usize = 16;

fn unique<T>(list: &[(String, T)], what: &str) -> Result<()> {
    let fail = |name: &String| Err(problem!("{what} {name:?} is empty or given twice"));
    let mut seen = HashSet::new();
    for (i, (name, _)) in list.iter().enumerate() {
        let before = list.iter().take(i).map(|(name, _)| name);
        let twice = if list.len() <= FEW_NAMES {
            before.into_iter().any(|n| n == name)
        } else {
            !seen.insert(name)
        };
        if twice || name.is_empty() {
            return fail(name);
        }
    }
    Ok(())
}

fn value_type(ty: &ValueType, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(problem!("types nested more than {MAX_DEPTH} deep"));
    }
    match ty {
        ValueType::Tensor(t) => tensor_type(t),
        ValueType::List { element, .. } => value_type(element, depth + 1),
        ValueType::Tuple(types) => types.iter().try_for_each(|t| value_type(t, depth + 1)),
        ValueType::Dictionary { key, value } => {
            value_type(key, depth + 1)?;
            value_type(value, depth + 1)
        }
        ValueType::State(inner) => match &**inner {
            ValueType::Tensor(t) => tensor_type(t),
            _ => Err(problem!("a state of something else than a tensor")),
        },
    }
}

fn tensor_type(t: &TensorType) -> Result<()> {
    if t.shape.len() > MAX_RANK {
        return Err(problem!(
            "{} dimensions, at most {MAX_RANK} are allowed",
            t.shape.len()
        ));
    }
    // Zeros count as ones, so that no partial product of the shape can overflow either.
    let elements = t.shape.iter().try_fold(1usize, |n, d| match d {
        Dim::Fixed(size) => n.checked_mul((*size).max(1)),
        Dim::Unknown | Dim::Variadic => Some(n),
    });
    let bytes = elements.and_then(|n| n.checked_mul(t.dtype.bits().map_or(1, |bits| bits.div_ceil(8))));
    match bytes {
        Some(bytes) if bytes <= MAX_TENSOR_BYTES => Ok(()),
        _ => Err(problem!("{t} has more than {MAX_TENSOR_BYTES} bytes")),
    }
}

fn value(v: &Value, depth: usize) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(problem!("values nested more than {MAX_DEPTH} deep"));
    }
    value_type(&v.ty, depth)?;
    match (&v.ty, &v.data) {
        (ValueType::Tensor(t), ValueData::Tensor(bytes)) => tensor_value(t, bytes),
        (ValueType::Tensor(t), ValueData::Strings(strings)) if t.dtype == DType::String => {
            check_count(t, strings.len())
        }
        (ValueType::Tensor(t), ValueData::Blob(_)) => match t.byte_len() {
            Some(_) => Ok(()),
            None => Err(problem!("{t} in a weight file has no fixed size")),
        },
        (ValueType::List { element, len }, ValueData::List(values)) => {
            if len.is_some_and(|n| n != values.len()) {
                return Err(problem!(
                    "a list of {} elements where {len:?} are declared",
                    values.len()
                ));
            }
            values.iter().try_for_each(|v| typed(v, element, depth))
        }
        (ValueType::Tuple(types), ValueData::Tuple(values)) => {
            if types.len() != values.len() {
                return Err(problem!(
                    "a tuple of {} where {} are declared",
                    values.len(),
                    types.len()
                ));
            }
            values
                .iter()
                .zip(types)
                .try_for_each(|(v, ty)| typed(v, ty, depth))
        }
        (ValueType::Dictionary { key, value }, ValueData::Dictionary(pairs)) => {
            pairs.iter().try_for_each(|(k, v)| {
                typed(k, key, depth)?;
                typed(v, value, depth)
            })
        }
        _ => Err(problem!("the value is of another kind than its type")),
    }
}

fn typed(v: &Value, expected: &ValueType, depth: usize) -> Result<()> {
    if !compatible(&v.ty, expected) {
        return Err(problem!("an element of another type than its container declares"));
    }
    value(v, depth + 1)
}

/// Equal, where an unknown size in `expected` allows every size.
fn compatible(found: &ValueType, expected: &ValueType) -> bool {
    match (found, expected) {
        (ValueType::Tensor(f), ValueType::Tensor(e)) => {
            let fits = |(f, e): (&Dim, &Dim)| f == e || *e == Dim::Unknown;
            let same_rank = f.shape.len() == e.shape.len();
            f.dtype == e.dtype && (e.is_variadic() || same_rank && f.shape.iter().zip(&e.shape).all(fits))
        }
        (ValueType::List { element: f, len: n }, ValueType::List { element: e, len: m }) => {
            (m.is_none() || n == m) && compatible(f, e)
        }
        (ValueType::Tuple(f), ValueType::Tuple(e)) => {
            f.len() == e.len() && f.iter().zip(e).all(|(f, e)| compatible(f, e))
        }
        (ValueType::Dictionary { key: f, value: v }, ValueType::Dictionary { key: e, value: w }) => {
            compatible(f, e) && compatible(v, w)
        }
        (ValueType::State(f), ValueType::State(e)) => compatible(f, e),
        _ => false,
    }
}

fn tensor_value(t: &TensorType, bytes: &[u8]) -> Result<()> {
    let bits = t
        .dtype
        .bits()
        .ok_or_else(|| problem!("bytes for a tensor of strings"))?;
    if t.dtype == DType::Bool && bytes.iter().any(|b| *b > 1) {
        return Err(problem!("a boolean that is neither 0 nor 1"));
    }
    if bytes
        .last()
        .is_some_and(|last| last & !(0xff >> padding_bits(t)) != 0)
    {
        return Err(problem!("bits set behind the last element of {t}"));
    }
    match t.byte_len() {
        Some(len) if len == bytes.len() => Ok(()),
        None if bits >= 8 && bytes.len().is_multiple_of(bits / 8) => check_count(t, bytes.len() / (bits / 8)),
        _ => Err(problem!("{} bytes for {t}", bytes.len())),
    }
}

/// Checks a number of elements against a type of which at most one dimension may be unknown.
pub(crate) fn check_count(t: &TensorType, count: usize) -> Result<()> {
    let fixed = t.shape.iter().try_fold(1usize, |product, d| match d {
        Dim::Fixed(n) => product.checked_mul(*n),
        Dim::Unknown | Dim::Variadic => Some(product),
    });
    let unknown = t.shape.iter().filter(|d| **d == Dim::Unknown).count();
    let fits = match (unknown, fixed) {
        _ if t.is_variadic() => false,
        (0, Some(fixed)) => fixed == count,
        (1, Some(0)) => count == 0,
        (1, Some(fixed)) => count.is_multiple_of(fixed),
        _ => false,
    };
    if fits {
        Ok(())
    } else {
        Err(problem!("{count} elements for {t}"))
    }
}

#[cfg(test)]
mod tests {
    use crate::parse_program;

    fn checked(body: &str) -> String {
        let text =
            format!("program(1.3) {{ func main<ios18>(tensor<fp32, [2]> x, bool p) {{ {body} }} -> (x); }}");
        let program = parse_program(&text, "test").unwrap_or_else(|e| panic!("{e}"));
        program.check().map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn programs_that_break_a_rule_are_refused_with_the_place() {
        let cases = [
            (
                "tensor<fp32, [2]> y = relu(x = z);",
                "operation 0 \"y\" (relu): input \"x\": \"z\" is not defined",
            ),
            (
                "tensor<fp32, [2]> x = relu(x = x);",
                "output \"x\" is defined already",
            ),
            (
                "tensor<fp32, [2]> y = relu(x = y);",
                "\"y\" is not defined before",
            ),
            (
                "tensor<fp32, [2]> y = relu(x = x, x = x);",
                "input \"x\" is empty or given twice",
            ),
            (
                "tensor<fp32, [2]> y = cond(pred = p) () {} -> (nowhere) () {} -> (x);",
                "block 0: output \"nowhere\"",
            ),
            (
                "tensor<fp32, [2]> y = cond(pred = p) () { fp32 a = g(); } -> (a) () {} -> (a);",
                "block 1: output \"a\" is not defined",
            ),
            (
                "tensor<fp32, [1099511627776, 1099511627776]> y = f();",
                "more than",
            ),
            (
                "tensor<fp32, [0, 1099511627776, 1099511627776]> y = f();",
                "more than",
            ),
            ("state<list<fp32, 2>> y = f();", "a state of something else"),
        ];
        for (body, expected) in cases {
            let found = checked(body);
            assert!(found.contains(expected), "{body}: {found:?}");
        }
    }

    #[test]
    fn names_given_twice_are_found_in_short_and_long_lists() {
        for count in [2, 40] {
            let mut inputs: Vec<_> = (0..count).map(|i| format!("a{i} = x")).collect();
            assert_eq!(
                checked(&format!("fp32 y = f({});", inputs.join(", "))),
                "",
                "{count}"
            );
            inputs.push("a1 = x".to_string());
            let found = checked(&format!("fp32 y = f({});", inputs.join(", ")));
            assert!(
                found.contains("input \"a1\" is empty or given twice"),
                "{count}: {found}"
            );
        }
    }

    #[test]
    fn blocks_side_by_side_may_use_the_same_names_and_outer_ones() {
        let side = "() { tensor<fp32, [2]> a = relu(x = x); } -> (a)";
        assert_eq!(
            checked(&format!("tensor<fp32, [2]> y = cond(pred = p) {side} {side};")),
            ""
        );
    }
}
