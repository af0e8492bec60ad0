//! Access tokens: what scripts and the command line use.

use askama::Template;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use super::Shared;
use super::create::FORM_IS_OLD;
use super::input::{Asked, Input, Posted, form_token, one_time_id, read_form_token};
use super::page::{Problem, Shell, page, page_with};
use super::parts::{Choice, Faults, Markup, masked, when, when_or};
use super::person::Person;
use super::reveal::{Line, Revealed, already, quoted, reveal};
use crate::control::model::{AccessToken, Fault};
use crate::control::service::tokens::TokenDraft;
use crate::control::store::AuditQuery;

#[derive(Template)]
#[template(path = "tokens.html")]
struct TokensPage {
    shell: Shell,
    rows: Vec<TokenRow>,
    name: String,
    expiries: Vec<Choice>,
    form_token: String,
    notice: Option<&'static str>,
    faults: Faults,
}

struct TokenRow {
    id: String,
    name: String,
    masked: String,
    created: Markup,
    last_used: Markup,
    expires: Markup,
    is_expired: bool,
}

/// `GET /tokens`.
pub async fn list(State(portal): State<Shared>, person: Person, Asked(query): Asked) -> Result<Response, Problem> {
    let mut tokens = tokens_page(&portal, &person, &Input::default()).await?;
    tokens.notice = (query.text("done") == Some("deleted")).then_some("The access token is deleted.");
    Ok(page(&tokens))
}

/// `POST /tokens`: makes a token and shows it this once.
pub async fn create(State(portal): State<Shared>, person: Person, Posted(form): Posted) -> Result<Response, Problem> {
    let app = &portal.app;
    let organization = &person.organization.id;
    let now_ms = app.now_ms();
    let mut again = tokens_page(&portal, &person, &form).await?;
    let Some(token) = read_form_token(&form, now_ms) else {
        again.notice = Some(FORM_IS_OLD);
        return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
    };
    // The form decides the id, and the audit log remembers each for ever: sent twice, a form makes one token.
    let id = one_time_id("tok_", organization, token);
    let made = AuditQuery {
        organization: Some(organization.clone()),
        target: Some(id.clone()),
        limit: 1,
        ..AuditQuery::default()
    };
    if !app.store.audit(&made).await?.is_empty() {
        return Ok(already(
            person.shell("/tokens"),
            "access token",
            &form.shown("name"),
            "/tokens",
        ));
    }
    let days = form.text("expiry").and_then(|days| days.parse::<i64>().ok());
    let draft = TokenDraft {
        name: form.owned("name"),
        expires_at_ms: days
            .filter(|days| (1..=3_650).contains(days))
            .map(|days| now_ms + days * 86_400_000),
        id: Some(id),
        ..Default::default()
    };
    let (token, secret) = match app.create_token(&person.caller, organization, draft).await {
        Ok(made) => made,
        Err(Fault::Validation(faults)) => {
            again.faults = Faults(faults);
            return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
        }
        Err(other) => return Err(other.into()),
    };
    let line = app.settings.public_url.as_deref().map(|url| Line {
        command: format!(
            "curl {} -H {}",
            quoted(&format!("{}/api/v1/keys", url.trim_end_matches('/'))),
            quoted(&format!("Authorization: Bearer {}", secret.expose()))
        ),
        is_complete: true,
    });
    Ok(reveal(Revealed {
        shell: person.shell("/tokens"),
        title: "Access token created",
        what: "access token",
        name: &token.name,
        secret: secret.expose(),
        notes: vec![Markup::text(
            "It may do everything in this organisation that you may do, except what concerns your own sign-in.",
        )],
        line,
        done: "/tokens",
    }))
}

/// `POST /tokens/{id}/delete`.
pub async fn delete(State(portal): State<Shared>, person: Person, Path(id): Path<String>) -> Result<Response, Problem> {
    portal
        .app
        .delete_token(&person.caller, &person.organization.id, &id)
        .await?;
    Ok(Redirect::to("/tokens?done=deleted").into_response())
}

async fn tokens_page(portal: &Shared, person: &Person, input: &Input) -> Result<TokensPage, Problem> {
    let app = &portal.app;
    let now_ms = app.now_ms();
    let row = |token: AccessToken| TokenRow {
        masked: masked("pxm_", &token.last_four),
        created: when(token.created_at_ms, now_ms),
        last_used: when_or(token.last_used_at_ms, now_ms, "never"),
        expires: when_or(token.expires_at_ms, now_ms, "never"),
        is_expired: token.expires_at_ms.is_some_and(|end| end <= now_ms),
        id: token.id,
        name: token.name,
    };
    let expiry = input.text("expiry").unwrap_or("90");
    Ok(TokensPage {
        shell: person.shell("/tokens"),
        rows: app
            .tokens(&person.organization.id)
            .await?
            .into_iter()
            .map(row)
            .collect(),
        name: input.shown("name"),
        expiries: [
            ("30", "In 30 days"),
            ("90", "In 90 days"),
            ("365", "In a year"),
            ("never", "Never"),
        ]
        .map(|(value, text)| Choice::new(value, text, expiry))
        .into(),
        form_token: form_token(now_ms)?,
        notice: None,
        faults: Faults::default(),
    })
}
