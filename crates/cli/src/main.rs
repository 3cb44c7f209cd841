//! The `candle-coreml` command.

mod args;
mod bench;
mod chat;
mod convert;
mod demo;
mod embed;
mod eval;
mod explain;
mod failure;
mod generate;
#[cfg(feature = "hub")]
mod hub;
mod inputs;
mod inspect;
mod interrupt;
mod model_facts;
mod npy;
mod ops;
mod picture;
mod plan;
mod predict;
mod terminal;
mod trace;
mod verify;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::Parser;
use failure::Outcome;

fn main() -> ExitCode {
    #[allow(
        unused_mut,
        reason = "names of the hub become paths where the hub is compiled in"
    )]
    let mut cli = Cli::parse();
    #[cfg(feature = "hub")]
    if let Err(failure) = hub::resolve(&mut cli.command, cli.offline) {
        return finish(Err(failure));
    }
    let outcome = match cli.command {
        Command::Inspect { model, json } => inspect::run(&model, json),
        Command::Ops { model, json } => ops::run(&model, json),
        Command::Predict(args) => predict::run(&args),
        Command::Trace(args) => trace::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Embed(args) => embed::run(&args),
        #[cfg(feature = "hub")]
        Command::Pull(args) => hub::pull(&args, cli.offline),
        #[cfg(feature = "hub")]
        Command::List(args) => hub::list(&args),
        #[cfg(feature = "hub")]
        Command::Rm(args) => hub::rm(&args),
        Command::Eval(command) => eval::run(&command),
        Command::Convert(args) => convert::run(&args),
        Command::Compress(args) => convert::compress::run(&args),
    };
    finish(outcome)
}

fn finish(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(code) => ExitCode::from(code),
        // Whoever read the output has enough of it.
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            terminal::error(failure.message());
            ExitCode::from(failure.code())
        }
    }
}
