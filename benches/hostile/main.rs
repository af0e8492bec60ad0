//! What an attack does to everybody else: the real binary, attacked from a process of its own, with honest requests
//! beside it. `cargo bench --bench hostile` runs it all (about ten minutes) and writes `results/hostile_slow.md` and
//! `results/hostile_keys.md`; `HOSTILE_PART=slow` or `keys` is one of them, and `HOSTILE_CONNECTIONS=N` changes how many
//! slow connections there are (10,000). `HOSTILE_TRACE=FILE` keeps every latency of the former, for a time line.
//!
//! Quiet and attacked phases take turns in one run, so that both meet the same machine. The attacker runs only while
//! nobody else wants a processor (`SCHED_IDLE`; niceness would let it finish its slice first): on the one machine of
//! this bench it takes the gate's processors otherwise, and what would be measured is the scheduler. On its own machine
//! it would not.

mod attack;
mod gate;
mod honest;
mod upstream;

use attack::Closed;
use gate::{Gate, Look};
use honest::{Latencies, honest, is_unsuspected};
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

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
    let part = std::env::var("HOSTILE_PART").ok();
    let chosen = |name: &str| part.as_deref().is_none_or(|part| part == name);
    if chosen("slow") {
        let connections = std::env::var("HOSTILE_CONNECTIONS")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(10_000);
        write("hostile_slow.md", |report| slow_clients(report, connections));
    }
    if chosen("keys") {
        write("hostile_keys.md", unknown_keys);
    }
}

fn write(file: &str, measure: impl FnOnce(&mut String)) {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let mut report = format!(
        "# What an attack does to everybody else\n\nWritten on 2026-11-26 by `cargo bench --bench hostile`: the `tollgate` \
         binary, optimised, with its default limits; {} shared processors for gate, upstream, honest clients and attacker \
         together, of which the attacker gets what nobody else wants; load average at the start: {}, which must be near 0 \
         for the times to mean anything. Honest requests: {} a second on {} kept connections, and {} a second on a \
         connection each; a latency counts from when the request was due. As many requests go past the gate, straight to \
         the upstream, and a timer tells how late the measuring thread itself was. Quiet and attacked phases take turns; \
         the last column is the median of the rounds' ratios, and its range.\n",
        std::thread::available_parallelism().map_or(1, usize::from),
        load.split_whitespace().next().unwrap_or_default(),
        honest::REQUESTS_PER_SECOND,
        honest::KEPT_CONNECTIONS,
        honest::CONNECTIONS_PER_SECOND,
    );
    measure(&mut report);
    println!("{report}");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results").join(file);
    std::fs::write(&path, report).expect("the results are written");
}

