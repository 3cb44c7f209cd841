//! Text to token ids and back, the way back one token at a time.

use std::sync::{Arc, OnceLock};

use crate::Error;
use crate::grammar::Prepared;

/// Tokens that may wait for the rest of a character. A character takes four bytes at most, so a longer wait means
/// bytes that are no text, which are then shown as replacement characters.
const LONGEST_WAIT_TOKENS: usize = 16;
const REPLACEMENT: char = '\u{FFFD}';

/// A model's vocabulary and rules, read from `tokenizer.json`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    special: Vec<u32>,
    /// The decoder joins the bytes of tokens and does nothing else.
    joins_bytes: bool,
    /// The vocabulary for grammars, once one was used.
    prepared: OnceLock<Prepared>,
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
        Ok(Tokenizer {
            special,
            joins_bytes: matches!(
                inner.get_decoder(),
                Some(tokenizers::DecoderWrapper::ByteLevel(_))
            ),
            inner: Arc::new(inner),
            prepared: OnceLock::new(),
        })
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
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the library refuses the text.
    pub fn encode_whole(&self, text: &str, max_tokens: usize) -> Result<(Vec<u32>, Vec<u32>, usize), Error> {
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

    /// The bytes of `id`, where a text is the bytes of its tokens and nothing else; none for an id without a token.
    fn joined_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = || self.inner.id_to_token(id).unwrap_or_default();
        self.joins_bytes.then(|| Spelling::Bytes.bytes(&token()))
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

    /// Tokens that texts of this vocabulary begin with, a `<s>` for many families and none for others: what the file's post-processor
    /// puts before a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the library refuses the text.
    pub fn beginning(&self) -> Result<Vec<u32>, Error> {
        const WORD: &str = "a";
        let encoding = self
            .inner
            .encode_fast(WORD, true)
            .map_err(|e| Error::Tokenizer(e.to_string()))?;
        let bare = self.encode(WORD)?;
        let ids = encoding.get_ids();
        let at = ids.windows(bare.len().max(1)).position(|window| window == bare);
        Ok(ids.get(..at.unwrap_or(0)).unwrap_or_default().to_vec())
    }

    /// The vocabulary for grammars, prepared at its first use.
    pub(crate) fn prepared(&self) -> Result<&Prepared, Error> {
        if let Some(prepared) = self.prepared.get() {
            return Ok(prepared);
        }
        let inner = Arc::clone(&self.inner);
        let encode = move |text: &str| {
            let encoding = inner.encode_fast(text, false).ok();
            encoding.map_or_else(Vec::new, |encoding| encoding.get_ids().to_vec())
        };
        let prepared = Prepared::new(self.words()?, Box::new(encode))?;
        // Of two threads that prepare at once, one's work is dropped.
        Ok(self.prepared.get_or_init(|| prepared))
    }

    /// The bytes of every token id, `None` for special tokens and ids without a token.
    fn words(&self) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let spelling = Spelling::of(self.inner.get_decoder())?;
        let vocabulary = self.inner.get_vocab(true);
        let most = vocabulary.values().max().copied().unwrap_or(0);
        let count = usize::try_from(most).map_or(usize::MAX, |most| most.saturating_add(1));
        if count > vocabulary.len().saturating_mul(2).saturating_add(1 << 16) {
            let reason = format!("token id {most} in a vocabulary of {} tokens", vocabulary.len());
            return Err(Error::Grammar(reason));
        }
        let added = self.inner.get_added_tokens_decoder();
        let mut words = vec![None; count];
        for (token, id) in vocabulary {
            let Some(word) = usize::try_from(id).ok().and_then(|id| words.get_mut(id)) else {
                continue;
            };
            *word = match added.get(&id) {
                Some(token) if token.special => None,
                Some(token) => Some(token.content.clone().into_bytes()),
                None => Some(spelling.bytes(&token)),
            };
        }
        Ok(words)
    }
}

/// How a vocabulary writes bytes and blanks.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Spelling {
    /// Each byte is a printable character: GPT-2 and most since.
    Bytes,
    /// Text with `▁` for blanks and `<0x0A>` for bytes: SentencePiece.
    Pieces,
}

impl Spelling {
    /// Read off the decoder, which undoes it.
    fn of(decoder: Option<&tokenizers::DecoderWrapper>) -> Result<Self, Error> {
        let json = serde_json::to_value(decoder).map_err(|e| Error::Grammar(e.to_string()))?;
        let mut kinds = vec![json["type"].as_str().unwrap_or("none")];
        let parts = json["decoders"].as_array().map(Vec::as_slice).unwrap_or_default();
        kinds.extend(parts.iter().filter_map(|part| part["type"].as_str()));
        if kinds.contains(&"ByteLevel") {
            return Ok(Spelling::Bytes);
        }
        if kinds.contains(&"ByteFallback") || kinds.contains(&"Metaspace") {
            return Ok(Spelling::Pieces);
        }
        let found = kinds.join(", ");
        Err(Error::Grammar(format!(
            "the tokenizer's decoder is {found}; grammars need ByteLevel, ByteFallback or Metaspace"
        )))
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Spelling::Bytes => {
                // A token with another character is no byte-level one and stands for itself.
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of_symbol).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Spelling::Pieces => {
                let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match hex
                    .filter(|hex| hex.len() == 2)
                    .map(|hex| u8::from_str_radix(hex, 16))
                {
                    Some(Ok(byte)) => vec![byte],
                    _ => token.replace('\u{2581}', " ").into_bytes(),
                }
            }
        }
    }
}

