//! Keys and their secrets.

use std::collections::HashMap;

use async_trait::async_trait;
use sqlx::{PgConnection, Postgres, QueryBuilder};

use super::retry::{Attempt, Failure, retry};
use super::{Change, PostgresStore, is_nowhere};
use crate::control::model::{
    ApiKey, AuditNote, EXPIRING_WITHIN_MS, Fault, KeySecret, KeyStatus, Organization, REMEMBER_OUTCOME_MS,
};
use crate::control::secret::Digest;
use crate::control::store::{Claim, KeyEdit, KeyQuery, KeySort, KeyStore, SortValue, Stamp, Written, line};

#[async_trait]
impl KeyStore for PostgresStore {
    async fn create_key(
        &self,
        key: &ApiKey,
        limit: u64,
        claim: Option<&Claim<'_>>,
        note: &AuditNote,
        stamp: Stamp<'_>,
    ) -> Result<Written, Fault> {
        retry(|| self.try_create_key(key, limit, claim, note, stamp)).await
    }

    async fn edit_key(
        &self,
        organization: Option<&str>,
        id: &str,
        edit: &KeyEdit<'_>,
        claim: Option<&Claim<'_>>,
        stamp: Stamp<'_>,
    ) -> Result<Written, Fault> {
        retry(|| self.try_edit_key(organization, id, edit, claim, stamp)).await
    }

    async fn key(&self, organization: Option<&str>, id: &str) -> Result<Option<ApiKey>, Fault> {
        if is_nowhere(&[Some(id), organization]) {
            return Ok(None);
        }
        retry(|| async {
            let mut tx = self.begin_reading().await?;
            find_key(&mut tx, organization, id).await
        })
        .await
    }

    async fn keys(&self, query: &KeyQuery) -> Result<Vec<ApiKey>, Fault> {
        let text = match &query.after {
            Some((SortValue::Text(text), _)) => Some(text.as_str()),
            _ => None,
        };
        let after = query.after.as_ref().map(|(_, id)| id.as_str());
        let asked = [&query.organization, &query.environment, &query.scope, &query.search];
        if is_nowhere(&asked.map(|text| text.as_deref())) || is_nowhere(&[text, after]) {
            return Ok(Vec::new());
        }
        retry(|| self.try_keys(query)).await
    }

    async fn outcome(&self, organization: &str, claim: &Claim<'_>, now_ms: i64) -> Result<Option<String>, Fault> {
        retry(|| async {
            let mut connection = self.pools.general.acquire().await?;
            find_outcome(&mut connection, organization, claim, now_ms).await
        })
        .await
    }
}

impl PostgresStore {
    async fn try_create_key(
        &self,
        key: &ApiKey,
        limit: u64,
        claim: Option<&Claim<'_>>,
        note: &AuditNote,
        stamp: Stamp<'_>,
    ) -> Attempt<Written> {
        let mut change = Change::begin(self).await?;
        if let Some(claim) = claim
            && let Some(outcome) = find_outcome(&mut change.tx, &key.organization_id, claim, stamp.now_ms).await?
        {
            return Ok(Written::Replayed(outcome));
        }
        let count: i64 =
            sqlx::query_scalar("SELECT count(*) FROM keys WHERE organization_id = $1 AND revoked_at_ms IS NULL")
                .bind(&key.organization_id)
                .fetch_one(&mut *change.tx)
                .await?;
        if count as u64 >= limit {
            return Err(Failure::Final(Fault::TooMany { what: "keys", limit }));
        }
        let mut key = key.clone();
        key.revision = change.next_revision();
        insert_key(&mut change.tx, &key).await?;
        write_line(&mut change.tx, &key).await?;
        change.audit(note, stamp).await?;
        if let Some(claim) = claim {
            write_outcome(&mut change.tx, &key.organization_id, claim, &key, stamp.now_ms).await?;
        }
        change.commit().await?;
        Ok(Written::Done(Box::new(key)))
    }

