//! Core ML models with Candle tensors.
