//! What a bundle's files say: its layout, how its packages are wired, and the packages themselves.

use std::io::Write;
use std::path::Path;

use candle_coreml_llm::{Bundle, WiredCall, WiredPort, Wiring};
use serde_json::{Map, Value, json};

use crate::failure::{DONE, Failure, Outcome};
use crate::terminal::{self, FAINT, STRONG, styled};

pub fn run(path: &Path, json: bool) -> Outcome {
    let bundle = Bundle::open(path)?;
    let wiring = bundle.wiring();
    let mut facts = facts(&bundle)?;
    let mut out = terminal::out();
    if json {
        match &wiring {
            Ok(wiring) => facts.extend(object(serde_json::to_value(wiring)?)),
            Err(misfit) => drop(facts.insert("misfit".to_owned(), json!(misfit.to_string()))),
        }
        facts.insert("packages".to_owned(), packages(&bundle)?);
        writeln!(out, "{}", serde_json::to_string_pretty(&Value::Object(facts))?)?;
    } else {
        let numbers = wiring.as_ref().map(numbers).unwrap_or_default();
        facts.extend(numbers);
        super::print(&mut out, &Value::Object(facts), 0)?;
        if let Ok(wiring) = &wiring {
            print_wiring(&mut out, wiring)?;
        }
        super::print(&mut out, &json!({ "package": packages(&bundle)? }), 0)?;
    }
    // Everything there is to see has been shown; what does not fit comes last.
    wiring?;
    Ok(DONE)
}

/// What the files beside the packages say.
fn facts(bundle: &Bundle) -> Result<Map<String, Value>, Failure> {
    let tokenizer = bundle.tokenizer();
    let ends = bundle.end_tokens().iter();
    let ends = ends
        .map(|&id| tokenizer.decode(&[id], true))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(object(json!({
        "language_model": bundle.name(),
        "layout": bundle.layout().name(),
        "architecture": bundle.meta().architecture(),
        "tokenizer_tokens": tokenizer.vocabulary(),
        "end_tokens": ends,
        "end_token_ids": **bundle.end_tokens(),
        "chat_template": bundle.template().is_ok(),
    })))
}

/// The numbers of a wiring, in words.
fn numbers(wiring: &Wiring) -> Map<String, Value> {
    let prefill = match (wiring.batch_tokens, &wiring.no_batches_because) {
        (Some(rows), None) if !wiring.further_batches.is_empty() => {
            let further: Vec<String> = wiring.further_batches.iter().map(usize::to_string).collect();
            format!("{rows} tokens at once, or {}", further.join(" or "))
        }
        (Some(rows), None) => format!("{rows} tokens at once"),
        (Some(_), Some(why)) => format!("token by token: {why}"),
        (None, why) => format!("none: {}", why.as_deref().unwrap_or_default()),
    };
    object(json!({
        "context_tokens": format!("{}, bound by {}", wiring.context_tokens, wiring.context_bound_by),
        "vocabulary": wiring.vocabulary,
        "gives": if wiring.gives_logits { "logits" } else { "the best token" },
        "prefill": prefill,
        "sliding_window": wiring.sliding_window,
    }))
}

fn packages(bundle: &Bundle) -> Result<Value, Failure> {
    let folder = bundle.files().path().unwrap_or(Path::new("")).to_owned();
    let mut all = Vec::new();
    for file in bundle.layout().packages() {
        let facts = super::one_model(&folder.join(file))?;
        all.push(json!({ "file": file, "functions": facts["functions"], "weights": facts["weights"] }));
    }
    Ok(Value::Array(all))
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn print_wiring(out: &mut impl Write, wiring: &Wiring) -> std::io::Result<()> {
    for call in &wiring.calls {
        print_call(out, call)?;
    }
    for (index, state) in wiring.states.iter().enumerate() {
        let title = styled(STRONG, format!("state {index}"));
        writeln!(out, "{title} made by {}", state.made_by)?;
        for buffer in &state.buffers {
            writeln!(out, "  {}", port(buffer))?;
        }
    }
    Ok(())
}

fn print_call(out: &mut impl Write, call: &WiredCall) -> std::io::Result<()> {
    let state = call
        .state
        .map(|index| format!(", state {index}"))
        .unwrap_or_default();
    let title = styled(STRONG, &call.when);
    writeln!(out, "{title} {}, function {}{state}", call.file, call.function)?;
    for input in &call.inputs {
        writeln!(
            out,
            "  {} {}",
            port(input),
            styled(FAINT, format!("<- {}", input.flow))
        )?;
    }
    for output in &call.outputs {
        writeln!(
            out,
            "  {} {}",
            port(output),
            styled(FAINT, format!("-> {}", output.flow))
        )?;
    }
    Ok(())
}

fn port(port: &WiredPort) -> String {
    let shape = if port.shape.is_empty() {
        String::new()
    } else {
        format!(" {:?}", port.shape)
    };
    format!("{} {}{shape}", port.name, port.dtype)
        .trim_end()
        .to_owned()
}
