//! Keys, and what holds for those who change them at once.

use futures_util::future::join_all;
use tollgate::control::model::{ApiKey, Fault, KeyStatus};
use tollgate::control::store::{Claim, KeyQuery, KeySort, SortValue, Written};
use tollgate::wire::FeedLine;

use crate::parts::*;

pub async fn a_key_is_kept_as_it_was_given(place: Place) {
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

pub async fn a_change_that_fails_leaves_nothing(place: Place) {
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

pub async fn limits_hold_for_those_who_come_at_once(place: Place) {
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

pub async fn an_outcome_is_recorded_once_and_replayed(place: Place) {
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

pub async fn keys_are_filtered_sorted_and_paged(place: Place) {
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
