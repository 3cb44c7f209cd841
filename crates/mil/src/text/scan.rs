//! Characters of MIL text into names, strings and number words, with positions for messages.

use std::borrow::Cow;

use crate::error::Error;

/// What is wrong at a byte of the text.
#[derive(Debug)]
pub(super) struct Fault {
    at: usize,
    problem: String,
}

pub(super) type Result<T> = std::result::Result<T, Fault>;

impl Fault {
    pub(super) fn new(at: usize, problem: impl Into<String>) -> Self {
        Fault {
            at,
            problem: problem.into(),
        }
    }

    /// The error with line and column, for the text this fault is in.
    pub(super) fn in_text(self, text: &str, path: &str) -> Error {
        let before = text.get(..self.at).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        Error::Text {
            path: path.to_string(),
            line: before.matches('\n').count() + 1,
            column: before.get(line_start..).unwrap_or("").chars().count() + 1,
            problem: self.problem,
        }
    }
}

/// A position in a text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scanner<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Scanner<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Scanner { text, at: 0 }
    }

    fn rest(&self) -> &'t str {
        self.text.get(self.at..).unwrap_or("")
    }

    /// The position of the next thing, after white space and comments.
    pub(super) fn here(&mut self) -> usize {
        loop {
            self.at += self.rest().len() - self.rest().trim_start().len();
            if !self.rest().starts_with("//") {
                return self.at;
            }
            self.at += self.rest().find('\n').unwrap_or(self.rest().len());
        }
    }

    /// The next character, without taking it.
    pub(super) fn peek(&mut self) -> Option<char> {
        self.here();
        self.rest().chars().next()
    }

    pub(super) fn fail<T>(&mut self, problem: impl Into<String>) -> Result<T> {
        Err(Fault::new(self.here(), problem))
    }

    fn fail_expecting<T>(&mut self, what: &str) -> Result<T> {
        let found = match self.peek() {
            None => "the end of the text".to_string(),
            Some(_) => {
                let word = self
                    .rest()
                    .find(char::is_whitespace)
                    .unwrap_or(self.rest().len())
                    .min(24);
                format!("{:?}", self.rest().chars().take(word.max(1)).collect::<String>())
            }
        };
        self.fail(format!("found {found}, expected {what}"))
    }

    /// Takes `symbol` if it is next.
    pub(super) fn accept(&mut self, symbol: &str) -> bool {
        self.here();
        let found = self.rest().starts_with(symbol);
        if found {
            self.at += symbol.len();
        }
        found
    }

    pub(super) fn expect(&mut self, symbol: &str) -> Result<()> {
        if self.accept(symbol) {
            Ok(())
        } else {
            self.fail_expecting(&format!("`{symbol}`"))
        }
    }

    /// A name, plain or in backquotes.
    pub(super) fn name(&mut self, what: &str) -> Result<Cow<'t, str>> {
        if self.peek() == Some('`') {
            return self.quoted('`').map(Cow::Owned);
        }
        let word = self.word();
        if super::is_plain_name(word) {
            self.at += word.len();
            return Ok(Cow::Borrowed(word));
        }
        self.fail_expecting(what)
    }

    /// Takes the keyword if it is next as a whole word.
    pub(super) fn accept_word(&mut self, keyword: &str) -> bool {
        self.here();
        let found = self.word() == keyword;
        if found {
            self.at += keyword.len();
        }
        found
    }

    fn word(&self) -> &'t str {
        let is_part = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'@' | b'.' | b':');
        let len = self.rest().bytes().take_while(|b| is_part(b)).count();
        self.rest().get(..len).unwrap_or("")
    }

    /// A number as it is written: `-12`, `0x1.8p-3`, `1.5e+3`, `-inf`, `nan`, `true`.
    pub(super) fn number_word(&mut self) -> Result<&'t str> {
        self.here();
        let bytes = self.rest().as_bytes();
        let hex = bytes.starts_with(b"0x") || bytes.starts_with(b"-0x");
        let mut len = 0;
        let mut previous = b' ';
        for b in bytes {
            let exponent = if hex { b"pP" } else { b"eE" };
            let sign = matches!(b, b'+' | b'-') && (len == 0 || exponent.contains(&previous));
            if !(sign || b.is_ascii_alphanumeric() || *b == b'.') {
                break;
            }
            previous = *b;
            len += 1;
        }
        if len == 0 {
            return self.fail_expecting("a value");
        }
        let word = self.rest().get(..len).unwrap_or("");
        self.at += len;
        Ok(word)
    }

    /// A string in double quotes. Backslash escapes are those of C; Apple's compiler writes none.
    pub(super) fn string(&mut self) -> Result<String> {
        if self.peek() != Some('"') {
            return self.fail_expecting("a string");
        }
        self.quoted('"')
    }

    fn quoted(&mut self, quote: char) -> Result<String> {
        let start = self.at;
        self.at += quote.len_utf8();
        let mut out = String::new();
        loop {
            let Some(c) = self.next_char() else {
                return Err(Fault::new(start, "the text ends inside what starts here"));
            };
            match c {
                '\\' => out.push(self.escape()?),
                c if c == quote => return Ok(out),
                c => out.push(c),
            }
        }
    }

    fn next_char(&mut self) -> Option<char> {
        let c = self.rest().chars().next()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn escape(&mut self) -> Result<char> {
        let at = self.at;
        match self.next_char() {
            Some('n') => Ok('\n'),
            Some('t') => Ok('\t'),
            Some('r') => Ok('\r'),
            Some('0') => Ok('\0'),
            Some('x') => {
                let digits = self.rest().get(..2).unwrap_or("");
                match u8::from_str_radix(digits, 16) {
                    Ok(code) if code < 128 => {
                        self.at += 2;
                        Ok(char::from(code))
                    }
                    _ => Err(Fault::new(at, "`\\x` needs two hexadecimal digits up to 7f")),
                }
            }
            Some(c) if c.is_ascii_punctuation() => Ok(c),
            _ => Err(Fault::new(
                at,
                "unknown escape; \\n, \\t, \\r, \\0, \\xHH and \\ before punctuation are known",
            )),
        }
    }

    /// An unsigned whole number.
    pub(super) fn unsigned(&mut self, what: &str) -> Result<u64> {
        let mut probe = *self;
        if !probe.peek().is_some_and(|c| c.is_ascii_digit()) {
            return self.fail_expecting(what);
        }
        let word = probe.number_word()?;
        match word.parse() {
            Ok(n) => {
                *self = probe;
                Ok(n)
            }
            Err(_) => self.fail(format!("{word} is no {what} of 64 bits")),
        }
    }
}
