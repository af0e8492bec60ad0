//! The real window under loom, which runs every order that two or three threads' steps can come in, and every value
//! that a load may return by the memory model.
//!
//! `window.rs` itself is compiled here against loom's atomics. Each execution's answers must be those of the
//! sequential program in `window_support/spec.rs` in some order of the calls that keeps each thread's own.
//!
//! Each model bounds how often a thread that could go on is put aside, so that all of them take well under a minute;
//! `TOLLGATE_LOOM_PREEMPTIONS` sets another bound for all.

/// The gate's own source files, with loom's atomics where the gate has those of the standard library.
#[allow(dead_code)]
#[path = "../src/gate"]
mod gate {
    pub mod limit;
    pub mod window;
    pub mod sync {
        pub use loom::sync::atomic::{AtomicU64, Ordering};
    }
    #[path = "../../tests/window_support/spec.rs"]
    pub mod spec;
}

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gate::limit::Limit;
use gate::spec::Spec;
use gate::window::{Refused, SlidingWindow, Taken, WindowCounts};

/// The models count in windows of 1.2 s: sub-buckets of 0.6, 0.4, 0.3 and 0.02 s for K of 2, 3, 4 and 60.
const WINDOW_MS: u64 = 1_200;
const T0: u64 = 12_000_000_000;

fn limit(permits: u32) -> Limit {
    Limit::new(permits, WINDOW_MS).unwrap()
}

/// The start of the sub-bucket so many after T0's.
fn edge<const K: u64>(sub_buckets: u64) -> u64 {
    T0 + sub_buckets * WINDOW_MS * 1_000_000 / K
}

#[derive(Clone, Copy, Debug)]
enum Call {
    Take { permits: u32, cost: u32, now_ns: u64 },
    Peek { permits: u32, cost: u32, now_ns: u64 },
    RetireIfIdle { now_ns: u64 },
    Close,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Answer {
    Taken(Result<Taken, Refused>),
    Peeked(Result<(), Refused>),
    Retired(bool),
    Closed(u64),
}

fn take(permits: u32, cost: u32, now_ns: u64) -> Call {
    Call::Take { permits, cost, now_ns }
}

fn ask<const K: u64>(window: &SlidingWindow<K>, call: Call) -> Answer {
    match call {
        Call::Take { permits, cost, now_ns } => Answer::Taken(window.take(limit(permits), cost, now_ns)),
        Call::Peek { permits, cost, now_ns } => Answer::Peeked(window.peek(limit(permits), cost, now_ns)),
        Call::RetireIfIdle { now_ns } => Answer::Retired(window.retire_if_idle(now_ns)),
        Call::Close => Answer::Closed(window.close_and_export().total()),
    }
}

/// The answer in the sequential program. `step` 0 is the time moving on, 1 the call itself.
fn expect(spec: &mut Spec, call: Call, step: usize) -> Option<Answer> {
    match call {
        Call::Take { now_ns, .. } | Call::Peek { now_ns, .. } if step == 0 => spec.tick(now_ns),
        _ if step == 0 => {}
        Call::Take { permits, cost, now_ns } => return Some(Answer::Taken(spec.take(limit(permits), cost, now_ns))),
        Call::Peek { permits, cost, now_ns } => {
            let mut aside = spec.clone();
            aside.tick(now_ns);
            return Some(Answer::Peeked(aside.take(limit(permits), cost, now_ns).map(|_| ())));
        }
        Call::RetireIfIdle { now_ns } => {
            let mut aside = spec.clone();
            aside.tick(now_ns);
            spec.closed |= aside.counted() == 0;
            return Some(Answer::Retired(spec.closed));
        }
        Call::Close => {
            spec.closed = true;
            return Some(Answer::Closed(spec.counted()));
        }
    }
    None
}

/// Whether the threads' answers are those of the program in some order.
fn explained(spec: &Spec, threads: &[(Vec<Call>, Vec<Answer>)], done: &mut [usize], after: &[(Call, Answer)]) -> bool {
    let mut finished = true;
    for thread in 0..threads.len() {
        let (calls, answers) = &threads[thread];
        let (call, step) = (done[thread] / 2, done[thread] % 2);
        if call == calls.len() {
            continue;
        }
        finished = false;
        let mut next = spec.clone();
        if expect(&mut next, calls[call], step).is_some_and(|expected| expected != answers[call]) {
            continue;
        }
        done[thread] += 1;
        let found = explained(&next, threads, done, after);
        done[thread] -= 1;
        if found {
            return true;
        }
    }
    let mut last = spec.clone();
    finished
        && after.iter().all(|(call, answer)| {
            expect(&mut last, *call, 0);
            expect(&mut last, *call, 1).as_ref() == Some(answer)
        })
}

/// One model: calls made before the threads start, those of each thread, and those after all have ended.
struct Model<const K: u64> {
    permits: u32,
    before: Vec<Call>,
    threads: Vec<Vec<Call>>,
    after: Vec<Call>,
    /// At most so many switches away from a thread that could go on; `None` for all.
    preemptions: Option<usize>,
}

impl<const K: u64> Model<K> {
    fn check(self, name: &str) {
        let executions = Arc::new(AtomicU64::new(0));
        let counter = executions.clone();
        let model = Arc::new(self);
        let mut builder = loom::model::Builder::new();
        let deeper = std::env::var("TOLLGATE_LOOM_PREEMPTIONS").ok();
        let deeper = deeper.map(|bound| bound.parse().expect("a number of preemptions"));
        builder.preemption_bound = deeper.or(model.preemptions);
        builder.max_branches = 100_000;
        builder.check(move || {
            counter.fetch_add(1, Ordering::Relaxed);
            model.run();
        });
        println!("{name}: {} executions", executions.load(Ordering::Relaxed));
    }

