//! Making a key and editing one: one form.

use askama::Template;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use super::Shared;
use super::input::{Asked, Input, Posted, form_token, read_form_token};
use super::page::{Problem, Shell, page, page_with};
use super::parts::{Choice, Faults, date_text, day_text};
use super::person::Person;
use super::reveal::{Revealed, already, let_gates_follow, request_line, reveal};
use crate::control::model::{ApiKey, Fault, FieldFault};
use crate::control::service::keys::{KeyDraft, KeyPatch};
use crate::control::settings::Settings;
use crate::control::time;

#[derive(Template)]
#[template(path = "key_form.html")]
struct KeyForm {
    shell: Shell,
    /// The key that is edited; none: a new one.
    id: Option<String>,
    title: String,
    name: String,
    environments: Vec<EnvironmentChoice>,
    groups: Vec<ScopeGroup>,
    expiries: Vec<Choice>,
    expires_on: String,
    /// Tomorrow.
    first_day: String,
    form_token: String,
    notice: Option<&'static str>,
    faults: Faults,
}

struct EnvironmentChoice {
    name: String,
    prefix: String,
    about: &'static str,
    selected: bool,
}

/// The scopes of one service.
struct ScopeGroup {
    service: String,
    scopes: Vec<ScopeChoice>,
}

struct ScopeChoice {
    name: String,
    about: String,
    selected: bool,
    /// Whether it only looks.
    reads: bool,
}

/// `GET /keys/new`.
pub async fn form(State(portal): State<Shared>, person: Person, Asked(query): Asked) -> Result<Response, Problem> {
    Ok(page(&new_form(&portal, &person, &query)?))
}

/// `POST /keys/new`: makes the key and shows its secret this once.
pub async fn create(State(portal): State<Shared>, person: Person, Posted(form): Posted) -> Result<Response, Problem> {
    let app = &portal.app;
    let now_ms = app.now_ms();
    let mut again = new_form(&portal, &person, &form)?;
    if form.text("preset").is_some() {
        return Ok(page(&again));
    }
    let Some(token) = read_form_token(&form, now_ms) else {
        again.notice = Some(FORM_IS_OLD);
        return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
    };
    let mut faults = Vec::new();
    let draft = KeyDraft {
        name: form.owned("name"),
        environment: form.owned("environment"),
        scopes: Some(form.all("scope")),
        expires_at_ms: read_expiry(&form, now_ms, &mut faults).flatten(),
        faults,
    };
    let name = form.shown("name");
    let issued = match app
        .create_key(&person.caller, &person.organization.id, draft, Some(token))
        .await
    {
        Ok(issued) => issued,
        Err(Fault::Validation(faults)) => {
            again.faults = Faults(faults);
            return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
        }
        Err(Fault::IdempotencyKeyReused) => return Ok(already(person.shell("/keys"), "API key", &name, "/keys")),
        Err(other) => return Err(other.into()),
    };
    let done = format!("/keys/{}", issued.key.id);
    let Some(secret) = issued.secret else {
        return Ok(already(person.shell("/keys"), "API key", &issued.key.name, &done));
    };
    let_gates_follow(app, issued.key.revision).await;
    Ok(reveal(Revealed {
        shell: person.shell("/keys"),
        title: "Key created",
        what: "API key",
        name: &issued.key.name,
        secret: secret.expose(),
        notes: Vec::new(),
        line: Some(request_line(&app.settings, secret.expose())),
        done: &done,
    }))
}

/// `GET /keys/{id}/edit`.
pub async fn edit_form(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let key = portal.app.key(Some(&person.organization.id), &id).await?;
    Ok(page(&filled_form(&portal, &person, &key)))
}

/// `POST /keys/{id}/edit`.
pub async fn edit(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let app = &portal.app;
    let key = app.key(Some(&person.organization.id), &id).await?;
    let settings = &app.settings;
    let mut again = filled_form(&portal, &person, &key);
    again.name = form.shown("name");
    again.groups = scope_groups(settings, &ticked(settings, &form));
    if form.text("preset").is_some() {
        return Ok(page(&again));
    }
    let mut faults = Vec::new();
    if form.text("name").is_none() {
        faults.push(FieldFault::new("name", "is required"));
    }
    let expires_at_ms = read_expiry(&form, app.now_ms(), &mut faults);
    let patch = KeyPatch {
        name: form.owned("name"),
        scopes: Some(form.all("scope")),
        expires_at_ms,
        disabled: None,
        faults,
    };
    match app
        .update_key(&person.caller, Some(&person.organization.id), &id, patch)
        .await
    {
        Ok(key) => {
            let_gates_follow(app, key.revision).await;
            Ok(Redirect::to(&format!("/keys/{id}?done=saved")).into_response())
        }
        Err(Fault::Validation(faults)) => {
            again.faults = Faults(faults);
            Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again))
        }
        Err(other) => Err(other.into()),
    }
}

