//! The contract: what each test asserts must hold on every engine.

use futures_util::future::{BoxFuture, join_all};
use serde_json::json;
use tollgate::control::model::{ApiKey, Fault, Invitation, KeyStatus};
use tollgate::control::store::{
    AuditQuery, Changes, Claim, EndSessions, GateReport, KeyQuery, KeySort, MOST_SESSIONS, OrganizationQuery,
    SortValue, Store, UsageQuery, Written,
};
use tollgate::wire::{FeedLine, LastUsed, PermitCount, RefusalCount, UsageBatch};

use crate::parts::*;

pub type Test = fn(Place) -> BoxFuture<'static, ()>;

macro_rules! contract {
    ($($test:ident),* $(,)?) => {
        pub const CONTRACT: &[(&str, Test)] = &[$((stringify!($test), |place| Box::pin($test(place)))),*];
    };
}

contract! {
    an_account_is_whole_or_not_there,
    an_invitation_is_used_once,
    organizations_are_changed_and_paged,
    a_new_plan_is_told_for_every_key,
    a_key_is_kept_as_it_was_given,
    a_change_that_fails_leaves_nothing,
    limits_hold_for_those_who_come_at_once,
    an_outcome_is_recorded_once_and_replayed,
    keys_are_filtered_sorted_and_paged,
    revisions_become_visible_in_order,
    a_snapshot_is_of_one_moment,
    what_was_revoked_long_ago_is_forgotten,
    a_resync_goes_beyond_every_claim,
    gates_are_remembered_as_they_speak,
    sessions_come_and_go,
    tokens_come_and_go,
    a_batch_counts_once_whoever_takes_it,
    usage_is_summed_by_what_was_asked,
    a_last_use_only_moves_forward,
    the_audit_log_is_read_newest_first,
    a_nul_is_nowhere,
    facts_are_replaced,
}

async fn changes(store: &dyn Store, after: u64) -> (Vec<FeedLine>, u64) {
    match store.feed_changes(after, 1_000).await.unwrap() {
        Changes::Lines { text, through } => {
            let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
            (lines.collect(), through)
        }
        Changes::Resync => panic!("a resync after {after}"),
    }
}

fn revision(line: &FeedLine) -> u64 {
    match line {
        FeedLine::Key(key) => key.revision,
        FeedLine::Gone { revision, .. } => *revision,
        other => panic!("not a change: {other:?}"),
    }
}

async fn an_account_is_whole_or_not_there(place: Place) {
    let store = &*place.store;
    let mut first = account("acme");
    first.key = Some(key("org_acme", "first"));
    let caller = caller();
    assert_eq!(store.create_account(&first, at(&caller, 500)).await, Ok(1));
    assert_eq!(
        store.organization("org_acme").await.unwrap().unwrap(),
        first.organization
    );
    let known = store.credentials_by_email("acme@example.com").await.unwrap().unwrap();
    assert_eq!(
        (known.user, known.password_hash),
        (user("acme"), "$argon2id$".to_owned())
    );
    assert!(store.credentials_by_user("usr_acme").await.unwrap().is_some());
    let (lines, through) = changes(store, 0).await;
    assert_eq!((lines.len(), through), (1, 1));

    // The same address again: nothing of it stays.
    let mut second = account("bolt");
    second.user.as_mut().unwrap().0.email = "acme@example.com".into();
    second.key = Some(key("org_bolt", "second"));
    assert_eq!(
        store.create_account(&second, at(&caller, 500)).await,
        Err(Fault::EmailTaken)
    );
    assert_eq!(store.organization("org_bolt").await.unwrap(), None);
    assert_eq!(store.revision().await, Ok(1));
    assert_eq!(
        register(store, "core").await,
        1,
        "an account without a key changes no revision"
    );
}

