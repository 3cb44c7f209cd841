//! Operators whose result types follow from their arguments: the words language models are written in.

use candle_coreml_mil::{DType, Dim, TensorType};

use crate::error::{Error, Result};
use crate::function::{Arg, FunctionBuilder, Var};
use crate::literal;

impl FunctionBuilder {
    /// `x op y` element by element for `add`, `sub`, `mul`, `real_div`, `maximum`, `minimum`, `pow`; numpy's broadcasting.
    ///
    /// # Errors
    /// [`Error::Op`] for other operators, element types that differ and shapes that do not broadcast.
    pub fn binary(&mut self, op: &str, x: &Var, y: &Var) -> Result<Var> {
        const KNOWN: [&str; 7] = ["add", "sub", "mul", "real_div", "maximum", "minimum", "pow"];
        if !KNOWN.contains(&op) {
            return Err(Error::op(op, format!("not one of {}", KNOWN.join(", "))));
        }
        if x.dtype() != y.dtype() {
            return Err(Error::op(op, format!("{} and {} differ", x.ty(), y.ty())));
        }
        let shape = broadcast(x.dims(), y.dims())
            .ok_or_else(|| Error::op(op, format!("{} and {} do not broadcast", x.ty(), y.ty())))?;
        let ty = TensorType {
            dtype: x.dtype(),
            shape,
        };
        self.op(op, &[("x", x.into()), ("y", y.into())], &ty)
    }

    /// `x + y`.
    ///
    /// # Errors
    /// As [`FunctionBuilder::binary`].
    pub fn add(&mut self, x: &Var, y: &Var) -> Result<Var> {
        self.binary("add", x, y)
    }

    /// `x * y`.
    ///
    /// # Errors
    /// As [`FunctionBuilder::binary`].
    pub fn mul(&mut self, x: &Var, y: &Var) -> Result<Var> {
        self.binary("mul", x, y)
    }

    /// `x * factor`, the factor in the type of `x`.
    ///
    /// # Errors
    /// [`Error::Op`] when `x` holds no 16- or 32-bit floats.
    pub fn scale(&mut self, x: &Var, factor: f32) -> Result<Var> {
        let factor = match x.dtype() {
            DType::Fp16 => literal::half(factor),
            DType::Fp32 => literal::float(factor),
            other => return Err(Error::op("mul", format!("a factor for {other}"))),
        };
        self.op("mul", &[("x", x.into()), ("y", factor.into())], x.ty())
    }

    /// An operator of one input that keeps its type: `silu`, `relu`, `tanh`, `sigmoid`, `identity`.
    ///
    /// # Errors
    /// As [`FunctionBuilder::op`].
    pub fn unary(&mut self, op: &str, x: &Var) -> Result<Var> {
        self.op(op, &[("x", x.into())], x.ty())
    }

    /// Gaussian error linear unit; `mode` is `EXACT`, `TANH_APPROXIMATION` or `SIGMOID_APPROXIMATION`.
    ///
    /// # Errors
    /// As [`FunctionBuilder::op`].
    pub fn gelu(&mut self, x: &Var, mode: &str) -> Result<Var> {
        self.op(
            "gelu",
            &[("x", x.into()), ("mode", literal::text(mode).into())],
            x.ty(),
        )
    }

    /// `x` in another element type.
    ///
    /// # Errors
    /// As [`FunctionBuilder::op`].
    pub fn cast(&mut self, x: &Var, dtype: DType) -> Result<Var> {
        let ty = TensorType {
            dtype,
            shape: x.dims().to_vec(),
        };
        self.op(
            "cast",
            &[("x", x.into()), ("dtype", literal::text(dtype.name()).into())],
            &ty,
        )
    }

    /// The elements of `x` in another shape; one dimension may be -1.
    ///
    /// # Errors
    /// [`Error::Op`] when the number of elements differs.
    pub fn reshape(&mut self, x: &Var, shape: &[i32]) -> Result<Var> {
        let ty = TensorType {
            dtype: x.dtype(),
            shape: reshaped(x, shape)?,
        };
        self.op(
            "reshape",
            &[("x", x.into()), ("shape", literal::ints(shape).into())],
            &ty,
        )
    }

