//! Prints the program of a model as MIL text: `cargo run -p candle-coreml-mil --example print -- model.mlpackage`.

use candle_coreml_mil::{Model, print_program};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("a path to a model is needed")?;
    let model = Model::open(&path)?;
    match model.program() {
        Some(program) => println!("{}", print_program(program)),
        None => println!("{}: {:?}", model.name(), model.description().kind),
    }
    Ok(())
}
