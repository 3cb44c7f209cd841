//! Programs whose path or shapes depend on values: loops, choices, lists, states in them, and what is refused.

#![allow(clippy::unwrap_used)] // a test stops at what it did not expect

use candle_coreml_mil::{Model as File, Source};
use candle_coreml_portable::{Array, Buffer, Data, Error, Label, Model, Numerics, Options, OwnedArray};
use std::sync::Arc;

fn open_with(text: &str, options: Options) -> Result<Model, Error> {
    let files = [("m.mlmodelc/model.mil".to_string(), text.to_string().into())];
    let file = File::open_source(Source::memory(files.into()), "m.mlmodelc").unwrap();
    Model::load(Arc::new(file), None, options)
}

/// A function of the given parameters and body, opened.
fn open(function: &str) -> Model {
    open_with(&program(function), Options::default()).unwrap()
}

fn program(function: &str) -> String {
    format!("program(1.3) {{ func main<ios18>{function} }}")
}

fn f32s(shape: &'static [usize], data: &'static [f32]) -> Array<'static> {
    let data = Data::F32(data);
    Array { shape, data }
}

fn i32s(shape: &'static [usize], data: &'static [i32]) -> Array<'static> {
    let data = Data::I32(data);
    Array { shape, data }
}

/// The shape and the elements of a result.
fn flat(value: &OwnedArray) -> (Vec<usize>, Vec<f32>) {
    let elements = match &value.data {
        Buffer::F32(v) => v.clone(),
        Buffer::I32(v) => v.iter().map(|&x| x as f32).collect(),
        _ => value.to_f32(),
    };
    (value.shape.clone(), elements)
}

/// Runs a program in every configuration and compares all results, in their order.
fn check(function: &str, inputs: &[(&str, Array<'_>)], want: &[(&[usize], &[f32])]) {
    for (numerics, passes) in [
        (Numerics::Default, true),
        (Numerics::Default, false),
        (Numerics::Faithful, false),
    ] {
        let mut options = Options::default();
        (options.numerics, options.passes) = (numerics, passes);
        let model = open_with(&program(function), options).unwrap();
        let got = model.predict(inputs, None).unwrap();
        assert_eq!(got.len(), want.len());
        for ((name, value), (shape, elements)) in got.iter().zip(want) {
            let (have_shape, have) = flat(value);
            assert_eq!(have_shape, *shape, "{name} {numerics:?} passes {passes}");
            assert_eq!(have, *elements, "{name} {numerics:?} passes {passes}");
        }
    }
}

/// The nested loops of coremltools' own test, `while i < j: (while 2 i < i + 2: i += 1); i += 2`.
const NESTED: &str = "(tensor<fp32, [1]> x, tensor<fp32, [1]> y) {
    tensor<fp32, [1]> two = const()[val = tensor<fp32, [1]>([0x1p+1])];
    tensor<fp32, [1]> i, tensor<fp32, [1]> j = while_loop(loop_vars = (x, y))
        (tensor<fp32, [1]> a, tensor<fp32, [1]> b) {
            tensor<bool, [1]> more = less(x = a, y = b);
        } -> (more)
        (tensor<fp32, [1]> a, tensor<fp32, [1]> b) {
            tensor<fp32, [1]> inner = while_loop(loop_vars = (a))
                (tensor<fp32, [1]> c) {
                    tensor<fp32, [1]> twice = mul(x = two, y = c);
                    tensor<fp32, [1]> ahead = add(x = c, y = two);
                    tensor<bool, [1]> again = less(x = twice, y = ahead);
                } -> (again)
                (tensor<fp32, [1]> c) {
                    tensor<fp32, [1]> one = const()[val = tensor<fp32, [1]>([0x1p+0])];
                    tensor<fp32, [1]> next = add(x = c, y = one);
                } -> (next);
            tensor<fp32, [1]> far = add(x = inner, y = two);
        } -> (far, b);
} -> (i, j);";

#[test]
fn loops_run_inside_loops_and_see_the_values_around_them() {
    let inputs = [("x", f32s(&[1], &[0.0])), ("y", f32s(&[1], &[10.0]))];
    check(NESTED, &inputs, &[(&[1], &[10.0]), (&[1], &[10.0])]);
    let never = [("x", f32s(&[1], &[3.0])), ("y", f32s(&[1], &[2.0]))];
    check(NESTED, &never, &[(&[1], &[3.0]), (&[1], &[2.0])]);
}

#[test]
fn a_choice_inside_a_loop_is_made_anew_each_time() {
    // First 3 * 2, then + 2, then + 2: the first round multiplies.
    let function = "(tensor<fp32, [2]> x) {
        tensor<fp32, []> weight = const()[val = tensor<fp32, []>(0x1p+1)];
        int32 end, tensor<fp32, [2]> y = while_loop(loop_vars = (int32(0), x))
            (int32 i, tensor<fp32, [2]> v) { bool more = less(x = i, y = int32(3)); } -> (more)
            (int32 i, tensor<fp32, [2]> v) {
                bool later = greater(x = i, y = int32(0));
                tensor<fp32, [2]> w = cond(pred = later)
                    () { tensor<fp32, [2]> r = add(x = v, y = weight); } -> (r)
                    () { tensor<fp32, [2]> r = mul(x = v, y = weight); } -> (r);
                int32 next = add(x = i, y = int32(1));
            } -> (next, w);
    } -> (end, y);";
    let inputs = [("x", f32s(&[2], &[3.0, -1.0]))];
    check(function, &inputs, &[(&[], &[3.0]), (&[2], &[10.0, 2.0])]);
}

