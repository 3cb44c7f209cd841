//! Grammars of answers that are a call.

use serde_json::{Value, json};

use super::{
    DEEPSEEK_CALL, DEEPSEEK_CALL_END, DEEPSEEK_CLOSE, DEEPSEEK_OPEN, DEEPSEEK_SEPARATOR, MISTRAL_ARGUMENTS,
    MISTRAL_OPEN, TAG_CLOSE, TAG_OPEN, ToolFormat,
};
use crate::grammar::Grammar;
use crate::tokenizer::Tokenizer;

impl ToolFormat {
    /// A grammar of answers that call one of `tools`, each given by its name and the JSON schema of its arguments: for
    /// [`GenerateOptions::grammar`](crate::GenerateOptions::grammar), where a call is a must. Marks that are special tokens of
    /// `tokenizer` are those tokens. Where a family of models writes calls in two ways, the model has the choice.
    pub fn grammar(self, tools: &[(&str, &Value)], tokenizer: &Tokenizer) -> Grammar {
        let mark = |text: &str| match tokenizer.id(text).filter(|id| tokenizer.is_special(*id)) {
            Some(id) => format!("<[{id}]>"),
            None => quoted(text),
        };
        let text = match self {
            ToolFormat::Json => return Grammar::JsonSchema(objects(tools, "parameters")),
            ToolFormat::Tagged => {
                let (open, close) = (mark(TAG_OPEN), mark(TAG_CLOSE));
                let call = compact(objects(tools, "arguments"));
                format!("start: {open} \"\\n\" call \"\\n\" {close}\ncall: %json {call}\n")
            }
            ToolFormat::Mistral => {
                let open = mark(MISTRAL_OPEN);
                let list = json!({"type": "array", "items": objects(tools, "arguments"), "minItems": 1, "maxItems": 1});
                let list = compact(list);
                let mut text = format!("start: {open} \" \"? list\nlist: %json {list}\n");
                // Versions without the mark between name and arguments know the list alone.
                if tokenizer.id(MISTRAL_ARGUMENTS).is_some() {
                    let calls = each_after(tools, |name| {
                        format!("{} {}", quoted(name), mark(MISTRAL_ARGUMENTS))
                    });
                    text = format!("start: {open} (\" \"? list | call)\nlist: %json {list}\n{calls}");
                }
                text
            }
            ToolFormat::DeepSeek => {
                let separator = mark(DEEPSEEK_SEPARATOR);
                let plain = each_after(tools, |name| format!("{} {separator}", quoted(name)));
                let blocks: Vec<String> = (0..tools.len())
                    .map(|at| {
                        let name = tools.get(at).map_or("", |tool| tool.0);
                        let head = quoted(&format!("{name}\n```json\n"));
                        format!(
                            "{} {separator} {head} arguments_{at} {}",
                            quoted("function"),
                            quoted("\n```")
                        )
                    })
                    .collect();
                format!(
                    "start: {} {} (call | block) {} {}\nblock: {}\n{plain}",
                    mark(DEEPSEEK_OPEN),
                    mark(DEEPSEEK_CALL),
                    mark(DEEPSEEK_CALL_END),
                    mark(DEEPSEEK_CLOSE),
                    blocks.join(" | "),
                )
            }
        };
        Grammar::Lark(text)
    }
}

/// The rule `call`: what stands before the arguments of each tool, then these.
fn each_after(tools: &[(&str, &Value)], head: impl Fn(&str) -> String) -> String {
    let (mut calls, mut rules) = (Vec::new(), String::new());
    for (at, (name, schema)) in tools.iter().enumerate() {
        calls.push(format!("{} arguments_{at}", head(name)));
        rules.push_str(&format!("arguments_{at}: %json {}\n", compact((*schema).clone())));
    }
    format!("call: {}\n{rules}", calls.join(" | "))
}

/// Objects with a tool's name and its arguments.
fn objects(tools: &[(&str, &Value)], arguments: &str) -> Value {
    let each = |(name, schema): &(&str, &Value)| {
        json!({
            "type": "object",
            "properties": {"name": {"const": name}, arguments: schema},
            "required": ["name", arguments],
            "additionalProperties": false,
        })
    };
    let mut calls: Vec<Value> = tools.iter().map(each).collect();
    if calls.len() == 1 {
        calls.swap_remove(0)
    } else {
        json!({"anyOf": calls})
    }
}

/// The schema of JSON as templates write it: with blanks at will a model may get lost in them.
fn compact(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Object(schema) => schema,
        _ => serde_json::Map::new(),
    };
    let blanks = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
    schema.insert("x-guidance".to_owned(), blanks);
    Value::Object(schema)
}

