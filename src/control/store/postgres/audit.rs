//! Reading the audit log; it is written with each change.

use async_trait::async_trait;
use sqlx::{Postgres, QueryBuilder};

use super::retry::retry;
use super::{PostgresStore, is_nowhere};
use crate::control::model::{AuditLine, Fault};
use crate::control::store::{AuditQuery, AuditStore};

#[async_trait]
impl AuditStore for PostgresStore {
    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditLine>, Fault> {
        let asked = [&query.organization, &query.action, &query.target, &query.actor];
        if is_nowhere(&asked.map(|text| text.as_deref())) {
            return Ok(Vec::new());
        }
        retry(|| async {
            let rows: Vec<Row> = select(query).build_query_as().fetch_all(&self.pools.general).await?;
            Ok(rows.into_iter().map(Row::into_line).collect())
        })
        .await
    }

    async fn forget_audit(&self, before_ms: i64, most: u32) -> Result<u64, Fault> {
        retry(|| async {
            // By the order in which they were written: there is no index by time.
            let done = sqlx::query(
                "DELETE FROM audit WHERE serial IN (SELECT serial FROM audit ORDER BY serial LIMIT $1) AND at_ms < $2",
            )
            .bind(i64::from(most))
            .bind(before_ms)
            .execute(&self.pools.general)
            .await?;
            Ok(done.rows_affected())
        })
        .await
    }
}

fn select(query: &AuditQuery) -> QueryBuilder<Postgres> {
    let mut sql = QueryBuilder::new(
        "SELECT serial, at_ms, organization_id, actor_kind, actor_id, actor_name, action, target_kind, target_id,
                detail::text AS detail, address, user_agent, request_id FROM audit WHERE true",
    );
    for (column, value) in [
        ("organization_id", &query.organization),
        ("action", &query.action),
        ("target_id", &query.target),
        ("actor_id", &query.actor),
    ] {
        if let Some(value) = value {
            sql.push(format!(" AND {column} = ")).push_bind(value.clone());
        }
    }
    for (condition, value) in [
        (" AND at_ms >= ", query.from_ms),
        (" AND at_ms < ", query.to_ms),
        (" AND serial < ", query.before),
    ] {
        if let Some(value) = value {
            sql.push(condition).push_bind(value);
        }
    }
    sql.push(" ORDER BY serial DESC LIMIT ")
        .push_bind(i64::from(query.limit));
    sql
}

#[derive(sqlx::FromRow)]
struct Row {
    serial: i64,
    at_ms: i64,
    organization_id: Option<String>,
    actor_kind: String,
    actor_id: String,
    actor_name: String,
    action: String,
    target_kind: String,
    target_id: String,
    detail: String,
    address: String,
    user_agent: String,
    request_id: String,
}

impl Row {
    fn into_line(self) -> AuditLine {
        AuditLine {
            serial: self.serial,
            at_ms: self.at_ms,
            organization_id: self.organization_id,
            actor_kind: self.actor_kind,
            actor_id: self.actor_id,
            actor_name: self.actor_name,
            action: self.action,
            target_kind: self.target_kind,
            target_id: self.target_id,
            // The column's type guarantees JSON.
            detail: serde_json::from_str(&self.detail).unwrap_or_default(),
            address: self.address,
            user_agent: self.user_agent,
            request_id: self.request_id,
        }
    }
}
