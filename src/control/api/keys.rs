//! API keys.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::HeaderMap;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::caller::Tenant;
use super::error::ApiError;
use super::fields::{Body, Fields, OptionalBody, QueryFields};
use super::key_view::{AppliedView, ChangedKey, IssuedKey, KeyList, KeyView};
use super::value::{Date, cursor, read_cursor};
use super::{App, Envelope, Reply};
use crate::control::model::{ApiKey, Fault, KeyStatus};
use crate::control::service::keys::{Issued, KeyDraft, KeyPatch, RotateDraft};
use crate::control::store::{KeyQuery, KeySort, SortValue};

/// A key to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct CreateKeyRequest {
    #[schema(min_length = 1, max_length = 100, example = "billing service")]
    name: String,
    /// One of the environments of this installation.
    #[schema(example = "live")]
    environment: String,
    /// Only what the key needs. May be empty: such a key may go where no scope is asked for.
    #[schema(max_items = 100, example = json!(["permissions:check"]))]
    scopes: Vec<String>,
    /// Refused from then on; absent or null: never.
    #[schema(value_type = Option<Date>)]
    expires_at: Option<String>,
}

/// What is to change; what is absent or null stays, but for `expiresAt`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct UpdateKeyRequest {
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
    #[schema(max_items = 100)]
    scopes: Option<Vec<String>>,
    /// Null: never.
    #[schema(value_type = Option<Date>)]
    expires_at: Option<String>,
    disabled: Option<bool>,
}

/// How long the old secret lives on.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct RotateKeyRequest {
    /// From 0 (the old secret dies at once) to 30 days; absent: 24 hours.
    #[schema(minimum = 0, maximum = 2_592_000, example = 86_400)]
    grace_period_seconds: Option<i64>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "describes the query; it is read field by field")]
pub struct KeyListQuery {
    #[param(max_length = 32)]
    environment: Option<String>,
    #[param(inline)]
    status: Option<StatusWord>,
    /// Keys that have this scope.
    #[param(max_length = 100)]
    scope: Option<String>,
    /// Part of a name, a whole id, or the last four characters of a secret.
    #[param(max_length = 100)]
    q: Option<String>,
    /// With `-` in front: the other way round. Default: `-createdAt`.
    #[param(inline)]
    sort: Option<SortWord>,
    /// `nextCursor` of the page before, with the same `sort`.
    #[param(max_length = 1024)]
    cursor: Option<String>,
    /// Default: 25.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<u32>,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[allow(dead_code, reason = "describes the query")]
enum StatusWord {
    Active,
    Rotating,
    Expiring,
    Expired,
    Disabled,
    Revoked,
}

#[derive(Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the query")]
enum SortWord {
    #[serde(rename = "createdAt")]
    Created,
    #[serde(rename = "-createdAt")]
    CreatedDescending,
    #[serde(rename = "name")]
    Name,
    #[serde(rename = "-name")]
    NameDescending,
    #[serde(rename = "lastUsedAt")]
    LastUsed,
    #[serde(rename = "-lastUsedAt")]
    LastUsedDescending,
    #[serde(rename = "expiresAt")]
    Expires,
    #[serde(rename = "-expiresAt")]
    ExpiresDescending,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "describes the query; it is read field by field")]
pub struct WaitQuery {
    /// `all`: answer once every live gate has applied the change, and say which have.
    #[param(inline)]
    wait: Option<WaitWord>,
    /// How long to wait at most. Default: 5.
    #[param(minimum = 0, maximum = 30)]
    wait_seconds: Option<u32>,
}

#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code, reason = "describes the query")]
enum WaitWord {
    All,
}

/// The organisation's keys.
#[utoipa::path(
    get, path = "/api/v1/keys", tag = "Keys", operation_id = "listKeys", params(KeyListQuery),
    responses((status = 200, description = "A page of keys.", body = Envelope<KeyList>)),
)]
pub async fn list(
    State(app): State<App>,
    tenant: Tenant,
    QueryFields(fields): QueryFields,
) -> Result<Reply<KeyList>, ApiError> {
    Ok(Reply::ok(page(&app, fields, Some(tenant.organization)).await?))
}

