//! Many tokens: the blocked product.

use super::*;

/// Tokens packed for the blocked product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tokens {
    m: usize,
    k: usize,
    pairs: bool,
    panels: usize,
    /// Panels multiplied together.
    panels_each: usize,
}

impl Tokens {
    pub(super) fn new(m: usize, k: usize, pairs: bool) -> Tokens {
        let width = panel_width();
        let panels = m.div_ceil(width);
        let panels_each = (GEMM_TOKENS / width).min(panels).max(1);
        Tokens {
            m,
            k,
            pairs,
            panels,
            panels_each,
        }
    }

    /// Lines of a panel: numbers of a token, or pairs.
    fn lines(self) -> usize {
        if self.pairs { self.k.div_ceil(2) } else { self.k }
    }

    /// Numbers of all panels.
    pub(super) fn len(self) -> usize {
        self.panels * self.lines() * panel_width()
    }

    /// Working memory of a thread.
    pub(super) fn work(self) -> usize {
        block_space(GEMM_ROWS) + 2 * GEMM_ROWS * self.panels_each * panel_width()
    }
}

/// All tokens at once: the blocked product.
pub(super) fn many(pool: &Pool, x: View<'_, f32>, layers: &[Layer<'_>], scratch: &mut Scratch) {
    let tokens = Tokens::new(x.shape()[0], x.shape()[1], layers[0].pairs);
    let (packed, work) = scratch.with_own(tokens.len(), pool.threads(), tokens.work());
    count_pairs(pool, layers);
    pack_tokens(pool, &x, tokens, packed);
    products(pool, (packed, tokens), layers, work);
}

