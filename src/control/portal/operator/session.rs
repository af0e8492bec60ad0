//! The operator comes and goes.

use askama::Template;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Redirect, Response};

use crate::control::model::Fault;
use crate::control::portal::Shared;
use crate::control::portal::account::with_cookie;
use crate::control::portal::input::Posted;
use crate::control::portal::page::{Problem, Shell, page, page_with};
use crate::control::portal::person::{Operator, Visitor, clear_operator_cookie, set_operator_cookie};
use crate::control::secret::equal_in_constant_time;
use crate::control::throttle::address_name;

#[derive(Template)]
#[template(path = "operator_login.html")]
struct LoginPage {
    shell: Shell,
    notice: Option<String>,
}

pub async fn login_form(_: Visitor) -> Response {
    page(&LoginPage {
        shell: Shell::visitor(),
        notice: None,
    })
}

pub async fn login(
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

pub async fn logout(State(portal): State<Shared>, _: Operator) -> Response {
    let cookie = clear_operator_cookie(&portal.app.settings);
    with_cookie(Redirect::to("/operator/login").into_response(), cookie)
}
