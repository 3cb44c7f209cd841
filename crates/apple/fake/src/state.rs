//! MLState.

use crate::Live;
use crate::array::FakeArray;
use crate::model::{array, buffer};
use block2::Block;
use candle_coreml_apple::reuse;
use candle_coreml_portable as portable;
use objc2::rc::Retained;
use objc2::runtime::NSObject;
use objc2::{AnyThread, DefinedClass, define_class, msg_send};
use objc2_core_ml::{MLMultiArray, MLState};
use objc2_foundation::NSString;
use std::cell::RefCell;
use std::ptr::NonNull;

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLState"]
    #[ivars = (RefCell<portable::State>, Live)]
    pub struct FakeState;

    impl FakeState {
        #[unsafe(method(getMultiArrayForStateNamed:handler:))]
        fn get(&self, name: &NSString, handler: &Block<dyn Fn(NonNull<MLMultiArray>)>) {
            let name = name.to_string();
            // A state that is used twice at once ends the test here.
            let mut state = self.ivars().0.borrow_mut();
            let (dtype, shape) = state.describe(&name).expect("Core ML throws for an unknown state");
            let element = reuse::element(dtype).expect("states are multi-arrays");
            let view = FakeArray::output(element, shape);
            let now = state.get(&name).expect("it was described");
            FakeArray::of(&view).fill(&buffer(now.data, element));
            handler.call((NonNull::from(&*view),));
            let (shape, data) = array(&view);
            let changed = portable::Array { shape: &shape, data: data.borrowed() };
            state.set(&name, changed).expect("it has the state's shape");
        }
    }
);

impl FakeState {
    pub fn made(state: portable::State) -> Retained<MLState> {
        let this = FakeState::alloc().set_ivars((RefCell::new(state), Live::new()));
        // SAFETY: The super class's own initializer.
        let this: Retained<FakeState> = unsafe { msg_send![super(this), init] };
        // SAFETY: The same class under the name of the bindings.
        unsafe { Retained::cast_unchecked(this) }
    }

    pub fn of(state: &MLState) -> &RefCell<portable::State> {
        // SAFETY: The only class of that name is the one defined here.
        &unsafe { &*std::ptr::from_ref(state).cast::<FakeState>() }
            .ivars()
            .0
    }
}
