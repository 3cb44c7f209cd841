//! The `candle-coreml` command.

fn main() {}
