//! Runs functions whose shapes or path depend on values.
//!
//! A block is run from place to place: the operations up to the next one that needs a computed value are lowered for the
//! shapes at hand and planned (or taken from the plans made before); that one is then evaluated alone, its inputs being
//! constants now; and so on. `cond` and `while_loop` run their blocks the same way. Blocks see the values around them;
//! states are written when a segment ends, so every segment reads what the one before has left.

mod border;
mod outline;
mod segment;

pub(crate) use segment::Staged;

use crate::array::{Array, Data, OwnedArray};
use crate::constant::ConstData;
use crate::error::{Error, OpResult};
use crate::graph::Graph;
use crate::item::Item;
use crate::lower::{LowerOptions, Outside, lower_piece, node_error, node_name, read_literal};
use crate::op::{Args, Op};
use crate::ops;
use crate::ops::blocks::{Control, control};
use crate::plan::{Plan, Step};
use crate::run::{Done, Observer, RunOptions, Workspace};
use crate::state::StateBuffer;
use candle_coreml_mil::{self as mil, DType};
use outline::{BlockId, Id};
use segment::{Expected, Segment};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// What a run needs besides its inputs.
pub(crate) struct Context<'a> {
    pub model: &'a mil::Model,
    pub function: &'a mil::Function,
    pub staged: &'a Staged,
    pub options: &'a LowerOptions,
    /// Applies the passes the model was opened with.
    pub optimize: &'a dyn Fn(Graph) -> Graph,
}

/// One run of a function.
pub(crate) struct Runner<'a, 'o> {
    cx: Context<'a>,
    blocks: Vec<&'a mil::Block>,
    values: Vec<Option<Item>>,
    workspace: &'a mut Workspace,
    states: &'a mut [&'a mut StateBuffer],
    observer: Option<&'o mut dyn Observer>,
}

