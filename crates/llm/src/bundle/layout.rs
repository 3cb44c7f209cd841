//! Which layout a folder has, from what lies in it.

use super::files::Files;
use super::meta::Meta;
use super::model_config::ConfiguredFiles;
use super::parts::{ChunkFiles, PartFiles, find_monolith, find_stem, is_part, model_stems};
use crate::Error;
use candle_coreml_mil::Description;

/// How a bundle's model is laid out in packages, with the file names found, each inside the bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// ANEMLL: embeddings, chunks of layers, a language head.
    Anemll(PartFiles),
    /// ANEMLL: everything in one package with functions for one token and for batches.
    Monolith(ChunkFiles),
    /// The same parts under any names, told by a `ModelConfig` of candle-coreml 0.3.
    Configured(ConfiguredFiles),
    /// One package that keeps its cache in states and takes any number of tokens.
    Stateful(String),
    /// One package without states, which computes its window anew for every token.
    Stateless(String),
}

impl Layout {
    /// Finds the layout of a bundle; `config` is the `ModelConfig` to go by, where one is given. `describe` reads a package's
    /// description.
    ///
    /// # Errors
    /// [`Error::MissingPart`] and [`Error::IncompletePart`] for packages that are not there, [`Error::Unsupported`] where the
    /// models found are not a language model in a layout that is known.
    pub(crate) fn find(
        files: &Files,
        meta: Option<&Meta>,
        config: Option<&str>,
        describe: impl Fn(&str) -> Result<Description, Error>,
    ) -> Result<Self, Error> {
        if let Some(config) = config {
            return ConfiguredFiles::read(files, config).map(Layout::Configured);
        }
        if let Some(meta) = meta {
            return match meta.model_type().as_deref() {
                Some("monolithic") => find_monolith(files, meta).map(Layout::Monolith),
                _ => PartFiles::find(files, meta).map(Layout::Anemll),
            };
        }
        if let Some(configured) = ConfiguredFiles::find(files)? {
            return Ok(Layout::Configured(configured));
        }
        let stems = model_stems(files)?;
        if stems.iter().any(|stem| is_part(stem)) {
            return PartFiles::find(files, &Meta::default()).map(Layout::Anemll);
        }
        if stems.iter().any(|stem| stem.contains("monolithic")) {
            return find_monolith(files, &Meta::default()).map(Layout::Monolith);
        }
        match stems.as_slice() {
            [] => Err(no_models(files)?),
            [stem] => {
                let package = find_stem(files, stem)?;
                let description = describe(&package)?;
                Ok(Self::of_package(package, &description))
            }
            several => Err(Error::Unsupported {
                file: files.name(),
                what: format!(
                    "the models {} without a word how they belong together; supported: ANEMLL's names or meta.yaml, a \
                     ModelConfig JSON with `components`, one package",
                    several.join(", ")
                ),
            }),
        }
    }

    /// The layout of the only package of a bundle.
    fn of_package(package: String, description: &Description) -> Self {
        let functions = &description.functions;
        if functions.len() > 1 && functions.iter().any(|f| f.name == "infer") {
            return Layout::Monolith(ChunkFiles::one(package));
        }
        let default = functions.iter().find(|f| f.name == description.default_function);
        match default
            .or(functions.first())
            .is_some_and(|f| !f.states.is_empty())
        {
            true => Layout::Stateful(package),
            false => Layout::Stateless(package),
        }
    }

    /// `anemll`, `anemll-monolithic`, `model-config`, `stateful-package` or `stateless-package`.
    pub fn name(&self) -> &'static str {
        match self {
            Layout::Anemll(_) => "anemll",
            Layout::Monolith(_) => "anemll-monolithic",
            Layout::Configured(_) => "model-config",
            Layout::Stateful(_) => "stateful-package",
            Layout::Stateless(_) => "stateless-package",
        }
    }

    /// The packages in the order they run.
    pub fn packages(&self) -> Vec<&str> {
        match self {
            Layout::Anemll(parts) => parts.packages().collect(),
            Layout::Monolith(chunk) => chunk.packages().collect(),
            Layout::Configured(configured) => configured.parts.packages().collect(),
            Layout::Stateful(package) | Layout::Stateless(package) => vec![package],
        }
    }
}

fn no_models(files: &Files) -> Result<Error, Error> {
    let inside = files
        .entries()?
        .iter()
        .any(|name| name == "Manifest.json" || name == "model.mil");
    if inside {
        return Ok(Error::Unsupported {
            file: files.name(),
            what: "this is a package; a bundle is the folder it lies in, beside tokenizer.json".to_owned(),
        });
    }
    Ok(Error::MissingPart {
        bundle: files.name(),
        part: "model".to_owned(),
        tried: vec!["`*.mlpackage`".to_owned(), "`*.mlmodelc`".to_owned()],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::anemll::toy::{feature, function};
    use bytes::Bytes;

    fn layout(packages: &[&str], functions: &[&str], states: bool) -> Result<Layout, Error> {
        let manifests = packages
            .iter()
            .map(|p| (format!("{p}/Manifest.json"), Bytes::new()));
        let files = Files::memory("b", manifests);
        Layout::find(&files, None, None, |_| {
            let mut description = Description::default();
            for name in functions {
                let mut function = function(name, &[("input_ids", &[1, 1])], &[("logits", &[1, 1, 9])]);
                if states {
                    function.states.push(feature("cache", &[1, 4, 8]));
                }
                description.functions.push(function);
            }
            Ok(description)
        })
    }

    #[test]
    fn folders_tell_their_layout_by_names_and_interfaces() {
        let parts = [
            "x_embeddings.mlpackage",
            "x_FFN_PF_chunk_01of01.mlpackage",
            "x_lm_head.mlpackage",
        ];
        for (packages, functions, states, expected) in [
            (&parts[..], &[][..], true, "anemll"),
            (
                &["x_monolithic_full_lut4.mlpackage"],
                &["infer", "prefill"],
                true,
                "anemll-monolithic",
            ),
            (
                &["any.mlpackage"],
                &["infer", "prefill"],
                true,
                "anemll-monolithic",
            ),
            (&["any.mlpackage"], &["main"], true, "stateful-package"),
            (&["any.mlpackage"], &["main"], false, "stateless-package"),
        ] {
            assert_eq!(
                layout(packages, functions, states).unwrap().name(),
                expected,
                "{packages:?}"
            );
        }
    }

    #[test]
    fn folders_of_no_layout_say_what_they_have() {
        for (packages, expected) in [
            (
                &[][..],
                "b: the model is missing; looked for `*.mlpackage`, `*.mlmodelc`",
            ),
            (
                &["a.mlpackage", "b.mlpackage"],
                "the models a, b without a word how they belong together",
            ),
            (&["x_lm_head.mlpackage"], "the embeddings is missing"),
        ] {
            let error = layout(packages, &["main"], true).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let package = Files::memory("b", [("Manifest.json".to_owned(), Bytes::new())]);
        let error = Layout::find(&package, None, None, |_| Ok(Description::default())).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("this is a package; a bundle is the folder"),
            "{error}"
        );
    }
}
