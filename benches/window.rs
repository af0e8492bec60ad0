//! The window beside its alternatives: a bare compare-and-swap, governor, `pingora_limits::rate::Rate`, and an exact
//! log behind a mutex.
//!
//! `cargo bench --bench window` measures in interleaved rounds, so that a machine that slows down does so for all,
//! and writes medians and quartiles to `benches/results/window.md`; `cargo bench --bench window -- --bench criterion`
//! runs criterion's statistics over the same calls of one thread.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use criterion::Criterion;
use governor::clock::FakeRelativeClock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use pingora_limits::rate::Rate;
use tollgate::gate::limit::Limit;
use tollgate::gate::window::{Refused, Window};

const S: u64 = 1_000_000_000;
const T0: u64 = 1_000 * 3_600 * S;
/// Calls to a measurement: some milliseconds, so that two threads run beside each other for most of it.
const CALLS: u64 = 1_000_000;

/// What a key has, made anew for every measurement so that none inherits another's state.
trait Limiter: Sync {
    /// What the answer comes to, with all of its parts used.
    fn take(&self, now_ns: u64) -> u64;

    /// Many calls, compiled for each contender, so that the choice between them is no part of the time.
    fn run(&self, step_ns: u64, calls: u64) -> u64 {
        let (mut now_ns, mut sum) = (T0, 0_u64);
        for _ in 0..calls {
            now_ns += step_ns;
            sum = sum.wrapping_add(self.take(black_box(now_ns)));
        }
        sum
    }
}

struct BareSwap(AtomicU64);

impl Limiter for BareSwap {
    #[inline(always)]
    fn take(&self, _: u64) -> u64 {
        let mut count = self.0.load(Ordering::Acquire);
        loop {
            match self
                .0
                .compare_exchange(count, count + 1, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return count,
                Err(found) => count = found,
            }
        }
    }
}

/// On a cache line of its own, as the gate keeps it.
#[repr(align(64))]
struct Ours(Window, Limit);

impl Limiter for Ours {
    #[inline(always)]
    fn take(&self, now_ns: u64) -> u64 {
        match self.0.take(self.1, 1, now_ns) {
            Ok(taken) => u64::from(taken.remaining) + u64::from(taken.reset_s),
            Err(Refused::Limited { retry_after_s, reset_s }) => u64::from(retry_after_s) + u64::from(reset_s),
            Err(_) => 0,
        }
    }
}

/// Governor's token bucket, with a clock that costs it one atomic load.
struct Governor(TokenBucket, FakeRelativeClock, bool);

type TokenBucket = RateLimiter<NotKeyed, InMemoryState, FakeRelativeClock, NoOpMiddleware<Nanos>>;

impl Limiter for Governor {
    #[inline(always)]
    fn take(&self, _: u64) -> u64 {
        if self.2 {
            self.1.advance(Duration::from_nanos(STEP_NS));
        }
        u64::from(self.0.check().is_ok())
    }
}

/// Pingora's sketch of counters reads the clock itself, and counts without deciding.
struct PingoraRate(Rate, isize);

impl Limiter for PingoraRate {
    #[inline(always)]
    fn take(&self, _: u64) -> u64 {
        u64::from(self.0.observe(&7_u64, 1) <= self.1)
    }
}

struct MutexLog(Mutex<VecDeque<u64>>, Limit);

impl Limiter for MutexLog {
    #[inline(always)]
    fn take(&self, now_ns: u64) -> u64 {
        let mut log = self.0.lock().expect("no holder panics");
        let since = now_ns.saturating_sub(self.1.window_ms() * 1_000_000);
        while log.front().is_some_and(|&at| at < since) {
            log.pop_front();
        }
        let fits = log.len() < self.1.permits() as usize;
        if fits {
            log.push_back(now_ns);
        }
        u64::from(fits)
    }
}

/// What is asked of a limiter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    /// Time stands still and everything passes.
    Pass,
    /// 4,900 a second against a limit of 5,000: everything passes, one call in 82 begins a sub-bucket.
    Steady,
    /// One call to each sub-bucket.
    Sparse,
    /// The limit is used up: everything is refused, with its waiting time where there is one.
    Refuse,
}

const LOADS: [(Load, &str); 4] = [
    (Load::Pass, "all pass, one sub-bucket"),
    (Load::Steady, "all pass, at 98 % of 5,000 a second"),
    (Load::Sparse, "all pass, a sub-bucket each"),
    (Load::Refuse, "all refused, of 5,000 a second"),
];

/// The time between calls at 4,900 a second.
const STEP_NS: u64 = S / 4_900;

impl Load {
    fn step_ns(self) -> u64 {
        match self {
            Load::Pass | Load::Refuse => 0,
            Load::Steady => STEP_NS,
            Load::Sparse => S / 60 + 1,
        }
    }

    fn limit(self) -> Limit {
        let permits = if self == Load::Pass { Limit::MAX_PERMITS } else { 5_000 };
        Limit::new(permits, 1_000).expect("within the ranges")
    }
}

type Make = fn(Load) -> Option<Box<dyn Limiter>>;

