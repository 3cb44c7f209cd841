//! Matrix products. Source: coremltools 9.0, `mil/ops/defs/iOS15/linear.py`, iOS17.

mod einsum;
mod integers;

use crate::constant::{Const, ConstData};
use crate::error::OpResult;
use crate::graph::{Storage, ValueId};
use crate::layout::{Layout, Shape, elements};
use crate::lower::OpCx;
use crate::op::{Args, In, Op, OpSpec, Support, opt, req};
use crate::ops::broadcast_shape;
use candle_coreml_kernels::{
    self as kernels, Arithmetic, ConvBeside, ConvParams, Epilogue, Operand, PackedConv, Unary, Weights,
};
use candle_coreml_mil::DType;
use smallvec::SmallVec;
use std::sync::Arc;

/// `y[.., n] = act(sum_k x[.., k] * w[n, k] + bias[n]) (+ residual[.., n])`; the optional second input is the residual.
#[derive(Clone)]
pub struct Linear {
    /// `[n, k]`, as stored.
    pub weights: Weights,
    /// `[n]`.
    pub bias: Option<Arc<[f32]>>,
    /// Applied before the residual.
    pub activation: Option<Unary>,
    /// How sums are made when there are many rows.
    pub arithmetic: Arithmetic,
    /// The weights packed as those of a convolution with a window of one pixel, where that is the better way.
    pub packed: Option<Arc<PackedConv>>,
}

/// A window of one pixel.
const PIXEL: ConvParams = ConvParams {
    kernel: [1; 3],
    stride: [1; 3],
    dilation: [1; 3],
    pad_before: [0; 3],
    pad_after: [0; 3],
    groups: 1,
};

/// Rows of `x` from which weights of 32 bits are packed: fewer are multiplied one by one, with weights as they are stored.
const PACK_FROM: usize = 5;

impl std::fmt::Debug for Linear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Linear[{}, {}]", self.weights.rows(), self.weights.cols())?;
        if self.bias.is_some() {
            f.write_str("+bias")?;
        }
        self.activation.map_or(Ok(()), |a| write!(f, "+{a:?}"))
    }
}

/// Whether the rows of `x` are so few that weights are read row by row.
fn is_few(weights: &Weights, inputs: &[&Layout]) -> bool {
    let of = |x: &&Layout| elements(&x.shape) / weights.cols().max(1) < PACK_FROM;
    inputs.first().is_some_and(of)
}

/// Two operations for each weight and row.
fn product_flops(weights: &Weights, x: &Layout) -> u64 {
    let rows = elements(&x.shape) / weights.cols().max(1);
    2 * (weights.rows() * weights.cols() * rows) as u64
}

/// `[.., k]` as a matrix `[rows, k]`, if strides allow.
pub fn as_matrix(layout: &Layout) -> Option<Layout> {
    let k = layout.shape.last().copied().unwrap_or(1);
    layout.reshape(&[elements(&layout.shape) / k.max(1), k])
}

/// The layout of a view that came as an argument.
pub fn layout_of<T>(v: &kernels::View<'_, T>) -> Layout {
    Layout {
        offset: v.offset(),
        shape: v.shape().into(),
        strides: v.strides().into(),
    }
}

/// True where the rows of `[.., k]` are the inner dimension in memory: a transposed matrix.
fn is_transposed(layout: &Layout) -> bool {
    as_matrix(layout).is_some_and(|m| m.shape[0] > 1 && m.strides[0] == 1 && m.strides[1] != 1)
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn accepts(&self, index: usize, layout: &Layout, storage: Storage) -> bool {
        let fits = match (&self.packed, index) {
            (None, _) => as_matrix(layout).is_some(),
            (Some(_), 0) => as_matrix(layout).is_some_and(|m| m.strides[1] == 1 || m.shape[1] == 1),
            (Some(_), _) => layout.is_contiguous(),
        };
        storage == Storage::F32 && fits
    }

    fn output_layout(&self, inputs: &[&Layout], shape: &[usize]) -> Layout {
        if self.packed.is_some() || !is_transposed(inputs[0]) {
            return Layout::contiguous(shape);
        }
        let last = shape.len() - 1;
        let mut order: Shape = smallvec::smallvec![last];
        order.extend(0..last);
        let turned: Shape = order.iter().map(|&i| shape[i]).collect();
        let mut back: Shape = (1..=last).collect();
        back.push(0);
        Layout::contiguous(&turned).permute(&back)
    }

    fn flops(&self, inputs: &[&Layout], _outputs: &[&Layout]) -> u64 {
        product_flops(&self.weights, inputs[0])
    }

    fn reads_rows(&self, inputs: &[&Layout]) -> bool {
        self.packed.is_none() && is_few(&self.weights, inputs)
    }

    fn expect(&self, pool: &kernels::Pool) {
        kernels::linear_expect(pool, std::iter::once((&self.weights, None)));
    }

    fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        if let Some(packed) = &self.packed {
            return self.run_packed(packed, args);
        }
        in_matrices(args, |args, x, y, residual| {
            let epilogue = Epilogue {
                bias: self.bias.as_deref(),
                activation: self.activation,
                residual,
                arithmetic: self.arithmetic,
            };
            kernels::linear(args.pool, x, &self.weights, y, &epilogue, args.scratch);
        })
    }
}

