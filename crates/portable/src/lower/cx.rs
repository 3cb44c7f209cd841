//! What an operator's `lower` sees of one use of it, and how it adds nodes.

use super::{FOLD_ELEMENTS, Lowering, fold, literal};
use crate::constant::{Const, ConstData};
use crate::error::{OpError, OpResult};
use crate::graph::{Node, Source, ValueId};
use crate::item::{Item, List};
use crate::layout::{Shape, checked_elements};
use crate::op::Op;
use bytes::Bytes;
use candle_coreml_kernels::{Arithmetic, Weights};
use candle_coreml_mil::{self as mil, Argument, DType};
use smallvec::SmallVec;
use std::sync::Arc;

/// One use of an operator while it is lowered.
pub struct OpCx<'a, 'm> {
    pub(crate) low: &'a mut Lowering<'m>,
    pub(crate) op: &'m mil::Operation,
    name: &'m str,
    bound: usize,
}

impl<'a, 'm> OpCx<'a, 'm> {
    pub(crate) fn new(low: &'a mut Lowering<'m>, op: &'m mil::Operation, name: &'m str) -> Self {
        OpCx {
            low,
            op,
            name,
            bound: 0,
        }
    }

    /// True when results are rounded to their written type.
    pub fn faithful(&self) -> bool {
        self.low.options.faithful
    }

    /// How sums of products are made.
    pub fn arithmetic(&self) -> Arithmetic {
        self.low.options.arithmetic(!self.low.graph.states.is_empty())
    }

    /// Number of the operation set that the program is written in: 5 for iOS 15, 7 for iOS 17.
    pub fn opset(&self) -> u32 {
        self.low.opset
    }

