//! The whole way on the portable engine: small models written as MIL text in memory, opened, described and run.

use candle_core::{DType, Device, Module, Tensor};
use candle_coreml::{
    CoreMLModel, CoreMLModelBuilder, ElementType, EngineKind, Error, FeatureType, Numerics, Source,
};

/// Functions that share nothing, one that is stateless and two that add to the same state.
const PROGRAM: &str = r#"program(1.3) {
    func main<ios18>(tensor<fp16, [2, 3]> x, tensor<int32, [3]> n) {
        tensor<fp16, [3]> f = cast(dtype = string("fp16"), x = n);
        tensor<fp16, [2, 3]> y = add(x = x, y = f);
        tensor<int32, [3]> twice = add(x = n, y = n);
    } -> (y, twice);
    func step<ios18>(state<tensor<fp16, [3]>> total, tensor<fp16, [3]> x) {
        tensor<fp16, [3]> before = read_state(input = total);
        tensor<fp16, [3]> after = add(x = before, y = x);
        write_state(data = after, input = total);
        tensor<fp16, [3]> result = read_state(input = total);
    } -> (result);
    func step_back<ios18>(state<tensor<fp16, [3]>> total, tensor<fp16, [3]> x) {
        tensor<fp16, [3]> before = read_state(input = total);
        tensor<fp16, [3]> after = sub(x = before, y = x);
        write_state(data = after, input = total);
        tensor<fp16, [3]> result = read_state(input = total);
    } -> (result);
    func relu<ios18>(tensor<fp32, [3]> x) {
        tensor<fp32, [3]> y = relu(x = x);
    } -> (y);
    func other_state<ios18>(state<tensor<fp16, [4]>> total, tensor<fp16, [4]> x) {
        tensor<fp16, [4]> before = read_state(input = total);
        tensor<fp16, [4]> y = add(x = before, y = x);
    } -> (y);
}"#;

fn builder() -> CoreMLModelBuilder {
    let files = [("tiny.mlmodelc/model.mil".to_string(), PROGRAM.into())];
    CoreMLModelBuilder::from_source(Source::memory(files.into()), "tiny.mlmodelc")
        .engine(EngineKind::Portable)
}

