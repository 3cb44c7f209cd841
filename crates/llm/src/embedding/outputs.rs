//! The output of a package that an encoder's vectors come from.

use candle_core::{DType, Tensor};
use candle_coreml::{Feature, FeatureType};

use super::package::Place;
use super::pooling::Pooling;
use super::settings::Settings;
use super::{EmbeddingOptions, pooling};
use crate::Error;

/// Names of outputs, in lower case and without what is no letter.
const OF_TEXTS: [&str; 7] = [
    "sentenceembedding",
    "sentenceembeddings",
    "textembedding",
    "textembeddings",
    "textembeds",
    "embedding",
    "embeddings",
];
const OF_TOKENS: [&str; 6] = [
    "lasthiddenstate",
    "lasthiddenstates",
    "hiddenstates",
    "hiddenstate",
    "tokenembeddings",
    "encoderoutput",
];
const OF_POOLER: [&str; 3] = ["pooleroutput", "pooledoutput", "pooled"];
/// What heads of classifiers and language models give.
const OF_HEADS: [&str; 6] = [
    "logits",
    "scores",
    "probabilities",
    "probs",
    "startlogits",
    "endlogits",
];

/// An output and what is done with it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Output {
    name: String,
    /// The package and the function it is an output of, for errors.
    package: String,
    function: String,
    /// What is done with the vectors of tokens.
    pooling: Pooling,
    /// Rank of what it gives, where the package says so.
    rank: Option<usize>,
    of_tokens: bool,
    /// Somebody asked for pooling: a vector of the text is not what is wanted.
    pooled_here: bool,
}