/// Make a key. The answer shows its secret this once.
#[utoipa::path(
    post, path = "/api/v1/keys", tag = "Keys", operation_id = "createKey",
    params(WaitQuery, ("Idempotency-Key" = Option<String>, Header,
        description = "For 24 hours, the same key with the same body makes no second key.",
        min_length = 1, max_length = 255, pattern = "^[!-~]+$")),
    request_body = CreateKeyRequest,
    responses(
        (status = 201, description = "Made.", body = Envelope<IssuedKey>),
        (status = 200, description = "Made before, with this `Idempotency-Key`.", body = Envelope<IssuedKey>),
    ),
)]
pub async fn create(
    State(app): State<App>,
    tenant: Tenant,
    headers: HeaderMap,
    QueryFields(query): QueryFields,
    Body(mut fields): Body,
) -> Result<Reply<IssuedKey>, ApiError> {
    let wait = read_wait(query)?;
    let idempotency_key = read_idempotency_key(&headers)?;
    let mut draft = KeyDraft {
        name: fields.text("name"),
        environment: fields.text("environment"),
        scopes: fields.texts("scopes"),
        expires_at_ms: fields.date("expiresAt"),
        ..Default::default()
    };
    draft.faults = fields.finish();
    let issued = app
        .create_key(&tenant.caller, &tenant.organization, draft, idempotency_key)
        .await?;
    reply_issued(&app, issued, wait).await
}

/// One key.
#[utoipa::path(
    get, path = "/api/v1/keys/{id}", tag = "Keys", operation_id = "showKey",
    params(("id" = String, Path, description = "The key.")),
    responses((status = 200, description = "The key.", body = Envelope<KeyView>)),
)]
pub async fn show(State(app): State<App>, tenant: Tenant, Path(id): Path<String>) -> Result<Reply<KeyView>, ApiError> {
    let key = app.key(Some(&tenant.organization), &id).await?;
    Ok(Reply::ok(KeyView::of(key, app.now_ms())))
}

/// Rename, re-scope, disable, enable, or set when it expires.
#[utoipa::path(
    patch, path = "/api/v1/keys/{id}", tag = "Keys", operation_id = "updateKey",
    params(("id" = String, Path, description = "The key."), WaitQuery),
    request_body = UpdateKeyRequest,
    responses((status = 200, description = "Changed.", body = Envelope<ChangedKey>)),
)]
pub async fn update(
    State(app): State<App>,
    tenant: Tenant,
    Path(id): Path<String>,
    QueryFields(query): QueryFields,
    Body(fields): Body,
) -> Result<Reply<ChangedKey>, ApiError> {
    let wait = read_wait(query)?;
    let key = app
        .update_key(&tenant.caller, Some(&tenant.organization), &id, read_patch(fields))
        .await?;
    reply_changed(&app, key, wait).await
}

/// Revoke for good.
///
/// The key stays to be seen, with the status `revoked`, and takes no further change.
#[utoipa::path(
    delete, path = "/api/v1/keys/{id}", tag = "Keys", operation_id = "revokeKey",
    params(("id" = String, Path, description = "The key."), WaitQuery),
    responses((status = 200, description = "Revoked.", body = Envelope<ChangedKey>)),
)]
pub async fn revoke(
    State(app): State<App>,
    tenant: Tenant,
    Path(id): Path<String>,
    QueryFields(query): QueryFields,
) -> Result<Reply<ChangedKey>, ApiError> {
    let wait = read_wait(query)?;
    let key = app.revoke_key(&tenant.caller, Some(&tenant.organization), &id).await?;
    reply_changed(&app, key, wait).await
}

