//! The overview: today, what needs attention, what to do next.

use askama::Template;
use axum::extract::State;
use axum::response::Response;

use super::Shared;
use super::chart::{DAY, Filter, Group, RANGES, Series, Totals, series, totals};
use super::page::{Problem, Shell, page};
use super::parts::{Markup, masked_key, status_badge, when, when_or};
use super::person::Person;
use super::reveal::{Line, request_line};
use crate::control::model::{ApiKey, KeyStatus};
use crate::control::store::{KeyQuery, KeySort};

#[derive(Template)]
#[template(path = "overview.html")]
struct OverviewPage {
    shell: Shell,
    today: Totals,
    chart: Series,
    attention: Vec<Attention>,
    steps: Vec<Step>,
    line: Option<Line>,
    has_no_key: bool,
}

/// A key that somebody should look at.
struct Attention {
    id: String,
    name: String,
    masked: String,
    badge: Markup,
    why: &'static str,
    at: Markup,
}

/// Something worth doing next.
struct Step {
    title: &'static str,
    text: String,
    link: String,
    action: &'static str,
}

/// `GET /`.
pub async fn show(State(portal): State<Shared>, person: Person) -> Result<Response, Problem> {
    let app = &portal.app;
    let (organization, now_ms) = (&person.organization.id, app.now_ms());
    let midnight_ms = now_ms.div_euclid(86_400_000) * 86_400_000;
    let nothing = Filter::default();
    let (mut groups, _) = totals(&portal, organization, midnight_ms, Group::Nothing, &nothing).await?;
    let chart = series(&portal, organization, &RANGES[DAY], &nothing).await?;
    let newest = keys(&portal, organization, None, KeySort::CreatedAt, true).await?;
    let month_ms = now_ms - 30 * 86_400_000;
    let (month, _) = totals(&portal, organization, month_ms, Group::Nothing, &nothing).await?;
    let is_quiet = month.is_empty() && newest.iter().all(|key| key.last_used_at_ms.is_none());
    let steps = steps(&portal, &newest, is_quiet);
    let line = is_quiet.then(|| request_line(&app.settings, "YOUR_API_KEY"));
    Ok(page(&OverviewPage {
        shell: person.shell("/"),
        today: groups.remove("").unwrap_or_default(),
        chart,
        attention: attention(&portal, organization, now_ms).await?,
        steps,
        line: line.filter(|_| !newest.is_empty()),
        has_no_key: newest.is_empty(),
    }))
}

async fn attention(portal: &Shared, organization: &str, now_ms: i64) -> Result<Vec<Attention>, Problem> {
    let mut list = Vec::new();
    let mut add = |key: &ApiKey, why: &'static str, at: Markup| {
        list.push(Attention {
            id: key.id.clone(),
            name: key.name.clone(),
            masked: masked_key(key),
            badge: status_badge(key, now_ms),
            why,
            at,
        });
    };
    let expiring = keys(
        portal,
        organization,
        Some(KeyStatus::Expiring),
        KeySort::ExpiresAt,
        false,
    )
    .await?;
    for key in expiring.iter().take(5) {
        add(key, "Expires", when_or(key.expires_at_ms, now_ms, "never"));
    }
    let rotating = keys(
        portal,
        organization,
        Some(KeyStatus::Rotating),
        KeySort::CreatedAt,
        true,
    )
    .await?;
    for key in rotating.iter().take(5) {
        if let Some(end_ms) = key
            .secrets
            .iter()
            .filter(|s| s.in_grace(now_ms))
            .filter_map(|s| s.not_after_ms)
            .max()
        {
            add(key, "Old secret dies", when(end_ms, now_ms));
        }
    }
    let idle = keys(
        portal,
        organization,
        Some(KeyStatus::Active),
        KeySort::LastUsedAt,
        false,
    )
    .await?;
    let is_idle = |key: &&ApiKey| key.last_used_at_ms.unwrap_or(key.created_at_ms) < now_ms - UNUSED_MS;
    for key in idle.iter().filter(is_idle).take(5) {
        add(key, "Last used", when_or(key.last_used_at_ms, now_ms, "never"));
    }
    Ok(list)
}

fn steps(portal: &Shared, newest: &[ApiKey], is_quiet: bool) -> Vec<Step> {
    let settings = &portal.app.settings;
    let mut steps = Vec::new();
    let is_billed = |name: &str| settings.environments.iter().any(|e| e.name == name && e.billed);
    let living: Vec<_> = newest.iter().filter(|key| key.revoked_at_ms.is_none()).collect();
    if is_quiet && !living.is_empty() {
        steps.push(Step {
            title: "Send your first request",
            text: "Put your key into the line below and run it in a terminal.".to_owned(),
            link: "/keys".to_owned(),
            action: "Your keys",
        });
    }
    if !living.iter().any(|key| is_billed(&key.environment))
        && let Some(live) = settings.environments.iter().find(|e| e.billed)
    {
        steps.push(Step {
            title: "Go live",
            text: format!(
                "Create a key in the {} environment, with only the scopes it needs.",
                live.name
            ),
            link: format!("/keys/new?environment={}", live.name),
            action: "Create a key",
        });
    }
    let is_broad = |key: &&&ApiKey| settings.scopes.len() > 1 && key.scopes.len() == settings.scopes.len();
    if let Some(key) = living.iter().filter(|key| is_billed(&key.environment)).find(is_broad) {
        steps.push(Step {
            title: "Narrow a key",
            text: format!(
                "“{}” holds every scope there is. Take away what it does not need.",
                key.name
            ),
            link: format!("/keys/{}/edit", key.id),
            action: "Edit its scopes",
        });
    }
    steps
}

async fn keys(
    portal: &Shared,
    organization: &str,
    status: Option<KeyStatus>,
    sort: KeySort,
    descending: bool,
) -> Result<Vec<ApiKey>, Problem> {
    let query = KeyQuery {
        organization: Some(organization.to_owned()),
        environment: None,
        scope: None,
        status,
        search: None,
        sort,
        descending,
        after: None,
        limit: 100,
        now_ms: portal.app.now_ms(),
    };
    Ok(portal.app.keys(&query).await?)
}

/// A key that nobody used for a quarter of a year is probably forgotten.
const UNUSED_MS: i64 = 90 * 86_400_000;
