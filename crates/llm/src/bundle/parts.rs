//! Which packages of a bundle are its embeddings, its chunks and its language head, or which one is all of them.

use super::files::Files;
use super::meta::Meta;
use crate::Error;

/// A compiled model comes first: it needs no compiling.
const ENDINGS: [&str; 2] = [".mlmodelc", ".mlpackage"];
/// More chunks than this are taken for a mistake in a file name.
const MOST_CHUNKS: usize = 256;

/// File names of the parts of a multi-component bundle, each inside the bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartFiles {
    /// Token ids to hidden states.
    pub embeddings: String,
    /// The transformer layers in the order they run.
    pub chunks: Vec<ChunkFiles>,
    /// Hidden state to logits.
    pub head: String,
}

/// File names of one chunk of layers, or of a monolith.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChunkFiles {
    /// The package with the function for one token, and with all others that have no package of their own.
    pub infer: String,
    /// The package with the function for batches, where that is another.
    pub prefill: Option<String>,
    /// The package with rotation functions, where that is another.
    pub rotated: Option<String>,
}

impl ChunkFiles {
    /// All functions in one package.
    pub(crate) fn one(file: String) -> Self {
        ChunkFiles {
            infer: file,
            prefill: None,
            rotated: None,
        }
    }

    /// The packages there are.
    pub fn packages(&self) -> impl Iterator<Item = &str> {
        let more = [&self.prefill, &self.rotated].into_iter().flatten();
        [&self.infer].into_iter().chain(more).map(String::as_str)
    }
}

impl PartFiles {
    /// Finds the parts by the names `meta` gives or leads to, otherwise by what the bundle holds.
    ///
    /// # Errors
    /// [`Error::MissingPart`] with the names tried, [`Error::IncompletePart`] for a package that is not whole,
    /// [`Error::Unsupported`] when several sets of parts lie in one bundle.
    pub(crate) fn find(files: &Files, meta: &Meta) -> Result<Self, Error> {
        let search = Search::new(files, meta)?;
        let embeddings = search.single("embeddings", "embeddings", "lut_embeddings")?;
        let chunks = search.chunks()?;
        let head = search.single("language head", "lm_head", "lut_lmhead")?;
        Ok(PartFiles {
            embeddings,
            chunks,
            head,
        })
    }

    /// The packages in the order they run.
    pub fn packages(&self) -> impl Iterator<Item = &str> {
        let chunks = self.chunks.iter().flat_map(ChunkFiles::packages);
        [self.embeddings.as_str()]
            .into_iter()
            .chain(chunks)
            .chain([self.head.as_str()])
    }
}

/// Finds the package of a monolith.
///
/// # Errors
/// As [`PartFiles::find`].
pub(crate) fn find_monolith(files: &Files, meta: &Meta) -> Result<ChunkFiles, Error> {
    let search = Search::new(files, meta)?;
    let mut names: Vec<String> = meta.word("monolithic_model").into_iter().collect();
    if let Some(prefix) = meta.word("model_prefix") {
        names.extend(search.with_luts(&format!("{prefix}_monolithic_full"), "", "lut_bits"));
    }
    let infer = match search.first_complete(&names)? {
        Some(found) => found,
        None => search.only_one("monolith", names, |stem| {
            stem.contains("monolithic") && !is_rotated(stem)
        })?,
    };
    let rotated = search.beside(&infer, |stem| is_rotated(stem).then(|| without_rotated(stem)))?;
    Ok(ChunkFiles {
        infer,
        prefill: None,
        rotated,
    })
}

/// The package `path` of a description stands for: at that place in the bundle, or of that name, with either ending.
///
/// # Errors
/// As [`PartFiles::find`].
pub(crate) fn find_named(files: &Files, part: &str, path: &str) -> Result<String, Error> {
    let meta = Meta::default();
    let search = Search::new(files, &meta)?;
    let slashes = path.replace('\\', "/");
    let name = slashes
        .rsplit('/')
        .find(|name| !name.is_empty())
        .unwrap_or_default()
        .to_owned();
    let inside = !slashes.starts_with('/') && slashes.split('/').all(|piece| piece != "..");
    let relative = inside.then(|| slashes.trim_start_matches("./").trim_end_matches('/').to_owned());
    let mut names: Vec<String> = relative
        .into_iter()
        .chain([name])
        .filter(|name| !name.is_empty())
        .collect();
    names.dedup();
    search
        .first_complete(&names)?
        .ok_or_else(|| search.missing(part, names))
}

