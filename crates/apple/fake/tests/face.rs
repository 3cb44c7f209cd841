//! Pictures, classifiers and optional inputs through `CoreMLModel`: the same on both engines.

mod common;

use candle_core::{Device, Tensor};
use candle_coreml::{
    ColorSpace, CoreMLModel, CoreMLModelBuilder, Description, Dictionary, ElementType, EngineKind, Feature,
    FeatureType, Flexibility, Image, ImageDescription, Pixels, Value,
};
use candle_coreml_apple_fake::{Behaviour, live};
use candle_coreml_mil::{PackageWriter, parse_program};
use common::{Folder, own_caches, start};
use half::f16;
use std::path::{Path, PathBuf};

const ENGINES: [EngineKind; 2] = [EngineKind::Apple, EngineKind::Portable];

/// A package of a program, with a description that `edit` changed.
fn package(folder: &Folder, name: &str, program: &str, edit: impl FnOnce(&mut Description)) -> PathBuf {
    let path = folder.0.join(name);
    let program = parse_program(program, name).unwrap();
    let mut description = Description::from_program(&program);
    edit(&mut description);
    PackageWriter::create(&path)
        .unwrap()
        .finish(&program, &description)
        .unwrap();
    path
}

fn open(path: &Path, engine: EngineKind) -> CoreMLModel {
    CoreMLModelBuilder::new(path).engine(engine).load().unwrap()
}

fn image(color: ColorSpace, flexibility: Flexibility) -> FeatureType {
    FeatureType::Image(ImageDescription {
        width: 5,
        height: 3,
        color,
        flexibility,
    })
}

fn picture(color: ColorSpace, width: usize, height: usize) -> Image {
    let count = width * height;
    let pixels = match color {
        ColorSpace::Grayscale => Pixels::Gray((0..count).map(|v| (v * 7) as u8).collect()),
        ColorSpace::GrayscaleFp16 => {
            Pixels::GrayF16((0..count).map(|v| f16::from_f32(v as f32 * 1.25)).collect())
        }
        ColorSpace::Rgb | ColorSpace::Bgr => Pixels::Rgb((0..3 * count).map(|v| (v * 5) as u8).collect()),
    };
    Image::new(width, height, pixels).unwrap()
}

/// Halves each channel by its own factor, so that an exchange of channels shows.
const COLOURS: &str = r#"program(1.0) {
    func main<ios16>(tensor<fp32, [1, 3, 3, 5]> x) {
        tensor<fp32, [1, 3, 1, 1]> each = const()[val = tensor<fp32, [1, 3, 1, 1]>([[[[1.0]], [[0.5]], [[0.25]]]])];
        tensor<fp32, [1, 3, 3, 5]> y = mul(x = x, y = each);
    } -> (y);
}"#;

const GREY: &str = r#"program(1.0) {
    func main<ios16>(tensor<fp32, [1, 1, 3, 5]> x) {
        tensor<fp32, []> half = const()[val = fp32(0.5)];
        tensor<fp32, [1, 1, 3, 5]> y = mul(x = x, y = half);
    } -> (y);
}"#;

#[test]
fn pictures_are_the_same_on_both_engines_and_nothing_is_left_of_them() {
    let _one = start();
    let folder = Folder::new("pictures");
    own_caches(&folder);
    let before = live();
    let rows = [
        ("rgb", COLOURS, ColorSpace::Rgb),
        ("bgr", COLOURS, ColorSpace::Bgr),
        ("grey", GREY, ColorSpace::Grayscale),
        ("grey16", GREY, ColorSpace::GrayscaleFp16),
    ];
    for (name, program, color) in rows {
        let path = package(&folder, &format!("{name}.mlpackage"), program, |description| {
            let function = &mut description.functions[0];
            function.inputs[0].ty = image(color, Flexibility::Fixed);
            function.outputs[0].ty = image(color, Flexibility::Fixed);
        });
        let given = picture(color, 5, 3);
        let value = Value::Image(given.clone());
        let [apple, portable] = ENGINES.map(|engine| {
            let model = open(&path, engine);
            // Again and again, so that what is kept from one to the next would show.
            let made = (0..4).map(
                |_| match model.predict_values(&[("x", &value)]).unwrap().get("y") {
                    Some(Value::Image(image)) => image.clone(),
                    other => panic!("{name} {engine:?}: {other:?}"),
                },
            );
            made.last().unwrap()
        });
        assert_eq!(apple, portable, "{name}");
        assert_ne!(apple, given, "{name}");
        assert_eq!((apple.width(), apple.height()), (5, 3), "{name}");
    }
    assert_eq!(live(), before, "every buffer was let go");
}

#[test]
fn a_buffer_that_cannot_be_made_or_locked_is_an_error_that_names_the_input() {
    let _one = start();
    let folder = Folder::new("no-buffer");
    own_caches(&folder);
    let path = package(&folder, "grey.mlpackage", GREY, |description| {
        description.functions[0].inputs[0].ty = image(ColorSpace::Grayscale, Flexibility::Fixed);
    });
    let model = open(&path, EngineKind::Apple);
    let given = Value::Image(picture(ColorSpace::Grayscale, 5, 3));
    let before = live();
    for (behaviour, wanted) in [
        (Behaviour::NoPixelBuffer, "-6662"),
        (Behaviour::LockFails, "-6661"),
    ] {
        let _on = behaviour.on();
        let mut text = String::new();
        let error = model.predict_values(&[("x", &given)]).unwrap_err();
        let mut next: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = next {
            text += &format!("{error}; ");
            next = error.source();
        }
        assert!(
            text.contains(wanted) && text.contains("\"x\""),
            "{behaviour:?}: {text}"
        );
    }
    assert_eq!(live(), before);
    model.predict_values(&[("x", &given)]).unwrap();
}

