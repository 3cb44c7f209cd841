//! `non_maximum_suppression` with results of the size the file asks for.

use crate::error::OpResult;
use crate::graph::ValueId;
use crate::layout::Shape;
use crate::lower::OpCx;
use crate::op::{Args, Op};
use candle_coreml_mil::DType;
use smallvec::smallvec;
use std::sync::Arc;

/// Boxes `[n, B, 4]` (centre x, centre y, width, height) with scores `[n, B, K]`: the best boxes that overlap none better by
/// more than a threshold, in order of score. Rows that stay free hold zeros and index -1.
#[derive(Debug)]
pub struct Suppress {
    /// Intersection over union above which the lesser box goes.
    overlap: f32,
    /// Least score.
    least: f32,
    count: usize,
    per_class: bool,
    boxes: usize,
    classes: usize,
}

/// Best class of a box and its score.
fn best(scores: &[f32]) -> (usize, f32) {
    let first = (0, scores.first().copied().unwrap_or(f32::NEG_INFINITY));
    scores
        .iter()
        .copied()
        .enumerate()
        .fold(first, |best, (i, s)| if s > best.1 { (i, s) } else { best })
}

/// Share of the union of two boxes that both cover; 0 for boxes without area.
fn overlap(a: &[f32], b: &[f32]) -> f32 {
    let cover = |i: usize| {
        let end = (a[i] + a[i + 2] / 2.0).min(b[i] + b[i + 2] / 2.0);
        let start = (a[i] - a[i + 2] / 2.0).max(b[i] - b[i + 2] / 2.0);
        (end - start).max(0.0)
    };
    let (both, area) = (cover(0) * cover(1), |x: &[f32]| x[2] * x[3]);
    let union = area(a) + area(b) - both;
    if union > 0.0 { both / union } else { 0.0 }
}

impl Suppress {
    /// Indices of the boxes that stay, best first. When no score is high enough it is the best box alone.
    fn chosen(&self, boxes: &[f32], scores: &[f32]) -> Vec<usize> {
        let best: Vec<(usize, f32)> = scores.chunks_exact(self.classes).map(best).collect();
        let mut order: Vec<usize> = (0..self.boxes).collect();
        order.sort_by(|&a, &b| best[b].1.total_cmp(&best[a].1).then(a.cmp(&b)));
        let mut kept: Vec<usize> = Vec::new();
        let at = |i: usize| &boxes[4 * i..4 * i + 4];
        for &i in &order {
            if kept.len() == self.count {
                break;
            }
            let rival = |k: usize| !self.per_class || best[k].0 == best[i].0;
            let free = |&k: &usize| !rival(k) || overlap(at(k), at(i)) <= self.overlap;
            if best[i].1 > self.least && kept.iter().all(free) {
                kept.push(i);
            }
        }
        if kept.is_empty() {
            kept.extend(order.first().filter(|_| self.count > 0));
        }
        kept
    }
}

impl Op for Suppress {
    fn name(&self) -> &'static str {
        "non_maximum_suppression"
    }

    fn run(&self, args: &mut Args<'_>) -> OpResult<()> {
        let (boxes, scores) = (args.f32s(0)?, args.f32s(1)?);
        let (b, s) = (args.result_f32(0)?, args.result_f32(1)?);
        let (places, counts) = (args.result_i32(2)?, args.result_i32(3)?);
        b.fill(0.0);
        s.fill(0.0);
        places.fill(-1);
        let k = self.classes;
        for (n, count) in counts.iter_mut().enumerate() {
            let boxes = &boxes[n * self.boxes * 4..(n + 1) * self.boxes * 4];
            let scores = &scores[n * self.boxes * k..(n + 1) * self.boxes * k];
            let chosen = self.chosen(boxes, scores);
            *count = chosen.len() as i32;
            for (row, i) in chosen.into_iter().enumerate() {
                let to = n * self.count + row;
                b[to * 4..to * 4 + 4].copy_from_slice(&boxes[i * 4..i * 4 + 4]);
                s[to * k..(to + 1) * k].copy_from_slice(&scores[i * k..(i + 1) * k]);
                places[to] = i as i32;
            }
        }
        Ok(())
    }
}

/// Boxes and scores with one row a box, as the first opset has them.
fn rows(cx: &mut OpCx<'_, '_>, turned: bool) -> OpResult<(ValueId, ValueId)> {
    let (boxes, scores) = (cx.value("boxes")?, cx.value("scores")?);
    if cx.shape(boxes).len() != 3 || cx.shape(scores).len() != 3 {
        return Err("boxes and scores must have rank 3".into());
    }
    if !turned {
        return Ok((boxes, scores));
    }
    Ok((cx.permute(boxes, &[0, 2, 1])?, cx.permute(scores, &[0, 2, 1])?))
}

/// Lowers `non_maximum_suppression`. Since iOS17 boxes lie along the last dimension and there is no threshold of scores.
pub fn lower_nms(cx: &mut OpCx<'_, '_>) -> OpResult<()> {
    let least = cx.float("score_threshold")?;
    let turned = least.is_none();
    let (boxes, scores) = rows(cx, turned)?;
    let (sb, ss) = (cx.shape(boxes), cx.shape(scores));
    if sb[2] != 4 || sb[..2] != ss[..2] || ss[2] == 0 {
        return Err(format!(
            "boxes {:?} and scores {:?} do not fit",
            sb.as_slice(),
            ss.as_slice()
        )
        .into());
    }
    let count = cx.int("max_boxes")?.ok_or("parameter \"max_boxes\" is missing")?;
    let count = usize::try_from(count).map_err(|_| "max_boxes must be 0 or more")?;
    let op = Suppress {
        overlap: cx
            .float("iou_threshold")?
            .ok_or("parameter \"iou_threshold\" is missing")?,
        least: least.unwrap_or(f32::NEG_INFINITY),
        count,
        per_class: cx.flag("per_class_suppression", false)?,
        boxes: sb[1],
        classes: ss[2],
    };
    let (n, k) = (sb[0], ss[2]);
    let places: Shape = smallvec![n, count];
    let results = [
        (cx.dtype(boxes), smallvec![n, count, 4]),
        (cx.dtype(scores), smallvec![n, count, k]),
        (DType::Int32, places),
        (DType::Int32, smallvec![n]),
    ];
    let ids = cx.emit_many(Arc::new(op), &[boxes, scores], &results)?;
    if !turned {
        return ids.into_iter().try_for_each(|id| cx.result(id));
    }
    for &id in &ids[..2] {
        let back = cx.permute(id, &[0, 2, 1])?;
        cx.result(back)?;
    }
    cx.result(ids[2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lesser_boxes_that_overlap_go() {
        let boxes = [0.0, 0.0, 2.0, 2.0, 0.5, 0.0, 2.0, 2.0, 9.0, 9.0, 2.0, 2.0];
        let scores = [0.5, 0.1, 0.1, 0.9, 0.3, 0.2];
        // Boxes 0 and 1 share 3 of 5 parts; their best classes differ.
        let rows = [
            ((0.5, 0.0, false), vec![1, 2]),
            ((0.7, 0.0, false), vec![1, 0, 2]),
            ((0.5, 0.0, true), vec![1, 0, 2]),
            ((0.5, 0.4, false), vec![1]),
            ((0.5, 2.0, false), vec![1]),
        ];
        for ((overlap, least, per_class), want) in rows {
            let op = Suppress {
                overlap,
                least,
                count: 3,
                per_class,
                boxes: 3,
                classes: 2,
            };
            assert_eq!(op.chosen(&boxes, &scores), want, "{overlap} {least} {per_class}");
        }
    }
}