/// Gives `run` input 0, the result and input 1, the residual if there is one, as matrices.
fn in_matrices(
    args: &mut Args<'_>,
    run: impl FnOnce(
        &mut Args<'_>,
        kernels::View<'_, f32>,
        kernels::ViewMut<'_, f32>,
        Option<kernels::View<'_, f32>>,
    ),
) -> OpResult<()> {
    let flat = "internal: a matrix view failed";
    let (x, y) = (args.f32(0)?, args.out_f32(0)?);
    let lx = as_matrix(&layout_of(&x)).ok_or(flat)?;
    let ly = as_matrix(&Layout {
        offset: y.offset(),
        shape: y.shape().into(),
        strides: y.strides().into(),
    })
    .ok_or(flat)?;
    let x = kernels::View::new(x.data(), lx.offset, &lx.shape, &lx.strides).ok_or(flat)?;
    let y = kernels::ViewMut::new(y.into_data(), ly.offset, &ly.shape, &ly.strides).ok_or(flat)?;
    let lr = match args.inputs.get(1) {
        Some(In::F32(r)) => Some((r.data(), as_matrix(&layout_of(r)).ok_or(flat)?)),
        _ => None,
    };
    let residual = match &lr {
        Some((data, l)) => Some(kernels::View::new(data, l.offset, &l.shape, &l.strides).ok_or(flat)?),
        None => None,
    };
    run(args, x, y, residual);
    Ok(())
}

impl Linear {
    /// The rows of `x` as the pixels of a picture of one row.
    fn run_packed(&self, packed: &PackedConv, args: &mut Args<'_>) -> OpResult<()> {
        let flat = "internal: a matrix view failed";
        let (x, y) = (args.f32(0)?, args.out_f32(0)?);
        let lx = as_matrix(&layout_of(&x)).ok_or(flat)?;
        let (rows, k, n) = (lx.shape[0], lx.shape[1], packed.outputs());
        let line = lx.strides[0];
        let picture = [1, 1, rows, k];
        let all = line.checked_mul(rows as isize).ok_or(flat)?;
        let steps = [all, all, line, lx.strides[1]];
        let x = kernels::View::new(x.data(), lx.offset, &picture, &steps).ok_or(flat)?;
        let (result, offset) = ([1, 1, rows, n], y.offset());
        let steps = crate::layout::row_major(&result);
        let y = kernels::ViewMut::new(y.into_data(), offset, &result, &steps).ok_or(flat)?;
        let residual = match args.inputs.get(1) {
            Some(In::F32(r)) => ConvBeside::In(r.as_slice().ok_or(flat)?),
            _ => ConvBeside::None,
        };
        let call = kernels::ConvLast {
            packed,
            bias: self.bias.as_deref(),
            activation: self.activation,
            residual,
            last: None,
        };
        kernels::conv_last(args.pool, x, &call, y, args.scratch);
        Ok(())
    }
}

/// `act(x gateᵀ) * (x upᵀ)`: made by a pass.
#[derive(Clone)]
pub struct Gated {
    /// `[n, k]`.
    pub gate: Weights,
    /// `[n, k]`.
    pub up: Weights,
    /// Applied to the gate's product.
    pub activation: Unary,
    /// How sums are made when there are many rows.
    pub arithmetic: Arithmetic,
}

