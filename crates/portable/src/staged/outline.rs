//! What a function that runs in stages reads and defines where: names become numbers, and every value has its last use.

use candle_coreml_mil as mil;
use std::collections::HashMap;

/// Index of a value of the function.
pub(super) type Id = usize;
/// Index of a block of the function; 0 is its body.
pub(super) type BlockId = usize;

/// The values and blocks of a function.
#[derive(Debug, Default)]
pub(super) struct Outline {
    pub blocks: Vec<BlockOutline>,
    pub values: Vec<Definition>,
}

/// A value.
#[derive(Debug)]
pub(super) struct Definition {
    pub name: String,
    /// The operation of its block that holds it, for constants of the file.
    pub literal: Option<(BlockId, usize)>,
    /// The last operation of its block that reads it, itself or in a nested block; the number of operations when it is a
    /// result of the block.
    last_use: usize,
    block: BlockId,
}

/// A block.
#[derive(Debug, Default)]
pub(super) struct BlockOutline {
    /// The block around it, the operation there that has it, and which of its blocks it is.
    place: Option<(BlockId, usize, usize)>,
    pub inputs: Vec<Id>,
    pub outputs: Vec<Id>,
    pub operations: Vec<OpOutline>,
}

/// An operation.
#[derive(Debug, Default)]
pub(super) struct OpOutline {
    /// What it and its blocks read from around it, each once.
    pub reads: Vec<Id>,
    /// Those of them that its blocks read.
    pub inner: Vec<Id>,
    pub writes: Vec<Id>,
    pub blocks: Vec<BlockId>,
    /// Values of the block that are not needed after it.
    pub dies: Vec<Id>,
}

impl Outline {
    /// Reads a function that was checked ([`mil::Program::check`]).
    pub fn of(function: &mil::Function) -> Outline {
        let mut builder = Builder::default();
        let block = builder.open(None);
        for input in &function.inputs {
            let id = builder.define(block, &input.name);
            builder.outline.blocks[block].inputs.push(id);
        }
        builder.fill(block, &function.body);
        builder.outline
    }

    /// The blocks themselves, by [`BlockId`].
    pub fn find<'m>(&self, function: &'m mil::Function) -> Vec<&'m mil::Block> {
        let mut found = vec![&function.body];
        for block in self.blocks.iter().skip(1) {
            if let Some((around, op, which)) = block.place {
                found.push(&found[around].operations[op].blocks[which]);
            }
        }
        found
    }

    /// Results of operations `from..to` of a block that are used behind them.
    pub fn needed(&self, block: BlockId, from: usize, to: usize) -> impl Iterator<Item = Id> {
        let operations = &self.blocks[block].operations[from..to];
        let written = operations.iter().flat_map(|op| op.writes.iter().copied());
        written.filter(move |&id| self.values[id].last_use >= to && self.values[id].literal.is_none())
    }
}

#[derive(Default)]
struct Builder<'m> {
    outline: Outline,
    scope: HashMap<&'m str, Id>,
}

impl<'m> Builder<'m> {
    fn open(&mut self, place: Option<(BlockId, usize, usize)>) -> BlockId {
        self.outline.blocks.push(BlockOutline {
            place,
            ..BlockOutline::default()
        });
        self.outline.blocks.len() - 1
    }

    fn define(&mut self, block: BlockId, name: &'m str) -> Id {
        let id = self.outline.values.len();
        self.outline.values.push(Definition {
            name: name.into(),
            literal: None,
            last_use: 0,
            block,
        });
        self.scope.insert(name, id);
        id
    }

