//! `Program` to `Graph`: names resolved, attributes read, shapes computed, constant parts evaluated.

mod check;
mod constants;
mod cx;
mod fold;
mod literal;
mod piece;

pub(crate) use check::check_function;
pub use constants::Constants;
pub use cx::{OpCx, normalize_axis};
pub(crate) use literal::read as read_literal;
pub(crate) use piece::{Outside, lower_piece};

use crate::constant::{Const, ConstData};
use crate::error::{Error, OpError, OpResult};
use crate::graph::{Graph, Source, StateSlot, ValueId};
use crate::item::Item;
use crate::layout::{Shape, checked_elements};
use crate::op::OpSpec;
use crate::ops;
use candle_coreml_kernels::{Arithmetic, Pool};
use candle_coreml_mil as mil;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Results larger than this many elements are computed when the model runs, not when it is lowered.
const FOLD_ELEMENTS: usize = 1 << 22;

/// What lowering needs to know besides the function.
pub struct LowerOptions {
    /// Round results of fp16 operations to fp16, constant ones included.
    pub faithful: bool,
    /// Round factors of products to 8-bit integers or bf16 where that is faster.
    pub fast: bool,
    /// Threads for evaluating constant parts.
    pub pool: Arc<Pool>,
    /// Weights of the file that were read before.
    pub constants: Arc<Constants>,
}

impl LowerOptions {
    /// How sums of products are made, in a function with states or without. Those with states are language models, whose greedy
    /// text 8-bit integers hardly change; the vectors of encoders would be off by 3e-2.
    pub fn arithmetic(&self, states: bool) -> Arithmetic {
        match (self.faithful, self.fast, states) {
            (true, ..) => Arithmetic::InOrder,
            (_, true, true) => Arithmetic::Int8,
            (_, true, false) => Arithmetic::Bf16,
            (_, false, _) => Arithmetic::F32,
        }
    }
}

/// A function lowered as one graph, or what stands in the way.
pub enum Lowered {
    /// The function.
    Whole(Graph),
    /// An operation needs a value that is known only when the model runs; the error names both.
    Cut(Error),
}

/// Lowers `function` for inputs of the given shapes.
///
/// # Errors
/// [`Error::Unsupported`] with every operator that is missing, [`Error::Node`] for a use that does not fit its operator.
pub fn lower(
    model: &mil::Model,
    function: &mil::Function,
    input_shapes: &HashMap<&str, Shape>,
    options: &LowerOptions,
) -> Result<Lowered, Error> {
    check_supported(&function.body)?;
    let mut lowering = Lowering::new(model, function, options);
    for input in &function.inputs {
        lowering.add_parameter(input, input_shapes)?;
    }
    for op in &function.body.operations {
        match lowering.operation(op) {
            Ok(()) => {}
            Err(e @ OpError::Dynamic(_)) => return Ok(Lowered::Cut(node_error(op, e))),
            Err(e) => return Err(node_error(op, e)),
        }
    }
    lowering.finish(&function.body).map(Lowered::Whole)
}

/// The error of an operation with its name.
pub(crate) fn node_error(op: &mil::Operation, e: OpError) -> Error {
    match e {
        OpError::Inner(e) => *e,
        e => Error::Node {
            node: node_name(op).into(),
            op: op.op_type.clone(),
            message: e.to_string(),
        },
    }
}

/// Names of all operators used in `block` and the blocks inside it that have no entry in the registry, with counts.
pub fn missing_ops(block: &mil::Block) -> BTreeMap<String, usize> {
    let mut missing = BTreeMap::new();
    let mut blocks = vec![block];
    while let Some(b) = blocks.pop() {
        for op in &b.operations {
            if op.op_type != "const" && ops::spec(&op.op_type).is_none() {
                *missing.entry(op.op_type.clone()).or_insert(0) += 1;
            }
            blocks.extend(&op.blocks);
        }
    }
    missing
}

/// [`missing_ops`] over every function of a model; empty for models that are no ML Program.
pub fn missing_ops_of(model: &mil::Model) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    for function in model
        .program()
        .map(|p| p.functions.as_slice())
        .unwrap_or_default()
    {
        for (name, n) in missing_ops(&function.body) {
            *all.entry(name).or_insert(0) += n;
        }
    }
    all
}

fn check_supported(block: &mil::Block) -> Result<(), Error> {
    let missing = missing_ops(block);
    if missing.is_empty() {
        return Ok(());
    }
    let ops = missing
        .into_iter()
        .map(|(name, n)| format!("{name} ({n} uses)"))
        .collect();
    Err(Error::Unsupported { ops })
}

