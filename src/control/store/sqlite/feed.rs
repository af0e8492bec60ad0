//! The feed's source: the outbox that changes write into.

use std::num::NonZeroU64;
use std::path::Path;

use async_trait::async_trait;
use rustix::fs::{Advice, fadvise};
use sqlx::{Sqlite, Transaction};
use tokio::sync::mpsc;

use super::{MAPPED_BYTES, SqliteStore, begin, fault, next_revision, write_audit};
use crate::control::model::{AuditNote, Fault, GateState, REMEMBER_OUTCOME_MS, REMEMBER_REVOKED_MS};
use crate::control::store::{Changes, FeedStore, GateReport, News, SnapshotReader, Stamp};
use crate::wire::FeedLine;

#[async_trait]
impl FeedStore for SqliteStore {
    async fn revision(&self) -> Result<u64, Fault> {
        sqlx::query_scalar::<_, i64>("SELECT revision FROM feed_state")
            .fetch_one(&self.readers)
            .await
            .map(|revision| revision as u64)
            .map_err(fault)
    }

    async fn feed_changes(&self, after: u64, limit: u32) -> Result<Changes, Fault> {
        let mut tx = self.begin_reading().await?;
        let (newest, oldest): (i64, i64) = sqlx::query_as("SELECT revision, oldest FROM feed_state")
            .fetch_one(&mut *tx)
            .await
            .map_err(fault)?;
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        if after > newest || after < oldest {
            return Ok(Changes::Resync);
        }
        let rows: Vec<(i64, Option<String>, String)> = sqlx::query_as(
            "SELECT revision, line, key_id FROM feed_lines WHERE revision > ?1
             UNION ALL SELECT revision, NULL, key_id FROM feed_gone WHERE revision > ?1
             ORDER BY revision LIMIT ?2",
        )
        .bind(after)
        .bind(limit)
        .fetch_all(&mut *tx)
        .await
        .map_err(fault)?;
        let through = if rows.len() < limit as usize {
            newest
        } else {
            rows.last().map_or(newest, |row| row.0)
        };
        let mut text = String::new();
        for (revision, line, key_id) in rows {
            match line {
                Some(line) => text.push_str(&line),
                None => text.push_str(
                    &serde_json::to_string(&FeedLine::Gone {
                        revision: revision as u64,
                        id: key_id,
                    })
                    .map_err(|e| Fault::Internal(e.to_string()))?,
                ),
            }
            text.push('\n');
        }
        Ok(Changes::Lines {
            text,
            through: through as u64,
        })
    }

    async fn feed_snapshot(&self) -> Result<Box<dyn SnapshotReader>, Fault> {
        read_ahead(&self.file);
        let mut tx = begin(&self.snapshots, "BEGIN").await?;
        // The first statement fixes what the whole transaction sees. The condition, which always holds, has SQLite count
        // row by row: without one it counts in a single step, in which it cannot give way.
        let (revision, keys): (i64, i64) = sqlx::query_as(
            "SELECT revision, (SELECT count(*) FROM feed_lines WHERE key_id IS NOT NULL) FROM feed_state",
        )
        .fetch_one(&mut *tx)
        .await
        .map_err(fault)?;
        Ok(Box::new(Snapshot {
            tx,
            revision: revision as u64,
            keys: keys as u64,
            read_through: 0,
        }))
    }

    async fn prune(&self, now_ms: i64) -> Result<u64, Fault> {
        let mut tx = self.begin().await?;
        let gone: Vec<String> = sqlx::query_scalar(
            "SELECT id FROM keys JOIN feed_lines ON key_id = id WHERE revoked_at_ms <= ? ORDER BY revoked_at_ms LIMIT 1000",
        )
        .bind(now_ms - REMEMBER_REVOKED_MS)
        .fetch_all(&mut *tx)
        .await
        .map_err(fault)?;
        for id in gone {
            let revision = next_revision(&mut tx).await?;
            sqlx::query("DELETE FROM feed_lines WHERE key_id = ?")
                .bind(&id)
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
            sqlx::query("INSERT INTO feed_gone (revision, key_id, gone_at_ms) VALUES (?, ?, ?)")
                .bind(revision as i64)
                .bind(&id)
                .bind(now_ms)
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
        }
        sqlx::query(
            "UPDATE feed_state SET oldest =
                 max(oldest, coalesce((SELECT max(revision) FROM feed_gone WHERE gone_at_ms <= ?), 0))",
        )
        .bind(now_ms - REMEMBER_REVOKED_MS)
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
        sqlx::query("DELETE FROM feed_gone WHERE revision <= (SELECT oldest FROM feed_state)")
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        sqlx::query("DELETE FROM idempotency WHERE created_at_ms <= ?")
            .bind(now_ms - REMEMBER_OUTCOME_MS)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        sqlx::query("DELETE FROM sessions WHERE expires_at_ms <= ?")
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        let revision: i64 = sqlx::query_scalar("SELECT revision FROM feed_state")
            .fetch_one(&mut *tx)
            .await
            .map_err(fault)?;
        tx.commit().await.map_err(fault)?;
        Ok(revision as u64)
    }

