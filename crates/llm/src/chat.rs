//! Turns of a conversation through a chat template.

mod known;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use crate::answer::AnswerFormat;
use crate::completion::{Completion, Piece, Step};
use crate::options::{ContextFull, GenerateOptions, Shift};
use crate::session::Session;
use crate::template::{ChatTemplate, Message, Prompt, TemplateOptions};
use crate::{Bundle, Error, LoadOptions};
use known::Known;

/// A conversation in messages. Each turn computes its new tokens only: the answers stay the ids the model gave, and are
/// not made from their text again.
///
/// With [`ContextFull::Shift`] a conversation that has outgrown the model's context goes on without its oldest turns: system messages
/// stay, and so does the last turn. [`Chat::dropped_messages`] says how many the model does not see any more; [`Chat::messages`] keeps all.
/// Where the context fills in the middle of an answer, the oldest turns are dropped there too.
#[derive(Debug)]
pub struct Chat {
    session: Session,
    template: Arc<ChatTemplate>,
    template_options: TemplateOptions,
    messages: Vec<Message>,
    /// Where the messages that the model sees begin; system messages before it are seen all the same.
    first: usize,
    known: Known,
}

impl Chat {
    /// Opens a bundle's packages for a conversation.
    ///
    /// # Errors
    /// As [`Bundle::session`]; [`Error::NoTemplate`] when the bundle has no chat template.
    pub fn open(bundle: &Bundle, options: &LoadOptions) -> Result<Self, Error> {
        let template = Arc::clone(bundle.template()?);
        Ok(Chat::new(bundle.session(options)?, template))
    }

    /// A conversation on a session of one's own.
    pub fn new(session: Session, template: Arc<ChatTemplate>) -> Self {
        Chat {
            session,
            template,
            template_options: TemplateOptions::default(),
            messages: Vec::new(),
            first: 0,
            known: Known::default(),
        }
    }

    /// Tools, thinking and variables for the template, from the next turn on.
    pub fn set_template_options(&mut self, options: TemplateOptions) {
        self.template_options = options;
    }

    /// Adds a message without an answer, for instance a system message before the first turn.
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Says something and gives every piece of the answer to `on_piece`, which may end it. The answer becomes part of
    /// the conversation, as far as it came.
    ///
    /// # Errors
    /// As [`Chat::answer`]. The conversation is then as it was before.
    pub fn say(
        &mut self,
        content: &str,
        options: &GenerateOptions,
        mut on_piece: impl FnMut(&Piece) -> ControlFlow<()>,
    ) -> Result<Completion, Error> {
        self.messages.push(Message::user(content));
        let answer = self.answer(options, |step| match step {
            Step::Token(piece) => on_piece(piece),
            _ => ControlFlow::Continue(()),
        });
        if answer.is_err() {
            self.messages.pop();
        }
        answer
    }

    /// Answers the messages as they are, for instance after what a tool gave, and gives every step to `on_step`, which may end it.
    /// [`GenerateOptions::format`] is the template's own unless another one is set, and so is what [`ContextFull::Shift`] keeps.
    ///
    /// # Errors
    /// [`Error::Template`] when the template refuses the messages, [`Error::PromptTooLong`] when they do not fit the context (with
    /// [`ContextFull::Shift`]: when the last turn alone does not), otherwise as [`Session::generate_with`].
    pub fn answer(
        &mut self,
        options: &GenerateOptions,
        on_step: impl FnMut(&Step) -> ControlFlow<()>,
    ) -> Result<Completion, Error> {
        let first = self.first;
        let answer = self.try_answer(options, on_step);
        if answer.is_err() {
            self.first = first;
        }
        answer
    }

    fn try_answer(
        &mut self,
        options: &GenerateOptions,
        on_step: impl FnMut(&Step) -> ControlFlow<()>,
    ) -> Result<Completion, Error> {
        let (prompt, ids, dropped) = self.fit(options)?;
        let mut options = options.clone();
        if options.format == AnswerFormat::default() {
            options.format = prompt.format.clone();
        }
        if options.context_full == ContextFull::Shift(Shift::default())
            && ids.len().saturating_add(options.max_tokens) > self.session.context_tokens()
        {
            options.context_full = ContextFull::Shift(self.turns(&ids)?);
        }
        let mut completion = self.session.generate_in_steps(&ids, &options, on_step)?;
        if completion.dropped_tokens == 0 {
            self.known
                .answered(&self.session, prompt.text, ids, &completion.text)?;
        } else {
            self.known = Known::default();
        }
        completion.dropped_tokens += dropped;
        let message = Message::answer(
            completion.text.clone(),
            &completion.thinking,
            &completion.tool_calls,
        );
        self.messages.push(message);
        Ok(completion)
    }