async fn an_invitation_is_used_once(place: Place) {
    let store = &*place.store;
    let caller = caller();
    let invitation = Invitation {
        id: "inv_1".into(),
        note: "for somebody".into(),
        created_at_ms: 1,
        expires_at_ms: 1_000,
        used_at_ms: None,
        used_by: None,
    };
    store
        .create_invitation(&invitation, &digest("i"), at(&caller, 1))
        .await
        .unwrap();
    assert_eq!(
        store.invitations(None, 10).await.unwrap(),
        std::slice::from_ref(&invitation)
    );
    let invited = |name: &str| {
        let mut account = account(name);
        account.invitation = Some(digest("i"));
        account
    };
    let late = store.create_account(&invited("late"), at(&caller, 1_000)).await;
    assert_eq!(late, Err(Fault::InvitationInvalid));
    let names = ["a111", "b222", "c333", "d444"];
    let stamp = at(&caller, 999);
    let tries = join_all(
        names
            .iter()
            .map(|name| async move { store.create_account(&invited(name), stamp).await }),
    )
    .await;
    assert_eq!(tries.iter().filter(|tried| tried.is_ok()).count(), 1, "{tries:?}");
    assert!(
        tries
            .iter()
            .all(|tried| matches!(tried, Ok(_) | Err(Fault::InvitationInvalid)))
    );
    let used = &store.invitations(None, 10).await.unwrap()[0];
    assert!(used.used_by.is_some() && used.used_at_ms == Some(999));
    assert_eq!(store.invitations(Some(&(1, "inv_1".into())), 10).await.unwrap(), []);
    assert_eq!(store.delete_invitation("inv_1", stamp).await, Ok(true));
    assert_eq!(store.delete_invitation("inv_1", stamp).await, Ok(false));
}

async fn organizations_are_changed_and_paged(place: Place) {
    let store = &*place.store;
    let caller = caller();
    for (index, name) in ["Zebra", "apple", "Äpfel", "100%"].iter().enumerate() {
        let mut account = account("x");
        account.organization.id = format!("org_{index}");
        account.organization.name = (*name).into();
        account.user = None;
        store.create_account(&account, at(&caller, 500)).await.unwrap();
    }
    let list = async |search: Option<&str>, after: Option<(i64, String)>| {
        let query = OrganizationQuery {
            search: search.map(str::to_owned),
            after,
            limit: 10,
        };
        let found = store.organizations(&query).await.unwrap();
        found
            .into_iter()
            .map(|organization| organization.name)
            .collect::<Vec<_>>()
    };
    assert_eq!(list(Some("ZEB"), None).await, ["Zebra"]);
    assert_eq!(list(Some("0%"), None).await, ["100%"]);
    assert_eq!(list(Some("_"), None).await, [""; 0]);
    assert_eq!(list(None, None).await.len(), 4);
    let first = OrganizationQuery {
        limit: 1,
        ..OrganizationQuery::default()
    };
    let first = store.organizations(&first).await.unwrap().pop().unwrap();
    assert_eq!(list(None, Some((first.created_at_ms, first.id.clone()))).await.len(), 3);
    let edited = store
        .edit_organization(&first.id, Some("Neu"), None, at(&caller, 1))
        .await;
    assert_eq!(edited.unwrap().unwrap().0.name, "Neu");
    assert_eq!(
        store
            .edit_organization("org_none", Some("n"), None, at(&caller, 1))
            .await,
        Ok(None)
    );
}

async fn a_new_plan_is_told_for_every_key(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    register(store, "bolt").await;
    for name in ["k001", "k002", "k003"] {
        create(store, "org_acme", name).await.unwrap();
    }
    create(store, "org_bolt", "k004").await.unwrap();
    let caller = caller();
    let edited = store
        .edit_organization("org_acme", None, Some("business"), at(&caller, 9))
        .await
        .unwrap();
    assert_eq!(edited.unwrap().1, 7);
    let (lines, through) = changes(store, 4).await;
    assert_eq!(through, 7);
    assert_eq!(lines.iter().map(revision).collect::<Vec<_>>(), [5, 6, 7]);
    for line in lines {
        let FeedLine::Key(line) = line else { panic!() };
        assert_eq!(
            (line.plan.as_str(), line.organization.as_str()),
            ("business", "org_acme")
        );
        assert_eq!(
            store.key(None, &line.id).await.unwrap().unwrap().revision,
            line.revision
        );
    }
    let same = store
        .edit_organization("org_acme", None, Some("business"), at(&caller, 9))
        .await
        .unwrap();
    assert_eq!(same.unwrap().1, 7, "nothing has changed");
}

