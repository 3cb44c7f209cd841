//! MLModelConfiguration, MLOptimizationHints and MLPredictionOptions.

use crate::Live;
use crate::value::retained;
use objc2::rc::{Allocated, Retained};
use objc2::runtime::{AnyObject, NSObject};
use objc2::{AnyThread, DefinedClass, define_class, msg_send};
use objc2_core_ml::{
    MLComputeUnits, MLModelConfiguration, MLOptimizationHints, MLPredictionOptions, MLReshapeFrequencyHint,
    MLSpecializationStrategy,
};
use objc2_foundation::{NSDictionary, NSString};
use std::cell::{Cell, RefCell};

#[derive(Default)]
pub struct Settings {
    units: Cell<isize>,
    function: RefCell<Option<String>>,
    low_precision: Cell<bool>,
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelConfiguration"]
    #[ivars = (Settings, Live)]
    pub struct FakeConfiguration;

    impl FakeConfiguration {
        #[unsafe(method_id(init))]
        fn init(this: Allocated<Self>) -> Retained<Self> {
            let this = this.set_ivars((Settings::default(), Live::new()));
            // SAFETY: The super class's own initializer.
            unsafe { msg_send![super(this), init] }
        }

        #[unsafe(method(setComputeUnits:))]
        fn set_units(&self, units: MLComputeUnits) {
            self.ivars().0.units.set(units.0);
        }

        #[unsafe(method(setAllowLowPrecisionAccumulationOnGPU:))]
        fn set_low_precision(&self, allow: bool) {
            self.ivars().0.low_precision.set(allow);
        }

        #[unsafe(method(setFunctionName:))]
        fn set_function(&self, name: Option<&NSString>) {
            *self.ivars().0.function.borrow_mut() = name.map(|n| n.to_string());
        }

        #[unsafe(method_id(optimizationHints))]
        fn hints(&self) -> Retained<MLOptimizationHints> {
            let this = FakeHints::alloc().set_ivars(Live::new());
            // SAFETY: The super class's own initializer.
            let this: Retained<FakeHints> = unsafe { msg_send![super(this), init] };
            // SAFETY: The same class under the name of the bindings.
            unsafe { Retained::cast_unchecked(this) }
        }

        #[unsafe(method(setOptimizationHints:))]
        fn set_hints(&self, _hints: &MLOptimizationHints) {}
    }
);

impl FakeConfiguration {
    pub fn function_of(configuration: &MLModelConfiguration) -> Option<String> {
        // SAFETY: The only class of that name is the one defined here.
        let this = unsafe { &*std::ptr::from_ref(configuration).cast::<FakeConfiguration>() };
        this.ivars().0.function.borrow().clone()
    }
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLOptimizationHints"]
    #[ivars = Live]
    pub struct FakeHints;

    impl FakeHints {
        #[unsafe(method(setReshapeFrequency:))]
        fn set_reshape(&self, _hint: MLReshapeFrequencyHint) {}

        #[unsafe(method(setSpecializationStrategy:))]
        fn set_strategy(&self, _strategy: MLSpecializationStrategy) {}
    }
);

type Backings = NSDictionary<NSString, AnyObject>;

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLPredictionOptions"]
    #[ivars = (RefCell<Option<Retained<Backings>>>, Live)]
    pub struct FakeOptions;

    impl FakeOptions {
        #[unsafe(method_id(init))]
        fn init(this: Allocated<Self>) -> Retained<Self> {
            let this = this.set_ivars((RefCell::new(None), Live::new()));
            // SAFETY: The super class's own initializer.
            unsafe { msg_send![super(this), init] }
        }

        #[unsafe(method(setOutputBackings:))]
        fn set_backings(&self, backings: &Backings) {
            *self.ivars().0.borrow_mut() = Some(retained(backings));
        }
    }
);

impl FakeOptions {
    pub fn backing(options: &MLPredictionOptions, name: &NSString) -> Option<Retained<AnyObject>> {
        // SAFETY: The only class of that name is the one defined here.
        let this = unsafe { &*std::ptr::from_ref(options).cast::<FakeOptions>() };
        this.ivars()
            .0
            .borrow()
            .as_ref()
            .and_then(|b| b.objectForKey(name))
    }
}