impl std::fmt::Debug for Gated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Gated[{}, {}]+{:?}",
            self.gate.rows(),
            self.gate.cols(),
            self.activation
        )
    }
}

impl Op for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && as_matrix(layout).is_some()
    }

    fn flops(&self, inputs: &[&Layout], _outputs: &[&Layout]) -> u64 {
        product_flops(&self.gate, inputs[0]) + product_flops(&self.up, inputs[0])
    }

    fn reads_rows(&self, inputs: &[&Layout]) -> bool {
        is_few(&self.gate, inputs)
    }

    fn expect(&self, pool: &kernels::Pool) {
        kernels::linear_expect(pool, std::iter::once((&self.gate, Some(&self.up))));
    }

    fn weight_bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let how = (self.activation, self.arithmetic);
        in_matrices(args, |args, x, y, _| {
            kernels::gated(args.pool, x, (&self.gate, &self.up), how, y, args.scratch);
        })
    }
}

/// A gated MLP: what [`Gated`] gives, multiplied with one more matrix. Made by a pass.
#[derive(Clone)]
pub struct Mlp {
    /// The two products of `x`.
    pub gated: Gated,
    /// The last one, with its epilogue; the optional second input is the residual.
    pub down: Linear,
}

impl std::fmt::Debug for Mlp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mlp({:?}, {:?})", self.gated, self.down)
    }
}

impl Op for Mlp {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && as_matrix(layout).is_some()
    }

    fn flops(&self, inputs: &[&Layout], outputs: &[&Layout]) -> u64 {
        let rows = elements(&inputs[0].shape) / self.gated.gate.cols().max(1);
        let down = 2 * (self.down.weights.rows() * self.down.weights.cols() * rows) as u64;
        self.gated.flops(inputs, outputs) + down
    }

    fn reads_rows(&self, inputs: &[&Layout]) -> bool {
        self.gated.reads_rows(inputs)
    }

    fn expect(&self, pool: &kernels::Pool) {
        self.gated.expect(pool);
    }

    fn weight_bytes(&self) -> usize {
        self.gated.weight_bytes() + self.down.weight_bytes()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let mlp = kernels::Mlp {
            gate: &self.gated.gate,
            up: &self.gated.up,
            activation: self.gated.activation,
            down: &self.down.weights,
        };
        in_matrices(args, |args, x, y, residual| {
            let epilogue = Epilogue {
                bias: self.down.bias.as_deref(),
                activation: self.down.activation,
                residual,
                arithmetic: self.down.arithmetic,
            };
            let (pool, then) = (args.pool, args.then);
            let next = || {
                if let Some(then) = then {
                    then.expect(pool);
                }
            };
            kernels::mlp(pool, x, &mlp, (y, &epilogue), &next, args.scratch);
        })
    }
}

/// A weight matrix and its bias, as the kernels take several of them.
type Layer<'a> = (&'a Weights, Option<&'a [f32]>);

/// Several products of one input: made by a pass.
#[derive(Debug, Clone)]
pub struct LinearMany {
    /// One a result; no activations.
    pub layers: Vec<Linear>,
}

