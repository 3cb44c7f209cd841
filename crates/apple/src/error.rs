//! What can go wrong, in words of the model.

use crate::options::OsVersion;

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Core ML said no.
    #[error("{what}: {message} ({domain} {code})")]
    CoreMl {
        /// What was asked of it.
        what: String,
        /// Its own words.
        message: String,
        /// The error's domain, mostly `com.apple.CoreML`.
        domain: String,
        /// The error's number in that domain.
        code: isize,
    },

    /// Core ML threw an Objective-C exception.
    #[error("{what}: Objective-C exception {name}: {reason}")]
    Exception {
        /// What was asked of it.
        what: String,
        /// The exception's name.
        name: String,
        /// Its own words.
        reason: String,
    },

    /// Core ML gave neither a result nor an error, or did not call back.
    #[error("{what}: {problem}")]
    Silent {
        /// What was asked of it.
        what: String,
        /// What was missing.
        problem: String,
    },

    /// The system is too old for what was asked.
    #[error("{what} needs {needed}; this is {found}")]
    System {
        /// What was asked.
        what: String,
        /// The first systems that have it.
        needed: String,
        /// The system this runs on.
        found: OsVersion,
    },

    /// Core ML gave an output of a kind, type or layout that cannot be.
    #[error("{feature:?}: {problem}")]
    Feature {
        /// Input, output or state.
        feature: String,
        /// What is wrong with it.
        problem: String,
    },

    /// The files of a model could not be read, or the cache not written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },

    /// Not a model that Core ML opens.
    #[error("{path}: {problem}")]
    NotAModel {
        /// The file or folder.
        path: String,
        /// What was found.
        problem: String,
    },
}

impl Error {
    pub(crate) fn feature(feature: &str, problem: impl ToString) -> Error {
        Error::Feature {
            feature: feature.to_string(),
            problem: problem.to_string(),
        }
    }

    pub(crate) fn io(path: &std::path::Path, source: std::io::Error) -> Error {
        Error::Io {
            path: path.display().to_string(),
            source,
        }
    }
}
