//! The operator's part: every organisation, every key by id, gates, invitations.

use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::audit::{AuditList, AuditListQuery};
use super::caller::Operator;
use super::catalogue::{PlanList, plan_list};
use super::error::ApiError;
use super::fields::{Body, QueryFields};
use super::key_view::{AppliedView, ChangedKey, KeyList, KeyView};
use super::keys::{KeyListQuery, UpdateKeyRequest, WaitQuery, page, read_patch, read_wait, reply_changed, wait_for};
use super::organization::OrganizationView;
use super::tokens::Deleted;
use super::value::{Date, cursor, read_cursor};
use super::{App, Envelope, Reply};
use crate::control::model::{GateState, Invitation};
use crate::control::service::admin::{InvitationDraft, OrganizationPatch};
use crate::control::store::OrganizationQuery;

/// A page of organisations.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrganizationList {
    items: Vec<OrganizationView>,
    /// For the next page; null on the last one.
    next_cursor: Option<String>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "describes the query; it is read field by field")]
pub struct OrganizationListQuery {
    /// Part of a name, or a whole id.
    #[param(max_length = 100)]
    q: Option<String>,
    #[param(max_length = 1024)]
    cursor: Option<String>,
    /// Default: 25.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<u32>,
}

/// What is to change.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct UpdateOrganizationRequest {
    #[schema(min_length = 1, max_length = 100)]
    name: Option<String>,
    /// One of the plans of this installation.
    #[schema(example = "business")]
    plan: Option<String>,
}

/// An organisation and, with `wait=all`, who has applied its new plan.
#[derive(Serialize, ToSchema)]
pub struct ChangedOrganization {
    #[serde(flatten)]
    organization: OrganizationView,
    revision: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    applied: Option<AppliedView>,
}

/// A gate.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct GateView {
    name: String,
    version: Option<String>,
    /// The newest revision that it has applied.
    revision: u64,
    /// How many revisions it is behind.
    lag: u64,
    last_heard_at: Date,
    connected: bool,
    /// Connected, or heard in the last 15 seconds.
    live: bool,
}

/// All gates.
#[derive(Serialize, ToSchema)]
pub struct GateList {
    items: Vec<GateView>,
    /// The newest revision.
    revision: u64,
}

/// The revision of the snapshot that every gate loads.
#[derive(Serialize, ToSchema)]
pub struct Resynced {
    revision: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    applied: Option<AppliedView>,
}

/// An invitation to be made.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[allow(
    dead_code,
    reason = "describes the body; it is read field by field, so that all faults are told"
)]
pub struct CreateInvitationRequest {
    /// For whom it is.
    #[schema(max_length = 200, pattern = r"^[^\x00-\x1f\x7f-\x9f]*$")]
    note: Option<String>,
    /// Absent or null: two weeks from now.
    #[schema(value_type = Option<Date>)]
    expires_at: Option<String>,
}

/// An invitation.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct InvitationView {
    id: String,
    note: String,
    created_at: Date,
    expires_at: Date,
    used_at: Option<Date>,
    /// The organisation that it became.
    used_by: Option<String>,
}

/// A new invitation: what the invited person sends as `invitation`, shown this once.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct IssuedInvitation {
    #[serde(flatten)]
    view: InvitationView,
    invitation: String,
}

/// A page of invitations.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct InvitationList {
    items: Vec<InvitationView>,
    next_cursor: Option<String>,
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "describes the query; it is read field by field")]
pub struct PageQuery {
    #[param(max_length = 1024)]
    cursor: Option<String>,
    /// Default: 25.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<u32>,
}

