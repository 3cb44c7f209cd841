//! `einsum` of two values: dimensions put in order, one matrix product, dimensions put back.

use crate::error::{OpError, OpResult};
use crate::graph::ValueId;
use crate::layout::{Shape, elements};
use crate::lower::OpCx;

/// The letters of an equation `a,b->c`, each operand's letters different.
struct Equation {
    operands: [Vec<char>; 2],
    result: Vec<char>,
}

impl Equation {
    fn parse(text: &str) -> OpResult<Equation> {
        let bad = || {
            OpError::new(format!(
                "equation {text:?} is not two operands and a result, as \"ab,bc->ac\""
            ))
        };
        let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let (left, result) = text.split_once("->").ok_or_else(bad)?;
        let (a, b) = left.split_once(',').ok_or_else(bad)?;
        let letters = |part: &str| -> OpResult<Vec<char>> {
            let all: Vec<char> = part.chars().collect();
            let plain = all.iter().all(char::is_ascii_alphabetic);
            let once = (1..all.len()).all(|i| !all[..i].contains(&all[i]));
            if plain && once { Ok(all) } else { Err(bad()) }
        };
        let equation = Equation {
            operands: [letters(a)?, letters(b)?],
            result: letters(result)?,
        };
        let [a, b] = &equation.operands;
        let known = |c: &char| a.contains(c) || b.contains(c);
        // A letter in one operand and not in the result would be a sum before the product.
        let lone = |c: &char| !equation.result.contains(c) && a.contains(c) != b.contains(c);
        if !equation.result.iter().all(known) || a.iter().chain(b).any(lone) {
            return Err(bad());
        }
        Ok(equation)
    }

    /// Letters of operand `n` by what the product does with them: in both and kept, in this one and kept, summed over.
    fn kinds(&self, n: usize) -> [Vec<char>; 3] {
        let [mine, other] = [&self.operands[n], &self.operands[1 - n]];
        let pick = |f: &dyn Fn(char) -> bool| mine.iter().copied().filter(|&c| f(c)).collect();
        let kept = |c: char| self.result.contains(&c);
        [
            self.result
                .iter()
                .copied()
                .filter(|c| mine.contains(c) && other.contains(c))
                .collect(),
            pick(&|c| kept(c) && !other.contains(&c)),
            // Both operands list the summed letters in the order of the first.
            self.operands[0].iter().copied().filter(|&c| !kept(c)).collect(),
        ]
    }
}

/// Lowers `einsum`.
pub fn lower_einsum(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let values = cx.values("values")?;
    let [a, b] = values.as_slice() else {
        return Err(format!("values has {} entries, 2 are allowed", values.len()).into());
    };
    let text = cx.text("equation")?.ok_or("parameter \"equation\" is missing")?;
    let equation = Equation::parse(&text)?;
    let size = sizes(cx, &equation, [*a, *b])?;
    let left = arrange(cx, &equation, 0, *a, &size)?;
    let right = arrange(cx, &equation, 1, *b, &size)?;
    let product = cx.matmul(left, right)?;
    let [batch, rows, _] = equation.kinds(0);
    let [_, cols, _] = equation.kinds(1);
    let order: Vec<char> = batch.into_iter().chain(rows).chain(cols).collect();
    let shape: Shape = order.iter().map(|c| size(*c)).collect();
    let spread = cx.reshape(product, &shape)?;
    let place = |c: &char| order.iter().position(|o| o == c).unwrap_or(0);
    let perm: Shape = equation.result.iter().map(place).collect();
    let y = cx.permute(spread, &perm)?;
    cx.result(y)
}

/// The length of each letter: that of the operands, one of which may have 1.
fn sizes(
    cx: &OpCx<'_, '_>,
    equation: &Equation,
    values: [ValueId; 2],
) -> OpResult<impl Fn(char) -> usize + use<>> {
    let mut known: Vec<(char, usize)> = Vec::new();
    for (letters, value) in equation.operands.iter().zip(values) {
        let shape = cx.shape(value);
        if shape.len() != letters.len() {
            return Err(format!("shape {:?} does not fit {letters:?}", shape.as_slice()).into());
        }
        for (&c, &d) in letters.iter().zip(&shape) {
            match known.iter_mut().find(|(k, _)| *k == c) {
                None => known.push((c, d)),
                Some((_, have)) if *have == d || d == 1 => {}
                Some((_, have)) if *have == 1 => *have = d,
                Some((_, have)) => return Err(format!("dimension {c:?} is {have} and {d}").into()),
            }
        }
    }
    Ok(move |c| known.iter().find(|(k, _)| *k == c).map_or(1, |(_, d)| *d))
}

/// Operand `n` as `[batch, rows, summed]`, the second one as `[batch, summed, columns]`.
fn arrange(
    cx: &mut OpCx<'_, '_>,
    equation: &Equation,
    n: usize,
    value: ValueId,
    size: &dyn Fn(char) -> usize,
) -> OpResult<ValueId> {
    let [batch, own, summed] = equation.kinds(n);
    let (middle, last) = if n == 0 { (own, summed) } else { (summed, own) };
    let order: Vec<char> = [&batch, &middle, &last].into_iter().flatten().copied().collect();
    let place = |c: &char| equation.operands[n].iter().position(|o| o == c).unwrap_or(0);
    let perm: Shape = order.iter().map(place).collect();
    let turned = cx.permute(value, &perm)?;
    let full: Shape = order.iter().map(|c| size(*c)).collect();
    let wide = cx.broadcast(turned, &full)?;
    let (b, m) = (batch.len(), batch.len() + middle.len());
    cx.reshape(
        wide,
        &[elements(&full[..b]), elements(&full[b..m]), elements(&full[m..])],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations_are_read_or_refused() {
        let e = Equation::parse("nchw, nwhu -> nchu").expect("two operands");
        assert_eq!(e.kinds(0), [vec!['n', 'h'], vec!['c'], vec!['w']]);
        assert_eq!(e.kinds(1), [vec!['n', 'h'], vec!['u'], vec!['w']]);
        for text in ["ab->a", "ab,bc", "aab,b->a", "ab,bc->ad", "ab,c->ac", "...a,a->a"] {
            assert!(Equation::parse(text).is_err(), "{text}");
        }
    }
}
