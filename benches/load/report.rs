//! The table that is written.

use super::client::Tally;
use super::scenario::{Scenario, Setup};
use std::fmt::Write as _;
use std::time::Duration;

/// One scenario in one round.
pub struct Sample {
    cpu_us: f64,
    per_second: f64,
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
}

impl Sample {
    pub fn new(tally: Tally, took: Duration, cpu: Duration) -> Self {
        let answered = tally.answered.max(1) as f64;
        Sample {
            cpu_us: cpu.as_secs_f64() * 1e6 / answered,
            per_second: tally.answered as f64 / took.as_secs_f64(),
            p50_us: tally.p50_us,
            p99_us: tally.p99_us,
            p999_us: tally.p999_us,
        }
    }
}

pub struct Report {
    head: String,
    rows: Vec<(Scenario, Vec<Sample>)>,
    setups: Vec<(Setup, Duration, u64, u64)>,
}

impl Report {
    pub fn new(pinned: bool, wrk: Option<String>, rounds: usize, time: Duration) -> Self {
        let generator = wrk.map_or("a generator of its own".to_owned(), |wrk| {
            format!("{wrk} for HTTP/1, a generator of its own for HTTP/2")
        });
        let placed = if pinned {
            "the gate on the first processor, origin and clients on the last"
        } else {
            "all on the same processors"
        };
        let head = format!(
            "# The gate under load\n\nWritten by `cargo bench --bench load` on {date}: {rounds} interleaved rounds of {seconds} s, {clients} connections, {generator}; {placed}. {machine}\n\nMedian and, in brackets, quartiles. CPU time is that of all the gate's threads; times of requests are those of a closed loop, so they follow from the load and are for comparing rows only.\n",
            date = today(),
            seconds = time.as_secs_f64(),
            clients = super::client::CONNECTIONS,
            machine = machine(),
        );
        Report {
            head,
            rows: vec![],
            setups: vec![],
        }
    }

    pub fn started(&mut self, setup: Setup, first_answer_after: Duration, resident_mib: u64) {
        self.setups.push((setup, first_answer_after, resident_mib, 0));
    }

    pub fn ended(&mut self, setup: Setup, resident_mib: u64) {
        for row in self.setups.iter_mut().filter(|row| row.0 == setup) {
            row.3 = resident_mib;
        }
    }

    pub fn add(&mut self, scenario: &Scenario, sample: Sample) {
        match self.rows.iter_mut().find(|(known, _)| known.name == scenario.name) {
            Some((_, samples)) => samples.push(sample),
            None => self.rows.push((scenario.clone(), vec![sample])),
        }
    }

    pub fn markdown(&self) -> String {
        let mut text = self.head.clone();
        text.push_str(
            "\n| scenario | CPU µs a request | requests/s | p50 µs | p99 µs | p99.9 µs |\n|---|---|---|---|---|---|\n",
        );
        for (scenario, samples) in &self.rows {
            let column = |of: fn(&Sample) -> f64, digits: usize| {
                let [lower, median, upper] = quartiles(samples.iter().map(of).collect());
                format!("{median:.digits$} [{lower:.digits$}–{upper:.digits$}]")
            };
            let median = |of: fn(&Sample) -> f64| quartiles(samples.iter().map(of).collect())[1];
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "| {} | {} | {} | {:.0} | {:.0} | {:.0} |",
                scenario.name,
                column(|sample| sample.cpu_us, 1),
                column(|sample| sample.per_second, 0),
                median(|sample| sample.p50_us),
                median(|sample| sample.p99_us),
                median(|sample| sample.p999_us),
            );
        }
        text.push_str(
            "\n| gate | first answer after, s | memory before, MiB | and after the load |\n|---|---|---|---|\n",
        );
        for (setup, first, before, after) in &self.setups {
            let _ = writeln!(
                text,
                "| {} keys, {} worker{}{} | {:.2} | {before} | {after} |",
                setup.keys,
                setup.workers,
                if setup.workers == 1 { "" } else { "s" },
                if setup.access_log { ", access log" } else { "" },
                first.as_secs_f64(),
            );
        }
        text
    }
}

/// Lower quartile, median, upper quartile, between neighbours in proportion.
fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_unstable_by(f64::total_cmp);
    [0.25, 0.5, 0.75].map(|share| {
        let at = share * (values.len() - 1) as f64;
        let (below, above) = (values[at.floor() as usize], values[at.ceil() as usize]);
        below + (above - below) * at.fract()
    })
}

fn today() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs() as i64);
    jiff::Timestamp::from_second(seconds).map_or_else(|_| String::new(), |now| now.strftime("%Y-%m-%d").to_string())
}

/// The machine in general terms.
fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let field = |name: &str| {
        cpu.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split(": ").nth(1))
    };
    let count = cpu.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = read("/proc/sys/kernel/osrelease");
    format!(
        "{count} × {}, Linux {}.",
        field("model name").unwrap_or("unknown processor"),
        kernel.trim()
    )
}
