//! What the gate has counted reaches the ledger exactly once, and windows outlive the process.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tollgate::clock::Clock;
use tollgate::feed::Token;
use tollgate::gate::{Gate, Reason};
use tollgate::meter::{Control, JournalOutcome, Meter, Settings};
use tollgate::wire::{KeyLine, UsageBatch};

use crate::plane::{Plane, UsageFault};
use crate::{FEED_TOKEN, START_MS, client, eventually, gate, key_in, secret, verdict_in, within};

const ENVIRONMENTS: [&str; 3] = ["live", "test", "dev"];

fn environment(n: u32) -> &'static str {
    ENVIRONMENTS[n as usize % 3]
}

/// Puts keys 0 to `count` into force, as the feed would.
fn fill(gate: &Gate, count: u32) {
    let mut resync = gate.resync(count as usize).unwrap();
    for n in 0..count {
        let line: KeyLine = key_in(n, environment(n));
        let text = serde_json::to_vec(&line).unwrap();
        resync
            .add(&tollgate::feed::parse::parse_key_file_line(&text, 1).unwrap())
            .unwrap();
    }
    resync.commit(1).unwrap();
}

fn pass(gate: &Gate, clock: &Clock, n: u32) -> bool {
    verdict_in(gate, clock, n, environment(n)).is_ok()
}

fn control(url: &str) -> Control {
    Control {
        url: url.to_owned(),
        authorization: Token::new(FEED_TOKEN).unwrap().authorization(),
        client: client(),
    }
}

fn settings(url: Option<&str>, directory: &Path) -> Settings {
    let mut settings = Settings::new("gate-1", url.map(control), directory);
    settings.flush_interval = Duration::from_millis(10);
    settings
}

/// A meter at work, until it is stopped or killed.
struct Running {
    meter: Arc<Meter>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn start(settings: Settings, gate: &Arc<Gate>, clock: &Clock) -> Self {
        let meter = Arc::new(Meter::new(settings, Arc::clone(gate), clock.clone()).unwrap());
        let running = Arc::clone(&meter);
        let task = tokio::spawn(async move { running.run(std::future::pending()).await });
        Running { meter, task }
    }

    async fn stop(self) {
        self.kill().await.stop().await;
    }

    /// As kill -9 would, but for a flush under way.
    async fn kill(self) -> Arc<Meter> {
        self.task.abort();
        let _ = self.task.await;
        self.meter
    }
}