async fn a_key_is_kept_as_it_was_given(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    let mut given = key("org_acme", "k001");
    given.expires_at_ms = Some(i64::MAX);
    given.secrets = vec![secret("newer", 2_000), secret("older", 1_000)];
    given.secrets[1].not_after_ms = Some(5_000);
    let caller = caller();
    let made = store
        .create_key(
            &given,
            10,
            None,
            &note("org_acme", "key.create", &given.id),
            at(&caller, 1_000),
        )
        .await
        .unwrap();
    given.revision = 1;
    assert_eq!(done(made), given);
    assert_eq!(store.key(None, "key_k001").await.unwrap(), Some(given.clone()));
    assert_eq!(
        store.key(Some("org_acme"), "key_k001").await.unwrap(),
        Some(given.clone())
    );
    assert_eq!(store.key(Some("org_bolt"), "key_k001").await.unwrap(), None);

    let edit = |key: &mut ApiKey| {
        key.disabled = true;
        key.revoked_at_ms = Some(7);
        key.scopes = vec![];
        key.secrets[0].not_after_ms = Some(6_000);
        key.secrets.insert(0, secret("newest", 3_000));
        Ok(note("org_acme", "key.update", &key.id))
    };
    let edited = store
        .edit_key(Some("org_acme"), "key_k001", &edit, None, at(&caller, 2))
        .await;
    edit(&mut given).unwrap();
    given.revision = 2;
    assert_eq!(done(edited.unwrap()), given);
    assert_eq!(store.key(None, "key_k001").await.unwrap(), Some(given));
    let (lines, _) = changes(store, 1).await;
    let FeedLine::Key(line) = &lines[0] else { panic!() };
    assert!(line.disabled && line.revoked && line.scopes.is_empty() && line.secrets.len() == 3);
    let foreign = store
        .edit_key(Some("org_bolt"), "key_k001", &edit, None, at(&caller, 2))
        .await;
    assert_eq!(foreign.unwrap_err(), Fault::NotFound);
}

async fn a_change_that_fails_leaves_nothing(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    create(store, "org_acme", "k001").await.unwrap();
    let caller = caller();
    let refuse = |key: &mut ApiKey| {
        key.name = "other".into();
        Err(Fault::KeyRevoked)
    };
    let refused = store.edit_key(None, "key_k001", &refuse, None, at(&caller, 1)).await;
    assert_eq!(refused.unwrap_err(), Fault::KeyRevoked);
    let keep = |key: &mut ApiKey| Ok(note("org_acme", "key.update", &key.id));
    let kept = done(
        store
            .edit_key(None, "key_k001", &keep, None, at(&caller, 1))
            .await
            .unwrap(),
    );
    assert_eq!((kept.name.as_str(), kept.revision), ("k001", 1));
    // A name that the column refuses: late in the transaction, and the whole of it goes.
    let long = rename(store, "key_k001", &"x".repeat(101)).await;
    assert!(matches!(long, Err(Fault::Internal(_))), "{long:?}");
    assert!(
        create(store, "org_none", "k002").await.is_err(),
        "of an organisation that is not there"
    );
    assert_eq!(store.revision().await, Ok(1));
    assert_eq!(rename(store, "key_k001", "next").await, Ok(2), "no revision was lost");
    assert_eq!(store.audit(&all_audit()).await.unwrap().len(), 3);
}

async fn limits_hold_for_those_who_come_at_once(place: Place) {
    let (store, other) = (place.store.clone(), place.again().await);
    register(&*store, "acme").await;
    let caller = caller();
    let stamp = at(&caller, 1);
    let names: Vec<String> = (0..12).map(|number| format!("k{number:03}")).collect();
    let tries = names.iter().enumerate().map(|(index, name)| {
        let store = if index % 2 == 0 { &store } else { &other };
        let key = key("org_acme", name);
        async move {
            store
                .create_key(&key, 5, None, &note("org_acme", "key.create", &key.id), stamp)
                .await
        }
    });
    let tries = join_all(tries).await;
    assert_eq!(tries.iter().filter(|tried| tried.is_ok()).count(), 5);
    let too_many = Fault::TooMany { what: "keys", limit: 5 };
    assert!(tries.into_iter().filter_map(Result::err).all(|fault| fault == too_many));
    assert_eq!(store.revision().await, Ok(5));
}

