//! What an answer is made of: thinking, text and calls of tools, told apart while it streams.
//!
//! [`ChatTemplate::prompt`](crate::ChatTemplate::prompt) gives an [`AnswerFormat`] with the prompt, to be set as
//! [`GenerateOptions::format`](crate::GenerateOptions::format). Each [`Piece`](crate::Piece) then has `text`, `thinking` and
//! `tool_calls` of its own, and so has the [`Completion`](crate::Completion); without a format everything is `text`.

use crate::tools::{PYTHON_TAG, TAG_CLOSE, ToolCall, ToolFormat};

/// Marks that models think between.
const THINKING: [(&str, &str); 5] = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thinking>", "</thinking>"),
];

/// How the parts of a model's answer are marked. The default marks nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AnswerFormat {
    /// The marks around thinking, for models that think.
    pub thinking: Option<Thinking>,
    /// The form of calls, where tools were given.
    pub tools: Option<ToolFormat>,
}

/// Marks around thinking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thinking {
    /// What it begins with: `<think>`.
    pub open: String,
    /// What it ends with: `</think>`.
    pub close: String,
    /// True when the prompt has opened it already.
    pub opened: bool,
}

impl Thinking {
    /// The marks a template knows, and whether `prompt`, which it wrote, leaves them open. Where the closing mark alone is in the
    /// template (it cuts thinking out of earlier answers), the model may think too.
    pub(crate) fn of(source: &str, prompt: &str) -> Option<Self> {
        let (open, close) = THINKING
            .into_iter()
            .find(|(open, close)| source.contains(open) || source.contains(close))?;
        Some(Thinking {
            open: open.to_owned(),
            close: close.to_owned(),
            opened: prompt.trim_end().ends_with(open),
        })
    }
}

impl AnswerFormat {
    /// Marks that may be special tokens, which otherwise are no text.
    pub(crate) fn marks(&self) -> impl Iterator<Item = &str> {
        let thinking = self
            .thinking
            .iter()
            .flat_map(|t| [t.open.as_str(), t.close.as_str()]);
        thinking.chain(self.tools.iter().flat_map(|tools| tools.marks().iter().copied()))
    }

    /// True when the answer begins inside thinking.
    pub(crate) fn starts_thinking(&self) -> bool {
        self.thinking.as_ref().is_some_and(|thinking| thinking.opened)
    }
}

/// What became certain of an answer.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Parts {
    pub text: String,
    pub thinking: String,
    pub calls: Vec<ToolCall>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Text,
    Thinking,
    /// Inside `<tool_call>`.
    Tagged,
    /// In a call that ends with the answer.
    Rest,
}

/// Takes an answer apart, wherever tokens cut it.
#[derive(Debug)]
pub(crate) struct Splitter {
    format: AnswerFormat,
    state: State,
    /// Text that is not given out yet: it may be the start of a mark, blanks before one, or a call.
    held: String,
    /// True until a part has shown something else than blanks.
    blank: bool,
    /// True until the answer has shown text.
    fresh: bool,
    calls: usize,
}

impl Splitter {
    pub fn new(format: AnswerFormat) -> Self {
        let thinking = format.starts_thinking();
        Splitter {
            state: if thinking { State::Thinking } else { State::Text },
            blank: thinking,
            format,
            held: String::new(),
            fresh: true,
            calls: 0,
        }
    }

    /// True while the answer is inside thinking.
    pub fn is_thinking(&self) -> bool {
        self.state == State::Thinking
    }

    /// Takes new text and gives what became certain with it.
    pub fn push(&mut self, text: &str) -> Parts {
        let mut parts = Parts::default();
        if self.format.thinking.is_none() && self.format.tools.is_none() {
            parts.text.push_str(text);
            return parts;
        }
        self.held.push_str(text);
        while self.advance(&mut parts) {}
        parts
    }

