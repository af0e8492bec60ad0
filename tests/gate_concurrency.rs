//! The gate while everything about it changes: decisions go on, limits hold, and no permit is lost or counted twice.
//!
//! Threads prove nothing by their timing here: what is asserted are counts, and that others get on while one works.

#[path = "gate_support/mod.rs"]
mod gate_support;

use gate_support::{CLIENT, START_MS, ask, hourly, key, resync, secret_update, settings, with_secret};
use http::HeaderMap;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};
use tollgate::clock::Clock;
use tollgate::gate::limit::Limit;
use tollgate::gate::{Gate, KeyUpdate, PlanSettings, SecretUpdate, Settings};

/// Keys that no change touches: they must always pass.
const STEADY: u32 = 2_000;
const PLENTY: u32 = 1_000_000_000;
/// How long others may take to get on. Far beyond what they need, on the slowest of machines.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::yield_now();
    }
}

/// Sets the flag when dropped, by a panic too, so that nobody waits for a thread that is gone.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Asks for steady keys until told to stop; counts how many passed, and panics if one did not.
fn ask_steadily(gate: &Gate, clock: &Clock, passed: &AtomicU64, stop: &AtomicBool) {
    let requests: Vec<HeaderMap> = (0..STEADY).map(with_secret).collect();
    let mut next = 0;
    while !stop.load(SeqCst) {
        let n = next % requests.len();
        let decided = ask(gate, "/things", &requests[n], CLIENT, clock.now());
        assert!(decided.is_ok(), "key {n}: {:?}", decided.err());
        passed.fetch_add(1, SeqCst);
        next += 1;
    }
}

/// Permits of every key that the meter was told of.
fn drained(gate: &Gate, sums: &mut HashMap<String, u64>) {
    gate.drain_permits(
        &mut |used| *sums.entry(used.key_id.to_string()).or_default() += used.permits,
        &mut |_| (),
    );
}

#[test]
fn decisions_go_on_during_full_resyncs_and_every_valid_key_passes() {
    let (gate, clock) = (
        gate_support::gate(settings(PLENTY), (0..STEADY).map(|n| key(n, 1))),
        Clock::manual(START_MS),
    );
    let (passed, stop) = ([AtomicU64::new(0), AtomicU64::new(0)], AtomicBool::new(false));
    let mut most_within_one = 0;
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for passed in &passed {
            scope.spawn(|| ask_steadily(&gate, &clock, passed, &stop));
        }
        for round in 0..30_u64 {
            let before = passed.each_ref().map(|count| count.load(SeqCst));
            let is_further = |by: u64| {
                let further = |(count, before): (&AtomicU64, &u64)| count.load(SeqCst) >= before + by;
                stop.load(SeqCst) || passed.iter().zip(&before).all(further)
            };
            let mut building = gate.resync(STEADY as usize).unwrap();
            for n in 0..STEADY + 500 {
                // Other keys come and go in every round.
                let n = if n < STEADY { n } else { n + 500 * (round % 3) as u32 };
                building.add(&key(n, 1)).unwrap();
                if n == STEADY / 2 {
                    // The resync stands still in the middle: both threads get on all the same.
                    wait_until("decisions wait for a resync", || is_further(50));
                }
            }
            building.commit(10 + round).unwrap();
            wait_until("decisions stand still after a resync", || is_further(100));
            let within = passed
                .iter()
                .zip(&before)
                .map(|(count, before)| count.load(SeqCst) - before)
                .min();
            most_within_one = most_within_one.max(within.unwrap());
        }
    });
    let total: u64 = passed.iter().map(|count| count.load(SeqCst)).sum();
    println!(
        "30 resyncs of {} keys beside {total} decisions, all of which passed",
        STEADY + 500
    );
    let mut sums = HashMap::new();
    drained(&gate, &mut sums);
    assert_eq!(sums.values().sum::<u64>(), total, "permits drained are those given");
    assert_eq!(gate.key_count(), (STEADY + 500) as usize);
}

