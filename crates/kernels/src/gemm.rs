//! The matrix product at the bottom of linear layers, attention and convolutions.
//!
//! One side, the *lanes* (tokens, or pixels), is packed into panels `[k][width]`, a vector or two wide. The other
//! side, the *rows* (weights), is read along `k` as stored, or decoded along `k` into a small block, so compressed
//! weights are unpacked once per block of lanes and never transposed. Results are `[row][lane]`.

pub(crate) mod int8;

use crate::loops::Shared;
#[cfg(target_arch = "x86_64")]
use crate::simd::matrix_unit;
use crate::simd::{Isa, Kernel, Simd, dispatch, dispatch_pairs, has_bytes, isa, pairs_pay};
#[cfg(target_arch = "x86_64")]
use crate::tiles::{Part, SIDE, Session, Unit};
use crate::weights::{Lines, Storage, Walk, Weights};
use half::bf16;
use std::ops::Range;

/// Steps of `k` handled together at most: a panel of this depth stays in the first-level cache.
const DEPTH: usize = 256;
/// Decoded rows begin at multiples of this, so that their addresses differ by a number that the innermost kernel knows.
const APART: usize = DEPTH + 16;

/// Matrix units read rows of pairs up to a multiple of this.
pub(crate) const WHOLE: usize = 16;

/// Side of the squares that are turned in registers; panels are a multiple of it wide.
pub(crate) const SQUARE: usize = 8;

/// Rows of the innermost kernel, of two vectors of lanes: their sums take twelve registers, or 24 where there are so many.
const ROWS: usize = 6;
const TALL: usize = 2 * ROWS;

/// Lanes in a panel on this processor.
pub(crate) fn panel_width() -> usize {
    match isa() {
        Isa::Avx512 => 32,
        Isa::Avx2 => 16,
        Isa::Neon | Isa::Portable => 8,
    }
}

/// How sums of products are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// In 32-bit floats.
    #[default]
    F32,
    /// In 32-bit floats, every sum as it is written: without Winograd's transform.
    InOrder,
    /// Factors are rounded to bf16 (8 bits of precision), products summed in 32-bit floats, where this processor has
    /// instructions for it and they pay; elsewhere as [`Arithmetic::F32`].
    Bf16,
    /// As [`Arithmetic::Bf16`], but factors of linear layers of many tokens are rounded to 8-bit integers with a scale for each block of
    /// 96, products summed exactly within blocks, where this processor has instructions for it and weights may be packed
    /// ([`Weights::pack_when_used`]).
    Int8,
}

impl Arithmetic {
    /// Whether linear layers of many tokens are multiplied in 8-bit integers on this processor.
    pub fn in_bytes(self) -> bool {
        self == Arithmetic::Int8 && has_bytes() && !by_tiles()
    }

    /// Whether products are made in pairs of bf16 on this processor.
    pub(crate) fn in_pairs(self) -> bool {
        matches!(self, Arithmetic::Bf16 | Arithmetic::Int8) && pairs_pay()
    }
}

/// Where rows come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows<'a> {
    /// `f32` rows, `stride` elements apart, dense along `k`. In pairs they are rounded already; what lies behind them up to a multiple of
    /// [`WHOLE`] may be read, and meets zeros.
    Dense { first: Shared<f32>, stride: isize },
    /// Decoded when needed.
    Stored(&'a Weights),
    /// Decoded when needed, from row and column `first` on.
    Part {
        weights: &'a Weights,
        first: (usize, usize),
    },
}

impl<'a> Rows<'a> {
    /// The rows of `weights`, in place where they are `f32`.
    pub(crate) fn of(weights: &'a Weights) -> Self {
        match weights.storage() {
            Storage::F32(data) if weights.bf12().is_none() => Rows::Dense {
                first: Shared::of(data.f32().as_ptr()),
                stride: weights.cols() as isize,
            },
            _ => Rows::Stored(weights),
        }
    }
}

/// A product of packed lanes and rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gemm<'a> {
    /// `[panel][k][width]`.
    pub panels: &'a [f32],
    pub k: usize,
    pub rows: Rows<'a>,
    /// What is read after this product, asked of memory meanwhile.
    pub then: Lines,
    /// Both sides are rounded to bf16: panels are `[panel][pair of k][width]` then.
    pub pairs: bool,
}