#[test]
fn both_sides_of_a_choice_may_use_the_same_names_and_give_what_they_were_given() {
    let function = "(tensor<fp32, [1]> x, tensor<bool, []> p, tensor<bool, []> q) {
        tensor<fp32, [1]> a, tensor<fp32, [1]> b = cond(pred = p)
            () { tensor<fp32, [1]> k = const()[val = tensor<fp32, [1]>([0x1p+0])];
                 tensor<fp32, [1]> r = add(x = x, y = k); } -> (r, k)
            () { tensor<fp32, [1]> k = const()[val = tensor<fp32, [1]>([0x1p+2])];
                 tensor<fp32, [1]> r = cond(pred = q)
                    () { tensor<fp32, [1]> s = mul(x = x, y = k); } -> (s)
                    () { } -> (x); } -> (r, k);
        bool always = const()[val = bool(true)];
        tensor<fp32, [1]> c = cond(pred = always)
            () { tensor<fp32, [1]> k = const()[val = tensor<fp32, [1]>([0x1p+3])];
                 tensor<fp32, [1]> r = add(x = a, y = k); } -> (r)
            () { tensor<fp32, [1]> r = relu(x = a); } -> (r);
    } -> (a, b, c);";
    let rows: [(i32, i32, [f32; 3]); 4] = [
        (1, 0, [6.0, 1.0, 14.0]),
        (1, 1, [6.0, 1.0, 14.0]),
        (0, 1, [20.0, 4.0, 28.0]),
        (0, 0, [5.0, 4.0, 13.0]),
    ];
    for (p, q, [a, b, c]) in rows {
        let (p, q) = ([p], [q]);
        let truth = |v| Array {
            shape: &[],
            data: Data::I32(v),
        };
        let inputs = [("x", f32s(&[1], &[5.0])), ("p", truth(&p)), ("q", truth(&q))];
        check(function, &inputs, &[(&[1], &[a]), (&[1], &[b]), (&[1], &[c])]);
    }
}

