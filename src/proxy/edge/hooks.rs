//! What a `ProxyHttp` behind an edge must still do.

use bytes::{Buf, Bytes};
use http::{HeaderName, header};
use pingora::http::RequestHeader;

use super::super::client_address::is_claim;
use super::super::strict::{HeadLimits, check_request};
use super::EdgeRefusal;

/// Checks a request that came over HTTP/2, for a proxy that runs without an edge; an edge has done it before.
///
/// # Errors
/// The refusal to answer with.
pub fn check_http2(request: &RequestHeader, limits: HeadLimits) -> Result<(), EdgeRefusal> {
    check_request(&request.method, &request.uri, &request.headers, limits).map_err(EdgeRefusal::from)
}

/// To be called in `request_body_filter`. Pingora 0.9.1 would send the last chunk twice to an HTTP/1 upstream when a
/// body's end comes in an empty piece, as with an empty DATA frame: the second one would be read as the start of a
/// response to nobody, on a pooled connection.
pub fn end_body_once(body: &mut Option<Bytes>, end_of_stream: bool) {
    if end_of_stream && body.as_ref().is_some_and(|bytes| !bytes.has_remaining()) {
        *body = None;
    }
}

/// To be called in `early_request_filter`, once the rule is known at the latest in `request_filter`: leaves an
/// `Upgrade` only where the rule allows it and it is a WebSocket handshake (RFC 6455 section 4.1: GET, HTTP/1.1, no
/// body, named by `Connection`). Pingora itself takes any `Upgrade` field for an upgrade. Returns whether one is left.
pub fn filter_upgrade(request: &mut RequestHeader, is_allowed: bool) -> bool {
    if !request.headers.contains_key(header::UPGRADE) {
        request.remove_header(&HTTP2_SETTINGS);
        return false;
    }
    let mut upgrades = request.headers.get_all(header::UPGRADE).iter();
    let is_websocket = upgrades
        .next()
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
        && upgrades.next().is_none();
    let is_named = request.headers.get_all(header::CONNECTION).iter().any(|value| {
        value
            .as_bytes()
            .split(|b| *b == b',')
            .any(|option| option.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
    });
    let has_body = request.headers.contains_key(header::TRANSFER_ENCODING)
        || request
            .headers
            .get(header::CONTENT_LENGTH)
            .is_some_and(|length| length.as_bytes() != b"0");
    let is_kept = is_allowed
        && is_websocket
        && is_named
        && !has_body
        && request.method == http::Method::GET
        && request.version == http::Version::HTTP_11;
    if !is_kept {
        request.remove_header(&header::UPGRADE);
    }
    request.remove_header(&HTTP2_SETTINGS);
    is_kept
}

/// Removes every field in which a client could claim an address, host, path or method that is not its request's
/// own. What is true is set again afterwards, from [`super::client_address::forwarded_fields`] (which must be asked
/// before).
pub fn remove_claims(request: &mut RequestHeader) {
    // One pass over the few fields there are; most requests have no claim among them.
    while let Some(claim) = request.headers.keys().find(|name| is_claim(name)).cloned() {
        request.remove_header(&claim);
    }
}

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
