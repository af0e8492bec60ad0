//! The only `ProxyHttp`: Pingora's phases, turned into the gate's steps.
//!
//! `request_filter` asks the gate and answers refusals; `upstream_request_filter` takes the credential and everything
//! of our namespace off the request and says whose it is; `response_filter` tells what is left of the limit.

pub mod access_log;
pub mod client_address;
pub mod edge;
pub mod embed;
pub mod frames;
pub mod guard;
mod key_counts;
mod metrics;
mod passing_on;
mod request_id;
pub mod response;
mod shared;
pub mod slots;
mod steps;
pub mod strict;
pub mod upstream;
mod wire;

pub use embed::GateProxy;
pub use metrics::{BUCKETS_US, ProxyMetrics};
pub use response::{Answer, ResponseSettings};
pub use shared::SharedLimits;
pub use steps::refuse;
pub use upstream::health::HealthSettings;
pub use upstream::{Balance, ServerSettings, Timeouts, UpstreamSettings, UpstreamTls};

use crate::clock::{Clock, Now};
use crate::gate::{Access, Gate, Permit, Refusal};
use access_log::{AccessLog, Entry};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use client_address::{TrustedProxies, client_address, forwarded_fields};
use guard::ConnectionInfo;
use http::{HeaderName, HeaderValue, Method, Version};
use key_counts::KeyCounts;
use metrics::Times;
use passing_on::{Duty, Peer};
use pingora::connectors::http::Connector;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorSource, ErrorType};
use request_id::RequestIds;
use response::X_REQUEST_ID;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use steps::{OurHeaders, host_of};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use upstream::{Attempts, Counts, ServerState, Upstreams};

/// The proxy's settings. Another set can be put in force at any time ([`Proxy::reload`]).
#[derive(Clone, Debug)]
pub struct Settings {
    /// The namespace of our headers: lower case, ends in `-`.
    pub header_prefix: String,
    /// How answers look.
    pub response: ResponseSettings,
    /// Where permitted requests go.
    pub upstreams: Vec<UpstreamSettings>,
    /// Whose forwarding headers are believed.
    pub trusted_proxies: Vec<client_address::IpNet>,
    /// Count the requests of each key by itself. Decided when the proxy is made; a reload does not change it.
    pub count_keys: bool,
}

/// The proxy behind the strict edge. Clones are the same proxy.
#[derive(Clone, Debug)]
pub struct Proxy(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    gate: Arc<Gate>,
    clock: Clock,
    duty: ArcSwap<Duty>,
    compiled: ArcSwap<Compiled>,
    /// Health checks are begun anew with what a reload brought.
    reloaded: Notify,
    ids: RequestIds,
    access_log: Option<AccessLog>,
    metrics: Arc<ProxyMetrics>,
    key_counts: Option<KeyCounts>,
    in_flight: Arc<AtomicU64>,
    shared: OnceLock<Arc<dyn SharedLimits>>,
}

/// Settings, made ready for the request path.
#[derive(Debug)]
struct Compiled {
    names: OurHeaders,
    response: ResponseSettings,
    upstreams: Upstreams,
    trusted_proxies: TrustedProxies,
}

/// A header prefix that cannot start a header's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadHeaderPrefix(pub String);

impl Proxy {
    /// A proxy that asks `gate`.
    ///
    /// # Errors
    /// [`BadHeaderPrefix`].
    pub fn new(
        settings: &Settings,
        gate: Arc<Gate>,
        clock: Clock,
        access_log: Option<AccessLog>,
    ) -> Result<Self, BadHeaderPrefix> {
        Ok(Proxy(Arc::new(Inner {
            gate,
            clock,
            duty: ArcSwap::from_pointee(Duty::Decide),
            compiled: ArcSwap::from_pointee(Compiled::new(settings, None)?),
            reloaded: Notify::new(),
            ids: RequestIds::default(),
            access_log,
            metrics: Arc::new(ProxyMetrics::default()),
            key_counts: settings.count_keys.then(KeyCounts::default),
            in_flight: Arc::default(),
            shared: OnceLock::new(),
        })))
    }

    /// Puts other settings in force for requests that come from now on.
    ///
    /// # Errors
    /// [`BadHeaderPrefix`]; the old settings then stay.
    pub fn reload(&self, settings: &Settings) -> Result<(), BadHeaderPrefix> {
        let compiled = Compiled::new(settings, Some(&self.0.compiled.load().upstreams))?;
        self.0.compiled.store(Arc::new(compiled));
        self.0.reloaded.notify_one();
        Ok(())
    }

