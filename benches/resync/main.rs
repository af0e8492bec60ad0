//! A million keys on their way into a gate: from the control plane, again beside requests, from the spool; and one more
//! key beside them.
//!
//! `cargo bench --bench resync` runs a real control plane on SQLite in a process of its own, a gate in this process that
//! follows it, then the `tollgate` binary as a gate, and writes `benches/results/resync.md`. Given a directory
//! (`-- DIRECTORY`), it keeps the control plane's database there for the next time.

mod follower;
#[path = "../../tests/gate_support/mod.rs"]
mod gate_support;
#[path = "../load/origin.rs"]
mod origin;
mod plane;
#[path = "../load/program.rs"]
mod program;
mod requests;

use gate_support::{CLIENT, ask, headers, settings};
use origin::Origin;
use plane::{ORGANIZATIONS, Plane};
use requests::{ASKED, BURST, PAUSE, Requests, THREADS, Times};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tollgate::clock::Clock;
use tollgate::feed::{Feed, LoadOutcome, Settings, Source, Tls, Token, http_client};
use tollgate::gate::Gate;

/// As in the `tollgate` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const KEYS: u32 = 1_000_000;
const TOKEN: &str = "the-token-of-the-bench-of-resyncs";
/// Enough that the gate's map of new keys becomes part of the large one, twice.
const ADDED: usize = 5_000;
/// Full snapshots beside HTTP requests, and starts of the binary.
const ROUNDS: usize = 5;
/// First snapshots with the database in the system's cache, and as often without.
const FIRST_TIMES: usize = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let given: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match given[..] {
        ["control", directory] => plane::serve(directory),
        [directory] => measure(Path::new(directory)),
        _ => measure(tempfile::tempdir().expect("a directory").path()),
    }
}

fn measure(directory: &Path) {
    let home = tempfile::tempdir().expect("a directory");
    let state = home.path().join("gate");
    eprintln!("starting a control plane with {KEYS} keys");
    let plane = Plane::start(directory);
    let bench = Bench {
        client: http_client("http://127.0.0.1", &Tls::default()).expect("a client"),
        runtime: tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime"),
        plane,
    };
    let mut text = format!(
        "# A million keys into a gate\n\nWritten by `cargo bench --bench resync`: a control plane on SQLite in a process of its own, \
         {KEYS} keys of {ORGANIZATIONS} organisations, gates that follow it over loopback, mimalloc as in the `tollgate` binary.\n\n"
    );
    bench.in_this_process(&state, &mut text);
    bench.as_a_program(home.path(), &mut text);
    println!("{text}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/resync.md");
    if let Err(error) = std::fs::write(path, text) {
        eprintln!("cannot write {path}: {error}");
    }
}

/// A gate that has its first snapshot.
struct Following {
    task: tokio::task::JoinHandle<()>,
    first: Duration,
    begun: Instant,
}

struct Bench {
    client: reqwest::Client,
    runtime: tokio::runtime::Runtime,
    plane: Plane,
}

