//! Constrained output: what a text must be, and which tokens may come next for it to become that.
//!
//! Set [`GenerateOptions::grammar`](crate::GenerateOptions::grammar): before every token is chosen, greedily or by chance, those
//! that cannot lead to a text of the grammar are out of the choice. The model's end tokens are in it only where the grammar may end, and a
//! text that can only end ends without one. Where the grammar leaves no choice, no token is computed to be chosen: what is certain is
//! computed in batches, as a prompt is. [`Completion::fits_grammar`](crate::Completion::fits_grammar) says whether the text
//! was whole when something else (the number of tokens, a stop string) ended it.
//!
//! The vocabulary is prepared once for each [`Tokenizer`], when its first grammar is used. The work is done by
//! [llguidance](https://github.com/guidance-ai/llguidance).

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{InferenceCapabilities, SimpleVob, TokRxInfo, TokTrie, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::Error;
use crate::tokenizer::Tokenizer;

/// Longest token a grammar can use, in bytes; longer ones (rows of spaces, mostly) are left out of the choice.
const LONGEST_TOKEN_BYTES: usize = 240;
/// Most token ids a vocabulary may have for grammars; the largest in use have 262,144.
const MOST_TOKENS: usize = 1 << 22;
/// Between the parts of JSON there is a blank after a comma or a colon at most: readable, and no model gets lost in blanks.
const JSON_COMMA: &str = r",\x20?";
const JSON_COLON: &str = r":\x20?";

/// What a text must be, from its first token to its last.
///
/// ```
/// use candle_coreml_llm::Grammar;
///
/// let mouse = Grammar::JsonSchema(serde_json::json!({
///     "type": "object",
///     "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
///     "required": ["name", "age"]
/// }));
/// let yes_or_no = Grammar::Regex("yes|no".to_string());
/// # let _ = (mouse, yes_or_no);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema accepts. Draft 2020-12 as far as llguidance has it; a keyword it lacks is an error.
    JsonSchema(Value),
    /// The whole text matches a regular expression, in the syntax of the `regex` crate without assertions.
    Regex(String),
    /// A context-free grammar in [llguidance's form of Lark](https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
    Lark(String),
}

impl Grammar {
    fn compile(&self) -> Result<TopLevelGrammar, Error> {
        let schema = match self {
            Grammar::Regex(pattern) => return Ok(TopLevelGrammar::from_regex(pattern)),
            Grammar::Lark(text) => return Ok(TopLevelGrammar::from_lark(text.clone())),
            Grammar::JsonObject => json!({"type": "object"}),
            Grammar::JsonSchema(schema) => schema.clone(),
        };
        let mut schema = match schema {
            Value::Object(schema) => schema,
            Value::Bool(true) => serde_json::Map::new(),
            other => {
                return Err(Error::Grammar(format!(
                    "a JSON schema is an object or `true`, this one is {other}"
                )));
            }
        };
        let blanks = json!({"whitespace_pattern": null, "whitespace_flexible": false,
            "item_separator": JSON_COMMA, "key_separator": JSON_COLON, "coerce_one_of": true, "lenient": false});
        schema.insert("x-guidance".to_string(), defaults_with(&blanks));
        Ok(TopLevelGrammar::from_json_schema(Value::Object(schema)))
    }
}

/// The crate's own options with those of `changes`.
fn defaults_with(changes: &Value) -> Value {
    let mut options = serde_json::to_value(llguidance::JsonCompileOptions::default()).unwrap_or_default();
    for (key, value) in changes.as_object().into_iter().flatten() {
        options[key.as_str()] = value.clone();
    }
    options
}

/// Token ids of a text, as the model's own tokenizer cuts it.
pub(crate) type Encode = Box<dyn Fn(&str) -> Vec<u32> + Send + Sync>;

/// A tokenizer's vocabulary as grammars need it: shared by all texts.
pub(crate) struct Prepared(ParserFactory);

/// The vocabulary as a tree of bytes, with the tokenizer's own way to cut a text.
struct Vocabulary {
    tree: TokTrie,
    encode: Encode,
    /// It cuts a piece of a text as that stands, and puts nothing before it.
    cuts_pieces: bool,
}

impl Vocabulary {
    fn new(tree: TokTrie, encode: Encode) -> Self {
        const SAMPLES: [&str; 4] = ["a", " a", "\"a", "\n"];
        let mut vocabulary = Vocabulary {
            tree,
            encode,
            cuts_pieces: false,
        };
        vocabulary.cuts_pieces = SAMPLES
            .iter()
            .all(|text| vocabulary.cut(text.as_bytes()).is_some());
        vocabulary
    }

    /// The tokens of a text, when they are tokens of text and have its bytes.
    fn cut(&self, bytes: &[u8]) -> Option<Vec<u32>> {
        let text = std::str::from_utf8(bytes).ok()?;
        let ids = (self.encode)(text);
        (self.tree.decode_raw(&ids) == bytes).then_some(ids)
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.tree
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.cut(bytes)
            .unwrap_or_else(|| self.tree.greedy_tokenize(bytes))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.cuts_pieces
    }
}

