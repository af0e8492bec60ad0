//! The gate in front of somebody's own Pingora service.
//!
//! [`GateProxy`] wraps any [`ProxyHttp`]: it asks the gate before the service sees a request, answers refusals itself,
//! and calls the service's hooks for all else. The manual's chapter is [`crate::embedding`].

use super::client_address::{IpNet, TrustedProxies, client_address};
use super::fields::{edit_request, edit_response};
use super::passing_on::Peer;
use super::request_id::RequestIds;
use super::response::{self, Answer, ResponseSettings, X_REQUEST_ID};
use super::steps::{self, OurHeaders};
use super::strict::{Ambiguity, PathRules, check_target};
use super::{BadHeaderPrefix, edge};
use crate::clock::{Clock, Now};
use crate::gate::{Gate, Permit};
use async_trait::async_trait;
use bytes::Bytes;
use http::header::HOST;
use http::{HeaderMap, HeaderValue, Method};
use pingora::cache::key::HashBinary;
use pingora::cache::{CacheKey, CacheMeta, ForcedFreshness, HitHandler, PurgeAction, RespCacheable};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::modules::http::HttpModules;
use pingora::protocols::Digest;
use pingora::proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, PurgeStatus, RangeType, Session};
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType, Result};
use std::any::Any;
use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// A service `P` behind the gate.
#[derive(Debug)]
pub struct GateProxy<P> {
    service: P,
    gate: Arc<Gate>,
    clock: Clock,
    names: OurHeaders,
    response: ResponseSettings,
    paths: PathRules,
    trusted_proxies: TrustedProxies,
    ids: RequestIds,
}

/// What is remembered of a request: the gate's part and the service's own.
#[derive(Debug)]
pub struct GateContext<C> {
    /// The service's own context.
    pub service: C,
    now: Now,
    request_id: Option<HeaderValue>,
    permit: Option<Permit>,
}

impl<C> GateContext<C> {
    /// The permit of a request that passed; it ends with the request.
    pub fn permit(&self) -> Option<&Permit> {
        self.permit.as_ref()
    }
}

/// The header prefix of a [`GateProxy`] that was given no other.
pub const DEFAULT_HEADER_PREFIX: &str = "x-tollgate-";

impl<P> GateProxy<P> {
    /// Puts the gate in front of `service`. Headers of the namespace `x-tollgate-` are ours, paths must be canonical,
    /// and no forwarding header is believed; the methods below change that.
    ///
    /// # Errors
    /// None in practice: that namespace can start a header's name.
    pub fn new(service: P, gate: Arc<Gate>, clock: Clock) -> std::result::Result<Self, BadHeaderPrefix> {
        Ok(GateProxy {
            service,
            gate,
            clock,
            names: OurHeaders::new(DEFAULT_HEADER_PREFIX)?,
            response: ResponseSettings::default(),
            paths: PathRules::Strict,
            trusted_proxies: TrustedProxies::new(vec![]),
            ids: RequestIds::default(),
        })
    }

    /// The namespace of our headers: lower case, ends in `-`.
    ///
    /// # Errors
    /// [`BadHeaderPrefix`] where no header's name can start so.
    pub fn header_prefix(mut self, prefix: &str) -> std::result::Result<Self, BadHeaderPrefix> {
        self.names = OurHeaders::new(prefix)?;
        Ok(self)
    }

    /// How answers look.
    #[must_use]
    pub fn answering(mut self, response: ResponseSettings) -> Self {
        self.response = response;
        self
    }

    /// What a path may contain.
    #[must_use]
    pub fn paths(mut self, paths: PathRules) -> Self {
        self.paths = paths;
        self
    }

    /// Whose forwarding headers are believed.
    #[must_use]
    pub fn trusting(mut self, proxies: Vec<IpNet>) -> Self {
        self.trusted_proxies = TrustedProxies::new(proxies);
        self
    }

