//! Options of `serve`.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use candle_coreml_server::Options;
use clap::Args;

use crate::args::EngineArgs;

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Language-model folders, or folders of text encoders, or their names on the hub; NAME=FOLDER serves one under another name.
    #[arg(value_name = "BUNDLE")]
    pub bundles: Vec<Named>,
    /// A text encoder, for embeddings. May be given several times.
    #[arg(long, value_name = "FOLDER")]
    pub embedding: Vec<Named>,
    /// The address to listen on; 127.0.0.1 is reached from this machine only, 0.0.0.0 from everywhere.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// The port; 0 takes a free one.
    #[arg(long, value_name = "N", default_value_t = 8080)]
    pub port: u16,
    /// A key that requests must bring; also from CANDLE_COREML_API_KEY. May be given several times.
    #[arg(long, value_name = "KEY")]
    pub api_key: Vec<String>,
    /// An origin whose pages may ask from a browser; * for all. May be given several times.
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// Most texts generated at a time, each with a state of its own.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = one_or_more())]
    pub max_concurrency: usize,
    /// Most texts that wait; further ones are refused.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub queue: usize,
    /// Threads that step the texts.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = one_or_more())]
    pub workers: usize,
    /// Most tokens of an answer; without it the context is the limit.
    #[arg(long, value_name = "N", value_parser = one_or_more())]
    pub max_tokens: Option<usize>,
    /// Most KiB of a request.
    #[arg(long, value_name = "KIB", default_value_t = 2048, value_parser = one_or_more())]
    pub max_body: usize,
    /// Seconds a request may take; its text ends then as if it had its number of tokens.
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// Seconds that running answers have left when the server is told to stop.
    #[arg(long, value_name = "S", default_value_t = 30)]
    pub grace: u64,
    /// Log warnings alone.
    #[arg(long, short = 'q')]
    pub quiet: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// A model and the name it is served under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub name: String,
    pub path: PathBuf,
}

impl FromStr for Named {
    type Err = Infallible;

    /// `NAME=PATH`; or a path, whose last part is the name; or `ORG/NAME` of the hub, which is the name without its revision.
    fn from_str(given: &str) -> Result<Self, Infallible> {
        if let Some((name, path)) = given.split_once('=')
            && !name.is_empty()
            && !Path::new(given).exists()
        {
            return Ok(Named {
                name: name.to_owned(),
                path: path.into(),
            });
        }
        let found = Path::new(given).canonicalize().ok();
        let name = match found.as_deref().and_then(Path::file_stem) {
            Some(last) => last.to_string_lossy().into_owned(),
            None => given.split('@').next().unwrap_or(given).to_owned(),
        };
        Ok(Named {
            name,
            path: given.into(),
        })
    }
}

fn one_or_more() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(1..)
}

impl ServeArgs {
    pub fn options(&self) -> Options {
        let mut options = Options::default();
        options.address = SocketAddr::new(self.host, self.port);
        options.api_keys.clone_from(&self.api_key);
        options.cors_origins.clone_from(&self.cors_origin);
        options.max_concurrency = self.max_concurrency;
        options.queue = self.queue;
        options.workers = self.workers;
        options.max_tokens = self.max_tokens;
        options.max_body_bytes = self.max_body.saturating_mul(1024);
        options.request_timeout = Duration::from_secs(self.timeout);
        options.grace = Duration::from_secs(self.grace);
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_by_whoever_starts_the_server_or_by_their_folders_or_by_the_hub() {
        for (given, name, path) in [
            ("story=../../models/tales", "story", "../../models/tales"),
            ("../../models/tales", "tales", "../../models/tales"),
            ("org/name@v2", "org/name", "org/name@v2"),
            ("small=org/name@v2", "small", "org/name@v2"),
        ] {
            let expected = Named {
                name: name.to_owned(),
                path: path.into(),
            };
            assert_eq!(given.parse(), Ok(expected), "{given}");
        }
    }
}
