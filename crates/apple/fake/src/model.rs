//! MLModel and MLModelAsset, run by the portable engine.

use crate::array::FakeArray;
use crate::configuration::{FakeConfiguration, FakeOptions};

use crate::state::FakeState;
use crate::value::{FakeValue, Held, counts};
use crate::{Behaviour, Live, description, pixels};
use block2::{DynBlock, RcBlock};
use candle_coreml_apple::{Element, reuse};
use candle_coreml_mil::{Feature, FeatureType, FunctionDescription, Model};
use candle_coreml_portable as portable;
use half::f16;
use objc2::rc::{Allocated, Retained};
use objc2::runtime::{AnyObject, NSObject, ProtocolObject};
use objc2::{AnyThread, DefinedClass, define_class, msg_send};
use objc2_core_ml::{
    MLArrayBatchProvider, MLBatchProvider, MLComputeDeviceProtocol, MLDictionaryFeatureProvider,
    MLFeatureProvider, MLFeatureValue, MLModelConfiguration, MLModelDescription, MLMultiArray,
    MLPredictionOptions, MLState,
};
use objc2_foundation::{NSArray, NSDictionary, NSError, NSException, NSNumber, NSString, NSURL};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

pub static COMPILATIONS: AtomicUsize = AtomicUsize::new(0);

type Provider = ProtocolObject<dyn MLFeatureProvider>;

pub struct Ivars {
    model: portable::Model,
    function: FunctionDescription,
    kept: Mutex<Vec<Retained<Provider>>>,
    _live: Live,
}

fn error(code: isize) -> Retained<NSError> {
    // SAFETY: A domain and no further information.
    unsafe { NSError::errorWithDomain_code_userInfo(&NSString::from_str("com.apple.CoreML"), code, None) }
}

/// Puts an error where the caller wants it.
fn refuse<T>(code: isize, place: *mut *mut NSError) -> Option<T> {
    if !place.is_null() {
        // SAFETY: The caller gave a place for an autoreleased error.
        unsafe { *place = Retained::autorelease_ptr(error(code)) };
    }
    None
}

/// Calls a completion handler here or on another thread.
pub fn complete<T>(
    handler: &DynBlock<dyn Fn(*mut T, *mut NSError)>,
    result: Option<Retained<T>>,
    code: Option<isize>,
) where
    T: objc2::Message + 'static,
{
    struct Crossing<T>(RcBlock<dyn Fn(*mut T, *mut NSError)>, Option<Retained<T>>);
    // SAFETY: Given away to the one thread that uses it.
    unsafe impl<T> Send for Crossing<T> {}
    impl<T: objc2::Message> Crossing<T> {
        fn call(self, code: Option<isize>) {
            let error = code.map(error);
            let object = self
                .1
                .as_ref()
                .map_or(std::ptr::null_mut(), |o| Retained::as_ptr(o).cast_mut());
            let error = error
                .as_ref()
                .map_or(std::ptr::null_mut(), |e| Retained::as_ptr(e).cast_mut());
            self.0.call((object, error));
        }
    }
    let crossing = Crossing(handler.copy(), result);
    if Behaviour::OtherThread.is_on() {
        let caller = std::thread::spawn(move || objc2::rc::autoreleasepool(|_| crossing.call(code)));
        let mut callers = crate::CALLERS.lock().unwrap_or_else(PoisonError::into_inner);
        callers.push(caller);
    } else {
        crossing.call(code);
    }
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModel"]
    #[ivars = Ivars]
    pub struct FakeModel;

    impl FakeModel {
        #[unsafe(method_id(modelWithContentsOfURL:configuration:error:))]
        fn load(url: &NSURL, configuration: &MLModelConfiguration, place: *mut *mut NSError) -> Option<Retained<Self>> {
            match open(url, FakeConfiguration::function_of(configuration)) {
                Some(ivars) => {
                    let this = FakeModel::alloc().set_ivars(ivars);
                    // SAFETY: The super class's own initializer.
                    Some(unsafe { msg_send![super(this), init] })
                }
                None => refuse(3, place),
            }
        }

        #[unsafe(method(compileModelAtURL:completionHandler:))]
        fn compile(url: &NSURL, handler: &DynBlock<dyn Fn(*mut NSURL, *mut NSError)>) {
            COMPILATIONS.fetch_add(1, Ordering::SeqCst);
            let compiled = url.path().map(|p| PathBuf::from(p.to_string())).and_then(|p| compile(&p));
            match compiled {
                _ if Behaviour::CompileSilent.is_on() => complete(handler, None, None),
                Some(path) if !Behaviour::CompileFails.is_on() => complete(handler, path.to_str().map(|p| NSURL::fileURLWithPath_isDirectory(&NSString::from_str(p), true)), None),
                _ => complete(handler, None, Some(0)),
            }
        }

        #[unsafe(method_id(availableComputeDevices))]
        fn devices() -> Retained<NSArray<ProtocolObject<dyn MLComputeDeviceProtocol>>> {
            crate::plan::devices(true)
        }

        #[unsafe(method_id(modelDescription))]
        fn description(&self) -> Retained<MLModelDescription> {
            description::description(&self.ivars().function)
        }

        #[unsafe(method_id(newState))]
        fn state(&self) -> Retained<MLState> {
            FakeState::made(self.ivars().model.make_state())
        }

        #[unsafe(method_id(predictionFromFeatures:options:error:))]
        fn predict(
            &self,
            inputs: &Provider,
            options: &MLPredictionOptions,
            place: *mut *mut NSError,
        ) -> Option<Retained<MLDictionaryFeatureProvider>> {
            given(self.run(inputs, None, Some(options)), place)
        }

        #[unsafe(method_id(predictionFromFeatures:usingState:options:error:))]
        fn predict_with_state(
            &self,
            inputs: &Provider,
            state: &MLState,
            options: &MLPredictionOptions,
            place: *mut *mut NSError,
        ) -> Option<Retained<MLDictionaryFeatureProvider>> {
            given(self.run(inputs, Some(state), Some(options)), place)
        }

        #[unsafe(method_id(predictionsFromBatch:error:))]
        fn predict_batch(
            &self,
            batch: &ProtocolObject<dyn MLBatchProvider>,
            place: *mut *mut NSError,
        ) -> Option<Retained<MLArrayBatchProvider>> {
            given(self.run_all(batch), place)
        }
    }
);

