//! What the control plane speaks of: organisations, keys, callers, and the ways in which a wish can fail.
//! Nothing here knows HTTP, SQL or JSON bodies.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::secret::{Digest, hex};

/// Who signed up; owns users, keys and usage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Organization {
    pub id: String,
    pub name: String,
    pub plan: String,
    pub created_at_ms: i64,
}

/// A person who signs in for an organisation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub id: String,
    pub organization_id: String,
    pub email: String,
    pub created_at_ms: i64,
}

/// A key: an id that never changes, what it may do, and its secrets. Serialisable so that the outcome of a
/// request with an `Idempotency-Key` can be kept; there is no secret in it to keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    pub id: String,
    pub organization_id: String,
    pub name: String,
    pub environment: String,
    /// What its secrets begin with.
    pub prefix: String,
    pub scopes: Vec<String>,
    pub created_at_ms: i64,
    /// Refused from this instant on.
    pub expires_at_ms: Option<i64>,
    pub disabled: bool,
    pub revoked_at_ms: Option<i64>,
    pub last_used_at_ms: Option<i64>,
    /// The feed revision of its newest change.
    pub revision: u64,
    /// Newest first. Only the first may lack a date of death.
    pub secrets: Vec<KeySecret>,
}

/// What is known of one secret of a key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeySecret {
    pub digest: Digest,
    pub last_four: String,
    pub created_at_ms: i64,
    /// Refused from this instant on; none: as long as the key lives.
    pub not_after_ms: Option<i64>,
    pub last_used_at_ms: Option<i64>,
}

impl fmt::Debug for KeySecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySecret")
            .field("id", &self.id())
            .field("not_after_ms", &self.not_after_ms)
            .finish()
    }
}

impl KeySecret {
    /// The first 16 hex digits of the digest: names the secret without helping to guess it.
    pub fn id(&self) -> String {
        hex(&self.digest[..8])
    }

    /// Whether it is an old one that still works.
    pub fn in_grace(&self, now_ms: i64) -> bool {
        self.not_after_ms.is_some_and(|end| end > now_ms)
    }
}

impl ApiKey {
    /// How it stands at `now_ms`. Of several that fit, the gravest counts.
    pub fn status(&self, now_ms: i64) -> KeyStatus {
        if self.revoked_at_ms.is_some() {
            KeyStatus::Revoked
        } else if self.disabled {
            KeyStatus::Disabled
        } else if self.expires_at_ms.is_some_and(|end| end <= now_ms) {
            KeyStatus::Expired
        } else if self.secrets.iter().any(|s| s.in_grace(now_ms)) {
            KeyStatus::Rotating
        } else if self.expires_at_ms.is_some_and(|end| end <= now_ms + EXPIRING_WITHIN_MS) {
            KeyStatus::Expiring
        } else {
            KeyStatus::Active
        }
    }

    /// How one of its secrets stands at `now_ms`.
    pub fn secret_state(&self, secret: &KeySecret, now_ms: i64) -> SecretState {
        match secret.not_after_ms {
            _ if self.revoked_at_ms.is_some() => SecretState::Dead,
            None => SecretState::Current,
            Some(_) if secret.in_grace(now_ms) => SecretState::Grace,
            Some(_) => SecretState::Dead,
        }
    }
}

/// How a secret stands, whether or not its key is disabled or has expired: both can be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecretState {
    Current,
    /// An old one that still works.
    Grace,
    /// Refused for good: its grace is over, or its key is revoked.
    Dead,
}

/// How a key stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyStatus {
    Active,
    /// An old secret is in its grace period.
    Rotating,
    /// Expires within seven days.
    Expiring,
    Expired,
    Disabled,
    Revoked,
}

/// How long before its end a key counts as expiring: a week leaves a working day to act.
pub const EXPIRING_WITHIN_MS: i64 = 7 * 24 * 3_600_000;

/// Most secrets of one key that may be alive at once. The feed tells gates of ten, and may drop only dead ones.
pub const MOST_LIVING_SECRETS: usize = 10;

