//! MLDictionaryFeatureProvider and MLArrayBatchProvider.

use crate::Live;
use crate::value::retained;
use objc2::rc::{Allocated, Retained};
use objc2::runtime::{AnyObject, NSObject, NSObjectProtocol, ProtocolObject};
use objc2::{DefinedClass, define_class, msg_send};
use objc2_core_ml::{MLFeatureProvider, MLFeatureValue};
use objc2_foundation::{NSArray, NSDictionary, NSError, NSInteger, NSSet, NSString};

type Values = NSDictionary<NSString, AnyObject>;
type Providers = NSArray<ProtocolObject<dyn MLFeatureProvider>>;

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLDictionaryFeatureProvider"]
    #[ivars = (Retained<Values>, Live)]
    pub struct FakeProvider;

    // SAFETY: NSObject conforms.
    unsafe impl NSObjectProtocol for FakeProvider {}

    impl FakeProvider {
        #[unsafe(method_id(initWithDictionary:error:))]
        fn init(this: Allocated<Self>, values: &Values, _error: *mut *mut NSError) -> Option<Retained<Self>> {
            let this = this.set_ivars((retained(values), Live::new()));
            // SAFETY: The super class's own initializer.
            unsafe { msg_send![super(this), init] }
        }

        #[unsafe(method_id(featureNames))]
        fn names(&self) -> Retained<NSSet<NSString>> {
            NSSet::from_retained_slice(&self.ivars().0.keys().collect::<Vec<_>>())
        }

        #[unsafe(method_id(featureValueForName:))]
        fn value(&self, name: &NSString) -> Option<Retained<MLFeatureValue>> {
            // SAFETY: The dictionary holds feature values.
            self.ivars().0.objectForKey(name).map(|value| unsafe { Retained::cast_unchecked(value) })
        }
    }
);

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLArrayBatchProvider"]
    #[ivars = (Retained<Providers>, Live)]
    pub struct FakeBatch;

    impl FakeBatch {
        #[unsafe(method_id(initWithFeatureProviderArray:))]
        fn init(this: Allocated<Self>, providers: &Providers) -> Retained<Self> {
            let this = this.set_ivars((retained(providers), Live::new()));
            // SAFETY: The super class's own initializer.
            unsafe { msg_send![super(this), init] }
        }

        #[unsafe(method(count))]
        fn count(&self) -> NSInteger {
            self.ivars().0.count() as NSInteger
        }

        #[unsafe(method_id(featuresAtIndex:))]
        fn features(&self, index: NSInteger) -> Retained<ProtocolObject<dyn MLFeatureProvider>> {
            self.ivars().0.objectAtIndex(index as usize)
        }
    }
);
