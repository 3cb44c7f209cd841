//! The Apple engine's code against the stand-ins, as they should be and misbehaving.

mod common;

use candle_coreml_apple::framework::{self, Model};
use candle_coreml_apple::{
    Array, ArrayRef, Buffer, Element, Error, LoadOptions, OsVersion, OwnedValue, Owner, Value,
};
use candle_coreml_apple_fake::{Behaviour, compilations, live};
use common::{Folder, ONE, PROGRAM, model, resident_bytes, start};
use half::f16;
use std::sync::Arc;

const NEW: OsVersion = OsVersion {
    mac: true,
    major: 15,
    minor: 0,
};
const OLD: OsVersion = OsVersion {
    mac: true,
    major: 14,
    minor: 7,
};

fn halves(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|&v| f16::from_f32(v).to_ne_bytes())
        .collect()
}

fn given<'a>(shape: &'a [usize], bytes: &'a [u8]) -> Value<'a> {
    Value::Array(ArrayRef {
        shape,
        element: Element::F16,
        bytes,
        owner: None,
    })
}

fn load(folder: &Folder, function: &str) -> Model {
    let path = model(folder, "two.mlmodelc", PROGRAM);
    let options = LoadOptions {
        function: Some(function.into()),
        ..LoadOptions::default()
    };
    let file = candle_coreml_mil::Model::open(&path).unwrap();
    let described = file
        .description()
        .functions
        .iter()
        .find(|f| f.name == function)
        .unwrap()
        .clone();
    Model::load(&path, &options, 2, Some(&described), NEW).unwrap()
}

fn floats(value: &OwnedValue) -> Vec<f32> {
    let OwnedValue::Array(Array {
        data: Buffer::F16(v), ..
    }) = value
    else {
        panic!("{value:?}")
    };
    v.iter().map(|v| v.to_f32()).collect()
}

