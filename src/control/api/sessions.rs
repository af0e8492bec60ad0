//! Signing in and out, one's own sessions, the password.

use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::caller::{Person, Visitor, clear_cookie, session_cookie, set_cookie};
use super::error::ApiError;
use super::fields::Body;
use super::value::Date;
use super::{App, Envelope, Reply};
use crate::control::model::Session;
use crate::control::service::sessions::{LoginDraft, PasswordDraft, SignedIn};

/// Who signs in.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct LoginRequest {
    #[schema(max_length = 254, example = "dev@example.com")]
    email: String,
    #[schema(max_length = 1024, example = "your-secure-password")]
    password: String,
}

/// The old password and the new one.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct PasswordRequest {
    #[schema(max_length = 1024)]
    current_password: String,
    #[schema(min_length = 8, max_length = 1024)]
    new_password: String,
}

/// Who is signed in.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionAnswer {
    organization_id: String,
    user_id: String,
    email: String,
    session_id: String,
    expires_at: Date,
}

/// A session of one's own.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionView {
    id: String,
    created_at: Date,
    /// Within a minute.
    last_used_at: Date,
    expires_at: Date,
    /// Where it was begun from.
    address: String,
    user_agent: String,
    /// Whether it is the one that asks.
    current: bool,
}

/// One's own sessions.
#[derive(Serialize, ToSchema)]
pub struct SessionList {
    items: Vec<SessionView>,
}

/// How many sessions were ended.
#[derive(Serialize, ToSchema)]
pub struct Ended {
    ended: u64,
}

/// Sign in. The session comes as a cookie; a session that the browser brought along ends.
#[utoipa::path(
    post, path = "/api/v1/login", tag = "Account", operation_id = "login",
    request_body = LoginRequest, security(()),
    responses((status = 200, description = "Signed in.", body = Envelope<SessionAnswer>,
        headers(("Set-Cookie" = String, description = "The session.")))),
)]
pub async fn login(
    State(app): State<App>,
    Visitor(caller): Visitor,
    headers: HeaderMap,
    Body(mut fields): Body,
) -> Result<Response, ApiError> {
    let mut draft = LoginDraft {
        email: fields.text("email"),
        password: fields.text("password"),
        brought: session_cookie(&headers, &app.settings).map(str::to_owned),
        ..Default::default()
    };
    draft.faults = fields.finish();
    let signed_in = app.login(&caller, draft).await?;
    Ok(with_cookie(
        Reply::ok(answer(&signed_in)),
        set_cookie(signed_in.secret.expose(), &app.settings),
    ))
}

/// Sign out.
#[utoipa::path(
    post, path = "/api/v1/logout", tag = "Account", operation_id = "logout",
    responses((status = 200, description = "Signed out.", body = Envelope<Ended>)),
)]
pub async fn logout(State(app): State<App>, person: Person) -> Result<Response, ApiError> {
    app.end_session(&person.caller, &person.user.id, &person.session.id)
        .await?;
    Ok(with_cookie(Reply::ok(Ended { ended: 1 }), clear_cookie(&app.settings)))
}

/// Who am I?
#[utoipa::path(
    get, path = "/api/v1/session", tag = "Account", operation_id = "showSession",
    responses((status = 200, description = "The session.", body = Envelope<SessionAnswer>)),
)]
pub async fn show(person: Person) -> Reply<SessionAnswer> {
    Reply::ok(SessionAnswer {
        organization_id: person.user.organization_id,
        user_id: person.user.id,
        email: person.user.email,
        session_id: person.session.id,
        expires_at: Date(person.session.expires_at_ms),
    })
}

/// One's own sessions, the latest used first.
#[utoipa::path(
    get, path = "/api/v1/sessions", tag = "Account", operation_id = "listSessions",
    responses((status = 200, description = "The sessions.", body = Envelope<SessionList>)),
)]
pub async fn list(State(app): State<App>, person: Person) -> Result<Reply<SessionList>, ApiError> {
    let sessions = app.sessions(&person.user.id).await?;
    let items = sessions
        .into_iter()
        .map(|session| view(session, &person.session.id))
        .collect();
    Ok(Reply::ok(SessionList { items }))
}

/// End every session of one's own but this one.
#[utoipa::path(
    delete, path = "/api/v1/sessions", tag = "Account", operation_id = "endOtherSessions",
    responses((status = 200, description = "Ended.", body = Envelope<Ended>)),
)]
pub async fn end_others(State(app): State<App>, person: Person) -> Result<Reply<Ended>, ApiError> {
    let ended = app
        .end_other_sessions(&person.caller, &person.user.id, &person.session.id)
        .await?;
    Ok(Reply::ok(Ended { ended }))
}

/// End one session of one's own.
#[utoipa::path(
    delete, path = "/api/v1/sessions/{id}", tag = "Account", operation_id = "endSession",
    params(("id" = String, Path, description = "The session.")),
    responses((status = 200, description = "Ended.", body = Envelope<Ended>)),
)]
pub async fn end(State(app): State<App>, person: Person, Path(id): Path<String>) -> Result<Reply<Ended>, ApiError> {
    app.end_session(&person.caller, &person.user.id, &id).await?;
    Ok(Reply::ok(Ended { ended: 1 }))
}

/// Change the password. Every other session ends, and this one gets a new cookie.
#[utoipa::path(
    post, path = "/api/v1/password", tag = "Account", operation_id = "changePassword",
    request_body = PasswordRequest,
    responses((status = 200, description = "Changed.", body = Envelope<SessionAnswer>,
        headers(("Set-Cookie" = String, description = "The new session.")))),
)]
pub async fn change_password(
    State(app): State<App>,
    person: Person,
    Body(mut fields): Body,
) -> Result<Response, ApiError> {
    let mut draft = PasswordDraft {
        current: fields.text("currentPassword"),
        new: fields.text("newPassword"),
        ..Default::default()
    };
    draft.faults = fields.finish();
    let signed_in = app.change_password(&person.caller, &person.user, draft).await?;
    Ok(with_cookie(
        Reply::ok(answer(&signed_in)),
        set_cookie(signed_in.secret.expose(), &app.settings),
    ))
}

fn answer(signed_in: &SignedIn) -> SessionAnswer {
    SessionAnswer {
        organization_id: signed_in.user.organization_id.clone(),
        user_id: signed_in.user.id.clone(),
        email: signed_in.user.email.clone(),
        session_id: signed_in.session.id.clone(),
        expires_at: Date(signed_in.session.expires_at_ms),
    }
}

fn view(session: Session, current: &str) -> SessionView {
    SessionView {
        current: session.id == current,
        id: session.id,
        created_at: Date(session.created_at_ms),
        last_used_at: Date(session.last_used_at_ms),
        expires_at: Date(session.expires_at_ms),
        address: session.address,
        user_agent: session.user_agent,
    }
}

fn with_cookie<T: Serialize>(reply: Reply<T>, cookie: Option<HeaderValue>) -> Response {
    let mut response = reply.into_response();
    if let Some(cookie) = cookie {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    response
}