/// The graph being built and the names in scope.
pub(crate) struct Lowering<'m> {
    pub(crate) model: &'m mil::Model,
    /// Number of the operation set: 5 for iOS 15, 6 for iOS 16 and so on.
    pub(crate) opset: u32,
    pub(crate) options: &'m LowerOptions,
    pub(crate) graph: Graph,
    pub(crate) names: HashMap<&'m str, ValueId>,
    pub(crate) literals: HashMap<&'m str, &'m mil::Value>,
    pub(crate) states: HashMap<&'m str, usize>,
    /// Values from before the piece that is lowered.
    pub(crate) outside: Outside<'m>,
    /// Results that are no tensors.
    pub(crate) items: HashMap<&'m str, Item>,
    /// Names of outside values that were used, in order.
    pub(crate) used: Vec<&'m str>,
}

/// `CoreML7` and, in the text of compiled models, `ios17` are number 7; an operation set that is not known is the oldest.
fn opset(name: &str) -> u32 {
    let number = |prefix: &str| name.strip_prefix(prefix)?.parse::<u32>().ok();
    // Apple's numbers: iOS 18 is followed by iOS 26.
    let ios = number("ios").map(|v| if v >= 26 { v - 17 } else { v.saturating_sub(10) });
    number("CoreML").or(ios).unwrap_or(5)
}

impl<'m> Lowering<'m> {
    fn new(model: &'m mil::Model, function: &mil::Function, options: &'m LowerOptions) -> Self {
        Lowering {
            model,
            opset: opset(&function.opset),
            options,
            graph: Graph::default(),
            names: HashMap::new(),
            literals: HashMap::new(),
            states: HashMap::new(),
            outside: Outside::default(),
            items: HashMap::new(),
            used: Vec::new(),
        }
    }

    fn add_parameter(
        &mut self,
        input: &'m mil::NamedType,
        shapes: &HashMap<&str, Shape>,
    ) -> Result<(), Error> {
        let fail = |message: String| Error::Node {
            node: input.name.clone(),
            op: "input".into(),
            message,
        };
        let tensor = input
            .ty
            .tensor()
            .ok_or_else(|| fail(format!("type {:?} is not a tensor", input.ty)))?;
        let name: Arc<str> = input.name.as_str().into();
        if matches!(input.ty, mil::ValueType::State(_)) {
            let shape = tensor
                .fixed_shape()
                .ok_or_else(|| fail("a state needs a fixed shape".into()))?;
            checked_elements(&shape).ok_or_else(|| fail(format!("shape {shape:?} is too large")))?;
            let slot = self.graph.states.len();
            let first = self
                .graph
                .add_value(name, tensor.dtype, &shape, Source::State(slot));
            let (name, dtype) = (input.name.clone(), tensor.dtype);
            self.graph.states.push(StateSlot {
                name,
                dtype,
                shape: shape.into(),
                first,
                last: first,
            });
            self.states.insert(&input.name, slot);
            return Ok(());
        }
        let shape: Shape = match shapes.get(input.name.as_str()) {
            Some(s) => s.clone(),
            None => tensor
                .fixed_shape()
                .ok_or_else(|| fail("its shape is flexible and no shape was given".into()))?
                .into(),
        };
        checked_elements(&shape).ok_or_else(|| fail(format!("shape {:?} is too large", shape.as_slice())))?;
        let index = self.graph.inputs.len();
        let id = self
            .graph
            .add_value(name, tensor.dtype, &shape, Source::Input(index));
        self.graph.inputs.push(id);
        self.names.insert(&input.name, id);
        Ok(())
    }

    /// Lowers one operation. When that needs a value that is not known, nothing of it stays in the graph.
    fn operation(&mut self, op: &'m mil::Operation) -> OpResult<()> {
        if op.op_type == "const" {
            return self.constant(op);
        }
        let spec = ops::spec(&op.op_type).ok_or("the operator is not supported")?;
        let literal = self.reads_literals_only(op);
        if literal && let Some(known) = self.options.constants.derived(op) {
            for (out, value) in op.outputs.iter().zip(known) {
                let id = self.add_const(&out.name, value);
                self.names.insert(&out.name, id);
            }
            return Ok(());
        }
        check_parameters(op, spec)?;
        let mark = self.mark();
        let mut cx = OpCx::new(self, op, node_name(op));
        let done = (spec.lower)(&mut cx).and_then(|()| cx.check_outputs());
        if matches!(done, Err(OpError::Dynamic(_))) {
            self.rewind(mark, op);
        }
        if literal && done.is_ok() {
            self.keep_constants(op);
        }
        done
    }

    fn reads_literals_only(&self, op: &mil::Operation) -> bool {
        let literal = |a: &mil::Argument| match a {
            mil::Argument::Value(_) => true,
            mil::Argument::Name(n) => self.literals.contains_key(n.as_str()),
        };
        op.blocks.is_empty() && op.inputs.iter().flat_map(|(_, list)| list).all(literal)
    }

    /// Keeps the results of an operation for the next time it is lowered, if all are constants.
    fn keep_constants(&self, op: &'m mil::Operation) {
        let result = |out: &mil::NamedType| {
            let id = self.names.get(out.name.as_str())?;
            self.graph.constant(*id).cloned()
        };
        if let Some(results) = op.outputs.iter().map(result).collect() {
            self.options.constants.keep(op, results);
        }
    }