#[test]
fn a_choice_on_a_constant_leaves_one_graph() {
    let model = open(
        "(tensor<fp32, [1]> x) {
        tensor<fp32, [1]> y = cond(pred = bool(false))
            () { tensor<fp32, [1]> r = relu(x = x); } -> (r)
            () { tensor<fp32, [1]> r = add(x = x, y = x); } -> (r);
    } -> (y);",
    );
    assert_eq!(model.graph(&[[1].as_slice().into()]).unwrap().nodes.len(), 1);
    let got = model.predict(&[("x", f32s(&[1], &[2.0]))], None).unwrap();
    assert_eq!(flat(&got[0].1).1, [4.0]);
}

#[test]
fn lists_grow_and_places_never_written_are_zero() {
    let function = "(tensor<fp32, [2]> a, tensor<fp32, [2]> b) {
        list<tensor<fp32, [2]>, ?> l0 = make_list(init_length = int32(2), dynamic_length = bool(true),
            elem_shape = (int32(2)), dtype = string(\"fp32\"));
        tensor<fp32, [2]> first = list_read(ls = l0, index = int32(0));
        list<tensor<fp32, [2]>, ?> l1 = list_write(ls = l0, index = int32(0), value = a);
        list<tensor<fp32, [2]>, ?> l2 = list_write(ls = l1, index = int32(4), value = b);
        list<tensor<fp32, [2]>, ?> l3 = list_scatter(ls = l2, indices = tensor<int32, [2]>([2, 1]),
            value = tensor<fp32, [2, 2]>([[-0x1p+0, -0x1p+1], [-0x1p+2, -0x1.4p+2]]));
        tensor<fp32, [2]> still = list_read(ls = l1, index = int32(1));
        tensor<fp32, [3, 2]> some = list_gather(ls = l3, indices = tensor<int32, [3]>([4, 2, 3]));
        int32 n = list_length(ls = l3);
    } -> (first, still, some, n);";
    let inputs = [("a", f32s(&[2], &[1.0, 3.0])), ("b", f32s(&[2], &[2.0, 4.0]))];
    check(
        function,
        &inputs,
        &[
            (&[2], &[0.0, 0.0]),
            (&[2], &[0.0, 0.0]),
            (&[3, 2], &[2.0, 4.0, -1.0, -2.0, 0.0, 0.0]),
            (&[], &[5.0]),
        ],
    );
}

/// Appends `x * i` for `i` below `n` to a list and gathers all of it.
const APPEND: &str = "(tensor<fp32, [2]> x, tensor<int32, []> n) {
    list<tensor<fp32, [2]>, ?> empty = make_list(init_length = int32(1), elem_shape = (int32(2)));
    int32 end, list<tensor<fp32, [2]>, ?> full = while_loop(loop_vars = (int32(0), empty))
        (int32 i, list<tensor<fp32, [2]>, ?> l) { bool more = less(x = i, y = n); } -> (more)
        (int32 i, list<tensor<fp32, [2]>, ?> l) {
            fp32 f = cast(x = i, dtype = string(\"fp32\"));
            tensor<fp32, [2]> e = mul(x = x, y = f);
            list<tensor<fp32, [2]>, ?> m = list_write(ls = l, index = i, value = e);
            int32 next = add(x = i, y = int32(1));
        } -> (next, m);
    int32 count = list_length(ls = full);
    tensor<int32, [?]> all = range_1d(start = int32(0), end = count, step = int32(1));
    tensor<fp32, [?, 2]> y = list_gather(ls = full, indices = all);
    tensor<fp32, [?, 2]> z = add(x = y, y = x);
} -> (z);";

#[test]
fn a_loop_appends_to_a_list() {
    let inputs = [("x", f32s(&[2], &[1.0, 2.0])), ("n", i32s(&[], &[3]))];
    check(APPEND, &inputs, &[(&[3, 2], &[1.0, 2.0, 2.0, 4.0, 3.0, 6.0])]);
    let none = [("x", f32s(&[2], &[1.0, 2.0])), ("n", i32s(&[], &[0]))];
    check(APPEND, &none, &[(&[1, 2], &[1.0, 2.0])]);
}

#[test]
fn the_same_shapes_are_planned_once_however_often_a_loop_runs() {
    let model = open(APPEND);
    let run = |n: &'static [i32]| {
        let inputs = [("x", f32s(&[2], &[1.0, 2.0])), ("n", i32s(&[], n))];
        model.predict(&inputs, None).unwrap();
        model.plans()
    };
    let few = run(&[4]);
    assert_eq!(run(&[4]), few);
    // The last part of the program, whose shapes follow from n, is planned once more.
    assert_eq!(run(&[50]), few + 1);
}

#[test]
fn shapes_follow_from_values_one_after_the_other() {
    // The places of what is not zero, their number, a range as long, and a reshape by that number.
    let function = "(tensor<fp32, [3, 3]> x) {
        tensor<int32, [?, 2]> at = non_zero(x = x);
        tensor<int32, [2]> s = shape(x = at);
        int32 n = slice_by_index(x = s, begin = tensor<int32, [1]>([0]), end = tensor<int32, [1]>([1]),
            squeeze_mask = tensor<bool, [1]>([true]));
        tensor<int32, [?]> r = range_1d(start = int32(0), end = n, step = int32(2));
        int32 half = floor_div(x = n, y = int32(2));
        tensor<int32, [3]> want = stack(values = (half, int32(2), int32(2)), axis = int32(0));
        tensor<int32, [?, 2, 2]> pairs = reshape(x = at, shape = want);
        tensor<fp32, [?, ?]> ones = fill(shape = s, value = fp32(0x1p+0));
        tensor<fp32, [?]> sum = reduce_sum(x = ones, axes = tensor<int32, [1]>([1]), keep_dims = bool(false));
    } -> (at, r, pairs, sum);";
    let inputs = [("x", f32s(&[3, 3], &[3.0, 0.0, 0.0, 0.0, 4.0, 0.0, 5.0, 6.0, 0.0]))];
    let places = &[0.0, 0.0, 1.0, 1.0, 2.0, 0.0, 2.0, 1.0];
    check(
        function,
        &inputs,
        &[
            (&[4, 2], places),
            (&[2], &[0.0, 2.0]),
            (&[2, 2, 2], places),
            (&[4], &[2.0; 4]),
        ],
    );
}

