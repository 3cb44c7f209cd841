//! One function of a program, operation by operation.

use std::collections::{HashMap, HashSet};

use candle_coreml_mil::{
    Argument, Block, DType, Dim, Flexibility, Function, NamedType, Operation, TensorType, Value, ValueData,
    ValueType,
};
use candle_coreml_portable::ops;

use crate::builder::{OPSET, StepInput, Weight, identifier, named};
use crate::error::{Error, Result};

/// A value inside one function: an input or the result of an operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Var {
    name: String,
    ty: TensorType,
}

impl Var {
    /// Element type and shape.
    pub fn ty(&self) -> &TensorType {
        &self.ty
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.ty.dtype
    }

    /// Shape, outermost dimension first.
    pub fn dims(&self) -> &[Dim] {
        &self.ty.shape
    }
}

/// What a parameter of an operation is bound to.
#[derive(Debug, Clone)]
pub enum Arg {
    /// A value computed before.
    Var(Var),
    /// A value written in the program.
    Value(Value),
    /// Several, for parameters such as `concat.values`.
    List(Vec<Arg>),
}

impl From<&Var> for Arg {
    fn from(var: &Var) -> Self {
        Arg::Var(var.clone())
    }
}

impl From<Value> for Arg {
    fn from(value: Value) -> Self {
        Arg::Value(value)
    }
}

impl From<Vec<Arg>> for Arg {
    fn from(list: Vec<Arg>) -> Self {
        Arg::List(list)
    }
}

/// An input's name, default shape and the other shapes it takes.
pub(crate) type FlexibleInput = (String, Vec<usize>, Flexibility);

/// Builds one function; see [`crate::ProgramBuilder`] for an example.
///
/// Methods named after operators (`add`, `conv`, `reshape`) work out the type of the result; [`FunctionBuilder::op`] takes
/// any operator by name.
#[derive(Debug)]
pub struct FunctionBuilder {
    name: String,
    inputs: Vec<NamedType>,
    flexible: Vec<FlexibleInput>,
    operations: Vec<Operation>,
    outputs: Vec<(String, String)>,
    constants: HashMap<ConstantKey, String>,
    weights: HashMap<String, Var>,
    taken: HashSet<String>,
}

/// The parts of a value that decide whether two constants are one.
type ConstantKey = (TensorType, ValueKey);

#[derive(Debug, PartialEq, Eq, Hash)]
enum ValueKey {
    Bytes(Vec<u8>),
    Strings(Vec<String>),
}

impl FunctionBuilder {
    /// Starts a function. A package with one function calls it `main`.
    pub fn new(name: &str) -> Self {
        FunctionBuilder {
            name: name.to_owned(),
            inputs: Vec::new(),
            flexible: Vec::new(),
            operations: Vec::new(),
            outputs: Vec::new(),
            constants: HashMap::new(),
            weights: HashMap::new(),
            taken: HashSet::new(),
        }
    }

    /// Adds an input of fixed shape.
    ///
    /// # Errors
    /// [`Error::Op`] when the name is taken.
    pub fn input(&mut self, name: &str, dtype: DType, shape: &[usize]) -> Result<Var> {
        self.add_input(name, TensorType::fixed(dtype, shape), false)
    }

    /// Adds an input that takes several shapes: dimensions that `flexibility` varies are unknown to the program.
    ///
    /// # Errors
    /// [`Error::Op`] when the name is taken or a shape has another rank.
    pub fn flexible_input(
        &mut self,
        name: &str,
        dtype: DType,
        shape: &[usize],
        flexibility: Flexibility,
    ) -> Result<Var> {
        let dims = flexible_dims(shape, &flexibility).ok_or_else(|| {
            Error::op(
                "input",
                format!("{name:?}: shapes of several ranks: {flexibility:?}"),
            )
        })?;
        let var = self.add_input(name, TensorType { dtype, shape: dims }, false)?;
        self.flexible.push((name.to_owned(), shape.to_vec(), flexibility));
        Ok(var)
    }

    /// Adds a state: a buffer that is read and written and keeps its content between calls.
    ///
    /// # Errors
    /// [`Error::Op`] when the name is taken.
    pub fn state(&mut self, name: &str, dtype: DType, shape: &[usize]) -> Result<Var> {
        self.add_input(name, TensorType::fixed(dtype, shape), true)
    }