    /// Dimensions in another order.
    ///
    /// # Errors
    /// [`Error::Op`] when `perm` is no permutation of the dimensions.
    pub fn transpose(&mut self, x: &Var, perm: &[usize]) -> Result<Var> {
        let mut sorted = perm.to_vec();
        sorted.sort_unstable();
        if sorted.into_iter().ne(0..x.dims().len()) {
            return Err(Error::op(
                "transpose",
                format!("{perm:?} is no permutation for {}", x.ty()),
            ));
        }
        let shape = perm.iter().filter_map(|&p| x.dims().get(p).copied()).collect();
        let ty = TensorType {
            dtype: x.dtype(),
            shape,
        };
        self.op(
            "transpose",
            &[("x", x.into()), ("perm", literal::ints(&as_i32(perm)?).into())],
            &ty,
        )
    }

    /// A dimension of size 1 at `axis` of the result.
    ///
    /// # Errors
    /// [`Error::Op`] when `axis` is past the end.
    pub fn expand_dims(&mut self, x: &Var, axis: usize) -> Result<Var> {
        let mut shape = x.dims().to_vec();
        if axis > shape.len() {
            return Err(Error::op("expand_dims", format!("axis {axis} of {}", x.ty())));
        }
        shape.insert(axis, Dim::Fixed(1));
        let ty = TensorType {
            dtype: x.dtype(),
            shape,
        };
        self.op(
            "expand_dims",
            &[("x", x.into()), ("axes", literal::ints(&as_i32(&[axis])?).into())],
            &ty,
        )
    }

    /// `x` without its dimension `axis`, which has size 1.
    ///
    /// # Errors
    /// [`Error::Op`] when that dimension has another size.
    pub fn squeeze(&mut self, x: &Var, axis: usize) -> Result<Var> {
        let mut shape = x.dims().to_vec();
        if shape.get(axis) != Some(&Dim::Fixed(1)) {
            return Err(Error::op("squeeze", format!("axis {axis} of {}", x.ty())));
        }
        shape.remove(axis);
        let ty = TensorType {
            dtype: x.dtype(),
            shape,
        };
        self.op(
            "squeeze",
            &[("x", x.into()), ("axes", literal::ints(&as_i32(&[axis])?).into())],
            &ty,
        )
    }

    /// Values one after the other along `axis`.
    ///
    /// # Errors
    /// [`Error::Op`] for no values, an axis past the end, and unlike types.
    pub fn concat(&mut self, values: &[&Var], axis: usize) -> Result<Var> {
        let wrong = || {
            let types: Vec<_> = values.iter().map(|v| v.ty().to_string()).collect();
            Error::op("concat", format!("axis {axis} of {}", types.join(", ")))
        };
        let first = values.first().ok_or_else(wrong)?;
        let mut shape = first.dims().to_vec();
        let mut total = Some(0usize);
        for v in values {
            let mut like = v.dims().to_vec();
            let size = std::mem::replace(like.get_mut(axis).ok_or_else(wrong)?, shape[axis]);
            if like != shape || v.dtype() != first.dtype() {
                return Err(wrong());
            }
            total = total.zip(fixed(size)).map(|(a, b)| a + b);
        }
        shape[axis] = total.map_or(Dim::Unknown, Dim::Fixed);
        let ty = TensorType {
            dtype: first.dtype(),
            shape,
        };
        let list = values.iter().map(|v| Arg::from(*v)).collect::<Vec<_>>();
        let axis = literal::ints(&as_i32(&[axis])?);
        let args = [
            ("values", list.into()),
            ("axis", scalar(axis)),
            ("interleave", literal::flag(false).into()),
        ];
        self.op("concat", &args, &ty)
    }

    /// Elements `from..to` of dimension `axis`, the other dimensions whole.
    ///
    /// # Errors
    /// [`Error::Op`] when the range does not lie in the dimension.
    pub fn slice(&mut self, x: &Var, axis: usize, from: usize, to: usize) -> Result<Var> {
        let inside = x
            .dims()
            .get(axis)
            .is_some_and(|d| fixed(*d).is_none_or(|n| to <= n));
        if from >= to || !inside {
            return Err(Error::op(
                "slice_by_index",
                format!("{from}..{to} of axis {axis} of {}", x.ty()),
            ));
        }
        let rank = x.dims().len();
        let mut shape = x.dims().to_vec();
        shape[axis] = Dim::Fixed(to - from);
        let (mut begin, mut end) = (
            vec![0; rank],
            x.dims()
                .iter()
                .map(|d| fixed(*d).unwrap_or(0))
                .collect::<Vec<_>>(),
        );
        (begin[axis], end[axis]) = (from, to);
        let whole: Vec<bool> = (0..rank).map(|i| i != axis).collect();
        let args = [
            ("x", x.into()),
            ("begin", literal::ints(&as_i32(&begin)?).into()),
            ("end", literal::ints(&as_i32(&end)?).into()),
            ("begin_mask", literal::flags(&whole).into()),
            ("end_mask", literal::flags(&whole).into()),
        ];
        self.op(
            "slice_by_index",
            &args,
            &TensorType {
                dtype: x.dtype(),
                shape,
            },
        )
    }