async fn an_outcome_is_recorded_once_and_replayed(place: Place) {
    let (store, other) = (place.store.clone(), place.again().await);
    register(&*store, "acme").await;
    let caller = caller();
    let record = |key: &ApiKey| Ok(format!("{{\"made\":\"{}\"}}", key.id));
    let claim = |fingerprint: &str| Claim {
        operation: "create".into(),
        idempotency_key: "idem",
        fingerprint: digest(fingerprint),
        record: &record,
    };
    let names: Vec<String> = (0..8).map(|number| format!("k{number:03}")).collect();
    let (claim_ref, stamp) = (&claim("same"), at(&caller, 1_000));
    let tries = join_all(names.iter().enumerate().map(|(index, name)| {
        let store = if index % 2 == 0 { &store } else { &other };
        let key = key("org_acme", name);
        async move {
            let note = note("org_acme", "key.create", &key.id);
            store
                .create_key(&key, 100, Some(claim_ref), &note, stamp)
                .await
                .unwrap()
        }
    }))
    .await;
    let made = tries.iter().filter(|tried| matches!(tried, Written::Done(_))).count();
    assert_eq!(made, 1);
    let replayed: Vec<_> = tries
        .iter()
        .filter_map(|tried| match tried {
            Written::Replayed(outcome) => Some(outcome.clone()),
            Written::Done(_) => None,
        })
        .collect();
    let outcome = store.outcome("org_acme", &claim("same"), 1_000).await.unwrap().unwrap();
    assert!(replayed.iter().all(|replayed| *replayed == outcome));
    let reused = store.outcome("org_acme", &claim("different"), 1_000).await;
    assert_eq!(reused, Err(Fault::IdempotencyKeyReused));
    let day = 24 * 3_600_000;
    assert_eq!(store.outcome("org_acme", &claim("same"), 1_000 + day).await, Ok(None));
    // A day later it may mean something else.
    let later = key("org_acme", "later");
    let note = note("org_acme", "key.create", &later.id);
    let again = store
        .create_key(&later, 100, Some(&claim("different")), &note, at(&caller, 1_000 + day))
        .await;
    assert!(matches!(again, Ok(Written::Done(_))));
}

async fn keys_are_filtered_sorted_and_paged(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    let caller = caller();
    for (index, name) in ["beta", "Alpha", "alpha", "Ölig", "be_ta"].iter().enumerate() {
        let mut key = key("org_acme", name);
        key.id = format!("key_{index}");
        key.created_at_ms = 1_000 - index as i64;
        key.disabled = index == 4;
        key.expires_at_ms = (index == 3).then_some(50_000);
        let note = note("org_acme", "key.create", &key.id);
        store
            .create_key(&key, 100, None, &note, at(&caller, 1_000))
            .await
            .unwrap();
    }
    let query = KeyQuery {
        organization: Some("org_acme".into()),
        environment: None,
        scope: None,
        status: None,
        search: None,
        sort: KeySort::Name,
        descending: false,
        after: None,
        limit: 10,
        now_ms: 60_000,
    };
    let names = async |query: KeyQuery| {
        let found = store.keys(&query).await.unwrap();
        assert!(found.iter().all(|key| key.secrets.len() == 1));
        found.into_iter().map(|key| key.name).collect::<Vec<_>>()
    };
    // Byte by byte, whatever the locale.
    let by_name = ["Alpha", "alpha", "be_ta", "beta", "Ölig"];
    assert_eq!(names(query.clone()).await, by_name);
    let after = Some((SortValue::Text("be_ta".into()), "key_4".into()));
    assert_eq!(names(KeyQuery { after, ..query.clone() }).await, ["beta", "Ölig"]);
    let newest = KeyQuery {
        sort: KeySort::CreatedAt,
        descending: true,
        limit: 2,
        ..query.clone()
    };
    assert_eq!(names(newest).await, ["beta", "Alpha"]);
    let last_to_expire = KeyQuery {
        sort: KeySort::ExpiresAt,
        limit: 1,
        ..query.clone()
    };
    assert_eq!(names(last_to_expire).await, ["Ölig"]);
    let search = async |text: &str| {
        names(KeyQuery {
            search: Some(text.into()),
            ..query.clone()
        })
        .await
    };
    assert_eq!(search("ALPHA").await, ["Alpha", "alpha"]);
    assert_eq!(search("e_t").await, ["be_ta"]);
    assert_eq!(search("key_2").await, ["alpha"]);
    assert_eq!(search("ateb").await, ["beta"], "the last four of the secret");
    assert_eq!(search("\\").await, [""; 0]);
    let status = async |status| {
        names(KeyQuery {
            status: Some(status),
            ..query.clone()
        })
        .await
    };
    assert_eq!(status(KeyStatus::Disabled).await, ["be_ta"]);
    assert_eq!(status(KeyStatus::Expired).await, ["Ölig"]);
    assert_eq!(status(KeyStatus::Active).await, ["Alpha", "alpha", "beta"]);
    let scope = async |name: &str| {
        names(KeyQuery {
            scope: Some(name.into()),
            ..query.clone()
        })
        .await
        .len()
    };
    assert_eq!((scope("permissions:check").await, scope("permissions").await), (5, 0));
    assert_eq!(scope("odd \"scope\", {with} \\ everything").await, 5);
    assert_eq!(
        names(KeyQuery {
            environment: Some("test".into()),
            ..query.clone()
        })
        .await,
        [""; 0]
    );
}

