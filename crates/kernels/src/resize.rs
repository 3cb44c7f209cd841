//! Images at other sizes and at arbitrary places: interpolation on a grid, and point by point.

use crate::loops::Shared;
use crate::pool::Pool;

/// What one output position reads along one axis: `x[low] * (1 - part) + x[high] * part`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tap {
    /// Lower index.
    pub low: usize,
    /// Upper index.
    pub high: usize,
    /// Share of the upper one.
    pub part: f32,
}

impl Tap {
    /// Linear interpolation at `place` on an axis of `len` elements; places outside are moved to its ends.
    pub fn linear(place: f32, len: usize) -> Tap {
        let last = len.saturating_sub(1);
        let place = place.clamp(0.0, last as f32);
        let low = (place.floor() as usize).min(last);
        Tap {
            low,
            high: (low + 1).min(last),
            part: place - low as f32,
        }
    }

    /// The element `index` alone.
    pub fn exact(index: usize) -> Tap {
        Tap {
            low: index,
            high: index,
            part: 0.0,
        }
    }
}

/// Interpolates planes `x[.., h, w]` into `y[.., rows, cols]`, both dense.
///
/// # Panics
/// When a tap lies outside a plane, or the lengths are not those of as many planes.
pub fn resize(pool: &Pool, x: &[f32], [h, w]: [usize; 2], rows: &[Tap], cols: &[Tap], y: &mut [f32]) {
    let (from, to) = (h * w, rows.len() * cols.len());
    if to == 0 || y.is_empty() {
        return;
    }
    let planes = y.len() / to;
    assert!(
        x.len() == planes * from && y.len() == planes * to,
        "resize: planes"
    );
    let inside = |taps: &[Tap], len: usize| taps.iter().all(|t| t.low < len && t.high < len);
    assert!(inside(rows, h) && inside(cols, w), "resize: a tap outside");
    let out = Shared(y.as_mut_ptr());
    pool.run_ranges(planes, (16_384 / to).max(1), &|range| {
        for p in range {
            let x = &x[p * from..(p + 1) * from];
            // SAFETY: plane `p` of the output belongs to this thread and lies inside it.
            let y = unsafe { std::slice::from_raw_parts_mut(out.at((p * to) as isize), to) };
            for (y, row) in y.chunks_exact_mut(cols.len()).zip(rows) {
                let (low, high) = (&x[row.low * w..][..w], &x[row.high * w..][..w]);
                for (y, col) in y.iter_mut().zip(cols) {
                    let across = |line: &[f32]| mix(line[col.low], line[col.high], col.part);
                    *y = mix(across(low), across(high), row.part);
                }
            }
        }
    });
}

/// As [`resize`] for pictures with channels last: `x[n, h, w, c]` into `y[n, rows, cols, c]`, both dense.
///
/// # Panics
/// When a tap lies outside the picture, or the lengths are not those of as many pictures.
pub fn resize_last(
    pool: &Pool,
    x: &[f32],
    [h, w, channels]: [usize; 3],
    rows: &[Tap],
    cols: &[Tap],
    y: &mut [f32],
) {
    let (from, line) = (h * w * channels, cols.len() * channels);
    if line == 0 || y.is_empty() {
        return;
    }
    let lines = y.len() / line;
    let pictures = lines / rows.len().max(1);
    assert!(
        x.len() == pictures * from && y.len() == pictures * rows.len() * line,
        "resize: pictures"
    );
    let inside = |taps: &[Tap], len: usize| taps.iter().all(|t| t.low < len && t.high < len);
    assert!(inside(rows, h) && inside(cols, w), "resize: a tap outside");
    let out = Shared(y.as_mut_ptr());
    pool.run_ranges(lines, (16_384 / line).max(1), &|range| {
        for at in range {
            let (picture, row) = (at / rows.len(), rows[at % rows.len()]);
            // SAFETY: line `at` of the output belongs to this thread and lies inside it.
            let y = unsafe { std::slice::from_raw_parts_mut(out.at((at * line) as isize), line) };
            let x = &x[picture * from..][..from];
            let (low, high) = (&x[row.low * w * channels..], &x[row.high * w * channels..]);
            for (y, col) in y.chunks_exact_mut(channels).zip(cols) {
                let [a, b] = [col.low, col.high].map(|at| &low[at * channels..][..channels]);
                if row.part == 0.0 && col.part == 0.0 {
                    y.copy_from_slice(a);
                    continue;
                }
                let [d, e] = [col.low, col.high].map(|at| &high[at * channels..][..channels]);
                for (y, (((a, b), d), e)) in y.iter_mut().zip(a.iter().zip(b).zip(d).zip(e)) {
                    *y = mix(mix(*a, *b, col.part), mix(*d, *e, col.part), row.part);
                }
            }
        }
    });
}

