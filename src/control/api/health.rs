//! Whether the control plane can do its work.

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::error::ApiError;
use super::{App, Envelope, Reply};

/// Healthy.
#[derive(Serialize, ToSchema)]
pub struct Health {
    /// The newest feed revision.
    revision: u64,
}

/// Whether the database answers.
#[utoipa::path(
    get, path = "/healthz", tag = "Health", operation_id = "health", security(()),
    responses((status = 200, description = "It does.", body = Envelope<Health>)),
)]
pub async fn health(State(app): State<App>) -> Result<Reply<Health>, ApiError> {
    let revision = app.store.revision().await?;
    Ok(Reply::ok(Health { revision }))
}
