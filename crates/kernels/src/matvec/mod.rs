//! Rows of a weight matrix times one vector.

mod bf12;
pub(crate) mod far;
#[cfg(target_arch = "x86_64")]
pub(crate) mod fixed;

use crate::simd::{Kernel, Memory, Simd, dispatch, memory};
use crate::weights::{Read, Storage, Weights};
use half::f16;
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    /// One decoded row, for storages that no kernel multiplies in place.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Orders of values in fixed point.
const ORDERS: usize = 4;

/// A vector prepared for every storage among the matrices it meets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Prepared<'a> {
    pub x: &'a [f32],
    /// In fixed point, per order.
    #[cfg(target_arch = "x86_64")]
    pub fixed: [Option<fixed::FixedX<'a>>; ORDERS],
}

/// `x` for storages that take it as it is.
pub(crate) fn unprepared(x: &[f32]) -> Prepared<'_> {
    Prepared {
        x,
        #[cfg(target_arch = "x86_64")]
        fixed: [None; ORDERS],
    }
}

/// Numbers of `f32` that a fixed form needs for a vector of `cols`: scales, values of half the size, and sums; an even number of blocks.
fn fixed_len(cols: usize) -> usize {
    let blocks = cols.div_ceil(64).next_multiple_of(2);
    blocks.next_multiple_of(16) + blocks * 32 + (2 * blocks).next_multiple_of(16)
}

/// Numbers of `f32` that [`prepare`] needs for a vector of `cols`.
pub(crate) fn prepared_len(cols: usize) -> usize {
    ORDERS * fixed_len(cols)
}

/// Makes the forms of `x` that `weights` want, in `space`.
pub(crate) fn prepare<'a>(x: &'a [f32], weights: &[&Weights], space: &'a mut [f32]) -> Prepared<'a> {
    #[cfg(target_arch = "x86_64")]
    {
        use fixed::Order;
        let mut prepared = unprepared(x);
        let mut parts = space.chunks_exact_mut(fixed_len(x.len()).max(1));
        for order in [Order::Nibbles, Order::Sixes, Order::Bytes, Order::Quads] {
            if let Some(space) = parts.next()
                && weights.iter().any(|w| order_of(w) == Some(order))
            {
                prepared.fixed[order as usize] = fix(x, order, space);
            }
        }
        prepared
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (weights, space);
        unprepared(x)
    }
}

/// The fixed-point order a matrix is multiplied in, if it is.
#[cfg(target_arch = "x86_64")]
fn order_of(w: &Weights) -> Option<fixed::Order> {
    match w.storage() {
        Storage::Lut(lut) if lut.fixed.is_some() => Some(match lut.bits {
            4 if fixed::wide::takes_quads(lut.col_group, lut.cols) => fixed::Order::Quads,
            4 => fixed::Order::Nibbles,
            _ => fixed::Order::Sixes,
        }),
        Storage::Affine(affine) if affine.block_shift.is_some() => Some(if affine.bits == 4 {
            fixed::Order::Nibbles
        } else {
            fixed::Order::Bytes
        }),
        _ => None,
    }
}

#[cfg(target_arch = "x86_64")]
fn fix<'a>(x: &[f32], order: fixed::Order, space: &'a mut [f32]) -> Option<fixed::FixedX<'a>> {
    if !crate::simd::has_avx2() {
        return None;
    }
    let blocks = x.len().div_ceil(fixed::BLOCK);
    let (scales, rest) = space.split_at_mut(blocks.next_multiple_of(16));
    let (values, sums) = rest.split_at_mut(blocks.next_multiple_of(2) * fixed::BLOCK / 2);
    let values: &mut [i16] = bytemuck::cast_slice_mut(values);
    // SAFETY: the instructions were found just now.
    let finite = unsafe { fixed::quantise(x, order, scales, values) };
    if !finite {
        return None;
    }
    if order == fixed::Order::Quads {
        // The last pair may lack its second block: nothing times nothing, whatever the memory held.
        values[blocks * fixed::BLOCK..].fill(0);
        scales[blocks..].fill(0.0);
        // SAFETY: the order is asked for where the instructions are; the values are pairs of blocks.
        unsafe { fixed::wide::to_quads(values) };
    } else {
        fixed::sum_halves(order, scales, values, sums);
    }
    Some(fixed::FixedX { scales, values, sums })
}