/// What [`Gemm::block`] reads first of `rows`, in pairs or not.
pub(crate) fn opening(weights: &Weights, rows: Range<usize>, pairs: bool) -> Lines {
    let cols = weights.cols();
    if !pairs {
        return weights.lines(rows, 0, depth_of(cols).min(cols));
    }
    let depth = depth_of(cols.div_ceil(2));
    weights.lines(rows, 0, (2 * depth).min(cols))
}

/// Elements of working memory that [`Gemm::block`] needs for `rows` rows.
pub(crate) fn block_space(rows: usize) -> usize {
    rows * APART
}

/// Steps of `k` handled together, of `all`: as many each time, and where a palette's indices begin with a byte.
fn depth_of(all: usize) -> usize {
    let times = all.div_ceil(DEPTH).max(1);
    all.div_ceil(times).next_multiple_of(32).min(DEPTH)
}

impl Gemm<'_> {
    /// `c[row][lane] = sum_k` for `rows` and the lanes of `panels`; `c` is dense. `space` is [`block_space`].
    ///
    /// # Safety
    /// Dense rows have `k` elements for every row in `rows`.
    pub(crate) unsafe fn block(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        c: &mut [f32],
        space: &mut [f32],
    ) {
        let width = panel_width();
        let lines = if self.pairs { self.k.div_ceil(2) } else { self.k };
        assert!(self.panels.len() >= panels.end * width * lines, "gemm: panels");
        assert!(c.len() >= rows.len() * panels.len() * width, "gemm: output");
        assert!(space.len() >= block_space(rows.len()), "gemm: working memory");
        if self.k == 0 {
            return c[..rows.len() * panels.len() * width].fill(0.0);
        }
        // As deep in pairs as in as many numbers otherwise.
        let (all, each) = if self.pairs { (lines, 2) } else { (self.k, 1) };
        let most = depth_of(all);
        let mut start = 0;
        while start < all {
            let depth = most.min(all - start);
            let next = each * (start + depth);
            let after = match self.rows {
                Rows::Stored(weights) if start + depth < all => {
                    weights.lines(rows.clone(), next, (each * most).min(self.k - next))
                }
                _ if start + depth == all => self.then,
                _ => Lines::default(),
            };
            self.step((&rows, &panels), (start, depth), after, c, space);
            start += depth;
        }
    }

    /// Steps of `k`, or pairs of them, so many from `start` on.
    fn step(
        &self,
        (rows, panels): (&Range<usize>, &Range<usize>),
        (start, depth): (usize, usize),
        after: Lines,
        c: &mut [f32],
        space: &mut [f32],
    ) {
        let width = panel_width();
        let (all, each) = if self.pairs {
            (self.k.div_ceil(2), 2)
        } else {
            (self.k, 1)
        };
        let block = Block {
            after,
            first: space.as_ptr(),
            stride: APART as isize,
            rows: rows.len(),
            panel: &self.panels[(panels.start * all + start) * width..],
            panel_step: width * all,
            panels: panels.len(),
            depth,
            add: start > 0,
            c,
        };
        let (weights, row, column) = match self.rows {
            Rows::Dense { first, stride } => {
                let first = first
                    .at(rows.start as isize * stride + start as isize)
                    .cast_const();
                return self.multiply::<false>(Block {
                    first,
                    stride,
                    ..block
                });
            }
            Rows::Stored(weights) => (weights, 0, 0),
            Rows::Part { weights, first } => (weights, first.0, first.1),
        };
        let (part, column) = (row + rows.start..row + rows.end, column + each * start);
        if self.pairs {
            let count = (2 * depth).min(self.k - 2 * start);
            let whole = 2 * depth.next_multiple_of(WHOLE);
            let to = (bytemuck::cast_slice_mut(&mut *space), 2 * APART);
            weights.decode_pairs(part, (column, count, whole), to);
        } else {
            weights.decode_block(part, column, depth, (&mut *space, APART));
        }
        self.multiply::<true>(block);
    }

    /// `DECODED` rows lie [`APART`].
    fn multiply<const DECODED: bool>(&self, block: Block<'_>) {
        #[cfg(target_arch = "x86_64")]
        if let Some(unit) = matrix_unit().filter(|_| self.pairs) {
            return dispatch_pairs(ByTiles(block, unit));
        }
        match (DECODED, self.pairs) {
            (false, false) => dispatch(Dense::<false>(block)),
            (true, false) => dispatch(Decoded::<false>(block)),
            (false, true) => dispatch_pairs(Dense::<true>(block)),
            (true, true) => dispatch_pairs(Decoded::<true>(block)),
        }
    }
}

