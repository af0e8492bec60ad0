//! One's own organisation.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::caller::Tenant;
use super::error::ApiError;
use super::fields::Body;
use super::value::Date;
use super::{App, Envelope, Reply};
use crate::control::model::Organization;

/// An organisation.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrganizationView {
    id: String,
    name: String,
    plan: String,
    created_at: Date,
}

/// What is to change.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct UpdateOwnOrganizationRequest {
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
}

/// One's own organisation.
#[utoipa::path(
    get, path = "/api/v1/organization", tag = "Account", operation_id = "showOrganization",
    responses((status = 200, description = "The organisation.", body = Envelope<OrganizationView>)),
)]
pub async fn show(State(app): State<App>, tenant: Tenant) -> Result<Reply<OrganizationView>, ApiError> {
    Ok(Reply::ok(OrganizationView::of(
        app.organization(&tenant.organization).await?,
    )))
}

/// Rename one's own organisation. Its plan is the operator's to change.
#[utoipa::path(
    patch, path = "/api/v1/organization", tag = "Account", operation_id = "updateOrganization",
    request_body = UpdateOwnOrganizationRequest,
    responses((status = 200, description = "Changed.", body = Envelope<OrganizationView>)),
)]
pub async fn update(
    State(app): State<App>,
    tenant: Tenant,
    Body(mut fields): Body,
) -> Result<Reply<OrganizationView>, ApiError> {
    let name = fields.text("name");
    let faults = fields.finish();
    let organization = app
        .rename_organization(&tenant.caller, &tenant.organization, name, faults)
        .await?;
    Ok(Reply::ok(OrganizationView::of(organization)))
}

impl OrganizationView {
    pub fn of(organization: Organization) -> Self {
        Self {
            id: organization.id,
            name: organization.name,
            plan: organization.plan,
            created_at: Date(organization.created_at_ms),
        }
    }
}
