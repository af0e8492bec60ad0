//! The operator's pages: gates, organisations, plans, keys of everybody, invitations, the whole audit log.

use askama::Template;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::{get, post};

use super::Shared;
use super::account::with_cookie;
use super::audit::{AuditTable, table as audit_table};
use super::create::FORM_IS_OLD;
use super::input::{Asked, Posted, form_token, link, one_time_id, read_form_token};
use super::key::{Confirmation, is_typed};
use super::keys::{KeyTable, table as key_table};
use super::page::{Problem, Shell, page, page_with};
use super::parts::{Choice, Faults, Markup, count, date, masked_key, status_badge, when, when_or};
use super::person::{Operator, Visitor, clear_operator_cookie, set_operator_cookie};
use super::reveal::{Revealed, already, let_gates_follow, reveal};
use super::settings::PlanView;
use crate::control::api::value::{cursor, read_cursor};
use crate::control::model::{ApiKey, Fault, Invitation, Organization};
use crate::control::secret::equal_in_constant_time;
use crate::control::service::admin::{InvitationDraft, OrganizationPatch};
use crate::control::service::keys::KeyPatch;
use crate::control::store::{AuditQuery, OrganizationQuery};
use crate::control::throttle::address_name;

/// The pages below `/operator`.
pub fn router() -> Router<Shared> {
    Router::new()
        .route("/operator", get(gates))
        .route("/operator/login", get(login_form).post(login))
        .route("/operator/logout", post(logout))
        .route("/operator/gates/{name}/forget", post(forget_gate))
        .route("/operator/organizations", get(organizations))
        .route(
            "/operator/organizations/{id}",
            get(organization).post(edit_organization),
        )
        .route("/operator/plans", get(plans))
        .route("/operator/keys", get(keys))
        .route("/operator/keys/{id}", get(key))
        .route("/operator/keys/{id}/disable", post(disable_key))
        .route("/operator/keys/{id}/enable", post(enable_key))
        .route("/operator/keys/{id}/revoke", post(revoke_key))
        .route("/operator/invitations", get(invitations).post(invite))
        .route("/operator/invitations/{id}/delete", post(delete_invitation))
        .route("/operator/audit", get(audit))
}

#[derive(Template)]
#[template(path = "operator_login.html")]
struct LoginPage {
    shell: Shell,
    notice: Option<String>,
}

#[derive(Template)]
#[template(path = "operator_gates.html")]
struct GatesPage {
    shell: Shell,
    gates: Vec<GateRow>,
    revision: String,
    live: usize,
    notice: Option<&'static str>,
}

struct GateRow {
    name: String,
    version: String,
    state: &'static str,
    class: &'static str,
    revision: String,
    lag: String,
    is_behind: bool,
    heard: Markup,
    is_forgettable: bool,
}

#[derive(Template)]
#[template(path = "operator_organizations.html")]
struct OrganizationsPage {
    shell: Shell,
    search: String,
    rows: Vec<OrganizationRow>,
    next: Option<String>,
    first: Option<String>,
}

struct OrganizationRow {
    id: String,
    name: String,
    plan: String,
    created: Markup,
}

#[derive(Template)]
#[template(path = "operator_organization.html")]
struct OrganizationPage {
    shell: Shell,
    id: String,
    name: String,
    created: Markup,
    plans: Vec<Choice>,
    notice: Option<&'static str>,
    faults: Faults,
}

#[derive(Template)]
#[template(path = "operator_plans.html")]
struct PlansPage {
    shell: Shell,
    plans: Vec<PlanView>,
    default_plan: String,
}

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

#[derive(Template)]
#[template(path = "operator_invitations.html")]
struct InvitationsPage {
    shell: Shell,
    rows: Vec<InvitationRow>,
    next: Option<String>,
    form_token: String,
    notice: Option<&'static str>,
    faults: Faults,
    is_needed: bool,
}

