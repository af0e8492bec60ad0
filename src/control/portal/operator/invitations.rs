//! Invitations to register.

use askama::Template;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use super::PAGE;
use crate::control::api::value::{cursor, read_cursor};
use crate::control::model::{Fault, Invitation};
use crate::control::portal::Shared;
use crate::control::portal::create::FORM_IS_OLD;
use crate::control::portal::input::{Asked, Posted, form_token, link, one_time_id, read_form_token};
use crate::control::portal::page::{Problem, Shell, page, page_with};
use crate::control::portal::parts::{Faults, Markup, when};
use crate::control::portal::person::Operator;
use crate::control::portal::reveal::{Revealed, already, reveal};
use crate::control::service::admin::InvitationDraft;
use crate::control::settings::Registration;
use crate::control::store::AuditQuery;

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

pub async fn invitations(State(portal): State<Shared>, _: Operator, Asked(query): Asked) -> Result<Response, Problem> {
    let after = query.text("after").and_then(read_cursor);
    let after = after.and_then(|(date, id)| Some((date.parse().ok()?, id)));
    let mut shown = invitations_page(&portal, after).await?;
    shown.notice = (query.text("done") == Some("deleted")).then_some("The invitation is withdrawn.");
    Ok(page(&shown))
}

pub async fn invite(
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

pub async fn delete_invitation(
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
        is_needed: app.settings.registration == Registration::Invite,
    })
}
