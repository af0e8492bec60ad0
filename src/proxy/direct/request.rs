//! A plain request: taken from the edge, and how it looks upstream.

use super::super::client_address::is_claim;
use super::super::guard::Guard;
use super::super::steps::{X_API_KEY, hides_authorization};
use super::super::strict::{BodyFraming, HeadCheck, HeadFraming};
use super::super::telling::permit_of;
use super::super::{Context, Proxy};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONNECTION};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use pingora::http::RequestHeader;
use pingora::proxy::Session;
use pingora::{Error, ErrorType};
use tokio::io::AsyncReadExt as _;

/// A plain request ([`HeadFraming::is_plain`]), of whose body some has not come yet.
#[derive(Debug)]
pub(in crate::proxy) struct PlainRequest {
    pub(super) head: RequestHeader,
    /// The head as it came, and the body behind it as far as it came with it.
    message: Bytes,
    head_bytes: usize,
    body_bytes: usize,
}

impl PlainRequest {
    /// The request at the front of `message`, which `check` has just checked. `None` where it is not plain, or its target
    /// is one that the `http` library cannot keep byte for byte.
    pub fn new(message: Bytes, framing: &HeadFraming, check: &HeadCheck) -> Option<Self> {
        let BodyFraming::Length(body_bytes) = framing.body else {
            return None;
        };
        let parts = check.plain_head(&message)?;
        let mut head = Request::new(()).into_parts().0;
        head.method = Method::from_bytes(parts.method()).ok()?;
        head.uri = Uri::from_maybe_shared(message.slice_ref(parts.target())).ok()?;
        if head.uri.path_and_query()?.as_str().as_bytes() != parts.target() {
            return None;
        }
        head.headers = HeaderMap::with_capacity(parts.field_count());
        for (name, value) in parts.fields() {
            // Shares what was read.
            let value = HeaderValue::from_maybe_shared(message.slice_ref(value)).ok()?;
            head.headers.append(field_name(name)?, value);
        }
        Some(PlainRequest {
            head: RequestHeader::from(head),
            head_bytes: framing.head_bytes,
            body_bytes: usize::try_from(body_bytes).ok()?,
            message,
        })
    }

    /// The head as it came, and the body behind it as far as it came with it.
    pub fn message(&self) -> &Bytes {
        &self.message
    }

    /// Whether a body belongs to it.
    pub(super) fn has_body(&self) -> bool {
        self.body_bytes > 0
    }

    /// The head as it came.
    pub(super) fn head_bytes(&self) -> &[u8] {
        &self.message[..self.head_bytes]
    }

    /// All of the body.
    ///
    /// # Errors
    /// Where the client does not send it, or too slowly.
    pub(super) async fn body(&self, guard: &mut Guard) -> pingora::Result<Bytes> {
        let come = self.message.slice(self.head_bytes..);
        if come.len() >= self.body_bytes {
            return Ok(come);
        }
        let mut body = BytesMut::with_capacity(self.body_bytes);
        body.extend_from_slice(&come);
        while body.len() < self.body_bytes {
            // Ends by itself where the body does.
            match guard.read_buf(&mut body).await {
                Ok(1..) => {}
                Ok(0) => {
                    let why = "the client left in the middle of its request";
                    return Err(Error::explain(ErrorType::ConnectionClosed, why).into_down());
                }
                Err(error) => {
                    return Err(
                        Error::because(ErrorType::ReadError, "while reading a request's body", error).into_down(),
                    );
                }
            }
        }
        Ok(body.freeze())
    }
}

/// A field's name; the one that most requests have and HTTP does not know costs nothing either.
fn field_name(name: &[u8]) -> Option<HeaderName> {
    if name.eq_ignore_ascii_case(X_API_KEY.as_str().as_bytes()) {
        return Some(X_API_KEY);
    }
    HeaderName::from_bytes(name).ok()
}

impl Proxy {
    /// Writes a request as it goes upstream. Names are in lower case, as HAProxy and Envoy send them.
    ///
    /// # Errors
    /// `InternalError` without a permit.
    pub(super) fn write_request(
        &self,
        session: &Session,
        context: &mut Context,
        body: &[u8],
        out: &mut BytesMut,
    ) -> pingora::Result<()> {
        let (request, compiled) = (session.req_header(), self.0.compiled.load());
        out.clear();
        out.reserve(HEAD_ROOM + body.len());
        out.put_slice(request.method.as_str().as_bytes());
        out.put_u8(b' ');
        out.put_slice(request.raw_path());
        out.put_slice(b" HTTP/1.1\r\n");
        let mut line = |name: &HeaderName, value: &HeaderValue| {
            out.put_slice(name.as_str().as_bytes());
            out.put_slice(b": ");
            out.put_slice(value.as_bytes());
            out.put_slice(b"\r\n");
        };
        let hides_authorization = hides_authorization(&request.headers, permit_of(context)?, &self.0.gate);
        for (name, value) in &request.headers {
            let is_withheld = *name == CONNECTION
                || (hides_authorization && *name == AUTHORIZATION)
                || compiled.names.has(name)
                || is_claim(name);
            if !is_withheld {
                line(name, value);
            }
        }
        self.tell_upstream(session, context, &mut line)?;
        out.put_slice(b"\r\n");
        out.put_slice(body);
        Ok(())
    }
}

/// For the lines of a usual head.
const HEAD_ROOM: usize = 2048;

#[cfg(test)]
mod tests {
    use super::super::super::strict::{HeadLimits, PathRules};
    use super::*;

    fn plain(message: &[u8]) -> Option<PlainRequest> {
        let mut check = HeadCheck::new(HeadLimits {
            bytes: 32 * 1024,
            fields: 100,
            target_bytes: 8192,
            paths: PathRules::Relaxed,
        });
        let framing = check.resume(message).ok()??;
        PlainRequest::new(Bytes::copy_from_slice(message), &framing, &check)
    }

    #[test]
    fn a_request_is_what_was_sent() {
        let request = plain(b"PUT /a?b=%20 HTTP/1.1\r\nHost: h\r\nX-API-Key: k\r\nX-One: 1\r\nx-one: \xe9\r\nContent-Length: 4\r\n\r\nha");
        let request = request.unwrap();
        assert_eq!(
            (request.head.method.as_str(), request.head.raw_path()),
            ("PUT", &b"/a?b=%20"[..])
        );
        let fields: Vec<_> = request.head.headers.iter().collect();
        let fields: Vec<_> = fields.iter().map(|(n, v)| (n.as_str(), v.as_bytes())).collect();
        assert_eq!(
            fields,
            [
                ("host", &b"h"[..]),
                ("x-api-key", b"k"),
                ("x-one", b"1"),
                ("x-one", b"\xe9"),
                ("content-length", b"4")
            ]
        );
        assert!(request.has_body() && request.head_bytes().ends_with(b"\r\n\r\n"));
        assert!(request.message().ends_with(b"\r\n\r\nha"));
    }

    #[test]
    fn a_target_stays_as_it_is_or_goes_pingoras_way() {
        let mut kept = 0;
        for byte in 0..=u8::MAX {
            for target in [&[b'/', b'a', byte][..], &[b'/', byte, b'?', byte, b'b'], &[b'/', byte]] {
                let head = [b"GET ", target, b" HTTP/1.1\r\nHost: h\r\n\r\n"].concat();
                if let Some(request) = plain(&head) {
                    assert_eq!(request.head.raw_path(), target);
                    kept += 1;
                }
            }
        }
        assert!(kept > 150, "{kept}");
    }
}
