//! A request that came over HTTP/2.

use http::header::{CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Uri};

use super::bytes::{has_control, is_space};
use super::fields::{check_host, check_method, content_length, is_disguised_framing};
use super::{Ambiguity, HeadLimits, check_target};

/// Checks a request that came over HTTP/2, whose framing its own parser has already checked.
///
/// # Errors
/// The same reasons as for HTTP/1, so that neither protocol is a way around the other.
pub fn check_request(method: &Method, uri: &Uri, headers: &HeaderMap, limits: HeadLimits) -> Result<(), Ambiguity> {
    check_method(method.as_str().as_bytes())?;
    let target = uri.path_and_query().map_or("", |target| target.as_str()).as_bytes();
    if target.len() > limits.target_bytes {
        return Err(Ambiguity::TargetTooLong);
    }
    match target.first() {
        Some(b'/') => check_target(target, limits.paths)?,
        Some(b'*') if target == b"*" && method == Method::OPTIONS => {}
        _ => return Err(Ambiguity::TargetForm),
    }
    if headers.len() > limits.fields {
        return Err(Ambiguity::TooManyFields);
    }
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Ambiguity::HostRepeated);
    }
    match (uri.authority(), host) {
        (None, None) => return Err(Ambiguity::HostMissing),
        (Some(authority), None) => check_host(authority.as_str().as_bytes())?,
        (None, Some(host)) => check_host(host.as_bytes())?,
        (Some(authority), Some(host)) => {
            check_host(host.as_bytes())?;
            if !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) {
                return Err(Ambiguity::HostAuthority);
            }
        }
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        return Err(Ambiguity::EncodingVersion);
    }
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        content_length(length.as_bytes())?;
    }
    if lengths.next().is_some() {
        return Err(Ambiguity::LengthRepeated);
    }
    if headers
        .get(EXPECT)
        .is_some_and(|expect| !expect.as_bytes().eq_ignore_ascii_case(b"100-continue"))
    {
        return Err(Ambiguity::Expectation);
    }
    for (name, value) in headers {
        let name = name.as_str().as_bytes();
        if name.contains(&b'_') && is_disguised_framing(name) {
            return Err(Ambiguity::FieldDisguised);
        }
        let value = value.as_bytes();
        if has_control(value) {
            return Err(Ambiguity::ControlByte);
        }
        // RFC 9113 section 8.2.1. Forwarded over HTTP/1.1 it would change its meaning.
        if value.first().is_some_and(|b| is_space(*b)) || value.last().is_some_and(|b| is_space(*b)) {
            return Err(Ambiguity::FieldPadded);
        }
    }
    Ok(())
}
