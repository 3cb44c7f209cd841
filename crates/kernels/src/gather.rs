//! Selecting rows by index.

use crate::loops::Shared;
use crate::pool::Pool;
use crate::strided::{View, ViewMut};
use crate::weights::Weights;
use std::cell::RefCell;

thread_local! {
    /// One decoded row.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `y[i] = table[indices[i]]`, rows of `table` decoded as they are read. Negative indices count from the end; the
/// first index outside the table, if any, is given back and its row is left as it was.
///
/// # Panics
/// When `y` is not `[indices, columns]`.
pub fn gather_rows(
    pool: &Pool,
    table: &Weights,
    indices: &[i32],
    mut y: ViewMut<'_, f32>,
) -> Result<(), i32> {
    assert_eq!(y.shape(), [indices.len(), table.cols()], "gather: output shape");
    let (cols, steps) = (table.cols(), [y.strides()[0], y.strides()[1]]);
    let py = Shared(y.ptr());
    pool.run_ranges(indices.len(), (16384 / cols.max(1)).max(1), &|range| {
        ROW.with_borrow_mut(|row| {
            row.resize(cols, 0.0);
            for i in range {
                let Some(index) = wrap_index(indices[i], table.rows()) else {
                    continue;
                };
                table.row(index, row);
                for (c, value) in row.iter().enumerate() {
                    // SAFETY: inside the shape checked above; one thread has this row.
                    unsafe { *py.at(i as isize * steps[0] + c as isize * steps[1]) = *value };
                }
            }
        });
    });
    let outside = indices
        .iter()
        .find(|index| wrap_index(**index, table.rows()).is_none());
    outside.map_or(Ok(()), |index| Err(*index))
}

/// `y[i, ..] = x[indices[i], ..]` along axis 0 of a strided tensor; indices as in [`gather_rows`].
///
/// # Panics
/// When `y` is not `[indices, x.shape[1..]]`.
pub fn gather<T: Copy + Send + Sync>(
    pool: &Pool,
    x: View<'_, T>,
    indices: &[i32],
    mut y: ViewMut<'_, T>,
) -> Result<(), i32> {
    let (Some((&rows, inner)), Some((&count, y_inner))) = (x.shape().split_first(), y.shape().split_first())
    else {
        panic!("gather takes rank 1 or more")
    };
    assert!(
        count == indices.len() && inner == y_inner,
        "gather from {:?} into {:?}",
        x.shape(),
        y.shape()
    );
    let nest = crate::loops::Nest::new(inner, [&y.strides()[1..], &x.strides()[1..]]);
    let (py, px) = (Shared(y.ptr()), Shared::of(x.ptr()));
    let (sy, sx) = (y.strides()[0], x.strides()[0]);
    let (len, steps) = nest.inner();
    let each: usize = inner.iter().product();
    pool.run_ranges(count, (16384 / each.max(1)).max(1), &|range| {
        for i in range {
            let Some(row) = wrap_index(indices[i], rows) else {
                continue;
            };
            let (to, from) = (py.at(i as isize * sy), px.at(row as isize * sx));
            nest.for_rows(0..nest.rows(), |_, at| {
                for j in 0..len as isize {
                    // SAFETY: inside the shapes; one thread has row `i` of `y`.
                    unsafe {
                        *to.wrapping_offset(at[0] + j * steps[0]) =
                            *from.wrapping_offset(at[1] + j * steps[1])
                    };
                }
            });
        }
    });
    let outside = indices.iter().find(|index| wrap_index(**index, rows).is_none());
    outside.map_or(Ok(()), |index| Err(*index))
}

/// A row number, negative ones counted from the end; none outside.
pub fn wrap_index(index: i32, rows: usize) -> Option<usize> {
    let rows = i64::try_from(rows).ok()?;
    let index = i64::from(index);
    let index = if index < 0 { index + rows } else { index };
    usize::try_from(index).ok().filter(|_| index < rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_gathered_with_wrapping_and_a_bad_index_is_named() {
        let pool = Pool::new(2);
        let x: Vec<i32> = (0..12).collect();
        let view = View::new(&x, 0, &[3, 4], &[1, 3]).unwrap();
        let mut y = vec![-1; 12];
        let out = ViewMut::new(&mut y, 0, &[3, 4], &[4, 1]).unwrap();
        assert_eq!(gather(&pool, view, &[2, 5, -3], out), Err(5));
        assert_eq!(y, [2, 5, 8, 11, -1, -1, -1, -1, 0, 3, 6, 9]);
    }
}