/// Whether pairs are multiplied by matrix units, which read rows otherwise.
pub(crate) fn by_tiles() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matrix_unit().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// One step of depth of [`Gemm::block`].
struct Block<'a> {
    /// What is read after this step, asked of memory meanwhile.
    after: Lines,
    first: *const f32,
    stride: isize,
    rows: usize,
    panel: &'a [f32],
    panel_step: usize,
    panels: usize,
    depth: usize,
    add: bool,
    c: &'a mut [f32],
}

/// Rows that lie anywhere; their elements are pairs of bf16 where `PAIRS`.
struct Dense<'a, const PAIRS: bool>(Block<'a>);

/// Rows that lie [`APART`]; their elements are pairs of bf16 where `PAIRS`.
struct Decoded<'a, const PAIRS: bool>(Block<'a>);

impl<const PAIRS: bool> Kernel for Dense<'_, PAIRS> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let stride = self.0.stride;
        self.0.run::<S, PAIRS, false>(s, stride);
    }
}

impl<const PAIRS: bool> Kernel for Decoded<'_, PAIRS> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.0.run::<S, PAIRS, true>(s, APART as isize);
    }
}

/// Rows of pairs by matrix units.
#[cfg(target_arch = "x86_64")]
struct ByTiles<'a>(Block<'a>, Unit);

#[cfg(target_arch = "x86_64")]
impl Kernel for ByTiles<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const WIDTH: usize = 2 * SIDE;
        assert_eq!(2 * S::LANES, WIDTH, "gemm: panels for matrix units");
        let (block, mut session) = (self.0, Session::new(self.1));
        let line = block.panels * WIDTH;
        let (whole, rest) = (block.depth / SIDE, block.depth % SIDE);
        // Lines behind the last whole chunk, and zeros.
        let mut last = [[0.0; WIDTH]; SIDE];
        let mut ahead = Ahead {
            walk: block.after.walk(),
            left: block.after.len(),
        };
        let each = ahead
            .left
            .div_ceil((block.panels * block.rows.div_ceil(2 * SIDE)).max(1));
        for p in 0..block.panels {
            let panel = &block.panel[p * block.panel_step..][..block.depth * WIDTH];
            last.as_flattened_mut()[..rest * WIDTH].copy_from_slice(&panel[whole * SIDE * WIDTH..]);
            for row in (0..block.rows).step_by(2 * SIDE) {
                let left = block.rows - row;
                let rows = [left.min(SIDE), left.saturating_sub(SIDE).min(SIDE)];
                let a =
                    [row, row + rows[0]].map(|row| block.first.wrapping_offset(row as isize * block.stride));
                let part = |chunk: usize, b: &[f32], chunks| Part {
                    a: a.map(|a| a.wrapping_add(chunk * SIDE).cast()),
                    a_step: block.stride as usize * size_of::<f32>(),
                    b: b.as_ptr().cast(),
                    b_step: WIDTH * size_of::<f32>(),
                    chunks,
                };
                let parts = [part(0, panel, whole), part(whole, last.as_flattened(), 1)];
                let parts = &parts[usize::from(whole == 0)..1 + usize::from(rest > 0)];
                let c = &mut block.c[row * line + p * WIDTH..];
                assert!(c.len() >= (rows[0] + rows[1] - 1) * line + WIDTH, "gemm: output");
                // SAFETY: so many decoded rows lie at `first`, zeros behind them; panel and output were checked.
                unsafe {
                    if rows[1] > 0 {
                        session.product::<2, 2>(rows, parts, c.as_mut_ptr(), line, block.add);
                    } else {
                        session.product::<1, 2>(rows, parts, c.as_mut_ptr(), line, block.add);
                    }
                }
                ahead.ask(s, each);
            }
        }
    }
}

