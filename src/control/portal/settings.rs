//! The organisation, its plan, one's password and sessions.

use askama::Template;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use super::Shared;
use super::account::with_cookie;
use super::input::{Asked, Posted};
use super::page::{Problem, Shell, page, page_with};
use super::parts::{Faults, Markup, count, date, duration, when};
use super::person::Person;
use crate::control::api::caller::set_cookie;
use crate::control::model::{Fault, FieldFault, Session};
use crate::control::service::sessions::PasswordDraft;
use crate::control::settings::Plan;

#[derive(Template)]
#[template(path = "settings.html")]
struct SettingsPage {
    shell: Shell,
    organization_id: String,
    organization_name: String,
    created: Markup,
    email: String,
    plan: Option<PlanView>,
    sessions: Vec<SessionRow>,
    others: usize,
    notice: Option<&'static str>,
    faults: Faults,
}

/// A plan and its limits.
pub struct PlanView {
    pub name: String,
    pub max_in_flight: String,
    /// Tier, limit, window.
    pub tiers: Vec<(String, String, String)>,
}

struct SessionRow {
    id: String,
    browser: String,
    user_agent: String,
    address: String,
    last_used: Markup,
    created: Markup,
    is_current: bool,
}

/// `GET /settings`.
pub async fn show(State(portal): State<Shared>, person: Person, Asked(query): Asked) -> Result<Response, Problem> {
    let mut settings = settings_page(&portal, &person).await?;
    settings.notice = match query.text("done") {
        Some("renamed") => Some("The organisation is renamed."),
        Some("password") => Some("Your password is changed. Every other session was ended."),
        Some("sessions") => Some("The sessions are ended."),
        _ => None,
    };
    Ok(page(&settings))
}

/// `POST /settings/organization`.
pub async fn rename(State(portal): State<Shared>, person: Person, Posted(form): Posted) -> Result<Response, Problem> {
    let name = form.owned("name");
    let faults = match name {
        Some(_) => Vec::new(),
        None => vec![FieldFault::new("name", "is required")],
    };
    let renamed = portal
        .app
        .rename_organization(&person.caller, &person.organization.id, name, faults)
        .await;
    match renamed {
        Ok(_) => Ok(Redirect::to("/settings?done=renamed").into_response()),
        Err(Fault::Validation(faults)) => again(&portal, &person, faults).await,
        Err(other) => Err(other.into()),
    }
}

/// `POST /settings/password`. Every other session ends, and this one gets a new cookie.
pub async fn change_password(
    State(portal): State<Shared>,
    person: Person,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let raw = |name: &str| form.raw(name).map(str::to_owned);
    let draft = PasswordDraft {
        current: raw("currentPassword"),
        new: raw("newPassword"),
        ..Default::default()
    };
    match portal.app.change_password(&person.caller, &person.user, draft).await {
        Ok(signed_in) => {
            let answer = Redirect::to("/settings?done=password").into_response();
            Ok(with_cookie(
                answer,
                set_cookie(signed_in.secret.expose(), &portal.app.settings),
            ))
        }
        Err(Fault::Validation(faults)) => again(&portal, &person, faults).await,
        Err(other) => Err(other.into()),
    }
}

/// `POST /settings/sessions/end-others`.
pub async fn end_other_sessions(State(portal): State<Shared>, person: Person) -> Result<Response, Problem> {
    portal
        .app
        .end_other_sessions(&person.caller, &person.user.id, &person.session.id)
        .await?;
    Ok(Redirect::to("/settings?done=sessions").into_response())
}

/// `POST /settings/sessions/{id}/end`.
pub async fn end_session(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    portal.app.end_session(&person.caller, &person.user.id, &id).await?;
    Ok(Redirect::to("/settings?done=sessions").into_response())
}

async fn again(portal: &Shared, person: &Person, faults: Vec<FieldFault>) -> Result<Response, Problem> {
    let mut settings = settings_page(portal, person).await?;
    settings.faults = Faults(faults);
    Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &settings))
}

async fn settings_page(portal: &Shared, person: &Person) -> Result<SettingsPage, Problem> {
    let app = &portal.app;
    let now_ms = app.now_ms();
    let row = |session: Session| SessionRow {
        is_current: session.id == person.session.id,
        browser: browser(&session.user_agent),
        last_used: when(session.last_used_at_ms, now_ms),
        created: date(session.created_at_ms),
        id: session.id,
        user_agent: session.user_agent,
        address: session.address,
    };
    let sessions: Vec<_> = app.sessions(&person.user.id).await?.into_iter().map(row).collect();
    Ok(SettingsPage {
        shell: person.shell("/settings"),
        organization_id: person.organization.id.clone(),
        organization_name: person.organization.name.clone(),
        created: date(person.organization.created_at_ms),
        email: person.user.email.clone(),
        plan: app
            .settings
            .plans
            .iter()
            .find(|p| p.name == person.organization.plan)
            .map(PlanView::of),
        others: sessions.len().saturating_sub(1),
        sessions,
        notice: None,
        faults: Faults::default(),
    })
}

impl PlanView {
    /// As pages show it.
    pub fn of(plan: &Plan) -> Self {
        let tier = |tier: &crate::control::settings::Tier| {
            (
                tier.name.clone(),
                count(tier.limit.into()),
                duration((tier.window_ms / 1_000) as i64),
            )
        };
        Self {
            name: plan.name.clone(),
            max_in_flight: plan
                .max_in_flight
                .map_or("no limit".to_owned(), |most| count(most.into())),
            tiers: plan.tiers.iter().map(tier).collect(),
        }
    }
}

/// The browser's name and system, as far as a user agent tells them; the whole text is shown beside it.
fn browser(user_agent: &str) -> String {
    let named =
        |list: &[(&str, &'static str)]| list.iter().find(|(mark, _)| user_agent.contains(mark)).map(|(_, n)| *n);
    // The order matters: every browser also names those that it wants to be taken for.
    let name = named(&[
        ("Firefox/", "Firefox"),
        ("Edg/", "Edge"),
        ("OPR/", "Opera"),
        ("Chrome/", "Chrome"),
        ("Safari/", "Safari"),
        ("curl/", "curl"),
    ]);
    let system = named(&[
        ("Android", "Android"),
        ("iPhone", "iOS"),
        ("iPad", "iPadOS"),
        ("Windows", "Windows"),
        ("Mac OS", "macOS"),
        ("Linux", "Linux"),
    ]);
    match (name, system) {
        (Some(name), Some(system)) => format!("{name} on {system}"),
        (Some(name), None) => name.to_owned(),
        _ => "Unknown browser".to_owned(),
    }
}
