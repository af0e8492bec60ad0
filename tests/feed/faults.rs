//! The stream, right and wrong: whole or not at all, never older, always recovered from.

use std::time::{Duration, Instant};

use tollgate::gate::Reason;
use tollgate::wire::{FeedLine, KeyLine};

use crate::plane::{Fault, Plane, line, snapshot};
use crate::{Running, eventually, key, keys, settings, verdict};

#[tokio::test(flavor = "multi_thread")]
async fn follows_snapshot_and_changes_and_acknowledges_them() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([key(1), key(2)]).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    assert_eq!(verdict(&running.gate, &running.clock, 1), Ok(()));
    assert_eq!(verdict(&running.gate, &running.clock, 3), Err(Reason::UnknownKey));

    plane.change(key(3));
    plane.change(KeyLine {
        revoked: true,
        ..key(1)
    });
    let newest = plane.forget("key_2");
    running.revision(newest).await;
    assert_eq!(verdict(&running.gate, &running.clock, 1), Err(Reason::RevokedKey));
    assert_eq!(verdict(&running.gate, &running.clock, 2), Err(Reason::UnknownKey));
    assert_eq!(verdict(&running.gate, &running.clock, 3), Ok(()));

    eventually("the acknowledgement", || {
        plane.state().acks.last().is_some_and(|ack| ack.revision == newest)
    })
    .await;
    {
        let state = plane.state();
        assert!(
            state
                .acks
                .iter()
                .all(|ack| ack.gate == "gate-1" && ack.version.is_some())
        );
        assert!(state.acks.is_sorted_by_key(|ack| ack.revision));
        assert_eq!(state.connections, [(None, "gate-1".to_owned())]);
    }
    let status = running.feed.status();
    assert!(
        status.connected && status.last_error.is_none() && !status.stale,
        "{status:?}"
    );
    assert_eq!(
        (status.revision, status.snapshots, status.changes),
        (Some(newest), 1, 3)
    );
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_in_force_and_acknowledged_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start((0..1_000).map(key)).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    let mut effects = Vec::new();
    for n in 0..500 {
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
        assert_eq!(verdict(&running.gate, &running.clock, n), Err(Reason::RevokedKey));
    }
    effects.sort_unstable();
    println!("change to effect: median {:?}, p99 {:?}", effects[250], effects[495]);
    assert!(effects[495] < Duration::from_millis(100), "{:?}", effects[495]);
    eventually("the last acknowledgement", || {
        plane.state().acks.last().is_some_and(|ack| ack.revision == 510)
    })
    .await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn goes_on_where_it_was_after_an_outage() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([key(1)]).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    plane.set_down(true);
    eventually("the loss", || !running.feed.status().connected).await;
    assert_eq!(verdict(&running.gate, &running.clock, 1), Ok(()), "served on");
    assert!(running.feed.status().last_error.is_some());
    let newest = plane.change(key(2));
    plane.set_down(false);
    running.revision(newest).await;
    eventually("the connection", || running.feed.status().connected).await;
    assert_eq!(running.feed.status().last_error, None);
    let state = plane.state();
    assert_eq!(
        state.connections.last().unwrap().0,
        Some(10),
        "only what was missed is asked for"
    );
    assert_eq!(running.feed.status().snapshots, 1);
}

