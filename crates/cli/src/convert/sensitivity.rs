//! `convert --sensitivity`: what each layer's compression costs on a text.

use std::io::Write;
use std::time::Duration;

use candle_coreml_convert::{LanguageModelOptions, Reference};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::args::ConvertArgs;
use super::check;
use crate::failure::{DONE, Failure, Outcome};
use crate::terminal::{self, FAINT, styled};

pub fn run(args: &ConvertArgs, options: &LanguageModelOptions) -> Outcome {
    if args.how.compression()? == candle_coreml_convert::Compression::None && options.mixed.is_empty() {
        return Err(Failure::usage(
            "--sensitivity needs a form to measure: --palettize, --quantize or --prune",
        ));
    }
    let reference = Reference::open(&args.model)?;
    let tokens = check::text_tokens(args, &reference.tokenizer()?, options.context)?;
    let style = ProgressStyle::with_template("{prefix} {wide_bar} layer {pos} of {len}, {eta} left");
    let style = style.expect("the template is a constant that indicatif understands");
    let bar = ProgressBar::new(0).with_style(style).with_prefix("measuring");
    bar.enable_steady_tick(Duration::from_millis(500));
    let report = reference.sensitivity(&tokens, |layer| *options.layer(layer), &mut |p| {
        bar.set_length(p.total);
        bar.set_position(p.done);
    });
    bar.finish_and_clear();
    let report = report?;
    let mut out = terminal::out();
    if args.json {
        let rows: Vec<_> = report
            .layers
            .iter()
            .map(|l| {
                json!({ "layer": l.layer, "how": l.how.to_string(), "divergence": l.divergence,
                        "perplexity": l.perplexity, "weight_error": l.weight_error })
            })
            .collect();
        let facts = json!({ "tokens": tokens.len(), "perplexity": report.perplexity, "layers": rows });
        writeln!(out, "{}", serde_json::to_string_pretty(&facts)?)?;
        return Ok(DONE);
    }
    writeln!(
        out,
        "{} tokens, perplexity {:.4} in float32; one layer at a time compressed, the worst first:",
        tokens.len(),
        report.perplexity
    )?;
    writeln!(out, "layer  divergence  perplexity  weight error  how")?;
    let mut layers: Vec<_> = report.layers.iter().collect();
    layers.sort_by(|a, b| b.divergence.total_cmp(&a.divergence));
    for l in layers {
        let (divergence, perplexity, error) = (l.divergence, l.perplexity, 100.0 * l.weight_error);
        let how = styled(FAINT, l.how);
        writeln!(
            out,
            "{:5}  {divergence:10.6}  {perplexity:10.4}  {error:10.2} %  {how}",
            l.layer
        )?;
    }
    Ok(DONE)
}