    /// The prompt with its ids, without the oldest turns where those do not fit and may be dropped, and how many tokens those had.
    fn fit(&mut self, options: &GenerateOptions) -> Result<(Prompt, Vec<u32>, usize), Error> {
        let context = self.session.context_tokens();
        let mut prompt = self.template.prompt(&self.seen(), &self.template_options)?;
        let mut ids = self.known.encode(self.session.tokenizer(), &prompt.text)?;
        let whole = ids.len();
        let room = options.max_tokens.min(context / 8);
        if options.context_full == ContextFull::Stop || whole + room <= context {
            return Ok((prompt, ids, 0));
        }
        // Half a context is free then: the next turns need not drop anything again.
        while ids.len() > context / 2
            && let Some(next) = self.next_turn()
        {
            self.first = next;
            prompt = self.template.prompt(&self.seen(), &self.template_options)?;
            ids = self.known.encode(self.session.tokenizer(), &prompt.text)?;
        }
        // A turn that does not fit is not cut: half of a question is another question.
        if ids.len() > context {
            let tokens = ids.len();
            return Err(Error::PromptTooLong { tokens, context });
        }
        let dropped = whole.saturating_sub(ids.len());
        Ok((prompt, ids, dropped))
    }

    /// The messages the model sees.
    fn seen(&self) -> Vec<Message> {
        let places = self.messages.iter().enumerate();
        places
            .filter(|(at, message)| *at >= self.first || message.role == "system")
            .map(|(_, message)| message.clone())
            .collect()
    }

    /// Where the second turn that the model sees begins.
    fn next_turn(&self) -> Option<usize> {
        let seen = self.messages.iter().enumerate().skip(self.first);
        let mut turns = seen.filter(|(_, message)| message.role == "user");
        turns.nth(1).map(|(at, _)| at)
    }

    /// What a shift in the middle of an answer keeps, and where turns begin in `prompt`: as far as the template writes the messages before
    /// a turn as the prompt has them.
    fn turns(&self, prompt: &[u32]) -> Result<Shift, Error> {
        let tokenizer = self.session.tokenizer();
        let place = |messages: &[Message]| -> Option<usize> {
            let text = self
                .template
                .render_options(messages, false, &self.template_options)
                .ok()?;
            let ids = self.known.encode(tokenizer, &text).ok()?;
            prompt.starts_with(&ids).then_some(ids.len())
        };
        let seen = self.seen();
        let system = seen.iter().take_while(|message| message.role == "system").count();
        let keep = match system {
            0 => None,
            _ => place(&seen[..system]),
        };
        let turns = (system + 1..seen.len()).filter(|at| seen[*at].role == "user");
        Ok(Shift {
            keep: keep.map_or_else(|| tokenizer.beginning().map(|ids| ids.len()), Ok)?,
            cuts: turns.filter_map(|at| place(&seen[..at])).collect(),
        })
    }

    /// Takes the last answer back and gives another one; `None` where nothing was said yet. With the same options, seed included, it is the same
    /// again.
    ///
    /// # Errors
    /// As [`Chat::answer`]. The conversation is then as it was before.
    pub fn retry(
        &mut self,
        options: &GenerateOptions,
        on_step: impl FnMut(&Step) -> ControlFlow<()>,
    ) -> Result<Option<Completion>, Error> {
        let Some(at) = self.last_said() else {
            return Ok(None);
        };
        let taken_back = self.messages.split_off(at + 1);
        let answer = self.answer(options, on_step);
        if answer.is_err() {
            self.messages.extend(taken_back);
        }
        answer.map(Some)
    }

    /// Takes back what was said last, with its answer, and gives it; `None` where nothing was said yet.
    pub fn undo(&mut self) -> Option<String> {
        let at = self.last_said()?;
        let said = self.messages.drain(at..).next()?;
        if self.first >= self.messages.len() {
            // What was dropped for the sake of this turn is seen again, as far as it fits.
            self.first = 0;
        }
        Some(said.content)
    }

    fn last_said(&self) -> Option<usize> {
        self.messages.iter().rposition(|message| message.role == "user")
    }

    /// What was said.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// How many of the messages the model does not see any more, because its context is full.
    pub fn dropped_messages(&self) -> usize {
        self.messages.len() - self.seen().len()
    }

    /// The tokens behind it.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Writes the conversation, what was computed of it and its messages to `path`, as [`Session::save`] does.
    ///
    /// # Errors
    /// As [`Session::save`].
    pub fn save(&self, path: impl AsRef<Path>, model: &str) -> Result<(), Error> {
        let as_text = |value: serde_json::Value| value.to_string();
        let extra = BTreeMap::from([
            ("messages".to_string(), as_text(serde_json::json!(self.messages))),
            ("first".to_string(), as_text(serde_json::json!(self.first))),
            ("known".to_string(), as_text(serde_json::json!(self.known))),
        ]);
        self.session.save_with(path.as_ref(), model, extra)
    }