#[test]
fn sizes_of_pictures_are_those_of_the_description() {
    let _one = start();
    let folder = Folder::new("sizes");
    own_caches(&folder);
    let program = GREY.replace("[1, 1, 3, 5]", "[1, 1, ?, ?]");
    let rows = [
        Flexibility::Enumerated(vec![vec![3, 5], vec![4, 4]]),
        Flexibility::Ranges(vec![(3, Some(4)), (4, None)]),
    ];
    for (at, sizes) in rows.into_iter().enumerate() {
        let path = package(&folder, &format!("{at}.mlpackage"), &program, |description| {
            let function = &mut description.functions[0];
            function.inputs[0].ty = image(ColorSpace::Grayscale, sizes.clone());
            function.outputs[0].ty = image(ColorSpace::Grayscale, sizes.clone());
        });
        for engine in ENGINES {
            let model = open(&path, engine);
            for (width, height, good) in [(5, 3, true), (4, 4, true), (4, 2, false)] {
                let done =
                    model.predict_values(&[("x", &picture(ColorSpace::Grayscale, width, height).into())]);
                assert_eq!(
                    done.is_ok(),
                    good,
                    "{engine:?} {sizes:?} {width} x {height}: {done:?}"
                );
            }
        }
    }
}

const SCALED: &str = r#"program(1.0) {
    func main<ios16>(tensor<fp32, [2]> x, tensor<fp32, [2]> scale) {
        tensor<fp32, [2]> y = mul(x = x, y = scale);
    } -> (y);
}"#;

#[test]
fn an_optional_input_that_is_left_out_has_its_default_on_both_engines() {
    let _one = start();
    let folder = Folder::new("optional");
    own_caches(&folder);
    let path = package(&folder, "scaled.mlpackage", SCALED, |description| {
        let scale = &mut description.functions[0].inputs[1];
        scale.optional = true;
        let FeatureType::MultiArray(array) = &mut scale.ty else {
            panic!("{scale:?}")
        };
        assert_eq!(array.dtype, ElementType::Fp32);
        array.default_value = Some(3.0);
    });
    let x = Tensor::new(&[1f32, -2.0], &Device::Cpu).unwrap();
    let scale = Tensor::new(&[10f32, 20.0], &Device::Cpu).unwrap();
    for engine in ENGINES {
        let model = open(&path, engine);
        let result = |inputs: &[(&str, &Tensor)]| {
            let outputs = model.predict(inputs).unwrap();
            outputs.tensor("y").unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(result(&[("x", &x)]), [3.0, -6.0], "{engine:?}");
        assert_eq!(
            result(&[("x", &x), ("scale", &scale)]),
            [10.0, -40.0],
            "{engine:?}"
        );
        assert_eq!(result(&[("x", &x)]), [3.0, -6.0], "{engine:?} again");
        assert!(model.predict(&[("scale", &scale)]).is_err(), "x is not optional");
    }
}

#[test]
fn labels_and_probabilities_are_the_same_on_both_engines() {
    let _one = start();
    let folder = Folder::new("classes");
    own_caches(&folder);
    let program = |classes: &str, label: &str| {
        format!(
            "program(1.0) {{
    func main<ios16>(tensor<fp32, [3]> x) {{
        {label} label, dict<{label}, fp64> probabilities = classify(probabilities = x, classes = {classes});
    }} -> (label, probabilities);
}}"
        )
    };
    let x = Tensor::new(&[0.25f32, 0.5, 0.125], &Device::Cpu).unwrap();
    let texts = program(r#"list<string, 3>(["cat", "dög", ""])"#, "string");
    let numbers = program("list<int64, 3>([7, -1, 9])", "int64");
    for (name, program, whole) in [("texts", texts, false), ("numbers", numbers, true)] {
        let path = package(&folder, &format!("{name}.mlpackage"), &program, |description| {
            // Programs without a description have arrays only.
            let output = |name: &str, ty| Feature {
                name: name.to_string(),
                description: String::new(),
                ty,
                optional: false,
            };
            let label = if whole {
                FeatureType::Int64
            } else {
                FeatureType::String
            };
            description.functions[0].outputs = vec![
                output("label", label),
                output("probabilities", FeatureType::Dictionary { integer_keys: whole }),
            ];
        });
        let [apple, portable] = ENGINES.map(|engine| {
            let outputs = open(&path, engine).predict(&[("x", &x)]).unwrap();
            ["label", "probabilities"].map(|name| outputs.get(name).unwrap().clone())
        });
        // Values have no equality; their texts hold all of these.
        assert_eq!(format!("{apple:?}"), format!("{portable:?}"), "{name}");
        match (&apple[0], &apple[1]) {
            (Value::String(label), Value::Dictionary(Dictionary::Strings(all))) => {
                assert_eq!((label.as_str(), all.len(), all["dög"]), ("dög", 3, 0.5));
            }
            (Value::Int64(label), Value::Dictionary(Dictionary::Integers(all))) => {
                assert_eq!((*label, all.len(), all[&-1]), (-1, 3, 0.5));
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}
