//! The ledger: batches in, totals out.

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde::Serialize;
use sqlx::{QueryBuilder, Sqlite, SqliteConnection};

use super::{SqliteStore, fault};
use crate::control::model::Fault;
use crate::control::store::rows::LedgerRow;
use crate::control::store::stretch::{Stretch, after};
use crate::control::store::{LedgerStore, UsageQuery, UsageRows};
use crate::wire::{LastUsed, PermitCount, RefusalCount, UsageBatch};

#[async_trait]
impl LedgerStore for SqliteStore {
    async fn apply_usage(&self, batch: &UsageBatch, now_ms: i64) -> Result<bool, Fault> {
        let mut tx = self.begin().await?;
        if !mark_applied(&mut tx, batch, now_ms).await? {
            return Ok(false);
        }
        apply_permits(&mut tx, &batch.permits).await?;
        apply_refusals(&mut tx, &batch.refusals).await?;
        apply_last_used(&mut tx, &batch.last_used).await?;
        tx.commit().await.map_err(fault)?;
        Ok(true)
    }

    async fn usage(&self, query: &UsageQuery) -> Result<UsageRows, Fault> {
        let mut tx = self.begin_reading().await?;
        let permits: Vec<LedgerRow> = select(query, "usage_minutes", "permits", "''")
            .build_query_as()
            .fetch_all(&mut *tx)
            .await
            .map_err(fault)?;
        let refusals: Vec<LedgerRow> = select(query, "refusal_minutes", "refusals", "code")
            .build_query_as()
            .fetch_all(&mut *tx)
            .await
            .map_err(fault)?;
        Ok(UsageRows {
            permits: permits.into_iter().map(|row| row.into_parts().0).collect(),
            refusals: refusals.into_iter().map(LedgerRow::into_parts).collect(),
        })
    }

    async fn oldest_usage(&self) -> Result<Option<i64>, Fault> {
        sqlx::query_scalar(
            "WITH tenants AS (SELECT '' AS id UNION ALL SELECT id FROM organizations)
             SELECT min(minute) FROM (
                 SELECT (SELECT min(minute) FROM usage_minutes WHERE organization_id = id) AS minute FROM tenants
                 UNION ALL
                 SELECT (SELECT min(minute) FROM refusal_minutes WHERE organization_id = id) FROM tenants)",
        )
        .fetch_one(&self.readers)
        .await
        .map_err(fault)
    }

    async fn fold_usage(&self, hour: i64, after: Option<&str>) -> Result<Option<String>, Fault> {
        let found: Option<String> = sqlx::query_scalar(
            "SELECT id FROM (SELECT '' AS id UNION ALL SELECT id FROM organizations) WHERE (?1 IS NULL OR id > ?1)
                 AND (EXISTS (SELECT 1 FROM usage_minutes
                              WHERE organization_id = id AND minute > ?2 AND minute < ?2 + 60)
                      OR EXISTS (SELECT 1 FROM refusal_minutes
                                 WHERE organization_id = id AND minute > ?2 AND minute < ?2 + 60))
             ORDER BY id LIMIT 1",
        )
        .bind(after)
        .bind(hour)
        .fetch_optional(&self.readers)
        .await
        .map_err(fault)?;
        let Some(organization) = found else { return Ok(None) };
        let mut tx = self.begin().await?;
        for statement in [
            "INSERT INTO usage_minutes (organization_id, minute, key_id, tier, environment, permits)
             SELECT organization_id, ?2, key_id, tier, environment, sum(permits) FROM usage_minutes
             WHERE organization_id = ?1 AND minute > ?2 AND minute < ?2 + 60 GROUP BY 1, 2, 3, 4, 5
             ON CONFLICT DO UPDATE SET permits = permits + excluded.permits",
            "DELETE FROM usage_minutes WHERE organization_id = ?1 AND minute > ?2 AND minute < ?2 + 60",
            "INSERT INTO refusal_minutes (organization_id, minute, key_id, tier, environment, code, refusals)
             SELECT organization_id, ?2, key_id, tier, environment, code, sum(refusals) FROM refusal_minutes
             WHERE organization_id = ?1 AND minute > ?2 AND minute < ?2 + 60 GROUP BY 1, 2, 3, 4, 5, 6
             ON CONFLICT DO UPDATE SET refusals = refusals + excluded.refusals",
            "DELETE FROM refusal_minutes WHERE organization_id = ?1 AND minute > ?2 AND minute < ?2 + 60",
        ] {
            sqlx::query(statement)
                .bind(&organization)
                .bind(hour)
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
        }
        tx.commit().await.map_err(fault)?;
        Ok(Some(organization))
    }
}

