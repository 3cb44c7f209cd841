//! The scheduler on a model that says whose turn it was.

use std::path::Path;
use std::time::Duration;

use candle_coreml_llm::{
    Error as ModelError, FinishReason, GenerateOptions, LanguageModel, Prediction, Tokenizer,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;

const BATCH: usize = 8;
const PATIENCE: Duration = Duration::from_secs(20);

/// What a model was asked, by the first token of its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Prefill(u32),
    Decode(u32),
}

type Calls = Arc<Mutex<Vec<Call>>>;

/// Says the sum of its tokens; token 99 as the last one makes it panic, 98 fail.
struct Recorder {
    calls: Calls,
    pause: Duration,
}

impl LanguageModel for Recorder {
    fn context_tokens(&self) -> usize {
        4096
    }

    fn vocabulary(&self) -> usize {
        100
    }

    fn gives_logits(&self) -> bool {
        false
    }

    fn prefill(&mut self, tokens: &[u32], cached: usize) -> Result<usize, ModelError> {
        lock(&self.calls).push(Call::Prefill(tokens[0]));
        std::thread::sleep(self.pause);
        Ok((cached + BATCH).min(tokens.len()))
    }

    fn decode(&mut self, tokens: &[u32]) -> Result<Prediction<'_>, ModelError> {
        lock(&self.calls).push(Call::Decode(tokens[0]));
        std::thread::sleep(self.pause);
        match tokens.last() {
            Some(99) => panic!("token 99"),
            Some(98) => Err(ModelError::Tokenizer("token 98".to_owned())),
            _ => Ok(Prediction::Token(tokens.iter().sum::<u32>() % 90)),
        }
    }

    fn fork(&self) -> Result<Box<dyn LanguageModel>, ModelError> {
        Ok(Box::new(Recorder {
            calls: Arc::clone(&self.calls),
            pause: self.pause,
        }))
    }

    fn snapshot(&self) -> Result<Vec<(String, candle_core::Tensor)>, ModelError> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _: &[(String, candle_core::Tensor)]) -> Result<(), ModelError> {
        Ok(())
    }
}

fn scheduler(limits: Limits, pause: Duration) -> (Scheduler, Calls) {
    let calls = Calls::default();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tales/tokenizer.json");
    let tokenizer = Tokenizer::parse("tokenizer.json", &std::fs::read(path).unwrap()).unwrap();
    let model = Recorder {
        calls: Arc::clone(&calls),
        pause,
    };
    let source = Source {
        id: "recorder".to_owned(),
        fresh: Mutex::new(Session::new(Box::new(model), Arc::new(tokenizer), Arc::from([]))),
    };
    let scheduler = Scheduler::start(vec![source], limits, Metrics::new()).unwrap();
    (scheduler, calls)
}

fn limits(active: usize, waiting: usize) -> Limits {
    Limits {
        active,
        waiting,
        workers: 1,
    }
}

type Events = UnboundedReceiver<(usize, Event)>;

fn task(prompt: &[u32], max_tokens: usize) -> (Task, Events) {
    let (events, receiver) = unbounded_channel();
    let task = Task {
        model: 0,
        index: 0,
        prompt: prompt.to_vec(),
        options: GenerateOptions {
            max_tokens,
            ..GenerateOptions::default()
        },
        arrived: Instant::now(),
        deadline: Instant::now() + PATIENCE,
        events,
    };
    (task, receiver)
}

/// Waits for a text's end: its tokens, how many were reused, and the reason; or why it failed.
fn end(events: &mut Events) -> Result<(usize, usize, FinishReason), String> {
    while let Some((_, event)) = events.blocking_recv() {
        match event {
            Event::Finished(done) => {
                return Ok((done.tokens.len(), done.reused_tokens, done.finish_reason));
            }
            Event::Failed(failure) => return Err(format!("{failure:?}")),
            _ => {}
        }
    }
    Err("no end".to_owned())
}

