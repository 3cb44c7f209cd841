//! Values that are no arrays, the devices, the plan, and what a prediction allocates.

mod common;

use candle_coreml_apple::framework::{self, Model};
use candle_coreml_apple::plan::ComputeDevice;
use candle_coreml_apple::{ArrayRef, Element, Error, LoadOptions, OsVersion, OwnedValue, Value};
use candle_coreml_apple_fake::{Behaviour, NEURAL_ENGINE_CORES, arrays_made, live};
use candle_coreml_mil::{Feature, FeatureType, FunctionDescription};
use common::{Folder, PROGRAM, model, start};
use std::collections::BTreeMap;

fn mac(major: u32, minor: u32) -> OsVersion {
    OsVersion {
        mac: true,
        major,
        minor,
    }
}

/// A function that gives what it takes, with features of these types; the last may be left out.
fn echo(types: &[(&str, FeatureType)]) -> FunctionDescription {
    let feature = |(name, ty): &(&str, FeatureType)| Feature {
        name: (*name).to_string(),
        description: String::new(),
        ty: ty.clone(),
        optional: false,
    };
    let features: Vec<Feature> = types.iter().map(feature).collect();
    FunctionDescription {
        name: "main".to_string(),
        inputs: features.clone(),
        outputs: features,
        states: Vec::new(),
    }
}

#[test]
fn strings_numbers_dictionaries_and_sequences_come_back_as_they_went() {
    let _one = start();
    let folder = Folder::new("values");
    let path = model(&folder, "two.mlmodelc", PROGRAM);
    let before = live();
    let words = BTreeMap::from([("cat".to_string(), 0.25), ("dög".to_string(), 0.75)]);
    let classes = BTreeMap::from([(-3_i64, 0.5), (7, 0.125)]);
    let texts = ["one".to_string(), String::new(), "drei \u{1f600}".to_string()];
    let numbers = [i64::MIN, 0, i64::MAX];
    let keys = |integer_keys| FeatureType::Dictionary { integer_keys };
    let elements = |integer_elements| FeatureType::Sequence { integer_elements };
    let rows = [
        (
            "text",
            FeatureType::String,
            Value::String("grüße"),
            OwnedValue::String("grüße".to_string()),
        ),
        (
            "whole",
            FeatureType::Int64,
            Value::Int64(i64::MIN),
            OwnedValue::Int64(i64::MIN),
        ),
        (
            "real",
            FeatureType::Double,
            Value::Double(-1.5e300),
            OwnedValue::Double(-1.5e300),
        ),
        (
            "words",
            keys(false),
            Value::Strings(&words),
            OwnedValue::Strings(words.clone()),
        ),
        (
            "classes",
            keys(true),
            Value::Integers(&classes),
            OwnedValue::Integers(classes.clone()),
        ),
        (
            "texts",
            elements(false),
            Value::StringSequence(&texts),
            OwnedValue::StringSequence(texts.to_vec()),
        ),
        (
            "numbers",
            elements(true),
            Value::IntegerSequence(&numbers),
            OwnedValue::IntegerSequence(numbers.to_vec()),
        ),
    ];
    let types: Vec<_> = rows.iter().map(|(name, ty, _, _)| (*name, ty.clone())).collect();
    let model = Model::load(&path, &LoadOptions::default(), 1, Some(&echo(&types)), mac(15, 0)).unwrap();
    let _echoes = Behaviour::Echoes.on();
    let inputs: Vec<_> = rows.iter().map(|(name, _, value, _)| (*name, *value)).collect();
    let expected: Vec<_> = rows
        .iter()
        .map(|(name, _, _, value)| ((*name).to_string(), value.clone()))
        .collect();
    for _ in 0..3 {
        assert_eq!(model.predict(&inputs, None).unwrap(), expected);
    }
    // What is left out is missing from the inputs, and not a value of nothing.
    let error = model.predict(&inputs[..6], None).unwrap_err().to_string();
    assert!(error.contains("numbers"), "{error}");
    let empty: [i64; 0] = [];
    let again = [&inputs[..6], &[("numbers", Value::IntegerSequence(&empty))]].concat();
    assert_eq!(
        model.predict(&again, None).unwrap()[6].1,
        OwnedValue::IntegerSequence(Vec::new())
    );
    drop(model);
    assert_eq!(live(), before, "every value was let go");
}

