//! The decision beside its alternatives: one hot key, Zipf-distributed keys and uniformly random ones, among ten
//! thousand keys and among a million.
//!
//! `cargo bench --bench decision` measures in interleaved rounds, so that a machine that slows down does so for all,
//! and writes medians and quartiles to `benches/results/decision.md`. Requests are made in batches outside the measured
//! time: their header fields are warm, as they are when a server has just read them; the keys are not.

#[path = "../tests/gate_support/mod.rs"]
mod gate_support;

use dashmap::DashMap;
use gate_support::{CLIENT, START_MS, hourly, key, keyed, secret};
use governor::clock::FakeRelativeClock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use http::{HeaderMap, HeaderValue, Method};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tollgate::clock::{Clock, Now};
use tollgate::gate::{Gate, KeyUpdate, RequestHead, Settings};

/// As in the `tollgate` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROUNDS: usize = 11;
const BATCH: usize = 64;
const BATCHES: usize = 300;
const FEW: u32 = 10_000;
const MANY: u32 = 1_000_000;
/// More than a measurement takes, so that requests pass; the hot key's too.
const LIMIT: u32 = 30_000;
const PATH: &str = "/api/v1/things/17";

/// Something that decides.
trait Contender {
    /// Decides on all requests of a batch; how many passed.
    fn decide(&self, batch: &[HeaderMap], now: Now) -> usize;
}

impl Contender for Gate {
    fn decide(&self, batch: &[HeaderMap], now: Now) -> usize {
        let mut passed = 0;
        for headers in batch {
            let head = RequestHead {
                method: &Method::GET,
                host: "api.example",
                path: PATH,
                headers,
                client: CLIENT,
            };
            passed += usize::from(black_box(self.check(black_box(&head), now)).is_ok());
        }
        passed
    }
}

/// What the usual middleware does: the secret itself is the key of a map, a token bucket is its limit. No form is
/// checked, nothing is hashed that an attacker could not choose, and no count is exact.
struct PlainMap(DashMap<String, Arc<Record>>);

struct Record {
    scopes: Vec<String>,
    bucket: RateLimiter<NotKeyed, InMemoryState, FakeRelativeClock, NoOpMiddleware<Nanos>>,
}

impl Record {
    fn new(clock: &FakeRelativeClock) -> Self {
        let quota = Quota::per_hour(NonZeroU32::new(LIMIT).expect("not zero"));
        Record {
            scopes: vec!["things:read".to_owned()],
            bucket: RateLimiter::direct_with_clock(quota, clock.clone()),
        }
    }
}