/// Marks a batch as applied; answers whether it was not before.
async fn mark_applied(tx: &mut SqliteConnection, batch: &UsageBatch, now_ms: i64) -> Result<bool, Fault> {
    let sequence = i64::try_from(batch.sequence).unwrap_or(i64::MAX);
    let through: Option<i64> = sqlx::query_scalar("SELECT applied_through FROM usage_runs WHERE gate = ? AND run = ?")
        .bind(&batch.gate)
        .bind(&batch.run)
        .fetch_optional(&mut *tx)
        .await
        .map_err(fault)?;
    let through = through.unwrap_or(0);
    if sequence <= through {
        return Ok(false);
    }
    let near: Vec<(i64, i64)> = sqlx::query_as(
        "SELECT first, last FROM usage_ahead WHERE gate = ? AND run = ? AND first <= ? ORDER BY first DESC LIMIT 2",
    )
    .bind(&batch.gate)
    .bind(&batch.run)
    .bind(after(sequence))
    .fetch_all(&mut *tx)
    .await
    .map_err(fault)?;
    let near: Vec<Stretch> = near.into_iter().map(|(first, last)| Stretch { first, last }).collect();
    let Some(joined) = Stretch::with(sequence, &near) else {
        return Ok(false);
    };
    sqlx::query("DELETE FROM usage_ahead WHERE gate = ? AND run = ? AND first BETWEEN ? AND ?")
        .bind(&batch.gate)
        .bind(&batch.run)
        .bind(joined.first)
        .bind(joined.last)
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
    let closes_the_gap = joined.first == through + 1;
    if !closes_the_gap {
        sqlx::query("INSERT INTO usage_ahead (gate, run, first, last) VALUES (?, ?, ?, ?)")
            .bind(&batch.gate)
            .bind(&batch.run)
            .bind(joined.first)
            .bind(joined.last)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
    }
    sqlx::query(
        "INSERT INTO usage_runs (gate, run, applied_through, last_at_ms) VALUES (?, ?, ?, ?)
         ON CONFLICT DO UPDATE SET applied_through = excluded.applied_through, last_at_ms = excluded.last_at_ms",
    )
    .bind(&batch.gate)
    .bind(&batch.run)
    .bind(if closes_the_gap { joined.last } else { through })
    .bind(now_ms)
    .execute(&mut *tx)
    .await
    .map_err(fault)?;
    Ok(true)
}

// Whole lists at once, which SQLite takes apart. It takes longer for what lies deeper, so what keys have in common is told
// once, and in the order of the tables. A key that is unknown here (a static key file, another installation) is kept under
// no organisation, so that the sum stays exact.

async fn apply_permits(tx: &mut SqliteConnection, permits: &[PermitCount]) -> Result<(), Fault> {
    let counts = by_key(permits.iter().map(|permit| {
        let group = Group {
            minute: permit.minute,
            tier: &permit.tier,
            environment: &permit.environment,
            code: "",
        };
        (group, &*permit.key, permit.count)
    }))?;
    sqlx::query(
        "WITH told AS MATERIALIZED (
             SELECT value ->> '$[0].minute' AS minute, value ->> '$[0].tier' AS tier,
                    value ->> '$[0].environment' AS environment, value -> 1 AS counts
             FROM json_each(?))
         INSERT INTO usage_minutes (organization_id, minute, key_id, tier, environment, permits)
         SELECT coalesce(k.organization_id, ''), told.minute, used.key, told.tier, told.environment, used.value
         FROM told, json_each(told.counts) AS used LEFT JOIN keys AS k ON k.id = used.key WHERE true
         ON CONFLICT DO UPDATE SET permits = permits + excluded.permits",
    )
    .bind(counts)
    .execute(tx)
    .await
    .map(drop)
    .map_err(fault)
}