impl Op for LinearMany {
    fn name(&self) -> &'static str {
        "linear_many"
    }

    fn accepts(&self, _index: usize, layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 && as_matrix(layout).is_some()
    }

    fn flops(&self, inputs: &[&Layout], _outputs: &[&Layout]) -> u64 {
        self.layers
            .iter()
            .map(|l| product_flops(&l.weights, inputs[0]))
            .sum()
    }

    fn reads_rows(&self, inputs: &[&Layout]) -> bool {
        self.layers.first().is_some_and(|l| is_few(&l.weights, inputs))
    }

    fn expect(&self, pool: &kernels::Pool) {
        kernels::linear_expect(pool, self.layers.iter().map(|l| (&l.weights, None)));
    }

    fn weight_bytes(&self) -> usize {
        self.layers.iter().map(|l| l.weights.bytes()).sum()
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let flat = "internal: a matrix view failed";
        let x = args.f32(0)?;
        let lx = as_matrix(&layout_of(&x)).ok_or(flat)?;
        let rows = lx.shape[0];
        let x = kernels::View::new(x.data(), lx.offset, &lx.shape, &lx.strides).ok_or(flat)?;
        let layers: SmallVec<[Layer<'_>; 4]> = self
            .layers
            .iter()
            .map(|l| (&l.weights, l.bias.as_deref()))
            .collect();
        let sizes: SmallVec<[([usize; 2], [isize; 2]); 4]> = layers
            .iter()
            .map(|(w, _)| ([rows, w.rows()], [w.rows() as isize, 1]))
            .collect();
        let mut outputs: SmallVec<[kernels::ViewMut<'_, f32>; 4]> = SmallVec::new();
        for (i, (shape, strides)) in sizes.iter().enumerate() {
            let y = args.out_f32(i)?;
            let offset = y.offset();
            outputs.push(kernels::ViewMut::new(y.into_data(), offset, shape, strides).ok_or(flat)?);
        }
        let arithmetic = self
            .layers
            .first()
            .map_or_else(Arithmetic::default, |l| l.arithmetic);
        kernels::linear_many(args.pool, x, &layers, arithmetic, &mut outputs, args.scratch);
        Ok(())
    }
}

/// `z[.., m, n] = sum_k x[.., m, k] * y[.., k, n]`, leading dimensions broadcast.
#[derive(Debug)]
pub struct MatMul;

impl Op for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn accepts(&self, index: usize, _layout: &Layout, storage: Storage) -> bool {
        storage == Storage::F32 || (index == 1 && storage == Storage::F16)
    }

    fn flops(&self, inputs: &[&Layout], outputs: &[&Layout]) -> u64 {
        let depth = inputs[0].shape.last().copied().unwrap_or(1);
        2 * (elements(&outputs[0].shape) * depth) as u64
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let x = args.f32(0)?;
        let z = args.out_f32(0)?;
        let zl = Layout {
            offset: z.offset(),
            shape: z.shape().into(),
            strides: z.strides().into(),
        };
        let z = z.into_data();
        let lead = zl.shape.len() - 2;
        let batched = |l: Layout, lead: usize| {
            let tail = &l.shape[l.shape.len() - 2..];
            let mut shape: Shape = zl.shape[..lead].into();
            shape.extend_from_slice(tail);
            l.broadcast(&shape).ok_or("internal: batches do not broadcast")
        };
        let lx = batched(layout_of(&x), lead)?;
        let y = args.inputs[1];
        let ly = match &y {
            In::F32(v) => batched(layout_of(v), lead)?,
            In::F16(v) => batched(layout_of(v), lead)?,
            _ => return Err("internal: matmul multiplies floats".into()),
        };
        // All leading dimensions but the last are walked here; the kernel takes the last as its batch.
        let outer = elements(&zl.shape[..lead.saturating_sub(1)]);
        for i in 0..outer {
            let (lx, ly, lz) = (batch(&lx, lead, i), batch(&ly, lead, i), batch(&zl, lead, i));
            let bad = "internal: a batch lies outside its value";
            let a = kernels::View::new(x.data(), lx.offset, &lx.shape, &lx.strides).ok_or(bad)?;
            let b = match &y {
                In::F32(v) => {
                    Operand::F32(kernels::View::new(v.data(), ly.offset, &ly.shape, &ly.strides).ok_or(bad)?)
                }
                In::F16(v) => {
                    Operand::F16(kernels::View::new(v.data(), ly.offset, &ly.shape, &ly.strides).ok_or(bad)?)
                }
                _ => return Err(bad.into()),
            };
            let c = kernels::ViewMut::new(z, lz.offset, &lz.shape, &lz.strides).ok_or(bad)?;
            kernels::matmul_f32(args.pool, a, b, c, args.scratch);
        }
        Ok(())
    }
}

/// Batch `index` of the leading dimensions but the last of `lead`, as a rank-3 layout.
pub fn batch(l: &Layout, lead: usize, index: usize) -> Layout {
    let (mut offset, mut rest) = (l.offset as isize, index);
    for d in (0..lead.saturating_sub(1)).rev() {
        offset += (rest % l.shape[d]) as isize * l.strides[d];
        rest /= l.shape[d];
    }
    let from = lead.saturating_sub(1);
    let (mut shape, mut strides) = (
        Shape::from(&l.shape[from..]),
        crate::layout::Strides::from(&l.strides[from..]),
    );
    if lead == 0 {
        shape.insert(0, 1);
        strides.insert(0, 0);
    }
    Layout {
        offset: offset as usize,
        shape,
        strides,
    }
}

