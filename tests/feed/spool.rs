//! The copy on disk: what it survives, and that no damage ever lets a wrong key in.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tollgate::clock::Clock;
use tollgate::feed::{Feed, LoadOutcome, Source, Token};
use tollgate::gate::Reason;
use tollgate::wire::KeyLine;

use crate::plane::Plane;
use crate::{Running, START_MS, eventually, gate, key, keys, settings, verdict};

/// Nobody listens there.
const DOWN: &str = "http://127.0.0.1:9";

async fn spooled(running: &Running, directory: &Path) {
    let spool = directory.join("keys.spool");
    eventually("the spool", || spool.exists()).await;
    assert_eq!(running.feed.status().spool_error, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_starts_with_the_control_plane_down_and_catches_up_later() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([key(1), key(2)]).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    running.stop().await;
    let mode = fs::metadata(directory.path().join("keys.spool"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let newest = plane.change(key(3));
    plane.set_down(true);
    let restarted = Running::start(settings(&plane.url, directory.path()));
    assert_eq!(restarted.gate.revision(), Some(10));
    assert_eq!(verdict(&restarted.gate, &restarted.clock, 2), Ok(()));
    plane.set_down(false);
    restarted.revision(newest).await;
    assert_eq!(
        plane.state().connections.last().unwrap().0,
        Some(10),
        "only what is new was asked for"
    );
    assert_eq!(restarted.feed.status().snapshots, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_stays_revoked_after_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([key(1), key(2)]).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    spooled(&running, directory.path()).await;
    let newest = plane.change(KeyLine {
        revoked: true,
        ..key(1)
    });
    eventually("the acknowledgement", || {
        plane.state().acks.last().is_some_and(|ack| ack.revision == newest)
    })
    .await;
    running.kill().await;

    plane.set_down(true);
    let restarted = Running::start(settings(&plane.url, directory.path()));
    assert_eq!(
        restarted.gate.revision(),
        Some(newest),
        "what was acknowledged is on disk"
    );
    assert_eq!(verdict(&restarted.gate, &restarted.clock, 1), Err(Reason::RevokedKey));
    assert_eq!(verdict(&restarted.gate, &restarted.clock, 2), Ok(()));
}

/// Whatever is acknowledged must be on the disk already: also what came in a full snapshot, for which all of the spool is
/// written anew.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_acknowledged_that_a_restart_would_undo() {
    const KEYS: u32 = 1_000;
    let (directory, copies) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plane = Plane::start((0..KEYS).map(key)).await;
    let (spool, copy) = (directory.path().join("keys.spool"), copies.path().to_owned());
    /// Each acknowledged revision, and the one on the disk at that moment.
    type Found = Vec<(u64, Option<u64>)>;
    let found: Arc<Mutex<Found>> = Arc::default();
    let finding = Arc::clone(&found);
    plane.state().on_ack = Some(Box::new(move |ack| {
        let revision = fs::read(&spool).ok().and_then(|bytes| load(&copy, &bytes).1);
        finding.lock().unwrap().push((ack.revision, revision));
    }));
    let mut settings = settings(&plane.url, directory.path());
    // Looking at the disk holds the plane up, which is no silence.
    settings.heartbeat = Duration::from_secs(10);
    let running = Running::start(settings);
    let acknowledged = async |revision| {
        eventually(&format!("the acknowledgement of {revision}"), || {
            plane.state().acks.last().is_some_and(|ack| ack.revision == revision)
        })
        .await;
    };
    acknowledged(10).await;
    let changed = plane.change(key(5_000));
    acknowledged(changed).await;
    for newest in [50, 90] {
        // All of it anew, and at once a change on top.
        plane.restore(newest, (0..KEYS).map(key));
        plane.kick();
        running.revision(newest).await;
        let changed = plane.change(KeyLine {
            revoked: true,
            ..key(1)
        });
        acknowledged(changed).await;
    }
    running.stop().await;
    let found = found.lock().unwrap();
    assert!(found.len() >= 4, "{found:?}");
    for (acknowledged, on_disk) in found.iter() {
        assert!(on_disk >= &Some(*acknowledged), "{found:?}");
    }
}

/// A spool with its keys at revision 10 and three changes after it, and what is in force at each revision.
async fn small_spool(directory: &Path) -> (Vec<u8>, BTreeMap<u64, BTreeSet<(String, bool)>>) {
    let plane = Plane::start([key(1), key(2)]).await;
    let running = Running::start(settings(&plane.url, directory));
    running.revision(10).await;
    spooled(&running, directory).await;
    let mut states = BTreeMap::from([(10, keys(&running.gate))]);
    for change in 0..3 {
        let revision = match change {
            0 => plane.change(KeyLine {
                revoked: true,
                ..key(1)
            }),
            1 => plane.forget("key_2"),
            _ => plane.change(key(3)),
        };
        running.revision(revision).await;
        states.insert(revision, keys(&running.gate));
    }
    eventually("the acknowledgement", || {
        plane.state().acks.last().is_some_and(|ack| ack.revision == 13)
    })
    .await;
    running.kill().await;
    (fs::read(directory.join("keys.spool")).unwrap(), states)
}

fn load(directory: &Path, spool: &[u8]) -> (LoadOutcome, Option<u64>, BTreeSet<(String, bool)>) {
    fs::write(directory.join("keys.spool"), spool).unwrap();
    let gate = gate(100);
    let outcome = Feed::new(settings(DOWN, directory), gate.clone(), Clock::manual(START_MS)).load();
    (outcome, gate.revision(), keys(&gate))
}

#[tokio::test(flavor = "multi_thread")]
async fn no_flipped_byte_and_no_cut_lets_a_wrong_key_in() {
    let directory = tempfile::tempdir().unwrap();
    let (spool, states) = small_spool(directory.path()).await;
    let (outcome, revision, _) = load(directory.path(), &spool);
    assert!(
        matches!(
            outcome,
            LoadOutcome::Loaded {
                revision: 13,
                keys: 2,
                damage: None,
                ..
            }
        ),
        "{outcome:?}"
    );
    assert_eq!(revision, Some(13));

    let mut seen: BTreeMap<Option<u64>, u32> = BTreeMap::new();
    let mut check = |damaged: &[u8], what: &str| {
        let (outcome, revision, keys) = load(directory.path(), damaged);
        *seen.entry(revision).or_default() += 1;
        match revision {
            None => {
                assert!(matches!(outcome, LoadOutcome::Refused { .. }), "{what}: {outcome:?}");
                assert!(keys.is_empty(), "{what}");
            }
            Some(revision) => {
                assert_eq!(Some(&keys), states.get(&revision), "{what}: {outcome:?}");
                assert!(matches!(outcome, LoadOutcome::Loaded { .. }));
            }
        }
        outcome
    };
    for at in 0..spool.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = spool.clone();
            damaged[at] ^= flip;
            let outcome = check(&damaged, &format!("byte {at} flipped by {flip:#x}"));
            assert!(
                !matches!(outcome, LoadOutcome::Loaded { damage: None, .. }),
                "byte {at}: the damage is said"
            );
        }
    }
    for length in 0..spool.len() {
        check(&spool[..length], &format!("cut at {length}"));
    }
    // All of the states were seen, and the newest only by the undamaged file.
    assert_eq!(
        seen.keys().copied().collect::<Vec<_>>(),
        [None, Some(10), Some(11), Some(12)]
    );
    println!("{} damaged spools: {seen:?}", seen.values().sum::<u32>());
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_cannot_be_left_out_moved_or_brought_from_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let (spool, states) = small_spool(directory.path()).await;
    // Find the changes from the end of the keys on: each is a length, a record and 16 bytes.
    let keys_bytes = u64::from_le_bytes(spool[24..32].try_into().unwrap()) as usize;
    let mut at = 40 + keys_bytes + 40;
    let head = spool[..at].to_vec();
    let mut changes = Vec::new();
    while at < spool.len() {
        let length = u32::from_le_bytes(spool[at..at + 4].try_into().unwrap()) as usize + 20;
        changes.push(&spool[at..at + length]);
        at += length;
    }
    let changes: Vec<&[u8]> = changes.into_iter().filter(|change| change[4] != 3).collect();
    assert_eq!(changes.len(), 3, "three changes; signs of life apart");
    for (arrangement, revision) in [
        (vec![changes[1], changes[2]], 10),
        (vec![changes[0], changes[2]], 11),
        (vec![changes[1], changes[0]], 10),
        (vec![changes[0], changes[0]], 11),
    ] {
        let forged = [&head[..], &arrangement.concat()].concat();
        let (outcome, loaded, keys) = load(directory.path(), &forged);
        assert_eq!(loaded, Some(revision), "{outcome:?}");
        assert_eq!(Some(&keys), states.get(&revision));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_line_says_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let (spool, _) = small_spool(directory.path()).await;
    let reason = |outcome| match outcome {
        LoadOutcome::Refused { reason } => reason.rsplit("is not used: ").next().unwrap().to_owned(),
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(load(directory.path(), &spool[..20]).0), "it is cut off");
    assert_eq!(
        reason(load(directory.path(), b"something else that lies here by accident").0),
        "it is damaged, or written by another version"
    );
    let mut damaged = spool.clone();
    damaged[60] ^= 1;
    assert_eq!(reason(load(directory.path(), &damaged).0), "it is damaged");

    fs::write(directory.path().join("keys.spool"), &spool).unwrap();
    let mut other = settings(DOWN, directory.path());
    if let Source::Http { token, .. } = &mut other.source {
        *token = Token::new("another-token").unwrap();
    }
    let outcome = Feed::new(other, gate(100), Clock::manual(START_MS)).load();
    assert_eq!(reason(outcome), "it was not written with this feed token");
    fs::remove_file(directory.path().join("keys.spool")).unwrap();
    assert_eq!(
        Feed::new(settings(DOWN, directory.path()), gate(100), Clock::manual(START_MS)).load(),
        LoadOutcome::Missing
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn after_damage_and_after_a_failed_disk_it_is_written_anew() {
    let directory = tempfile::tempdir().unwrap();
    let (spool, _) = small_spool(directory.path()).await;
    let state_dir = directory.path().join("state");
    fs::create_dir(&state_dir).unwrap();
    fs::write(state_dir.join("keys.spool"), &spool[..spool.len() - 3]).unwrap();
    let running = Running::start(settings(DOWN, &state_dir));
    assert_eq!(running.gate.revision(), Some(12));
    eventually("the rewrite", || {
        let gate = gate(100);
        Feed::new(settings(DOWN, &state_dir), gate, Clock::manual(START_MS)).load()
            == (LoadOutcome::Loaded {
                revision: 12,
                keys: 1,
                saved_at_ms: START_MS,
                damage: None,
            })
    })
    .await;
    running.stop().await;

    // A state directory that is a file cannot be written to; the gate serves all the same.
    let blocked = directory.path().join("blocked");
    fs::write(&blocked, "").unwrap();
    let plane = Plane::start([key(1)]).await;
    let running = Running::start(settings(&plane.url, &blocked));
    running.revision(10).await;
    eventually("the error", || running.feed.status().spool_error.is_some()).await;
    let newest = plane.change(key(2));
    running.revision(newest).await;
    fs::remove_file(&blocked).unwrap();
    running.clock.advance(Duration::from_secs(10));
    eventually("the spool", || {
        blocked.join("keys.spool").exists() && running.feed.status().spool_error.is_none()
    })
    .await;
}