#[test]
fn a_result_may_have_any_number_of_dimensions() {
    let function = "(tensor<int32, [?]> s) {
        tensor<fp32, [*]> y = fill(shape = s, value = fp32(0x1p+1));
    } -> (y);";
    check(
        function,
        &[("s", i32s(&[3], &[2, 1, 2]))],
        &[(&[2, 1, 2], &[2.0; 4])],
    );
    check(function, &[("s", i32s(&[1], &[3]))], &[(&[3], &[2.0; 3])]);
}

#[test]
fn attributes_may_be_computed_from_the_elements_of_an_input() {
    let function = "(tensor<fp32, [2, 3]> x, tensor<int32, [2]> v) {
        tensor<int32, [2]> w = add(x = v, y = tensor<int32, [2]>([0, 1]));
        tensor<fp32, [?, ?]> t = tile(x = x, reps = v);
        tensor<fp32, [?, ?]> s = slice_by_size(x = x, begin = tensor<int32, [2]>([0, 1]), size = v);
        tensor<fp32, [?, ?]> i = slice_by_index(x = x, begin = tensor<int32, [2]>([0, 0]), end = w);
        tensor<int32, [4]> p = concat(values = (v, v), axis = int32(0));
        tensor<fp32, [?, ?]> q = pad(x = i, pad = p, mode = string(\"constant\"), constant_val = fp32(0x1p+3));
        tensor<fp32, [?, ?, ?, ?]> e = expand_dims(x = s, axes = v);
    } -> (t, s, i, q, e);";
    let inputs = [
        ("x", f32s(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ("v", i32s(&[2], &[1, 2])),
    ];
    let tiled = &[1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 4.0, 5.0, 6.0];
    let eights = |middle: [f32; 3]| -> Vec<f32> {
        let mut row = vec![8.0];
        row.extend(middle);
        row.extend([8.0, 8.0]);
        row
    };
    let mut padded = vec![8.0; 6];
    padded.extend(eights([1.0, 2.0, 3.0]));
    padded.extend([8.0; 12]);
    check(
        function,
        &inputs,
        &[
            (&[2, 6], tiled),
            (&[1, 2], &[2.0, 3.0]),
            (&[1, 3], &[1.0, 2.0, 3.0]),
            (&[4, 6], &padded),
            (&[1, 1, 1, 2], &[2.0, 3.0]),
        ],
    );
}

const STATE: &str = "(state<tensor<fp16, [2]>> total, tensor<int32, []> n) {
    tensor<fp16, [2]> before = read_state(input = total);
    int32 end = while_loop(loop_vars = (int32(0)))
        (int32 i) { bool more = less(x = i, y = n); } -> (more)
        (int32 i) {
            int32 next = add(x = i, y = int32(1));
            fp16 f = cast(x = next, dtype = string(\"fp16\"));
            tensor<fp16, [2]> now = read_state(input = total);
            tensor<fp16, [2]> sum = add(x = now, y = f);
            write_state(input = total, data = sum);
        } -> (next);
    tensor<fp16, [2]> after = read_state(input = total);
    tensor<fp16, [2]> difference = sub(x = after, y = before);
} -> (before, after, difference);";

#[test]
fn a_state_written_in_a_loop_is_read_in_the_next_round_and_the_next_prediction() {
    let model = open(STATE);
    let mut state = model.make_state();
    for (n, want) in [
        ([3], [[0.0, 6.0, 6.0]]),
        ([0], [[6.0, 6.0, 0.0]]),
        ([2], [[6.0, 9.0, 3.0]]),
    ] {
        let n = Array {
            shape: &[],
            data: Data::I32(&n),
        };
        let got = model.predict(&[("n", n)], Some(&mut state)).unwrap();
        let got: Vec<f32> = got.iter().map(|(_, v)| flat(v).1[0]).collect();
        assert_eq!(got, want[0]);
    }
    assert_eq!(state.get("total").unwrap().to_f32(), [9.0, 9.0]);
    assert!(matches!(
        model.predict(&[("n", i32s(&[], &[1]))], None),
        Err(Error::NeedsState { .. })
    ));
}

#[test]
fn what_a_state_held_before_can_be_given_after_it_was_overwritten() {
    let model = open(
        "(state<tensor<fp32, [2]>> a, state<tensor<fp32, [2]>> b, tensor<fp32, [2]> x) {
        tensor<fp32, [2]> old_a = read_state(input = a);
        tensor<fp32, [2]> old_b = read_state(input = b);
        tensor<fp32, [2]> sum = add(x = old_b, y = x);
        write_state(input = b, data = old_a);
        write_state(input = a, data = sum);
    } -> (old_a, old_b);",
    );
    let mut state = model.make_state();
    let mut outputs = Vec::new();
    for _ in 0..3 {
        let got = model
            .predict(&[("x", f32s(&[2], &[1.0, 2.0]))], Some(&mut state))
            .unwrap();
        outputs.push((flat(&got[0].1).1[1], flat(&got[1].1).1[1]));
    }
    // (a, b) goes to (b + x, a) each time.
    assert_eq!(outputs, [(0.0, 0.0), (2.0, 0.0), (2.0, 2.0)]);
    assert_eq!(state.get("a").unwrap().to_f32(), [2.0, 4.0]);
}

#[test]
fn a_part_of_constants_is_replaced_when_a_program_is_lowered() {
    check(
        "(tensor<fp32, [1]> x) {
        tensor<fp32, [4]> c = slice_update(x = tensor<fp32, [4]>([0x1p+0, 0x1p+1, 0x1p+2, 0x1p+3]),
            update = tensor<fp32, [2]>([0x0p+0, -0x1p+0]), begin = tensor<int32, [1]>([1]), end = tensor<int32, [1]>([3]));
        tensor<fp32, [4]> y = add(x = c, y = x);
    } -> (y);",
        &[("x", f32s(&[1], &[1.0]))],
        &[(&[4], &[2.0, 1.0, 0.0, 9.0])],
    );
}

#[test]
fn a_classifier_gives_its_label_and_all_probabilities() {
    let classify = |classes: &str, label: &str| {
        format!(
            "(tensor<fp32, [1, 3]> x) {{
            {label} label, dict<{label}, fp64> p = classify(probabilities = x, classes = {classes});
        }} -> (label, p);"
        )
    };
    let text = classify("list<string, 3>([\"cat\", \"dog\", \"owl\"])", "string");
    let inputs = [("x", f32s(&[1, 3], &[0.25, 0.5, 0.25]))];
    let Ok(model) = open_with(&program(&text), Options::default()) else {
        panic!("{}", program(&text))
    };
    let got = model.predict(&inputs, None).unwrap();
    assert_eq!(got[0].1.data, Buffer::Strings(vec!["dog".into()]));
    let label = |s: &str| Label::Text(s.into());
    let all = vec![(label("cat"), 0.25), (label("dog"), 0.5), (label("owl"), 0.25)];
    assert_eq!(got[1].1.data, Buffer::Dictionary(all));
}

