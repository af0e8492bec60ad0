//! The store on SQLite.
//!
//! One connection writes, several read: SQLite has one writer anyway, and a queue in front of it is fairer than its busy
//! handler. WAL lets readers go on beside the writer. `synchronous = FULL` makes every commit wait for the disk, so that
//! what was acknowledged survives the loss of power, not only of the process.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::migrate::{Migrate, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, Connection as _, Sqlite, Transaction};

use super::{MigrationState, Stamp, Store};
use crate::control::model::{AuditNote, Fault};
use crate::courtesy::Courtesy;

mod accounts;
mod audit;
mod backup;
mod feed;
mod keys;
mod ledger;
mod sessions;

pub use backup::backup;

/// The migrations, as they were when this binary was built.
pub static MIGRATIONS: Migrator = sqlx::migrate!("src/control/store/migrations/sqlite");

/// A database file and the connections to it.
pub struct SqliteStore {
    writer: SqlitePool,
    readers: SqlitePool,
    /// Apart from the readers, so that gates that load a million keys slowly do not starve the API.
    snapshots: SqlitePool,
    /// The database's file.
    file: PathBuf,
    _scratch: Option<Scratch>,
}

#[async_trait]
impl Store for SqliteStore {
    async fn close(&self) {
        self.readers.close().await;
        self.snapshots.close().await;
        // The last to go writes the log into the file, which those that only read could not.
        self.writer.close().await;
    }
}

impl SqliteStore {
    /// Opens `sqlite://…`, makes the file where there is none, and brings its schema up to date.
    pub async fn open(url: &str) -> Result<Self, Fault> {
        let (options, scratch) = options(url)?;
        let writer_options = options.clone().create_if_missing(true);
        let writer = pool(1).connect_with(writer_options).await.map_err(fault)?;
        let mut connection = writer.acquire().await.map_err(fault)?;
        // `run` is the same over any executor, and loses the compiler in its lifetimes.
        MIGRATIONS
            .run_direct(None, &mut *connection, false)
            .await
            .map_err(|e| Fault::Unavailable(format!("the schema cannot be updated: {e}")))?;
        drop(connection);
        backup::begin_new_life_if_restored(&writer).await?;
        let file = options.get_filename().to_path_buf();
        let read_only = options.read_only(true);
        let readers = pool(READERS).connect_lazy_with(read_only.clone());
        // A million keys are read nearly twice as fast through a map of the file. It counts as the process's memory while
        // it lasts, so these connections end soon after they were used.
        let mapped = read_only.pragma("mmap_size", MAPPED_BYTES.to_string());
        let snapshots = pool(SNAPSHOTS)
            .idle_timeout(Some(SNAPSHOT_IDLE))
            .connect_lazy_with(mapped);
        Ok(Self {
            writer,
            readers,
            snapshots,
            file,
            _scratch: scratch,
        })
    }

    /// Begins a change. Immediate: a transaction that reads first and writes later could fail halfway where another
    /// process had written in between.
    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, Fault> {
        begin(&self.writer, "BEGIN IMMEDIATE").await
    }

    /// Begins reading: all statements see the same state.
    async fn begin_reading(&self) -> Result<Transaction<'static, Sqlite>, Fault> {
        begin(&self.readers, "BEGIN").await
    }
}

/// The state of every migration; of a database that does not exist, none is applied.
pub async fn migration_states(url: &str) -> Result<Vec<MigrationState>, Fault> {
    let (options, _scratch) = options(url)?;
    let applied: Vec<i64> = if options.get_filename().exists() {
        // Not read-only: a database in WAL mode that nobody has open can then not be read, for want of its index file.
        let mut connection = options.connect().await.map_err(fault)?;
        let has_any =
            sqlx::query_scalar::<_, i64>("SELECT count(*) FROM sqlite_master WHERE name = '_sqlx_migrations'")
                .fetch_one(&mut connection)
                .await
                .map_err(fault)?;
        let applied = match has_any {
            0 => Vec::new(),
            _ => connection
                .list_applied_migrations("_sqlx_migrations")
                .await
                .map_err(|e| Fault::Unavailable(e.to_string()))?,
        };
        connection.close().await.map_err(fault)?;
        applied.into_iter().map(|m| m.version).collect()
    } else {
        Vec::new()
    };
    Ok(MigrationState::of(&MIGRATIONS, &applied))
}

