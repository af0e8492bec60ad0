//! Pingora's phases, turned into the gate's steps.

use super::access_log::Entry;
use super::at_once::{Filter, answered, done, filtered};
use super::client_address::{client_address, forwarded_fields, remove_claims};
use super::direct::may_go_directly;
use super::fields::{edit_request, edit_response};
use super::guard::ConnectionInfo;
use super::passing_on::{Duty, Peer};
use super::response::{self, Answer, X_REQUEST_ID};
use super::shared::{self, SharedLimits};
use super::steps::{self, host_of};
use super::upstream::{self, Attempts};
use super::{Context, FIELDS_ADDED, PASSED, Proxy, UnderWay, edge, passing_on, us_between};
use crate::gate::{Access, Permit, Refusal};
use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::protocols::Digest;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType};
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
        session: &'s mut Session,
        context: &'c mut Self::CTX,
    ) -> Filter<'f, pingora::Result<bool>>
    where
        'p: 'f,
        's: 'f,
        'c: 'f,
    {
        if !may_go_directly(session.req_header()) || context.passed_on.is_some() {
            return answered::<true>();
        }
        // Answered: Pingora goes no further.
        Box::pin(async move {
            self.pass_directly(session, context)
                .await
                .map(|is_answered| !is_answered)
        })
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
            let now = self.0.clock.now();
            context.upstream_answered.get_or_insert(now);
            context.upstream_ended.get_or_insert(now);
            // Pingora closes the connection after this answer, whatever is returned below: the client must be told.
            session.set_keepalive(None);
        }
        let answer = edge::guard_refusal(error)
            .map(|refusal| Answer::from(&refusal))
            .or_else(|| answer_to(error));
        let Some(answer) = answer.filter(|_| session.response_written().is_none()) else {
            context.decision = if *error.esource() == ErrorSource::Upstream {
                "BAD_GATEWAY"
            } else {
                "CLIENT_GONE"
            };
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

impl Proxy {
    async fn answer(&self, session: &mut Session, context: &mut Context, answer: &Answer) -> pingora::Result<()> {
        context.decision = answer.code;
        let compiled = self.0.compiled.load_full();
        if answer.status != http::StatusCode::BAD_REQUEST || context.refusal.is_some() {
            steps::read_on(session);
        }
        let request_id = context
            .request_id
            .get_or_insert_with(|| self.0.ids.of(&session.req_header().headers))
            .clone();
        let rate = context.refusal.as_ref().and_then(|refusal| refusal.rate());
        steps::answer(session, answer, rate, &compiled.response, &request_id).await
    }

    /// Asks the gate; `Err` is the answer where the request goes no further.
    fn decide(&self, session: &mut Session, context: &mut Context) -> Result<(), Answer> {
        self.before_the_gate(session, context)?;
        // Held for the decision and no longer: a hand-over waits until nobody holds it.
        let duty = self.0.duty.load();
        if let Duty::PassOn(successor) = &**duty {
            context.passed_on = Some(successor.clone());
            return Ok(());
        }
        let decided = steps::check(&self.0.gate, session, context.client, context.now);
        drop(duty);
        self.after_the_gate(session, context, decided)
    }

    /// The same where limits are shared: a request may have to wait for permits.
    async fn decide_with_others(
        &self,
        limits: &dyn SharedLimits,
        session: &mut Session,
        context: &mut Context,
    ) -> Result<(), Answer> {
        self.before_the_gate(session, context)?;
        // As above, through a wait of some milliseconds.
        let duty = self.0.duty.load_full();
        if let Duty::PassOn(successor) = &*duty {
            context.passed_on = Some(successor.clone());
            return Ok(());
        }
        let (gate, clock) = (&self.0.gate, &self.0.clock);
        let decided = shared::check(limits, gate, clock, session, context.client, context.now).await;
        drop(duty);
        self.after_the_gate(session, context, decided)
    }

    fn before_the_gate(&self, session: &Session, context: &mut Context) -> Result<(), Answer> {
        context.peer = Peer::of(session);
        if let Some(peer) = context.peer {
            let compiled = self.0.compiled.load();
            context.client = client_address(
                peer.address.ip(),
                &session.req_header().headers,
                &compiled.trusted_proxies,
            )
            .client;
        }
        let method = &session.req_header().method;
        if method == Method::TRACE || method == Method::CONNECT {
            return Err(Answer::method_not_allowed());
        }
        steps::check_parameters(&self.0.gate, session.req_header())
            .map_err(|ambiguity| Answer::from(&edge::EdgeRefusal::from(ambiguity)))
    }

    fn after_the_gate(
        &self,
        session: &mut Session,
        context: &mut Context,
        decided: Result<Permit, Refusal>,
    ) -> Result<(), Answer> {
        let permit = decided.map_err(|refusal| Answer::of(context.refusal.insert(refusal)))?;
        if edge::filter_upgrade(session.req_header_mut(), permit.route().upgrade) {
            self.end_with_its_key(session, &permit);
        }
        context.permit = Some(permit);
        Ok(())
    }

    /// Counts that no connection came about. Whether to try again.
    pub(super) fn may_try_again_after_no_connection(&self, context: &Context) -> bool {
        if let Some(permit) = &context.permit {
            let compiled = self.0.compiled.load();
            compiled.upstreams.count_connect_failure(permit.upstream());
        }
        context.attempts.again_after_no_connection()
    }

    /// Makes a request ready for its upstream.
    fn make_ready(&self, session: &Session, request: &mut RequestHeader, context: &mut Context) -> pingora::Result<()> {
        if context.passed_on.is_some() {
            return passing_on::name_client(session, request);
        }
        if request.version == Version::HTTP_10 {
            request.set_version(Version::HTTP_11);
        }
        edit_request(request, |fields| {
            // Five that say whose request it is, three that say where it comes from.
            fields.reserve(8);
            let permit = permit_of(context)?;
            self.0.compiled.load().names.strip(fields, permit, &self.0.gate);
            remove_claims(fields);
            self.tell_upstream(session, context, |name, value| {
                fields.insert(name, value);
            })
        })
    }

    /// Tells a request's upstream where it comes from, whose it is, and its id. The client's own fields of these
    /// names do not travel, so that each stands there once.
    ///
    /// # Errors
    /// `InternalError` without a permit.
    pub(super) fn tell_upstream(
        &self,
        session: &Session,
        context: &mut Context,
        mut put: impl FnMut(&HeaderName, HeaderValue),
    ) -> pingora::Result<()> {
        let (sent, compiled) = (&session.req_header().headers, self.0.compiled.load());
        if let Some(Peer { address, is_tls }) = context.peer {
            let (peer, connection) = (address.ip(), ConnectionInfo::of(session.digest()));
            // Nobody in front of us is believed: the connection has its client's address ready.
            let known = connection.filter(|_| !compiled.trusted_proxies.contains(peer));
            let (chain, scheme) = match known.and_then(ConnectionInfo::client_value) {
                Some(client) => (client, if is_tls { "https" } else { "http" }),
                None => {
                    let (_, chain, scheme) = forwarded_fields(peer, is_tls, sent, &compiled.trusted_proxies);
                    (chain, scheme)
                }
            };
            put(&X_FORWARDED_FOR, chain);
            put(&X_FORWARDED_PROTO, HeaderValue::from_static(scheme));
        }
        compiled.names.tell(permit_of(context)?, &mut put)?;
        let request_id = context.request_id.get_or_insert_with(|| self.0.ids.of(sent));
        put(&X_REQUEST_ID, request_id.clone());
        Ok(())
    }

    /// Makes a response ready for the client.
    ///
    /// # Errors
    /// `InvalidHTTPHeader` for a change of protocols that was not asked for: Pingora would let it through.
    pub(super) fn tell_client(
        &self,
        session: &Session,
        response: &mut ResponseHeader,
        context: &mut Context,
    ) -> pingora::Result<()> {
        if response.status == StatusCode::SWITCHING_PROTOCOLS && !session.is_upgrade_req() {
            let why = "101 to a request that asked for no upgrade";
            return Err(Error::explain(ErrorType::InvalidHTTPHeader, why).into_up());
        }
        context.upstream_answered = Some(self.0.clock.now());
        if context.passed_on.is_some() {
            return Ok(());
        }
        // Whatever the upstream speaks, this is what we speak (RFC 9110 section 2.5).
        response.set_version(Version::HTTP_11);
        edit_response(response, |fields| {
            fields.reserve(FIELDS_ADDED);
            self.add_fields(fields, context);
            Ok(())
        })
    }

    /// Tells the client its request's id and what is left of its limit.
    pub(super) fn add_fields(&self, fields: &mut HeaderMap, context: &Context) {
        if let Some(request_id) = &context.request_id {
            fields.insert(X_REQUEST_ID, request_id.clone());
        }
        if let Some(rate) = context.permit.as_ref().and_then(Permit::rate) {
            response::add_rate_limit(fields, &self.0.compiled.load().response, rate);
        }
    }

    /// Counts and logs a request that is over.
    fn record(&self, session: &Session, context: &Context) {
        // The process that decided has logged and counted it.
        if context.passed_on.is_some() && context.decision == PASSED {
            return;
        }
        let status = session
            .response_written()
            .map_or(0, |response| response.status.as_u16());
        let route = context
            .permit
            .as_ref()
            .map(Permit::route)
            .or(context.refusal.as_ref().and_then(|r| r.route.as_ref()));
        let tier = match route.map(|route| &route.access) {
            Some(Access::Keyed { tier, .. }) => Some(&**tier),
            _ => None,
        };
        let now = self.0.clock.now();
        let times = context.times(now);
        self.0.metrics.record(context.decision, tier, status, Some(&times));
        let holder = context
            .permit
            .as_ref()
            .and_then(Permit::holder)
            .or(context.refusal.as_ref().and_then(Refusal::holder));
        if let (Some(counts), Some(holder)) = (&self.0.key_counts, holder) {
            counts.record(holder.key_id(), context.decision);
        }
        let Some(access_log) = &self.0.access_log else { return };
        let request = session.req_header();
        access_log.log(&Entry {
            unix_ms: context.now.unix_ms,
            client: Some(context.client),
            request_id: context
                .request_id
                .as_ref()
                .and_then(|id| id.to_str().ok())
                .unwrap_or("-"),
            method: request.method.as_str(),
            host: host_of(request),
            path: request.uri.path(),
            status,
            decision: context.decision,
            route: route.map_or("", |route| &route.name),
            tier: tier.map_or("", |tier| &tier.name),
            key_id: holder.map_or("", |holder| holder.key_id()),
            organization: holder.map_or("", |holder| holder.organization()),
            duration_us: us_between(context.now, now),
            upstream_us: times.upstream_us.unwrap_or_default(),
            bytes_sent: session.body_bytes_sent(),
            traceparent: request
                .headers
                .get("traceparent")
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default(),
        });
    }

    /// An upgraded connection has no further requests to refuse, so it is watched for as long as it lasts.
    fn end_with_its_key(&self, session: &Session, permit: &Permit) {
        let (proxy, ticket) = (self.clone(), permit.ticket());
        if let Some(connection) = ConnectionInfo::of(session.digest()) {
            connection.keep_while(move || proxy.0.gate.still_permits(&ticket, proxy.0.clock.now()));
        }
    }
}

/// Without a permit nothing travels upstream, whatever phase order a later Pingora has.
pub(super) fn permit_of(context: &Context) -> pingora::Result<&Permit> {
    let permit = context.permit.as_ref();
    permit.ok_or_else(|| Error::explain(ErrorType::InternalError, "no permit"))
}

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// What the client is told when the exchange with the upstream failed; `None` where the client itself is gone.
fn answer_to(error: &Error) -> Option<Answer> {
    use ErrorType::{
        ConnectTimedout, ConnectionClosed, HTTPStatus, InvalidHTTPHeader, ReadError, ReadTimedout,
        TLSHandshakeTimedout, WriteError, WriteTimedout,
    };
    match (error.esource(), error.etype()) {
        (_, HTTPStatus(status)) if *status < 500 => {
            let status = http::StatusCode::from_u16(*status).unwrap_or(http::StatusCode::BAD_REQUEST);
            Some(Answer::new(
                status,
                "AMBIGUOUS_REQUEST",
                "The request is not well-formed HTTP.",
            ))
        }
        (ErrorSource::Downstream, WriteError | ReadError | ConnectionClosed | ReadTimedout | WriteTimedout) => None,
        (ErrorSource::Downstream, InvalidHTTPHeader) | (ErrorSource::Downstream, _) => {
            Some(Answer::ambiguous("The request is not well-formed HTTP."))
        }
        (_, ConnectTimedout | ReadTimedout | WriteTimedout | TLSHandshakeTimedout) => Some(Answer::upstream_timeout()),
        _ => Some(Answer::bad_gateway()),
    }
}