/// Stems of all models at the top of a bundle, a package and its compiled form as one.
pub(crate) fn model_stems(files: &Files) -> Result<Vec<String>, Error> {
    let entries = files.entries()?;
    let mut stems: Vec<String> = entries
        .iter()
        .filter_map(|entry| stem(entry))
        .map(str::to_owned)
        .collect();
    stems.dedup();
    Ok(stems)
}

/// The whole package with this stem.
///
/// # Errors
/// As [`PartFiles::find`].
pub(crate) fn find_stem(files: &Files, stem: &str) -> Result<String, Error> {
    find_named(files, "model", stem)
}

/// True for names of parts of a multi-component bundle.
pub(crate) fn is_part(stem: &str) -> bool {
    let bare = without_lut(stem);
    let ends = ["embeddings", "lm_head"]
        .iter()
        .any(|word| bare == *word || bare.ends_with(&format!("_{word}")));
    ends || chunk_numbers(stem).is_some()
}

struct Search<'a> {
    files: &'a Files,
    entries: Vec<String>,
    meta: &'a Meta,
}

impl<'a> Search<'a> {
    fn new(files: &'a Files, meta: &'a Meta) -> Result<Self, Error> {
        Ok(Search {
            files,
            entries: files.entries()?,
            meta,
        })
    }

    /// The part called `{prefix}_{word}`.
    fn single(&self, part: &str, word: &str, lut_key: &str) -> Result<String, Error> {
        let mut names: Vec<String> = self.meta.word(word).into_iter().collect();
        if let Some(prefix) = self.meta.word("model_prefix") {
            names.extend(self.with_luts(&format!("{prefix}_{word}"), "", lut_key));
        }
        if let Some(found) = self.first_complete(&names)? {
            return Ok(found);
        }
        let fits = |stem: &str| {
            let stem = without_lut(stem);
            stem == word || stem.ends_with(&format!("_{word}"))
        };
        self.only_one(part, names, fits)
    }

    fn chunks(&self) -> Result<Vec<ChunkFiles>, Error> {
        let total = match self.meta.number("num_chunks").or_else(|| self.totals_seen()) {
            Some(total @ 1..=MOST_CHUNKS) => total,
            Some(total) => {
                let reason = format!("num_chunks is {total}, allowed: 1 to {MOST_CHUNKS}");
                return Err(Error::Malformed {
                    file: self.files.full_name("meta.yaml"),
                    reason,
                });
            }
            None => return Err(self.missing("chunk 1 of 1", vec!["*_FFN_PF*_chunk_01of01".to_owned()])),
        };
        (1..=total).map(|number| self.chunk(number, total)).collect()
    }

    fn chunk(&self, number: usize, total: usize) -> Result<ChunkFiles, Error> {
        let suffix = format!("_chunk_{number:02}of{total:02}");
        let mut names = Vec::new();
        if let Some(first) = self.meta.word("ffn") {
            names.extend(same_set(&first, &suffix));
        }
        if let Some(prefix) = self.meta.word("model_prefix") {
            for word in ["FFN_PF", "FFN"] {
                names.extend(self.with_luts(&format!("{prefix}_{word}"), &suffix, "lut_ffn"));
            }
        }
        let part = format!("chunk {number} of {total}");
        let ours = |stem: &str, word: &str| {
            stem.contains(word) && chunk_numbers(stem) == Some((number, total)) && !is_rotated(stem)
        };
        let infer = match self.first_complete(&names)? {
            Some(found) => found,
            None => self.only_one(&part, names, |stem| ours(stem, "FFN"))?,
        };
        let rotated = self.beside(&infer, |stem| is_rotated(stem).then(|| without_rotated(stem)))?;
        // A set that was not combined has files for batches beside those for single tokens.
        let prefill = self.beside(&infer, |stem| {
            ours(stem, "_prefill").then(|| stem.replace("_prefill", "_FFN"))
        })?;
        Ok(ChunkFiles {
            infer,
            prefill,
            rotated,
        })
    }