impl Block<'_> {
    /// Where `TALL_TOO`, rows go by twelve where registers allow it. Twelve addresses that differ by any step do not find room in
    /// registers beside their sums: attention took 1.5 times as long.
    #[inline(always)]
    fn run<S: Simd, const PAIRS: bool, const TALL_TOO: bool>(self, s: S, stride: isize) {
        let width = 2 * S::LANES;
        let line = self.panels * width;
        let tall = if S::REGISTERS < 32 || !TALL_TOO {
            0
        } else if self.rows % TALL == 1 {
            // A single last row would wait for its own sums.
            (self.rows / TALL).saturating_sub(1)
        } else {
            self.rows / TALL
        };
        let rest = self.rows - tall * TALL;
        let tiles = self.panels * (tall + rest.div_ceil(ROWS));
        let mut ahead = Ahead {
            walk: self.after.walk(),
            left: 0,
        };
        let each = self.after.len().div_ceil(tiles.max(1));
        for p in 0..self.panels {
            let panel = &self.panel[p * self.panel_step..][..self.depth * width];
            let mut row = 0;
            while row < self.rows {
                let count = if row < tall * TALL {
                    TALL
                } else {
                    ROWS.min(self.rows - row)
                };
                let first = self.first.wrapping_offset(row as isize * stride);
                let c = &mut self.c[row * line + p * width..];
                assert!(c.len() >= (count - 1) * line + width, "gemm: output");
                ahead.left = each;
                let to = (self.add, c.as_mut_ptr(), line);
                // SAFETY: `count` rows of `depth` elements lie at `first` (the caller of `Gemm::block`, or the
                // decoded block), and the panel and the output were checked.
                unsafe {
                    match count {
                        TALL if S::REGISTERS >= 32 && TALL_TOO => {
                            tile::<S, TALL, PAIRS>(s, panel, (first, stride), to, &mut ahead);
                        }
                        6 => tile::<S, 6, PAIRS>(s, panel, (first, stride), to, &mut ahead),
                        5 => tile::<S, 5, PAIRS>(s, panel, (first, stride), to, &mut ahead),
                        4 => tile::<S, 4, PAIRS>(s, panel, (first, stride), to, &mut ahead),
                        3 => tile::<S, 3, PAIRS>(s, panel, (first, stride), to, &mut ahead),
                        2 => tile::<S, 2, PAIRS>(s, panel, (first, stride), to, &mut ahead),
                        _ => tile::<S, 1, PAIRS>(s, panel, (first, stride), to, &mut ahead),
                    }
                }
                row += count;
                ahead.ask(s, each);
            }
        }
    }
}

/// Lines that memory is asked for while it has nothing else to do.
struct Ahead {
    walk: Walk,
    left: usize,
}

impl Ahead {
    /// Asks for the next `count` lines, as far as there are any left.
    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S, count: usize) {
        for _ in 0..count.min(self.left) {
            s.prefetch_later(self.walk.step());
            self.left -= 1;
        }
    }
}

/// `R` rows by one panel, two vectors wide, all sums in registers.
///
/// # Safety
/// `R` rows of `panel.len() / (2 * LANES)` elements lie at `first`, `stride` apart; `R` lines of `2 * LANES` are
/// writable at `c`, `line` apart.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const PAIRS: bool>(
    s: S,
    panel: &[f32],
    (first, stride): (*const f32, isize),
    (add, c, line): (bool, *mut f32, usize),
    ahead: &mut Ahead,
) {
    let width = 2 * S::LANES;
    let depth = panel.len() / width;
    let mut sums = [[s.zero(); 2]; R];
    let rows: [*const f32; R] = std::array::from_fn(|r| first.wrapping_offset(r as isize * stride));
    let at = panel.as_ptr();
    let mut k = 0;
    while k + 4 <= depth {
        for step in 0..4 {
            // SAFETY: step `k + step` is below the depth.
            unsafe { tile_step::<S, R, PAIRS>(s, at.add((k + step) * width), &rows, k + step, &mut sums) };
        }
        ahead.ask(s, 2);
        k += 4;
    }
    while k < depth {
        // SAFETY: step `k` is below the depth.
        unsafe { tile_step::<S, R, PAIRS>(s, at.add(k * width), &rows, k, &mut sums) };
        k += 1;
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (half, mut sum) in sums.into_iter().enumerate() {
            let to = c.wrapping_add(r * line + half * S::LANES);
            if add {
                // SAFETY: a line of the output.
                sum = s.add(sum, unsafe { s.load(to) });
            }
            // SAFETY: a line of the output.
            unsafe { s.store(to, sum) };
        }
    }
}