const CONTENDERS: [(&str, Make); 5] = [
    ("bare compare-and-swap", |load| {
        (load == Load::Pass).then(|| Box::new(BareSwap(AtomicU64::new(0))) as Box<dyn Limiter>)
    }),
    ("the window", |load| {
        let limit = load.limit();
        let window = Window::new(limit, T0);
        if load == Load::Refuse {
            // Spread over the window, as a client at its limit has it.
            for n in 0..5_000 {
                let _ = window.take(limit, 1, T0 - S + n * (S / 5_000));
            }
        }
        Some(Box::new(Ours(window, limit)))
    }),
    ("governor (token bucket)", |load| {
        let clock = FakeRelativeClock::default();
        let permits = NonZeroU32::new(load.limit().permits()).expect("not 0");
        let limiter = RateLimiter::direct_with_clock(Quota::per_second(permits), clock.clone());
        if load == Load::Refuse {
            while limiter.check().is_ok() {}
        }
        (load != Load::Sparse).then(|| Box::new(Governor(limiter, clock, load == Load::Steady)) as Box<dyn Limiter>)
    }),
    ("pingora_limits::Rate (estimate, own clock)", |load| {
        let most = if load == Load::Refuse { 0 } else { isize::MAX };
        let makes_sense = matches!(load, Load::Pass | Load::Refuse);
        makes_sense.then(|| Box::new(PingoraRate(Rate::new(Duration::from_secs(1)), most)) as Box<dyn Limiter>)
    }),
    ("mutex, exact log", |load| {
        let log = (0..if load == Load::Pass { 0 } else { 4_999 })
            .map(|n| T0 - S + n * (S / 5_000))
            .collect();
        let log = MutexLog(Mutex::new(log), load.limit());
        while load == Load::Refuse && log.take(T0) > 0 {}
        Some(Box::new(log))
    }),
];

/// Nanoseconds a call of each thread takes, where so many threads go at so many keys.
fn measure(make: Make, load: Load, threads: usize, keys: usize) -> Option<f64> {
    let limiters: Vec<_> = (0..keys).map(|_| make(load)).collect::<Option<_>>()?;
    let waiting = AtomicUsize::new(threads);
    let slowest = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let (limiter, waiting) = (&*limiters[thread % keys], &waiting);
                scope.spawn(move || {
                    limiter.run(load.step_ns(), 1_000);
                    // All start at once, awake.
                    waiting.fetch_sub(1, Ordering::AcqRel);
                    while waiting.load(Ordering::Acquire) > 0 {
                        std::hint::spin_loop();
                    }
                    let from = Instant::now();
                    black_box(limiter.run(load.step_ns(), CALLS));
                    from.elapsed()
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("no worker panics"))
            .max()
    });
    slowest.map(|time| time.as_nanos() as f64 / CALLS as f64)
}

const PARTIES: [(usize, usize, &str); 3] = [
    (1, 1, "1 thread"),
    (2, 1, "2 threads, 1 key"),
    (2, 2, "2 threads, 2 keys"),
];

/// The rounds of a table, in each of which every contender comes once.
fn table(rounds: usize) -> String {
    let mut text = String::from(
        "# The window beside its alternatives\n\nNanoseconds per call, median (quartiles), as `cargo bench --bench window` \
         writes them. The caller gives the time, but for `Rate`, which reads the clock itself.\n",
    );
    for (load, title) in LOADS {
        let mut samples = vec![vec![Vec::new(); PARTIES.len()]; CONTENDERS.len()];
        for _ in 0..rounds {
            for (party, &(threads, keys, _)) in PARTIES.iter().enumerate() {
                for (contender, &(_, make)) in CONTENDERS.iter().enumerate() {
                    // Two clocks that go their own way through one exact log are not a history it can keep.
                    samples[contender][party].extend(measure(make, load, threads, keys));
                }
            }
        }
        let _ = write!(text, "\n## {title}\n\n| |");
        for (_, _, party) in PARTIES {
            let _ = write!(text, " {party} |");
        }
        let _ = write!(text, "\n|---|{}\n", "---|".repeat(PARTIES.len()));
        for (&(name, _), samples) in CONTENDERS.iter().zip(&mut samples) {
            if samples[0].is_empty() {
                continue;
            }
            let _ = write!(text, "| {name} |");
            for sample in samples {
                sample.sort_by(f64::total_cmp);
                let at = |quarter: usize| sample[(sample.len() - 1) * quarter / 4];
                let _ = write!(text, " {:.1} ({:.1}–{:.1}) |", at(2), at(1), at(3));
            }
            text.push('\n');
        }
    }
    text
}

fn criterion() {
    let mut criterion = Criterion::default();
    for (load, title) in LOADS {
        let mut group = criterion.benchmark_group(title);
        for (name, make) in CONTENDERS {
            if let Some(limiter) = make(load) {
                let mut now_ns = T0;
                group.bench_function(name, |bencher| {
                    bencher.iter(|| {
                        now_ns += load.step_ns();
                        limiter.take(black_box(now_ns))
                    })
                });
            }
        }
    }
}

fn main() {
    if std::env::args().any(|arg| arg == "criterion") {
        criterion();
        return;
    }
    let text = table(15);
    println!("{text}");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results");
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(format!("{folder}/window.md"), text));
    if let Err(error) = written {
        eprintln!("the table could not be kept in {folder}: {error}");
    }
}
