//! `POST /api/v1/register`.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::caller::Visitor;
use super::error::ApiError;
use super::fields::Body;
use super::keys::wait_for;
use super::{App, Envelope, Reply};
use crate::control::service::accounts::RegisterDraft;

/// Who registers.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct RegisterRequest {
    /// The organisation's name.
    #[schema(min_length = 1, max_length = 100, example = "My Company")]
    name: String,
    #[schema(max_length = 254, example = "dev@example.com")]
    email: String,
    #[schema(min_length = 8, max_length = 1024, example = "your-secure-password")]
    password: String,
    /// Where registration is by invitation.
    invitation: Option<String>,
}

/// The organisation, and its first key: this once.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RegisterAnswer {
    #[schema(example = "org_4fzq0XbW2Tn8rLs7KcY")]
    organization_id: String,
    /// A sandbox key with every scope. It cannot be shown again.
    api_key: String,
}

/// Make an account: an organisation, its first user, and a sandbox key that may do everything there.
#[utoipa::path(
    post, path = "/api/v1/register", tag = "Account", operation_id = "register",
    request_body = RegisterRequest, security(()),
    responses((status = 201, description = "Made.", body = Envelope<RegisterAnswer>)),
)]
pub async fn register(
    State(app): State<App>,
    Visitor(caller): Visitor,
    Body(mut fields): Body,
) -> Result<Reply<RegisterAnswer>, ApiError> {
    let mut draft = RegisterDraft {
        name: fields.text("name"),
        email: fields.text("email"),
        password: fields.text("password"),
        invitation: fields.text("invitation"),
        ..Default::default()
    };
    draft.faults = fields.finish();
    let made = app.register(&caller, draft).await?;
    wait_for(&app, made.revision, None).await;
    Ok(Reply::created(RegisterAnswer {
        organization_id: made.organization_id,
        api_key: made.secret.expose().to_owned(),
    }))
}
