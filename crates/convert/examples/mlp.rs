//! A model of one's own: two layers from weights in memory, 4-bit palettes for the first:
//! `cargo run -p candle-coreml-convert --example mlp -- out.mlpackage`

use candle_coreml_convert::{Compression, FunctionBuilder, ProgramBuilder};
use candle_coreml_mil::{DType, Metadata};
use half::f16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: mlp OUT.mlpackage")?;
    let mut package = ProgramBuilder::create(&path)?;
    let wave = |n: usize, step: f32| -> Vec<f16> {
        (0..n).map(|i| f16::from_f32((i as f32 * step).sin())).collect()
    };
    let palette = Compression::palette(4, Some(8));
    let first = package.weight("first.weight", &[64, 16], &wave(64 * 16, 0.7), &palette)?;
    let second = package.weight("second.weight", &[4, 64], &wave(4 * 64, 0.3), &Compression::None)?;
    let bias = package.weight("second.bias", &[4], &wave(4, 1.0), &Compression::None)?;

    let mut f = FunctionBuilder::new("main");
    let x = f.input("x", DType::Fp16, &[1, 16])?;
    let weight = f.weight(&first)?;
    let hidden = f.linear(&x, &weight, None)?;
    let hidden = f.gelu(&hidden, "EXACT")?;
    let (weight, bias) = (f.weight(&second)?, f.weight(&bias)?);
    let scores = f.linear(&hidden, &weight, Some(&bias))?;
    let shares = f.softmax(&scores)?;
    f.output("shares", &shares)?;
    package.function(f)?;
    package.metadata(Metadata {
        short_description: "Two layers".to_owned(),
        ..Metadata::default()
    });
    package.finish()?;
    println!("{path}");
    Ok(())
}
