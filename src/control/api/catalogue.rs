//! What there is to choose from: plans with their limits, scopes, environments.

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::caller::Tenant;
use super::error::ApiError;
use super::{App, Envelope, Reply};
use crate::control::settings::{Plan, Settings};

/// A plan and its limits.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlanView {
    name: String,
    /// Whether it is the one of the organisation that asks.
    current: bool,
    /// Requests of one key that may be under way at once; null: unlimited.
    max_in_flight: Option<u32>,
    tiers: Vec<TierView>,
}

/// The limit of one tier.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TierView {
    name: String,
    /// Requests per key in any window.
    limit: u32,
    window_seconds: f64,
}

/// All plans.
#[derive(Serialize, ToSchema)]
pub struct PlanList {
    items: Vec<PlanView>,
}

/// A scope.
#[derive(Serialize, ToSchema)]
pub struct ScopeView {
    name: String,
    /// What it grants.
    description: String,
}

/// An environment.
#[derive(Serialize, ToSchema)]
pub struct EnvironmentView {
    name: String,
    prefix: String,
    billed: bool,
}

/// All scopes, and the environments that keys can be made for.
#[derive(Serialize, ToSchema)]
pub struct ScopeList {
    items: Vec<ScopeView>,
    environments: Vec<EnvironmentView>,
}

/// The plans and their limits.
#[utoipa::path(
    get, path = "/api/v1/plans", tag = "Catalogue", operation_id = "listPlans",
    responses((status = 200, description = "The plans.", body = Envelope<PlanList>)),
)]
pub async fn plans(State(app): State<App>, tenant: Tenant) -> Result<Reply<PlanList>, ApiError> {
    let own = app.organization(&tenant.organization).await?.plan;
    Ok(Reply::ok(plan_list(&app.settings, Some(&own))))
}

/// The scopes and environments.
#[utoipa::path(
    get, path = "/api/v1/scopes", tag = "Catalogue", operation_id = "listScopes",
    responses((status = 200, description = "The scopes.", body = Envelope<ScopeList>)),
)]
pub async fn scopes(State(app): State<App>, _: Tenant) -> Reply<ScopeList> {
    let scopes = app.settings.scopes.iter();
    let environments = app.settings.environments.iter();
    Reply::ok(ScopeList {
        items: scopes
            .map(|s| ScopeView {
                name: s.name.clone(),
                description: s.description.clone(),
            })
            .collect(),
        environments: environments
            .map(|e| EnvironmentView {
                name: e.name.clone(),
                prefix: e.prefix.clone(),
                billed: e.billed,
            })
            .collect(),
    })
}

/// Every plan, with the one that is `own` marked.
pub fn plan_list(settings: &Settings, own: Option<&str>) -> PlanList {
    let view = |plan: &Plan| PlanView {
        name: plan.name.clone(),
        current: own == Some(plan.name.as_str()),
        max_in_flight: plan.max_in_flight,
        tiers: plan
            .tiers
            .iter()
            .map(|tier| TierView {
                name: tier.name.clone(),
                limit: tier.limit,
                window_seconds: tier.window_ms as f64 / 1_000.0,
            })
            .collect(),
    };
    PlanList {
        items: settings.plans.iter().map(view).collect(),
    }
}