/// Slow heads, bodies and readers, all at once, several times.
fn slow_clients(report: &mut String, connections: usize) {
    const ROUNDS: usize = 3;
    let begun = tokio::time::Instant::now();
    let gate = Gate::start(upstream::start());
    honest(&gate, || std::thread::sleep(Duration::from_secs(3)));
    let before = gate.look();
    let [mut quiet, mut coming, mut there] = std::array::from_fn(|_| Phase::default());
    let mut closed: Vec<Closed> = Vec::new();
    let mut most = Look::default();
    for _ in 0..ROUNDS {
        quiet.run(&gate, || std::thread::sleep(QUIET));
        let mut attacker = attack::slow(&gate, connections);
        coming.run(&gate, || std::thread::sleep(attack::RAMP));
        there.run(&gate, || {
            while !attacker.has_ended() {
                std::thread::sleep(Duration::from_millis(500));
                most = most.max(gate.look());
            }
        });
        closed = attack::together(closed, attacker.report());
        std::thread::sleep(Duration::from_secs(3));
    }
    let after = gate.look();
    if let Some(path) = std::env::var_os("HOSTILE_TRACE") {
        let mut text = String::new();
        for phase in [&quiet, &coming, &there] {
            for (name, series) in [
                ("kept", &phase.latencies.kept),
                ("fresh", &phase.latencies.fresh),
                ("past", &phase.latencies.past_the_gate),
                ("timer", &phase.latencies.timer),
            ] {
                series.trace(name, begun, &mut text);
            }
        }
        std::fs::write(path, text).expect("the trace is written");
    }
    let attacks = (connections * ROUNDS) as f64;
    let _ = write!(
        report,
        "\n## {connections} slow connections, {ROUNDS} times\n\nFrom {} addresses, all open at once after {} s, in \
         which they come at even distances; each sends, or takes, one byte every 5 s. \"Over\" is the time from the end of what its rule allows (head: 10 s; body: 20 s at \
         500 bytes a second; response: 60 s at the same rate) to the moment it saw its connection end.\n\n\
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
    latencies(
        report,
        &quiet,
        &[("while they come", &coming), ("while they are there", &there)],
    );
    let _ = writeln!(
        report,
        "\nThe gate's processor time: {:.0} µs for an honest request while it was quiet; beyond that the attack took \
         {:.0} µs for each of its connections, from its first byte to its end: \
         {:.1} % of one processor while they came, {:.1} % while they were there. Descriptors of the gate: {} before, {} at most, {} after. Resident memory: {} MiB before, {} MiB at \
         most; the kernel's for all sockets of the machine, both ends of each: {} MiB at most.",
        quiet.cpu_us_per_request(),
        (coming.cpu_us_beyond(&quiet) + there.cpu_us_beyond(&quiet)) / attacks,
        coming.cpu_us_beyond(&quiet) / coming.time.as_secs_f64() / 1e4,
        there.cpu_us_beyond(&quiet) / there.time.as_secs_f64() / 1e4,
        before.descriptors,
        most.descriptors,
        after.descriptors,
        before.resident_kib / 1024,
        most.resident_kib / 1024,
        most.sockets_kib / 1024,
    );
    assert!(closed.iter().all(|kind| kind.gone == kind.opened), "{report}");
    assert!(closed.iter().all(|kind| kind.longest_ms <= 10_500), "{report}");
    assert!(after.descriptors <= before.descriptors + 16, "{report}");
}

/// A million keys that nobody has, from one address.
fn unknown_keys(report: &mut String) {
    const ROUNDS: u64 = 5;
    let gate = Gate::start(upstream::start());
    honest(&gate, || std::thread::sleep(Duration::from_secs(3)));
    let before = gate.look();
    let (mut quiet, mut beside) = (Phase::default(), Phase::default());
    let mut guesses = attack::Guesses::default();
    for round in 0..ROUNDS {
        quiet.run(&gate, || std::thread::sleep(QUIET));
        let each = attack::GUESSES / ROUNDS;
        beside.run(&gate, || guesses.add(attack::guess(&gate, round * each, each)));
    }
    let after = gate.look();
    let _ = write!(
        report,
        "\n## {} unknown keys from one address\n\nWell-formed keys with a right checksum, each with an X-Forwarded-For of \
         another, honest address; on {} connections, {:.0} a second ({} were asked for). Answers: {} × 401, {} × 429 \
         TOO_MANY_FAILED_ATTEMPTS, {} others. Resident memory: {} KiB before, {} KiB after. The honest clients have \
         other addresses.\n",
        attack::GUESSES,
        attack::GUESSERS,
        attack::GUESSES as f64 / guesses.seconds.max(0.001),
        attack::GUESSES_PER_SECOND,
        guesses.unknown,
        guesses.throttled,
        guesses.others,
        before.resident_kib,
        after.resident_kib,
    );
    latencies(report, &quiet, &[("attacked", &beside)]);
    let _ = writeln!(
        report,
        "\nThe gate's processor time: {:.1} µs for an honest request while it was quiet, {:.1} µs for a refused one. An \
         unknown key from one of the addresses that were named in X-Forwarded-For is still answered 401.",
        quiet.cpu_us_per_request(),
        beside.cpu_us_beyond(&quiet) / attack::GUESSES as f64,
    );
    assert_eq!(guesses.others, 0, "{report}");
    assert!(guesses.throttled > guesses.unknown, "{report}");
    assert!(is_unsuspected(&gate), "an honest address was framed:\n{report}");
}

/// The honest requests of all phases of one kind, and what they and the attack beside them took.
#[derive(Default)]
struct Phase {
    /// Of all rounds, and of each.
    latencies: Latencies,
    rounds: Vec<[u64; SERIES.len()]>,
    cpu: Duration,
    time: Duration,
}

impl Phase {
    fn run(&mut self, gate: &Gate, meanwhile: impl FnOnce()) {
        let (cpu, started) = (gate.cpu(), Instant::now());
        let round = honest(gate, meanwhile);
        self.rounds.push(SERIES.map(|(_, of)| of(&round).percentile(0.99)));
        self.latencies.add(round);
        self.cpu += gate.cpu().saturating_sub(cpu);
        self.time += started.elapsed();
    }

    fn cpu_us_per_request(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.latencies.answered().max(1) as f64
    }

    /// What was spent on others than honest requests.
    fn cpu_us_beyond(&self, quiet: &Phase) -> f64 {
        self.cpu.as_secs_f64() * 1e6 - quiet.cpu_us_per_request() * self.latencies.answered() as f64
    }
}

/// One of the series of a phase.
type Choose = fn(&Latencies) -> &honest::Series;

/// What is told of each phase.
const SERIES: [(&str, Choose); 4] = [
    ("on kept connections", |all| &all.kept),
    ("on a connection each", |all| &all.fresh),
    ("past the gate", |all| &all.past_the_gate),
    ("none: a timer", |all| &all.timer),
];

fn latencies(report: &mut String, quiet: &Phase, attacked: &[(&str, &Phase)]) {
    let phases = || std::iter::once(("quiet", quiet)).chain(attacked.iter().copied());
    report.push_str(
        "\n| honest requests | phase | answered | failed | median µs | p99 µs | × the quiet p99 |\n|---|---|---|---|---|---|---|\n",
    );
    for (at, (what, of)) in SERIES.iter().enumerate() {
        for (phase, all) in phases() {
            let series = of(&all.latencies);
            let rounds = all.rounds.iter().zip(&quiet.rounds);
            let mut ratios: Vec<f64> = rounds
                .map(|(p99, quiet)| p99[at] as f64 / quiet[at].max(1) as f64)
                .collect();
            ratios.sort_by(f64::total_cmp);
            let _ = writeln!(
                report,
                "| {what} | {phase} | {} | {} | {} | {} | {:.2} ({:.2} to {:.2}) |",
                series.answered(),
                series.failed,
                series.percentile(0.5),
                series.percentile(0.99),
                ratios[ratios.len() / 2],
                ratios[0],
                ratios[ratios.len() - 1],
            );
        }
    }
    for (_, phase) in phases() {
        let failed = phase.latencies.kept.failed + phase.latencies.fresh.failed;
        assert_eq!(failed, 0, "honest requests failed:\n{report}");
    }
}

const QUIET: Duration = Duration::from_secs(15);