    /// What was held back, when the answer ends.
    pub fn finish(&mut self) -> Parts {
        let mut parts = Parts::default();
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Text => self.give_text(&held, &mut parts),
            State::Thinking => self.give_thinking(held.trim_end(), &mut parts),
            State::Tagged | State::Rest => self.give_calls(&held, &held, &mut parts),
        }
        parts
    }

    /// Goes on to the next mark; false when there is none yet.
    fn advance(&mut self, parts: &mut Parts) -> bool {
        match self.state {
            State::Text => self.advance_text(parts),
            State::Thinking => self.advance_thinking(parts),
            State::Tagged => {
                let Some((inside, after)) = self.held.split_once(TAG_CLOSE) else {
                    return false;
                };
                let (inside, after) = (inside.to_owned(), after.to_owned());
                let whole = format!("{inside}{TAG_CLOSE}");
                self.held = after;
                self.enter(State::Text);
                self.give_calls(&inside, &whole, parts);
                true
            }
            State::Rest => self.release_other_json(parts),
        }
    }

    fn advance_text(&mut self, parts: &mut Parts) -> bool {
        let mut marks: Vec<(String, State)> = Vec::new();
        if let (Some(thinking), true) = (&self.format.thinking, self.fresh) {
            marks.push((thinking.open.clone(), State::Thinking));
        }
        if let Some(tools) = self.format.tools {
            let next = if tools == ToolFormat::Tagged {
                State::Tagged
            } else {
                State::Rest
            };
            marks.push((tools.open().to_owned(), next));
        }
        let first = marks
            .iter()
            .filter_map(|(mark, next)| Some((self.held.find(mark.as_str())?, mark.len(), *next)))
            .min_by_key(|(at, ..)| *at);
        let begins_with_brace = self.fresh && self.held.trim_start().starts_with('{');
        if self.format.tools == Some(ToolFormat::Json) && begins_with_brace {
            self.state = State::Rest;
            return true;
        }
        if let Some((at, length, next)) = first {
            let rest = self.held.split_off(at + length);
            let mut before = std::mem::replace(&mut self.held, rest);
            before.truncate(at);
            // Text before thinking is no text of an answer yet; it stays text when there is some.
            if next == State::Thinking && !before.trim().is_empty() {
                self.give_text(&before, parts);
                let mark = marks.swap_remove(0).0;
                self.give_text(&mark, parts);
                return true;
            }
            self.give_text(before.trim_end(), parts);
            self.enter(next);
            return true;
        }
        let waiting = marks
            .iter()
            .map(|(mark, _)| overlap(&self.held, mark))
            .max()
            .unwrap_or(0);
        let mut certain = self.held.len() - waiting;
        // Blanks before a mark are not shown; before an answer's first text, neither is what may become thinking.
        certain = self.held[..certain].trim_end().len();
        let rest = self.held.split_off(certain);
        let out = std::mem::replace(&mut self.held, rest);
        self.give_text(&out, parts);
        false
    }

    fn advance_thinking(&mut self, parts: &mut Parts) -> bool {
        let close = self
            .format
            .thinking
            .as_ref()
            .map(|t| t.close.clone())
            .unwrap_or_default();
        if let Some(at) = self.held.find(&close) {
            let rest = self.held.split_off(at + close.len());
            let mut inside = std::mem::replace(&mut self.held, rest);
            inside.truncate(at);
            self.give_thinking(inside.trim_end(), parts);
            self.enter(State::Text);
            return true;
        }
        let certain = self.held.len() - overlap(&self.held, &close);
        let certain = self.held[..certain].trim_end().len();
        let rest = self.held.split_off(certain);
        let out = std::mem::replace(&mut self.held, rest);
        self.give_thinking(&out, parts);
        false
    }

    /// Gives an object that cannot become a call back as text.
    fn release_other_json(&mut self, parts: &mut Parts) -> bool {
        const KEYS: [&str; 6] = ["name", "type", "function", "parameters", "arguments", "id"];
        if self.format.tools != Some(ToolFormat::Json) {
            return false;
        }
        let Some(inside) = self.held.trim_start().strip_prefix('{') else {
            return false;
        };
        let inside = inside.trim_start();
        let possible = match inside.strip_prefix('"') {
            None => inside.is_empty(),
            Some(key) => match key.split_once('"') {
                Some((key, _)) => KEYS.contains(&key),
                None => KEYS.iter().any(|known| known.starts_with(key)),
            },
        };
        if !possible {
            let held = std::mem::take(&mut self.held);
            self.state = State::Text;
            self.give_text(&held, parts);
        }
        false
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.blank = true;
    }

    fn give_text(&mut self, text: &str, parts: &mut Parts) {
        let text = self.without_leading_blanks(text);
        self.fresh &= text.trim().is_empty();
        parts.text.push_str(text);
    }

    fn give_thinking(&mut self, text: &str, parts: &mut Parts) {
        parts.thinking.push_str(self.without_leading_blanks(text));
    }

    /// Blanks after a mark are not shown.
    fn without_leading_blanks<'t>(&mut self, text: &'t str) -> &'t str {
        let text = if self.blank { text.trim_start() } else { text };
        self.blank &= text.is_empty();
        text
    }

    /// The calls of `inside`; what is none is given as the text it was.
    fn give_calls(&mut self, inside: &str, whole: &str, parts: &mut Parts) {
        let tools = self.format.tools.unwrap_or(ToolFormat::Json);
        match tools.parse(inside, self.calls) {
            Some(calls) => {
                self.calls += calls.len();
                parts.calls.extend(calls);
            }
            None => {
                let open = match tools {
                    // Without the mark the held text is all there was.
                    ToolFormat::Json if whole.trim_start().starts_with('{') => "",
                    ToolFormat::Json => PYTHON_TAG,
                    ToolFormat::Tagged | ToolFormat::Mistral | ToolFormat::DeepSeek => tools.open(),
                };
                self.blank = false;
                self.give_text(&format!("{open}{whole}"), parts);
            }
        }
    }
}

