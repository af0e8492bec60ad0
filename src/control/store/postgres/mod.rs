//! The store on PostgreSQL, which any number of control planes may share.
//!
//! # What must hold, and why it does
//!
//! A gate asks for everything after revision R and never asks for R or less again. So **revisions must become visible
//! in their order**: if 8 were committed before 7, a gate that read in between would go on after 8 and never hear of 7.
//! A sequence or a timestamp taken in a transaction promises no such thing, since transactions commit in any order.
//! Here the revision is the one row of `feed_state`, and every change begins by locking that row ([`Change::begin`]) and
//! holds it until its commit:
//!
//! - two changes are never under way at once, in whatever process, so the one with revision 8 begins when 7 is
//!   committed or gone. PostgreSQL makes a transaction visible *before* it releases its locks, so whoever sees 8 sees 7;
//! - a change that fails takes its revision back with it, for it is a row and not a sequence: there are no gaps;
//! - a change reads what the one before it has left. `READ COMMITTED` takes a new snapshot for each statement, and the
//!   first one after the lock is granted sees everything committed by then. So limits that are counted and then
//!   inserted, outcomes that are looked for and then recorded, a plan that is read into a key's line: none of them can
//!   be overtaken, just as with SQLite's one writer;
//! - `SERIALIZABLE` would promise less for more: it orders transactions, but not their commits as a reader of the feed
//!   sees them, and every second change would fail on `feed_state` and begin again.
//!
//! The price is that keys change one after another: about a millisecond each, a thousand a second. Reading, signing in,
//! and the ledger do not wait for it.
//!
//! | transaction | locks, in this order |
//! |---|---|
//! | a change (accounts, keys, invitations, `prune`, `resync`) | `feed_state`, then the rows of keys it changes |
//! | sessions, passwords | the user's row |
//! | access tokens | the organisation's row |
//! | a batch of usage | its run's row, then rows of the ledger in the order of their primary key |
//! | last uses (their own short transactions) | rows of keys in the order of their ids |
//! | gates | their rows in the order of their names |
//!
//! No lock is asked for against this order, so a deadlock is not expected; one that comes nevertheless (40P01), a
//! serialisation failure (40001) and a connection that was lost before the commit was asked for are tried again, a bounded
//! number of times (`retry`). A connection that is lost while a commit is on its way leaves open what became of it: that
//! is told (503), and an `Idempotency-Key` makes asking again harmless.
//!
//! Columns are named in every statement, never `*`: a newer version may add some while an older one still runs.

use async_trait::async_trait;
use sqlx::{PgConnection, Postgres, Transaction};

use super::{Stamp, Store};
use crate::control::model::{AuditNote, Fault};

mod accounts;
mod audit;
mod connect;
mod feed;
mod gates;
mod keys;
mod ledger;
mod listen;
mod retry;
mod schema;
mod sessions;

pub use schema::{migrate, migration_states};

pub(in crate::control::store) use connect::patient as connect_patiently;

use connect::Pools;
use retry::{Attempt, Failure};

/// A database and the connections to it.
pub struct PostgresStore {
    pools: Pools,
    /// Names this process among those that share the database.
    process: String,
}

#[async_trait]
impl Store for PostgresStore {
    async fn close(&self) {
        let Pools {
            general,
            changes,
            snapshots,
            ..
        } = &self.pools;
        for pool in [snapshots, changes, general] {
            pool.close().await;
        }
    }
}

impl PostgresStore {
    /// Connects to `postgres://…` and brings its schema up to date. Several processes may do so at once.
    ///
    /// # Errors
    /// [`Fault::Unavailable`] if there is no such database or it has a schema of a newer version.
    pub async fn open(url: &str) -> Result<Self, Fault> {
        migrate(url).await?;
        Ok(Self {
            pools: Pools::open(url)?,
            process: crate::control::secret::id("cp_")?,
        })
    }

    /// Begins a transaction that locks by itself what it must.
    async fn begin(&self) -> Attempt<Transaction<'static, Postgres>> {
        Ok(self
            .pools
            .general
            .begin_with("BEGIN ISOLATION LEVEL READ COMMITTED")
            .await?)
    }

    /// Begins reading: all statements see the same state.
    async fn begin_reading(&self) -> Attempt<Transaction<'static, Postgres>> {
        let statement = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        Ok(self.pools.general.begin_with(statement).await?)
    }
}

/// A change to what gates are told: the only one under way until it is committed or dropped.
struct Change {
    tx: Transaction<'static, Postgres>,
    committed: u64,
    revision: u64,
}

impl Change {
    /// Waits until no other change is under way.
    async fn begin(store: &PostgresStore) -> Attempt<Self> {
        let mut tx = store
            .pools
            .changes
            .begin_with("BEGIN ISOLATION LEVEL READ COMMITTED")
            .await?;
        let revision: i64 = sqlx::query_scalar("SELECT revision FROM feed_state FOR UPDATE")
            .fetch_one(&mut *tx)
            .await?;
        Ok(Self {
            tx,
            committed: revision as u64,
            revision: revision as u64,
        })
    }

    /// The next revision. It is written down at the commit; until then nobody else can take one.
    fn next_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    async fn audit(&mut self, note: &AuditNote, stamp: Stamp<'_>) -> Attempt<()> {
        write_audit(&mut self.tx, note, stamp).await
    }

    /// Commits, and tells every process that follows the feed. Answers the newest revision.
    async fn commit(mut self) -> Attempt<u64> {
        if self.revision > self.committed {
            // Notifications are sent at the commit, and in the order of commits.
            sqlx::query(
                "WITH told AS (UPDATE feed_state SET revision = $1 RETURNING revision)
                 SELECT pg_notify($2, revision::text) FROM told",
            )
            .bind(self.revision as i64)
            .bind(listen::FEED)
            .execute(&mut *self.tx)
            .await?;
        }
        commit(self.tx).await?;
        Ok(self.revision)
    }
}

/// Commits. A connection that is lost meanwhile leaves open what became of it, so that is no reason to try again.
async fn commit(tx: Transaction<'static, Postgres>) -> Attempt<()> {
    tx.commit().await.map_err(|error| match Failure::from(error) {
        Failure::Lost(why) => Failure::Final(Fault::Unavailable(format!(
            "the connection was lost during a commit, so it is not known whether the change was made: {why}"
        ))),
        other => other,
    })
}

async fn write_audit(tx: &mut PgConnection, note: &AuditNote, stamp: Stamp<'_>) -> Attempt<()> {
    let (kind, id, name) = stamp.caller.actor.parts();
    sqlx::query(
        "INSERT INTO audit (at_ms, organization_id, actor_kind, actor_id, actor_name, action, target_kind, target_id,
                            detail, address, user_agent, request_id)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9::jsonb, $10, $11, $12)",
    )
    .bind(stamp.now_ms)
    .bind(&note.organization_id)
    .bind(kind)
    .bind(id)
    .bind(name)
    .bind(note.action)
    .bind(note.target_kind)
    .bind(&note.target_id)
    .bind(note.detail.to_string())
    .bind(stamp.caller.origin.address_text())
    .bind(&stamp.caller.origin.user_agent)
    .bind(&stamp.caller.origin.request_id)
    .execute(tx)
    .await?;
    Ok(())
}

/// Whether a text cannot be in the database, since PostgreSQL's text holds no NUL: what is asked for by it is not there.
fn is_nowhere(asked: &[Option<&str>]) -> bool {
    asked.iter().flatten().any(|text| text.contains('\0'))
}
