//! Pingora's phases, turned into the gate's steps.

use super::at_once::{Filter, answered, done, filtered};
use super::upstream::{self, Attempts};
use super::{Context, PASSED, Proxy, UnderWay, edge};
use async_trait::async_trait;
use bytes::Bytes;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::protocols::Digest;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType};
use std::any::Any;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[async_trait]
impl ProxyHttp for Proxy {
    // Boxed: Pingora moves it some times for each request, and has room for it in several places of its future.
    type CTX = Box<Context>;

    fn new_ctx(&self) -> Box<Context> {
        Box::new(Context {
            now: self.0.clock.now(),
            peer: None,
            client: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            request_id: None,
            permit: None,
            refusal: None,
            decision: PASSED,
            upstream_started: None,
            upstream_answered: None,
            upstream_ended: None,
            attempts: Attempts::default(),
            passed_on: None,
            _under_way: UnderWay::new(&self.0.in_flight),
        })
    }

    /// A request of which a part was done already.
    fn on_connection_reuse(&self, _session: &mut Session, context: &mut Self::CTX, begun: Box<dyn Any + Send + Sync>) {
        if let Ok(begun) = begun.downcast() {
            *context = *begun;
        }
    }

    /// None: the compression module that Pingora adds by default costs allocations and changes nothing here.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    fn early_request_filter<'p, 's, 'c, 'f>(
        &'p self,
        _session: &'s mut Session,
        _context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<()>>
    where
        'p: 'f,
        's: 'f,
        'c: 'f,
    {
        filtered(Ok(()))
    }

    fn request_filter<'p, 's, 'c, 'f>(
        &'p self,
        session: &'s mut Session,
        context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<bool>>
    where
        'p: 'f,
        's: 'f,
        'c: 'f,
    {
        if context.permit.is_some() || context.passed_on.is_some() {
            // Decided already, before it turned out that the request needs Pingora's way.
            return answered::<false>();
        }
        let Some(limits) = self.0.shared.get() else {
            return match self.decide(session, context) {
                Ok(()) => answered::<false>(),
                // Answered: Pingora goes no further.
                Err(answer) => Box::pin(async move { self.answer(session, context, &answer).await.map(|()| true) }),
            };
        };
        Box::pin(async move {
            match self.decide_with_others(limits.as_ref(), session, context).await {
                Ok(()) => Ok(false),
                Err(answer) => self.answer(session, context, &answer).await.map(|()| true),
            }
        })
    }

    fn proxy_upstream_filter<'p, 's, 'c, 'f>(
        &'p self,
        _session: &'s mut Session,
        _context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<bool>>
    where
        'p: 'f,
        's: 'f,
        'c: 'f,
    {
        answered::<true>()
    }

    async fn upstream_peer(&self, _session: &mut Session, context: &mut Self::CTX) -> pingora::Result<Box<HttpPeer>> {
        // Further tries are part of what the upstream took.
        context.upstream_started.get_or_insert_with(|| self.0.clock.now());
        if let Some(successor) = &context.passed_on {
            return Ok(successor.clone());
        }
        let name = context.permit.as_ref().map_or("", |permit| permit.upstream());
        let next = self.0.compiled.load().upstreams.next(name, &mut context.attempts);
        let mut peer =
            next.ok_or_else(|| Error::explain(ErrorType::InternalError, format!("no upstream is called {name:?}")))?;
        let in_flight = self.0.in_flight.load(Ordering::Relaxed);
        peer.options.tcp_recv_buf = Some(upstream::receive_buffer(in_flight));
        Ok(peer)
    }

    fn connected_to_upstream<'p, 's, 'u, 'd, 'c, 'f>(
        &'p self,
        _session: &'s mut Session,
        _reused: bool,
        _peer: &'u HttpPeer,
        _fd: RawFd,
        _digest: Option<&'d Digest>,
        _context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<()>>
    where
        'p: 'f,
        's: 'f,
        'u: 'f,
        'd: 'f,
        'c: 'f,
    {
        filtered(Ok(()))
    }

    fn upstream_request_filter<'p, 's, 'r, 'c, 'f>(
        &'p self,
        session: &'s mut Session,
        request: &'r mut RequestHeader,
        context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<()>>
    where
        'p: 'f,
        's: 'f,
        'r: 'f,
        'c: 'f,
    {
        filtered(self.make_ready(session, request, context))
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        context: &mut Self::CTX,
        mut error: Box<Error>,
    ) -> Box<Error> {
        error.set_retry(self.may_try_again_after_no_connection(context));
        error
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        context: &mut Self::CTX,
        reused: bool,
    ) -> Box<Error> {
        let body_is_kept = !session.as_ref().retry_buffer_truncated();
        let method = &session.req_header().method;
        let again = context.attempts.again_after(&mut error, reused, method, body_is_kept);
        error.set_retry(again);
        error
    }

    fn upstream_response_filter<'p, 's, 'r, 'c, 'f>(
        &'p self,
        _session: &'s mut Session,
        _response: &'r mut ResponseHeader,
        _context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<()>>
    where
        'p: 'f,
        's: 'f,
        'r: 'f,
        'c: 'f,
    {
        filtered(Ok(()))
    }

    fn response_filter<'p, 's, 'r, 'c, 'f>(
        &'p self,
        session: &'s mut Session,
        response: &'r mut ResponseHeader,
        context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<()>>
    where
        'p: 'f,
        's: 'f,
        'r: 'f,
        'c: 'f,
    {
        filtered(self.tell_client(session, response, context))
    }

    fn response_body_filter(
        &self,
        _session: &mut Session,
        _body: &mut Option<Bytes>,
        end_of_stream: bool,
        context: &mut Self::CTX,
    ) -> pingora::Result<Option<Duration>> {
        if end_of_stream {
            context.upstream_ended = Some(self.0.clock.now());
        }
        Ok(None)
    }

    fn request_body_filter<'p, 's, 'b, 'c, 'f>(
        &'p self,
        _session: &'s mut Session,
        body: &'b mut Option<Bytes>,
        end_of_stream: bool,
        _context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<()>>
    where
        'p: 'f,
        's: 'f,
        'b: 'f,
        'c: 'f,
    {
        edge::end_body_once(body, end_of_stream);
        filtered(Ok(()))
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, context: &mut Self::CTX) -> FailToProxy {
        if context.upstream_started.is_some() {
            // Pingora closes the connection after this answer, whatever is returned below: the client must be told.
            session.set_keepalive(None);
        }
        let Some(answer) = self.answer_to_failure(error, session.response_written().is_some(), context) else {
            return FailToProxy {
                error_code: 0,
                can_reuse_downstream: false,
            };
        };
        let written = self.answer(session, context, &answer).await;
        FailToProxy {
            error_code: answer.status.as_u16(),
            can_reuse_downstream: written.is_ok(),
        }
    }

    fn logging<'p, 's, 'e, 'c, 'f>(
        &'p self,
        session: &'s mut Session,
        _error: Option<&'e Error>,
        context: &'c mut Self::CTX,
    ) -> Filter<'f, ()>
    where
        'p: 'f,
        's: 'f,
        'e: 'f,
        'c: 'f,
    {
        self.record(session, context);
        done()
    }

    /// As below: what was tried again is counted.
    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _context: &Self::CTX,
        _error: &Error,
        _why: ProxyWarnLogContext,
    ) -> bool {
        true
    }

    /// Pingora logs every failed request as an error with its whole summary; the access log has them.
    fn suppress_error_log(&self, _session: &Session, _context: &Self::CTX, _error: &Error) -> bool {
        true
    }
}
