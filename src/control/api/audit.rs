//! Who did what, when, from where.

use axum::extract::State;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::caller::Tenant;
use super::error::ApiError;
use super::fields::{Fields, QueryFields};
use super::value::{Date, cursor, read_cursor};
use super::{App, Envelope, Reply};
use crate::control::model::AuditLine;
use crate::control::store::AuditQuery;

/// One line of the audit log.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuditView {
    id: i64,
    at: Date,
    organization_id: Option<String>,
    actor: ActorView,
    /// Such as `key.rotate`.
    action: String,
    target: TargetView,
    /// What changed.
    #[schema(value_type = Object)]
    detail: serde_json::Value,
    address: String,
    user_agent: String,
    request_id: String,
}

/// Who did it.
#[derive(Serialize, ToSchema)]
pub struct ActorView {
    /// `user`, `token`, `operator`, `system` or `visitor`.
    kind: String,
    id: String,
    name: String,
}

/// What it was done to.
#[derive(Serialize, ToSchema)]
pub struct TargetView {
    kind: String,
    id: String,
}

/// A page of the audit log, newest first.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuditList {
    items: Vec<AuditView>,
    /// For the next page; null on the last one.
    next_cursor: Option<String>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "describes the query; it is read field by field")]
pub struct AuditListQuery {
    #[param(max_length = 64, example = "key.rotate")]
    action: Option<String>,
    /// The id of what it was done to.
    #[param(max_length = 64)]
    target: Option<String>,
    /// The id of who did it.
    #[param(max_length = 254)]
    actor: Option<String>,
    #[param(value_type = Option<Date>, inline)]
    from: Option<String>,
    #[param(value_type = Option<Date>, inline)]
    to: Option<String>,
    /// `nextCursor` of the page before.
    #[param(max_length = 1024)]
    cursor: Option<String>,
    /// Default: 50.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<u32>,
}

/// The organisation's audit log, newest first.
#[utoipa::path(
    get, path = "/api/v1/audit", tag = "Audit", operation_id = "listAudit", params(AuditListQuery),
    responses((status = 200, description = "A page of it.", body = Envelope<AuditList>)),
)]
pub async fn list(
    State(app): State<App>,
    tenant: Tenant,
    QueryFields(fields): QueryFields,
) -> Result<Reply<AuditList>, ApiError> {
    Ok(Reply::ok(page(&app, fields, Some(tenant.organization)).await?))
}

/// Reads a page of the audit log, of one organisation or of all.
pub async fn page(app: &App, mut fields: Fields, organization: Option<String>) -> Result<AuditList, ApiError> {
    let limit = fields.number("limit", 1..=100).unwrap_or(50) as u32;
    let mut query = AuditQuery {
        organization,
        action: fields.short("action", 64),
        target: fields.short("target", 64),
        actor: fields.short("actor", 254),
        from_ms: fields.date("from"),
        to_ms: fields.date("to"),
        before: None,
        limit: limit + 1,
    };
    if let Some(text) = fields.text("cursor") {
        query.before = match read_cursor(&text).and_then(|(value, _)| value.parse().ok()) {
            Some(before) => Some(before),
            None => fields.fault("cursor", "is not one that a page gave"),
        };
    }
    fields.done()?;
    let mut lines = app.store.audit(&query).await?;
    let more = lines.len() > limit as usize;
    lines.truncate(limit as usize);
    let next_cursor = lines
        .last()
        .filter(|_| more)
        .map(|line| cursor(&line.serial.to_string(), "audit"));
    Ok(AuditList {
        items: lines.into_iter().map(AuditView::of).collect(),
        next_cursor,
    })
}

impl AuditView {
    fn of(line: AuditLine) -> Self {
        Self {
            id: line.serial,
            at: Date(line.at_ms),
            organization_id: line.organization_id,
            actor: ActorView {
                kind: line.actor_kind,
                id: line.actor_id,
                name: line.actor_name,
            },
            action: line.action,
            target: TargetView {
                kind: line.target_kind,
                id: line.target_id,
            },
            detail: line.detail,
            address: line.address,
            user_agent: line.user_agent,
            request_id: line.request_id,
        }
    }
}