    async fn resync(&self, beyond: u64, stamp: Stamp<'_>) -> Result<u64, Fault> {
        let mut tx = self.begin().await?;
        let revision: i64 =
            sqlx::query_scalar("UPDATE feed_state SET revision = max(revision, ?) + 1 RETURNING revision")
                .bind(i64::try_from(beyond).unwrap_or(i64::MAX - 1))
                .fetch_one(&mut *tx)
                .await
                .map_err(fault)?;
        sqlx::query("UPDATE feed_state SET oldest = revision")
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        let note = AuditNote {
            organization_id: None,
            action: "feed.resync",
            target_kind: "feed",
            target_id: String::new(),
            detail: serde_json::json!({ "revision": revision }),
        };
        write_audit(&mut tx, &note, stamp).await?;
        tx.commit().await.map_err(fault)?;
        Ok(revision as u64)
    }

    async fn gates(&self) -> Result<Vec<GateState>, Fault> {
        let rows: Vec<(String, Option<String>, i64, i64, i64)> =
            sqlx::query_as("SELECT name, version, revision, claimed, last_heard_at_ms FROM gates ORDER BY name")
                .fetch_all(&self.readers)
                .await
                .map_err(fault)?;
        Ok(rows
            .into_iter()
            .map(|(name, version, revision, claimed, last_heard_at_ms)| GateState {
                name,
                version,
                revision: revision as u64,
                claimed: claimed as u64,
                last_heard_at_ms,
                connected: false,
                live: false,
            })
            .collect())
    }

    async fn save_gates(&self, gates: &[GateReport]) -> Result<(), Fault> {
        let mut tx = self.begin().await?;
        for gate in gates {
            sqlx::query(
                "INSERT INTO gates (name, version, revision, claimed, last_heard_at_ms) VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (name) DO UPDATE SET version = coalesce(excluded.version, version),
                     revision = iif(?6, excluded.revision, max(revision, excluded.revision)),
                     claimed = excluded.claimed, last_heard_at_ms = max(last_heard_at_ms, excluded.last_heard_at_ms)",
            )
            .bind(&gate.name)
            .bind(&gate.version)
            .bind(gate.said.unwrap_or(0) as i64)
            .bind(gate.claimed as i64)
            .bind(gate.last_heard_at_ms)
            .bind(gate.begins)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        }
        tx.commit().await.map_err(fault)
    }

    async fn forget_gate(&self, name: &str, stamp: Stamp<'_>) -> Result<bool, Fault> {
        let mut tx = self.begin().await?;
        let deleted = sqlx::query("DELETE FROM gates WHERE name = ?")
            .bind(name)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        let note = AuditNote {
            organization_id: None,
            action: "gate.forget",
            target_kind: "gate",
            target_id: name.to_owned(),
            detail: serde_json::json!({}),
        };
        write_audit(&mut tx, &note, stamp).await?;
        tx.commit().await.map_err(fault)?;
        Ok(deleted.rows_affected() > 0)
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn news(&self) -> Option<mpsc::Receiver<News>> {
        None
    }
}

/// Has the system read the file into its cache, beside the caller: the lines of a million keys lie all over it, and
/// whoever walks through them alone waits for the disk at every step. What is in the cache already costs next to nothing.
fn read_ahead(file: &Path) {
    let file = file.to_path_buf();
    // Where the system's queue for the disk is full, it makes the caller wait.
    tokio::task::spawn_blocking(move || {
        let advised = std::fs::File::open(&file)
            .and_then(|file| Ok(fadvise(&file, 0, NonZeroU64::new(MAPPED_BYTES), Advice::WillNeed)?));
        if let Err(error) = advised {
            log::debug!("{} is not read in advance: {error}", file.display());
        }
    });
}

struct Snapshot {
    tx: Transaction<'static, Sqlite>,
    revision: u64,
    keys: u64,
    read_through: i64,
}

#[async_trait]
impl SnapshotReader for Snapshot {
    fn revision(&self) -> u64 {
        self.revision
    }

    fn keys(&self) -> u64 {
        self.keys
    }

    async fn next(&mut self) -> Result<Option<String>, Fault> {
        // SQLite joins the lines itself: one row for a hundred keys instead of a hundred rows, which is what makes a million
        // keys a matter of a second. No more than that, so that what is done with a piece at once, here and at the gate,
        // holds nobody up.
        let (lines, last): (Option<String>, Option<i64>) = sqlx::query_as(
            "SELECT group_concat(line, char(10)), max(revision)
             FROM (SELECT revision, line FROM feed_lines WHERE revision > ? ORDER BY revision LIMIT 100)",
        )
        .bind(self.read_through)
        .fetch_one(&mut *self.tx)
        .await
        .map_err(fault)?;
        let (Some(mut lines), Some(last)) = (lines, last) else {
            return Ok(None);
        };
        lines.push('\n');
        self.read_through = last;
        Ok(Some(lines))
    }
}
