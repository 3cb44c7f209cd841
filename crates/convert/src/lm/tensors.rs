//! Where a decoder's tensors are in a checkpoint and what shapes they have.

use std::ops::Range;

use half::f16;

use crate::builder::{ProgramBuilder, Weight};
use crate::compress::Compression;
use crate::config::{DecoderConfig, Family};
use crate::error::{Error, Result};
use crate::weights::Checkpoint;

/// A checkpoint seen as a decoder.
pub(super) struct Tensors<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a DecoderConfig,
    root: &'static str,
}

/// How the projections of a layer are used: as 1x1 convolutions or as matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shapes {
    Conv,
    Matrix,
}

/// A projection and its bias.
pub(super) struct Projection {
    pub(super) weight: Weight,
    pub(super) bias: Option<Weight>,
}

/// Everything of one layer.
pub(super) struct LayerWeights {
    pub(super) before_attention: Weight,
    pub(super) query: Projection,
    pub(super) key: Projection,
    pub(super) value: Projection,
    pub(super) output: Projection,
    /// Norms of each head's query and key.
    pub(super) head_norms: Option<(Weight, Weight)>,
    /// Gemma: norm of what attention adds.
    pub(super) after_attention: Option<Weight>,
    pub(super) before_mlp: Weight,
    pub(super) gate: Projection,
    pub(super) up: Projection,
    pub(super) down: Projection,
    /// Gemma: norm of what the MLP adds.
    pub(super) after_mlp: Option<Weight>,
}

/// What the names of a decoder's tensors start with.
pub(crate) fn root_of(checkpoint: &Checkpoint) -> Result<&'static str> {
    const ROOTS: [&str; 4] = ["model.", "", "language_model.model.", "model.language_model."];
    let has_embeddings = |root: &&str| checkpoint.contains(&format!("{root}embed_tokens.weight"));
    let root = ROOTS.into_iter().find(has_embeddings);
    root.ok_or_else(|| Error::tensor("model.embed_tokens.weight", "not in the checkpoint"))
}

