//! Copies of the database, and what happens when one is put in the database's place.
//!
//! Gates refuse a revision that is older than theirs, and a restored database would count through revisions that they
//! have seen already with another meaning. So a copy carries a mark, and whoever opens it as a database begins a new
//! life: far above every revision of the earlier one, with a full snapshot for every gate. A database that was restored
//! by other means has no mark: then the operator says so (`POST /api/v1/admin/feed/resync`).

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool};
use sqlx::{ConnectOptions as _, Connection as _};

use super::{begin, fault, options, write_audit};
use crate::control::model::{Actor, AuditNote, Caller, Fault, Origin};
use crate::control::store::Stamp;

/// Writes a consistent, compacted copy to `target`, which must not exist, while the database is in use.
pub async fn backup(url: &str, target: &Path) -> Result<(), Fault> {
    let (options, _scratch) = options(url)?;
    let name = target
        .to_str()
        .ok_or_else(|| Fault::Unavailable("the target's name is not UTF-8".into()))?;
    let mut connection = options.connect().await.map_err(fault)?;
    make_private(target)?;
    let copied = sqlx::query("VACUUM INTO ?").bind(name).execute(&mut connection).await;
    if copied.is_err() {
        // Nothing of use is in it, and it would be in the next one's way.
        let _ = std::fs::remove_file(target);
    }
    copied.map_err(fault)?;
    connection.close().await.map_err(fault)?;
    // Without a log beside it: the copy is one file.
    let copy = SqliteConnectOptions::new()
        .filename(target)
        .journal_mode(SqliteJournalMode::Delete)
        .disable_statement_logging();
    let mut connection = copy.connect().await.map_err(fault)?;
    sqlx::query("INSERT INTO facts (name, value) VALUES (?, '') ON CONFLICT (name) DO NOTHING")
        .bind(MARK)
        .execute(&mut connection)
        .await
        .map_err(fault)?;
    connection.close().await.map_err(fault)
}

/// Makes an empty file, which SQLite takes as well as none, that only its owner can read: it will hold what the database
/// holds, and SQLite itself would leave the rights to the umask.
fn make_private(target: &Path) -> Result<(), Fault> {
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target);
    made.map(drop).map_err(|error| {
        Fault::Unavailable(match error.kind() {
            ErrorKind::AlreadyExists => format!("{} exists already", target.display()),
            _ => format!("{}: {error}", target.display()),
        })
    })
}

/// Takes the mark off a database that is a copy, and begins its new life.
pub async fn begin_new_life_if_restored(writer: &SqlitePool) -> Result<(), Fault> {
    let mut tx = begin(writer, "BEGIN IMMEDIATE").await?;
    let marks = sqlx::query("DELETE FROM facts WHERE name = ?")
        .bind(MARK)
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
    if marks.rows_affected() == 0 {
        return tx.rollback().await.map_err(fault);
    }
    let revision: i64 = sqlx::query_scalar("UPDATE feed_state SET revision = revision + ? RETURNING revision")
        .bind(NEW_LIFE)
        .fetch_one(&mut *tx)
        .await
        .map_err(fault)?;
    sqlx::query("UPDATE feed_state SET oldest = revision")
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
    let note = AuditNote {
        organization_id: None,
        action: "feed.restore",
        target_kind: "feed",
        target_id: String::new(),
        detail: serde_json::json!({ "revision": revision }),
    };
    let caller = Caller {
        actor: Actor::System,
        origin: Origin::default(),
    };
    let now_ms = jiff::Timestamp::now().as_millisecond();
    let stamp = Stamp {
        caller: &caller,
        now_ms,
    };
    write_audit(&mut tx, &note, stamp).await?;
    tx.commit().await.map_err(fault)?;
    log::warn!(
        "the database was restored from a backup: it goes on at revision {revision}, and every gate loads all keys anew; \
         what was changed after the backup, revocations too, is undone"
    );
    Ok(())
}

/// The fact that marks a copy.
const MARK: &str = "backup";
/// More changes than anybody makes between a backup and its use: a thousand a second for seven weeks. Revisions reach
/// 2^53, so there is room for two million lives.
const NEW_LIFE: i64 = 1 << 32;
