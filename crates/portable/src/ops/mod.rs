//! The registry: one module a family of operators, one row an operator.

pub mod activation;
pub mod blocks;
pub mod classify;
pub mod constexpr;
pub mod control_flow;
pub mod conv;
pub mod dense;
pub mod elementwise_binary;
pub mod elementwise_unary;
pub mod image_resizing;
pub mod linear;
pub mod lists;
pub mod non_zero;
pub mod normalization;
pub mod pool;
pub mod quantization_ops;
pub mod random;
pub mod recurrent;
pub mod reduction;
pub mod rotary;
pub mod scatter_gather;
pub mod states;
pub mod tensor_operation;
pub mod tensor_transformation;
pub mod transformers;
pub mod view;

use crate::op::OpSpec;
use std::collections::HashMap;
use std::sync::OnceLock;

/// Every family's list.
pub const FAMILIES: &[&[&OpSpec]] = &[
    activation::OPS,
    blocks::OPS,
    classify::OPS,
    constexpr::OPS,
    control_flow::OPS,
    conv::OPS,
    elementwise_binary::OPS,
    elementwise_unary::OPS,
    image_resizing::OPS,
    linear::OPS,
    lists::OPS,
    non_zero::OPS,
    normalization::OPS,
    pool::OPS,
    quantization_ops::OPS,
    random::OPS,
    recurrent::OPS,
    reduction::OPS,
    scatter_gather::OPS,
    states::OPS,
    tensor_operation::OPS,
    tensor_transformation::OPS,
    transformers::OPS,
];

/// The row of the operator `name`.
pub fn spec(name: &str) -> Option<&'static OpSpec> {
    static BY_NAME: OnceLock<HashMap<&'static str, &'static OpSpec>> = OnceLock::new();
    let rows = || FAMILIES.iter().flat_map(|family| family.iter());
    BY_NAME
        .get_or_init(|| rows().map(|s| (s.name, *s)).collect())
        .get(name)
        .copied()
}

/// Shape of an elementwise result, numpy's rule.
pub fn broadcast_shape(a: &[usize], b: &[usize]) -> Result<crate::layout::Shape, String> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| (i + s.len()).checked_sub(rank).map_or(1, |j| s[j]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => Err(format!("shapes {a:?} and {b:?} do not broadcast")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operator_names_are_unique() {
        let mut seen = std::collections::HashSet::new();
        let twice: Vec<&str> = FAMILIES
            .iter()
            .flat_map(|f| f.iter())
            .map(|s| s.name)
            .filter(|n| !seen.insert(*n))
            .collect();
        assert!(twice.is_empty(), "listed twice: {twice:?}");
    }

    #[test]
    fn shapes_broadcast_from_the_last_dimension() {
        assert_eq!(
            broadcast_shape(&[2, 1, 4], &[3, 1]).expect("fits").as_slice(),
            &[2, 3, 4]
        );
        assert_eq!(broadcast_shape(&[], &[0, 3]).expect("fits").as_slice(), &[0, 3]);
        assert!(broadcast_shape(&[2], &[3]).is_err());
    }
}