impl Bench {
    fn in_this_process(&self, state: &Path, text: &mut String) {
        let spool = state.join("keys.spool");
        let mut cold: Vec<Duration> = (0..FIRST_TIMES)
            .map(|_| {
                self.plane.out_of_cache();
                self.first(&state.with_file_name("cold"))
            })
            .collect();
        let mut warm: Vec<Duration> = (0..FIRST_TIMES)
            .map(|_| self.first(&state.with_file_name("warm")))
            .collect();
        eprintln!("first snapshots: {cold:?} from the disk, {warm:?} from the cache");
        cold.sort_unstable();
        warm.sort_unstable();

        let gate = gate();
        let Following { task, first, begun } = self.follow(state, &gate);
        wait(|| spool.exists());
        let spooled = begun.elapsed() - first;

        let requests = Requests::decisions(&gate, DECISIONS_WHILE.len());
        std::thread::sleep(Duration::from_secs(4));
        requests.enter(1);
        let before = modified(&spool);
        let begun = Instant::now();
        let newest = self.runtime.block_on(self.plane.resync(&self.client, false));
        wait(|| gate.revision() == Some(newest));
        let again = begun.elapsed();
        requests.enter(2);
        wait(|| modified(&spool) != before);
        let respooled = begun.elapsed() - again;
        eprintln!("again, beside requests: {again:?}, its spool {respooled:?}");
        requests.enter(3);
        std::thread::sleep(Duration::from_secs(2));
        requests.enter(4);
        let beside = load(state);
        let times = requests.end();

        let added = self.runtime.block_on(self.add_keys(&gate));
        eprintln!("{ADDED} keys added");
        task.abort();
        let bytes = std::fs::metadata(&spool).expect("it exists").len();
        let mut alone: Vec<Duration> = (0..3).map(|_| load(state)).collect();
        alone.sort_unstable();

        let _ = write!(
            text,
            "| | s | goal |\n|---|---|---|\n\
             | first snapshot in force, after the first byte (median of {FIRST_TIMES}; the longest) | {}; {} | 2 |\n\
             | the same, of a database that is not in the system's cache | {}; {} | 2 |\n\
             | its spool on the disk, after that | {} | |\n\
             | full snapshot again beside decisions, from the operator's request on | {} | 2 |\n\
             | its spool on the disk, after that | {} | |\n\
             | spool of {} MB loaded, beside decisions | {} | 1.5 |\n\
             | spool loaded, nothing beside it (median of 3) | {} | 1.5 |\n\n\
             One more key beside the million, made through the control API, {ADDED} times: from the answer until the gate let it pass.\n\n\
             | median, ms | p99, ms | longest, ms | goal, ms |\n|---|---|---|---|\n| {:.2} | {:.2} | {:.2} | 100 |\n\n\
             Decisions of {THREADS} threads that make at most {} a second each, over {} different keys.\n\n",
            seconds(warm[FIRST_TIMES / 2]),
            seconds(warm[FIRST_TIMES - 1]),
            seconds(cold[FIRST_TIMES / 2]),
            seconds(cold[FIRST_TIMES - 1]),
            seconds(spooled),
            seconds(again),
            seconds(respooled),
            bytes / 1_000_000,
            seconds(beside),
            seconds(alone[1]),
            milliseconds(added[ADDED / 2]),
            milliseconds(added[ADDED * 99 / 100]),
            milliseconds(added[ADDED - 1]),
            BURST as u128 * 1_000 / PAUSE.as_millis(),
            ASKED * THREADS,
        );
        table(text, "decisions while", "ns", 1, &DECISIONS_WHILE, &times);
    }

    /// How long a new gate takes from the first byte to the snapshot's effect.
    fn first(&self, state: &Path) -> Duration {
        let Following { task, first, .. } = self.follow(state, &gate());
        // So that the next one has the machine to itself, and no spool to start from.
        wait(|| state.join("keys.spool").exists());
        task.abort();
        std::fs::remove_dir_all(state).expect("a directory of ours");
        first
    }

    fn follow(&self, state: &Path, gate: &Arc<Gate>) -> Following {
        let feed = Arc::new(self.feed(state, gate));
        assert_eq!(feed.load(), LoadOutcome::Missing);
        let running = Arc::clone(&feed);
        let task = self
            .runtime
            .spawn(async move { running.run(std::future::pending()).await });
        // The head of the answer is here; the first byte of the stream is on its way.
        wait(|| feed.status().connections > 0);
        let begun = Instant::now();
        wait(|| gate.is_ready());
        let first = begun.elapsed();
        Following { task, first, begun }
    }

    /// How long each new key took to pass once it was answered, sorted.
    async fn add_keys(&self, gate: &Gate) -> Vec<Duration> {
        let token = self.plane.tenant(&self.client).await;
        let clock = Clock::system();
        let mut times = Vec::with_capacity(ADDED);
        for _ in 0..ADDED {
            let secret = self.plane.add_key(&self.client, &token).await;
            let begun = Instant::now();
            let headers = headers(&[("x-api-key", &secret)]);
            while ask(gate, "/things", &headers, CLIENT, clock.now()).is_err() {
                assert!(begun.elapsed() < Duration::from_secs(10), "the key is not let in");
                tokio::time::sleep(Duration::from_micros(50)).await;
            }
            times.push(begun.elapsed());
        }
        times.sort_unstable();
        times
    }