/// How long a revoked key is still told apart from an unknown one, and how long the feed remembers that it is gone.
pub const REMEMBER_REVOKED_MS: i64 = 30 * 24 * 3_600_000;

/// How long the outcome of a request with an `Idempotency-Key` is kept.
pub const REMEMBER_OUTCOME_MS: i64 = 24 * 3_600_000;

/// Who asks for a change, and from where.
#[derive(Clone, Debug)]
pub struct Caller {
    pub actor: Actor,
    pub origin: Origin,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// Nobody yet: a registration or a sign-in.
    Visitor,
    User {
        id: String,
        email: String,
    },
    Token {
        id: String,
        name: String,
    },
    /// Whoever holds the admin token.
    Operator,
    /// The control plane itself, or the `dev` command.
    System,
}

/// Where a request came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    pub address: Option<IpAddr>,
    /// At most 200 characters.
    pub user_agent: String,
    pub request_id: String,
}

/// Whom a request acts for, once it has shown a session or an access token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub organization_id: String,
    pub actor: Actor,
    /// The session, where it is one.
    pub session_id: Option<String>,
}

/// A signed-in browser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    pub id: String,
    pub user_id: String,
    pub created_at_ms: i64,
    pub last_used_at_ms: i64,
    pub expires_at_ms: i64,
    pub address: String,
    pub user_agent: String,
}

/// An access token for the control API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessToken {
    pub id: String,
    pub organization_id: String,
    pub name: String,
    pub last_four: String,
    pub created_at_ms: i64,
    pub expires_at_ms: Option<i64>,
    pub last_used_at_ms: Option<i64>,
}

/// Permission to register, where registration is by invitation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invitation {
    pub id: String,
    pub note: String,
    pub created_at_ms: i64,
    pub expires_at_ms: i64,
    pub used_at_ms: Option<i64>,
    pub used_by: Option<String>,
}

/// What is written down about a change, beside who made it and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditNote {
    pub organization_id: Option<String>,
    pub action: &'static str,
    pub target_kind: &'static str,
    pub target_id: String,
    /// What changed; never a secret.
    pub detail: serde_json::Value,
}

/// A line of the audit log as it is read.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditLine {
    pub serial: i64,
    pub at_ms: i64,
    pub organization_id: Option<String>,
    pub actor_kind: String,
    pub actor_id: String,
    pub actor_name: String,
    pub action: String,
    pub target_kind: String,
    pub target_id: String,
    pub detail: serde_json::Value,
    pub address: String,
    pub user_agent: String,
    pub request_id: String,
}

impl Actor {
    /// Its kind, id and name, as the audit log has them.
    pub fn parts(&self) -> (&'static str, &str, &str) {
        match self {
            Actor::Visitor => ("visitor", "", ""),
            Actor::User { id, email } => ("user", id, email),
            Actor::Token { id, name } => ("token", id, name),
            Actor::Operator => ("operator", "", ""),
            Actor::System => ("system", "", ""),
        }
    }
}

impl Origin {
    /// The address as text, empty where there is none.
    pub fn address_text(&self) -> String {
        self.address.map(|a| a.to_canonical().to_string()).unwrap_or_default()
    }
}

/// A gate as the operator sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateState {
    pub name: String,
    pub version: Option<String>,
    /// The newest revision that it said it had applied.
    pub revision: u64,
    /// A revision that it claims and that we never made, from a later life of a database that was restored since. It
    /// says nothing about what the gate knows of ours. 0: none.
    pub claimed: u64,
    pub last_heard_at_ms: i64,
    /// To this process or to another one that shares the store.
    pub connected: bool,
    pub live: bool,
}

/// Which gates have applied a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    pub gates: Vec<String>,
    /// Live gates that have not.
    pub pending: Vec<String>,
    /// Gates that were there in the last 24 hours, are not live, and have not acknowledged it: they may still serve
    /// from their spool. They are named, but not waited for.
    pub silent: Vec<String>,
}

