//! Weights of a file, read once for all functions, shapes and stages that use them.

use super::literal;
use crate::constant::Const;
use crate::error::OpError;
use candle_coreml_mil::{self as mil, BlobRef, ValueData, ValueType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What was read of one file; it must not be used with another.
#[derive(Debug, Default)]
pub struct Constants {
    blobs: Mutex<HashMap<(BlobRef, ValueType), Arc<Const>>>,
}

impl Constants {
    /// A literal as a constant; what lies in a weight file is shared by everyone who asks for it.
    pub(crate) fn read(&self, model: &mil::Model, value: &mil::Value) -> Result<Arc<Const>, OpError> {
        let ValueData::Blob(blob) = &value.data else {
            return literal::read(model, value).map(Arc::new);
        };
        let key = (blob.clone(), value.ty.clone());
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = blobs.get(&key) {
            return Ok(known.clone());
        }
        let constant = Arc::new(literal::read(model, value)?);
        blobs.insert(key, constant.clone());
        Ok(constant)
    }
}
