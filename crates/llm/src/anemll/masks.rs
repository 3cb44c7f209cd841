//! Masks and positions, made once and cut to size for every step.

use candle_core::{DType, Device, Tensor};
use half::f16;

use crate::Error;
use crate::part::interface::Place;

/// More slots than this are taken for a mistake in a package: 4 million, several times the longest contexts there are.
const MOST_SLOTS: usize = 1 << 22;

/// Causal masks over a cache of `width` slots, all windows of one row.
///
/// A mask row for position `p` has zeros up to slot `p` and -inf after it. All of them lie in one row of `width` zeros
/// and `width` -inf: the row for `p` starts at `width - 1 - p`. A decode step takes a view; a batch copies one slice a
/// row.
#[derive(Debug, Clone)]
pub(crate) struct Masks {
    width: usize,
    causal: Tensor,
    causal_row: Vec<f16>,
    update: Tensor,
    positions: Tensor,
}

impl Masks {
    /// Masks over `width` slots, of dtype `dtype`; positions go up to `width`.
    pub(crate) fn new(width: usize, dtype: DType) -> Result<Self, Error> {
        if width > MOST_SLOTS {
            return Err(too_wide(width));
        }
        let at = |slot: usize| {
            if slot < width {
                f16::ZERO
            } else {
                f16::NEG_INFINITY
            }
        };
        let causal_row: Vec<f16> = (0..2 * width).map(at).collect();
        let hit = |slot: usize| if slot + 1 == width { f16::ONE } else { f16::ZERO };
        let update_row: Vec<f16> = (0..2 * width).map(hit).collect();
        let last = i32::try_from(width).map_err(|_| too_wide(width))?;
        Ok(Masks {
            width,
            causal: Tensor::from_slice(&causal_row, 2 * width, &Device::Cpu)?.to_dtype(dtype)?,
            update: Tensor::from_slice(&update_row, 2 * width, &Device::Cpu)?.to_dtype(dtype)?,
            causal_row,
            positions: Tensor::from_vec((0..last).collect::<Vec<i32>>(), width, &Device::Cpu)?,
        })
    }

    /// Positions `start..start + count`.
    pub(crate) fn positions(&self, start: usize, place: &Place, count: usize) -> Result<Tensor, Error> {
        Ok(self.positions.narrow(0, start, count)?.reshape(place.shape())?)
    }

    /// The mask rows of positions `start..start + count`, as `[1, 1, count, width]` or what the place declares.
    pub(crate) fn causal(&self, start: usize, place: &Place, count: usize) -> Result<Tensor, Error> {
        if count == 1 {
            let row = self.causal.narrow(0, self.width - 1 - start, self.width)?;
            return Ok(row.reshape(place.shape())?);
        }
        let mut rows = Vec::with_capacity(count * self.width);
        for position in start..start + count {
            rows.extend_from_slice(&self.causal_row[self.width - 1 - position..][..self.width]);
        }
        Ok(Tensor::from_vec(rows, place.shape(), &Device::Cpu)?.to_dtype(self.causal.dtype())?)
    }

    /// A one in the slot each of `start..start + count` is written to: `[1, 1, slots, count]`. The place says how many slots;
    /// mostly they are those of the causal mask.
    pub(crate) fn update(&self, start: usize, place: &Place, count: usize) -> Result<Tensor, Error> {
        let slots = place.shape().iter().product::<usize>() / count.max(1);
        if count == 1 && slots == self.width {
            let column = self.update.narrow(0, self.width - 1 - start, self.width)?;
            return Ok(column.reshape(place.shape())?);
        }
        let mut columns = vec![f16::ZERO; slots * count];
        for (index, slot) in (start..start + count).enumerate() {
            if let Some(hit) = columns.get_mut(slot * count + index) {
                *hit = f16::ONE;
            }
        }
        Ok(Tensor::from_vec(columns, place.shape(), &Device::Cpu)?.to_dtype(self.update.dtype())?)
    }
}

fn too_wide(width: usize) -> Error {
    Error::Option {
        option: "context",
        value: width.to_string(),
        allowed: "at most 2^22 slots",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(tensor: &Tensor) -> Vec<f32> {
        tensor
            .flatten_all()
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    #[test]
    fn every_row_sees_its_past_and_itself() {
        const HIDDEN: f32 = f32::NEG_INFINITY;
        for dtype in [DType::F16, DType::F32] {
            let masks = Masks::new(4, dtype).unwrap();
            for (start, count) in [(0, 1), (3, 1), (1, 1), (0, 4), (1, 3), (2, 2)] {
                let place = Place::new("causal_mask", &[1, 1, count, 4]);
                let mask = masks.causal(start, &place, count).unwrap();
                assert_eq!((mask.dims(), mask.dtype()), (&[1, 1, count, 4][..], dtype));
                let expected: Vec<f32> = (start..start + count)
                    .flat_map(|row| (0..4).map(move |slot| if slot <= row { 0.0 } else { HIDDEN }))
                    .collect();
                assert_eq!(rows(&mask), expected, "start {start}, count {count}");
                assert!(mask.is_contiguous());
            }
        }
    }

    #[test]
    fn absurd_widths_are_refused_before_memory_is_asked_for() {
        let error = Masks::new(usize::MAX / 8, DType::F16).unwrap_err().to_string();
        assert!(error.contains("allowed: at most 2^22 slots"), "{error}");
    }

    #[test]
    fn update_masks_mark_the_slots_written_to() {
        let masks = Masks::new(4, DType::F16).unwrap();
        let single = masks
            .update(2, &Place::new("update_mask", &[1, 1, 4, 1]), 1)
            .unwrap();
        assert_eq!(rows(&single), [0., 0., 1., 0.]);
        let batch = masks
            .update(1, &Place::new("update_mask", &[1, 1, 4, 2]), 2)
            .unwrap();
        assert_eq!(rows(&batch), [0., 0., 1., 0., 0., 1., 0., 0.]);
        let longer = masks
            .update(2, &Place::new("update_mask", &[1, 1, 6, 1]), 1)
            .unwrap();
        assert_eq!(rows(&longer), [0., 0., 1., 0., 0., 0.]);
    }

    #[test]
    fn positions_count_from_the_start_of_the_batch() {
        let masks = Masks::new(4, DType::F16).unwrap();
        let positions = masks.positions(1, &Place::new("position_ids", &[3]), 3).unwrap();
        assert_eq!(positions.to_vec1::<i32>().unwrap(), [1, 2, 3]);
    }
}
