//! What the server counts, as Prometheus reads it.

use prometheus_client::encoding::{EncodeLabelSet, prometheus_text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use std::time::Duration;

/// How `/metrics` is labelled for those who read it.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    route: String,
    method: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Model {
    model: String,
}

/// The counters; cloning gives another hand on the same ones.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    requests: Family<Request, Counter>,
    durations: Histogram,
    waiting: Gauge,
    active: Gauge,
    states: Gauge,
    prompt_tokens: Family<Model, Counter>,
    reused_tokens: Family<Model, Counter>,
    generated_tokens: Family<Model, Counter>,
    cancelled: Family<Model, Counter>,
    first_token: Histogram,
    speed: Histogram,
}

/// Work at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    /// Texts that wait.
    pub waiting: usize,
    /// Texts being generated.
    pub active: usize,
    /// States held, those of idle conversations included.
    pub states: usize,
}

/// A finished text in numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Text {
    pub prompt_tokens: usize,
    pub reused_tokens: usize,
    pub tokens: usize,
    pub tokens_per_s: f64,
    pub cancelled: bool,
}

impl Metrics {
    pub fn new() -> Self {
        let seconds = [
            0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
        ];
        let speeds = [
            1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0,
        ];
        Metrics {
            requests: Family::default(),
            durations: Histogram::new(seconds),
            waiting: Gauge::default(),
            active: Gauge::default(),
            states: Gauge::default(),
            prompt_tokens: Family::default(),
            reused_tokens: Family::default(),
            generated_tokens: Family::default(),
            cancelled: Family::default(),
            first_token: Histogram::new(seconds),
            speed: Histogram::new(speeds),
        }
    }

    fn registry(&self) -> Registry {
        let mut all = Registry::with_prefix("candle_coreml");
        all.register("requests", "Requests by route and status", self.requests.clone());
        let durations = self.durations.clone();
        let what = "Time from a request to the start of its response";
        all.register_with_unit("request_duration", what, Unit::Seconds, durations);
        all.register("queue_length", "Texts that wait", self.waiting.clone());
        all.register("active", "Texts being generated", self.active.clone());
        let what = "Conversation states held, idle ones included";
        all.register("states", what, self.states.clone());
        let what = "Tokens of prompts";
        all.register("prompt_tokens", what, self.prompt_tokens.clone());
        let what = "Tokens of prompts that an earlier prompt had computed";
        all.register("reused_prompt_tokens", what, self.reused_tokens.clone());
        all.register(
            "generated_tokens",
            "Tokens generated",
            self.generated_tokens.clone(),
        );
        let what = "Texts ended because their client went away, the time was up or the server stopped";
        all.register("cancelled", what, self.cancelled.clone());
        let first = self.first_token.clone();
        let what = "Time from a request to the first token of its text, waiting included";
        all.register_with_unit("time_to_first_token", what, Unit::Seconds, first);
        let what = "Tokens a second of each text, other texts' turns not counted";
        all.register("tokens_per_second", what, self.speed.clone());
        all
    }

    pub fn request(&self, route: &str, method: &str, status: u16, took: Duration) {
        let label = Request {
            route: route.to_owned(),
            method: method.to_owned(),
            status,
        };
        self.requests.get_or_create(&label).inc();
        self.durations.observe(took.as_secs_f64());
    }

    pub fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
    }

    pub fn text(&self, model: &str, text: &Text) {
        let label = Model {
            model: model.to_owned(),
        };
        for (family, count) in [
            (&self.prompt_tokens, text.prompt_tokens),
            (&self.reused_tokens, text.reused_tokens),
            (&self.generated_tokens, text.tokens),
            (&self.cancelled, usize::from(text.cancelled)),
        ] {
            let count = u64::try_from(count).unwrap_or(u64::MAX);
            family.get_or_create(&label).inc_by(count);
        }
        if text.tokens_per_s > 0.0 {
            self.speed.observe(text.tokens_per_s);
        }
    }

    /// All of it as text.
    pub fn print(&self, load: Load) -> Result<String, std::fmt::Error> {
        for (gauge, value) in [
            (&self.waiting, load.waiting),
            (&self.active, load.active),
            (&self.states, load.states),
        ] {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry())?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_printed_with_their_names_and_labels() {
        let metrics = Metrics::new();
        metrics.request("/v1/models", "GET", 200, Duration::from_millis(2));
        metrics.first_token(Duration::from_millis(40));
        metrics.text(
            "tales",
            &Text {
                prompt_tokens: 30,
                reused_tokens: 20,
                tokens: 9,
                tokens_per_s: 150.0,
                cancelled: false,
            },
        );
        let text = metrics
            .print(Load {
                waiting: 1,
                active: 2,
                states: 3,
            })
            .unwrap();
        let mut missing = Vec::new();
        for line in [
            "candle_coreml_requests_total{route=\"/v1/models\",method=\"GET\",status=\"200\"} 1",
            "candle_coreml_request_duration_seconds_count 1",
            "candle_coreml_queue_length 1",
            "candle_coreml_active 2",
            "candle_coreml_states 3",
            "candle_coreml_prompt_tokens_total{model=\"tales\"} 30",
            "candle_coreml_reused_prompt_tokens_total{model=\"tales\"} 20",
            "candle_coreml_generated_tokens_total{model=\"tales\"} 9",
            "candle_coreml_cancelled_total{model=\"tales\"} 0",
            "candle_coreml_time_to_first_token_seconds_bucket{le=\"0.05\"} 1",
            "candle_coreml_tokens_per_second_bucket{le=\"100\"} 0",
            "candle_coreml_tokens_per_second_bucket{le=\"200\"} 1",
        ] {
            if !text.lines().any(|l| l == line) {
                missing.push(line);
            }
        }
        assert!(missing.is_empty(), "{missing:#?} in\n{text}");
    }
}