    /// The model whose stem `leads` to that of `file`.
    fn beside(&self, file: &str, leads: impl Fn(&str) -> Option<String>) -> Result<Option<String>, Error> {
        let wanted = stem(file).unwrap_or(file);
        let fits = |found: &&str| leads(found).is_some_and(|to| to == wanted);
        let found = self.entries.iter().filter_map(|entry| stem(entry)).find(fits);
        found.map_or(Ok(None), |found| self.first_complete(&[found.to_owned()]))
    }

    /// `stem_lutN` and `stem`, each followed by `suffix`.
    fn with_luts(&self, stem: &str, suffix: &str, lut_key: &str) -> Vec<String> {
        let lut = self
            .meta
            .lut_bits(lut_key)
            .map(|bits| format!("{stem}_lut{bits}{suffix}"));
        lut.into_iter().chain([format!("{stem}{suffix}")]).collect()
    }

    fn totals_seen(&self) -> Option<usize> {
        let stems = self.entries.iter().filter_map(|entry| stem(entry));
        stems
            .filter(|s| s.contains("FFN"))
            .find_map(chunk_numbers)
            .map(|(_, total)| total)
    }

    /// The first of `names` that is there and whole, as written or with either ending.
    fn first_complete(&self, names: &[String]) -> Result<Option<String>, Error> {
        let mut incomplete = None;
        for name in names {
            let stem = stem(name).unwrap_or(name);
            let as_written = (stem != name).then(|| name.clone());
            for candidate in as_written
                .into_iter()
                .chain(ENDINGS.map(|ending| format!("{stem}{ending}")))
            {
                match self.lacks(&candidate) {
                    _ if !self.files.contains(&candidate) => {}
                    None => return Ok(Some(candidate)),
                    Some(missing) => {
                        let file = self.files.full_name(&candidate);
                        incomplete.get_or_insert(Error::IncompletePart { file, missing });
                    }
                }
            }
        }
        incomplete.map_or(Ok(None), Err)
    }

    /// What a package needs and does not have.
    fn lacks(&self, package: &str) -> Option<&'static str> {
        let has = |file: &str| self.files.contains(&format!("{package}/{file}"));
        if package.ends_with(".mlpackage") {
            (!has("Manifest.json")).then_some("Manifest.json")
        } else {
            (!has("model.mil") && !has("coremldata.bin")).then_some("model.mil")
        }
    }

    /// The one entry whose stem `fits`; a package and its compiled form count as one.
    fn only_one(&self, part: &str, tried: Vec<String>, fits: impl Fn(&str) -> bool) -> Result<String, Error> {
        let mut stems: Vec<String> = self
            .entries
            .iter()
            .filter_map(|entry| stem(entry))
            .filter(|s| fits(s))
            .map(str::to_owned)
            .collect();
        stems.dedup();
        match stems.as_slice() {
            [] => Err(self.missing(part, tried)),
            [_] => self
                .first_complete(&stems)?
                .ok_or_else(|| self.missing(part, tried)),
            several => Err(Error::Unsupported {
                file: self.files.name(),
                what: format!(
                    "several candidates for the {part} ({}) and no meta.yaml that chooses",
                    several.join(", ")
                ),
            }),
        }
    }

    fn missing(&self, part: &str, mut tried: Vec<String>) -> Error {
        if tried.is_empty() {
            tried.push("any prefix".to_owned());
        }
        let tried = tried.into_iter().map(|name| format!("`{name}`")).collect();
        Error::MissingPart {
            bundle: self.files.name(),
            part: part.to_owned(),
            tried,
        }
    }
}

/// `name` without its ending, `None` for anything that is not a model.
fn stem(name: &str) -> Option<&str> {
    ENDINGS.iter().find_map(|ending| name.strip_suffix(ending))
}

/// `x_lut6` is `x`.
fn without_lut(stem: &str) -> &str {
    match stem.rsplit_once("_lut") {
        Some((before, bits)) if !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit()) => before,
        _ => stem,
    }
}

