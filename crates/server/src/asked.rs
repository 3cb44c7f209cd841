//! What requests for text have in common, read and turned into options of a generation.

use std::collections::BTreeMap;

use candle_coreml_llm::{GenerateOptions, Grammar, Sampler, Sampling, Tokenizer};
use serde::Deserialize;
use serde_json::{Number, Value};

use crate::app::App;
use crate::json::Unsupported;
use crate::refusal::Refusal;

/// Most stop strings of a request.
const STOPS: usize = 16;
/// Most tokens whose log probabilities are given beside the chosen one's.
const TOP_LOGPROBS: usize = 20;

/// Parameters of both kinds of requests. Those OpenAI does not have carry the names other servers gave them.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Asked {
    pub model: Option<String>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub n: Option<usize>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<Number>,
    stop: Option<Stop>,
    ignore_eos: Option<bool>,
    response_format: Option<ResponseFormat>,
}

/// What a stream tells besides the text.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct StreamOptions {
    pub include_usage: Option<bool>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings is allowed")]
enum Stop {
    One(String),
    Several(Vec<String>),
}

#[derive(Debug, Clone, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<JsonSchema>,
}

#[derive(Debug, Clone, Deserialize)]
struct JsonSchema {
    schema: Option<Value>,
}

/// Parameters of both kinds that are refused.
pub(crate) const UNSUPPORTED: &[Unsupported] = &[
    Unsupported {
        param: "best_of",
        why: "texts are not ranked; ask for `n`",
        harmless: |value| value == 1,
    },
    Unsupported {
        param: "suffix",
        why: "no model here fills gaps",
        harmless: |value| value == "",
    },
    Unsupported {
        param: "store",
        why: "nothing is kept",
        harmless: |value| value == false,
    },
    Unsupported {
        param: "background",
        why: "texts are given to who waits for them",
        harmless: |value| value == false,
    },
];

impl Asked {
    pub fn is_stream(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    pub fn wants_usage(&self) -> bool {
        let options = self.stream_options.as_ref();
        options.and_then(|o| o.include_usage).unwrap_or(false)
    }

    /// Texts for each prompt.
    pub fn texts(&self) -> Result<usize, Refusal> {
        match self.n.unwrap_or(1) {
            0 => Err(Refusal::value("n", 0, "1 or more")),
            n => Ok(n),
        }
    }

    /// Checks that so many texts could ever be taken on at once.
    pub fn check_texts(&self, app: &App, prompts: usize) -> Result<usize, Refusal> {
        let most = app.options.max_concurrency + app.options.queue;
        let texts = self.texts()?;
        match texts.checked_mul(prompts) {
            Some(all) if all <= most => Ok(all),
            _ => {
                let allowed = format!("1 to {most} texts in all, `n` times the number of prompts");
                Err(Refusal::value("n", texts, &allowed))
            }
        }
    }

    /// The options of a generation; `default_tokens` is its length where none is asked for.
    pub fn options(
        &self,
        app: &App,
        tokenizer: &Tokenizer,
        default_tokens: usize,
    ) -> Result<GenerateOptions, Refusal> {
        let sampling = self.sampling(tokenizer)?;
        Sampler::new(sampling.clone()).map_err(|e| Refusal::of(&e, "messages"))?;
        Ok(GenerateOptions {
            max_tokens: self.max_tokens(app.options.max_tokens, default_tokens)?,
            sampling,
            stop_strings: self.stops()?,
            ignore_end: self.ignore_eos.unwrap_or(false),
            grammar: self.grammar()?,
            ..GenerateOptions::default()
        })
    }

    fn sampling(&self, tokenizer: &Tokenizer) -> Result<Sampling, Refusal> {
        let default = Sampling::default();
        let temperature = self.temperature.unwrap_or(1.0);
        if !(0.0..=2.0).contains(&temperature) {
            return Err(Refusal::value("temperature", temperature, "0 to 2"));
        }
        for (name, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if let Some(value) = value.filter(|v| !(-2.0..=2.0).contains(v)) {
                return Err(Refusal::value(name, value, "-2 to 2"));
            }
        }
        Ok(Sampling {
            temperature,
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            typical_p: self.typical_p.unwrap_or(default.typical_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
            logit_bias: self.logit_bias(tokenizer.vocabulary())?,
            seed: self.seed()?,
            ..default
        })
    }

    fn max_tokens(&self, most: Option<usize>, default: usize) -> Result<usize, Refusal> {
        let (name, asked) = match self.max_completion_tokens {
            Some(asked) => ("max_completion_tokens", Some(asked)),
            None => ("max_tokens", self.max_tokens),
        };
        match (asked, most) {
            (Some(0), _) => Err(Refusal::value(name, 0, "1 or more")),
            (Some(asked), Some(most)) if asked > most => {
                Err(Refusal::value(name, asked, &format!("1 to {most}")))
            }
            (Some(asked), _) => Ok(asked),
            (None, most) => Ok(default.min(most.unwrap_or(usize::MAX))),
        }
    }

    fn stops(&self) -> Result<Vec<String>, Refusal> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Several(stops)) => stops.clone(),
        };
        if stops.len() > STOPS {
            let found = format!("{} strings", stops.len());
            return Err(Refusal::value("stop", found, &format!("up to {STOPS}")));
        }
        if stops.iter().any(String::is_empty) {
            return Err(Refusal::value(
                "stop",
                "an empty string",
                "one character or more each",
            ));
        }
        Ok(stops)
    }

    /// Keys are token ids in decimal; -100 forbids a token.
    fn logit_bias(&self, vocabulary: usize) -> Result<Vec<(u32, f32)>, Refusal> {
        let each = |(key, bias): (&String, &f32)| {
            let param = format!("logit_bias.{key}");
            let token = key
                .parse::<u32>()
                .ok()
                .filter(|&token| usize::try_from(token).is_ok_and(|token| token < vocabulary));
            let Some(token) = token else {
                let allowed = format!("token ids, 0 to {}", vocabulary.saturating_sub(1));
                return Err(Refusal::value(&param, format!("{key:?}"), &allowed));
            };
            if !(-100.0..=100.0).contains(bias) {
                return Err(Refusal::value(&param, bias, "-100 to 100"));
            }
            let bias = if *bias == -100.0 { f32::NEG_INFINITY } else { *bias };
            Ok((token, bias))
        };
        self.logit_bias.iter().flatten().map(each).collect()
    }

    /// Without a seed every request has another one.
    fn seed(&self) -> Result<u64, Refusal> {
        match &self.seed {
            None => getrandom::u64().map_err(|e| Refusal::internal(format!("no random seed: {e}"))),
            Some(seed) => seed
                .as_u64()
                .or_else(|| seed.as_i64().map(i64::cast_unsigned))
                .ok_or_else(|| Refusal::value("seed", seed, "whole numbers of 64 bits")),
        }
    }

    fn grammar(&self) -> Result<Option<Grammar>, Refusal> {
        let Some(format) = &self.response_format else {
            return Ok(None);
        };
        match format.kind.as_str() {
            "text" => Ok(None),
            "json_object" => Ok(Some(Grammar::JsonObject)),
            "json_schema" => {
                let schema = format.json_schema.as_ref().and_then(|s| s.schema.clone());
                let param = "response_format.json_schema.schema";
                let missing = || Refusal::param(param, "missing_parameter", format!("`{param}` is missing"));
                Ok(Some(Grammar::JsonSchema(schema.ok_or_else(missing)?)))
            }
            other => {
                let allowed = "text, json_object, json_schema";
                Err(Refusal::value(
                    "response_format.type",
                    format!("{other:?}"),
                    allowed,
                ))
            }
        }
    }
}