#[test]
fn decisions_go_on_beside_a_stream_of_changes() {
    const CHANGES: u32 = 5_000;
    let (gate, clock) = (
        gate_support::gate(settings(PLENTY), (0..STEADY).map(|n| key(n, 1))),
        Clock::manual(START_MS),
    );
    let (passed, stop) = ([AtomicU64::new(0), AtomicU64::new(0)], AtomicBool::new(false));
    thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for passed in &passed {
            scope.spawn(|| ask_steadily(&gate, &clock, passed, &stop));
        }
        let start = Instant::now();
        let mut revision = 1;
        for change in 0..CHANGES {
            revision += 1;
            let other = STEADY + change % 700;
            match change % 4 {
                // The steady keys are changed too, in what leaves them valid: a rotation's second secret comes and goes.
                0 => gate.apply(KeyUpdate {
                    secrets: vec![secret_update(change % STEADY), secret_update(1_000_000 + change)],
                    ..key(change % STEADY, revision)
                }),
                1 => gate.apply(key((change - 1) % STEADY, revision)),
                2 => gate.apply(key(other, revision)),
                _ => gate.forget(&format!("key_{}", other - 1), revision),
            }
            .unwrap();
            if change % 500 == 0 {
                let before = passed.each_ref().map(|count| count.load(SeqCst));
                wait_until("decisions stand still", || {
                    stop.load(SeqCst)
                        || passed
                            .iter()
                            .zip(&before)
                            .all(|(count, before)| count.load(SeqCst) > before + 50)
                });
            }
        }
        println!("{CHANGES} changes in {:?}", start.elapsed());
    });
    let total: u64 = passed.iter().map(|count| count.load(SeqCst)).sum();
    println!("beside {total} decisions, all of which passed");
    let mut sums = HashMap::new();
    drained(&gate, &mut sums);
    assert_eq!(sums.values().sum::<u64>(), total);
}

/// A burst of one key from several threads, while `disturb` does to the gate what it will; how many passed.
fn burst(gate: &Gate, clock: &Clock, secrets: &[u32], disturb: impl Fn(u64) + Sync) -> u64 {
    const THREADS: usize = 4;
    const EACH: usize = 3_000;
    let (passed, asked, disturbed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (passed, asked, disturbed) = (&passed, &asked, &disturbed);
                scope.spawn(move || {
                    let requests: Vec<HeaderMap> = secrets.iter().map(|n| with_secret(*n)).collect();
                    let mut n = 0;
                    // Until there were disturbances enough, however slow their thread is.
                    while n < EACH || disturbed.load(SeqCst) < 10 {
                        let headers = &requests[(n + thread) % requests.len()];
                        n += 1;
                        match ask(gate, "/things", headers, CLIENT, clock.now()) {
                            Ok(_) => drop(passed.fetch_add(1, SeqCst)),
                            Err(refusal) => assert_eq!(refusal.reason.code(), "RATE_LIMITED"),
                        }
                        asked.fetch_add(1, SeqCst);
                    }
                })
            })
            .collect();
        let disturbing = scope.spawn(|| {
            while !over.load(SeqCst) {
                disturb(disturbed.fetch_add(1, SeqCst));
                // In the middle of the burst, not all of it before the first request.
                let before = asked.load(SeqCst);
                wait_until("the burst stands still", || {
                    over.load(SeqCst) || asked.load(SeqCst) > before + 20
                });
            }
        });
        for thread in asking {
            thread.join().unwrap();
        }
        over.store(true, SeqCst);
        disturbing.join().unwrap();
    });
    passed.load(SeqCst)
}

const BURST_LIMIT: u32 = 4_000;

fn with_two_secrets(revision: u64) -> KeyUpdate {
    KeyUpdate {
        secrets: vec![
            SecretUpdate {
                not_after_ms: Some(START_MS + 3_600_000),
                ..secret_update(1)
            },
            secret_update(2),
        ],
        ..key(1, revision)
    }
}

#[test]
fn a_limit_is_kept_exactly_across_rotations_in_a_burst() {
    let (gate, clock) = (
        gate_support::gate(settings(BURST_LIMIT), [key(1, 1)]),
        Clock::manual(START_MS),
    );
    // The first secret is there throughout, the second one comes and goes.
    let passed = burst(&gate, &clock, &[1], |round| {
        gate.apply(if round % 2 == 0 {
            with_two_secrets(2 + round)
        } else {
            key(1, 2 + round)
        })
        .unwrap();
    });
    assert_eq!(passed, u64::from(BURST_LIMIT));
}

#[test]
fn a_limit_is_kept_exactly_across_resyncs_in_a_burst_of_both_secrets() {
    let gate = gate_support::gate(settings(BURST_LIMIT), [with_two_secrets(1), key(9, 1)]);
    let clock = Clock::manual(START_MS);
    let passed = burst(&gate, &clock, &[1, 2], |round| {
        // Another key beside it comes and goes, so that slots are given back and taken again.
        resync(&gate, [with_two_secrets(1), key(9 + (round % 5) as u32, 1)], 2 + round);
    });
    assert_eq!(passed, u64::from(BURST_LIMIT));
}

