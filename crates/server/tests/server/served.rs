//! A server with the demo model on a free port of this machine, and what asks it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use candle_coreml_llm::{
    Bundle, ChatTemplate, Completion, EmbeddingModel, EmbeddingOptions, GenerateOptions, Message,
};
use candle_coreml_server::{Error, Handle, Model, Options, Server};
use serde_json::{Value, json};

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A template that teaches tools and thinking, for a model that has learnt neither.
pub const TOOLS_TEMPLATE: &str = "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}\
     <tool_call>{\"name\": …}</tool_call><|im_end|>\n{% endif %}\
     {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking %}<think>{% endif %}{% endif %}";

pub fn tales() -> Bundle {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tales");
    Bundle::open(folder).unwrap()
}

/// A running server; dropping it stops it.
pub struct Served {
    pub address: SocketAddr,
    handle: Handle,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Served {
    /// `tales`, and the same weights as `tools` with a template that knows tools.
    pub fn start(change: impl FnOnce(&mut Options)) -> Self {
        let bundle = tales();
        let load = Default::default();
        let template = ChatTemplate::parse(TOOLS_TEMPLATE, Default::default()).unwrap();
        let session = bundle.session(&load).unwrap();
        let tools = Model::new("tools", session.fork().unwrap(), Some(Arc::new(template)));
        let tales = Model::new("tales", session, Some(Arc::clone(bundle.template().unwrap())));
        Served::with(vec![tales, tools], change)
    }

    pub fn with(models: Vec<Model>, change: impl FnOnce(&mut Options)) -> Self {
        let mut options = Options::default();
        options.address.set_port(0);
        change(&mut options);
        let server = Server::bind(models, options).unwrap();
        let (address, handle) = (server.address(), server.handle());
        Served {
            address,
            handle,
            thread: Some(std::thread::spawn(move || server.run())),
        }
    }

    /// Stops it and waits until it has.
    pub fn stop(&mut self) -> Duration {
        let start = Instant::now();
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
        start.elapsed()
    }

    /// Tells it to stop and does not wait.
    pub fn begin_to_stop(&self) {
        self.handle.stop();
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        self.ask("GET", path, &[], "")
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let json = [("Content-Type", "application/json")];
        self.ask("POST", path, &json, &body.to_string())
    }

    pub fn text(&self, path: &str) -> String {
        let agent = agent();
        let mut response = agent
            .get(format!("http://{}{path}", self.address))
            .call()
            .unwrap();
        response.body_mut().read_to_string().unwrap()
    }

    /// Any request: its status and its body as JSON.
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> (u16, Value) {
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = agent().run(request.body(body.to_owned()).unwrap()).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        (response.status().as_u16(), value)
    }

    /// A streamed answer, read to its end: its chunks, `[DONE]` left out.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut stream = Stream::open(self.address, path, body);
        let mut chunks = Vec::new();
        while let Some(data) = stream.next_data() {
            if data == "[DONE]" {
                return chunks;
            }
            chunks.push(serde_json::from_str(&data).unwrap());
        }
        panic!("the stream broke off after {chunks:?}");
    }

    /// The value of a metric without labels, or the sum over its labels.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.text("/metrics");
        let of = |line: &str| {
            let (found, value) = line.rsplit_once(' ')?;
            let bare = found.split('{').next()?;
            (bare == name).then(|| value.parse::<f64>().ok()).flatten()
        };
        text.lines().filter_map(of).sum()
    }

    /// Waits until a metric has a value.
    pub fn wait_for(&self, name: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name) != value {
            assert!(start.elapsed() < PATIENCE, "{name} is {}", self.metric(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(PATIENCE))
        .build()
        .into()
}

/// A streamed answer on a connection of its own.
pub struct Stream {
    lines: BufReader<TcpStream>,
    pub status: u16,
}

impl Stream {
    pub fn open(address: SocketAddr, path: &str, body: &Value) -> Self {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.to_string();
        write!(
            socket,
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut lines = BufReader::new(socket);
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap().parse().unwrap();
        while line.trim() != "" {
            line.clear();
            lines.read_line(&mut line).unwrap();
        }
        Stream { lines, status }
    }

    /// The data of the next event; none at the end.
    pub fn next_data(&mut self) -> Option<String> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            // Lines between those of events are lengths of chunks.
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end().to_owned());
            }
        }
    }

    pub fn rest(mut self) -> String {
        let mut text = String::new();
        self.lines.read_to_string(&mut text).unwrap();
        text
    }
}

/// A greedy chat of one message.
pub fn chat(content: &str, max_tokens: usize) -> Value {
    json!({
        "model": "tales",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
    })
}

/// What a session says to it.
pub fn expected(content: &str, max_tokens: usize) -> Completion {
    let bundle = tales();
    let text = bundle
        .template()
        .unwrap()
        .render(&[Message::user(content)], true)
        .unwrap();
    let prompt = bundle.tokenizer().encode(&text).unwrap();
    let options = GenerateOptions {
        max_tokens,
        ..GenerateOptions::default()
    };
    bundle
        .session(&Default::default())
        .unwrap()
        .generate_with(&prompt, &options, |_| std::ops::ControlFlow::Continue(()))
        .unwrap()
}

/// The text of a stream's chunks.
pub fn joined(chunks: &[Value]) -> String {
    let content = |chunk: &Value| {
        chunk
            .pointer("/choices/0/delta/content")?
            .as_str()
            .map(str::to_owned)
    };
    chunks.iter().filter_map(content).collect()
}

/// A small encoder of the language-model crate's tests.
pub fn encoder() -> EmbeddingModel {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../llm/testdata/encoders/ranged");
    EmbeddingModel::open(folder, &EmbeddingOptions::default()).unwrap()
}
