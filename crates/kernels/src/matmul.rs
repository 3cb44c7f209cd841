//! Batched matrix products of activations.

use crate::attention::few_rows;
use crate::gemm::{Gemm, Rows, block_space, pack_panels, panel_width};
use crate::loops::Shared;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::strided::{View, ViewMut};
use crate::weights::Lines;
use half::f16;
use std::ops::Range;

/// A read-only operand in either width.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a> {
    /// Values as they are.
    F32(View<'a, f32>),
    /// Widened when read.
    F16(View<'a, f16>),
}

impl<'a> Operand<'a> {
    /// Length of each dimension, outermost first.
    pub fn shape(&self) -> &'a [usize] {
        match self {
            Operand::F32(view) => view.shape(),
            Operand::F16(view) => view.shape(),
        }
    }

    /// Step of each dimension in elements.
    pub fn strides(&self) -> &'a [isize] {
        match self {
            Operand::F32(view) => view.strides(),
            Operand::F16(view) => view.strides(),
        }
    }

    pub(crate) fn source(&self) -> Source {
        match self {
            Operand::F32(view) => Source::F32(Shared::of(view.ptr())),
            Operand::F16(view) => Source::F16(Shared::of(view.ptr())),
        }
    }
}

/// An operand's first element.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    F32(Shared<f32>),
    F16(Shared<f16>),
}

impl Source {
    /// The element `at` steps on.
    ///
    /// # Safety
    /// `at` must be the offset of an index of the view this came from, which must be borrowed still.
    pub(crate) unsafe fn get(self, at: isize) -> f32 {
        match self {
            // SAFETY: the caller's.
            Source::F32(p) => unsafe { *p.at(at) },
            // SAFETY: the caller's.
            Source::F16(p) => unsafe { *p.at(at) }.to_f32(),
        }
    }
}

/// `y[b, m, n] = sum_k a[b, m, k] * b[b, k, n]`; transposed operands are strides, repeated batches stride 0.
///
/// # Panics
/// When the operands are not of rank 3 or their shapes do not fit.
pub fn matmul_f32(
    pool: &Pool,
    a: View<'_, f32>,
    b: Operand<'_>,
    mut y: ViewMut<'_, f32>,
    scratch: &mut Scratch,
) {
    let (&[batch, m, k], &[bb, bk, n]) = (a.shape(), b.shape()) else {
        panic!("matmul takes rank 3")
    };
    assert!(
        bb == batch && bk == k && y.shape() == [batch, m, n],
        "matmul of {:?} by {:?}",
        a.shape(),
        b.shape()
    );
    let steps = |strides: &[isize]| [strides[0], strides[1], strides[2]];
    let (sa, sb, sy) = (steps(a.strides()), steps(b.strides()), steps(y.strides()));
    let left = Side {
        source: Source::F32(Shared::of(a.ptr())),
        batch: sa[0],
        item: sa[1],
        k: sa[2],
        count: m,
    };
    let right = Side {
        source: b.source(),
        batch: sb[0],
        item: sb[2],
        k: sb[1],
        count: n,
    };
    // The side with more items becomes the lanes, whose panels are filled up to their width.
    let (lanes, rows, y_steps) = if n >= m {
        (right, left, [sy[0], sy[2], sy[1]])
    } else {
        (left, right, [sy[0], sy[1], sy[2]])
    };
    if batch * m * n == 0 {
        return;
    }
    let product = Product {
        lanes,
        rows,
        k,
        y: Shared(y.ptr()),
        steps: y_steps,
    };
    if rows.count <= FEW_ROWS && (lanes.k == 1 || lanes.item == 1) {
        return product.few(pool, batch);
    }
    // A few batches at a time, so that the packed operands stay small.
    let each = product.packed_len();
    let together = (PACKED_MOST / each.max(1)).clamp(1, batch);
    for first in (0..batch).step_by(together) {
        product.many(pool, first..(first + together).min(batch), scratch);
    }
}

/// Packed elements of a round of batches.
const PACKED_MOST: usize = 4 << 20;

/// Up to this many rows are multiplied with the other side in place.
const FEW_ROWS: usize = 3;

/// Rows multiplied together with a panel block.
const ROW_BLOCK: usize = 48;

/// Panels multiplied together.
const PANEL_BLOCK: usize = 8;

/// One operand: `count` items of `k` elements per batch.
#[derive(Debug, Clone, Copy)]
struct Side {
    source: Source,
    batch: isize,
    item: isize,
    k: isize,
    count: usize,
}

/// `y[b, lane, row] = sum_k lanes[b, lane, k] * rows[b, row, k]`.
#[derive(Debug, Clone, Copy)]
struct Product {
    lanes: Side,
    rows: Side,
    k: usize,
    y: Shared<f32>,
    /// Of batch, lane and row.
    steps: [isize; 3],
}

impl Product {
    /// Lanes in panels and, unless they can be read in place, rows.
    fn packed_len(&self) -> usize {
        self.panels_len() + self.rows_len()
    }

