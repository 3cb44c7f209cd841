//! The outputs of one prediction, by name and in order.

use crate::error::Error;
use crate::value::Value;
use candle_core::Tensor;
use std::collections::HashMap;

/// The outputs of one prediction, in the order the model declares them.
#[derive(Debug, Clone, Default)]
pub struct Outputs {
    values: Vec<(String, Value)>,
}

impl Outputs {
    pub(crate) fn new(values: Vec<(String, Value)>) -> Self {
        Outputs { values }
    }

    /// The output `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.iter().find(|(n, _)| n == name).map(|(_, v)| v)
    }

    /// The output `name` as a tensor (a handle on the same memory).
    ///
    /// # Errors
    /// [`Error::UnknownOutput`] with the names there are; [`Error::NotATensor`] for labels, pictures and the like.
    pub fn tensor(&self, name: &str) -> Result<Tensor, Error> {
        match self.get(name) {
            Some(Value::Tensor(tensor)) => Ok(tensor.clone()),
            Some(other) => Err(Error::NotATensor {
                name: name.to_string(),
                found: other.kind(),
            }),
            None => Err(Error::UnknownOutput {
                name: name.to_string(),
                allowed: self.names().map(str::to_string).collect(),
            }),
        }
    }

    /// The names in order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.values.iter().map(|(n, _)| n.as_str())
    }

    /// Names and values in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.values.iter().map(|(n, v)| (n.as_str(), v))
    }

    /// How many outputs there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// True for a model without outputs.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The values by name; the order is lost.
    pub fn into_map(self) -> HashMap<String, Value> {
        self.values.into_iter().collect()
    }
}

impl IntoIterator for Outputs {
    type Item = (String, Value);
    type IntoIter = std::vec::IntoIter<(String, Value)>;

    fn into_iter(self) -> Self::IntoIter {
        self.values.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn outputs() -> Outputs {
        let tensor = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap();
        Outputs::new(vec![
            ("b".to_string(), tensor.into()),
            ("a".to_string(), "cat".into()),
        ])
    }

    #[test]
    fn outputs_keep_their_order_and_are_found_by_name() {
        let outputs = outputs();
        assert_eq!(outputs.names().collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!(outputs.tensor("b").unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        assert!(matches!(outputs.get("a"), Some(Value::String(s)) if s == "cat"));
        assert_eq!(outputs.len(), outputs.clone().into_map().len());
    }

    #[test]
    fn asking_for_the_wrong_output_names_the_right_ones() {
        let words = outputs().tensor("c").unwrap_err().to_string();
        assert_eq!(words, r#"no output "c"; the outputs are: "b", "a""#);
        assert_eq!(
            outputs().tensor("a").unwrap_err().to_string(),
            r#"output "a" is a string, not a tensor"#
        );
    }
}