    /// Requests by key id and decision, where they are counted.
    pub fn key_requests(&self) -> Vec<(Box<str>, &'static str, u64)> {
        self.0.key_counts.as_ref().map(KeyCounts::read).unwrap_or_default()
    }

    /// Every server of every upstream.
    pub fn servers(&self) -> Vec<ServerState> {
        self.0.compiled.load().upstreams.servers()
    }

    /// What is counted of every upstream: its name, connections that did not come about, requests tried once more.
    pub fn upstream_counts(&self) -> Vec<(String, u64, u64)> {
        let compiled = self.0.compiled.load();
        let read = |(name, counts): (&str, &Counts)| {
            let failures = counts.connect_failures.load(Ordering::Relaxed);
            (name.to_owned(), failures, counts.retries.load(Ordering::Relaxed))
        };
        compiled.upstreams.counts().map(read).collect()
    }

    /// Runs the health checks of whatever settings are in force, until it is dropped.
    pub async fn check_health(&self) {
        let connector = Arc::new(Connector::new(None));
        loop {
            let compiled = self.0.compiled.load_full();
            let mut checks = JoinSet::new();
            for check in compiled.upstreams.checks() {
                checks.spawn(check.clone().run(connector.clone()));
            }
            self.0.reloaded.notified().await;
        }
    }

    /// Lets requests wait for permits of limits that the gate shares with others ([`Gate::sharing_limits`]). Once.
    pub fn share_limits(&self, limits: Arc<dyn SharedLimits>) {
        // A second time would be a mistake of ours; the first one holds.
        let _ = self.0.shared.set(limits);
    }

    /// What has been counted.
    pub fn metrics(&self) -> Arc<ProxyMetrics> {
        self.0.metrics.clone()
    }

    /// How many requests are under way.
    pub fn in_flight(&self) -> Arc<AtomicU64> {
        self.0.in_flight.clone()
    }

    /// Logs and counts a request that the edge refused.
    pub fn log_refused_at_the_edge(&self, client: Option<SocketAddr>, refusal: &edge::EdgeRefusal, request_id: &str) {
        self.0.metrics.record(refusal.code, "", refusal.status, None);
        let Some(access_log) = &self.0.access_log else { return };
        access_log.log(&Entry {
            unix_ms: self.0.clock.now().unix_ms,
            client: &client.map_or_else(String::new, |client| client.ip().to_string()),
            request_id,
            // Nothing that was sent is repeated: it could not be read in one way only.
            method: "-",
            host: "",
            path: "-",
            status: refusal.status,
            decision: refusal.code,
            route: "",
            tier: "",
            key_id: "",
            organization: "",
            duration_us: 0,
            upstream_us: 0,
            bytes_sent: 0,
            traceparent: "",
        });
    }

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

    /// An upgraded connection has no further requests to refuse, so it is watched for as long as it lasts.
    fn end_with_its_key(&self, session: &Session, permit: &Permit) {
        let (proxy, ticket) = (self.clone(), permit.ticket());
        if let Some(connection) = ConnectionInfo::of(session.digest()) {
            connection.keep_while(move || proxy.0.gate.still_permits(&ticket, proxy.0.clock.now()));
        }
    }
}

impl Compiled {
    fn new(settings: &Settings, before: Option<&Upstreams>) -> Result<Self, BadHeaderPrefix> {
        Ok(Compiled {
            names: OurHeaders::new(&settings.header_prefix)?,
            response: settings.response.clone(),
            upstreams: Upstreams::new(&settings.upstreams, before),
            trusted_proxies: TrustedProxies::new(settings.trusted_proxies.clone()),
        })
    }
}

/// What is remembered of a request between the phases.
#[derive(Debug)]
pub struct Context {
    now: Now,
    client: IpAddr,
    request_id: Option<HeaderValue>,
    permit: Option<Permit>,
    refusal: Option<Refusal>,
    decision: &'static str,
    upstream_started: Option<Now>,
    /// The head of the upstream's response, or its failure.
    upstream_answered: Option<Now>,
    /// The last byte of its response.
    upstream_ended: Option<Now>,
    attempts: Attempts,
    /// The process that this request is passed on to, instead of being decided here.
    passed_on: Option<Box<HttpPeer>>,
    _under_way: UnderWay,
}

