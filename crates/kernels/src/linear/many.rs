//! Many tokens: the blocked product.

use super::*;

/// What both sides of a product are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Nothing.
    F32,
    /// Pairs of bf16.
    Pairs,
    /// Blocks of 8-bit integers.
    Int8,
}

impl Form {
    /// What suits `layers`, whose weights are rounded now where they are to be.
    pub(super) fn of(pool: &Pool, layers: &[Layer<'_>]) -> Form {
        let Some(arithmetic) = layers.first().map(|layer| layer.arithmetic) else {
            return Form::F32;
        };
        let mut matrices = layers
            .iter()
            .flat_map(|layer| [Some(layer.w), layer.up])
            .flatten();
        if arithmetic.in_bytes() && matrices.all(|w| w.weights.int8_when_used(pool).is_some()) {
            Form::Int8
        } else if arithmetic.in_pairs() {
            Form::Pairs
        } else {
            Form::F32
        }
    }
}

/// Tokens packed for the blocked product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tokens {
    m: usize,
    k: usize,
    form: Form,
    panels: usize,
    /// Panels multiplied together.
    panels_each: usize,
}

impl Tokens {
    pub(super) fn new(m: usize, k: usize, form: Form) -> Tokens {
        let width = panel_width();
        let panels = m.div_ceil(width);
        let panels_each = (GEMM_TOKENS / width).min(panels).max(1);
        Tokens {
            m,
            k,
            form,
            panels,
            panels_each,
        }
    }

    /// Lines of a panel.
    fn lines(self) -> usize {
        match self.form {
            Form::F32 => self.k,
            Form::Pairs => self.k.div_ceil(2),
            Form::Int8 => int8::lines(self.k),
        }
    }

    /// Numbers of all panels.
    pub(super) fn len(self) -> usize {
        self.panels * self.lines() * panel_width()
    }

    /// Rows of a layer multiplied together. Those that become the depth of the next product are whole blocks of it.
    fn rows(self, layer: &Layer<'_>) -> usize {
        if self.form == Form::Int8 && layer.panels.is_some() {
            int8::BLOCK
        } else {
            GEMM_ROWS
        }
    }

    /// Working memory of a thread.
    pub(super) fn work(self) -> usize {
        let (space, rows) = match self.form {
            Form::Int8 => (0, int8::BLOCK),
            Form::F32 | Form::Pairs => (block_space(GEMM_ROWS), GEMM_ROWS),
        };
        space + 2 * rows * self.panels_each * panel_width()
    }
}

/// All tokens at once: the blocked product.
pub(super) fn many(pool: &Pool, x: View<'_, f32>, layers: &[Layer<'_>], scratch: &mut Scratch) {
    let tokens = Tokens::new(x.shape()[0], x.shape()[1], Form::of(pool, layers));
    let (packed, work) = scratch.with_own(tokens.len(), pool.threads(), tokens.work());
    pack_tokens(pool, &x, tokens, packed);
    products(pool, (packed, tokens), layers, work);
}

pub(super) fn pack_tokens(pool: &Pool, x: &View<'_, f32>, tokens: Tokens, packed: &mut [f32]) {
    let Tokens {
        m, k, form, panels, ..
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
            match form {
                Form::F32 => pack_panels(source, steps, m, k, range, to),
                Form::Pairs => pack_pairs(source, steps, m, k, range, to),
                Form::Int8 => int8::pack(source, steps, m, k, range, to),
            }
        }
    });
}