impl<'a> Tensors<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, config: &'a DecoderConfig) -> Result<Self> {
        let root = root_of(checkpoint)?;
        Ok(Tensors {
            checkpoint,
            config,
            root,
        })
    }

    /// Writes the embeddings [vocabulary, hidden].
    pub(super) fn embeddings(&self, package: &mut ProgramBuilder, how: &Compression) -> Result<Weight> {
        let c = self.config;
        let shape = [c.vocabulary, c.hidden];
        let name = format!("{}embed_tokens.weight", self.root);
        self.table(package, "embed_tokens", &name, shape, how)
    }

    /// Writes the head's matrix [vocabulary, hidden].
    pub(super) fn head(&self, package: &mut ProgramBuilder, how: &Compression) -> Result<Weight> {
        let c = self.config;
        self.table(
            package,
            "lm_head",
            &self.head_name()?,
            [c.vocabulary, c.hidden],
            how,
        )
    }

    /// Rows of the head's matrix.
    pub(super) fn head_rows(&self, rows: Range<usize>) -> Result<Vec<f16>> {
        let c = self.config;
        let shape = [c.vocabulary, c.hidden];
        self.checkpoint.read_rows(&self.head_name()?, &shape, rows)
    }

    /// Where the head's matrix is: the embeddings where they are tied.
    fn head_name(&self) -> Result<String> {
        let names = ["lm_head.weight", "language_model.lm_head.weight"];
        match names.into_iter().find(|n| self.checkpoint.contains(n)) {
            Some(name) if !self.config.tied => Ok(name.to_owned()),
            None if !self.config.tied => Err(Error::tensor(
                "lm_head.weight",
                "not in the checkpoint, and embeddings are not tied",
            )),
            _ => Ok(format!("{}embed_tokens.weight", self.root)),
        }
    }

    /// A large matrix, streamed where it is stored as it is.
    fn table(
        &self,
        package: &mut ProgramBuilder,
        to: &str,
        name: &str,
        shape: [usize; 2],
        how: &Compression,
    ) -> Result<Weight> {
        if *how == Compression::None {
            return package.weight_from(to, &shape, &mut self.checkpoint.stream(name, &shape)?);
        }
        package.weight(to, &shape, &self.checkpoint.read(name, &shape)?, how)
    }

    pub(super) fn final_norm(&self, package: &mut ProgramBuilder) -> Result<Weight> {
        self.norm(package, &format!("{}norm.weight", self.root), self.config.hidden)
    }

    pub(super) fn layer(
        &self,
        package: &mut ProgramBuilder,
        layer: usize,
        shapes: Shapes,
        how: &Compression,
    ) -> Result<LayerWeights> {
        let c = self.config;
        let (h, q, kv, inner) = (
            c.hidden,
            c.heads * c.head_dim,
            c.kv_heads * c.head_dim,
            c.intermediate,
        );
        let name = |part: &str| format!("{}layers.{layer}.{part}", self.root);
        let mut project = |part: &str, out: usize, inputs: usize| {
            self.projection(package, &name(part), [out, inputs], shapes, how)
        };
        let (query, key) = (
            project("self_attn.q_proj", q, h)?,
            project("self_attn.k_proj", kv, h)?,
        );
        let (value, output) = (
            project("self_attn.v_proj", kv, h)?,
            project("self_attn.o_proj", h, q)?,
        );
        let (gate, up) = (
            project("mlp.gate_proj", inner, h)?,
            project("mlp.up_proj", inner, h)?,
        );
        let down = project("mlp.down_proj", h, inner)?;
        let gemma = c.family == Family::Gemma3;
        let before_mlp = if gemma {
            "pre_feedforward_layernorm"
        } else {
            "post_attention_layernorm"
        };
        let mut norm = |part: &str, width: usize| self.norm(package, &name(&format!("{part}.weight")), width);
        let head_norms = match c.family {
            Family::Qwen3 | Family::Gemma3 => Some((
                norm("self_attn.q_norm", c.head_dim)?,
                norm("self_attn.k_norm", c.head_dim)?,
            )),
            _ => None,
        };
        Ok(LayerWeights {
            before_attention: norm("input_layernorm", h)?,
            query,
            key,
            value,
            output,
            head_norms,
            after_attention: if gemma {
                Some(norm("post_attention_layernorm", h)?)
            } else {
                None
            },
            before_mlp: norm(before_mlp, h)?,
            gate,
            up,
            down,
            after_mlp: if gemma {
                Some(norm("post_feedforward_layernorm", h)?)
            } else {
                None
            },
        })
    }

    /// A norm's weight. Gemma stores the difference to 1.
    fn norm(&self, package: &mut ProgramBuilder, name: &str, width: usize) -> Result<Weight> {
        let mut values = self.checkpoint.read(name, &[width])?;
        if self.config.family == Family::Gemma3 {
            values
                .iter_mut()
                .for_each(|v| *v = f16::from_f32(v.to_f32() + 1.0));
        }
        package.weight(name, &[width], &values, &Compression::None)
    }

    fn projection(
        &self,
        package: &mut ProgramBuilder,
        name: &str,
        shape: [usize; 2],
        shapes: Shapes,
        how: &Compression,
    ) -> Result<Projection> {
        let weight = format!("{name}.weight");
        let values = self.checkpoint.read(&weight, &shape)?;
        let stored: &[usize] = match shapes {
            Shapes::Conv => &[shape[0], shape[1], 1, 1],
            Shapes::Matrix => &shape,
        };
        let weight = package.weight(&weight, stored, &values, how)?;
        let bias = format!("{name}.bias");
        let bias = if self.checkpoint.contains(&bias) {
            let values = self.checkpoint.read(&bias, &shape[..1])?;
            Some(package.weight(&bias, &shape[..1], &values, &Compression::None)?)
        } else {
            None
        };
        Ok(Projection { weight, bias })
    }
}