fn sums(plane: &Plane) -> (BTreeMap<String, u64>, u64) {
    let state = plane.state();
    let mut by_environment = BTreeMap::new();
    for permit in state.ledger.iter().flat_map(|batch| &batch.permits) {
        *by_environment.entry(permit.environment.clone()).or_default() += permit.count;
    }
    let refusals = state
        .ledger
        .iter()
        .flat_map(|batch| &batch.refusals)
        .map(|refusal| refusal.count)
        .sum();
    (by_environment, refusals)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_of_200_000_permits_is_exact_whatever_happens_to_the_batches() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([]).await;
    let clock = Clock::manual(START_MS);
    let gate = gate(1_000_000);
    fill(&gate, 500);
    let mut running = Running::start(settings(Some(&plane.url), directory.path()), &gate, &clock);
    let faults = [
        UsageFault::LoseAnswer,
        UsageFault::LoseBatch,
        UsageFault::RepeatLate,
        UsageFault::Refuse(500),
        UsageFault::RepeatLate,
        UsageFault::Refuse(503),
        UsageFault::LoseAnswer,
        UsageFault::Refuse(401),
    ];
    let mut permits = BTreeMap::<String, u64>::new();
    let mut seen_faults = 0;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..200_u32 {
        for _ in 0..1_000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let n = (random >> 33) as u32 % 500;
            assert!(pass(&gate, &clock, n));
            *permits.entry(environment(n).to_owned()).or_default() += 1;
        }
        // A key that nobody knows is refused, and counted apart.
        assert_eq!(verdict_in(&gate, &clock, 777_777, "live"), Err(Reason::UnknownKey));
        clock.advance(Duration::from_secs(7));
        tokio::time::sleep(Duration::from_millis(15)).await;
        let faulty = plane.state().usage_faults.len();
        if faulty < 2 {
            plane.state().usage_faults.push_back(faults[seen_faults % faults.len()]);
            seen_faults += 1;
        }
        if round % 40 == 20 {
            plane.set_down(true);
        }
        if round % 40 == 30 {
            plane.set_down(false);
        }
        if round % 60 == 59 {
            // A stop in an orderly way, in the middle of all that.
            running.stop().await;
            running = Running::start(settings(Some(&plane.url), directory.path()), &gate, &clock);
        }
    }
    assert!(seen_faults >= faults.len(), "{seen_faults}");
    eventually("the whole ledger", || sums(&plane).0.values().sum::<u64>() >= 200_000).await;
    // Nothing more may come.
    eventually("an empty outbox", || running.meter.status().unsent_batches == 0).await;
    running.stop().await;
    let (by_environment, refusals) = sums(&plane);
    assert_eq!(by_environment, permits);
    assert_eq!(by_environment.values().sum::<u64>(), 200_000);
    assert_eq!(refusals, 200);
    let state = plane.state();
    println!(
        "{} batches received, {} applied, {seen_faults} faults",
        state.received,
        state.ledger.len()
    );
    assert!(state.received > state.ledger.len(), "some were repeated");
    let sequences: Vec<_> = state.ledger.iter().map(|batch| (&batch.run, batch.sequence)).collect();
    assert!(sequences.iter().all(|(_, sequence)| *sequence > 0));
    let minutes: Vec<i64> = state
        .ledger
        .iter()
        .flat_map(|batch| &batch.permits)
        .map(|permit| permit.minute)
        .collect();
    let first = START_MS / 60_000;
    assert!(
        minutes
            .iter()
            .all(|minute| (first - 1..=first + 200 * 7 / 60 + 1).contains(minute))
    );
    assert_eq!(fs::read_dir(directory.path().join("usage")).unwrap().count(), 0);
    // Raw secrets are in none of it.
    let all = serde_json::to_string(&state.ledger).unwrap();
    assert!(!all.contains(&secret(0, "live")));
    assert!(all.contains("\"last_used\":[{"));
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_loses_what_was_not_flushed_and_counts_nothing_twice() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([]).await;
    let clock = Clock::manual(START_MS);
    let (mut given, mut unflushed) = (0_u64, 0_u64);
    for life in 0..50_u32 {
        // Every process has a gate of its own.
        let gate = gate(1_000_000);
        fill(&gate, 10);
        let mut settings = settings(Some(&plane.url), directory.path());
        // Flushed by hand, so that it is known what was.
        settings.flush_interval = Duration::from_secs(3_600);
        let running = Running::start(settings, &gate, &clock);
        plane.state().usage_faults.push_back(UsageFault::LoseAnswer);
        for _ in 0..life % 7 {
            for n in 0..10 {
                assert!(pass(&gate, &clock, n));
            }
            given += 10;
            running.meter.flush().await;
            tokio::time::sleep(Duration::from_millis(u64::from(life % 5))).await;
        }
        for n in 0..life % 10 {
            assert!(pass(&gate, &clock, n));
            given += 1;
            unflushed += 1;
        }
        drop(running.kill().await);
    }
    plane.state().usage_faults.clear();
    let gate = gate(1);
    let running = Running::start(settings(Some(&plane.url), directory.path()), &gate, &clock);
    eventually("an empty outbox", || running.meter.status().unsent_batches == 0).await;
    let counted: u64 = sums(&plane).0.values().sum();
    // The first flush of a life may come after its first permits, so it may have caught some of the last ones.
    assert!(counted <= given, "{counted} of {given}: never twice");
    assert!(
        counted >= given - unflushed,
        "{counted} of {given}, {unflushed} not flushed"
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_outage_is_merged_and_keeps_its_sums() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([]).await;
    plane.set_down(true);
    let clock = Clock::manual(START_MS);
    let gate = gate(u32::MAX >> 1);
    fill(&gate, 30);
    let mut settings = settings(Some(&plane.url), directory.path());
    settings.flush_interval = Duration::from_secs(3_600);
    // Enough for the present hour only.
    settings.outbox_bytes = 100_000;
    let running = Running::start(settings, &gate, &clock);
    for _ in 0..300 {
        for n in 0..30 {
            assert!(pass(&gate, &clock, n));
        }
        clock.advance(Duration::from_secs(60));
        running.meter.flush().await;
    }
    let files = fs::read_dir(directory.path().join("usage")).unwrap().count();
    let bytes = running.meter.status().unsent_bytes;
    assert!(files <= 70, "{files} files");
    assert!(bytes < 500_000, "{bytes} bytes: by the minute they would take 1 MB");
    plane.set_down(false);
    eventually("an empty outbox", || running.meter.status().unsent_batches == 0).await;
    assert_eq!(sums(&plane).0.values().sum::<u64>(), 9_000);
    let status = running.meter.status();
    assert_eq!((status.permits, status.post_error), (9_000, None));
    running.stop().await;
}

