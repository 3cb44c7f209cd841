//! Laws that hold for every program: what is printed or written reads back as it was.

use bytes::Bytes;
use candle_coreml_mil::*;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const SEED: RngSeed = RngSeed::Fixed(7);

fn name() -> impl Strategy<Value = String> {
    prop_oneof![4 => "[a-z_][a-z0-9_]{0,6}", 1 => "[ -~é\n\t]{1,6}"]
}

fn tensor_type() -> impl Strategy<Value = TensorType> {
    let dims = prop::collection::vec(prop_oneof![9 => 1usize..4, 1 => Just(0)], 0..4);
    (prop::sample::select(&DType::ALL[..]), dims).prop_map(|(dtype, dims)| TensorType::fixed(dtype, &dims))
}

fn value_type() -> impl Strategy<Value = ValueType> {
    let dim = prop_oneof![3 => (0usize..9).prop_map(Dim::Fixed), 1 => Just(Dim::Unknown)];
    let tensor = (
        prop::sample::select(&DType::ALL[..]),
        prop::collection::vec(dim, 0..4),
    )
        .prop_map(|(dtype, shape)| ValueType::Tensor(TensorType { dtype, shape }));
    tensor.prop_recursive(2, 6, 3, |inner| {
        prop_oneof![
            (inner.clone(), prop::option::of(0usize..5)).prop_map(|(element, len)| ValueType::List {
                element: Box::new(element),
                len
            }),
            prop::collection::vec(inner.clone(), 0..3).prop_map(ValueType::Tuple),
            (inner.clone(), inner).prop_map(|(key, value)| ValueType::Dictionary {
                key: Box::new(key),
                value: Box::new(value)
            }),
            tensor_type().prop_map(|t| ValueType::State(Box::new(ValueType::Tensor(t)))),
        ]
    })
}

/// Any bytes become elements of the type: booleans are 0 or 1, unused bits 0.
fn tensor_value() -> impl Strategy<Value = Value> {
    (
        tensor_type(),
        prop::collection::vec(any::<u8>(), 27 * 8),
        prop::collection::vec("\\PC{0,4}", 27),
        0..4usize,
    )
        .prop_map(|(mut ty, mut raw, mut strings, unknown)| {
            let count = ty.element_count().unwrap_or(0);
            let data = match ty.byte_len() {
                None => {
                    strings.truncate(count);
                    ValueData::Strings(strings)
                }
                Some(len) => {
                    raw.truncate(len);
                    if ty.dtype == DType::Bool {
                        raw.iter_mut().for_each(|b| *b &= 1);
                    }
                    let used = count * ty.dtype.bits().unwrap_or(8) % 8;
                    if let (true, Some(last)) = (used > 0, raw.last_mut()) {
                        *last &= (1 << used) - 1;
                    }
                    ValueData::Tensor(Bytes::from(raw))
                }
            };
            let packed = ty.dtype.bits().is_some_and(|bits| bits < 8);
            if let (Some(dim), false) = (ty.shape.get_mut(unknown), packed || count == 0) {
                *dim = Dim::Unknown;
            }
            Value {
                ty: ValueType::Tensor(ty),
                data,
            }
        })
}

fn value() -> impl Strategy<Value = Value> {
    let list = |inner: BoxedStrategy<Value>| {
        (inner, 0usize..4, any::<bool>()).prop_map(|(element, n, sized)| Value {
            ty: ValueType::List {
                element: Box::new(element.ty.clone()),
                len: sized.then_some(n),
            },
            data: ValueData::List(vec![element; n]),
        })
    };
    let tuple = |inner: BoxedStrategy<Value>| {
        prop::collection::vec(inner, 0..3).prop_map(|parts| Value {
            ty: ValueType::Tuple(parts.iter().map(|p| p.ty.clone()).collect()),
            data: ValueData::Tuple(parts),
        })
    };
    let dictionary = |inner: BoxedStrategy<Value>| {
        (inner.clone(), inner, 0usize..3).prop_map(|(key, value, n)| Value {
            ty: ValueType::Dictionary {
                key: Box::new(key.ty.clone()),
                value: Box::new(value.ty.clone()),
            },
            data: ValueData::Dictionary(vec![(key, value); n]),
        })
    };
    tensor_value().prop_recursive(2, 6, 3, move |inner| {
        let inner = inner.boxed();
        prop_oneof![list(inner.clone()), tuple(inner.clone()), dictionary(inner)]
    })
}

/// Sorted by name, each name once: the form that the protobuf's maps have.
fn attributes() -> impl Strategy<Value = Attributes> {
    prop::collection::btree_map(name(), value(), 0..3).prop_map(|map| map.into_iter().collect())
}

/// An operation without names of values: those are given when the block is put together.
#[derive(Debug, Clone)]
struct Draft {
    op_type: String,
    inputs: Vec<(String, Vec<Result<Value, prop::sample::Index>>)>,
    outputs: Vec<(String, ValueType)>,
    attributes: Attributes,
    blocks: Vec<Vec<Draft>>,
}