/// Applies what is missing.
pub async fn migrate(url: &str) -> Result<(), Fault> {
    let (options, _scratch) = options(url)?;
    let mut connection = options.create_if_missing(true).connect().await.map_err(fault)?;
    MIGRATIONS
        .run(&mut connection)
        .await
        .map_err(|e| Fault::Unavailable(e.to_string()))?;
    connection.close().await.map_err(fault)
}

/// Connects to a database that is there already, and brings its schema up to date.
pub(super) async fn connect_to_existing(url: &str) -> Result<SqliteConnection, Fault> {
    let (options, _scratch) = options(url)?;
    if !options.get_filename().exists() {
        let message = format!("there is no database {}", options.get_filename().display());
        return Err(Fault::Unavailable(message));
    }
    migrate(url).await?;
    options.connect().await.map_err(fault)
}

/// A directory that ends with the store: what `sqlite::memory:` means here. A real file in memory has WAL and
/// independent readers, as in production; SQLite's own memory databases have neither.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            log::debug!("the scratch database {} was not removed: {error}", self.0.display());
        }
    }
}

fn options(url: &str) -> Result<(SqliteConnectOptions, Option<Scratch>), Fault> {
    let (options, scratch) = if url == "sqlite::memory:" {
        let scratch = scratch()?;
        (
            SqliteConnectOptions::new().filename(scratch.0.join("tollgate.db")),
            Some(scratch),
        )
    } else {
        let options =
            SqliteConnectOptions::from_str(url).map_err(|e| Fault::Unavailable(format!("the database's URL: {e}")))?;
        (options, None)
    };
    let options = options
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
        // 4 MiB of page cache for each connection; what lies beyond is in the system's cache.
        .pragma("cache_size", "-4096")
        .pragma("trusted_schema", "OFF")
        .optimize_on_close(true, None)
        // sqlx logs statements at debug level; bound values are not among them, but nobody needs the noise.
        .disable_statement_logging();
    Ok((options, scratch))
}

fn scratch() -> Result<Scratch, Fault> {
    use std::os::unix::fs::DirBuilderExt as _;
    let shared_memory = Path::new("/dev/shm");
    let base = if shared_memory.is_dir() {
        shared_memory.to_path_buf()
    } else {
        std::env::temp_dir()
    };
    let directory = base.join(crate::control::secret::id("tollgate-")?);
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .map_err(|e| Fault::Unavailable(format!("{}: {e}", directory.display())))?;
    Ok(Scratch(directory))
}

