//! The window under real threads: races for the last permit, migrations in the middle of a burst, a running clock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use arc_swap::ArcSwap;
use tollgate::clock::Clock;
use tollgate::gate::limit::Limit;
use tollgate::gate::window::{Refused, Window, WindowCounts};

const S: u64 = 1_000_000_000;
const T0: u64 = 1_000 * 3_600 * S;

fn limit(permits: u32, window_ms: u64) -> Limit {
    Limit::new(permits, window_ms).unwrap()
}

#[test]
fn of_64_threads_exactly_one_gets_the_last_permit() {
    const ROUNDS: usize = 1_000_000;
    const CHUNK: usize = 10_000;
    const THREADS: usize = 64;
    // One form of the ring after the other; the last permit is left in head's sub-bucket, or becomes free at the
    // edge at which all the threads arrive, or after a long rest.
    let limits = [1, 63, 1_000, 30_000, 1_000_000].map(|permits| limit(permits, 60_000));
    let arrive = [T0 + 1, T0 + 61 * S, T0 + 400 * S];
    let prepare = |round: usize| {
        let (limit, arrival) = (limits[round % limits.len()], round % arrive.len());
        let window = Window::new(limit, T0);
        if arrival == 0 {
            window.take(limit, limit.permits() - 1, T0).unwrap();
        } else {
            window.take(limit, 1, T0).unwrap();
            if arrival == 1 {
                window.take(limit, limit.permits() - 1, T0 + 30 * S).unwrap();
            }
        }
        window
    };

    let windows = ArcSwap::from_pointee(Vec::new());
    let wins: Vec<AtomicU32> = (0..CHUNK).map(|_| AtomicU32::new(0)).collect();
    let (ready, done) = (Barrier::new(THREADS + 1), Barrier::new(THREADS + 1));
    let mut rounds = 0;
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (windows, wins, ready, done) = (&windows, &wins, &ready, &done);
            scope.spawn(move || {
                for chunk in 0..ROUNDS / CHUNK {
                    ready.wait();
                    let windows = windows.load();
                    // Some skew, so that not all stand at the same window for ever.
                    for step in 0..CHUNK {
                        let at = (step + thread % 4) % CHUNK;
                        let round = chunk * CHUNK + at;
                        let limit = limits[round % limits.len()];
                        // After a rest all permits are free: then the whole limit is what only one can have.
                        let whole = round % arrive.len() == 2;
                        let cost = if whole { limit.permits() } else { 1 };
                        let window: &Window = &windows[at];
                        if window.take(limit, cost, arrive[round % arrive.len()]).is_ok() {
                            wins[at].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    drop(windows);
                    done.wait();
                }
            });
        }
        for chunk in 0..ROUNDS / CHUNK {
            windows.store(Arc::new(
                (0..CHUNK).map(|at| prepare(chunk * CHUNK + at)).collect::<Vec<_>>(),
            ));
            ready.wait();
            done.wait();
            for (at, wins) in wins.iter().enumerate() {
                let won = wins.swap(0, Ordering::Relaxed);
                assert_eq!(won, 1, "winners of round {}", chunk * CHUNK + at);
                rounds += 1;
            }
        }
    });
    println!("{THREADS} threads, {rounds} rounds, exactly one winner in each");
    assert_eq!(rounds, ROUNDS);
}

/// A key's place for its window, as the gate keeps one: replaced when closed or outgrown, by whoever notices.
struct Place(ArcSwap<Window>);

impl Place {
    fn take(&self, limit: Limit, cost: u32, now_ns: u64) -> Result<(), Refused> {
        loop {
            let window = self.0.load();
            match window.take(limit, cost, now_ns) {
                Err(Refused::Retired | Refused::Outgrown) => {
                    let counts = window.close_and_export();
                    let next = Arc::new(Window::import(limit, &counts, now_ns));
                    self.0.compare_and_swap(&*window, next);
                }
                answer => return answer.map(drop),
            }
        }
    }
}

#[test]
fn migrations_and_limit_changes_in_a_burst_lose_no_count() {
    const THREADS: u64 = 8;
    let policies = [
        limit(50, 60_000),
        limit(900, 60_000),
        limit(20_000, 90_000),
        limit(60_000, 60_000),
    ];
    let mut given_in_all = 0;
    for round in 0..150 {
        let place = Place(ArcSwap::from_pointee(Window::new(policies[0], T0)));
        let (policy, given) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            let takers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (place, policy, given) = (&place, &policy, &given);
                    scope.spawn(move || {
                        for request in 0..1_000 {
                            if request % 20 == thread {
                                policy.fetch_add(1, Ordering::Relaxed);
                            }
                            let limit = policies[policy.load(Ordering::Relaxed) as usize % policies.len()];
                            let cost = 1 + (thread + request) as u32 % 7;
                            if place.take(limit, cost, T0 + 10).is_ok() {
                                given.fetch_add(u64::from(cost), Ordering::Release);
                            }
                            if request % 10 == 9 {
                                // The journal looks on, and sees no less than what was given before.
                                let window = place.0.load();
                                let before = given.load(Ordering::Acquire);
                                let counted = window.export(T0 + 10).total();
                                assert!(
                                    counted >= before || window.is_retired(),
                                    "{counted} exported of {before}"
                                );
                            }
                        }
                    })
                })
                .collect();
            for taker in takers {
                taker.join().unwrap();
            }
        });
        let given = given.into_inner();
        assert_eq!(
            u64::from(place.0.load().used(T0 + 10)),
            given,
            "round {round}: all that was given is counted"
        );
        assert!(given <= 60_000, "round {round}: {given} given of the largest limit");
        given_in_all += given;
    }
    println!("150 rounds of 400 policy changes and 800 exports, {given_in_all} permits, every permit counted");
    assert!(given_in_all > 150 * 50);
}

