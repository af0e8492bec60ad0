//! The ledger and the audit log.

use futures_util::future::join_all;
use serde_json::json;
use tollgate::control::model::{ApiKey, Fault};
use tollgate::control::store::{AuditQuery, OrganizationQuery, Store, UsageQuery};
use tollgate::wire::{LastUsed, PermitCount, RefusalCount, UsageBatch};

use crate::parts::*;

pub async fn a_batch_counts_once_whoever_takes_it(place: Place) {
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

/// Batches 4 to 6 are lost to the ledger: it was restored from a backup, or the gate merged them before they were sent.
/// What comes later counts once, and is no more to remember than the gap.
pub async fn a_gap_that_never_closes_costs_one_row(place: Place) {
    register(&*place.store, "acme").await;
    create(&*place.store, "org_acme", "k001").await.unwrap();
    let apply = async |sequence| {
        let batch = batch(sequence, &[("key_k001", "default", 5, 1)]);
        place.store.apply_usage(&batch, 1).await.unwrap()
    };
    for sequence in (1..=3).chain(7..=12) {
        assert!(apply(sequence).await, "{sequence}");
    }
    assert_eq!(place.rows("usage_ahead").await, 1);
    for sequence in [1, 3, 7, 9, 12] {
        assert!(!apply(sequence).await, "{sequence}");
    }
    // Another gap, which closes from both ends.
    for sequence in [15, 13, 14] {
        assert!(apply(sequence).await, "{sequence}");
    }
    assert_eq!(place.rows("usage_ahead").await, 1);
    // What was merely late closes the first one.
    for sequence in (4..=6).rev() {
        assert!(apply(sequence).await, "{sequence}");
    }
    assert_eq!(place.rows("usage_ahead").await, 0);
    assert!(!apply(9).await && apply(16).await);
    let total = place.store.usage(&usage_query()).await.unwrap().permits;
    assert_eq!(total.iter().map(|row| row.count).collect::<Vec<_>>(), [16]);
}

pub async fn usage_is_summed_by_what_was_asked(place: Place) {
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

pub async fn an_hour_is_folded_once_whoever_does_it(place: Place) {
    let stores = [place.store.clone(), place.again().await];
    for name in ["acme", "bolt"] {
        register(&*place.store, name).await;
        create(&*place.store, &format!("org_{name}"), &format!("{name}1"))
            .await
            .unwrap();
    }
    let keys = ["key_acme1", "key_bolt1", "key_of_nobody"];
    let apply = async |sequence: u64| {
        let permits: Vec<_> = (0..60)
            .map(|minute| (keys[minute as usize % 3], "default", 120 + minute, 1))
            .collect();
        place.store.apply_usage(&batch(sequence, &permits), 1).await.unwrap()
    };
    assert_eq!(place.store.oldest_usage().await, Ok(None));
    assert!(apply(1).await);
    assert_eq!(place.store.oldest_usage().await, Ok(Some(120)));
    // Both fold while batches for the same hour go on coming.
    let fold = async |store: &dyn Store| {
        let mut organizations = vec![];
        for _ in 0..100 {
            let after = organizations.last().cloned();
            match store.fold_usage(120, after.as_deref()).await.unwrap() {
                Some(organization) => organizations.push(organization),
                None => break,
            }
        }
        organizations
    };
    let batches = async {
        for sequence in 2..=8 {
            assert!(apply(sequence).await);
        }
    };
    let (first, second, ()) = tokio::join!(fold(&*stores[0]), fold(&*stores[1]), batches);
    assert!(first.len() + second.len() >= 3, "{first:?} {second:?}");
    fold(&*stores[1]).await;
    assert_eq!(place.store.fold_usage(120, None).await, Ok(None));
    assert_eq!(place.rows("usage_minutes").await, 3);
    let rows = async |organization: &str| {
        let query = UsageQuery {
            organization: organization.into(),
            bucket_minutes: 1,
            ..usage_query()
        };
        let rows = place.store.usage(&query).await.unwrap().permits;
        rows.iter().map(|row| (row.minute, row.count)).collect::<Vec<_>>()
    };
    for organization in ["", "org_acme", "org_bolt"] {
        assert_eq!(rows(organization).await, [(120, 160)], "{organization:?}");
    }
}

pub async fn a_last_use_only_moves_forward(place: Place) {
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

/// While a secret is the only one of its key, and after it got company.
pub async fn each_secret_has_its_own_last_use(place: Place) {
    let store = &*place.store;
    register(store, "acme").await;
    create(store, "org_acme", "k001").await.unwrap();
    let used = |secret: &str, at_ms| LastUsed {
        key: "key_k001".into(),
        secret: digest(secret)[..8].iter().map(|byte| format!("{byte:02x}")).collect(),
        at_ms,
    };
    let apply = async |sequence, last_used: &[LastUsed]| {
        let batch = UsageBatch {
            last_used: last_used.to_vec(),
            ..batch(sequence, &[])
        };
        assert_eq!(store.apply_usage(&batch, 1).await, Ok(true));
    };
    let last_uses = async || {
        let key = store.key(None, "key_k001").await.unwrap().unwrap();
        let secrets: Vec<_> = key.secrets.iter().map(|secret| secret.last_used_at_ms).collect();
        (key.last_used_at_ms, secrets)
    };
    assert_eq!(last_uses().await, (None, vec![None]));
    apply(1, &[used("k001", 1_000)]).await;
    assert_eq!(last_uses().await, (Some(1_000), vec![Some(1_000)]));
    let rotate = |key: &mut ApiKey| {
        key.secrets.insert(0, secret("newer", 2_000));
        Ok(note("org_acme", "key.rotate", &key.id))
    };
    store
        .edit_key(None, "key_k001", &rotate, None, at(&caller(), 2_000))
        .await
        .unwrap();
    assert_eq!(last_uses().await, (Some(1_000), vec![None, Some(1_000)]));
    apply(2, &[used("newer", 3_000)]).await;
    assert_eq!(last_uses().await, (Some(3_000), vec![Some(3_000), Some(1_000)]));
    apply(3, &[used("k001", 2_500), used("k001", 2_400), used("nobody's", 3_500)]).await;
    assert_eq!(last_uses().await, (Some(3_500), vec![Some(3_000), Some(2_500)]));
}

pub async fn a_key_of_nobody_may_be_any_text(place: Place) {
    for (sequence, key) in [(1, r#"a"b\c/'{$[0]}"#), (2, "0")] {
        let batch = batch(
            sequence,
            &[
                (key, "default", 60, 1),
                ("other", "default", 60, 1),
                (key, "default", 60, 2),
            ],
        );
        assert_eq!(place.store.apply_usage(&batch, 1).await, Ok(true));
        let query = UsageQuery {
            organization: String::new(),
            key: Some(key.into()),
            by_key: true,
            ..usage_query()
        };
        let rows = place.store.usage(&query).await.unwrap().permits;
        let rows: Vec<_> = rows.iter().map(|row| (row.key.as_str(), row.count)).collect();
        assert_eq!(rows, [(key, 3)]);
    }
}

pub async fn the_audit_log_is_read_newest_first(place: Place) {
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
pub async fn a_nul_is_nowhere(place: Place) {
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