/// `out[i] = sum_k w[rows.start + i, k] * x[k]`.
pub(crate) fn dot(w: Read<'_>, x: &Prepared<'_>, rows: Range<usize>, out: &mut [f32]) {
    let (w, packed, cols) = (w.weights, w.bf12, w.cols());
    assert!(
        rows.end <= w.rows() && out.len() == rows.len() && x.x.len() == cols,
        "matvec: rows and columns"
    );
    #[cfg(target_arch = "x86_64")]
    if let Some(fixed) = order_of(w).and_then(|order| x.fixed[order as usize]) {
        match w.storage() {
            Storage::Lut(lut) => return lut_dot(lut, fixed, rows, out),
            Storage::Affine(affine) => return int_dot(affine, fixed, rows, out),
            _ => {}
        }
    }
    match w.storage() {
        _ if let Some(w) = packed => dispatch(bf12::Dot { w, rows, x: x.x, out }),
        Storage::F32(data) => {
            dispatch(Dot {
                w: &data.f32()[rows.start * cols..rows.end * cols],
                x: x.x,
                out,
            });
        }
        Storage::F16(data) => {
            dispatch(Dot {
                w: &data.f16()[rows.start * cols..rows.end * cols],
                x: x.x,
                out,
            });
        }
        _ => ROW.with_borrow_mut(|space| {
            space.resize(cols, 0.0);
            for (row, out) in rows.zip(out) {
                w.decode(row, 0, space);
                dispatch(Dot {
                    w: space,
                    x: x.x,
                    out: std::slice::from_mut(out),
                });
            }
        }),
    }
}

/// Rows `rows` of a palettised matrix in fixed point, as many at once as share a table. `x` is in the order that [`order_of`] gives.
#[cfg(target_arch = "x86_64")]
fn lut_dot(lut: &crate::weights::Lut, x: fixed::FixedX<'_>, rows: Range<usize>, out: &mut [f32]) {
    use fixed::wide;
    let Some(tables) = lut.fixed.as_ref() else { return };
    let bits = lut.bits as usize;
    let (stride, entries) = (lut.cols * bits / 8, 2 << bits);
    let quads = bits == 4 && wide::takes_quads(lut.col_group, lut.cols);
    let sixes = bits == 6 && wide::there();
    out.fill(0.0);
    for segment in 0..lut.col_groups {
        let first = segment * lut.col_group;
        let cols = lut.col_group.min(lut.cols - first);
        let x = fixed::FixedX {
            scales: &x.scales[first / fixed::BLOCK..],
            values: &x.values[first / fixed::BLOCK * fixed::BLOCK..],
            sums: &[],
        };
        let mut row = rows.start;
        while row < rows.end {
            let group = row / lut.row_group;
            let count = (rows.end - row).min((group + 1) * lut.row_group - row);
            let table = group * lut.col_groups + segment;
            let planes = &tables.planes[table * entries..(table + 1) * entries];
            let bytes = &lut.indices[row * stride + first * bits / 8..(row + count) * stride];
            let scale = tables.scales[table];
            let out = &mut out[row - rows.start..row - rows.start + count];
            let mut done = 0;
            while done < count {
                let at = bytes[done * stride..].as_ptr();
                let add = |out: &mut [f32], sums: &[f32]| {
                    for (out, sum) in out.iter_mut().zip(sums) {
                        *out += sum * scale;
                    }
                };
                let out = &mut out[done..];
                // SAFETY: fixed tables exist only where AVX2 does and rows are whole bytes; `bytes` holds the rows up to `count`, from
                // column `first` on; `x` was made for all columns of the matrix.
                unsafe {
                    done += match (count - done, quads, sixes) {
                        (8.., true, _) => {
                            add(out, &wide::dot_quads::<8>(at, stride, cols, planes, x));
                            8
                        }
                        (4.., true, _) => {
                            add(out, &wide::dot_quads::<4>(at, stride, cols, planes, x));
                            4
                        }
                        (_, true, _) => {
                            add(out, &wide::dot_quads::<1>(at, stride, cols, planes, x));
                            1
                        }
                        (4.., _, true) => {
                            add(out, &wide::dot_sixes::<4>(at, stride, cols, planes, x));
                            4
                        }
                        (_, _, true) => {
                            add(out, &wide::dot_sixes::<1>(at, stride, cols, planes, x));
                            1
                        }
                        (4.., ..) if bits == 4 => {
                            add(out, &fixed::dot_rows::<4, 4>(at, stride, cols, planes, x));
                            4
                        }
                        (4.., ..) => {
                            add(out, &fixed::dot_rows::<6, 4>(at, stride, cols, planes, x));
                            4
                        }
                        _ if bits == 4 => {
                            add(out, &fixed::dot_rows::<4, 1>(at, stride, cols, planes, x));
                            1
                        }
                        _ => {
                            add(out, &fixed::dot_rows::<6, 1>(at, stride, cols, planes, x));
                            1
                        }
                    };
                }
            }
            row += count;
        }
    }
}