impl<'a, 'o> Runner<'a, 'o> {
    /// A run with the function's states in their order.
    pub fn new(
        cx: Context<'a>,
        workspace: &'a mut Workspace,
        states: &'a mut [&'a mut StateBuffer],
        observer: Option<&'o mut dyn Observer>,
    ) -> Self {
        let outline = &cx.staged.outline;
        Runner {
            blocks: outline.find(cx.function),
            values: vec![None; outline.values.len()],
            cx,
            workspace,
            states,
            observer,
        }
    }

    /// Runs the function on the values of its parameters that are no states; gives every output by name.
    pub fn run(mut self, inputs: &[Array<'_>], wide: bool) -> Result<Vec<(String, OwnedArray)>, Error> {
        let outline = &self.cx.staged.outline;
        let parameters = self.cx.function.inputs.iter().zip(&outline.blocks[0].inputs);
        let mut given = inputs.iter();
        for (parameter, &id) in parameters {
            if let mil::ValueType::Tensor(ty) = &parameter.ty
                && let Some(array) = given.next()
            {
                self.values[id] = Some(Item::computed(border::read(&parameter.name, ty.dtype, *array)?));
            }
        }
        let results = self.block(0)?;
        let names = self.cx.function.body.outputs.iter();
        names
            .zip(results)
            .map(|(name, item)| Ok((name.clone(), border::give(name, item, wide)?)))
            .collect()
    }

    /// Runs a block whose inputs are set; gives its results and forgets everything else it defined.
    fn block(&mut self, block: BlockId) -> Result<Vec<Item>, Error> {
        let count = self.blocks[block].operations.len();
        let mut at = 0;
        while at < count {
            let segment = self.segment(block, at)?;
            self.execute(&segment)?;
            self.forget(block, at, segment.end);
            at = segment.end;
            if at < count {
                self.single(block, at)?;
                self.forget(block, at, at + 1);
                at += 1;
            }
        }
        let outline = &self.cx.staged.outline.blocks[block];
        let results = outline.outputs.iter().map(|&id| self.item(id));
        let results = results.collect::<Result<Vec<_>, _>>()?;
        let written = outline.operations.iter().flat_map(|op| &op.writes);
        for &id in written.chain(&outline.inputs) {
            self.values[id] = None;
        }
        Ok(results)
    }

    fn forget(&mut self, block: BlockId, from: usize, to: usize) {
        for op in &self.cx.staged.outline.blocks[block].operations[from..to] {
            for &id in &op.dies {
                self.values[id] = None;
            }
        }
    }

    /// The value of an id: a result at hand, or a constant of the file.
    fn item(&self, id: Id) -> Result<Item, Error> {
        if let Some(item) = &self.values[id] {
            return Ok(item.clone());
        }
        let name = &self.cx.staged.outline.values[id].name;
        let literal = self.literal(id).ok_or_else(|| Error::Internal {
            message: format!("value {name:?} is used before it is computed"),
        })?;
        let value = read_literal(self.cx.model, literal).map_err(|e| Error::Node {
            node: name.clone(),
            op: "const".into(),
            message: e.to_string(),
        })?;
        Ok(Item::Tensor {
            value: Arc::new(value),
            fixed: false,
        })
    }

    fn literal(&self, id: Id) -> Option<&'a mil::Value> {
        let (block, op) = self.cx.staged.outline.values[id].literal?;
        self.blocks[block].operations[op].attribute("val")
    }

    /// The operations from `at` on that can be run as one, for the values at hand.
    fn segment(&mut self, block: BlockId, at: usize) -> Result<Arc<Segment>, Error> {
        let staged = self.cx.staged;
        if let Some(known) = staged.find(block, at, &self.values) {
            return Ok(known);
        }
        let outline = &staged.outline;
        let mut outside = Outside::default();
        let mut ids: HashMap<&str, Id> = HashMap::new();
        for op in &outline.blocks[block].operations[at..] {
            for &id in op.reads.iter().chain(&op.writes) {
                let name = outline.values[id].name.as_str();
                ids.insert(name, id);
                if let Some(literal) = self.literal(id) {
                    outside.literals.insert(name, literal);
                } else if let Some(item) = &self.values[id] {
                    outside.items.insert(name, item.clone());
                }
            }
        }
        let needed = |count: usize| {
            let needed = outline.needed(block, at, at + count);
            needed.map(|id| outline.values[id].name.as_str()).collect()
        };
        let operations = &self.blocks[block].operations[at..];
        let (cx, id) = (&self.cx, |name: &str| ids.get(name).copied());
        let piece = lower_piece(cx.model, cx.function, operations, outside, cx.options, &needed)?;
        let expected = |name: &&str| match id(name).map(|id| (id, &self.values[id])) {
            Some((id, Some(Item::Tensor { value, fixed }))) => Some(match fixed {
                true => (id, Expected::Same(value.clone())),
                false => (id, Expected::Shaped(value.dtype, value.shape.clone())),
            }),
            _ => None,
        };
        let reads = piece.used.iter().filter_map(expected).collect();
        let outputs = piece.graph.outputs.iter().filter_map(|(name, _)| id(name));
        let outputs = outputs.collect();
        let items = piece
            .items
            .into_iter()
            .filter_map(|(name, item)| Some((id(name)?, item)));
        let segment = Arc::new(Segment {
            end: at + piece.count,
            reads,
            outputs,
            items: items.collect(),
            plan: self.plan(piece.graph)?,
        });
        staged.keep(block, at, segment.clone());
        Ok(segment)
    }

    fn plan(&self, graph: Graph) -> Result<Option<Plan>, Error> {
        let writes = graph.states.iter().any(|s| s.first != s.last);
        if graph.outputs.is_empty() && !writes {
            return Ok(None);
        }
        let plan = Plan::new(&(self.cx.optimize)(graph))?;
        Ok(Some(plan))
    }

    fn execute(&mut self, segment: &Segment) -> Result<(), Error> {
        for (id, item) in &segment.items {
            self.values[*id] = Some(item.clone());
        }
        let Some(plan) = &segment.plan else {
            return Ok(());
        };
        let computed = |(id, e): &(Id, Expected)| matches!(e, Expected::Shaped(..)).then_some(*id);
        let inputs: Vec<Id> = segment.reads.iter().filter_map(computed).collect();
        self.execute_plan(plan, &inputs, &segment.outputs)
    }

    fn execute_plan(&mut self, plan: &Plan, inputs: &[Id], outputs: &[Id]) -> Result<(), Error> {
        self.workspace.fit(plan);
        for (slot, &id) in plan.inputs.iter().zip(inputs) {
            if let Some(Item::Tensor { value, .. }) = &self.values[id] {
                let data = match &value.data {
                    ConstData::I32(v) => Data::I32(v),
                    _ => Data::F32(value.floats()),
                };
                let shape = &value.shape;
                self.workspace.write_input(slot, Array { shape, data })?;
            }
        }
        let options = RunOptions {
            pool: &self.cx.options.pool,
            faithful: self.cx.options.faithful,
            observer: self.observer.as_mut().map(|o| &mut **o as &mut dyn Observer),
        };
        self.workspace.run(plan, self.states, options)?;
        for (slot, &id) in plan.outputs.iter().zip(outputs) {
            // Floats stay as wide as they were computed until they leave the function.
            let dtype = if slot.dtype.is_float() {
                DType::Fp32
            } else {
                slot.dtype
            };
            let pool = &self.cx.options.pool;
            let array = self.workspace.read(pool, &slot.operand, dtype, self.states)?;
            let value = border::keep(slot.dtype, array);
            self.values[id] = Some(Item::computed(value));
        }
        Ok(())
    }

    /// Runs the operation that ended a segment.
    fn single(&mut self, block: BlockId, at: usize) -> Result<(), Error> {
        let op = &self.blocks[block].operations[at];
        let results = match control(&op.op_type) {
            Some(Control::Choice) => self.choice(block, at, op)?,
            Some(Control::Loop) => self.repeat(block, at, op)?,
            None => return self.evaluate(block, at),
        };
        let writes = &self.cx.staged.outline.blocks[block].operations[at].writes;
        for (&id, item) in writes.iter().zip(results) {
            self.values[id] = Some(item);
        }
        Ok(())
    }

    fn choice(&mut self, block: BlockId, at: usize, op: &mil::Operation) -> Result<Vec<Item>, Error> {
        let holds = truth(op, &self.argument(block, at, "pred", 0)?, "pred")?;
        let blocks = &self.cx.staged.outline.blocks[block].operations[at].blocks;
        match blocks.get(usize::from(!holds)) {
            Some(&chosen) => self.block(chosen),
            None => Err(node_error(op, "a block is missing".into())),
        }
    }

    fn repeat(&mut self, block: BlockId, at: usize, op: &mil::Operation) -> Result<Vec<Item>, Error> {
        let staged = self.cx.staged;
        let noted = &staged.outline.blocks[block].operations[at];
        let &[condition, body] = noted.blocks.as_slice() else {
            return Err(node_error(op, "it needs 2 blocks".into()));
        };
        let count = op.input("loop_vars").map_or(0, <[_]>::len);
        let mut variables = (0..count)
            .map(|i| self.argument(block, at, "loop_vars", i))
            .collect::<Result<Vec<_>, _>>()?;
        // Nobody else holds on to a variable that dies here, so that lists can be changed in place.
        for id in noted.dies.iter().filter(|id| !noted.inner.contains(id)) {
            self.values[*id] = None;
        }
        loop {
            self.bind(condition, variables.iter().cloned());
            let goes_on = self.block(condition)?;
            let goes_on = goes_on
                .first()
                .ok_or_else(|| node_error(op, "the condition gives nothing".into()))?;
            if !truth(op, goes_on, "the condition")? {
                return Ok(variables);
            }
            self.bind(body, variables.drain(..));
            variables = self.block(body)?;
        }
    }

    fn bind(&mut self, block: BlockId, items: impl Iterator<Item = Item>) {
        for (&id, item) in self.cx.staged.outline.blocks[block].inputs.iter().zip(items) {
            self.values[id] = Some(item);
        }
    }

    /// The value bound to a parameter of a control operation.
    fn argument(&self, block: BlockId, at: usize, param: &str, index: usize) -> Result<Item, Error> {
        let op = &self.blocks[block].operations[at];
        let argument = op.input(param).and_then(|a| a.get(index));
        let missing = || node_error(op, format!("parameter {param:?} is missing").into());
        match argument.ok_or_else(missing)? {
            mil::Argument::Value(v) => {
                let value = read_literal(self.cx.model, v).map_err(|e| node_error(op, e))?;
                Ok(Item::computed(value))
            }
            mil::Argument::Name(name) => {
                let outline = &self.cx.staged.outline;
                let reads = &outline.blocks[block].operations[at].reads;
                let id = reads.iter().find(|&&id| outline.values[id].name == *name);
                self.item(*id.ok_or_else(missing)?)
            }
        }
    }

    /// Evaluates one operation whose inputs are known; what dies with it, it may change in place.
    fn evaluate(&mut self, block: BlockId, at: usize) -> Result<(), Error> {
        let op = &self.blocks[block].operations[at];
        let start = self.observer.is_some().then(Instant::now);
        let outline = &self.cx.staged.outline;
        let noted = &outline.blocks[block].operations[at];
        let mut outside = Outside {
            known: true,
            ..Outside::default()
        };
        for &id in &noted.reads {
            let name = outline.values[id].name.as_str();
            if let Some(literal) = self.literal(id) {
                outside.literals.insert(name, literal);
            } else if noted.dies.contains(&id) {
                outside
                    .items
                    .extend(self.values[id].take().map(|item| (name, item)));
            } else if let Some(item) = &self.values[id] {
                outside.items.insert(name, item.clone());
            }
        }
        let needed = |count: usize| {
            let done = if count == 1 { op.outputs.as_slice() } else { &[] };
            done.iter().map(|o| o.name.as_str()).collect()
        };
        let (cx, one) = (&self.cx, std::slice::from_ref(op));
        let piece = lower_piece(cx.model, cx.function, one, outside, cx.options, &needed)?;
        if let Some(cut) = piece.cut {
            return Err(cut);
        }
        let id = |name: &str| {
            op.outputs
                .iter()
                .position(|o| o.name == name)
                .and_then(|i| noted.writes.get(i))
        };
        for (name, item) in piece.items {
            if let Some(&id) = id(name) {
                self.values[id] = Some(item);
            }
        }
        let outputs: Vec<Id> = piece
            .graph
            .outputs
            .iter()
            .filter_map(|(name, _)| id(name).copied())
            .collect();
        if let Some(plan) = self.plan(piece.graph)? {
            self.execute_plan(&plan, &[], &outputs)?;
        } else if let Some(start) = start {
            self.report(op, &noted.writes, start);
        }
        Ok(())
    }

    /// Shows an observer what an operation gave that no plan ran.
    fn report(&mut self, op: &mil::Operation, writes: &[Id], start: Instant) {
        let elapsed = start.elapsed();
        let Some(observer) = self.observer.as_mut() else {
            return;
        };
        let (mut dtypes, mut results) = (smallvec::SmallVec::new(), Vec::new());
        for &id in writes {
            if let Some(Item::Tensor { value, .. }) = &self.values[id] {
                dtypes.push(value.dtype);
                if observer.wants_results() {
                    results.push(border::array(value, true));
                }
            }
        }
        let step = Step {
            name: node_name(op).into(),
            op: Arc::new(Evaluated(ops::spec(&op.op_type).map_or("", |s| s.name))),
            inputs: smallvec::SmallVec::new(),
            outputs: smallvec::SmallVec::new(),
            dtypes,
            then: None,
        };
        observer.after(&Done {
            step: &step,
            elapsed,
            results: &results,
            overflows: 0,
        });
    }
}

/// Stands for an operation that was evaluated between segments, in reports.
#[derive(Debug)]
struct Evaluated(&'static str);

impl Op for Evaluated {
    fn name(&self) -> &'static str {
        self.0
    }

    fn run(&self, _args: &mut Args<'_>) -> OpResult<()> {
        Err("internal: this was evaluated before".into())
    }
}

/// The truth value of a predicate.
fn truth(op: &mil::Operation, item: &Item, what: &str) -> Result<bool, Error> {
    let one = match item {
        Item::Tensor { value, .. } => value.int(),
        _ => None,
    };
    let one = one.ok_or_else(|| node_error(op, format!("{what} is not one truth value").into()))?;
    Ok(one != 0)
}
