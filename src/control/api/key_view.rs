//! Keys as the API shows them.

use serde::Serialize;
use utoipa::ToSchema;

use super::value::Date;
use crate::control::model::{self, ApiKey, Applied, KeySecret, KeyStatus};

/// A key. Its secrets are not here: they are known as digests only.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyView {
    #[schema(example = "key_4fzq0XbW2Tn8rLs7KcY")]
    pub(super) id: String,
    pub(super) organization_id: String,
    pub(super) name: String,
    pub(super) environment: String,
    pub(super) scopes: Vec<String>,
    pub(super) status: Status,
    /// What its newest secret begins and ends with.
    #[schema(example = "pxk_live_…x7Qz")]
    pub(super) masked: String,
    pub(super) created_at: Date,
    pub(super) expires_at: Option<Date>,
    pub(super) last_used_at: Option<Date>,
    pub(super) disabled: bool,
    pub(super) revoked_at: Option<Date>,
    /// Newest first.
    pub(super) secrets: Vec<SecretView>,
    /// The feed revision of its newest change.
    pub(super) revision: u64,
}

/// One secret of a key.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretView {
    /// The first 16 hex digits of its digest.
    pub(super) id: String,
    pub(super) masked: String,
    pub(super) state: SecretState,
    pub(super) created_at: Date,
    /// Refused from then on.
    pub(super) not_after: Option<Date>,
    pub(super) last_used_at: Option<Date>,
}

/// How a key stands; of several that fit, the gravest.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Status {
    Active,
    /// An old secret is in its grace period.
    Rotating,
    /// Expires within seven days.
    Expiring,
    Expired,
    Disabled,
    Revoked,
}

/// How a secret stands.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum SecretState {
    Current,
    /// An old one that still works.
    Grace,
    /// Refused for good: its grace is over, or the key is revoked.
    Dead,
}

/// A change and, with `wait=all`, who has applied it.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ChangedKey {
    #[serde(flatten)]
    pub(super) key: KeyView,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) applied: Option<AppliedView>,
}

/// A key with its new secret, which is shown this once.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct IssuedKey {
    #[serde(flatten)]
    pub(super) key: KeyView,
    /// The secret. Null in a replay: it is not stored, so it cannot be shown again.
    pub(super) api_key: Option<String>,
    /// True where this `Idempotency-Key` was seen before: nothing was done again.
    pub(super) replayed: bool,
    /// After a rotation: when the old secret dies.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) grace_ends_at: Option<Date>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub(super) applied: Option<AppliedView>,
}

/// Which gates have applied a change.
#[derive(Serialize, ToSchema)]
pub struct AppliedView {
    pub(super) gates: Vec<String>,
    /// Gates that are connected, or were heard in the last 15 seconds, and have not applied it in the time waited.
    pub(super) pending: Vec<String>,
    /// Gates that were there in the last 24 hours, are not now, and may still serve from their spool.
    pub(super) silent: Vec<String>,
}

/// A page of keys.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeyList {
    pub(super) items: Vec<KeyView>,
    /// For the next page; null on the last one.
    pub(super) next_cursor: Option<String>,
}

impl KeyView {
    pub fn of(key: ApiKey, now_ms: i64) -> Self {
        let status = match key.status(now_ms) {
            KeyStatus::Active => Status::Active,
            KeyStatus::Rotating => Status::Rotating,
            KeyStatus::Expiring => Status::Expiring,
            KeyStatus::Expired => Status::Expired,
            KeyStatus::Disabled => Status::Disabled,
            KeyStatus::Revoked => Status::Revoked,
        };
        let secrets: Vec<_> = key
            .secrets
            .iter()
            .map(|secret| SecretView::of(secret, &key, now_ms))
            .collect();
        KeyView {
            masked: secrets.first().map(|s| s.masked.clone()).unwrap_or_default(),
            status,
            secrets,
            id: key.id,
            organization_id: key.organization_id,
            name: key.name,
            environment: key.environment,
            scopes: key.scopes,
            created_at: Date(key.created_at_ms),
            expires_at: key.expires_at_ms.map(Date),
            last_used_at: key.last_used_at_ms.map(Date),
            disabled: key.disabled,
            revoked_at: key.revoked_at_ms.map(Date),
            revision: key.revision,
        }
    }
}

impl SecretView {
    fn of(secret: &KeySecret, key: &ApiKey, now_ms: i64) -> Self {
        SecretView {
            id: secret.id(),
            masked: format!("{}…{}", key.prefix, secret.last_four),
            state: match key.secret_state(secret, now_ms) {
                model::SecretState::Current => SecretState::Current,
                model::SecretState::Grace => SecretState::Grace,
                model::SecretState::Dead => SecretState::Dead,
            },
            created_at: Date(secret.created_at_ms),
            not_after: secret.not_after_ms.map(Date),
            last_used_at: secret.last_used_at_ms.map(Date),
        }
    }
}

impl AppliedView {
    pub(super) fn of(applied: Applied) -> Self {
        Self {
            gates: applied.gates,
            pending: applied.pending,
            silent: applied.silent,
        }
    }
}