    /// Lowers a block in the place of an operation, as part of the same graph; gives the values of its results.
    pub(crate) fn inline(&mut self, block: &'m mil::Block) -> OpResult<Vec<ValueId>> {
        let run = |low: &mut Self| -> OpResult<Vec<ValueId>> {
            for op in &block.operations {
                low.operation(op).map_err(|e| match e {
                    e @ OpError::Dynamic(_) => e,
                    e => OpError::Inner(Box::new(node_error(op, e))),
                })?;
            }
            let result = |name: &'m String| {
                low.resolve(name)?
                    .ok_or_else(|| format!("a block returns {name:?}, which it does not define").into())
            };
            block.outputs.iter().map(result).collect()
        };
        let results = run(self);
        for out in block.operations.iter().flat_map(|op| &op.outputs) {
            self.names.remove(out.name.as_str());
            self.literals.remove(out.name.as_str());
        }
        results
    }

    /// Notes a `const`; it is read when something uses it, since packed data is never widened.
    fn constant(&mut self, op: &'m mil::Operation) -> Result<(), OpError> {
        let value = op.attribute("val").ok_or("attribute \"val\" is missing")?;
        let out = op.outputs.first().ok_or("a const has one result")?;
        self.literals.insert(&out.name, value);
        Ok(())
    }

    /// The value a name stands for.
    pub(crate) fn resolve(&mut self, name: &'m str) -> Result<Option<ValueId>, OpError> {
        if let Some(id) = self.names.get(name) {
            return Ok(Some(*id));
        }
        let id = match self.literals.get(name).copied() {
            Some(value) => self.literal(value, name)?,
            None => match self.enter(name)? {
                Some(id) => id,
                None => return Ok(None),
            },
        };
        self.names.insert(name, id);
        Ok(Some(id))
    }

    /// Adds a literal of the file as a constant.
    pub(crate) fn literal(&mut self, value: &mil::Value, name: &str) -> Result<ValueId, OpError> {
        let constant = self.options.constants.read(self.model, value)?;
        Ok(self.add_const(name, constant))
    }

    pub(crate) fn add_const(&mut self, name: &str, constant: Arc<Const>) -> ValueId {
        let (dtype, shape) = (constant.dtype, constant.shape.clone());
        self.graph
            .add_value(name.into(), dtype, &shape, Source::Const(constant))
    }

    fn finish(mut self, body: &'m mil::Block) -> Result<Graph, Error> {
        for name in &body.outputs {
            let fail = |message: String| Error::Node {
                node: name.clone(),
                op: "output".into(),
                message,
            };
            let id = self.resolve(name).map_err(|e| fail(e.to_string()))?;
            let id = id.ok_or_else(|| fail("the block returns a value that it does not define".into()))?;
            self.graph.outputs.push((name.clone(), id));
        }
        Ok(self.graph)
    }
}

/// The operation's `name` attribute, or the name of its first result, or its type.
pub(crate) fn node_name(op: &mil::Operation) -> &str {
    let attribute = op.attribute("name").and_then(|v| match &v.data {
        mil::ValueData::Strings(s) => s.first().map(String::as_str),
        _ => None,
    });
    attribute
        .or(op.outputs.first().map(|o| o.name.as_str()))
        .unwrap_or(&op.op_type)
}

fn check_parameters(op: &mil::Operation, spec: &OpSpec) -> Result<(), OpError> {
    let known = |name: &str| spec.inputs.iter().any(|p| p.name == name);
    if let Some((name, _)) = op.inputs.iter().find(|(name, _)| !known(name)) {
        let all: Vec<&str> = spec.inputs.iter().map(|p| p.name).collect();
        return Err(format!("unknown parameter {name:?}; it has: {}", all.join(", ")).into());
    }
    let given = |name: &str| op.input(name).is_some() || op.attribute(name).is_some();
    if let Some(p) = spec.inputs.iter().find(|p| p.required && !given(p.name)) {
        return Err(format!("parameter {:?} is missing", p.name).into());
    }
    match spec.outputs {
        Some(n) if n != op.outputs.len() => {
            Err(format!("{} results are declared, it gives {n}", op.outputs.len()).into())
        }
        _ => Ok(()),
    }
}

impl Const {
    /// The same elements under another type and shape of as many elements.
    pub(crate) fn alias(&self, dtype: mil::DType, shape: &[usize]) -> Option<Const> {
        match &self.data {
            ConstData::F32(_)
            | ConstData::I32(_)
            | ConstData::Stored(_)
            | ConstData::F16(_)
            | ConstData::Strings(_) => Some(Const::new(dtype, shape, self.data.clone())),
            ConstData::Lut(_) | ConstData::Affine(_) => None,
        }
    }
}
