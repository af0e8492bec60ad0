//! Everybody's keys.

use askama::Template;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use crate::control::model::{ApiKey, Organization};
use crate::control::portal::Shared;
use crate::control::portal::input::{Asked, Posted};
use crate::control::portal::key::{Confirmation, is_typed};
use crate::control::portal::keys::{KeyTable, table as key_table};
use crate::control::portal::page::{Problem, Shell, page, page_with};
use crate::control::portal::parts::{Markup, masked_key, status_badge, when, when_or};
use crate::control::portal::person::Operator;
use crate::control::portal::reveal::let_gates_follow;
use crate::control::service::keys::KeyPatch;

#[derive(Template)]
#[template(path = "operator_keys.html")]
struct KeysPage {
    shell: Shell,
    list: KeyTable,
}

#[derive(Template)]
#[template(path = "operator_key.html")]
struct KeyPage {
    shell: Shell,
    key: ApiKey,
    organization: Organization,
    masked: String,
    badge: Markup,
    created: Markup,
    last_used: Markup,
    expires: Markup,
    is_wrong: bool,
    notice: Option<&'static str>,
    confirmation: Option<Confirmation>,
}

pub async fn keys(State(portal): State<Shared>, _: Operator, Asked(query): Asked) -> Result<Response, Problem> {
    let organization = query.text("organization").map(|id| id.chars().take(64).collect());
    let list = key_table(&portal, &query, "/operator/keys", organization).await?;
    Ok(page(&KeysPage {
        shell: Shell::operator("/operator/keys"),
        list,
    }))
}

pub async fn key(
    State(portal): State<Shared>,
    _: Operator,
    Path(id): Path<String>,
    Asked(query): Asked,
) -> Result<Response, Problem> {
    let key = portal.app.key(None, &id).await?;
    let mut shown = key_page(&portal, key).await?;
    shown.notice = match query.text("done") {
        Some("disabled") => Some("The key is disabled."),
        Some("enabled") => Some("The key is enabled."),
        Some("revoked") => Some("The key is revoked for good."),
        _ => None,
    };
    if let Some(revision) = query.text("revision").and_then(|text| text.parse::<u64>().ok()) {
        let app = &portal.app;
        let applied = app.hub.applied(revision.min(app.hub.revision()), app.now_ms());
        shown.confirmation = Some(Confirmation::of(
            applied,
            format!("/operator/keys/{id}?revision={revision}"),
        ));
    }
    Ok(page(&shown))
}

pub async fn disable_key(
    State(portal): State<Shared>,
    who: Operator,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    set_disabled(&portal, who, &id, true).await
}

pub async fn enable_key(
    State(portal): State<Shared>,
    who: Operator,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    set_disabled(&portal, who, &id, false).await
}

async fn set_disabled(portal: &Shared, who: Operator, id: &str, disabled: bool) -> Result<Response, Problem> {
    let patch = KeyPatch {
        disabled: Some(disabled),
        ..KeyPatch::default()
    };
    let key = portal.app.update_key(&who.0, None, id, patch).await?;
    Ok(changed(portal, &key, if disabled { "disabled" } else { "enabled" }).await)
}

pub async fn revoke_key(
    State(portal): State<Shared>,
    Operator(caller): Operator,
    Path(id): Path<String>,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let key = portal.app.key(None, &id).await?;
    if !is_typed(&form, &key.name) {
        let mut again = key_page(&portal, key).await?;
        again.is_wrong = true;
        return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
    }
    let key = portal.app.revoke_key(&caller, None, &id).await?;
    Ok(changed(&portal, &key, "revoked").await)
}

async fn changed(portal: &Shared, key: &ApiKey, done: &str) -> Response {
    let_gates_follow(&portal.app, key.revision).await;
    Redirect::to(&format!(
        "/operator/keys/{}?done={done}&revision={}",
        key.id, key.revision
    ))
    .into_response()
}

async fn key_page(portal: &Shared, key: ApiKey) -> Result<KeyPage, Problem> {
    let now_ms = portal.app.now_ms();
    Ok(KeyPage {
        shell: Shell::operator("/operator/keys"),
        organization: portal.app.organization(&key.organization_id).await?,
        masked: masked_key(&key),
        badge: status_badge(&key, now_ms),
        created: when(key.created_at_ms, now_ms),
        last_used: when_or(key.last_used_at_ms, now_ms, "never"),
        expires: when_or(key.expires_at_ms, now_ms, "never"),
        is_wrong: false,
        notice: None,
        confirmation: None,
        key,
    })
}
