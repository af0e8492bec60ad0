//! A million keys in memory: how much of it they take, how long they take to load and to load again.
//!
//! `cargo bench --bench snapshot` starts a process of its own for each contender, because what is measured is the
//! memory of whole processes, and writes `benches/results/snapshot.md`.

#[path = "../tests/gate_support/mod.rs"]
mod gate_support;

use dashmap::DashMap;
use gate_support::{CLIENT, START_MS, ask, key, secret, settings, with_secret};
use std::hint::black_box;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tollgate::clock::Clock;
use tollgate::gate::{Gate, KeyUpdate};

/// As in the `tollgate` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const KEYS: u32 = 1_000_000;
const ORGANIZATIONS: u32 = 10_000;
const ACTIVE: u32 = 100_000;

fn update(n: u32) -> KeyUpdate {
    KeyUpdate {
        organization: format!("org_{:08}", n % ORGANIZATIONS).into(),
        id: format!("key_{n:016}").into(),
        ..key(n, 1)
    }
}

/// `VmRSS` or `VmHWM` of this process, in KiB.
fn memory_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find(|line| line.starts_with(field)).unwrap_or_default();
    line.split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse().ok())
        .unwrap_or(0)
}

/// The resident memory once the allocator has given back what it will.
fn settled_kib() -> u64 {
    // mimalloc waits up to ten seconds for memory to be wanted again.
    for _ in 0..120 {
        std::thread::sleep(Duration::from_millis(100));
        black_box(vec![0_u8; 1 << 20]);
    }
    memory_kib("VmRSS")
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// Time in a full resync, and of it what making the million updates takes, which is no part of it.
fn resync(gate: &Gate, revision: u64) -> (Duration, Duration) {
    let start = Instant::now();
    for n in 0..KEYS {
        black_box(update(n));
    }
    let making = start.elapsed();
    let start = Instant::now();
    gate_support::resync(gate, (0..KEYS).map(update), revision);
    (start.elapsed().saturating_sub(making), making)
}

fn row(what: &str, value: String) {
    println!("| {what} | {value} |");
}

fn measure_gate() {
    let before = memory_kib("VmRSS");
    let clock = Clock::manual(START_MS);
    let gate = Gate::new(settings(5_000)).expect("sound settings");
    row("process before, MiB", format!("{:.1}", mib(before)));
    let (load, _) = resync(&gate, 1);
    row("load, s", format!("{:.2}", load.as_secs_f64()));
    let loaded = settled_kib();
    row("process with 1,000,000 keys, MiB", format!("{:.1}", mib(loaded)));
    row(
        "of it for a key, bytes",
        format!("{:.0}", (loaded - before) as f64 * 1024.0 / f64::from(KEYS)),
    );
    row("most while loading, MiB", format!("{:.1}", mib(memory_kib("VmHWM"))));
    let (again, _) = resync(&gate, 2);
    row("the same again (resync), s", format!("{:.2}", again.as_secs_f64()));
    let resynced = settled_kib();
    row("process after the resync, MiB", format!("{:.1}", mib(resynced)));
    row("most in the resync, MiB", format!("{:.1}", mib(memory_kib("VmHWM"))));
    let mut passed = 0;
    for n in (0..KEYS).step_by((KEYS / ACTIVE) as usize) {
        passed += u32::from(ask(&gate, "/", &with_secret(n), CLIENT, clock.now()).is_ok());
    }
    assert_eq!(passed, ACTIVE);
    let active = settled_kib();
    row(
        "process with 100,000 of them used in a tier of 5,000, MiB",
        format!("{:.1}", mib(active)),
    );
    row(
        "growth for an active key, bytes",
        format!(
            "{:.0}",
            active.saturating_sub(resynced) as f64 * 1024.0 / f64::from(ACTIVE)
        ),
    );
    clock.advance(Duration::from_secs(3 * 3600));
    gate.give_back_idle(clock.now());
    gate.drain_permits(&mut |_| (), &mut |_| ());
    row(
        "process after they were idle, MiB",
        format!("{:.1}", mib(settled_kib())),
    );
}

/// A record as one would write it down.
struct Record {
    _id: String,
    _organization: String,
    _environment: String,
    _plan: String,
    _scopes: Vec<String>,
}

fn measure_records() {
    let before = memory_kib("VmRSS");
    row("process before, MiB", format!("{:.1}", mib(before)));
    let start = Instant::now();
    let map = DashMap::new();
    for n in 0..KEYS {
        let update = update(n);
        let record = Record {
            _id: update.id.into(),
            _organization: update.organization.into(),
            _environment: update.environment.into(),
            _plan: update.plan.into(),
            _scopes: update.scopes.into_iter().map(String::from).collect(),
        };
        map.insert(secret(n), Arc::new(record));
    }
    row(
        "load, with the making of the updates, s",
        format!("{:.2}", start.elapsed().as_secs_f64()),
    );
    let loaded = settled_kib();
    row("process with 1,000,000 keys, MiB", format!("{:.1}", mib(loaded)));
    row(
        "of it for a key, bytes",
        format!("{:.0}", (loaded - before) as f64 * 1024.0 / f64::from(KEYS)),
    );
    black_box(map);
}

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("gate") => return measure_gate(),
        Some("records") => return measure_records(),
        _ => {}
    }
    let run = |contender: &str| {
        let this = std::env::current_exe().expect("a path of its own");
        let output = Command::new(this).arg(contender).output().expect("can start itself");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let text = format!(
        "# A million keys in memory\n\nWritten by `cargo bench --bench snapshot`; {ORGANIZATIONS} organisations, mimalloc as in \
         the `tollgate` binary, one process for each table.\n\n| Tollgate's gate | |\n|---|---|\n{}\n| `DashMap` from the secret \
         to an `Arc` of a record | |\n|---|---|\n{}",
        run("gate"),
        run("records")
    );
    println!("{text}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/snapshot.md");
    if let Err(error) = std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results"))
        .and_then(|()| std::fs::write(path, text))
    {
        eprintln!("cannot write {path}: {error}");
    }
}
