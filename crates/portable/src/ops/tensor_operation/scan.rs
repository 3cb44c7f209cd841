//! `cumsum`, `band_part`, `one_hot` and `fill_like`.

use crate::error::OpResult;
use crate::layout::elements;
use crate::lower::{OpCx, normalize_axis};
use crate::op::{Args, Op};
use crate::ops::dense::Pair;
use candle_coreml_kernels::Compare;
use candle_coreml_mil::DType;
use smallvec::smallvec;

/// Sums of all elements up to each one along a dimension.
#[derive(Debug)]
pub struct CumSum {
    len: usize,
    inner: usize,
    /// Without the element itself.
    exclusive: bool,
    /// From the end.
    reverse: bool,
}

impl CumSum {
    fn scan<T: Copy, S: Copy>(
        &self,
        x: &[T],
        y: &mut [T],
        zero: S,
        add: impl Fn(S, T) -> S,
        out: impl Fn(S) -> T,
    ) {
        let block = (self.len * self.inner).max(1);
        for (x, y) in x.chunks_exact(block).zip(y.chunks_exact_mut(block)) {
            for i in 0..self.inner {
                let mut sum = zero;
                for n in 0..self.len {
                    let n = if self.reverse { self.len - 1 - n } else { n };
                    let at = n * self.inner + i;
                    let with = add(sum, x[at]);
                    y[at] = out(if self.exclusive { sum } else { with });
                    sum = with;
                }
            }
        }
    }
}

impl Op for CumSum {
    fn name(&self) -> &'static str {
        "cumsum"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        match args.pair()? {
            Pair::F32(x, y) => self.scan(x, y, 0.0f64, |s, v| s + f64::from(v), |s| s as f32),
            Pair::I32(x, y) => self.scan(x, y, 0i32, i32::wrapping_add, |s| s),
        }
        Ok(())
    }
}

/// Lowers `cumsum`.
pub fn lower_cumsum(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let axis = cx.axis("axis", shape.len(), Some(0))?;
    let op = CumSum {
        len: shape[axis],
        inner: elements(&shape[axis + 1..]),
        exclusive: cx.flag("exclusive", false)?,
        reverse: cx.flag("reverse", false)?,
    };
    let y = cx.emit(op, &[x], cx.dtype(x), &shape)?;
    cx.result(y)
}

/// `x[.., m, n]` where `m - n <= lower` and `n - m <= upper`, 0 elsewhere; a negative limit is none.
#[derive(Debug)]
pub struct BandPart {
    lower: i32,
    upper: i32,
    matrix: [usize; 2],
}

impl BandPart {
    fn keep<T: Copy + Default>(&self, x: &[T], y: &mut [T]) {
        let [rows, cols] = self.matrix;
        let within = |limit: i32, distance: i64| limit < 0 || distance <= i64::from(limit);
        for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
            let (m, n) = ((i / cols % rows) as i64, (i % cols) as i64);
            let inside = within(self.lower, m - n) && within(self.upper, n - m);
            *y = if inside { x } else { T::default() };
        }
    }
}

impl Op for BandPart {
    fn name(&self) -> &'static str {
        "band_part"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        match args.pair()? {
            Pair::F32(x, y) => self.keep(x, y),
            Pair::I32(x, y) => self.keep(x, y),
        }
        Ok(())
    }
}

/// Lowers `band_part`.
pub fn lower_band_part(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let x = cx.value("x")?;
    let shape = cx.shape(x);
    let Some(&matrix) = shape.last_chunk::<2>() else {
        return Err("x must have rank 2 or more".into());
    };
    let op = BandPart {
        lower: cx.int("lower")?.unwrap_or(-1),
        upper: cx.int("upper")?.unwrap_or(-1),
        matrix,
    };
    let y = cx.emit(op, &[x], cx.dtype(x), &shape)?;
    cx.result(y)
}

/// Lowers `one_hot`: indices compared with a range along the new dimension. Indices outside it have no place that is on.
pub fn lower_one_hot(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let indices = cx.value("indices")?;
    let shape = cx.shape(indices);
    let size = cx
        .int("one_hot_vector_size")?
        .ok_or("parameter \"one_hot_vector_size\" is missing")?;
    let count = usize::try_from(size).map_err(|_| "one_hot_vector_size must be 0 or more")?;
    let axis = normalize_axis(cx.int("axis")?.unwrap_or(-1), shape.len() + 1)?;
    let mut wide = shape.clone();
    wide.insert(axis, 1);
    let indices = cx.reshape(indices, &wide)?;
    let mut line: crate::layout::Shape = smallvec![1; wide.len()];
    line[axis] = count;
    let range = cx.add_i32(DType::Int32, &line, (0..size).collect());
    let hit = cx.compare(Compare::Eq, indices, range)?;
    let (on, off) = (cx.optional("on_value")?, cx.optional("off_value")?);
    let dtype = on.or(off).map_or(DType::Int32, |v| cx.dtype(v));
    let mut number = |value: Option<_>, default: i32| match value {
        Some(v) => cx.reshape(v, &[]),
        None if dtype.is_float() => Ok(cx.add_f32(dtype, &[], vec![default as f32])),
        None => Ok(cx.add_i32(dtype, &[], vec![default])),
    };
    let (on, off) = (number(on, 1)?, number(off, 0)?);
    wide[axis] = count;
    let y = cx.emit(crate::ops::control_flow::Select, &[hit, on, off], dtype, &wide)?;
    cx.result(y)
}

/// Lowers `fill_like`.
pub fn lower_fill_like(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let like = cx.value("ref_tensor")?;
    let shape = cx.shape(like);
    let value = match cx.optional("value")? {
        Some(v) => cx.reshape(v, &[])?,
        None => cx.add_f32(DType::Fp32, &[], vec![0.0]),
    };
    let y = cx.broadcast(value, &shape)?;
    cx.result(y)
}
