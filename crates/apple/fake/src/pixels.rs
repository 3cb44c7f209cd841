//! CVPixelBuffer, and the functions of Core Video and Core Foundation that the engine calls.

use crate::value::retained;
use crate::{Behaviour, Live};
use candle_coreml_apple::pixels::{read_rows, write_rows};
use candle_coreml_apple::{Picture, PixelFormat, Pixels};
use candle_coreml_mil::{ColorSpace, ImageDescription};
use half::f16;
use objc2::rc::Retained;
use objc2::runtime::{AnyObject, NSObject};
use objc2::{AnyThread, DefinedClass, define_class, msg_send};
use objc2_core_video::CVPixelBuffer;
use std::cell::RefCell;
use std::ffi::c_void;

/// What Core Video answers when there is no memory.
const NO_MEMORY: i32 = -6662;
/// What Core Video answers to arguments it does not take.
const INVALID: i32 = -6661;

pub struct Ivars {
    size: (usize, usize),
    format: PixelFormat,
    row_bytes: usize,
    /// In words of 8 bytes, so that 16-bit pixels are aligned.
    memory: RefCell<Box<[u64]>>,
    /// The flags of each lock that holds.
    locks: RefCell<Vec<u64>>,
    _live: Live,
}

impl Drop for Ivars {
    fn drop(&mut self) {
        assert!(
            self.locks.borrow().is_empty(),
            "a buffer is unlocked before it goes"
        );
    }
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses, and the drop of the variables is enough.
    #[unsafe(super(NSObject))]
    #[name = "StandInPixelBuffer"]
    #[ivars = Ivars]
    pub struct FakePixels;
);

impl FakePixels {
    /// Rows are longer than their pixels, as Core Video's are; what is between them is no zero.
    fn made(width: usize, height: usize, format: PixelFormat) -> Retained<CVPixelBuffer> {
        let row_bytes = (width * format.bytes()).next_multiple_of(64) + 64;
        let words = row_bytes * height / 8;
        let this = FakePixels::alloc().set_ivars(Ivars {
            size: (width, height),
            format,
            row_bytes,
            memory: RefCell::new(vec![0x7c7c_7c7c_7c7c_7c7c; words].into_boxed_slice()),
            locks: RefCell::default(),
            _live: Live::new(),
        });
        // SAFETY: The super class's own initializer.
        let this: Retained<FakePixels> = unsafe { msg_send![super(this), init] };
        // SAFETY: An object, which is all that the bindings demand of a pixel buffer.
        unsafe { Retained::cast_unchecked(this) }
    }

    fn of(buffer: &CVPixelBuffer) -> &FakePixels {
        // SAFETY: Pixel buffers are made here only.
        unsafe { &*std::ptr::from_ref(buffer).cast::<FakePixels>() }
    }

    fn picture(&self) -> Option<Picture> {
        let ivars = self.ivars();
        let (memory, (width, height)) = (ivars.memory.borrow(), ivars.size);
        let bytes: Vec<u8> = memory.iter().flat_map(|word| word.to_ne_bytes()).collect();
        read_rows(width, height, ivars.format, ivars.row_bytes, &bytes).ok()
    }
}

/// The pixels of a buffer as a model computes with them: shape [1, channels, height, width], 0 to 255.
pub fn planes(buffer: &CVPixelBuffer, color: ColorSpace) -> Option<(Vec<usize>, Vec<f32>)> {
    let picture = FakePixels::of(buffer).picture()?;
    let (height, width) = (picture.height, picture.width);
    let order: &[usize] = if color == ColorSpace::Bgr {
        &[2, 1, 0]
    } else {
        &[0, 1, 2]
    };
    Some(match picture.pixels {
        Pixels::Gray(p) => (vec![1, 1, height, width], p.into_iter().map(f32::from).collect()),
        Pixels::GrayF16(p) => (vec![1, 1, height, width], p.into_iter().map(f32::from).collect()),
        Pixels::Rgb(p) => {
            let plane = |&channel: &usize| p.iter().skip(channel).step_by(3).map(|&v| f32::from(v));
            (vec![1, 3, height, width], order.iter().flat_map(plane).collect())
        }
    })
}