/// The one that matters: a gate that reads while others write must hear of everything, whoever wrote it.
async fn revisions_become_visible_in_order(place: Place) {
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

async fn a_snapshot_is_of_one_moment(place: Place) {
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

async fn what_was_revoked_long_ago_is_forgotten(place: Place) {
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

async fn a_resync_goes_beyond_every_claim(place: Place) {
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

async fn gates_are_remembered_as_they_speak(place: Place) {
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

async fn sessions_come_and_go(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    let caller = caller();
    let stamp = at(&caller, 0);
    for index in 0..MOST_SESSIONS + 3 {
        store
            .begin_session(&session("acme", &format!("s{index}"), index), None, stamp)
            .await
            .unwrap();
    }
    let list = store.sessions("usr_acme", 0).await.unwrap();
    assert_eq!((list.len() as i64, list[0].id.as_str()), (MOST_SESSIONS, "ses_s52"));
    assert_eq!(
        store.session(&digest("s2"), 0).await.unwrap(),
        None,
        "the oldest gave way"
    );
    let (found, whose) = store.session(&digest("s9"), 0).await.unwrap().unwrap();
    assert_eq!((found, whose), (session("acme", "s9", 9).session, user("acme")));
    assert_eq!(
        store.session(&digest("s9"), 10_009).await.unwrap(),
        None,
        "its time is over"
    );
    store.touch_session("ses_s9", 5_000).await.unwrap();
    store.touch_session("ses_s9", 4_000).await.unwrap();
    assert_eq!(store.sessions("usr_acme", 0).await.unwrap()[0].last_used_at_ms, 5_000);
    // Signing in again ends the session that the browser brought along.
    store
        .begin_session(&session("acme", "new", 60), Some(&digest("s9")), stamp)
        .await
        .unwrap();
    assert_eq!(store.session(&digest("s9"), 0).await.unwrap(), None);
    assert_eq!(
        store.end_sessions("usr_acme", EndSessions::One("ses_s52"), stamp).await,
        Ok(1)
    );
    assert_eq!(
        store.end_sessions("usr_acme", EndSessions::One("ses_s52"), stamp).await,
        Ok(0)
    );
    let rest = store
        .end_sessions("usr_acme", EndSessions::AllBut("ses_new"), stamp)
        .await;
    assert_eq!(rest, Ok(MOST_SESSIONS as u64 - 2));
    store
        .change_password("usr_acme", "$new$", &session("acme", "last", 70), stamp)
        .await
        .unwrap();
    let left = store.sessions("usr_acme", 0).await.unwrap();
    assert_eq!(
        left.iter().map(|session| session.id.as_str()).collect::<Vec<_>>(),
        ["ses_last"]
    );
    let known = store.credentials_by_user("usr_acme").await.unwrap().unwrap();
    assert_eq!(known.password_hash, "$new$");
    store.prune(10_070).await.unwrap();
    assert_eq!(store.sessions("usr_acme", 0).await.unwrap(), []);
}

async fn tokens_come_and_go(place: Place) {
    let (store, other) = (place.store.clone(), place.again().await);
    register(&*store, "acme").await;
    let caller = caller();
    let token = |name: &str| tollgate::control::model::AccessToken {
        id: format!("tok_{name}"),
        organization_id: "org_acme".into(),
        name: name.into(),
        last_four: "abcd".into(),
        created_at_ms: 5,
        expires_at_ms: Some(100),
        last_used_at_ms: None,
    };
    let stamp = at(&caller, 5);
    let names: Vec<String> = (0..8).map(|number| number.to_string()).collect();
    let tries = join_all(names.iter().enumerate().map(|(index, name)| {
        let store = if index % 2 == 0 { &store } else { &other };
        let token = token(name);
        async move { store.create_token(&token, &digest(&token.name), 3, stamp).await }
    }))
    .await;
    assert_eq!(tries.iter().filter(|tried| tried.is_ok()).count(), 3, "{tries:?}");
    let list = store.tokens("org_acme").await.unwrap();
    let first = &list[0];
    assert_eq!(
        store.token(&digest(&first.name), 99).await.unwrap().as_ref(),
        Some(first)
    );
    assert_eq!(store.token(&digest(&first.name), 100).await.unwrap(), None);
    store.touch_token(&first.id, 50).await.unwrap();
    store.touch_token(&first.id, 40).await.unwrap();
    assert_eq!(
        store
            .token(&digest(&first.name), 0)
            .await
            .unwrap()
            .unwrap()
            .last_used_at_ms,
        Some(50)
    );
    assert_eq!(store.delete_token("org_bolt", &first.id, stamp).await, Ok(false));
    assert_eq!(store.delete_token("org_acme", &first.id, stamp).await, Ok(true));
    assert_eq!(store.tokens("org_acme").await.unwrap().len(), 2);
}

fn batch(sequence: u64, permits: &[(&str, &str, i64, u64)]) -> UsageBatch {
    UsageBatch {
        gate: "gate-1".into(),
        run: "run-1".into(),
        sequence,
        permits: permits
            .iter()
            .map(|(key, tier, minute, count)| PermitCount {
                key: (*key).into(),
                tier: (*tier).into(),
                environment: "live".into(),
                minute: *minute,
                count: *count,
            })
            .collect(),
        refusals: vec![],
        last_used: vec![],
    }
}

fn usage_query() -> UsageQuery {
    UsageQuery {
        organization: "org_acme".into(),
        from_minute: 0,
        to_minute: 1_000,
        bucket_minutes: 60,
        by_key: false,
        by_tier: false,
        key: None,
        tier: None,
        environment: None,
        limit: 100,
    }
}

async fn a_batch_counts_once_whoever_takes_it(place: Place) {
    let stores = [place.store.clone(), place.again().await];
    register(&*place.store, "acme").await;
    create(&*place.store, "org_acme", "k001").await.unwrap();
    create(&*place.store, "org_acme", "k002").await.unwrap();
    // Thirty batches, each four times, in an order of their own, to both; the same rows in opposite orders.
    let sends: Vec<(usize, u64)> = (0..120).map(|send| (send % 2, (send as u64 * 7) % 30 + 1)).collect();
    let taken = join_all(sends.iter().map(|(store, sequence)| {
        let store = &stores[*store];
        let (first, second) = if sequence % 2 == 0 {
            ("key_k001", "key_k002")
        } else {
            ("key_k002", "key_k001")
        };
        let batch = batch(
            *sequence,
            &[
                (first, "default", 5, 1),
                (second, "default", 5, 1),
                (first, "default", 5, 1),
            ],
        );
        async move { store.apply_usage(&batch, 1).await.unwrap() }
    }))
    .await;
    assert_eq!(taken.into_iter().filter(|new| *new).count(), 30);
    let total = place.store.usage(&usage_query()).await.unwrap().permits;
    assert_eq!(total.iter().map(|row| row.count).collect::<Vec<_>>(), [90]);
    assert_eq!(place.store.apply_usage(&batch(30, &[]), 1).await, Ok(false));
    assert_eq!(
        place.store.apply_usage(&batch(32, &[]), 1).await,
        Ok(true),
        "it overtook one"
    );
    assert_eq!(place.store.apply_usage(&batch(32, &[]), 1).await, Ok(false));
    assert_eq!(place.store.apply_usage(&batch(31, &[]), 1).await, Ok(true));
}

async fn usage_is_summed_by_what_was_asked(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    create(store, "org_acme", "k001").await.unwrap();
    let mut all = batch(
        1,
        &[
            ("key_k001", "default", 59, 2),
            ("key_k001", "audit", 60, 3),
            ("key_of_nobody", "default", 60, 99),
        ],
    );
    let refusal = |key: Option<&str>, code: &str, count| RefusalCount {
        key: key.map(str::to_owned),
        environment: key.map(|_| "live".into()),
        tier: "default".into(),
        code: code.into(),
        minute: 60,
        count,
    };
    all.refusals = vec![
        refusal(Some("key_k001"), "RATE_LIMITED", 4),
        refusal(Some("key_k001"), "INSUFFICIENT_SCOPE", 1),
        refusal(None, "INVALID_API_KEY", 50),
    ];
    assert_eq!(store.apply_usage(&all, 1).await, Ok(true));
    let rows = async |query: UsageQuery| {
        let rows = store.usage(&query).await.unwrap();
        let permits: Vec<_> = rows
            .permits
            .into_iter()
            .map(|row| (row.minute, row.key, row.tier, row.count))
            .collect();
        let refusals: Vec<_> = rows
            .refusals
            .into_iter()
            .map(|(row, code)| (row.minute, code, row.count))
            .collect();
        (permits, refusals)
    };
    let empty = String::new;
    let (permits, refusals) = rows(usage_query()).await;
    assert_eq!(permits, [(0, empty(), empty(), 2), (60, empty(), empty(), 3)]);
    assert_eq!(
        refusals,
        [
            (60, "INSUFFICIENT_SCOPE".to_owned(), 1),
            (60, "RATE_LIMITED".to_owned(), 4)
        ]
    );
    let daily = UsageQuery {
        bucket_minutes: 1_440,
        by_key: true,
        by_tier: true,
        ..usage_query()
    };
    let of = |tier: &str, count| (0, "key_k001".to_owned(), tier.to_owned(), count);
    assert_eq!(rows(daily.clone()).await.0, [of("audit", 3), of("default", 2)]);
    assert_eq!(
        rows(UsageQuery {
            tier: Some("audit".into()),
            ..daily.clone()
        })
        .await
        .0,
        [of("audit", 3)]
    );
    assert_eq!(
        rows(UsageQuery {
            to_minute: 60,
            ..daily.clone()
        })
        .await
        .0,
        [of("default", 2)]
    );
    assert_eq!(
        rows(UsageQuery { limit: 0, ..daily }).await.0.len(),
        1,
        "one more than asked for"
    );
    let nobody = UsageQuery {
        organization: String::new(),
        ..usage_query()
    };
    assert_eq!(rows(nobody).await.0, [(60, empty(), empty(), 99)]);
}

async fn a_last_use_only_moves_forward(place: Place) {
    let stores = [place.store.clone(), place.again().await];
    register(&*place.store, "acme").await;
    create(&*place.store, "org_acme", "k001").await.unwrap();
    let id: String = digest("k001")[..8].iter().map(|byte| format!("{byte:02X}")).collect();
    join_all((1..=10_u64).map(|sequence| {
        let mut batch = batch(sequence, &[]);
        let used = |at_ms| LastUsed {
            key: "key_k001".into(),
            secret: id.clone(),
            at_ms,
        };
        let at_ms = 1_000 + (sequence as i64 * 7) % 10;
        batch.last_used = vec![
            used(at_ms),
            used(at_ms - 500),
            LastUsed {
                key: "key_none".into(),
                ..used(9_999)
            },
        ];
        let store = &stores[sequence as usize % 2];
        async move { store.apply_usage(&batch, 1).await.unwrap() }
    }))
    .await;
    let key = place.store.key(None, "key_k001").await.unwrap().unwrap();
    assert_eq!(
        (key.last_used_at_ms, key.secrets[0].last_used_at_ms),
        (Some(1_009), Some(1_009))
    );
    assert_eq!(key.revision, 1, "gates need not know");
}

fn all_audit() -> AuditQuery {
    AuditQuery {
        limit: 100,
        ..AuditQuery::default()
    }
}

async fn the_audit_log_is_read_newest_first(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    register(store, "bolt").await;
    create(store, "org_acme", "k001").await.unwrap();
    rename(store, "key_k001", "n").await.unwrap();
    let all = store.audit(&all_audit()).await.unwrap();
    let actions: Vec<&str> = all.iter().map(|line| line.action.as_str()).collect();
    assert_eq!(
        actions,
        [
            "key.update",
            "key.create",
            "organization.register",
            "organization.register"
        ]
    );
    let line = &all[1];
    assert_eq!(line.detail, json!({"b": [1, "zwei"], "a": null}));
    assert_eq!(
        (line.at_ms, line.actor_kind.as_str(), line.address.as_str()),
        (1_000, "operator", "192.0.2.1")
    );
    assert_eq!(
        (line.target_id.as_str(), line.organization_id.as_deref()),
        ("key_k001", Some("org_acme"))
    );
    let count = async |query: AuditQuery| store.audit(&query).await.unwrap().len();
    assert_eq!(
        count(AuditQuery {
            organization: Some("org_acme".into()),
            ..all_audit()
        })
        .await,
        3
    );
    assert_eq!(
        count(AuditQuery {
            target: Some("key_k001".into()),
            ..all_audit()
        })
        .await,
        2
    );
    assert_eq!(
        count(AuditQuery {
            action: Some("key.create".into()),
            ..all_audit()
        })
        .await,
        1
    );
    assert_eq!(
        count(AuditQuery {
            actor: Some("usr_none".into()),
            ..all_audit()
        })
        .await,
        0
    );
    assert_eq!(
        count(AuditQuery {
            from_ms: Some(1_000),
            to_ms: Some(2_000),
            ..all_audit()
        })
        .await,
        1
    );
    assert_eq!(
        count(AuditQuery {
            before: Some(line.serial),
            ..all_audit()
        })
        .await,
        2
    );
    assert_eq!(
        count(AuditQuery {
            limit: 2,
            ..AuditQuery::default()
        })
        .await,
        2
    );
}

/// One engine's text can hold it and the other's cannot: neither may stumble over it.
async fn a_nul_is_nowhere(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    let nul = "a\0b";
    let caller = caller();
    let stamp = at(&caller, 1);
    assert!(store.credentials_by_email(nul).await.unwrap().is_none());
    assert_eq!(store.organization(nul).await, Ok(None));
    assert_eq!(store.key(None, nul).await, Ok(None));
    let keep = |key: &mut ApiKey| Ok(note("org_acme", "key.update", &key.id));
    assert_eq!(
        store.edit_key(None, nul, &keep, None, stamp).await.unwrap_err(),
        Fault::NotFound
    );
    let query = OrganizationQuery {
        search: Some(nul.into()),
        after: None,
        limit: 5,
    };
    assert_eq!(store.organizations(&query).await.unwrap(), []);
    assert_eq!(
        store
            .audit(&AuditQuery {
                target: Some(nul.into()),
                ..all_audit()
            })
            .await
            .unwrap(),
        []
    );
    let query = UsageQuery {
        tier: Some(nul.into()),
        ..usage_query()
    };
    assert_eq!(store.usage(&query).await.unwrap().permits, []);
}

async fn facts_are_replaced(place: Place) {
    let store = &*place.store;
    assert_eq!(store.fact("name").await, Ok(None));
    store.set_fact("name", "one").await.unwrap();
    store.set_fact("name", "two").await.unwrap();
    assert_eq!(store.fact("name").await.unwrap().as_deref(), Some("two"));
}
