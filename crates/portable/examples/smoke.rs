use candle_coreml_mil as mil;
use candle_coreml_portable::*;
use half::f16;
use std::sync::Arc;
use std::time::Instant;
fn load(p: &str) -> Arc<mil::Model> {
    Arc::new(mil::Model::open(p).unwrap())
}
fn main() {
    let dir = std::env::args().nth(1).unwrap();
    let passes = std::env::var("NOPASS").is_err();
    let opt = || Options {
        passes,
        ..Default::default()
    };
    let find = |s: &str| {
        std::fs::read_dir(&dir)
            .unwrap()
            .map(|e| e.unwrap().path())
            .find(|p| p.to_str().unwrap().contains(s))
            .unwrap()
    };
    let t = Instant::now();
    let emb = Model::load(load(find("embeddings").to_str().unwrap()), None, opt()).unwrap();
    println!("emb {:?}", t.elapsed());
    let inf = Model::load(load(find("FFN_PF").to_str().unwrap()), Some("infer"), opt()).unwrap();
    println!("infer {:?}", t.elapsed());
    let pre = inf.with_function("prefill").unwrap();
    println!("prefill {:?}", t.elapsed());
    let head = Model::load(load(find("lm_head").to_str().unwrap()), None, opt()).unwrap();
    println!("head {:?}", t.elapsed());
    let g: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(format!("{dir}/golden.json")).unwrap()).unwrap();
    let mut state = inf.make_state();
    let hid = inf.file().description().functions[0].inputs[0].clone();
    let h = match hid.ty {
        mil::FeatureType::MultiArray(a) => a.shape[2],
        _ => 0,
    };
    for p in g["prompts"].as_array().unwrap() {
        state.reset();
        let ids: Vec<i32> = p["prompt_tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_i64().unwrap() as i32)
            .collect();
        let want: Vec<i32> = p["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_i64().unwrap() as i32)
            .collect();
        let t0 = Instant::now();
        let mut pos = 0;
        let row = |p: usize| -> Vec<f16> {
            (0..512)
                .map(|j| if j <= p { f16::ZERO } else { f16::NEG_INFINITY })
                .collect()
        };
        while pos < ids.len() {
            let mut b: Vec<i32> = ids[pos..(pos + 64).min(ids.len())].to_vec();
            b.resize(64, 0);
            let e = emb
                .predict(
                    &[(
                        "input_ids",
                        Array {
                            shape: &[1, 64],
                            data: Data::I32(&b),
                        },
                    )],
                    None,
                )
                .unwrap();
            let mask: Vec<f16> = (0..64).flat_map(|i| row(pos + i)).collect();
            let pid: Vec<i32> = (pos as i32..pos as i32 + 64).collect();
            pre.predict(
                &[
                    ("hidden_states", e[0].1.as_array().unwrap()),
                    (
                        "position_ids",
                        Array {
                            shape: &[64],
                            data: Data::I32(&pid),
                        },
                    ),
                    (
                        "causal_mask",
                        Array {
                            shape: &[1, 1, 64, 512],
                            data: Data::F16(&mask),
                        },
                    ),
                    (
                        "current_pos",
                        Array {
                            shape: &[1],
                            data: Data::I32(&[pos as i32]),
                        },
                    ),
                ],
                Some(&mut state),
            )
            .unwrap();
            pos += 64;
        }
        let tp = t0.elapsed();
        let mut all = ids.clone();
        let mut got = vec![];
        let t1 = Instant::now();
        for _ in 0..want.len() {
            let p = all.len() - 1;
            let e = emb
                .predict(
                    &[(
                        "input_ids",
                        Array {
                            shape: &[1, 1],
                            data: Data::I32(&[all[p]]),
                        },
                    )],
                    None,
                )
                .unwrap();
            assert_eq!(e[0].1.shape, [1, 1, h]);
            let o = inf
                .predict(
                    &[
                        ("hidden_states", e[0].1.as_array().unwrap()),
                        (
                            "position_ids",
                            Array {
                                shape: &[1],
                                data: Data::I32(&[p as i32]),
                            },
                        ),
                        (
                            "causal_mask",
                            Array {
                                shape: &[1, 1, 1, 512],
                                data: Data::F16(&row(p)),
                            },
                        ),
                        (
                            "current_pos",
                            Array {
                                shape: &[1],
                                data: Data::I32(&[p as i32]),
                            },
                        ),
                    ],
                    Some(&mut state),
                )
                .unwrap();
            let l = head
                .predict(&[("hidden_states", o[0].1.as_array().unwrap())], None)
                .unwrap();
            let mut parts: Vec<(usize, Vec<f32>)> = l
                .iter()
                .map(|(n, a)| (n.trim_start_matches("logits").parse().unwrap(), a.to_f32()))
                .collect();
            parts.sort_by_key(|p| p.0);
            let logits: Vec<f32> = parts.into_iter().flat_map(|p| p.1).collect();
            let best = (0..logits.len()).fold(0, |b, i| if logits[i] > logits[b] { i } else { b });
            all.push(best as i32);
            got.push(best as i32);
        }
        let td = t1.elapsed();
        let same = got.iter().zip(&want).take_while(|(a, b)| a == b).count();
        println!(
            "{} prompt {} same {}/{} margin there {:?} prefill {:?} decode {:.1} tok/s",
            p["name"],
            ids.len(),
            same,
            want.len(),
            p["margins"].get(same),
            tp,
            got.len() as f64 / td.as_secs_f64()
        );
    }
}