async fn apply_refusals(tx: &mut SqliteConnection, refusals: &[RefusalCount]) -> Result<(), Fault> {
    let counts = by_key(refusals.iter().map(|refusal| {
        let group = Group {
            minute: refusal.minute,
            tier: &refusal.tier,
            environment: refusal.environment.as_deref().unwrap_or_default(),
            code: &refusal.code,
        };
        (group, refusal.key.as_deref().unwrap_or_default(), refusal.count)
    }))?;
    sqlx::query(
        "WITH told AS MATERIALIZED (
             SELECT value ->> '$[0].minute' AS minute, value ->> '$[0].tier' AS tier,
                    value ->> '$[0].environment' AS environment, value ->> '$[0].code' AS code, value -> 1 AS counts
             FROM json_each(?))
         INSERT INTO refusal_minutes (organization_id, minute, key_id, tier, environment, code, refusals)
         SELECT coalesce(k.organization_id, ''), told.minute, used.key, told.tier, told.environment, told.code, used.value
         FROM told, json_each(told.counts) AS used LEFT JOIN keys AS k ON k.id = used.key WHERE true
         ON CONFLICT DO UPDATE SET refusals = refusals + excluded.refusals",
    )
    .bind(counts)
    .execute(tx)
    .await
    .map(drop)
    .map_err(fault)
}

/// What counts have in common that differ in their keys.
#[derive(PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Group<'b> {
    minute: i64,
    tier: &'b str,
    environment: &'b str,
    /// Of refusals.
    code: &'b str,
}

/// A list of pairs: a group, and its counts by key.
fn by_key<'b>(counts: impl Iterator<Item = (Group<'b>, &'b str, u64)>) -> Result<String, Fault> {
    let mut groups: BTreeMap<Group<'_>, BTreeMap<&str, u64>> = BTreeMap::new();
    for (group, key, count) in counts {
        let sum = groups.entry(group).or_default().entry(key).or_default();
        // Where this matters the column refuses it: it holds 63 bits.
        *sum = sum.saturating_add(count);
    }
    json(&groups.into_iter().collect::<Vec<_>>())
}

/// Batches may arrive in any order, so a time only ever moves forward. The secrets of a table are in the order in which
/// they were made, so that each of a batch's lies in a page of its own: only where a key has several are they told of
/// (an only secret was last used when its key was).
async fn apply_last_used(tx: &mut SqliteConnection, last_used: &[LastUsed]) -> Result<(), Fault> {
    let mut latest: BTreeMap<&str, i64> = BTreeMap::new();
    for used in last_used {
        let at_ms = latest.entry(&used.key).or_default();
        *at_ms = used.at_ms.max(*at_ms);
    }
    sqlx::query(
        "UPDATE keys SET last_used_at_ms = used.value FROM json_each(?) AS used
         WHERE keys.id = used.key AND coalesce(last_used_at_ms, 0) < used.value",
    )
    .bind(json(&latest)?)
    .execute(&mut *tx)
    .await
    .map_err(fault)?;
    sqlx::query(
        "WITH used AS MATERIALIZED (
             SELECT value ->> 'key' AS key, unhex(value ->> 'secret') AS prefix, max(value ->> 'at_ms') AS at_ms
             FROM json_each(?) WHERE (SELECT count(*) FROM key_secrets WHERE key_id = value ->> 'key') > 1
             GROUP BY 1, 2)
         UPDATE key_secrets SET last_used_at_ms = used.at_ms FROM used
         WHERE key_id = used.key AND substr(digest, 1, 8) = used.prefix AND coalesce(last_used_at_ms, 0) < used.at_ms",
    )
    .bind(json(&last_used)?)
    .execute(&mut *tx)
    .await
    .map(drop)
    .map_err(fault)
}

fn select(query: &UsageQuery, table: &str, column: &str, code: &str) -> QueryBuilder<Sqlite> {
    let key = if query.by_key { "key_id" } else { "''" };
    let tier = if query.by_tier { "tier" } else { "''" };
    let mut sql = QueryBuilder::new("SELECT minute - minute % ");
    sql.push_bind(query.bucket_minutes);
    sql.push(format!(
        " AS bucket, {key} AS key, {tier} AS tier, environment, {code} AS code, sum({column}) AS total"
    ));
    sql.push(format!(" FROM {table} WHERE organization_id = "))
        .push_bind(query.organization.clone());
    sql.push(" AND minute >= ")
        .push_bind(query.from_minute)
        .push(" AND minute < ")
        .push_bind(query.to_minute);
    for (name, value) in [
        ("key_id", &query.key),
        ("tier", &query.tier),
        ("environment", &query.environment),
    ] {
        if let Some(value) = value {
            sql.push(format!(" AND {name} = ")).push_bind(value.clone());
        }
    }
    sql.push(" GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5 LIMIT ")
        .push_bind(query.limit + 1);
    sql
}

fn json<T: Serialize>(list: &T) -> Result<String, Fault> {
    serde_json::to_string(list).map_err(|e| Fault::Internal(e.to_string()))
}