    async fn try_edit_key(
        &self,
        organization: Option<&str>,
        id: &str,
        edit: &KeyEdit<'_>,
        claim: Option<&Claim<'_>>,
        stamp: Stamp<'_>,
    ) -> Attempt<Written> {
        let mut change = Change::begin(self).await?;
        let before = find_key(&mut change.tx, organization, id)
            .await?
            .ok_or(Fault::NotFound)?;
        if let Some(claim) = claim
            && let Some(outcome) = find_outcome(&mut change.tx, &before.organization_id, claim, stamp.now_ms).await?
        {
            return Ok(Written::Replayed(outcome));
        }
        let mut after = before.clone();
        let note = edit(&mut after)?;
        if after == before {
            return Ok(Written::Done(Box::new(before)));
        }
        after.revision = change.next_revision();
        update_key(&mut change.tx, &before, &after).await?;
        write_line(&mut change.tx, &after).await?;
        change.audit(&note, stamp).await?;
        if let Some(claim) = claim {
            write_outcome(&mut change.tx, &after.organization_id, claim, &after, stamp.now_ms).await?;
        }
        change.commit().await?;
        Ok(Written::Done(Box::new(after)))
    }

    async fn try_keys(&self, query: &KeyQuery) -> Attempt<Vec<ApiKey>> {
        let mut tx = self.begin_reading().await?;
        let rows: Vec<KeyRow> = select(query).build_query_as().fetch_all(&mut *tx).await?;
        with_secrets(&mut tx, rows).await
    }
}

/// What is read of a key; in the order of the table.
const KEY_COLUMNS: &str = "id, organization_id, name, environment, prefix, scopes, created_at_ms, expires_at_ms, \
                           disabled, revoked_at_ms, last_used_at_ms, revision";

#[derive(sqlx::FromRow)]
struct KeyRow {
    id: String,
    organization_id: String,
    name: String,
    environment: String,
    prefix: String,
    scopes: Vec<String>,
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
    fn into_key(self, mut secrets: Vec<KeySecret>) -> ApiKey {
        if let [only] = &mut *secrets {
            only.last_used_at_ms = self.last_used_at_ms;
        }
        ApiKey {
            id: self.id,
            organization_id: self.organization_id,
            name: self.name,
            environment: self.environment,
            prefix: self.prefix,
            scopes: self.scopes,
            created_at_ms: self.created_at_ms,
            expires_at_ms: self.expires_at_ms,
            disabled: self.disabled,
            revoked_at_ms: self.revoked_at_ms,
            last_used_at_ms: self.last_used_at_ms,
            revision: self.revision as u64,
            secrets,
        }
    }
}

async fn find_key(connection: &mut PgConnection, organization: Option<&str>, id: &str) -> Attempt<Option<ApiKey>> {
    let mut sql = QueryBuilder::<Postgres>::new(format!("SELECT {KEY_COLUMNS} FROM keys WHERE id = "));
    sql.push_bind(id);
    if let Some(organization) = organization {
        sql.push(" AND organization_id = ").push_bind(organization);
    }
    let rows: Vec<KeyRow> = sql.build_query_as().fetch_all(&mut *connection).await?;
    Ok(with_secrets(connection, rows).await?.pop())
}

async fn with_secrets(connection: &mut PgConnection, rows: Vec<KeyRow>) -> Attempt<Vec<ApiKey>> {
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    let found: Vec<SecretRow> = sqlx::query_as(
        "SELECT key_id, digest, last_four, created_at_ms, not_after_ms, last_used_at_ms FROM key_secrets
         WHERE key_id = ANY($1) ORDER BY key_id, serial DESC",
    )
    .bind(ids)
    .fetch_all(connection)
    .await?;
    let mut secrets: HashMap<String, Vec<KeySecret>> = HashMap::new();
    for row in found {
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
    Ok(rows
        .into_iter()
        .map(|row| {
            let own = secrets.remove(&row.id).unwrap_or_default();
            row.into_key(own)
        })
        .collect())
}

pub(super) async fn insert_key(tx: &mut PgConnection, key: &ApiKey) -> Attempt<()> {
    sqlx::query(
        "INSERT INTO keys (id, organization_id, name, environment, prefix, scopes, created_at_ms, expires_at_ms,
                           disabled, revoked_at_ms, revision)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
    )
    .bind(&key.id)
    .bind(&key.organization_id)
    .bind(&key.name)
    .bind(&key.environment)
    .bind(&key.prefix)
    .bind(&key.scopes)
    .bind(key.created_at_ms)
    .bind(key.expires_at_ms)
    .bind(key.disabled)
    .bind(key.revoked_at_ms)
    .bind(key.revision as i64)
    .execute(&mut *tx)
    .await?;
    // Oldest first, since the serial orders them.
    for secret in key.secrets.iter().rev() {
        insert_secret(tx, &key.id, secret).await?;
    }
    Ok(())
}