/// Add a secret. The old one lives on for its grace period, then dies by itself.
#[utoipa::path(
    post, path = "/api/v1/keys/{id}/rotate", tag = "Keys", operation_id = "rotateKey",
    params(("id" = String, Path, description = "The key."), WaitQuery, ("Idempotency-Key" = Option<String>, Header,
        description = "For 24 hours, the same key with the same body makes no second secret.",
        min_length = 1, max_length = 255, pattern = "^[!-~]+$")),
    request_body(content = Option<RotateKeyRequest>),
    responses(
        (status = 201, description = "Rotated.", body = Envelope<IssuedKey>),
        (status = 200, description = "Rotated before, with this `Idempotency-Key`.", body = Envelope<IssuedKey>),
    ),
)]
pub async fn rotate(
    State(app): State<App>,
    tenant: Tenant,
    Path(id): Path<String>,
    headers: HeaderMap,
    QueryFields(query): QueryFields,
    OptionalBody(mut fields): OptionalBody,
) -> Result<Reply<IssuedKey>, ApiError> {
    let wait = read_wait(query)?;
    let idempotency_key = read_idempotency_key(&headers)?;
    let mut draft = RotateDraft {
        grace_s: fields.integer("gracePeriodSeconds"),
        ..Default::default()
    };
    draft.faults = fields.finish();
    let issued = app
        .rotate_key(&tenant.caller, &tenant.organization, &id, draft, idempotency_key)
        .await?;
    reply_issued(&app, issued, wait).await
}

/// End the grace of every old secret now.
#[utoipa::path(
    post, path = "/api/v1/keys/{id}/end-grace", tag = "Keys", operation_id = "endGrace",
    params(("id" = String, Path, description = "The key."), WaitQuery),
    responses((status = 200, description = "Ended.", body = Envelope<ChangedKey>)),
)]
pub async fn end_grace(
    State(app): State<App>,
    tenant: Tenant,
    Path(id): Path<String>,
    QueryFields(query): QueryFields,
) -> Result<Reply<ChangedKey>, ApiError> {
    let wait = read_wait(query)?;
    let key = app.end_grace(&tenant.caller, &tenant.organization, &id).await?;
    reply_changed(&app, key, wait).await
}

/// Reads a page of keys, of one organisation or of all.
pub async fn page(app: &App, mut fields: Fields, organization: Option<String>) -> Result<KeyList, ApiError> {
    let now_ms = app.now_ms();
    let environment = fields.short("environment", 32);
    let scope = fields.short("scope", 100);
    let search = fields.short("q", 100).filter(|search| !search.is_empty());
    let status = fields.word("status", &STATUS_WORDS);
    let (sort, descending) = fields.word("sort", &SORT_WORDS).unwrap_or((KeySort::CreatedAt, true));
    let limit = fields.number("limit", 1..=100).unwrap_or(25);
    let after = match fields.text("cursor") {
        None => None,
        Some(text) => match read_cursor(&text).and_then(|(value, id)| Some((sort_value(sort, value)?, id))) {
            Some(after) => Some(after),
            None => fields.fault("cursor", "is not one that a page with this `sort` gave"),
        },
    };
    fields.done()?;
    let query = KeyQuery {
        organization,
        environment,
        scope,
        status,
        search,
        sort,
        descending,
        after,
        limit: limit as u32 + 1,
        now_ms,
    };
    let mut keys = app.keys(&query).await?;
    let more = keys.len() > limit as usize;
    keys.truncate(limit as usize);
    let next_cursor = keys
        .last()
        .filter(|_| more)
        .map(|key| cursor(&sort_text(sort, key), &key.id));
    Ok(KeyList {
        items: keys.into_iter().map(|key| KeyView::of(key, now_ms)).collect(),
        next_cursor,
    })
}

/// Reads the changes of a `PATCH`.
pub fn read_patch(mut fields: Fields) -> KeyPatch {
    let mut patch = KeyPatch {
        name: fields.text("name"),
        scopes: fields.texts("scopes"),
        expires_at_ms: fields.date_or_null("expiresAt"),
        disabled: fields.boolean("disabled"),
        ..Default::default()
    };
    patch.faults = fields.finish();
    patch
}

