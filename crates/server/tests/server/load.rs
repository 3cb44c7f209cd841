//! The server with more to do than it can at once, clients that leave, and its end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::served::{PATIENCE, Served, Stream, chat, expected, joined};
use serde_json::{Value, json};

/// A chat that never ends by itself before the context is full.
fn endless(content: &str) -> Value {
    let mut body = chat(content, 400);
    body["ignore_eos"] = json!(true);
    body["stream"] = json!(true);
    body
}

fn open(served: &Served, body: &Value) -> Stream {
    let stream = Stream::open(served.address, "/v1/chat/completions", body);
    assert_eq!(stream.status, 200);
    stream
}

#[test]
fn many_clients_at_once_get_their_own_answers() {
    let served = Served::start(|options| options.max_concurrency = 3);
    let prompts: Vec<String> = ["mouse", "cat", "bear", "fox", "bird", "dog", "frog", "duck"]
        .iter()
        .map(|animal| format!("Tell me a story about a {animal}."))
        .collect();
    std::thread::scope(|scope| {
        for prompt in &prompts {
            let served = &served;
            scope.spawn(move || {
                let mut body = chat(prompt, 24);
                body["stream"] = json!(true);
                let chunks = served.stream("/v1/chat/completions", &body);
                assert_eq!(joined(&chunks), expected(prompt, 24).text, "{prompt}");
            });
        }
    });
    assert!(served.metric("candle_coreml_states") <= 3.0);
}

#[test]
fn a_client_that_leaves_ends_its_text_streamed_or_not() {
    let served = Served::start(|options| options.max_concurrency = 1);
    let mut stream = open(&served, &endless("Tell me about a mouse."));
    for _ in 0..3 {
        stream.next_data().unwrap();
    }
    drop(stream);
    served.wait_for("candle_coreml_active", 0.0);
    assert_eq!(served.metric("candle_coreml_cancelled_total"), 1.0);
    let generated = served.metric("candle_coreml_generated_tokens_total");
    assert!(generated < 400.0, "{generated}");

    let mut socket = TcpStream::connect(served.address).unwrap();
    let mut body = endless("Tell me about a mouse.");
    body["stream"] = json!(false);
    let body = body.to_string();
    write!(
        socket,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    served.wait_for("candle_coreml_active", 1.0);
    drop(socket);
    served.wait_for("candle_coreml_active", 0.0);
    assert_eq!(served.metric("candle_coreml_cancelled_total"), 2.0);
}

#[test]
fn a_full_queue_refuses_with_the_time_to_come_back() {
    let served = Served::start(|options| {
        options.max_concurrency = 1;
        options.queue = 1;
    });
    let running = open(&served, &endless("Tell me about a mouse."));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| served.post("/v1/chat/completions", &chat("A cat.", 2)));
        served.wait_for("candle_coreml_queue_length", 1.0);
        let body = chat("A dog.", 2).to_string();
        let mut socket = TcpStream::connect(served.address).unwrap();
        write!(
            socket,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
        assert!(answer.contains("retry-after: 1"), "{answer}");
        assert!(answer.contains("\"code\":\"queue_full\""), "{answer}");
        drop(running);
        assert_eq!(waiting.join().unwrap().0, 200);
    });
}

#[test]
fn time_that_is_up_ends_a_text_as_its_length_would() {
    let served = Served::start(|options| {
        options.max_concurrency = 1;
        options.request_timeout = Duration::from_millis(400);
    });
    let mut body = endless("Tell me about a mouse.");
    body["max_tokens"] = json!(100_000);
    let chunks = served.stream("/v1/chat/completions", &body);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(!joined(&chunks).is_empty());
    served.wait_for("candle_coreml_cancelled_total", 1.0);
}

#[test]
fn requests_that_are_sent_too_slowly_are_given_up() {
    let served = Served::start(|options| options.io_timeout = Duration::from_millis(300));
    let mut slow_head = TcpStream::connect(served.address).unwrap();
    slow_head.write_all(b"POST /v1/completions HTTP/1.1\r\n").unwrap();
    let mut slow_body = TcpStream::connect(served.address).unwrap();
    slow_body
        .write_all(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
        )
        .unwrap();
    let start = Instant::now();
    for (socket, expected) in [(&mut slow_head, ""), (&mut slow_body, "HTTP/1.1 408 ")] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with(expected), "{answer}");
    }
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn stopping_lets_running_answers_finish_and_refuses_those_who_wait() {
    let mut served = Served::start(|options| options.max_concurrency = 1);
    let prompt = "Tell me about a mouse.";
    let mut body = chat(prompt, 60);
    body["stream"] = json!(true);
    let mut running = open(&served, &body);
    running.next_data().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| served.post("/v1/chat/completions", &chat("A cat.", 2)));
        served.wait_for("candle_coreml_queue_length", 1.0);
        served.begin_to_stop();
        let (status, body) = waiting.join().unwrap();
        assert_eq!((status, &body["error"]["code"]), (503, &json!("stopping")));
    });
    let mut chunks = Vec::new();
    while let Some(data) = running.next_data() {
        if data != "[DONE]" {
            chunks.push(serde_json::from_str(&data).unwrap());
        }
    }
    assert_eq!(joined(&chunks), expected(prompt, 60).text);
    served.stop();
    assert!(TcpStream::connect(served.address).is_err());
}

#[test]
fn stopping_ends_what_does_not_finish_in_time_and_says_so() {
    let mut served = Served::start(|options| options.grace = Duration::from_millis(50));
    let mut body = endless("Tell me about a mouse.");
    // In an unoptimised build too, this takes longer than the grace.
    body["max_tokens"] = json!(480);
    let mut stream = open(&served, &body);
    stream.next_data().unwrap();
    let took = served.stop();
    assert!(took < Duration::from_secs(20), "{took:?}");
    let rest = stream.rest();
    assert!(
        rest.contains("\"code\":\"stopping\"") && !rest.contains("[DONE]"),
        "{rest}"
    );
}