/// Everything that a stream can do wrong, with key 66 in it where it has any.
fn faults() -> Vec<(&'static str, Fault)> {
    let evil = [key(66)];
    let whole = snapshot(99, &evil);
    let text = String::from_utf8(whole.clone()).unwrap();
    let mut wrong_sum = whole.clone();
    let digit = wrong_sum.len() - 4;
    wrong_sum[digit] = if wrong_sum[digit] == b'0' { b'1' } else { b'0' };
    let end = String::from_utf8(line(&FeedLine::End { xxh3: "0".repeat(16) })).unwrap();
    let too_many = text.replace("\"keys\":1", "\"keys\":0");
    let too_few = text.replace("\"keys\":1", "\"keys\":2");
    let absurd = text.replace("\"keys\":1", "\"keys\":18446744073709551615");
    let bad_line = text.replace("\"environment\":\"live\"", "\"environment\":17");
    let key_line = text.lines().nth(1).unwrap().to_owned() + "\n";
    let interrupted = text.replacen(
        &key_line,
        &format!("{{\"type\":\"heartbeat\",\"revision\":99}}\n{key_line}"),
        1,
    );
    vec![
        ("late", Fault::Late(Duration::from_millis(100))),
        ("never", Fault::NoAnswer),
        ("silence", Fault::SayAndHang(vec![])),
        (
            "silence in a snapshot",
            Fault::SayAndHang(whole[..whole.len() / 2].to_vec()),
        ),
        ("cut in a line", Fault::SayAndCut(whole[..whole.len() / 2].to_vec())),
        (
            "cut between lines",
            Fault::SayAndCut(text.lines().next().unwrap().as_bytes().to_vec()),
        ),
        (
            "ended before its end",
            Fault::Say(whole[..whole.len() - end.len()].to_vec()),
        ),
        ("garbage", Fault::Say((0..=255).cycle().take(10_000).collect())),
        (
            "a page",
            Fault::Say(b"<html><body>Welcome to the hotel</body></html>\n".to_vec()),
        ),
        ("endless line", Fault::Repeat(vec![b'x'; 10_000])),
        ("endless line of spaces", Fault::Repeat(vec![b' '; 10_000])),
        ("no keys", Fault::SayAndHang(snapshot(99, &[]))),
        ("older", Fault::SayAndHang(snapshot(3, &evil))),
        ("older and empty", Fault::SayAndHang(snapshot(0, &[]))),
        ("wrong checksum", Fault::SayAndHang(wrong_sum)),
        ("more keys than announced", Fault::SayAndHang(too_many.into_bytes())),
        ("fewer keys than announced", Fault::SayAndHang(too_few.into_bytes())),
        ("absurd number of keys", Fault::SayAndHang(absurd.into_bytes())),
        ("a bad line", Fault::SayAndHang(bad_line.into_bytes())),
        ("interrupted", Fault::SayAndHang(interrupted.into_bytes())),
        ("an end without a beginning", Fault::SayAndHang(end.into_bytes())),
        ("slow drip", Fault::Drip(whole.clone(), Duration::from_millis(20))),
        ("server error", Fault::Status(500)),
        ("redirect", Fault::Status(302)),
        ("not found", Fault::Status(404)),
        ("refused", Fault::Status(403)),
        ("not HTTP", Fault::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec())),
        (
            "bad chunks",
            Fault::Raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec()),
        ),
        (
            "unasked compression",
            Fault::Raw(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc".to_vec()),
        ),
    ]
}

