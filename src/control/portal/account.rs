//! Registering, signing in and out.

use askama::Template;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};

use super::Shared;
use super::input::{Asked, Input, Posted, own_path};
use super::page::{Problem, Shell, page, page_with};
use super::parts::Faults;
use super::person::{Person, Visitor};
use super::reveal::{Revealed, already, let_gates_follow, request_line, reveal};
use crate::control::api::caller::{clear_cookie, session_cookie, set_cookie};
use crate::control::model::Fault;
use crate::control::service::accounts::RegisterDraft;
use crate::control::service::sessions::LoginDraft;
use crate::control::settings::Registration;

#[derive(Template)]
#[template(path = "register.html")]
struct RegisterPage {
    shell: Shell,
    name: String,
    email: String,
    invitation: String,
    needs_invitation: bool,
    is_closed: bool,
    notice: Option<String>,
    faults: Faults,
}

#[derive(Template)]
#[template(path = "login.html")]
struct LoginPage {
    shell: Shell,
    email: String,
    next: String,
    notice: Option<String>,
    faults: Faults,
    may_register: bool,
}

/// `GET /register`.
pub async fn register_form(State(portal): State<Shared>, Asked(query): Asked) -> Response {
    page(&register_page(&portal, &query))
}

/// `POST /register`: the account, its session, and the first key, shown this once.
pub async fn register(
    State(portal): State<Shared>,
    Visitor(caller): Visitor,
    headers: HeaderMap,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let app = &portal.app;
    let draft = RegisterDraft {
        name: form.owned("name"),
        email: form.owned("email"),
        password: form.raw("password").map(str::to_owned),
        invitation: form.owned("invitation"),
        ..Default::default()
    };
    let (email, password) = (draft.email.clone(), draft.password.clone());
    let made = match app.register(&caller, draft).await {
        Ok(made) => made,
        Err(fault) => return refuse_registration(&portal, &headers, &form, fault).await,
    };
    let login = LoginDraft {
        email: email.clone(),
        password,
        brought: session_cookie(&headers, &app.settings).map(str::to_owned),
        ..Default::default()
    };
    let signed_in = app.login(&caller, login).await?;
    let_gates_follow(app, made.revision).await;
    let organization = app.organization(&made.organization_id).await?;
    let shown = reveal(Revealed {
        shell: Shell::member("/keys", &organization, &signed_in.user.email),
        title: "Your account is ready",
        what: "API key",
        name: "Default key",
        secret: made.secret.expose(),
        notes: Vec::new(),
        line: Some(request_line(&app.settings, made.secret.expose())),
        done: "/",
    });
    Ok(with_cookie(shown, set_cookie(signed_in.secret.expose(), &app.settings)))
}

async fn refuse_registration(
    portal: &Shared,
    headers: &HeaderMap,
    form: &Input,
    fault: Fault,
) -> Result<Response, Problem> {
    let app = &portal.app;
    let mut page = register_page(portal, form);
    let status = match fault {
        Fault::Validation(faults) => {
            page.faults = Faults(faults);
            StatusCode::UNPROCESSABLE_ENTITY
        }
        Fault::EmailTaken => {
            // A reload of the page that showed the first key: its session says that it was this browser.
            if let Some(secret) = session_cookie(headers, &app.settings)
                && let Some((_, _, user)) = app.session_member(secret).await?
                && form
                    .text("email")
                    .is_some_and(|email| email.eq_ignore_ascii_case(&user.email))
            {
                let organization = app.organization(&user.organization_id).await?;
                let shell = Shell::member("/keys", &organization, &user.email);
                return Ok(already(shell, "API key", "Default key", "/keys"));
            }
            page.notice = Some("There is an account with this e-mail address already. Sign in instead.".to_owned());
            StatusCode::CONFLICT
        }
        Fault::InvitationInvalid => {
            page.notice = Some("The invitation is unknown, was used already, or has expired.".to_owned());
            StatusCode::FORBIDDEN
        }
        Fault::RegistrationClosed => StatusCode::FORBIDDEN,
        Fault::Throttled { retry_after_s } => {
            page.notice = Some(format!("Too many attempts. Try again in {retry_after_s} seconds."));
            StatusCode::TOO_MANY_REQUESTS
        }
        other => return Err(other.into()),
    };
    Ok(page_with(status, &page))
}