/// One step of [`tile`].
///
/// # Safety
/// `2 * LANES` numbers are readable at `x`, and each row has an element `k`.
#[inline(always)]
unsafe fn tile_step<S: Simd, const R: usize, const PAIRS: bool>(
    s: S,
    x: *const f32,
    rows: &[*const f32; R],
    k: usize,
    sums: &mut [[S::F; 2]; R],
) {
    // SAFETY: the caller's.
    let (x0, x1) = unsafe { (s.load(x), s.load(x.add(S::LANES))) };
    for r in 0..R {
        // SAFETY: the caller's.
        let w = s.splat(unsafe { *rows[r].add(k) });
        if PAIRS {
            sums[r][0] = s.dot_pairs(w, x0, sums[r][0]);
            sums[r][1] = s.dot_pairs(w, x1, sums[r][1]);
        } else {
            sums[r][0] = s.fma(w, x0, sums[r][0]);
            sums[r][1] = s.fma(w, x1, sums[r][1]);
        }
    }
}

/// Packs `lanes` lanes of `k` elements into panels, zeros behind the last lane. `x` is element `[lane, k]` at
/// `lane * steps[0] + k * steps[1]`; `range` are the panels to fill in `panels`, which starts at the first of them.
///
/// # Safety
/// `x` holds every such element.
pub(crate) unsafe fn pack_panels(
    x: Shared<f32>,
    steps: [isize; 2],
    lanes: usize,
    k: usize,
    range: Range<usize>,
    panels: &mut [f32],
) {
    let width = panel_width();
    for (p, panel) in range.zip(panels.chunks_exact_mut((width * k).max(1))) {
        let first = p * width;
        let count = width.min(lanes.saturating_sub(first));
        if steps[1] == 1 && count == width {
            let from = x.at(first as isize * steps[0]);
            // `width` lanes of `k` elements, as the caller says.
            dispatch(Transpose {
                x: from,
                stride: steps[0],
                lanes: width,
                k,
                panel,
            });
            continue;
        }
        for (j, line) in panel.chunks_exact_mut(width).enumerate() {
            let from = x.at(first as isize * steps[0] + j as isize * steps[1]);
            if steps[0] == 1 && count == width {
                // SAFETY: `width` lanes side by side.
                line.copy_from_slice(unsafe { std::slice::from_raw_parts(from, width) });
                continue;
            }
            for (lane, value) in line.iter_mut().enumerate() {
                let from = from.wrapping_offset(lane as isize * steps[0]);
                // SAFETY: a lane that exists.
                *value = if lane < count { unsafe { *from } } else { 0.0 };
            }
        }
    }
}

/// `panel[j][lane] = x[lane][j]` for `lanes` dense rows of `k` elements, `stride` apart.
struct Transpose<'a> {
    x: *const f32,
    stride: isize,
    lanes: usize,
    k: usize,
    panel: &'a mut [f32],
}

impl Kernel for Transpose<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (lanes, k) = (self.lanes, self.k);
        assert!(
            self.panel.len() >= lanes * k && lanes.is_multiple_of(SQUARE),
            "gemm: panel"
        );
        let whole = k / SQUARE * SQUARE;
        for j in (0..whole).step_by(SQUARE) {
            for lane in (0..lanes).step_by(SQUARE) {
                let from = self
                    .x
                    .wrapping_offset(lane as isize * self.stride)
                    .wrapping_add(j);
                let to = self.panel[j * lanes + lane..].as_mut_ptr();
                // SAFETY: the rows are readable (where the kernel was made) up to `k`, and the panel holds `k` lines.
                unsafe { s.turn(from, self.stride, to, lanes as isize) };
            }
        }
        for j in whole..k {
            for (lane, value) in self.panel[j * lanes..][..lanes].iter_mut().enumerate() {
                // SAFETY: inside the row.
                *value = unsafe { *self.x.wrapping_offset(lane as isize * self.stride + j as isize) };
            }
        }
    }
}

