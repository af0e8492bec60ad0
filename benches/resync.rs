//! A million keys on their way into a gate: from the control plane, again beside requests, and from the spool.
//!
//! `cargo bench --bench resync` runs a real control plane on SQLite in a process of its own and a gate that follows it,
//! and writes `benches/results/resync.md`.

#[path = "../tests/gate_support/mod.rs"]
mod gate_support;

use gate_support::{CLIENT, ask, secret, settings, with_secret};
use http::HeaderMap;
use sha2::{Digest, Sha256};
use sqlx::{Connection as _, Executor as _};
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tollgate::clock::Clock;
use tollgate::control::{ControlPlane, Environment, Plan, Settings as ControlSettings, migrate};
use tollgate::feed::{Feed, LoadOutcome, Settings, Source, Tls, Token, http_client};
use tollgate::gate::Gate;
use tollgate::wire::{FeedLine, KeyLine, SecretLine};

/// As in the `tollgate` binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const KEYS: u32 = 1_000_000;
const ORGANIZATIONS: u32 = 10_000;
const TOKEN: &str = "the-token-of-the-bench";
/// Requests of one thread at once, and its pause after them: 20,000 a second at most, which leaves the processors
/// something to do the rest with.
const BURST: usize = 20;
const PAUSE: Duration = Duration::from_millis(1);
/// Different keys that one thread asks with.
const ASKED: u32 = 50_000;

fn main() {
    let mode = std::env::args().nth(1);
    match mode.as_deref() {
        Some("control") => serve(&std::env::args().nth(2).expect("a directory")),
        _ => measure(),
    }
}

fn line(n: u32) -> KeyLine {
    let digest = Sha256::digest(secret(n).as_bytes());
    KeyLine {
        revision: u64::from(n) + 1,
        id: format!("key_{n:016}"),
        organization: format!("org_{:016}", n % ORGANIZATIONS),
        environment: "live".into(),
        scopes: vec!["permissions:check".into(), "storage:read".into()],
        plan: "starter".into(),
        secrets: vec![SecretLine {
            sha256: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            not_after: None,
        }],
        expires_at: None,
        disabled: false,
        revoked: false,
    }
}

/// A control plane with a million keys, until its standard input ends.
#[tokio::main]
async fn serve(directory: &str) {
    let database = format!("sqlite://{directory}/tollgate.db");
    migrate(&database).await.expect("a new database");
    let mut connection = sqlx::SqliteConnection::connect(&database)
        .await
        .expect("it was just made");
    connection.execute("BEGIN").await.expect("no other writer");
    for n in 0..KEYS {
        let key = line(n);
        sqlx::query("INSERT INTO feed_lines (revision, key_id, line) VALUES (?, ?, ?)")
            .bind(i64::from(n) + 1)
            .bind(key.id.clone())
            .bind(serde_json::to_string(&FeedLine::Key(key)).expect("plain data"))
            .execute(&mut connection)
            .await
            .expect("a new line");
    }
    let revision = format!("UPDATE feed_state SET revision = {KEYS}");
    connection
        .execute(sqlx::AssertSqlSafe(revision))
        .await
        .expect("one row");
    connection.execute("COMMIT").await.expect("room on the disk");
    connection.close().await.expect("nothing is under way");
    let settings = ControlSettings {
        database,
        feed_token: TOKEN.into(),
        admin_token: TOKEN.into(),
        environments: vec![Environment {
            name: "live".into(),
            prefix: "pxk_live_".into(),
            billed: true,
        }],
        plans: vec![Plan {
            name: "starter".into(),
            max_in_flight: None,
            tiers: vec![],
        }],
        ..ControlSettings::default()
    };
    let plane = ControlPlane::open(settings, Clock::system())
        .await
        .expect("sound settings");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    println!("http://{}", listener.local_addr().expect("it is bound"));
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().lines().for_each(drop));
    plane
        .serve(listener, None, async {
            let _ = ended.await;
        })
        .await
        .expect("a server");
}