/// One valid key keeps working throughout, and no key of the wrong stream ever does.
#[tokio::test(flavor = "multi_thread")]
async fn every_fault_is_survived() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([key(1)]).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    let mut added = 100;
    for (name, fault) in faults() {
        let seen = plane.state().connections.len();
        plane.state().faults.push_back(fault);
        plane.kick();
        // The fault, and then a good connection again.
        let begun = Instant::now();
        loop {
            assert_eq!(verdict(&running.gate, &running.clock, 1), Ok(()), "{name}");
            assert_eq!(
                verdict(&running.gate, &running.clock, 66),
                Err(Reason::UnknownKey),
                "{name}"
            );
            if plane.state().connections.len() >= seen + 2 && running.feed.status().connected {
                break;
            }
            // What is only late is followed on that same connection.
            if name == "late" && begun.elapsed() > Duration::from_millis(300) && running.feed.status().connected {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "no recovery from: {name}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        added += 1;
        let revision = plane.change(key(added));
        running.revision(revision).await;
        assert_eq!(verdict(&running.gate, &running.clock, added), Ok(()), "after {name}");
    }
    let status = running.feed.status();
    assert_eq!(
        status.snapshots, 1,
        "no wrong snapshot was taken, and a right one was not needed again: {status:?}"
    );
    assert!(status.refused >= 15, "{status:?}");
    running.stop().await;
}

/// A gate that has nothing yet: not ready until the first whole snapshot, never with half of one, and no worse for it.
#[tokio::test(flavor = "multi_thread")]
async fn every_fault_before_the_first_snapshot_is_survived() {
    for (name, fault) in faults() {
        // To a gate without keys an older or an empty snapshot is as good as any.
        if ["late", "no keys", "older", "older and empty"].contains(&name) {
            continue;
        }
        let directory = tempfile::tempdir().unwrap();
        let plane = Plane::start([key(1)]).await;
        plane.state().faults.push_back(fault);
        let running = Running::start(settings(&plane.url, directory.path()));
        let begun = Instant::now();
        loop {
            // Asked before the revision, so that what it says is of no later state.
            let (evil, good) = (
                verdict(&running.gate, &running.clock, 66),
                verdict(&running.gate, &running.clock, 1),
            );
            assert!(evil.is_err(), "{name}: a key of a snapshot that was never whole");
            if good.is_ok() {
                break;
            }
            assert!(
                matches!(good, Err(Reason::NotReady)),
                "{name}: {good:?}, before any snapshot was whole"
            );
            assert!(begun.elapsed() < Duration::from_secs(20), "no recovery from: {name}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(running.gate.revision(), Some(10), "{name}");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_snapshot_may_be_empty_and_the_last_key_may_go() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([]).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    assert!(running.gate.is_ready());
    let revision = plane.change(key(1));
    running.revision(revision).await;
    let revision = plane.forget("key_1");
    running.revision(revision).await;
    assert_eq!(verdict(&running.gate, &running.clock, 1), Err(Reason::UnknownKey));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_restored_from_a_backup_is_noticed_and_caught_up_with() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([key(1), key(2)]).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    let newest = plane.change(KeyLine {
        revoked: true,
        ..key(1)
    });
    running.revision(newest).await;

    plane.restore(7, [key(1), key(3)]);
    plane.kick();
    eventually("being noticed", || running.feed.status().source_is_behind).await;
    assert!(running.feed.status().last_error.unwrap().contains("older than 11"));
    assert_eq!(
        verdict(&running.gate, &running.clock, 1),
        Err(Reason::RevokedKey),
        "the newer state is kept"
    );
    assert_eq!(verdict(&running.gate, &running.clock, 2), Ok(()));

    // Its changes up to there were never seen, so it must be taken over whole.
    for _ in 0..5 {
        plane.change(key(4));
    }
    running.revision(12).await;
    assert_eq!(
        keys(&running.gate),
        [
            ("key_1".into(), false),
            ("key_3".into(), false),
            ("key_4".into(), false)
        ]
        .into()
    );
    eventually("being well", || !running.feed.status().source_is_behind).await;
    assert_eq!(running.feed.status().snapshots, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_cannot_be_used_holds_up_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let strange = KeyLine {
        organization: "\u{fc}nprintable".into(),
        ..key(2)
    };
    let plane = Plane::start([key(1), strange.clone()]).await;
    let running = Running::start(settings(&plane.url, directory.path()));
    running.revision(10).await;
    assert_eq!(verdict(&running.gate, &running.clock, 1), Ok(()));
    assert_eq!(verdict(&running.gate, &running.clock, 2), Err(Reason::UnknownKey));
    plane.change(KeyLine {
        organization: "\u{fc}".into(),
        ..key(1)
    });
    let newest = plane.change(key(3));
    running.revision(newest).await;
    assert_eq!(
        verdict(&running.gate, &running.clock, 1),
        Err(Reason::UnknownKey),
        "its old form does not live on"
    );
    assert_eq!(verdict(&running.gate, &running.clock, 3), Ok(()));
    assert_eq!(running.feed.status().unusable_keys, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_stream_is_followed_too() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start((0..5_000).map(key)).await;
    plane.state().zstd = true;
    let mut settings = settings(&plane.url, directory.path());
    if let tollgate::feed::Source::Http { zstd, .. } = &mut settings.source {
        *zstd = true;
    }
    let running = Running::start(settings);
    running.revision(10).await;
    eventually("all keys", || running.gate.key_count() == 5_000).await;
    let newest = plane.change(KeyLine {
        revoked: true,
        ..key(7)
    });
    running.revision(newest).await;
    assert_eq!(verdict(&running.gate, &running.clock, 7), Err(Reason::RevokedKey));
    assert_eq!(verdict(&running.gate, &running.clock, 8), Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_for_longer_than_max_staleness_closes_the_gate_until_the_source_is_heard() {
    let directory = tempfile::tempdir().unwrap();
    let plane = Plane::start([key(1)]).await;
    let mut settings = settings(&plane.url, directory.path());
    settings.max_staleness = Some(Duration::from_secs(60));
    let running = Running::start(settings.clone());
    running.revision(10).await;
    plane.set_down(true);
    eventually("the loss", || !running.feed.status().connected).await;
    running.clock.advance(Duration::from_secs(60));
    assert!(!running.feed.is_stale(running.clock.now()));
    assert_eq!(verdict(&running.gate, &running.clock, 1), Ok(()));
    running.clock.advance(Duration::from_millis(1));
    eventually("staleness", || running.feed.status().stale).await;
    assert_eq!(verdict(&running.gate, &running.clock, 1), Err(Reason::NotReady));
    plane.set_down(false);
    eventually("being heard", || !running.feed.status().stale).await;
    assert_eq!(verdict(&running.gate, &running.clock, 1), Ok(()));

    // The spool knows when its source was heard last, too.
    plane.set_down(true);
    running.stop().await;
    let clock = tollgate::clock::Clock::manual(crate::START_MS + 3 * 60_000);
    let restarted = Running::start_with(settings, crate::gate(100), clock);
    eventually("staleness", || restarted.feed.status().stale).await;
    assert_eq!(restarted.gate.revision(), Some(10));
    assert_eq!(verdict(&restarted.gate, &restarted.clock, 1), Err(Reason::NotReady));
}
