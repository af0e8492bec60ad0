//! What all processes together know of the gates: each writes down what a gate says to it, and all are told at once.

use serde::{Deserialize, Serialize};

use super::retry::Attempt;
use super::{PostgresStore, commit, listen, write_audit};
use crate::control::model::{AuditNote, GateState};
use crate::control::store::{GateReport, Stamp};

/// A gate's row, as it is stored and announced.
#[derive(sqlx::FromRow, Serialize, Deserialize)]
pub struct GateRow {
    name: String,
    version: Option<String>,
    revision: i64,
    claimed: i64,
    last_heard_at_ms: i64,
    process: Option<String>,
}

impl GateRow {
    /// As the process `own` sees it: what it is connected to itself it knows better.
    pub fn into_state(self, own: &str) -> GateState {
        GateState {
            name: self.name,
            version: self.version,
            revision: self.revision as u64,
            claimed: self.claimed as u64,
            last_heard_at_ms: self.last_heard_at_ms,
            connected: self.process.is_some_and(|process| process != own),
            live: false,
        }
    }
}

impl PostgresStore {
    pub(super) async fn try_gates(&self) -> Attempt<Vec<GateState>> {
        let rows: Vec<GateRow> = sqlx::query_as(
            "SELECT name, version, revision, claimed, last_heard_at_ms, process FROM gates ORDER BY name",
        )
        .fetch_all(&self.pools.general)
        .await?;
        Ok(rows.into_iter().map(|row| row.into_state(&self.process)).collect())
    }

    pub(super) async fn try_save_gates(&self, gates: &[GateReport]) -> Attempt<()> {
        let mut gates: Vec<&GateReport> = gates.iter().collect();
        gates.sort_by(|left, right| left.name.cmp(&right.name));
        // A gate tells again what is lost here, and until then counts as behind: nobody waits for the disk.
        let begin = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off";
        let mut tx = self.pools.general.begin_with(begin).await?;
        // Acknowledgements of one gate may come by different processes, in any order: the highest counts. A gate that
        // has connected may know less than it once did, and what it says then replaces what was known.
        let rows: Vec<GateRow> = sqlx::query_as(
            "INSERT INTO gates (name, version, revision, claimed, last_heard_at_ms, process)
             SELECT name, version, revision, claimed, heard, CASE WHEN connected THEN $7 END
             FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::boolean[])
                      AS said (name, version, revision, claimed, heard, connected)
             ORDER BY name
             ON CONFLICT (name) DO UPDATE SET
                 version = coalesce(excluded.version, gates.version),
                 revision = CASE WHEN excluded.name = ANY($8) THEN excluded.revision
                                 ELSE greatest(gates.revision, excluded.revision) END,
                 claimed = excluded.claimed,
                 last_heard_at_ms = greatest(gates.last_heard_at_ms, excluded.last_heard_at_ms),
                 process = CASE WHEN excluded.process IS NOT NULL THEN excluded.process
                                WHEN gates.process = $7 THEN NULL ELSE gates.process END
             RETURNING name, version, revision, claimed, last_heard_at_ms, process",
        )
        .bind(gates.iter().map(|gate| gate.name.as_str()).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.version.as_deref()).collect::<Vec<_>>())
        .bind(
            gates
                .iter()
                .map(|gate| gate.said.unwrap_or(0) as i64)
                .collect::<Vec<_>>(),
        )
        .bind(gates.iter().map(|gate| gate.claimed as i64).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.last_heard_at_ms).collect::<Vec<_>>())
        .bind(gates.iter().map(|gate| gate.connected).collect::<Vec<_>>())
        .bind(&self.process)
        .bind(begun(&gates))
        .fetch_all(&mut *tx)
        .await?;
        sqlx::query("SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload")
            .bind(listen::GATES)
            .bind(listen::payloads(&rows)?)
            .execute(&mut *tx)
            .await?;
        commit(tx).await
    }

    pub(super) async fn try_forget_gate(&self, name: &str, stamp: Stamp<'_>) -> Attempt<bool> {
        let mut tx = self.begin().await?;
        let deleted = sqlx::query("DELETE FROM gates WHERE name = $1")
            .bind(name)
            .execute(&mut *tx)
            .await?;
        let note = AuditNote {
            organization_id: None,
            action: "gate.forget",
            target_kind: "gate",
            target_id: name.to_owned(),
            detail: serde_json::json!({}),
        };
        write_audit(&mut tx, &note, stamp).await?;
        // An empty list of rows: look at all of them.
        sqlx::query("SELECT pg_notify($1, '[]')")
            .bind(listen::GATES)
            .execute(&mut *tx)
            .await?;
        commit(tx).await?;
        Ok(deleted.rows_affected() > 0)
    }
}

fn begun<'a>(gates: &[&'a GateReport]) -> Vec<&'a str> {
    let begun = gates.iter().filter(|gate| gate.begins);
    begun.map(|gate| gate.name.as_str()).collect()
}
