//! One key: its secrets, limits, usage, history; disabling and revoking it.

use std::time::Duration;

use askama::Template;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use super::Shared;
use super::audit::AuditRow;
use super::chart::{DAY, Filter, Group, RANGES, Series, series, totals};
use super::input::{Asked, Input, Posted};
use super::page::{Problem, Shell, page, page_with};
use super::parts::{Markup, count, date, duration, masked, masked_key, short_digest, status_badge, when, when_or};
use super::person::Person;
use crate::control::model::{ApiKey, Applied, KeySecret, SecretState};
use crate::control::service::keys::KeyPatch;
use crate::control::store::AuditQuery;

#[derive(Template)]
#[template(path = "key.html")]
struct KeyPage {
    shell: Shell,
    key: ApiKey,
    masked: String,
    badge: Markup,
    created: Markup,
    last_used: Markup,
    expires: Markup,
    revoked: Option<Markup>,
    scopes: Vec<(String, String)>,
    secrets: Vec<SecretRow>,
    grace: Option<Grace>,
    limits: Vec<LimitRow>,
    max_in_flight: Option<String>,
    plan: String,
    chart: Series,
    lines: Vec<AuditRow>,
    notice: Option<&'static str>,
    confirmation: Option<Confirmation>,
}

struct SecretRow {
    masked: String,
    fingerprint: String,
    state: &'static str,
    class: &'static str,
    created: Markup,
    last_used: Markup,
    dies: Markup,
}

/// An old secret that still works.
struct Grace {
    masked: String,
    dies: Markup,
    dies_at: Markup,
    last_used: Markup,
    /// Whether it was used after the newest secret was made.
    still_used: bool,
    more: usize,
}

/// A tier's limit, and what is left of it.
struct LimitRow {
    tier: String,
    limit: String,
    window: String,
    used: String,
    left: String,
    /// For `<meter>`.
    used_number: u64,
    limit_number: u32,
    high_number: u64,
}

/// Which gates have applied a change.
#[derive(Template)]
#[template(path = "applied.html")]
pub struct Confirmation {
    pub link: String,
    pub confirmed: usize,
    pub all: usize,
    pub pending: String,
    pub silent: String,
    pub is_complete: bool,
}

#[derive(Template)]
#[template(path = "revoke.html")]
struct RevokePage {
    shell: Shell,
    id: String,
    name: String,
    masked: String,
    environment: String,
    last_used: Markup,
    is_recent: bool,
    typed: String,
    is_wrong: bool,
}

/// `GET /keys/{id}`.
pub async fn show(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
    Asked(query): Asked,
) -> Result<Response, Problem> {
    let app = &portal.app;
    let (organization, now_ms) = (&person.organization.id, app.now_ms());
    let key = app.key(Some(organization), &id).await?;
    let filter = Filter {
        key: Some(id.clone()),
        ..Filter::default()
    };
    let chart = series(&portal, organization, &RANGES[DAY], &filter).await?;
    let audit = AuditQuery {
        organization: Some(organization.clone()),
        target: Some(id),
        limit: 10,
        ..AuditQuery::default()
    };
    let lines = app.store.audit(&audit).await?;
    let plan = app
        .settings
        .plans
        .iter()
        .find(|plan| plan.name == person.organization.plan);
    let about = |name: &String| {
        let known = app.settings.scopes.iter().find(|scope| scope.name == *name);
        (name.clone(), known.map(|s| s.description.clone()).unwrap_or_default())
    };
    Ok(page(&KeyPage {
        shell: person.shell("/keys"),
        masked: masked_key(&key),
        badge: status_badge(&key, now_ms),
        created: when(key.created_at_ms, now_ms),
        last_used: when_or(key.last_used_at_ms, now_ms, "never"),
        expires: when_or(key.expires_at_ms, now_ms, "never"),
        revoked: key.revoked_at_ms.map(|at| when(at, now_ms)),
        scopes: key.scopes.iter().map(about).collect(),
        secrets: secrets(&key, now_ms),
        grace: grace(&key, now_ms),
        limits: limits(&portal, &person, &filter).await?,
        max_in_flight: plan.and_then(|plan| plan.max_in_flight).map(|most| count(most.into())),
        plan: person.organization.plan.clone(),
        chart,
        lines: lines.into_iter().map(|line| AuditRow::of(line, now_ms)).collect(),
        notice: notice(&query),
        confirmation: confirmation(&portal, &key, &query),
        key,
    }))
}

