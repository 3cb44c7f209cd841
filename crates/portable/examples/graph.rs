//! Prints the optimised graph of a function: `graph MODEL FUNCTION`.
use candle_coreml_mil as mil;
use candle_coreml_portable::*;
use std::sync::Arc;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let m = Arc::new(mil::Model::open(&a[1]).unwrap());
    let passes = std::env::var("NOPASS").is_err();
    let model = Model::load(
        m,
        a.get(2).map(|s| s.as_str()),
        Options {
            passes,
            ..Default::default()
        },
    )
    .unwrap();
    let g = model.graph(&model.default_shapes().unwrap()).unwrap();
    println!("{g}");
    let p = plan::Plan::new(&g).unwrap();
    for s in &p.steps {
        let pl = |o: &plan::Operand| match &o.place {
            plan::Place::Arena(r) => format!("a{}", r.start),
            plan::Place::Const(_) => "c".into(),
            plan::Place::State(i) => format!("s{i}"),
            plan::Place::Result => "r".into(),
        };
        println!(
            "{:?} {:?} <- {:?}",
            s.op,
            s.outputs.iter().map(pl).collect::<Vec<_>>(),
            s.inputs.iter().map(pl).collect::<Vec<_>>()
        );
    }
    eprintln!(
        "{} nodes {} steps arena {} KB",
        g.nodes.len(),
        p.steps.len(),
        p.arena_bytes() / 1024
    );
}