/// Every organisation, oldest first.
#[utoipa::path(
    get, path = "/api/v1/admin/organizations", tag = "Operator", operation_id = "adminListOrganizations",
    params(OrganizationListQuery),
    responses((status = 200, description = "A page of them.", body = Envelope<OrganizationList>)),
)]
pub async fn organizations(
    State(app): State<App>,
    _: Operator,
    QueryFields(mut fields): QueryFields,
) -> Result<Reply<OrganizationList>, ApiError> {
    let search = fields.short("q", 100).filter(|search| !search.is_empty());
    let (after, limit) = read_page(&mut fields);
    fields.done()?;
    let mut found = app
        .store
        .organizations(&OrganizationQuery {
            search,
            after,
            limit: limit + 1,
        })
        .await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_cursor = found
        .last()
        .filter(|_| more)
        .map(|o| cursor(&o.created_at_ms.to_string(), &o.id));
    Ok(Reply::ok(OrganizationList {
        items: found.into_iter().map(OrganizationView::of).collect(),
        next_cursor,
    }))
}

/// One organisation.
#[utoipa::path(
    get, path = "/api/v1/admin/organizations/{id}", tag = "Operator", operation_id = "adminShowOrganization",
    params(("id" = String, Path, description = "The organisation.")),
    responses((status = 200, description = "The organisation.", body = Envelope<OrganizationView>)),
)]
pub async fn organization(
    State(app): State<App>,
    _: Operator,
    Path(id): Path<String>,
) -> Result<Reply<OrganizationView>, ApiError> {
    Ok(Reply::ok(OrganizationView::of(app.organization(&id).await?)))
}

/// Change an organisation's name or plan.
#[utoipa::path(
    patch, path = "/api/v1/admin/organizations/{id}", tag = "Operator", operation_id = "adminUpdateOrganization",
    params(("id" = String, Path, description = "The organisation."), WaitQuery),
    request_body = UpdateOrganizationRequest,
    responses((status = 200, description = "Changed.", body = Envelope<ChangedOrganization>)),
)]
pub async fn update_organization(
    State(app): State<App>,
    Operator(caller): Operator,
    Path(id): Path<String>,
    QueryFields(query): QueryFields,
    Body(mut fields): Body,
) -> Result<Reply<ChangedOrganization>, ApiError> {
    let wait = read_wait(query)?;
    let mut patch = OrganizationPatch {
        name: fields.text("name"),
        plan: fields.text("plan"),
        ..Default::default()
    };
    patch.faults = fields.finish();
    let (organization, revision) = app.update_organization(&caller, &id, patch).await?;
    let applied = wait_for(&app, revision, wait).await;
    Ok(Reply::ok(ChangedOrganization {
        organization: OrganizationView::of(organization),
        revision,
        applied,
    }))
}

/// The plans and their limits, as the configuration has them.
#[utoipa::path(
    get, path = "/api/v1/admin/plans", tag = "Operator", operation_id = "adminListPlans",
    responses((status = 200, description = "The plans.", body = Envelope<PlanList>)),
)]
pub async fn plans(State(app): State<App>, _: Operator) -> Reply<PlanList> {
    Reply::ok(plan_list(&app.settings, None))
}

/// Keys of every organisation.
#[utoipa::path(
    get, path = "/api/v1/admin/keys", tag = "Operator", operation_id = "adminListKeys",
    params(KeyListQuery, ("organization" = Option<String>, Query, description = "Only this one's.", max_length = 64)),
    responses((status = 200, description = "A page of keys.", body = Envelope<KeyList>)),
)]
pub async fn keys(
    State(app): State<App>,
    _: Operator,
    QueryFields(mut fields): QueryFields,
) -> Result<Reply<KeyList>, ApiError> {
    let organization = fields.short("organization", 64);
    Ok(Reply::ok(page(&app, fields, organization).await?))
}

/// One key, whoever it belongs to.
#[utoipa::path(
    get, path = "/api/v1/admin/keys/{id}", tag = "Operator", operation_id = "adminShowKey",
    params(("id" = String, Path, description = "The key.")),
    responses((status = 200, description = "The key.", body = Envelope<KeyView>)),
)]
pub async fn key(State(app): State<App>, _: Operator, Path(id): Path<String>) -> Result<Reply<KeyView>, ApiError> {
    let key = app.key(None, &id).await?;
    Ok(Reply::ok(KeyView::of(key, app.now_ms())))
}

