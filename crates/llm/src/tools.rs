//! Tools: calls that a model writes into its answer, in the forms its chat template teaches it.
//!
//! A template takes the tools as JSON ([`TemplateOptions::tools`](crate::TemplateOptions::tools)), each as OpenAI's interface has
//! it: `{"type": "function", "function": {"name", "description", "parameters"}}`. [`ChatTemplate::prompt`](crate::ChatTemplate::prompt)
//! says with the prompt which form of calls to look for; generated with that, pieces and completions carry
//! [`ToolCall`]s and their text does not show them. Answer with a message of role `tool` and go on.

mod grammar;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// A call of a tool, read out of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToolCall {
    /// Nine letters and digits, made from the call and its place: the form that every template takes.
    pub id: String,
    /// The tool's name.
    pub name: String,
    /// Its arguments by name.
    pub arguments: Map<String, Value>,
}

impl ToolCall {
    /// The call as an entry of a message's `tool_calls`, with arguments as an object, as templates expect them.
    pub fn to_json(&self) -> Value {
        json!({"id": self.id, "type": "function",
            "function": {"name": self.name, "arguments": self.arguments}})
    }
}

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several after each other: Hermes, Qwen. Inside the tags also
    /// `<function=NAME><parameter=KEY>VALUE</parameter></function>`: Qwen3-Coder.
    Tagged,
    /// The answer is `{"name": …, "parameters": {…}}`, several with `;` between them, perhaps after `<|python_tag|>`: Llama 3.
    Json,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}]`, or `[TOOL_CALLS]NAME[ARGS]{…}`: Mistral.
    Mistral,
    /// `<｜tool▁calls▁begin｜>`, then for each call `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>` (V3.1), or
    /// `function<｜tool▁sep｜>NAME` and the arguments as a block of JSON between the same marks (V3, R1): DeepSeek.
    DeepSeek,
}

/// Marks of calls in answers.
pub(crate) const TAG_OPEN: &str = "<tool_call>";
pub(crate) const TAG_CLOSE: &str = "</tool_call>";
pub(crate) const MISTRAL_OPEN: &str = "[TOOL_CALLS]";
pub(crate) const PYTHON_TAG: &str = "<|python_tag|>";
const MISTRAL_ARGUMENTS: &str = "[ARGS]";
const MISTRAL_ID: &str = "[CALL_ID]";
pub(crate) const DEEPSEEK_OPEN: &str = "<｜tool▁calls▁begin｜>";
const DEEPSEEK_CLOSE: &str = "<｜tool▁calls▁end｜>";
const DEEPSEEK_CALL: &str = "<｜tool▁call▁begin｜>";
const DEEPSEEK_CALL_END: &str = "<｜tool▁call▁end｜>";
const DEEPSEEK_SEPARATOR: &str = "<｜tool▁sep｜>";

impl ToolFormat {
    /// The form a template teaches, read off its source.
    pub(crate) fn of_template(source: &str) -> Self {
        if source.contains(TAG_OPEN) {
            ToolFormat::Tagged
        } else if source.contains(MISTRAL_OPEN) {
            ToolFormat::Mistral
        } else if source.contains(DEEPSEEK_CALL) {
            ToolFormat::DeepSeek
        } else {
            ToolFormat::Json
        }
    }

    /// What a call begins with.
    pub(crate) fn open(self) -> &'static str {
        match self {
            ToolFormat::Tagged => TAG_OPEN,
            ToolFormat::Json => PYTHON_TAG,
            ToolFormat::Mistral => MISTRAL_OPEN,
            ToolFormat::DeepSeek => DEEPSEEK_OPEN,
        }
    }

    /// Marks that may be special tokens.
    pub(crate) fn marks(self) -> &'static [&'static str] {
        match self {
            ToolFormat::Tagged => &[TAG_OPEN, TAG_CLOSE],
            ToolFormat::Json => &[PYTHON_TAG],
            ToolFormat::Mistral => &[MISTRAL_OPEN, MISTRAL_ARGUMENTS, MISTRAL_ID],
            ToolFormat::DeepSeek => &[
                DEEPSEEK_OPEN,
                DEEPSEEK_CLOSE,
                DEEPSEEK_CALL,
                DEEPSEEK_CALL_END,
                DEEPSEEK_SEPARATOR,
            ],
        }
    }

    /// The calls of `text`, what stands between or after the marks; `None` when it is something else. `before` counts the
    /// calls that came earlier in the answer.
    pub(crate) fn parse(self, text: &str, before: usize) -> Option<Vec<ToolCall>> {
        let found = match self {
            ToolFormat::Tagged if text.trim_start().starts_with("<function=") => {
                vec![parse_function_tags(text)?]
            }
            ToolFormat::Tagged | ToolFormat::Json => parse_objects(text)?,
            ToolFormat::Mistral => parse_mistral(text)?,
            ToolFormat::DeepSeek => parse_deepseek(text)?,
        };
        let calls: Vec<ToolCall> = (before..).zip(found).map(|(at, call)| call.at(at)).collect();
        (!calls.is_empty()).then_some(calls)
    }
}

/// A call before it has an id.
struct Found {
    name: String,
    arguments: Map<String, Value>,
}

impl Found {
    fn new(name: &str, arguments: Value) -> Option<Self> {
        let arguments = match arguments {
            Value::Object(arguments) => arguments,
            Value::Null => Map::new(),
            Value::String(text) => serde_json::from_str(&text).ok()?,
            _ => return None,
        };
        let name = name.trim();
        (!name.is_empty()).then(|| Found {
            name: name.to_owned(),
            arguments,
        })
    }

    /// From `{"name": …, "arguments": …}`, with Llama's `parameters`, or with both inside `function`.
    fn from_json(value: &Value) -> Option<Self> {
        let object = value.as_object()?;
        if let Some(inner) = object.get("function").filter(|f| f.is_object()) {
            return Found::from_json(inner);
        }
        let name = object.get("name").or_else(|| object.get("function"))?.as_str()?;
        let arguments = object.get("arguments").or_else(|| object.get("parameters"));
        Found::new(name, arguments.cloned().unwrap_or_default())
    }

    fn at(self, index: usize) -> ToolCall {
        const SYMBOLS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
        let hash = Sha256::new()
            .chain_update(index.to_le_bytes())
            .chain_update(&self.name)
            .chain_update(Value::Object(self.arguments.clone()).to_string())
            .finalize();
        let symbol = |byte: &u8| char::from(SYMBOLS[usize::from(*byte) % SYMBOLS.len()]);
        ToolCall {
            id: hash.iter().take(9).map(symbol).collect(),
            name: self.name,
            arguments: self.arguments,
        }
    }
}

/// Objects or arrays of them, with blanks or `;` between.
fn parse_objects(text: &str) -> Option<Vec<Found>> {
    let mut calls = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (value, after) = first_json(rest)?;
        match &value {
            Value::Array(items) => {
                for item in items {
                    calls.push(Found::from_json(item)?);
                }
            }
            one => calls.push(Found::from_json(one)?),
        }
        rest = after.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
    }
    Some(calls)
}

/// What follows `[TOOL_CALLS]`: a JSON array, or names with arguments, each after the mark again.
fn parse_mistral(text: &str) -> Option<Vec<Found>> {
    let mut calls = Vec::new();
    for part in text
        .split(MISTRAL_OPEN)
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        if part.starts_with('[') || part.starts_with('{') {
            calls.extend(parse_objects(part)?);
            continue;
        }
        let brace = part.find('{')?;
        let head = part[..brace].split(MISTRAL_ARGUMENTS).next()?;
        let name = head.split(MISTRAL_ID).next()?;
        let (arguments, after) = first_json(&part[brace..])?;
        if !after.trim().is_empty() {
            return None;
        }
        calls.push(Found::new(name, arguments)?);
    }
    Some(calls)
}

/// What follows `<｜tool▁calls▁begin｜>`: calls between marks of their own. An answer that ends early may lack the last marks.
fn parse_deepseek(text: &str) -> Option<Vec<Found>> {
    let text = text.split(DEEPSEEK_CLOSE).next()?.trim();
    let mut calls = Vec::new();
    for part in text.strip_prefix(DEEPSEEK_CALL)?.split(DEEPSEEK_CALL) {
        let part = part.trim().trim_end_matches(DEEPSEEK_CALL_END);
        let (name, arguments) = match part.split_once(DEEPSEEK_SEPARATOR)? {
            ("function", rest) => rest.split_once('\n')?,
            named => named,
        };
        let arguments = arguments.trim();
        let block = arguments
            .strip_prefix("```json")
            .or(arguments.strip_prefix("```"));
        let arguments = block.unwrap_or(arguments);
        let (arguments, after) = first_json(arguments)?;
        if !matches!(after.trim(), "" | "```") {
            return None;
        }
        calls.push(Found::new(name, arguments)?);
    }
    Some(calls)
}