    /// `x` repeated `reps` times along each dimension.
    ///
    /// # Errors
    /// [`Error::Op`] when there is not one number for each dimension.
    pub fn tile(&mut self, x: &Var, reps: &[usize]) -> Result<Var> {
        if reps.len() != x.dims().len() {
            return Err(Error::op("tile", format!("{reps:?} for {}", x.ty())));
        }
        let shape = x
            .dims()
            .iter()
            .zip(reps)
            .map(|(d, r)| fixed(*d).map_or(Dim::Unknown, |n| Dim::Fixed(n * r)));
        let ty = TensorType {
            dtype: x.dtype(),
            shape: shape.collect(),
        };
        self.op(
            "tile",
            &[("x", x.into()), ("reps", literal::ints(&as_i32(reps)?).into())],
            &ty,
        )
    }

    /// Rows of `x` along `axis` at `indices`, whose shape takes the place of that dimension.
    ///
    /// # Errors
    /// [`Error::Op`] when the axis is past the end.
    pub fn gather(&mut self, x: &Var, indices: &Var, axis: usize) -> Result<Var> {
        let (before, after) = (x.dims().get(..axis), x.dims().get(axis + 1..));
        let (Some(before), Some(after)) = (before, after) else {
            return Err(Error::op("gather", format!("axis {axis} of {}", x.ty())));
        };
        let ty = TensorType {
            dtype: x.dtype(),
            shape: [before, indices.dims(), after].concat(),
        };
        let args = [
            ("x", x.into()),
            ("indices", indices.into()),
            ("axis", scalar(literal::ints(&as_i32(&[axis])?))),
            ("batch_dims", literal::int(0).into()),
            ("validate_indices", literal::flag(false).into()),
        ];
        self.op("gather", &args, &ty)
    }

    /// Matrix product of the last two dimensions, `y` transposed on request.
    ///
    /// # Errors
    /// [`Error::Op`] when the sizes do not fit.
    pub fn matmul(&mut self, x: &Var, y: &Var, transpose_y: bool) -> Result<Var> {
        let wrong = || {
            Error::op(
                "matmul",
                format!("{} by {} (transposed: {transpose_y})", x.ty(), y.ty()),
            )
        };
        let (Some((bx, [m, k])), Some((by, [p, q]))) =
            (x.dims().split_last_chunk::<2>(), y.dims().split_last_chunk::<2>())
        else {
            return Err(wrong());
        };
        let (inner, n) = if transpose_y { (q, p) } else { (p, q) };
        let fits = k == inner || *k == Dim::Unknown || *inner == Dim::Unknown;
        let mut shape = broadcast(bx, by).filter(|_| fits).ok_or_else(wrong)?;
        shape.extend([*m, *n]);
        let args = [
            ("x", x.into()),
            ("y", y.into()),
            ("transpose_x", literal::flag(false).into()),
            ("transpose_y", literal::flag(transpose_y).into()),
        ];
        self.op(
            "matmul",
            &args,
            &TensorType {
                dtype: x.dtype(),
                shape,
            },
        )
    }

    /// `x Wᵀ + b` over the last dimension; `weight` is `[out, in]`, `bias` `[out]`.
    ///
    /// # Errors
    /// [`Error::Op`] when the sizes do not fit.
    pub fn linear(&mut self, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
        let (Some((inner, lead)), [out, needed]) = (x.dims().split_last(), weight.dims()) else {
            return Err(Error::op("linear", format!("{} by {}", x.ty(), weight.ty())));
        };
        if inner != needed {
            return Err(Error::op("linear", format!("{} by {}", x.ty(), weight.ty())));
        }
        let ty = TensorType {
            dtype: x.dtype(),
            shape: [lead, &[*out]].concat(),
        };
        let mut args = vec![("x", x.into()), ("weight", weight.into())];
        args.extend(bias.map(|b| ("bias", b.into())));
        self.op("linear", &args, &ty)
    }

