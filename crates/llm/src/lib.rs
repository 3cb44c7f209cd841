//! Language models packaged for Core ML.