    /// Takes up a conversation that [`Chat::save`] wrote.
    ///
    /// # Errors
    /// As [`Session::load`], also for a session without messages; this conversation is then empty.
    pub fn load(&mut self, path: impl AsRef<Path>, model: &str) -> Result<(), Error> {
        let path = path.as_ref();
        let failed = |reason: String| Error::Session {
            file: path.display().to_string(),
            reason,
        };
        let mut extra = self.session.load_with(path, model)?;
        // What is in memory from here on is the file's: nothing of the old conversation fits it.
        self.messages.clear();
        self.known = Known::default();
        self.first = 0;
        let mut take = |key: &str| {
            extra
                .remove(key)
                .ok_or_else(|| failed(format!("no {key:?}: not a chat")))
        };
        let (messages, first, known) = (take("messages")?, take("first")?, take("known")?);
        let messages: Vec<Message> = serde_json::from_str(&messages).map_err(|e| failed(e.to_string()))?;
        let first: usize = serde_json::from_str(&first).map_err(|e| failed(e.to_string()))?;
        let known: Known = serde_json::from_str(&known).map_err(|e| failed(e.to_string()))?;
        if !known.is_whole() {
            return Err(failed("\"known\" has marks outside its text".to_string()));
        }
        self.first = first.min(messages.len());
        (self.messages, self.known) = (messages, known);
        Ok(())
    }

    /// Forgets everything and starts with a system message, or with none where `content` is empty.
    pub fn restart_with_system(&mut self, content: &str) {
        self.messages.clear();
        self.reset();
        if !content.is_empty() {
            self.push(Message::system(content));
        }
    }

