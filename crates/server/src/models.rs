//! What is served: models opened under the names that requests give.

use std::fmt;
use std::sync::{Arc, Mutex};

use candle_coreml_llm::{Bundle, ChatTemplate, EmbeddingModel, LoadOptions, Session, Tokenizer};

use crate::Error;
use crate::refusal::Refusal;
use crate::scheduler::Source;

/// A model and the name it is served under.
#[derive(Debug)]
pub struct Model {
    id: String,
    kind: Kind,
}

enum Kind {
    Text(Box<Session>, Option<Arc<ChatTemplate>>),
    Encoder(Box<EmbeddingModel>),
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Text(..) => "Text",
            Kind::Encoder(_) => "Encoder",
        })
    }
}

impl Model {
    /// Opens a bundle's packages, to generate text with.
    ///
    /// # Errors
    /// [`Error::Model`] with what [`Bundle::session`] says.
    pub fn open(id: impl Into<String>, bundle: &Bundle, options: &LoadOptions) -> Result<Self, Error> {
        let id = id.into();
        let session = bundle.session(options).map_err(|source| Error::Model {
            id: id.clone(),
            source,
        })?;
        let template = bundle.template().ok().cloned();
        Ok(Model {
            id,
            kind: Kind::Text(Box::new(session), template),
        })
    }

    /// A session of one's own to generate text with; every conversation begins as its copy. Without a template it completes
    /// texts and does not chat.
    pub fn new(id: impl Into<String>, session: Session, template: Option<Arc<ChatTemplate>>) -> Self {
        Model {
            id: id.into(),
            kind: Kind::Text(Box::new(session), template),
        }
    }

    /// An encoder, for embeddings.
    pub fn encoder(id: impl Into<String>, model: EmbeddingModel) -> Self {
        Model {
            id: id.into(),
            kind: Kind::Encoder(Box::new(model)),
        }
    }

    /// The name it is served under.
    pub fn id(&self) -> &str {
        &self.id
    }
}

/// A model that generates text, as routes see it.
#[derive(Debug)]
pub(crate) struct TextModel {
    pub id: String,
    /// Its place in the scheduler.
    pub place: usize,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<Arc<ChatTemplate>>,
    pub context_tokens: usize,
}

/// A model that gives embeddings, as routes see it.
pub(crate) struct Encoder {
    pub id: String,
    pub model: Arc<EmbeddingModel>,
    /// One request computes at a time.
    pub turn: tokio::sync::Semaphore,
}

/// All models by name.
pub(crate) struct Models {
    pub texts: Vec<TextModel>,
    pub encoders: Vec<Encoder>,
}

impl Models {
    /// Sorts models by what they do; the sources are the scheduler's.
    pub fn new(models: Vec<Model>) -> Result<(Self, Vec<Source>), Error> {
        let (mut texts, mut encoders, mut sources) = (Vec::new(), Vec::new(), Vec::<Source>::new());
        let mut ids: Vec<String> = Vec::new();
        for Model { id, kind } in models {
            if ids.contains(&id) {
                return Err(Error::SameName { id });
            }
            ids.push(id.clone());
            match kind {
                Kind::Text(session, template) => {
                    texts.push(TextModel {
                        id: id.clone(),
                        place: sources.len(),
                        tokenizer: Arc::clone(session.tokenizer()),
                        template,
                        context_tokens: session.context_tokens(),
                    });
                    sources.push(Source {
                        id,
                        fresh: Mutex::new(*session),
                    });
                }
                Kind::Encoder(model) => encoders.push(Encoder {
                    id,
                    model: Arc::new(*model),
                    turn: tokio::sync::Semaphore::new(1),
                }),
            }
        }
        if ids.is_empty() {
            return Err(Error::NoModel);
        }
        Ok((Models { texts, encoders }, sources))
    }

    pub fn ids(&self) -> impl Iterator<Item = &str> {
        let texts = self.texts.iter().map(|m| m.id.as_str());
        texts.chain(self.encoders.iter().map(|m| m.id.as_str()))
    }

    /// The model a request for text names; without a name the first one.
    pub fn text(&self, id: Option<&str>) -> Result<&TextModel, Refusal> {
        let all: Vec<&str> = self.texts.iter().map(|m| m.id.as_str()).collect();
        let found = match id {
            None => self.texts.first(),
            Some(id) => self.texts.iter().find(|m| m.id == id),
        };
        found.ok_or_else(|| self.other(id, &all, "generates no text"))
    }

    /// The model a request for embeddings names; without a name the first one.
    pub fn encoder(&self, id: Option<&str>) -> Result<&Encoder, Refusal> {
        let all: Vec<&str> = self.encoders.iter().map(|m| m.id.as_str()).collect();
        let found = match id {
            None => self.encoders.first(),
            Some(id) => self.encoders.iter().find(|m| m.id == id),
        };
        found.ok_or_else(|| self.other(id, &all, "is no encoder and gives no embeddings"))
    }

    fn other(&self, id: Option<&str>, fitting: &[&str], what: &str) -> Refusal {
        match id {
            Some(id) if self.ids().any(|known| known == id) => Refusal::param(
                "model",
                "wrong_kind_of_model",
                format!("the model `{id}` {what}; {} would", list(fitting)),
            ),
            _ if fitting.is_empty() => Refusal::unknown_model(id.unwrap_or_default(), &["none of this kind"]),
            id => Refusal::unknown_model(id.unwrap_or_default(), fitting),
        }
    }
}

fn list(ids: &[&str]) -> String {
    if ids.is_empty() {
        "no model that is served here".to_owned()
    } else {
        ids.join(", ")
    }
}
