//! A decision allocates nothing: not to let a request pass, and not to refuse it for whatever reason. Nor does a line of
//! the access log, but for room for many.
//!
//! An allocator that counts, per thread, what is asked of it stands under everything. Each case is tried until it has
//! made what is made once (a key's window in a tier, an address's, a thread's place in the maps), then watched.

#[path = "gate_support/mod.rs"]
mod gate_support;

use gate_support::{CLIENT, START_MS, ask, hourly, keyed, public, resync, secret, with_secret};
use http::HeaderMap;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::net::IpAddr;
use std::time::Duration;
use tollgate::clock::Clock;
use tollgate::gate::{FailedAttemptsSettings, Gate, KeyUpdate, PlanSettings, SecretUpdate, Settings};
use tollgate::proxy::access_log::{self, AccessLog, Entry, Format, Output};

/// The system's allocator, counting.
struct Counting;

thread_local! {
    /// What this thread asked of the allocator: memory, more memory, or to take memory back.
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A cell without a destructor is there until the thread's very end; were it not, nobody would read it any more.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: every method hands its arguments unchanged to `System`, which keeps the trait's contract, and returns what
// that returns; the caller's duties are the same. Counting touches a constant-initialised thread-local cell only,
// which neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller vouches for `layout`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller vouches for `layout`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller got `memory` from this allocator, that is from `System`, with this layout.
        unsafe { System.realloc(memory, layout, new_size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller got `memory` from this allocator, that is from `System`, with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often this thread called the allocator meanwhile.
fn calls_in<R>(act: impl FnOnce() -> R) -> (R, u64) {
    let before = CALLS.with(Cell::get);
    let result = act();
    (result, CALLS.with(Cell::get) - before)
}

const LONG_ID: &str = "key_with_an_id_that_does_not_fit_into_its_slot";
/// Decisions that are watched in each case.
const DECISIONS: u32 = 2_000;

fn all_settings() -> Settings {
    let base = gate_support::settings(1_000_000);
    Settings {
        tiers: vec![("default".into(), hourly(1_000_000)), ("narrow".into(), hourly(1))],
        plans: vec![
            PlanSettings {
                name: "starter".into(),
                ..PlanSettings::default()
            },
            PlanSettings {
                name: "capped".into(),
                max_in_flight: Some(1),
                tiers: vec![],
            },
        ],
        routes: vec![
            keyed("/things/**", Some("things:read"), "default", None),
            keyed("/narrow", None, "narrow", None),
            keyed("/admin", Some("admin:all"), "default", None),
            keyed("/sandboxed", None, "default", Some(&["test"])),
            public("/open", None),
            public("/register", Some(hourly(1_000_000))),
            public("/scarce", Some(hourly(1))),
        ],
        failed_attempts: FailedAttemptsSettings {
            limit: 100_000,
            window: Duration::from_secs(60),
        },
        ..base
    }
}

fn keys() -> Vec<KeyUpdate> {
    let key = |n| gate_support::key(n, 1);
    vec![
        key(1),
        KeyUpdate {
            revoked: true,
            ..key(2)
        },
        KeyUpdate {
            expires_at_ms: Some(START_MS),
            ..key(3)
        },
        KeyUpdate {
            disabled: true,
            ..key(4)
        },
        KeyUpdate {
            plan: "capped".into(),
            ..key(5)
        },
        KeyUpdate {
            id: LONG_ID.into(),
            ..key(6)
        },
        KeyUpdate {
            secrets: vec![SecretUpdate {
                not_after_ms: Some(START_MS),
                ..gate_support::secret_update(7)
            }],
            ..key(7)
        },
        // More scopes than one word holds.
        KeyUpdate {
            scopes: (0..200).map(|n| format!("scope:{n}").into()).collect(),
            ..key(8)
        },
        key(9),
    ]
}

/// One way for a decision to end, and what to ask for it.
struct Case {
    name: &'static str,
    ends_in: &'static str,
    path: &'static str,
    headers: HeaderMap,
    client: IpAddr,
}

const PASSED: &str = "PASSED";

fn cases() -> Vec<Case> {
    let case = |name, ends_in, path, headers| Case {
        name,
        ends_in,
        path,
        headers,
        client: CLIENT,
    };
    let with = gate_support::headers;
    let one = secret(1);
    let bearer = format!("Bearer {one}");
    let hammering = "198.51.100.7".parse().unwrap();
    vec![
        case("allow", PASSED, "/things/1", with_secret(1)),
        case(
            "allow, bearer",
            PASSED,
            "/things/1",
            with(&[("authorization", &bearer)]),
        ),
        case(
            "allow, the same key twice",
            PASSED,
            "/things/1",
            with(&[("authorization", &bearer), ("x-api-key", &one)]),
        ),
        case("allow, no rule", PASSED, "/elsewhere", with_secret(1)),
        case(
            "allow, another tier's window beside",
            PASSED,
            "/things/1",
            with_secret(9),
        ),
        case("allow, long id", PASSED, "/things/1", with_secret(6)),
        case("allow, capped", PASSED, "/things/1", with_secret(5)),
        case("allow, public", PASSED, "/open", with(&[])),
        case("allow, public with a limit", PASSED, "/register", with(&[])),
        case("missing", "MISSING_API_KEY", "/things/1", with(&[])),
        case(
            "malformed",
            "INVALID_API_KEY",
            "/things/1",
            with(&[("x-api-key", "pxk_live_no")]),
        ),
        case("unknown", "INVALID_API_KEY", "/things/1", with_secret(1_000)),
        case(
            "conflicting",
            "CONFLICTING_CREDENTIALS",
            "/things/1",
            with(&[("authorization", &bearer), ("x-api-key", &secret(2))]),
        ),
        case("revoked", "REVOKED_API_KEY", "/things/1", with_secret(2)),
        case("past grace", "REVOKED_API_KEY", "/things/1", with_secret(7)),
        case("expired", "EXPIRED_API_KEY", "/things/1", with_secret(3)),
        case("disabled", "DISABLED_API_KEY", "/things/1", with_secret(4)),
        case("environment", "ENVIRONMENT_NOT_ALLOWED", "/sandboxed", with_secret(1)),
        case("scope", "INSUFFICIENT_SCOPE", "/admin", with_secret(1)),
        case("scope, long id", "INSUFFICIENT_SCOPE", "/admin", with_secret(6)),
        case("scope, among 200", "INSUFFICIENT_SCOPE", "/admin", with_secret(8)),
        case("rate limited", "RATE_LIMITED", "/narrow", with_secret(1)),
        case("rate limited, public", "RATE_LIMITED", "/scarce", with(&[])),
        Case {
            client: hammering,
            ..case(
                "too many failed attempts",
                "TOO_MANY_FAILED_ATTEMPTS",
                "/things/1",
                with(&[("x-api-key", "pxk_live_no")]),
            )
        },
    ]
}

fn end_of(gate: &Gate, case: &Case, clock: &Clock) -> &'static str {
    match ask(gate, case.path, &case.headers, case.client, clock.now()) {
        Ok(permit) => {
            black_box(&permit);
            PASSED
        }
        Err(refusal) => refusal.reason.code(),
    }
}

/// Asks `DECISIONS` times, 100 ms apart: over three sub-buckets of an hour's window, too.
fn watch(gate: &Gate, case: &Case, clock: &Clock) {
    // What is made once. A limit of one is used up here.
    for _ in 0..3 {
        end_of(gate, case, clock);
    }
    let (wrong, calls) = calls_in(|| {
        (0..DECISIONS)
            .filter(|_| {
                clock.advance(Duration::from_millis(100));
                end_of(gate, case, clock) != case.ends_in
            })
            .count()
    });
    assert_eq!(
        wrong, 0,
        "{}: so many decisions did not end in {}",
        case.name, case.ends_in
    );
    assert_eq!(
        calls, 0,
        "{}: calls of the allocator in {DECISIONS} decisions",
        case.name
    );
}

/// A gate with all keys, an address that has failed too often, and a key that was used in two tiers.
fn fixture() -> Gate {
    let gate = Gate::new(all_settings()).unwrap();
    resync(&gate, keys(), 1);
    gate
}

/// Brings about what the cases start from. The failures of one address are forgotten after a minute, so each case
/// has a clock and a gate of its own.
fn prepare(gate: &Gate, case: &Case, clock: &Clock) {
    if case.ends_in == "TOO_MANY_FAILED_ATTEMPTS" {
        let strict = Settings {
            failed_attempts: FailedAttemptsSettings {
                limit: 1,
                window: Duration::from_secs(24 * 3600),
            },
            ..all_settings()
        };
        gate.reload(strict).unwrap();
    }
    if case.name.contains("another tier") {
        drop(ask(gate, "/narrow", &case.headers, case.client, clock.now()));
    }
}

#[test]
fn the_counter_counts() {
    let (boxed, calls) = calls_in(|| black_box(Box::new(7_u64)));
    assert_eq!(calls, 1);
    assert_eq!(calls_in(|| drop(black_box(boxed))).1, 1);
    assert_eq!(calls_in(|| black_box(7_u64)).1, 0);
    let elsewhere = std::thread::spawn(|| ());
    let (text, calls) = calls_in(|| black_box(format!("{}", black_box(7))));
    assert!(calls > 0, "{text}");
    elsewhere.join().unwrap();
}

#[test]
fn no_decision_allocates() {
    let cases = cases();
    for case in &cases {
        let (gate, clock) = (fixture(), Clock::manual(START_MS));
        prepare(&gate, case, &clock);
        watch(&gate, case, &clock);
    }
    println!(
        "{} cases of {DECISIONS} decisions: no call of the allocator",
        cases.len()
    );
}

#[test]
fn no_refusal_for_the_concurrency_cap_allocates() {
    let (gate, clock) = (fixture(), Clock::manual(START_MS));
    let headers = with_secret(5);
    let held = ask(&gate, "/things/1", &headers, CLIENT, clock.now()).unwrap();
    let case = Case {
        name: "in flight",
        ends_in: "TOO_MANY_IN_FLIGHT",
        path: "/things/1",
        headers,
        client: CLIENT,
    };
    watch(&gate, &case, &clock);
    drop(held);
    assert_eq!(end_of(&gate, &case, &clock), PASSED);
}

#[test]
fn no_refusal_of_a_gate_that_is_not_ready_allocates() {
    let clock = Clock::manual(START_MS);
    let not_ready = |name| Case {
        name,
        ends_in: "NOT_READY",
        path: "/things/1",
        headers: with_secret(1),
        client: CLIENT,
    };
    let empty = Gate::new(all_settings()).unwrap();
    watch(&empty, &not_ready("no snapshot yet"), &clock);
    let stale = fixture();
    stale.set_stale(true);
    watch(&stale, &not_ready("stale snapshot"), &clock);
}

#[test]
fn no_line_of_the_access_log_allocates_but_room_for_fifty() {
    const LINES: usize = 10_000;
    let entry = Entry {
        bytes_sent: 36,
        client: Some("2001:db8::7".parse().unwrap()),
        decision: "PASSED",
        duration_us: 123,
        host: "api.example.com",
        key_id: LONG_ID,
        method: "GET",
        organization: "org_1",
        path: "/things/\"1\"",
        request_id: "0f8fad5bd9cb469fa16570867728950e",
        route: "things",
        status: 200,
        tier: "default",
        unix_ms: START_MS,
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        upstream_us: 80,
    };
    for format in [Format::Json, Format::Text] {
        let settings = access_log::Settings {
            format,
            output: Output::File("/dev/null".into()),
            buffer_lines: LINES + 1,
        };
        let (log, writer) = AccessLog::open(&settings).unwrap();
        log.log(&entry);
        let ((), calls) = calls_in(|| (0..LINES).for_each(|_| log.log(&entry)));
        // Between a hundred and two hundred lines find room in a chunk; how many chunks there are is the writer's pace.
        assert!(calls <= LINES as u64 / 50, "{format:?}: {calls} calls of the allocator");
        drop(writer);
        assert_eq!((log.written(), log.dropped()), (LINES as u64 + 1, 0));
        println!("{LINES} lines, {format:?}: {calls} calls of the allocator");
    }
}

#[test]
fn no_decision_allocates_on_threads_that_share_keys() {
    let gate = fixture();
    let cases: Vec<Case> = cases()
        .into_iter()
        .filter(|case| case.ends_in != "TOO_MANY_FAILED_ATTEMPTS")
        .collect();
    let clock = Clock::manual(START_MS);
    for case in &cases {
        prepare(&gate, case, &clock);
    }
    // The time stands still for all of them, so that a limit of one stays used up.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let capped = |case: &&Case| case.name != "allow, capped";
                for case in cases.iter().filter(capped) {
                    for _ in 0..3 {
                        end_of(&gate, case, &clock);
                    }
                    let (wrong, calls) = calls_in(|| {
                        (0..DECISIONS)
                            .filter(|_| end_of(&gate, case, &clock) != case.ends_in)
                            .count()
                    });
                    assert_eq!((wrong, calls), (0, 0), "{}", case.name);
                }
            });
        }
    });
}