struct Control {
    process: Child,
    url: String,
}

impl Control {
    fn start(directory: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().expect("a path of its own"))
            .arg("control")
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("can start itself");
        let mut url = String::new();
        let output = process.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut url).expect("it says where it is");
        Control {
            process,
            url: url.trim().to_owned(),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Two threads of requests, and how long each request took, by phase.
struct Requests {
    phase: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Vec<Vec<u32>>>>,
}

const PHASES: [&str; 5] = [
    "nothing else",
    "a full snapshot comes",
    "the spool is written",
    "nothing else, again",
    "another gate loads the spool",
];

impl Requests {
    fn start(gate: &Arc<Gate>) -> Self {
        let (phase, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let threads = (0..2_u32)
            .map(|thread| {
                let (gate, phase, stop) = (Arc::clone(gate), Arc::clone(&phase), Arc::clone(&stop));
                std::thread::spawn(move || request(&gate, thread, &phase, &stop))
            })
            .collect();
        Requests { phase, stop, threads }
    }

    fn enter(&self, phase: usize) {
        self.phase.store(phase, Ordering::Relaxed);
    }

    /// The sorted times of every phase, in nanoseconds.
    fn end(self) -> Vec<Vec<u32>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = vec![vec![]; PHASES.len()];
        for thread in self.threads {
            for (phase, times) in thread.join().expect("no panic").into_iter().enumerate() {
                all[phase].extend(times);
            }
        }
        all.iter_mut().for_each(|times| times.sort_unstable());
        all
    }
}

fn request(gate: &Gate, thread: u32, phase: &AtomicUsize, stop: &AtomicBool) -> Vec<Vec<u32>> {
    let clock = Clock::system();
    // Spread over all keys.
    let keys: Vec<HeaderMap> = (0..ASKED).map(|n| with_secret((n * 20 + thread) % KEYS)).collect();
    let mut times = vec![Vec::with_capacity(400_000); PHASES.len()];
    let mut keys = keys.iter().cycle();
    while !stop.load(Ordering::Relaxed) {
        let phase = phase.load(Ordering::Relaxed);
        for headers in keys.by_ref().take(BURST) {
            let begun = Instant::now();
            let permit = ask(gate, "/things", headers, CLIENT, clock.now());
            let took = begun.elapsed();
            assert!(permit.is_ok(), "every key is valid throughout");
            times[phase].push(took.as_nanos().min(u128::from(u32::MAX)) as u32);
        }
        std::thread::sleep(PAUSE);
    }
    times
}

fn gate() -> Arc<Gate> {
    Arc::new(Gate::new(settings(1_000_000)).expect("sound settings"))
}

fn feed(url: &str, directory: &Path, gate: &Arc<Gate>) -> Feed {
    let client = http_client(&Tls::default()).expect("a client");
    let source = Source::http(url, Token::new(TOKEN).expect("a token"), client);
    Feed::new(
        Settings::new("gate-1", source, directory),
        Arc::clone(gate),
        Clock::system(),
    )
}

fn wait(mut until: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !until() {
        assert!(begun.elapsed() < Duration::from_secs(120), "waited in vain");
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn measure() {
    let directory = tempfile::tempdir().expect("a directory");
    let state = directory.path().join("gate");
    eprintln!("making a control plane with {KEYS} keys");
    let control = Control::start(directory.path());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");

    let gate = gate();
    let feed = Arc::new(feed(&control.url, &state, &gate));
    assert_eq!(feed.load(), LoadOutcome::Missing);
    let running = Arc::clone(&feed);
    let task = runtime.spawn(async move { running.run(std::future::pending()).await });
    // The head of the answer is here; the first byte of the stream is on its way.
    wait(|| feed.status().connections > 0);
    let begun = Instant::now();
    wait(|| gate.is_ready());
    let first = begun.elapsed();
    // The gate's books are done a moment after the snapshot is in force.
    wait(|| gate.key_count() == KEYS as usize);
    eprintln!("first snapshot: {first:?}");
    let spool = state.join("keys.spool");
    wait(|| spool.exists());
    let spooled = begun.elapsed() - first;

    let requests = Requests::start(&gate);
    std::thread::sleep(Duration::from_secs(4));
    // Beside requests: the operator asks for a resync.
    requests.enter(1);
    let before = std::fs::metadata(&spool)
        .and_then(|file| file.modified())
        .expect("it exists");
    let begun = Instant::now();
    let client = http_client(&Tls::default()).expect("a client");
    let asked = client
        .post(format!("{}/api/v1/admin/feed/resync", control.url))
        .bearer_auth(TOKEN)
        .send();
    let answer = runtime.block_on(asked).expect("an answer");
    assert!(answer.status().is_success(), "{}", answer.status());
    let newest = u64::from(KEYS) + 1;
    wait(|| gate.revision() == Some(newest));
    let again = begun.elapsed();
    requests.enter(2);
    wait(|| {
        std::fs::metadata(&spool)
            .and_then(|file| file.modified())
            .is_ok_and(|time| time != before)
    });
    let respooled = begun.elapsed() - again;
    eprintln!("again, beside requests: {again:?}");
    task.abort();
    requests.enter(3);
    std::thread::sleep(Duration::from_secs(2));

    requests.enter(4);
    let beside = load(&state);
    let times = requests.end();
    let bytes = std::fs::metadata(&spool).expect("it exists").len();
    let mut alone: Vec<Duration> = (0..3).map(|_| load(&state)).collect();
    alone.sort_unstable();

    let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
    let mut text = format!(
        "# A million keys into a gate\n\nWritten by `cargo bench --bench resync`: a control plane on SQLite in a process of its own, \
         {KEYS} keys of {ORGANIZATIONS} organisations, a gate that follows it over loopback, mimalloc as in the `tollgate` binary. \
         \"Beside requests\": two threads that make at most {} decisions a second each, over {} different keys.\n\n\
         | | s | goal |\n|---|---|---|\n\
         | first snapshot in force, after the first byte | {} | 2 |\n\
         | its spool on the disk, after that | {} | |\n\
         | full snapshot again beside requests, from the operator's request on | {} | 2 |\n\
         | its spool on the disk, after that | {} | |\n\
         | spool of {} MB loaded, beside requests | {} | 1.5 |\n\
         | spool loaded, nothing beside it (median of 3) | {} | 1.5 |\n\n\
         | decisions while | number | median, ns | p99, ns | p99.9, ns |\n|---|---|---|---|---|\n",
        BURST as u128 * 1_000 / PAUSE.as_millis(),
        ASKED * 2,
        seconds(first),
        seconds(spooled),
        seconds(again),
        seconds(respooled),
        bytes / 1_000_000,
        seconds(beside),
        seconds(alone[1]),
    );
    for (phase, times) in PHASES.iter().zip(&times) {
        let at = |part: f64| times.get((times.len() as f64 * part) as usize).copied().unwrap_or(0);
        text += &format!(
            "| {phase} | {} | {} | {} | {} |\n",
            times.len(),
            at(0.5),
            at(0.99),
            at(0.999)
        );
    }
    println!("{text}");
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/resync.md");
    if let Err(error) = std::fs::write(path, text) {
        eprintln!("cannot write {path}: {error}");
    }
}

/// How long a new gate takes to load the spool.
fn load(state: &Path) -> Duration {
    let gate = gate();
    let feed = feed("http://127.0.0.1:9", state, &gate);
    let begun = Instant::now();
    let outcome = feed.load();
    let took = begun.elapsed();
    assert!(
        matches!(
            outcome,
            LoadOutcome::Loaded {
                keys: 1_000_000,
                damage: None,
                ..
            }
        ),
        "{outcome:?}"
    );
    took
}
