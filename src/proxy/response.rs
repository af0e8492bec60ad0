//! Where a refusal becomes HTTP: the one place that knows which status, code, message and challenge each has.
//!
//! Two forms of the same answer: the envelope `{"success":false,"error":{…}}` as `application/json`, or RFC 9457
//! `application/problem+json` where the client's `Accept` prefers it.

use super::edge::EdgeRefusal;
use crate::gate::{Access, RateStatus, Reason, Refusal};
use bytes::{BufMut, Bytes};
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use pingora::http::ResponseHeader;
use std::borrow::Cow;
use std::fmt::Write as _;

/// `RateLimit` of draft-ietf-httpapi-ratelimit-headers-10.
pub const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
/// `RateLimit-Policy` of the same draft.
pub const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const LEGACY: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit"),
    HeaderName::from_static("x-ratelimit-remaining"),
    HeaderName::from_static("x-ratelimit-reset"),
];
/// The request's id, for the client's report and our log.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// How answers look.
#[derive(Clone, Debug)]
pub struct ResponseSettings {
    /// The realm in `WWW-Authenticate`.
    pub realm: String,
    /// Send `RateLimit-Policy` and `RateLimit`.
    pub rate_limit: bool,
    /// Send `X-RateLimit-Limit`, `-Remaining` and `-Reset` (delta seconds).
    pub legacy_rate_limit: bool,
}

impl Default for ResponseSettings {
    fn default() -> Self {
        ResponseSettings {
            realm: "tollgate".into(),
            rate_limit: true,
            legacy_rate_limit: false,
        }
    }
}

/// An answer that the gate gives itself, before it has a form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The stable code that programs act on.
    pub code: &'static str,
    /// What a person reads: what is wrong, and what would be right.
    pub message: Cow<'static, str>,
    /// The challenge of a 401, 403 or 400 about credentials, after `Bearer realm="…"`.
    pub challenge: Option<Cow<'static, str>>,
    /// Seconds to wait before the next try.
    pub retry_after_s: Option<u32>,
}

