//! Pictures as pixel buffers.

use crate::error::Error;
use crate::pixels::{read_rows, write_rows};
use crate::value::{Picture, PixelFormat};
use objc2::rc::Retained;
use objc2_core_foundation::CFRetained;
use objc2_core_ml::MLFeatureValue;
use objc2_core_video::{
    CVPixelBuffer, CVPixelBufferCreate, CVPixelBufferGetBaseAddress, CVPixelBufferGetBytesPerRow,
    CVPixelBufferGetHeight, CVPixelBufferGetPixelFormatType, CVPixelBufferGetWidth,
    CVPixelBufferLockBaseAddress, CVPixelBufferLockFlags, CVPixelBufferUnlockBaseAddress, kCVReturnSuccess,
};
use std::ptr::NonNull;

/// A picture for Core ML, copied into a pixel buffer.
pub(super) fn feature_value(name: &str, picture: &Picture) -> Result<Retained<MLFeatureValue>, Error> {
    let format = PixelFormat::of(&picture.pixels);
    let mut made: *mut CVPixelBuffer = std::ptr::null_mut();
    // SAFETY: `made` may be written; no attributes are given.
    let code = unsafe {
        CVPixelBufferCreate(
            None,
            picture.width,
            picture.height,
            format.code(),
            None,
            NonNull::from(&mut made),
        )
    };
    let buffer = NonNull::new(made).filter(|_| code == kCVReturnSuccess);
    let buffer =
        buffer.ok_or_else(|| Error::feature(name, format!("no pixel buffer: Core Video error {code}")))?;
    // SAFETY: Core Video gave a buffer that is ours to release.
    let buffer = unsafe { CFRetained::from_raw(buffer) };
    locked(
        name,
        &buffer,
        CVPixelBufferLockFlags::empty(),
        |memory, row_bytes, size| {
            // SAFETY: The buffer is locked, of this size, and nobody else knows it yet.
            let rows = unsafe { std::slice::from_raw_parts_mut(memory, size) };
            write_rows(picture, row_bytes, rows).map_err(|e| Error::feature(name, e))
        },
    )?;
    // SAFETY: A valid pixel buffer.
    Ok(unsafe { MLFeatureValue::featureValueWithPixelBuffer(&buffer) })
}

/// The picture of an output.
pub(super) fn picture(name: &str, value: &MLFeatureValue) -> Result<Picture, Error> {
    // SAFETY: The getter of the value's kind.
    let buffer = unsafe { value.imageBufferValue() };
    let buffer = buffer.ok_or_else(|| Error::feature(name, "Core ML gave no pixel buffer"))?;
    let code = CVPixelBufferGetPixelFormatType(&buffer);
    let format = PixelFormat::from_code(code);
    let format =
        format.ok_or_else(|| Error::feature(name, format!("pixel format {code:#010x} is unknown")))?;
    let (width, height) = (CVPixelBufferGetWidth(&buffer), CVPixelBufferGetHeight(&buffer));
    locked(
        name,
        &buffer,
        CVPixelBufferLockFlags::ReadOnly,
        |memory, row_bytes, size| {
            // SAFETY: The buffer is locked for reading and of this size.
            let rows = unsafe { std::slice::from_raw_parts(memory, size) };
            read_rows(width, height, format, row_bytes, rows).map_err(|e| Error::feature(name, e))
        },
    )
}

/// Gives `body` the address, the bytes of a row and the size of a buffer while it is locked.
fn locked<R>(
    name: &str,
    buffer: &CVPixelBuffer,
    flags: CVPixelBufferLockFlags,
    body: impl FnOnce(*mut u8, usize, usize) -> Result<R, Error>,
) -> Result<R, Error> {
    // SAFETY: A valid buffer.
    let code = unsafe { CVPixelBufferLockBaseAddress(buffer, flags) };
    if code != kCVReturnSuccess {
        return Err(Error::feature(
            name,
            format!("the pixel buffer cannot be locked: Core Video error {code}"),
        ));
    }
    let row_bytes = CVPixelBufferGetBytesPerRow(buffer);
    let size = row_bytes.checked_mul(CVPixelBufferGetHeight(buffer));
    let result = match (CVPixelBufferGetBaseAddress(buffer), size) {
        (memory, Some(size)) if !memory.is_null() => body(memory.cast(), row_bytes, size),
        _ => Err(Error::feature(name, "the pixel buffer has no memory")),
    };
    // SAFETY: It was locked with the same flags.
    unsafe { CVPixelBufferUnlockBaseAddress(buffer, flags) };
    result
}
