//! Keys and their secrets.

use std::collections::HashMap;

use async_trait::async_trait;
use sqlx::{QueryBuilder, Sqlite, SqliteConnection};

use super::{SqliteStore, fault, next_revision, write_audit};
use crate::control::model::{ApiKey, AuditNote, EXPIRING_WITHIN_MS, Fault, KeySecret, KeyStatus, REMEMBER_OUTCOME_MS};
use crate::control::secret::Digest;
use crate::control::store::{Claim, KeyEdit, KeyQuery, KeySort, KeyStore, SortValue, Stamp, Written, line};

#[async_trait]
impl KeyStore for SqliteStore {
    async fn create_key(
        &self,
        key: &ApiKey,
        limit: u64,
        claim: Option<&Claim<'_>>,
        note: &AuditNote,
        stamp: Stamp<'_>,
    ) -> Result<Written, Fault> {
        let mut tx = self.begin().await?;
        if let Some(claim) = claim
            && let Some(outcome) = find_outcome(&mut tx, &key.organization_id, claim, stamp.now_ms).await?
        {
            return Ok(Written::Replayed(outcome));
        }
        let count: i64 =
            sqlx::query_scalar("SELECT count(*) FROM keys WHERE organization_id = ? AND revoked_at_ms IS NULL")
                .bind(&key.organization_id)
                .fetch_one(&mut *tx)
                .await
                .map_err(fault)?;
        if count as u64 >= limit {
            return Err(Fault::TooMany { what: "keys", limit });
        }
        let mut key = key.clone();
        key.revision = next_revision(&mut tx).await?;
        insert_key(&mut tx, &key).await?;
        write_line(&mut tx, &key).await?;
        write_audit(&mut tx, note, stamp).await?;
        if let Some(claim) = claim {
            write_outcome(&mut tx, &key.organization_id, claim, &key, stamp.now_ms).await?;
        }
        tx.commit().await.map_err(fault)?;
        Ok(Written::Done(Box::new(key)))
    }

    async fn edit_key(
        &self,
        organization: Option<&str>,
        id: &str,
        edit: &KeyEdit<'_>,
        claim: Option<&Claim<'_>>,
        stamp: Stamp<'_>,
    ) -> Result<Written, Fault> {
        let mut tx = self.begin().await?;
        let before = find_key(&mut tx, organization, id).await?.ok_or(Fault::NotFound)?;
        if let Some(claim) = claim
            && let Some(outcome) = find_outcome(&mut tx, &before.organization_id, claim, stamp.now_ms).await?
        {
            return Ok(Written::Replayed(outcome));
        }
        let mut after = before.clone();
        let note = edit(&mut after)?;
        if after == before {
            return Ok(Written::Done(Box::new(before)));
        }
        after.revision = next_revision(&mut tx).await?;
        update_key(&mut tx, &before, &after).await?;
        write_line(&mut tx, &after).await?;
        write_audit(&mut tx, &note, stamp).await?;
        if let Some(claim) = claim {
            write_outcome(&mut tx, &after.organization_id, claim, &after, stamp.now_ms).await?;
        }
        tx.commit().await.map_err(fault)?;
        Ok(Written::Done(Box::new(after)))
    }

    async fn key(&self, organization: Option<&str>, id: &str) -> Result<Option<ApiKey>, Fault> {
        let mut tx = self.begin_reading().await?;
        find_key(&mut tx, organization, id).await
    }

    async fn keys(&self, query: &KeyQuery) -> Result<Vec<ApiKey>, Fault> {
        let mut tx = self.begin_reading().await?;
        let rows: Vec<KeyRow> = select(query)
            .build_query_as()
            .fetch_all(&mut *tx)
            .await
            .map_err(fault)?;
        let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
        let mut secrets = find_secrets(&mut tx, &ids).await?;
        rows.into_iter()
            .map(|row| {
                let own = secrets.remove(&row.id).unwrap_or_default();
                row.into_key(own)
            })
            .collect()
    }

    async fn outcome(&self, organization: &str, claim: &Claim<'_>, now_ms: i64) -> Result<Option<String>, Fault> {
        let mut connection = self.readers.acquire().await.map_err(fault)?;
        find_outcome(&mut connection, organization, claim, now_ms).await
    }
}