/// As [`pack_panels`], rounded to pairs of bf16: panels are `[pair of k][width]`, with a zero behind an odd number of elements.
///
/// # Safety
/// As there.
pub(crate) unsafe fn pack_pairs(
    x: Shared<f32>,
    steps: [isize; 2],
    lanes: usize,
    k: usize,
    range: Range<usize>,
    panels: &mut [f32],
) {
    let width = panel_width();
    for (p, panel) in range.zip(panels.chunks_exact_mut((width * k.div_ceil(2)).max(1))) {
        let first = p * width;
        // Lanes that exist, `k` elements each, as the caller says.
        dispatch_pairs(PackPairs {
            x: x.at(first as isize * steps[0]),
            steps,
            lanes: width.min(lanes.saturating_sub(first)),
            k,
            panel,
            width,
        });
    }
}

struct PackPairs<'a> {
    x: *const f32,
    steps: [isize; 2],
    lanes: usize,
    k: usize,
    panel: &'a mut [f32],
    width: usize,
}

impl Kernel for PackPairs<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let pairs = self.k.div_ceil(2);
        assert!(
            self.panel.len() >= pairs * self.width && self.width.is_multiple_of(SQUARE.max(S::LANES)),
            "gemm: panel"
        );
        let whole = self.lanes == self.width;
        let done = match self.steps {
            // SAFETY: lanes and elements exist (where the kernel was made), the panel holds a line for each pair.
            [_, 1] if whole => unsafe { self.turned(s) },
            // SAFETY: as above.
            [1, _] if whole => unsafe { self.side_by_side(s) },
            _ => 0,
        };
        for pair in done..pairs {
            for lane in 0..self.width {
                let number = |k: usize| {
                    let at = lane as isize * self.steps[0] + k as isize * self.steps[1];
                    // SAFETY: a lane and an element that exist.
                    let number =
                        (lane < self.lanes && k < self.k).then(|| unsafe { *self.x.wrapping_offset(at) });
                    u32::from(bf16::from_f32(number.unwrap_or(0.0)).to_bits())
                };
                let bits = number(2 * pair) | number(2 * pair + 1) << 16;
                self.panel[pair * self.width + lane] = f32::from_bits(bits);
            }
        }
    }
}

