//! A plain request as Pingora's phases see it: a session in memory.

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::{Digest, Stream as ClientStream};
use pingora::proxy::Session;
use pingora::{Error, ErrorType, Result};
use std::io::Cursor;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A session that has nothing but a request's head and its connection's digest. What is answered is kept, to be sent
/// by whoever has the connection.
pub(super) struct SessionInMemory {
    session: Box<Session>,
    digest: Arc<Digest>,
    answered: Body,
}

/// The body that was answered. Shared, as Pingora's session gives nothing back of what it holds.
type Body = Arc<Mutex<Vec<u8>>>;

impl SessionInMemory {
    /// A session on the connection with this digest, without a request.
    pub fn new(digest: Digest) -> Self {
        // The only way to a session of one's own is through a stream, which is not read.
        let unread: ClientStream = Box::new(Cursor::new(Vec::new()));
        SessionInMemory {
            session: Box::new(Session::new_h1(unread)),
            digest: Arc::new(digest),
            answered: Body::default(),
        }
    }

    /// Pingora's session.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Takes up a request. Nothing is left of the one before.
    pub fn begin(&mut self, request: RequestHeader) {
        lock(&self.answered).clear();
        *self.session.downstream_session = ServerSession::new_custom(Box::new(Plain {
            request,
            digest: self.digest.clone(),
            answer: None,
            body: self.answered.clone(),
        }));
    }

    /// Forgets it. At rest a connection does not hold what its last request needed.
    pub fn end(&mut self) {
        *self.session.req_header_mut() = nothing();
    }

    /// What was answered, if anything was.
    pub fn answer(&self) -> Option<(&ResponseHeader, Vec<u8>)> {
        let body = std::mem::take(&mut *lock(&self.answered));
        Some((self.session.response_written()?, body))
    }
}

/// No request at all.
pub(super) fn nothing() -> RequestHeader {
    RequestHeader::from(http::Request::new(()).into_parts().0)
}

struct Plain {
    request: RequestHeader,
    digest: Arc<Digest>,
    answer: Option<Box<ResponseHeader>>,
    body: Body,
}

fn lock(body: &Body) -> std::sync::MutexGuard<'_, Vec<u8>> {
    // Nobody panics with it.
    body.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Read by nobody: who serves a plain request reads its body from the connection, and sets no times here.
#[async_trait]
impl CustomSession for Plain {
    fn req_header(&self) -> &RequestHeader {
        &self.request
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    async fn write_response_header(&mut self, head: Box<ResponseHeader>, _end: bool) -> Result<()> {
        self.answer = Some(head);
        Ok(())
    }

    async fn write_response_header_ref(&mut self, head: &ResponseHeader, end: bool) -> Result<()> {
        self.write_response_header(Box::new(head.clone()), end).await
    }

    async fn write_body(&mut self, data: Bytes, _end: bool) -> Result<()> {
        lock(&self.body).extend_from_slice(&data);
        Ok(())
    }

    async fn write_trailers(&mut self, _trailers: HeaderMap) -> Result<()> {
        Ok(())
    }

    async fn response_duplex_vec(&mut self, _tasks: Vec<HttpTask>) -> Result<bool> {
        Error::e_explain(ErrorType::InternalError, "only whole answers are kept in memory")
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.answer.as_deref()
    }

    fn body_bytes_sent(&self) -> usize {
        lock(&self.body).len()
    }

    fn digest(&self) -> Option<&Digest> {
        Some(&self.digest)
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        Arc::get_mut(&mut self.digest)
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.digest.socket_digest.as_ref()?.peer_addr()
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.digest.socket_digest.as_ref()?.local_addr()
    }

    fn request_summary(&self) -> String {
        format!("{} {}", self.request.method, self.request.uri.path())
    }

    async fn shutdown(&mut self, _code: u32, _context: &str) {}

    async fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        Ok(None)
    }

    async fn read_body_or_idle(&mut self, _no_body_expected: bool) -> Result<Option<Bytes>> {
        Ok(None)
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        Ok(())
    }

    fn is_body_done(&mut self) -> bool {
        true
    }

    fn is_body_empty(&mut self) -> bool {
        true
    }

    fn body_bytes_read(&self) -> usize {
        0
    }

    fn enable_retry_buffering(&mut self) {}

    fn retry_buffer_truncated(&self) -> bool {
        false
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        None
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        Bytes::new()
    }

    fn set_read_timeout(&mut self, _timeout: Option<Duration>) {}

    fn get_read_timeout(&self) -> Option<Duration> {
        None
    }

    fn set_write_timeout(&mut self, _timeout: Option<Duration>) {}

    fn get_write_timeout(&self) -> Option<Duration> {
        None
    }

    fn set_total_drain_timeout(&mut self, _timeout: Option<Duration>) {}

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        None
    }

    fn take_custom_message_reader(
        &mut self,
    ) -> Option<Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>> {
        None
    }

    fn restore_custom_message_reader(
        &mut self,
        _reader: Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>,
    ) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(&mut self, _writer: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }
}