#[derive(sqlx::FromRow)]
struct KeyRow {
    id: String,
    organization_id: String,
    name: String,
    environment: String,
    prefix: String,
    scopes: String,
    created_at_ms: i64,
    expires_at_ms: Option<i64>,
    disabled: bool,
    revoked_at_ms: Option<i64>,
    last_used_at_ms: Option<i64>,
    revision: i64,
}

#[derive(sqlx::FromRow)]
struct SecretRow {
    key_id: String,
    digest: Vec<u8>,
    last_four: String,
    created_at_ms: i64,
    not_after_ms: Option<i64>,
    last_used_at_ms: Option<i64>,
}

impl KeyRow {
    fn into_key(self, mut secrets: Vec<KeySecret>) -> Result<ApiKey, Fault> {
        if let [only] = &mut *secrets {
            only.last_used_at_ms = self.last_used_at_ms;
        }
        let scopes = serde_json::from_str(&self.scopes)
            .map_err(|e| Fault::Internal(format!("the scopes of {} are not JSON: {e}", self.id)))?;
        Ok(ApiKey {
            id: self.id,
            organization_id: self.organization_id,
            name: self.name,
            environment: self.environment,
            prefix: self.prefix,
            scopes,
            created_at_ms: self.created_at_ms,
            expires_at_ms: self.expires_at_ms,
            disabled: self.disabled,
            revoked_at_ms: self.revoked_at_ms,
            last_used_at_ms: self.last_used_at_ms,
            revision: self.revision as u64,
            secrets,
        })
    }
}

pub(super) async fn find_key(
    connection: &mut SqliteConnection,
    organization: Option<&str>,
    id: &str,
) -> Result<Option<ApiKey>, Fault> {
    let row: Option<KeyRow> =
        sqlx::query_as("SELECT * FROM keys WHERE id = ?1 AND (?2 IS NULL OR organization_id = ?2)")
            .bind(id)
            .bind(organization)
            .fetch_optional(&mut *connection)
            .await
            .map_err(fault)?;
    let Some(row) = row else { return Ok(None) };
    let own = find_secrets(connection, &[id]).await?.remove(id).unwrap_or_default();
    row.into_key(own).map(Some)
}

async fn find_secrets(
    connection: &mut SqliteConnection,
    ids: &[&str],
) -> Result<HashMap<String, Vec<KeySecret>>, Fault> {
    let ids = serde_json::to_string(ids).map_err(|e| Fault::Internal(e.to_string()))?;
    let rows: Vec<SecretRow> = sqlx::query_as(
        "SELECT key_id, digest, last_four, created_at_ms, not_after_ms, last_used_at_ms FROM key_secrets
         WHERE key_id IN (SELECT value FROM json_each(?)) ORDER BY key_id, serial DESC",
    )
    .bind(ids)
    .fetch_all(connection)
    .await
    .map_err(fault)?;
    let mut secrets: HashMap<String, Vec<KeySecret>> = HashMap::new();
    for row in rows {
        let digest: Digest = row
            .digest
            .try_into()
            .map_err(|_| Fault::Internal("a stored digest has not 32 bytes".into()))?;
        secrets.entry(row.key_id).or_default().push(KeySecret {
            digest,
            last_four: row.last_four,
            created_at_ms: row.created_at_ms,
            not_after_ms: row.not_after_ms,
            last_used_at_ms: row.last_used_at_ms,
        });
    }
    Ok(secrets)
}

pub(super) async fn insert_key(tx: &mut SqliteConnection, key: &ApiKey) -> Result<(), Fault> {
    sqlx::query(
        "INSERT INTO keys (id, organization_id, name, environment, prefix, scopes, created_at_ms, expires_at_ms,
                           disabled, revoked_at_ms, revision)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&key.id)
    .bind(&key.organization_id)
    .bind(&key.name)
    .bind(&key.environment)
    .bind(&key.prefix)
    .bind(scopes_json(key)?)
    .bind(key.created_at_ms)
    .bind(key.expires_at_ms)
    .bind(key.disabled)
    .bind(key.revoked_at_ms)
    .bind(key.revision as i64)
    .execute(&mut *tx)
    .await
    .map_err(fault)?;
    // Oldest first, since the serial orders them.
    for secret in key.secrets.iter().rev() {
        insert_secret(tx, &key.id, secret).await?;
    }
    Ok(())
}

