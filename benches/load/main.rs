//! The whole gate under load: `cargo bench --bench load`.
//!
//! Starts gates of its own (the `tollgate` binary that Cargo built beside this), an origin behind them and clients in
//! front, all on loopback, and writes `benches/results/load.md`: medians and quartiles of interleaved rounds, so that a
//! machine that slows down does so for every scenario. Nothing is installed or built from outside; where `wrk` is on the
//! PATH it sends what is HTTP/1, otherwise, and for HTTP/2, a generator of our own does.
//!
//! With `taskset` and at least two processors the gate has the first one for itself and everything else the last.
//! CPU time is what the kernel says all of the gate's threads used, over the requests that were answered; unlike
//! requests per second it does not depend on what else the machine is doing.
//!
//! | variable | what | default |
//! |---|---|---|
//! | `LOAD_ROUNDS` | rounds | 7 |
//! | `LOAD_SECONDS` | seconds a scenario and round | 1.0 |
//! | `LOAD_ONLY` | only scenarios whose name has this in it | all |
//! | `LOAD_GENERATOR` | `own`: no `wrk` | |

mod client;
mod gate;
mod origin;
mod program;
mod report;
mod scenario;

#[path = "../../tests/gate_support/mod.rs"]
mod gate_support;

use client::Tally;
use gate::RunningGate;
use origin::Origin;
use report::{Report, Sample};
use scenario::{Scenario, Setup};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

fn main() {
    // `cargo test --benches` and nextest ask for a list; there is nothing here for them.
    if std::env::args().any(|argument| argument == "--list" || argument == "--test") {
        return;
    }
    let pinned = pin_to_the_last_processor();
    let rounds = number("LOAD_ROUNDS", 7.0) as usize;
    let time = Duration::from_secs_f64(number("LOAD_SECONDS", 1.0));
    let only = std::env::var("LOAD_ONLY").unwrap_or_default();
    let scenarios: Vec<Scenario> = scenario::all()
        .into_iter()
        .filter(|scenario| scenario.name.contains(&only))
        .collect();
    assert!(!scenarios.is_empty(), "no scenario has {only:?} in its name");

    let directory = tempfile::tempdir().expect("a directory for temporary files");
    let origin = Origin::start();
    let mut gates: BTreeMap<Setup, RunningGate> = BTreeMap::new();
    for setup in scenarios.iter().map(|scenario| scenario.setup) {
        gates
            .entry(setup)
            .or_insert_with(|| RunningGate::start(directory.path(), setup, origin.address, pinned));
    }
    let wrk = client::wrk(directory.path());

    let mut report = Report::new(pinned, wrk.as_ref().map(|wrk| wrk.version.clone()), rounds, time);
    for (setup, gate) in &gates {
        report.started(*setup, gate.program.first_answer_after, gate.resident_mib());
    }
    for round in 0..=rounds {
        for scenario in &scenarios {
            let gate = &gates[&scenario.setup];
            // The first round warms up: it makes each key's window.
            let scenario = &if round > 0 {
                scenario.clone()
            } else {
                scenario.warming_up()
            };
            let (cpu_before, begun) = (gate.cpu(), Instant::now());
            let tally: Tally = match &wrk {
                Some(wrk) if scenario.protocol.is_http1() => wrk.run(scenario, gate, time, round),
                _ => client::run(scenario, gate, time, round),
            };
            let (took, cpu) = (begun.elapsed(), gate.cpu() - cpu_before);
            if round > 0 {
                report.add(scenario, Sample::new(tally, took, cpu));
            }
        }
        eprintln!("round {round} of {rounds}");
    }
    for (setup, gate) in &gates {
        report.ended(*setup, gate.resident_mib());
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/load.md");
    let text = report.markdown();
    print!("{text}");
    std::fs::write(path, text).expect("the results' directory can be written");
    eprintln!("written to {path}");
}

fn number(variable: &str, default: f64) -> f64 {
    match std::env::var(variable) {
        Err(_) => default,
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is {text:?}, and should be a number")),
    }
}

/// Starts this program again on the last processor, once, and says whether it runs there. The gate then gets the first.
fn pin_to_the_last_processor() -> bool {
    use std::os::unix::process::CommandExt;
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    if std::env::var_os("LOAD_PINNED").is_some() {
        return true;
    }
    let has_taskset = Command::new("taskset").arg("--version").output().is_ok();
    if processors < 2 || !has_taskset {
        return false;
    }
    let this = std::env::current_exe().expect("this program has a path");
    let error = Command::new("taskset")
        .args(["-c", &(processors - 1).to_string()])
        .arg(this)
        .args(std::env::args_os().skip(1))
        .env("LOAD_PINNED", "1")
        .exec();
    panic!("taskset cannot start this program again: {error}");
}