/// What 1,200 keys make in a flush does not fit into one batch.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_gate_sends_what_ten_flushes_brought_at_once() {
    const KEYS: u32 = 1_200;
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([]).await;
    let clock = Clock::manual(START_MS);
    let gate = gate(1_000_000);
    fill(&gate, KEYS);
    let mut settings = settings(Some(&plane.url), directory.path());
    settings.flush_interval = Duration::from_secs(3_600);
    let counted = || sums(&plane).0.values().sum::<u64>();
    let files = || fs::read_dir(directory.path().join("usage")).unwrap().count();
    let flush = async |meter: &Meter, times| {
        for _ in 0..times {
            assert!((0..KEYS).all(|n| pass(&gate, &clock, n)));
            meter.flush().await;
        }
    };
    let meter = Meter::new(settings.clone(), Arc::clone(&gate), clock.clone()).unwrap();
    flush(&meter, 9).await;
    assert_eq!(files(), 9);
    flush(&meter, 1).await;
    assert_eq!(files(), 1);
    within("the stop", meter.stop()).await;
    assert_eq!((files(), counted()), (0, u64::from(10 * KEYS)));
    {
        let state = plane.state();
        let entries = |batch: &UsageBatch| batch.permits.len() + batch.last_used.len();
        assert_eq!(state.ledger.iter().map(entries).collect::<Vec<_>>(), [2_000, 400]);
        assert!(
            state
                .ledger
                .iter()
                .flat_map(|batch| &batch.permits)
                .all(|permit| permit.count == 10)
        );
    }
    // A process that ends does not wait for the tenth; one that is killed leaves it to the next.
    flush(&meter, 3).await;
    within("the stop", meter.stop()).await;
    assert_eq!((files(), counted()), (0, u64::from(13 * KEYS)));
    flush(&meter, 2).await;
    drop(meter);
    assert_eq!((files(), counted()), (2, u64::from(13 * KEYS)));
    let running = Running::start(settings, &gate, &clock);
    eventually("an empty outbox", || running.meter.status().unsent_batches == 0).await;
    assert_eq!(counted(), u64::from(15 * KEYS));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_between_merging_and_removing_counts_once() {
    let directory = tempfile::tempdir().unwrap();
    let usage = directory.path().join("usage");
    let plane = Plane::start([]).await;
    plane.set_down(true);
    let clock = Clock::manual(START_MS);
    let gate = gate(1_000_000);
    fill(&gate, 3);
    let mut settings = settings(None, directory.path());
    settings.control = Some(control(&plane.url));
    // Never run, so that nothing is sent.
    let meter = Meter::new(settings.clone(), Arc::clone(&gate), clock.clone()).unwrap();
    let copy = directory.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for round in 0..64 {
        assert!(pass(&gate, &clock, round % 3));
        if round == 63 {
            for entry in fs::read_dir(&usage).unwrap() {
                let path = entry.unwrap().path();
                fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
            }
        }
        meter.flush().await;
    }
    assert_eq!(fs::read_dir(&usage).unwrap().count(), 1, "merged");
    // The files that were merged are still there, as they are after a crash at that moment.
    for entry in fs::read_dir(&copy).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, usage.join(path.file_name().unwrap())).unwrap();
    }
    drop(meter);
    assert_eq!(fs::read_dir(&usage).unwrap().count(), 64);
    plane.set_down(false);
    drop(Meter::new(settings.clone(), Arc::clone(&gate), clock.clone()).unwrap());
    assert_eq!(fs::read_dir(&usage).unwrap().count(), 1, "what was merged is gone");
    let running = Running::start(settings, &gate, &clock);
    eventually("an empty outbox", || running.meter.status().unsent_batches == 0).await;
    assert_eq!(sums(&plane).0.values().sum::<u64>(), 64);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_refused_holds_up_no_other_and_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([]).await;
    let clock = Clock::manual(START_MS);
    let gate = gate(1_000_000);
    fill(&gate, 1);
    plane.state().usage_faults.push_back(UsageFault::Refuse(422));
    let running = Running::start(settings(Some(&plane.url), directory.path()), &gate, &clock);
    assert!(pass(&gate, &clock, 0));
    eventually("the refusal", || plane.state().received == 1).await;
    assert!(pass(&gate, &clock, 0));
    eventually("the next batch", || plane.state().ledger.len() == 1).await;
    // The answer to the second batch may still be on its way to the meter.
    eventually("the batch that waits", || running.meter.status().unsent_batches == 1).await;
    // Tried again a minute later, and after a restart.
    running.stop().await;
    let running = Running::start(settings(Some(&plane.url), directory.path()), &gate, &clock);
    eventually("the refused batch", || plane.state().ledger.len() == 2).await;
    assert_eq!(sums(&plane).0["live"], 2);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_loses_nothing_that_memory_holds() {
    let directory = tempfile::tempdir().unwrap();
    let state_dir = directory.path().join("state");
    let plane = Plane::start([]).await;
    let clock = Clock::manual(START_MS);
    let gate = gate(5);
    fill(&gate, 1);
    let running = Running::start(settings(Some(&plane.url), &state_dir), &gate, &clock);
    // Gone from under it: neither file can be made.
    fs::remove_dir_all(&state_dir).unwrap();
    for _ in 0..3 {
        assert!(pass(&gate, &clock, 0));
    }
    eventually("the error", || running.meter.status().disk_error.is_some()).await;
    assert!(pass(&gate, &clock, 0));
    fs::create_dir_all(state_dir.join("usage")).unwrap();
    eventually("the ledger", || sums(&plane).0.get("live") == Some(&4)).await;
    eventually("being well", || running.meter.status().disk_error.is_none()).await;
    running.stop().await;
    let restarted = crate::gate(5);
    fill(&restarted, 1);
    let meter = Meter::new(settings(None, &state_dir), Arc::clone(&restarted), clock.clone()).unwrap();
    assert_eq!(
        meter.load_journal(),
        JournalOutcome::Restored {
            windows: 1,
            permits: 4,
            damage: None
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_control_plane_nothing_piles_up() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START_MS);
    let gate = gate(2);
    fill(&gate, 1);
    let running = Running::start(settings(None, directory.path()), &gate, &clock);
    assert!(pass(&gate, &clock, 0) && pass(&gate, &clock, 0) && !pass(&gate, &clock, 0));
    eventually("the counts", || running.meter.status().permits == 2).await;
    eventually("the refusal", || {
        running.meter.status().refusals.get("RATE_LIMITED") == Some(&1)
    })
    .await;
    running.stop().await;
    assert!(!directory.path().join("usage").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_forgives_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START_MS);
    let mut passed = 0;
    for life in 0..10 {
        let gate = gate(100);
        // Every other time the journal comes before the keys.
        if life % 2 == 0 {
            fill(&gate, 2);
        }
        let meter = Meter::new(settings(None, directory.path()), Arc::clone(&gate), clock.clone()).unwrap();
        meter.load_journal();
        if life % 2 == 1 {
            fill(&gate, 2);
        }
        for _ in 0..15 {
            passed += u32::from(pass(&gate, &clock, 0));
            clock.advance(Duration::from_secs(1));
        }
        within("the stop", meter.stop()).await;
    }
    assert_eq!(passed, 100, "one limit over ten processes");
    // And no longer than it must: the first of them leave an hour after they came.
    clock.advance(Duration::from_secs(3_600 + 60 - 150));
    let gate = gate(100);
    fill(&gate, 2);
    let meter = Meter::new(settings(None, directory.path()), Arc::clone(&gate), clock.clone()).unwrap();
    meter.load_journal();
    assert!(pass(&gate, &clock, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_journal_is_believed_up_to_the_damage() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("windows.journal");
    let clock = Clock::manual(START_MS);
    let gate = gate(1_000);
    fill(&gate, 4);
    let meter = Meter::new(settings(None, directory.path()), Arc::clone(&gate), clock.clone()).unwrap();
    let mut lengths = vec![8];
    for n in 0..4 {
        for _ in 0..10 * (n + 1) {
            assert!(pass(&gate, &clock, n));
            clock.advance(Duration::from_secs(40));
        }
        meter.flush().await;
        lengths.push(fs::metadata(&path).unwrap().len() as usize);
    }
    let whole = fs::read(&path).unwrap();
    assert_eq!(*lengths.last().unwrap(), whole.len());
    let load = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let gate = crate::gate(1_000);
        fill(&gate, 4);
        Meter::new(settings(None, directory.path()), gate, clock.clone())
            .unwrap()
            .load_journal()
    };
    let intact = load(&whole);
    assert_eq!(
        intact,
        JournalOutcome::Restored {
            windows: 4,
            permits: 100,
            damage: None
        }
    );
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        let before = lengths.iter().filter(|end| **end <= at).count().saturating_sub(1);
        let permits = (1..=before as u64).map(|n| 10 * n).sum();
        let JournalOutcome::Restored {
            windows,
            permits: restored,
            damage,
        } = load(&damaged)
        else {
            panic!()
        };
        assert_eq!((windows, restored), (before as u64, permits), "byte {at}");
        let offset = if at < 8 { 0 } else { lengths[before] };
        assert!(
            damage
                .unwrap()
                .starts_with(&format!("from byte {offset} on it is ignored")),
            "byte {at}"
        );
    }
    for length in 0..whole.len() {
        let JournalOutcome::Restored { windows, damage, .. } = load(&whole[..length]) else {
            panic!()
        };
        let records = lengths.iter().filter(|end| **end <= length).count().saturating_sub(1);
        assert_eq!(windows, records as u64, "cut at {length}");
        assert_eq!(damage.is_some(), !lengths.contains(&length), "cut at {length}");
    }
    // What was loaded has been written anew, without the damage.
    let _ = load(&whole[..lengths[2] + 5]);
    let gate = crate::gate(1_000);
    fill(&gate, 4);
    let meter = Meter::new(settings(None, directory.path()), gate, clock.clone()).unwrap();
    assert_eq!(
        meter.load_journal(),
        JournalOutcome::Restored {
            windows: 2,
            permits: 30,
            damage: None
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_journal_outlives_being_replaced_and_forgets_what_no_longer_counts() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("windows.journal");
    let clock = Clock::manual(START_MS);
    let gate = gate(100);
    fill(&gate, 3);
    let old = Meter::new(settings(None, directory.path()), Arc::clone(&gate), clock.clone()).unwrap();
    assert_eq!(old.load_journal(), JournalOutcome::Missing);
    assert!(pass(&gate, &clock, 0));
    old.flush().await;
    // A new process takes over and writes the file anew; what the old one still counts is not lost.
    let taking_over = crate::gate(100);
    fill(&taking_over, 3);
    let new = Meter::new(settings(None, directory.path()), taking_over, clock.clone()).unwrap();
    assert_eq!(
        new.load_journal(),
        JournalOutcome::Restored {
            windows: 1,
            permits: 1,
            damage: None
        }
    );
    assert!(pass(&gate, &clock, 1));
    old.stop().await;
    let next = crate::gate(100);
    fill(&next, 3);
    let meter = Meter::new(settings(None, directory.path()), next, clock.clone()).unwrap();
    assert_eq!(
        meter.load_journal(),
        JournalOutcome::Restored {
            windows: 2,
            permits: 2,
            damage: None
        }
    );
    clock.advance(Duration::from_secs(3 * 3_600));
    let late = crate::gate(100);
    let meter = Meter::new(settings(None, directory.path()), late, clock.clone()).unwrap();
    assert_eq!(
        meter.load_journal(),
        JournalOutcome::Restored {
            windows: 0,
            permits: 0,
            damage: None
        }
    );
    assert_eq!(fs::metadata(&path).unwrap().len(), 8, "nothing but its head is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_do_not_wait_for_a_snapshot_that_is_being_built() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START_MS);
    let gate = gate(100);
    fill(&gate, 3);
    let meter = Meter::new(settings(None, directory.path()), Arc::clone(&gate), clock.clone()).unwrap();
    let mut resync = gate.resync(3).unwrap();
    for n in 0..3 {
        let text = serde_json::to_vec(&key_in(n, environment(n))).unwrap();
        let update = tollgate::feed::parse::parse_key_file_line(&text, 2).unwrap();
        resync.add(&update).unwrap();
        assert!(pass(&gate, &clock, n));
    }
    meter.flush().await;
    assert_eq!(meter.status().permits, 3);
    resync.commit(2).unwrap();
    assert!(pass(&gate, &clock, 0));
    meter.stop().await;
    assert_eq!(meter.status().permits, 4);
    let restarted = crate::gate(100);
    let meter = Meter::new(settings(None, directory.path()), restarted, clock).unwrap();
    let outcome = meter.load_journal();
    assert_eq!(
        outcome,
        JournalOutcome::Restored {
            windows: 3,
            permits: 4,
            damage: None
        }
    );
}