/// A result as Objective-C wants it: the object, or nil with an error where there is one to give.
fn given<T>(
    result: Result<Option<Retained<T>>, Option<isize>>,
    place: *mut *mut NSError,
) -> Option<Retained<T>> {
    match result {
        Ok(object) => object,
        Err(code) => code.and_then(|code| refuse(code, place)),
    }
}

fn open(url: &NSURL, function: Option<String>) -> Option<Ivars> {
    let file = Arc::new(Model::open(url.path().map(|p| PathBuf::from(p.to_string()))?).ok()?);
    let default = Some(file.description().default_function.clone()).filter(|d| !d.is_empty());
    let name = function.or(default).unwrap_or_else(|| "main".to_string());
    let function = file
        .description()
        .functions
        .iter()
        .find(|f| f.name == name)?
        .clone();
    let model = portable::Model::load(file, Some(&name), portable::Options::default()).ok()?;
    Some(Ivars {
        model,
        function,
        kept: Mutex::default(),
        _live: Live::new(),
    })
}

/// A copy of the files in the temporary folder: compiled as far as the portable engine is concerned.
fn compile(source: &Path) -> Option<PathBuf> {
    let number = COMPILATIONS.load(Ordering::SeqCst);
    let made = std::env::temp_dir().join(format!("fake-{}-{number}.mlmodelc", std::process::id()));
    copy(source, &made).ok()?;
    Some(made)
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let (path, name) = entry.map(|e| (e.path(), e.file_name()))?;
        if path.is_dir() {
            copy(&path, &to.join(name))?;
        } else {
            std::fs::copy(&path, to.join(name)).map(|_| ())?;
        }
    }
    Ok(())
}

impl FakeModel {
    /// Runs the function once for each element of a batch.
    fn run_all(
        &self,
        batch: &ProtocolObject<dyn MLBatchProvider>,
    ) -> Result<Option<Retained<MLArrayBatchProvider>>, Option<isize>> {
        let mut results: Vec<Retained<Provider>> = Vec::new();
        // SAFETY: A plain getter.
        for index in 0..unsafe { batch.count() } {
            // SAFETY: The index is below the count.
            let inputs = unsafe { batch.featuresAtIndex(index) };
            match self.run(&inputs, None, None)? {
                Some(outputs) => results.push(ProtocolObject::from_retained(outputs)),
                None => return Ok(None),
            }
        }
        let results = NSArray::from_retained_slice(&results);
        let this: Allocated<MLArrayBatchProvider> = MLArrayBatchProvider::alloc();
        // SAFETY: An array of feature providers.
        Ok(Some(unsafe {
            MLArrayBatchProvider::initWithFeatureProviderArray(this, &results)
        }))
    }

