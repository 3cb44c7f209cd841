//! Where the elements of a resized axis come from.

use crate::error::OpResult;
use candle_coreml_kernels::Tap;

/// How a grid of places is laid over an axis or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    /// First and last place on the first and last element.
    StrictAlignCorners,
    /// The same, a single place in the middle.
    AlignCorners,
    /// Equal steps from the first element on.
    Default,
    /// Centres of equal parts of the way from the first to the last element.
    OffsetCorners,
    /// Centres of equal parts of the axis, elements being one wide.
    UnalignCorners,
}

impl Sampling {
    /// The mode of a name.
    pub fn named(name: &str) -> OpResult<Sampling> {
        Ok(match name {
            "STRICT_ALIGN_CORNERS" => Sampling::StrictAlignCorners,
            "ALIGN_CORNERS" => Sampling::AlignCorners,
            "DEFAULT" => Sampling::Default,
            "OFFSET_CORNERS" => Sampling::OffsetCorners,
            "UNALIGN_CORNERS" => Sampling::UnalignCorners,
            other => {
                let known = "STRICT_ALIGN_CORNERS, ALIGN_CORNERS, DEFAULT, OFFSET_CORNERS or UNALIGN_CORNERS";
                return Err(format!("sampling_mode {other:?} is not {known}").into());
            }
        })
    }

    /// Place `i` of `n` between `start` and `end`, both included; `end` may come first.
    pub fn place(self, (start, end): (f32, f32), i: usize, n: usize) -> f32 {
        let (index, count) = (i as f32, n as f32);
        let way = end - start;
        let wide = way + 1f32.copysign(way);
        let p = match self {
            Sampling::AlignCorners if n == 1 => start + way / 2.0,
            Sampling::StrictAlignCorners | Sampling::AlignCorners if n == 1 => start,
            Sampling::StrictAlignCorners | Sampling::AlignCorners => start + index * (way / (count - 1.0)),
            Sampling::Default => start + index * (wide / count),
            Sampling::OffsetCorners => {
                let delta = way.abs().max(1.0).copysign(way) / count;
                start + 0.5 * delta + index * delta
            }
            Sampling::UnalignCorners => start + (index + 0.5) * (wide / count) - 0.5f32.copysign(way),
        };
        p.max(start.min(end)).min(start.max(end))
    }

    /// Taps of linear interpolation from `len` elements to `n`.
    pub fn taps(self, len: usize, n: usize) -> Vec<Tap> {
        let ends = (0.0, len.saturating_sub(1) as f32);
        (0..n).map(|i| Tap::linear(self.place(ends, i, n), len)).collect()
    }

    /// Taps of the nearest elements from `len` to `n`, a place in the middle of two belonging to the upper one. In the default
    /// mode elements are one wide and the centres of equal parts of the axis are taken.
    pub fn nearest(self, len: usize, n: usize) -> Vec<Tap> {
        let last = len.saturating_sub(1);
        let index = |i: usize| match self {
            Sampling::Default | Sampling::UnalignCorners => (2 * i + 1) * len / (2 * n),
            _ => (self.place((0.0, last as f32), i, n) + 0.5) as usize,
        };
        (0..n).map(|i| Tap::exact(index(i).min(last))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_lie_where_the_reference_says() {
        // From 2 elements to 5 and 6, the examples of the operator's documentation.
        let rows = [
            (Sampling::UnalignCorners, vec![0.0, 0.1, 0.5, 0.9, 1.0]),
            (Sampling::StrictAlignCorners, vec![0.0, 0.25, 0.5, 0.75, 1.0]),
            (Sampling::Default, vec![0.0, 0.4, 0.8, 1.0, 1.0]),
            (Sampling::OffsetCorners, vec![0.1, 0.3, 0.5, 0.7, 0.9]),
            (Sampling::UnalignCorners, vec![0.0, 0.0, 0.333, 0.667, 1.0, 1.0]),
            (Sampling::AlignCorners, vec![0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
            (Sampling::Default, vec![0.0, 0.333, 0.667, 1.0, 1.0, 1.0]),
            (
                Sampling::OffsetCorners,
                vec![0.083, 0.25, 0.417, 0.583, 0.75, 0.917],
            ),
            (Sampling::AlignCorners, vec![0.5]),
            (Sampling::StrictAlignCorners, vec![0.0]),
        ];
        for (mode, want) in rows {
            for (i, w) in want.iter().enumerate() {
                let p = mode.place((0.0, 1.0), i, want.len());
                assert!((p - w).abs() < 1e-3, "{mode:?} {i} of {}: {p}", want.len());
            }
        }
        let back: Vec<f32> = (0..2)
            .map(|i| Sampling::AlignCorners.place((2.0, 1.0), i, 2))
            .collect();
        assert_eq!(back, [2.0, 1.0]);
    }
}
