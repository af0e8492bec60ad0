//! Which requests go the direct way, and how they look on it.

use super::super::client_address::is_claim;
use super::super::phases::permit_of;
use super::super::steps::hides_authorization;
use super::super::{Context, Proxy};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONNECTION};
use http::{HeaderName, HeaderValue, Method, Version};
use pingora::Error;
use pingora::http::RequestHeader;
use pingora::proxy::Session;

/// Whether a request may go the direct way: HTTP/1.1, at most a short body, and nothing that concerns the connection but
/// whether it is kept. Not HEAD: no answer to it has the length that its head says.
pub(in crate::proxy) fn may_go_directly(request: &RequestHeader) -> bool {
    request.version == Version::HTTP_11
        && request.method != Method::HEAD
        && request.uri.authority().is_none()
        && request.headers.iter().all(|(name, value)| match name.as_str() {
            "connection" => {
                let value = value.as_bytes();
                value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close")
            }
            "content-length" => value
                .to_str()
                .is_ok_and(|length| length.parse().is_ok_and(|length: u64| length <= MOST_BODY)),
            "expect"
            | "http2-settings"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade" => false,
            _ => true,
        })
}

/// All of a request's body.
///
/// # Errors
/// Where the client does not send it, or too slowly.
pub(super) async fn read_body(session: &mut Session) -> pingora::Result<Bytes> {
    let mut body = BytesMut::new();
    while let Some(piece) = session.read_request_body().await.map_err(Error::into_down)? {
        body.extend_from_slice(&piece);
    }
    Ok(body.freeze())
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
        self.tell_upstream(session, context, |name, value| line(name, &value))?;
        out.put_slice(b"\r\n");
        out.put_slice(body);
        Ok(())
    }
}

/// What is sent and retried in one piece, in bytes.
const MOST_BODY: u64 = 16 * 1024;
/// For the lines of a usual head.
const HEAD_ROOM: usize = 2048;
