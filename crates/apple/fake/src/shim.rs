//! Entry points that clang's runtimes have and GCC's lacks, as the messages they stand for.

use std::ffi::{CStr, c_char, c_void};

type Id = *mut c_void;
type Selector = *const c_void;
type Method = unsafe extern "C-unwind" fn(Id, Selector) -> Id;

unsafe extern "C-unwind" {
    fn objc_msg_lookup(receiver: Id, selector: Selector) -> Method;
    fn sel_registerName(name: *const c_char) -> Selector;
    fn objc_lookUpClass(name: *const c_char) -> Id;
}

#[link(name = "BlocksRuntime")]
unsafe extern "C" {
    fn _Block_copy(block: *const c_void) -> *mut c_void;
}

#[link(name = "gnustep-base")]
unsafe extern "C" {
    static NSDefaultRunLoopMode: *const c_void;
}

unsafe fn send(object: Id, selector: &CStr) -> Id {
    if object.is_null() {
        return object;
    }
    // SAFETY: The object is valid and answers to the selector, which takes nothing; every caller below sees to it.
    unsafe {
        let selector = sel_registerName(selector.as_ptr());
        objc_msg_lookup(object, selector)(object, selector)
    }
}

macro_rules! entries {
    ($($name:ident($object:ident) -> $result:ty { $body:expr })*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($object: Id) -> $result {
            // SAFETY: Valid objects or nil, by the contract of the entry point (clang, Objective-C ARC).
            unsafe { $body }
        }
    )*};
}

entries! {
    objc_retain(o) -> Id { { send(o, c"retain"); o } }
    objc_release(o) -> () { { send(o, c"release"); } }
    objc_autorelease(o) -> Id { send(o, c"autorelease") }
    objc_autoreleaseReturnValue(o) -> Id { send(o, c"autorelease") }
    objc_retainAutorelease(o) -> Id { { send(o, c"retain"); send(o, c"autorelease") } }
    objc_retainAutoreleasedReturnValue(o) -> Id { { send(o, c"retain"); o } }
    objc_autoreleasePoolPop(o) -> () { { send(o, c"release"); } }
    object_getClass(o) -> Id { if o.is_null() { o } else { *o.cast::<Id>() } }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn objc_autoreleasePoolPush() -> Id {
    // SAFETY: The class exists wherever Foundation does, and answers to `new`.
    unsafe { send(objc_lookUpClass(c"NSAutoreleasePool".as_ptr()), c"new") }
}

/// Refers to the libraries, blocks before Foundation, so that the linker keeps both.
pub fn keep() {
    std::hint::black_box(objc_retain as *const ());
    std::hint::black_box(_Block_copy as *const ());
    std::hint::black_box(&raw const NSDefaultRunLoopMode);
}
