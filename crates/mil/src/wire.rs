//! The program part of the specification protobuf, as read and written here.
//!
//! The generated messages of `coreml-proto` keep maps in hash tables: slow to fill for ten thousand operations, and
//! written in another order each time. A map is the same bytes as a list of key and value, which these messages use;
//! types and values without maps are the generated ones.

use coreml_proto::proto::{ModelDescription, mil_spec as pb};
use prost::Message;

/// The fields of `CoreML.Specification.Model` needed here; the others, neural networks' weights among them, are skipped.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Model {
    #[prost(int32, tag = "1")]
    pub specification_version: i32,
    #[prost(message, optional, tag = "2")]
    pub description: Option<ModelDescription>,
    #[prost(message, optional, tag = "502")]
    pub program: Option<Program>,
}

/// One entry of a map.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Entry<V: Message + Default + std::fmt::Debug> {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(message, optional, tag = "2")]
    pub value: Option<V>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Program {
    #[prost(int64, tag = "1")]
    pub version: i64,
    #[prost(message, repeated, tag = "2")]
    pub functions: Vec<Entry<Function>>,
    #[prost(message, repeated, tag = "4")]
    pub attributes: Vec<Entry<pb::Value>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Function {
    #[prost(message, repeated, tag = "1")]
    pub inputs: Vec<pb::NamedValueType>,
    #[prost(string, tag = "2")]
    pub opset: String,
    #[prost(message, repeated, tag = "3")]
    pub block_specializations: Vec<Entry<Block>>,
    #[prost(message, repeated, tag = "4")]
    pub attributes: Vec<Entry<pb::Value>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Block {
    #[prost(message, repeated, tag = "1")]
    pub inputs: Vec<pb::NamedValueType>,
    #[prost(string, repeated, tag = "2")]
    pub outputs: Vec<String>,
    #[prost(message, repeated, tag = "3")]
    pub operations: Vec<Operation>,
    #[prost(message, repeated, tag = "4")]
    pub attributes: Vec<Entry<pb::Value>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Operation {
    #[prost(string, tag = "1")]
    pub op_type: String,
    #[prost(message, repeated, tag = "2")]
    pub inputs: Vec<Entry<pb::Argument>>,
    #[prost(message, repeated, tag = "3")]
    pub outputs: Vec<pb::NamedValueType>,
    #[prost(message, repeated, tag = "4")]
    pub blocks: Vec<Block>,
    #[prost(message, repeated, tag = "5")]
    pub attributes: Vec<Entry<pb::Value>>,
}

/// Reads the entries of a map, sorted by key.
pub(crate) fn read_map<V: Message + Default + std::fmt::Debug, T, E>(
    entries: Vec<Entry<V>>,
    mut read: impl FnMut(&str, V) -> Result<T, E>,
) -> Result<Vec<(String, T)>, E> {
    let mut read = |entry: Entry<V>| {
        let value = read(&entry.key, entry.value.unwrap_or_default())?;
        Ok((entry.key, value))
    };
    let mut map: Vec<_> = entries.into_iter().map(&mut read).collect::<Result<_, E>>()?;
    map.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(map)
}

/// The entries of a map, sorted by key.
pub(crate) fn write_map<'a, V: Message + Default + std::fmt::Debug, T: 'a>(
    items: impl Iterator<Item = (&'a String, &'a T)>,
    write: impl Fn(&T) -> V,
) -> Vec<Entry<V>> {
    let mut entries: Vec<_> = items
        .map(|(key, item)| Entry {
            key: key.clone(),
            value: Some(write(item)),
        })
        .collect();
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    entries
}