/// `POST /keys/{id}/disable`.
pub async fn disable(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    set_disabled(&portal, &person, &id, true).await
}

/// `POST /keys/{id}/enable`.
pub async fn enable(State(portal): State<Shared>, person: Person, Path(id): Path<String>) -> Result<Response, Problem> {
    set_disabled(&portal, &person, &id, false).await
}

async fn set_disabled(portal: &Shared, person: &Person, id: &str, disabled: bool) -> Result<Response, Problem> {
    let patch = KeyPatch {
        disabled: Some(disabled),
        ..KeyPatch::default()
    };
    let key = portal
        .app
        .update_key(&person.caller, Some(&person.organization.id), id, patch)
        .await?;
    Ok(changed(portal, &key, if disabled { "disabled" } else { "enabled" }).await)
}

/// `GET /keys/{id}/revoke`.
pub async fn revoke_form(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let key = portal.app.key(Some(&person.organization.id), &id).await?;
    Ok(page(&revoke_page(&portal, &person, &key)))
}

/// `POST /keys/{id}/revoke`, with the key's name typed.
pub async fn revoke(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let organization = Some(person.organization.id.as_str());
    let key = portal.app.key(organization, &id).await?;
    if !is_typed(&form, &key.name) {
        let mut again = revoke_page(&portal, &person, &key);
        again.typed = form.shown("confirm");
        again.is_wrong = true;
        return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
    }
    let key = portal.app.revoke_key(&person.caller, organization, &id).await?;
    Ok(changed(&portal, &key, "revoked").await)
}

/// `GET /keys/{id}/applied?revision=N`: the part of the page that says which gates have applied a change.
pub async fn applied(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
    Asked(query): Asked,
) -> Result<Response, Problem> {
    let key = portal.app.key(Some(&person.organization.id), &id).await?;
    match confirmation(&portal, &key, &query) {
        Some(confirmation) => Ok(page(&confirmation)),
        None => Err(crate::control::model::Fault::NotFound.into()),
    }
}

/// Whether the name was typed to confirm. Browsers send some blanks differently, so all of them count as one.
pub fn is_typed(form: &Input, name: &str) -> bool {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    form.text("confirm").is_some_and(|typed| words(typed) == words(name))
}

/// Back to the key's page, which says which gates have followed. Most have by then.
pub async fn changed(portal: &Shared, key: &ApiKey, done: &str) -> Response {
    portal
        .app
        .wait_until_applied(key.revision, Duration::from_millis(1_500))
        .await;
    Redirect::to(&format!("/keys/{}?done={done}&revision={}", key.id, key.revision)).into_response()
}

/// Who has applied the revision of the address.
fn confirmation(portal: &Shared, key: &ApiKey, query: &Input) -> Option<Confirmation> {
    let revision: u64 = query.text("revision")?.parse().ok()?;
    let app = &portal.app;
    let link = format!("/keys/{}/applied?revision={revision}", key.id);
    Some(Confirmation::of(
        app.hub.applied(revision.min(app.hub.revision()), app.now_ms()),
        link,
    ))
}

impl Confirmation {
    pub fn of(applied: Applied, link: String) -> Self {
        Self {
            link,
            confirmed: applied.gates.len(),
            all: applied.gates.len() + applied.pending.len(),
            is_complete: applied.pending.is_empty(),
            pending: applied.pending.join(", "),
            silent: applied.silent.join(", "),
        }
    }
}

fn revoke_page(portal: &Shared, person: &Person, key: &ApiKey) -> RevokePage {
    let now_ms = portal.app.now_ms();
    RevokePage {
        shell: person.shell("/keys"),
        id: key.id.clone(),
        name: key.name.clone(),
        masked: masked_key(key),
        environment: key.environment.clone(),
        last_used: when_or(key.last_used_at_ms, now_ms, "never"),
        is_recent: key.last_used_at_ms.is_some_and(|at| at > now_ms - 7 * 86_400_000),
        typed: String::new(),
        is_wrong: false,
    }
}

