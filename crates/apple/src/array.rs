//! Element types of multi-arrays and the arrays that go in and come out: row-major, without gaps.

use half::f16;

/// Element types of MLMultiArray, with Core ML's own numbers for them (MLMultiArray.h: `MLMultiArrayDataType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Element {
    F16,
    F32,
    F64,
    I32,
    I8,
}

impl Element {
    /// All of them.
    pub const ALL: [Element; 5] = [
        Element::F16,
        Element::F32,
        Element::F64,
        Element::I32,
        Element::I8,
    ];

    /// Core ML's number: 0x10000 for floats or 0x20000 for integers, and the bits.
    pub fn code(self) -> isize {
        match self {
            Element::F16 => 0x10000 | 16,
            Element::F32 => 0x10000 | 32,
            Element::F64 => 0x10000 | 64,
            Element::I32 => 0x20000 | 32,
            Element::I8 => 0x20000 | 8,
        }
    }

    /// The element type of a number of Core ML's.
    pub fn from_code(code: isize) -> Option<Element> {
        Element::ALL.into_iter().find(|e| e.code() == code)
    }

    /// Size of an element.
    pub fn bytes(self) -> usize {
        match self {
            Element::I8 => 1,
            Element::F16 => 2,
            Element::F32 | Element::I32 => 4,
            Element::F64 => 8,
        }
    }
}

/// What keeps memory alive: Core ML may hold an array longer than the call it came with.
pub type Owner = std::sync::Arc<dyn std::any::Any + Send + Sync>;

/// Elements to be read, row-major without gaps.
#[derive(Debug, Clone, Copy)]
pub struct ArrayRef<'a> {
    /// Outermost dimension first.
    pub shape: &'a [usize],
    /// Type of the elements.
    pub element: Element,
    /// The elements in the machine's byte order, as many as the shape has.
    pub bytes: &'a [u8],
    /// What the memory belongs to. Without it the elements are always copied; with it a large array is read where it is,
    /// and the owner is let go when Core ML lets go of the array.
    pub owner: Option<&'a Owner>,
}

/// Elements of their own, row-major without gaps.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Buffer,
}

/// The elements of an [`Array`].
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Buffer {
    F16(Vec<f16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    I32(Vec<i32>),
    I8(Vec<i8>),
}

impl Buffer {
    /// `count` zeros.
    pub fn zeros(element: Element, count: usize) -> Buffer {
        match element {
            Element::F16 => Buffer::F16(vec![f16::ZERO; count]),
            Element::F32 => Buffer::F32(vec![0.0; count]),
            Element::F64 => Buffer::F64(vec![0.0; count]),
            Element::I32 => Buffer::I32(vec![0; count]),
            Element::I8 => Buffer::I8(vec![0; count]),
        }
    }

    /// Type of the elements.
    pub fn element(&self) -> Element {
        match self {
            Buffer::F16(_) => Element::F16,
            Buffer::F32(_) => Element::F32,
            Buffer::F64(_) => Element::F64,
            Buffer::I32(_) => Element::I32,
            Buffer::I8(_) => Element::I8,
        }
    }

    /// The memory of the elements.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Buffer::F16(v) => bytemuck::cast_slice(v),
            Buffer::F32(v) => bytemuck::cast_slice(v),
            Buffer::F64(v) => bytemuck::cast_slice(v),
            Buffer::I32(v) => bytemuck::cast_slice(v),
            Buffer::I8(v) => bytemuck::cast_slice(v),
        }
    }

    /// The memory of the elements.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Buffer::F16(v) => bytemuck::cast_slice_mut(v),
            Buffer::F32(v) => bytemuck::cast_slice_mut(v),
            Buffer::F64(v) => bytemuck::cast_slice_mut(v),
            Buffer::I32(v) => bytemuck::cast_slice_mut(v),
            Buffer::I8(v) => bytemuck::cast_slice_mut(v),
        }
    }
}

impl Array {
    /// The same array, borrowed.
    pub fn as_ref(&self) -> ArrayRef<'_> {
        ArrayRef {
            shape: &self.shape,
            element: self.data.element(),
            bytes: self.data.bytes(),
            owner: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_core_ml_name_one_element_type_each() {
        for element in Element::ALL {
            assert_eq!(Element::from_code(element.code()), Some(element));
            assert_eq!(element.code() & 0xff, 8 * element.bytes() as isize, "{element:?}");
            let zeros = Buffer::zeros(element, 3);
            assert_eq!(
                (zeros.element(), zeros.bytes().len()),
                (element, 3 * element.bytes())
            );
        }
        assert_eq!(Element::from_code(0x20000 | 64), None);
    }
}
