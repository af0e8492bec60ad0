//! Reading the audit log; it is written with each change.

use async_trait::async_trait;
use sqlx::{Postgres, QueryBuilder};

use super::retry::retry;
use super::{PostgresStore, is_nowhere};
use crate::control::model::{AuditLine, Fault};
use crate::control::store::rows::AuditRow;
use crate::control::store::{AuditQuery, AuditStore};

#[async_trait]
impl AuditStore for PostgresStore {
    async fn audit(&self, query: &AuditQuery) -> Result<Vec<AuditLine>, Fault> {
        let asked = [&query.organization, &query.action, &query.target, &query.actor];
        if is_nowhere(&asked.map(|text| text.as_deref())) {
            return Ok(Vec::new());
        }
        retry(|| async {
            let rows: Vec<AuditRow> = select(query).build_query_as().fetch_all(&self.pools.general).await?;
            Ok(rows.into_iter().map(AuditRow::into_line).collect())
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