/// Rename, re-scope, disable, enable a key, or set when it expires.
#[utoipa::path(
    patch, path = "/api/v1/admin/keys/{id}", tag = "Operator", operation_id = "adminUpdateKey",
    params(("id" = String, Path, description = "The key."), WaitQuery),
    request_body = UpdateKeyRequest,
    responses((status = 200, description = "Changed.", body = Envelope<ChangedKey>)),
)]
pub async fn update_key(
    State(app): State<App>,
    Operator(caller): Operator,
    Path(id): Path<String>,
    QueryFields(query): QueryFields,
    Body(fields): Body,
) -> Result<Reply<ChangedKey>, ApiError> {
    let wait = read_wait(query)?;
    let key = app.update_key(&caller, None, &id, read_patch(fields)).await?;
    reply_changed(&app, key, wait).await
}

/// Revoke a key for good.
///
/// It stays to be seen, with the status `revoked`, and takes no further change.
#[utoipa::path(
    delete, path = "/api/v1/admin/keys/{id}", tag = "Operator", operation_id = "adminRevokeKey",
    params(("id" = String, Path, description = "The key."), WaitQuery),
    responses((status = 200, description = "Revoked.", body = Envelope<ChangedKey>)),
)]
pub async fn revoke_key(
    State(app): State<App>,
    Operator(caller): Operator,
    Path(id): Path<String>,
    QueryFields(query): QueryFields,
) -> Result<Reply<ChangedKey>, ApiError> {
    let wait = read_wait(query)?;
    let key = app.revoke_key(&caller, None, &id).await?;
    reply_changed(&app, key, wait).await
}

/// The gates, with their revision, lag and version.
#[utoipa::path(
    get, path = "/api/v1/admin/gates", tag = "Operator", operation_id = "adminListGates",
    responses((status = 200, description = "The gates.", body = Envelope<GateList>)),
)]
pub async fn gates(State(app): State<App>, _: Operator) -> Reply<GateList> {
    let (gates, revision) = app.gates();
    Reply::ok(GateList {
        items: gates.into_iter().map(|gate| GateView::of(gate, revision)).collect(),
        revision,
    })
}

/// Forget a gate that was taken out of service. One that is connected is not forgotten.
#[utoipa::path(
    delete, path = "/api/v1/admin/gates/{name}", tag = "Operator", operation_id = "adminForgetGate",
    params(("name" = String, Path, description = "The gate.")),
    responses((status = 200, description = "Forgotten.", body = Envelope<Deleted>)),
)]
pub async fn forget_gate(
    State(app): State<App>,
    Operator(caller): Operator,
    Path(name): Path<String>,
) -> Result<Reply<Deleted>, ApiError> {
    app.forget_gate(&caller, &name).await?;
    Ok(Reply::ok(Deleted::new(name)))
}

/// Make every gate load a full snapshot. Needed after the database was restored from a backup: the gates are ahead of it
/// and refuse what is older than what they have.
#[utoipa::path(
    post, path = "/api/v1/admin/feed/resync", tag = "Operator", operation_id = "adminResync", params(WaitQuery),
    responses((status = 200, description = "On its way.", body = Envelope<Resynced>)),
)]
pub async fn resync(
    State(app): State<App>,
    Operator(caller): Operator,
    QueryFields(query): QueryFields,
) -> Result<Reply<Resynced>, ApiError> {
    let wait = read_wait(query)?;
    let revision = app.resync(&caller).await?;
    let applied = wait_for(&app, revision, wait).await;
    Ok(Reply::ok(Resynced { revision, applied }))
}

/// The audit log of every organisation, newest first.
#[utoipa::path(
    get, path = "/api/v1/admin/audit", tag = "Operator", operation_id = "adminListAudit",
    params(AuditListQuery, ("organization" = Option<String>, Query, description = "Only this one's.", max_length = 64)),
    responses((status = 200, description = "A page of it.", body = Envelope<AuditList>)),
)]
pub async fn audit(
    State(app): State<App>,
    _: Operator,
    QueryFields(mut fields): QueryFields,
) -> Result<Reply<AuditList>, ApiError> {
    let organization = fields.short("organization", 64);
    Ok(Reply::ok(super::audit::page(&app, fields, organization).await?))
}

