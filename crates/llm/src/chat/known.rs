//! What a conversation's text is in ids, as the model gave them.

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::session::Session;
use crate::tokenizer::{TextStream, Tokenizer};

/// A text and its ids, with the places where both may be cut: the ends of prompts and of answers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Known {
    text: String,
    ids: Vec<u32>,
    /// Bytes of the text and ids up to each place, ascending.
    marks: Vec<(usize, usize)>,
}

impl Known {
    /// Ids of `text`, those of its known beginning taken as they are.
    pub fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
        let Some((bytes, ids)) = self.shared(text) else {
            return tokenizer.encode(text);
        };
        let new = tokenizer.encode(&text[bytes..])?;
        Ok([&self.ids[..ids], &new].concat())
    }

    /// The last place up to which `text` is known.
    fn shared(&self, text: &str) -> Option<(usize, usize)> {
        let places = self.marks.iter().rev().copied();
        let mut same =
            places.filter(|(bytes, _)| text.as_bytes().starts_with(&self.text.as_bytes()[..*bytes]));
        same.next()
    }

    /// Takes a prompt with its ids and the answer that `session` has after it.
    pub fn answered(
        &mut self,
        session: &Session,
        prompt: String,
        ids: Vec<u32>,
        answer: &str,
    ) -> Result<(), Error> {
        let place = self.shared(&prompt);
        self.marks
            .retain(|mark| place.is_some_and(|place| *mark <= place));
        self.marks.push((prompt.len(), ids.len()));
        let after = session.tokens().get(ids.len()..).unwrap_or_default();
        (self.text, self.ids) = (prompt, ids);
        // Thinking, calls and stop strings are in the ids and not in the text: such an answer is encoded from what the template makes of it.
        if shown(session.tokenizer(), after)? == answer {
            self.text.push_str(answer);
            self.ids.extend(after);
            self.marks.push((self.text.len(), self.ids.len()));
        }
        Ok(())
    }

    /// False for marks outside the text or the ids, which a file may have.
    pub fn is_whole(&self) -> bool {
        self.marks
            .iter()
            .all(|(bytes, ids)| self.text.is_char_boundary(*bytes) && *ids <= self.ids.len())
    }
}

/// The text of `ids` as it was streamed, special tokens left out.
fn shown(tokenizer: &Tokenizer, ids: &[u32]) -> Result<String, Error> {
    let mut stream = TextStream::default();
    let mut text = String::new();
    for &id in ids {
        text.push_str(&stream.push(tokenizer, id)?);
    }
    text.push_str(&stream.flush(tokenizer)?);
    Ok(text)
}
