//! The fields of a head, edited as a plain map.
//!
//! Pingora keeps each field's name twice, once as it was spelled, and pays two allocations for every name of ours that
//! it is given. Here a head is taken apart, its fields are edited, and it is put together again without the
//! spelling: names then go on in lower case, but for those that HTTP itself defines. They mean the same (RFC 9110
//! section 5.1), HTTP/2 has no other way, and HAProxy and Envoy send them so too.

use http::{HeaderMap, Request, Response, request, response};
use pingora::Result;
use pingora::http::{RequestHeader, ResponseHeader};

/// Edits the fields of a request; its method, target and version stay as they are.
///
/// # Errors
/// Those of `edit`; and none in practice for a target that was parsed before.
pub(super) fn edit_request(head: &mut RequestHeader, edit: impl FnOnce(&mut HeaderMap) -> Result<()>) -> Result<()> {
    // A target that its `Uri` does not have byte for byte (an absolute one) has to be set again.
    let target = head.uri.path_and_query().map_or("", |target| target.as_str());
    let target = (head.raw_path() != target.as_bytes()).then(|| head.raw_path().to_vec());
    let ends_with_head = head.send_end_stream();
    let nothing = RequestHeader::from(Request::new(()).into_parts().0);
    let mut parts = request::Parts::from(std::mem::replace(head, nothing));
    let edited = edit(&mut parts.headers);
    *head = RequestHeader::from(parts);
    head.set_send_end_stream(ends_with_head.unwrap_or(true));
    if let Some(target) = target {
        head.set_raw_path(&target)?;
    }
    edited
}

/// Edits the fields of a response; its status, reason and version stay as they are.
///
/// # Errors
/// Those of `edit`.
pub(super) fn edit_response(head: &mut ResponseHeader, edit: impl FnOnce(&mut HeaderMap) -> Result<()>) -> Result<()> {
    let reason = head.get_reason_phrase();
    let reason = reason
        .filter(|_| reason != head.status.canonical_reason())
        .map(str::to_owned);
    let nothing = ResponseHeader::from(Response::new(()).into_parts().0);
    let mut parts = response::Parts::from(std::mem::replace(head, nothing));
    let edited = edit(&mut parts.headers);
    *head = ResponseHeader::from(parts);
    if reason.is_some() {
        head.set_reason_phrase(reason.as_deref())?;
    }
    edited
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderValue, Version};

    #[test]
    fn a_request_keeps_all_but_the_spelling_of_names() {
        for target in ["/a?b=c", "http://host/a?b=c", "*"] {
            let mut head = RequestHeader::build("OPTIONS", target.as_bytes(), None).unwrap();
            head.set_version(Version::HTTP_11);
            head.append_header("X-One", "1").unwrap();
            head.append_header("X-One", "2").unwrap();
            edit_request(&mut head, |fields| {
                fields.insert("x-two", HeaderValue::from_static("3"));
                Ok(())
            })
            .unwrap();
            let mut wire = Vec::new();
            head.header_to_h1_wire(&mut wire);
            assert_eq!(wire, b"x-one: 1\r\nx-one: 2\r\nx-two: 3\r\n");
            assert_eq!(head.raw_path(), target.as_bytes());
            assert_eq!((head.method.as_str(), head.version), ("OPTIONS", Version::HTTP_11));
        }
    }

    #[test]
    fn a_response_keeps_its_reason() {
        for reason in [Some("All fine"), None] {
            let mut head = ResponseHeader::build(200, None).unwrap();
            head.set_reason_phrase(reason.or(Some("OK"))).unwrap();
            head.append_header("Content-Type", "text/plain").unwrap();
            edit_response(&mut head, |fields| {
                fields.remove("x-none");
                Ok(())
            })
            .unwrap();
            assert_eq!(head.get_reason_phrase(), reason.or(Some("OK")));
            let mut wire = Vec::new();
            head.header_to_h1_wire(&mut wire);
            assert_eq!(wire, b"Content-Type: text/plain\r\n");
        }
    }
}
