//! Where a server listens, who may ask it, and how much of the machine it may take.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::http::HeaderValue;

use crate::Error;

/// How a server behaves. Every limit has a default that suits one machine and a few people.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Options {
    /// Where it listens; port 0 takes a free one. By default 127.0.0.1:8080, which only this machine reaches.
    pub address: SocketAddr,
    /// Keys of which a request must bring one as `Authorization: Bearer KEY`; none lets everybody in.
    pub api_keys: Vec<String>,
    /// Origins whose pages may ask from a browser, `*` for all; none for the built-in page alone.
    pub cors_origins: Vec<String>,
    /// Most texts generated at a time. Each has a state (a KV-cache) of its own, and no more states than these are kept.
    pub max_concurrency: usize,
    /// Most texts that wait for one of these; further ones are refused with 429.
    pub queue: usize,
    /// Threads that step the texts in turn. A large model keeps all cores busy with one; more help small ones.
    pub workers: usize,
    /// Most bytes of a request's body.
    pub max_body_bytes: usize,
    /// Most tokens a request may ask for; without it the model's context is the limit.
    pub max_tokens: Option<usize>,
    /// Most inputs of one request for embeddings, and most prompts of one for completions.
    pub max_inputs: usize,
    /// From a request's arrival to the end of its text; a text that takes longer ends as if it had its number of tokens.
    pub request_timeout: Duration,
    /// How long a client may take to send a request or to take what it is sent, and how long a connection may idle.
    pub io_timeout: Duration,
    /// Most connections open at a time; further ones wait.
    pub max_connections: usize,
    /// How long running texts may go on when the server is told to stop.
    pub grace: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            max_concurrency: 4,
            queue: 64,
            workers: 2,
            max_body_bytes: 2 << 20,
            max_tokens: None,
            max_inputs: 256,
            request_timeout: Duration::from_secs(600),
            io_timeout: Duration::from_secs(60),
            max_connections: 512,
            grace: Duration::from_secs(30),
        }
    }
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), Error> {
        for (option, value) in [
            ("max_concurrency", self.max_concurrency),
            ("workers", self.workers),
            ("max_body_bytes", self.max_body_bytes),
            ("max_tokens", self.max_tokens.unwrap_or(1)),
            ("max_inputs", self.max_inputs),
            ("max_connections", self.max_connections),
        ] {
            if value == 0 {
                return Err(refuse(option, "0", "1 or more"));
            }
        }
        for (option, value) in [
            ("request_timeout", self.request_timeout),
            ("io_timeout", self.io_timeout),
        ] {
            if value.is_zero() {
                return Err(refuse(option, "0", "more than no time"));
            }
        }
        if self.api_keys.iter().any(String::is_empty) {
            return Err(refuse("api_keys", "an empty key", "one character or more each"));
        }
        self.origins().map(|_| ())
    }

    /// The origins as headers; `*` is kept as it is.
    pub(crate) fn origins(&self) -> Result<Vec<HeaderValue>, Error> {
        let parse = |origin: &String| {
            let fits = origin == "*" || (origin.contains("://") && !origin.ends_with('/'));
            let header = HeaderValue::from_str(origin).ok().filter(|_| fits);
            header.ok_or_else(|| {
                refuse(
                    "cors_origins",
                    origin,
                    "origins such as https://example.org without a path, or *",
                )
            })
        };
        self.cors_origins.iter().map(parse).collect()
    }
}

fn refuse(option: &'static str, value: &str, allowed: &'static str) -> Error {
    Error::Option {
        option,
        value: value.to_owned(),
        allowed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_out_of_range_are_refused_by_name() {
        assert!(Options::default().check().is_ok());
        let mut failures = Vec::new();
        let rows: [(&str, fn(&mut Options)); 6] = [
            ("max_concurrency is 0, allowed: 1 or more", |o| {
                o.max_concurrency = 0
            }),
            ("max_tokens is 0, allowed: 1 or more", |o| o.max_tokens = Some(0)),
            ("request_timeout is 0, allowed: more than no time", |o| {
                o.request_timeout = Duration::ZERO
            }),
            (
                "api_keys is an empty key, allowed: one character or more each",
                |o| o.api_keys.push(String::new()),
            ),
            ("cors_origins is example.org, allowed: ", |o| {
                o.cors_origins.push("example.org".to_owned())
            }),
            ("cors_origins is https://example.org/, allowed: ", |o| {
                o.cors_origins.push("https://example.org/".to_owned())
            }),
        ];
        for (expected, change) in rows {
            let mut options = Options::default();
            change(&mut options);
            match options.check() {
                Err(error) if error.to_string().starts_with(expected) => {}
                other => failures.push(format!("{expected}: {other:?}")),
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
    }
}