/// Every layer for all tokens.
pub(super) fn products(pool: &Pool, (packed, tokens): (&[f32], Tokens), layers: &[Layer<'_>], work: Own) {
    let Tokens {
        panels, panels_each, ..
    } = tokens;
    let token_blocks = panels.div_ceil(panels_each);
    let mut ends = [0_usize; 8];
    let mut chunks = 0;
    for (end, layer) in ends.iter_mut().zip(layers) {
        chunks += layer.w.rows().div_ceil(tokens.rows(layer)) * token_blocks;
        *end = chunks;
    }
    let part = |chunk: usize| {
        let which = ends.iter().position(|end| chunk < *end)?;
        let layer = &layers[which];
        let chunk = chunk - if which == 0 { 0 } else { ends[which - 1] };
        let each = tokens.rows(layer);
        let first = chunk / token_blocks * each;
        let rows = first..(first + each).min(layer.w.rows());
        let start = chunk % token_blocks * panels_each;
        Some((layer, rows, start..(start + panels_each).min(panels)))
    };
    pool.run_indexed(chunks, &|worker, chunk| {
        let (layer, rows, range) = part(chunk).expect("chunks were counted over the layers");
        // A thread has its chunks one after the other.
        let then = part(chunk + 1).map_or(Lines::default(), |(next, rows, _)| {
            tokens.opening(next.w.weights, rows)
        });
        // SAFETY: each worker has its own part of `work`.
        let work = unsafe { work.of(worker) };
        many_rows(layer, (packed, tokens), (rows, then), range, work);
    });
}

impl Tokens {
    /// What products with `rows` of `weights` read first.
    fn opening(self, weights: &Weights, rows: Range<usize>) -> Lines {
        match (self.form, weights.int8()) {
            (Form::Int8, Some(int8)) => int8.lines(&rows, 0..int8.blocks().min(int8::DEEP)),
            _ => opening(weights, rows, self.form == Form::Pairs),
        }
    }

    /// Sums of `rows` of `weights` for the tokens of panels `panels`; `then` is what is read after them.
    fn multiply(
        self,
        (packed, weights): (&[f32], &Weights),
        (rows, panels): (Range<usize>, Range<usize>),
        then: Lines,
        sums: &mut [f32],
        space: &mut [f32],
    ) {
        let rows_of = match self.form {
            Form::Int8 => {
                let weights = weights
                    .int8()
                    .expect("this form was chosen because they are there");
                let product = int8::Product {
                    packed,
                    weights,
                    rows,
                    panels,
                    c: sums,
                    then,
                };
                return product.run();
            }
            Form::Pairs => Rows::Stored(weights),
            Form::F32 => Rows::of(weights),
        };
        let product = Gemm {
            panels: packed,
            k: self.k,
            rows: rows_of,
            then,
            pairs: self.form == Form::Pairs,
        };
        // SAFETY: the rows of a weight matrix have its columns, `k` of them.
        unsafe { product.block(rows, panels, sums, space) };
    }
}

/// Rows `rows` of a layer for the tokens of panels `panels`, which are this thread's; `then` is what it reads after them.
fn many_rows(
    layer: &Layer<'_>,
    (packed, tokens): (&[f32], Tokens),
    (rows, then): (Range<usize>, Lines),
    panels: Range<usize>,
    work: &mut [f32],
) {
    let width = panel_width();
    let line = panels.len() * width;
    let space = if tokens.form == Form::Int8 {
        0
    } else {
        block_space(GEMM_ROWS)
    };
    let (space, sums) = work.split_at_mut(space);
    let (sums, ups) = sums.split_at_mut(sums.len() / 2);
    let first = panels.start * width;
    let count = line.min(tokens.m - first);
    let part = || (rows.clone(), panels.clone());
    let after = layer
        .up
        .map_or(then, |up| tokens.opening(up.weights, rows.clone()));
    tokens.multiply((packed, layer.w.weights), part(), after, sums, space);
    for (row, sums) in rows.clone().zip(sums.chunks_exact_mut(line)) {
        layer.finish_row(row, &mut sums[..count]);
    }
    if let Some(up) = layer.up {
        tokens.multiply((packed, up.weights), part(), then, ups, space);
        let used = rows.len() * line;
        sums[..used]
            .iter_mut()
            .zip(&ups[..used])
            .for_each(|(sum, up)| *sum *= up);
    }
    if let Some(to) = layer.panels {
        let depth = Tokens {
            k: layer.w.rows(),
            ..tokens
        };
        let step = depth.lines() * width;
        let first = to.at((panels.start * step) as isize);
        if tokens.form == Form::Int8 {
            // Tokens behind the last have sums of zeros too, which the activation leaves finite or not: they are not read.
            let into = int8::IntoPanels {
                sums,
                line,
                count: rows.len(),
                panels: panels.len(),
                first: first.wrapping_add(int8::line_of(rows.start) * width),
                step,
            };
            // SAFETY: rows go block by block, and the panels of these tokens have all of them.
            return unsafe { into.run() };
        }
        let pairs = tokens.form == Form::Pairs;
        return dispatch_pairs_if(
            pairs,
            IntoPanels {
                sums,
                line,
                rows,
                first,
                step,
                pairs,
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