/// Between `a` and `b`; exactly `a` for a share of 0, whatever `b` is.
fn mix(a: f32, b: f32, part: f32) -> f32 {
    if part == 0.0 { a } else { a + (b - a) * part }
}

/// What is seen beside an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Beside {
    /// Pixels of this value around the image.
    Constant(f32),
    /// This value at every place that is not between the centres of the first and the last pixel.
    Outside(f32),
    /// The nearest pixel of the border.
    Border,
    /// The image mirrored at the centres of its border pixels.
    Reflection,
    /// The image mirrored at its edges.
    Symmetric,
}

/// How points of an image are read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Mix the four pixels around a point; the nearest one otherwise, halves to the even one.
    pub bilinear: bool,
    /// What is seen beside the image.
    pub beside: Beside,
}

impl Sampler {
    /// The value of a plane `[h, w]` at a place `[y, x]` counted in pixels from the centre of the first one.
    pub fn value(self, plane: &[f32], [h, w]: [usize; 2], [y, x]: [f32; 2]) -> f32 {
        let (y, x) = (self.place(y, h), self.place(x, w));
        let outside = match self.beside {
            Beside::Constant(v) => v,
            Beside::Outside(v) => {
                let between = |p: f32, len: usize| p >= 0.0 && p <= len as f32 - 1.0;
                if !between(y, h) || !between(x, w) {
                    return v;
                }
                v
            }
            _ => 0.0,
        };
        let pixel = |y: f32, x: f32| {
            let fits = y >= 0.0 && x >= 0.0 && y < h as f32 && x < w as f32;
            let at = fits.then(|| y as usize * w + x as usize);
            at.and_then(|at| plane.get(at)).copied().unwrap_or(outside)
        };
        if !self.bilinear {
            return pixel(y.round_ties_even(), x.round_ties_even());
        }
        let (top, left) = (y.floor(), x.floor());
        let (dy, dx) = (y - top, x - left);
        let line = |y: f32| {
            if dx == 0.0 {
                pixel(y, left)
            } else {
                mix(pixel(y, left), pixel(y, left + 1.0), dx)
            }
        };
        if dy == 0.0 {
            line(top)
        } else {
            mix(line(top), line(top + 1.0), dy)
        }
    }

    /// A place brought inside an axis of `len` pixels where the mode mirrors or repeats.
    fn place(self, p: f32, len: usize) -> f32 {
        let last = len as f32 - 1.0;
        match self.beside {
            Beside::Constant(_) | Beside::Outside(_) => p,
            Beside::Border => p.clamp(0.0, last.max(0.0)),
            Beside::Reflection => mirror(p, 0.0, last).clamp(0.0, last.max(0.0)),
            Beside::Symmetric => mirror(p, -0.5, last + 0.5).clamp(0.0, last.max(0.0)),
        }
    }
}

/// `p` mirrored at `low` and `high` until it lies between them.
fn mirror(p: f32, low: f32, high: f32) -> f32 {
    let span = high - low;
    if span <= 0.0 {
        return low.max(0.0);
    }
    let p = (p - low).abs();
    let (turns, rest) = ((p / span).floor(), p.rem_euclid(span));
    if turns.rem_euclid(2.0) == 0.0 {
        low + rest
    } else {
        high - rest
    }
}