    fn panels_len(&self) -> usize {
        self.lanes.count.next_multiple_of(panel_width()) * self.k
    }

    fn rows_len(&self) -> usize {
        if self.rows_in_place() {
            0
        } else {
            self.rows.count * self.k
        }
    }

    fn rows_in_place(&self) -> bool {
        self.rows.k == 1 && matches!(self.rows.source, Source::F32(_))
    }

    /// Few rows: the lanes are read once, where they are.
    fn few(&self, pool: &Pool, batch: usize) {
        let Product { lanes, rows, k, .. } = *self;
        let grain = (40_000 / (k * rows.count).max(1)).clamp(16, lanes.count.max(16));
        let blocks = lanes.count.div_ceil(grain);
        pool.run_ranges(batch * blocks, 1, &|range| {
            let (mut items, mut out) = (vec![0.0; k * rows.count], vec![0.0; grain * rows.count]);
            for job in range {
                let (b, first) = (job / blocks, job % blocks * grain);
                let count = grain.min(lanes.count - first);
                for (r, item) in items.chunks_exact_mut(k.max(1)).enumerate() {
                    for (l, value) in item.iter_mut().enumerate() {
                        let at = b as isize * rows.batch + r as isize * rows.item + l as isize * rows.k;
                        // SAFETY: inside the operand.
                        *value = unsafe { rows.source.get(at) };
                    }
                }
                let at = b as isize * lanes.batch + first as isize * lanes.item;
                let out = &mut out[..count * rows.count];
                // SAFETY: the lanes `first..first + count` of the operand, `k` elements each.
                unsafe {
                    match lanes.source {
                        Source::F32(p) => few_rows(p.at(at), (lanes.item, lanes.k), (count, k), &items, out),
                        Source::F16(p) => few_rows(p.at(at), (lanes.item, lanes.k), (count, k), &items, out),
                    }
                }
                for (r, out) in out.chunks_exact(count).enumerate() {
                    let y = self.y.at(b as isize * self.steps[0] + r as isize * self.steps[2]);
                    for (lane, value) in out.iter().enumerate() {
                        let at = (first + lane) as isize * self.steps[1];
                        // SAFETY: inside the output; these lanes belong to this thread.
                        unsafe { *y.wrapping_offset(at) = *value };
                    }
                }
            }
        });
    }

    /// The blocked product for `batches`.
    fn many(&self, pool: &Pool, batches: Range<usize>, scratch: &mut Scratch) {
        let Product { lanes, rows, k, .. } = *self;
        let width = panel_width();
        let panels = lanes.count.div_ceil(width);
        let each = self.packed_len().next_multiple_of(16);
        let work_each = ROW_BLOCK * PANEL_BLOCK * width + block_space(ROW_BLOCK);
        let (packed, work) = scratch.with_own(each * batches.len(), pool.threads(), work_each);
        let target = Shared(packed.as_mut_ptr());
        pool.run_ranges(
            batches.len() * panels,
            (16384 / (width * k).max(1)).max(1),
            &|range| {
                for job in range {
                    let (b, p) = (job / panels, job % panels);
                    let to = target.at((b * each + p * width * k) as isize);
                    // SAFETY: this job's panel.
                    let to = unsafe { std::slice::from_raw_parts_mut(to, width * k) };
                    let at = (batches.start + b) as isize * lanes.batch;
                    match lanes.source {
                        // SAFETY: the operand's items.
                        Source::F32(x) => unsafe {
                            pack_panels(
                                Shared(x.at(at)),
                                [lanes.item, lanes.k],
                                lanes.count,
                                k,
                                p..p + 1,
                                to,
                            );
                        },
                        source @ Source::F16(_) => pack_half(source, at, &lanes, p * width, to),
                    }
                }
            },
        );
        if !self.rows_in_place() {
            let start = self.panels_len();
            pool.run_ranges(batches.len() * rows.count, (16384 / k.max(1)).max(1), &|range| {
                for job in range {
                    let (b, r) = (job / rows.count, job % rows.count);
                    let from = (batches.start + b) as isize * rows.batch + r as isize * rows.item;
                    let to = target.at((b * each + start + r * k) as isize);
                    for l in 0..k {
                        // SAFETY: inside the operand, and this job's row of the packed ones.
                        unsafe { *to.wrapping_add(l) = rows.source.get(from + l as isize * rows.k) };
                    }
                }
            });
        }
        let packed = &*packed;
        let (row_blocks, panel_blocks) = (rows.count.div_ceil(ROW_BLOCK), panels.div_ceil(PANEL_BLOCK));
        pool.run_indexed(batches.len() * row_blocks * panel_blocks, &|worker, job| {
            let (b, block) = (
                job / (row_blocks * panel_blocks),
                job % (row_blocks * panel_blocks),
            );
            let first = block % row_blocks * ROW_BLOCK;
            let start = block / row_blocks * PANEL_BLOCK;
            // SAFETY: each worker has its own part.
            let work = unsafe { work.of(worker) };
            let packed = &packed[b * each..(b + 1) * each];
            let chosen = first..(first + ROW_BLOCK).min(rows.count);
            self.block(
                batches.start + b,
                packed,
                chosen,
                start..(start + PANEL_BLOCK).min(panels),
                work,
            );
        });
    }