fn new_form(portal: &Shared, person: &Person, input: &Input) -> Result<KeyForm, Fault> {
    let (settings, now_ms) = (&portal.app.settings, portal.app.now_ms());
    let environment = input.shown("environment");
    Ok(KeyForm {
        shell: person.shell("/keys"),
        id: None,
        title: "Create a key".to_owned(),
        name: input.shown("name"),
        environments: environments(settings, &environment),
        groups: scope_groups(settings, &ticked(settings, input)),
        expiries: expiries(input.text("expiry").unwrap_or("never"), None),
        // A browser complains of what is no day.
        expires_on: input
            .text("expires_on")
            .filter(|day| end_of_day(day).is_some())
            .unwrap_or_default()
            .to_owned(),
        first_day: day_text(now_ms + DAY_MS),
        form_token: form_token(now_ms)?,
        notice: None,
        faults: Faults::default(),
    })
}

fn filled_form(portal: &Shared, person: &Person, key: &ApiKey) -> KeyForm {
    let (settings, now_ms) = (&portal.app.settings, portal.app.now_ms());
    KeyForm {
        shell: person.shell("/keys"),
        id: Some(key.id.clone()),
        title: format!("Edit “{}”", key.name),
        name: key.name.clone(),
        environments: Vec::new(),
        groups: scope_groups(settings, &key.scopes),
        expiries: expiries("keep", Some(key.expires_at_ms)),
        expires_on: String::new(),
        first_day: day_text(now_ms + DAY_MS),
        form_token: String::new(),
        notice: None,
        faults: Faults::default(),
    }
}

fn environments(settings: &Settings, selected: &str) -> Vec<EnvironmentChoice> {
    let choice = |environment: &crate::control::settings::Environment| EnvironmentChoice {
        name: environment.name.clone(),
        prefix: environment.prefix.clone(),
        about: if environment.billed {
            "Real effects. Requests are billed."
        } else {
            "Sandbox. Nothing is sent or billed."
        },
        selected: environment.name == selected,
    };
    settings.environments.iter().map(choice).collect()
}

/// The scopes that a form has ticked, or that a preset ticks.
fn ticked(settings: &Settings, input: &Input) -> Vec<String> {
    let those = |keep: fn(&str) -> bool| {
        let names = settings.scopes.iter().map(|s| s.name.clone());
        names.filter(|name| keep(name)).collect()
    };
    match input.text("preset") {
        Some("read") => those(only_reads),
        Some("all") => those(|_| true),
        Some(_) => Vec::new(),
        None => input.all("scope"),
    }
}

fn scope_groups(settings: &Settings, ticked: &[String]) -> Vec<ScopeGroup> {
    let mut groups: Vec<ScopeGroup> = Vec::new();
    for scope in &settings.scopes {
        let service = scope.name.split(':').next().unwrap_or_default();
        let choice = ScopeChoice {
            name: scope.name.clone(),
            about: scope.description.clone(),
            selected: ticked.contains(&scope.name),
            reads: only_reads(&scope.name),
        };
        match groups.iter_mut().find(|group| group.service == service) {
            Some(group) => group.scopes.push(choice),
            None => groups.push(ScopeGroup {
                service: service.to_owned(),
                scopes: vec![choice],
            }),
        }
    }
    groups
}

/// Whether a scope's verb says that it changes nothing.
fn only_reads(scope: &str) -> bool {
    let verb = scope.rsplit(':').next().unwrap_or_default();
    ["read", "list", "view", "check", "resolve", "audit", "search", "query"].contains(&verb)
}

fn expiries(selected: &str, kept: Option<Option<i64>>) -> Vec<Choice> {
    let mut choices = Vec::new();
    if let Some(kept) = kept {
        let text = kept.map_or("never".to_owned(), date_text);
        choices.push(Choice::new("keep", format!("As it is: {text}"), selected));
    }
    if kept != Some(None) {
        choices.push(Choice::new("never", "Never", selected));
    }
    for (days, text) in EXPIRY_DAYS {
        choices.push(Choice::new(days.to_string(), text, selected));
    }
    choices.push(Choice::new("date", "After a day of your choice", selected));
    choices
}

/// What the form says about the end: none where it stays, the inner none for never.
fn read_expiry(form: &Input, now_ms: i64, faults: &mut Vec<FieldFault>) -> Option<Option<i64>> {
    match form.text("expiry").unwrap_or("never") {
        "keep" => None,
        "never" => Some(None),
        "date" => {
            let end = form.text("expires_on").and_then(end_of_day);
            if end.is_none() {
                faults.push(FieldFault::new("expiresAt", "must be a day such as 2027-01-31"));
            }
            Some(end)
        }
        days => {
            let known = EXPIRY_DAYS.iter().find(|(known, _)| known.to_string() == days);
            if known.is_none() {
                faults.push(FieldFault::new("expiresAt", "must be one of the choices"));
            }
            Some(known.map(|(days, _)| now_ms + days * DAY_MS))
        }
    }
}

/// The last instant of a day such as `2027-01-31`: the whole of a day that was chosen counts.
fn end_of_day(day: &str) -> Option<i64> {
    time::parse(&format!("{day}T23:59:59.999Z")).filter(|_| day.len() == 10)
}

/// What a form says that was open for too long.
pub const FORM_IS_OLD: &str = "This form was open for too long. Check it and send it again.";
const DAY_MS: i64 = 86_400_000;
const EXPIRY_DAYS: [(i64, &str); 4] = [
    (7, "In 7 days"),
    (30, "In 30 days"),
    (90, "In 90 days"),
    (365, "In a year"),
];