/// Counts products in pairs, where weights are packed for them.
pub(super) fn count_pairs(pool: &Pool, layers: &[Layer<'_>]) {
    for layer in layers.iter().filter(|layer| layer.pairs && !by_tiles()) {
        layer.w.weights.used_in_pairs(pool);
        layer.up.inspect(|up| up.weights.used_in_pairs(pool));
    }
}

pub(super) fn pack_tokens(pool: &Pool, x: &View<'_, f32>, tokens: Tokens, packed: &mut [f32]) {
    let Tokens {
        m, k, pairs, panels, ..
    } = tokens;
    let each = panel_width() * tokens.lines();
    let target = Shared(packed.as_mut_ptr());
    let (source, steps) = (Shared::of(x.ptr()), [x.strides()[0], x.strides()[1]]);
    pool.run_ranges(panels, (16384 / each.max(1)).max(1), &|range| {
        let to = target.at((range.start * each) as isize);
        // SAFETY: the panels of `range` are this thread's part of `packed`.
        let to = unsafe { std::slice::from_raw_parts_mut(to, range.len() * each) };
        // SAFETY: the source holds `m` tokens of `k` elements.
        unsafe {
            if pairs {
                pack_pairs(source, steps, m, k, range, to);
            } else {
                pack_panels(source, steps, m, k, range, to);
            }
        }
    });
}

/// Every layer for all tokens.
pub(super) fn products(pool: &Pool, (packed, tokens): (&[f32], Tokens), layers: &[Layer<'_>], work: Own) {
    let Tokens {
        m,
        k,
        pairs,
        panels,
        panels_each,
    } = tokens;
    let token_blocks = panels.div_ceil(panels_each);
    let mut ends = [0_usize; 8];
    let mut chunks = 0;
    for (end, layer) in ends.iter_mut().zip(layers) {
        chunks += layer.w.rows().div_ceil(GEMM_ROWS) * token_blocks;
        *end = chunks;
    }
    let part = |chunk: usize| {
        let which = ends.iter().position(|end| chunk < *end)?;
        let layer = &layers[which];
        let chunk = chunk - if which == 0 { 0 } else { ends[which - 1] };
        let first = chunk / token_blocks * GEMM_ROWS;
        let rows = first..(first + GEMM_ROWS).min(layer.w.rows());
        let start = chunk % token_blocks * panels_each;
        Some((layer, rows, start..(start + panels_each).min(panels)))
    };
    pool.run_indexed(chunks, &|worker, chunk| {
        let (layer, rows, range) = part(chunk).expect("chunks were counted over the layers");
        // A thread has its chunks one after the other.
        let then = part(chunk + 1).map_or(Lines::default(), |(next, rows, _)| {
            opening(next.w.weights, rows, pairs)
        });
        // SAFETY: each worker has its own part of `work`.
        let work = unsafe { work.of(worker) };
        many_rows(layer, packed, (m, k), (rows, then), range, work);
    });
}

/// Rows `rows` of a layer for the tokens of panels `panels`, which are this thread's; `then` is what it reads after them.
fn many_rows(
    layer: &Layer<'_>,
    packed: &[f32],
    (m, k): (usize, usize),
    (rows, then): (Range<usize>, Lines),
    panels: Range<usize>,
    work: &mut [f32],
) {
    let width = panel_width();
    let line = panels.len() * width;
    let (space, sums) = work.split_at_mut(block_space(GEMM_ROWS));
    let (sums, ups) = sums.split_at_mut(sums.len() / 2);
    let first = panels.start * width;
    let count = line.min(m - first);
    let rows_of = |w| {
        if layer.pairs { Rows::Stored(w) } else { Rows::of(w) }
    };
    // SAFETY: the rows of a weight matrix have its columns, `k` of them.
    unsafe {
        Gemm {
            panels: packed,
            k,
            rows: rows_of(layer.w.weights),
            pairs: layer.pairs,
            then: layer
                .up
                .map_or(then, |up| opening(up.weights, rows.clone(), layer.pairs)),
        }
        .block(rows.clone(), panels.clone(), sums, space)
    };
    for (row, sums) in rows.clone().zip(sums.chunks_exact_mut(line)) {
        layer.finish_row(row, &mut sums[..count]);
    }
    if let Some(up) = layer.up {
        // SAFETY: as above; `up` has the shape of `w`.
        unsafe {
            Gemm {
                panels: packed,
                k,
                rows: rows_of(up.weights),
                pairs: layer.pairs,
                then,
            }
            .block(rows.clone(), panels.clone(), ups, space)
        };
        let used = rows.len() * line;
        sums[..used]
            .iter_mut()
            .zip(&ups[..used])
            .for_each(|(sum, up)| *sum *= up);
    }
    if let Some(to) = layer.panels {
        let lines = if layer.pairs {
            layer.w.rows().div_ceil(2)
        } else {
            layer.w.rows()
        };
        return dispatch_pairs_if(
            layer.pairs,
            IntoPanels {
                sums,
                line,
                rows,
                first: to.at((panels.start * lines * width) as isize),
                step: lines * width,
                pairs: layer.pairs,
            },
        );
    }
    // Results are `[row][token]`. Rows go out as they are when tokens lie side by side, else by small squares.
    if layer.steps[0] == 1 && layer.residual.is_none_or(|(_, steps)| steps[0] == 1) {
        for (row, sums) in rows.zip(sums.chunks_exact(line)) {
            let to = layer.y.at(first as isize + row as isize * layer.steps[1]);
            let Some((residual, steps)) = layer.residual else {
                // SAFETY: inside the output; these rows and tokens belong to this thread.
                unsafe { std::slice::from_raw_parts_mut(to, count) }.copy_from_slice(&sums[..count]);
                continue;
            };
            let from = residual.at(first as isize + row as isize * steps[1]);
            for (i, sum) in sums[..count].iter().enumerate() {
                // SAFETY: as above; the residual has the shape of the output, in whose place it may lie.
                unsafe { *to.wrapping_add(i) = sum + *from.wrapping_add(i) };
            }
        }
        return;
    }
    dispatch(Turned {
        layer,
        sums,
        line,
        rows,
        tokens: first..first + count,
    });
}

/// Runs `kernel` with instructions for pairs of bf16 where `pairs`.
fn dispatch_pairs_if<K: Kernel>(pairs: bool, kernel: K) -> K::Out {
    if pairs {
        dispatch_pairs(kernel)
    } else {
        dispatch(kernel)
    }
}

/// Stores sums `[row][token]` as panels of the next product, whose depth these rows are.
struct IntoPanels<'a> {
    sums: &'a [f32],
    line: usize,
    /// An even first one.
    rows: Range<usize>,
    /// The first panel of these tokens, and how far it is to the next.
    first: *mut f32,
    step: usize,
    pairs: bool,
}

impl Kernel for IntoPanels<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (width, each) = (2 * S::LANES, if self.pairs { 2 } else { 1 });
        assert!(
            self.sums.len() >= self.rows.len() * self.line && self.line.is_multiple_of(width),
            "linear: sums"
        );
        for panel in 0..self.line / width {
            for row in (0..self.rows.len()).step_by(each) {
                let to = self
                    .first
                    .wrapping_add(panel * self.step + (self.rows.start + row) / each * width);
                for half in 0..2 {
                    let at = row * self.line + panel * width + half * S::LANES;
                    // SAFETY: vectors of the sums of a row and the next, where there is one; the line of the panel is this thread's.
                    unsafe {
                        let mut x = s.load(self.sums.as_ptr().add(at));
                        if self.pairs {
                            let there = row + 1 < self.rows.len();
                            let high = if there {
                                s.load(self.sums.as_ptr().add(at + self.line))
                            } else {
                                s.zero()
                            };
                            x = s.pairs(x, high);
                        }
                        s.store(to.add(half * S::LANES), x);
                    }
                }
            }
        }
    }
}