/// Runs `main` and gives `sum` and `twice`.
fn run(model: &Model) -> Result<(Vec<f32>, Vec<f32>), Error> {
    let (x, y) = (
        halves(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        halves(&[10.0, 20.0, 30.0]),
    );
    let outputs = model.predict(&[("x", given(&[2, 3], &x)), ("y", given(&[3], &y))], None)?;
    assert_eq!((outputs[0].0.as_str(), outputs[1].0.as_str()), ("sum", "twice"));
    Ok((floats(&outputs[0].1), floats(&outputs[1].1)))
}

fn wanted() -> (Vec<f32>, Vec<f32>) {
    (vec![11.0, 22.0, 33.0, 14.0, 25.0, 36.0], vec![20.0, 40.0, 60.0])
}

#[test]
fn outputs_are_the_same_whatever_the_layout_of_the_memory() {
    let _one = start();
    let folder = Folder::new("layouts");
    let model = load(&folder, "main");
    assert_eq!(run(&model).unwrap(), wanted());
    for behaviour in [
        Behaviour::PaddedOutputs,
        Behaviour::RebasedBuffers,
        Behaviour::KeepsInputs,
    ] {
        let on = behaviour.on();
        for _ in 0..3 {
            assert_eq!(run(&model).unwrap(), wanted(), "{behaviour:?}");
        }
        drop(on);
    }
    assert_eq!(run(&model).unwrap(), wanted());
}

#[test]
fn what_fails_is_an_error_with_core_mls_words_and_the_model_stays_usable() {
    let _one = start();
    let folder = Folder::new("failures");
    let model = load(&folder, "main");
    let rows = [
        (Behaviour::Fails, "prediction: "),
        (Behaviour::FailsSilently, "prediction: "),
        (
            Behaviour::MissingOutput,
            r#""twice": Core ML gave no such output"#,
        ),
        (
            Behaviour::Throws,
            "prediction: Objective-C exception NSGenericException: played",
        ),
    ];
    for (behaviour, words) in rows {
        let on = behaviour.on();
        let error = run(&model).unwrap_err().to_string();
        assert!(error.contains(words), "{behaviour:?}: {error}");
        drop(on);
        assert_eq!(run(&model).unwrap(), wanted(), "after {behaviour:?}");
    }
}

#[test]
fn a_model_that_is_not_there_is_refused_with_core_mls_number() {
    let _one = start();
    let missing = std::path::Path::new("/no/such.mlmodelc");
    let error = Model::load(missing, &LoadOptions::default(), 1, None, NEW)
        .err()
        .unwrap();
    assert!(
        matches!(&error, Error::CoreMl { code: 3, domain, .. } if domain == "com.apple.CoreML"),
        "{error}"
    );
}

#[test]
fn core_mls_description_is_the_one_in_the_file() {
    let _one = start();
    let folder = Folder::new("described");
    for function in ["main", "step"] {
        let model = load(&folder, function);
        let described = model.described(NEW).unwrap();
        candle_coreml_apple::describe::check(model.function(), &described).unwrap();
        assert_eq!(described.states.len(), usize::from(function == "step"));
    }
}

#[test]
fn states_are_changed_read_written_reset_and_forked() {
    let _one = start();
    let folder = Folder::new("states");
    let model = load(&folder, "step");
    for behaviour in [
        None,
        Some(Behaviour::PaddedOutputs),
        Some(Behaviour::RebasedBuffers),
    ] {
        let _on = behaviour.map(Behaviour::on);
        let mut state = model.make_state(NEW).unwrap();
        let x = halves(&[1.0, 2.0, 3.0]);
        for times in 1..=3u8 {
            let outputs = model
                .predict(&[("x", given(&[3], &x))], Some(&mut state))
                .unwrap();
            let all = f32::from(times);
            assert_eq!(floats(&outputs[0].1), [all, 2.0 * all, 3.0 * all]);
        }
        let mut fork = state.fork().unwrap();
        let tens = halves(&[10.0, 10.0, 10.0]);
        fork.write(
            "total",
            ArrayRef {
                shape: &[3],
                element: Element::F16,
                bytes: &tens,
                owner: None,
            },
        )
        .unwrap();
        assert_eq!(floats(&OwnedValue::Array(fork.read("total").unwrap())), [10.0; 3]);
        assert_eq!(
            floats(&OwnedValue::Array(state.read("total").unwrap())),
            [3.0, 6.0, 9.0]
        );
        state.reset().unwrap();
        assert_eq!(floats(&OwnedValue::Array(state.read("total").unwrap())), [0.0; 3]);
        assert!(state.read("other").unwrap_err().to_string().contains("total"));
    }
}

#[test]
fn systems_before_states_and_functions_refuse_them_by_name() {
    let _one = start();
    let folder = Folder::new("systems");
    let model = load(&folder, "step");
    let words = model.make_state(OLD).err().unwrap().to_string();
    assert!(words.contains("macOS 15.0"), "{words}");
    let path = folder.0.join("two.mlmodelc");
    let options = LoadOptions {
        function: Some("main".into()),
        ..LoadOptions::default()
    };
    assert!(matches!(
        Model::load(&path, &options, 2, None, OLD),
        Err(Error::System { .. })
    ));
    assert!(framework::function_names(&path, OLD).is_err());
    let mut names = framework::function_names(&path, NEW).unwrap();
    names.sort();
    assert_eq!(names, ["main", "step"]);
}

#[test]
fn a_model_is_compiled_once_and_again_after_a_change() {
    let _one = start();
    let folder = Folder::new("compiled");
    let cache = folder.0.join("cache");
    let before = compilations();
    let source = model(&folder, "one.mlpackage", ONE);
    let other_thread = Behaviour::OtherThread.on();
    let first = framework::compiled(&source, &cache).unwrap();
    assert_eq!(framework::compiled(&source, &cache).unwrap(), first);
    drop(other_thread);
    assert_eq!(compilations() - before, 1);
    let changed = model(&folder, "one.mlpackage", &ONE.replace("y = x", "y = x "));
    assert_ne!(framework::compiled(&changed, &cache).unwrap(), first);
    assert_eq!(compilations() - before, 2);
    let third = model(&folder, "three.mlpackage", PROGRAM);
    for (behaviour, words) in [
        (Behaviour::CompileFails, "compiling"),
        (Behaviour::CompileSilent, "neither"),
    ] {
        let _on = behaviour.on();
        let error = framework::compiled(&third, &cache).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
}

#[test]
fn a_batch_gives_what_single_predictions_give() {
    let _one = start();
    let folder = Folder::new("batch");
    let model = load(&folder, "main");
    let (x, y) = (
        halves(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        halves(&[10.0, 20.0, 30.0]),
    );
    let inputs = [("x", given(&[2, 3], &x)), ("y", given(&[3], &y))];
    let outputs = model.predict_batch(&[&inputs, &inputs]).unwrap();
    assert_eq!(outputs.len(), 2);
    for outputs in outputs {
        assert_eq!((floats(&outputs[0].1), floats(&outputs[1].1)), wanted());
    }
}

#[test]
fn one_model_predicts_on_several_threads() {
    let _one = start();
    let folder = Folder::new("threads");
    let model = load(&folder, "main");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| assert_eq!(run(&model).unwrap(), wanted())));
        }
    });
}

