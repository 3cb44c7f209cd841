//! The frame of every call: a pool for autoreleased objects, exceptions as errors, and small conversions.

use crate::error::Error;
use objc2::exception::{self, Exception};
use objc2::rc::{Retained, autoreleasepool};
use objc2_foundation::{NSArray, NSError, NSException, NSNumber, NSString, NSURL};
use std::panic::AssertUnwindSafe;
use std::path::Path;

/// Runs `body` in an autorelease pool of its own, so that what it leaves behind goes when it returns, and gives an
/// exception that Core ML throws as an error.
pub(super) fn call<R>(what: &str, body: impl FnOnce() -> Result<R, Error>) -> Result<R, Error> {
    autoreleasepool(|_| {
        // What an exception interrupts is dropped: nothing of it is seen afterwards but the error.
        let caught = exception::catch(AssertUnwindSafe(body));
        caught.unwrap_or_else(|thrown| Err(exception_error(what, thrown)))
    })
}

fn exception_error(what: &str, thrown: Option<Retained<Exception>>) -> Error {
    let exception = thrown.map(NSException::from_exception);
    let (name, reason) = match &exception {
        Some(Ok(e)) => (
            e.name().to_string(),
            e.reason().map_or(String::new(), |r| r.to_string()),
        ),
        Some(Err(other)) => (format!("{other:?}"), String::new()),
        None => ("nil".to_string(), String::new()),
    };
    Error::Exception {
        what: what.to_string(),
        name,
        reason,
    }
}

/// The error that Core ML gave when it was asked to do `what`.
pub(super) fn core_ml(what: &str) -> impl Fn(Retained<NSError>) -> Error {
    move |error| Error::CoreMl {
        what: what.to_string(),
        message: error.localizedDescription().to_string(),
        domain: error.domain().to_string(),
        code: error.code(),
    }
}

/// Shapes and strides for Core ML.
pub(super) fn numbers(values: &[usize]) -> Retained<NSArray<NSNumber>> {
    let numbers: Vec<_> = values.iter().map(|&v| NSNumber::new_usize(v)).collect();
    NSArray::from_retained_slice(&numbers)
}

/// Shapes and strides from Core ML; `None` when one is negative.
pub(super) fn sizes(numbers: &NSArray<NSNumber>) -> Option<Vec<usize>> {
    numbers
        .iter()
        .map(|n| usize::try_from(n.as_isize()).ok())
        .collect()
}

pub(super) fn string(text: &str) -> Retained<NSString> {
    NSString::from_str(text)
}

/// The place of a file or folder.
pub(super) fn url(path: &Path) -> Result<Retained<NSURL>, Error> {
    let text = path.to_str();
    let url = text.map(|t| NSURL::fileURLWithPath_isDirectory(&string(t), path.is_dir()));
    url.ok_or_else(|| Error::NotAModel {
        path: path.display().to_string(),
        problem: "no path that Foundation takes".to_string(),
    })
}