impl Output {
    /// By name, unless the options say which.
    pub(super) fn choose(
        place: &Place<'_>,
        options: &EmbeddingOptions,
        settings: &Settings,
    ) -> Result<Self, Error> {
        let outputs = place.outputs();
        let listed = || {
            let names: Vec<String> = outputs.iter().map(|f| format!("`{}`", f.name)).collect();
            format!("its outputs are {}", names.join(", "))
        };
        let named = |names: &[&str]| outputs.iter().find(|f| names.contains(&bare(&f.name).as_str()));
        let tokens = || named(&OF_TOKENS).or_else(|| named(&OF_TEXTS).filter(|f| rank(f) != Some(2)));
        let single = match outputs {
            [one] if !OF_HEADS.contains(&bare(&one.name).as_str()) => Some(one),
            _ => None,
        };
        let found = match (&options.output, options.pooling) {
            (Some(name), _) => outputs.iter().find(|f| f.name == *name).ok_or_else(|| {
                place.wrong(format!("no output `{name}`; {}", listed()))
            })?,
            (None, Some(Pooling::Pooler)) => named(&OF_POOLER)
                .ok_or_else(|| place.wrong(format!("no `pooler_output` to take; {}", listed())))?,
            (None, Some(how)) => tokens().or(single).ok_or_else(|| {
                place.wrong(format!("nothing for pooling {how} to pool, such as `last_hidden_state`; {}", listed()))
            })?,
            (None, None) => named(&OF_TEXTS)
                .or_else(tokens)
                .or(single)
                .or_else(|| named(&OF_POOLER))
                .ok_or_else(|| {
                    place.wrong(format!(
                        "none of its outputs is known to be an encoder's (`last_hidden_state`, `sentence_embedding`); {}",
                        listed()
                    ))
                })?,
        };
        let bare = bare(&found.name);
        let (package, function) = place.names();
        let output = Output {
            name: found.name.clone(),
            package,
            function,
            pooling: options.pooling.or(settings.pooling()?).unwrap_or(Pooling::Mean),
            rank: rank(found),
            of_tokens: OF_TOKENS.contains(&bare.as_str()),
            pooled_here: options.pooling.is_some_and(|p| p != Pooling::Pooler),
        };
        if output.pooling().is_some() || !OF_TEXTS.contains(&bare.as_str()) {
            settings.check_modules()?;
        }
        Ok(output)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The pooling of tokens; `None` where the output is known to be the texts'.
    pub(super) fn pooling(&self) -> Option<Pooling> {
        let of_texts = !self.of_tokens && self.rank == Some(2)
            || !self.of_tokens && self.rank.is_none() && !self.pooled_here && {
                let bare = bare(&self.name);
                OF_TEXTS.contains(&bare.as_str()) || OF_POOLER.contains(&bare.as_str())
            };
        (!of_texts).then_some(self.pooling)
    }

    /// The vector of each row, of which the first `lengths` tokens count. By the shape of what came: [rows, tokens,
    /// width] and [rows, width, 1, tokens] are pooled, [rows, width] is the texts' own, as is [width] of one row.
    pub(super) fn vectors(
        &self,
        output: &Tensor,
        lengths: &[usize],
        tokens: usize,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let output = output.to_dtype(DType::F32)?;
        let rows = lengths.len();
        let by_token = match *output.dims() {
            [r, n, _] if (r, n) == (rows, tokens) => output,
            [r, _, 1, n] if (r, n) == (rows, tokens) => output.squeeze(2)?.transpose(1, 2)?,
            [n, _] if rows == 1 && n == tokens && (self.of_tokens || n != 1) => output.unsqueeze(0)?,
            [r, _] if r == rows && !self.of_tokens => return self.own(output.to_vec2()?),
            [_] if rows == 1 => return self.own(vec![output.to_vec1()?]),
            _ => {
                return Err(self.wrong(format!(
                    "has shape {:?} for {rows} texts of {tokens} tokens; allowed: [texts, tokens, width], [texts, width, \
                     1, tokens], [texts, width]",
                    output.dims()
                )));
            }
        };
        let by_token = by_token.to_vec3::<f32>()?;
        let pooled = by_token.iter().zip(lengths).map(|(row, &used)| {
            let shown = row.get(..used).unwrap_or(row);
            self.pooling.pool(shown)
        });
        Ok(pooled.collect())
    }

    fn own(&self, vectors: Vec<Vec<f32>>) -> Result<Vec<Vec<f32>>, Error> {
        if self.pooled_here {
            let what = format!(
                "gives the vector of the whole text; there is nothing for pooling {} to pool",
                self.pooling
            );
            return Err(self.wrong(what));
        }
        Ok(vectors)
    }

    fn wrong(&self, what: String) -> Error {
        Error::Wiring {
            part: self.package.clone(),
            function: self.function.clone(),
            what: format!("output `{}` {what}", self.name),
        }
    }
}

/// A name as the lists above have it.
pub(super) fn bare(name: &str) -> String {
    let letters = name.chars().filter(|c| c.is_ascii_alphabetic());
    letters.map(|c| c.to_ascii_lowercase()).collect()
}

/// True for names of what classifiers and language models give.
pub(super) fn is_head(feature: &Feature) -> bool {
    OF_HEADS.contains(&bare(&feature.name).as_str())
}

fn rank(feature: &Feature) -> Option<usize> {
    match &feature.ty {
        FeatureType::MultiArray(array) if !array.shape.is_empty() => Some(array.shape.len()),
        _ => None,
    }
}

/// What `1_Pooling/config.json` may say, for messages.
pub(super) fn poolings() -> String {
    pooling::names()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn output(of_tokens: bool, pooled_here: bool) -> Output {
        Output {
            name: "o".to_owned(),
            package: "p.mlpackage".to_owned(),
            function: "main".to_owned(),
            pooling: Pooling::Mean,
            rank: None,
            of_tokens,
            pooled_here,
        }
    }

    #[test]
    fn the_shape_says_what_is_pooled() {
        let numbers = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap();
        let mut failures = Vec::new();
        let mut check =
            |shape: &[usize], lengths: &[usize], tokens, of_tokens, expected: Option<&[&[f32]]>| {
                let given = numbers.reshape(shape).unwrap();
                let found = output(of_tokens, false).vectors(&given, lengths, tokens).ok();
                if found.as_deref()
                    != expected
                        .map(|e| e.iter().map(|v| v.to_vec()).collect::<Vec<_>>())
                        .as_deref()
                {
                    failures.push(format!("{shape:?}, {lengths:?} of {tokens}: {found:?}"));
                }
            };
        check(&[2, 3, 2], &[3, 1], 3, true, Some(&[&[2.0, 3.0], &[6.0, 7.0]]));
        check(&[2, 2, 1, 3], &[3, 2], 3, true, Some(&[&[1.0, 4.0], &[6.5, 9.5]]));
        check(&[6, 2], &[2], 6, true, Some(&[&[1.0, 2.0]]));
        check(
            &[2, 6],
            &[9, 9],
            9,
            false,
            Some(&[&[0., 1., 2., 3., 4., 5.], &[6., 7., 8., 9., 10., 11.]]),
        );
        check(
            &[1, 12],
            &[1],
            1,
            true,
            Some(&[&[0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.]]),
        );
        check(&[2, 6], &[9, 9], 9, true, None);
        check(&[2, 3, 2], &[3, 1], 4, true, None);
        check(&[12], &[1, 1], 1, false, None);
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn a_vector_of_the_text_is_not_pooled_on_request() {
        let given = Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap();
        let error = output(false, true)
            .vectors(&given, &[2], 3)
            .unwrap_err()
            .to_string();
        assert!(error.contains("nothing for pooling mean"), "{error}");
    }
}