fn draft() -> impl Strategy<Value = Draft> {
    let binding = prop_oneof![any::<prop::sample::Index>().prop_map(Err), value().prop_map(Ok)];
    let inputs = prop::collection::btree_map(name(), prop::collection::vec(binding, 0..3), 0..3);
    let outputs = prop::collection::vec((name(), value_type()), 0..3);
    let flat =
        (name(), inputs, outputs, attributes()).prop_map(|(op_type, inputs, outputs, attributes)| Draft {
            op_type,
            inputs: inputs.into_iter().collect(),
            outputs,
            attributes,
            blocks: Vec::new(),
        });
    flat.prop_recursive(2, 8, 2, |inner| {
        let blocks = prop::collection::vec(prop::collection::vec(inner.clone(), 0..3), 0..3);
        (inner, blocks).prop_map(|(draft, blocks)| Draft { blocks, ..draft })
    })
}

/// Gives every value a name of its own and every use the name of a value in sight.
fn assemble(drafts: Vec<Draft>, visible: &mut Vec<String>, inputs: Vec<NamedType>) -> Block {
    let mark = visible.len();
    visible.extend(inputs.iter().map(|n| n.name.clone()));
    let mut operations = Vec::new();
    for draft in drafts {
        let pick = |index: prop::sample::Index| index.get(visible).clone();
        let bind = |binding| match binding {
            Ok(value) => Argument::Value(value),
            Err(index) => Argument::Name(pick(index)),
        };
        let inputs = draft
            .inputs
            .into_iter()
            .map(|(n, list)| (n, list.into_iter().map(bind).collect()))
            .collect();
        let blocks = draft
            .blocks
            .into_iter()
            .map(|b| assemble(b, visible, Vec::new()))
            .collect();
        let mut outputs = Vec::new();
        for (name, ty) in draft.outputs {
            let name = format!("{name}#{}", visible.len());
            visible.push(name.clone());
            outputs.push(NamedType { name, ty });
        }
        operations.push(Operation {
            op_type: draft.op_type,
            inputs,
            outputs,
            attributes: draft.attributes,
            blocks,
        });
    }
    let outputs = visible.last().cloned().into_iter().collect();
    visible.truncate(mark);
    Block {
        inputs: Vec::new(),
        operations,
        outputs,
        attributes: Attributes::new(),
    }
}

fn program() -> impl Strategy<Value = Program> {
    let opset = prop::sample::select(&["CoreML5", "CoreML7", "CoreML8", "CoreML9", "Other"][..]);
    let function = (
        opset,
        value_type(),
        attributes(),
        prop::collection::vec(draft(), 0..4),
    );
    let version = prop::sample::select(&[ProgramVersion::V1_0, ProgramVersion::V1_3][..]);
    let functions = prop::collection::btree_map(name(), function, 0..3);
    (version, functions, attributes()).prop_map(|(version, functions, attributes)| Program {
        version,
        functions: functions
            .into_iter()
            .map(|(name, (opset, ty, attributes, drafts))| {
                let inputs = vec![NamedType {
                    name: "x".to_string(),
                    ty,
                }];
                let body = assemble(drafts, &mut vec!["x".to_string()], Vec::new());
                Function {
                    name,
                    opset: opset.to_string(),
                    inputs,
                    attributes,
                    body,
                }
            })
            .collect(),
        attributes,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, rng_seed: SEED, ..ProptestConfig::default() })]

    #[test]
    fn printed_programs_parse_to_themselves(program in program()) {
        prop_assert_eq!(program.check(), Ok(()));
        let text = print_program(&program);
        match parse_program(&text, "printed") {
            Ok(parsed) => prop_assert_eq!(parsed, program, "{}", text),
            Err(error) => prop_assert!(false, "{}\n{}", error, text),
        }
    }

    #[test]
    fn written_packages_read_back_as_they_were(program in program()) {
        let folder = std::env::temp_dir().join(format!("candle-coreml-write-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("model.mlpackage");
        let _ = std::fs::remove_dir_all(&path);
        let mut description = Description::from_program(&program);
        // Element types that only exist inside programs cannot be described.
        for f in &mut description.functions {
            f.inputs.clear();
            f.outputs.clear();
            f.states.clear();
        }
        let written = PackageWriter::create(&path).and_then(|w| w.finish(&program, &description));
        if program.functions.is_empty() {
            prop_assert!(written.is_err());
            return Ok(());
        }
        written.unwrap();
        let model = Model::open(&path).unwrap();
        // A package does not say in which dialect it is printed: its specification version does.
        let version = match description.specification_version {
            9.. => ProgramVersion::V1_3,
            _ => ProgramVersion::V1_0,
        };
        let program = Program { version, ..program };
        prop_assert_eq!(model.program(), Some(&program));
        prop_assert_eq!(model.description(), &description);
    }

    #[test]
    fn parsing_any_text_never_panics(text in "(program\\(1.3\\) \\{ func m<ios18>\\()?[a-z<>\\[\\](){}=,;?0-9\"`\\\\ -]{0,60}") {
        let _ = parse_program(&text, "any");
    }
}