fn open(function: &str) -> CoreMLModel {
    builder().function(function).load().unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor
        .to_dtype(DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

#[test]
fn a_model_says_what_it_takes_and_gives() {
    let model = open("main");
    assert_eq!(model.engine(), EngineKind::Portable);
    let names: Vec<_> = model.functions().iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["main", "step", "step_back", "relu", "other_state"]);
    let inputs: Vec<_> = model.inputs().iter().map(|f| f.name.as_str()).collect();
    assert_eq!(inputs, ["x", "n"]);
    let FeatureType::MultiArray(x) = &model.inputs()[0].ty else {
        panic!("not an array")
    };
    assert_eq!((x.dtype, x.shape.as_slice()), (ElementType::Fp16, &[2, 3][..]));
    assert_eq!(open("step").states()[0].name, "total");
}

#[test]
fn all_outputs_come_by_name_in_their_declared_dtypes() {
    let model = open("main");
    // Strided, of another dtype, and given in another order.
    let x = Tensor::arange(0f64, 6.0, &Device::Cpu)
        .unwrap()
        .reshape((3, 2))
        .unwrap()
        .t()
        .unwrap();
    let n = Tensor::new(&[10i64, 20, 30], &Device::Cpu).unwrap();
    let outputs = model.predict(&[("n", &n), ("x", &x)]).unwrap();
    assert_eq!(outputs.names().collect::<Vec<_>>(), ["y", "twice"]);
    let (y, twice) = (outputs.tensor("y").unwrap(), outputs.tensor("twice").unwrap());
    assert_eq!((y.dtype(), y.dims()), (DType::F16, &[2, 3][..]));
    assert_eq!(numbers(&y), [10.0, 22.0, 34.0, 11.0, 23.0, 35.0]);
    assert_eq!(twice.dtype(), DType::I32);
    assert_eq!(twice.to_vec1::<i32>().unwrap(), [20, 40, 60]);
    assert_eq!(numbers(&model.forward(&[&x, &n]).unwrap()), numbers(&y));
}

#[test]
fn wrong_inputs_are_refused_before_the_engine_sees_them() {
    let model = open("main");
    let x = Tensor::zeros((2, 3), DType::F16, &Device::Cpu).unwrap();
    let big = Tensor::new(&[1i64, 2, 1 << 40], &Device::Cpu).unwrap();
    let rows: [(&[(&str, &Tensor)], &str); 3] = [
        (
            &[("x", &x)],
            r#"function "main" was not given: "n" (a tensor int32 [3]); given: "x""#,
        ),
        (
            &[("x", &x), ("n", &x)],
            r#"input "n": shape [2, 3] is not allowed; allowed: [3]"#,
        ),
        (
            &[("x", &x), ("n", &big)],
            r#"input "n" (int32): element 2 is 1099511627776; allowed: whole numbers from -2147483648 to 2147483647"#,
        ),
    ];
    for (inputs, wanted) in rows {
        assert_eq!(model.predict(inputs).unwrap_err().to_string(), wanted);
    }
    let words = builder().function("none").load().unwrap_err().to_string();
    assert!(
        words.contains(r#"no function "none"; it has: "main", "step""#),
        "{words}"
    );
}

#[test]
fn functions_share_one_state_and_forks_go_their_own_way() {
    let step = open("step");
    let back = step.with_function("step_back").unwrap();
    let x = vector(&[1.0, 2.0, 3.0]);
    let mut state = step.make_state().unwrap();
    for _ in 0..3 {
        step.predict_with_state(&[("x", &x)], &mut state).unwrap();
    }
    let mut fork = state.fork().unwrap();
    let outputs = back.predict_with_state(&[("x", &x)], &mut state).unwrap();
    assert_eq!(numbers(&outputs.tensor("result").unwrap()), [2.0, 4.0, 6.0]);
    assert_eq!(numbers(&state.read("total").unwrap()), [2.0, 4.0, 6.0]);
    assert_eq!(numbers(&fork.read("total").unwrap()), [3.0, 6.0, 9.0]);
    fork.write("total", &vector(&[100.0, 0.0, -1.0])).unwrap();
    let outputs = step.predict_with_state(&[("x", &x)], &mut fork).unwrap();
    assert_eq!(numbers(&outputs.tensor("result").unwrap()), [101.0, 2.0, 2.0]);
    state.reset().unwrap();
    assert_eq!(numbers(&state.read("total").unwrap()), [0.0; 3]);
}

#[test]
fn a_state_of_other_declarations_is_refused_and_left_alone() {
    let mut state = open("step").make_state().unwrap();
    state.write("total", &vector(&[1.0, 1.0, 1.0])).unwrap();
    let other = open("other_state");
    let x = Tensor::zeros(4, DType::F16, &Device::Cpu).unwrap();
    let error = other.predict_with_state(&[("x", &x)], &mut state).unwrap_err();
    assert!(matches!(error, Error::StateMismatch { .. }), "{error}");
    assert!(matches!(
        other.predict(&[("x", &x)]),
        Err(Error::StateNeeded { .. })
    ));
    assert_eq!(numbers(&state.read("total").unwrap()), [1.0; 3]);
}

#[test]
fn threads_with_states_of_their_own_predict_on_one_model_at_once() {
    let model = open("step");
    let totals: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let run = |k: u8| {
            let (model, x) = (model.clone(), vector(&[f32::from(k); 3]));
            move || {
                let mut state = model.make_state().unwrap();
                for _ in 0..50 {
                    model.predict_with_state(&[("x", &x)], &mut state).unwrap();
                }
                numbers(&state.read("total").unwrap())
            }
        };
        let threads: Vec<_> = (1..=4).map(|k| scope.spawn(run(k))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(totals, [[50.0; 3], [100.0; 3], [150.0; 3], [200.0; 3]]);
}

#[test]
fn every_choice_of_the_builder_runs_the_model() {
    let x = vector(&[-1.0, 0.5, 2.0]);
    for numerics in [Numerics::Default, Numerics::Faithful, Numerics::Fast] {
        for threads in [0, 1, 2] {
            let model = builder()
                .function("relu")
                .numerics(numerics)
                .threads(threads)
                .load()
                .unwrap();
            let y = Module::forward(&model, &x).unwrap();
            assert_eq!(numbers(&y), [0.0, 0.5, 2.0], "{numerics:?} {threads}");
        }
    }
}

#[test]
fn what_is_no_model_is_an_error_with_the_file_and_the_place() {
    let text = PROGRAM.replace("relu(x = x)", "relu(x = absent)");
    let files = [("bad.mlmodelc/model.mil".to_string(), text.into())];
    let error = CoreMLModelBuilder::from_source(Source::memory(files.into()), "bad.mlmodelc")
        .load()
        .unwrap_err();
    assert!(matches!(error, Error::Open { .. }));
    let words = error.to_string();
    assert!(words.contains("model.mil") && words.contains("absent"), "{words}");
}
