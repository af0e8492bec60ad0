//! The feed's source: the outbox that changes write into.

use async_trait::async_trait;
use sqlx::{Postgres, Transaction};
use tokio::sync::mpsc;

use super::retry::{Attempt, Failure, retry};
use super::{Change, PostgresStore, listen};
use crate::control::model::{AuditNote, Fault, GateState, REMEMBER_OUTCOME_MS, REMEMBER_REVOKED_MS};
use crate::control::store::{Changes, FeedStore, GateReport, News, SnapshotReader, Stamp};
use crate::wire::FeedLine;

#[async_trait]
impl FeedStore for PostgresStore {
    async fn revision(&self) -> Result<u64, Fault> {
        retry(|| async {
            let revision: i64 = sqlx::query_scalar("SELECT revision FROM feed_state")
                .fetch_one(&self.pools.general)
                .await?;
            Ok(revision as u64)
        })
        .await
    }

    async fn feed_changes(&self, after: u64, limit: u32) -> Result<Changes, Fault> {
        retry(|| self.try_feed_changes(after, limit)).await
    }

    async fn feed_snapshot(&self) -> Result<Box<dyn SnapshotReader>, Fault> {
        retry(|| self.try_feed_snapshot()).await
    }

    async fn prune(&self, now_ms: i64) -> Result<u64, Fault> {
        retry(|| self.try_prune(now_ms)).await
    }

    async fn resync(&self, beyond: u64, stamp: Stamp<'_>) -> Result<u64, Fault> {
        retry(|| async {
            let mut change = Change::begin(self).await?;
            // Below the largest that a bigint holds, whatever a gate claims.
            change.revision = change.revision.max(beyond.min(i64::MAX as u64 - 1));
            let revision = change.next_revision();
            sqlx::query("UPDATE feed_state SET oldest = $1")
                .bind(revision as i64)
                .execute(&mut *change.tx)
                .await?;
            let note = AuditNote {
                organization_id: None,
                action: "feed.resync",
                target_kind: "feed",
                target_id: String::new(),
                detail: serde_json::json!({ "revision": revision }),
            };
            change.audit(&note, stamp).await?;
            change.commit().await
        })
        .await
    }

    async fn gates(&self) -> Result<Vec<GateState>, Fault> {
        retry(|| self.try_gates()).await
    }

    async fn save_gates(&self, gates: &[GateReport]) -> Result<(), Fault> {
        retry(|| self.try_save_gates(gates)).await
    }

    async fn forget_gate(&self, name: &str, stamp: Stamp<'_>) -> Result<bool, Fault> {
        retry(|| self.try_forget_gate(name, stamp)).await
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn news(&self) -> Option<mpsc::Receiver<News>> {
        Some(listen::follow(self.pools.options.clone(), self.process.clone()))
    }
}

#[derive(sqlx::FromRow)]
struct ChangeRow {
    newest: i64,
    oldest: i64,
    /// None: there is no change.
    revision: Option<i64>,
    key_id: Option<String>,
    /// None: the key is gone.
    line: Option<String>,
}

impl PostgresStore {
    async fn try_feed_changes(&self, after: u64, limit: u32) -> Attempt<Changes> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        // One statement sees one state. Its first rows say how far that state reaches, also where there is no change.
        let rows: Vec<ChangeRow> = sqlx::query_as(
            "SELECT state.revision AS newest, state.oldest, told.revision, told.key_id, told.line
             FROM feed_state AS state LEFT JOIN LATERAL
                 (SELECT revision, key_id, line FROM feed_lines WHERE revision > $1
                  UNION ALL SELECT revision, key_id, NULL FROM feed_gone WHERE revision > $1
                  ORDER BY revision LIMIT $2) AS told ON true
             ORDER BY told.revision",
        )
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(&self.pools.general)
        .await?;
        let Some((newest, oldest)) = rows.first().map(|row| (row.newest, row.oldest)) else {
            return Err(Failure::Final(Fault::Internal("the feed has no state".into())));
        };
        if after > newest || after < oldest {
            return Ok(Changes::Resync);
        }
        let (mut text, mut count, mut last) = (String::new(), 0, newest);
        for row in rows {
            let (Some(revision), Some(id)) = (row.revision, row.key_id) else {
                break;
            };
            match row.line {
                Some(line) => text.push_str(&line),
                None => {
                    let revision = revision as u64;
                    let line = serde_json::to_string(&FeedLine::Gone { revision, id });
                    text.push_str(&line.map_err(|e| Fault::Internal(e.to_string()))?);
                }
            }
            text.push('\n');
            (count, last) = (count + 1, revision);
        }
        let through = if count < limit { newest } else { last } as u64;
        Ok(Changes::Lines { text, through })
    }