    /// The service behind the gate.
    pub fn service(&self) -> &P {
        &self.service
    }

    /// What could be read as another path or another host than the one that was decided on.
    fn ambiguity(&self, session: &Session) -> Option<Ambiguity> {
        let request = session.req_header();
        let target = request.uri.path_and_query().map_or("", |target| target.as_str());
        if !(target == "*" && request.method == Method::OPTIONS)
            && let Err(ambiguity) = check_target(target.as_bytes(), self.paths)
        {
            return Some(ambiguity);
        }
        let mut hosts = request.headers.get_all(HOST).iter();
        match (request.uri.authority(), hosts.next(), hosts.next()) {
            (_, _, Some(_)) => Some(Ambiguity::HostRepeated),
            (Some(authority), Some(host), None)
                if !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) =>
            {
                Some(Ambiguity::HostAuthority)
            }
            _ => None,
        }
    }
}

#[async_trait]
impl<P> ProxyHttp for GateProxy<P>
where
    P: ProxyHttp + Send + Sync,
    P::CTX: Send + Sync,
{
    type CTX = GateContext<P::CTX>;

    fn new_ctx(&self) -> Self::CTX {
        GateContext {
            service: self.service.new_ctx(),
            now: self.clock.now(),
            request_id: None,
            permit: None,
        }
    }

    async fn request_filter(&self, session: &mut Session, context: &mut Self::CTX) -> Result<bool> {
        let request_id = context
            .request_id
            .insert(self.ids.of(&session.req_header().headers))
            .clone();
        let method = &session.req_header().method;
        let unfit = if method == Method::TRACE || method == Method::CONNECT {
            Some(Answer::method_not_allowed())
        } else {
            let ambiguity = self
                .ambiguity(session)
                .or_else(|| steps::check_parameters(&self.gate, session.req_header()).err());
            ambiguity.map(|ambiguity| Answer::from(&edge::EdgeRefusal::from(ambiguity)))
        };
        if let Some(answer) = unfit {
            steps::answer(session, &answer, None, &self.response, &request_id).await?;
            return Ok(true);
        }
        let client = Peer::of_connection(session)
            .map(|peer| peer.address.ip())
            .map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| {
                client_address(peer, &session.req_header().headers, &self.trusted_proxies).client
            });
        match steps::check(&self.gate, session, client, context.now) {
            Ok(permit) => {
                edge::filter_upgrade(session.req_header_mut(), permit.route().upgrade);
                context.permit = Some(permit);
                self.service.request_filter(session, &mut context.service).await
            }
            Err(refusal) => {
                steps::refuse_as(session, &refusal, &self.response, &request_id).await?;
                Ok(true)
            }
        }
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        upstream_request: &mut RequestHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        // Without a permit nothing travels upstream, whatever phase order a later Pingora has.
        let permit = context
            .permit
            .as_ref()
            .ok_or_else(|| Error::explain(ErrorType::InternalError, "no permit"))?;
        edit_request(upstream_request, |fields| {
            self.names.strip(fields, permit, &self.gate);
            self.names.tell(permit, &mut |name, value| {
                fields.insert(name, value.clone());
            })?;
            if let Some(request_id) = &context.request_id {
                fields.insert(X_REQUEST_ID, request_id.clone());
            }
            Ok(())
        })?;
        self.service
            .upstream_request_filter(session, upstream_request, &mut context.service)
            .await
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        upstream_response: &mut ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        edit_response(upstream_response, |fields| {
            if let Some(request_id) = &context.request_id {
                fields.insert(X_REQUEST_ID, request_id.clone());
            }
            if let Some(rate) = context.permit.as_ref().and_then(Permit::rate) {
                response::add_rate_limit(fields, &self.response, rate);
            }
            Ok(())
        })?;
        self.service
            .response_filter(session, upstream_response, &mut context.service)
            .await
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        context: &mut Self::CTX,
    ) -> Result<()> {
        self.service
            .request_body_filter(session, body, end_of_stream, &mut context.service)
            .await?;
        edge::end_body_once(body, end_of_stream);
        Ok(())
    }

    // From here on every hook is the service's own.

    async fn upstream_peer(&self, session: &mut Session, context: &mut Self::CTX) -> Result<Box<HttpPeer>> {
        self.service.upstream_peer(session, &mut context.service).await
    }

    fn init_downstream_modules(&self, modules: &mut HttpModules) {
        self.service.init_downstream_modules(modules);
    }

    async fn early_request_filter(&self, session: &mut Session, context: &mut Self::CTX) -> Result<()> {
        self.service.early_request_filter(session, &mut context.service).await
    }

    fn allow_spawning_subrequest(&self, session: &Session, context: &Self::CTX) -> bool {
        self.service.allow_spawning_subrequest(session, &context.service)
    }

    fn request_cache_filter(&self, session: &mut Session, context: &mut Self::CTX) -> Result<()> {
        self.service.request_cache_filter(session, &mut context.service)
    }

    fn cache_key_callback(&self, session: &Session, context: &mut Self::CTX) -> Result<CacheKey> {
        self.service.cache_key_callback(session, &mut context.service)
    }

    fn cache_miss(&self, session: &mut Session, context: &mut Self::CTX) {
        self.service.cache_miss(session, &mut context.service);
    }

    async fn cache_hit_filter(
        &self,
        session: &mut Session,
        meta: &CacheMeta,
        hit_handler: &mut HitHandler,
        is_fresh: bool,
        context: &mut Self::CTX,
    ) -> Result<Option<ForcedFreshness>> {
        self.service
            .cache_hit_filter(session, meta, hit_handler, is_fresh, &mut context.service)
            .await
    }

    async fn proxy_upstream_filter(&self, session: &mut Session, context: &mut Self::CTX) -> Result<bool> {
        self.service.proxy_upstream_filter(session, &mut context.service).await
    }

    fn response_cache_filter(
        &self,
        session: &Session,
        response: &ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<RespCacheable> {
        self.service
            .response_cache_filter(session, response, &mut context.service)
    }

    fn cache_vary_filter(
        &self,
        meta: &CacheMeta,
        context: &mut Self::CTX,
        request: &RequestHeader,
    ) -> Option<HashBinary> {
        self.service.cache_vary_filter(meta, &mut context.service, request)
    }

    fn cache_not_modified_filter(
        &self,
        session: &Session,
        response: &ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<bool> {
        self.service
            .cache_not_modified_filter(session, response, &mut context.service)
    }

    fn range_header_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        context: &mut Self::CTX,
    ) -> RangeType {
        self.service
            .range_header_filter(session, response, &mut context.service)
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        upstream_response: &mut ResponseHeader,
        context: &mut Self::CTX,
    ) -> Result<()> {
        self.service
            .upstream_response_filter(session, upstream_response, &mut context.service)
            .await
    }

    async fn custom_forwarding(
        &self,
        session: &mut Session,
        context: &mut Self::CTX,
        to_upstream: Option<mpsc::Sender<Bytes>>,
        to_downstream: mpsc::Sender<Bytes>,
    ) -> Result<()> {
        self.service
            .custom_forwarding(session, &mut context.service, to_upstream, to_downstream)
            .await
    }

    async fn downstream_custom_message_proxy_filter(
        &self,
        session: &mut Session,
        message: Bytes,
        context: &mut Self::CTX,
        final_hop: bool,
    ) -> Result<Option<Bytes>> {
        self.service
            .downstream_custom_message_proxy_filter(session, message, &mut context.service, final_hop)
            .await
    }

    async fn upstream_custom_message_proxy_filter(
        &self,
        session: &mut Session,
        message: Bytes,
        context: &mut Self::CTX,
        final_hop: bool,
    ) -> Result<Option<Bytes>> {
        self.service
            .upstream_custom_message_proxy_filter(session, message, &mut context.service, final_hop)
            .await
    }

    fn upstream_response_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        context: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        self.service
            .upstream_response_body_filter(session, body, end_of_stream, &mut context.service)
    }

    fn upstream_response_trailer_filter(
        &self,
        session: &mut Session,
        trailers: &mut HeaderMap,
        context: &mut Self::CTX,
    ) -> Result<()> {
        self.service
            .upstream_response_trailer_filter(session, trailers, &mut context.service)
    }

    fn response_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        context: &mut Self::CTX,
    ) -> Result<Option<Duration>> {
        self.service
            .response_body_filter(session, body, end_of_stream, &mut context.service)
    }

    async fn response_trailer_filter(
        &self,
        session: &mut Session,
        trailers: &mut HeaderMap,
        context: &mut Self::CTX,
    ) -> Result<Option<Bytes>> {
        self.service
            .response_trailer_filter(session, trailers, &mut context.service)
            .await
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, context: &mut Self::CTX) {
        self.service.logging(session, error, &mut context.service).await;
    }

    fn persist_connection_context(&self, session: &Session, context: &Self::CTX) -> Option<Box<dyn Any + Send + Sync>> {
        self.service.persist_connection_context(session, &context.service)
    }

    fn on_connection_reuse(&self, session: &mut Session, context: &mut Self::CTX, before: Box<dyn Any + Send + Sync>) {
        self.service.on_connection_reuse(session, &mut context.service, before);
    }

    fn suppress_error_log(&self, session: &Session, context: &Self::CTX, error: &Error) -> bool {
        self.service.suppress_error_log(session, &context.service, error)
    }

    fn suppress_proxy_warn_log(
        &self,
        session: &Session,
        context: &Self::CTX,
        error: &Error,
        about: ProxyWarnLogContext,
    ) -> bool {
        self.service
            .suppress_proxy_warn_log(session, &context.service, error, about)
    }

    fn error_while_proxy(
        &self,
        peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        context: &mut Self::CTX,
        client_reused: bool,
    ) -> Box<Error> {
        self.service
            .error_while_proxy(peer, session, error, &mut context.service, client_reused)
    }

    fn fail_to_connect(
        &self,
        session: &mut Session,
        peer: &HttpPeer,
        context: &mut Self::CTX,
        error: Box<Error>,
    ) -> Box<Error> {
        self.service.fail_to_connect(session, peer, &mut context.service, error)
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, context: &mut Self::CTX) -> FailToProxy {
        self.service.fail_to_proxy(session, error, &mut context.service).await
    }

    fn should_serve_stale(&self, session: &mut Session, context: &mut Self::CTX, error: Option<&Error>) -> bool {
        self.service.should_serve_stale(session, &mut context.service, error)
    }

    async fn connected_to_upstream(
        &self,
        session: &mut Session,
        reused: bool,
        peer: &HttpPeer,
        fd: RawFd,
        digest: Option<&Digest>,
        context: &mut Self::CTX,
    ) -> Result<()> {
        self.service
            .connected_to_upstream(session, reused, peer, fd, digest, &mut context.service)
            .await
    }

    fn request_summary(&self, session: &Session, context: &Self::CTX) -> String {
        self.service.request_summary(session, &context.service)
    }

    fn is_purge(&self, session: &Session, context: &Self::CTX) -> bool {
        self.service.is_purge(session, &context.service)
    }

    fn purge_action(&self, session: &Session, context: &Self::CTX) -> PurgeAction {
        self.service.purge_action(session, &context.service)
    }

    fn purge_response_filter(
        &self,
        session: &Session,
        context: &mut Self::CTX,
        status: PurgeStatus,
        response: &mut Cow<'static, ResponseHeader>,
    ) -> Result<()> {
        self.service
            .purge_response_filter(session, &mut context.service, status, response)
    }
}
