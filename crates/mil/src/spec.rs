//! The specification protobuf (`model.mlmodel`): which kind of model it is, its description and its program.

mod interface;
mod program;

use bytes::Bytes;
use prost::Message;

use crate::description::{Description, ModelKind};
use crate::error::{Error, Result};
use crate::program::Program;
use crate::wire;

pub(crate) use interface::description as read_description;
pub(crate) use program::DTYPES;

/// The protobuf format's own limit.
const MAX_SPEC_BYTES: u64 = (1 << 31) - 1;

const PROGRAM_FIELD: u32 = 502;

/// Reads a specification; `path` is how messages call it.
pub(crate) fn read_spec(bytes: &Bytes, path: &str) -> Result<(Description, Option<Program>)> {
    if bytes.len() as u64 > MAX_SPEC_BYTES {
        let (bytes, limit) = (bytes.len() as u64, MAX_SPEC_BYTES);
        return Err(Error::TooLarge {
            path: path.to_string(),
            bytes,
            limit,
        });
    }
    let not_a_model = |problem: &str| Error::NotAModel {
        path: path.to_string(),
        problem: problem.to_string(),
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(not_a_model(
            "a Git LFS pointer, not the model: fetch it with `git lfs pull`",
        ));
    }
    let field = kind_field(bytes)
        .ok_or_else(|| not_a_model("not a Core ML specification: no model type in the protobuf message"))?;
    let model = wire::Model::decode(bytes.as_ref()).map_err(|source| Error::Protobuf {
        path: path.to_string(),
        source,
    })?;
    let program = match (field, model.program) {
        (PROGRAM_FIELD, Some(program)) => {
            Some(program::convert(program, model.specification_version).map_err(|p| p.in_file(path))?)
        }
        _ => None,
    };
    let mut description =
        interface::description(&model.description.unwrap_or_default()).map_err(|p| p.in_file(path))?;
    description.specification_version = model.specification_version;
    description.kind = kind(field);
    Ok((description, program))
}

/// The kind of a model by the number of its field in the protobuf message, which compiled models use too.
pub(crate) fn kind(field: u32) -> ModelKind {
    let name = match field {
        PROGRAM_FIELD => return ModelKind::Program,
        200 => "pipelineClassifier",
        201 => "pipelineRegressor",
        202 => "pipeline",
        300 => "glmRegressor",
        301 => "supportVectorRegressor",
        302 => "treeEnsembleRegressor",
        303 => "neuralNetworkRegressor",
        304 => "bayesianProbitRegressor",
        400 => "glmClassifier",
        401 => "supportVectorClassifier",
        402 => "treeEnsembleClassifier",
        403 => "neuralNetworkClassifier",
        404 => "kNearestNeighborsClassifier",
        500 => "neuralNetwork",
        501 => "itemSimilarityRecommender",
        555 => "customModel",
        556 => "linkedModel",
        560 => "classConfidenceThresholding",
        600 => "oneHotEncoder",
        601 => "imputer",
        602 => "featureVectorizer",
        603 => "dictVectorizer",
        604 => "scaler",
        606 => "categoricalMapping",
        607 => "normalizer",
        609 => "arrayFeatureExtractor",
        610 => "nonMaximumSuppression",
        900 => "identity",
        2000 => "textClassifier",
        2001 => "wordTagger",
        2002 => "visionFeaturePrint",
        2003 => "soundAnalysisPreprocessing",
        2004 => "gazetteer",
        2005 => "wordEmbedding",
        2006 => "audioFeaturePrint",
        3000 => "serializedModel",
        other => return ModelKind::Other(format!("type {other}")),
    };
    ModelKind::Other(name.to_string())
}

/// Number of the message's last field from 200 on, which is the model's type; `None` for anything but such a message.
fn kind_field(bytes: &[u8]) -> Option<u32> {
    let mut rest = bytes;
    let mut found = None;
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        let field = u32::try_from(key >> 3).ok().filter(|f| *f > 0)?;
        let skipped = match key & 7 {
            0 => varint(&mut rest).map(|_| 0)?,
            1 => 8,
            2 => varint(&mut rest)?,
            5 => 4,
            _ => return None,
        };
        rest = rest.get(usize::try_from(skipped).ok()?..)?;
        if field >= 200 {
            found = Some(field);
        }
    }
    found
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_is_the_last_type_field() {
        // Version 1, then field 500 with an empty message.
        let network = [0x08, 1, 0xa2, 0x1f, 0];
        assert_eq!(kind_field(&network), Some(500));
        for (what, bytes) in [
            ("empty", &[][..]),
            ("version only", &[8, 1]),
            ("cut", &network[..4]),
            ("wire type", &[0x0b]),
        ] {
            assert_eq!(kind_field(bytes), None, "{what}");
        }
    }

    #[test]
    fn what_is_no_specification_is_refused_by_name() {
        for bytes in [
            &b""[..],
            b"hello, world",
            b"version https://git-lfs.github.com/spec/v1\n",
            b"{\"a\": 1}",
        ] {
            let error = read_spec(&Bytes::from_static(bytes), "x.mlmodel").unwrap_err();
            assert!(error.to_string().starts_with("x.mlmodel: "), "{error}");
        }
    }
}
