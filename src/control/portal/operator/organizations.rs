//! Organisations, and the plans that they may have.

use askama::Template;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use super::PAGE;
use crate::control::api::value::{cursor, read_cursor};
use crate::control::model::Fault;
use crate::control::portal::Shared;
use crate::control::portal::input::{Asked, Posted, link};
use crate::control::portal::page::{Problem, Shell, page, page_with};
use crate::control::portal::parts::{Choice, Faults, Markup, date, when};
use crate::control::portal::person::Operator;
use crate::control::portal::reveal::let_gates_follow;
use crate::control::portal::settings::PlanView;
use crate::control::service::admin::OrganizationPatch;
use crate::control::store::OrganizationQuery;

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

pub async fn organizations(
    State(portal): State<Shared>,
    _: Operator,
    Asked(query): Asked,
) -> Result<Response, Problem> {
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

pub async fn organization(
    State(portal): State<Shared>,
    _: Operator,
    Path(id): Path<String>,
    Asked(query): Asked,
) -> Result<Response, Problem> {
    let mut shown = organization_page(&portal, &id).await?;
    shown.notice = (query.text("done") == Some("saved")).then_some("Saved. The gates apply the plan's limits at once.");
    Ok(page(&shown))
}

pub async fn edit_organization(
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

pub async fn plans(State(portal): State<Shared>, _: Operator) -> Response {
    page(&PlansPage {
        shell: Shell::operator("/operator/plans"),
        plans: portal.app.settings.plans.iter().map(PlanView::of).collect(),
        default_plan: portal.app.settings.default_plan.clone(),
    })
}
