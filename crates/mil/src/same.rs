//! Whether two models hold the same program, as a package and its compiled form do.

use std::collections::{BTreeMap, HashMap};

use crate::error::{Problem, problem};
use crate::model::Model;
use crate::program::*;

/// The first place where two programs differ.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Difference(String);

/// The attribute of compiled functions that repeats the shapes of the description.
pub(crate) const FLEXIBLE_SHAPES: &str = "FlexibleShapeInformation";

type Result<T, E = Problem> = std::result::Result<T, E>;

/// Compares the programs of two models.
///
/// They are the same when their functions have the same names, operation sets, inputs and outputs, and the same operations
/// in the same order with the same values; weights are compared by their bytes. What Apple's compiler changes does not
/// count: names of values inside a function, the order of functions, inputs, arguments and attributes, where constants
/// are (their place among the operations, in place or in a weight file, named or written as an argument), the `name`
/// attribute of operations, program attributes such as `buildInfo`, and `FlexibleShapeInformation`, which repeats the
/// description.
///
/// Two models without a program are the same here.
///
/// # Errors
/// Where they differ first, and how.
pub fn same_program(a: &Model, b: &Model) -> Result<(), Difference> {
    let fail = |p: Problem| Difference(p.into_text());
    match (a.program(), b.program()) {
        (None, None) => Ok(()),
        (Some(left), Some(right)) => programs(&Sides { a, b }, left, right).map_err(fail),
        _ => Err(fail(problem!("only one of the models has a program"))),
    }
}

struct Sides<'m> {
    a: &'m Model,
    b: &'m Model,
}

fn programs(sides: &Sides, left: &Program, right: &Program) -> Result<()> {
    let names = |p: &Program| {
        let mut names: Vec<_> = p.functions.iter().map(|f| f.name.clone()).collect();
        names.sort();
        names
    };
    equal("functions", &names(left), &names(right))?;
    for f in &left.functions {
        let Some(g) = right.function(&f.name) else {
            continue;
        };
        function(sides, f, g).map_err(|p| p.within(format!("function {:?}", f.name)))?;
    }
    Ok(())
}

fn equal<T: PartialEq + std::fmt::Debug>(what: &str, left: &T, right: &T) -> Result<()> {
    if left == right {
        Ok(())
    } else {
        Err(problem!("{what}: {left:?} and {right:?}"))
    }
}

fn function<'p>(sides: &Sides, f: &'p Function, g: &'p Function) -> Result<()> {
    equal("operation set", &f.opset, &g.opset)?;
    let inputs = |f: &'p Function| -> BTreeMap<&'p str, &'p ValueType> {
        f.inputs.iter().map(|n| (n.name.as_str(), &n.ty)).collect()
    };
    equal("inputs", &inputs(f), &inputs(g))?;
    equal("outputs", &f.body.outputs, &g.body.outputs)?;
    let mut comparison = Comparison {
        sides,
        left: HashMap::new(),
        right: HashMap::new(),
        next: 0,
    };
    for input in &f.inputs {
        comparison.bind(&input.name, &input.name);
    }
    comparison.attributes(&f.attributes, &g.attributes, FLEXIBLE_SHAPES)?;
    comparison.block(&f.body, &g.body)
}

/// What a name stands for.
#[derive(Clone, Copy)]
enum Meaning<'p> {
    /// The same number on both sides is the same value.
    Numbered(usize),
    Constant(&'p Value),
}

/// Comparison of two functions, with what the names seen so far stand for on each side.
struct Comparison<'p, 'm> {
    sides: &'m Sides<'m>,
    left: HashMap<&'p str, Meaning<'p>>,
    right: HashMap<&'p str, Meaning<'p>>,
    next: usize,
}