/// Begins a transaction.
///
/// SQLite ends a transaction by itself when the disk is full or fails. sqlx then still believes in it, its roll-back
/// fails, and the connection could never begin another one: such a connection is closed, and the pool opens a new one.
async fn begin(pool: &SqlitePool, statement: &'static str) -> Result<Transaction<'static, Sqlite>, Fault> {
    for _ in 0..=pool.options().get_max_connections() {
        match pool.begin_with(statement).await {
            Err(sqlx::Error::InvalidSavePointStatement) => {
                let stuck = pool.acquire().await.map_err(fault)?;
                stuck.close().await.map_err(fault)?;
            }
            begun => return begun.map_err(fault),
        }
    }
    Err(Fault::Unavailable("no connection could begin a transaction".to_owned()))
}

fn pool(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .min_connections(0)
        .acquire_timeout(BUSY_TIMEOUT)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .after_connect(|connection, _| Box::pin(give_way(connection)))
}

/// Has statements offer the processor while they run (`courtesy.rs`): one may go through a million rows.
async fn give_way(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    let mut courtesy = Courtesy::every(1);
    let offer = move || {
        courtesy.step();
        true
    };
    connection
        .lock_handle()
        .await?
        .set_progress_handler(STEPS_AT_ONCE, offer);
    Ok(())
}

/// Takes the next revision of the feed. Held until the commit: revisions appear in order and without gaps.
async fn next_revision(tx: &mut SqliteConnection) -> Result<u64, Fault> {
    sqlx::query_scalar::<_, i64>("UPDATE feed_state SET revision = revision + 1 RETURNING revision")
        .fetch_one(tx)
        .await
        .map(|revision| revision as u64)
        .map_err(fault)
}

async fn write_audit(tx: &mut SqliteConnection, note: &AuditNote, stamp: Stamp<'_>) -> Result<(), Fault> {
    let (kind, id, name) = stamp.caller.actor.parts();
    sqlx::query(
        "INSERT INTO audit (at_ms, organization_id, actor_kind, actor_id, actor_name, action, target_kind, target_id,
                            detail, address, user_agent, request_id)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
    .await
    .map(drop)
    .map_err(fault)
}

/// Tells what passes by itself (locked, full, no file, no free connection) from what is our bug.
fn fault(error: sqlx::Error) -> Fault {
    match &error {
        sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed => {
            Fault::Unavailable(error.to_string())
        }
        sqlx::Error::Database(database) => {
            // The primary result code is the low byte: https://sqlite.org/rescode.html
            let code = database.code().and_then(|c| c.parse::<u32>().ok()).unwrap_or(0) & 0xff;
            match code {
                BUSY | LOCKED | READ_ONLY | INPUT_OUTPUT | FULL | CANNOT_OPEN => Fault::Unavailable(error.to_string()),
                _ => Fault::Internal(error.to_string()),
            }
        }
        _ => Fault::Internal(error.to_string()),
    }
}

/// Whether an error says that a unique column has this value already.
fn is_taken(error: &sqlx::Error, column: &str) -> bool {
    matches!(error, sqlx::Error::Database(d) if d.is_unique_violation() && d.message().contains(column))
}

const BUSY: u32 = 5;
const LOCKED: u32 = 6;
const READ_ONLY: u32 = 8;
const INPUT_OUTPUT: u32 = 10;
const FULL: u32 = 13;
const CANNOT_OPEN: u32 = 14;

/// How long a request waits for the database before it is told that there is none. A gate's client waits no longer
/// than that either.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Reads of the API at once; each is a thread, and they take microseconds.
const READERS: u32 = 4;
/// How long a connection for snapshots is kept for the next one.
const SNAPSHOT_IDLE: Duration = Duration::from_secs(5);
/// How much of the file they map, and have read in advance: some 1.4 million keys and what is told of them.
const MAPPED_BYTES: u64 = 1 << 30;
/// Steps of SQLite's virtual machine between two offers of the processor: some 0.1 ms where they read rows of 300 bytes.
const STEPS_AT_ONCE: i32 = 250;
/// Snapshots for gates at once; further gates wait their turn.
const SNAPSHOTS: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::model::{Actor, Caller, Origin};
    use crate::control::store::{AccountStore as _, FeedStore as _, NewAccount};

    fn account(id: &str, name: String) -> NewAccount {
        let organization = crate::control::model::Organization {
            id: id.to_owned(),
            name,
            plan: "starter".into(),
            created_at_ms: 0,
        };
        let note = AuditNote {
            organization_id: Some(id.to_owned()),
            action: "organization.register",
            target_kind: "organization",
            target_id: id.to_owned(),
            detail: serde_json::json!({"padding": "x".repeat(20_000)}),
        };
        NewAccount {
            organization,
            user: None,
            key: None,
            invitation: None,
            note,
        }
    }

    #[tokio::test]
    async fn a_full_database_is_unavailable_and_nothing_is_half_done() {
        let store = SqliteStore::open("sqlite::memory:").await.unwrap();
        let caller = Caller {
            actor: Actor::System,
            origin: Origin::default(),
        };
        let stamp = Stamp {
            caller: &caller,
            now_ms: 0,
        };
        let pages: i64 = sqlx::query_scalar("PRAGMA page_count")
            .fetch_one(&store.writer)
            .await
            .unwrap();
        // The same error as from a full disk. The setting belongs to the one connection that writes.
        let limit = format!("PRAGMA max_page_count = {}", pages + 2);
        sqlx::query(sqlx::AssertSqlSafe(limit))
            .execute(&store.writer)
            .await
            .unwrap();
        let result = store.create_account(&account("org_1", "n".into()), stamp).await;
        assert!(matches!(result, Err(Fault::Unavailable(_))), "{result:?}");
        assert_eq!(store.organization("org_1").await.unwrap(), None);
        sqlx::query("PRAGMA max_page_count = 1000000")
            .execute(&store.writer)
            .await
            .unwrap();
        store
            .create_account(&account("org_1", "n".into()), stamp)
            .await
            .unwrap();
        assert!(store.organization("org_1").await.unwrap().is_some());
    }

    #[tokio::test]
    async fn the_database_is_set_up_as_promised() {
        let store = SqliteStore::open("sqlite::memory:").await.unwrap();
        let pragma = async |name: &str| {
            let statement = sqlx::AssertSqlSafe(format!("PRAGMA {name}"));
            let row: (String,) = sqlx::query_as(statement)
                .fetch_one(&store.writer)
                .await
                .unwrap_or_default();
            row.0
        };
        assert_eq!(pragma("journal_mode").await, "wal");
        let number = async |name: &str| {
            let statement = sqlx::AssertSqlSafe(format!("PRAGMA {name}"));
            sqlx::query_scalar::<_, i64>(statement)
                .fetch_one(&store.writer)
                .await
                .unwrap()
        };
        assert_eq!(number("foreign_keys").await, 1);
        assert_eq!(number("synchronous").await, 2, "FULL");
        assert_eq!(number("busy_timeout").await, 5_000);
        let loose: Vec<String> = sqlx::query_scalar(
            "SELECT name FROM pragma_table_list WHERE schema = 'main' AND strict = 0 AND name NOT LIKE 'sqlite_%'
             AND name NOT LIKE '_sqlx_%'",
        )
        .fetch_all(&store.writer)
        .await
        .unwrap();
        assert!(loose.is_empty(), "not STRICT: {loose:?}");
    }

    #[tokio::test]
    async fn a_snapshot_does_not_see_what_came_after_it() {
        let store = SqliteStore::open("sqlite::memory:").await.unwrap();
        let caller = Caller {
            actor: Actor::System,
            origin: Origin::default(),
        };
        let stamp = Stamp {
            caller: &caller,
            now_ms: 0,
        };
        let mut snapshot = store.feed_snapshot().await.unwrap();
        let mut with_key = account("org_1", "n".into());
        let environment = crate::control::settings::Environment {
            name: "live".into(),
            prefix: "pxk_live_".into(),
            billed: true,
        };
        let (key, _) =
            crate::control::service::keys::new_key("org_1", "k".into(), &environment, vec![], None, 0).unwrap();
        with_key.key = Some(key);
        assert_eq!(store.create_account(&with_key, stamp).await.unwrap(), 1);
        assert_eq!((snapshot.revision(), snapshot.keys()), (0, 0));
        assert_eq!(snapshot.next().await.unwrap(), None);
        let mut later = store.feed_snapshot().await.unwrap();
        assert_eq!((later.revision(), later.keys()), (1, 1));
        assert!(later.next().await.unwrap().unwrap().ends_with('\n'));
        assert_eq!(later.next().await.unwrap(), None);
    }
}