impl Prepared {
    /// `words` are the bytes of each token id, `None` for those that are no text.
    pub fn new(words: Vec<Option<Vec<u8>>>, encode: Encode) -> Result<Self, Error> {
        let failed = |e: &dyn std::fmt::Display| Error::Grammar(format!("the vocabulary: {e}"));
        if words.len() >= MOST_TOKENS {
            let many = format!("{} token ids; allowed: fewer than {MOST_TOKENS}", words.len());
            return Err(failed(&many));
        }
        let fits = |word: Option<Vec<u8>>| {
            word.filter(|w| w.len() <= LONGEST_TOKEN_BYTES)
                .unwrap_or_default()
        };
        let mut words: Vec<Vec<u8>> = words.into_iter().map(fits).collect();
        // An id of no token stands for the end: which tokens end a text is the session's to say.
        let end = u32::try_from(words.len()).map_err(|e| failed(&e))?;
        words.push(b"\xFF<end of text>".to_vec());
        let info = TokRxInfo {
            vocab_size: end + 1,
            tok_eos: end,
            tok_bos: None,
            tok_pad: None,
            tok_unk: None,
            tok_end_of_turn: None,
        };
        let environment = Arc::new(Vocabulary::new(TokTrie::from(&info, &words), encode));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&(environment as _), InferenceCapabilities::default(), &slices)
            .map_err(|e| failed(&e))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Prepared(factory))
    }
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Prepared({} tokens)",
            self.0.tok_env().tok_trie().vocab_size() - 1
        )
    }
}

/// A text on its way through a grammar.
pub(crate) struct Constraint {
    matcher: Matcher,
    end: u32,
}

impl Constraint {
    /// The start of a text.
    pub fn new(grammar: &Grammar, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let factory = &tokenizer.prepared()?.0;
        let matcher = Matcher::new(factory.create_parser(grammar.compile()?));
        if let Some(reason) = matcher.get_error() {
            return Err(failed(&reason));
        }
        Ok(Constraint {
            matcher,
            end: factory.tok_env().tok_trie().eos_token(),
        })
    }

    /// The tokens of text that may come next.
    pub fn allowed(&mut self) -> Result<Allowed, Error> {
        if self.is_done() {
            return Ok(Allowed(None, self.end));
        }
        let mask = self.matcher.compute_mask().map_err(|e| failed(&e))?;
        Ok(Allowed(Some(mask), self.end))
    }

    /// The tokens that come next in any case, as the model's own tokenizer cuts what they say; none where there is a choice.
    pub fn forced(&mut self) -> Vec<u32> {
        if self.is_done() {
            return Vec::new();
        }
        let mut tokens = self.matcher.compute_ff_tokens();
        tokens.retain(|token| *token != self.end);
        tokens
    }

    /// Takes a token of text that was allowed.
    pub fn take(&mut self, token: u32) -> Result<(), Error> {
        self.matcher.consume_token(token).map_err(|e| failed(&e))
    }

    /// Takes tokens of text as far as they are allowed, and says whether all were.
    pub fn take_all(&mut self, tokens: &[u32]) -> Result<bool, Error> {
        let taken = self.matcher.try_consume_tokens(tokens).map_err(|e| failed(&e))?;
        Ok(taken == tokens.len())
    }

    /// True where the text may end.
    pub fn may_end(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }

    /// True where the text can only end.
    pub fn is_done(&self) -> bool {
        self.matcher.is_stopped()
    }
}

impl std::fmt::Debug for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Constraint")
            .field("done", &self.is_done())
            .finish()
    }
}

/// Tokens that may come next.
pub(crate) struct Allowed(Option<SimpleVob>, u32);

impl Allowed {
    /// Their ids, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        let end = self.1;
        self.0
            .iter()
            .flat_map(SimpleVob::iter)
            .filter(move |id| *id != end)
    }
}

