//! The tokenizer of an encoder: `tokenizer.json`, or BERT's `vocab.txt`.

use serde_json::{Value, json};

use crate::bundle::Files;
use crate::{Error, Tokenizer};

/// Reads `tokenizer.json`, otherwise builds BERT's tokenizer of `vocab.txt`.
pub(super) fn read(files: &Files) -> Result<Tokenizer, Error> {
    if let Some(json) = files.read("tokenizer.json")? {
        return Tokenizer::parse(&files.full_name("tokenizer.json"), &json);
    }
    let Some(vocabulary) = files.read("vocab.txt")? else {
        return Err(Error::MissingFile {
            bundle: files.name(),
            file: "tokenizer.json".to_owned(),
            purpose: "vocabulary and rules of the text; BERT's vocab.txt does as well",
        });
    };
    let file = files.full_name("vocab.txt");
    let malformed = |reason: String| Error::Malformed {
        file: file.clone(),
        reason,
    };
    let text = String::from_utf8(vocabulary.to_vec()).map_err(|e| malformed(e.to_string()))?;
    let config = files.json("tokenizer_config.json")?;
    let json = word_pieces(&text, &config).map_err(malformed)?;
    Tokenizer::parse(&file, json.to_string().as_bytes())
}

/// The `tokenizer.json` of a vocabulary of one token a line, with the rules of the first BERT.
fn word_pieces(text: &str, config: &Value) -> Result<Value, String> {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let mut vocabulary = serde_json::Map::new();
    for (id, token) in lines.iter().enumerate() {
        vocabulary.entry(*token).or_insert_with(|| id.into());
    }
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let id = |token: &str| vocabulary.get(token).cloned();
    for needed in ["[UNK]", "[CLS]", "[SEP]"] {
        id(needed).ok_or_else(|| format!("no line is {needed}"))?;
    }
    let added = special.iter().filter_map(|token| {
        let id = id(token)?;
        Some(
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}),
        )
    });
    let added: Vec<Value> = added.collect();
    let lower = config
        .get("do_lower_case")
        .and_then(Value::as_bool)
        .unwrap_or(true);
    let accents = config.get("strip_accents").cloned().unwrap_or(Value::Null);
    let chinese = config
        .get("tokenize_chinese_chars")
        .and_then(Value::as_bool)
        .unwrap_or(true);
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": chinese,
            "strip_accents": accents, "lowercase": lower},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", id("[SEP]")], "cls": ["[CLS]", id("[CLS]")]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn files(files: &[(&str, &str)]) -> Files {
        let files = files
            .iter()
            .map(|(name, text)| ((*name).to_owned(), Bytes::from((*text).to_owned())));
        Files::memory("m", files)
    }

    const VOCABULARY: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\nplay\n##ing\nPlay\n!\n";

    #[test]
    fn a_vocabulary_of_bert_is_a_tokenizer() {
        let tokenizer = read(&files(&[("vocab.txt", VOCABULARY)])).unwrap();
        let found = tokenizer.encode_whole("Playing, play!", 16).unwrap();
        assert_eq!(found.0, [2, 4, 5, 1, 4, 7, 3]);
        let cased = [
            ("vocab.txt", VOCABULARY),
            ("tokenizer_config.json", r#"{"do_lower_case": false}"#),
        ];
        let found = read(&files(&cased)).unwrap().encode_whole("Playing", 16).unwrap();
        assert_eq!(found.0, [2, 6, 5, 3]);
    }

    #[test]
    fn long_texts_lose_their_end_and_keep_what_surrounds_them() {
        let tokenizer = read(&files(&[("vocab.txt", VOCABULARY)])).unwrap();
        let (ids, types, cut) = tokenizer.encode_whole("play ! playing !", 4).unwrap();
        assert_eq!((ids, types, cut), (vec![2, 4, 7, 3], vec![0; 4], 3));
        assert_eq!(tokenizer.encode_whole("", 4).unwrap().0, [2, 3]);
        assert_eq!(tokenizer.added_tokens(), 2);
    }

    #[test]
    fn a_folder_without_a_vocabulary_is_refused_with_the_file_that_is_missing() {
        let error = read(&files(&[])).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        let error = read(&files(&[("vocab.txt", "a\nb\n")])).unwrap_err().to_string();
        assert!(error.contains("vocab.txt") && error.contains("[UNK]"), "{error}");
    }
}