impl PackPairs<'_> {
    /// Dense lanes, by squares of pairs that are turned; gives how many pairs it did.
    ///
    /// # Safety
    /// The lanes and their elements are readable; the panel holds a line for each pair.
    #[inline(always)]
    unsafe fn turned<S: Simd>(&mut self, s: S) -> usize {
        const DEEP: usize = 4 * SQUARE;
        let whole = self.k / DEEP * DEEP;
        let mut rows = [[bf16::ZERO; DEEP]; SQUARE];
        for k in (0..whole).step_by(DEEP) {
            for lane in (0..self.width).step_by(SQUARE) {
                for (i, row) in rows.iter_mut().enumerate() {
                    let from = self
                        .x
                        .wrapping_offset((lane + i) as isize * self.steps[0])
                        .wrapping_add(k);
                    for at in (0..DEEP).step_by(2 * S::LANES) {
                        // SAFETY: two vectors of the lane, and of the row.
                        unsafe {
                            let both = [s.load(from.add(at)), s.load(from.add(at + S::LANES))];
                            s.store_bf16_twice(row.as_mut_ptr().add(at), both);
                        }
                    }
                }
                for half in 0..2 {
                    let from = rows.as_ptr().cast::<f32>().wrapping_add(half * SQUARE);
                    let to = self.panel[(k / 2 + half * SQUARE) * self.width + lane..].as_mut_ptr();
                    // SAFETY: eight rows of sixteen pairs, and eight lines of the panel.
                    unsafe { s.turn(from, 2 * SQUARE as isize, to, self.width as isize) };
                }
            }
        }
        whole / 2
    }

    /// Lanes that lie side by side; gives how many pairs it did.
    ///
    /// # Safety
    /// As [`PackPairs::turned`].
    #[inline(always)]
    unsafe fn side_by_side<S: Simd>(&mut self, s: S) -> usize {
        let whole = self.k / 2;
        for pair in 0..whole {
            let from = self.x.wrapping_offset(2 * pair as isize * self.steps[1]);
            for lane in (0..self.width).step_by(S::LANES) {
                // SAFETY: a vector of each element, and of the line.
                unsafe {
                    let low = s.load(from.add(lane));
                    let high = s.load(from.wrapping_offset(self.steps[1]).add(lane));
                    s.store(
                        self.panel.as_mut_ptr().add(pair * self.width + lane),
                        s.pairs(low, high),
                    );
                }
            }
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matvec::tests::random;

    #[test]
    fn pairs_are_packed_however_lanes_lie() {
        let (mut seed, width) = (3, panel_width());
        for (lanes, k) in [
            (1, 1),
            (width, 64),
            (2 * width + 3, 77),
            (width, 34),
            (3 * width, 33),
        ] {
            let x: Vec<f32> = (0..lanes * k).map(|_| random(&mut seed)).collect();
            let count = lanes.div_ceil(width);
            for steps in [[k as isize, 1], [1, lanes as isize]] {
                let mut panels = vec![f32::NAN; count * width * k.div_ceil(2)];
                // SAFETY: `x` is `[lanes, k]`, or turned.
                unsafe { pack_pairs(Shared::of(x.as_ptr()), steps, lanes, k, 0..count, &mut panels) };
                for (p, panel) in panels.chunks_exact(width * k.div_ceil(2)).enumerate() {
                    for (pair, line) in panel.chunks_exact(width).enumerate() {
                        for (lane, found) in line.iter().enumerate() {
                            let at = |k_at: usize| {
                                (p * width + lane) as isize * steps[0] + k_at as isize * steps[1]
                            };
                            let there = |k_at: usize| p * width + lane < lanes && k_at < k;
                            let wanted = [2 * pair, 2 * pair + 1]
                                .map(|k_at| if there(k_at) { x[at(k_at) as usize] } else { 0.0 })
                                .map(|x| u32::from(bf16::from_f32(x).to_bits()));
                            assert_eq!(
                                found.to_bits(),
                                wanted[0] | wanted[1] << 16,
                                "[{lanes} {k}] {steps:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn blocks_of_any_size_agree_with_the_definition() {
        let mut seed = 7;
        for (m, n, k) in [
            (1_usize, 1_usize, 1_usize),
            (17, 7, 5),
            (33, 13, 300),
            (16, 6, 256),
            (5, 11, 513),
            (40, 3, 0),
        ] {
            let x: Vec<f32> = (0..m * k).map(|_| random(&mut seed)).collect();
            let w: Vec<f32> = (0..n * k).map(|_| random(&mut seed)).collect();
            let width = panel_width();
            let count = m.div_ceil(width);
            let mut panels = vec![f32::NAN; count * width * k];
            // SAFETY: `x` is `[m, k]`.
            unsafe {
                pack_panels(
                    Shared::of(x.as_ptr()),
                    [k as isize, 1],
                    m,
                    k,
                    0..count,
                    &mut panels,
                )
            };
            let rows = Rows::Dense {
                first: Shared::of(w.as_ptr()),
                stride: k as isize,
            };
            let mut c = vec![f32::NAN; n * count * width];
            let mut space = vec![0.0; block_space(n)];
            // SAFETY: `w` is `[n, k]`.
            unsafe {
                Gemm {
                    panels: &panels,
                    k,
                    rows,
                    then: Lines::default(),
                    pairs: false,
                }
                .block(0..n, 0..count, &mut c, &mut space)
            };
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k)
                        .map(|l| f64::from(x[i * k + l]) * f64::from(w[j * k + l]))
                        .sum();
                    let found = c[j * count * width + i];
                    assert!(
                        (f64::from(found) - exact).abs() < 1e-4,
                        "[{m} {n} {k}] {i} {j}: {found} {exact}"
                    );
                }
            }
        }
    }
}