/// The crate's reason without the dump it adds.
fn failed(reason: &dyn std::fmt::Display) -> Error {
    let reason = reason.to_string();
    let first = reason.split("\n<").next().unwrap_or_default().trim();
    Error::Grammar(first.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::bytes_tokenizer;

    /// Whether each text is taken whole, and whether it may end there.
    fn follow(tokenizer: &Tokenizer, grammar: &Grammar, text: &str) -> (bool, bool) {
        let mut constraint = Constraint::new(grammar, tokenizer).unwrap();
        let whole = constraint.take_all(&tokenizer.encode(text).unwrap()).unwrap();
        (whole, whole && constraint.may_end())
    }

    #[test]
    fn grammars_take_what_they_say() {
        let tokenizer = bytes_tokenizer();
        let schema = Grammar::JsonSchema(json!({"type": "object", "properties": {"a": {"type": "integer"}},
            "required": ["a"], "additionalProperties": false}));
        let lark = Grammar::Lark("start: \"a\" start \"b\" | \"c\"".to_string());
        let mut failures = Vec::new();
        for (grammar, text, expected) in [
            (&Grammar::JsonObject, "{\"x\": [1, true]}", (true, true)),
            (&Grammar::JsonObject, "{\"x\": [1, tr", (true, false)),
            (&Grammar::JsonObject, "[1]", (false, false)),
            (
                &Grammar::JsonObject,
                "{\"x\":[1,{\"y\":\"z\"}], \"v\": {}}",
                (true, true),
            ),
            (&Grammar::JsonObject, "{\"x\" : null}", (false, false)),
            (&Grammar::JsonObject, "{ \"x\": null}", (false, false)),
            (&Grammar::JsonObject, "{\"x\":  null}", (false, false)),
            (&Grammar::JsonObject, "{\"x\": [\n1]}", (false, false)),
            (&schema, "{\"a\":12}", (true, true)),
            (&schema, "{\"b\"", (false, false)),
            (&schema, "{}", (false, false)),
            (&Grammar::Regex("yes|no".into()), "no", (true, true)),
            (&Grammar::Regex("yes|no".into()), "maybe", (false, false)),
            (&Grammar::Regex("a+/é".into()), "aaa/é", (true, true)),
            (&Grammar::Regex("a+".into()), "aa", (true, true)),
            (&Grammar::Regex("".into()), "", (true, true)),
            (&lark, "aacbb", (true, true)),
            (&lark, "aacb", (true, false)),
        ] {
            let found = follow(&tokenizer, grammar, text);
            if found != expected {
                failures.push(format!("{grammar:?} {text:?}: {found:?}, expected {expected:?}"));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn what_a_grammar_leaves_no_choice_about_is_known_at_once() {
        let tokenizer = bytes_tokenizer();
        let text_of = |tokens: &[u32]| tokenizer.decode(tokens, false).unwrap();
        let grammar = Grammar::JsonSchema(json!({"type": "object",
            "properties": {"the name": {"enum": ["aa", "ab"]}}, "required": ["the name"], "additionalProperties": false}));
        let mut constraint = Constraint::new(&grammar, &tokenizer).unwrap();
        let first = constraint.forced();
        assert_eq!(text_of(&first), "{\"the name\":");
        // `the` is one token where it follows a blank, and three where it does not.
        assert_eq!(first[..3], tokenizer.encode("{\"t").unwrap());
        assert!(constraint.take_all(&first).unwrap());
        assert!(constraint.forced().is_empty(), "a blank may come or not");
        assert!(constraint.take_all(&tokenizer.encode("\"a").unwrap()).unwrap());
        assert!(constraint.forced().is_empty());
        constraint.take(u32::from(b'b')).unwrap();
        let rest = constraint.forced();
        assert_eq!(text_of(&rest), "\"}");
        assert!(constraint.take_all(&rest).unwrap() && constraint.is_done());
        assert!(constraint.forced().is_empty());
    }

    #[test]
    fn special_tokens_and_the_stand_in_for_the_end_are_never_text() {
        let tokenizer = bytes_tokenizer();
        let mut any = Constraint::new(&Grammar::Regex("(?s:.*)".into()), &tokenizer).unwrap();
        let ids: Vec<u32> = any.allowed().unwrap().ids().collect();
        assert!(ids.contains(&97) && ids.contains(&256), "{ids:?}");
        assert!(
            !ids.iter().any(|id| tokenizer.is_special(*id) || *id > 258),
            "{ids:?}"
        );
        assert!(any.may_end() && !any.is_done());
        let mut one = Constraint::new(&Grammar::Regex("a".into()), &tokenizer).unwrap();
        assert_eq!(one.allowed().unwrap().ids().collect::<Vec<_>>(), [97]);
        one.take(97).unwrap();
        assert!(one.is_done() && one.may_end());
        assert_eq!(one.allowed().unwrap().ids().count(), 0);
    }

    #[test]
    fn grammars_that_cannot_be_read_say_why() {
        let tokenizer = bytes_tokenizer();
        for (grammar, expected) in [
            (Grammar::JsonSchema(json!(3)), "a JSON schema is an object"),
            (Grammar::JsonSchema(json!({"type": "strin"})), "strin"),
            (
                Grammar::JsonSchema(json!({"type": "object", "dependentSchemas": {"a": {}}})),
                "dependentSchemas",
            ),
            (Grammar::Regex("a(".into()), "regex"),
            (Grammar::Lark("start: nothing".into()), "nothing"),
        ] {
            let error = Constraint::new(&grammar, &tokenizer).unwrap_err().to_string();
            assert!(error.starts_with("grammar: "), "{error}");
            assert!(
                error.contains(expected) && !error.contains("<state>"),
                "{grammar:?}: {error}"
            );
        }
    }
}
