//! What tests make stores of.

use std::sync::Arc;

use serde_json::json;
use sqlx::Connection as _;
use tollgate::control::model::{
    Actor, ApiKey, AuditNote, Caller, Fault, KeySecret, Organization, Origin, Session, User,
};
use tollgate::control::store::{self, AuditQuery, Changes, NewAccount, NewSession, Stamp, Store, UsageQuery, Written};
use tollgate::wire::FeedLine;

/// A store, and how to open another one on the same database.
#[derive(Clone)]
pub struct Place {
    pub url: String,
    pub store: Arc<dyn Store>,
}

impl Place {
    pub async fn open(url: String) -> Self {
        let store = store::open(&url).await.unwrap();
        Self { url, store }
    }

    /// How many rows a table has.
    pub async fn rows(&self, table: &str) -> i64 {
        let count = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
        if self.url.starts_with("sqlite") {
            let mut connection = sqlx::SqliteConnection::connect(&self.url).await.unwrap();
            sqlx::query_scalar(count).fetch_one(&mut connection).await.unwrap()
        } else {
            let mut connection = sqlx::PgConnection::connect(&self.url).await.unwrap();
            sqlx::query_scalar(count).fetch_one(&mut connection).await.unwrap()
        }
    }

    /// As another process would.
    pub async fn again(&self) -> Arc<dyn Store> {
        store::open(&self.url).await.unwrap()
    }
}

pub fn caller() -> Caller {
    Caller {
        actor: Actor::Operator,
        origin: Origin {
            address: Some("192.0.2.1".parse().unwrap()),
            user_agent: "tests".into(),
            request_id: "req_1".into(),
        },
    }
}

pub fn at(caller: &Caller, now_ms: i64) -> Stamp<'_> {
    Stamp { caller, now_ms }
}

pub fn note(organization: &str, action: &'static str, target: &str) -> AuditNote {
    AuditNote {
        organization_id: Some(organization.to_owned()),
        action,
        target_kind: "key",
        target_id: target.to_owned(),
        detail: json!({"b": [1, "zwei"], "a": null}),
    }
}

pub fn digest(name: &str) -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(name.as_bytes()).into()
}

pub fn secret(name: &str, created_at_ms: i64) -> KeySecret {
    KeySecret {
        digest: digest(name),
        last_four: name.chars().rev().take(4).collect(),
        created_at_ms,
        not_after_ms: None,
        last_used_at_ms: None,
    }
}

/// A key whose id, name and secret are made from `name`, of at least four characters.
pub fn key(organization: &str, name: &str) -> ApiKey {
    ApiKey {
        id: format!("key_{name}"),
        organization_id: organization.to_owned(),
        name: name.to_owned(),
        environment: "live".into(),
        prefix: "pxk_live_".into(),
        scopes: vec!["permissions:check".into(), "odd \"scope\", {with} \\ everything".into()],
        created_at_ms: 1_000,
        expires_at_ms: None,
        disabled: false,
        revoked_at_ms: None,
        last_used_at_ms: None,
        revision: 0,
        secrets: vec![secret(name, 1_000)],
    }
}

/// An organisation `org_NAME` with a user `NAME@example.com` and no key.
pub fn account(name: &str) -> NewAccount {
    let id = format!("org_{name}");
    NewAccount {
        organization: Organization {
            id: id.clone(),
            name: name.to_owned(),
            plan: "starter".into(),
            created_at_ms: 500,
        },
        user: Some((user(name), "$argon2id$".into())),
        key: None,
        invitation: None,
        note: note(&id, "organization.register", &id),
    }
}

pub fn user(name: &str) -> User {
    User {
        id: format!("usr_{name}"),
        organization_id: format!("org_{name}"),
        email: format!("{name}@example.com"),
        created_at_ms: 500,
    }
}

pub fn session(user: &str, name: &str, now_ms: i64) -> NewSession {
    NewSession {
        session: Session {
            id: format!("ses_{name}"),
            user_id: format!("usr_{user}"),
            created_at_ms: now_ms,
            last_used_at_ms: now_ms,
            expires_at_ms: now_ms + 10_000,
            address: "192.0.2.1".into(),
            user_agent: "tests".into(),
        },
        digest: digest(name),
    }
}

/// Makes an organisation.
pub async fn register(store: &dyn Store, name: &str) -> u64 {
    store.create_account(&account(name), at(&caller(), 500)).await.unwrap()
}

/// Makes a key; answers its revision.
pub async fn create(store: &dyn Store, organization: &str, name: &str) -> Result<u64, Fault> {
    let key = key(organization, name);
    let note = note(organization, "key.create", &key.id);
    let written = store
        .create_key(&key, 100_000, None, &note, at(&caller(), 1_000))
        .await?;
    Ok(done(written).revision)
}

/// Gives a key another name; answers its revision.
pub async fn rename(store: &dyn Store, id: &str, name: &str) -> Result<u64, Fault> {
    let edit = |key: &mut ApiKey| {
        key.name = name.to_owned();
        Ok(note(&key.organization_id, "key.update", &key.id))
    };
    let written = store.edit_key(None, id, &edit, None, at(&caller(), 2_000)).await?;
    Ok(done(written).revision)
}

pub fn done(written: Written) -> ApiKey {
    match written {
        Written::Done(key) => *key,
        Written::Replayed(outcome) => panic!("replayed: {outcome}"),
    }
}

/// The lines after a revision, and how far they reach.
pub async fn changes(store: &dyn Store, after: u64) -> (Vec<FeedLine>, u64) {
    match store.feed_changes(after, 1_000).await.unwrap() {
        Changes::Lines { text, through } => {
            let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
            (lines.collect(), through)
        }
        Changes::Resync => panic!("a resync after {after}"),
    }
}

pub fn revision(line: &FeedLine) -> u64 {
    match line {
        FeedLine::Key(key) => key.revision,
        FeedLine::Gone { revision, .. } => *revision,
        other => panic!("not a change: {other:?}"),
    }
}

/// The newest hundred lines.
pub fn all_audit() -> AuditQuery {
    AuditQuery {
        limit: 100,
        ..AuditQuery::default()
    }
}

/// Everything of `org_acme`, by the hour.
pub fn usage_query() -> UsageQuery {
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
