//! Compresses a package: `cargo run --release -p candle-coreml-convert --example compress -- in.mlpackage out.mlpackage BITS
//! [GROUP]`. Prints how long it took.

use candle_coreml_convert::{CompressOptions, Compression, compress_package};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(from), Some(to), Some(bits)) = (arguments.next(), arguments.next(), arguments.next()) else {
        return Err("usage: compress IN OUT BITS [GROUP]".into());
    };
    let group = arguments.next().map(|g| g.parse()).transpose()?;
    let options = CompressOptions::from(Compression::Palette {
        bits: bits.parse()?,
        group,
    });
    let start = std::time::Instant::now();
    let report = compress_package(from, &to, &options, &mut |p| {
        eprint!("\r{:3} %", p.done * 100 / p.total.max(1));
    })?;
    eprintln!("\r{:.1} s", start.elapsed().as_secs_f64());
    let (before, after) = report.bytes;
    println!(
        "{to}: {} weights, {} values, {before} bytes to {after}",
        report.compressed, report.values
    );
    for (name, why) in report.kept {
        println!("kept {name}: {why}");
    }
    Ok(())
}