#[test]
fn texts_take_turns_whatever_the_length_of_their_prompts() {
    let (scheduler, calls) = scheduler(limits(3, 8), Duration::from_millis(1));
    let long: Vec<u32> = [1].into_iter().chain(std::iter::repeat_n(7, 399)).collect();
    let tasks = [task(&long, 20), task(&[2, 5], 20), task(&[3, 5], 20)];
    let (tasks, mut events): (Vec<_>, Vec<_>) = tasks.into_iter().unzip();
    scheduler.submit(tasks).unwrap();
    for events in &mut events[1..] {
        assert_eq!(end(events), Ok((20, 0, FinishReason::Length)));
    }
    let until_here = lock(&calls).clone();
    let turns = |who: u32| {
        let mine = |call: &&Call| matches!(call, Call::Prefill(w) | Call::Decode(w) if *w == who);
        until_here.iter().filter(mine).count()
    };
    // A prefill of one batch for all but the last token comes before the 20 tokens of the short ones.
    assert_eq!((turns(2), turns(3)), (21, 21));
    assert!((20..=23).contains(&turns(1)), "{}", turns(1));
    assert!(
        until_here.iter().all(|c| *c != Call::Decode(1)),
        "its prompt has 50 batches"
    );
    assert_eq!(end(&mut events[0]), Ok((20, 0, FinishReason::Length)));
}

#[test]
fn who_waits_longest_comes_next_and_nobody_starves() {
    let (scheduler, calls) = scheduler(limits(2, 16), Duration::ZERO);
    let (tasks, mut events): (Vec<_>, Vec<_>) = (1..=12).map(|who| task(&[who, 1], 5)).unzip();
    scheduler.submit(tasks).unwrap();
    for events in &mut events {
        assert_eq!(end(events).map(|(tokens, ..)| tokens), Ok(5));
    }
    let mut order = Vec::new();
    for call in lock(&calls).iter() {
        let (Call::Prefill(who) | Call::Decode(who)) = call;
        if !order.contains(who) {
            order.push(*who);
        }
    }
    assert_eq!(order, (1..=12).collect::<Vec<_>>());
}

#[test]
fn a_text_nobody_listens_to_ends_within_a_step() {
    let (scheduler, calls) = scheduler(limits(1, 8), Duration::from_millis(2));
    let (first, mut events) = task(&[1, 2], 4000);
    scheduler.submit(vec![first]).unwrap();
    while !matches!(events.blocking_recv(), Some((_, Event::Token(_)))) {}
    let (gone, never) = task(&[3, 2], 50);
    let (next, mut after) = task(&[2, 2], 3);
    scheduler.submit(vec![gone, next]).unwrap();
    drop(never);
    drop(events);
    let steps = lock(&calls).len();
    assert_eq!(end(&mut after).map(|(tokens, ..)| tokens), Ok(3));
    let calls = lock(&calls);
    let late = calls
        .iter()
        .skip(steps)
        .filter(|c| **c == Call::Decode(1))
        .count();
    assert!(late <= 1, "{late} steps after the client left");
    assert!(!calls.contains(&Call::Prefill(3)) && !calls.contains(&Call::Decode(3)));
    assert_eq!(scheduler.load().waiting, 0);
}

#[test]
fn a_full_line_refuses_and_those_who_left_make_room() {
    let (scheduler, _) = scheduler(limits(1, 2), Duration::from_millis(2));
    let (running, mut first) = task(&[1, 2], 4000);
    scheduler.submit(vec![running]).unwrap();
    while !matches!(first.blocking_recv(), Some((_, Event::Started))) {}
    let (tasks, events): (Vec<_>, Vec<_>) = (2..4).map(|who| task(&[who, 1], 1)).unzip();
    scheduler.submit(tasks).unwrap();
    let load = scheduler.load();
    assert_eq!((load.waiting, load.active, load.states), (2, 1, 1));
    assert_eq!(scheduler.submit(vec![task(&[9, 1], 1).0]), Err(Denied::Full(2)));
    assert_eq!(scheduler.would_take(1), Err(Denied::Full(2)));
    drop(events);
    let (tasks, _events): (Vec<_>, Vec<_>) = (4..6).map(|who| task(&[who, 1], 1)).unzip();
    assert_eq!(scheduler.submit(tasks), Ok(()));
}