#[test]
fn a_limit_is_kept_exactly_across_reloads_and_changes_of_the_windows_length() {
    let gate = gate_support::gate(settings(BURST_LIMIT), [key(1, 1)]);
    let clock = Clock::manual(START_MS);
    let passed = burst(&gate, &clock, &[1], |round| {
        // Each length makes another window out of the counts of the last one.
        let window_ms = [3_600_000, 7_200_000, 1_800_000][(round % 3) as usize];
        let mut changed = settings(BURST_LIMIT);
        changed.tiers[0].1 = Limit::new(BURST_LIMIT, window_ms).unwrap();
        gate.reload(changed).unwrap();
    });
    assert_eq!(passed, u64::from(BURST_LIMIT));
}

#[test]
fn a_changing_limit_is_never_passed_by_more_than_its_highest_value() {
    let plans = |plan: &str, permits| PlanSettings {
        name: plan.into(),
        max_in_flight: None,
        tiers: vec![("default".into(), hourly(permits))],
    };
    let settings = Settings {
        // One fits the compact window, one does not: the window is replaced at each change of plan.
        plans: vec![plans("starter", 60), plans("large", BURST_LIMIT)],
        ..settings(1)
    };
    let (gate, clock) = (gate_support::gate(settings, [key(1, 1)]), Clock::manual(START_MS));
    let with_plan = |plan: &str, revision| KeyUpdate {
        plan: plan.into(),
        ..key(1, revision)
    };
    let passed = burst(&gate, &clock, &[1], |round| {
        gate.apply(with_plan(["large", "starter"][(round % 2) as usize], 2 + round))
            .unwrap();
    });
    assert!(passed <= u64::from(BURST_LIMIT), "{passed}");
    // What is left can still be had, to the last permit.
    gate.apply(with_plan("large", u64::MAX - 1)).unwrap();
    let headers = with_secret(1);
    let rest = (0..BURST_LIMIT + 10)
        .filter(|_| ask(&gate, "/things", &headers, CLIENT, clock.now()).is_ok())
        .count() as u64;
    assert_eq!(passed + rest, u64::from(BURST_LIMIT));
}

#[test]
fn windows_given_back_while_they_are_used_lose_no_permit() {
    const KEYS: u32 = 16;
    const EACH: u32 = 20_000;
    let gate = gate_support::gate(settings(PLENTY), (0..KEYS).map(|n| key(n, 1)));
    let clock = Clock::manual(START_MS);
    let (over, given_back) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut sums = HashMap::new();
    let passed = thread::scope(|scope| {
        let _stop = StopAtEnd(&over);
        let housekeeping = scope.spawn(|| {
            while !over.load(SeqCst) {
                // Every window is idle now, but for the requests that come at this very moment.
                clock.advance(Duration::from_secs(2 * 3600));
                gate.give_back_idle(clock.now());
                given_back.fetch_add(1, SeqCst);
                thread::yield_now();
            }
        });
        let metering = scope.spawn(|| {
            let mut sums = HashMap::new();
            while !over.load(SeqCst) {
                drained(&gate, &mut sums);
                thread::yield_now();
            }
            sums
        });
        let asking: Vec<_> = (0..3)
            .map(|thread| {
                let (gate, clock) = (&gate, &clock);
                scope.spawn(move || {
                    let requests: Vec<HeaderMap> = (0..KEYS).map(with_secret).collect();
                    let ask_one = |n: u32| {
                        let headers = &requests[((n + thread) % KEYS) as usize];
                        u64::from(ask(gate, "/things", headers, CLIENT, clock.now()).is_ok())
                    };
                    (0..EACH).map(ask_one).sum::<u64>()
                })
            })
            .collect();
        let passed: u64 = asking.into_iter().map(|thread| thread.join().unwrap()).sum();
        over.store(true, SeqCst);
        housekeeping.join().unwrap();
        sums = metering.join().unwrap();
        passed
    });
    assert_eq!(passed, u64::from(3 * EACH), "no limit was near");
    assert!(given_back.load(SeqCst) > 10, "{given_back:?} rounds of giving back");
    drained(&gate, &mut sums);
    assert_eq!(sums.values().sum::<u64>(), passed, "permits drained are those given");
    assert_eq!(sums.len(), KEYS as usize);
    let mut again = HashMap::new();
    drained(&gate, &mut again);
    assert!(again.is_empty(), "{again:?} were drained twice");
}