/// Rows `rows` of an integer matrix in fixed point.
#[cfg(target_arch = "x86_64")]
fn int_dot(affine: &crate::weights::Affine, x: fixed::FixedX<'_>, rows: Range<usize>, out: &mut [f32]) {
    let Some(block_shift) = affine.block_shift else {
        return;
    };
    let stride = affine.cols * affine.bits as usize / 8;
    for (row, out) in rows.zip(out) {
        let group = row / affine.row_block * affine.col_blocks;
        let blocks = group..group + affine.col_blocks;
        let int_row = fixed::IntRow {
            data: affine.data[row * stride..(row + 1) * stride].as_ptr(),
            cols: affine.cols,
            signed: affine.signed,
            scales: &affine.scale[blocks.clone()],
            zeros: affine.zero.as_ref().map(|zero| &zero[blocks]),
            block_shift,
        };
        // SAFETY: `block_shift` is there only where AVX2 is and rows are whole bytes; the row was sliced, and `x` made
        // for its columns, in the order for its bits.
        *out = unsafe {
            match affine.bits {
                4 => fixed::dot_ints::<4>(&int_row, x),
                _ => fixed::dot_ints::<8>(&int_row, x),
            }
        };
    }
}

/// A stored number that vectors are loaded from.
pub(crate) trait Stored: Copy {
    /// The numbers of a matrix that is stored like this, row by row.
    fn all(w: &Weights) -> Option<&[Self]>;
    /// # Safety
    /// `S::LANES` numbers are readable at `p`.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F;
    fn widen(self) -> f32;
}