    /// Runs the function. `Err` holds the code of an error, or nothing where none is to be given.
    fn run(
        &self,
        inputs: &Provider,
        state: Option<&MLState>,
        options: Option<&MLPredictionOptions>,
    ) -> Result<Option<Retained<MLDictionaryFeatureProvider>>, Option<isize>> {
        if Behaviour::Throws.is_on() {
            let reason = NSString::from_str("played");
            let name = NSString::from_str("NSGenericException");
            let exception = NSException::new(&name, Some(&reason), None).ok_or(None)?;
            // Throwing does not retain it here, and the frames it passes drop what is theirs.
            let exception = Retained::autorelease_ptr(exception);
            // SAFETY: The pool around the call outlives the exception's way.
            unsafe { &*exception }.raise();
        }
        if Behaviour::FailsSilently.is_on() {
            return Err(None);
        }
        if Behaviour::Fails.is_on() {
            return Err(Some(0));
        }
        if Behaviour::KeepsInputs.is_on() {
            self.ivars()
                .kept
                .lock()
                .map_err(|_| None)?
                .push(objc2::Message::retain(inputs));
        }
        if Behaviour::Echoes.is_on() {
            // SAFETY: The engine's inputs are dictionaries of features.
            let inputs = unsafe { &*std::ptr::from_ref(inputs).cast::<MLDictionaryFeatureProvider>() };
            return Ok(Some(objc2::Message::retain(inputs)));
        }
        if Behaviour::Idle.is_on() {
            return self.idle(options).map(Some);
        }
        let mut given = Vec::new();
        for feature in &self.ivars().function.inputs {
            let name = NSString::from_str(&feature.name);
            // SAFETY: A plain getter.
            let Some(value) = (unsafe { inputs.featureValueForName(&name) }) else {
                continue;
            };
            let (shape, data) = taken(&feature.ty, &value).ok_or(Some(1))?;
            given.push((feature.name.as_str(), shape, data));
        }
        let borrowed: Vec<_> = given
            .iter()
            .map(|(name, shape, data)| {
                (
                    *name,
                    portable::Array {
                        shape,
                        data: data.borrowed(),
                    },
                )
            })
            .collect();
        let mut state = state.map(|s| FakeState::of(s).borrow_mut());
        let outputs = self
            .ivars()
            .model
            .predict(&borrowed, state.as_deref_mut())
            .map_err(|_| Some(0))?;
        self.give(outputs, options).map(Some)
    }

    fn give(
        &self,
        outputs: Vec<(String, portable::OwnedArray)>,
        options: Option<&MLPredictionOptions>,
    ) -> Result<Retained<MLDictionaryFeatureProvider>, Option<isize>> {
        let mut values = Vec::new();
        for feature in &self.ivars().function.outputs {
            let output = outputs
                .iter()
                .find(|(n, _)| *n == feature.name)
                .ok_or(Some(0))?
                .1
                .clone();
            let held = match other(&feature.ty, &output) {
                Some(held) => held,
                None => Held::Array(self.filled(options, feature, output)?),
            };
            values.push((feature.name.as_str(), held));
        }
        if Behaviour::MissingOutput.is_on() {
            values.pop();
        }
        Ok(provider(values))
    }

    /// An output that is an array.
    fn filled(
        &self,
        options: Option<&MLPredictionOptions>,
        feature: &Feature,
        output: portable::OwnedArray,
    ) -> Result<Retained<MLMultiArray>, Option<isize>> {
        let element = match (&feature.ty, &output.data) {
            (FeatureType::MultiArray(a), _) => reuse::element(a.dtype).ok_or(Some(1))?,
            (_, portable::Buffer::I32(_)) => Element::I32,
            _ => Element::F32,
        };
        let array = self.target(options, &feature.name, element, &output.shape);
        FakeArray::of(&array).fill(&buffer(output.data, element));
        Ok(array)
    }

