//! Reading the audit log; it is written with each change.

use async_trait::async_trait;
use sqlx::{QueryBuilder, Sqlite};

use super::{SqliteStore, fault};
use crate::control::model::{AuditLine, Fault};
use crate::control::store::{AuditQuery, AuditStore};

#[async_trait]
impl AuditStore for SqliteStore {
    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditLine>, Fault> {
        let mut sql: QueryBuilder<Sqlite> = QueryBuilder::new("SELECT * FROM audit WHERE 1");
        if let Some(organization) = &query.organization {
            sql.push(" AND organization_id = ").push_bind(organization.clone());
        }
        if let Some(action) = &query.action {
            sql.push(" AND action = ").push_bind(action.clone());
        }
        if let Some(target) = &query.target {
            sql.push(" AND target_id = ").push_bind(target.clone());
        }
        if let Some(actor) = &query.actor {
            sql.push(" AND actor_id = ").push_bind(actor.clone());
        }
        if let Some(from) = query.from_ms {
            sql.push(" AND at_ms >= ").push_bind(from);
        }
        if let Some(to) = query.to_ms {
            sql.push(" AND at_ms < ").push_bind(to);
        }
        if let Some(before) = query.before {
            sql.push(" AND serial < ").push_bind(before);
        }
        sql.push(" ORDER BY serial DESC LIMIT ").push_bind(query.limit);
        let rows: Vec<Row> = sql.build_query_as().fetch_all(&self.readers).await.map_err(fault)?;
        Ok(rows.into_iter().map(Row::into_line).collect())
    }

    async fn forget_audit(&self, before_ms: i64, most: u32) -> Result<u64, Fault> {
        // By the order in which they were written: there is no index by time.
        sqlx::query(
            "DELETE FROM audit WHERE serial IN (SELECT serial FROM audit ORDER BY serial LIMIT ?) AND at_ms < ?",
        )
        .bind(most)
        .bind(before_ms)
        .execute(&self.writer)
        .await
        .map(|done| done.rows_affected())
        .map_err(fault)
    }
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
            // The column's check guarantees JSON.
            detail: serde_json::from_str(&self.detail).unwrap_or_default(),
            address: self.address,
            user_agent: self.user_agent,
            request_id: self.request_id,
        }
    }
}
