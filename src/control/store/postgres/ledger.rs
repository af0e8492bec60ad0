//! The ledger: batches in, totals out.

use async_trait::async_trait;
use sqlx::{PgConnection, Postgres, QueryBuilder};

use super::retry::{Attempt, retry};
use super::{PostgresStore, commit, is_nowhere};
use crate::control::model::Fault;
use crate::control::store::rows::LedgerRow;
use crate::control::store::stretch::{Stretch, after};
use crate::control::store::{LedgerStore, UsageQuery, UsageRows};
use crate::wire::{LastUsed, UsageBatch};

#[async_trait]
impl LedgerStore for PostgresStore {
    async fn apply_usage(&self, batch: &UsageBatch, now_ms: i64) -> Result<bool, Fault> {
        // Apart from the batch and before it: they may be applied any number of times, since a time only moves forward,
        // and a key's row is not locked for as long as a whole batch takes, while a revocation would wait for it.
        for last_used in batch.last_used.chunks(LAST_USES_AT_ONCE) {
            retry(|| self.try_apply_last_used(last_used)).await?;
        }
        retry(|| self.try_apply_usage(batch, now_ms)).await
    }

    async fn usage(&self, query: &UsageQuery) -> Result<UsageRows, Fault> {
        let asked = [&query.key, &query.tier, &query.environment];
        if is_nowhere(&asked.map(|text| text.as_deref())) || is_nowhere(&[Some(&query.organization)]) {
            return Ok(UsageRows::default());
        }
        retry(|| self.try_usage(query)).await
    }

    async fn oldest_usage(&self) -> Result<Option<i64>, Fault> {
        retry(|| async {
            Ok(sqlx::query_scalar(
                "WITH tenants AS (SELECT ''::text AS id UNION ALL SELECT id FROM organizations)
                 SELECT min(minute) FROM (
                     SELECT (SELECT min(minute) FROM usage_minutes WHERE organization_id = id) AS minute FROM tenants
                     UNION ALL
                     SELECT (SELECT min(minute) FROM refusal_minutes WHERE organization_id = id) FROM tenants) AS oldest",
            )
            .fetch_one(&self.pools.general)
            .await?)
        })
        .await
    }

    async fn fold_usage(&self, hour: i64, after: Option<&str>) -> Result<Option<String>, Fault> {
        retry(|| self.try_fold_usage(hour, after)).await
    }
}

impl PostgresStore {
    async fn try_apply_usage(&self, batch: &UsageBatch, now_ms: i64) -> Attempt<bool> {
        let mut tx = self.begin().await?;
        if !mark_applied(&mut tx, batch, now_ms).await? {
            return Ok(false);
        }
        // Whole lists at once, each row once, in the order of the primary key, so that two batches that meet in the same
        // rows wait for each other instead of each holding what the other wants. A key that is unknown here (a static key
        // file, another installation) is kept under no organisation, so that the sum stays exact.
        let permits = &batch.permits;
        sqlx::query(
            "INSERT INTO usage_minutes (organization_id, minute, key_id, tier, environment, permits)
             SELECT coalesce(k.organization_id, ''), used.minute, used.key, used.tier, used.environment,
                    sum(used.count)::bigint
             FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[])
                      AS used (key, tier, environment, minute, count) LEFT JOIN keys AS k ON k.id = used.key
             GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
             ON CONFLICT (organization_id, minute, key_id, tier, environment)
                 DO UPDATE SET permits = usage_minutes.permits + excluded.permits",
        )
        .bind(permits.iter().map(|permit| permit.key.as_str()).collect::<Vec<_>>())
        .bind(permits.iter().map(|permit| permit.tier.as_str()).collect::<Vec<_>>())
        .bind(
            permits
                .iter()
                .map(|permit| permit.environment.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(permits.iter().map(|permit| permit.minute).collect::<Vec<_>>())
        .bind(permits.iter().map(|permit| permit.count as i64).collect::<Vec<_>>())
        .execute(&mut *tx)
        .await?;
        let refusals = &batch.refusals;
        sqlx::query(
            "INSERT INTO refusal_minutes (organization_id, minute, key_id, tier, environment, code, refusals)
             SELECT coalesce(k.organization_id, ''), told.minute, told.key, told.tier, told.environment, told.code,
                    sum(told.count)::bigint
             FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bigint[], $6::bigint[])
                      AS told (key, tier, environment, code, minute, count) LEFT JOIN keys AS k ON k.id = told.key
             GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6
             ON CONFLICT (organization_id, minute, key_id, tier, environment, code)
                 DO UPDATE SET refusals = refusal_minutes.refusals + excluded.refusals",
        )
        .bind(
            refusals
                .iter()
                .map(|refusal| refusal.key.as_deref().unwrap_or_default())
                .collect::<Vec<_>>(),
        )
        .bind(refusals.iter().map(|refusal| refusal.tier.as_str()).collect::<Vec<_>>())
        .bind(
            refusals
                .iter()
                .map(|refusal| refusal.environment.as_deref().unwrap_or_default())
                .collect::<Vec<_>>(),
        )
        .bind(refusals.iter().map(|refusal| refusal.code.as_str()).collect::<Vec<_>>())
        .bind(refusals.iter().map(|refusal| refusal.minute).collect::<Vec<_>>())
        .bind(refusals.iter().map(|refusal| refusal.count as i64).collect::<Vec<_>>())
        .execute(&mut *tx)
        .await?;
        commit(tx).await?;
        Ok(true)
    }

