//! Chat templates: messages to the text a model was trained on, as transformers renders them.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::Error;
use crate::answer::{AnswerFormat, Thinking};
use crate::tools::{ToolCall, ToolFormat};

const NAME: &str = "chat_template";
/// Steps a template may take; the longest ones in use need some thousands for a long conversation.
const FUEL: u64 = 50_000_000;

/// One message of a conversation. It is read from JSON as OpenAI's interface has it: `content` may be missing or null, which is the
/// empty text, or a list of text parts, which are joined.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what the template knows besides.
    pub role: String,
    /// What is said.
    #[serde(default, deserialize_with = "text_of_content")]
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

    /// What a tool gave to a call.
    pub fn tool(call: &ToolCall, content: impl Into<String>) -> Self {
        Message::new("tool", content)
            .with("name", call.name.as_str())
            .with("tool_call_id", call.id.as_str())
    }

    /// An answer of the model with its parts: thinking as `reasoning_content`, calls as `tool_calls`, where there are any.
    pub fn answer(text: impl Into<String>, thinking: &str, calls: &[ToolCall]) -> Self {
        let mut message = Message::assistant(text);
        if !thinking.is_empty() {
            message = message.with("reasoning_content", thinking);
        }
        if !calls.is_empty() {
            let calls: Vec<_> = calls.iter().map(ToolCall::to_json).collect();
            message = message.with("tool_calls", calls);
        }
        message
    }

    /// The message with a further key.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<serde_json::Value>) -> Self {
        self.more.insert(key.into(), value.into());
        self
    }

    /// The message with the arguments of its calls as objects, which templates expect and OpenAI's interface writes as strings.
    fn with_arguments_as_objects(&self) -> Self {
        let mut message = self.clone();
        let calls = message
            .more
            .get_mut("tool_calls")
            .and_then(|calls| calls.as_array_mut());
        for call in calls.into_iter().flatten() {
            let Some(arguments) = call.pointer_mut("/function/arguments") else {
                continue;
            };
            let parsed = arguments
                .as_str()
                .and_then(|text| serde_json::from_str(text).ok());
            if let Some(object @ serde_json::Value::Object(_)) = parsed {
                *arguments = object;
            }
        }
        message
    }
}

fn text_of_content<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Content {
        Text(String),
        Parts(Vec<BTreeMap<String, serde_json::Value>>),
    }
    let content = match Option::<Content>::deserialize(deserializer)? {
        None => return Ok(String::new()),
        Some(Content::Text(text)) => return Ok(text),
        Some(Content::Parts(parts)) => parts,
    };
    let mut text = String::new();
    for part in &content {
        let kind = part.get("type").and_then(|kind| kind.as_str());
        let words = part.get("text").and_then(|text| text.as_str());
        match (kind, words) {
            (Some("text" | "input_text") | None, Some(words)) => text.push_str(words),
            (kind, _) => {
                let kind = kind.unwrap_or("none");
                return Err(D::Error::custom(format!(
                    "a content part of type {kind:?}; allowed: \"text\""
                )));
            }
        }
    }
    Ok(text)
}

/// What a template is given besides the messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TemplateOptions {
    /// Tools the model may call, as JSON of OpenAI's form: `{"type": "function", "function": {…}}`.
    pub tools: Vec<serde_json::Value>,
    /// Whether the model is to think first, for templates with such a switch (`enable_thinking`, `thinking`); `None` leaves it to the
    /// template.
    pub enable_thinking: Option<bool>,
    /// Further variables, by the names the template has for them.
    pub variables: BTreeMap<String, serde_json::Value>,
}

