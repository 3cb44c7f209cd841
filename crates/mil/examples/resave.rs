//! Writes a model, compiled or not, as a package: `… --example resave -- model.mlmodelc model.mlpackage`.

use candle_coreml_mil::{Model, same_program};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut paths = std::env::args().skip(1);
    let (Some(from), Some(to)) = (paths.next(), paths.next()) else {
        return Err("two paths are needed: a model, and the package to write".into());
    };
    let model = Model::open(&from)?;
    model.save_package(&to)?;
    let saved = Model::open(&to)?;
    same_program(&model, &saved)?;
    println!(
        "{to}: {} bytes of weights, {} before",
        saved.content_size_bytes(),
        model.content_size_bytes()
    );
    Ok(())
}
