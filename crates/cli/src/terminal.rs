//! What people see: colours where there is a terminal, progress on standard error.

use std::fmt::Display;
use std::io::{self, Write};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressStyle};

/// Headings and names.
pub const STRONG: Style = Style::new().bold();
/// Things of less weight.
pub const FAINT: Style = Style::new().dimmed();
const RED: Style = AnsiColor::Red.on_default().bold();
/// Good and bad, in tables.
pub const GOOD: Style = AnsiColor::Green.on_default();
pub const BAD: Style = AnsiColor::Red.on_default();

/// Standard output; styles are left out where it is no terminal.
pub fn out() -> impl Write {
    anstream::AutoStream::auto(io::stdout())
}

/// `text` in `style`.
pub fn styled(style: Style, text: impl Display) -> String {
    format!("{style}{text}{style:#}")
}

/// Says why the command failed.
pub fn error(message: &str) {
    // Nothing is left to do when standard error is closed.
    let _ = writeln!(
        anstream::AutoStream::auto(io::stderr()),
        "{} {message}",
        styled(RED, "error:")
    );
}

/// Says something beside the result.
pub fn note(message: &str) {
    let _ = writeln!(
        anstream::AutoStream::auto(io::stderr()),
        "{}",
        styled(FAINT, message)
    );
}

/// A spinner while something of unknown length runs; nothing where standard error is no terminal.
pub fn spinner(what: impl Into<std::borrow::Cow<'static, str>>) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// A bar over `total` steps; nothing where standard error is no terminal.
pub fn bar(what: impl Into<std::borrow::Cow<'static, str>>, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}");
    let style = style.expect("the template is a constant that indicatif understands");
    ProgressBar::new(total).with_style(style).with_message(what)
}

/// Bytes as people read them: `7.34 MiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["B", "KiB", "MiB", "GiB"];
    let mut size = count as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{size:.2} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (count, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.50 KiB"),
            (7 << 20, "7.00 MiB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
    }
}
