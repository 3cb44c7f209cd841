//! Clients that stream at once for minutes, and misbehave: every answer is compared with a session's, memory is watched.
//!
//!     cargo run --release -p candle-coreml-server --example soak -- --minutes 10 --clients 16

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_coreml_llm::{Bundle, GenerateOptions, Message, Session};
use candle_coreml_server::{Model, Options, Server};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const ANIMALS: [&str; 12] = [
    "mouse", "cat", "bear", "fox", "bird", "dog", "frog", "duck", "horse", "owl", "rabbit", "snail",
];
const LENGTHS: [usize; 3] = [12, 40, 90];
/// Between two measurements of memory.
const PERIOD: Duration = Duration::from_secs(5);
/// What memory may grow by between the end of the first quarter and the end: pieces of the allocator, not texts kept.
const GROWTH_BYTES: u64 = 24 << 20;

fn main() -> Result<()> {
    let (minutes, clients) = arguments()?;
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tales");
    let bundle = Bundle::open(folder)?;
    let answers = answers(&bundle)?;
    let server = serve(&bundle, clients)?;
    let (address, handle) = (server.address(), server.handle());
    let running = std::thread::spawn(move || server.run());
    let soak = Soak {
        address,
        answers,
        end: Instant::now() + Duration::from_secs_f64(minutes * 60.0),
        failed: AtomicBool::new(false),
        counts: Mutex::default(),
    };
    println!("{clients} clients on http://{address} for {minutes} minutes");
    let memory = soak.run(clients);
    let after = soak.check_last();
    handle.stop();
    running.join().map_err(|_| "the server panicked")??;
    soak.report(&memory)?;
    after
}

fn arguments() -> Result<(f64, usize)> {
    let (mut minutes, mut clients) = (10.0, 16);
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given.next().ok_or("--minutes M --clients N")?;
        match name.as_str() {
            "--minutes" => minutes = value.parse()?,
            "--clients" => clients = value.parse()?,
            _ => return Err("--minutes M --clients N".into()),
        }
    }
    Ok((minutes, clients))
}

fn serve(bundle: &Bundle, clients: usize) -> Result<Server> {
    let mut options = Options::default();
    options.address.set_port(0);
    options.max_concurrency = clients.div_ceil(2);
    options.queue = clients * 2;
    options.max_body_bytes = 256 << 10;
    options.io_timeout = Duration::from_secs(3);
    let model = Model::open("tales", bundle, &Default::default())?;
    Ok(Server::bind(vec![model], options)?)
}

/// What a session says to every prompt, by prompt and length.
fn answers(bundle: &Bundle) -> Result<BTreeMap<(String, usize), String>> {
    let mut session: Session = bundle.session(&Default::default())?;
    let mut answers = BTreeMap::new();
    for animal in ANIMALS {
        let prompt = format!("Tell me a story about a {animal}.");
        let text = bundle.template()?.render(&[Message::user(&prompt)], true)?;
        let ids = bundle.tokenizer().encode(&text)?;
        for max_tokens in LENGTHS {
            let options = GenerateOptions {
                max_tokens,
                ..GenerateOptions::default()
            };
            session.reset();
            let done = session.generate_with(&ids, &options, |_| ControlFlow::Continue(()))?;
            answers.insert((prompt.clone(), max_tokens), done.text);
        }
    }
    Ok(answers)
}

struct Soak {
    address: SocketAddr,
    answers: BTreeMap<(String, usize), String>,
    end: Instant,
    failed: AtomicBool,
    counts: Mutex<BTreeMap<&'static str, u64>>,
}

/// What a client does in a turn.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Stream,
    ReadSlowly,
    NotStream,
    LeaveEarly,
    LeaveBeforeTheAnswer,
    BadJson,
    HugeBody,
    NeverRead,
}

impl Deed {
    fn of(pick: u64) -> Self {
        match pick % 16 {
            0..=6 => Deed::Stream,
            7 => Deed::ReadSlowly,
            8 | 9 => Deed::NotStream,
            10 | 11 => Deed::LeaveEarly,
            12 => Deed::LeaveBeforeTheAnswer,
            13 => Deed::BadJson,
            14 => Deed::HugeBody,
            _ => Deed::NeverRead,
        }
    }
}

impl Soak {
    /// Lets clients loose until the time is up; gives the memory over time.
    fn run(&self, clients: usize) -> Vec<u64> {
        std::thread::scope(|scope| {
            for client in 0..clients {
                scope.spawn(move || self.client(u64::try_from(client).unwrap_or(0)));
            }
            let mut memory = vec![resident_bytes()];
            while Instant::now() < self.end && !self.failed.load(Ordering::Relaxed) {
                std::thread::sleep(PERIOD.min(self.end.saturating_duration_since(Instant::now())));
                memory.push(resident_bytes());
            }
            memory
        })
    }

    fn client(&self, number: u64) {
        // A linear congruential generator: the same deeds every time.
        let mut random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        while Instant::now() < self.end && !self.failed.load(Ordering::Relaxed) {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let pick = random >> 33;
            let deed = Deed::of(pick);
            let which = usize::try_from(pick / 16).unwrap_or(0) % self.answers.len();
            let Some(((prompt, max_tokens), answer)) = self.answers.iter().nth(which) else {
                return;
            };
            if let Err(error) = self.act(deed, prompt, *max_tokens, answer) {
                eprintln!("client {number}, {deed:?}: {error}");
                self.failed.store(true, Ordering::Relaxed);
            }
        }
    }