async fn insert_secret(tx: &mut PgConnection, key_id: &str, secret: &KeySecret) -> Attempt<()> {
    sqlx::query(
        "INSERT INTO key_secrets (key_id, digest, last_four, created_at_ms, not_after_ms) VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(key_id)
    .bind(secret.digest.as_slice())
    .bind(&secret.last_four)
    .bind(secret.created_at_ms)
    .bind(secret.not_after_ms)
    .execute(tx)
    .await?;
    Ok(())
}

async fn update_key(tx: &mut PgConnection, before: &ApiKey, after: &ApiKey) -> Attempt<()> {
    sqlx::query(
        "UPDATE keys SET name = $1, scopes = $2, expires_at_ms = $3, disabled = $4, revoked_at_ms = $5, revision = $6
         WHERE id = $7",
    )
    .bind(&after.name)
    .bind(&after.scopes)
    .bind(after.expires_at_ms)
    .bind(after.disabled)
    .bind(after.revoked_at_ms)
    .bind(after.revision as i64)
    .bind(&after.id)
    .execute(&mut *tx)
    .await?;
    if before.secrets.len() == 1 && after.secrets.len() > 1 {
        // The ledger told nobody but the key while this was its only secret.
        sqlx::query(
            "UPDATE key_secrets SET last_used_at_ms = (SELECT last_used_at_ms FROM keys WHERE id = $1) WHERE key_id = $1",
        )
        .bind(&after.id)
        .execute(&mut *tx)
        .await?;
    }
    for secret in after.secrets.iter().rev() {
        match before.secrets.iter().find(|known| known.digest == secret.digest) {
            None => insert_secret(tx, &after.id, secret).await?,
            Some(known) if known.not_after_ms != secret.not_after_ms => {
                sqlx::query("UPDATE key_secrets SET not_after_ms = $1 WHERE digest = $2")
                    .bind(secret.not_after_ms)
                    .bind(secret.digest.as_slice())
                    .execute(&mut *tx)
                    .await?;
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Tells the gates. The line before it is replaced: only a key's newest state matters.
pub(super) async fn write_line(tx: &mut PgConnection, key: &ApiKey) -> Attempt<()> {
    let plan: String = sqlx::query_scalar("SELECT plan FROM organizations WHERE id = $1")
        .bind(&key.organization_id)
        .fetch_one(&mut *tx)
        .await?;
    write_lines(tx, std::slice::from_ref(key), &plan).await
}

async fn write_lines(tx: &mut PgConnection, keys: &[ApiKey], plan: &str) -> Attempt<()> {
    let lines = keys.iter().map(|key| line::render(key, plan));
    let lines = lines.collect::<Result<Vec<_>, _>>()?;
    sqlx::query(
        "INSERT INTO feed_lines (revision, key_id, line)
         SELECT revision, key_id, line FROM unnest($1::bigint[], $2::text[], $3::text[]) AS told (revision, key_id, line)
         ON CONFLICT (key_id) DO UPDATE SET revision = excluded.revision, line = excluded.line",
    )
    .bind(keys.iter().map(|key| key.revision as i64).collect::<Vec<_>>())
    .bind(keys.iter().map(|key| key.id.as_str()).collect::<Vec<_>>())
    .bind(lines)
    .execute(tx)
    .await?;
    Ok(())
}

/// Writes the line of every key of an organisation anew, each at a revision of its own: in a few statements for a
/// thousand keys, since all other changes wait.
pub(super) async fn tell_organization(change: &mut Change, organization: &Organization) -> Attempt<()> {
    let mut last = String::new();
    loop {
        let mut sql = QueryBuilder::<Postgres>::new(format!("SELECT {KEY_COLUMNS} FROM keys WHERE organization_id = "));
        sql.push_bind(&organization.id)
            .push(" AND id > ")
            .push_bind(&last)
            .push(" AND EXISTS (SELECT 1 FROM feed_lines WHERE key_id = id) ORDER BY id LIMIT 1000");
        let rows: Vec<KeyRow> = sql.build_query_as().fetch_all(&mut *change.tx).await?;
        let Some(newest) = rows.last() else { return Ok(()) };
        last = newest.id.clone();
        let mut keys = with_secrets(&mut change.tx, rows).await?;
        for key in &mut keys {
            key.revision = change.next_revision();
        }
        sqlx::query(
            "UPDATE keys SET revision = told.revision FROM unnest($1::text[], $2::bigint[]) AS told (id, revision)
             WHERE keys.id = told.id",
        )
        .bind(keys.iter().map(|key| key.id.as_str()).collect::<Vec<_>>())
        .bind(keys.iter().map(|key| key.revision as i64).collect::<Vec<_>>())
        .execute(&mut *change.tx)
        .await?;
        write_lines(&mut change.tx, &keys, &organization.plan).await?;
    }
}

async fn find_outcome(
    connection: &mut PgConnection,
    organization: &str,
    claim: &Claim<'_>,
    now_ms: i64,
) -> Attempt<Option<String>> {
    let found: Option<(Vec<u8>, String)> = sqlx::query_as(
        "SELECT fingerprint, outcome FROM idempotency
         WHERE organization_id = $1 AND operation = $2 AND idempotency_key = $3 AND created_at_ms > $4",
    )
    .bind(organization)
    .bind(&claim.operation)
    .bind(claim.idempotency_key)
    .bind(now_ms - REMEMBER_OUTCOME_MS)
    .fetch_optional(connection)
    .await?;
    match found {
        None => Ok(None),
        Some((fingerprint, outcome)) if fingerprint == claim.fingerprint => Ok(Some(outcome)),
        Some(_) => Err(Failure::Final(Fault::IdempotencyKeyReused)),
    }
}

async fn write_outcome(
    tx: &mut PgConnection,
    organization: &str,
    claim: &Claim<'_>,
    key: &ApiKey,
    now_ms: i64,
) -> Attempt<()> {
    // Replaces one whose 24 hours are over and that was not pruned yet; a living one was found before.
    sqlx::query(
        "INSERT INTO idempotency (organization_id, operation, idempotency_key, fingerprint, outcome, created_at_ms)
         VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (organization_id, operation, idempotency_key) DO UPDATE
             SET fingerprint = excluded.fingerprint, outcome = excluded.outcome, created_at_ms = excluded.created_at_ms",
    )
    .bind(organization)
    .bind(&claim.operation)
    .bind(claim.idempotency_key)
    .bind(claim.fingerprint.as_slice())
    .bind((claim.record)(key)?)
    .bind(now_ms)
    .execute(tx)
    .await?;
    Ok(())
}

fn select(query: &KeyQuery) -> QueryBuilder<Postgres> {
    let mut sql = QueryBuilder::new(format!("SELECT {KEY_COLUMNS} FROM keys AS k WHERE true"));
    if let Some(organization) = &query.organization {
        sql.push(" AND k.organization_id = ").push_bind(organization.clone());
    }
    if let Some(environment) = &query.environment {
        sql.push(" AND k.environment = ").push_bind(environment.clone());
    }
    if let Some(scope) = &query.scope {
        sql.push(" AND ").push_bind(scope.clone()).push(" = ANY(k.scopes)");
    }
    if let Some(search) = &query.search {
        sql.push(" AND (k.name ILIKE ")
            .push_bind(like(search))
            .push(" OR k.id = ")
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
        .push_bind(i64::from(query.limit));
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
fn push_status(sql: &mut QueryBuilder<Postgres>, status: KeyStatus, now_ms: i64) {
    if status == KeyStatus::Revoked {
        sql.push(" AND k.revoked_at_ms IS NOT NULL");
        return;
    }
    sql.push(" AND k.revoked_at_ms IS NULL");
    if status == KeyStatus::Disabled {
        sql.push(" AND k.disabled");
        return;
    }
    sql.push(" AND NOT k.disabled AND coalesce(k.expires_at_ms, 9223372036854775807)");
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

/// A pattern that finds `text` anywhere; what LIKE would read as wild cards is escaped (by `\`, PostgreSQL's default).
pub(super) fn like(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_");
    format!("%{escaped}%")
}
