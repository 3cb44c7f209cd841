//! MLMultiArray.

use crate::{Behaviour, Live};
use block2::{Block, DynBlock, RcBlock};
use candle_coreml_apple::Element;
use candle_coreml_apple::strided::{Layout, packed_strides};
use objc2::rc::{Allocated, Retained};
use objc2::runtime::NSObject;
use objc2::{AnyThread, DefinedClass, define_class, msg_send};
use objc2_core_ml::{MLMultiArray, MLMultiArrayDataType};
use objc2_foundation::{NSArray, NSError, NSInteger, NSNumber};
use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Multi-arrays made so far.
pub static MADE: AtomicUsize = AtomicUsize::new(0);

/// Memory and layout. Own memory is in words of 8 bytes, so that every element type is aligned.
pub struct Memory {
    pointer: *mut u8,
    bytes: usize,
    layout: Layout,
    own: Option<Box<[u64]>>,
}

pub struct Ivars {
    memory: RefCell<Memory>,
    element: Element,
    deallocator: Option<RcBlock<dyn Fn(NonNull<c_void>)>>,
    _live: Live,
}

impl Drop for Ivars {
    fn drop(&mut self) {
        let pointer = NonNull::new(self.memory.borrow().pointer.cast::<c_void>());
        if let (Some(deallocator), Some(pointer)) = (&self.deallocator, pointer) {
            deallocator.call((pointer,));
        }
    }
}

pub fn numbers(values: &[usize]) -> Retained<NSArray<NSNumber>> {
    NSArray::from_retained_slice(&values.iter().map(|&v| NSNumber::new_usize(v)).collect::<Vec<_>>())
}

fn sizes(numbers: &NSArray<NSNumber>) -> Vec<usize> {
    numbers.iter().map(|n| n.as_usize()).collect()
}

/// Strides of rows padded to 64 bytes.
fn padded(shape: &[usize], element: Element) -> Vec<usize> {
    let mut room = shape.to_vec();
    if let Some(row) = room.last_mut() {
        *row = (*row * element.bytes()).next_multiple_of(64) / element.bytes() + 64 / element.bytes();
    }
    packed_strides(&room)
}

impl Memory {
    fn new(shape: &[usize], strides: &[usize], element: Element) -> Memory {
        let layout = Layout::new(shape, strides).expect("tests use small arrays");
        let bytes = layout.span() * element.bytes();
        // What is between rows is no zero.
        let mut own = vec![0x7c7c_7c7c_7c7c_7c7c_u64; bytes.div_ceil(8).max(1)].into_boxed_slice();
        let pointer = own.as_mut_ptr().cast();
        Memory {
            pointer,
            bytes,
            layout,
            own: Some(own),
        }
    }

    fn slice(&mut self) -> &mut [u8] {
        // SAFETY: The memory is of this size, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses, and the drop of the variables is enough.
    #[unsafe(super(NSObject))]
    #[name = "MLMultiArray"]
    #[ivars = Ivars]
    pub struct FakeArray;

    impl FakeArray {
        #[unsafe(method_id(initWithShape:dataType:error:))]
        fn init(
            this: Allocated<Self>,
            shape: &NSArray<NSNumber>,
            element: MLMultiArrayDataType,
            _error: *mut *mut NSError,
        ) -> Option<Retained<Self>> {
            started(this, Ivars::zeros(&sizes(shape), element))
        }

        #[unsafe(method_id(initWithDataPointer:shape:dataType:strides:deallocator:error:))]
        fn wrap(
            this: Allocated<Self>,
            pointer: NonNull<c_void>,
            shape: &NSArray<NSNumber>,
            element: MLMultiArrayDataType,
            strides: &NSArray<NSNumber>,
            deallocator: Option<&DynBlock<dyn Fn(NonNull<c_void>)>>,
            _error: *mut *mut NSError,
        ) -> Option<Retained<Self>> {
            started(this, Ivars::over(pointer, &sizes(shape), &sizes(strides), element, deallocator))
        }

        #[unsafe(method_id(shape))]
        fn shape(&self) -> Retained<NSArray<NSNumber>> {
            numbers(self.ivars().memory.borrow().layout.shape())
        }

        #[unsafe(method_id(strides))]
        fn strides(&self) -> Retained<NSArray<NSNumber>> {
            numbers(self.ivars().memory.borrow().layout.strides())
        }

        #[unsafe(method(dataType))]
        fn data_type(&self) -> MLMultiArrayDataType {
            MLMultiArrayDataType(self.ivars().element.code())
        }

        #[unsafe(method(getBytesWithHandler:))]
        fn bytes(&self, handler: &Block<dyn Fn(NonNull<c_void>, NSInteger)>) {
            let (pointer, bytes) = self.place();
            handler.call((pointer, bytes as NSInteger));
        }

        #[unsafe(method(getMutableBytesWithHandler:))]
        fn mutable_bytes(&self, handler: &Block<dyn Fn(NonNull<c_void>, NSInteger, NonNull<NSArray<NSNumber>>)>) {
            self.rebase();
            let strides = numbers(self.ivars().memory.borrow().layout.strides());
            let (pointer, bytes) = self.place();
            handler.call((pointer, bytes as NSInteger, NonNull::from(&*strides)));
        }
    }
);

/// Finishes an initializer; nil where there is nothing to start from.
fn started(this: Allocated<FakeArray>, ivars: Option<Ivars>) -> Option<Retained<FakeArray>> {
    MADE.fetch_add(1, Ordering::SeqCst);
    let this = this.set_ivars(ivars?);
    // SAFETY: The super class's own initializer.
    unsafe { msg_send![super(this), init] }
}

impl Ivars {
    fn zeros(shape: &[usize], element: MLMultiArrayDataType) -> Option<Ivars> {
        let element = Element::from_code(element.0)?;
        let mut memory = Memory::new(shape, &packed_strides(shape), element);
        memory.slice().fill(0);
        Some(Ivars {
            memory: RefCell::new(memory),
            element,
            deallocator: None,
            _live: Live::new(),
        })
    }

