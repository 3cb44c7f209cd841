//! Stand-ins for the classes of CoreML.framework, on GNUstep, for tests of the Apple engine off Apple systems.
//!
//! Models are run by the portable engine. What this shows is that the calls are made, read and counted rightly; what it
//! cannot show is how Apple's own classes behave. [`Behaviour`] plays what is known of them and is easily got wrong.

/// An object of a stand-in class, under the name of the bindings.
macro_rules! made {
    ($class:ty, $ivars:expr) => {{
        let this = <$class as objc2::AnyThread>::alloc().set_ivars(($ivars, crate::Live::new()));
        // SAFETY: The super class's own initializer.
        let this: objc2::rc::Retained<$class> = unsafe { objc2::msg_send![super(this), init] };
        // SAFETY: The same class under the name of the bindings.
        unsafe { objc2::rc::Retained::cast_unchecked(this) }
    }};
}

mod array;
mod configuration;
mod description;
mod model;
mod pixels;
mod plan;
mod provider;
mod sequence;
mod shim;
mod state;
mod value;

use objc2::ClassType;
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

/// Stand-in objects alive.
static LIVE: AtomicIsize = AtomicIsize::new(0);

/// Threads that call completion handlers; one may still hold its result when the handler has handed it on.
static CALLERS: Mutex<Vec<JoinHandle<()>>> = Mutex::new(Vec::new());

/// How many stand-in objects are alive, once no thread is left that calls a completion handler.
pub fn live() -> isize {
    let callers = std::mem::take(&mut *CALLERS.lock().unwrap_or_else(PoisonError::into_inner));
    for caller in callers {
        // A handler that panics is told of where it panicked.
        let _ = caller.join();
    }
    LIVE.load(Ordering::SeqCst)
}

/// Counts the object it is part of.
pub struct Live;

impl Live {
    fn new() -> Live {
        LIVE.fetch_add(1, Ordering::SeqCst);
        Live
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        LIVE.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What the stand-ins do that is easily got wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum Behaviour {
    /// Outputs come in arrays of their own with rows padded to 64 bytes; backings are left alone.
    PaddedOutputs,
    /// Memory moves, with other strides, when it is asked for to be written.
    RebasedBuffers,
    /// Completion handlers are called on another thread.
    OtherThread,
    /// Predictions give nil with an error.
    Fails,
    /// Predictions give nil without an error.
    FailsSilently,
    /// Predictions throw.
    Throws,
    /// The last output is missing.
    MissingOutput,
    /// Compiling fails.
    CompileFails,
    /// Compiling gives neither a result nor an error.
    CompileSilent,
    /// Inputs are kept after a prediction.
    KeepsInputs,
    /// Predictions do nothing and give the backings as they are.
    Idle,
    /// Predictions give their inputs.
    Echoes,
    /// Core Video makes no pixel buffer.
    NoPixelBuffer,
    /// Pixel buffers cannot be locked.
    LockFails,
}

static SWITCHES: [AtomicBool; 14] = [const { AtomicBool::new(false) }; 14];

impl Behaviour {
    /// Plays it until the result is dropped.
    pub fn on(self) -> On {
        SWITCHES[self as usize].store(true, Ordering::SeqCst);
        On(self)
    }

    fn is_on(self) -> bool {
        SWITCHES[self as usize].load(Ordering::SeqCst)
    }
}

/// A behaviour that is played.
pub struct On(Behaviour);

impl Drop for On {
    fn drop(&mut self) {
        SWITCHES[self.0 as usize].store(false, Ordering::SeqCst);
    }
}

/// How many multi-arrays were made so far.
pub fn arrays_made() -> usize {
    array::MADE.load(Ordering::SeqCst)
}

/// Cores of the Neural Engine that the stand-ins have.
pub const NEURAL_ENGINE_CORES: usize = plan::CORES;

/// How often models were compiled.
pub fn compilations() -> usize {
    model::COMPILATIONS.load(Ordering::SeqCst)
}

/// Registers the classes; to be called before anything else.
pub fn install() {
    shim::keep();
    plan::install();
    let _ = sequence::FakeSequence::class();
    let _ = (
        array::FakeArray::class(),
        value::FakeValue::class(),
        provider::FakeProvider::class(),
    );
    let _ = (
        provider::FakeBatch::class(),
        configuration::FakeConfiguration::class(),
    );
    let _ = (
        configuration::FakeOptions::class(),
        configuration::FakeHints::class(),
        state::FakeState::class(),
    );
    let _ = (
        model::FakeModel::class(),
        model::FakeAsset::class(),
        description::FakeDescription::class(),
    );
    let _ = (
        description::FakeFeature::class(),
        description::FakeConstraint::class(),
    );
    let _ = (
        description::FakeShapes::class(),
        description::FakeStateConstraint::class(),
    );
    let _ = (
        description::FakeImage::class(),
        description::FakeImageSizes::class(),
        description::FakeImageSize::class(),
    );
    let _ = (
        description::FakeKeys::class(),
        description::FakeElements::class(),
        pixels::FakePixels::class(),
    );
}