/// Why a wish was not granted. The client's message comes from the variant; what a variant carries as text
/// is for the log, except for the faults of fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every field that is wrong.
    Validation(Vec<FieldFault>),
    /// There is no such thing, or it belongs to somebody else.
    NotFound,
    EmailTaken,
    /// Unknown e-mail or wrong password: deliberately one fault.
    WrongCredentials,
    RegistrationClosed,
    InvitationInvalid,
    KeyRevoked,
    TooManyLivingSecrets,
    /// An organisation has as many of these as it may.
    TooMany {
        what: &'static str,
        limit: u64,
    },
    IdempotencyKeyReused,
    Throttled {
        retry_after_s: u64,
    },
    /// Too much expensive work is waiting already.
    Busy,
    /// The database is locked, full or away.
    Unavailable(String),
    Internal(String),
}

/// What is wrong with one field of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldFault {
    pub field: String,
    /// A sentence fragment that follows the field's name.
    pub message: String,
}

impl FieldFault {
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
        }
    }
}

impl Fault {
    /// A fault of one field.
    pub fn field(field: &str, message: impl Into<String>) -> Self {
        Fault::Validation(vec![FieldFault::new(field, message)])
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Validation(faults) => {
                f.write_str("wrong fields:")?;
                faults
                    .iter()
                    .try_for_each(|fault| write!(f, " {} {};", fault.field, fault.message))
            }
            Fault::NotFound => f.write_str("not found"),
            Fault::EmailTaken => f.write_str("the e-mail address has an account"),
            Fault::WrongCredentials => f.write_str("wrong e-mail address or password"),
            Fault::RegistrationClosed => f.write_str("registration is closed"),
            Fault::InvitationInvalid => f.write_str("the invitation is unknown, used or expired"),
            Fault::KeyRevoked => f.write_str("the key is revoked"),
            Fault::TooManyLivingSecrets => f.write_str("the key has too many living secrets"),
            Fault::TooMany { what, limit } => write!(f, "more than {limit} {what}"),
            Fault::IdempotencyKeyReused => f.write_str("the idempotency key belongs to a different request"),
            Fault::Throttled { retry_after_s } => write!(f, "throttled for {retry_after_s} s"),
            Fault::Busy => f.write_str("too much work is waiting"),
            Fault::Unavailable(why) => write!(f, "the database is unavailable: {why}"),
            Fault::Internal(why) => write!(f, "internal fault: {why}"),
        }
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> ApiKey {
        let secret = |not_after_ms| KeySecret {
            digest: [7; 32],
            last_four: "abcd".into(),
            created_at_ms: 0,
            not_after_ms,
            last_used_at_ms: None,
        };
        ApiKey {
            id: "key_1".into(),
            organization_id: "org_1".into(),
            name: "n".into(),
            environment: "live".into(),
            prefix: "pxk_live_".into(),
            scopes: vec![],
            created_at_ms: 0,
            expires_at_ms: None,
            disabled: false,
            revoked_at_ms: None,
            last_used_at_ms: None,
            revision: 1,
            secrets: vec![secret(None), secret(Some(1_000))],
        }
    }

    #[test]
    fn the_gravest_status_counts_and_ends_are_exact() {
        let mut key = key();
        assert_eq!(key.status(999), KeyStatus::Rotating);
        assert_eq!(key.status(1_000), KeyStatus::Active);
        key.expires_at_ms = Some(2_000 + EXPIRING_WITHIN_MS);
        assert_eq!(key.status(1_999), KeyStatus::Active);
        assert_eq!(key.status(2_000), KeyStatus::Expiring);
        assert_eq!(key.status(2_000 + EXPIRING_WITHIN_MS), KeyStatus::Expired);
        key.disabled = true;
        assert_eq!(key.status(0), KeyStatus::Disabled);
        key.revoked_at_ms = Some(5);
        assert_eq!(key.status(0), KeyStatus::Revoked);
    }
}