/// Stores sums `[row][token]` by squares that are turned in registers.
struct Turned<'a> {
    layer: &'a Layer<'a>,
    sums: &'a [f32],
    /// Tokens of a row, those behind the last included.
    line: usize,
    rows: Range<usize>,
    tokens: Range<usize>,
}

impl Kernel for Turned<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (layer, line, count) = (self.layer, self.line, self.tokens.len());
        assert!(
            line.is_multiple_of(SQUARE) && self.sums.len() >= self.rows.len() * line,
            "linear: sums"
        );
        let dense = layer.steps[1] == 1 && layer.residual.is_none_or(|(_, steps)| steps[1] == 1);
        let mut square = [[0.0; SQUARE]; SQUARE];
        for row in (0..self.rows.len()).step_by(SQUARE) {
            let high = SQUARE.min(self.rows.len() - row);
            for token in (0..count).step_by(SQUARE) {
                let from = self.sums[row * line + token..].as_ptr();
                if high == SQUARE {
                    // SAFETY: eight rows of `line` sums, and eight of them from `token` on: `line` is a multiple of eight.
                    unsafe { s.turn(from, line as isize, square.as_mut_ptr().cast(), SQUARE as isize) };
                } else {
                    for r in 0..high {
                        for (t, sum) in self.sums[(row + r) * line + token..][..SQUARE].iter().enumerate() {
                            square[t][r] = *sum;
                        }
                    }
                }
                for (t, square) in square.iter_mut().enumerate().take(count - token) {
                    let (token, row) = (self.tokens.start + token + t, self.rows.start + row);
                    if !(dense && high == SQUARE) {
                        // SAFETY: inside the output, and these rows and tokens belong to this thread.
                        unsafe { layer.store_token(token, row, square[..high].iter().copied()) };
                        continue;
                    }
                    let at = |steps: [isize; 2]| token as isize * steps[0] + row as isize;
                    if let Some((residual, steps)) = layer.residual {
                        // SAFETY: the residual has the shape of the output.
                        let residual = unsafe { &*residual.at(at(steps)).cast::<[f32; SQUARE]>() };
                        square.iter_mut().zip(residual).for_each(|(sum, r)| *sum += r);
                    }
                    // SAFETY: as above.
                    unsafe { *layer.y.at(at(layer.steps)).cast::<[f32; SQUARE]>() = *square };
                }
            }
        }
    }
}