fn register_page(portal: &Shared, input: &Input) -> RegisterPage {
    let registration = portal.app.settings.registration;
    RegisterPage {
        shell: Shell::visitor(),
        name: input.shown("name"),
        email: input.shown("email"),
        invitation: input.shown("invitation"),
        needs_invitation: registration == Registration::Invite,
        is_closed: registration == Registration::Off,
        notice: None,
        faults: Faults::default(),
    }
}

/// `GET /login`.
pub async fn login_form(
    State(portal): State<Shared>,
    headers: HeaderMap,
    Asked(query): Asked,
) -> Result<Response, Problem> {
    if let Some(secret) = session_cookie(&headers, &portal.app.settings)
        && portal.app.session_member(secret).await?.is_some()
    {
        return Ok(Redirect::to(next(&query)).into_response());
    }
    let mut login = login_page(&portal, &query);
    if query.text("done") == Some("signed-out") {
        login.notice = Some("You are signed out.".to_owned());
    }
    Ok(page(&login))
}

/// `POST /login`. The session is a new one, whatever cookie the browser brought along.
pub async fn login(
    State(portal): State<Shared>,
    Visitor(caller): Visitor,
    headers: HeaderMap,
    Posted(form): Posted,
) -> Result<Response, Problem> {
    let app = &portal.app;
    let draft = LoginDraft {
        email: form.owned("email"),
        password: form.raw("password").map(str::to_owned),
        brought: session_cookie(&headers, &app.settings).map(str::to_owned),
        ..Default::default()
    };
    let mut page = login_page(&portal, &form);
    let status = match app.login(&caller, draft).await {
        Ok(signed_in) => {
            let answer = Redirect::to(next(&form)).into_response();
            return Ok(with_cookie(
                answer,
                set_cookie(signed_in.secret.expose(), &app.settings),
            ));
        }
        Err(Fault::Validation(faults)) => {
            page.faults = Faults(faults);
            StatusCode::UNPROCESSABLE_ENTITY
        }
        Err(Fault::WrongCredentials) => {
            page.notice = Some("The e-mail address or the password is wrong.".to_owned());
            StatusCode::UNAUTHORIZED
        }
        Err(Fault::Throttled { retry_after_s }) => {
            page.notice = Some(format!("Too many attempts. Try again in {retry_after_s} seconds."));
            StatusCode::TOO_MANY_REQUESTS
        }
        Err(other) => return Err(other.into()),
    };
    Ok(page_with(status, &page))
}

/// `POST /logout`.
pub async fn logout(State(portal): State<Shared>, person: Person) -> Result<Response, Problem> {
    portal
        .app
        .end_session(&person.caller, &person.user.id, &person.session.id)
        .await?;
    let answer = Redirect::to("/login?done=signed-out").into_response();
    Ok(with_cookie(answer, clear_cookie(&portal.app.settings)))
}

/// The answer with a cookie.
pub fn with_cookie(mut response: Response, cookie: Option<HeaderValue>) -> Response {
    if let Some(cookie) = cookie {
        response.headers_mut().append(header::SET_COOKIE, cookie);
    }
    response
}

fn login_page(portal: &Shared, input: &Input) -> LoginPage {
    LoginPage {
        shell: Shell::visitor(),
        email: input.shown("email"),
        next: next(input).to_owned(),
        notice: None,
        faults: Faults::default(),
        may_register: portal.app.settings.registration != Registration::Off,
    }
}

fn next(input: &Input) -> &str {
    input.text("next").and_then(own_path).unwrap_or("/")
}
