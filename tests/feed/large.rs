//! A million keys: from the feed's first byte, from the spool, and a change beside a rewrite of it. Run by hand:
//! `cargo test --release --test feed large -- --ignored --nocapture`.

use std::fs;
use std::time::{Duration, Instant};

use tollgate::clock::Clock;
use tollgate::feed::{Feed, LoadOutcome};
use tollgate::wire::KeyLine;

use crate::plane::Plane;
use crate::{Running, START_MS, eventually, gate, key, settings, verdict};

/// What the process has spent on its processors: on a busy machine that says more than the time it took.
fn processor_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

const KEYS: u32 = 1_000_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a minute and most of a gigabyte"]
async fn a_million_keys() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start((0..KEYS).map(key)).await;
    let prepared = plane.prepare();
    println!("snapshot: {} MB", prepared / 1_000_000);
    let spent = processor_time();
    let running = Running::start(settings(&plane.url, directory.path()));
    eventually("the first byte", || plane.state().began.is_some()).await;
    let begun = plane.state().began.unwrap();
    while !running.gate.is_ready() {
        assert!(begun.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!(
        "first snapshot: {:?} after its first byte, {:?} of processor time, the sending included",
        begun.elapsed(),
        processor_time() - spent
    );

    // Changes while the spool is being written for the first time.
    let spool = directory.path().join("keys.spool");
    let mut effects = Vec::new();
    let mut during_rewrite = 0;
    for n in 0..3_000 {
        let begun = Instant::now();
        let revision = plane.change(KeyLine {
            revoked: true,
            ..key(n)
        });
        while running.gate.revision() != Some(revision) {
            assert!(begun.elapsed() < Duration::from_secs(10));
            tokio::task::yield_now().await;
        }
        effects.push(begun.elapsed());
        during_rewrite += u32::from(!spool.exists());
    }
    effects.sort_unstable();
    println!(
        "change to effect: median {:?}, p99 {:?}, worst {:?}; {during_rewrite} of them while the spool was written",
        effects[1_500], effects[2_970], effects[2_999]
    );
    eventually("the spool", || spool.exists()).await;
    running.stop().await;
    println!("spool: {} MB", fs::metadata(&spool).unwrap().len() / 1_000_000);

    let gate = gate(100);
    let feed = Feed::new(
        settings("http://127.0.0.1:9", directory.path()),
        gate.clone(),
        Clock::manual(START_MS),
    );
    let (begun, spent) = (Instant::now(), processor_time());
    let outcome = feed.load();
    println!(
        "spool loaded: {:?}, {:?} of processor time",
        begun.elapsed(),
        processor_time() - spent
    );
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
    assert!(verdict(&gate, &Clock::manual(START_MS), 17).is_err());
    assert!(verdict(&gate, &Clock::manual(START_MS), 999_999).is_ok());
}
