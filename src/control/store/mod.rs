//! What is kept, behind one trait per subject: on SQLite for one process, on PostgreSQL for any number of them. One
//! contract suite, `tests/store`, runs on both.
//!
//! Every method is one transaction. A change writes, in that transaction, the rows, the feed line that tells the gates,
//! the audit line and the outcome for its `Idempotency-Key`: all of it is there afterwards or none of it.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use sqlx::migrate::Migrator;
use tokio::sync::mpsc;

use super::model::{
    AccessToken, ApiKey, AuditLine, AuditNote, Caller, Fault, GateState, Invitation, KeyStatus, Organization, Session,
    User,
};
use super::secret::Digest;
use crate::wire::UsageBatch;

pub mod copy;
mod line;
pub mod postgres;
mod rows;
pub mod sqlite;
mod stretch;

/// Opens the database at `sqlite://…` or `postgres://…` and brings its schema up to date.
///
/// # Errors
/// [`Fault::Unavailable`] if it cannot be opened.
pub async fn open(url: &str) -> Result<Arc<dyn Store>, Fault> {
    Ok(match Engine::of(url) {
        Engine::Sqlite => Arc::new(sqlite::SqliteStore::open(url).await?),
        Engine::Postgres => Arc::new(postgres::PostgresStore::open(url).await?),
    })
}

/// Which migrations the database at `url` has, and which it lacks. Of a file that does not exist it lacks all.
///
/// # Errors
/// [`Fault::Unavailable`] if it cannot be read.
pub async fn migration_states(url: &str) -> Result<Vec<MigrationState>, Fault> {
    match Engine::of(url) {
        Engine::Sqlite => sqlite::migration_states(url).await,
        Engine::Postgres => postgres::migration_states(url).await,
    }
}

/// Applies the migrations that the database at `url` lacks.
///
/// # Errors
/// [`Fault::Unavailable`] if it cannot be written.
pub async fn migrate(url: &str) -> Result<(), Fault> {
    match Engine::of(url) {
        Engine::Sqlite => sqlite::migrate(url).await,
        Engine::Postgres => postgres::migrate(url).await,
    }
}

/// Copies a SQLite database to the new file `target`, consistently and while it is in use.
///
/// # Errors
/// [`Fault::Unavailable`] if it cannot be read or written, and on PostgreSQL: its own tools do that better.
pub async fn backup(url: &str, target: &Path) -> Result<(), Fault> {
    match Engine::of(url) {
        Engine::Sqlite => sqlite::backup(url, target).await,
        Engine::Postgres => Err(Fault::Unavailable(format!(
            "this copies SQLite files only; PostgreSQL has a tool of its own for that, which is as consistent: \
             pg_dump --format=custom --file={} DATABASE (and pg_restore to restore it)",
            target.display()
        ))),
    }
}

enum Engine {
    Sqlite,
    Postgres,
}

impl Engine {
    fn of(url: &str) -> Self {
        match url.split(':').next() {
            Some("postgres" | "postgresql") => Engine::Postgres,
            _ => Engine::Sqlite,
        }
    }
}

/// Whether a database has a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationState {
    pub version: i64,
    pub description: String,
    pub applied: bool,
}

impl MigrationState {
    fn of(known: &Migrator, applied: &[i64]) -> Vec<Self> {
        let state = |migration: &sqlx::migrate::Migration| Self {
            version: migration.version,
            description: migration.description.to_string(),
            applied: applied.contains(&migration.version),
        };
        known.iter().map(state).collect()
    }
}

/// Everything a store does.
#[async_trait]
pub trait Store: AccountStore + SessionStore + KeyStore + AuditStore + LedgerStore + FeedStore + 'static {
    /// Ends its connections, once what they do is done; a SQLite database is then one file, without a log beside it. What is
    /// asked of the store afterwards fails.
    async fn close(&self);
}

/// Who makes a change, and when.
#[derive(Clone, Copy, Debug)]
pub struct Stamp<'a> {
    pub caller: &'a Caller,
    pub now_ms: i64,
}