struct InvitationRow {
    id: String,
    note: String,
    state: &'static str,
    class: &'static str,
    created: Markup,
    expires: Markup,
    used_by: String,
    is_open: bool,
}

#[derive(Template)]
#[template(path = "operator_audit.html")]
struct AuditPage {
    shell: Shell,
    log: AuditTable,
}

async fn login_form(_: Visitor) -> Response {
    page(&LoginPage {
        shell: Shell::visitor(),
        notice: None,
    })
}

async fn login(
    State(portal): State<Shared>,
    Visitor(caller): Visitor,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let app = &portal.app;
    let now_ms = app.now_ms();
    let address = address_name(caller.origin.address);
    let refused = |status, notice: String| {
        let notice = Some(notice);
        page_with(
            status,
            &LoginPage {
                shell: Shell::visitor(),
                notice,
            },
        )
    };
    if let Err(Fault::Throttled { retry_after_s }) = portal.operator_attempts.attempt(&address, now_ms) {
        let notice = format!("Too many attempts. Try again in {retry_after_s} seconds.");
        return Ok(refused(StatusCode::TOO_MANY_REQUESTS, notice));
    }
    let expected = &app.settings.admin_token;
    let presented = form.text("token").unwrap_or_default();
    // An empty setting lets nobody in.
    if expected.is_empty() || !equal_in_constant_time(presented, expected) {
        return Ok(refused(
            StatusCode::UNAUTHORIZED,
            "That is not the admin token.".to_owned(),
        ));
    }
    portal.operator_attempts.refund(&address, now_ms);
    let cookie = set_operator_cookie(&app.settings, now_ms)?;
    Ok(with_cookie(Redirect::to("/operator").into_response(), cookie))
}

async fn logout(State(portal): State<Shared>, _: Operator) -> Response {
    let cookie = clear_operator_cookie(&portal.app.settings);
    with_cookie(Redirect::to("/operator/login").into_response(), cookie)
}

async fn gates(State(portal): State<Shared>, _: Operator, Asked(query): Asked) -> Response {
    let now_ms = portal.app.now_ms();
    let (gates, newest) = portal.app.gates();
    let row = |gate: crate::control::model::GateState| {
        let lag = newest.saturating_sub(gate.revision);
        let (state, class) = match (gate.connected, gate.live) {
            (true, _) => ("Connected", "active"),
            (false, true) => ("Reconnecting", "rotating"),
            (false, false) => ("Silent", "revoked"),
        };
        GateRow {
            name: gate.name,
            version: gate.version.unwrap_or_else(|| "unknown".to_owned()),
            state,
            class,
            revision: count(gate.revision),
            lag: count(lag),
            is_behind: lag > 0,
            heard: when(gate.last_heard_at_ms, now_ms),
            is_forgettable: !gate.connected,
        }
    };
    page(&GatesPage {
        shell: Shell::operator("/operator"),
        live: gates.iter().filter(|gate| gate.live).count(),
        gates: gates.into_iter().map(row).collect(),
        revision: count(newest),
        notice: (query.text("done") == Some("forgotten")).then_some("The gate is forgotten."),
    })
}

async fn forget_gate(
    State(portal): State<Shared>,
    Operator(caller): Operator,
    Path(name): Path<String>,
) -> Result<Response, Problem> {
    portal.app.forget_gate(&caller, &name).await?;
    Ok(Redirect::to("/operator?done=forgotten").into_response())
}