    async fn try_feed_snapshot(&self) -> Attempt<Box<dyn SnapshotReader>> {
        let statement = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";
        let mut tx = self.pools.snapshots.begin_with(statement).await?;
        // The first statement fixes what the whole transaction sees.
        let (revision, keys): (i64, i64) =
            sqlx::query_as("SELECT revision, (SELECT count(*) FROM feed_lines) FROM feed_state")
                .fetch_one(&mut *tx)
                .await?;
        Ok(Box::new(Snapshot {
            tx,
            revision: revision as u64,
            keys: keys as u64,
            read_through: 0,
        }))
    }

    async fn try_prune(&self, now_ms: i64) -> Attempt<u64> {
        let mut change = Change::begin(self).await?;
        let gone: Vec<String> = sqlx::query_scalar(
            "DELETE FROM feed_lines WHERE key_id IN
                 (SELECT id FROM keys WHERE revoked_at_ms <= $1 AND EXISTS (SELECT 1 FROM feed_lines WHERE key_id = id)
                  ORDER BY revoked_at_ms LIMIT 1000)
             RETURNING key_id",
        )
        .bind(now_ms - REMEMBER_REVOKED_MS)
        .fetch_all(&mut *change.tx)
        .await?;
        let revisions: Vec<i64> = gone.iter().map(|_| change.next_revision() as i64).collect();
        sqlx::query(
            "INSERT INTO feed_gone (revision, key_id, gone_at_ms)
             SELECT revision, key_id, $3 FROM unnest($1::bigint[], $2::text[]) AS gone (revision, key_id)",
        )
        .bind(revisions)
        .bind(gone)
        .bind(now_ms)
        .execute(&mut *change.tx)
        .await?;
        sqlx::query(
            "UPDATE feed_state SET oldest = newer.oldest
             FROM (SELECT max(revision) AS oldest FROM feed_gone WHERE gone_at_ms <= $1) AS newer
             WHERE newer.oldest > feed_state.oldest",
        )
        .bind(now_ms - REMEMBER_REVOKED_MS)
        .execute(&mut *change.tx)
        .await?;
        sqlx::query("DELETE FROM feed_gone WHERE revision <= (SELECT oldest FROM feed_state)")
            .execute(&mut *change.tx)
            .await?;
        sqlx::query("DELETE FROM idempotency WHERE created_at_ms <= $1")
            .bind(now_ms - REMEMBER_OUTCOME_MS)
            .execute(&mut *change.tx)
            .await?;
        sqlx::query("DELETE FROM sessions WHERE expires_at_ms <= $1")
            .bind(now_ms)
            .execute(&mut *change.tx)
            .await?;
        change.commit().await
    }
}

struct Snapshot {
    tx: Transaction<'static, Postgres>,
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
        // One row for a thousand keys, as on SQLite. An attempt that fails cannot be repeated: what the transaction saw
        // is gone with it. The gate begins anew.
        let piece = sqlx::query_as(
            r"SELECT string_agg(line, E'\n' ORDER BY revision), max(revision)
              FROM (SELECT revision, line FROM feed_lines WHERE revision > $1 ORDER BY revision LIMIT 1000) AS piece",
        )
        .bind(self.read_through)
        .fetch_one(&mut *self.tx)
        .await;
        let (lines, last): (Option<String>, Option<i64>) = match piece.map_err(Failure::from) {
            Ok(piece) => piece,
            Err(Failure::Final(fault)) => return Err(fault),
            Err(Failure::Conflict(why) | Failure::Lost(why)) => return Err(Fault::Unavailable(why)),
        };
        let (Some(mut lines), Some(last)) = (lines, last) else {
            return Ok(None);
        };
        lines.push('\n');
        self.read_through = last;
        Ok(Some(lines))
    }
}
