//! Sessions on toy models whose every call is checked, and on models that say what they are told to.

use std::sync::Arc;

use super::*;
use crate::anemll::toy::{Calls, Toy, VOCABULARY};
use crate::completion::{FinishReason, Step};
use crate::grammar::Grammar;
use crate::model::Prediction;
use crate::options::Shift;
use crate::sampling::Sampling;
use crate::tokenizer::tests::bytes_tokenizer;
use candle_core::Tensor;

const END: u32 = 259;

fn session(toy: &Toy) -> (Session, Calls) {
    let (model, calls) = toy.model();
    (
        Session::new(Box::new(model), Arc::new(bytes_tokenizer()), vec![END].into()),
        calls,
    )
}

fn prompt(tokens: usize) -> Vec<u32> {
    (0..tokens)
        .map(|i| (i as u32 * 13 + 5) % VOCABULARY as u32)
        .collect()
}

fn at_most(max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        max_tokens,
        ignore_end: true,
        ..GenerateOptions::default()
    }
}

fn run(session: &mut Session, prompt: &[u32], options: &GenerateOptions) -> Completion {
    session
        .generate_with(prompt, options, |_| ControlFlow::Continue(()))
        .unwrap()
}

/// A model that says what it is told to, whatever it is asked.
struct Script {
    says: Vec<u32>,
    from: usize,
}

impl LanguageModel for Script {
    fn context_tokens(&self) -> usize {
        64
    }

    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn gives_logits(&self) -> bool {
        false
    }

    fn prefill(&mut self, tokens: &[u32], _cached: usize) -> Result<usize, Error> {
        Ok(tokens.len())
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, Error> {
        Ok(Prediction::Token(self.says[tokens.len() - self.from]))
    }

    fn snapshot(&self) -> Result<Vec<(String, Tensor)>, Error> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _buffers: &[(String, Tensor)]) -> Result<(), Error> {
        Ok(())
    }

    fn fork(&self) -> Result<Box<dyn LanguageModel>, Error> {
        Ok(Box::new(Script {
            says: self.says.clone(),
            from: self.from,
        }))
    }
}

fn script(says: &[u32]) -> Session {
    let model = Script {
        says: says.to_vec(),
        from: 1,
    };
    Session::new(Box::new(model), Arc::new(bytes_tokenizer()), vec![END].into())
}