/// The invitations, oldest first.
#[utoipa::path(
    get, path = "/api/v1/admin/invitations", tag = "Operator", operation_id = "adminListInvitations",
    params(PageQuery),
    responses((status = 200, description = "A page of them.", body = Envelope<InvitationList>)),
)]
pub async fn invitations(
    State(app): State<App>,
    _: Operator,
    QueryFields(mut fields): QueryFields,
) -> Result<Reply<InvitationList>, ApiError> {
    let (after, limit) = read_page(&mut fields);
    fields.done()?;
    let mut found = app.store.invitations(after.as_ref(), limit + 1).await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next_cursor = found
        .last()
        .filter(|_| more)
        .map(|i| cursor(&i.created_at_ms.to_string(), &i.id));
    Ok(Reply::ok(InvitationList {
        items: found.into_iter().map(InvitationView::of).collect(),
        next_cursor,
    }))
}

/// Invite somebody. The answer shows the invitation this once.
#[utoipa::path(
    post, path = "/api/v1/admin/invitations", tag = "Operator", operation_id = "adminCreateInvitation",
    request_body = CreateInvitationRequest,
    responses((status = 201, description = "Made.", body = Envelope<IssuedInvitation>)),
)]
pub async fn create_invitation(
    State(app): State<App>,
    Operator(caller): Operator,
    Body(mut fields): Body,
) -> Result<Reply<IssuedInvitation>, ApiError> {
    let mut draft = InvitationDraft {
        note: fields.text("note"),
        expires_at_ms: fields.date("expiresAt"),
        ..Default::default()
    };
    draft.faults = fields.finish();
    let (invitation, secret) = app.create_invitation(&caller, draft).await?;
    let answer = IssuedInvitation {
        view: InvitationView::of(invitation),
        invitation: secret.expose().to_owned(),
    };
    Ok(Reply::created(answer))
}

/// Withdraw an invitation.
#[utoipa::path(
    delete, path = "/api/v1/admin/invitations/{id}", tag = "Operator", operation_id = "adminDeleteInvitation",
    params(("id" = String, Path, description = "The invitation.")),
    responses((status = 200, description = "Withdrawn.", body = Envelope<Deleted>)),
)]
pub async fn delete_invitation(
    State(app): State<App>,
    Operator(caller): Operator,
    Path(id): Path<String>,
) -> Result<Reply<Deleted>, ApiError> {
    app.delete_invitation(&caller, &id).await?;
    Ok(Reply::ok(Deleted::new(id)))
}

fn read_page(fields: &mut super::fields::Fields) -> (Option<(i64, String)>, u32) {
    let limit = fields.number("limit", 1..=100).unwrap_or(25) as u32;
    let after = match fields.text("cursor") {
        None => None,
        Some(text) => match read_cursor(&text).and_then(|(value, id)| Some((value.parse().ok()?, id))) {
            Some(after) => Some(after),
            None => fields.fault("cursor", "is not one that a page gave"),
        },
    };
    (after, limit)
}

impl GateView {
    fn of(gate: GateState, newest: u64) -> Self {
        Self {
            lag: newest.saturating_sub(gate.revision),
            name: gate.name,
            version: gate.version,
            revision: gate.revision,
            last_heard_at: Date(gate.last_heard_at_ms),
            connected: gate.connected,
            live: gate.live,
        }
    }
}

impl InvitationView {
    fn of(invitation: Invitation) -> Self {
        Self {
            id: invitation.id,
            note: invitation.note,
            created_at: Date(invitation.created_at_ms),
            expires_at: Date(invitation.expires_at_ms),
            used_at: invitation.used_at_ms.map(Date),
            used_by: invitation.used_by,
        }
    }
}