impl OpCx<'_, '_> {
    /// `x wᵀ + bias` with `w` `[n, k]`: compressed weights stay compressed, computed ones are multiplied as they come.
    pub fn linear(&mut self, x: ValueId, w: ValueId, bias: Option<ValueId>) -> OpResult<ValueId> {
        let (mut shape, weights) = (self.shape(x), self.shape(w));
        let (n, k) = (weights[0], elements(&weights[1..]));
        let dtype = self.dtype(x);
        match shape.last_mut() {
            Some(last) if *last == k => *last = n,
            _ => {
                return Err(
                    format!("x {:?} does not fit weights [{n}, {k}]", self.shape(x).as_slice()).into(),
                );
            }
        }
        let constant_bias = match bias {
            Some(b) => self.constant(b).map(|c| Some(c.dense())),
            None => Some(None),
        };
        let rows = elements(&shape[..shape.len() - 1]);
        if dtype.is_float()
            && let (Some(bias), Some(weights)) = (constant_bias, self.linear_weights(w, (n, k), rows)?)
        {
            let bias = bias.filter(|b| b.iter().any(|&v| v != 0.0));
            let packed = self.packed_linear(w, (n, k), rows)?;
            let arithmetic = self.arithmetic();
            return self.emit(
                Linear {
                    weights,
                    bias,
                    activation: None,
                    arithmetic,
                    packed,
                },
                &[x],
                dtype,
                &shape,
            );
        }
        let w = self.reshape(w, &[n, k])?;
        let w = self.permute(w, &[1, 0])?;
        let y = self.matmul(x, w)?;
        match bias {
            Some(b) => self.binary(kernels::Binary::Add, y, b),
            None => Ok(y),
        }
    }

    /// Weights as they are kept; in fast numerics, 32-bit ones that meet few rows are rounded to 16 bits: reading them is all the work.
    fn linear_weights(
        &mut self,
        w: ValueId,
        (n, k): (usize, usize),
        rows: usize,
    ) -> OpResult<Option<Weights>> {
        if !matches!(self.arithmetic(), Arithmetic::Bf16 | Arithmetic::Int8) || rows >= PACK_FROM {
            return self.weights(w, n, k);
        }
        let Some(constant) = self.constant(w) else {
            return Ok(None);
        };
        let weights = constant.half_weights(n, k)?;
        if matches!(constant.data, ConstData::Stored(_)) {
            self.release(&constant);
        }
        Ok(Some(weights))
    }

    /// 32-bit weights that meet many rows, packed, unless they are rounded when they are used.
    fn packed_linear(
        &mut self,
        w: ValueId,
        matrix: (usize, usize),
        rows: usize,
    ) -> OpResult<Option<Arc<PackedConv>>> {
        let wide = |c: &Arc<Const>| matches!(c.data, ConstData::F32(_) | ConstData::Stored(_));
        let rounded = self.arithmetic().in_bytes();
        let some = matrix.0 > 0 && matrix.1 > 0 && rows >= PACK_FROM && !rounded;
        let Some(constant) = self.constant(w).filter(|c| some && wide(c)) else {
            return Ok(None);
        };
        let packed = constant.packed(matrix, &PIXEL, [1, rows], self.arithmetic())?;
        self.release(&constant);
        Ok(Some(packed))
    }

    /// numpy's matmul of values of rank 2 and more.
    pub fn matmul(&mut self, x: ValueId, y: ValueId) -> OpResult<ValueId> {
        let (a, b) = (self.shape(x), self.shape(y));
        let (Some([m, k]), Some([k2, n])) = (a.last_chunk::<2>(), b.last_chunk::<2>()) else {
            // A vector counts as a matrix of one row (or one column), which is dropped again.
            return self.matmul_vector(x, y);
        };
        if k != k2 {
            return Err(format!("shapes {:?} and {:?} do not multiply", a.as_slice(), b.as_slice()).into());
        }
        let mut shape = broadcast_shape(&a[..a.len() - 2], &b[..b.len() - 2])?;
        shape.extend_from_slice(&[*m, *n]);
        let (dtype, other) = (self.dtype(x), self.dtype(y));
        if dtype.is_float() != other.is_float() {
            return Err(format!("{dtype} and {other} do not multiply").into());
        }
        if dtype.is_float() {
            self.emit(MatMul, &[x, y], dtype, &shape)
        } else {
            self.emit(integers::IntegerMatMul, &[x, y], dtype, &shape)
        }
    }

