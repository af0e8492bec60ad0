//! The window against an exact log of every permit, over random and adversarial arrivals.
//!
//! `TOLLGATE_MODEL_DECISIONS` sets how many decisions are tried, `TOLLGATE_MODEL_SEED` where the generator starts.
//! The checks cost a constant time per decision, so that 10^9 of them are a matter of minutes in a release build:
//! `TOLLGATE_MODEL_DECISIONS=1000000000 cargo test --release --test window_model arrivals -- --nocapture`.

#[path = "window_support/arrivals.rs"]
mod arrivals;
#[path = "window_support/exact_log.rs"]
mod exact_log;
#[path = "window_support/spec.rs"]
mod spec;
/// What `spec.rs` expects beside it.
use tollgate::gate::{limit, window};

use arrivals::{Arrivals, Pattern, Rng};
use exact_log::ExactLog;
use proptest::prelude::*;
use spec::Spec;
use tollgate::gate::limit::Limit;
use tollgate::gate::window::{Refused, Window};

const S: u64 = 1_000_000_000;

fn decisions(default: u64) -> u64 {
    from_environment("TOLLGATE_MODEL_DECISIONS").unwrap_or(default)
}

fn seed() -> u64 {
    from_environment("TOLLGATE_MODEL_SEED").unwrap_or(0x70_11_9a_7e)
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.replace('_', "").parse().expect("a number of decisions, or a seed"))
}

/// Decisions to one history of one window.
const HISTORY: u64 = 5_000;
/// Ninety years, some before time stands still for the window: a lone permit in 30 days goes a long way.
const END_OF_TIME_NS: u64 = 90 * 365 * 86_400 * S;

#[derive(Default, Debug)]
struct Tally {
    histories: u64,
    decisions: u64,
    refused: u64,
    waits: u64,
    limit_changes: u64,
    at_the_limit: u64,
}

#[test]
fn arrivals_of_every_pattern_keep_every_promise() {
    let (wanted, mut rng, mut tally) = (decisions(20_000_000), Rng(seed()), Tally::default());
    let started = std::time::Instant::now();
    while tally.decisions < wanted {
        let pattern = Pattern::ALL[tally.histories as usize % Pattern::ALL.len()];
        one_history(pattern, rng.next(), &mut tally);
    }
    println!(
        "seed {}: {tally:?}, no promise broken, in {:.1} s",
        seed(),
        started.elapsed().as_secs_f64()
    );
    assert!(tally.decisions >= wanted && tally.refused > 0 && tally.waits > tally.histories / 2);
    assert!(
        tally.at_the_limit > tally.histories / 2,
        "most histories reach their limit, or they prove nothing"
    );
}