    fn act(&self, deed: Deed, prompt: &str, max_tokens: usize, answer: &str) -> Result<()> {
        let stream = !matches!(deed, Deed::NotStream | Deed::LeaveBeforeTheAnswer);
        let body = json!({
            "model": "tales",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": stream,
        })
        .to_string();
        let name = match deed {
            Deed::Stream => self.stream(&body, answer, Duration::ZERO)?,
            Deed::ReadSlowly => self.stream(&body, answer, Duration::from_millis(20))?,
            Deed::NotStream => self.whole(&body, answer)?,
            Deed::LeaveEarly => {
                let mut reader = BufReader::new(self.send(&body)?);
                let mut line = String::new();
                for _ in 0..12 {
                    reader.read_line(&mut line)?;
                }
                "left early"
            }
            Deed::LeaveBeforeTheAnswer => {
                self.send(&body)?;
                "left before the answer"
            }
            Deed::BadJson => {
                expect(&read(self.send("{\"messages\": [")?)?, "400")?;
                "bad JSON refused"
            }
            Deed::HugeBody => {
                expect(&read(self.send(&"x".repeat(1 << 20))?)?, "413")?;
                "huge body refused"
            }
            Deed::NeverRead => {
                let socket = self.send(&body)?;
                std::thread::sleep(Duration::from_millis(500));
                drop(socket);
                "never read"
            }
        };
        self.count(name);
        Ok(())
    }

    fn count(&self, name: &'static str) {
        if let Ok(mut counts) = self.counts.lock() {
            *counts.entry(name).or_default() += 1;
        }
    }

    fn send(&self, body: &str) -> Result<TcpStream> {
        let mut socket = TcpStream::connect(self.address)?;
        socket.set_read_timeout(Some(Duration::from_secs(120)))?;
        write!(
            socket,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        Ok(socket)
    }

    fn stream(&self, body: &str, answer: &str, pause: Duration) -> Result<&'static str> {
        let mut reader = BufReader::new(self.send(body)?);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        expect(&line, "200")?;
        let (mut text, mut done) = (String::new(), false);
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                break;
            }
            let Some(data) = line.strip_prefix("data: ").map(str::trim_end) else {
                continue;
            };
            if data == "[DONE]" {
                done = true;
                continue;
            }
            let chunk: Value = serde_json::from_str(data)?;
            let content = chunk.pointer("/choices/0/delta/content").and_then(Value::as_str);
            text.push_str(content.unwrap_or_default());
            std::thread::sleep(pause);
        }
        same(&text, answer)?;
        if !done {
            return Err("the stream broke off".into());
        }
        Ok("right answers, streamed")
    }

    fn whole(&self, body: &str, answer: &str) -> Result<&'static str> {
        let text = read(self.send(body)?)?;
        expect(&text, "200")?;
        let json = text.split("\r\n\r\n").nth(1).ok_or("no body")?;
        let value: Value = serde_json::from_str(json)?;
        let content = value
            .pointer("/choices/0/message/content")
            .and_then(Value::as_str);
        same(content.unwrap_or_default(), answer)?;
        Ok("right answers, whole")
    }

    /// After all of it the server becomes idle and answers as at first.
    fn check_last(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let mut socket = TcpStream::connect(self.address)?;
            socket.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            let text = read(socket)?;
            if text.contains("\"active\":0,\"queue_length\":0") {
                break;
            }
            if start.elapsed() > Duration::from_secs(30) {
                return Err(format!("the server is not idle: {text}").into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let ((prompt, max_tokens), answer) = self.answers.iter().next().ok_or("no answers")?;
        self.act(Deed::Stream, prompt, *max_tokens, answer)
    }

    fn report(&self, memory: &[u64]) -> Result<()> {
        if let Ok(counts) = self.counts.lock() {
            for (name, count) in counts.iter() {
                println!("{count:>8} {name}");
            }
        }
        let at = |index: usize| memory.get(index).copied().unwrap_or_default();
        let (first, early, last) = (at(0), at(memory.len() / 4), at(memory.len().saturating_sub(1)));
        println!(
            "resident memory: {} MiB at the start, {} MiB after a quarter, {} MiB at the end, {} MiB at most",
            first >> 20,
            early >> 20,
            last >> 20,
            memory.iter().copied().max().unwrap_or_default() >> 20
        );
        if self.failed.load(Ordering::Relaxed) {
            return Err("a client got what it should not".into());
        }
        if last > early + GROWTH_BYTES {
            return Err("memory grew".into());
        }
        println!("memory is flat, every answer was right");
        Ok(())
    }
}

fn read(mut socket: TcpStream) -> Result<String> {
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    Ok(text)
}

fn expect(answer: &str, status: &str) -> Result<()> {
    if answer.split(' ').nth(1) == Some(status) {
        return Ok(());
    }
    Err(format!("{answer:?} instead of {status}").into())
}

fn same(found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(format!("{found:?} instead of {expected:?}").into())
}

/// Memory of this process in use, where the system says so as Linux does; 0 elsewhere.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}
