//! The gate's steps on a Pingora session, shared by [`Proxy`](super::Proxy) and [`GateProxy`](super::GateProxy): ask,
//! refuse, and tell the upstream whose request it is.

use super::request_id::RequestIds;
use super::response::{self, Answer, ResponseSettings};
use super::strict::{Ambiguity, without_parameters};
use super::{BadHeaderPrefix, DRAIN_DEADLINE, DRAINED_BYTES};
use crate::clock::Now;
use crate::gate::{Access, Gate, Permit, RateStatus, Refusal, RequestHead};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, EXPECT, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use pingora::http::RequestHeader;
use pingora::proxy::Session;
use pingora::{ErrorType, OrErr};
use std::net::IpAddr;

/// Our namespace, and the names in it that tell an upstream whose request it is.
#[derive(Debug)]
pub(super) struct OurHeaders {
    namespace: String,
    key_id: HeaderName,
    organization: HeaderName,
    environment: HeaderName,
    scopes: HeaderName,
    tier: HeaderName,
}

impl OurHeaders {
    /// The names that begin with `prefix`.
    pub fn new(prefix: &str) -> Result<Self, BadHeaderPrefix> {
        let name = |suffix: &str| {
            HeaderName::try_from(format!("{prefix}{suffix}")).map_err(|_| BadHeaderPrefix(prefix.to_owned()))
        };
        Ok(OurHeaders {
            namespace: prefix.to_ascii_lowercase(),
            key_id: name("key-id")?,
            organization: name("organization-id")?,
            environment: name("environment")?,
            scopes: name("scopes")?,
            tier: name("tier")?,
        })
    }

    /// Whether a name is for us alone: a credential's, one in our namespace in any spelling, a method override's.
    pub fn has(&self, name: &HeaderName) -> bool {
        is_ours(name.as_str(), &self.namespace)
    }

    /// Takes off what must not travel: the credential, and what is [ours](OurHeaders::has).
    pub fn strip(&self, fields: &mut HeaderMap, permit: &Permit, gate: &Gate) {
        // Most requests carry their key here and nothing else that has to go.
        fields.remove(&X_API_KEY);
        if hides_authorization(fields, permit, gate) {
            fields.remove(AUTHORIZATION);
        }
        while let Some(other) = fields.keys().find(|name| self.has(name)) {
            let other = other.clone();
            fields.remove(other);
        }
    }

    /// Says whose request it is.
    pub fn tell(&self, permit: &Permit, put: &mut impl FnMut(&HeaderName, &HeaderValue)) -> pingora::Result<()> {
        if let Some(holder) = permit.holder() {
            let key_id = HeaderValue::from_str(holder.key_id())
                .or_err(ErrorType::InternalError, "a key's id that cannot stand in a header")?;
            put(&self.key_id, &key_id);
            put(&self.organization, holder.headers().organization);
            put(&self.environment, holder.headers().environment);
            put(&self.scopes, holder.headers().scopes);
        }
        if let Access::Keyed { tier, .. } = &permit.route().access {
            put(&self.tier, &tier.header);
        }
        Ok(())
    }
}

/// Whether a request's `Authorization` must not travel: the key came in it, or a public rule's request carries one of
/// ours nevertheless.
pub(super) fn hides_authorization(fields: &HeaderMap, permit: &Permit, gate: &Gate) -> bool {
    permit.credential_in_authorization()
        || fields
            .get_all(AUTHORIZATION)
            .iter()
            .any(|value| gate.is_bearer_key(value.as_bytes()))
}

/// Whether the request falls under one rule, also to servers that cut path parameters off (`/a;b` is `/a` to them).
pub(super) fn check_parameters(gate: &Gate, request: &RequestHeader) -> Result<(), Ambiguity> {
    let path = request.uri.path();
    let Some(readings) = without_parameters(path) else {
        return Ok(());
    };
    let host = host_of(request);
    let is_same = |reading: &String| gate.is_same_rule(host, &request.method, path, reading);
    if readings.iter().all(is_same) {
        Ok(())
    } else {
        Err(Ambiguity::PathSemicolon)
    }
}

