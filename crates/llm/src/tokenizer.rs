//! Text to token ids and back, the way back one token at a time.

use crate::Error;

/// Tokens that may wait for the rest of a character. A character takes four bytes at most, so a longer wait means
/// bytes that are no text, which are then shown as replacement characters.
const LONGEST_WAIT_TOKENS: usize = 16;
const REPLACEMENT: char = '\u{FFFD}';

/// A model's vocabulary and rules, read from `tokenizer.json`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: Vec<u32>,
}

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.json`; `file` is used in errors.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the tokenizers library cannot read it.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self, Error> {
        let malformed = |e: tokenizers::Error| Error::Malformed {
            file: file.to_owned(),
            reason: e.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(malformed)?;
        // Padding and truncation are for batches of training texts; a prompt is neither padded nor cut.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(malformed)?;
        let added = inner.get_added_tokens_decoder();
        let mut special: Vec<u32> = added
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
        special.sort_unstable();
        Ok(Tokenizer { inner, special })
    }

    /// Token ids of `text` as it is: special tokens written in it are recognised, none is added.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the library refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids and token types of `text` with the special tokens the model wants around it, and how many tokens of its end
    /// were left out so that no more than `max_tokens` came.
    pub(crate) fn encode_whole(
        &self,
        text: &str,
        max_tokens: usize,
    ) -> Result<(Vec<u32>, Vec<u32>, usize), Error> {
        let failed = |e: tokenizers::Error| Error::Tokenizer(e.to_string());
        let mut encoding = self.inner.encode_fast(text, false).map_err(failed)?;
        let room = max_tokens.saturating_sub(self.added_tokens());
        let cut = encoding.len().saturating_sub(room);
        encoding.truncate(room, 0, tokenizers::TruncationDirection::Right);
        encoding.take_overflowing();
        let whole = self.inner.post_process(encoding, None, true).map_err(failed)?;
        Ok((whole.get_ids().to_vec(), whole.get_type_ids().to_vec(), cut))
    }

    /// How many special tokens surround a text.
    pub(crate) fn added_tokens(&self) -> usize {
        use tokenizers::PostProcessor;
        self.inner
            .get_post_processor()
            .map_or(0, |p| p.added_tokens(false))
    }

    /// Text of `ids`, special tokens left out unless `with_special`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the library refuses the ids.
    pub fn decode(&self, ids: &[u32], with_special: bool) -> Result<String, Error> {
        self.inner
            .decode(ids, !with_special)
            .map_err(|e| Error::Tokenizer(e.to_string()))
    }

    /// The id of a token by its exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// True for tokens that steer a model and are no text: beginnings, ends, roles.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// Number of tokens, added ones included.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// Turns a stream of ids into a stream of text that never splits a character.
///
/// It keeps only the ids since the last boundary: a piece is what the text of those ids gained, so joined pieces are
/// the text of all ids, spaces between words included. Special tokens give no text.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    /// Ids whose text is out (the first `settled` of them) and ids that wait.
    window: Vec<u32>,
    settled: usize,
    settled_text: String,
}

impl TextStream {
    /// Takes one id and gives the text that became certain, empty while a character is incomplete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, Error> {
        if tokenizer.is_special(id) {
            return self.flush(tokenizer);
        }
        self.window.push(id);
        let text = tokenizer.decode(&self.window, false)?;
        let waiting = self.window.len() - self.settled;
        if text.ends_with(REPLACEMENT) && waiting < LONGEST_WAIT_TOKENS {
            return Ok(String::new());
        }
        self.settle(tokenizer, &text)
    }

    /// Gives what still waits, an incomplete character as a replacement character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn flush(&mut self, tokenizer: &Tokenizer) -> Result<String, Error> {
        if self.window.len() == self.settled {
            return Ok(String::new());
        }
        let text = tokenizer.decode(&self.window, false)?;
        self.settle(tokenizer, &text)
    }

    fn settle(&mut self, tokenizer: &Tokenizer, text: &str) -> Result<String, Error> {
        let shared = common_prefix_bytes(&self.settled_text, text);
        let piece = text[shared..].to_owned();
        self.window.drain(..self.settled);
        self.settled = self.window.len();
        self.settled_text = tokenizer.decode(&self.window, false)?;
        Ok(piece)
    }
}

fn common_prefix_bytes(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(x, y)| x == y);
    same.map(|(c, _)| c.len_utf8()).sum()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One token a byte (ids 0 to 255), ` the` (256), special `<end>` (259) and `<turn>` (260).
    pub(crate) fn bytes_tokenizer() -> Tokenizer {
        Tokenizer::parse("tokenizer.json", bytes_tokenizer_json().as_bytes()).unwrap()
    }

    pub(crate) fn bytes_tokenizer_json() -> String {
        let mut vocab = serde_json::Map::new();
        for byte in 0..=255u8 {
            vocab.insert(byte_symbol(byte).to_string(), byte.into());
        }
        for (id, token) in [(256, "Ġthe"), (257, "Ġt"), (258, "he")] {
            vocab.insert(token.to_owned(), id.into());
        }
        let added = [(259, "<end>"), (260, "<turn>")].map(|(id, content)| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        });
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                "merges": ["Ġ t", "h e", "Ġt he"]}
        })
        .to_string()
    }

    /// The printable character byte-level vocabularies write for a byte.
    fn byte_symbol(byte: u8) -> char {
        let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        if printable(&byte) {
            return char::from(byte);
        }
        let before = (0..byte).filter(|b| !printable(b)).count();
        char::from_u32(256 + u32::try_from(before).unwrap()).unwrap()
    }

    fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = TextStream::default();
        let mut pieces: Vec<_> = ids
            .iter()
            .map(|&id| stream.push(tokenizer, id).unwrap())
            .collect();
        pieces.push(stream.flush(tokenizer).unwrap());
        pieces
    }

    #[test]
    fn characters_split_over_tokens_come_out_whole() {
        let tokenizer = bytes_tokenizer();
        for text in [
            "plain",
            "Grüße",
            "日本語",
            "😀😃 ok",
            "e\u{301}",
            " the the",
            "a\u{FFFD}b",
            "😀😀😀😀😀😀",
        ] {
            let ids = tokenizer.encode(text).unwrap();
            let pieces = stream(&tokenizer, &ids);
            assert_eq!(pieces.concat(), text);
            let split = pieces.iter().any(|p| p.contains(REPLACEMENT)) && !text.contains(REPLACEMENT);
            assert!(!split, "{text}: {pieces:?}");
        }
        assert_eq!(
            stream(&tokenizer, &[0xF0, 0x9F, 0x98, 0x80, 33]),
            ["", "", "", "😀", "!", ""]
        );
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_and_do_not_wait_forever() {
        let tokenizer = bytes_tokenizer();
        let pieces = stream(&tokenizer, &[0xFF; 40]);
        assert!(pieces.iter().filter(|p| !p.is_empty()).count() >= 2, "{pieces:?}");
        assert_eq!(pieces.concat().chars().filter(|&c| c == REPLACEMENT).count(), 40);
        assert_eq!(stream(&tokenizer, &[97, 0xC3]).concat(), "a\u{FFFD}");
    }

    #[test]
    fn special_tokens_are_recognised_in_text_and_give_none() {
        let tokenizer = bytes_tokenizer();
        let ids = tokenizer.encode("a<turn>b<end>").unwrap();
        assert_eq!(ids, [97, 260, 98, 259]);
        assert_eq!(stream(&tokenizer, &ids).concat(), "ab");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<turn>b<end>");
        assert!(tokenizer.is_special(259) && !tokenizer.is_special(97));
        assert_eq!(tokenizer.id("<turn>"), Some(260));
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_refused_by_name() {
        for json in ["", "{}", "[]", "{\"model\": 3}"] {
            let error = Tokenizer::parse("b/tokenizer.json", json.as_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("b/tokenizer.json: "), "{error}");
        }
    }
}