#[test]
fn devices_are_listed_from_macos_14_on() {
    let _one = start();
    let before = live();
    let engine = ComputeDevice::NeuralEngine {
        cores: NEURAL_ENGINE_CORES,
    };
    assert_eq!(
        framework::devices(mac(14, 0)).unwrap(),
        [ComputeDevice::Cpu, engine]
    );
    assert!(matches!(
        framework::devices(mac(13, 6)),
        Err(Error::System { .. })
    ));
    assert_eq!(live(), before);
}

#[test]
fn a_plan_says_for_each_operation_where_it_runs_and_at_what_cost() {
    let _one = start();
    let folder = Folder::new("plan");
    let program = r#"program(1.3) {
        func main<ios18>(tensor<fp32, [2]> x, tensor<bool, []> up) {
            tensor<fp32, [2]> one = const()[val = tensor<fp32, [2]>([1, 2])];
            tensor<fp32, [2]> moved = cond(pred = up)
                () { tensor<fp32, [2]> a = add(x = x, y = one); } -> (a)
                () { tensor<fp32, [2]> b = sub(x = x, y = one); } -> (b);
            tensor<fp32, [2]> y = mul(x = moved, y = moved);
        } -> (y);
    }"#;
    let path = model(&folder, "branch.mlmodelc", program);
    candle_coreml_mil::Model::open(&path).unwrap();
    let before = live();
    for behaviour in [None, Some(Behaviour::OtherThread)] {
        let _on = behaviour.map(Behaviour::on);
        let plan = framework::compute_plan(&path, &LoadOptions::default(), 1, mac(15, 0)).unwrap();
        let rows: Vec<_> = plan
            .operations
            .iter()
            .map(|o| {
                (
                    o.operator.as_str(),
                    o.outputs.join(" "),
                    o.preferred,
                    o.supported.len(),
                    o.cost,
                )
            })
            .collect();
        let engine = Some(ComputeDevice::NeuralEngine {
            cores: NEURAL_ENGINE_CORES,
        });
        let cost = Some(0.25);
        assert_eq!(
            rows,
            [
                ("ios18.const", "one".to_string(), None, 0, None),
                (
                    "ios18.cond",
                    "moved".to_string(),
                    Some(ComputeDevice::Cpu),
                    1,
                    cost
                ),
                ("ios18.add", "a".to_string(), engine, 2, cost),
                ("ios18.sub", "b".to_string(), engine, 2, cost),
                ("ios18.mul", "y".to_string(), engine, 2, cost),
            ]
        );
        assert!(plan.to_string().contains("Neural Engine"), "{plan}");
    }
    let missing = folder.0.join("none.mlmodelc");
    let error = framework::compute_plan(&missing, &LoadOptions::default(), 1, mac(15, 0)).unwrap_err();
    assert!(matches!(error, Error::CoreMl { code: 3, .. }), "{error}");
    let old = framework::compute_plan(&path, &LoadOptions::default(), 1, mac(14, 3));
    assert!(matches!(old, Err(Error::System { .. })));
    assert_eq!(live(), before);
}

/// Inputs and outputs of a step stay in the arrays of the first.
#[test]
fn a_step_that_was_made_before_makes_no_array() {
    let _one = start();
    let folder = Folder::new("reuse");
    let path = model(&folder, "two.mlmodelc", PROGRAM);
    let file = candle_coreml_mil::Model::open(&path).unwrap();
    let described = file
        .description()
        .functions
        .iter()
        .find(|f| f.name == "main")
        .unwrap();
    let options = LoadOptions {
        function: Some("main".to_string()),
        ..LoadOptions::default()
    };
    let model = Model::load(&path, &options, 2, Some(described), mac(15, 0)).unwrap();
    let zeros = [0; 12];
    let given = |shape, bytes| {
        Value::Array(ArrayRef {
            shape,
            element: Element::F16,
            bytes,
            owner: None,
        })
    };
    let inputs = [("x", given(&[2, 3], &zeros[..])), ("y", given(&[3], &zeros[..6]))];
    let step = || drop(model.predict(&inputs, None).unwrap());
    let start = arrays_made();
    step();
    // Two inputs and two outputs.
    assert_eq!(arrays_made() - start, 4);
    (0..100).for_each(|_| step());
    assert_eq!(arrays_made() - start, 4);
    // Outputs that Core ML does not write where it was asked to are arrays of its own.
    let _padded = Behaviour::PaddedOutputs.on();
    step();
    assert_eq!(arrays_made() - start, 6);
}