/// How long a change waits for the gates; none: not at all.
pub fn read_wait(mut fields: Fields) -> Result<Option<Duration>, ApiError> {
    let wait = fields.word("wait", &[("all", ())]);
    let seconds = fields.number("wait_seconds", 0..=30).unwrap_or(5);
    fields.done()?;
    Ok(wait.map(|()| Duration::from_secs(seconds.unsigned_abs())))
}

/// Answers a change, once it is applied where that was asked for.
pub async fn reply_changed(app: &App, key: ApiKey, wait: Option<Duration>) -> Result<Reply<ChangedKey>, ApiError> {
    let applied = wait_for(app, key.revision, wait).await;
    Ok(Reply::ok(ChangedKey {
        key: KeyView::of(key, app.now_ms()),
        applied,
    }))
}

/// How long a change waits for the gates where nobody asked it to: a gate on the same machine acknowledges within a few
/// milliseconds, and whoever reads the answer expects what it says to be so. A gate that is slow or gone costs no more
/// than this, a tenth of what a person notices.
const BRIEF_WAIT: Duration = Duration::from_millis(100);

/// Waits until gates have applied a revision; says who has only where that was asked for.
pub async fn wait_for(app: &App, revision: u64, wait: Option<Duration>) -> Option<AppliedView> {
    let applied = app.wait_until_applied(revision, wait.unwrap_or(BRIEF_WAIT)).await;
    wait.map(|_| AppliedView::of(applied))
}

async fn reply_issued(app: &App, issued: Issued, wait: Option<Duration>) -> Result<Reply<IssuedKey>, ApiError> {
    let applied = wait_for(app, issued.key.revision, wait).await;
    let replayed = issued.secret.is_none();
    let answer = IssuedKey {
        key: KeyView::of(issued.key, app.now_ms()),
        api_key: issued.secret.map(|secret| secret.expose().to_owned()),
        replayed,
        grace_ends_at: issued.grace_ends_at_ms.map(Date),
        applied,
    };
    Ok(if replayed {
        Reply::ok(answer)
    } else {
        Reply::created(answer)
    })
}

fn read_idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    let fine = (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic()) && values.next().is_none();
    match fine {
        true => Ok(Some(text)),
        false => Err(Fault::field(
            "Idempotency-Key",
            "must be one value of 1 to 255 visible ASCII characters",
        )
        .into()),
    }
}

fn sort_text(sort: KeySort, key: &ApiKey) -> String {
    match sort {
        KeySort::CreatedAt => key.created_at_ms.to_string(),
        KeySort::Name => key.name.clone(),
        KeySort::LastUsedAt => key.last_used_at_ms.unwrap_or(0).to_string(),
        KeySort::ExpiresAt => key.expires_at_ms.unwrap_or(i64::MAX).to_string(),
    }
}

fn sort_value(sort: KeySort, text: String) -> Option<SortValue> {
    match sort {
        KeySort::Name => Some(SortValue::Text(text)),
        KeySort::CreatedAt | KeySort::LastUsedAt | KeySort::ExpiresAt => text.parse().ok().map(SortValue::Number),
    }
}

const STATUS_WORDS: [(&str, KeyStatus); 6] = [
    ("active", KeyStatus::Active),
    ("rotating", KeyStatus::Rotating),
    ("expiring", KeyStatus::Expiring),
    ("expired", KeyStatus::Expired),
    ("disabled", KeyStatus::Disabled),
    ("revoked", KeyStatus::Revoked),
];

const SORT_WORDS: [(&str, (KeySort, bool)); 8] = [
    ("createdAt", (KeySort::CreatedAt, false)),
    ("-createdAt", (KeySort::CreatedAt, true)),
    ("name", (KeySort::Name, false)),
    ("-name", (KeySort::Name, true)),
    ("lastUsedAt", (KeySort::LastUsedAt, false)),
    ("-lastUsedAt", (KeySort::LastUsedAt, true)),
    ("expiresAt", (KeySort::ExpiresAt, false)),
    ("-expiresAt", (KeySort::ExpiresAt, true)),
];
