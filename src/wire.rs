//! What is on the wire between a gate and the control plane: the feed's lines and the usage batches.
//!
//! Both ends use these types, so that they cannot drift apart; neither end keeps them beyond the wire.
//! Somebody's own key service can serve the same lines: see `manual/operations.md`.

use serde::{Deserialize, Serialize};

/// One line of the feed (newline-delimited JSON).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FeedLine {
    /// The start of a full snapshot: `keys` lines of type `key` follow, then `end`.
    Snapshot { revision: u64, keys: u64 },
    /// All about one key; a change is the whole line again at a higher revision.
    Key(KeyLine),
    /// Forget a key: 30 days after its revocation.
    Gone { revision: u64, id: String },
    /// The end of a snapshot: XXH3-64 (seed 0) of the bytes of its key lines, each with its newline, as 16 hex digits.
    End { xxh3: String },
    /// Sent every 5 s so that a silent connection is known to be dead; `revision` is the newest one.
    Heartbeat { revision: u64 },
}

/// All that a gate must know about one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyLine {
    #[serde(default)]
    pub revision: u64,
    pub id: String,
    #[serde(default)]
    pub organization: String,
    pub environment: String,
    #[serde(default)]
    pub scopes: Vec<String>,
    #[serde(default = "default_plan")]
    pub plan: String,
    pub secrets: Vec<SecretLine>,
    /// RFC 3339 in UTC with milliseconds, or null: never.
    #[serde(default)]
    pub expires_at: Option<String>,
    #[serde(default)]
    pub disabled: bool,
    #[serde(default)]
    pub revoked: bool,
}

/// One secret of a key: its digest, and the instant it dies if it is in its grace period.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretLine {
    /// SHA-256 of the secret, 64 hex digits.
    pub sha256: String,
    /// RFC 3339 in UTC with milliseconds: not accepted from this instant on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
}

/// The plan of a key line that names none.
pub fn default_plan() -> String {
    "starter".to_owned()
}

/// `POST /feed/v1/acks`: this gate has applied everything up to `revision`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    pub gate: String,
    pub revision: u64,
    /// The gate's version, for the operator's page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// `POST /feed/v1/usage`: what a gate has counted since its last batch. Applied once per (gate, run, sequence),
/// however often it is sent and in whatever order. `T` is the text in it: what is written may be borrowed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageBatch<T = String> {
    pub gate: T,
    /// A random number that names this life of the gate's counter: after a crash that lost its last
    /// sequence number a gate starts a new run at sequence 1, and is never mistaken for a repetition.
    pub run: T,
    pub sequence: u64,
    /// Permits given.
    #[serde(default = "Vec::new")]
    pub permits: Vec<PermitCount<T>>,
    /// Refusals, by code. Counted apart: a refused request is never billed.
    #[serde(default = "Vec::new")]
    pub refusals: Vec<RefusalCount<T>>,
    /// When each secret was last used.
    #[serde(default = "Vec::new")]
    pub last_used: Vec<LastUsed<T>>,
}

/// Permits of one key in one tier in one minute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PermitCount<T = String> {
    pub key: T,
    pub tier: T,
    pub environment: T,
    /// Minutes since the Unix epoch.
    pub minute: i64,
    pub count: u64,
}

/// Refusals of one code in one minute; `key` and `environment` are absent where no key was known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusalCount<T = String> {
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub key: Option<T>,
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub environment: Option<T>,
    pub tier: T,
    pub code: T,
    pub minute: i64,
    pub count: u64,
}

/// The last use of one secret of a key, named by the first 16 hex digits of its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastUsed<T = String> {
    pub key: T,
    pub secret: T,
    /// Milliseconds since the Unix epoch.
    pub at_ms: i64,
}