    async fn try_apply_last_used(&self, last_used: &[LastUsed]) -> Attempt<()> {
        let keys: Vec<&str> = last_used.iter().map(|used| used.key.as_str()).collect();
        let secrets: Vec<String> = last_used.iter().map(|used| used.secret.to_ascii_lowercase()).collect();
        let times: Vec<i64> = last_used.iter().map(|used| used.at_ms).collect();
        let mut tx = self.begin().await?;
        // An UPDATE locks in whatever order its plan has; this one locks in the order of ids.
        sqlx::query("SELECT 1 FROM keys WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE")
            .bind(&keys)
            .execute(&mut *tx)
            .await?;
        sqlx::query(
            "UPDATE keys SET last_used_at_ms = used.at_ms
             FROM (SELECT key, max(at_ms) AS at_ms FROM unnest($1::text[], $2::bigint[]) AS each (key, at_ms)
                   GROUP BY key) AS used
             WHERE keys.id = used.key AND coalesce(keys.last_used_at_ms, 0) < used.at_ms",
        )
        .bind(&keys)
        .bind(&times)
        .execute(&mut *tx)
        .await?;
        // Of keys with several: an only secret was last used when its key was.
        sqlx::query(
            "UPDATE key_secrets SET last_used_at_ms = used.at_ms
             FROM (SELECT key, secret, max(at_ms) AS at_ms
                   FROM unnest($1::text[], $2::text[], $3::bigint[]) AS each (key, secret, at_ms)
                   WHERE (SELECT count(*) FROM key_secrets WHERE key_id = key) > 1
                   GROUP BY key, secret) AS used
             WHERE key_secrets.key_id = used.key AND encode(substring(key_secrets.digest FOR 8), 'hex') = used.secret
                   AND coalesce(key_secrets.last_used_at_ms, 0) < used.at_ms",
        )
        .bind(&keys)
        .bind(&secrets)
        .bind(&times)
        .execute(&mut *tx)
        .await?;
        commit(tx).await
    }

    async fn try_fold_usage(&self, hour: i64, after: Option<&str>) -> Attempt<Option<String>> {
        let found: Option<String> = sqlx::query_scalar(
            r#"SELECT id FROM (SELECT '' COLLATE "C" AS id UNION ALL SELECT id FROM organizations) AS tenants
               WHERE ($1::text IS NULL OR id > $1)
                   AND (EXISTS (SELECT 1 FROM usage_minutes
                                WHERE organization_id = id AND minute > $2 AND minute < $2 + 60)
                        OR EXISTS (SELECT 1 FROM refusal_minutes
                                   WHERE organization_id = id AND minute > $2 AND minute < $2 + 60))
               ORDER BY id LIMIT 1"#,
        )
        .bind(after)
        .bind(hour)
        .fetch_optional(&self.pools.general)
        .await?;
        let Some(organization) = found else { return Ok(None) };
        let mut tx = self.begin().await?;
        // Two processes that fold the same hour: whoever comes second finds nothing left.
        for statement in [
            "WITH old AS (DELETE FROM usage_minutes WHERE organization_id = $1 AND minute > $2 AND minute < $2 + 60
                          RETURNING key_id, tier, environment, permits)
             INSERT INTO usage_minutes (organization_id, minute, key_id, tier, environment, permits)
             SELECT $1, $2, key_id, tier, environment, sum(permits)::bigint FROM old
             GROUP BY 3, 4, 5 ORDER BY 3, 4, 5
             ON CONFLICT (organization_id, minute, key_id, tier, environment)
                 DO UPDATE SET permits = usage_minutes.permits + excluded.permits",
            "WITH old AS (DELETE FROM refusal_minutes WHERE organization_id = $1 AND minute > $2 AND minute < $2 + 60
                          RETURNING key_id, tier, environment, code, refusals)
             INSERT INTO refusal_minutes (organization_id, minute, key_id, tier, environment, code, refusals)
             SELECT $1, $2, key_id, tier, environment, code, sum(refusals)::bigint FROM old
             GROUP BY 3, 4, 5, 6 ORDER BY 3, 4, 5, 6
             ON CONFLICT (organization_id, minute, key_id, tier, environment, code)
                 DO UPDATE SET refusals = refusal_minutes.refusals + excluded.refusals",
        ] {
            sqlx::query(statement)
                .bind(&organization)
                .bind(hour)
                .execute(&mut *tx)
                .await?;
        }
        commit(tx).await?;
        Ok(Some(organization))
    }

    async fn try_usage(&self, query: &UsageQuery) -> Attempt<UsageRows> {
        let mut tx = self.begin_reading().await?;
        let permits: Vec<LedgerRow> = select(query, "usage_minutes", "permits", "''::text")
            .build_query_as()
            .fetch_all(&mut *tx)
            .await?;
        let refusals: Vec<LedgerRow> = select(query, "refusal_minutes", "refusals", "code")
            .build_query_as()
            .fetch_all(&mut *tx)
            .await?;
        Ok(UsageRows {
            permits: permits.into_iter().map(|row| row.into_parts().0).collect(),
            refusals: refusals.into_iter().map(LedgerRow::into_parts).collect(),
        })
    }
}

