//! Chat templates: messages to the text a model was trained on, as transformers renders them.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};
use serde::{Deserialize, Serialize};

use crate::Error;

const NAME: &str = "chat_template";
/// Steps a template may take; the longest ones in use need some thousands for a long conversation.
const FUEL: u64 = 50_000_000;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what the template knows besides.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Further keys a template may look at, for instance `tool_calls`.
    #[serde(flatten)]
    pub more: BTreeMap<String, serde_json::Value>,
}

impl Message {
    /// A message of any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message {
            role: role.into(),
            content: content.into(),
            more: BTreeMap::new(),
        }
    }

    /// A message of the person who asks.
    pub fn user(content: impl Into<String>) -> Self {
        Message::new("user", content)
    }

    /// A message of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Message::new("assistant", content)
    }

    /// Instructions for the whole conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Message::new("system", content)
    }
}

/// A compiled chat template.
///
/// ```
/// use candle_coreml_llm::{ChatTemplate, Message};
///
/// let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
///               {% if add_generation_prompt %}<assistant>{% endif %}";
/// let template = ChatTemplate::parse(source, Default::default())?;
/// assert_eq!(template.render(&[Message::user("Hi")], true)?, "<user>Hi<assistant>");
/// # Ok::<(), candle_coreml_llm::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles a template. `variables` are visible in it besides the messages: `bos_token`, `eos_token`.
    ///
    /// # Errors
    /// [`Error::Template`] with the line of a mistake.
    pub fn parse(source: &str, variables: BTreeMap<String, serde_json::Value>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(template_error)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        for (name, value) in variables {
            environment.add_global(name, Value::from(Serde(value)));
        }
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(template_error)?;
        Ok(ChatTemplate { environment })
    }

    /// The text of `messages`; `add_generation_prompt` ends it where the model is to speak.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own words when it refuses the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Error> {
        self.render_with(messages, add_generation_prompt, &BTreeMap::new())
    }

    /// As [`ChatTemplate::render`], with further variables such as `tools` or `enable_thinking`.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &BTreeMap<String, serde_json::Value>,
    ) -> Result<String, Error> {
        #[derive(Serialize)]
        struct Context<'a> {
            messages: &'a [Message],
            add_generation_prompt: bool,
            #[serde(flatten)]
            variables: &'a BTreeMap<String, serde_json::Value>,
        }
        let template = self.environment.get_template(NAME).map_err(template_error)?;
        let context = Value::from(Serde(Context {
            messages,
            add_generation_prompt,
            variables,
        }));
        template.render(context).map_err(template_error)
    }
}

fn template_error(error: minijinja::Error) -> Error {
    let place = error
        .line()
        .map(|line| format!("line {line}: "))
        .unwrap_or_default();
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    Error::Template(format!("{place}{detail}"))
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// The present date in UTC, as Python's `strftime` formats it.
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now)
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, with its `indent`.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let invalid = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut out,
            PythonFormatter,
        )),
        Some(width) => {
            let indent = vec![b' '; width.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
    }
    .map_err(invalid)?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// Python separates with `, ` and `: `.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
        let variables = BTreeMap::from([("bos_token".to_owned(), "<s>".into())]);
        ChatTemplate::parse(source, variables)?.render(messages, true)
    }

    #[test]
    fn templates_render_as_transformers_renders_them() {
        let talk = [Message::system("Be kind."), Message::user(" <Hi> & \"you\" ")];
        for (source, expected) in [
            (
                "{{ bos_token }}{{ messages[1]['content'] }}",
                "<s> <Hi> & \"you\" ",
            ),
            ("{{ messages[1].content.strip() }}", "<Hi> & \"you\""),
            (
                "{%- for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}]\n  {% endif %}\n{% endfor %}",
                "[<Hi> & \"you\"]\n",
            ),
            (
                "{{ messages[1] | tojson }}",
                r#"{"role": "user", "content": " <Hi> & \"you\" "}"#,
            ),
            ("{{ [1, 2] | tojson(indent=2) }}", "[\n  1,\n  2\n]"),
            ("{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}", "us"),
            (
                "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "2",
            ),
            (
                "{{ 'a</think>b'.split('</think>')[-1].lstrip('b') }}|{{ tools is defined }}",
                "|False",
            ),
            (
                "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
                "system",
            ),
            (
                "{{ messages[0].tool_calls }}|{{ strftime_now('%Y') | length }}",
                "|4",
            ),
        ] {
            assert_eq!(render(source, &talk).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn a_template_that_refuses_says_why() {
        for (source, expected) in [
            (
                "\n{{ raise_exception('roles must alternate') }}",
                "chat template: line 2: roles must alternate",
            ),
            ("{% if %}", "line 1"),
            ("{{ missing.field.deeper }}", "line 1"),
            (
                "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
                "fuel",
            ),
        ] {
            let error = render(source, &[]).unwrap_err().to_string();
            assert!(error.contains(expected), "{source}: {error}");
        }
    }

    #[test]
    fn more_variables_reach_the_template() {
        let template =
            ChatTemplate::parse("{{ enable_thinking }}{{ messages[0].name }}", BTreeMap::new()).unwrap();
        let mut message = Message::user("x");
        message.more.insert("name".to_owned(), "Ann".into());
        let variables = BTreeMap::from([("enable_thinking".to_owned(), false.into())]);
        assert_eq!(
            template.render_with(&[message], true, &variables).unwrap(),
            "FalseAnn"
        );
    }
}