    fn over(
        pointer: NonNull<c_void>,
        shape: &[usize],
        strides: &[usize],
        element: MLMultiArrayDataType,
        deallocator: Option<&DynBlock<dyn Fn(NonNull<c_void>)>>,
    ) -> Option<Ivars> {
        let element = Element::from_code(element.0)?;
        let layout = Layout::new(shape, strides).ok()?;
        Some(Ivars {
            memory: RefCell::new(Memory {
                pointer: pointer.as_ptr().cast(),
                bytes: layout.span() * element.bytes(),
                layout,
                own: None,
            }),
            element,
            deallocator: deallocator.map(|d| d.copy()),
            _live: Live::new(),
        })
    }
}

impl FakeArray {
    fn place(&self) -> (NonNull<c_void>, usize) {
        let memory = self.ivars().memory.borrow();
        (
            NonNull::new(memory.pointer.cast()).expect("memory is never null"),
            memory.bytes,
        )
    }

    /// Moves the elements to memory with padded rows.
    fn rebase(&self) {
        let mut memory = self.ivars().memory.borrow_mut();
        if !Behaviour::RebasedBuffers.is_on() || memory.own.is_none() {
            return;
        }
        let (packed, shape) = (
            pack(&mut memory, self.ivars().element),
            memory.layout.shape().to_vec(),
        );
        *memory = Memory::new(
            &shape,
            &padded(&shape, self.ivars().element),
            self.ivars().element,
        );
        unpack(&mut memory, self.ivars().element, &packed);
    }

    pub fn of(array: &MLMultiArray) -> &FakeArray {
        // SAFETY: The only class of that name is the one defined here.
        unsafe { &*(std::ptr::from_ref(array).cast::<FakeArray>()) }
    }

    pub fn element(&self) -> Element {
        self.ivars().element
    }

    pub fn dims(&self) -> Vec<usize> {
        self.ivars().memory.borrow().layout.shape().to_vec()
    }

    /// The elements, row-major.
    pub fn packed(&self) -> Vec<u8> {
        pack(&mut self.ivars().memory.borrow_mut(), self.ivars().element)
    }

    pub fn fill(&self, packed: &[u8]) {
        unpack(
            &mut self.ivars().memory.borrow_mut(),
            self.ivars().element,
            packed,
        );
    }

    /// An output: padded where that is played.
    pub fn output(element: Element, shape: &[usize]) -> Retained<MLMultiArray> {
        let strides = if Behaviour::PaddedOutputs.is_on() {
            padded(shape, element)
        } else {
            packed_strides(shape)
        };
        MADE.fetch_add(1, Ordering::SeqCst);
        let this = FakeArray::alloc().set_ivars(Ivars {
            memory: RefCell::new(Memory::new(shape, &strides, element)),
            element,
            deallocator: None,
            _live: Live::new(),
        });
        // SAFETY: The super class's own initializer.
        let this: Retained<FakeArray> = unsafe { msg_send![super(this), init] };
        // SAFETY: The same class under the name of the bindings.
        unsafe { Retained::cast_unchecked(this) }
    }
}

fn pack(memory: &mut Memory, element: Element) -> Vec<u8> {
    let layout = memory.layout.clone();
    let mut packed = vec![0; layout.count() * element.bytes()];
    layout
        .gather(element.bytes(), memory.slice(), &mut packed)
        .expect("the memory has the layout's size");
    packed
}

fn unpack(memory: &mut Memory, element: Element, packed: &[u8]) {
    let layout = memory.layout.clone();
    layout
        .scatter(element.bytes(), packed, memory.slice())
        .expect("as many elements as the shape has");
}
