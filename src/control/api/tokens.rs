//! Access tokens.

use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::caller::Tenant;
use super::error::ApiError;
use super::fields::Body;
use super::value::Date;
use super::{App, Envelope, Reply};
use crate::control::model::AccessToken;
use crate::control::service::tokens::TokenDraft;

/// A token to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct CreateTokenRequest {
    #[schema(min_length = 1, max_length = 100, example = "deploy script")]
    name: String,
    /// Refused from then on; absent or null: never.
    #[schema(value_type = Option<Date>)]
    expires_at: Option<String>,
}

/// An access token. It acts for the whole organisation.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TokenView {
    id: String,
    name: String,
    #[schema(example = "pxm_…x7Qz")]
    masked: String,
    created_at: Date,
    expires_at: Option<Date>,
    /// Within a minute.
    last_used_at: Option<Date>,
}

/// A new token, shown this once.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct IssuedToken {
    #[serde(flatten)]
    token_view: TokenView,
    /// The token itself.
    token: String,
}

/// The organisation's tokens.
#[derive(Serialize, ToSchema)]
pub struct TokenList {
    items: Vec<TokenView>,
}

/// What was deleted.
#[derive(Serialize, ToSchema)]
pub struct Deleted {
    id: String,
}

impl Deleted {
    pub fn new(id: String) -> Self {
        Self { id }
    }
}

/// The organisation's access tokens, oldest first.
#[utoipa::path(
    get, path = "/api/v1/tokens", tag = "Access tokens", operation_id = "listTokens",
    responses((status = 200, description = "The tokens.", body = Envelope<TokenList>)),
)]
pub async fn list(State(app): State<App>, tenant: Tenant) -> Result<Reply<TokenList>, ApiError> {
    let tokens = app.tokens(&tenant.organization).await?;
    Ok(Reply::ok(TokenList {
        items: tokens.into_iter().map(TokenView::of).collect(),
    }))
}

/// Make an access token. The answer shows it this once.
#[utoipa::path(
    post, path = "/api/v1/tokens", tag = "Access tokens", operation_id = "createToken",
    request_body = CreateTokenRequest,
    responses((status = 201, description = "Made.", body = Envelope<IssuedToken>)),
)]
pub async fn create(
    State(app): State<App>,
    tenant: Tenant,
    Body(mut fields): Body,
) -> Result<Reply<IssuedToken>, ApiError> {
    let mut draft = TokenDraft {
        name: fields.text("name"),
        expires_at_ms: fields.date("expiresAt"),
        ..Default::default()
    };
    draft.faults = fields.finish();
    let (token, secret) = app.create_token(&tenant.caller, &tenant.organization, draft).await?;
    Ok(Reply::created(IssuedToken {
        token_view: TokenView::of(token),
        token: secret.expose().to_owned(),
    }))
}

/// End an access token at once.
#[utoipa::path(
    delete, path = "/api/v1/tokens/{id}", tag = "Access tokens", operation_id = "deleteToken",
    params(("id" = String, Path, description = "The token.")),
    responses((status = 200, description = "Ended.", body = Envelope<Deleted>)),
)]
pub async fn delete(
    State(app): State<App>,
    tenant: Tenant,
    Path(id): Path<String>,
) -> Result<Reply<Deleted>, ApiError> {
    app.delete_token(&tenant.caller, &tenant.organization, &id).await?;
    Ok(Reply::ok(Deleted { id }))
}

impl TokenView {
    fn of(token: AccessToken) -> Self {
        Self {
            masked: format!("pxm_…{}", token.last_four),
            id: token.id,
            name: token.name,
            created_at: Date(token.created_at_ms),
            expires_at: token.expires_at_ms.map(Date),
            last_used_at: token.last_used_at_ms.map(Date),
        }
    }
}
