//! Packages that are described and not opened: enough to wire a bundle and to show how.

use std::sync::Arc;

use candle_core::Tensor;
use candle_coreml_mil::{Description, FunctionDescription};

use super::Part;
use crate::Error;

/// What a package says of itself, at one of its functions.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    name: String,
    description: Arc<Description>,
    function: FunctionDescription,
}

impl Described {
    /// The package `name` at its default function.
    pub(crate) fn new(name: &str, description: &Description) -> Result<Self, Error> {
        let default = |f: &&FunctionDescription| f.name == description.default_function;
        let function = description
            .functions
            .iter()
            .find(default)
            .or(description.functions.first())
            .ok_or_else(|| Error::Wiring {
                part: name.to_owned(),
                function: description.default_function.clone(),
                what: "the package has no functions".to_owned(),
            })?
            .clone();
        Ok(Described {
            name: name.to_owned(),
            description: Arc::new(description.clone()),
            function,
        })
    }

    fn not_opened(&self) -> Error {
        Error::Unsupported {
            file: self.name.clone(),
            what: "predictions of a package that is described and not opened".to_owned(),
        }
    }
}

impl Part for Described {
    type State = ();

    fn name(&self) -> &str {
        &self.name
    }

    fn functions(&self) -> Vec<String> {
        self.description
            .functions
            .iter()
            .map(|f| f.name.clone())
            .collect()
    }

    fn written(&self, key: &str) -> Option<String> {
        let user = &self.description.metadata.user;
        user.iter()
            .find(|(k, _)| k == key)
            .map(|(_, value)| value.clone())
    }

    fn with_function(&self, name: &str) -> Result<Self, Error> {
        let found = self.description.functions.iter().find(|f| f.name == name);
        let function = found.ok_or_else(|| Error::Wiring {
            part: self.name.clone(),
            function: name.to_owned(),
            what: format!(
                "the package has no such function; it has {}",
                self.functions().join(", ")
            ),
        })?;
        Ok(Described {
            function: function.clone(),
            ..self.clone()
        })
    }

    fn opens_functions_fast(&self) -> bool {
        true
    }

    fn interface(&self) -> &FunctionDescription {
        &self.function
    }

    fn make_state(&self) -> Result<(), Error> {
        Ok(())
    }

    fn fork_state(&self, (): &()) -> Result<(), Error> {
        Ok(())
    }

    fn snapshot_state(&self, (): &()) -> Result<Vec<(String, Tensor)>, Error> {
        Err(self.not_opened())
    }

    fn restore_state(&self, (): &mut (), _buffers: &[(String, Tensor)]) -> Result<(), Error> {
        Err(self.not_opened())
    }

    fn predict(
        &self,
        _inputs: &[(&str, &Tensor)],
        _state: Option<&mut ()>,
    ) -> Result<Vec<(String, Tensor)>, Error> {
        Err(self.not_opened())
    }
}
