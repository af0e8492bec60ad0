//! The strict edge: what stands between a listener and Pingora's parser.
//!
//! [`Edge`] is a Pingora `ServerApp` around Pingora's own HTTP proxy. Pingora goes on accepting connections, handing
//! descriptors over and shutting down; the edge counts connections, does the TLS handshake, reads each request head
//! under one deadline, checks it ([`super::strict`]) and lends Pingora a stream ([`super::guard`]) that yields exactly
//! this one message, or sends it on the direct way ([`super::direct`]). What is refused here never reaches Pingora, nor
//! its `logging` hook: it is told to the [`EdgeObserver`].
//!
//! What a `ProxyHttp` behind an edge must still do is in [`end_body_once`], [`filter_upgrade`],
//! [`remove_claims`] and [`guard_refusal`].

mod hooks;
mod http1;
mod http2;
mod observer;
mod refusal;
mod settings;

pub use hooks::{check_http2, end_body_once, filter_upgrade, remove_claims};
pub use observer::{Activity, EdgeObserver};
pub use refusal::{EdgeRefusal, RefusedFor, RenderRefusal, guard_refusal};
pub use settings::{EdgeSettings, Http2Settings};

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora::apps::{HttpServerApp, ServerApp};
use pingora::listeners::tls::Acceptor;
use pingora::protocols::{ALPN, Stream};
use pingora::proxy::{HttpProxy, ProxyHttp};
use pingora::server::ShutdownWatch;
use tokio::time::Instant;

use super::Proxy;
use super::client_address::{ProxyHeader, TrustedProxies, read_proxy_header};
use super::guard::{ConnectionInfo, Guard, GuardSettings};
use super::slots::{Slot, Slots};
use super::strict::HeadLimits;
use super::wire::Wire;
use crate::tls::ListenerTls;
use refusal::render_refusal;

/// The edge of one listener.
pub struct Edge<P> {
    settings: EdgeSettings,
    guard_settings: GuardSettings,
    limits: HeadLimits,
    trusted: TrustedProxies,
    proxy: Arc<HttpProxy<P>>,
    direct: Option<Proxy>,
    tls: Option<Arc<ListenerTls>>,
    observer: Arc<dyn EdgeObserver>,
    slots: Arc<Slots>,
    activity: Arc<Activity>,
    render: RenderRefusal,
}

impl<P> Edge<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    /// An edge around a proxy that was made by `pingora::proxy::http_proxy`.
    pub fn new(
        settings: EdgeSettings,
        proxy: Arc<HttpProxy<P>>,
        tls: Option<Arc<ListenerTls>>,
        observer: Arc<dyn EdgeObserver>,
    ) -> Self {
        Edge {
            guard_settings: settings.guard(),
            limits: settings.head_limits(),
            trusted: TrustedProxies::new(settings.trusted_proxies.clone()),
            slots: Slots::new(settings.connections, settings.connections_per_address),
            settings,
            proxy,
            direct: None,
            tls,
            observer,
            activity: Arc::default(),
            render: render_refusal,
        }
    }

    /// Shares places and counters with the other listeners, so that caps and counts hold for all of them together.
    pub fn sharing(mut self, slots: Arc<Slots>, activity: Arc<Activity>) -> Self {
        self.slots = slots;
        self.activity = activity;
        self
    }

    /// Lets plain requests go the direct way of this proxy, which is the one that Pingora's proxy was made of.
    pub fn going_directly(mut self, proxy: Proxy) -> Self {
        self.direct = Some(proxy);
        self
    }

    /// Renders refusals in another way.
    pub fn rendering(mut self, render: RenderRefusal) -> Self {
        self.render = render;
        self
    }

    /// The connections' places.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// What is in flight.
    pub fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    async fn serve(&self, stream: Stream, slot: &mut Slot, shutdown: &ShutdownWatch) {
        let mut wire = Wire::new(stream);
        let peer = wire.peer();
        let mut client = peer;
        let deadline = Instant::now() + self.settings.handshake_deadline;
        if self.settings.proxy_protocol {
            if !peer.is_some_and(|peer| self.trusted.contains(peer.ip())) {
                self.observer
                    .handshake_failed(peer, "a PROXY header is expected, but the peer is not a trusted proxy");
                return;
            }
            match tokio::time::timeout_at(deadline, read_proxy_header(&mut wire)).await {
                Ok(Ok(ProxyHeader::Local)) => {}
                Ok(Ok(ProxyHeader::Proxied { client: named, .. })) => {
                    client = Some(named);
                    wire.set_peer(named);
                }
                Ok(Err(error)) => return self.observer.handshake_failed(peer, &error.to_string()),
                Err(_) => {
                    return self
                        .observer
                        .handshake_failed(peer, "the PROXY header did not come in time");
                }
            }
        }
        // All of a trusted proxy's clients come from its address, so it has no limit of its own.
        let counted: Option<IpAddr> = client
            .map(|client| client.ip())
            .filter(|ip| !self.trusted.contains(*ip));
        if let Some(address) = counted
            && let Err(why) = slot.count_for(address)
        {
            self.observer.capped(client, why);
            return;
        }
        let socket = wire.socket();
        let stream: Stream = match &self.tls {
            None => Box::new(wire),
            Some(tls) => {
                match tokio::time::timeout_at(deadline, Acceptor::from_server_config(tls.config()).tls_handshake(wire))
                    .await
                {
                    Ok(Ok(stream)) => Box::new(stream),
                    Ok(Err(error)) => return self.observer.handshake_failed(client, &error.to_string()),
                    Err(_) => {
                        return self
                            .observer
                            .handshake_failed(client, "the TLS handshake did not finish in time");
                    }
                }
            }
        };
        let by_alpn = matches!(stream.selected_alpn_proto(), Some(ALPN::H2));
        let info = Arc::new(ConnectionInfo::new(client, self.tls.is_some()));
        let mut guard = Box::new(Guard::new(stream, self.guard_settings, info, socket.clone()));
        if by_alpn {
            self.serve_http2(guard, socket, shutdown).await;
        } else if self.settings.h2c && self.tls.is_none() {
            match self.starts_with_preface(&mut guard).await {
                Some(true) => self.serve_http2(guard, socket, shutdown).await,
                Some(false) => self.serve_http1(guard, shutdown).await,
                None => {}
            }
        } else {
            self.serve_http1(guard, shutdown).await;
        }
    }
}

#[async_trait]
impl<P> ServerApp for Edge<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        match self.slots.take() {
            Ok(mut slot) => {
                self.observer.connection_opened();
                let _closed = OnDrop(|| self.observer.connection_closed());
                self.serve(stream, &mut slot, shutdown).await;
            }
            Err(why) => self.observer.capped(Wire::new(stream).peer(), why),
        }
        None
    }

    async fn cleanup(&self) {
        self.proxy.http_cleanup().await;
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// For an answer of a few hundred bytes.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(1);