#[test]
fn a_conversation_that_goes_on_finds_its_state_and_others_keep_theirs() {
    let (scheduler, _) = scheduler(limits(2, 8), Duration::ZERO);
    let run = |prompt: &[u32]| {
        let (task, mut events) = task(prompt, 4);
        scheduler.submit(vec![task]).unwrap();
        let mut tokens = prompt.to_vec();
        while let Some((_, event)) = events.blocking_recv() {
            match event {
                Event::Token(piece) => tokens.push(piece.token),
                Event::Finished(done) => {
                    return (tokens, done.reused_tokens, scheduler.load().states);
                }
                _ => {}
            }
        }
        panic!("no end");
    };
    let shared: Vec<u32> = (0..40).collect();
    let a = [&shared[..], &[50]].concat();
    let (first, reused, states) = run(&a);
    assert_eq!((reused, states), (0, 1));
    let (second, reused, states) = run(&[&shared[..], &[60]].concat());
    assert_eq!((reused, states), (40, 2), "a copy of the first one's beginning");
    let (first, reused, states) = run(&[&first[..], &[51]].concat());
    assert_eq!(
        (reused, states),
        (44, 2),
        "all of it but the token not computed yet"
    );
    let (_, reused, states) = run(&[&second[..], &[61]].concat());
    assert_eq!((reused, states), (44, 2));
    let (_, reused, states) = run(&[90, 91]);
    assert_eq!((reused, states), (0, 2), "the one not used for longest has to go");
    let (_, reused, _) = run(&[&first[..], &[52]].concat());
    assert_eq!(reused, 40, "it was the first conversation");
}

#[test]
fn a_panic_or_an_error_ends_one_text_alone() {
    let (scheduler, _) = scheduler(limits(2, 8), Duration::ZERO);
    let (tasks, mut events): (Vec<_>, Vec<_>) = [
        task(&[1, 99], 5),
        task(&[1, 98], 5),
        task(&[1, 2], 5),
        task(&[200], 5),
    ]
    .into_iter()
    .unzip();
    scheduler.submit(tasks).unwrap();
    assert_eq!(end(&mut events[0]), Err("Panic".to_owned()));
    assert!(end(&mut events[1]).unwrap_err().contains("token 98"));
    assert_eq!(end(&mut events[2]).map(|(tokens, ..)| tokens), Ok(5));
    assert!(end(&mut events[3]).unwrap_err().contains("TokenOutside"));
    let (again, mut events) = task(&[1, 2], 2);
    scheduler.submit(vec![again]).unwrap();
    assert_eq!(end(&mut events).map(|(tokens, ..)| tokens), Ok(2));
}

#[test]
fn a_text_ends_when_its_time_is_up() {
    let (scheduler, _) = scheduler(limits(1, 8), Duration::from_millis(2));
    let (mut late, mut events) = task(&[1, 2], 4000);
    late.deadline = Instant::now() + Duration::from_millis(60);
    scheduler.submit(vec![late]).unwrap();
    let (tokens, _, reason) = end(&mut events).unwrap();
    assert_eq!(reason, FinishReason::Cancelled);
    assert!(tokens < 60, "{tokens}");
}

#[test]
fn stopping_fails_who_waits_and_lets_who_runs_finish_until_it_aborts() {
    let (scheduler, _) = scheduler(limits(1, 8), Duration::from_millis(2));
    let (first, mut running) = task(&[1, 2], 10);
    let (second, mut waiting) = task(&[2, 2], 10);
    scheduler.submit(vec![first]).unwrap();
    while !matches!(running.blocking_recv(), Some((_, Event::Started))) {}
    scheduler.submit(vec![second]).unwrap();
    scheduler.stop();
    assert_eq!(end(&mut waiting), Err("Stopping".to_owned()));
    assert_eq!(scheduler.submit(vec![task(&[3, 2], 1).0]), Err(Denied::Stopping));
    assert_eq!(end(&mut running).map(|(tokens, ..)| tokens), Ok(10));
    assert_eq!(scheduler.load().active, 0);

    let (scheduler, _) = self::scheduler(limits(1, 8), Duration::from_millis(2));
    let (endless, mut events) = task(&[1, 2], 4000);
    scheduler.submit(vec![endless]).unwrap();
    while !matches!(events.blocking_recv(), Some((_, Event::Started))) {}
    scheduler.abort();
    assert_eq!(end(&mut events), Err("Stopping".to_owned()));
    assert_eq!(scheduler.load().active, 0);
}
