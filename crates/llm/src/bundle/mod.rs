//! Bundles: the files that make one language model.

mod config;
mod files;
mod layout;
mod meta;
mod model_config;
mod parts;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use candle_coreml::{ComputeUnits, CoreMLModelBuilder, EngineKind, Numerics, Source};
use candle_coreml_mil as mil;

use sha2::{Digest, Sha256};

use crate::anemll::{AnemllModel, ChunkParts, Components, Facts};
use crate::model::LanguageModel;
use crate::part::head::Vocabulary;
use crate::part::{CoreMlPart, Described, Part};
use crate::single::{PackageFacts, Stateful, Stateless};
use crate::template::{ChatTemplate, Message};
use crate::tokenizer::Tokenizer;
use crate::wiring::Wiring;
use crate::{Error, Session};
pub use config::Configs;
pub use files::Files;
pub use layout::Layout;
pub use meta::Meta;
pub use model_config::ConfiguredFiles;
pub use parts::{ChunkFiles, PartFiles};

/// From this version on, converters say in `meta.yaml` whether batched prefill is valid; before it, it is.
const SAYS_WHETHER_PREFILL_IS_VALID: [u32; 3] = [0, 3, 5];

/// The files of one language model, read and checked, its packages found but not opened.
///
/// ```no_run
/// use candle_coreml_llm::{Bundle, GenerateOptions};
///
/// let bundle = Bundle::open("models/tales")?;
/// let mut session = bundle.session(&Default::default())?;
/// let prompt = bundle.tokenizer().encode("Once upon a time")?;
/// for piece in session.generate(&prompt, &GenerateOptions::default())? {
///     print!("{}", piece?.text);
/// }
/// # Ok::<(), candle_coreml_llm::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Bundle {
    files: Files,
    meta: Meta,
    configs: Configs,
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    layout: Layout,
    end_tokens: Arc<[u32]>,
}

/// How the packages of a bundle are opened.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The engine that runs them.
    pub engine: EngineKind,
    /// The processors CoreML.framework may use.
    pub compute_units: ComputeUnits,
    /// How the portable engine computes.
    pub numerics: Numerics,
    /// Threads of the portable engine; 0 for the pool that all models share.
    pub threads: usize,
}