    /// The operation as written.
    pub fn operation(&self) -> &'m mil::Operation {
        self.op
    }

    fn argument(&mut self, argument: &'m Argument, param: &str) -> OpResult<ValueId> {
        match argument {
            Argument::Value(v) => self.low.literal(v, param),
            Argument::Name(n) => self.low.resolve(n)?.ok_or_else(|| {
                format!("parameter {param:?} names {n:?}, which is not defined before").into()
            }),
        }
    }

    /// The value bound to a parameter; `None` when it is left out. Attributes count as parameters.
    pub fn optional(&mut self, param: &str) -> OpResult<Option<ValueId>> {
        let op = self.op;
        match op.input(param) {
            Some([argument]) => self.argument(argument, param).map(Some),
            Some(many) => {
                Err(format!("parameter {param:?} has {} values, one is allowed", many.len()).into())
            }
            None => match op.attribute(param) {
                Some(v) => self.low.literal(v, param).map(Some),
                None => Ok(None),
            },
        }
    }

    /// The value bound to a parameter.
    pub fn value(&mut self, param: &str) -> OpResult<ValueId> {
        self.optional(param)?
            .ok_or_else(|| format!("parameter {param:?} is missing").into())
    }

    /// All values bound to a variadic parameter.
    pub fn values(&mut self, param: &str) -> OpResult<Vec<ValueId>> {
        let op = self.op;
        let arguments = op
            .input(param)
            .ok_or_else(|| format!("parameter {param:?} is missing"))?;
        arguments.iter().map(|a| self.argument(a, param)).collect()
    }

    /// The element type of a value.
    pub fn dtype(&self, id: ValueId) -> DType {
        self.low.graph.value(id).dtype
    }

    /// The dimensions of a value.
    pub fn shape(&self, id: ValueId) -> Shape {
        self.low.graph.value(id).shape.clone()
    }

    /// The constant a value is, if it is one.
    pub fn constant(&self, id: ValueId) -> Option<Arc<Const>> {
        self.low.graph.constant(id).cloned()
    }

    fn known(&mut self, param: &str) -> OpResult<Option<Arc<Const>>> {
        match self.optional(param)? {
            None => Ok(None),
            Some(id) => match self.constant(id) {
                Some(c) => Ok(Some(c)),
                None => Err(OpError::Dynamic(param.into())),
            },
        }
    }

    /// The integers of a parameter whose value must be known now.
    pub fn ints(&mut self, param: &str) -> OpResult<Option<Vec<i32>>> {
        let Some(c) = self.known(param)? else {
            return Ok(None);
        };
        let ints = c.ints().map(<[i32]>::to_vec);
        ints.map(Some)
            .ok_or_else(|| format!("parameter {param:?} must be integers, not {}", c.dtype).into())
    }

    /// The integer of a scalar parameter.
    pub fn int(&mut self, param: &str) -> OpResult<Option<i32>> {
        match self.ints(param)?.as_deref() {
            None => Ok(None),
            Some([one]) => Ok(Some(*one)),
            Some(many) => {
                Err(format!("parameter {param:?} has {} values, one is allowed", many.len()).into())
            }
        }
    }

    /// The truth values of a parameter.
    pub fn bools(&mut self, param: &str) -> OpResult<Option<Vec<bool>>> {
        Ok(self.ints(param)?.map(|v| v.into_iter().map(|x| x != 0).collect()))
    }

    /// The truth value of a scalar parameter, or what holds when it is left out.
    pub fn flag(&mut self, param: &str, default: bool) -> OpResult<bool> {
        Ok(self.int(param)?.map_or(default, |v| v != 0))
    }

    /// The number of a scalar parameter.
    pub fn float(&mut self, param: &str) -> OpResult<Option<f32>> {
        let Some(c) = self.known(param)? else {
            return Ok(None);
        };
        c.scalar()
            .map(Some)
            .ok_or_else(|| format!("parameter {param:?} must be one number").into())
    }

    /// The numbers of a parameter.
    pub fn floats(&mut self, param: &str) -> OpResult<Option<Vec<f32>>> {
        Ok(self.known(param)?.map(|c| c.dense().to_vec()))
    }

    /// The text of a parameter.
    pub fn text(&mut self, param: &str) -> OpResult<Option<String>> {
        let Some(c) = self.known(param)? else {
            return Ok(None);
        };
        match &c.data {
            ConstData::Strings(s) if s.len() == 1 => Ok(s.first().cloned()),
            _ => Err(format!("parameter {param:?} must be one string").into()),
        }
    }

    /// An axis, negative ones counted from the end.
    pub fn axis(&mut self, param: &str, rank: usize, default: Option<i32>) -> OpResult<usize> {
        let axis = self
            .int(param)?
            .or(default)
            .ok_or_else(|| format!("parameter {param:?} is missing"))?;
        normalize_axis(axis, rank)
    }

    /// A parameter's packed bytes with their type and shape, for compressed weights.
    pub fn packed(&mut self, param: &str) -> OpResult<Option<(Bytes, DType, Vec<usize>)>> {
        let op = self.op;
        let value = match op.input(param) {
            Some([Argument::Value(v)]) => Some(v),
            Some([Argument::Name(n)]) => return self.packed_const(n, param).map(Some),
            _ => op.attribute(param),
        };
        value.map(|v| literal::packed(self.low.model, v)).transpose()
    }

    /// Finds the `const` operation behind a name: its widened form in the graph has lost the packing.
    fn packed_const(&self, name: &str, param: &str) -> OpResult<(Bytes, DType, Vec<usize>)> {
        let value = self.low.literals.get(name).copied();
        let value = value.ok_or_else(|| format!("parameter {param:?} must be a constant of the file"))?;
        literal::packed(self.low.model, value)
    }

    /// A constant as a weight matrix; `None` when the value is computed.
    pub fn weights(&mut self, id: ValueId, rows: usize, cols: usize) -> OpResult<Option<Weights>> {
        let Some(constant) = self.constant(id) else {
            return Ok(None);
        };
        let weights = constant.weights(rows, cols)?;
        if let ConstData::Stored(bytes) | ConstData::F16(bytes) = &constant.data {
            match self.low.model.mapped(bytes) {
                Some(mapped) => weights.pack_when_used(move || mapped.release()),
                None if self.arithmetic() == Arithmetic::Int8 => weights.pack_when_used(|| {}),
                None => {}
            }
        }
        Ok(Some(weights))
    }

    /// Says that the elements of a constant were copied in another form and are not needed as the file has them for now.
    pub fn release(&self, constant: &Const) {
        match &constant.data {
            ConstData::Stored(bytes) | ConstData::F16(bytes) => self.low.model.release(bytes),
            ConstData::Lut(lut) => self.low.model.release(&lut.indices),
            ConstData::Affine(affine) => self.low.model.release(&affine.data),
            ConstData::F32(_) | ConstData::I32(_) | ConstData::Strings(_) => {}
        }
    }

    /// Adds a float constant made by lowering.
    pub fn add_f32(&mut self, dtype: DType, shape: &[usize], data: Vec<f32>) -> ValueId {
        self.add_const(Const::f32(dtype, shape, data))
    }

    /// Adds an integer constant made by lowering.
    pub fn add_i32(&mut self, dtype: DType, shape: &[usize], data: Vec<i32>) -> ValueId {
        self.add_const(Const::i32(dtype, shape, data))
    }

    /// Adds a constant made by lowering.
    pub fn add_const(&mut self, constant: Const) -> ValueId {
        self.add_shared(Arc::new(constant))
    }

    /// Adds a constant that others hold as well.
    pub fn add_shared(&mut self, constant: Arc<Const>) -> ValueId {
        let name = self.name;
        self.low.add_const(name, constant)
    }

    /// Adds a node with one result; with constant inputs it is evaluated at once and the result is a constant.
    pub fn emit(
        &mut self,
        op: impl Op,
        inputs: &[ValueId],
        dtype: DType,
        shape: &[usize],
    ) -> OpResult<ValueId> {
        let ids = self.emit_many(Arc::new(op), inputs, &[(dtype, shape.into())])?;
        ids.first()
            .copied()
            .ok_or_else(|| "internal: a node without a result".into())
    }

    /// Adds a node with any number of results.
    pub fn emit_many(
        &mut self,
        op: Arc<dyn Op>,
        inputs: &[ValueId],
        outputs: &[(DType, Shape)],
    ) -> OpResult<SmallVec<[ValueId; 2]>> {
        for (_, shape) in outputs {
            checked_elements(shape)
                .ok_or_else(|| format!("a result of shape {:?} is too large", shape.as_slice()))?;
        }
        if let Some(constants) = self.fold(&*op, inputs, outputs)? {
            return Ok(constants.into_iter().map(|c| self.add_const(c)).collect());
        }
        let name: Arc<str> = self.name.into();
        let graph = &mut self.low.graph;
        let ids: SmallVec<[ValueId; 2]> = outputs
            .iter()
            .map(|(dtype, shape)| graph.add_value(name.clone(), *dtype, shape, Source::Node))
            .collect();
        graph.nodes.push(Node {
            name,
            op,
            inputs: inputs.into(),
            outputs: ids.clone(),
        });
        Ok(ids)
    }

    fn fold(
        &mut self,
        op: &dyn Op,
        inputs: &[ValueId],
        outputs: &[(DType, Shape)],
    ) -> OpResult<Option<Vec<Const>>> {
        let size: usize = outputs.iter().map(|(_, s)| s.iter().product::<usize>()).sum();
        let size_allowed = size <= FOLD_ELEMENTS || self.low.outside.known;
        if inputs.is_empty() || !size_allowed || !op.foldable() {
            return Ok(None);
        }
        let constants: Option<Vec<Arc<Const>>> = inputs.iter().map(|&i| self.constant(i)).collect();
        let Some(constants) = constants else {
            return Ok(None);
        };
        let refs: Vec<&Const> = constants.iter().map(|c| &**c).collect();
        fold::evaluate(op, &refs, outputs, self.faithful(), &self.low.options.pool).map(Some)
    }

    /// The list bound to a parameter. It is known only when the model runs, and then belongs to this operation where no
    /// other needs it.
    pub fn list(&mut self, param: &str) -> OpResult<Arc<List>> {
        let op = self.op;
        let Some([Argument::Name(name)]) = op.input(param) else {
            return Err(format!("parameter {param:?} must name a list").into());
        };
        self.needs_values(param)?;
        match self.low.outside.items.remove(name.as_str()) {
            Some(Item::List(list)) => Ok(list),
            Some(other) => Err(format!("parameter {param:?} must be a list, it is {}", other.kind()).into()),
            None => Err(format!("parameter {param:?} names {name:?}, which is not defined before").into()),
        }
    }

    /// Refuses to go on while values are not known, for operations whose results no graph can hold.
    pub fn needs_values(&self, param: &str) -> OpResult<()> {
        if self.low.outside.known {
            return Ok(());
        }
        Err(OpError::Dynamic(param.into()))
    }

    /// Binds the next result of the operation to what is no tensor.
    pub fn result_item(&mut self, item: Item) -> OpResult<()> {
        let out = self.op.outputs.get(self.bound);
        let out = out.ok_or("internal: more results than declared")?;
        self.low.items.insert(&out.name, item);
        self.bound += 1;
        Ok(())
    }

    /// The literal bound to a parameter as the file has it.
    pub fn written(&self, param: &str) -> Option<&'m mil::Value> {
        match self.op.input(param) {
            Some([Argument::Value(v)]) => Some(v),
            Some([Argument::Name(n)]) => self.low.literals.get(n.as_str()).copied(),
            _ => self.op.attribute(param),
        }
    }

    /// Lowers a block of this operation as part of the same graph; gives the values of its results.
    pub fn inline(&mut self, index: usize) -> OpResult<Vec<ValueId>> {
        let block = self.op.blocks.get(index);
        let block = block.ok_or_else(|| format!("block {index} is missing"))?;
        self.low.inline(block)
    }

    /// Binds the next result of the operation to a value.
    pub fn result(&mut self, id: ValueId) -> OpResult<()> {
        let out = self
            .op
            .outputs
            .get(self.bound)
            .ok_or("internal: more results than declared")?;
        let value = &mut self.low.graph.values[id.0 as usize];
        if matches!(value.source, Source::Node) {
            value.name = out.name.as_str().into();
        }
        self.low.names.insert(&out.name, id);
        self.bound += 1;
        Ok(())
    }

    /// The declared type of result `index`.
    pub fn declared(&self, index: usize) -> Option<&'m mil::TensorType> {
        self.op.outputs.get(index).and_then(|o| o.ty.tensor())
    }

    /// The state bound to parameter `param`, by position in the graph's states.
    pub fn state(&mut self, param: &str) -> OpResult<usize> {
        let op = self.op;
        match op.input(param) {
            Some([Argument::Name(n)]) => {
                let slot = self.low.states.get(n.as_str()).copied();
                slot.ok_or_else(|| format!("parameter {param:?} names {n:?}, which is not a state").into())
            }
            _ => Err(format!("parameter {param:?} must name a state").into()),
        }
    }

    /// The value a state holds at this point of the program.
    pub fn current_state(&self, slot: usize) -> ValueId {
        self.low.graph.states[slot].last
    }

    /// Makes `value` what a state holds from here on.
    pub fn set_state(&mut self, slot: usize, value: ValueId) {
        self.low.graph.states[slot].last = value;
    }

    /// Checks that every declared result was bound, with the shape the file declares.
    pub(crate) fn check_outputs(&self) -> OpResult<()> {
        for out in &self.op.outputs {
            if self.low.items.contains_key(out.name.as_str()) {
                continue;
            }
            let id = self.low.names.get(out.name.as_str());
            let id = id.ok_or_else(|| format!("internal: result {:?} was not bound", out.name))?;
            let have = &self.low.graph.value(*id).shape;
            let Some(declared) = out.ty.tensor() else { continue };
            if !declared.admits(have) {
                let text = format!(
                    "result {:?} is declared {:?} but has shape {:?}",
                    out.name, declared.shape, have
                );
                return Err(text.into());
            }
        }
        Ok(())
    }
}

/// An axis from `-rank..rank` as one from `0..rank`.
pub fn normalize_axis(axis: i32, rank: usize) -> OpResult<usize> {
    let r = rank as i32;
    if (-r..r).contains(&axis) {
        Ok(if axis < 0 { axis + r } else { axis } as usize)
    } else {
        Err(format!("axis {axis} is outside {}..{r} for a value of rank {rank}", -r).into())
    }
}
