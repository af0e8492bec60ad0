//! The operator's pages: gates, organisations, plans, keys of everybody, invitations, the whole audit log.

use askama::Template;
use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::{get, post};

use super::Shared;
use super::audit::{AuditTable, table as audit_table};
use super::input::Asked;
use super::page::{Problem, Shell, page};
use super::person::Operator;

mod gates;
mod invitations;
mod keys;
mod organizations;
mod session;

/// The pages below `/operator`.
pub fn router() -> Router<Shared> {
    Router::new()
        .route("/operator", get(gates::gates))
        .route("/operator/gates/{name}/forget", post(gates::forget_gate))
        .route("/operator/login", get(session::login_form).post(session::login))
        .route("/operator/logout", post(session::logout))
        .route("/operator/organizations", get(organizations::organizations))
        .route(
            "/operator/organizations/{id}",
            get(organizations::organization).post(organizations::edit_organization),
        )
        .route("/operator/plans", get(organizations::plans))
        .route("/operator/keys", get(keys::keys))
        .route("/operator/keys/{id}", get(keys::key))
        .route("/operator/keys/{id}/disable", post(keys::disable_key))
        .route("/operator/keys/{id}/enable", post(keys::enable_key))
        .route("/operator/keys/{id}/revoke", post(keys::revoke_key))
        .route(
            "/operator/invitations",
            get(invitations::invitations).post(invitations::invite),
        )
        .route(
            "/operator/invitations/{id}/delete",
            post(invitations::delete_invitation),
        )
        .route("/operator/audit", get(audit))
}

#[derive(Template)]
#[template(path = "operator_audit.html")]
struct AuditPage {
    shell: Shell,
    log: AuditTable,
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
