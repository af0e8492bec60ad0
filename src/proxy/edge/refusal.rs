//! A request that was refused, and its answer.

use std::fmt;

use super::super::guard::GuardError;
use super::super::strict::Ambiguity;

/// A request that was refused before Pingora saw it, or whose body was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EdgeRefusal {
    /// The status of the answer.
    pub status: u16,
    /// The code of section 2's table, or one beside it.
    pub code: &'static str,
    /// Why, for logs and metrics; its `Display` is the client's message.
    pub why: RefusedFor,
}

/// What a request was refused for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedFor {
    /// It can be read in more than one way, or not at all.
    Ambiguity(Ambiguity),
    /// The head, or the body, was not there in time.
    Slow,
}

impl fmt::Display for RefusedFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RefusedFor::Ambiguity(ambiguity) => ambiguity.fmt(f),
            RefusedFor::Slow => f.write_str("The request took too long to arrive."),
        }
    }
}

impl From<Ambiguity> for EdgeRefusal {
    fn from(ambiguity: Ambiguity) -> Self {
        let (status, code) = match ambiguity {
            Ambiguity::MethodRefused => (405, "METHOD_NOT_ALLOWED"),
            Ambiguity::Version => (505, "HTTP_VERSION_NOT_SUPPORTED"),
            Ambiguity::TargetTooLong => (414, "URI_TOO_LONG"),
            Ambiguity::HeadTooLarge | Ambiguity::TooManyFields => (431, "HEADERS_TOO_LARGE"),
            Ambiguity::Expectation => (417, "EXPECTATION_FAILED"),
            _ => (400, "AMBIGUOUS_REQUEST"),
        };
        EdgeRefusal {
            status,
            code,
            why: RefusedFor::Ambiguity(ambiguity),
        }
    }
}

impl EdgeRefusal {
    /// 408.
    pub const SLOW: EdgeRefusal = EdgeRefusal {
        status: 408,
        code: "REQUEST_TIMEOUT",
        why: RefusedFor::Slow,
    };
}

/// Renders the body of the answer to a refused request: the envelope of section 2, as `application/json`.
pub type RenderRefusal = fn(&EdgeRefusal, request_id: &str) -> String;

/// The refusal behind an error that Pingora reports for a request's body, for `fail_to_proxy`: the guard found the
/// body malformed (400) or too slow (408).
pub fn guard_refusal(error: &pingora::Error) -> Option<EdgeRefusal> {
    let io = error.root_cause().downcast_ref::<std::io::Error>()?;
    match io.get_ref()?.downcast_ref::<GuardError>()? {
        GuardError::Body(ambiguity) => Some((*ambiguity).into()),
        GuardError::BodyTooSlow => Some(EdgeRefusal::SLOW),
        _ => None,
    }
}

/// 128 random bits in hexadecimal, as every request id.
pub(super) fn request_id() -> String {
    let mut bytes = [0u8; 16];
    // Without randomness nothing here is at risk: the id only helps to find a log line.
    let _ = getrandom::fill(&mut bytes);
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(super) fn render_refusal(refusal: &EdgeRefusal, request_id: &str) -> String {
    format!(
        r#"{{"success":false,"error":{{"code":"{}","message":"{}","requestId":"{request_id}"}}}}"#,
        refusal.code, refusal.why
    )
}

/// The head of an HTTP/1 refusal.
pub(super) fn refusal_head(refusal: &EdgeRefusal, body_bytes: usize, request_id: &str) -> String {
    let reason = http::StatusCode::from_u16(refusal.status)
        .ok()
        .and_then(|status| status.canonical_reason());
    format!(
        "HTTP/1.1 {} {}\r\nContent-Type: application/json\r\nContent-Length: {body_bytes}\r\n\
         Cache-Control: no-store\r\nX-Request-Id: {request_id}\r\nConnection: close\r\n\r\n",
        refusal.status,
        reason.unwrap_or("Refused"),
    )
}