impl Stored for f32 {
    fn all(w: &Weights) -> Option<&[f32]> {
        match w.storage() {
            Storage::F32(data) => Some(data.f32()),
            _ => None,
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Stored for f16 {
    fn all(w: &Weights) -> Option<&[f16]> {
        match w.storage() {
            Storage::F16(data) => Some(data.f16()),
            _ => None,
        }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::F {
        // SAFETY: the caller's.
        unsafe { s.load_f16(p) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// `out[r] = w[r] . x`, rows of `w` one after the other.
pub(crate) struct Dot<'a, T> {
    pub w: &'a [T],
    pub x: &'a [f32],
    pub out: &'a mut [f32],
}

impl<T: Stored> Kernel for Dot<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let cols = self.x.len();
        assert_eq!(self.w.len(), cols * self.out.len(), "dot: rows and columns");
        let mut row = 0;
        if cols >= LONG {
            row = match memory() {
                Memory::OneStream => self.streams::<S, 1, 4, false>(s, 3584),
                Memory::FarStreams => self.streams::<S, 4, 4, true>(s, 1024),
                Memory::FourStreams => self.streams::<S, 4, 2, false>(s, 512),
            };
        }
        while row + 4 <= self.out.len() {
            let sums = dot_rows::<S, T, 4>(s, &self.w[row * cols..(row + 4) * cols], self.x);
            self.out[row..row + 4].copy_from_slice(&sums);
            row += 4;
        }
        while row < self.out.len() {
            let [sum] = dot_rows::<S, T, 1>(s, &self.w[row * cols..(row + 1) * cols], self.x);
            self.out[row] = sum;
            row += 1;
        }
    }
}

/// Rows from this length on come from memory as fast as it gives them when what follows is asked for early.
const LONG: usize = 256;

impl<T: Stored> Dot<'_, T> {
    /// Multiplies most rows, `R` far apart side by side in `A` sums each, asking memory for what lies `ahead` bytes behind, where
    /// `SECOND` to the second cache; gives how many it did, the first ones.
    #[inline(always)]
    fn streams<S: Simd, const R: usize, const A: usize, const SECOND: bool>(
        &mut self,
        s: S,
        ahead: usize,
    ) -> usize {
        let cols = self.x.len();
        let each = self.out.len() / R;
        for at in 0..each {
            let first = |stream: usize| stream * each + at;
            let rows = std::array::from_fn(|r| &self.w[first(r) * cols..(first(r) + 1) * cols]);
            let sums = dot_streams::<S, T, R, A, SECOND>(s, rows, self.x, ahead);
            for (stream, sum) in sums.into_iter().enumerate() {
                self.out[first(stream)] = sum;
            }
        }
        each * R
    }
}

/// Asks memory for `bytes` from `first` on, where `SECOND` to the second cache.
#[inline(always)]
fn ask<S: Simd, const SECOND: bool>(s: S, first: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        if SECOND {
            s.prefetch_second(first.wrapping_add(line));
        } else {
            s.prefetch(first.wrapping_add(line));
        }
    }
}

/// A matrix that is read row by row.
pub(crate) trait Rows: Copy {
    /// `w[r].0`'s row `w[r].1` times `x`, for rows that lie far apart, in `A` sums each; asks memory for what lies `ahead` bytes behind,
    /// where `SECOND` to the second cache.
    fn dot<S: Simd, const R: usize, const A: usize, const SECOND: bool>(
        s: S,
        w: [(Self, usize); R],
        x: &[f32],
        ahead: usize,
    ) -> [f32; R];
}

impl<T: Stored> Rows for &[T] {
    #[inline(always)]
    fn dot<S: Simd, const R: usize, const A: usize, const SECOND: bool>(
        s: S,
        w: [(Self, usize); R],
        x: &[f32],
        ahead: usize,
    ) -> [f32; R] {
        let mut rows = [&[][..]; R];
        for (to, (w, row)) in rows.iter_mut().zip(w) {
            *to = &w[row * x.len()..(row + 1) * x.len()];
        }
        dot_streams::<S, T, R, A, SECOND>(s, rows, x, ahead)
    }
}

/// `w[r] . x` for rows that lie far apart.
#[inline(always)]
fn dot_streams<S: Simd, T: Stored, const R: usize, const A: usize, const SECOND: bool>(
    s: S,
    w: [&[T]; R],
    x: &[f32],
    ahead: usize,
) -> [f32; R] {
    let cols = x.len();
    assert!(w.iter().all(|w| w.len() == cols), "dot: columns");
    let mut sums = [[s.zero(); A]; R];
    let mut c = 0;
    while c + 4 * S::LANES <= cols {
        for w in w {
            let at = w.as_ptr().wrapping_add(c).cast::<u8>();
            ask::<S, SECOND>(s, at.wrapping_add(ahead), 4 * S::LANES * size_of::<T>());
        }
        for n in 0..4 {
            let at = c + n * S::LANES;
            // SAFETY: `at + LANES` is not past `cols`.
            let x = unsafe { s.load(x.as_ptr().add(at)) };
            for (w, sums) in w.iter().zip(&mut sums) {
                // SAFETY: as above, every row being as long as `x`.
                let w = unsafe { T::load(s, w.as_ptr().add(at)) };
                sums[n % A] = s.fma(w, x, sums[n % A]);
            }
        }
        c += 4 * S::LANES;
    }
    while c + S::LANES <= cols {
        // SAFETY: `c + LANES` is not past `cols`.
        let x = unsafe { s.load(x.as_ptr().add(c)) };
        for (w, sums) in w.iter().zip(&mut sums) {
            // SAFETY: as above.
            let w = unsafe { T::load(s, w.as_ptr().add(c)) };
            sums[0] = s.fma(w, x, sums[0]);
        }
        c += S::LANES;
    }
    let mut results = [0.0; R];
    for (r, result) in results.iter_mut().enumerate() {
        let rest: f32 = (c..cols).map(|c| w[r][c].widen() * x[c]).sum();
        let mut sum = sums[r][0];
        for part in &sums[r][1..] {
            sum = s.add(sum, *part);
        }
        *result = s.sum(sum) + rest;
    }
    results
}

#[inline(always)]
fn dot_rows<S: Simd, T: Stored, const R: usize>(s: S, w: &[T], x: &[f32]) -> [f32; R] {
    let cols = x.len();
    assert_eq!(w.len(), R * cols, "dot: rows");
    let mut sums = [[s.zero(); 2]; R];
    let mut c = 0;
    while c + 2 * S::LANES <= cols {
        for half in 0..2 {
            let at = c + half * S::LANES;
            // SAFETY: `at + LANES` is not past `cols`.
            let x = unsafe { s.load(x.as_ptr().add(at)) };
            for r in 0..R {
                // SAFETY: as above, in row `r`.
                let w = unsafe { T::load(s, w.as_ptr().add(r * cols + at)) };
                sums[r][half] = s.fma(w, x, sums[r][half]);
            }
        }
        c += 2 * S::LANES;
    }
    let mut results = [0.0; R];
    for (r, result) in results.iter_mut().enumerate() {
        let rest: f32 = (c..cols).map(|c| w[r * cols + c].widen() * x[c]).sum();
        *result = s.sum(s.add(sums[r][0], sums[r][1])) + rest;
    }
    results
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn random(seed: &mut u64) -> f32 {
        *seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((*seed >> 40) as f32 / (1 << 24) as f32) * 2.0 - 1.0
    }

    fn lut(rows: usize, cols: usize, bits: u32, groups: (usize, usize), seed: &mut u64) -> Weights {
        let tables = rows.div_ceil(groups.0) * cols.div_ceil(groups.1);
        let indices: Vec<u8> = (0..(rows * cols * bits as usize).div_ceil(8))
            .map(|_| (random(seed) * 128.0 + 128.0) as u8)
            .collect();
        let table = (0..tables << bits).map(|_| random(seed)).collect();
        Weights::lut(rows, cols, bits, indices.into(), table, groups.0, groups.1).unwrap()
    }

    fn check(w: &Weights, seed: &mut u64, range: Range<usize>) {
        let x: Vec<f32> = (0..w.cols()).map(|_| random(seed)).collect();
        // Working memory holds anything.
        let mut space = vec![f32::NAN; prepared_len(w.cols())];
        let prepared = prepare(&x, &[w], &mut space);
        let mut out = vec![f32::NAN; range.len()];
        dot(Read::of(w), &prepared, range.clone(), &mut out);
        let mut row = vec![0.0; w.cols()];
        for (r, out) in range.zip(out) {
            w.row(r, &mut row);
            let exact: f64 = row
                .iter()
                .zip(&x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                .sum();
            let sizes: f64 = row.iter().map(|w| f64::from(w.abs())).sum();
            let x_sizes: f64 = x.iter().map(|x| f64::from(x.abs())).sum();
            // The bound stated at the top of `fixed`, all magnitudes being below 1, and the rounding of the sums. With a
            // zero point, the sums are those of larger terms.
            let bound = sizes / 32766.0 + x_sizes / 65534.0 + 4e-5;
            assert!(
                (f64::from(out) - exact).abs() <= bound,
                "row {r}: {out} is not {exact}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn every_storage_agrees_with_its_decoded_rows(
            rows in 1_usize..40, cols in 1_usize..700, seed in any::<u64>(), start in 0_usize..5, kind in 0..8,
            row_group in 1_usize..20, col_group in 1_usize..4,
        ) {
            let mut seed = seed;
            let range = start.min(rows)..rows;
            let w = match kind {
                0 | 1 => {
                    let data: Vec<f32> = (0..rows * cols).map(|_| random(&mut seed)).collect();
                    if kind == 0 {
                        Weights::from_f32(rows, cols, bytemuck::cast_slice(&data).to_vec().into()).unwrap()
                    } else {
                        let data: Vec<f16> = data.into_iter().map(f16::from_f32).collect();
                        Weights::from_f16(rows, cols, bytemuck::cast_slice(&data).to_vec().into()).unwrap()
                    }
                }
                2 => lut(rows, cols, 4, (row_group, cols), &mut seed),
                3 => lut(rows, cols, 6, (row_group, cols), &mut seed),
                4 => lut(rows, cols * 4, if row_group % 2 == 0 { 4 } else { 6 }, (row_group, 64 * col_group), &mut seed),
                6 | 7 => {
                    let bits = if kind == 6 { 4 } else { 8 };
                    let block = [32, 64, 128, cols, 40][row_group % 5];
                    let blocks = rows.div_ceil(col_group) * cols.div_ceil(block);
                    let data: Vec<u8> = (0..(rows * cols * bits as usize).div_ceil(8))
                        .map(|_| (random(&mut seed) * 128.0 + 128.0) as u8)
                        .collect();
                    // Magnitudes stay below 1, as the bound assumes.
                    let size = if bits == 4 { 0.03 } else { 0.0015 };
                    let scale = (0..blocks).map(|_| random(&mut seed) * size).collect();
                    let zero = (seed % 2 == 0).then(|| (0..blocks).map(|_| (random(&mut seed) * 5.0).round()).collect());
                    let signed = seed % 3 == 0;
                    Weights::affine(rows, cols, bits, signed, data.into(), scale, zero, col_group, block).unwrap()
                }
                _ => lut(rows, cols, [1, 2, 3, 8][row_group % 4], (row_group, col_group * 7), &mut seed),
            };
            check(&w, &mut seed, range);
        }
    }

    #[test]
    fn an_infinite_activation_stays_infinite() {
        let w = Weights::lut(
            1,
            64,
            4,
            vec![0x11; 32].into(),
            (0..16).map(|i| i as f32).collect(),
            1,
            64,
        )
        .unwrap();
        let mut x = vec![1.0; 64];
        x[5] = f32::INFINITY;
        let mut space = vec![f32::NAN; prepared_len(64)];
        let mut out = [0.0];
        dot(Read::of(&w), &prepare(&x, &[&w], &mut space), 0..1, &mut out);
        assert_eq!(out[0], f32::INFINITY);
    }
}