/// Bytes at the end of `text` that `mark` begins with.
fn overlap(text: &str, mark: &str) -> usize {
    let starts = mark.char_indices().map(|(at, _)| at).skip(1);
    starts
        .filter(|&at| text.ends_with(&mark[..at]))
        .last()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(opened: bool, tools: Option<ToolFormat>) -> AnswerFormat {
        let prompt = if opened { "<think>\n" } else { "" };
        AnswerFormat {
            thinking: Thinking::of("… </think> …", prompt),
            tools,
        }
    }

    /// Text, thinking and names of calls, from pieces of so many bytes.
    fn split(format: &AnswerFormat, text: &str, size: usize) -> (String, String, Vec<String>) {
        let mut splitter = Splitter::new(format.clone());
        let (mut whole, mut piece) = (Parts::default(), String::new());
        let mut add = |parts: Parts| {
            whole.text += &parts.text;
            whole.thinking += &parts.thinking;
            whole.calls.extend(parts.calls);
        };
        for c in text.chars() {
            piece.push(c);
            if piece.len() >= size {
                add(splitter.push(&std::mem::take(&mut piece)));
            }
        }
        add(splitter.push(&piece));
        add(splitter.finish());
        (
            whole.text,
            whole.thinking,
            whole.calls.into_iter().map(|c| c.name).collect(),
        )
    }

    #[test]
    fn parts_are_told_apart_however_the_answer_is_cut() {
        use ToolFormat::{DeepSeek, Json, Mistral, Tagged};
        let call = "{\"name\": \"f\", \"arguments\": {}}";
        let tagged =
            format!("Let me see.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>{call}</tool_call>\n");
        let after = format!("<think>a</think><tool_call>{call}</tool_call> Done.");
        let broken = "<tool_call>\n{\"name\": </tool_call> so";
        let python = format!("<|python_tag|>{call}");
        let mistral = format!("[TOOL_CALLS][{call}]");
        let deepseek = "Soon.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
        let mut failures = Vec::new();
        for (format, text, expected) in [
            (
                format(false, None),
                "Plain <b>text</b> \n",
                ("Plain <b>text</b> \n", "", 0),
            ),
            (
                format(false, None),
                "<think>\nWhy?\n</think>\n\nBecause. ",
                ("Because. ", "Why?", 0),
            ),
            (
                format(true, None),
                "\nWhy? é\n</think>\n\nBecause é",
                ("Because é", "Why? é", 0),
            ),
            (format(true, None), "cut off in <thi", ("", "cut off in <thi", 0)),
            (
                format(false, None),
                "A tag <think> in text",
                ("A tag <think> in text", "", 0),
            ),
            (format(false, None), "a\n\n  b", ("a\n\n  b", "", 0)),
            (
                format(false, None),
                "<think>\n\n</think>\n\nfast",
                ("fast", "", 0),
            ),
            (format(false, None), tagged.as_str(), (tagged.as_str(), "", 0)),
            (
                format(false, Some(Tagged)),
                tagged.as_str(),
                ("Let me see.", "", 2),
            ),
            (format(false, Some(Tagged)), after.as_str(), ("Done.", "a", 1)),
            (format(false, Some(Tagged)), broken, (broken, "", 0)),
            (
                format(false, Some(Tagged)),
                "<tool_call>{\"name\": \"f\"}",
                ("", "", 1),
            ),
            (format(false, Some(Tagged)), "a < b <tool", ("a < b <tool", "", 0)),
            (format(false, Some(Json)), call, ("", "", 1)),
            (format(false, Some(Json)), python.as_str(), ("", "", 1)),
            (format(false, Some(Json)), "{\"age\": 3}", ("{\"age\": 3}", "", 0)),
            (
                format(false, Some(Json)),
                "{\"name\": 3}",
                ("{\"name\": 3}", "", 0),
            ),
            (format(false, Some(Json)), "Use {x}.", ("Use {x}.", "", 0)),
            (format(false, Some(Mistral)), mistral.as_str(), ("", "", 1)),
            (
                format(false, Some(Mistral)),
                "[TOOL_CALLS]oops",
                ("[TOOL_CALLS]oops", "", 0),
            ),
            (format(false, Some(DeepSeek)), deepseek, ("Soon.", "", 1)),
            (
                AnswerFormat::default(),
                "<think>x</think>",
                ("<think>x</think>", "", 0),
            ),
        ] {
            for size in 1..=text.len() {
                let (said, thought, calls) = split(&format, text, size);
                let (expected_said, expected_thought, count) = expected;
                if said != expected_said || thought != expected_thought || calls.len() != count {
                    failures.push(format!("{text:?} by {size}: {said:?}, {thought:?}, {calls:?}"));
                }
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn thinking_and_text_stream_without_waiting_for_the_end() {
        let mut splitter = Splitter::new(format(true, None));
        assert_eq!(splitter.push("\nOne two").thinking, "One two");
        assert!(splitter.is_thinking());
        assert_eq!(splitter.push(" three</th").thinking, " three");
        let parts = splitter.push("ink>\n\nYes");
        assert_eq!((parts.thinking.as_str(), parts.text.as_str()), ("", "Yes"));
        assert_eq!(splitter.push(", so").text, ", so");
    }

    #[test]
    fn marks_are_those_the_template_knows() {
        for (source, prompt, expected) in [
            ("x.split('</think>')", "a<think>\n", Some(("<think>", true))),
            (
                "'<think>\n\n</think>\n\n'",
                "a<think>\n\n</think>\n\n",
                Some(("<think>", false)),
            ),
            ("[THINK]", "a", Some(("[THINK]", false))),
            ("none", "a", None),
        ] {
            let found = Thinking::of(source, prompt);
            assert_eq!(
                found.as_ref().map(|t| (t.open.as_str(), t.opened)),
                expected,
                "{source}"
            );
        }
    }
}