#[test]
fn errors_in_blocks_name_the_operation() {
    // (function, inputs that make it fail, message); the first ones fail when the model is opened.
    let looped = |body: &str| {
        format!(
            "(tensor<fp32, [2]> x, tensor<int32, []> n) {{
            int32 end, tensor<fp32, [2]> y = while_loop(loop_vars = (int32(0), x))
                (int32 i, tensor<fp32, [2]> v) {{ bool more = less(x = i, y = n); }} -> (more)
                (int32 i, tensor<fp32, [2]> v) {{
                    int32 next = add(x = i, y = int32(1)); {body}
                }} -> (next, w);
        }} -> (y);"
        )
    };
    let at_load = [
        (
            looped("tensor<fp32, [2]> w = add(x = v, y = tensor<fp32, [3]>([0x0p+0, 0x0p+0, 0x0p+0]));"),
            "node \"w\" (add): shapes [2] and [3] do not broadcast",
        ),
        (
            looped("tensor<fp32, [2]> w = frobnicate(x = v);"),
            "operations that are not supported: frobnicate (1 uses)",
        ),
        (
            looped("tensor<fp32, [2]> w = relu(x = v, z = v);"),
            "node \"w\" (relu): unknown parameter \"z\"; it has: x",
        ),
    ];
    for (function, want) in at_load {
        let error = open_with(&program(&function), Options::default()).unwrap_err();
        assert_eq!(error.to_string(), want);
    }
    let at_run = [
        (
            looped("tensor<fp32, [2]> w = gather(x = v, indices = tensor<int32, [2]>([0, 2]), axis = int32(0));"),
            "node \"w\" (gather): index 2 is outside -2..2",
        ),
        (
            looped(
                "list<tensor<fp32, [2]>, 1> l = make_list(init_length = int32(1), dynamic_length = bool(false), elem_shape = (int32(2)));
                 tensor<fp32, [2]> w = list_read(ls = l, index = next);",
            ),
            "node \"w\" (list_read): index 1 is outside a list of 1",
        ),
    ];
    for (function, want) in at_run {
        let model = open_with(&program(&function), Options::default()).unwrap();
        let inputs = [("x", f32s(&[2], &[1.0, 2.0])), ("n", i32s(&[], &[1]))];
        assert_eq!(model.predict(&inputs, None).unwrap_err().to_string(), want);
    }
}