async fn insert_secret(tx: &mut SqliteConnection, key_id: &str, secret: &KeySecret) -> Result<(), Fault> {
    sqlx::query(
        "INSERT INTO key_secrets (key_id, digest, last_four, created_at_ms, not_after_ms) VALUES (?, ?, ?, ?, ?)",
    )
    .bind(key_id)
    .bind(secret.digest.as_slice())
    .bind(&secret.last_four)
    .bind(secret.created_at_ms)
    .bind(secret.not_after_ms)
    .execute(tx)
    .await
    .map(drop)
    .map_err(fault)
}

async fn update_key(tx: &mut SqliteConnection, before: &ApiKey, after: &ApiKey) -> Result<(), Fault> {
    sqlx::query(
        "UPDATE keys SET name = ?, scopes = ?, expires_at_ms = ?, disabled = ?, revoked_at_ms = ?, revision = ?
         WHERE id = ?",
    )
    .bind(&after.name)
    .bind(scopes_json(after)?)
    .bind(after.expires_at_ms)
    .bind(after.disabled)
    .bind(after.revoked_at_ms)
    .bind(after.revision as i64)
    .bind(&after.id)
    .execute(&mut *tx)
    .await
    .map_err(fault)?;
    if before.secrets.len() == 1 && after.secrets.len() > 1 {
        // The ledger told nobody but the key while this was its only secret.
        sqlx::query(
            "UPDATE key_secrets SET last_used_at_ms = (SELECT last_used_at_ms FROM keys WHERE id = ?1) WHERE key_id = ?1",
        )
        .bind(&after.id)
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
    }
    for secret in after.secrets.iter().rev() {
        match before.secrets.iter().find(|known| known.digest == secret.digest) {
            None => insert_secret(tx, &after.id, secret).await?,
            Some(known) if known.not_after_ms != secret.not_after_ms => {
                sqlx::query("UPDATE key_secrets SET not_after_ms = ? WHERE digest = ?")
                    .bind(secret.not_after_ms)
                    .bind(secret.digest.as_slice())
                    .execute(&mut *tx)
                    .await
                    .map_err(fault)?;
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Tells the gates. The line before it is replaced: only a key's newest state matters.
pub(super) async fn write_line(tx: &mut SqliteConnection, key: &ApiKey) -> Result<(), Fault> {
    let plan: String = sqlx::query_scalar("SELECT plan FROM organizations WHERE id = ?")
        .bind(&key.organization_id)
        .fetch_one(&mut *tx)
        .await
        .map_err(fault)?;
    sqlx::query("INSERT OR REPLACE INTO feed_lines (revision, key_id, line) VALUES (?, ?, ?)")
        .bind(key.revision as i64)
        .bind(&key.id)
        .bind(line::render(key, &plan)?)
        .execute(tx)
        .await
        .map(drop)
        .map_err(fault)
}

async fn find_outcome(
    connection: &mut SqliteConnection,
    organization: &str,
    claim: &Claim<'_>,
    now_ms: i64,
) -> Result<Option<String>, Fault> {
    let found: Option<(Vec<u8>, String)> = sqlx::query_as(
        "SELECT fingerprint, outcome FROM idempotency
         WHERE organization_id = ? AND operation = ? AND idempotency_key = ? AND created_at_ms > ?",
    )
    .bind(organization)
    .bind(&claim.operation)
    .bind(claim.idempotency_key)
    .bind(now_ms - REMEMBER_OUTCOME_MS)
    .fetch_optional(connection)
    .await
    .map_err(fault)?;
    match found {
        None => Ok(None),
        Some((fingerprint, outcome)) if fingerprint == claim.fingerprint => Ok(Some(outcome)),
        Some(_) => Err(Fault::IdempotencyKeyReused),
    }
}

async fn write_outcome(
    tx: &mut SqliteConnection,
    organization: &str,
    claim: &Claim<'_>,
    key: &ApiKey,
    now_ms: i64,
) -> Result<(), Fault> {
    // Replaces one whose 24 hours are over and that was not pruned yet; a living one was found before.
    sqlx::query(
        "INSERT OR REPLACE INTO idempotency
         (organization_id, operation, idempotency_key, fingerprint, outcome, created_at_ms) VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(organization)
    .bind(&claim.operation)
    .bind(claim.idempotency_key)
    .bind(claim.fingerprint.as_slice())
    .bind((claim.record)(key)?)
    .bind(now_ms)
    .execute(tx)
    .await
    .map(drop)
    .map_err(fault)
}

fn scopes_json(key: &ApiKey) -> Result<String, Fault> {
    serde_json::to_string(&key.scopes).map_err(|e| Fault::Internal(e.to_string()))
}

fn select(query: &KeyQuery) -> QueryBuilder<Sqlite> {
    let mut sql = QueryBuilder::new("SELECT * FROM keys AS k WHERE 1");
    if let Some(organization) = &query.organization {
        sql.push(" AND k.organization_id = ").push_bind(organization.clone());
    }
    if let Some(environment) = &query.environment {
        sql.push(" AND k.environment = ").push_bind(environment.clone());
    }
    if let Some(scope) = &query.scope {
        sql.push(" AND EXISTS (SELECT 1 FROM json_each(k.scopes) WHERE value = ")
            .push_bind(scope.clone())
            .push(")");
    }
    if let Some(search) = &query.search {
        sql.push(" AND (k.name LIKE ")
            .push_bind(like(search))
            .push(" ESCAPE '\\' OR k.id = ")
            .push_bind(search.clone());
        sql.push(" OR EXISTS (SELECT 1 FROM key_secrets AS s WHERE s.key_id = k.id AND s.last_four = ")
            .push_bind(search.clone())
            .push("))");
    }
    if let Some(status) = query.status {
        push_status(&mut sql, status, query.now_ms);
    }
    let (column, order) = (sort_column(query.sort), if query.descending { "DESC" } else { "ASC" });
    if let Some((value, id)) = &query.after {
        let beyond = if query.descending { " < " } else { " > " };
        sql.push(format!(" AND ({column}, k.id)")).push(beyond).push("(");
        match value {
            SortValue::Number(number) => sql.push_bind(*number),
            SortValue::Text(text) => sql.push_bind(text.clone()),
        };
        sql.push(", ").push_bind(id.clone()).push(")");
    }
    sql.push(format!(" ORDER BY {column} {order}, k.id {order} LIMIT "))
        .push_bind(query.limit);
    sql
}

fn sort_column(sort: KeySort) -> &'static str {
    match sort {
        KeySort::CreatedAt => "k.created_at_ms",
        KeySort::Name => "k.name",
        KeySort::LastUsedAt => "coalesce(k.last_used_at_ms, 0)",
        // Beyond every date that can be written.
        KeySort::ExpiresAt => "coalesce(k.expires_at_ms, 9223372036854775807)",
    }
}

/// The same order of gravity as [`ApiKey::status`]; a test compares them.
fn push_status(sql: &mut QueryBuilder<Sqlite>, status: KeyStatus, now_ms: i64) {
    if status == KeyStatus::Revoked {
        sql.push(" AND k.revoked_at_ms IS NOT NULL");
        return;
    }
    sql.push(" AND k.revoked_at_ms IS NULL");
    if status == KeyStatus::Disabled {
        sql.push(" AND k.disabled = 1");
        return;
    }
    sql.push(" AND k.disabled = 0 AND coalesce(k.expires_at_ms, 9223372036854775807)");
    if status == KeyStatus::Expired {
        sql.push(" <= ").push_bind(now_ms);
        return;
    }
    sql.push(" > ").push_bind(now_ms);
    sql.push(if status == KeyStatus::Rotating {
        " AND "
    } else {
        " AND NOT "
    });
    sql.push("EXISTS (SELECT 1 FROM key_secrets AS s WHERE s.key_id = k.id AND s.not_after_ms > ")
        .push_bind(now_ms)
        .push(")");
    if status != KeyStatus::Rotating {
        sql.push(" AND coalesce(k.expires_at_ms, 9223372036854775807)");
        sql.push(if status == KeyStatus::Expiring { " <= " } else { " > " })
            .push_bind(now_ms + EXPIRING_WITHIN_MS);
    }
}

/// A pattern that finds `text` anywhere; what LIKE would read as wild cards is escaped.
pub(super) fn like(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
    format!("%{escaped}%")
}