impl Context {
    /// How long the parts of the request took that ends `now`.
    fn times(&self, now: Now) -> Times {
        let Some(started) = self.upstream_started else {
            return Times {
                decision_us: None,
                overhead_us: us_between(self.now, now),
                upstream_us: None,
            };
        };
        let decision_us = us_between(self.now, started);
        let answered = self.upstream_answered.unwrap_or(now);
        Times {
            decision_us: Some(decision_us),
            overhead_us: decision_us + us_between(self.upstream_ended.unwrap_or(answered), now),
            upstream_us: Some(us_between(started, answered)),
        }
    }
}

fn us_between(earlier: Now, later: Now) -> u64 {
    later.elapsed_ns.saturating_sub(earlier.elapsed_ns) / 1000
}

/// Counts a request as under way until it is dropped.
#[derive(Debug)]
struct UnderWay(Arc<AtomicU64>);

impl UnderWay {
    fn new(count: &Arc<AtomicU64>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        UnderWay(count.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The decision of a request that passed.
pub const PASSED: &str = "PASSED";

#[async_trait]
impl ProxyHttp for Proxy {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        Context {
            now: self.0.clock.now(),
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
        }
    }

    /// None: the compression module that Pingora adds by default costs allocations and changes nothing here.
    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn request_filter(&self, session: &mut Session, context: &mut Context) -> pingora::Result<bool> {
        let compiled = self.0.compiled.load_full();
        if let Some(peer) = Peer::of(session) {
            context.client = client_address(
                peer.address.ip(),
                &session.req_header().headers,
                &compiled.trusted_proxies,
            )
            .client;
        }
        let method = &session.req_header().method;
        if method == Method::TRACE || method == Method::CONNECT {
            self.answer(session, context, &Answer::method_not_allowed()).await?;
            return Ok(true);
        }
        if let Err(ambiguity) = steps::check_parameters(&self.0.gate, session.req_header()) {
            let answer = Answer::from(&edge::EdgeRefusal::from(ambiguity));
            self.answer(session, context, &answer).await?;
            return Ok(true);
        }
        let decided = match self.0.shared.get() {
            None => {
                // Held for the decision and no longer: a hand-over waits until nobody holds it.
                let duty = self.0.duty.load();
                if let Duty::PassOn(successor) = &**duty {
                    context.passed_on = Some(successor.clone());
                    return Ok(false);
                }
                steps::check(&self.0.gate, session, context.client, context.now)
            }
            Some(limits) => {
                // As above, through a wait of some milliseconds.
                let duty = self.0.duty.load_full();
                if let Duty::PassOn(successor) = &*duty {
                    context.passed_on = Some(successor.clone());
                    return Ok(false);
                }
                let (gate, clock) = (&self.0.gate, &self.0.clock);
                shared::check(limits.as_ref(), gate, clock, session, context.client, context.now).await
            }
        };
        match decided {
            Ok(permit) => {
                if edge::filter_upgrade(session.req_header_mut(), permit.route().upgrade) {
                    self.end_with_its_key(session, &permit);
                }
                context.permit = Some(permit);
                Ok(false)
            }
            Err(refusal) => {
                context.decision = refusal.reason.code();
                let request_id = context
                    .request_id
                    .insert(self.0.ids.of(&session.req_header().headers))
                    .clone();
                let refusal = context.refusal.insert(refusal);
                steps::refuse_as(session, refusal, &compiled.response, &request_id).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_peer(&self, _session: &mut Session, context: &mut Context) -> pingora::Result<Box<HttpPeer>> {
        // Further tries are part of what the upstream took.
        context.upstream_started.get_or_insert_with(|| self.0.clock.now());
        if let Some(successor) = &context.passed_on {
            return Ok(successor.clone());
        }
        let name = context.permit.as_ref().map_or("", |permit| permit.upstream());
        self.0
            .compiled
            .load()
            .upstreams
            .next(name, &mut context.attempts)
            .ok_or_else(|| Error::explain(ErrorType::InternalError, format!("no upstream is called {name:?}")))
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        upstream_request: &mut RequestHeader,
        context: &mut Context,
    ) -> pingora::Result<()> {
        if context.passed_on.is_some() {
            return passing_on::name_client(session, upstream_request);
        }
        // Without a permit nothing travels upstream, whatever phase order a later Pingora has.
        let permit = context
            .permit
            .as_ref()
            .ok_or_else(|| Error::explain(ErrorType::InternalError, "no permit"))?;
        let compiled = self.0.compiled.load();
        compiled.names.strip(upstream_request, permit, &self.0.gate);
        passing_on::forget_client(session, upstream_request);
        edge::remove_claims(upstream_request);
        if let Some(peer) = Peer::of(session) {
            let headers = &session.req_header().headers;
            let (_, chain, scheme) =
                forwarded_fields(peer.address.ip(), peer.is_tls, headers, &compiled.trusted_proxies);
            upstream_request.insert_header(X_FORWARDED_FOR, chain)?;
            upstream_request.insert_header(X_FORWARDED_PROTO, HeaderValue::from_static(scheme))?;
        }
        if upstream_request.version == Version::HTTP_10 {
            upstream_request.set_version(Version::HTTP_11);
        }
        compiled.names.tell(upstream_request, permit)?;
        let request_id = context
            .request_id
            .get_or_insert_with(|| self.0.ids.of(&session.req_header().headers));
        upstream_request.insert_header(X_REQUEST_ID, request_id.clone())?;
        Ok(())
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        context: &mut Context,
        mut error: Box<Error>,
    ) -> Box<Error> {
        if let Some(permit) = &context.permit {
            self.0
                .compiled
                .load()
                .upstreams
                .count_connect_failure(permit.upstream());
        }
        error.set_retry(context.attempts.again_after_no_connection());
        error
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        mut error: Box<Error>,
        context: &mut Context,
        reused: bool,
    ) -> Box<Error> {
        let body_is_kept = !session.as_ref().retry_buffer_truncated();
        let method = &session.req_header().method;
        let again = context.attempts.again_after(&mut error, reused, method, body_is_kept);
        error.set_retry(again);
        error
    }

    async fn response_filter(
        &self,
        _session: &mut Session,
        upstream_response: &mut ResponseHeader,
        context: &mut Context,
    ) -> pingora::Result<()> {
        context.upstream_answered = Some(self.0.clock.now());
        if context.passed_on.is_some() {
            return Ok(());
        }
        if let Some(request_id) = &context.request_id {
            upstream_response.insert_header(X_REQUEST_ID, request_id.clone())?;
        }
        if let Some(rate) = context.permit.as_ref().and_then(|permit| permit.rate()) {
            response::add_rate_limit(upstream_response, &self.0.compiled.load().response, rate)?;
        }
        Ok(())
    }

    fn response_body_filter(
        &self,
        _session: &mut Session,
        _body: &mut Option<Bytes>,
        end_of_stream: bool,
        context: &mut Context,
    ) -> pingora::Result<Option<Duration>> {
        if end_of_stream {
            context.upstream_ended = Some(self.0.clock.now());
        }
        Ok(None)
    }

    async fn request_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        _context: &mut Context,
    ) -> pingora::Result<()> {
        edge::end_body_once(body, end_of_stream);
        Ok(())
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, context: &mut Context) -> FailToProxy {
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

    async fn logging(&self, session: &mut Session, _error: Option<&Error>, context: &mut Context) {
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
            Some(Access::Keyed { tier, .. }) => &*tier.name,
            _ => "",
        };
        let now = self.0.clock.now();
        let times = context.times(now);
        self.0.metrics.record(context.decision, tier, status, Some(&times));
        let holder = context
            .permit
            .as_ref()
            .and_then(Permit::holder)
            .or(context.refusal.as_ref().and_then(|r| r.holder.as_ref()));
        if let (Some(counts), Some(holder)) = (&self.0.key_counts, holder) {
            counts.record(holder.key_id(), context.decision);
        }
        let Some(access_log) = &self.0.access_log else { return };
        let request = session.req_header();
        access_log.log(&Entry {
            unix_ms: context.now.unix_ms,
            client: &context.client.to_string(),
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
            tier,
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

    /// As below: what was tried again is counted.
    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _context: &Context,
        _error: &Error,
        _why: ProxyWarnLogContext,
    ) -> bool {
        true
    }

    /// Pingora logs every failed request as an error with its whole summary; the access log has them.
    fn suppress_error_log(&self, _session: &Session, _context: &Context, _error: &Error) -> bool {
        true
    }
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

/// How long a refused request's body is read on, so that the connection stays usable.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
