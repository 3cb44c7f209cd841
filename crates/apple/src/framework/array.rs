//! Elements into and out of MLMultiArray.

use super::call::{core_ml, numbers, sizes};
use crate::array::{Array, ArrayRef, Buffer, Element, Owner};
use crate::error::Error;
use crate::strided::{Layout, LayoutError, packed_strides};
use block2::RcBlock;
use objc2::AnyThread;
use objc2::rc::Retained;
use objc2_core_ml::{MLMultiArray, MLMultiArrayDataType};
use objc2_foundation::{NSArray, NSInteger, NSNumber};
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most elements of an array that Core ML gives: far beyond any output, and below what would overflow.
const MAX_ELEMENTS: usize = 1 << 36;

/// An array with memory of its own.
pub(super) fn new(element: Element, shape: &[usize]) -> Result<Retained<MLMultiArray>, Error> {
    let what = format!("making an array of shape {shape:?}");
    let data_type = MLMultiArrayDataType(element.code());
    // SAFETY: A data type of the enumeration and a shape of numbers.
    let made = unsafe {
        MLMultiArray::initWithShape_dataType_error(MLMultiArray::alloc(), &numbers(shape), data_type)
    };
    made.map_err(core_ml(&what))
}

/// An array over memory that is somebody else's, and the sign that Core ML has let go of it.
pub(super) struct Wrapped {
    pub array: Retained<MLMultiArray>,
    pub released: Arc<AtomicBool>,
}

/// An array over the memory of `source`, without a copy; it holds the owner until Core ML lets go of it.
///
/// # Safety
/// `owner` keeps the memory of `source` where it is, and nobody writes to it.
pub(super) unsafe fn wrap(source: ArrayRef<'_>, owner: &Owner) -> Result<Wrapped, Error> {
    let what = format!("wrapping an array of shape {:?}", source.shape);
    let released = Arc::new(AtomicBool::new(false));
    let (sign, owner) = (released.clone(), RefCell::new(Some(owner.clone())));
    let deallocator = RcBlock::new(move |_: NonNull<c_void>| {
        // Called once, from whichever thread lets go last.
        drop(owner.take());
        sign.store(true, Ordering::Release);
    });
    // An input is not written to: Core ML takes a mutable pointer because arrays can be outputs too.
    let memory = NonNull::from(source.bytes).cast::<c_void>();
    let strides = packed_strides(source.shape);
    // SAFETY: The memory holds the elements of this shape, type and strides, and stays, since the block holds its owner.
    let made = unsafe {
        MLMultiArray::initWithDataPointer_shape_dataType_strides_deallocator_error(
            MLMultiArray::alloc(),
            memory,
            &numbers(source.shape),
            MLMultiArrayDataType(source.element.code()),
            &numbers(&strides),
            Some(&deallocator),
        )
    };
    Ok(Wrapped {
        array: made.map_err(core_ml(&what))?,
        released,
    })
}

/// Copies the elements of `source` into `array`, which has its shape and type.
pub(super) fn write(name: &str, array: &MLMultiArray, source: ArrayRef<'_>) -> Result<(), Error> {
    let done: Cell<Option<Result<(), Error>>> = Cell::new(None);
    let handler = RcBlock::new(
        |memory: NonNull<c_void>, bytes: NSInteger, strides: NonNull<NSArray<NSNumber>>| {
            // SAFETY: Core ML gives a valid array of numbers for the time of the handler.
            let strides = sizes(unsafe { strides.as_ref() });
            let size = usize::try_from(bytes).unwrap_or(0);
            // SAFETY: Core ML gives memory of this size, to be written within the handler, which alone refers to it.
            let target = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr().cast::<u8>(), size) };
            done.set(Some(
                scatter(source, strides, target).map_err(|e| Error::feature(name, e)),
            ));
        },
    );
    // SAFETY: The handler is called before the method returns; it writes what the memory holds by its strides.
    unsafe { array.getMutableBytesWithHandler(&handler) };
    drop(handler);
    done.take()
        .unwrap_or_else(|| Err(Error::feature(name, NO_HANDLER)))
}

/// A copy of the elements of `array`.
pub(super) fn read(name: &str, array: &MLMultiArray) -> Result<Array, Error> {
    // SAFETY: A plain getter.
    let code = unsafe { array.dataType() }.0;
    let element = Element::from_code(code)
        .ok_or_else(|| Error::feature(name, format!("element type {code:#x} is unknown")))?;
    // SAFETY: A plain getter.
    let shape = sizes(&*unsafe { array.shape() });
    // SAFETY: A plain getter.
    let strides = sizes(&*unsafe { array.strides() });
    let layout = layout(shape, strides).map_err(|e| Error::feature(name, e))?;
    let data = RefCell::new(Buffer::zeros(element, layout.count()));
    let done: Cell<Option<Result<(), Error>>> = Cell::new(None);
    let handler = RcBlock::new(|memory: NonNull<c_void>, bytes: NSInteger| {
        let size = usize::try_from(bytes).unwrap_or(0);
        // SAFETY: Core ML gives memory of this size, to be read within the handler.
        let source = unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<u8>(), size) };
        let copied = layout.gather(element.bytes(), source, data.borrow_mut().bytes_mut());
        done.set(Some(copied.map_err(|e| Error::feature(name, e))));
    });
    // SAFETY: The handler is called before the method returns, and reads only.
    unsafe { array.getBytesWithHandler(&handler) };
    drop(handler);
    done.take()
        .unwrap_or_else(|| Err(Error::feature(name, NO_HANDLER)))?;
    Ok(Array {
        shape: layout.shape().to_vec(),
        data: data.into_inner(),
    })
}

const NO_HANDLER: &str = "Core ML gave no access to its memory";

fn scatter(source: ArrayRef<'_>, strides: Option<Vec<usize>>, target: &mut [u8]) -> Result<(), String> {
    let layout = layout(Some(source.shape.to_vec()), strides)?;
    let copied = layout.scatter(source.element.bytes(), source.bytes, target);
    copied.map_err(|e: LayoutError| e.to_string())
}

fn layout(shape: Option<Vec<usize>>, strides: Option<Vec<usize>>) -> Result<Layout, String> {
    let (Some(shape), Some(strides)) = (shape, strides) else {
        return Err("a negative size or stride".to_string());
    };
    let layout = Layout::new(&shape, &strides).map_err(|e| e.to_string())?;
    if layout.count() > MAX_ELEMENTS {
        return Err(format!("shape {shape:?} has more than {MAX_ELEMENTS} elements"));
    }
    Ok(layout)
}