async fn organizations(State(portal): State<Shared>, _: Operator, Asked(query): Asked) -> Result<Response, Problem> {
    let now_ms = portal.app.now_ms();
    let search = query.text("q").map(|q| q.chars().take(100).collect::<String>());
    let after = query.text("after").and_then(read_cursor);
    let after = after.and_then(|(date, id)| Some((date.parse().ok()?, id)));
    let wanted = OrganizationQuery {
        search: search.clone(),
        after: after.clone(),
        limit: PAGE + 1,
    };
    let mut found = portal.app.store.organizations(&wanted).await?;
    let more = found.len() > PAGE as usize;
    found.truncate(PAGE as usize);
    let search = search.unwrap_or_default();
    let with = |after: &str| link("/operator/organizations", &[("q", &search), ("after", after)]);
    let last = found.last().filter(|_| more);
    Ok(page(&OrganizationsPage {
        shell: Shell::operator("/operator/organizations"),
        next: last.map(|o| with(&cursor(&o.created_at_ms.to_string(), &o.id))),
        first: after.map(|_| with("")),
        rows: found
            .into_iter()
            .map(|o| OrganizationRow {
                created: when(o.created_at_ms, now_ms),
                id: o.id,
                name: o.name,
                plan: o.plan,
            })
            .collect(),
        search,
    }))
}

async fn organization(
    State(portal): State<Shared>,
    _: Operator,
    Path(id): Path<String>,
    Asked(query): Asked,
) -> Result<Response, Problem> {
    let mut shown = organization_page(&portal, &id).await?;
    shown.notice = (query.text("done") == Some("saved")).then_some("Saved. The gates apply the plan's limits at once.");
    Ok(page(&shown))
}

async fn edit_organization(
    State(portal): State<Shared>,
    Operator(caller): Operator,
    Path(id): Path<String>,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let mut again = organization_page(&portal, &id).await?;
    let patch = OrganizationPatch {
        name: Some(form.shown("name")),
        plan: form.owned("plan"),
        ..Default::default()
    };
    match portal.app.update_organization(&caller, &id, patch).await {
        Ok((_, revision)) => {
            let_gates_follow(&portal.app, revision).await;
            Ok(Redirect::to(&format!("/operator/organizations/{id}?done=saved")).into_response())
        }
        Err(Fault::Validation(faults)) => {
            again.faults = Faults(faults);
            Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again))
        }
        Err(other) => Err(other.into()),
    }
}

async fn organization_page(portal: &Shared, id: &str) -> Result<OrganizationPage, Problem> {
    let organization = portal.app.organization(id).await?;
    let plans = portal.app.settings.plans.iter();
    Ok(OrganizationPage {
        shell: Shell::operator("/operator/organizations"),
        plans: plans
            .map(|p| Choice::new(&*p.name, &*p.name, &organization.plan))
            .collect(),
        created: date(organization.created_at_ms),
        id: organization.id,
        name: organization.name,
        notice: None,
        faults: Faults::default(),
    })
}

async fn plans(State(portal): State<Shared>, _: Operator) -> Response {
    page(&PlansPage {
        shell: Shell::operator("/operator/plans"),
        plans: portal.app.settings.plans.iter().map(PlanView::of).collect(),
        default_plan: portal.app.settings.default_plan.clone(),
    })
}

async fn keys(State(portal): State<Shared>, _: Operator, Asked(query): Asked) -> Result<Response, Problem> {
    let organization = query.text("organization").map(|id| id.chars().take(64).collect());
    let list = key_table(&portal, &query, "/operator/keys", organization).await?;
    Ok(page(&KeysPage {
        shell: Shell::operator("/operator/keys"),
        list,
    }))
}