/// A text as Lark has it; its escapes are those of JSON.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::Constraint;
    use crate::tokenizer::tests::{bytes_tokenizer, tokenizer_with};

    #[test]
    fn calls_of_every_form_are_what_a_grammar_allows_and_are_read_again() {
        use ToolFormat::{DeepSeek, Json, Mistral, Tagged};
        let plain = bytes_tokenizer();
        let marked = tokenizer_with(&[
            TAG_OPEN,
            TAG_CLOSE,
            MISTRAL_OPEN,
            MISTRAL_ARGUMENTS,
            DEEPSEEK_OPEN,
            DEEPSEEK_CLOSE,
            DEEPSEEK_CALL,
            DEEPSEEK_CALL_END,
            DEEPSEEK_SEPARATOR,
        ]);
        let city = json!({"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
            "additionalProperties": false});
        let nothing = json!({"type": "object", "additionalProperties": false});
        let tools = [("weather", &city), ("time \"now\"", &nothing)];
        let deepseek = |call: &str| {
            format!(
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
            )
        };
        let mut failures = Vec::new();
        for (format, text, good) in [
            (
                Tagged,
                "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>"
                    .to_owned(),
                true,
            ),
            (
                Tagged,
                "<tool_call>\n{\"name\": \"time \\\"now\\\"\", \"arguments\": {}}\n</tool_call>".to_owned(),
                true,
            ),
            (
                Tagged,
                "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>"
                    .to_owned(),
                false,
            ),
            (Tagged, "Well, <tool_call>\n".to_owned(), false),
            (
                Json,
                "{\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\"}}".to_owned(),
                true,
            ),
            (Json, "{\"name\": \"rain\", \"parameters\": {}}".to_owned(), false),
            (
                Mistral,
                "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}]".to_owned(),
                true,
            ),
            (
                Mistral,
                "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}]".to_owned(),
                true,
            ),
            (Mistral, "[TOOL_CALLS][]".to_owned(), false),
            (Mistral, "[TOOL_CALLS]rain[ARGS]{}".to_owned(), false),
            (
                DeepSeek,
                deepseek("weather<｜tool▁sep｜>{\"city\": \"Rome\"}"),
                true,
            ),
            (
                DeepSeek,
                deepseek("function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Rome\"}\n```"),
                true,
            ),
            (
                DeepSeek,
                deepseek("function<｜tool▁sep｜>time \"now\"\n```json\n{}\n```"),
                true,
            ),
            (DeepSeek, deepseek("weather<｜tool▁sep｜>{}"), false),
            (
                DeepSeek,
                deepseek("function<｜tool▁sep｜>rain\n```json\n{}\n```"),
                false,
            ),
        ] {
            for (which, tokenizer) in [("text", &plain), ("tokens", &marked)] {
                let mut way = Constraint::new(&format.grammar(&tools, tokenizer), tokenizer).unwrap();
                let ids = tokenizer.encode(&text).unwrap();
                let fits = way.take_all(&ids).unwrap() && way.may_end();
                let inside = text
                    .strip_prefix(format.open())
                    .unwrap_or(&text)
                    .replace(TAG_CLOSE, "");
                let read = format.parse(&inside, 0).is_some_and(|calls| calls.len() == 1);
                if fits != good || (good && !read) {
                    failures.push(format!(
                        "{format:?}, marks as {which}, {text:?}: fits {fits}, read {read}"
                    ));
                }
            }
        }
        // The mark between name and arguments has to be a token for the form to be known.
        let mut way = Constraint::new(&Mistral.grammar(&tools, &marked), &marked).unwrap();
        let named = marked
            .encode("[TOOL_CALLS]weather[ARGS]{\"city\": \"Rome\"}")
            .unwrap();
        if !way.take_all(&named).unwrap() || !way.may_end() {
            failures.push("Mistral by name".to_owned());
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn special_marks_are_the_only_choice() {
        let marked = tokenizer_with(&[DEEPSEEK_OPEN, DEEPSEEK_CALL]);
        let schema = json!({"type": "object"});
        let grammar = ToolFormat::DeepSeek.grammar(&[("f", &schema)], &marked);
        let mut way = Constraint::new(&grammar, &marked).unwrap();
        for mark in [DEEPSEEK_OPEN, DEEPSEEK_CALL] {
            let id = marked.id(mark).unwrap();
            assert!(marked.is_special(id));
            assert_eq!(way.allowed().unwrap().ids().collect::<Vec<_>>(), [id], "{mark}");
            way.take(id).unwrap();
        }
    }
}
