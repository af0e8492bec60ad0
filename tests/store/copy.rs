//! Moving from SQLite to PostgreSQL.

use tollgate::control::copy;
use tollgate::control::model::ApiKey;
use tollgate::control::store::{AuditQuery, GateReport};
use tollgate::wire::{PermitCount, UsageBatch};

use crate::parts::{Place, account, at, caller, create, digest, key, note, register, rename, session};
use crate::postgres::Postgres;

/// A store with something in every table, texts that are hard to copy among it.
async fn filled(url: String) -> Place {
    let place = Place::open(url).await;
    let store = &*place.store;
    let caller = caller();
    let mut odd = account("acme");
    odd.organization.name = "Tab\tnewline\nbackslash \\N \\x00 quote ' \" Ünïcödé 🚪".into();
    odd.key = Some(key("org_acme", "k001"));
    store.create_account(&odd, at(&caller, 500)).await.unwrap();
    register(store, "bolt").await;
    for index in 0..200 {
        create(store, "org_bolt", &format!("b{index:03}")).await.unwrap();
    }
    let revoke = |key: &mut ApiKey| {
        key.revoked_at_ms = Some(1);
        Ok(note("org_bolt", "key.revoke", &key.id))
    };
    store
        .edit_key(None, "key_b000", &revoke, None, at(&caller, 1))
        .await
        .unwrap();
    store.prune(31 * 24 * 3_600_000).await.unwrap();
    let record = |key: &ApiKey| Ok(serde_json::to_string(key).unwrap());
    let claim = tollgate::control::store::Claim {
        operation: "create".into(),
        idempotency_key: "idem",
        fingerprint: digest("f"),
        record: &record,
    };
    let claimed = key("org_bolt", "claimed");
    let claimed_note = note("org_bolt", "key.create", &claimed.id);
    store
        .create_key(&claimed, 1_000, Some(&claim), &claimed_note, at(&caller, 1))
        .await
        .unwrap();
    let invitation = tollgate::control::model::Invitation {
        id: "inv_1".into(),
        note: "note".into(),
        created_at_ms: 1,
        expires_at_ms: 2,
        used_at_ms: None,
        used_by: None,
    };
    store
        .create_invitation(&invitation, &digest("i"), at(&caller, 1))
        .await
        .unwrap();
    let mut long = session("acme", "s", 1);
    long.session.expires_at_ms = i64::MAX;
    store.begin_session(&long, None, at(&caller, 1)).await.unwrap();
    let token = tollgate::control::model::AccessToken {
        id: "tok_1".into(),
        organization_id: "org_acme".into(),
        name: "t".into(),
        last_four: "abcd".into(),
        created_at_ms: 1,
        expires_at_ms: None,
        last_used_at_ms: None,
    };
    store
        .create_token(&token, &digest("t"), 10, at(&caller, 1))
        .await
        .unwrap();
    let report = GateReport {
        name: "gate-1".into(),
        version: None,
        said: Some(3),
        begins: true,
        claimed: 0,
        last_heard_at_ms: 1,
        connected: true,
    };
    store.save_gates(&[report]).await.unwrap();
    for sequence in [1, 3] {
        let permit = PermitCount {
            key: "key_k001".into(),
            tier: "default".into(),
            environment: "live".into(),
            minute: 5,
            count: 1 << 53,
        };
        let batch = UsageBatch {
            gate: "gate-1".into(),
            run: "run".into(),
            sequence,
            permits: vec![permit],
            refusals: vec![tollgate::wire::RefusalCount {
                key: None,
                environment: None,
                tier: String::new(),
                code: "INVALID_API_KEY".into(),
                minute: 5,
                count: 2,
            }],
            last_used: vec![],
        };
        store.apply_usage(&batch, 1).await.unwrap();
    }
    store.set_fact("dev_organization", "org_acme").await.unwrap();
    place
}

#[tokio::test]
async fn a_store_is_copied_whole_and_goes_on_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let server = Postgres::start();
    let from = filled(format!("sqlite://{}", directory.path().join("tollgate.db").display())).await;
    let to = server.database();
    let mut last = None;
    let copied = copy(&from.url, &to, &mut |progress| last = Some(progress))
        .await
        .unwrap();
    let last = last.expect("progress was reported");
    assert_eq!((last.done, last.is_verifying), (last.total, true));
    assert_eq!(last.total, 2 * copied.iter().map(|table| table.rows).sum::<u64>());
    assert_eq!(copied.len(), 18);
    assert!(copied.iter().all(|table| table.rows > 0), "{copied:?}");

    let to = Place::open(to).await;
    let (old, new) = (&*from.store, &*to.store);
    assert_eq!(old.organization("org_acme").await, new.organization("org_acme").await);
    for id in ["key_k001", "key_b000", "key_b199", "key_claimed"] {
        assert_eq!(old.key(None, id).await, new.key(None, id).await, "{id}");
    }
    let all = AuditQuery {
        limit: 1_000,
        ..AuditQuery::default()
    };
    assert_eq!(old.audit(&all).await, new.audit(&all).await);
    assert_eq!(old.gates().await, new.gates().await);
    assert_eq!(old.feed_changes(1, 1_000).await, new.feed_changes(1, 1_000).await);
    assert_eq!(old.session(&digest("s"), 1).await, new.session(&digest("s"), 1).await);
    // It goes on: revisions, and the numbers that the database gives.
    let revision = old.revision().await.unwrap();
    assert_eq!(rename(new, "key_k001", "next").await, Ok(revision + 1));
    create(new, "org_acme", "fresh").await.unwrap();
    let audit = new.audit(&all).await.unwrap();
    assert_eq!(audit[0].serial, audit[1].serial + 1);
    assert!(audit[1].serial > audit[2].serial);

    let again = copy(&from.url, &to.url, &mut |_| ()).await.unwrap_err().to_string();
    assert!(
        again.contains("not empty: organizations has rows; nothing was copied"),
        "{again}"
    );
}

#[tokio::test]
async fn a_copy_that_is_not_the_same_is_not_kept() {
    let directory = tempfile::tempdir().unwrap();
    let server = Postgres::start();
    let from = filled(format!("sqlite://{}", directory.path().join("tollgate.db").display())).await;
    let to = server.database();
    tollgate::control::migrate(&to).await.unwrap();
    let name = to.rsplit('/').next().unwrap();
    server.execute(
        name,
        "CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
             IF NEW.id = 'key_b100' THEN NEW.disabled = true; END IF; RETURN NEW; END $$;
         CREATE TRIGGER spoil BEFORE INSERT ON keys FOR EACH ROW EXECUTE FUNCTION spoil()",
    );
    let spoilt = copy(&from.url, &to, &mut |_| ()).await.unwrap_err().to_string();
    assert!(
        spoilt.contains("table keys is not the same after it was copied"),
        "{spoilt}"
    );
    server.execute(name, "DROP TRIGGER spoil ON keys");
    // Nothing was kept, so the next one finds it empty.
    copy(&from.url, &to, &mut |_| ()).await.unwrap();
    let absent = format!("sqlite://{}", directory.path().join("absent.db").display());
    let absent = copy(&absent, &to, &mut |_| ()).await.unwrap_err().to_string();
    assert!(absent.contains("there is no database"), "{absent}");
}