    /// Rows `rows` and panels `panels` of one batch.
    fn block(
        &self,
        batch: usize,
        packed: &[f32],
        rows: Range<usize>,
        panels: Range<usize>,
        work: &mut [f32],
    ) {
        let width = panel_width();
        let line = panels.len() * width;
        let (c, space) = work.split_at_mut(ROW_BLOCK * PANEL_BLOCK * width);
        let source = match self.rows.source {
            Source::F32(p) if self.rows_in_place() => Rows::Dense {
                first: Shared(p.at(batch as isize * self.rows.batch)),
                stride: self.rows.item,
            },
            _ => Rows::Dense {
                first: Shared::of(packed[self.panels_len()..].as_ptr()),
                stride: self.k as isize,
            },
        };
        let gemm = Gemm {
            panels: &packed[..self.panels_len()],
            k: self.k,
            rows: source,
            then: Lines::default(),
            pairs: false,
        };
        // SAFETY: the rows of the operand, or their packed copy.
        unsafe { gemm.block(rows.clone(), panels.clone(), c, space) };
        let first = panels.start * width;
        let count = line.min(self.lanes.count - first);
        for (row, c) in rows.zip(c.chunks_exact(line)) {
            let y = self.y.at(batch as isize * self.steps[0]
                + first as isize * self.steps[1]
                + row as isize * self.steps[2]);
            for (lane, value) in c[..count].iter().enumerate() {
                // SAFETY: inside the output; these rows and lanes belong to this thread.
                unsafe { *y.wrapping_offset(lane as isize * self.steps[1]) = *value };
            }
        }
    }
}

/// One panel from half-precision lanes, `first` on.
fn pack_half(source: Source, at: isize, lanes: &Side, first: usize, panel: &mut [f32]) {
    let width = panel_width();
    let count = width.min(lanes.count - first);
    for (l, line) in panel.chunks_exact_mut(width).enumerate() {
        let from = at + first as isize * lanes.item + l as isize * lanes.k;
        if let (Source::F16(p), 1) = (source, lanes.item) {
            // SAFETY: `count` lanes side by side.
            let x = unsafe { std::slice::from_raw_parts(p.at(from).cast_const(), count) };
            crate::copy::f16_to_f32(x, &mut line[..count]);
        } else {
            for (lane, value) in line[..count].iter_mut().enumerate() {
                // SAFETY: inside the operand.
                *value = unsafe { source.get(from + lane as isize * lanes.item) };
            }
        }
        line[count..].fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn products_of_any_size_and_layout_agree_with_the_definition(
            batch in 1_usize..4, m in 1_usize..60, k in 0_usize..70, n in 1_usize..60, layout in 0_usize..8,
            narrow in any::<bool>(), shared in any::<bool>(), seed in any::<u64>(),
        ) {
            let mut seed = seed;
            let strides = |rows: usize, cols: usize, transposed: bool| {
                let all = if batch == 1 { 0 } else { (rows * cols) as isize };
                if transposed { [all, 1, rows as isize] } else { [all, cols as isize, 1] }
            };
            let (a_shape, b_shape, y_shape) = ([batch, m, k], [batch, k, n], [batch, m, n]);
            let sa = strides(m, k, layout & 1 != 0);
            let mut sb = strides(k, n, layout & 2 != 0);
            let sy = strides(m, n, layout & 4 != 0);
            if shared {
                sb[0] = 0;
            }
            let a: Vec<f32> = (0..batch * m * k).map(|_| random(&mut seed)).collect();
            let b: Vec<f16> = (0..batch * k * n).map(|_| f16::from_f32(random(&mut seed))).collect();
            let wide: Vec<f32> = b.iter().map(|b| b.to_f32()).collect();
            let operand = if narrow {
                Operand::F16(View::new(&b, 0, &b_shape, &sb).unwrap())
            } else {
                Operand::F32(View::new(&wide, 0, &b_shape, &sb).unwrap())
            };
            let mut y = vec![f32::NAN; batch * m * n];
            let out = ViewMut::new(&mut y, 0, &y_shape, &sy).unwrap();
            let view = View::new(&a, 0, &a_shape, &sa).unwrap();
            matmul_f32(&Pool::new(2), view, operand, out, &mut Scratch::new());
            let at = |s: [isize; 3], i: [usize; 3]| (0..3).map(|n| s[n] * i[n] as isize).sum::<isize>() as usize;
            for g in 0..batch {
                for i in 0..m {
                    for j in 0..n {
                        let exact: f64 = (0..k)
                            .map(|l| f64::from(a[at(sa, [g, i, l])]) * f64::from(wide[at(sb, [g, l, j])]))
                            .sum();
                        let found = f64::from(y[at(sy, [g, i, j])]);
                        prop_assert!((found - exact).abs() < 1e-5, "[{g}, {i}, {j}]: {found} is not {exact}");
                    }
                }
            }
        }
    }
}