/// A buffer of what a model computed, [1, channels, height, width].
pub fn buffer(shape: &[usize], values: &[f32], image: &ImageDescription) -> Option<Retained<CVPixelBuffer>> {
    let &[1, _, height, width] = shape else {
        return None;
    };
    let byte = |v: f32| v.round().clamp(0.0, 255.0) as u8;
    let pixels = match image.color {
        ColorSpace::Grayscale => Pixels::Gray(values.iter().map(|&v| byte(v)).collect()),
        ColorSpace::GrayscaleFp16 => Pixels::GrayF16(values.iter().map(|&v| f16::from_f32(v)).collect()),
        ColorSpace::Rgb | ColorSpace::Bgr => {
            let order = if image.color == ColorSpace::Bgr {
                [2, 1, 0]
            } else {
                [0, 1, 2]
            };
            let count = height * width;
            Pixels::Rgb(
                (0..count)
                    .flat_map(|i| order.map(|c| byte(values[c * count + i])))
                    .collect(),
            )
        }
    };
    let picture = Picture {
        width,
        height,
        pixels,
    };
    let made = FakePixels::made(width, height, PixelFormat::of(&picture.pixels));
    let ivars = FakePixels::of(&made).ivars();
    let mut rows: Vec<u8> = ivars
        .memory
        .borrow()
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    write_rows(&picture, ivars.row_bytes, &mut rows).ok()?;
    let words = rows
        .as_chunks::<8>()
        .0
        .iter()
        .map(|&bytes| u64::from_ne_bytes(bytes));
    *ivars.memory.borrow_mut() = words.collect();
    Some(made)
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn CVPixelBufferCreate(
    _allocator: *const c_void,
    width: usize,
    height: usize,
    format: u32,
    _attributes: *const c_void,
    place: *mut *mut CVPixelBuffer,
) -> i32 {
    if Behaviour::NoPixelBuffer.is_on() {
        return NO_MEMORY;
    }
    let Some(format) = PixelFormat::from_code(format).filter(|_| width > 0 && height > 0) else {
        return INVALID;
    };
    // SAFETY: The caller gave a place for the buffer, which is then the caller's to release.
    unsafe { *place = Retained::into_raw(FakePixels::made(width, height, format)) };
    0
}

#[unsafe(no_mangle)]
extern "C-unwind" fn CVPixelBufferGetWidth(buffer: &CVPixelBuffer) -> usize {
    FakePixels::of(buffer).ivars().size.0
}

#[unsafe(no_mangle)]
extern "C-unwind" fn CVPixelBufferGetHeight(buffer: &CVPixelBuffer) -> usize {
    FakePixels::of(buffer).ivars().size.1
}

#[unsafe(no_mangle)]
extern "C-unwind" fn CVPixelBufferGetPixelFormatType(buffer: &CVPixelBuffer) -> u32 {
    FakePixels::of(buffer).ivars().format.code()
}

#[unsafe(no_mangle)]
extern "C-unwind" fn CVPixelBufferGetBytesPerRow(buffer: &CVPixelBuffer) -> usize {
    FakePixels::of(buffer).ivars().row_bytes
}

#[unsafe(no_mangle)]
extern "C-unwind" fn CVPixelBufferLockBaseAddress(buffer: &CVPixelBuffer, flags: u64) -> i32 {
    if Behaviour::LockFails.is_on() {
        return INVALID;
    }
    FakePixels::of(buffer).ivars().locks.borrow_mut().push(flags);
    0
}

#[unsafe(no_mangle)]
extern "C-unwind" fn CVPixelBufferUnlockBaseAddress(buffer: &CVPixelBuffer, flags: u64) -> i32 {
    let lock = FakePixels::of(buffer).ivars().locks.borrow_mut().pop();
    assert_eq!(lock, Some(flags), "unlocked with the flags of the lock");
    0
}

/// The memory while it is locked, nothing before and after.
#[unsafe(no_mangle)]
extern "C-unwind" fn CVPixelBufferGetBaseAddress(buffer: &CVPixelBuffer) -> *mut c_void {
    let ivars = FakePixels::of(buffer).ivars();
    if ivars.locks.borrow().is_empty() {
        return std::ptr::null_mut();
    }
    ivars.memory.borrow_mut().as_mut_ptr().cast()
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn CFRetain(object: *mut AnyObject) -> *mut AnyObject {
    // SAFETY: The engine counts references of pixel buffers only, which are objects here.
    unsafe { Retained::into_raw(retained(&*object)) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn CFRelease(object: *mut AnyObject) {
    // SAFETY: As above; the caller gives its reference away.
    drop(unsafe { Retained::from_raw(object) });
}