/// What the meter does for every key that was used in the last second.
#[test]
fn what_was_counted_is_drained_without_allocations() {
    let (gate, clock) = (fixture(), Clock::manual(START_MS));
    for n in [1, 6, 9] {
        for path in ["/things/1", "/narrow", "/narrow"] {
            drop(ask(&gate, path, &with_secret(n), CLIENT, clock.now()));
        }
    }
    let (mut permits, mut limited, mut secrets) = (0, 0, 0);
    let (_, calls) = calls_in(|| {
        gate.drain_permits(
            &mut |used| {
                permits += used.permits;
                limited += used.limited;
            },
            &mut |_| secrets += 1,
        )
    });
    assert_eq!((permits, limited, secrets, calls), (6, 3, 3, 0));
    let mut windows = 0;
    let (_, calls) = calls_in(|| gate.drain_windows(clock.now(), &mut |_| windows += 1));
    // Room for the counts of one window, and to give it back.
    assert_eq!((windows, calls), (6, 2));
}

/// A gate that shares its limits decides from what is reserved: no allocation, and nobody is called. What a permit or a
/// refusal says of more being wanted is an `Arc` that was there.
#[test]
fn a_decision_from_a_reservation_allocates_nothing() {
    let gate = fixture().sharing_limits();
    let clock = Clock::manual(START_MS);
    for case in cases()
        .iter()
        .filter(|case| case.name.starts_with("allow,") && !case.name.contains("public"))
    {
        let reserve = || match ask(&gate, case.path, &case.headers, case.client, clock.now()) {
            Err(refusal) => refusal.wanted().unwrap().reservation.clone(),
            Ok(_) => panic!("{}: nothing was reserved yet", case.name),
        };
        let reservation = reserve();
        // Empty: refused, with a word that more may be had.
        watch_shared(&gate, case, &clock, "RATE_LIMITED");
        reservation.refill(DECISIONS / 2, u64::MAX, DECISIONS);
        watch_shared(&gate, case, &clock, PASSED);
        reservation.take_back();
        reservation.nothing_until(u64::MAX);
        watch_shared(&gate, case, &clock, "RATE_LIMITED");
        reservation.nothing_until(0);
    }
}

fn watch_shared(gate: &Gate, case: &Case, clock: &Clock, ends_in: &str) {
    end_of(gate, case, clock);
    let (wrong, calls) = calls_in(|| {
        let wrong = |_: &u32| {
            clock.advance(Duration::from_millis(100));
            end_of(gate, case, clock) != ends_in
        };
        (0..DECISIONS / 4).filter(wrong).count()
    });
    assert_eq!(
        (wrong, calls),
        (0, 0),
        "{}, {ends_in}: wrong ends, calls of the allocator",
        case.name
    );
}
