//! Who asks: a session's cookie, an access token, the operator's token, a gate's token.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};

use super::App;
use super::error::ApiError;
use crate::control::model::{Actor, Caller, Member, Origin, Session, User};
use crate::control::secret::equal_in_constant_time;
use crate::control::service::sessions::SESSION_LIFE_MS;
use crate::control::settings::Settings;

/// Anybody.
pub struct Visitor(pub Caller);

impl FromRequestParts<App> for Visitor {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _app: &App) -> Result<Self, ApiError> {
        Ok(Self(Caller {
            actor: Actor::Visitor,
            origin: origin(parts),
        }))
    }
}

/// Somebody who acts for an organisation: a session or an access token. Both at once are refused: which of two
/// credentials a request means is not for us to guess.
pub struct Tenant {
    pub caller: Caller,
    pub organization: String,
}

impl FromRequestParts<App> for Tenant {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let member = match bearer(&parts.headers)? {
            Some(_) if session_cookie(&parts.headers, &app.settings).is_some() => None,
            Some(token) => app.token_member(token).await?,
            None => session(parts, app).await?.map(|(member, _, _)| member),
        };
        let Member {
            organization_id, actor, ..
        } = member.ok_or(ApiError::Unauthenticated)?;
        Ok(Self {
            caller: Caller {
                actor,
                origin: origin(parts),
            },
            organization: organization_id,
        })
    }
}

/// A person with a session.
pub struct Person {
    pub caller: Caller,
    pub user: User,
    pub session: Session,
}

impl FromRequestParts<App> for Person {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        if let Some(token) = bearer(&parts.headers)? {
            let known = app.token_member(token).await?.is_some();
            return Err(if known {
                ApiError::SessionRequired
            } else {
                ApiError::Unauthenticated
            });
        }
        let (member, session, user) = session(parts, app).await?.ok_or(ApiError::Unauthenticated)?;
        Ok(Self {
            caller: Caller {
                actor: member.actor,
                origin: origin(parts),
            },
            user,
            session,
        })
    }
}

/// The operator.
pub struct Operator(pub Caller);

impl FromRequestParts<App> for Operator {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        require_token(&parts.headers, &app.settings.admin_token)?;
        Ok(Self(Caller {
            actor: Actor::Operator,
            origin: origin(parts),
        }))
    }
}

/// A gate, and the name it gives itself.
pub struct Gate {
    pub name: Option<String>,
}

impl FromRequestParts<App> for Gate {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        require_token(&parts.headers, &app.settings.feed_token)?;
        let name = parts
            .headers
            .get("x-tollgate-gate")
            .and_then(|value| value.to_str().ok());
        Ok(Self {
            name: name.filter(|name| is_gate_name(name)).map(str::to_owned),
        })
    }
}

/// Whether a gate may have this name: 1 to 64 visible ASCII characters.
pub fn is_gate_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic())
}

/// The secret of the session that a browser brought along.
pub fn session_cookie<'a>(headers: &'a HeaderMap, settings: &Settings) -> Option<&'a str> {
    let name = cookie_name(settings);
    let lines = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|line| line.to_str().ok());
    let mut pairs = lines
        .flat_map(|line| line.split(';'))
        .filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(found, _)| *found == name).map(|(_, value)| value)
}

/// Gives the browser its session. `Lax` and not `Strict`, so that a link from an e-mail arrives signed in; what
/// changes anything is guarded by the check for other sites anyway.
pub fn set_cookie(secret: &str, settings: &Settings) -> Option<HeaderValue> {
    cookie(secret, SESSION_LIFE_MS / 1_000, settings)
}

/// Takes the session away from the browser.
pub fn clear_cookie(settings: &Settings) -> Option<HeaderValue> {
    cookie("", 0, settings)
}

/// The cookie's name. The prefix makes browsers insist on `Secure`, on the whole host and on no other host setting it.
pub fn cookie_name(settings: &Settings) -> &'static str {
    if is_secure(settings) {
        "__Host-tollgate_session"
    } else {
        "tollgate_session"
    }
}

fn cookie(value: &str, max_age_s: i64, settings: &Settings) -> Option<HeaderValue> {
    let name = cookie_name(settings);
    let secure = if is_secure(settings) { "; Secure" } else { "" };
    let text = format!("{name}={value}; Path=/; HttpOnly; SameSite=Lax; Max-Age={max_age_s}{secure}");
    // Base62 and digits: always a valid header value.
    HeaderValue::from_str(&text).ok()
}

fn is_secure(settings: &Settings) -> bool {
    settings
        .public_url
        .as_deref()
        .is_some_and(|url| url.starts_with("https://"))
}

async fn session(parts: &Parts, app: &App) -> Result<Option<(Member, Session, User)>, ApiError> {
    match session_cookie(&parts.headers, &app.settings) {
        Some(secret) => Ok(app.session_member(secret).await?),
        None => Ok(None),
    }
}

fn require_token(headers: &HeaderMap, expected: &str) -> Result<(), ApiError> {
    let presented = bearer(headers)?.ok_or(ApiError::Unauthenticated)?;
    // An empty setting lets nobody in.
    let fits = equal_in_constant_time(presented, expected) && !expected.is_empty();
    if fits { Ok(()) } else { Err(ApiError::Unauthenticated) }
}

/// The token of `Authorization: Bearer`, if there is that header at all. Another scheme, or the header twice, is refused.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let mut lines = headers.get_all(header::AUTHORIZATION).iter();
    let Some(line) = lines.next() else { return Ok(None) };
    let text = line.to_str().map_err(|_| ApiError::Unauthenticated)?;
    let (scheme, token) = text.split_once(' ').ok_or(ApiError::Unauthenticated)?;
    let token = token.trim();
    if lines.next().is_some() || !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() || token.len() > 512 {
        return Err(ApiError::Unauthenticated);
    }
    Ok(Some(token))
}

fn origin(parts: &Parts) -> Origin {
    parts.extensions.get::<Origin>().cloned().unwrap_or_default()
}
