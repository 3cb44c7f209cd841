//! Converts a language model: `cargo run --release -p candle-coreml-convert --example convert -- MODEL OUT
//! [anemll|stateful] [BITS]`, where MODEL is a Hugging Face folder or a GGUF file and BITS those of palettes in groups of 8.

use candle_coreml_convert::{Compression, LanguageModelOptions, Layout, convert_language_model};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(from), Some(to)) = (arguments.next(), arguments.next()) else {
        return Err("usage: convert MODEL OUT [anemll|stateful] [BITS]".into());
    };
    let layout = match arguments.next().as_deref() {
        None | Some("anemll") => Layout::Anemll,
        Some("stateful") => Layout::Stateful,
        Some(other) => return Err(format!("layout {other:?}; anemll and stateful are known").into()),
    };
    let palette = match arguments.next() {
        Some(bits) => Compression::Palette {
            bits: bits.parse()?,
            group: Some(8),
        },
        None => Compression::None,
    };
    let options = LanguageModelOptions {
        layout,
        layers: palette,
        head: palette,
        ..LanguageModelOptions::default()
    };
    let plan = convert_language_model(from, &to, &options, &mut |p| {
        eprint!("\r{:3} %", p.done * 100 / p.total.max(1));
    })?;
    eprintln!();
    for (name, what, bytes) in plan.packages {
        println!("{to}/{name}: {what}, about {bytes} bytes");
    }
    Ok(())
}