    fn run(&self) {
        let mut spec = Spec::new(K, limit(self.permits), T0);
        let window = Arc::new(SlidingWindow::<K>::new(limit(self.permits), T0));
        for &call in &self.before {
            expect(&mut spec, call, 0);
            assert_eq!(
                Some(ask(&window, call)),
                expect(&mut spec, call, 1),
                "before the threads: {call:?}"
            );
        }
        let spawned: Vec<_> = self.threads[1..]
            .iter()
            .map(|calls| {
                let (window, calls) = (window.clone(), calls.clone());
                loom::thread::spawn(move || calls.iter().map(|&call| ask(&window, call)).collect::<Vec<_>>())
            })
            .collect();
        let first = self.threads[0].iter().map(|&call| ask(&window, call)).collect();
        let answers = std::iter::once(first).chain(spawned.into_iter().map(|thread| thread.join().unwrap()));
        let threads: Vec<_> = self.threads.iter().cloned().zip(answers).collect();
        let after: Vec<_> = self.after.iter().map(|&call| (call, ask(&window, call))).collect();
        assert!(
            explained(&spec, &threads, &mut vec![0; threads.len()], &after),
            "no order of the calls explains these answers:\n{threads:#?}\nand then {after:#?}"
        );
    }
}

/// Calls that pin down what each sub-bucket holds, by when it is given back.
fn probe<const K: u64>(permits: u32, sub_buckets: std::ops::Range<u64>) -> Vec<Call> {
    sub_buckets.map(|n| take(permits, permits, edge::<K>(n))).collect()
}

#[test]
fn three_threads_race_for_the_last_permit() {
    Model::<2> {
        permits: 2,
        before: vec![take(2, 1, T0)],
        threads: vec![vec![take(2, 1, T0)]; 3],
        after: probe::<2>(2, 0..5),
        preemptions: None,
    }
    .check("last permit");
}

#[test]
fn two_threads_cross_an_edge() {
    // The permit of T0's sub-bucket leaves at edge 3; the threads stand on both sides of it.
    for (name, permits, many) in [("edge, packed", 2, 1), ("edge, one to a word", 40_000, 20_000)] {
        Model::<2> {
            permits,
            before: vec![take(permits, many, T0), take(permits, many, edge::<2>(2))],
            threads: vec![
                vec![take(permits, many, edge::<2>(3) - 1), take(permits, many, edge::<2>(3))],
                vec![take(permits, many, edge::<2>(3)), take(permits, many, edge::<2>(3) + 1)],
            ],
            after: probe::<2>(permits, 3..8),
            preemptions: Some(5),
        }
        .check(name);
    }
}

#[test]
fn a_permit_is_taken_in_what_another_thread_leaves() {
    // The second advances by sums that the first makes wrong meanwhile, to where just one permit is left.
    for (name, permits, many) in [
        ("left behind, packed", 3, 1),
        ("left behind, one to a word", 60_000, 20_000),
    ] {
        Model::<2> {
            permits,
            before: vec![take(permits, many, T0), take(permits, many, edge::<2>(1))],
            threads: vec![
                vec![take(permits, many, edge::<2>(2)), take(permits, many, edge::<2>(3))],
                vec![take(permits, many, edge::<2>(3))],
            ],
            after: probe::<2>(permits, 3..8),
            preemptions: Some(4),
        }
        .check(name);
    }
}

#[test]
fn three_threads_cross_an_edge() {
    Model::<2> {
        permits: 60_000,
        before: vec![take(60_000, 20_000, T0), take(60_000, 20_000, edge::<2>(1))],
        threads: vec![
            vec![take(60_000, 20_000, edge::<2>(3) - 1)],
            vec![take(60_000, 20_000, edge::<2>(3))],
            vec![take(60_000, 40_000, edge::<2>(3) + 1)],
        ],
        after: probe::<2>(60_000, 3..8),
        preemptions: Some(1),
    }
    .check("edge by three");
}

#[test]
fn one_thread_goes_round_the_ring_while_another_lags() {
    // The first stays at T0 while the second fills and leaves K + 2 sub-buckets: every slot is used anew.
    for (name, permits, many) in [
        ("full turn, packed", 3, 1),
        ("full turn, one to a word", 60_000, 20_000),
    ] {
        Model::<2> {
            permits,
            before: vec![take(permits, many, T0)],
            threads: vec![
                vec![take(permits, many, T0), take(permits, many, T0 + 1)],
                (1..=4).map(|n| take(permits, many, edge::<2>(n))).collect(),
            ],
            after: probe::<2>(permits, 4..9),
            preemptions: Some(3),
        }
        .check(name);
    }
}

#[test]
fn three_threads_go_round_the_ring() {
    // The third uses the slot of T0's sub-bucket anew, whichever of the other two is still about it.
    Model::<2> {
        permits: 3,
        before: vec![take(3, 1, T0)],
        threads: vec![
            vec![take(3, 1, edge::<2>(1))],
            vec![take(3, 1, edge::<2>(2))],
            vec![take(3, 1, edge::<2>(3)), take(3, 1, edge::<2>(4))],
        ],
        after: probe::<2>(3, 4..9),
        preemptions: Some(1),
    }
    .check("full turn by three");
}

#[test]
fn a_jump_beyond_the_window_races_with_a_step() {
    for (name, permits, many) in [("jump, packed", 4, 1), ("jump, one to a word", 40_000, 10_000)] {
        Model::<4> {
            permits,
            before: (0..3).map(|n| take(permits, many, edge::<4>(n))).collect(),
            threads: vec![
                vec![take(permits, many, edge::<4>(3)), take(permits, many, edge::<4>(5))],
                vec![take(permits, many, edge::<4>(9)), take(permits, many, edge::<4>(10))],
            ],
            after: probe::<4>(permits, 10..16),
            preemptions: Some(2),
        }
        .check(name);
    }
}

#[test]
fn a_limit_changes_while_permits_are_taken() {
    Model::<2> {
        permits: 3,
        before: vec![take(3, 1, T0)],
        threads: vec![
            vec![take(3, 1, edge::<2>(1)), take(3, 1, edge::<2>(3))],
            vec![take(1, 1, edge::<2>(1)), take(2, 1, edge::<2>(3))],
        ],
        after: probe::<2>(3, 3..8),
        preemptions: Some(3),
    }
    .check("limit change");
}

#[test]
fn clocks_differ() {
    // By a nanosecond across an edge, by a sub-bucket, and by more than the ring.
    for (name, ahead) in [
        ("clocks 1 ns apart", edge::<3>(2)),
        ("clocks 1.2 s apart", edge::<3>(5) + 7),
    ] {
        Model::<3> {
            permits: 3,
            before: vec![take(3, 1, T0)],
            threads: vec![
                vec![take(3, 1, edge::<3>(2) - 1), take(3, 1, edge::<3>(2) - 1)],
                vec![take(3, 1, ahead), take(3, 2, ahead)],
            ],
            after: probe::<3>(3, 5..10),
            preemptions: Some(5),
        }
        .check(name);
    }
}

#[test]
fn peeking_spends_nothing() {
    Model::<2> {
        permits: 2,
        before: vec![take(2, 1, T0), take(2, 1, edge::<2>(1))],
        threads: vec![
            vec![take(2, 1, edge::<2>(3)), take(2, 1, edge::<2>(4))],
            vec![
                Call::Peek {
                    permits: 2,
                    cost: 1,
                    now_ns: edge::<2>(3) - 1,
                },
                Call::Peek {
                    permits: 2,
                    cost: 2,
                    now_ns: edge::<2>(3),
                },
            ],
        ],
        after: probe::<2>(2, 4..8),
        preemptions: Some(2),
    }
    .check("peek");
}

#[test]
fn a_window_closes_while_permits_are_taken() {
    // The permits of the two takers are in what both closers export, or were not given.
    Model::<2> {
        permits: 3,
        before: vec![take(3, 1, T0)],
        threads: vec![
            vec![take(3, 1, edge::<2>(1))],
            vec![take(3, 1, edge::<2>(2))],
            vec![Call::Close],
        ],
        after: vec![Call::Close, take(3, 1, edge::<2>(2))],
        preemptions: Some(3),
    }
    .check("close");
}

#[test]
fn an_idle_window_retires_while_a_permit_is_taken() {
    let now_ns = edge::<2>(3);
    Model::<2> {
        permits: 1,
        before: vec![take(1, 1, T0)],
        threads: vec![
            vec![take(1, 1, now_ns)],
            vec![Call::RetireIfIdle { now_ns }, Call::RetireIfIdle { now_ns }],
        ],
        after: vec![take(1, 1, now_ns)],
        preemptions: None,
    }
    .check("retire");
}

/// What is exported while permits are taken is never less than what was given before.
#[test]
fn an_export_holds_what_was_given_before() {
    loom::model(|| {
        let three = limit(60_000);
        let window = Arc::new(SlidingWindow::<2>::new(three, T0));
        window.take(three, 20_000, T0).unwrap();
        let taker = window.clone();
        let other = loom::thread::spawn(move || {
            taker.take(limit(60_000), 20_000, edge::<2>(1)).unwrap();
            taker.take(limit(60_000), 20_000, edge::<2>(2)).unwrap();
        });
        let mine = window.export(edge::<2>(1));
        assert!(mine.total() >= 20_000 && mine.total().is_multiple_of(20_000));
        other.join().unwrap();
        let all = window.export(edge::<2>(2));
        let ends: Vec<_> = (1..=3).map(|n| (edge::<2>(n) - 1, 20_000)).collect();
        assert_eq!(all.iter().collect::<Vec<_>>(), ends);
    });
}

/// A migration in the middle of a burst: two threads take, and either replaces the window when it is outgrown.
#[test]
fn a_migration_loses_no_count() {
    use loom::sync::Mutex;
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(|| {
        let (small, large) = (limit(3), limit(40_000));
        let first = Arc::new(SlidingWindow::<2>::new(small, T0));
        let slot = Arc::new(Mutex::new(first));
        let other = {
            let slot = slot.clone();
            loom::thread::spawn(move || {
                let mut given = 0_u32;
                for _ in 0..2 {
                    let window = slot.lock().unwrap().clone();
                    // The thread with the old policy leaves a closed or larger window alone.
                    given += u32::from(window.take(limit(3), 1, T0 + 1).is_ok());
                }
                given
            })
        };
        let given = loop {
            let window = slot.lock().unwrap().clone();
            match window.take(large, 39_998, edge::<2>(1)) {
                Ok(_) => break 39_998,
                Err(Refused::Outgrown | Refused::Retired) => {
                    let counts: WindowCounts = window.close_and_export();
                    let next = Arc::new(SlidingWindow::<2>::import(large, &counts, edge::<2>(1)));
                    *slot.lock().unwrap() = next;
                }
                Err(_) => break 0,
            }
        };
        let total = given + other.join().unwrap();
        assert_eq!(slot.lock().unwrap().used(edge::<2>(1)), total);
    });
}

/// The real number of sub-buckets, in both forms of the ring, across an edge at which old permits leave.
#[test]
fn two_threads_cross_an_edge_of_the_real_ring() {
    for (name, permits, many) in [("K = 60, packed", 3, 1), ("K = 60, one to a word", 60_000, 20_000)] {
        Model::<60> {
            permits,
            before: vec![take(permits, many, T0), take(permits, many, edge::<60>(30))],
            threads: vec![
                vec![take(permits, many, edge::<60>(60))],
                vec![
                    take(permits, many, edge::<60>(61)),
                    take(permits, many, edge::<60>(61) + 1),
                ],
            ],
            after: vec![
                take(permits, permits, edge::<60>(90)),
                take(permits, many, edge::<60>(91)),
            ],
            preemptions: Some(5),
        }
        .check(name);
    }
}
