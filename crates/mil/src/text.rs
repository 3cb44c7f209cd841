//! MIL text, the form of programs in compiled models: both dialects, both ways.

mod float;
mod literal;
mod parse;
mod print;
mod scan;

pub use parse::parse_program;
pub use print::print_program;

/// Operation sets by their names in text and in the protobuf.
const OPSETS: [(&str, &str); 5] = [
    ("ios15", "CoreML5"),
    ("ios16", "CoreML6"),
    ("ios17", "CoreML7"),
    ("ios18", "CoreML8"),
    ("ios26", "CoreML9"),
];

/// Whether a name can stand in text as it is; others are written in backquotes, which is this crate's addition.
fn is_plain_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'@' | b'.' | b':'))
}