    fn matmul_vector(&mut self, x: ValueId, y: ValueId) -> OpResult<ValueId> {
        let (a, b) = (self.shape(x), self.shape(y));
        if a.is_empty() || b.is_empty() {
            return Err("scalars do not multiply as matrices".into());
        }
        let left = if a.len() == 1 {
            self.reshape(x, &[1, a[0]])?
        } else {
            x
        };
        let right = if b.len() == 1 {
            self.reshape(y, &[b[0], 1])?
        } else {
            y
        };
        let z = self.matmul(left, right)?;
        let mut shape = self.shape(z);
        if b.len() == 1 {
            shape.pop();
        }
        if a.len() == 1 {
            shape.remove(shape.len() - if b.len() == 1 { 1 } else { 2 });
        }
        self.reshape(z, &shape)
    }
}

fn lower_linear(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, w, bias) = (cx.value("x")?, cx.value("weight")?, cx.optional("bias")?);
    if cx.shape(w).len() != 2 {
        return Err(format!("weight {:?} must have rank 2", cx.shape(w).as_slice()).into());
    }
    let y = cx.linear(x, w, bias)?;
    cx.result(y)
}

fn swap_last(cx: &mut OpCx<'_, '_>, x: ValueId) -> OpResult<ValueId> {
    let rank = cx.shape(x).len();
    if rank < 2 {
        return Ok(x);
    }
    let mut perm: Shape = (0..rank).collect();
    perm.swap(rank - 1, rank - 2);
    cx.permute(x, &perm)
}

/// From iOS 17 on a constant may have another type than the computed value; the result has that of the computed one, which the
/// program declares. Integers among themselves are multiplied as such, beside floats as floats.
fn lower_matmul(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let (x, y) = (cx.value("x")?, cx.value("y")?);
    let (dx, dy) = (cx.dtype(x), cx.dtype(y));
    if dx == dy && (dx.is_float() || dx == DType::Int32) {
        let z = product(cx, x, y)?;
        return cx.result(z);
    }
    let of_computed = if cx.constant(x).is_some() { dy } else { dx };
    let dtype = cx.declared(0).map_or(of_computed, |declared| declared.dtype);
    let computed = if dx.is_float() || dy.is_float() {
        DType::Fp32
    } else {
        DType::Int32
    };
    let x = cx.cast(x, computed)?;
    let y = cx.cast(y, computed)?;
    let z = product(cx, x, y)?;
    let z = cx.cast(z, dtype)?;
    cx.result(z)
}

fn product(cx: &mut OpCx<'_, '_>, x: ValueId, y: ValueId) -> OpResult<ValueId> {
    let (turn_x, turn_y) = (cx.flag("transpose_x", false)?, cx.flag("transpose_y", false)?);
    let x = if turn_x { swap_last(cx, x)? } else { x };
    // A constant matrix on the right is a weight: the linear kernels read it as stored.
    if cx.constant(y).is_some() && cx.shape(y).len() == 2 && cx.shape(x).len() >= 2 && turn_y {
        return cx.linear(x, y, None);
    }
    let y = if turn_y { swap_last(cx, y)? } else { y };
    if cx.constant(y).is_some() && cx.shape(y).len() == 2 && cx.shape(x).len() >= 2 {
        let turned = cx.permute(y, &[1, 0])?;
        if cx.constant(turned).is_some() {
            return cx.linear(x, turned, None);
        }
    }
    cx.matmul(x, y)
}

macro_rules! row {
    ($name:literal, $inputs:expr, $lower:expr) => {
        &OpSpec {
            name: $name,
            family: "linear",
            since: "iOS15",
            inputs: $inputs,
            outputs: Some(1),
            support: Support::Full,
            tolerance: 1e-5,
            lower: $lower,
        }
    };
}

/// This family's rows.
pub const OPS: &[&OpSpec] = &[
    row!("einsum", &[req("values"), req("equation")], einsum::lower_einsum),
    row!("linear", &[req("x"), req("weight"), opt("bias")], lower_linear),
    row!(
        "matmul",
        &[req("x"), req("y"), opt("transpose_x"), opt("transpose_y")],
        lower_matmul
    ),
];