/// The byte a printable character of a byte-level vocabulary stands for: printable bytes are themselves, the others come
/// from 256 on in their order.
fn byte_of_symbol(symbol: char) -> Option<u8> {
    let code = u32::from(symbol);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Turns a stream of ids into a stream of text that never splits a character.
///
/// A piece is what the text of all ids gained with the last one, so joined pieces are the text of all ids, spaces between words included.
/// Special tokens give no text. Of byte-level vocabularies only the bytes of an incomplete character are kept, of others the ids since the
/// last boundary.
#[derive(Debug, Clone, Default)]
pub struct TextStream {
    /// Bytes that are no whole character yet.
    bytes: Vec<u8>,
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
        if let Some(bytes) = tokenizer.joined_bytes(id) {
            self.bytes.extend(bytes);
            return Ok(take_characters(&mut self.bytes));
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
        if !self.bytes.is_empty() {
            let bytes = std::mem::take(&mut self.bytes);
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
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

/// Takes the whole characters off `bytes`, replacement characters for what can become none; leaves the start of one.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let wrong = chunk.invalid();
        let at_end = taken + wrong.len() == bytes.len();
        let may_go_on = std::str::from_utf8(wrong).is_err_and(|error| error.error_len().is_none());
        if at_end && may_go_on {
            break;
        }
        if !wrong.is_empty() {
            text.push(REPLACEMENT);
            taken += wrong.len();
        }
    }
    bytes.drain(..taken);
    text
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

    /// The same with more special tokens, from id 261 on.
    pub(crate) fn tokenizer_with(special: &[&str]) -> Tokenizer {
        Tokenizer::parse("tokenizer.json", bytes_json(special).as_bytes()).unwrap()
    }

    pub(crate) fn bytes_tokenizer_json() -> String {
        bytes_json(&[])
    }

    fn bytes_json(more: &[&str]) -> String {
        let mut vocab = serde_json::Map::new();
        for byte in 0..=255u8 {
            vocab.insert(byte_symbol(byte).to_string(), byte.into());
        }
        for (id, token) in [(256, "Ġthe"), (257, "Ġt"), (258, "he")] {
            vocab.insert(token.to_owned(), id.into());
        }
        let special = ["<end>", "<turn>"].iter().chain(more);
        let added: Vec<serde_json::Value> = (259..)
            .zip(special)
            .map(|(id, content)| {
                serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true})
            })
            .collect();
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

    /// The same vocabulary behind a decoder that is asked for every window of ids.
    fn windowed_tokenizer() -> Tokenizer {
        let mut json: serde_json::Value = serde_json::from_str(&bytes_tokenizer_json()).unwrap();
        json["decoder"] = serde_json::json!({"type": "Sequence", "decoders": [json["decoder"]]});
        let tokenizer = Tokenizer::parse("tokenizer.json", json.to_string().as_bytes()).unwrap();
        assert!(!tokenizer.joins_bytes && bytes_tokenizer().joins_bytes);
        tokenizer
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
        for tokenizer in [bytes_tokenizer(), windowed_tokenizer()] {
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
    }

    #[test]
    fn bytes_that_are_no_text_are_shown_and_do_not_wait_forever() {
        for tokenizer in [bytes_tokenizer(), windowed_tokenizer()] {
            let pieces = stream(&tokenizer, &[0xFF; 40]);
            assert!(pieces.iter().filter(|p| !p.is_empty()).count() >= 2, "{pieces:?}");
            assert_eq!(pieces.concat().chars().filter(|&c| c == REPLACEMENT).count(), 40);
            assert_eq!(stream(&tokenizer, &[97, 0xC3]).concat(), "a\u{FFFD}");
        }
    }

    #[test]
    fn pieces_join_to_the_text_of_all_ids_whatever_bytes_come() {
        let tokenizer = bytes_tokenizer();
        let mut state = 7u32;
        for length in 1..200 {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Mostly leading and continuing bytes, which make characters that begin and break off.
                let byte = state >> 24;
                if byte < 0x60 { byte } else { byte | 0x80 }
            };
            let ids: Vec<u32> = (0..length).map(|_| next()).collect();
            let whole = tokenizer.decode(&ids, false).unwrap();
            assert_eq!(stream(&tokenizer, &ids).concat(), whole, "{ids:?}");
        }
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
    fn symbols_of_bytes_are_read_back() {
        for byte in 0..=255u8 {
            assert_eq!(byte_of_symbol(byte_symbol(byte)), Some(byte));
        }
        assert_eq!(byte_of_symbol('日'), None);
        for (spelling, token, expected) in [
            (Spelling::Bytes, "Ġthe", &b" the"[..]),
            (Spelling::Bytes, "日", "日".as_bytes()),
            (Spelling::Pieces, "\u{2581}the", b" the"),
            (Spelling::Pieces, "<0x0A>", b"\n"),
            (Spelling::Pieces, "<0xZZ>", b"<0xZZ>"),
        ] {
            assert_eq!(spelling.bytes(token), expected, "{token}");
        }
    }

    #[test]
    fn a_text_begins_with_what_the_post_processor_puts_there() {
        let mut json: serde_json::Value = serde_json::from_str(&bytes_tokenizer_json()).unwrap();
        assert!(bytes_tokenizer().beginning().unwrap().is_empty());
        json["post_processor"] = serde_json::json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<turn>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<end>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<turn>": {"id": "<turn>", "ids": [260], "tokens": ["<turn>"]},
                "<end>": {"id": "<end>", "ids": [259], "tokens": ["<end>"]}}});
        let tokenizer = Tokenizer::parse("t", json.to_string().as_bytes()).unwrap();
        assert_eq!(tokenizer.beginning().unwrap(), [260]);
        assert_eq!(tokenizer.encode("a").unwrap(), [97]);
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