#[test]
fn a_saved_conversation_goes_on_where_it_was_and_with_its_model_only() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("talk.session");
    let (mut first, _) = session(&Toy::default());
    run(&mut first, &prompt(70), &at_most(5));
    let known = first.cached_tokens();
    first.save(&path, "a model").unwrap();
    let longer = [first.tokens(), &[7, 8, 9]].concat();
    let expected = run(&mut first, &longer, &at_most(6));
    let (mut second, calls) = session(&Toy::default());
    second.load(&path, "a model").unwrap();
    assert_eq!((second.tokens().len(), second.cached_tokens()), (75, known));
    let before = calls.lock().unwrap().len();
    let done = run(&mut second, &longer, &at_most(6));
    assert_eq!((done.tokens, done.reused_tokens), (expected.tokens, known));
    assert!(calls.lock().unwrap().len() > before);
    let words = second.load(&path, "another").unwrap_err().to_string();
    assert!(
        words.contains("it belongs to the model a model, this one is another"),
        "{words}"
    );
    assert_eq!(second.tokens().len(), longer.len() + 6, "as it was");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 1, 8, 40, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(
            matches!(second.load(&path, "a model"), Err(Error::Session { .. })),
            "{length}"
        );
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_stop_string_ends_the_text_before_it_and_is_never_shown() {
    let says: Vec<u32> = "story\n\nUser: no".bytes().map(u32::from).collect();
    for (stop, text, tokens, reason) in [
        ("\n\nUser:", "story", 12, FinishReason::Stop),
        ("ry", "sto", 5, FinishReason::Stop),
        ("never", "story\n\nUser: n", 14, FinishReason::Length),
    ] {
        let options = GenerateOptions {
            stop_strings: vec![stop.to_string()],
            ..at_most(14)
        };
        let mut shown = String::new();
        let mut session = script(&says);
        let done = session
            .generate_with(&[1], &options, |piece| {
                shown.push_str(&piece.text);
                assert!(!shown.contains(stop) && text.starts_with(&shown), "{shown:?}");
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!((done.text.as_str(), shown.as_str()), (text, text), "{stop:?}");
        assert_eq!(
            (done.tokens.len(), done.finish_reason),
            (tokens, reason),
            "{stop:?}"
        );
    }
    let empty = GenerateOptions {
        stop_strings: vec![String::new()],
        ..at_most(1)
    };
    let error = script(&says).generate(&[1], &empty).unwrap_err().to_string();
    assert!(error.starts_with("stop_strings"), "{error}");
}

#[test]
fn what_a_grammar_leaves_no_choice_about_is_computed_in_batches() {
    let say = Grammar::Regex(
        "the answer of the mouse is the one: (yes|no), and that is the end of the tale".to_string(),
    );
    let options = GenerateOptions {
        grammar: Some(say),
        ..at_most(100)
    };
    let counted = |options: &GenerateOptions| {
        let (mut session, calls) = session(&Toy::default());
        let done = run(&mut session, &prompt(3), options);
        let one_by_one = calls
            .lock()
            .unwrap()
            .iter()
            .filter(|c| c.function == "infer")
            .count();
        (done, one_by_one)
    };
    let (fast, few) = counted(&options);
    // Probabilities are of logits, so that every token is decoded.
    let slow_options = GenerateOptions {
        logprobs: Some(0),
        ..options.clone()
    };
    let (slow, many) = counted(&slow_options);
    assert!(fast.text.starts_with("the answer of the mouse is the one: ") && fast.text.ends_with("the tale"));
    assert_eq!((&fast.text, &fast.tokens), (&slow.text, &slow.tokens));
    assert_eq!(fast.fits_grammar, Some(true));
    assert!(few * 4 < many, "{few} of {many}");
    for length in [1, 5, 20] {
        let short = GenerateOptions {
            max_tokens: length,
            ..options.clone()
        };
        let (cut, _) = counted(&short);
        assert_eq!(
            (cut.tokens.as_slice(), cut.finish_reason),
            (&fast.tokens[..length], FinishReason::Length)
        );
    }
}

#[test]
fn log_probabilities_are_of_the_models_own_logits() {
    let (mut session, _) = session(&Toy::default());
    let options = GenerateOptions {
        logprobs: Some(3),
        sampling: Sampling {
            temperature: 0.1,
            ..Sampling::default()
        },
        ..at_most(4)
    };
    let mut pieces = 0;
    let each = |piece: &Piece| {
        let logprobs = piece.logprobs.as_ref().unwrap();
        assert_eq!(logprobs.best.len(), 3);
        assert!(logprobs.best[0].1 >= logprobs.chosen && logprobs.chosen <= 0.0);
        let own = logprobs.best.iter().find(|(t, _)| *t == piece.token);
        assert!(own.is_none_or(|(_, p)| *p == logprobs.chosen));
        pieces += 1;
        ControlFlow::Continue(())
    };
    session.generate_with(&prompt(3), &options, each).unwrap();
    assert_eq!(pieces, 4);
    assert!(matches!(
        script(&[1]).generate(&[1], &options),
        Err(Error::NoLogits)
    ));
}

#[test]
fn prompts_of_every_length_continue_as_they_do_token_by_token() {
    let slow = Toy {
        batched_prefill: false,
        ..Toy::default()
    };
    for tokens in [1, 2, 63, 64, 65, 128, 129, 255, 256] {
        let (mut batched, _) = session(&Toy::default());
        let (mut single, _) = session(&slow);
        let fast = run(&mut batched, &prompt(tokens), &at_most(8));
        assert_eq!(
            fast.tokens,
            run(&mut single, &prompt(tokens), &at_most(8)).tokens,
            "{tokens} tokens"
        );
        let room = 256 + 1 - tokens;
        assert_eq!(fast.tokens.len(), room.min(8), "{tokens} tokens");
        let reason = if room < 8 {
            FinishReason::Context
        } else {
            FinishReason::Length
        };
        assert_eq!(fast.finish_reason, reason, "{tokens} tokens");
    }
}

#[test]
fn prompts_the_model_cannot_take_are_refused() {
    let (mut session, calls) = session(&Toy::default());
    for (prompt, expected) in [
        (
            prompt(257),
            "the prompt has 257 tokens, the model's context holds 256",
        ),
        (vec![], "the prompt is empty; at least one token is needed"),
        (
            vec![1, 300],
            "token 1 of the prompt is 300, the vocabulary has 300 tokens",
        ),
    ] {
        let error = session.generate(&prompt, &at_most(1)).unwrap_err().to_string();
        assert_eq!(error, expected);
    }
    assert!(calls.lock().unwrap().is_empty());
}

#[test]
fn a_prompt_that_begins_like_the_last_computes_its_rest_only() {
    let (mut session, calls) = session(&Toy::default());
    let first = run(&mut session, &prompt(100), &at_most(10));
    assert_eq!(session.cached_tokens(), 109);
    let longer = [session.tokens(), &prompt(20)].concat();
    calls.lock().unwrap().clear();
    let second = run(&mut session, &longer, &at_most(3));
    assert_eq!((first.reused_tokens, second.reused_tokens), (0, 109));
    let batches = calls
        .lock()
        .unwrap()
        .iter()
        .filter(|c| c.function == "prefill" && c.part == "chunk0")
        .count();
    assert_eq!(batches, 1);
    let (mut fresh, _) = self::session(&Toy::default());
    assert_eq!(second.tokens, run(&mut fresh, &longer, &at_most(3)).tokens);

    let other = [&prompt(50)[..], &[9, 9]].concat();
    let third = run(&mut session, &other, &at_most(3));
    assert_eq!(third.reused_tokens, 50);
    fresh.reset();
    assert_eq!(third.tokens, run(&mut fresh, &other, &at_most(3)).tokens);
    let again = run(&mut session, &other, &at_most(3));
    assert_eq!((again.reused_tokens, again.tokens), (51, third.tokens));
}

#[test]
fn it_stops_at_end_tokens_and_leaves_them_out_of_text_and_history() {
    for (options, expected, reason) in [
        (
            GenerateOptions::default(),
            vec![104, 105, END],
            FinishReason::Stop,
        ),
        (
            GenerateOptions {
                stop_tokens: vec![105],
                ..Default::default()
            },
            vec![104, 105],
            FinishReason::Stop,
        ),
        (
            GenerateOptions {
                max_tokens: 2,
                ..Default::default()
            },
            vec![104, 105],
            FinishReason::Length,
        ),
        (at_most(4), vec![104, 105, END, 106], FinishReason::Length),
        (at_most(0), vec![], FinishReason::Length),
    ] {
        let mut session = script(&[104, 105, END, 106, 107]);
        let done = run(&mut session, &[1], &options);
        assert_eq!(
            (&done.tokens, done.finish_reason),
            (&expected, reason),
            "{options:?}"
        );
        let text: String = expected
            .iter()
            .filter(|&&t| t < 256)
            .map(|&t| char::from(t as u8))
            .collect();
        let cut = if options.stop_tokens.is_empty() {
            text.len()
        } else {
            1
        };
        assert_eq!(done.text, text[..cut], "{options:?}");
        assert_eq!(
            session.tokens().contains(&END),
            options.ignore_end && options.max_tokens > 2
        );
    }
}

#[test]
fn characters_come_whole_and_what_is_left_comes_last() {
    let face = [0xF0, 0x9F, 0x98, 0x80];
    let mut session = script(&[&face[..], &[END]].concat());
    let pieces: Vec<Piece> = session
        .generate(&[1], &Default::default())
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let texts: Vec<&str> = pieces.iter().map(|p| p.text.as_str()).collect();
    assert_eq!(texts, ["", "", "", "😀", ""]);
    let cut = run(&mut script(&face[..2]), &[1], &at_most(2));
    assert_eq!(cut.text, "\u{FFFD}");
}

#[test]
fn steps_iterator_and_callback_agree() {
    let toy = Toy::default();
    let (mut session, _) = session(&toy);
    let by_callback = run(&mut session, &prompt(130), &at_most(6));
    session.reset();
    let mut pieces = session.generate(&prompt(130), &at_most(6)).unwrap();
    let by_iterator: Vec<u32> = pieces.by_ref().map(|piece| piece.unwrap().token).collect();
    assert_eq!(by_iterator, by_callback.tokens);
    assert_eq!(pieces.completion().text, by_callback.text);
    session.reset();
    let mut generation = session.generate(&prompt(130), &at_most(1)).unwrap();
    let mut steps = Vec::new();
    while !matches!(steps.last(), Some(Step::Finished(_))) {
        steps.push(generation.step().unwrap());
    }
    assert_eq!(steps[0], Step::Prefilled { done: 64, total: 130 });
    assert_eq!(
        steps[1],
        Step::Prefilled {
            done: 128,
            total: 130
        }
    );
    assert_eq!(
        steps[2],
        Step::Prefilled {
            done: 129,
            total: 130
        }
    );
    assert!(matches!(&steps[3], Step::Token(piece) if piece.token == by_callback.tokens[0]));
    assert_eq!(steps[4..], [Step::Finished(FinishReason::Length)]);
    session.reset();
    let mut generation = session.generate(&prompt(130), &at_most(1)).unwrap();
    generation.prefill_while(|done, _| done < 100).unwrap();
    assert_eq!(
        generation.step().unwrap(),
        Step::Finished(FinishReason::Cancelled)
    );
    assert_eq!(session.cached_tokens(), 128);
}

#[test]
fn cancelling_keeps_what_came() {
    let (mut session, _) = session(&Toy::default());
    let mut left = 3;
    let done = session
        .generate_with(&prompt(5), &at_most(50), |_| {
            left -= 1;
            if left == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap();
    assert_eq!(
        (done.tokens.len(), done.finish_reason),
        (3, FinishReason::Cancelled)
    );
    assert_eq!((session.tokens().len(), session.cached_tokens()), (8, 7));
}

#[test]
fn seeds_decide_sampled_texts() {
    let sampled = |seed| {
        let sampling = Sampling {
            temperature: 2.0,
            top_k: 20,
            seed,
            ..Sampling::default()
        };
        let (mut session, _) = session(&Toy::default());
        run(
            &mut session,
            &prompt(9),
            &GenerateOptions {
                sampling,
                ..at_most(20)
            },
        )
        .tokens
    };
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));
    let (mut greedy_only, _) = session(&Toy {
        argmax: true,
        ..Toy::default()
    });
    let sampling = Sampling {
        temperature: 1.0,
        ..Sampling::default()
    };
    let refused = greedy_only.generate(
        &prompt(3),
        &GenerateOptions {
            sampling,
            ..at_most(1)
        },
    );
    assert!(matches!(refused, Err(Error::NoLogits)));
}

#[test]
fn a_fork_continues_alike_and_apart() {
    let (mut session, calls) = session(&Toy::default());
    run(&mut session, &prompt(90), &at_most(1));
    let mut fork = session.fork().unwrap();
    calls.lock().unwrap().clear();
    let left = run(&mut session, &[&prompt(90)[..], &[1]].concat(), &at_most(4));
    let right = run(&mut fork, &[&prompt(90)[..], &[2]].concat(), &at_most(4));
    assert_eq!((left.reused_tokens, right.reused_tokens), (90, 90));
    assert!(calls.lock().unwrap().iter().all(|call| call.function == "infer"));
    let (mut fresh, _) = self::session(&Toy::default());
    assert_eq!(
        right.tokens,
        run(&mut fresh, &[&prompt(90)[..], &[2]].concat(), &at_most(4)).tokens
    );
}

#[test]
fn timings_count_tokens_after_the_first() {
    let (mut session, _) = session(&Toy::default());
    let done = run(&mut session, &prompt(5), &at_most(4));
    assert_eq!(done.timings.decode_tokens, 3);
    assert!(done.timings.prefill_ms > 0.0 && done.timings.decode_tokens_per_s() > 0.0);
    let single = run(&mut session, &prompt(5), &at_most(1));
    assert_eq!(single.timings.decode_tokens_per_s(), 0.0);
}

fn shifting(keep: usize, max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        context_full: ContextFull::Shift(Shift {
            keep,
            ..Shift::default()
        }),
        ..at_most(max_tokens)
    }
}

#[test]
fn a_context_that_fills_in_mid_answer_shifts_and_what_stays_is_computed_anew() {
    let toy = Toy {
        slots: 64,
        ..Toy::default()
    };
    let (mut shifted, _) = session(&toy);
    let mut generation = shifted.generate(&prompt(40), &shifting(5, 60)).unwrap();
    let (mut shifts, mut found) = (Vec::new(), Vec::new());
    let reason = loop {
        match generation.step().unwrap() {
            Step::Shifted { dropped, left } => shifts.push((found.len(), dropped, left)),
            Step::Token(piece) => found.push(piece.token),
            Step::Finished(reason) => break reason,
            Step::Prefilled { .. } => {}
        }
    };
    let done = generation.completion();
    // 65 tokens do not fit: of the 60 after those kept, half go.
    assert_eq!(shifts, [(25, 30, 35), (55, 30, 35)]);
    assert_eq!(
        (reason, done.dropped_tokens, done.tokens.len()),
        (FinishReason::Length, 60, 60)
    );
    let (mut fresh, _) = session(&toy);
    let mut tokens = prompt(40);
    for &token in &found {
        if tokens.len() > 64 {
            tokens.drain(5..35);
        }
        fresh.reset();
        assert_eq!(run(&mut fresh, &tokens, &at_most(1)).tokens, [token]);
        tokens.push(token);
    }
    assert_eq!(shifted.tokens(), tokens);
}

#[test]
fn a_prompt_that_does_not_fit_loses_its_oldest_tokens_where_that_is_wanted() {
    let toy = Toy {
        slots: 64,
        ..Toy::default()
    };
    let (mut session, _) = session(&toy);
    let done = run(&mut session, &prompt(150), &shifting(10, 3));
    // 140 after those kept, then 70: 45 tokens are left of them in the second shift's turn.
    let left = session.tokens().len() - 3;
    assert_eq!((done.prompt_tokens, done.dropped_tokens), (150, 150 - left));
    assert!(left <= 64 && left > 32, "{left}");
    let (start, end) = (&prompt(150)[..10], &prompt(150)[150 - (left - 10)..]);
    assert_eq!(session.tokens()[..left], [start, end].concat());
    let error = session
        .generate(&prompt(3), &shifting(63, 1))
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("keep"), "{error}");
}
