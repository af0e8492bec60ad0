//! What gates follow, and what is known of them.

use futures_util::future::join_all;
use tollgate::control::model::ApiKey;
use tollgate::control::store::{Changes, GateReport};
use tollgate::wire::FeedLine;

use crate::parts::*;

/// The one that matters: a gate that reads while others write must hear of everything, whoever wrote it.
pub async fn revisions_become_visible_in_order(place: Place) {
    let writers = [place.store.clone(), place.again().await, place.again().await];
    register(&*place.store, "acme").await;
    for index in 0..6 {
        create(&*place.store, "org_acme", &format!("k{index:03}"))
            .await
            .unwrap();
    }
    let each = 20;
    let total = 6 + 6 * each;
    let write = join_all((0..6).map(|index| {
        let store = writers[index % writers.len()].clone();
        async move {
            for round in 0..each {
                rename(&*store, &format!("key_k{index:03}"), &format!("n{round}"))
                    .await
                    .unwrap();
            }
        }
    }));
    let store = place.again().await;
    let read = async {
        let (mut at, mut newest) = (0, std::collections::BTreeMap::new());
        while at < total as u64 {
            let (lines, through) = changes(&*store, at).await;
            assert!(through >= at);
            let revisions: Vec<u64> = lines.iter().map(revision).collect();
            assert!(revisions.is_sorted() && revisions.iter().all(|r| (at + 1..=through).contains(r)));
            for line in lines {
                let FeedLine::Key(line) = line else { panic!() };
                newest.insert(line.id, line.revision);
            }
            at = through;
            tokio::task::yield_now().await;
        }
        newest
    };
    let (_, newest) = tokio::time::timeout(std::time::Duration::from_secs(60), async { tokio::join!(write, read) })
        .await
        .expect("the reader waits for a revision that is there");
    for (id, heard) in newest {
        // Had it missed a change, it would have an older line than the one that is kept.
        assert_eq!(store.key(None, &id).await.unwrap().unwrap().revision, heard, "{id}");
    }
    assert_eq!(store.revision().await, Ok(total as u64));
}

pub async fn a_snapshot_is_of_one_moment(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    for index in 0..3 {
        create(store, "org_acme", &format!("k{index:03}")).await.unwrap();
    }
    let mut snapshot = store.feed_snapshot().await.unwrap();
    rename(store, "key_k000", "later").await.unwrap();
    create(store, "org_acme", "k003").await.unwrap();
    assert_eq!((snapshot.revision(), snapshot.keys()), (3, 3));
    let text = snapshot.next().await.unwrap().unwrap();
    let lines: Vec<FeedLine> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(revision).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(text.ends_with('\n'));
    assert_eq!(snapshot.next().await.unwrap(), None);
    drop(snapshot);
    assert_eq!(store.feed_snapshot().await.unwrap().revision(), 5);
    // In pieces.
    assert!(matches!(store.feed_changes(6, 10).await.unwrap(), Changes::Resync));
    let Changes::Lines { text, through } = store.feed_changes(0, 2).await.unwrap() else {
        panic!()
    };
    assert_eq!(
        (text.lines().count(), through),
        (2, 3),
        "k001 and k002: k000 has moved on"
    );
    let Changes::Lines { text, through } = store.feed_changes(5, 2).await.unwrap() else {
        panic!()
    };
    assert_eq!((text.as_str(), through), ("", 5));
}

pub async fn what_was_revoked_long_ago_is_forgotten(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    let month = 30 * 24 * 3_600_000;
    for name in ["k001", "k002"] {
        create(store, "org_acme", name).await.unwrap();
    }
    let caller = caller();
    let revoke = |key: &mut ApiKey| {
        key.revoked_at_ms = Some(1_000);
        Ok(note("org_acme", "key.revoke", &key.id))
    };
    store
        .edit_key(None, "key_k001", &revoke, None, at(&caller, 1_000))
        .await
        .unwrap();
    assert_eq!(store.prune(1_000 + month - 1).await, Ok(3));
    assert_eq!(store.prune(1_000 + month).await, Ok(4));
    let (lines, _) = changes(store, 3).await;
    assert!(
        matches!(&lines[..], [FeedLine::Gone { revision: 4, id }] if id == "key_k001"),
        "{lines:?}"
    );
    assert_eq!(store.feed_snapshot().await.unwrap().keys(), 1);
    assert_eq!(store.prune(1_000 + month).await, Ok(4), "once");
    // Another month later nobody remembers that it went: who was not there needs everything.
    assert_eq!(store.prune(1_000 + 2 * month).await, Ok(4));
    assert!(matches!(store.feed_changes(3, 10).await.unwrap(), Changes::Resync));
    assert!(matches!(
        store.feed_changes(4, 10).await.unwrap(),
        Changes::Lines { .. }
    ));
}

pub async fn a_resync_goes_beyond_every_claim(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    create(store, "org_acme", "k001").await.unwrap();
    let caller = caller();
    assert_eq!(store.resync(90, at(&caller, 1)).await, Ok(91));
    assert_eq!(store.resync(0, at(&caller, 1)).await, Ok(92));
    assert!(matches!(store.feed_changes(91, 10).await.unwrap(), Changes::Resync));
    assert_eq!(changes(store, 92).await.1, 92);
    assert_eq!(rename(store, "key_k001", "next").await, Ok(93));
}

pub async fn gates_are_remembered_as_they_speak(place: Place) {
    let store = &*place.store;
    let report = |said, begins, heard| GateReport {
        name: "gate-1".into(),
        version: None,
        said,
        begins,
        claimed: 0,
        last_heard_at_ms: heard,
        connected: true,
    };
    let known = async || {
        let gates = store.gates().await.unwrap();
        (gates[0].revision, gates[0].last_heard_at_ms)
    };
    let first = GateReport {
        version: Some("1.0".into()),
        claimed: 90,
        ..report(Some(7), true, 100)
    };
    store.save_gates(&[first]).await.unwrap();
    assert_eq!(store.gates().await.unwrap()[0].claimed, 90);
    store.save_gates(&[report(Some(9), false, 200)]).await.unwrap();
    assert_eq!(known().await, (9, 200));
    store.save_gates(&[report(Some(8), false, 150)]).await.unwrap();
    assert_eq!(known().await, (9, 200), "an acknowledgement that was overtaken");
    store.save_gates(&[report(None, false, 300)]).await.unwrap();
    assert_eq!(known().await, (9, 300), "only heard");
    store.save_gates(&[report(Some(2), true, 400)]).await.unwrap();
    assert_eq!(known().await, (2, 400), "it has lost its spool");
    let gate = &store.gates().await.unwrap()[0];
    assert_eq!(
        (gate.version.as_deref(), gate.claimed, gate.connected),
        (Some("1.0"), 0, false)
    );
    let caller = caller();
    assert_eq!(store.forget_gate("gate-1", at(&caller, 1)).await, Ok(true));
    assert_eq!(store.forget_gate("gate-1", at(&caller, 1)).await, Ok(false));
    assert_eq!(store.gates().await.unwrap(), []);
}