impl Answer {
    /// An answer without challenge and waiting time.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Answer {
            status,
            code,
            message: message.into(),
            challenge: None,
            retry_after_s: None,
        }
    }

    /// TRACE and CONNECT.
    pub fn method_not_allowed() -> Self {
        Answer::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "METHOD_NOT_ALLOWED",
            "TRACE and CONNECT are not allowed here.",
        )
    }

    /// A request that two readers could read differently.
    pub fn ambiguous(what: impl Into<Cow<'static, str>>) -> Self {
        Answer::new(StatusCode::BAD_REQUEST, "AMBIGUOUS_REQUEST", what)
    }

    /// The upstream refused the connection, broke it, or answered nonsense.
    pub fn bad_gateway() -> Self {
        Answer::new(
            StatusCode::BAD_GATEWAY,
            "BAD_GATEWAY",
            "The service behind the gate could not answer.",
        )
    }

    /// The upstream did not answer in time.
    pub fn upstream_timeout() -> Self {
        Answer::new(
            StatusCode::GATEWAY_TIMEOUT,
            "UPSTREAM_TIMEOUT",
            "The service behind the gate took too long.",
        )
    }

    /// The answer to a refusal.
    pub fn of(refusal: &Refusal) -> Self {
        let scope = match refusal.route.as_ref().map(|route| &route.access) {
            Some(Access::Keyed { scope: Some(scope), .. }) => &*scope.name,
            _ => "",
        };
        let unauthorized = |code, message: &'static str| {
            let mut answer = Answer::new(StatusCode::UNAUTHORIZED, code, message);
            answer.challenge = Some(r#", error="invalid_token""#.into());
            answer
        };
        let wait = |status, message: Cow<'static, str>, retry_after_s| {
            let mut answer = Answer::new(status, refusal.reason.code(), message);
            answer.retry_after_s = Some(retry_after_s);
            answer
        };
        let code = refusal.reason.code();
        match &refusal.reason {
            Reason::MissingKey => {
                let message = "An API key is required: send it as 'x-api-key: KEY' or 'Authorization: Bearer KEY'.";
                Answer {
                    challenge: Some("".into()),
                    ..unauthorized(code, message)
                }
            }
            Reason::MalformedKey | Reason::UnknownKey => unauthorized(code, "The API key is not valid."),
            Reason::RevokedKey => unauthorized(
                code,
                "The API key was revoked, or replaced and its grace period is over.",
            ),
            Reason::ExpiredKey => unauthorized(code, "The API key has expired."),
            Reason::DisabledKey => unauthorized(code, "The API key is disabled."),
            Reason::ConflictingCredentials => Answer {
                status: StatusCode::BAD_REQUEST,
                challenge: Some(r#", error="invalid_request""#.into()),
                ..unauthorized(
                    code,
                    "The request carries more than one credential: send one key, in one header, once.",
                )
            },
            Reason::InsufficientScope => Answer {
                status: StatusCode::FORBIDDEN,
                message: format!("The API key lacks the scope '{scope}'.").into(),
                challenge: Some(format!(r#", error="insufficient_scope", scope="{scope}""#).into()),
                ..unauthorized(code, "")
            },
            Reason::EnvironmentNotAllowed => {
                let environment = refusal.holder().map_or("", |holder| holder.environment());
                let message = format!("Keys of the environment '{environment}' are not allowed here.");
                Answer::new(StatusCode::FORBIDDEN, code, message)
            }
            Reason::RateLimited { retry_after_s } => wait(
                StatusCode::TOO_MANY_REQUESTS,
                format!("Rate limit exceeded. Retry after {retry_after_s} seconds.").into(),
                *retry_after_s,
            ),
            Reason::TooManyInFlight => wait(
                StatusCode::TOO_MANY_REQUESTS,
                "Too many requests of this key are under way.".into(),
                1,
            ),
            Reason::TooManyFailedAttempts { retry_after_s } => wait(
                StatusCode::TOO_MANY_REQUESTS,
                format!("Too many bad credentials from this address. Retry after {retry_after_s} seconds.").into(),
                *retry_after_s,
            ),
            Reason::NotReady => wait(StatusCode::SERVICE_UNAVAILABLE, "The gate has no keys yet.".into(), 1),
        }
    }

    /// The body, and its content type.
    pub fn body(&self, request_id: &str, problem: bool) -> (String, &'static str) {
        let mut body = String::with_capacity(192);
        let (status, code) = (self.status.as_u16(), self.code);
        // Writing to a String cannot fail.
        let _ = if problem {
            let title = self.status.canonical_reason().unwrap_or("Error");
            write!(
                body,
                r#"{{"type":"about:blank","title":"{title}","status":{status},"detail":"#
            )
            .and_then(|()| write_json_string(&mut body, &self.message))
            .and_then(|()| write!(body, r#","code":"{code}","requestId":"#))
            .and_then(|()| write_json_string(&mut body, request_id))
            .and_then(|()| body.write_char('}'))
        } else {
            write!(body, r#"{{"success":false,"error":{{"code":"{code}","message":"#)
                .and_then(|()| write_json_string(&mut body, &self.message))
                .and_then(|()| body.write_str(r#","requestId":"#))
                .and_then(|()| write_json_string(&mut body, request_id))
                .and_then(|()| body.write_str("}}"))
        };
        (
            body,
            if problem {
                "application/problem+json"
            } else {
                "application/json"
            },
        )
    }

    /// The head of the response.
    pub fn head(
        &self,
        settings: &ResponseSettings,
        content_type: &'static str,
        body_len: usize,
        request_id: &HeaderValue,
        rate: Option<RateStatus<'_>>,
    ) -> ResponseHeader {
        let (mut head, ()) = Response::new(()).into_parts();
        head.status = self.status;
        let fields = &mut head.headers;
        // Ours, and the two that Pingora adds.
        fields.reserve(10);
        fields.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        fields.insert(CONTENT_LENGTH, HeaderValue::from(body_len));
        fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        fields.insert(X_REQUEST_ID, request_id.clone());
        if let Some(challenge) = &self.challenge {
            let challenge = ["Bearer realm=\"", &settings.realm, "\"", challenge].concat();
            // The realm was checked with the configuration, and scopes are of characters that a challenge may have.
            let challenge = HeaderValue::from_maybe_shared(Bytes::from(challenge));
            fields.insert(
                WWW_AUTHENTICATE,
                challenge.unwrap_or(HeaderValue::from_static("Bearer")),
            );
        }
        if let Some(retry_after_s) = self.retry_after_s {
            fields.insert(RETRY_AFTER, HeaderValue::from(retry_after_s));
        }
        if let Some(rate) = rate {
            add_rate_limit(fields, settings, rate);
        }
        head.into()
    }
}

impl From<&EdgeRefusal> for Answer {
    fn from(refusal: &EdgeRefusal) -> Self {
        let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST);
        Answer::new(status, refusal.code, refusal.why.to_string())
    }
}

/// A field's value that tells of a limit.
#[derive(Clone, Copy, Debug)]
pub(super) enum RateLimitValue<'a> {
    /// A structured field item with two numbers, `"name";q=5000;w=3600`.
    Item(&'a str, [(&'static str, u32); 2]),
    Number(u32),
}

impl RateLimitValue<'_> {
    pub fn write_to(self, out: &mut impl BufMut) {
        let mut digits = itoa::Buffer::new();
        match self {
            RateLimitValue::Item(name, parameters) => {
                out.put_u8(b'"');
                out.put_slice(name.as_bytes());
                out.put_u8(b'"');
                for (parameter, number) in parameters {
                    out.put_u8(b';');
                    out.put_slice(parameter.as_bytes());
                    out.put_u8(b'=');
                    out.put_slice(digits.format(number).as_bytes());
                }
            }
            RateLimitValue::Number(number) => out.put_slice(digits.format(number).as_bytes()),
        }
    }
}

/// Tells what is left of the limit, field by field.
pub(super) fn rate_limit_fields<'a>(
    settings: &ResponseSettings,
    rate: RateStatus<'a>,
    mut put: impl FnMut(&HeaderName, RateLimitValue<'a>),
) {
    let (limit, window_s) = (rate.limit.permits(), rate.limit.window_s());
    if settings.rate_limit {
        let name = &*rate.tier.name;
        put(
            &RATE_LIMIT_POLICY,
            RateLimitValue::Item(name, [("q", limit), ("w", window_s)]),
        );
        put(
            &RATE_LIMIT,
            RateLimitValue::Item(name, [("r", rate.remaining), ("t", rate.reset_s)]),
        );
    }
    if settings.legacy_rate_limit {
        for (name, number) in LEGACY.iter().zip([limit, rate.remaining, rate.reset_s]) {
            put(name, RateLimitValue::Number(number));
        }
    }
}

/// Adds what is left of the limit.
pub(super) fn add_rate_limit(fields: &mut HeaderMap, settings: &ResponseSettings, rate: RateStatus<'_>) {
    rate_limit_fields(settings, rate, |name, value| {
        let mut text = Vec::with_capacity(64);
        value.write_to(&mut text);
        // A tier's name was checked to be a structured field string when the policy was compiled.
        let value = HeaderValue::from_maybe_shared(Bytes::from(text));
        fields.insert(name, value.unwrap_or(HeaderValue::from_static("")));
    });
}

/// Whether fields of this name are replaced by [`rate_limit_fields`].
pub(super) fn is_rate_limit(settings: &ResponseSettings, name: &[u8]) -> bool {
    let is = |ours: &HeaderName| name.eq_ignore_ascii_case(ours.as_str().as_bytes());
    (settings.rate_limit && (is(&RATE_LIMIT) || is(&RATE_LIMIT_POLICY)))
        || (settings.legacy_rate_limit && LEGACY.iter().any(is))
}

/// Whether the client prefers RFC 9457 over the envelope (RFC 9110 section 12.5.1): it names
/// `application/problem+json`, and gives it a higher weight than `application/json`, or does not name that.
pub fn prefers_problem(headers: &HeaderMap) -> bool {
    let (mut problem, mut json) = (None, None);
    for value in headers.get_all(ACCEPT) {
        for range in value.to_str().unwrap_or_default().split(',') {
            let mut parts = range.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let weight = parts
                .find_map(|parameter| parameter.strip_prefix("q="))
                .map_or(1.0, |q| q.parse().unwrap_or(0.0));
            if name.eq_ignore_ascii_case("application/problem+json") {
                problem = Some(weight);
            } else if name.eq_ignore_ascii_case("application/json") {
                json = Some(weight);
            }
        }
    }
    problem.is_some_and(|problem: f32| problem > json.unwrap_or(0.0))
}

fn write_json_string(out: &mut String, text: &str) -> std::fmt::Result {
    out.push('"');
    let mut rest = text;
    while let Some(at) = rest.find(|c| c == '"' || c == '\\' || c < ' ') {
        let (plain, special) = rest.split_at(at);
        out.push_str(plain);
        match special.as_bytes()[0] {
            quoted @ (b'"' | b'\\') => out.extend(['\\', char::from(quoted)]),
            control => write!(out, "\\u{control:04x}")?,
        }
        rest = &special[1..];
    }
    out.push_str(rest);
    out.push('"');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_json_whatever_the_message_holds() {
        let answer = Answer::ambiguous("a \"quoted\" \\ and \u{1}");
        for problem in [false, true] {
            let (body, content_type) = answer.body("id-1", problem);
            let value: serde_json::Value = serde_json::from_str(&body).unwrap();
            let (message, id) = if problem {
                (&value["detail"], &value["requestId"])
            } else {
                (&value["error"]["message"], &value["error"]["requestId"])
            };
            assert_eq!(message, "a \"quoted\" \\ and \u{1}");
            assert_eq!(id, "id-1");
            assert_eq!(content_type.ends_with("problem+json"), problem);
        }
    }

    #[test]
    fn problem_details_only_where_they_are_preferred() {
        let prefers = |accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_str(accept).unwrap());
            prefers_problem(&headers)
        };
        for accept in [
            "application/problem+json",
            "application/problem+json, */*",
            "application/json;q=0.5, application/problem+json",
            "text/html, Application/Problem+JSON;q=0.1",
        ] {
            assert!(prefers(accept), "{accept}");
        }
        for accept in [
            "*/*",
            "application/json",
            "application/json, application/problem+json",
            "application/problem+json;q=0.4, application/json;q=0.5",
            "application/problem+json;q=0",
        ] {
            assert!(!prefers(accept), "{accept}");
        }
    }
}