impl Bundle {
    /// Reads a folder, or the folder of a `ModelConfig` JSON file.
    ///
    /// # Errors
    /// [`Error::MissingFile`] and [`Error::MissingPart`] with what is not there, [`Error::Malformed`] with what cannot
    /// be read, [`Error::Unsupported`] for layouts this version does not run.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let (files, config) = located(path.as_ref())?;
        Unread::find(files, config.as_deref())?.read()
    }

    /// Reads files from wherever they are.
    ///
    /// # Errors
    /// As [`Bundle::open`].
    pub fn from_files(files: Files) -> Result<Self, Error> {
        Unread::find(files, None)?.read()
    }

    /// [`Bundle::open`] and [`Bundle::load`] together: packages are opened beside each other while the tokenizer is read, which takes as
    /// long as they do.
    ///
    /// # Errors
    /// As those two.
    pub fn open_model(
        path: impl AsRef<Path>,
        options: &LoadOptions,
    ) -> Result<(Self, Box<dyn LanguageModel>), Error> {
        let (files, config) = located(path.as_ref())?;
        Unread::find(files, config.as_deref())?.read_and_load(options)
    }

    /// [`Bundle::open_model`] for files from wherever they are.
    ///
    /// # Errors
    /// As there.
    pub fn model_from_files(
        files: Files,
        options: &LoadOptions,
    ) -> Result<(Self, Box<dyn LanguageModel>), Error> {
        Unread::find(files, None)?.read_and_load(options)
    }

    /// A hash (SHA-256, hexadecimal) of every file of its packages: what a saved conversation belongs to. Reads them all.
    ///
    /// # Errors
    /// [`Error::Read`] for files that cannot be read.
    pub fn fingerprint(&self) -> Result<String, Error> {
        let mut hash = Sha256::new();
        for part in self.layout.packages() {
            self.files.visit(part, &mut |path, bytes| {
                hash.update(path.as_bytes());
                hash.update(bytes.len().to_le_bytes());
                hash.update(bytes);
            })?;
        }
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Opens the packages and wires them.
    ///
    /// # Errors
    /// [`Error::Engine`] when a package cannot be opened or run, [`Error::Wiring`] when packages do not fit each other.
    pub fn load(&self, options: &LoadOptions) -> Result<Box<dyn LanguageModel>, Error> {
        self.load_parts(|file| open_part(&self.files, file, options))
    }

    /// Wires the parts that `open` gives.
    fn load_parts(
        &self,
        open: impl Fn(&str) -> Result<CoreMlPart, Error>,
    ) -> Result<Box<dyn LanguageModel>, Error> {
        let model: Box<dyn LanguageModel> = match self.assemble(open)? {
            Assembled::Functions(model) => Box::new(model),
            Assembled::Stateful(model) => Box::new(model),
            Assembled::Stateless(model) => Box::new(model),
        };
        self.check_vocabulary(model.vocabulary())?;
        tracing::info!(
            bundle = self.name(),
            layout = self.layout.name(),
            context = model.context_tokens(),
            "opened a language model"
        );
        Ok(model)
    }

    /// How the packages are wired, from their descriptions: nothing is compiled or run.
    ///
    /// # Errors
    /// [`Error::Engine`] when a package cannot be read, [`Error::Wiring`] when packages do not fit each other.
    pub fn wiring(&self) -> Result<Wiring, Error> {
        let describe = |file: &str| {
            let model = open_description(&self.files, file)?;
            Described::new(file, model.description())
        };
        let name = self.layout.name();
        let wiring = match self.assemble(describe)? {
            Assembled::Functions(model) => model.wiring(name),
            Assembled::Stateful(model) => model.wiring(name),
            Assembled::Stateless(model) => model.wiring(name),
        };
        self.check_vocabulary(wiring.vocabulary)?;
        Ok(wiring)
    }

    /// Wires the parts that `open` gives.
    fn assemble<P: Part>(&self, open: impl Fn(&str) -> Result<P, Error>) -> Result<Assembled<P>, Error> {
        let chunk = |chunk: &ChunkFiles| -> Result<ChunkParts<P>, Error> {
            let other = |file: &Option<String>| file.as_deref().map(&open).transpose();
            Ok(ChunkParts {
                infer: open(&chunk.infer)?,
                prefill: other(&chunk.prefill)?,
                rotated: other(&chunk.rotated)?,
            })
        };
        let parts = |parts: &PartFiles, facts: Facts| -> Result<Assembled<P>, Error> {
            let components = Components {
                embeddings: Some(open(&parts.embeddings)?),
                chunks: parts.chunks.iter().map(chunk).collect::<Result<_, _>>()?,
                head: Some(open(&parts.head)?),
                facts,
            };
            AnemllModel::new(components).map(Assembled::Functions)
        };
        match &self.layout {
            Layout::Anemll(files) => parts(files, self.facts()),
            Layout::Configured(configured) => {
                let mut facts = self.facts();
                facts.context = configured.context_tokens.or(facts.context);
                facts.vocabulary.size = configured.vocabulary.or(facts.vocabulary.size);
                facts.renamed.clone_from(&configured.inputs);
                facts.one_by_one = None;
                parts(&configured.parts, facts)
            }
            Layout::Monolith(files) => {
                let components = Components {
                    embeddings: None,
                    chunks: vec![chunk(files)?],
                    head: None,
                    facts: self.facts(),
                };
                AnemllModel::new(components).map(Assembled::Functions)
            }
            Layout::Stateful(file) => {
                Stateful::new(open(file)?, &self.package_facts()).map(Assembled::Stateful)
            }
            Layout::Stateless(file) => {
                Stateless::new(open(file)?, &self.package_facts()).map(Assembled::Stateless)
            }
        }
    }

    fn facts(&self) -> Facts {
        let single_cache = self.meta.flag("single_cache");
        Facts {
            context: self.context_tokens(),
            window: self.meta.number("sliding_window").filter(|_| !single_cache),
            vocabulary: self.vocabulary_facts(),
            one_by_one: (!self.batched_prefill()).then(|| self.unvouched()),
            renamed: BTreeMap::new(),
        }
    }

    fn package_facts(&self) -> PackageFacts {
        PackageFacts {
            context: self.context_tokens(),
            positions: self.configs.number("max_position_embeddings"),
            vocabulary: self.vocabulary_facts(),
        }
    }

    fn vocabulary_facts(&self) -> Vocabulary {
        let config = self.configs.number("vocab_size");
        Vocabulary {
            size: config.or_else(|| self.meta.number("vocab_size")),
            part_sizes: self.meta.numbers("lm_head_chunk_sizes"),
            tokens: Some(self.tokenizer.vocabulary()),
            parts: self
                .meta
                .number("split_lm_head")
                .or_else(|| self.meta.number("num_logits")),
        }
    }

    fn unvouched(&self) -> String {
        let version = match self.meta.version() {
            Some([major, minor, patch]) => format!("version {major}.{minor}.{patch}"),
            None => "no version".to_owned(),
        };
        format!(
            "meta.yaml ({version}) sets neither `update_mask_prefill` nor `prefill_dynamic_slice`: batches of such packages \
             write to the wrong slots"
        )
    }

    /// A model that gives less than half as many logits as there are tokens is an encoder, or another model's.
    fn check_vocabulary(&self, vocabulary: usize) -> Result<(), Error> {
        let tokens = self.tokenizer.vocabulary();
        if vocabulary >= tokens.div_ceil(2) {
            return Ok(());
        }
        let last = self.layout.packages().last().copied().unwrap_or_default();
        Err(Error::Malformed {
            file: self.files.full_name(last),
            reason: format!(
                "it gives {vocabulary} values for each token, and the tokenizer has {tokens} tokens: these are no logits of \
                 this tokenizer"
            ),
        })
    }

    /// Opens the packages and starts a conversation.
    ///
    /// # Errors
    /// As [`Bundle::load`].
    pub fn session(&self, options: &LoadOptions) -> Result<Session, Error> {
        Ok(self.session_of(self.load(options)?))
    }

    /// Starts a conversation with a model that was opened from it ([`Bundle::open_model`]).
    pub fn session_of(&self, model: Box<dyn LanguageModel>) -> Session {
        Session::new(model, Arc::clone(&self.tokenizer), Arc::clone(&self.end_tokens))
    }

    /// The model's name, or the folder's.
    pub fn name(&self) -> String {
        self.meta.name().unwrap_or_else(|| self.files.name())
    }

    /// Where the files are.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// What `meta.yaml` says.
    pub fn meta(&self) -> &Meta {
        &self.meta
    }

    /// What the JSON files say.
    pub fn configs(&self) -> &Configs {
        &self.configs
    }

    /// How the model is laid out in packages.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Text to ids and back.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Messages to text.
    ///
    /// # Errors
    /// [`Error::NoTemplate`] when the bundle has none.
    pub fn template(&self) -> Result<&Arc<ChatTemplate>, Error> {
        self.template.as_ref().ok_or_else(|| Error::NoTemplate {
            bundle: self.files.name(),
        })
    }

    /// Tokens that end an answer: those of the configurations, and the one the chat template closes an answer with.
    pub fn end_tokens(&self) -> &Arc<[u32]> {
        &self.end_tokens
    }

    /// Tokens a conversation may have, where `meta.yaml` says so. Packages may bound it further:
    /// [`LanguageModel::context_tokens`] has what holds.
    pub fn context_tokens(&self) -> Option<usize> {
        let context = self.meta.number("context_length");
        let state = self.meta.number("state_length");
        [context, state].into_iter().flatten().min()
    }

    /// False for bundles whose batched prefill is known, or not known not, to write wrong cache slots.
    pub fn batched_prefill(&self) -> bool {
        let declared = self.meta.flag("update_mask_prefill") || self.meta.flag("prefill_dynamic_slice");
        declared
            || self
                .meta
                .version()
                .is_some_and(|version| version < SAYS_WHETHER_PREFILL_IS_VALID)
    }
}