    /// Notes the operations of a block whose inputs are defined; gives what they read from around it.
    fn fill(&mut self, block: BlockId, source: &'m mil::Block) -> Vec<Id> {
        let mut around = Vec::new();
        for (at, op) in source.operations.iter().enumerate() {
            let mut noted = self.operation(block, at, op);
            noted.reads.sort_unstable();
            noted.reads.dedup();
            self.read(block, at, &noted.reads, &mut around);
            for out in &op.outputs {
                let id = self.define(block, &out.name);
                self.outline.values[id].last_use = at;
                if op.op_type == "const" {
                    self.outline.values[id].literal = Some((block, at));
                }
                noted.writes.push(id);
            }
            self.outline.blocks[block].operations.push(noted);
        }
        let outputs: Vec<Id> = source.outputs.iter().filter_map(|n| self.id(n)).collect();
        self.read(block, source.operations.len(), &outputs, &mut around);
        self.outline.blocks[block].outputs = outputs;
        self.bury(block);
        for out in source.operations.iter().flat_map(|op| &op.outputs) {
            self.scope.remove(out.name.as_str());
        }
        around
    }

    fn operation(&mut self, block: BlockId, at: usize, op: &'m mil::Operation) -> OpOutline {
        let mut noted = OpOutline::default();
        for argument in op.inputs.iter().flat_map(|(_, arguments)| arguments) {
            if let mil::Argument::Name(name) = argument {
                noted.reads.extend(self.id(name));
            }
        }
        for (which, inner) in op.blocks.iter().enumerate() {
            let id = self.open(Some((block, at, which)));
            for input in &inner.inputs {
                let input = self.define(id, &input.name);
                self.outline.blocks[id].inputs.push(input);
            }
            noted.inner.extend(self.fill(id, inner));
            for input in &inner.inputs {
                self.scope.remove(input.name.as_str());
            }
            noted.blocks.push(id);
        }
        noted.reads.extend(&noted.inner);
        noted
    }

    fn id(&self, name: &str) -> Option<Id> {
        self.scope.get(name).copied()
    }

    fn read(&mut self, block: BlockId, at: usize, ids: &[Id], around: &mut Vec<Id>) {
        for &id in ids {
            let value = &mut self.outline.values[id];
            if value.block == block {
                value.last_use = value.last_use.max(at);
            } else {
                around.push(id);
            }
        }
    }

    /// Notes for each operation what dies with it.
    fn bury(&mut self, block: BlockId) {
        let outline = &mut self.outline;
        let operations = &mut outline.blocks[block].operations;
        for (id, value) in outline.values.iter().enumerate() {
            if value.block == block
                && value.literal.is_none()
                && let Some(op) = operations.get_mut(value.last_use)
            {
                op.dies.push(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_read_in_a_nested_block_lives_until_the_operation_around_it() {
        let text = r#"program(1.3) { func main<ios18>(tensor<fp32, [2]> x, bool p) {
            tensor<fp32, [2]> a = relu(x = x);
            tensor<fp32, [2]> b = cond(pred = p)
                () { tensor<fp32, [2]> c = add(x = a, y = a); } -> (c)
                () { tensor<fp32, [2]> c = sub(x = a, y = x); } -> (c);
            tensor<fp32, [2]> d = relu(x = b);
        } -> (d); }"#;
        let program = mil::parse_program(text, "test").unwrap();
        let outline = Outline::of(&program.functions[0]);
        let name =
            |ids: &[Id]| -> Vec<&str> { ids.iter().map(|&i| outline.values[i].name.as_str()).collect() };
        let ops = &outline.blocks[0].operations;
        assert_eq!(name(&ops[0].dies), Vec::<&str>::new());
        assert_eq!(name(&ops[1].reads), ["x", "p", "a"]);
        assert_eq!(name(&ops[1].dies), ["x", "p", "a"]);
        assert_eq!(name(&outline.needed(0, 0, 1).collect::<Vec<_>>()), ["a"]);
        assert_eq!(name(&outline.needed(0, 0, 3).collect::<Vec<_>>()), ["d"]);
        let blocks = outline.find(&program.functions[0]);
        assert_eq!(blocks[2].operations[0].op_type, "sub");
        assert_eq!(outline.blocks[1].operations[0].dies, Vec::<Id>::new());
    }
}
