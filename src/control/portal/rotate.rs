//! Rotating a key, and ending the grace of its old secret.

use askama::Template;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::Shared;
use super::create::FORM_IS_OLD;
use super::input::{Input, Posted, form_token, read_form_token};
use super::key::changed;
use super::page::{Problem, Shell, page, page_with};
use super::parts::{Choice, Faults, Markup, date, duration, masked_key, when_or};
use super::person::Person;
use super::reveal::{Revealed, already, let_gates_follow, request_line, reveal};
use crate::control::model::{ApiKey, Fault, FieldFault};
use crate::control::service::keys::RotateDraft;

#[derive(Template)]
#[template(path = "rotate.html")]
struct RotatePage {
    shell: Shell,
    id: String,
    name: String,
    masked: String,
    last_used: Markup,
    graces: Vec<Choice>,
    own_number: String,
    own_units: Vec<Choice>,
    longest: String,
    form_token: String,
    notice: Option<&'static str>,
    faults: Faults,
}

#[derive(Template)]
#[template(
    source = "The old secret is accepted until {{ end }}, then it dies by itself.",
    ext = "html"
)]
struct GraceNote {
    end: Markup,
}

/// `GET /keys/{id}/rotate`.
pub async fn form(State(portal): State<Shared>, person: Person, Path(id): Path<String>) -> Result<Response, Problem> {
    let key = portal.app.key(Some(&person.organization.id), &id).await?;
    Ok(page(&rotate_page(&portal, &person, &key, &Input::default())?))
}

/// `POST /keys/{id}/rotate`: adds a secret and shows it this once.
pub async fn rotate(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let app = &portal.app;
    let organization = &person.organization.id;
    let key = app.key(Some(organization), &id).await?;
    let mut again = rotate_page(&portal, &person, &key, &form)?;
    let Some(token) = read_form_token(&form, app.now_ms()) else {
        again.notice = Some(FORM_IS_OLD);
        return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
    };
    let mut draft = RotateDraft::default();
    match read_grace(&form) {
        Some(grace_s) => draft.grace_s = Some(grace_s),
        None => draft
            .faults
            .push(FieldFault::new("gracePeriodSeconds", "must be a whole number")),
    }
    let done = format!("/keys/{id}");
    let issued = match app
        .rotate_key(&person.caller, organization, &id, draft, Some(token))
        .await
    {
        Ok(issued) => issued,
        Err(Fault::Validation(faults)) => {
            again.faults = Faults(faults);
            return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
        }
        Err(Fault::IdempotencyKeyReused) => return Ok(already(person.shell("/keys"), "secret", &key.name, &done)),
        Err(other) => return Err(other.into()),
    };
    let Some(secret) = issued.secret else {
        return Ok(already(person.shell("/keys"), "secret", &key.name, &done));
    };
    let_gates_follow(app, issued.key.revision).await;
    let end_ms = issued.grace_ends_at_ms.filter(|end| *end > app.now_ms());
    let notes = match end_ms {
        Some(end_ms) => Markup::of(&GraceNote { end: date(end_ms) }),
        None => Markup::text("The old secret is dead: every request with it is refused from now on."),
    };
    Ok(reveal(Revealed {
        shell: person.shell("/keys"),
        title: "Key rotated",
        what: "new secret",
        name: &issued.key.name,
        secret: secret.expose(),
        notes: vec![notes],
        line: Some(request_line(&app.settings, secret.expose())),
        done: &done,
    }))
}

/// `POST /keys/{id}/end-grace`.
pub async fn end_grace(
    State(portal): State<Shared>,
    person: Person,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let key = portal
        .app
        .end_grace(&person.caller, &person.organization.id, &id)
        .await?;
    Ok(changed(&portal, &key, "grace-ended").await)
}

fn rotate_page(portal: &Shared, person: &Person, key: &ApiKey, input: &Input) -> Result<RotatePage, Problem> {
    let (settings, now_ms) = (&portal.app.settings, portal.app.now_ms());
    if key.revoked_at_ms.is_some() {
        return Err(Fault::KeyRevoked.into());
    }
    let (default_s, most_s) = (settings.default_grace_ms / 1_000, settings.max_grace_ms / 1_000);
    let mut seconds = vec![0, 3_600, 86_400, 7 * 86_400, default_s];
    seconds.sort_unstable();
    seconds.dedup();
    seconds.retain(|grace_s| *grace_s <= most_s);
    let selected = input.text("grace").map_or(default_s.to_string(), str::to_owned);
    let text = |grace_s: i64| match grace_s {
        0 => "None: the old secret dies now".to_owned(),
        _ if grace_s == default_s => format!("{} (default)", duration(grace_s)),
        _ => duration(grace_s),
    };
    let mut graces: Vec<_> = seconds
        .iter()
        .map(|s| Choice::new(s.to_string(), text(*s), &selected))
        .collect();
    graces.push(Choice::new("own", "Another length", &selected));
    let unit = input.text("own_unit").unwrap_or("3600");
    Ok(RotatePage {
        shell: person.shell("/keys"),
        id: key.id.clone(),
        name: key.name.clone(),
        masked: masked_key(key),
        last_used: when_or(key.last_used_at_ms, now_ms, "never"),
        graces,
        own_number: input.shown("own_number"),
        own_units: [("60", "minutes"), ("3600", "hours"), ("86400", "days")]
            .map(|(value, text)| Choice::new(value, text, unit))
            .into(),
        longest: duration(most_s),
        form_token: form_token(now_ms)?,
        notice: None,
        faults: Faults::default(),
    })
}

fn read_grace(form: &Input) -> Option<i64> {
    match form.text("grace")? {
        "own" => {
            let number: i64 = form.text("own_number")?.parse().ok()?;
            let unit: i64 = form.text("own_unit")?.parse().ok()?;
            number.checked_mul(unit)
        }
        seconds => seconds.parse().ok(),
    }
}