    fn add_input(&mut self, name: &str, ty: TensorType, state: bool) -> Result<Var> {
        if identifier(name) != name || !self.taken.insert(name.to_owned()) {
            return Err(Error::op("input", format!("{name:?} is taken or no identifier")));
        }
        let tensor = ValueType::Tensor(ty.clone());
        self.inputs.push(NamedType {
            name: name.to_owned(),
            ty: if state {
                ValueType::State(Box::new(tensor))
            } else {
                tensor
            },
        });
        Ok(Var {
            name: name.to_owned(),
            ty,
        })
    }

    /// A weight as a value of this function.
    ///
    /// # Errors
    /// None today; operators may be checked against the weight later.
    pub fn weight(&mut self, weight: &Weight) -> Result<Var> {
        if let Some(known) = self.weights.get(&weight.name) {
            return Ok(known.clone());
        }
        let mut before: Vec<Var> = Vec::new();
        for (i, step) in weight.steps.iter().enumerate() {
            let last = i + 1 == weight.steps.len();
            let base = if last {
                weight.name.clone()
            } else {
                format!("{}_{}", weight.name, step.op)
            };
            let outputs: Vec<Var> = step
                .outputs
                .iter()
                .map(|ty| self.fresh(&base, ty.clone()))
                .collect();
            let mut op = Operation {
                op_type: step.op.to_owned(),
                outputs: outputs.iter().map(declared).collect(),
                ..Operation::default()
            };
            for (param, input) in &step.inputs {
                match input {
                    StepInput::Value(value) if step.op == "const" => {
                        op.attributes.push(((*param).to_owned(), value.clone()));
                    }
                    StepInput::Value(value) => {
                        op.inputs
                            .push(((*param).to_owned(), vec![Argument::Value(value.clone())]));
                    }
                    StepInput::Before(index) => {
                        let var = before
                            .get(*index)
                            .ok_or_else(|| Error::op(step.op, "no such result before"))?;
                        op.inputs
                            .push(((*param).to_owned(), vec![Argument::Name(var.name.clone())]));
                    }
                }
            }
            self.push(op, &base);
            before = outputs;
        }
        let var = before
            .into_iter()
            .next()
            .ok_or_else(|| Error::op("const", "a weight without operations"))?;
        self.weights.insert(weight.name.clone(), var.clone());
        Ok(var)
    }

    /// Any operator with one result, whose type is given.
    ///
    /// # Errors
    /// [`Error::Op`] for an operator that is not known, a parameter it does not have and one that is missing.
    pub fn op(&mut self, op: &str, args: &[(&str, Arg)], ty: &TensorType) -> Result<Var> {
        let vars = self.op_with_results(op, args, std::slice::from_ref(ty))?;
        vars.into_iter().next().ok_or_else(|| Error::op(op, "no result"))
    }

    /// Any operator, with the types of all its results; none for `write_state`.
    ///
    /// # Errors
    /// As [`FunctionBuilder::op`].
    pub fn op_with_results(
        &mut self,
        op: &str,
        args: &[(&str, Arg)],
        types: &[TensorType],
    ) -> Result<Vec<Var>> {
        check_parameters(op, args, types.len())?;
        let mut inputs = Vec::new();
        for (param, arg) in args {
            let mut list = Vec::new();
            self.bind(arg, &mut list)?;
            inputs.push(((*param).to_owned(), list));
        }
        let outputs: Vec<Var> = types.iter().map(|ty| self.fresh(op, ty.clone())).collect();
        let name = outputs
            .first()
            .map_or_else(|| format!("{op}_{}", self.operations.len()), |v| v.name.clone());
        let operation = Operation {
            op_type: op.to_owned(),
            inputs,
            outputs: outputs.iter().map(declared).collect(),
            ..Operation::default()
        };
        self.push(operation, &name);
        Ok(outputs)
    }

