//! Strings that end a text, wherever tokens cut them.

/// Holds back text that may be the start of a stop string.
#[derive(Debug, Default)]
pub(crate) struct Stops {
    strings: Vec<String>,
    held: String,
}

impl Stops {
    pub fn new(strings: &[String]) -> Self {
        Stops {
            strings: strings.to_vec(),
            held: String::new(),
        }
    }

    /// Takes new text; gives what is certain not to be part of a stop string, and whether one was found. The text before
    /// it is given, itself and what follows are not.
    pub fn push(&mut self, text: String) -> (String, bool) {
        if self.strings.is_empty() {
            return (text, false);
        }
        self.held.push_str(&text);
        let found = self
            .strings
            .iter()
            .filter_map(|s| self.held.find(s.as_str()))
            .min();
        if let Some(at) = found {
            let mut out = std::mem::take(&mut self.held);
            out.truncate(at);
            return (out, true);
        }
        let waiting = self.strings.iter().map(|s| self.overlap(s)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - waiting);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, when the text ends otherwise.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that a stop string begins with.
    fn overlap(&self, stop: &str) -> usize {
        let starts = stop.char_indices().map(|(at, _)| at).skip(1);
        let fits = |&at: &usize| self.held.ends_with(&stop[..at]);
        starts.filter(fits).last().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_string_is_found_however_it_is_cut() {
        let text = "one two\n\nUser: three é";
        for size in 1..text.len() {
            let mut stops = Stops::new(&["User:".to_string(), "\n\nUser".to_string()]);
            let (mut out, mut found) = (String::new(), false);
            let mut piece = String::new();
            for c in text.chars() {
                piece.push(c);
                if piece.len() >= size && !found {
                    let (text, stop) = stops.push(std::mem::take(&mut piece));
                    out.push_str(&text);
                    found = stop;
                }
            }
            if !found {
                let (text, stop) = stops.push(piece);
                out.push_str(&text);
                found = stop;
            }
            assert_eq!((out.as_str(), found), ("one two", true), "pieces of {size} bytes");
        }
    }

    #[test]
    fn text_that_only_begins_like_a_stop_string_comes_in_the_end() {
        let mut stops = Stops::new(&["abcd".to_string(), "éé".to_string()]);
        assert_eq!(stops.push("xab".into()), ("x".into(), false));
        assert_eq!(stops.push("ab".into()), ("ab".into(), false));
        assert_eq!(stops.push("cé".into()), ("abc".into(), false));
        assert_eq!(stops.flush(), "é");
        assert_eq!(Stops::new(&[]).push("abc".into()), ("abc".into(), false));
    }
}
