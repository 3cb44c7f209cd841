//! Tools of a request, and grammars that have one of them called.

use candle_coreml_llm::{Grammar, Tokenizer, ToolFormat};
use serde_json::{Value, json};

use crate::refusal::Refusal;

/// A tool the model may call.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tool {
    pub name: String,
    pub parameters: Value,
    /// As it was given.
    pub json: Value,
}

/// What the model is to do with tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Choice {
    /// There are none, or they are not to be called.
    None,
    /// As it likes.
    Auto,
    /// It must call one of them.
    Any,
    /// It must call this one.
    One(String),
}

/// Checks the tools of a request.
pub(super) fn read(tools: Vec<Value>) -> Result<Vec<Tool>, Refusal> {
    let each = |(at, json): (usize, Value)| {
        if let Some(kind) = json
            .get("type")
            .and_then(Value::as_str)
            .filter(|k| *k != "function")
        {
            let param = format!("tools[{at}].type");
            return Err(Refusal::value(&param, format!("{kind:?}"), "function"));
        }
        let name = json.pointer("/function/name").and_then(Value::as_str);
        let name = name.filter(|name| !name.is_empty()).ok_or_else(|| {
            let param = format!("tools[{at}].function.name");
            let message = format!("`{param}` is missing or no text");
            Refusal::param(param, "missing_parameter", message)
        })?;
        let parameters = json.pointer("/function/parameters").filter(|p| !p.is_null());
        Ok(Tool {
            name: name.to_owned(),
            parameters: parameters.cloned().unwrap_or_else(|| json!({"type": "object"})),
            json,
        })
    };
    tools.into_iter().enumerate().map(each).collect()
}

impl Choice {
    /// Reads `tool_choice`.
    pub fn read(value: Option<&Value>, tools: &[Tool]) -> Result<Self, Refusal> {
        let refuse = |found: String, allowed: &str| Err(Refusal::value("tool_choice", found, allowed));
        match value {
            None | Some(Value::Null) if tools.is_empty() => Ok(Choice::None),
            None | Some(Value::Null) => Ok(Choice::Auto),
            Some(Value::String(word)) => match word.as_str() {
                "none" => Ok(Choice::None),
                "auto" if tools.is_empty() => Ok(Choice::None),
                "auto" => Ok(Choice::Auto),
                "required" if tools.is_empty() => {
                    refuse("required".to_owned(), "none, for there are no tools")
                }
                "required" => Ok(Choice::Any),
                other => refuse(format!("{other:?}"), "none, auto, required, or a function"),
            },
            Some(value) => {
                let name = value.pointer("/function/name").and_then(Value::as_str);
                match name.filter(|name| tools.iter().any(|tool| tool.name == *name)) {
                    Some(name) => Ok(Choice::One(name.to_owned())),
                    None => {
                        let known: Vec<&str> = tools.iter().map(|tool| tool.name.as_str()).collect();
                        refuse(
                            value.to_string(),
                            &format!("one of the tools: {}", known.join(", ")),
                        )
                    }
                }
            }
        }
    }

    /// What the answer must be where a call is a must.
    pub fn grammar(
        &self,
        tools: &[Tool],
        format: Option<ToolFormat>,
        tokenizer: &Tokenizer,
    ) -> Option<Grammar> {
        let callable = |tool: &&Tool| match self {
            Choice::None | Choice::Auto => false,
            Choice::Any => true,
            Choice::One(name) => tool.name == *name,
        };
        let callable: Vec<(&str, &Value)> = tools
            .iter()
            .filter(callable)
            .map(|tool| (tool.name.as_str(), &tool.parameters))
            .collect();
        if callable.is_empty() {
            return None;
        }
        Some(format?.grammar(&callable, tokenizer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name}})
    }

    #[test]
    fn choices_are_read_and_wrong_ones_refused() {
        let none = read(vec![]).unwrap();
        let two = read(vec![tool("a"), tool("b")]).unwrap();
        let mut failures = Vec::new();
        for (value, tools, expected) in [
            (json!(null), &none, Some(Choice::None)),
            (json!(null), &two, Some(Choice::Auto)),
            (json!("auto"), &none, Some(Choice::None)),
            (json!("none"), &two, Some(Choice::None)),
            (json!("required"), &two, Some(Choice::Any)),
            (json!("required"), &none, None),
            (json!("maybe"), &two, None),
            (tool("b"), &two, Some(Choice::One("b".to_owned()))),
            (tool("c"), &two, None),
            (json!(3), &two, None),
        ] {
            let found = Choice::read(Some(&value), tools).ok();
            if found != expected {
                failures.push(format!("{value}: {found:?}"));
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
        assert!(read(vec![json!({"type": "web_search"})]).is_err());
        assert!(read(vec![json!({"type": "function"})]).is_err());
    }
}