    /// Makes `var` the output `name`.
    ///
    /// # Errors
    /// [`Error::Op`] when the name is taken.
    pub fn output(&mut self, name: &str, var: &Var) -> Result<()> {
        if identifier(name) != name || !self.taken.insert(name.to_owned()) {
            return Err(Error::op("output", format!("{name:?} is taken or no identifier")));
        }
        let direct = self.inputs.iter().any(|i| i.name == var.name)
            || self.outputs.iter().any(|(_, v)| *v == var.name);
        let var = if direct {
            self.op("identity", &[("x", var.into())], &var.ty.clone())?
        } else {
            var.clone()
        };
        self.outputs.push((name.to_owned(), var.name));
        Ok(())
    }

    fn bind(&mut self, arg: &Arg, list: &mut Vec<Argument>) -> Result<()> {
        match arg {
            Arg::Var(var) => list.push(Argument::Name(var.name.clone())),
            Arg::Value(value) => list.push(Argument::Name(self.constant(value)?)),
            Arg::List(args) => args.iter().try_for_each(|a| self.bind(a, list))?,
        }
        Ok(())
    }

    /// The name of a `const` with this value; equal ones are shared, as coremltools writes them apart from operations.
    fn constant(&mut self, value: &Value) -> Result<String> {
        let (ValueType::Tensor(ty), key) = (&value.ty, value_key(value)) else {
            return Err(Error::op("const", "only tensors can be arguments"));
        };
        let key = key.map(|k| (ty.clone(), k));
        if let Some(known) = key.as_ref().and_then(|k| self.constants.get(k)) {
            return Ok(known.clone());
        }
        let var = self.fresh("const", ty.clone());
        let op = Operation {
            op_type: "const".to_owned(),
            outputs: vec![declared(&var)],
            attributes: vec![("val".to_owned(), value.clone())],
            ..Operation::default()
        };
        self.push(op, &var.name);
        if let Some(key) = key {
            self.constants.insert(key, var.name.clone());
        }
        Ok(var.name)
    }

    fn push(&mut self, op: Operation, name: &str) {
        self.operations.push(named(op, name));
    }

    fn fresh(&mut self, base: &str, ty: TensorType) -> Var {
        let mut name = base.to_owned();
        if base == "const" || ops::spec(base).is_some() || self.taken.contains(base) {
            name = format!("{base}_{}", self.operations.len());
        }
        let mut n = 0usize;
        while !self.taken.insert(name.clone()) {
            n += 1;
            name = format!("{base}_{}_{n}", self.operations.len());
        }
        Var { name, ty }
    }

    pub(crate) fn finish(mut self) -> Result<(Function, Vec<FlexibleInput>)> {
        if self.outputs.is_empty() {
            return Err(Error::op(
                "output",
                format!("function {:?} has no outputs", self.name),
            ));
        }
        let renamed: HashMap<&str, &str> = self
            .outputs
            .iter()
            .map(|(to, from)| (from.as_str(), to.as_str()))
            .collect();
        let rename = |name: &mut String| {
            if let Some(to) = renamed.get(name.as_str()) {
                *name = (*to).to_owned();
            }
        };
        for op in &mut self.operations {
            op.outputs.iter_mut().for_each(|o| rename(&mut o.name));
            for argument in op.inputs.iter_mut().flat_map(|(_, list)| list) {
                if let Argument::Name(name) = argument {
                    rename(name);
                }
            }
        }
        let body = Block {
            operations: self.operations,
            outputs: self.outputs.into_iter().map(|(name, _)| name).collect(),
            ..Block::default()
        };
        let function = Function {
            name: self.name,
            opset: OPSET.to_owned(),
            inputs: self.inputs,
            attributes: Vec::new(),
            body,
        };
        Ok((function, self.flexible))
    }
}

fn declared(var: &Var) -> NamedType {
    NamedType {
        name: var.name.clone(),
        ty: ValueType::Tensor(var.ty.clone()),
    }
}

fn value_key(value: &Value) -> Option<ValueKey> {
    match &value.data {
        ValueData::Tensor(bytes) => Some(ValueKey::Bytes(bytes.to_vec())),
        ValueData::Strings(strings) => Some(ValueKey::Strings(strings.clone())),
        _ => None,
    }
}

