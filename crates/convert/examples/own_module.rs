//! A Candle module of one's own as a package: the weights come from its `VarBuilder`, the program is written beside its `forward`,
//! and both are run on the same input.
//!
//! `cargo run -p candle-coreml-convert --example own_module -- out.mlpackage`

use candle_core::{DType, Device, Tensor};
use candle_coreml::CoreMLModel;
use candle_coreml_convert::{Compression, FunctionBuilder, ProgramBuilder, Var};
use candle_coreml_mil::DType as Element;
use candle_nn::{LayerNorm, Linear, Module, VarBuilder, VarMap, layer_norm, linear};

const WIDTH: usize = 64;

/// Any module: two linear layers around an activation, with a residual and a norm.
struct Block {
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

impl Block {
    fn new(vb: VarBuilder<'_>) -> candle_core::Result<Self> {
        Ok(Block {
            up: linear(WIDTH, 4 * WIDTH, vb.pp("up"))?,
            down: linear(4 * WIDTH, WIDTH, vb.pp("down"))?,
            norm: layer_norm(WIDTH, 1e-5, vb.pp("norm"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.down.forward(&self.up.forward(x)?.gelu_erf()?)?;
        self.norm.forward(&(x + y)?)
    }
}

/// The same weights and the same steps, as a package. `vb` is the one the module was made with.
fn write(vb: &VarBuilder<'_>, path: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut package = ProgramBuilder::create(path)?;
    let mut f = FunctionBuilder::new("main");
    let x = f.input("x", Element::Fp16, &[1, WIDTH])?;
    let mut weight = |f: &mut FunctionBuilder, name: &str, shape: &[usize], how: Compression| {
        let tensor = vb.get(shape, name)?;
        let weight = package.tensor(name, &tensor, &how)?;
        Ok::<Var, Box<dyn std::error::Error>>(f.weight(&weight)?)
    };
    let plain = Compression::None;
    let palette = Compression::palette(8, Some(16));
    let (w, b) = (
        weight(&mut f, "up.weight", &[4 * WIDTH, WIDTH], palette)?,
        weight(&mut f, "up.bias", &[4 * WIDTH], plain)?,
    );
    let y = f.linear(&x, &w, Some(&b))?;
    let y = f.gelu(&y, "EXACT")?;
    let (w, b) = (
        weight(&mut f, "down.weight", &[WIDTH, 4 * WIDTH], palette)?,
        weight(&mut f, "down.bias", &[WIDTH], plain)?,
    );
    let y = f.linear(&y, &w, Some(&b))?;
    let y = f.add(&x, &y)?;
    let (gamma, beta) = (
        weight(&mut f, "norm.weight", &[WIDTH], plain)?,
        weight(&mut f, "norm.bias", &[WIDTH], plain)?,
    );
    let y = f.layer_norm(&y, &gamma, &beta, 1e-5)?;
    f.output("y", &y)?;
    package.function(f)?;
    package.finish()?;
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: own_module OUT.mlpackage")?;
    // Weights from a file come with VarBuilder::from_mmaped_safetensors; here they are new.
    let weights = VarMap::new();
    let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    let block = Block::new(vb.clone())?;
    write(&vb, &path)?;

    let x = Tensor::arange(0f32, WIDTH as f32, &Device::Cpu)?
        .affine(0.03, -1.0)?
        .unsqueeze(0)?;
    let expected = block.forward(&x)?;
    let outputs = CoreMLModel::load(&path)?.predict(&[("x", &x)])?;
    let found = outputs.tensor("y")?.to_dtype(DType::F32)?;
    let off = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("{path}: off by {off} at most");
    Ok(())
}
