//! Rendering, the frame around every page, pages of refusals.

use askama::Template;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};

use super::assets;
use super::input::encode;
use crate::control::api::error::{ApiError, Refusal};
use crate::control::model::{Fault, Organization};

/// What the frame of a page shows: which section one is in, and who one is.
pub struct Shell {
    /// The path of the section, such as `/keys`.
    pub section: &'static str,
    pub who: Who,
}

/// Who looks at a page.
pub enum Who {
    Visitor,
    Member { organization: String, email: String },
    Operator,
}

impl Shell {
    pub fn visitor() -> Self {
        Self {
            section: "",
            who: Who::Visitor,
        }
    }

    pub fn operator(section: &'static str) -> Self {
        Self {
            section,
            who: Who::Operator,
        }
    }

    pub fn member(section: &'static str, organization: &Organization, email: &str) -> Self {
        let who = Who::Member {
            organization: organization.name.clone(),
            email: email.to_owned(),
        };
        Self { section, who }
    }

    /// Where an asset is.
    pub fn asset(&self, name: &str) -> String {
        assets::url(name)
    }

    /// The links of the navigation: path, text, whether it is where one is.
    pub fn links(&self) -> Vec<(&'static str, &'static str, bool)> {
        let links: &[_] = match self.who {
            Who::Visitor => &[],
            Who::Member { .. } => &MEMBER_LINKS,
            Who::Operator => &OPERATOR_LINKS,
        };
        let link = |(path, text): &(&'static str, &'static str)| (*path, *text, *path == self.section);
        links.iter().map(link).collect()
    }
}

const MEMBER_LINKS: [(&str, &str); 6] = [
    ("/", "Overview"),
    ("/keys", "Keys"),
    ("/usage", "Usage"),
    ("/audit", "Audit log"),
    ("/tokens", "Access tokens"),
    ("/settings", "Settings"),
];

const OPERATOR_LINKS: [(&str, &str); 6] = [
    ("/operator", "Gates"),
    ("/operator/organizations", "Organisations"),
    ("/operator/keys", "Keys"),
    ("/operator/plans", "Plans"),
    ("/operator/invitations", "Invitations"),
    ("/operator/audit", "Audit log"),
];

/// Marks an answer whose body is a page already, also where its status is that of a refusal.
#[derive(Clone, Copy)]
pub struct Rendered;

/// Why there is no page.
pub enum Problem {
    Refused(ApiError),
    /// Sign in first, then come back to this path.
    SignIn {
        next: String,
        htmx: bool,
    },
    OperatorSignIn {
        htmx: bool,
    },
}

impl From<Fault> for Problem {
    fn from(fault: Fault) -> Self {
        Problem::Refused(ApiError::Fault(fault))
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        Problem::Refused(error)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        match self {
            Problem::Refused(error) => error.into_response(),
            Problem::SignIn { next, htmx } if next == "/" => go(htmx, "/login"),
            Problem::SignIn { next, htmx } => go(htmx, &format!("/login?next={}", encode(&next))),
            Problem::OperatorSignIn { htmx } => go(htmx, "/operator/login"),
        }
    }
}

/// A redirect of the whole page, also where htmx asked for a part of it.
fn go(htmx: bool, target: &str) -> Response {
    match HeaderValue::from_str(target) {
        Ok(target) if htmx => [(HeaderName::from_static("hx-redirect"), target)].into_response(),
        _ => Redirect::to(target).into_response(),
    }
}

/// A page.
pub fn page(template: &impl Template) -> Response {
    page_with(StatusCode::OK, template)
}

/// A page with another status, such as a form with faults.
pub fn page_with(status: StatusCode, template: &impl Template) -> Response {
    match template.render() {
        Ok(html) => {
            let mut response = (status, page_headers(), html).into_response();
            response.extensions_mut().insert(Rendered);
            response
        }
        Err(error) => ApiError::Fault(Fault::Internal(format!("a page cannot be rendered: {error}"))).into_response(),
    }
}

/// Whether a refusal should be a page: it is outside the API, and the client reads HTML.
pub fn wants_page(path: &str, headers: &HeaderMap) -> bool {
    let is_api = ["/api/", "/feed/", "/openapi.json"]
        .iter()
        .any(|api| path.starts_with(api));
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    !is_api && accept.is_some_and(|accept| accept.contains("text/html"))
}

/// Makes a refusal a page.
pub fn write_refusal(response: &mut Response, refusal: &Refusal, request_id: &str) {
    let status = response.status();
    let title = match status {
        StatusCode::NOT_FOUND => "Page not found",
        StatusCode::FORBIDDEN => "Not allowed",
        StatusCode::TOO_MANY_REQUESTS => "Too many attempts",
        StatusCode::CONFLICT => "That does not fit",
        StatusCode::UNPROCESSABLE_ENTITY | StatusCode::BAD_REQUEST => "That cannot be done",
        _ if status.is_server_error() => "Something went wrong",
        _ => "Refused",
    };
    let message = match (status, &refusal.fields) {
        (StatusCode::NOT_FOUND, _) => "There is nothing here, or it belongs to somebody else.".to_owned(),
        (_, Some(fields)) => {
            let told: Vec<_> = fields.iter().map(|f| format!("{} {}", f.field, f.message)).collect();
            format!("{}.", told.join("; "))
        }
        _ => refusal.message.clone(),
    };
    let template = RefusalPage {
        shell: Shell::visitor(),
        title,
        message,
        request_id,
    };
    let html = template.render().unwrap_or_else(|_| title.to_owned());
    let headers = response.headers_mut();
    for (name, value) in page_headers() {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(html.len()));
    *response.body_mut() = Body::from(html);
}

#[derive(Template)]
#[template(path = "refusal.html")]
struct RefusalPage<'a> {
    shell: Shell,
    title: &'a str,
    message: String,
    request_id: &'a str,
}

fn page_headers() -> [(HeaderName, &'static str); 2] {
    [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
    ]
}

/// Only our own files; no inline script or style, no frames, forms to ourselves only.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
    connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";