    /// Forgets what was said, but for system messages.
    pub fn reset(&mut self) {
        self.messages.retain(|message| message.role == "system");
        self.first = 0;
        self.known = Known::default();
        self.session.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anemll::toy::Toy;
    use crate::completion::FinishReason;
    use crate::tokenizer::tests::bytes_tokenizer;

    const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<turn>{% endfor %}\
                            {% if add_generation_prompt %}a:{% endif %}";

    fn chat(toy: &Toy) -> Chat {
        let (model, _) = toy.model();
        let session = Session::new(Box::new(model), Arc::new(bytes_tokenizer()), vec![260].into());
        Chat::new(
            session,
            Arc::new(ChatTemplate::parse(TEMPLATE, Default::default()).unwrap()),
        )
    }

    #[test]
    fn a_second_turn_computes_its_new_tokens_only() {
        let mut chat = chat(&Toy::default());
        let options = GenerateOptions {
            max_tokens: 5,
            ..GenerateOptions::default()
        };
        let first = chat.say("hi", &options, |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(
            (first.prompt_tokens, first.reused_tokens),
            ("u:hi".len() + 1 + "a:".len(), 0)
        );
        let second = chat.say("and", &options, |_| ControlFlow::Continue(())).unwrap();
        // The last of the five tokens was generated and not computed yet.
        assert_eq!(second.reused_tokens, first.prompt_tokens + 4);
        let new = 1 + "u:and".len() + 1 + "a:".len();
        assert_eq!(second.prompt_tokens, first.prompt_tokens + 5 + new);
        assert_eq!(chat.messages().len(), 4);
    }

    #[test]
    fn an_answer_cut_short_or_refused_leaves_the_conversation_whole() {
        let mut chat = chat(&Toy {
            slots: 64,
            ..Toy::default()
        });
        chat.push(Message::system("s"));
        let options = GenerateOptions::default();
        let cut = chat.say("one", &options, |_| ControlFlow::Break(())).unwrap();
        assert_eq!(
            (cut.finish_reason, cut.tokens.len()),
            (FinishReason::Cancelled, 1)
        );
        let before = chat.messages().to_vec();
        let error = chat
            .say(&"long ".repeat(20), &options, |_| ControlFlow::Continue(()))
            .unwrap_err();
        assert!(
            matches!(error, Error::PromptTooLong { context: 64, .. }),
            "{error}"
        );
        assert_eq!(chat.messages(), before);
        chat.reset();
        assert_eq!(chat.messages(), [Message::system("s")]);
        assert_eq!(chat.session().cached_tokens(), 0);
        chat.restart_with_system("t");
        assert_eq!(chat.messages(), [Message::system("t")]);
    }

    fn small() -> Chat {
        chat(&Toy {
            slots: 64,
            ..Toy::default()
        })
    }

    fn shifting(max_tokens: usize) -> GenerateOptions {
        GenerateOptions {
            max_tokens,
            ignore_end: true,
            context_full: ContextFull::Shift(Shift::default()),
            ..GenerateOptions::default()
        }
    }

    const GO_ON: fn(&Piece) -> ControlFlow<()> = |_| ControlFlow::Continue(());

    #[test]
    fn a_conversation_that_outgrows_the_context_goes_on_without_its_oldest_turns() {
        let mut chat = small();
        chat.push(Message::system("s"));
        let mut dropped = Vec::new();
        for turn in 0..8 {
            let done = chat.say(&format!("turn {turn}"), &shifting(4), GO_ON).unwrap();
            assert!(chat.session().tokens().len() <= 64);
            dropped.push(done.dropped_tokens);
        }
        assert_eq!(chat.messages().len(), 17);
        assert!(dropped.iter().any(|tokens| *tokens > 0), "{dropped:?}");
        assert!(chat.dropped_messages() > 0 && chat.dropped_messages().is_multiple_of(2));
        let shown = chat.session().tokenizer().decode(chat.session().tokens(), true);
        let shown = shown.unwrap();
        let first = chat.messages()[1 + chat.dropped_messages()].content.clone();
        assert!(
            shown.starts_with(&format!("s:s<turn>u:{first}<turn>a:")),
            "{shown}"
        );
        chat.reset();
        assert_eq!(chat.dropped_messages(), 0);
    }

    #[test]
    fn a_turn_that_does_not_fit_by_itself_is_refused_and_not_cut() {
        let mut chat = small();
        chat.say("one", &shifting(4), GO_ON).unwrap();
        let before = chat.messages().to_vec();
        let error = chat.say(&"long ".repeat(20), &shifting(4), GO_ON).unwrap_err();
        assert!(
            matches!(error, Error::PromptTooLong { context: 64, .. }),
            "{error}"
        );
        assert_eq!((chat.messages(), chat.dropped_messages()), (&before[..], 0));
        chat.say("two", &shifting(4), GO_ON).unwrap();
    }

    #[test]
    fn a_context_that_fills_in_mid_answer_keeps_the_system_turn_and_cuts_at_turns() {
        let mut chat = small();
        chat.push(Message::system("s"));
        chat.say("one", &shifting(4), GO_ON).unwrap();
        let mut shifts = 0;
        chat.push(Message::user("two"));
        let done = chat
            .answer(&shifting(150), |step| {
                shifts += usize::from(matches!(step, Step::Shifted { .. }));
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(done.tokens.len(), 150);
        assert!(shifts > 1 && done.dropped_tokens > 64, "{shifts}");
        let shown = chat
            .session()
            .tokenizer()
            .decode(&chat.session().tokens()[..4], true);
        assert_eq!(shown.unwrap(), "s:s<turn>");
        let after = chat.say("three", &shifting(4), GO_ON).unwrap();
        assert_eq!(after.tokens.len(), 4);
    }

    #[test]
    fn an_answer_can_be_given_again_and_taken_back() {
        let mut chat = chat(&Toy::default());
        let options = GenerateOptions {
            max_tokens: 5,
            ignore_end: true,
            ..GenerateOptions::default()
        };
        let each = |_: &Step| ControlFlow::Continue(());
        assert!(chat.retry(&options, each).unwrap().is_none() && chat.undo().is_none());
        chat.say("hi", &options, GO_ON).unwrap();
        let second = chat.say("and", &options, GO_ON).unwrap();
        let again = chat.retry(&options, each).unwrap().unwrap();
        assert_eq!(
            (&again.tokens, again.reused_tokens),
            (&second.tokens, second.prompt_tokens - 1)
        );
        assert_eq!(chat.messages().len(), 4);
        assert_eq!(chat.undo().as_deref(), Some("and"));
        let third = chat.say("and", &options, GO_ON).unwrap();
        assert_eq!(
            (third.tokens, third.reused_tokens),
            (second.tokens, second.prompt_tokens - 1)
        );
    }

    #[test]
    fn a_saved_chat_goes_on_with_its_messages() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("talk");
        let mut first = chat(&Toy::default());
        let options = GenerateOptions {
            max_tokens: 5,
            ..GenerateOptions::default()
        };
        first.push(Message::system("s"));
        first.say("hi", &options, GO_ON).unwrap();
        first.save(&path, "m").unwrap();
        let expected = first.say("and", &options, GO_ON).unwrap();
        let mut second = chat(&Toy::default());
        second.load(&path, "m").unwrap();
        assert_eq!(second.messages().len(), 3);
        let found = second.say("and", &options, GO_ON).unwrap();
        assert_eq!(
            (found.tokens, found.reused_tokens),
            (expected.tokens, expected.reused_tokens)
        );
        second.session().save(&path, "m").unwrap();
        let words = second.load(&path, "m").unwrap_err().to_string();
        assert!(words.contains("not a chat"), "{words}");
    }
}