fn presented(headers: &HeaderMap) -> &str {
    headers
        .get("x-api-key")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

impl Contender for PlainMap {
    fn decide(&self, batch: &[HeaderMap], _: Now) -> usize {
        let decide = |headers: &&HeaderMap| {
            let record = self.0.get(presented(headers)).map(|found| found.clone());
            black_box(record).is_some_and(|record| {
                record.scopes.iter().any(|scope| scope == "things:read") && record.bucket.check().is_ok()
            })
        };
        batch.iter().filter(decide).count()
    }
}

/// The first thing one would write: a locked map of counters that start again every hour.
struct LockedMap(Mutex<HashMap<String, (u64, u32)>>);

impl Contender for LockedMap {
    fn decide(&self, batch: &[HeaderMap], now: Now) -> usize {
        let decide = |headers: &&HeaderMap| {
            let mut map = self.0.lock().expect("no holder panics");
            map.get_mut(presented(headers)).is_some_and(|(hour, count)| {
                let this = now.elapsed_ns / 3_600_000_000_000;
                if *hour != this {
                    (*hour, *count) = (this, 0);
                }
                *count += 1;
                *count <= LIMIT
            })
        };
        batch.iter().filter(decide).count()
    }
}

/// Which keys come.
#[derive(Clone, Copy)]
enum Draw {
    Hot,
    /// Rank r with a probability proportional to 1/r.
    Zipf,
    Uniform,
    Malformed,
    Unknown,
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn request(&mut self, draw: Draw, keys: u32) -> HeaderMap {
        let unit = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        let text = match draw {
            Draw::Hot => secret(7),
            // The inverse of the distribution ln(r) / ln(n), scattered over the keys.
            Draw::Zipf => secret((f64::from(keys).powf(unit) as u32).wrapping_mul(2_654_435_761) % keys),
            Draw::Uniform => secret((f64::from(keys) * unit) as u32),
            Draw::Malformed => secret(7).replace("live_0", "live_1"),
            Draw::Unknown => secret(MANY * 2 + (f64::from(MANY) * unit) as u32),
        };
        let mut headers = HeaderMap::with_capacity(8);
        headers.insert("host", HeaderValue::from_static("api.example"));
        headers.insert("user-agent", HeaderValue::from_static("curl/8.0"));
        headers.insert("accept", HeaderValue::from_static("*/*"));
        headers.insert("x-api-key", HeaderValue::from_str(&text).expect("visible ASCII"));
        headers
    }
}

struct Case {
    name: String,
    draw: Draw,
    keys: u32,
    contender: Arc<dyn Contender>,
    /// Nanoseconds per decision, one for each round.
    measured: Vec<f64>,
}

fn gate_of(keys: u32) -> Gate {
    let base = gate_support::settings(LIMIT);
    let settings = Settings {
        tiers: vec![("default".into(), hourly(LIMIT)), ("things".into(), hourly(LIMIT))],
        routes: vec![
            keyed("/api/v1/things/*", Some("things:read"), "things", None),
            keyed("/api/v1/others/**", None, "default", None),
        ],
        ..base
    };
    let of_organization = |n| KeyUpdate {
        organization: format!("org_{}", n % 10_000).into(),
        ..key(n, 1)
    };
    gate_support::gate(settings, (0..keys).map(of_organization))
}

fn contenders(keys: u32, governor_clock: &FakeRelativeClock) -> [(&'static str, Arc<dyn Contender>); 3] {
    let plain = DashMap::new();
    let mut locked = HashMap::new();
    for n in 0..keys {
        plain.insert(secret(n), Arc::new(Record::new(governor_clock)));
        locked.insert(secret(n), (0, 0));
    }
    [
        ("Tollgate", Arc::new(gate_of(keys))),
        ("DashMap of secrets, governor", Arc::new(PlainMap(plain))),
        ("mutex, map of counters", Arc::new(LockedMap(Mutex::new(locked)))),
    ]
}

/// One round of one case: nanoseconds per decision, the median of its batches, so that a thread that was put aside in
/// one of them has done no harm.
fn measure(case: &Case, clock: &Clock, rng: &mut Rng, must_pass: bool) -> f64 {
    let mut spent = Vec::with_capacity(BATCHES);
    for _ in 0..BATCHES {
        let batch: Vec<HeaderMap> = (0..BATCH).map(|_| rng.request(case.draw, case.keys)).collect();
        clock.advance(Duration::from_millis(1));
        let now = clock.now();
        let start = Instant::now();
        let passed = case.contender.decide(&batch, now);
        spent.push(start.elapsed().as_nanos() as f64 / BATCH as f64);
        let expected = if must_pass { BATCH } else { 0 };
        assert_eq!(passed, expected, "{}", case.name);
    }
    spent.sort_by(f64::total_cmp);
    quantile(&spent, 0.5)
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

fn main() {
    let clock = Clock::manual(START_MS);
    let governor_clock = FakeRelativeClock::default();
    let mut rng = Rng(2026);
    let mut cases = vec![];
    for keys in [FEW, MANY] {
        for (name, contender) in contenders(keys, &governor_clock) {
            // Every key has been used: its window exists, and is as cold as the rest of it.
            for first in (0..keys).step_by(BATCH) {
                let batch: Vec<HeaderMap> = (first..keys.min(first + BATCH as u32))
                    .map(gate_support::with_secret)
                    .collect();
                contender.decide(&batch, clock.now());
            }
            let draws: &[(&str, Draw)] = match name {
                "Tollgate" => &[
                    ("hot", Draw::Hot),
                    ("Zipf", Draw::Zipf),
                    ("cold", Draw::Uniform),
                    ("malformed", Draw::Malformed),
                    ("unknown", Draw::Unknown),
                ],
                _ => &[
                    ("hot", Draw::Hot),
                    ("Zipf", Draw::Zipf),
                    ("cold", Draw::Uniform),
                    ("unknown", Draw::Unknown),
                ],
            };
            for (what, draw) in draws {
                cases.push(Case {
                    name: format!("{keys} keys | {what} | {name}"),
                    draw: *draw,
                    keys,
                    contender: contender.clone(),
                    measured: vec![],
                });
            }
        }
    }
    for round in 0..=ROUNDS {
        for case in &mut cases {
            // An hour and more: what was counted has left the windows.
            clock.advance(Duration::from_secs(2 * 3600));
            governor_clock.advance(Duration::from_secs(2 * 3600));
            let must_pass = !matches!(case.draw, Draw::Malformed | Draw::Unknown);
            let ns = measure(case, &clock, &mut rng, must_pass);
            // The first round warms up.
            if round > 0 {
                case.measured.push(ns);
            }
        }
    }
    let mut table = String::from("| keys | requests | contender | ns, median | lower quartile | upper quartile |\n");
    table.push_str("|---|---|---|---|---|---|\n");
    for case in &mut cases {
        case.measured.sort_by(f64::total_cmp);
        let at = |q| quantile(&case.measured, q);
        let _ = writeln!(
            table,
            "| {} | {:.0} | {:.0} | {:.0} |",
            case.name,
            at(0.5),
            at(0.25),
            at(0.75)
        );
    }
    println!("{table}");
    let text = format!(
        "# The decision\n\nWritten by `cargo bench --bench decision`: {ROUNDS} interleaved rounds of {} decisions each, one \
         thread. Nanoseconds for one decision, a `HeaderMap` and a clock reading given; every key was used before.\n\n{table}",
        BATCH * BATCHES
    );
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/decision.md");
    if let Err(error) = std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results"))
        .and_then(|()| std::fs::write(path, text))
    {
        eprintln!("cannot write {path}: {error}");
    }
}