/// Organisations, their first users, invitations.
#[async_trait]
pub trait AccountStore: Send + Sync {
    /// Makes an organisation, with its first user and key where given. Answers the feed revision.
    /// [`Fault::EmailTaken`], [`Fault::InvitationInvalid`].
    async fn create_account(&self, account: &NewAccount, stamp: Stamp<'_>) -> Result<u64, Fault>;
    async fn organization(&self, id: &str) -> Result<Option<Organization>, Fault>;
    async fn organizations(&self, page: &OrganizationQuery) -> Result<Vec<Organization>, Fault>;
    /// Changes name or plan; a new plan is told to every gate for every key. Answers the newest revision.
    async fn edit_organization(
        &self,
        id: &str,
        name: Option<&str>,
        plan: Option<&str>,
        stamp: Stamp<'_>,
    ) -> Result<Option<(Organization, u64)>, Fault>;
    async fn create_invitation(&self, invitation: &Invitation, digest: &Digest, stamp: Stamp<'_>) -> Result<(), Fault>;
    async fn invitations(&self, after: Option<&(i64, String)>, limit: u32) -> Result<Vec<Invitation>, Fault>;
    async fn delete_invitation(&self, id: &str, stamp: Stamp<'_>) -> Result<bool, Fault>;
    async fn fact(&self, name: &str) -> Result<Option<String>, Fault>;
    async fn set_fact(&self, name: &str, value: &str) -> Result<(), Fault>;
}

/// Passwords, sessions, access tokens.
#[async_trait]
pub trait SessionStore: Send + Sync {
    async fn credentials_by_email(&self, email: &str) -> Result<Option<Credentials>, Fault>;
    async fn credentials_by_user(&self, user_id: &str) -> Result<Option<Credentials>, Fault>;
    /// Sets the password and ends every session of the user, then begins `session`.
    async fn change_password(
        &self,
        user_id: &str,
        password_hash: &str,
        session: &NewSession,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault>;
    /// Begins a session, and ends the one that the browser brought along.
    async fn begin_session(
        &self,
        session: &NewSession,
        replaced: Option<&Digest>,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault>;
    async fn session(&self, digest: &Digest, now_ms: i64) -> Result<Option<(Session, User)>, Fault>;
    async fn touch_session(&self, id: &str, now_ms: i64) -> Result<(), Fault>;
    async fn sessions(&self, user_id: &str, now_ms: i64) -> Result<Vec<Session>, Fault>;
    /// Ends one session of the user, or all but one.
    async fn end_sessions(&self, user_id: &str, which: EndSessions<'_>, stamp: Stamp<'_>) -> Result<u64, Fault>;
    /// [`Fault::TooMany`].
    async fn create_token(
        &self,
        token: &AccessToken,
        digest: &Digest,
        limit: u64,
        stamp: Stamp<'_>,
    ) -> Result<(), Fault>;
    async fn tokens(&self, organization_id: &str) -> Result<Vec<AccessToken>, Fault>;
    async fn token(&self, digest: &Digest, now_ms: i64) -> Result<Option<AccessToken>, Fault>;
    async fn touch_token(&self, id: &str, now_ms: i64) -> Result<(), Fault>;
    async fn delete_token(&self, organization_id: &str, id: &str, stamp: Stamp<'_>) -> Result<bool, Fault>;
}

/// What makes an account.
pub struct NewAccount {
    pub organization: Organization,
    /// With the hash of the password.
    pub user: Option<(User, String)>,
    pub key: Option<ApiKey>,
    /// The invitation to use up.
    pub invitation: Option<Digest>,
    pub note: AuditNote,
}

/// What a password is checked against.
pub struct Credentials {
    pub user: User,
    pub password_hash: String,
}

/// A session to begin.
pub struct NewSession {
    pub session: Session,
    pub digest: Digest,
}

/// Which sessions to end.
#[derive(Clone, Copy, Debug)]
pub enum EndSessions<'a> {
    One(&'a str),
    AllBut(&'a str),
}

/// Sessions of one user: more than anybody has browsers. The longest unused give way to new ones.
pub const MOST_SESSIONS: i64 = 50;

/// A page of organisations, oldest first.
#[derive(Clone, Debug, Default)]
pub struct OrganizationQuery {
    /// Part of a name or a whole id.
    pub search: Option<String>,
    pub after: Option<(i64, String)>,
    pub limit: u32,
}

/// Keys.
#[async_trait]
pub trait KeyStore: Send + Sync {
    /// [`Fault::TooMany`], [`Fault::IdempotencyKeyReused`].
    async fn create_key(
        &self,
        key: &ApiKey,
        limit: u64,
        claim: Option<&Claim<'_>>,
        note: &AuditNote,
        stamp: Stamp<'_>,
    ) -> Result<Written, Fault>;
    /// Loads the key, lets `edit` change it, and writes it back under a new revision; nothing is written where `edit`
    /// changed nothing. `organization` of none is the operator's reach. [`Fault::NotFound`], or what `edit` says.
    async fn edit_key(
        &self,
        organization: Option<&str>,
        id: &str,
        edit: &KeyEdit<'_>,
        claim: Option<&Claim<'_>>,
        stamp: Stamp<'_>,
    ) -> Result<Written, Fault>;
    async fn key(&self, organization: Option<&str>, id: &str) -> Result<Option<ApiKey>, Fault>;
    async fn keys(&self, query: &KeyQuery) -> Result<Vec<ApiKey>, Fault>;
    /// The outcome kept for an `Idempotency-Key`. [`Fault::IdempotencyKeyReused`].
    async fn outcome(&self, organization: &str, claim: &Claim<'_>, now_ms: i64) -> Result<Option<String>, Fault>;
}

/// Changes a key in place and says what to write into the audit log. Pure: an engine may have to run it again.
pub type KeyEdit<'a> = dyn Fn(&mut ApiKey) -> Result<AuditNote, Fault> + Send + Sync + 'a;

/// An `Idempotency-Key`, what it was sent with, and how the outcome is written down.
pub struct Claim<'a> {
    /// What was asked for, such as `create`.
    pub operation: String,
    pub idempotency_key: &'a str,
    /// Digest of the request's meaning.
    pub fingerprint: Digest,
    pub record: &'a (dyn Fn(&ApiKey) -> Result<String, Fault> + Send + Sync),
}

/// What became of a change.
#[derive(Debug)]
pub enum Written {
    Done(Box<ApiKey>),
    /// The same request was carried out before; this is what was recorded of it.
    Replayed(String),
}

/// A page of keys.
#[derive(Clone, Debug)]
pub struct KeyQuery {
    pub organization: Option<String>,
    pub environment: Option<String>,
    pub scope: Option<String>,
    pub status: Option<KeyStatus>,
    /// Part of a name, a whole id, or a secret's last four characters.
    pub search: Option<String>,
    pub sort: KeySort,
    pub descending: bool,
    /// The sort value and id of the last key of the page before.
    pub after: Option<(SortValue, String)>,
    pub limit: u32,
    /// What `status` is judged at.
    pub now_ms: i64,
}

/// What keys are sorted by; ties by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeySort {
    CreatedAt,
    Name,
    /// Never used sorts as the longest ago.
    LastUsedAt,
    /// Never expiring sorts as the farthest ahead.
    ExpiresAt,
}

/// Where a page of keys ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SortValue {
    Number(i64),
    Text(String),
}

/// The audit log.
#[async_trait]
pub trait AuditStore: Send + Sync {
    /// Newest first.
    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditLine>, Fault>;
    /// Forgets those of the `most` oldest lines that are from before `before_ms`. Answers how many.
    async fn forget_audit(&self, before_ms: i64, most: u32) -> Result<u64, Fault>;
}

/// A page of the audit log.
#[derive(Clone, Debug, Default)]
pub struct AuditQuery {
    pub organization: Option<String>,
    pub action: Option<String>,
    pub target: Option<String>,
    pub actor: Option<String>,
    pub from_ms: Option<i64>,
    pub to_ms: Option<i64>,
    /// The serial of the last line of the page before.
    pub before: Option<i64>,
    pub limit: u32,
}

/// The ledger.
#[async_trait]
pub trait LedgerStore: Send + Sync {
    /// Adds a batch, unless it is in the ledger already; answers whether it was new.
    async fn apply_usage(&self, batch: &UsageBatch, now_ms: i64) -> Result<bool, Fault>;
    /// Totals by bucket and group, at most `limit` + 1 rows of each kind.
    async fn usage(&self, query: &UsageQuery) -> Result<UsageRows, Fault>;
    /// The oldest minute that there is usage of.
    async fn oldest_usage(&self) -> Result<Option<i64>, Fault>;
    /// Adds up what was used in the hour that begins with the minute `hour`, as if all had been in that minute: of one
    /// organisation, the first after `after` where something is to be added up. Answers which; none is left: `None`.
    async fn fold_usage(&self, hour: i64, after: Option<&str>) -> Result<Option<String>, Fault>;
}

/// What is asked of the ledger. Minutes since the epoch; `to` is excluded.
#[derive(Clone, Debug)]
pub struct UsageQuery {
    pub organization: String,
    pub from_minute: i64,
    pub to_minute: i64,
    /// 1, 60 or 1440.
    pub bucket_minutes: i64,
    pub by_key: bool,
    pub by_tier: bool,
    pub key: Option<String>,
    pub tier: Option<String>,
    pub environment: Option<String>,
    pub limit: u32,
}

/// Rows of the ledger, by bucket. The environment is always told apart, since only some are billable.
#[derive(Clone, Debug, Default)]
pub struct UsageRows {
    pub permits: Vec<UsageRow>,
    /// With the code of the refusal.
    pub refusals: Vec<(UsageRow, String)>,
}

/// One row: empty strings for what was not asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRow {
    pub minute: i64,
    pub key: String,
    pub tier: String,
    pub environment: String,
    pub count: u64,
}

/// The feed's source.
#[async_trait]
pub trait FeedStore: Send + Sync {
    /// The newest revision.
    async fn revision(&self) -> Result<u64, Fault>;
    /// At most `limit` lines after a revision, in order.
    async fn feed_changes(&self, after: u64, limit: u32) -> Result<Changes, Fault>;
    /// Begins reading all keys as they are at one revision.
    async fn feed_snapshot(&self) -> Result<Box<dyn SnapshotReader>, Fault>;
    /// Tells gates to forget what was revoked long ago, and forgets other things whose time is over.
    /// Answers the newest revision.
    async fn prune(&self, now_ms: i64) -> Result<u64, Fault>;
    /// Raises the revision beyond `beyond` and everything known, and makes every gate that is not there need a full
    /// snapshot. Answers the new revision.
    async fn resync(&self, beyond: u64, stamp: Stamp<'_>) -> Result<u64, Fault>;
    /// The gates that were saved, by name; connected are those of other processes that share the store. Whether one
    /// counts as live is not the store's to say.
    async fn gates(&self) -> Result<Vec<GateState>, Fault>;
    /// Adds what this process was told to what is known of gates.
    async fn save_gates(&self, gates: &[GateReport]) -> Result<(), Fault>;
    async fn forget_gate(&self, name: &str, stamp: Stamp<'_>) -> Result<bool, Fault>;
    /// Whether other processes may use the store at the same time.
    fn is_shared(&self) -> bool;
    /// What processes that share the store change, this one among them, until the receiver is dropped. None: it
    /// is not shared. It is a reason to look and no more: some may get lost.
    fn news(&self) -> Option<mpsc::Receiver<News>>;
}

/// What a gate has said to this process since it was last saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateReport {
    pub name: String,
    /// None: it has not said.
    pub version: Option<String>,
    /// The newest revision that it said it had applied. None: it has said nothing of that.
    pub said: Option<u64>,
    /// It has connected anew: `said` replaces what was known, also where that was more. Otherwise the higher counts.
    pub begins: bool,
    /// A revision that it claims and that was never made here; 0: none.
    pub claimed: u64,
    pub last_heard_at_ms: i64,
    /// Whether this process holds its connection.
    pub connected: bool,
}

/// What has changed in a store that several processes share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// This revision is committed.
    Revision(u64),
    /// These gates are known so now.
    Gates(Vec<GateState>),
    /// Anything may have changed.
    Unknown,
}

/// Lines after a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changes {
    /// The revision is too old or unknown: a full snapshot is needed.
    Resync,
    /// JSON lines, each ended by a newline, up to and including revision `through`.
    Lines { text: String, through: u64 },
}

/// Reads one consistent snapshot, a piece at a time.
#[async_trait]
pub trait SnapshotReader: Send {
    fn revision(&self) -> u64;
    fn keys(&self) -> u64;
    /// The next key lines, each ended by a newline; none at the end.
    async fn next(&mut self) -> Result<Option<String>, Fault>;
}
