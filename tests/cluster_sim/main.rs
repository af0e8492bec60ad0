//! The real protocol, many gates and a store that fails in every way there is, in a world where time is a number.
//!
//! Each seed is a plan: gates, limit, window, demand, faults. What comes of it is checked against an exact log of every
//! permit. `TOLLGATE_CLUSTER_SEED=N` runs one seed and prints what happened in it; `TOLLGATE_PROOF=full` runs 100,000.

#[path = "../gate_support/mod.rs"]
mod gate_support;
mod many;
mod plan;
#[path = "../cluster/sharing_gate.rs"]
mod sharing_gate;
mod waiting;
mod world;

use plan::Plan;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use world::Outcome;

/// How many seeds `make test` runs.
const SEEDS: u64 = 10_000;
const SEEDS_FULL: u64 = 100_000;

#[test]
fn never_more_than_the_limit_and_hardly_less() {
    if let Ok(seed) = std::env::var("TOLLGATE_CLUSTER_SEED") {
        let plan = Plan::of(seed.parse().expect("TOLLGATE_CLUSTER_SEED is a number"));
        println!("{plan:#?}");
        let outcome = world::run(&plan, true);
        println!("{outcome:#?}");
        assert_eq!(outcome.faults(&plan), Vec::<String>::new());
        return;
    }
    let full = std::env::var("TOLLGATE_PROOF").is_ok_and(|proof| proof == "full");
    let seeds = if full { SEEDS_FULL } else { SEEDS };
    let (next, failed, sums) = (AtomicU64::new(0), Mutex::new(vec![]), Mutex::new(Sums::default()));
    std::thread::scope(|threads| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            threads.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let plan = Plan::of(seed);
                    let outcome = world::run(&plan, false);
                    let faults = outcome.faults(&plan);
                    sums.lock().unwrap().add(&plan, &outcome);
                    if !faults.is_empty() {
                        println!("TOLLGATE_CLUSTER_SEED={seed}: {}", faults.join("; "));
                        failed.lock().unwrap().push(seed);
                    }
                }
            });
        }
    });
    let (failed, sums) = (failed.into_inner().unwrap(), sums.into_inner().unwrap());
    println!("{seeds} seeds, {} failed\n{sums:#?}", failed.len());
    sums.check(seeds);
    assert!(
        failed.is_empty(),
        "{} of {seeds} seeds failed: {failed:?}",
        failed.len()
    );
}

/// What was seen over all seeds, so that it is known that the faults struck.
#[derive(Debug, Default)]
struct Sums {
    permits: u64,
    calls: u64,
    granted: u64,
    waited: u64,
    runs_lost: u64,
    runs_with_identities: u64,
    runs_over_with_share: u64,
    worst_over_of_bound: f64,
    worst_under: f64,
    judged_under: u64,
}

impl Sums {
    fn add(&mut self, plan: &Plan, outcome: &Outcome) {
        self.permits += outcome.permits;
        self.calls += outcome.calls;
        self.granted += outcome.granted;
        self.waited += outcome.waited;
        self.runs_lost += u64::from(outcome.lost_seen);
        self.runs_with_identities += u64::from(outcome.identities > 1);
        self.runs_over_with_share += u64::from(outcome.most_in_a_window > u64::from(plan.limit));
        self.worst_over_of_bound = self
            .worst_over_of_bound
            .max(outcome.most_in_a_window as f64 / outcome.bound as f64);
        if plan.is_judged_for_under_admission() {
            self.judged_under += 1;
            self.worst_under = self.worst_under.max(outcome.under_admission());
        }
    }

    fn check(&self, seeds: u64) {
        assert!(self.permits > 10 * seeds, "hardly anything was admitted");
        assert!(self.runs_lost > seeds / 20, "the store was hardly ever lost");
        assert!(self.runs_with_identities > seeds / 20, "the store hardly ever changed");
        assert!(self.judged_under > seeds / 50, "under-admission was hardly ever judged");
        assert!(self.worst_over_of_bound > 0.99, "the limit was never reached");
    }
}