/// `<function=NAME><parameter=KEY>VALUE</parameter>…</function>`. A value that is JSON other than a string is that, else it is text.
fn parse_function_tags(text: &str) -> Option<Found> {
    let body = text.trim().strip_prefix("<function=")?;
    let (name, body) = body.split_once('>')?;
    let body = body.split("</function>").next()?;
    let mut arguments = Map::new();
    for part in body.split("<parameter=").skip(1) {
        let (key, value) = part.split_once('>')?;
        let value = value.split("</parameter>").next()?;
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let json = serde_json::from_str(value)
            .ok()
            .filter(|json: &Value| !json.is_string());
        arguments.insert(key.trim().to_owned(), json.unwrap_or_else(|| value.into()));
    }
    Found::new(name, Value::Object(arguments))
}

/// The JSON value a text begins with, and what comes after it.
fn first_json(text: &str) -> Option<(Value, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let value = values.next()?.ok()?;
    Some((value, text.get(values.byte_offset()..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(format: ToolFormat, text: &str) -> Option<Vec<(String, Value)>> {
        let calls = format.parse(text, 0)?;
        Some(
            calls
                .into_iter()
                .map(|c| (c.name, Value::Object(c.arguments)))
                .collect(),
        )
    }

    #[test]
    fn calls_are_read_in_every_form_and_anything_else_is_none() {
        use ToolFormat::{DeepSeek, Json, Mistral, Tagged};
        let one = |name: &str, arguments: Value| Some(vec![(name.to_owned(), arguments)]);
        let mut failures = Vec::new();
        for (format, text, expected) in [
            (
                Tagged,
                "\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n",
                one("f", json!({"x": 1})),
            ),
            (
                Tagged,
                "{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}",
                one("f", json!({"x": 1})),
            ),
            (Tagged, "{\"name\": \"f\"}", one("f", json!({}))),
            (Tagged, "{\"name\": \"f\", \"arguments\": 3}", None),
            (Tagged, "{\"name\": \"f\"", None),
            (Tagged, "", None),
            (
                Tagged,
                "\n<function=get>\n<parameter=city>\nParis\nand\n</parameter>\n<parameter=n>3</parameter>\n</function>\n",
                one("get", json!({"city": "Paris\nand", "n": 3})),
            ),
            (
                Json,
                "{\"name\": \"f\", \"parameters\": {\"x\": \"}\"}}",
                one("f", json!({"x": "}"})),
            ),
            (
                Json,
                "{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {}}}",
                one("f", json!({})),
            ),
            (
                Json,
                "{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {}}",
                Some(vec![("f".into(), json!({})), ("g".into(), json!({}))]),
            ),
            (Json, "{\"age\": 3}", None),
            (Json, "{\"name\": \"f\", \"parameters\": {}} and so on", None),
            (
                Mistral,
                " [{\"name\": \"f\", \"arguments\": {\"x\": []}}]",
                one("f", json!({"x": []})),
            ),
            (Mistral, "f[ARGS]{\"x\": 1}", one("f", json!({"x": 1}))),
            (
                Mistral,
                "f[CALL_ID]abc123def[ARGS]{}[TOOL_CALLS]g{\"y\": 2}",
                Some(vec![("f".into(), json!({})), ("g".into(), json!({"y": 2}))]),
            ),
            (Mistral, "no call", None),
            (
                DeepSeek,
                "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"x\": 1}<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                Some(vec![("f".into(), json!({"x": 1})), ("g".into(), json!({}))]),
            ),
            (
                DeepSeek,
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"x\": \"``\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
                Some(vec![("f".into(), json!({"x": "``"})), ("g".into(), json!({}))]),
            ),
            (
                DeepSeek,
                "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"x\": 1}",
                one("f", json!({"x": 1})),
            ),
            (DeepSeek, "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"x\":", None),
            (DeepSeek, "<｜tool▁call▁begin｜>f", None),
            (DeepSeek, "f{}", None),
        ] {
            let found = read(format, text);
            if found != expected {
                failures.push(format!("{format:?} {text:?}: {found:?}"));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn ids_are_nine_symbols_and_tell_calls_apart() {
        let text = "{\"name\": \"f\"} {\"name\": \"f\"} {\"name\": \"g\"}";
        let calls = ToolFormat::Json.parse(text, 0).unwrap();
        let ids: std::collections::BTreeSet<&str> = calls.iter().map(|c| c.id.as_str()).collect();
        assert_eq!(ids.len(), 3);
        assert!(
            ids.iter()
                .all(|id| id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()))
        );
        assert_eq!(calls, ToolFormat::Json.parse(text, 0).unwrap());
    }
}