impl<'p> Comparison<'p, '_> {
    fn bind(&mut self, left: &'p str, right: &'p str) {
        self.left.insert(left, Meaning::Numbered(self.next));
        self.right.insert(right, Meaning::Numbered(self.next));
        self.next += 1;
    }

    fn block(&mut self, left: &'p Block, right: &'p Block) -> Result<()> {
        self.bind_all("block inputs", &left.inputs, &right.inputs)?;
        let left_ops = skip_constants(left, &mut self.left);
        let right_ops = skip_constants(right, &mut self.right);
        let types = |ops: &[&Operation]| ops.iter().map(|op| op.op_type.clone()).collect::<Vec<_>>();
        for (i, (x, y)) in left_ops.iter().zip(&right_ops).enumerate() {
            let name = x.outputs.first().map_or("", |o| o.name.as_str());
            self.operation(x, y).map_err(|p| {
                p.within(format!(
                    "operation {i} {name:?} ({}), constants not counted",
                    x.op_type
                ))
            })?;
        }
        let common = left_ops.len().min(right_ops.len());
        let rest = |ops: &[&Operation]| types(ops.get(common..).unwrap_or_default());
        equal("operations at the end", &rest(&left_ops), &rest(&right_ops))?;
        equal(
            "number of block outputs",
            &left.outputs.len(),
            &right.outputs.len(),
        )?;
        for (x, y) in left.outputs.iter().zip(&right.outputs) {
            self.same(
                self.left.get(x.as_str()).copied(),
                self.right.get(y.as_str()).copied(),
            )
            .map_err(|p| p.within(format!("block output {x:?} and {y:?}")))?;
        }
        Ok(())
    }

    fn operation(&mut self, x: &'p Operation, y: &'p Operation) -> Result<()> {
        equal("operator", &x.op_type, &y.op_type)?;
        equal("inputs", &sorted_names(&x.inputs), &sorted_names(&y.inputs))?;
        for (name, arguments) in &x.inputs {
            let other = y.input(name).unwrap_or_default();
            self.arguments(arguments, other)
                .map_err(|p| p.within(format!("input {name:?}")))?;
        }
        self.attributes(&x.attributes, &y.attributes, "name")?;
        equal("number of blocks", &x.blocks.len(), &y.blocks.len())?;
        for (i, (b, c)) in x.blocks.iter().zip(&y.blocks).enumerate() {
            self.block(b, c).map_err(|p| p.within(format!("block {i}")))?;
        }
        self.bind_all("outputs", &x.outputs, &y.outputs)
    }

    fn bind_all(&mut self, what: &str, left: &'p [NamedType], right: &'p [NamedType]) -> Result<()> {
        let types = |list: &'p [NamedType]| list.iter().map(|n| &n.ty).collect::<Vec<_>>();
        equal(what, &types(left), &types(right))?;
        left.iter()
            .zip(right)
            .for_each(|(l, r)| self.bind(&l.name, &r.name));
        Ok(())
    }

    fn arguments(&self, left: &'p [Argument], right: &'p [Argument]) -> Result<()> {
        equal("number of arguments", &left.len(), &right.len())?;
        for (l, r) in left.iter().zip(right) {
            self.same(meaning(l, &self.left), meaning(r, &self.right))?;
        }
        Ok(())
    }

    fn same(&self, left: Option<Meaning>, right: Option<Meaning>) -> Result<()> {
        match (left, right) {
            (Some(Meaning::Constant(l)), Some(Meaning::Constant(r))) => self.values(l, r),
            (Some(Meaning::Numbered(l)), Some(Meaning::Numbered(r))) if l == r => Ok(()),
            (Some(Meaning::Numbered(_)), Some(Meaning::Numbered(_))) => {
                Err(problem!("bound to different values"))
            }
            (None, _) | (_, None) => Err(problem!("bound to a name that is not defined")),
            _ => Err(problem!("a constant and a computed value")),
        }
    }

    fn attributes(&self, left: &Attributes, right: &Attributes, ignored: &str) -> Result<()> {
        let map = |list: &'_ Attributes| -> BTreeMap<String, usize> {
            let kept = list.iter().enumerate().filter(|(_, (name, _))| name != ignored);
            kept.map(|(i, (name, _))| (name.clone(), i)).collect()
        };
        let (l, r) = (map(left), map(right));
        equal(
            "attributes",
            &l.keys().collect::<Vec<_>>(),
            &r.keys().collect::<Vec<_>>(),
        )?;
        for ((name, i), j) in l.iter().zip(r.values()) {
            let (Some((_, x)), Some((_, y))) = (left.get(*i), right.get(*j)) else {
                continue;
            };
            self.values(x, y)
                .map_err(|p| p.within(format!("attribute {name:?}")))?;
        }
        Ok(())
    }

    fn values(&self, left: &Value, right: &Value) -> Result<()> {
        equal("type", &left.ty, &right.ty)?;
        let read = |model: &Model, value: &Value| model.tensor_bytes(value).map_err(|e| problem!("{e}"));
        let (l, r) = (read(self.sides.a, left)?, read(self.sides.b, right)?);
        match (l, r, &left.data, &right.data) {
            (Some(l), Some(r), ..) if l == r => Ok(()),
            (Some(l), Some(r), ..) => {
                let at = l.iter().zip(&r).take_while(|(x, y)| x == y).count();
                Err(problem!("the elements differ, first at byte {at} of {}", l.len()))
            }
            (_, _, ValueData::List(l), ValueData::List(r))
            | (_, _, ValueData::Tuple(l), ValueData::Tuple(r)) => {
                equal("number of elements", &l.len(), &r.len())?;
                l.iter().zip(r).try_for_each(|(x, y)| self.values(x, y))
            }
            (_, _, l, r) => equal("value", l, r),
        }
    }
}

