//! What a model says about itself: inputs, outputs, states, functions, flexible shapes and metadata.

use crate::program::DType;

/// A model's interface and metadata.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Description {
    /// One entry a function; models with a single function call it `main`.
    pub functions: Vec<FunctionDescription>,
    /// The function used when the caller names none.
    pub default_function: String,
    /// Specification version: 4 to 10.
    pub specification_version: i32,
    /// Author, licence, version, description and the user's own keys.
    pub metadata: Metadata,
    /// What kind of model the file holds.
    pub kind: ModelKind,
    /// Name of the output with the predicted label, for classifiers.
    pub predicted_feature: Option<String>,
    /// Name of the output with the probabilities by label, for classifiers.
    pub predicted_probabilities: Option<String>,
}

/// Kinds of Core ML models. Only [`ModelKind::Program`] carries a [`crate::Program`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ModelKind {
    /// An ML Program (MIL).
    #[default]
    Program,
    /// Any other kind, by the protobuf's own name: `neuralNetwork`, `pipeline`, `glmClassifier`.
    Other(String),
}

/// Interface of one function.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FunctionDescription {
    /// The function's name.
    pub name: String,
    /// Inputs in the order of the file.
    pub inputs: Vec<Feature>,
    /// Outputs in the order of the file.
    pub outputs: Vec<Feature>,
    /// States in the order of the file.
    pub states: Vec<Feature>,
}

/// One input, output or state.
#[derive(Debug, Clone, PartialEq)]
pub struct Feature {
    /// The name predictions use.
    pub name: String,
    /// The author's words about it, perhaps empty.
    pub description: String,
    /// What it holds.
    pub ty: FeatureType,
    /// True when a prediction may leave it out.
    pub optional: bool,
}

/// What a feature holds.
#[derive(Debug, Clone, PartialEq)]
pub enum FeatureType {
    /// A multi-array.
    MultiArray(ArrayDescription),
    /// A picture.
    Image(ImageDescription),
    /// A 64-bit integer.
    Int64,
    /// A double.
    Double,
    /// A string, for instance a predicted label.
    String,
    /// A map from labels to doubles, for instance class probabilities.
    Dictionary {
        /// True when the keys are integers, false when they are strings.
        integer_keys: bool,
    },
    /// A sequence of integers or strings.
    Sequence {
        /// True when the elements are integers, false when they are strings.
        integer_elements: bool,
    },
    /// A state's buffer.
    State(ArrayDescription),
}

/// Element type and allowed shapes of a multi-array.
#[derive(Debug, Clone, PartialEq)]
pub struct ArrayDescription {
    /// `Fp16`, `Fp32`, `Fp64`, `Int32` or `Int8`.
    pub dtype: DType,
    /// The default shape, outermost dimension first; empty where the file gives none.
    pub shape: Vec<usize>,
    /// Which other shapes are allowed.
    pub flexibility: Flexibility,
    /// Value of an optional input that is left out.
    pub default_value: Option<f64>,
}

/// Shapes a multi-array accepts.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Flexibility {
    /// The default shape only.
    #[default]
    Fixed,
    /// One of these.
    Enumerated(Vec<Vec<usize>>),
    /// Each dimension between its bounds, inclusive; no upper bound is `None`.
    Ranges(Vec<(usize, Option<usize>)>),
}

/// Size and pixel layout of an image feature.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageDescription {
    /// Default width in pixels.
    pub width: usize,
    /// Default height in pixels.
    pub height: usize,
    /// Pixel layout.
    pub color: ColorSpace,
    /// Which other sizes are allowed, as [height, width].
    pub flexibility: Flexibility,
}

/// Pixel layouts of image features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColorSpace {
    /// 8 bits of grey.
    Grayscale,
    /// 16-bit float grey.
    GrayscaleFp16,
    /// 8 bits each, red first.
    Rgb,
    /// 8 bits each, blue first.
    Bgr,
}

/// Author, licence, version, description and the user's own keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// What the model is for.
    pub short_description: String,
    /// Who made it.
    pub author: String,
    /// Terms of use.
    pub license: String,
    /// The author's version.
    pub version: String,
    /// Other keys, sorted, for instance `com.github.apple.coremltools.version`.
    pub user: Vec<(String, String)>,
}