fn flexible_dims(shape: &[usize], flexibility: &Flexibility) -> Option<Vec<Dim>> {
    let varies: Vec<bool> = match flexibility {
        Flexibility::Fixed => vec![false; shape.len()],
        Flexibility::Enumerated(shapes) => {
            let same_rank = shapes.iter().all(|s| s.len() == shape.len());
            same_rank.then(|| {
                let differs = |i: usize, s: &Vec<usize>| s.get(i) != shape.get(i);
                (0..shape.len())
                    .map(|i| shapes.iter().any(|s| differs(i, s)))
                    .collect()
            })?
        }
        Flexibility::Ranges(ranges) => ranges.iter().map(|(low, high)| Some(*low) != *high).collect(),
    };
    let dim = |(&size, varies): (&usize, &bool)| if *varies { Dim::Unknown } else { Dim::Fixed(size) };
    (varies.len() == shape.len()).then(|| shape.iter().zip(&varies).map(dim).collect())
}

fn check_parameters(op: &str, args: &[(&str, Arg)], results: usize) -> Result<()> {
    let spec = ops::spec(op).ok_or_else(|| Error::op(op, "not an operator the engines know"))?;
    let names = || spec.inputs.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
    for (i, (param, _)) in args.iter().enumerate() {
        if !spec.inputs.iter().any(|p| p.name == *param) {
            return Err(Error::op(
                op,
                format!("no parameter {param:?}; it has {}", names()),
            ));
        }
        if args.iter().take(i).any(|(earlier, _)| earlier == param) {
            return Err(Error::op(op, format!("parameter {param:?} is given twice")));
        }
    }
    if let Some(missing) = spec
        .inputs
        .iter()
        .find(|p| p.required && !args.iter().any(|(a, _)| *a == p.name))
    {
        return Err(Error::op(
            op,
            format!("parameter {:?} is missing; it has {}", missing.name, names()),
        ));
    }
    match spec.outputs {
        Some(n) if n != results => Err(Error::op(op, format!("{results} results asked for, it has {n}"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::literal;

    #[test]
    fn wrong_parameters_are_refused_by_name() {
        let ty = TensorType::fixed(DType::Fp16, &[2]);
        let mut f = FunctionBuilder::new("main");
        let x = f.input("x", DType::Fp16, &[2]).unwrap();
        let y = || Arg::from(literal::half(1.0));
        type Case<'a> = (&'a str, Vec<(&'a str, Arg)>, &'a str);
        let cases: [Case; 4] = [
            (
                "add",
                vec![("x", (&x).into())],
                "parameter \"y\" is missing; it has x, y",
            ),
            ("add", vec![("x", (&x).into()), ("z", y())], "no parameter \"z\""),
            ("add", vec![("x", (&x).into()), ("x", y())], "given twice"),
            ("addd", vec![], "not an operator"),
        ];
        for (op, args, expected) in cases {
            let error = f.op(op, &args, &ty).unwrap_err().to_string();
            assert!(error.contains(expected), "{op}: {error}");
        }
        assert!(f.op_with_results("relu", &[("x", (&x).into())], &[]).is_err());
        assert!(f.input("x", DType::Fp16, &[2]).is_err() && f.input("a b", DType::Fp16, &[2]).is_err());
        assert!(FunctionBuilder::new("main").finish().is_err());
    }

    #[test]
    fn outputs_carry_their_names_and_equal_constants_are_one() {
        let mut f = FunctionBuilder::new("main");
        let x = f.input("x", DType::Fp16, &[2]).unwrap();
        let ty = x.ty().clone();
        let a = f
            .op(
                "add",
                &[("x", (&x).into()), ("y", literal::half(1.0).into())],
                &ty,
            )
            .unwrap();
        let b = f
            .op(
                "mul",
                &[("x", (&a).into()), ("y", literal::half(1.0).into())],
                &ty,
            )
            .unwrap();
        for (name, var) in [("first", &a), ("again", &a), ("second", &b), ("same", &x)] {
            f.output(name, var).unwrap();
        }
        let (function, _) = f.finish().unwrap();
        assert_eq!(function.body.outputs, ["first", "again", "second", "same"]);
        let consts = function
            .body
            .operations
            .iter()
            .filter(|o| o.op_type == "const")
            .count();
        let program = candle_coreml_mil::Program {
            functions: vec![function],
            ..Default::default()
        };
        program.check().unwrap();
        assert_eq!(consts, 1);
    }
}