    /// The array an output goes to: its backing, or one of its own.
    fn target(
        &self,
        options: Option<&MLPredictionOptions>,
        name: &str,
        element: Element,
        shape: &[usize],
    ) -> Retained<MLMultiArray> {
        let backing = options.and_then(|o| FakeOptions::backing(o, &NSString::from_str(name)));
        match backing {
            Some(backing) if !Behaviour::PaddedOutputs.is_on() => {
                // SAFETY: Backings of multi-arrays are multi-arrays.
                let array: Retained<MLMultiArray> = unsafe { Retained::cast_unchecked(backing) };
                let fake = FakeArray::of(&array);
                assert_eq!(
                    (fake.element(), fake.dims()),
                    (element, shape.to_vec()),
                    "a backing fits its output"
                );
                array
            }
            _ => FakeArray::output(element, shape),
        }
    }

    fn idle(
        &self,
        options: Option<&MLPredictionOptions>,
    ) -> Result<Retained<MLDictionaryFeatureProvider>, Option<isize>> {
        let outputs = self.ivars().function.outputs.iter().map(|feature| {
            let (element, shape) = reuse::backing(feature).ok_or(Some(0))?;
            Ok((
                feature.name.as_str(),
                Held::Array(self.target(options, &feature.name, element, shape)),
            ))
        });
        outputs.collect::<Result<Vec<_>, _>>().map(provider)
    }
}

fn provider(values: Vec<(&str, Held)>) -> Retained<MLDictionaryFeatureProvider> {
    let names: Vec<_> = values.iter().map(|(n, _)| NSString::from_str(n)).collect();
    let names: Vec<&NSString> = names.iter().map(|n| &**n).collect();
    let values: Vec<Retained<AnyObject>> = values
        .into_iter()
        .map(|(_, held)| FakeValue::made(held).into())
        .collect();
    let values = NSDictionary::from_retained_objects(&names, &values);
    // SAFETY: Keys are strings, values are feature values.
    let made = unsafe {
        MLDictionaryFeatureProvider::initWithDictionary_error(MLDictionaryFeatureProvider::alloc(), &values)
    };
    made.expect("the stand-in takes every dictionary")
}

/// An input as the portable engine takes it.
fn taken(ty: &FeatureType, value: &MLFeatureValue) -> Option<(Vec<usize>, Elements)> {
    Some(match ty {
        FeatureType::Image(image) => {
            // SAFETY: A plain getter.
            let buffer = unsafe { value.imageBufferValue() }?;
            let (shape, values) = pixels::planes(&buffer, image.color)?;
            (shape, Elements::F32(values))
        }
        // SAFETY: A plain getter.
        FeatureType::Double => (
            vec![1],
            Elements::F32(vec![unsafe { value.doubleValue() } as f32]),
        ),
        // SAFETY: A plain getter.
        FeatureType::Int64 => (
            vec![1],
            Elements::I32(vec![unsafe { value.int64Value() }.try_into().ok()?]),
        ),
        // SAFETY: A plain getter.
        _ => array(&*unsafe { value.multiArrayValue() }?),
    })
}

/// An output that is no array.
fn other(ty: &FeatureType, output: &portable::OwnedArray) -> Option<Held> {
    use portable::{Buffer, Label};
    Some(match (ty, &output.data) {
        (FeatureType::Image(image), _) => {
            Held::Pixels(pixels::buffer(&output.shape, &output.to_f32(), image)?)
        }
        (FeatureType::String, Buffer::Strings(texts)) => Held::String(NSString::from_str(texts.first()?)),
        (FeatureType::Int64, Buffer::I64(v)) => Held::Int64(*v.first()?),
        (FeatureType::Int64, Buffer::I32(v)) => Held::Int64((*v.first()?).into()),
        (FeatureType::Double, Buffer::F32(v)) => Held::Double((*v.first()?).into()),
        (FeatureType::Dictionary { .. }, Buffer::Dictionary(pairs)) => {
            let numbers: Vec<f64> = pairs.iter().map(|(_, v)| *v).collect();
            let texts = pairs.iter().map(|(label, _)| match label {
                Label::Text(text) => Some(NSString::from_str(text)),
                Label::Number(_) => None,
            });
            Held::Dictionary(match texts.collect::<Option<Vec<_>>>() {
                Some(texts) => counts(&texts, &numbers),
                None => {
                    let keys = pairs.iter().filter_map(|(label, _)| match label {
                        Label::Number(number) => Some(NSNumber::new_i64(*number)),
                        Label::Text(_) => None,
                    });
                    counts(&keys.collect::<Vec<_>>(), &numbers)
                }
            })
        }
        _ => return None,
    })
}