/// A prompt, and what the answer to it will look like.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// The text to encode, special tokens included.
    pub text: String,
    /// To be set as [`GenerateOptions::format`](crate::GenerateOptions::format).
    pub format: AnswerFormat,
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
    source: String,
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
        Ok(ChatTemplate {
            environment,
            source: source.to_owned(),
        })
    }

    /// The prompt for an answer to `messages`, and how the parts of that answer are marked.
    ///
    /// ```
    /// use candle_coreml_llm::{ChatTemplate, Message, TemplateOptions};
    ///
    /// let source = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}\
    ///               {% if add_generation_prompt %}<assistant><think>{% endif %}";
    /// let template = ChatTemplate::parse(source, Default::default())?;
    /// let prompt = template.prompt(&[Message::user("Why?")], &TemplateOptions::default())?;
    /// assert!(prompt.format.thinking.is_some_and(|marks| marks.opened && marks.close == "</think>"));
    /// # Ok::<(), candle_coreml_llm::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`Error::Template`] too for tools or a switch of thinking that the template has no place for.
    pub fn prompt(&self, messages: &[Message], options: &TemplateOptions) -> Result<Prompt, Error> {
        let text = self.render_options(messages, true, options)?;
        let format = AnswerFormat {
            thinking: Thinking::of(&self.source, &text),
            tools: (!options.tools.is_empty()).then(|| ToolFormat::of_template(&self.source)),
        };
        Ok(Prompt { text, format })
    }

    /// As [`ChatTemplate::prompt`], without a place for the answer where `add_generation_prompt` is false.
    pub(crate) fn render_options(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        options: &TemplateOptions,
    ) -> Result<String, Error> {
        let mut variables = options.variables.clone();
        if !options.tools.is_empty() {
            if !self.knows("tools") {
                return Err(Error::Template("it has no place for tools".to_owned()));
            }
            variables.insert("tools".to_owned(), options.tools.clone().into());
        }
        if let Some(think) = options.enable_thinking {
            let switch = ["enable_thinking", "thinking"]
                .into_iter()
                .find(|name| self.knows(name));
            let switch = switch.ok_or_else(|| Error::Template("it has no switch for thinking".to_owned()))?;
            variables.insert(switch.to_owned(), think.into());
        }
        let messages: Vec<Message> = messages.iter().map(Message::with_arguments_as_objects).collect();
        self.render_with(&messages, add_generation_prompt, &variables)
    }

    /// True when the template looks at a variable of this name: `tools`, `enable_thinking`.
    pub fn knows(&self, variable: &str) -> bool {
        let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
        self.source.match_indices(variable).any(|(at, _)| {
            let before = self.source[..at].chars().next_back();
            let after = self.source[at + variable.len()..].chars().next();
            let attribute = before == Some('.') || before == Some('<') || before == Some('/');
            !attribute && !before.is_some_and(part_of_name) && !after.is_some_and(part_of_name)
        })
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
    fn messages_are_read_as_open_ai_writes_them() {
        for (json, expected) in [
            (r#"{"role": "user", "content": "a"}"#, Ok("a")),
            (
                r#"{"role": "assistant", "content": null, "tool_calls": []}"#,
                Ok(""),
            ),
            (r#"{"role": "assistant"}"#, Ok("")),
            (
                r#"{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}"#,
                Ok("ab"),
            ),
            (
                r#"{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}"#,
                Err("a content part of type \"image_url\"; allowed: \"text\""),
            ),
        ] {
            let found: Result<Message, _> = serde_json::from_str(json);
            match expected {
                Ok(content) => assert_eq!(found.unwrap().content, content, "{json}"),
                Err(words) => assert!(found.unwrap_err().to_string().contains(words), "{json}"),
            }
        }
    }

    #[test]
    fn tools_and_switches_reach_templates_that_have_a_place_for_them() {
        let tool = serde_json::json!({"type": "function", "function": {"name": "f"}});
        let tools = TemplateOptions {
            tools: vec![tool],
            ..TemplateOptions::default()
        };
        let think = TemplateOptions {
            enable_thinking: Some(false),
            ..TemplateOptions::default()
        };
        let parse = |source: &str| ChatTemplate::parse(source, BTreeMap::new()).unwrap();
        let with_tools = parse("{% for t in tools %}{{ t.function.name }}{% endfor %}<tool_call>");
        let prompt = with_tools.prompt(&[], &tools).unwrap();
        assert_eq!(
            (prompt.text.as_str(), prompt.format.tools),
            ("f<tool_call>", Some(ToolFormat::Tagged))
        );
        let deepseek = parse("{% for t in tools %}{{ t }}{% endfor %}<｜tool▁call▁begin｜>");
        assert_eq!(
            deepseek.prompt(&[], &tools).unwrap().format.tools,
            Some(ToolFormat::DeepSeek)
        );
        assert_eq!(
            with_tools
                .prompt(&[], &TemplateOptions::default())
                .unwrap()
                .format
                .tools,
            None
        );
        assert_eq!(
            parse("{{ enable_thinking }}").prompt(&[], &think).unwrap().text,
            "False"
        );
        assert_eq!(parse("{{ thinking }}").prompt(&[], &think).unwrap().text, "False");
        for (source, options, expected) in [
            ("{{ m.tools }} <tools> my_tools", &tools, "no place for tools"),
            ("</thinking>", &think, "no switch for thinking"),
        ] {
            let error = parse(source).prompt(&[], options).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn arguments_written_as_strings_reach_the_template_as_objects() {
        let template = ChatTemplate::parse(
            "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{{ c.function.arguments.x }}{% endfor %}\
             {{ m.tool_call_id }}{% endfor %}",
            BTreeMap::new(),
        )
        .unwrap();
        let call = serde_json::json!([{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 3}"}}]);
        let asked = Message::assistant("").with("tool_calls", call);
        let read = ToolFormat::Tagged
            .parse("{\"name\": \"f\", \"arguments\": {\"x\": 4}}", 0)
            .unwrap();
        let own = Message::answer("", "", &read);
        let given = Message::tool(&read[0], "ok");
        let text = template
            .prompt(&[asked, own, given], &TemplateOptions::default())
            .unwrap()
            .text;
        assert_eq!(text, format!("{{\"x\": 3}}3{{\"x\": 4}}4{}", read[0].id));
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

    #[derive(Deserialize)]
    struct Golden {
        templates: BTreeMap<String, String>,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        template: String,
        messages: Vec<Message>,
        variables: BTreeMap<String, serde_json::Value>,
        add_generation_prompt: bool,
        text: Option<String>,
        error: Option<String>,
    }

    /// `testdata/templates.py` made the renders.
    #[test]
    fn templates_of_every_family_render_as_jinja2_renders_them() {
        let golden: Golden = serde_json::from_str(include_str!("../testdata/templates/golden.json")).unwrap();
        let mut failures = Vec::new();
        for (index, case) in golden.cases.iter().enumerate() {
            let special = BTreeMap::from([("bos_token".to_string(), serde_json::Value::from("<s>"))]);
            let template = ChatTemplate::parse(&golden.templates[&case.template], special).unwrap();
            let found = template.render_with(&case.messages, case.add_generation_prompt, &case.variables);
            let right = match (&found, &case.text, &case.error) {
                (Ok(found), Some(text), _) => found == text,
                (Err(error), None, Some(words)) => error.to_string().contains(words),
                _ => false,
            };
            if !right {
                failures.push(format!(
                    "case {index} ({}): {found:?}\nexpected {:?} {:?}",
                    case.template, case.text, case.error
                ));
            }
        }
        let few: Vec<_> = failures.iter().take(4).cloned().collect();
        assert!(
            failures.is_empty() && golden.cases.len() > 200,
            "{} of {}:\n{}",
            failures.len(),
            golden.cases.len(),
            few.join("\n")
        );
    }
}