#[test]
fn a_window_given_back_in_a_burst_gives_no_permit_twice() {
    const ROUNDS: u64 = 3_000;
    let ten = limit(10, 1_000);
    let place = Place(ArcSwap::from_pointee(Window::new(ten, T0)));
    let (start, end) = (Barrier::new(5), Barrier::new(5));
    let (given, retired) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for thread in 0..4 {
            let (place, given, retired, start, end) = (&place, &given, &retired, &start, &end);
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    start.wait();
                    let now_ns = T0 + round * 2 * S;
                    if thread == 0 {
                        // The sweep comes to a window that was idle until just now.
                        for _ in 0..4 {
                            let window = place.0.load();
                            let open = !window.is_retired();
                            retired.fetch_add(u64::from(open && window.retire_if_idle(now_ns)), Ordering::Relaxed);
                        }
                    }
                    for _ in 0..8 {
                        given.fetch_add(u64::from(place.take(ten, 1, now_ns).is_ok()), Ordering::Relaxed);
                    }
                    end.wait();
                }
            });
        }
        for round in 1..=ROUNDS {
            start.wait();
            end.wait();
            assert_eq!(given.swap(0, Ordering::Relaxed), 10, "permits given in round {round}");
        }
    });
    println!(
        "{ROUNDS} rounds, {} windows given back, 10 permits in every round",
        retired.load(Ordering::Relaxed)
    );
    assert!(retired.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_running_clock_and_racing_threads_keep_the_limit() {
    const PERMITS: u32 = 5_000;
    let (limit, clock) = (limit(PERMITS, 1_000), Clock::system());
    let window = Window::new(limit, clock.now().elapsed_ns);
    let until = clock.now().elapsed_ns + 5 * S / 2;
    // Each permit with the instants before and after it was taken, as a thread may be put aside in between.
    let mut permits: Vec<(u64, u64)> = thread::scope(|scope| {
        let takers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut mine = Vec::new();
                    loop {
                        let before = clock.now().elapsed_ns;
                        if before > until {
                            return mine;
                        }
                        if window.take(limit, 1, before).is_ok() {
                            mine.push((before, clock.now().elapsed_ns));
                        }
                    }
                })
            })
            .collect();
        takers.into_iter().flat_map(|taker| taker.join().unwrap()).collect()
    });
    let skew = permits.iter().map(|&(before, after)| after - before).max().unwrap();
    permits.sort_unstable();
    let span = S.saturating_sub(skew);
    let most = (0..permits.len())
        .map(|first| permits[first..].partition_point(|&(before, _)| before <= permits[first].0 + span))
        .max()
        .unwrap();
    println!(
        "{} permits in 2.5 s, at most {most} in any {} ms (readings up to {} µs old)",
        permits.len(),
        span / 1_000_000,
        skew / 1_000
    );
    assert!(most <= PERMITS as usize);
    // 2.5 s hold two windows of 61/60 s and the beginning of a third, unless the machine stood still.
    assert!(permits.len() > 2 * PERMITS as usize);
}

/// The journal's counts of an earlier process, merged into a window that is already in use.
#[test]
fn counts_are_merged_into_a_window_in_use() {
    let limit = limit(1_000, 60_000);
    let place = Place(ArcSwap::from_pointee(Window::new(limit, T0)));
    let given = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..400 {
                    given.fetch_add(u64::from(place.take(limit, 1, T0).is_ok()), Ordering::Relaxed);
                }
            });
        }
        let journal = WindowCounts::from_pairs([(T0 - 5 * S, 300), (T0 - 50 * S, 100), (T0 - 70 * S, 7_000)]);
        let mut counts = place.0.load().close_and_export();
        // A taker may replace the closed window first; what it carried over is closed and merged again.
        loop {
            let found = place.0.load();
            if !found.is_retired() {
                counts = found.close_and_export();
            }
            let mut merged = counts.clone();
            merged.merge(&journal);
            let next = Arc::new(Window::import(limit, &merged, T0));
            if Arc::ptr_eq(&place.0.compare_and_swap(&*found, next), &found) {
                break;
            }
        }
    });
    assert_eq!(given.load(Ordering::Relaxed) + 400, u64::from(place.0.load().used(T0)));
    assert!(place.0.load().used(T0) <= 1_000 + 400);
}