/// Elements in a type the portable engine reads.
pub enum Elements {
    F16(Vec<f16>),
    F32(Vec<f32>),
    I32(Vec<i32>),
}

impl Elements {
    pub fn borrowed(&self) -> portable::Data<'_> {
        match self {
            Elements::F16(v) => portable::Data::F16(v),
            Elements::F32(v) => portable::Data::F32(v),
            Elements::I32(v) => portable::Data::I32(v),
        }
    }
}

/// Shape and elements of a multi-array.
pub fn array(array: &MLMultiArray) -> (Vec<usize>, Elements) {
    let fake = FakeArray::of(array);
    let bytes = fake.packed();
    let elements = match fake.element() {
        Element::F16 => Elements::F16(
            bytes
                .chunks_exact(2)
                .map(|b| f16::from_ne_bytes([b[0], b[1]]))
                .collect(),
        ),
        Element::F32 => Elements::F32(chunks(&bytes, f32::from_ne_bytes)),
        Element::F64 => Elements::F32(chunks(&bytes, |b| f64::from_ne_bytes(b) as f32)),
        Element::I32 => Elements::I32(chunks(&bytes, i32::from_ne_bytes)),
        Element::I8 => Elements::I32(chunks(&bytes, |b: [u8; 1]| i8::from_ne_bytes(b).into())),
    };
    (fake.dims(), elements)
}

fn chunks<const N: usize, T>(bytes: &[u8], make: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&b| make(b)).collect()
}

/// Elements of the portable engine as bytes of an element type.
pub fn buffer(data: portable::Buffer, element: Element) -> Vec<u8> {
    let floats = |v: &dyn Fn(usize) -> f64, count: usize| -> Vec<u8> {
        let each = (0..count).map(v);
        match element {
            Element::F16 => each.flat_map(|x| f16::from_f64(x).to_ne_bytes()).collect(),
            Element::F32 => each.flat_map(|x| (x as f32).to_ne_bytes()).collect(),
            Element::F64 => each.flat_map(f64::to_ne_bytes).collect(),
            Element::I32 => each.flat_map(|x| (x as i32).to_ne_bytes()).collect(),
            Element::I8 => each.flat_map(|x| (x as i8).to_ne_bytes()).collect(),
        }
    };
    match data {
        portable::Buffer::F16(v) => floats(&|i| v[i].into(), v.len()),
        portable::Buffer::F32(v) => floats(&|i| v[i].into(), v.len()),
        portable::Buffer::I32(v) => floats(&|i| v[i].into(), v.len()),
        _ => Vec::new(),
    }
}

define_class!(
    // SAFETY: NSObject has no demands on subclasses.
    #[unsafe(super(NSObject))]
    #[name = "MLModelAsset"]
    #[ivars = (PathBuf, Live)]
    pub struct FakeAsset;

    impl FakeAsset {
        #[unsafe(method_id(modelAssetWithURL:error:))]
        fn open(url: &NSURL, place: *mut *mut NSError) -> Option<Retained<Self>> {
            match url.path().map(|p| PathBuf::from(p.to_string())).filter(|p| p.exists()) {
                Some(path) => {
                    let this = FakeAsset::alloc().set_ivars((path, Live::new()));
                    // SAFETY: The super class's own initializer.
                    Some(unsafe { msg_send![super(this), init] })
                }
                None => refuse(3, place),
            }
        }

        #[unsafe(method(functionNamesWithCompletionHandler:))]
        fn names(&self, handler: &DynBlock<dyn Fn(*mut NSArray<NSString>, *mut NSError)>) {
            let Ok(file) = Model::open(&self.ivars().0) else {
                return complete(handler, None, Some(3));
            };
            let names = file.description().functions.iter().map(|f| NSString::from_str(&f.name));
            complete(handler, Some(NSArray::from_retained_slice(&names.collect::<Vec<_>>())), None);
        }
    }
);
