//! How conversion grows with the model: random checkpoints of 0.1, 0.5 and 1 billion values, each converted by a process of its own.
//!
//! `cargo run --release -p candle-coreml-convert --example growth [-- HOW]`, where HOW is how the weights are stored. Needs 5 GB of
//! disk in the folder for temporary files. Memory is known on Linux only.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use candle_coreml_convert::{Compression, LanguageModelOptions, convert_language_model};
use half::f16;
use serde_json::{Map, json};

const HIDDEN: usize = 1024;
const INNER: usize = 2816;
const HEADS: usize = 16;
const VOCABULARY: usize = 32_768;

/// Numbers of layers that make about 0.1, 0.5 and 1 billion values.
const LAYERS: [usize; 3] = [6, 36, 76];

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.as_slice() {
        [mode, from, to, how] if mode == "--convert" => {
            return convert(Path::new(from), Path::new(to), how.parse()?);
        }
        [] | [_] => {}
        _ => return Err("usage: growth [HOW]".into()),
    }
    let how = words.first().map_or("none", String::as_str);
    println!("values\tcheckpoint\tpackages as {how}: seconds\tMB of memory at most");
    for layers in LAYERS {
        let folder = std::env::temp_dir().join(format!("candle-coreml-growth-{}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let row = measure(&folder, layers, how);
        std::fs::remove_dir_all(&folder)?;
        println!("{}", row?);
    }
    Ok(())
}

fn measure(folder: &Path, layers: usize, how: &str) -> Result<String, Box<dyn Error>> {
    let values = checkpoint(folder, layers)?;
    let done = Command::new(std::env::current_exe()?)
        .arg("--convert")
        .args([folder, &folder.join("out")])
        .arg(how)
        .output()?;
    if !done.status.success() {
        return Err(String::from_utf8_lossy(&done.stderr).into());
    }
    let report = String::from_utf8(done.stdout)?;
    Ok(format!(
        "{values}\t{} MB\t{}",
        values * 2 / 1_000_000,
        report.trim()
    ))
}

fn convert(from: &Path, to: &Path, how: Compression) -> Result<(), Box<dyn Error>> {
    let options = LanguageModelOptions {
        layers: how,
        head: how,
        ..LanguageModelOptions::default()
    };
    let start = Instant::now();
    convert_language_model(from, to, &options, &mut |_| {})?;
    let seconds = start.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let most = most.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let most = most.map_or("unknown".to_owned(), |kib| (kib * 1024 / 1_000_000).to_string());
    println!("{seconds:.1}\t{most}");
    Ok(())
}

/// Writes a random checkpoint of so many layers; its number of values.
fn checkpoint(folder: &Path, layers: usize) -> Result<u64, Box<dyn Error>> {
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "intermediate_size": INNER, "vocab_size": VOCABULARY, "tie_word_embeddings": true,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..layers {
        let mut add = |part: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{part}.weight"), shape.to_vec()));
        };
        for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(&format!("self_attn.{part}"), &[HIDDEN, HIDDEN]);
        }
        add("mlp.gate_proj", &[INNER, HIDDEN]);
        add("mlp.up_proj", &[INNER, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, INNER]);
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
    }
    let mut header = Map::new();
    let mut end = 0;
    for (name, shape) in &tensors {
        let bytes = shape.iter().product::<usize>() * 2;
        let place = json!({ "dtype": "F16", "shape": shape, "data_offsets": [end, end + bytes] });
        header.insert(name.clone(), place);
        end += bytes;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut out = BufWriter::new(File::create(folder.join("model.safetensors"))?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    let mut state = 1u64;
    for _ in 0..end / 2 {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        // The sum of two uniform numbers: a bell of sorts.
        let uniform = |bits: u64| (bits & 0xffff) as f32 / 65536.0 - 0.5;
        let value = f16::from_f32((uniform(state >> 48) + uniform(state >> 32)) * 0.05);
        out.write_all(&value.to_le_bytes())?;
    }
    out.flush()?;
    Ok(end as u64 / 2)
}