/// Marks a batch as applied; answers whether it was not before. The run's row is locked until the commit, so a batch
/// that reaches two processes at once waits in one of them and is then found applied.
async fn mark_applied(tx: &mut PgConnection, batch: &UsageBatch, now_ms: i64) -> Attempt<bool> {
    let sequence = i64::try_from(batch.sequence).unwrap_or(i64::MAX);
    let through: i64 = sqlx::query_scalar(
        "INSERT INTO usage_runs (gate, run, applied_through, last_at_ms) VALUES ($1, $2, 0, $3)
         ON CONFLICT (gate, run) DO UPDATE SET last_at_ms = excluded.last_at_ms RETURNING applied_through",
    )
    .bind(&batch.gate)
    .bind(&batch.run)
    .bind(now_ms)
    .fetch_one(&mut *tx)
    .await?;
    if sequence <= through {
        return Ok(false);
    }
    let near: Vec<(i64, i64)> = sqlx::query_as(
        "SELECT first, last FROM usage_ahead WHERE gate = $1 AND run = $2 AND first <= $3 ORDER BY first DESC LIMIT 2",
    )
    .bind(&batch.gate)
    .bind(&batch.run)
    .bind(after(sequence))
    .fetch_all(&mut *tx)
    .await?;
    let near: Vec<Stretch> = near.into_iter().map(|(first, last)| Stretch { first, last }).collect();
    let Some(joined) = Stretch::with(sequence, &near) else {
        return Ok(false);
    };
    sqlx::query("DELETE FROM usage_ahead WHERE gate = $1 AND run = $2 AND first BETWEEN $3 AND $4")
        .bind(&batch.gate)
        .bind(&batch.run)
        .bind(joined.first)
        .bind(joined.last)
        .execute(&mut *tx)
        .await?;
    if joined.first == through + 1 {
        sqlx::query("UPDATE usage_runs SET applied_through = $3 WHERE gate = $1 AND run = $2")
            .bind(&batch.gate)
            .bind(&batch.run)
            .bind(joined.last)
            .execute(&mut *tx)
            .await?;
    } else {
        sqlx::query("INSERT INTO usage_ahead (gate, run, first, last) VALUES ($1, $2, $3, $4)")
            .bind(&batch.gate)
            .bind(&batch.run)
            .bind(joined.first)
            .bind(joined.last)
            .execute(&mut *tx)
            .await?;
    }
    Ok(true)
}

fn select(query: &UsageQuery, table: &str, column: &str, code: &str) -> QueryBuilder<Postgres> {
    let key = if query.by_key { "key_id" } else { "''::text" };
    let tier = if query.by_tier { "tier" } else { "''::text" };
    let mut sql = QueryBuilder::new("SELECT minute - minute % ");
    sql.push_bind(query.bucket_minutes);
    sql.push(format!(
        " AS bucket, {key} AS key, {tier} AS tier, environment, {code} AS code, sum({column})::bigint AS total"
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
        .push_bind(i64::from(query.limit) + 1);
    sql
}

/// Short enough that nobody notices to have waited for these rows.
const LAST_USES_AT_ONCE: usize = 500;