async fn key(
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

async fn disable_key(State(portal): State<Shared>, who: Operator, Path(id): Path<String>) -> Result<Response, Problem> {
    set_disabled(&portal, who, &id, true).await
}

async fn enable_key(State(portal): State<Shared>, who: Operator, Path(id): Path<String>) -> Result<Response, Problem> {
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

async fn revoke_key(
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

async fn invitations(State(portal): State<Shared>, _: Operator, Asked(query): Asked) -> Result<Response, Problem> {
    let after = query.text("after").and_then(read_cursor);
    let after = after.and_then(|(date, id)| Some((date.parse().ok()?, id)));
    let mut shown = invitations_page(&portal, after).await?;
    shown.notice = (query.text("done") == Some("deleted")).then_some("The invitation is withdrawn.");
    Ok(page(&shown))
}

async fn invite(
    State(portal): State<Shared>,
    Operator(caller): Operator,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let app = &portal.app;
    let mut again = invitations_page(&portal, None).await?;
    let Some(token) = read_form_token(&form, app.now_ms()) else {
        again.notice = Some(FORM_IS_OLD);
        return Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again));
    };
    let id = one_time_id("inv_", "operator", token);
    let made = AuditQuery {
        target: Some(id.clone()),
        limit: 1,
        ..AuditQuery::default()
    };
    let shell = Shell::operator("/operator/invitations");
    if !app.store.audit(&made).await?.is_empty() {
        return Ok(already(
            shell,
            "invitation",
            &form.shown("note"),
            "/operator/invitations",
        ));
    }
    let draft = InvitationDraft {
        note: form.owned("note"),
        id: Some(id),
        ..Default::default()
    };
    match app.create_invitation(&caller, draft).await {
        Ok((invitation, secret)) => Ok(reveal(Revealed {
            shell,
            title: "Invitation created",
            what: "invitation",
            name: if invitation.note.is_empty() {
                "Invitation"
            } else {
                &invitation.note
            },
            secret: secret.expose(),
            notes: vec![Markup::text(
                "Whoever has it may register one account, until it expires in two weeks.",
            )],
            line: None,
            done: "/operator/invitations",
        })),
        Err(Fault::Validation(faults)) => {
            again.faults = Faults(faults);
            Ok(page_with(StatusCode::UNPROCESSABLE_ENTITY, &again))
        }
        Err(other) => Err(other.into()),
    }
}

async fn delete_invitation(
    State(portal): State<Shared>,
    Operator(caller): Operator,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    portal.app.delete_invitation(&caller, &id).await?;
    Ok(Redirect::to("/operator/invitations?done=deleted").into_response())
}

async fn invitations_page(portal: &Shared, after: Option<(i64, String)>) -> Result<InvitationsPage, Problem> {
    let app = &portal.app;
    let now_ms = app.now_ms();
    let mut found = app.store.invitations(after.as_ref(), PAGE + 1).await?;
    let more = found.len() > PAGE as usize;
    found.truncate(PAGE as usize);
    let last = found.last().filter(|_| more);
    let next = last.map(|i| {
        link(
            "/operator/invitations",
            &[("after", &cursor(&i.created_at_ms.to_string(), &i.id))],
        )
    });
    let row = |invitation: Invitation| {
        let (state, class) = match (invitation.used_at_ms, invitation.expires_at_ms <= now_ms) {
            (Some(_), _) => ("Used", "expired"),
            (None, true) => ("Expired", "expired"),
            (None, false) => ("Open", "active"),
        };
        InvitationRow {
            state,
            class,
            created: when(invitation.created_at_ms, now_ms),
            expires: when(invitation.expires_at_ms, now_ms),
            used_by: invitation.used_by.unwrap_or_default(),
            is_open: state == "Open",
            id: invitation.id,
            note: invitation.note,
        }
    };
    Ok(InvitationsPage {
        shell: Shell::operator("/operator/invitations"),
        rows: found.into_iter().map(row).collect(),
        next,
        form_token: form_token(now_ms)?,
        notice: None,
        faults: Faults::default(),
        is_needed: app.settings.registration == crate::control::settings::Registration::Invite,
    })
}

async fn audit(State(portal): State<Shared>, _: Operator, Asked(query): Asked) -> Result<Response, Problem> {
    let log = audit_table(&portal, &query, "/operator/audit", None).await?;
    Ok(page(&AuditPage {
        shell: Shell::operator("/operator/audit"),
        log,
    }))
}

/// Rows on a page.
const PAGE: u32 = 25;