/// Reads `x[b, c, h, w]` at `places(b, i)` (`[y, x]` in pixels) into `y[b, c, i]`, `count` places an image; both dense.
///
/// # Panics
/// When the lengths do not fit.
pub fn sample(
    pool: &Pool,
    x: &[f32],
    [b, c, h, w]: [usize; 4],
    (count, places): (usize, &(dyn Fn(usize, usize) -> [f32; 2] + Sync)),
    sampler: Sampler,
    y: &mut [f32],
) {
    assert!(
        x.len() == b * c * h * w && y.len() == b * c * count,
        "sample: lengths"
    );
    let out = Shared(y.as_mut_ptr());
    pool.run_ranges(b * c, (4096 / count.max(1)).max(1), &|range| {
        for p in range {
            let plane = &x[p * h * w..(p + 1) * h * w];
            // SAFETY: plane `p` of the output belongs to this thread and lies inside it.
            let y = unsafe { std::slice::from_raw_parts_mut(out.at((p * count) as isize), count) };
            for (i, y) in y.iter_mut().enumerate() {
                *y = sampler.value(plane, [h, w], places(p / c, i));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_are_interpolated_between_their_elements() {
        let x = [0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0];
        let rows = [Tap::exact(1)];
        let cols = [Tap::linear(-1.0, 2), Tap::linear(0.25, 2), Tap::linear(9.0, 2)];
        let mut y = [0.0; 6];
        resize(&Pool::new(2), &x, [2, 2], &rows, &cols, &mut y);
        assert_eq!(y, [2.0, 2.25, 3.0, 12.0, 12.25, 13.0]);
    }

    #[test]
    fn channels_last_give_what_planes_give() {
        for (h, w, channels, rows, cols) in [(2, 3, 5, 4, 6), (1, 4, 1, 3, 2), (3, 3, 9, 3, 7)] {
            let x: Vec<f32> = (0..2 * h * w * channels).map(|i| (i * 37 % 101) as f32).collect();
            let taps = |len: usize, n: usize| -> Vec<Tap> {
                (0..n).map(|i| Tap::linear(i as f32 * 0.6 - 0.3, len)).collect()
            };
            let (rows, cols) = (taps(h, rows), taps(w, cols));
            let to = rows.len() * cols.len();
            // The same pictures as planes.
            let planes: Vec<f32> = (0..x.len())
                .map(|i| {
                    let (n, c, at) = (i / (h * w * channels), i / (h * w) % channels, i % (h * w));
                    x[(n * h * w + at) * channels + c]
                })
                .collect();
            let (mut first, mut last) = (vec![0.0; 2 * channels * to], vec![0.0; 2 * channels * to]);
            resize(&Pool::new(2), &planes, [h, w], &rows, &cols, &mut first);
            resize_last(&Pool::new(2), &x, [h, w, channels], &rows, &cols, &mut last);
            for (i, value) in first.iter().enumerate() {
                let (n, c, at) = (i / (to * channels), i / to % channels, i % to);
                assert_eq!(*value, last[(n * to + at) * channels + c]);
            }
        }
    }

    #[test]
    fn places_beside_an_image_follow_their_mode() {
        // One row 1, 2, 3 read at whole places from -3 to 5.
        let rows = [
            (
                Beside::Constant(9.0),
                [9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0],
            ),
            (
                Beside::Outside(9.0),
                [9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.0],
            ),
            (Beside::Border, [1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0]),
            (Beside::Reflection, [2.0, 3.0, 2.0, 1.0, 2.0, 3.0, 2.0, 1.0, 2.0]),
            (Beside::Symmetric, [3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0]),
        ];
        for (beside, want) in rows {
            for bilinear in [true, false] {
                let sampler = Sampler { bilinear, beside };
                let got: Vec<f32> = (-3..6)
                    .map(|x| sampler.value(&[1.0, 2.0, 3.0], [1, 3], [0.0, x as f32]))
                    .collect();
                assert_eq!(got, want, "{beside:?} {bilinear}");
            }
        }
        let half = |beside| {
            let sampler = Sampler {
                bilinear: true,
                beside,
            };
            sampler.value(&[1.0, 2.0, 3.0], [1, 3], [0.0, -0.5])
        };
        assert_eq!(
            (half(Beside::Constant(9.0)), half(Beside::Outside(9.0))),
            (5.0, 9.0)
        );
    }
}