/// II and NN of `..._chunk_IIofNN` and `..._chunk_IIofNN_rot`.
fn chunk_numbers(stem: &str) -> Option<(usize, usize)> {
    let (number, total) = stem.rsplit_once("_chunk_")?.1.split_once("of")?;
    let total = total.strip_suffix("_rot").unwrap_or(total);
    Some((number.parse().ok()?, total.parse().ok()?))
}

/// Names of packages with rotation functions alone: `..._rot`, `..._FFN_rotate_...`.
fn is_rotated(stem: &str) -> bool {
    stem.split('_').any(|word| word == "rot" || word == "rotate")
}

fn without_rotated(stem: &str) -> String {
    let words: Vec<&str> = stem
        .split('_')
        .filter(|word| *word != "rot" && *word != "rotate")
        .collect();
    words.join("_")
}

/// The name of another chunk of the set that `first` belongs to.
fn same_set(first: &str, suffix: &str) -> Option<String> {
    let bare = stem(first).unwrap_or(first);
    let ending = first.strip_prefix(bare).unwrap_or("");
    Some(format!("{}{suffix}{ending}", bare.rsplit_once("_chunk_")?.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn bundle(packages: &[&str]) -> Files {
        let inner = |package: &&str| {
            let file = if package.ends_with("c") {
                "model.mil"
            } else {
                "Manifest.json"
            };
            let path = if package.contains('/') {
                (*package).to_owned()
            } else {
                format!("{package}/{file}")
            };
            (path, Bytes::new())
        };
        Files::memory("b", packages.iter().map(inner))
    }

    fn meta(parameters: &str) -> Meta {
        Meta::parse(
            "meta.yaml",
            format!("model_info: {{parameters: {{{parameters}}}}}").as_bytes(),
        )
        .unwrap()
    }

    #[test]
    fn parts_are_found_under_every_naming() {
        let prefix = "model_prefix: q, num_chunks: 1, lut_ffn: 6, lut_lmhead: 4";
        let two = "model_prefix: q, num_chunks: 2";
        let named =
            "embeddings: e.mlpackage, lm_head: h.mlmodelc, ffn: f_chunk_01of02.mlpackage, num_chunks: 2";
        let cases: &[(&str, &str, &[&str], &[&str])] = &[
            (
                "lookup tables in the names",
                prefix,
                &[
                    "q_embeddings.mlpackage",
                    "q_FFN_PF_lut6_chunk_01of01.mlpackage",
                    "q_lm_head_lut4.mlpackage",
                ],
                &[
                    "q_embeddings.mlpackage",
                    "q_FFN_PF_lut6_chunk_01of01.mlpackage",
                    "q_lm_head_lut4.mlpackage",
                ],
            ),
            (
                "falls back to names without tables",
                prefix,
                &[
                    "q_embeddings.mlmodelc",
                    "q_FFN_PF_chunk_01of01.mlmodelc",
                    "q_lm_head.mlmodelc",
                ],
                &[
                    "q_embeddings.mlmodelc",
                    "q_FFN_PF_chunk_01of01.mlmodelc",
                    "q_lm_head.mlmodelc",
                ],
            ),
            (
                "the compiled form first, chunks in order",
                two,
                &[
                    "q_FFN_PF_chunk_02of02.mlpackage",
                    "q_FFN_PF_chunk_01of02.mlpackage",
                    "q_FFN_PF_chunk_01of02.mlmodelc",
                    "q_embeddings.mlpackage",
                    "q_lm_head.mlpackage",
                ],
                &[
                    "q_embeddings.mlpackage",
                    "q_FFN_PF_chunk_01of02.mlmodelc",
                    "q_FFN_PF_chunk_02of02.mlpackage",
                    "q_lm_head.mlpackage",
                ],
            ),
            (
                "names as written, or with the other ending",
                named,
                &[
                    "e.mlmodelc",
                    "h.mlmodelc",
                    "f_chunk_01of02.mlpackage",
                    "f_chunk_02of02.mlmodelc",
                ],
                &[
                    "e.mlmodelc",
                    "f_chunk_01of02.mlpackage",
                    "f_chunk_02of02.mlmodelc",
                    "h.mlmodelc",
                ],
            ),
            (
                "no meta data at all",
                "",
                &[
                    "any_embeddings_lut8.mlpackage",
                    "any_FFN_PF_lut4_chunk_01of01.mlpackage",
                    "any_lm_head.mlpackage",
                ],
                &[
                    "any_embeddings_lut8.mlpackage",
                    "any_FFN_PF_lut4_chunk_01of01.mlpackage",
                    "any_lm_head.mlpackage",
                ],
            ),
            (
                "rotation functions in files of their own",
                two,
                &[
                    "q_FFN_PF_chunk_01of02.mlmodelc",
                    "q_FFN_PF_chunk_01of02_rot.mlmodelc",
                    "q_FFN_PF_chunk_02of02.mlmodelc",
                    "q_FFN_PF_chunk_02of02_rot.mlmodelc",
                    "q_embeddings.mlmodelc",
                    "q_lm_head.mlmodelc",
                ],
                &[
                    "q_embeddings.mlmodelc",
                    "q_FFN_PF_chunk_01of02.mlmodelc",
                    "q_FFN_PF_chunk_01of02_rot.mlmodelc",
                    "q_FFN_PF_chunk_02of02.mlmodelc",
                    "q_FFN_PF_chunk_02of02_rot.mlmodelc",
                    "q_lm_head.mlmodelc",
                ],
            ),
            (
                "functions that were not combined",
                "model_prefix: q, num_chunks: 1, lut_ffn: 4",
                &[
                    "q_FFN_lut4_chunk_01of01.mlpackage",
                    "q_FFN_rotate_lut4_chunk_01of01.mlpackage",
                    "q_prefill_lut4_chunk_01of01.mlpackage",
                    "q_embeddings.mlpackage",
                    "q_lm_head.mlpackage",
                ],
                &[
                    "q_embeddings.mlpackage",
                    "q_FFN_lut4_chunk_01of01.mlpackage",
                    "q_prefill_lut4_chunk_01of01.mlpackage",
                    "q_FFN_rotate_lut4_chunk_01of01.mlpackage",
                    "q_lm_head.mlpackage",
                ],
            ),
            (
                "a broken compiled form beside a whole package",
                "",
                &[
                    "a_embeddings.mlmodelc/weights",
                    "a_embeddings.mlpackage",
                    "a_FFN_PF_chunk_01of01.mlpackage",
                    "a_lm_head.mlpackage",
                ],
                &[
                    "a_embeddings.mlpackage",
                    "a_FFN_PF_chunk_01of01.mlpackage",
                    "a_lm_head.mlpackage",
                ],
            ),
        ];
        let mut failures = Vec::new();
        for (case, parameters, packages, expected) in cases {
            let found = PartFiles::find(&bundle(packages), &meta(parameters));
            let names = found.map(|p| p.packages().map(str::to_owned).collect::<Vec<_>>());
            if names
                .as_ref()
                .ok()
                .map(|n| n.iter().map(String::as_str).collect::<Vec<_>>())
                != Some(expected.to_vec())
            {
                failures.push(format!("{case}: {names:?}"));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let whole = [
            "q_embeddings.mlpackage",
            "q_FFN_PF_chunk_01of01.mlpackage",
            "q_lm_head.mlpackage",
        ];
        let cases: &[(&str, &[&str], &str)] = &[
            (
                "model_prefix: q",
                &[],
                "b: the embeddings is missing; looked for `q_embeddings`",
            ),
            (
                "model_prefix: q, num_chunks: 2",
                &whole,
                "chunk 1 of 2 is missing; looked for `q_FFN_PF_chunk_01of02`",
            ),
            (
                "model_prefix: q, num_chunks: 0",
                &whole,
                "b/meta.yaml: num_chunks is 0",
            ),
            (
                "model_prefix: q",
                &whole[..2],
                "language head is missing; looked for `q_lm_head`",
            ),
            (
                "",
                &["q_embeddings.mlpackage/x"],
                "b/q_embeddings.mlpackage: incomplete: it has no `Manifest.json`",
            ),
            (
                "",
                &["q_embeddings.mlpackage", "r_embeddings.mlpackage"],
                "several candidates for the embeddings",
            ),
        ];
        for (parameters, packages, expected) in cases {
            let error = PartFiles::find(&bundle(packages), &meta(parameters))
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{parameters} {packages:?}: {error}");
        }
    }
}