#[test]
fn large_inputs_are_read_where_they_are_and_let_go() {
    let _one = start();
    let folder = Folder::new("large");
    let program = r#"program(1.0) { func main<ios16>(tensor<fp32, [1, 300000]> x) {
        tensor<fp32, [1, 300000]> y = add(x = x, y = x); } -> (y); }"#;
    let path = model(&folder, "large.mlmodelc", program);
    let file = candle_coreml_mil::Model::open(&path).unwrap();
    let model = Model::load(
        &path,
        &LoadOptions::default(),
        1,
        Some(&file.description().functions[0]),
        NEW,
    )
    .unwrap();
    let bytes: Arc<Vec<u8>> = Arc::new((0..300_000).flat_map(|i| (i as f32).to_ne_bytes()).collect());
    let owner: Owner = bytes.clone();
    let input = ArrayRef {
        shape: &[1, 300_000],
        element: Element::F32,
        bytes: &bytes,
        owner: Some(&owner),
    };
    let mut kept_before = false;
    for behaviour in [None, Some(Behaviour::KeepsInputs), None] {
        let _on = behaviour.map(Behaviour::on);
        let outputs = model.predict(&[("x", Value::Array(input))], None).unwrap();
        let OwnedValue::Array(Array {
            data: Buffer::F32(v), ..
        }) = &outputs[0].1
        else {
            panic!()
        };
        assert!(v.iter().enumerate().all(|(i, &v)| v == 2.0 * i as f32));
        // Ours, the owner handed over, and what the framework keeps.
        let kept = usize::from(kept_before || behaviour.is_some());
        assert_eq!(Arc::strong_count(&bytes), 2 + kept, "{behaviour:?}");
        kept_before |= behaviour.is_some();
    }
    drop(model);
    assert_eq!(Arc::strong_count(&bytes), 2, "let go with the framework's model");
}

#[test]
fn nothing_is_left_of_a_hundred_thousand_predictions() {
    let _one = start();
    let folder = Folder::new("leaks");
    let before = live();
    let model = load(&folder, "step");
    let mut state = model.make_state(NEW).unwrap();
    let x = halves(&[0.0, 0.0, 0.0]);
    let mut step = || {
        drop(
            model
                .predict(&[("x", given(&[3], &x))], Some(&mut state))
                .unwrap(),
        )
    };
    (0..1_000).for_each(|_| step());
    let (objects, bytes) = (live(), resident_bytes());
    (0..100_000).for_each(|_| step());
    let (objects_after, bytes_after) = (live(), resident_bytes());
    println!(
        "objects {objects} -> {objects_after}, resident {} -> {} KiB",
        bytes >> 10,
        bytes_after >> 10
    );
    assert_eq!(objects, objects_after);
    assert!(bytes_after < bytes + (2 << 20), "{bytes} -> {bytes_after}");
    drop((model, state));
    assert_eq!(live(), before);
}
