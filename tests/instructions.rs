//! What a decision costs in instructions: counted by valgrind's callgrind, and compared with figures that are kept in
//! `tests/golden/instructions.txt`.
//!
//! Times depend on the machine and on what else it does; instructions depend on the program alone, so that a step which
//! makes the decision dearer shows on any machine. They are counted in the build that the tests are, which is not
//! optimised, and on the processor that valgrind shows to the program, which has no instructions for SHA-256: the
//! numbers are large, and say nothing about time. What counts is that they stay.

#[path = "gate_support/mod.rs"]
mod gate_support;

use gate_support::{CLIENT, START_MS, ask, hourly, key, keyed, public, secret, settings, with_secret};
use http::HeaderMap;
use std::fmt::Write as _;
use std::process::Command;
use tollgate::clock::{Clock, Now};
use tollgate::gate::{Gate, KeyUpdate, PlanSettings, Settings};

/// Decisions of each kind that are counted.
const DECISIONS: u64 = 200;
/// A figure may be off by so much before it has to be looked at: another patch release of a dependency or of the compiler.
const TOLERANCE: f64 = 0.04;
/// The function that callgrind is to look into, as it calls it.
const COUNTED: &str = "instructions::counted_decisions";
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/instructions.txt");

struct Case {
    name: &'static str,
    path: &'static str,
    headers: HeaderMap,
    passes: bool,
}

fn cases() -> Vec<Case> {
    let case = |name, path, headers, passes| Case {
        name,
        path,
        headers,
        passes,
    };
    let malformed = gate_support::headers(&[("x-api-key", &secret(1).replace("live_0", "live_1"))]);
    let bearer = gate_support::headers(&[("authorization", &format!("Bearer {}", secret(1)))]);
    vec![
        case("permit", "/things/17", with_secret(1), true),
        case("permit, bearer", "/things/17", bearer, true),
        case("permit, capped", "/things/17", with_secret(2), true),
        case("refused by the limit", "/scarce", with_secret(1), false),
        case("revoked", "/things/17", with_secret(3), false),
        case("without the scope", "/admin", with_secret(1), false),
        case("unknown", "/things/17", with_secret(99), false),
        case("malformed", "/things/17", malformed, false),
        case("without a key", "/things/17", HeaderMap::new(), false),
        case("public", "/open", HeaderMap::new(), true),
    ]
}

fn gate() -> Gate {
    let base = settings(1_000_000);
    let settings = Settings {
        tiers: vec![("default".into(), hourly(1_000_000)), ("scarce".into(), hourly(1))],
        plans: vec![
            PlanSettings {
                name: "starter".into(),
                ..PlanSettings::default()
            },
            PlanSettings {
                name: "capped".into(),
                max_in_flight: Some(8),
                tiers: vec![],
            },
        ],
        routes: vec![
            keyed("/things/*", Some("things:read"), "default", None),
            keyed("/scarce", None, "scarce", None),
            keyed("/admin", Some("admin:all"), "default", None),
            public("/open", None),
        ],
        ..base
    };
    let keys = [
        key(1, 1),
        KeyUpdate {
            plan: "capped".into(),
            ..key(2, 1)
        },
        KeyUpdate {
            revoked: true,
            ..key(3, 1)
        },
    ];
    gate_support::gate(settings, keys)
}

/// Callgrind counts what is done in here, and nothing else.
#[inline(never)]
fn counted_decisions(gate: &Gate, case: &Case, now: Now) -> u64 {
    let passed = |_: &u64| ask(gate, case.path, &case.headers, CLIENT, now).is_ok();
    (0..DECISIONS).filter(passed).count() as u64
}

#[test]
#[ignore = "run under callgrind by the test below"]
fn decides() {
    let (gate, clock) = (gate(), Clock::manual(START_MS));
    for case in cases() {
        for _ in 0..10 {
            let _ = ask(&gate, case.path, &case.headers, CLIENT, clock.now());
        }
        let expected = if case.passes { DECISIONS } else { 0 };
        assert_eq!(counted_decisions(&gate, &case, clock.now()), expected, "{}", case.name);
    }
}

#[test]
#[cfg_attr(
    not(debug_assertions),
    ignore = "the figures that are kept are those of the unoptimised build"
)]
fn a_decision_takes_as_many_instructions_as_it_is_known_to() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("counts");
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no"])
        .arg(format!("--toggle-collect={COUNTED}"))
        .arg(format!("--dump-after={COUNTED}"))
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "decides", "--ignored", "--nocapture"])
        .output()
        .expect("valgrind is installed (`make install-test` does that)");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));

    let kept = std::fs::read_to_string(KEPT).unwrap();
    let kept_of = |name: &str| {
        let line = kept
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.and_then(|figure| figure.parse::<f64>().ok())
    };
    let (mut counted, mut wrong) = (String::new(), vec![]);
    for (index, case) in cases().iter().enumerate() {
        // The n-th time that the function was left, callgrind wrote its n-th file.
        let figure = total_of(&out.with_extension((index + 1).to_string())) / DECISIONS;
        let _ = writeln!(counted, "{}: {figure}", case.name);
        let kept = kept_of(case.name);
        if kept.is_none_or(|kept| (figure as f64 / kept - 1.0).abs() > TOLERANCE) {
            wrong.push(case.name);
        }
    }
    println!("instructions per decision\n{counted}");
    assert!(
        wrong.is_empty(),
        "{wrong:?} took other numbers of instructions than {KEPT} says. If that is meant, it is to say:\n{counted}"
    );
}

/// All instructions in a file of callgrind's.
fn total_of(file: &std::path::Path) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
    total
        .and_then(|total| total.trim().parse().ok())
        .expect("a line with the total")
}