    fn as_a_program(&self, home: &Path, text: &mut String) {
        let origin = Origin::start();
        let mut starts: Vec<Duration> = (0..ROUNDS)
            .map(|_| follower::start(home, &self.plane.url, origin.address).first_answer_after)
            .collect();
        starts.sort_unstable();
        eprintln!("first 200 after the start: {starts:?}");

        let program = follower::start(home, &self.plane.url, origin.address);
        // A gate that has just started has a spool to write first.
        self.runtime.block_on(self.plane.resync(&self.client, true));
        let requests = Requests::http(program.address, REQUESTS_WHILE.len());
        for _ in 0..ROUNDS {
            requests.enter(0);
            std::thread::sleep(Duration::from_secs(4));
            requests.enter(1);
            self.runtime.block_on(self.plane.resync(&self.client, true));
        }
        let times = requests.end();
        let _ = write!(
            text,
            "\nThe `tollgate` binary with the same keys in its spool: first 200 {} s after its start (median of {ROUNDS}; the longest {} s; \
             goal 1.5 s). Then {THREADS} threads with a connection each, {} ms between an answer and the next request; the control plane, the gate, \
             the clients and what stands behind the gate share the machine.\n\n",
            seconds(starts[ROUNDS / 2]),
            seconds(starts[ROUNDS - 1]),
            PAUSE.as_millis(),
        );
        table(text, "HTTP requests while", "µs", 1_000, &REQUESTS_WHILE, &times);
    }

    fn feed(&self, state: &Path, gate: &Arc<Gate>) -> Feed {
        feed(&self.plane.url, state, gate)
    }
}

const DECISIONS_WHILE: [&str; 5] = [
    "nothing else",
    "a full snapshot comes",
    "the spool is written",
    "nothing else, again",
    "another gate loads the spool",
];
const REQUESTS_WHILE: [&str; 2] = ["nothing else", "a full snapshot comes and its spool is written"];

fn gate() -> Arc<Gate> {
    Arc::new(Gate::new(settings(1_000_000)).expect("sound settings"))
}

fn feed(url: &str, state: &Path, gate: &Arc<Gate>) -> Feed {
    let client = http_client("http://127.0.0.1", &Tls::default()).expect("a client");
    let source = Source::http(url, Token::new(TOKEN).expect("a token"), client);
    Feed::new(
        Settings::new("gate-1", source, state),
        Arc::clone(gate),
        Clock::system(),
    )
}

/// How long a new gate takes to load the spool.
fn load(state: &Path) -> Duration {
    let gate = gate();
    let feed = feed("http://127.0.0.1:9", state, &gate);
    let begun = Instant::now();
    let outcome = feed.load();
    let took = begun.elapsed();
    let whole = matches!(outcome, LoadOutcome::Loaded { keys, damage: None, .. } if keys >= KEYS as usize);
    assert!(whole, "{outcome:?}");
    took
}

fn modified(path: &Path) -> Option<std::time::SystemTime> {
    std::fs::metadata(path).and_then(|file| file.modified()).ok()
}

fn wait(mut until: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !until() {
        assert!(begun.elapsed() < Duration::from_secs(120), "waited in vain");
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1_000.0
}

fn table(text: &mut String, what: &str, unit: &str, ns_in_unit: u32, phases: &[&str], times: &[Times]) {
    let _ = writeln!(
        text,
        "| {what} | number | median, {unit} | p99, {unit} | of the first row's | p99.9, {unit} |\n|---|---|---|---|---|---|"
    );
    for (phase, measured) in phases.iter().zip(times) {
        let at = |part| measured.at(part) / ns_in_unit;
        let _ = writeln!(
            text,
            "| {phase} | {} | {} | {} | {:.2} | {} |",
            measured.len(),
            at(0.5),
            at(0.99),
            f64::from(measured.at(0.99)) / f64::from(times[0].at(0.99)),
            at(0.999)
        );
    }
}
