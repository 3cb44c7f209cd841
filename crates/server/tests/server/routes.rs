//! Every route: whole answers, streams, refusals.

use std::collections::BTreeSet;

use crate::served::{Served, Stream, chat, encoder, expected, joined};
use candle_coreml_server::Model;
use serde_json::{Value, json};

const MOUSE: &str = "Tell me a story about a brave mouse.";

#[test]
fn a_chat_is_what_a_session_says_whole_and_streamed() {
    let served = Served::start(|_| {});
    let expected = expected(MOUSE, 40);
    let (status, body) = served.post("/v1/chat/completions", &chat(MOUSE, 40));
    assert_eq!(status, 200, "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "tales");
    let choice = &body["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], expected.text.as_str());
    assert_eq!(choice["message"]["refusal"], Value::Null);
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(
        body["usage"],
        json!({
            "prompt_tokens": expected.prompt_tokens,
            "completion_tokens": 40,
            "total_tokens": expected.prompt_tokens + 40,
            "prompt_tokens_details": {"cached_tokens": 0},
        })
    );

    let mut streamed = chat(MOUSE, 40);
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let chunks = served.stream("/v1/chat/completions", &streamed);
    assert_eq!(joined(&chunks), expected.text);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let ids: BTreeSet<&str> = chunks.iter().map(|c| c["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 1);
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 40);
    assert_eq!(
        last["usage"]["prompt_tokens_details"]["cached_tokens"],
        expected.prompt_tokens - 1,
        "the same prompt again"
    );
    assert!(others.iter().all(|chunk| chunk["usage"].is_null()));
    assert_eq!(others.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_second_turn_computes_its_new_tokens_only() {
    let served = Served::start(|_| {});
    let (_, first) = served.post("/v1/chat/completions", &chat(MOUSE, 400));
    assert_eq!(first["choices"][0]["finish_reason"], "stop", "{first}");
    let mut second = chat(MOUSE, 5);
    second["messages"] = json!([
        {"role": "user", "content": MOUSE},
        first["choices"][0]["message"],
        {"role": "user", "content": "And a cat?"},
    ]);
    let (status, body) = served.post("/v1/chat/completions", &second);
    assert_eq!(status, 200, "{body}");
    let known = first["usage"]["total_tokens"].as_u64().unwrap() - 1;
    let cached = &body["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64().unwrap() + 1 >= known, "{cached} of {known}");
    assert!(served.metric("candle_coreml_reused_prompt_tokens_total") + 1.0 >= known as f64);
}

#[test]
fn completions_take_every_form_of_prompt() {
    let served = Served::start(|_| {});
    let ids = crate::served::tales()
        .tokenizer()
        .encode("Once upon a time")
        .unwrap();
    let ask = |prompt: Value, more: Value| {
        let mut body = json!({"model": "tales", "prompt": prompt, "temperature": 0, "max_tokens": 6});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let (status, body) = served.post("/v1/completions", &body);
        assert_eq!(status, 200, "{body}");
        body
    };
    let text = |body: &Value, at: usize| body["choices"][at]["text"].as_str().unwrap().to_owned();
    let one = ask(json!("Once upon a time"), json!({}));
    assert_eq!(one["object"], "text_completion");
    let said = text(&one, 0);
    assert!(!said.is_empty());
    assert_eq!(text(&ask(json!(ids), json!({})), 0), said);
    let many = ask(json!(["Once upon a time", "The cat"]), json!({"n": 2}));
    assert_eq!(many["choices"].as_array().unwrap().len(), 4);
    assert_eq!((text(&many, 0), text(&many, 1)), (said.clone(), said.clone()));
    assert_eq!(text(&many, 2), text(&many, 3));
    assert_eq!(many["usage"]["completion_tokens"], 24);
    let echoed = ask(json!([ids]), json!({"echo": true}));
    assert_eq!(text(&echoed, 0), format!("Once upon a time{said}"));
    let logprobs = ask(json!("Once upon a time"), json!({"logprobs": 2}));
    let lists = &logprobs["choices"][0]["logprobs"];
    assert_eq!(lists["tokens"].as_array().unwrap().len(), 6);
    assert_eq!(lists["text_offset"][0], 0);
    assert!(
        lists["top_logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .all(|t| t.as_object().unwrap().len() == 2)
    );
    let body = json!({"model": "tales", "prompt": ["Once upon a time"], "temperature": 0, "max_tokens": 6, "stream": true});
    let chunks = served.stream("/v1/completions", &body);
    let streamed: String = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(streamed, said);
}

#[test]
fn what_is_asked_of_sampling_is_done() {
    let served = Served::start(|_| {});
    let say = |more: Value| {
        let mut body = chat(MOUSE, 30);
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let (status, body) = served.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{body}");
        body["choices"].clone()
    };
    let text = |choices: &Value| choices[0]["message"]["content"].as_str().unwrap().to_owned();
    let hot = |seed: i64| text(&say(json!({"temperature": 1.5, "seed": seed})));
    assert_eq!(hot(1), hot(1));
    assert_ne!(hot(1), hot(-2));
    let two = say(json!({"temperature": 1.5, "seed": 1, "n": 2}));
    assert_eq!(text(&two), hot(1));
    assert_eq!(two[1]["message"]["content"], hot(2).as_str());

    let greedy = expected(MOUSE, 30);
    let stop = greedy.text.split(' ').nth(3).unwrap();
    let stopped = say(json!({"stop": stop}));
    assert_eq!(text(&stopped), greedy.text.split(stop).next().unwrap());
    assert_eq!(stopped[0]["finish_reason"], "stop");

    let first = greedy.tokens[0];
    let biased = say(json!({"logit_bias": {first.to_string(): -100}, "logprobs": true, "top_logprobs": 3}));
    let content = biased[0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 30);
    let tokenizer = crate::served::tales();
    let banned = tokenizer.tokenizer().decode(&[first], true).unwrap();
    assert!(content.iter().all(|t| t["token"] != banned.as_str()));
    assert_eq!(
        content[0]["top_logprobs"][0]["token"],
        banned.as_str(),
        "log probabilities are the model's own"
    );
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(
        content[0]["bytes"],
        json!(content[0]["token"].as_str().unwrap().as_bytes())
    );
    let repeated = text(&say(json!({"frequency_penalty": 2, "presence_penalty": 2})));
    assert_ne!(repeated, greedy.text);
}

#[test]
fn answers_have_the_form_that_was_asked_for() {
    let served = Served::start(|_| {});
    let schema = json!({
        "type": "object",
        "properties": {"animal": {"enum": ["mouse", "cat"]}, "legs": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["animal", "legs"],
        "additionalProperties": false,
    });
    for seed in 0..4 {
        let mut body = chat(MOUSE, 60);
        body["temperature"] = json!(1.3);
        body["seed"] = json!(seed);
        body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "animal", "strict": true, "schema": schema}});
        let (status, body) = served.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{body}");
        let choice = &body["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{body}");
        let found: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
        assert!(["mouse", "cat"].contains(&found["animal"].as_str().unwrap()));
        assert!((0..=9).contains(&found["legs"].as_i64().unwrap()));
    }
    let mut body = chat(MOUSE, 5);
    body["response_format"] = json!({"type": "json_object"});
    let (_, body) = served.post("/v1/chat/completions", &body);
    let content = body["choices"][0]["message"]["content"]
        .as_str()
        .unwrap()
        .trim_start();
    assert!(content.starts_with('{'), "{content}");
    assert_eq!(
        body["choices"][0]["finish_reason"], "length",
        "five tokens are no object"
    );
}

#[test]
fn tools_are_called_and_their_calls_are_no_text() {
    let served = Served::start(|_| {});
    let tool = |name: &str| {
        json!({"type": "function", "function": {"name": name, "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": false,
        }}})
    };
    let mut body = chat("What is the weather in Rome?", 80);
    body["model"] = json!("tools");
    body["tools"] = json!([tool("get_weather"), tool("get_time")]);
    body["tool_choice"] = json!({"type": "function", "function": {"name": "get_time"}});
    let (status, whole) = served.post("/v1/chat/completions", &body);
    assert_eq!(status, 200, "{whole}");
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
    assert_eq!(choice["message"]["content"], Value::Null);
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(
        (&call["type"], &call["function"]["name"]),
        (&json!("function"), &json!("get_time"))
    );
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().unwrap()));

    body["stream"] = json!(true);
    let chunks = served.stream("/v1/chat/completions", &body);
    assert_eq!(joined(&chunks), "");
    let calls: Vec<&Value> = chunks
        .iter()
        .filter_map(|c| c.pointer("/choices/0/delta/tool_calls/0"))
        .collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(
        (&calls[0]["index"], &calls[0]["function"]),
        (&json!(0), &call["function"])
    );
    assert_eq!(
        chunks.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );

    // The call and its result go back to the model.
    let mut next = chat("What is the weather in Rome?", 4);
    next["model"] = json!("tools");
    next["tools"] = body["tools"].clone();
    next["messages"] = json!([
        {"role": "user", "content": [{"type": "text", "text": "What is the weather in Rome?"}]},
        choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny"},
    ]);
    assert_eq!(served.post("/v1/chat/completions", &next).0, 200);
}

#[test]
fn thinking_comes_apart_from_the_answer() {
    let served = Served::start(|_| {});
    let mut body = chat(MOUSE, 10);
    body["model"] = json!("tools");
    body["chat_template_kwargs"] = json!({"enable_thinking": true});
    let (status, body) = served.post("/v1/chat/completions", &body);
    assert_eq!(status, 200, "{body}");
    let message = &body["choices"][0]["message"];
    assert_eq!(message["content"], "", "it never stopped thinking");
    assert!(!message["reasoning_content"].as_str().unwrap().is_empty());
}

#[test]
fn embeddings_are_those_of_the_encoder() {
    let served = Served::with(vec![Model::encoder("small", encoder())], |_| {});
    let texts = ["a cat sits", "a dog"];
    let expected = encoder().embed(&texts).unwrap();
    let (status, body) = served.post("/v1/embeddings", &json!({"model": "small", "input": texts}));
    assert_eq!(status, 200, "{body}");
    for (index, expected) in expected.iter().enumerate() {
        let found: Vec<f32> = serde_json::from_value(body["data"][index]["embedding"].clone()).unwrap();
        assert!(
            found
                .iter()
                .zip(&expected.vector)
                .all(|(a, b)| (a - b).abs() < 1e-6)
        );
        assert_eq!(body["data"][index]["index"], index);
    }
    let tokens: usize = expected.iter().map(|e| e.tokens).sum();
    assert_eq!(body["usage"]["prompt_tokens"], tokens);
    let (_, base64) = served.post(
        "/v1/embeddings",
        &json!({"input": texts[0], "encoding_format": "base64", "dimensions": 4}),
    );
    assert_eq!(base64["data"][0]["embedding"].as_str().unwrap().len(), 24);
    let (status, body) = served.post("/v1/chat/completions", &chat(MOUSE, 1));
    assert_eq!((status, &body["error"]["code"]), (404, &json!("model_not_found")));
    let mut wrong = chat(MOUSE, 1);
    wrong["model"] = json!("small");
    let (status, body) = served.post("/v1/chat/completions", &wrong);
    assert_eq!(
        (status, &body["error"]["code"]),
        (400, &json!("wrong_kind_of_model"))
    );
}

#[test]
fn models_health_metrics_and_the_page_are_there() {
    let served = Served::start(|_| {});
    let (status, models) = served.get("/v1/models");
    assert_eq!(status, 200);
    let ids: Vec<&str> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["tales", "tools"]);
    let (_, one) = served.get("/v1/models/tales");
    assert_eq!(
        (&one["object"], &one["task"], &one["context_length"]),
        (&json!("model"), &json!("text-generation"), &json!(512))
    );
    assert_eq!(served.get("/v1/models/org/none").0, 404);
    assert_eq!(
        served.get("/health"),
        (200, json!({"status": "ok", "active": 0, "queue_length": 0}))
    );
    served.post("/v1/chat/completions", &chat(MOUSE, 3));
    assert_eq!(served.metric("candle_coreml_generated_tokens_total"), 3.0);
    assert_eq!(
        served.metric("candle_coreml_time_to_first_token_seconds_count"),
        1.0
    );
    let page = served.text("/");
    assert!(page.contains("<html lang=\"en\">") && !page.contains("http://") && !page.contains("https://"));
}

#[test]
fn every_refusal_has_its_status_parameter_and_code() {
    let served = Served::start(|options| {
        options.max_tokens = Some(100);
        options.queue = 4;
    });
    let with = |param: &str, value: Value| {
        let mut body = chat(MOUSE, 1);
        body[param] = value;
        body
    };
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let rows = [
        (with("model", json!("gpt-4")), 404, "model", "model_not_found"),
        (with("messages", json!(null)), 400, "messages", "invalid_type"),
        (with("messages", json!([])), 400, "messages", "invalid_value"),
        (
            with("messages", json!([{"content": "x"}])),
            400,
            "messages[0].role",
            "missing_parameter",
        ),
        (
            with(
                "messages",
                json!([{"role": "user", "content": [{"type": "image_url"}]}]),
            ),
            400,
            "messages[0].content",
            "invalid_type",
        ),
        (
            with(
                "messages",
                json!([{"role": "user", "content": "word ".repeat(600)}]),
            ),
            400,
            "messages",
            "context_length_exceeded",
        ),
        (
            with("temperature", json!(2.5)),
            400,
            "temperature",
            "invalid_value",
        ),
        (
            with("temperature", json!("hot")),
            400,
            "temperature",
            "invalid_type",
        ),
        (with("top_p", json!(0)), 400, "top_p", "invalid_value"),
        (with("max_tokens", json!(101)), 400, "max_tokens", "invalid_value"),
        (with("max_tokens", json!(-1)), 400, "max_tokens", "invalid_type"),
        (with("n", json!(9)), 400, "n", "invalid_value"),
        (with("stop", json!([""])), 400, "stop", "invalid_value"),
        (
            with("logit_bias", json!({"999999": 1})),
            400,
            "logit_bias.999999",
            "invalid_value",
        ),
        (
            with("top_logprobs", json!(2)),
            400,
            "top_logprobs",
            "invalid_value",
        ),
        (
            with("functions", json!([{}])),
            400,
            "functions",
            "unsupported_parameter",
        ),
        (
            with("modalities", json!(["text", "audio"])),
            400,
            "modalities",
            "unsupported_parameter",
        ),
        (
            with("tool_choice", json!("required")),
            400,
            "tool_choice",
            "invalid_value",
        ),
        (with("tools", json!([tool])), 400, "tools", "invalid_value"),
        (
            with("response_format", json!({"type": "xml"})),
            400,
            "response_format.type",
            "invalid_value",
        ),
        (
            with(
                "response_format",
                json!({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}),
            ),
            400,
            "response_format",
            "invalid_value",
        ),
    ];
    let mut failures = Vec::new();
    for (body, status, param, code) in rows {
        let (found, answer) = served.post("/v1/chat/completions", &body);
        let error = &answer["error"];
        if (found, &error["param"], &error["code"]) != (status, &json!(param), &json!(code))
            || !error["message"].is_string()
            || !error["type"].is_string()
        {
            failures.push(format!("{param}, {code}: {found} {answer}"));
        }
    }
    for (method, path, status, code) in [
        ("GET", "/v1/nothing", 404, "unknown_route"),
        ("GET", "/v1/chat/completions", 405, "wrong_method"),
    ] {
        let (found, answer) = served.ask(method, path, &[], "");
        if (found, &answer["error"]["code"]) != (status, &json!(code)) {
            failures.push(format!("{method} {path}: {found} {answer}"));
        }
    }
    let json = ("Content-Type", "application/json");
    for (headers, body, status, code) in [
        (vec![json], "{", 400, "invalid_json"),
        (vec![json], "[]", 400, "invalid_json"),
        (
            vec![("Content-Type", "text/plain")],
            "{}",
            415,
            "invalid_content_type",
        ),
        (vec![json, ("Host", "example.org")], "{}", 403, "host_not_allowed"),
    ] {
        let (found, answer) = served.ask("POST", "/v1/completions", &headers, body);
        if (found, &answer["error"]["code"]) != (status, &json!(code)) {
            failures.push(format!("{headers:?} {body}: {found} {answer}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn keys_are_asked_for_and_origins_are_told() {
    let served = Served::start(|options| {
        options.api_keys = vec!["secret".to_owned()];
        options.cors_origins = vec!["https://app.example".to_owned()];
    });
    let (status, body) = served.get("/v1/models");
    assert_eq!(
        (status, &body["error"]["type"]),
        (401, &json!("authentication_error"))
    );
    let key = ("Authorization", "Bearer secret");
    assert_eq!(served.ask("GET", "/v1/models", &[key], "").0, 200);
    assert_eq!(served.ask("GET", "/metrics", &[], "").0, 401);
    assert_eq!(
        served.ask("GET", "/health", &[("Host", "any.example")], "").0,
        200
    );
    let preflight = [
        ("Origin", "https://app.example"),
        ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type"),
    ];
    assert_eq!(
        served.ask("OPTIONS", "/v1/chat/completions", &preflight, "").0,
        200
    );
}

#[test]
fn bodies_have_their_size_and_may_be_sent_in_chunks() {
    let served = Served::start(|options| options.max_body_bytes = 10_000);
    let huge = chat(&"a".repeat(300_000), 1);
    let (status, body) = served.post("/v1/chat/completions", &huge);
    assert_eq!(
        (status, &body["error"]["code"]),
        (413, &json!("request_too_large"))
    );
    assert_eq!(served.post("/v1/chat/completions", &chat(MOUSE, 1)).0, 200);
}

#[test]
fn a_stream_that_cannot_start_has_a_status_of_its_own() {
    let served = Served::start(|_| {});
    let mut body = chat(&"word ".repeat(600), 1);
    body["stream"] = json!(true);
    let stream = Stream::open(served.address, "/v1/chat/completions", &body);
    assert_eq!(stream.status, 400);
    assert!(stream.rest().contains("context_length_exceeded"));
}