    /// A projection as the Neural Engine likes it: a 1x1 convolution of `x` [1, in, 1, n] by `weight` [out, in, 1, 1].
    ///
    /// # Errors
    /// [`Error::Op`] when the sizes do not fit.
    pub fn conv1x1(&mut self, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
        let (&[batch, inner, height, width], &[out, needed, Dim::Fixed(1), Dim::Fixed(1)]) =
            (x.dims(), weight.dims())
        else {
            return Err(Error::op("conv", format!("{} by {}", x.ty(), weight.ty())));
        };
        if inner != needed {
            return Err(Error::op("conv", format!("{} by {}", x.ty(), weight.ty())));
        }
        let ty = TensorType {
            dtype: x.dtype(),
            shape: vec![batch, out, height, width],
        };
        let mut args = vec![
            ("x", x.into()),
            ("weight", weight.into()),
            ("strides", literal::ints(&[1, 1]).into()),
            ("pad_type", literal::text("valid").into()),
            ("pad", literal::ints(&[0, 0, 0, 0]).into()),
            ("dilations", literal::ints(&[1, 1]).into()),
            ("groups", literal::int(1).into()),
        ];
        args.extend(bias.map(|b| ("bias", b.into())));
        self.op("conv", &args, &ty)
    }

    /// Softmax over the last dimension.
    ///
    /// # Errors
    /// As [`FunctionBuilder::op`].
    pub fn softmax(&mut self, x: &Var) -> Result<Var> {
        self.op(
            "softmax",
            &[("x", x.into()), ("axis", literal::int(-1).into())],
            x.ty(),
        )
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, spelled as a layer norm of `x` beside `-x`, whose mean
    /// is 0 and whose variance is the mean of squares: the Neural Engine keeps that sum in more than 16 bits.
    ///
    /// # Errors
    /// [`Error::Op`] when the last dimension is not fixed.
    pub fn rms_norm(&mut self, x: &Var, weight: &Var, eps: f32) -> Result<Var> {
        let axis = x.dims().len().saturating_sub(1);
        let Some(width) = x.dims().last().and_then(|d| fixed(*d)) else {
            return Err(Error::op(
                "layer_norm",
                format!("the last dimension of {} is not fixed", x.ty()),
            ));
        };
        let negative = self.scale(x, -1.0)?;
        let both = self.concat(&[x, &negative], axis)?;
        let args = [
            ("x", (&both).into()),
            ("axes", literal::ints(&[-1]).into()),
            ("epsilon", literal::half(eps).into()),
        ];
        let normed = self.op("layer_norm", &args, both.ty())?;
        let half = self.slice(&normed, axis, 0, width)?;
        self.mul(&half, weight)
    }

    /// Layer norm over the last dimension.
    ///
    /// # Errors
    /// As [`FunctionBuilder::op`].
    pub fn layer_norm(&mut self, x: &Var, gamma: &Var, beta: &Var, eps: f32) -> Result<Var> {
        let eps = if x.dtype() == DType::Fp16 {
            literal::half(eps)
        } else {
            literal::float(eps)
        };
        let args = [
            ("x", x.into()),
            ("axes", literal::ints(&[-1]).into()),
            ("gamma", gamma.into()),
            ("beta", beta.into()),
            ("epsilon", eps.into()),
        ];
        self.op("layer_norm", &args, x.ty())
    }

    /// What `state` holds now.
    ///
    /// # Errors
    /// As [`FunctionBuilder::op`].
    pub fn read_state(&mut self, state: &Var) -> Result<Var> {
        self.op("read_state", &[("input", state.into())], state.ty())
    }

    /// Makes `value` the content of `state`.
    ///
    /// # Errors
    /// As [`FunctionBuilder::op`].
    pub fn write_state(&mut self, state: &Var, value: &Var) -> Result<()> {
        self.op_with_results(
            "write_state",
            &[("input", state.into()), ("data", value.into())],
            &[],
        )?;
        Ok(())
    }
}

/// A vector of one literal as a scalar argument.
fn scalar(mut vector: candle_coreml_mil::Value) -> Arg {
    vector.ty = candle_coreml_mil::ValueType::Tensor(TensorType {
        dtype: DType::Int32,
        shape: Vec::new(),
    });
    vector.into()
}

pub(crate) fn fixed(dim: Dim) -> Option<usize> {
    match dim {
        Dim::Fixed(n) => Some(n),
        Dim::Unknown | Dim::Variadic => None,
    }
}

pub(crate) fn as_i32(sizes: &[usize]) -> Result<Vec<i32>> {
    let convert = |&n: &usize| i32::try_from(n);
    sizes.iter().map(convert).collect::<Result<_, _>>().map_err(|_| {
        let largest = i32::MAX;
        Error::op("const", format!("{sizes:?}: at most {largest}"))
    })
}

fn broadcast(x: &[Dim], y: &[Dim]) -> Option<Vec<Dim>> {
    let rank = x.len().max(y.len());
    let at = |s: &[Dim], i: usize| (i + s.len()).checked_sub(rank).map_or(Dim::Fixed(1), |j| s[j]);
    let one = Dim::Fixed(1);
    let join = |(a, b): (Dim, Dim)| match (a, b) {
        (a, b) if a == b || b == one => Some(a),
        (a, b) if a == one => Some(b),
        (Dim::Unknown, b) => Some(b),
        (a, Dim::Unknown) => Some(a),
        _ => None,
    };
    (0..rank).map(|i| join((at(x, i), at(y, i)))).collect()
}

fn reshaped(x: &Var, shape: &[i32]) -> Result<Vec<Dim>> {
    let wrong = || Error::op("reshape", format!("{} to {shape:?}", x.ty()));
    let known: Option<usize> = shape
        .iter()
        .filter(|d| **d != -1)
        .try_fold(1usize, |n, d| n.checked_mul(usize::try_from(*d).ok()?));
    let known = known.ok_or_else(wrong)?;
    let open = shape.iter().filter(|d| **d == -1).count();
    let rest = match (x.ty().element_count(), open) {
        (Some(count), 0) if count == known => None,
        (Some(count), 1) if known > 0 && count % known == 0 => Some(Dim::Fixed(count / known)),
        (None, 0) => None,
        (None, 1) => Some(Dim::Unknown),
        _ => return Err(wrong()),
    };
    let dim = |d: &i32| usize::try_from(*d).map_or(rest.unwrap_or(Dim::Unknown), Dim::Fixed);
    Ok(shape.iter().map(dim).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(text: &[i32]) -> Vec<Dim> {
        text.iter()
            .map(|&d| usize::try_from(d).map_or(Dim::Unknown, Dim::Fixed))
            .collect()
    }

    #[test]
    fn shapes_broadcast_with_unknown_dimensions() {
        type Case<'a> = (&'a [i32], &'a [i32], Option<&'a [i32]>);
        let cases: [Case<'_>; 6] = [
            (&[1, 4], &[3, 1], Some(&[3, 4])),
            (&[-1, 4], &[4], Some(&[-1, 4])),
            (&[1, -1], &[1, 1], Some(&[1, -1])),
            (&[-1], &[5], Some(&[5])),
            (&[], &[2], Some(&[2])),
            (&[2], &[3], None),
        ];
        for (x, y, expected) in cases {
            assert_eq!(broadcast(&dims(x), &dims(y)), expected.map(dims), "{x:?} {y:?}");
        }
    }

    #[test]
    fn result_types_follow_the_arguments_and_misfits_are_refused() {
        let mut f = FunctionBuilder::new("main");
        let x = f.input("x", DType::Fp16, &[1, 4, 2, 3]).unwrap();
        let w = f.input("w", DType::Fp16, &[8, 4, 1, 1]).unwrap();
        let i = f.input("i", DType::Int32, &[5]).unwrap();
        let shape = |v: Result<Var>| v.unwrap().ty().fixed_shape().unwrap();
        assert_eq!(shape(f.conv1x1(&x, &w, None)), [1, 8, 2, 3]);
        assert_eq!(shape(f.reshape(&x, &[4, -1])), [4, 6]);
        assert_eq!(shape(f.transpose(&x, &[0, 3, 2, 1])), [1, 3, 2, 4]);
        assert_eq!(shape(f.gather(&x, &i, 1)), [1, 5, 2, 3]);
        assert_eq!(shape(f.matmul(&x, &x, true)), [1, 4, 2, 2]);
        assert_eq!(shape(f.slice(&x, 1, 1, 3)), [1, 2, 2, 3]);
        assert_eq!(shape(f.concat(&[&x, &x], 3)), [1, 4, 2, 6]);
        assert_eq!(shape(f.tile(&x, &[1, 2, 1, 1])), [1, 8, 2, 3]);
        assert!(f.conv1x1(&w, &x, None).is_err());
        assert!(f.reshape(&x, &[5, -1]).is_err() && f.transpose(&x, &[0, 1]).is_err());
        assert!(f.matmul(&x, &x, false).is_err() && f.slice(&x, 1, 3, 5).is_err());
        assert!(f.add(&x, &i).is_err() && f.squeeze(&x, 1).is_err() && f.concat(&[&x, &w], 0).is_err());
    }
}
