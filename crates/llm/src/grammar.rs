//! Constrained output: what a text must be, and which tokens may come next for it to become that.
//!
//! Set [`GenerateOptions::grammar`](crate::GenerateOptions::grammar): before every token is chosen, greedily or by chance, those
//! that cannot lead to a text of the grammar are out of the choice. The model's end tokens are in it only where the grammar may end, and a
//! text that can only end ends without one. [`Completion::fits_grammar`](crate::Completion::fits_grammar) says whether the text
//! was whole when something else (the number of tokens, a stop string) ended it.
//!
//! The vocabulary is prepared once for each [`Tokenizer`], when its first grammar is used. The work is done by
//! [llguidance](https://github.com/guidance-ai/llguidance).

use std::sync::Arc;

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, SimpleVob, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::Error;
use crate::tokenizer::Tokenizer;

/// Longest token a grammar can use, in bytes; longer ones (rows of spaces, mostly) are left out of the choice.
const LONGEST_TOKEN_BYTES: usize = 240;
/// Most token ids a vocabulary may have for grammars; the largest in use have 262,144.
const MOST_TOKENS: usize = 1 << 22;
/// One blank, or a new line with its indentation, between the parts of JSON: readable, and no model gets lost in blanks.
const JSON_BLANK: &str = r"(\x20|\n[\x20]{0,24})";

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
        let blanks = json!({"whitespace_pattern": JSON_BLANK, "whitespace_flexible": true,
            "item_separator": ",", "key_separator": ":", "coerce_one_of": true, "lenient": false});
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

/// A tokenizer's vocabulary as grammars need it: shared by all texts.
pub(crate) struct Prepared(ParserFactory);

impl Prepared {
    /// `words` are the bytes of each token id, `None` for those that are no text.
    pub fn new(words: Vec<Option<Vec<u8>>>) -> Result<Self, Error> {
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
        let environment = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
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
            (&Grammar::JsonObject, "{\n  \"x\": null\n}", (true, true)),
            (&Grammar::JsonObject, "{  \"x\": null}", (false, false)),
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