/// Opens a package with an engine.
fn open_part(files: &Files, file: &str, options: &LoadOptions) -> Result<CoreMlPart, Error> {
    let builder = match (files.path(), files.below(file)) {
        (None, Some(inside)) => {
            let rooted: BTreeMap<_, _> = inside
                .into_iter()
                .map(|(path, bytes)| (format!("{file}/{path}"), bytes))
                .collect();
            CoreMLModelBuilder::from_source(Source::memory(rooted), file)
        }
        (path, _) => CoreMLModelBuilder::new(path.unwrap_or(Path::new("")).join(file)),
    };
    let model = builder
        .engine(options.engine)
        .compute_units(options.compute_units)
        .numerics(options.numerics)
        // Hidden states pass from part to part: rounding them to fp16 at each border changes close decisions.
        .wide(true)
        .threads(options.threads)
        .load()
        .map_err(|e| Error::Engine {
            part: files.full_name(file),
            source: Box::new(e),
        })?;
    Ok(CoreMlPart::new(file, model))
}

/// The folder that a path names, and the `ModelConfig` in it, where that is what it names.
fn located(path: &Path) -> Result<(Files, Option<String>), Error> {
    let metadata = std::fs::metadata(path).map_err(|source| Error::Read {
        file: path.display().to_string(),
        source,
    })?;
    if metadata.is_dir() {
        return Ok((Files::directory(path), None));
    }
    let json = path.extension().is_some_and(|ending| ending == "json");
    let config = path.file_name().and_then(|name| name.to_str()).filter(|_| json);
    let Some(config) = config else {
        let reason =
            "a bundle is a folder with tokenizer.json and packages, or a ModelConfig JSON in it; this is another file"
                .to_owned();
        return Err(Error::Malformed {
            file: path.display().to_string(),
            reason,
        });
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let files = Files::directory(folder.unwrap_or(Path::new(".")));
    Ok((files, Some(config.to_owned())))
}

/// A bundle whose tokenizer is not read yet.
struct Unread {
    files: Files,
    meta: Option<Meta>,
    configs: Configs,
    layout: Layout,
    tokenizer: Bytes,
}

impl Unread {
    fn find(files: Files, config: Option<&str>) -> Result<Self, Error> {
        let meta = match files.read("meta.yaml")? {
            Some(text) => Some(Meta::parse(&files.full_name("meta.yaml"), &text)?),
            None => None,
        };
        let layout = Layout::find(&files, meta.as_ref(), config, |package| {
            Ok(open_description(&files, package)?.description().clone())
        })?;
        let configs = Configs::read(&files)?;
        let tokenizer = files.read("tokenizer.json")?.ok_or_else(|| Error::MissingFile {
            bundle: files.name(),
            file: "tokenizer.json".to_owned(),
            purpose: "vocabulary and rules of the text",
        })?;
        Ok(Unread {
            files,
            meta,
            configs,
            layout,
            tokenizer,
        })
    }

    fn read(self) -> Result<Bundle, Error> {
        let Unread {
            files,
            meta,
            configs,
            layout,
            tokenizer,
        } = self;
        let tokenizer = Arc::new(Tokenizer::parse(&files.full_name("tokenizer.json"), &tokenizer)?);
        let template = read_template(&configs)?.map(Arc::new);
        let end_tokens = end_tokens(&configs, &tokenizer, template.as_deref()).into();
        Ok(Bundle {
            files,
            meta: meta.unwrap_or_default(),
            configs,
            tokenizer,
            template,
            layout,
            end_tokens,
        })
    }

    /// Reads it while threads open its packages. What the tokenizer or a template lacks is said first.
    fn read_and_load(self, options: &LoadOptions) -> Result<(Bundle, Box<dyn LanguageModel>), Error> {
        let (files, layout) = (self.files.clone(), self.layout.clone());
        std::thread::scope(|scope| {
            let opening = layout.packages().into_iter().map(|package| {
                let files = &files;
                (package, scope.spawn(move || open_part(files, package, options)))
            });
            let opening: Vec<_> = opening.collect();
            let bundle = self.read();
            let mut parts = BTreeMap::new();
            for (package, thread) in opening {
                let part = thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                parts.insert(package, part);
            }
            let (bundle, parts) = (bundle?, RefCell::new(parts));
            let model = bundle.load_parts(|file| {
                let opened = parts.borrow_mut().remove(file);
                opened.unwrap_or_else(|| open_part(&files, file, options))
            })?;
            Ok((bundle, model))
        })
    }
}

/// A model of one of the kinds that layouts lead to.
enum Assembled<P: Part> {
    Functions(AnemllModel<P>),
    Stateful(Stateful<P>),
    Stateless(Stateless<P>),
}

/// Reads a package without an engine.
fn open_description(files: &Files, package: &str) -> Result<mil::Model, Error> {
    let model = match (files.path(), files.below(package)) {
        (None, Some(inside)) => {
            let rooted = inside
                .into_iter()
                .map(|(path, bytes)| (format!("{package}/{path}"), bytes));
            mil::Model::open_source(mil::Source::memory(rooted.collect()), package)
        }
        (path, _) => mil::Model::open(path.unwrap_or(Path::new("")).join(package)),
    };
    model.map_err(|e| Error::Engine {
        part: files.full_name(package),
        source: Box::new(e),
    })
}

fn read_template(configs: &Configs) -> Result<Option<ChatTemplate>, Error> {
    let Some(source) = configs.chat_template() else {
        return Ok(None);
    };
    let token = |key: &str| {
        let text = configs.special_token(key).unwrap_or_default();
        (key.to_owned(), serde_json::Value::from(text))
    };
    let variables = ["bos_token", "eos_token", "pad_token", "unk_token"].map(token);
    ChatTemplate::parse(source, variables.into()).map(Some)
}

fn end_tokens(configs: &Configs, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Vec<u32> {
    let mut ends = configs.end_token_ids();
    ends.extend(
        configs
            .special_token("eos_token")
            .and_then(|token| tokenizer.id(token)),
    );
    ends.extend(template.and_then(|template| closing_token(template, tokenizer)));
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// The special token a template writes right after an answer.
fn closing_token(template: &ChatTemplate, tokenizer: &Tokenizer) -> Option<u32> {
    const ANSWER: &str = "an answer without an end";
    let talk = [Message::user("a question"), Message::assistant(ANSWER)];
    let text = template.render(&talk, false).ok()?;
    let (_, after) = text.rsplit_once(ANSWER)?;
    let first = *tokenizer.encode(after).ok()?.first()?;
    tokenizer.is_special(first).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::bytes_tokenizer_json;

    fn files(more: &[(&str, &str)]) -> Files {
        let packages = ["x_embeddings", "x_FFN_PF_chunk_01of01", "x_lm_head"];
        let manifests = packages.map(|p| (format!("{p}.mlpackage/Manifest.json"), Bytes::from_static(b"{}")));
        let json = ("tokenizer.json".to_owned(), Bytes::from(bytes_tokenizer_json()));
        let more = more
            .iter()
            .map(|(n, t)| ((*n).to_owned(), Bytes::copy_from_slice(t.as_bytes())));
        Files::memory("b", manifests.into_iter().chain([json]).chain(more))
    }

    #[test]
    fn end_tokens_come_from_configurations_and_the_template() {
        let config = ("config.json", r#"{"eos_token_id": 7}"#);
        let named = ("tokenizer_config.json", r#"{"eos_token": "<end>"}"#);
        let template = (
            "chat_template.jinja",
            "{% for m in messages %}{{ m.content }}<turn>\n{% endfor %}",
        );
        let silent = (
            "chat_template.jinja",
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        );
        for (more, expected) in [
            (vec![], vec![]),
            (vec![config], vec![7]),
            (vec![config, named, template], vec![7, 259, 260]),
            (vec![silent], vec![]),
        ] {
            assert_eq!(
                **Bundle::from_files(files(&more)).unwrap().end_tokens(),
                *expected,
                "{more:?}"
            );
        }
    }

    #[test]
    fn what_is_opened_at_once_says_what_each_part_says() {
        let options = LoadOptions::default();
        let error = |files: Files| {
            let opened = Bundle::model_from_files(files, &options);
            opened.err().expect("nothing to open").to_string()
        };
        // Packages without a model: the first that is wired is named, whichever thread was first.
        let apart = Bundle::from_files(files(&[])).unwrap().load(&options);
        let apart = apart.err().expect("nothing to open").to_string();
        assert_eq!(error(files(&[])), apart);
        assert!(apart.contains("x_embeddings"), "{apart}");
        let bad = files(&[("tokenizer.json", "{")]);
        assert_eq!(
            error(bad.clone()),
            Bundle::from_files(bad).unwrap_err().to_string()
        );
    }

    #[test]
    fn batches_are_used_where_the_converter_vouches_for_them() {
        for (meta, expected) in [
            ("model_info: {version: 0.3.4}", true),
            ("model_info: {version: 0.3.5}", false),
            (
                "model_info: {version: 0.3.5, parameters: {update_mask_prefill: true}}",
                true,
            ),
            (
                "model_info: {version: 1.0.0, parameters: {prefill_dynamic_slice: true}}",
                true,
            ),
            ("model_info: {name: x}", false),
        ] {
            let bundle = Bundle::from_files(files(&[("meta.yaml", meta)])).unwrap();
            assert_eq!(bundle.batched_prefill(), expected, "{meta}");
        }
    }

    #[test]
    fn the_shorter_of_context_and_state_bounds_a_conversation() {
        let meta = "model_info: {parameters: {context_length: 4096, state_length: 2048}}";
        let bundle = Bundle::from_files(files(&[("meta.yaml", meta)])).unwrap();
        assert_eq!(bundle.context_tokens(), Some(2048));
    }

    #[test]
    fn what_is_missing_or_not_run_is_said() {
        let error = |files: Files| Bundle::from_files(files).unwrap_err().to_string();
        let mono = files(&[("meta.yaml", "model_info: {model_type: monolithic}")]);
        assert!(error(mono).contains("b: the monolith is missing"));
        let single = Files::memory("b", [("model.mlpackage/Manifest.json".to_owned(), Bytes::new())]);
        assert!(error(single).starts_with("b/model.mlpackage: "));
        let packages = ["x_embeddings", "x_FFN_PF_chunk_01of01", "x_lm_head"];
        let bare = packages.map(|p| (format!("{p}.mlpackage/Manifest.json"), Bytes::new()));
        assert_eq!(
            error(Files::memory("b", bare)),
            "b: `tokenizer.json` is missing (vocabulary and rules of the text)"
        );
        let missing = Bundle::open("/no/such/folder").unwrap_err().to_string();
        assert!(
            missing.starts_with("/no/such/folder: cannot be read"),
            "{missing}"
        );
        let untemplated = Bundle::from_files(files(&[])).unwrap();
        assert!(
            untemplated
                .template()
                .unwrap_err()
                .to_string()
                .contains("no chat template")
        );
    }
}
