//! What a server says of itself on standard error.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Prints what the server logs, one line each; warnings alone where `quiet`.
pub fn install(quiet: bool) {
    let level = if quiet {
        LevelFilter::WARN
    } else {
        LevelFilter::INFO
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false);
    let targets = Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("candle_coreml_server", level);
    // Another subscriber would have been set by whoever runs this as a library.
    let _ = tracing_subscriber::registry()
        .with(lines)
        .with(targets)
        .try_init();
}