fn secrets(key: &ApiKey, now_ms: i64) -> Vec<SecretRow> {
    let row = |secret: &KeySecret| {
        let ends = [secret.not_after_ms, key.expires_at_ms, key.revoked_at_ms];
        let (state, class) = match key.secret_state(secret, now_ms) {
            SecretState::Current => ("Current", "active"),
            SecretState::Grace => ("Grace period", "rotating"),
            SecretState::Dead => ("Dead", "revoked"),
        };
        SecretRow {
            masked: masked(&key.prefix, &secret.last_four),
            fingerprint: short_digest(&secret.digest),
            state,
            class,
            created: when(secret.created_at_ms, now_ms),
            last_used: when_or(secret.last_used_at_ms, now_ms, "never"),
            dies: when_or(ends.into_iter().flatten().min(), now_ms, "with the key"),
        }
    };
    key.secrets.iter().take(10).map(row).collect()
}

fn grace(key: &ApiKey, now_ms: i64) -> Option<Grace> {
    if key.revoked_at_ms.is_some() {
        return None;
    }
    let mut old: Vec<_> = key.secrets.iter().filter(|secret| secret.in_grace(now_ms)).collect();
    old.sort_by_key(|secret| std::cmp::Reverse(secret.not_after_ms));
    let (longest, newest) = (old.first()?, key.secrets.first()?);
    let end_ms = longest.not_after_ms?;
    Some(Grace {
        masked: masked(&key.prefix, &longest.last_four),
        dies: when(end_ms, now_ms),
        dies_at: date(end_ms),
        last_used: when_or(longest.last_used_at_ms, now_ms, "never"),
        still_used: old.iter().any(|s| {
            s.last_used_at_ms
                .is_some_and(|at| at / 1_000 >= newest.created_at_ms / 1_000)
        }),
        more: old.len() - 1,
    })
}

async fn limits(portal: &Shared, person: &Person, filter: &Filter) -> Result<Vec<LimitRow>, Problem> {
    let app = &portal.app;
    let Some(plan) = app
        .settings
        .plans
        .iter()
        .find(|plan| plan.name == person.organization.plan)
    else {
        return Ok(Vec::new());
    };
    let mut windows: Vec<u64> = plan.tiers.iter().map(|tier| tier.window_ms).collect();
    windows.sort_unstable();
    windows.dedup();
    let mut rows = Vec::new();
    for window_ms in windows {
        // The ledger counts by the minute, so this is what was used in the window, give or take the minute at its edge.
        let from_ms = app.now_ms() - i64::try_from(window_ms).unwrap_or(i64::MAX / 2) + 60_000;
        let (used, _) = totals(portal, &person.organization.id, from_ms, Group::Tier, filter).await?;
        for (place, tier) in plan
            .tiers
            .iter()
            .enumerate()
            .filter(|(_, tier)| tier.window_ms == window_ms)
        {
            let used = used.get(&tier.name).map_or(0, |totals| totals.passed);
            let row = LimitRow {
                tier: tier.name.clone(),
                limit: count(tier.limit.into()),
                window: duration((window_ms / 1_000) as i64),
                used: count(used),
                left: count(u64::from(tier.limit).saturating_sub(used)),
                used_number: used.min(tier.limit.into()),
                limit_number: tier.limit,
                high_number: u64::from(tier.limit) * 4 / 5,
            };
            rows.push((place, row));
        }
    }
    rows.sort_by_key(|(place, _)| *place);
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

fn notice(query: &Input) -> Option<&'static str> {
    Some(match query.text("done")? {
        "saved" => "Your changes are saved.",
        "disabled" => "The key is disabled. Requests with it are refused until you enable it.",
        "enabled" => "The key is enabled.",
        "grace-ended" => "The grace period is over. Only the newest secret is accepted.",
        "revoked" => "The key is revoked for good.",
        _ => return None,
    })
}