/// How many log probabilities beside the chosen one's; `name` is the parameter.
pub(crate) fn top_logprobs(name: &str, count: usize) -> Result<usize, Refusal> {
    if count > TOP_LOGPROBS {
        return Err(Refusal::value(name, count, &format!("0 to {TOP_LOGPROBS}")));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn asked(body: Value) -> Asked {
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn lengths_keep_to_what_the_server_allows() {
        for (body, most, expected) in [
            (json!({}), None, Some(16)),
            (json!({}), Some(8), Some(8)),
            (json!({"max_tokens": 5}), Some(8), Some(5)),
            (
                json!({"max_tokens": 5, "max_completion_tokens": 7}),
                None,
                Some(7),
            ),
            (json!({"max_tokens": 9}), Some(8), None),
            (json!({"max_tokens": 0}), None, None),
        ] {
            let found = asked(body.clone()).max_tokens(most, 16);
            assert_eq!(found.ok(), expected, "{body}");
        }
    }

    #[test]
    fn values_out_of_range_name_their_parameter() {
        let mut failures = Vec::new();
        for (body, param) in [
            (json!({"stop": ["a", ""]}), "stop"),
            (json!({"stop": vec!["a"; 17]}), "stop"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias.x"),
            (json!({"logit_bias": {"9": 101}}), "logit_bias.9"),
            (json!({"logit_bias": {"10": 1}}), "logit_bias.10"),
            (json!({"seed": 1.5}), "seed"),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format.type",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema.schema",
            ),
        ] {
            let asked = asked(body.clone());
            let refusals = [
                asked.stops().err(),
                asked.logit_bias(10).err(),
                asked.seed().err(),
                asked.grammar().err(),
            ];
            let params: Vec<_> = refusals
                .into_iter()
                .flatten()
                .filter_map(|r| r.body.param)
                .collect();
            if params != [param] {
                failures.push(format!("{body}: {params:?}"));
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
    }

    #[test]
    fn a_seed_may_be_negative_and_a_bias_may_forbid() {
        assert_eq!(asked(json!({"seed": -1})).seed().unwrap(), u64::MAX);
        assert_eq!(
            asked(json!({"logit_bias": {"3": -100}})).logit_bias(10).unwrap(),
            [(3, f32::NEG_INFINITY)]
        );
    }
}