/// One window through one history, checked at every decision.
fn one_history(pattern: Pattern, seed: u64, tally: &mut Tally) {
    let mut rng = Rng(seed);
    let mut arrivals = Arrivals::new(pattern, &mut rng);
    let mut limit = arrivals.limit;
    let mut window = Window::new(limit, arrivals.now_ns);
    let mut log = ExactLog::new(limit.window_ms());
    if arrivals.moves_backwards() {
        log.keep_all();
    }
    log.moved_to(arrivals.now_ns);
    let context = |limit: Limit, now_ns: u64| format!("pattern {pattern:?}, seed {seed}, {limit:?}, at {now_ns} ns");
    let mut reached = false;

    for _ in 0..HISTORY {
        let (now_ns, cost) = arrivals.next();
        if now_ns > END_OF_TIME_NS {
            break;
        }
        tally.decisions += 1;
        if arrivals.limit != limit {
            limit = arrivals.limit;
            tally.limit_changes += 1;
        }
        let answer = match window.take(limit, cost, now_ns) {
            Err(Refused::Outgrown) => {
                window = Window::import(limit, &window.close_and_export(), now_ns);
                window.take(limit, cost, now_ns)
            }
            answer => answer,
        };
        log.moved_to(now_ns);
        let permits = u64::from(limit.permits());
        match answer {
            Ok(taken) => {
                let within = log.given(now_ns, cost);
                assert!(
                    within <= permits,
                    "{within} permits in a window: {}",
                    context(limit, now_ns)
                );
                // What the window counts includes all that the log does: it never promises too much.
                assert!(
                    u64::from(taken.remaining) <= permits - within,
                    "{}",
                    context(limit, now_ns)
                );
                arrivals.granted();
                reached |= taken.remaining == 0;
            }
            Err(Refused::Limited { retry_after_s, .. }) => {
                tally.refused += 1;
                reached = true;
                let lately = log.within_a_sub_bucket_more();
                assert!(
                    lately + u64::from(cost) > permits,
                    "refused with {lately}: {}",
                    context(limit, now_ns)
                );
                arrivals.refused(retry_after_s);
                if arrivals.waits_it_out(&mut rng) {
                    tally.waits += 1;
                    tally.decisions += 2;
                    let wait_ns = u64::from(retry_after_s) * S;
                    let early = window.take(limit, cost, now_ns + wait_ns - S);
                    assert!(early.is_err(), "a second too long a wait: {}", context(limit, now_ns));
                    let due = window.take(limit, cost, now_ns + wait_ns);
                    assert!(due.is_ok(), "too short a wait: {}", context(limit, now_ns));
                    log.moved_to(now_ns + wait_ns);
                    assert!(
                        log.given(now_ns + wait_ns, cost) <= permits,
                        "{}",
                        context(limit, now_ns)
                    );
                    arrivals.moved_to(now_ns + wait_ns);
                }
            }
            Err(other) => panic!("{other:?}: {}", context(limit, now_ns)),
        }
    }
    if let Some(most) = log.most_in_any_window_if_kept() {
        assert!(
            most <= u64::from(limit.permits()),
            "{most} permits in a window: {}",
            context(limit, arrivals.now_ns)
        );
    }
    tally.at_the_limit += u64::from(reached);
    tally.histories += 1;
}

/// The estimate of two fixed counters that others use, over the same arrivals: the baseline that shows that the
/// patterns find what there is to find.
#[test]
fn two_counters_exceed_the_limit_on_the_same_arrivals() {
    let mut rng = Rng(seed());
    println!("two counters, interpolated:");
    let mut worst_of_all = 0.0_f64;
    for pattern in Pattern::ALL {
        let (mut worst, mut false_refusals, mut refusals) = (0.0_f64, 0_u64, 0_u64);
        for _ in 0..40 {
            let mut arrivals = Arrivals::new(pattern, &mut Rng(rng.next()));
            let limit = arrivals.limit;
            if arrivals.moves_backwards() || arrivals.changes_limits() {
                continue;
            }
            let (mut counters, mut log) = (TwoCounters::default(), ExactLog::new(limit.window_ms()));
            for _ in 0..HISTORY {
                let (now_ns, cost) = arrivals.next();
                log.moved_to(now_ns);
                if counters.take(limit, cost, now_ns) {
                    worst = worst.max(log.given(now_ns, cost) as f64 / f64::from(limit.permits()));
                    arrivals.granted();
                } else {
                    refusals += 1;
                    let lately = log.within_a_sub_bucket_more() + u64::from(cost);
                    false_refusals += u64::from(lately <= u64::from(limit.permits()));
                    arrivals.refused(1);
                }
            }
        }
        println!("  {pattern:?}: up to {worst:.3} × L in a window, {false_refusals} of {refusals} refusals false");
        worst_of_all = worst_of_all.max(worst);
    }
    assert!(
        worst_of_all > 1.9,
        "the patterns drive the estimate to nearly twice the limit, not {worst_of_all}"
    );
}

#[derive(Default)]
struct TwoCounters {
    period: u64,
    current: u64,
    previous: u64,
}