/// The operations without constants, which are remembered as what their names stand for.
fn skip_constants<'p>(block: &'p Block, names: &mut HashMap<&'p str, Meaning<'p>>) -> Vec<&'p Operation> {
    let mut kept = Vec::new();
    for op in &block.operations {
        match (op.op_type.as_str(), op.outputs.as_slice(), op.attribute("val")) {
            ("const", [output], Some(value)) => {
                names.insert(&output.name, Meaning::Constant(value));
            }
            _ => kept.push(op),
        }
    }
    kept
}

fn meaning<'p>(argument: &'p Argument, names: &HashMap<&'p str, Meaning<'p>>) -> Option<Meaning<'p>> {
    match argument {
        Argument::Name(name) => names.get(name.as_str()).copied(),
        Argument::Value(value) => Some(Meaning::Constant(value)),
    }
}

fn sorted_names(inputs: &[(String, Vec<Argument>)]) -> Vec<&str> {
    let mut names: Vec<_> = inputs.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::source::Source;

    fn model(version: &str, body: &str) -> Model {
        let text = format!(
            "program({version}) {{ func main<ios18>(tensor<fp32, [2]> x, bool p) {{ {body} }} -> (y); }}"
        );
        let files = BTreeMap::from([("model.mil".to_string(), text.into())]);
        Model::open_source(Source::memory(files), "").unwrap()
    }

    const BODY: &str = "tensor<fp32, [2]> a = add(x = x, y = fp32(0x1p+0))[name = string(\"op\")];
        tensor<fp32, [2]> y = cond(pred = p) () {} -> (a) () { tensor<fp32, [2]> b = exp(x = a); } -> (b);";

    #[test]
    fn names_order_and_the_place_of_constants_do_not_count() {
        let other = "tensor<fp32, []> one = const()[val = tensor<fp32, []>(0x1p+0)];
            tensor<fp32, [2]> z = add(y = one, x = x);
            tensor<fp32, [2]> y = cond(pred = p) () {} -> (z) () { tensor<fp32, [2]> c = exp(x = z); } -> (c);";
        assert_eq!(same_program(&model("1.3", BODY), &model("1.0", other)), Ok(()));
    }

    #[test]
    fn everything_else_counts_and_is_told_with_its_place() {
        let cases = [
            (
                "fp32(0x1p+0)",
                "fp32(0x1p+1)",
                "(add), constants not counted: input \"y\": the elements differ",
            ),
            ("fp32(0x1p+0)", "fp16(0x1p+0)", "input \"y\": type"),
            ("fp32(0x1p+0)", "x", "a constant and a computed value"),
            ("exp(x = a)", "exp(x = x)", "block 1: operation 0 \"b\" (exp)"),
            ("exp(x = a)", "log(x = a)", "operator: \"exp\" and \"log\""),
            ("-> (b)", "-> (a)", "block output"),
            ("name = string(\"op\")", "mode = string(\"op\")", "attributes"),
            ("[2]> b", "[3]> b", "outputs"),
            ("add(x = x,", "add(", "inputs"),
        ];
        for (from, to, expected) in cases {
            let found = same_program(&model("1.3", BODY), &model("1.3", &BODY.replace(from, to)));
            let found = found.unwrap_err().to_string();
            assert!(
                found.starts_with("function \"main\": ") && found.contains(expected),
                "{to}: {found}"
            );
        }
        let longer = format!("{BODY} fp32 q = exp(x = fp32(0x1p+0));");
        let found = same_program(&model("1.3", BODY), &model("1.3", &longer)).unwrap_err();
        assert!(found.to_string().contains("operations at the end"), "{found}");
    }
}
