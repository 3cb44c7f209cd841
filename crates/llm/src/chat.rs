//! Turns of a conversation through a chat template.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use crate::completion::{Completion, Piece};
use crate::options::GenerateOptions;
use crate::session::Session;
use crate::template::{ChatTemplate, Message};
use crate::{Bundle, Error, LoadOptions};

/// A conversation in messages. Each turn computes its new tokens only: the answers stay the ids the model gave, and are
/// not made from their text again.
#[derive(Debug)]
pub struct Chat {
    session: Session,
    template: Arc<ChatTemplate>,
    messages: Vec<Message>,
    /// The conversation so far as ids, and the text they stand for.
    ids: Vec<u32>,
    text: String,
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
            messages: Vec::new(),
            ids: Vec::new(),
            text: String::new(),
        }
    }

    /// Adds a message without an answer, for instance a system message before the first turn.
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Says something and gives every piece of the answer to `on_piece`, which may end it. The answer becomes part of
    /// the conversation, as far as it came.
    ///
    /// # Errors
    /// [`Error::Template`] when the template refuses the messages, otherwise as [`Session::generate_with`]. The
    /// conversation is then as it was before.
    pub fn say(
        &mut self,
        content: &str,
        options: &GenerateOptions,
        on_piece: impl FnMut(&Piece) -> ControlFlow<()>,
    ) -> Result<Completion, Error> {
        self.messages.push(Message::user(content));
        let answer = self.answer(options, on_piece);
        if answer.is_err() {
            self.messages.pop();
        }
        answer
    }

    fn answer(
        &mut self,
        options: &GenerateOptions,
        on_piece: impl FnMut(&Piece) -> ControlFlow<()>,
    ) -> Result<Completion, Error> {
        let text = self.template.render(&self.messages, true)?;
        let prompt = self.encode(&text)?;
        let completion = self.session.generate_with(&prompt, options, on_piece)?;
        self.ids = self.session.tokens().to_vec();
        self.text = text + &completion.text;
        self.messages.push(Message::assistant(completion.text.clone()));
        Ok(completion)
    }

    /// Ids of `text`, those of its known beginning taken as they are.
    fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let tokenizer = self.session.tokenizer();
        match text.strip_prefix(&self.text) {
            Some(new) if !self.text.is_empty() => Ok([self.ids.clone(), tokenizer.encode(new)?].concat()),
            _ => tokenizer.encode(text),
        }
    }

    /// What was said.
    pub fn messages(&self) -> &[Message] {
        &self.messages
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
        let extra = BTreeMap::from([
            (
                "messages".to_string(),
                serde_json::json!(self.messages).to_string(),
            ),
            ("text".to_string(), self.text.clone()),
            ("ids".to_string(), serde_json::json!(self.ids).to_string()),
        ]);
        self.session.save_with(path.as_ref(), model, extra)
    }

    /// Takes up a conversation that [`Chat::save`] wrote.
    ///
    /// # Errors
    /// As [`Session::load`], also for a session without messages.
    pub fn load(&mut self, path: impl AsRef<Path>, model: &str) -> Result<(), Error> {
        let path = path.as_ref();
        let failed = |reason: String| Error::Session {
            file: path.display().to_string(),
            reason,
        };
        let mut extra = self.session.load_with(path, model)?;
        let mut take = |key: &str| {
            extra
                .remove(key)
                .ok_or_else(|| failed(format!("no {key:?}: not a chat")))
        };
        let messages = serde_json::from_str(&take("messages")?).map_err(|e| failed(e.to_string()))?;
        let ids = serde_json::from_str(&take("ids")?).map_err(|e| failed(e.to_string()))?;
        let text = take("text")?;
        (self.messages, self.ids, self.text) = (messages, ids, text);
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
        self.ids.clear();
        self.text.clear();
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
}
