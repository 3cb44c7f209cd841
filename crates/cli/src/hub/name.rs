//! Names of models on the hub: `ORG/NAME`, `ORG/NAME@REVISION`.

use std::fmt;

/// Endings of files and folders that are models themselves: such a word is a path with a mistake, not a name.
const PATHS: [&str; 6] = [
    ".mlpackage",
    ".mlmodelc",
    ".mlmodel",
    ".gguf",
    ".safetensors",
    ".json",
];
/// What is taken without a revision.
const DEFAULT_REVISION: &str = "main";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    pub organisation: String,
    pub model: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl Name {
    /// True when `text` could be meant as a name: two words with a slash between them.
    pub fn looks_like(text: &str) -> bool {
        let name = text.split('@').next().unwrap_or_default();
        let words: Vec<&str> = name.split('/').collect();
        words.len() == 2
            && words.iter().all(|word| is_word(word))
            && !PATHS.iter().any(|ending| name.ends_with(ending))
    }

    /// Reads a name; `Err` says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, revision),
            None => (text, DEFAULT_REVISION),
        };
        if !Name::looks_like(text) {
            return Err(format!(
                "{text:?} is no name of a model; allowed: ORG/NAME or ORG/NAME@REVISION"
            ));
        }
        if !revision.split('/').all(is_word) {
            return Err(format!(
                "{text:?}: {revision:?} is no revision; allowed: a branch, a tag or a commit"
            ));
        }
        let (organisation, model) = name.split_once('/').unwrap_or_default();
        Ok(Name {
            organisation: organisation.to_owned(),
            model: model.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// `ORG/NAME`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.organisation, self.model)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.organisation, self.model)?;
        match self.revision.as_str() {
            DEFAULT_REVISION => Ok(()),
            revision => write!(f, "@{revision}"),
        }
    }
}

/// True for the 40 hexadecimal digits of a commit.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hex(text)
}

/// True for small hexadecimal digits alone.
pub fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_word(word: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    !word.is_empty() && word.bytes().all(allowed) && !word.starts_with('.') && !word.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for (text, expected) in [
            ("org/name", Some("org/name main")),
            ("org/Name-1.5_x@v1.0", Some("org/Name-1.5_x v1.0")),
            ("org/name@refs/pr/1", Some("org/name refs/pr/1")),
            ("org/name@", None),
            ("org/name@../x", None),
            ("org/..", None),
            ("name", None),
            ("./name", None),
            ("/org/name", None),
            ("a/b/c", None),
            ("org/model.mlpackage", None),
            ("org/na me", None),
        ] {
            let found = Name::parse(text).ok();
            let found = found.map(|n| format!("{} {}", n.repository(), n.revision));
            assert_eq!(found.as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn only_forty_digits_are_a_commit() {
        assert!(is_commit("0123456789abcdef0123456789abcdef01234567"));
        assert!(!is_commit("0123456") && !is_commit(&"G".repeat(40)));
        assert_eq!(Name::parse("a/b@main").unwrap().to_string(), "a/b");
        assert_eq!(Name::parse("a/b@v1").unwrap().to_string(), "a/b@v1");
    }
}
