//! What an attack does to everybody else: the real binary, attacked from a process of its own, with honest requests
//! beside it. `cargo bench --bench hostile` runs it all (about four minutes) and writes `results/hostile.md`;
//! `HOSTILE_CONNECTIONS=N` changes how many slow connections there are (10,000).
//!
//! The attacker has the lowest priority: on the one machine of this bench it takes the gate's processor otherwise, and
//! what would be measured is the scheduler. On its own machine it would not.

mod attack;
mod gate;
mod honest;
mod upstream;

use attack::Closed;
use gate::Gate;
use honest::{Latencies, honest};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("attacker") => attack::attacker(&arguments[1..]),
        // What cargo passes on from `cargo test --benches`: nothing to do there.
        Some("--test") => {}
        _ => bench(),
    }
}

fn bench() {
    let connections = std::env::var("HOSTILE_CONNECTIONS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(10_000);
    let mut report = format!(
        "# What an attack does to everybody else\n\nWritten by `cargo bench --bench hostile`: the `tollgate` binary, \
         optimised, with its default limits; {} processors for gate, upstream, honest clients and attacker together, the \
         attacker at the lowest priority; load average at the start: {}, which must be near 0 for the times to mean \
         anything. Honest requests: {} a second on {} kept connections, and {} a \
         second on a connection each; a latency counts from when the request was due.\n",
        std::thread::available_parallelism().map_or(1, usize::from),
        std::fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| Some(text.split_whitespace().next()?.to_owned()))
            .unwrap_or_default(),
        honest::REQUESTS_PER_SECOND,
        honest::KEPT_CONNECTIONS,
        honest::CONNECTIONS_PER_SECOND,
    );
    slow_clients(&mut report, connections);
    unknown_keys(&mut report);
    println!("{report}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results/hostile.md");
    std::fs::write(&path, report).expect("the results are written");
}

/// Slow heads, bodies and readers, all at once.
fn slow_clients(report: &mut String, connections: usize) {
    let upstream = upstream::start();
    let gate = Gate::start(upstream);
    honest(&gate, || std::thread::sleep(Duration::from_secs(3)));
    let descriptors_before = gate.descriptors();
    let memory_before = gate.resident_kib();
    let quiet = honest(&gate, || std::thread::sleep(Duration::from_secs(15)));
    let mut closed = Vec::new();
    let mut most_descriptors = 0;
    let mut most_memory = 0;
    let busy = honest(&gate, || {
        let mut attacker = attack::slow(&gate, connections);
        while !attacker.has_ended() {
            std::thread::sleep(Duration::from_millis(500));
            most_descriptors = most_descriptors.max(gate.descriptors());
            most_memory = most_memory.max(gate.resident_kib());
        }
        closed = attacker.report();
    });
    std::thread::sleep(Duration::from_secs(3));
    let after = honest(&gate, || std::thread::sleep(Duration::from_secs(15)));
    let descriptors_after = gate.descriptors();
    let _ = write!(
        report,
        "\n## {connections} slow connections\n\nFrom {} addresses, opened within {} s; each sends, or takes, one byte \
         every 5 s. \"Over\" is the time from the end of what its rule allows (head: 10 s; body: 20 s at 500 bytes a \
         second; response: 60 s at the same rate) to the moment it saw its connection end.\n\n\
         | kind | connections | gone | over, median | over, longest |\n|---|---|---|---|---|\n",
        attack::ADDRESSES,
        attack::RAMP.as_secs(),
    );
    for Closed {
        kind,
        opened,
        gone,
        median_ms,
        longest_ms,
    } in &closed
    {
        let _ = writeln!(
            report,
            "| {kind} | {opened} | {gone} | {median_ms} ms | {longest_ms} ms |"
        );
    }
    latencies(report, &[("before", &quiet), ("during", &busy), ("after", &after)]);
    let _ = writeln!(
        report,
        "\nDescriptors of the gate: {descriptors_before} before, {most_descriptors} at most, {descriptors_after} \
         after. Resident memory: {} MiB before, {} MiB at most.",
        memory_before / 1024,
        most_memory / 1024,
    );
    assert!(closed.iter().all(|kind| kind.gone == kind.opened), "{report}");
    assert!(closed.iter().all(|kind| kind.longest_ms <= 10_500), "{report}");
    assert!(descriptors_after <= descriptors_before + 16, "{report}");
}

/// A million keys that nobody has, from one address.
fn unknown_keys(report: &mut String) {
    let upstream = upstream::start();
    let gate = Gate::start(upstream);
    honest(&gate, || std::thread::sleep(Duration::from_secs(3)));
    let quiet = honest(&gate, || std::thread::sleep(Duration::from_secs(15)));
    let memory_before = gate.resident_kib();
    let mut guessed = attack::Guesses::default();
    let busy = honest(&gate, || guessed = attack::guess(&gate, attack::GUESSES));
    let memory_after = gate.resident_kib();
    let _ = write!(
        report,
        "\n## {} unknown keys from one address\n\nWell-formed keys with a right checksum, on 16 connections, as fast as \
         they were answered: {:.0} s, {:.0} a second. Answers: {} × 401, {} × 429 TOO_MANY_FAILED_ATTEMPTS, {} others. \
         Resident memory: {} KiB before, {} KiB after. The honest clients have other addresses.\n",
        attack::GUESSES,
        guessed.seconds,
        attack::GUESSES as f64 / guessed.seconds.max(0.001),
        guessed.unknown,
        guessed.throttled,
        guessed.others,
        memory_before,
        memory_after,
    );
    latencies(report, &[("before", &quiet), ("during", &busy)]);
    assert_eq!(guessed.others, 0, "{report}");
    assert!(guessed.throttled > guessed.unknown, "{report}");
}

fn latencies(report: &mut String, phases: &[(&str, &Latencies)]) {
    report.push_str(
        "\n| honest requests | phase | answered | failed | median µs | p99 µs | × the p99 before |\n|---|---|---|---|---|---|---|\n",
    );
    for (what, of) in [
        (
            "on kept connections",
            Latencies::kept as fn(&Latencies) -> &honest::Series,
        ),
        ("on a connection each", Latencies::fresh),
    ] {
        let before = of(phases[0].1).percentile(0.99);
        for (phase, all) in phases {
            let series = of(all);
            let p99 = series.percentile(0.99);
            let _ = writeln!(
                report,
                "| {what} | {phase} | {} | {} | {} | {p99} | {:.2} |",
                series.answered(),
                series.failed,
                series.percentile(0.5),
                p99 as f64 / before.max(1) as f64,
            );
        }
    }
    for (phase, all) in phases {
        assert_eq!(
            all.kept().failed + all.fresh().failed,
            0,
            "honest requests failed {phase}:\n{report}"
        );
    }
}