impl TwoCounters {
    fn take(&mut self, limit: Limit, cost: u32, now_ns: u64) -> bool {
        let window_ns = limit.window_ms() * 1_000_000;
        let period = now_ns / window_ns;
        if period > self.period {
            self.previous = if period == self.period + 1 { self.current } else { 0 };
            (self.period, self.current) = (period, 0);
        }
        let left = 1.0 - (now_ns % window_ns) as f64 / window_ns as f64;
        let estimate = self.previous as f64 * left + self.current as f64;
        let given = estimate + f64::from(cost) <= f64::from(limit.permits());
        self.current += if given { u64::from(cost) } else { 0 };
        given
    }
}

/// A step of a small history: how the clock moves, in sub-buckets and nanoseconds, and what is asked.
#[derive(Clone, Copy, Debug)]
struct Step {
    sub_buckets: i64,
    ns: i64,
    cost: u32,
    permits: u32,
    peek: bool,
}

fn steps(most: u32) -> impl Strategy<Value = Vec<Step>> {
    let sub_buckets = prop_oneof![4 => Just(0_i64), 4 => 0..3_i64, 2 => 28..33_i64, 2 => 58..63_i64, 1 => -70..200_i64];
    let ns = prop_oneof![3 => Just(0_i64), 3 => -1..=1_i64, 1 => -20_000_000..20_000_000_i64];
    let step = (
        sub_buckets,
        ns,
        0..=most / 2 + 1,
        most / 2 + 1..=most,
        prop::bool::weighted(0.1),
    );
    let step = step.prop_map(|(sub_buckets, ns, cost, permits, peek)| Step {
        sub_buckets,
        ns,
        cost,
        permits,
        peek,
    });
    prop::collection::vec(step, 1..120)
}

fn matches_the_spec(window_ms: u64, most: u32, steps: Vec<Step>) -> Result<(), TestCaseError> {
    // A sub-bucket's edge, where all the off-by-ones are.
    let mut now_ns = 500 * window_ms * 1_000_000;
    let first = Limit::new(most, window_ms).unwrap();
    let (window, mut spec) = (Window::new(first, now_ns), Spec::new(60, first, now_ns));
    for step in steps {
        let limit = Limit::new(step.permits, window_ms).unwrap();
        let by = step.sub_buckets * (window_ms * 1_000_000).div_ceil(60) as i64 + step.ns;
        now_ns = now_ns.saturating_add_signed(by);
        if step.peek {
            let mut aside = spec.clone();
            aside.tick(now_ns);
            let expected = aside.take(limit, step.cost, now_ns).map(|_| ());
            if matches!(expected, Err(Refused::Limited { .. })) {
                spec.tick(now_ns);
            }
            prop_assert_eq!(window.peek(limit, step.cost, now_ns), expected);
        } else {
            if step.cost <= step.permits {
                spec.tick(now_ns);
            }
            prop_assert_eq!(
                window.take(limit, step.cost, now_ns),
                spec.take(limit, step.cost, now_ns)
            );
        }
        let mut later = spec.clone();
        later.tick(now_ns);
        prop_assert_eq!(u64::from(window.used(now_ns)), later.counted());
        prop_assert_eq!(window.export(now_ns).total(), later.counted());
        let moved = Window::import(limit, &window.export(now_ns), now_ns);
        prop_assert_eq!(moved.export(now_ns), window.export(now_ns));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every answer in full, with remaining, reset and wait, in all four forms of the ring; shrunk where it fails.
    #[test]
    fn small_histories_answer_as_the_sequential_program(
        (most, steps) in prop_oneof![
            Just(1_u32), Just(2), Just(3), Just(10), Just(63), Just(64), Just(255), Just(256), Just(1_023),
            Just(1_024), Just(8_191), Just(8_192), Just(32_767), Just(32_768), Just(524_287), Just(524_288),
            Just(Limit::MAX_PERMITS)
        ].prop_flat_map(|most| (Just(most), steps(most))),
        window_ms in prop_oneof![Just(1_000_u64), Just(1_001), Just(60_000), Just(3_600_000), Just(2_592_000_000)],
    ) {
        matches_the_spec(window_ms, most, steps)?;
    }
}
