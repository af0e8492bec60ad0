//! Reading the audit log; it is written with each change.

use async_trait::async_trait;
use sqlx::{QueryBuilder, Sqlite};

use super::{SqliteStore, fault};
use crate::control::model::{AuditLine, Fault};
use crate::control::store::rows::AuditRow;
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
        let rows: Vec<AuditRow> = sql.build_query_as().fetch_all(&self.readers).await.map_err(fault)?;
        Ok(rows.into_iter().map(AuditRow::into_line).collect())
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
