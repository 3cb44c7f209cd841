//! Weights of a file, read once for all functions, shapes and stages that use them.

use super::literal;
use crate::constant::Const;
use crate::error::OpError;
use candle_coreml_mil::{self as mil, BlobRef, ValueData, ValueType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What was read of one file. It belongs to that opened file and must not be used with another.
#[derive(Debug, Default)]
pub struct Constants {
    blobs: Mutex<HashMap<(BlobRef, ValueType), Arc<Const>>>,
    /// Results of operations that read constants of the file alone, by the operation's address in the opened file.
    derived: Mutex<HashMap<usize, Vec<Arc<Const>>>>,
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

    /// The results of an operation that were computed before.
    pub(crate) fn derived(&self, op: &mil::Operation) -> Option<Vec<Arc<Const>>> {
        let derived = self.derived.lock().unwrap_or_else(PoisonError::into_inner);
        derived.get(&address(op)).cloned()
    }

    /// Keeps the results of an operation that reads constants of the file alone.
    pub(crate) fn keep(&self, op: &mil::Operation, results: Vec<Arc<Const>>) {
        let mut derived = self.derived.lock().unwrap_or_else(PoisonError::into_inner);
        derived.insert(address(op), results);
    }
}

fn address(op: &mil::Operation) -> usize {
    std::ptr::from_ref(op).addr()
}
