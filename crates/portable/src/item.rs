//! What a name stands for while a program runs in stages: a tensor, a list of tensors, a dictionary.

use crate::array::Label;
use crate::constant::Const;
use crate::error::{OpError, OpResult};
use crate::graph::Storage;
use crate::layout::{Shape, checked_elements};
use candle_coreml_mil::DType;
use std::sync::Arc;

/// Most elements a list may have: far above the steps of any loop, far below what fills the memory with empty places.
pub const MAX_LIST_LENGTH: usize = 1 << 20;

/// A value at the border of a stage.
#[derive(Debug, Clone)]
pub enum Item {
    /// Elements with a shape.
    Tensor {
        /// The elements.
        value: Arc<Const>,
        /// The same in every run: a weight, or computed from shapes and weights alone.
        fixed: bool,
    },
    /// Tensors by position.
    List(Arc<List>),
    /// Numbers by label: what a classifier gives.
    Dictionary(Arc<[(Label, f64)]>),
    /// A label that is a number of 64 bits.
    Number(i64),
}

impl Item {
    /// A tensor computed by a run.
    pub fn computed(value: Const) -> Item {
        Item::Tensor {
            value: Arc::new(value),
            fixed: false,
        }
    }

    /// What kind it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Item::Tensor { .. } => "a tensor",
            Item::List(_) => "a list",
            Item::Dictionary(_) => "a dictionary",
            Item::Number(_) => "a 64-bit number",
        }
    }
}

/// A list: places that hold a tensor each, or nothing yet.
#[derive(Debug, Clone)]
pub struct List {
    dtype: DType,
    /// The shape of elements; dimensions that the file leaves open are `None`.
    element: Vec<Option<usize>>,
    /// Grows when something is written behind its end.
    dynamic: bool,
    places: Vec<Option<Arc<Const>>>,
}

impl List {
    /// `length` empty places for elements of one type.
    ///
    /// # Errors
    /// When the length is negative or above [`MAX_LIST_LENGTH`].
    pub fn new(dtype: DType, element: Vec<Option<usize>>, length: i32, dynamic: bool) -> OpResult<List> {
        let length = usize::try_from(length).ok().filter(|&n| n <= MAX_LIST_LENGTH);
        let length = length.ok_or_else(|| format!("init_length must be between 0 and {MAX_LIST_LENGTH}"))?;
        Ok(List {
            dtype,
            element,
            dynamic,
            places: vec![None; length],
        })
    }

    /// Number of places.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// True when there are no places.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The element at `index`; a place that was never written holds zeros.
    ///
    /// # Errors
    /// When there is no such place, or nothing was written and the file leaves the shape open.
    pub fn read(&self, index: i32) -> OpResult<Arc<Const>> {
        let place = usize::try_from(index).ok().and_then(|i| self.places.get(i));
        match place {
            Some(Some(value)) => Ok(value.clone()),
            Some(None) => self.zeros().map(Arc::new),
            None => Err(self.outside(index)),
        }
    }

    /// Puts an element at `index`; a dynamic list grows to hold it.
    ///
    /// # Errors
    /// When there is no such place or the element has another type or shape than the list's.
    pub fn write(&mut self, index: i32, value: Arc<Const>) -> OpResult<()> {
        let fits = self.element.len() == value.shape.len()
            && self
                .element
                .iter()
                .zip(&value.shape)
                .all(|(want, &have)| want.is_none_or(|w| w == have));
        if !fits || Storage::of(self.dtype) != Storage::of(value.dtype) {
            let text = format!(
                "an element of {}{:?} does not fit a list of {}{}",
                value.dtype,
                value.shape.as_slice(),
                self.dtype,
                dimensions(&self.element)
            );
            return Err(text.into());
        }
        let at = usize::try_from(index).map_err(|_| self.outside(index))?;
        if at >= self.places.len() {
            if !self.dynamic || at >= MAX_LIST_LENGTH {
                return Err(self.outside(index));
            }
            self.places.resize(at + 1, None);
        }
        if let Some(place) = self.places.get_mut(at) {
            *place = Some(value);
        }
        Ok(())
    }

