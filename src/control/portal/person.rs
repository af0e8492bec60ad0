//! Who is signed in: a member of an organisation, or the operator.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::Shared;
use super::page::{Problem, Shell};
use crate::control::api::caller::session_cookie;
use crate::control::model::{Actor, Caller, Fault, Organization, Origin, Session, User};
use crate::control::secret::{equal_in_constant_time, hex, id};
use crate::control::settings::Settings;

/// A member with a session.
pub struct Person {
    pub caller: Caller,
    pub user: User,
    pub session: Session,
    pub organization: Organization,
}

impl Person {
    pub fn shell(&self, section: &'static str) -> Shell {
        Shell::member(section, &self.organization, &self.user.email)
    }
}

impl FromRequestParts<Shared> for Person {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, portal: &Shared) -> Result<Self, Problem> {
        let app = &portal.app;
        let found = match session_cookie(&parts.headers, &app.settings) {
            Some(secret) => app.session_member(secret).await?,
            None => None,
        };
        let Some((member, session, user)) = found else {
            // Only what can be asked for again is worth coming back to.
            let next = parts.uri.path_and_query().filter(|_| parts.method == "GET");
            return Err(Problem::SignIn {
                next: next.map_or("/", |next| next.as_str()).to_owned(),
                htmx: is_htmx(&parts.headers),
            });
        };
        let organization = app.organization(&user.organization_id).await?;
        Ok(Self {
            caller: Caller {
                actor: member.actor,
                origin: origin(parts),
            },
            user,
            session,
            organization,
        })
    }
}

/// Anybody.
pub struct Visitor(pub Caller);

impl FromRequestParts<Shared> for Visitor {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Shared) -> Result<Self, Problem> {
        Ok(Self(Caller {
            actor: Actor::Visitor,
            origin: origin(parts),
        }))
    }
}

/// The operator, after having shown the admin token.
pub struct Operator(pub Caller);

impl FromRequestParts<Shared> for Operator {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, portal: &Shared) -> Result<Self, Problem> {
        let app = &portal.app;
        let presented = cookie(&parts.headers, operator_cookie_name(&app.settings));
        if !presented.is_some_and(|pass| is_valid_pass(pass, &app.settings.admin_token, app.now_ms())) {
            return Err(Problem::OperatorSignIn {
                htmx: is_htmx(&parts.headers),
            });
        }
        Ok(Self(Caller {
            actor: Actor::Operator,
            origin: origin(parts),
        }))
    }
}

/// The cookie of an operator who has shown the admin token. The token itself is not in it: the cookie is a date and a
/// MAC over it, keyed by the token, so a new admin token ends all of them. `Strict`: nothing links to these pages.
pub fn set_operator_cookie(settings: &Settings, now_ms: i64) -> Result<Option<HeaderValue>, Fault> {
    let body = format!("{}.{}", now_ms + OPERATOR_LIFE_MS, id("op_")?);
    let value = format!("{body}.{}", pass_mac(&body, &settings.admin_token));
    Ok(operator_cookie(&value, OPERATOR_LIFE_MS / 1_000, settings))
}

/// Takes the cookie away.
pub fn clear_operator_cookie(settings: &Settings) -> Option<HeaderValue> {
    operator_cookie("", 0, settings)
}

fn operator_cookie(value: &str, max_age_s: i64, settings: &Settings) -> Option<HeaderValue> {
    let secure = if is_secure(settings) { "; Secure" } else { "" };
    let name = operator_cookie_name(settings);
    let text = format!("{name}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={max_age_s}{secure}");
    HeaderValue::from_str(&text).ok()
}

fn operator_cookie_name(settings: &Settings) -> &'static str {
    if is_secure(settings) {
        "__Host-tollgate_operator"
    } else {
        "tollgate_operator"
    }
}

fn is_secure(settings: &Settings) -> bool {
    settings
        .public_url
        .as_deref()
        .is_some_and(|url| url.starts_with("https://"))
}

fn is_valid_pass(pass: &str, admin_token: &str, now_ms: i64) -> bool {
    let Some((body, mac)) = pass.rsplit_once('.') else {
        return false;
    };
    let ends_at_ms = body.split_once('.').and_then(|(date, _)| date.parse::<i64>().ok());
    // An empty setting lets nobody in.
    !admin_token.is_empty()
        && equal_in_constant_time(mac, &pass_mac(body, admin_token))
        && ends_at_ms.is_some_and(|end| end > now_ms)
}

fn pass_mac(body: &str, admin_token: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(admin_token.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(b"tollgate portal operator\n");
    mac.update(body.as_bytes());
    hex(&mac.finalize().into_bytes())
}

fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let lines = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|line| line.to_str().ok());
    let mut pairs = lines
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(found, _)| *found == name).map(|(_, value)| value)
}

fn is_htmx(headers: &HeaderMap) -> bool {
    headers.contains_key("hx-request")
}

fn origin(parts: &Parts) -> Origin {
    parts.extensions.get::<Origin>().cloned().unwrap_or_default()
}

/// A working day.
const OPERATOR_LIFE_MS: i64 = 8 * 3_600_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_bound_to_the_token_and_ends() {
        let pass = |token: &str| {
            let body = "1000.op_x";
            format!("{body}.{}", pass_mac(body, token))
        };
        assert!(is_valid_pass(&pass("token"), "token", 999));
        assert!(!is_valid_pass(&pass("token"), "token", 1_000));
        assert!(!is_valid_pass(&pass("other"), "token", 999));
        assert!(!is_valid_pass(&pass(""), "", 999));
        assert!(!is_valid_pass(&pass("token").replace("1000", "9000"), "token", 999));
        assert!(!is_valid_pass("", "token", 0));
    }
}