pub(super) const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Asks the gate about the request of a session.
pub(super) fn check(gate: &Gate, session: &Session, client: IpAddr, now: Now) -> Result<Permit, Refusal> {
    let request = session.req_header();
    let head = RequestHead {
        method: &request.method,
        host: host_of(request),
        path: request.uri.path(),
        headers: &request.headers,
        client,
    };
    gate.check(&head, now)
}

/// Answers a refused request; the connection stays usable. The request's id is the client's if it sent a
/// well-formed one.
///
/// For services that call [`Gate::check`] themselves, in `request_filter`, which then returns `Ok(true)`.
///
/// # Errors
/// Where the client cannot be written to.
pub async fn refuse(session: &mut Session, refusal: &Refusal, settings: &ResponseSettings) -> pingora::Result<()> {
    static IDS: std::sync::OnceLock<RequestIds> = std::sync::OnceLock::new();
    let request_id = IDS.get_or_init(RequestIds::default).of(&session.req_header().headers);
    refuse_as(session, refusal, settings, &request_id).await
}

/// [`refuse`] under an id that was chosen already.
pub(super) async fn refuse_as(
    session: &mut Session,
    refusal: &Refusal,
    settings: &ResponseSettings,
    request_id: &HeaderValue,
) -> pingora::Result<()> {
    let rate = refusal.rate();
    read_on(session);
    answer(session, &Answer::of(refusal), rate, settings, request_id).await
}

/// Keeps the connection for further requests where the rest of the body is soon read. Otherwise Pingora announces its
/// end, so that a client need not send what nobody wants.
pub(super) fn read_on(session: &mut Session) {
    session.set_total_drain_timeout(Some(DRAIN_DEADLINE));
    let fields = &session.req_header().headers;
    let length = fields
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    // Who waits for a `100 Continue` may send the body after all, or not: what comes next could be either.
    let is_soon_read = length <= Some(DRAINED_BYTES) && !fields.contains_key(EXPECT);
    session.set_close_on_response_before_downstream_finish(!is_soon_read);
}

/// Writes an answer of our own, whole.
pub(super) async fn answer(
    session: &mut Session,
    answer: &Answer,
    rate: Option<RateStatus<'_>>,
    settings: &ResponseSettings,
    request_id: &HeaderValue,
) -> pingora::Result<()> {
    let request = session.req_header();
    let problem = response::prefers_problem(&request.headers);
    let head_only = request.method == Method::HEAD;
    let (body, content_type) = answer.body(request_id.to_str().unwrap_or_default(), problem);
    let head = answer.head(settings, content_type, body.len(), request_id, rate);
    session.write_response_header(Box::new(head), head_only).await?;
    if !head_only {
        session.write_response_body(Some(Bytes::from(body)), true).await?;
    }
    Ok(())
}

/// The host that a request asks for: the authority of an HTTP/2 request or an absolute target, else `Host`.
pub(super) fn host_of(request: &RequestHeader) -> &str {
    match request.uri.authority() {
        Some(authority) => authority.as_str(),
        None => request
            .headers
            .get(HOST)
            .and_then(|host| host.to_str().ok())
            .unwrap_or_default(),
    }
}

/// Whether a name is one that only we may set, or that could be read as one: servers that hand headers on as
/// variables (CGI, WSGI, Rack) make no difference between `-` and `_`.
fn is_ours(name: &str, namespace: &str) -> bool {
    const NAMES: [&str; 6] = [
        "x-api-key",
        "x-http-method-override",
        "x-http-method",
        "x-method-override",
        // Set afresh.
        "x-request-id",
        "x-original-url",
    ];
    let same = |ours: &str, theirs: &[u8]| {
        ours.len() == theirs.len()
            && ours
                .bytes()
                .zip(theirs)
                .all(|(a, b)| a == *b || (a == b'-' && *b == b'_'))
    };
    let starts_with = |prefix: &str| name.len() > prefix.len() && same(prefix, &name.as_bytes()[..prefix.len()]);
    starts_with(namespace) || starts_with("x-tollgate-") || NAMES.iter().any(|ours| same(ours, name.as_bytes()))
}