    /// The elements at `indices` along a new first dimension.
    ///
    /// # Errors
    /// When there is no such place, or elements differ in shape.
    pub fn gather(&self, indices: &[i32]) -> OpResult<Const> {
        let parts = indices
            .iter()
            .map(|&i| self.read(i))
            .collect::<OpResult<Vec<_>>>()?;
        let element = match parts.first() {
            Some(first) => first.shape.clone(),
            None => self.known_shape()?,
        };
        if let Some(other) = parts.iter().find(|p| p.shape != element) {
            let (a, b) = (element.as_slice(), other.shape.as_slice());
            return Err(format!("elements of shapes {a:?} and {b:?} cannot be gathered").into());
        }
        let mut shape: Shape = smallvec::smallvec![parts.len()];
        shape.extend_from_slice(&element);
        checked_elements(&shape)
            .ok_or_else(|| format!("a result of shape {:?} is too large", shape.as_slice()))?;
        Ok(match Storage::of(self.dtype) {
            Storage::I32 => {
                let rows = parts.iter().filter_map(|p| p.ints());
                Const::i32(self.dtype, &shape, rows.flatten().copied().collect())
            }
            _ => {
                let rows = parts.iter().flat_map(|p| p.floats().iter().copied());
                Const::f32(self.dtype, &shape, rows.collect())
            }
        })
    }

    fn known_shape(&self) -> OpResult<Shape> {
        let shape: Option<Shape> = self.element.iter().copied().collect();
        let shape = shape.filter(|s| checked_elements(s).is_some());
        shape.ok_or_else(|| OpError::new("nothing was written there, and the list leaves the shape open"))
    }

    fn zeros(&self) -> OpResult<Const> {
        let shape = self.known_shape()?;
        let n = crate::layout::elements(&shape);
        Ok(match Storage::of(self.dtype) {
            Storage::I32 => Const::i32(self.dtype, &shape, vec![0; n]),
            _ => Const::f32(self.dtype, &shape, vec![0.0; n]),
        })
    }

    fn outside(&self, index: i32) -> OpError {
        OpError::new(format!("index {index} is outside a list of {}", self.len()))
    }
}

fn dimensions(element: &[Option<usize>]) -> String {
    let each = element
        .iter()
        .map(|d| d.map_or("?".into(), |n: usize| n.to_string()));
    format!("[{}]", each.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(a: f32, b: f32) -> Arc<Const> {
        Arc::new(Const::f32(DType::Fp32, &[2], vec![a, b]))
    }

    #[test]
    fn places_never_written_hold_zeros_and_dynamic_lists_grow() {
        let mut list = List::new(DType::Fp32, vec![Some(2)], 1, true).unwrap();
        list.write(2, pair(1.0, 2.0)).unwrap();
        assert_eq!(list.len(), 3);
        let got = list.gather(&[2, 1]).unwrap();
        assert_eq!(
            (got.shape.as_slice(), got.floats()),
            (&[2, 2][..], &[1.0, 2.0, 0.0, 0.0][..])
        );
        assert_eq!(list.gather(&[]).unwrap().shape.as_slice(), &[0, 2]);
    }

    #[test]
    fn what_does_not_fit_a_list_is_refused() {
        let mut list = List::new(DType::Fp32, vec![None], 2, false).unwrap();
        let scalar = Arc::new(Const::f32(DType::Fp32, &[], vec![1.0]));
        let rows = [
            (list.write(2, pair(0.0, 0.0)), "index 2 is outside a list of 2"),
            (list.write(-1, pair(0.0, 0.0)), "index -1 is outside a list of 2"),
            (
                list.write(0, scalar),
                "an element of fp32[] does not fit a list of fp32[?]",
            ),
            (
                list.read(0).map(|_| ()),
                "nothing was written there, and the list leaves the shape open",
            ),
        ];
        for (got, want) in rows {
            assert_eq!(got.unwrap_err().to_string(), want);
        }
        assert!(List::new(DType::Fp32, Vec::new(), -1, true).is_err());
    }
}
