//! The strict edge: what stands between a listener and Pingora's parser.
//!
//! [`Edge`] is a Pingora `ServerApp` around Pingora's own HTTP proxy. Pingora goes on accepting connections, handing
//! descriptors over and shutting down; the edge counts connections, does the TLS handshake, reads each request head
//! under one deadline, checks it ([`super::strict`]) and lends Pingora a stream ([`super::guard`]) that yields exactly
//! this one message. What is refused here never reaches Pingora, nor its `logging` hook: it is told to the
//! [`EdgeObserver`].
//!
//! What a `ProxyHttp` behind an edge must still do is in [`end_body_once`], [`filter_upgrade`],
//! [`remove_claims`] and [`guard_refusal`].

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use http::{HeaderName, header};
use pingora::apps::{HttpServerApp, ServerApp};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v2::server::{H2Accept, H2Options, HttpSession as Http2Session, handshake};
use pingora::protocols::{ALPN, Digest, SocketDigest, Stream};
use pingora::proxy::{HttpProxy, ProxyHttp};
use pingora::server::ShutdownWatch;
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

use super::client_address::{IpNet, ProxyHeader, TrustedProxies, is_claim, read_proxy_header};
use super::frames::{FrameLimits, FrameWatch, PREFACE};
use super::guard::{ConnectionInfo, Guard, GuardError, GuardSettings, PaceLimits, close, close_lingering};
use super::slots::{Capped, Slot, Slots};
use super::strict::{Ambiguity, HeadCheck, HeadFraming, HeadLimits, PathRules, check_request};
use super::tls::EdgeTls;
use super::wire::Wire;

/// How much of everything a client may use. One per listener; [`Slots`] are shared between listeners.
#[derive(Clone, Debug)]
pub struct EdgeSettings {
    /// Bytes of a request head, HTTP/2 header lists included. 32 KiB: section 8 of the design; nginx has 4 × 8 KiB.
    pub head_bytes: usize,
    /// Field lines in a head. 100: section 8 of the design; Apache's default, too.
    pub head_fields: usize,
    /// Bytes of a request target. 8 KiB: what RFC 9112 section 3 recommends as a minimum, and nginx's limit.
    pub target_bytes: usize,
    /// From a head's first byte (a connection's start, for its first head) to its last. 10 s: section 8 of the design.
    pub head_deadline: Duration,
    /// For the whole TLS handshake, and for a PROXY header. 10 s, as for a head.
    pub handshake_deadline: Duration,
    /// How long a kept-alive connection may wait for its next request. 60 s: Pingora's default; nginx has 75.
    pub idle_timeout: Duration,
    /// The longest pause in a request body, and the start's credit of its pace. 20 s: Apache's `mod_reqtimeout`.
    pub body_grace: Duration,
    /// The longest time in which a client takes nothing of a response. 60 s: nginx's `send_timeout`.
    pub response_grace: Duration,
    /// Bytes per second that a body, or a response that the client takes, must keep up. 500: Apache's
    /// `mod_reqtimeout`.
    pub min_bytes_per_second: u32,
    /// How long an upgraded connection may be silent in both directions. 1 h: longer than any heartbeat in use.
    pub upgraded_idle: Duration,
    /// Connections in all. 20,000: section 10 of the design. `tests/edge/hostile.rs` measures what each costs.
    pub connections: usize,
    /// Connections from one IPv4 address or IPv6 /64. 1,000: section 10 of the design. Trusted proxies are exempt.
    pub connections_per_address: usize,
    /// Requests on one HTTP/1 connection. None: nothing here grows with their number.
    pub requests_per_connection: Option<u32>,
    /// How long an idle connection is still served after shutdown has begun. 300 ms: long enough for a request that
    /// is already on its way, short enough for section 7's "ends within 1 s".
    pub shutdown_linger: Duration,
    /// HTTP/2's own limits.
    pub http2: Http2Settings,
    /// Speak HTTP/2 without TLS to clients that start with its preface.
    pub h2c: bool,
    /// Proxies whose `X-Forwarded-For`, `Forwarded` and PROXY headers are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Every connection starts with version 2 of the PROXY protocol; refused from peers that are not trusted.
    pub proxy_protocol: bool,
    /// What a path may contain.
    pub paths: PathRules,
}

/// Limits of one HTTP/2 connection.
#[derive(Clone, Debug)]
pub struct Http2Settings {
    /// Requests at once. 100: RFC 9113's recommended minimum, and Pingora's default.
    pub concurrent_streams: u32,
    /// Bytes of a request body that may be on their way before it is read. 64 KiB: RFC 9113's initial window.
    pub stream_window: u32,
    /// The same for all streams of a connection. 1 MiB: 16 streams at full speed.
    pub connection_window: u32,
    /// Response bytes buffered for one stream. 256 KiB.
    pub send_buffer: usize,
    /// Streams that the client cancels in a minute. 1,000: no browser comes near; a rapid-reset attack needs more in a
    /// second.
    pub resets_per_minute: u32,
    /// Frames without content in a second. 1,000: an upload that opens its window with every frame needs less.
    pub control_frames_per_second: u32,
}

impl Default for Http2Settings {
    fn default() -> Self {
        Http2Settings {
            concurrent_streams: 100,
            stream_window: 65_535,
            connection_window: 1 << 20,
            send_buffer: 256 * 1024,
            resets_per_minute: 1_000,
            control_frames_per_second: 1_000,
        }
    }
}

impl Default for EdgeSettings {
    fn default() -> Self {
        EdgeSettings {
            head_bytes: 32 * 1024,
            head_fields: 100,
            target_bytes: 8 * 1024,
            head_deadline: Duration::from_secs(10),
            handshake_deadline: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            body_grace: Duration::from_secs(20),
            response_grace: Duration::from_secs(60),
            min_bytes_per_second: 500,
            upgraded_idle: Duration::from_secs(3600),
            connections: 20_000,
            connections_per_address: 1_000,
            requests_per_connection: None,
            shutdown_linger: Duration::from_millis(300),
            http2: Http2Settings::default(),
            h2c: false,
            trusted_proxies: Vec::new(),
            proxy_protocol: false,
            paths: PathRules::Strict,
        }
    }
}

impl EdgeSettings {
    /// The part of the settings that heads are checked by.
    pub fn head_limits(&self) -> HeadLimits {
        HeadLimits {
            bytes: self.head_bytes,
            fields: self.head_fields,
            target_bytes: self.target_bytes,
            paths: self.paths,
        }
    }

    fn guard(&self) -> GuardSettings {
        let pace = |grace| PaceLimits {
            grace,
            bytes_per_second: self.min_bytes_per_second,
        };
        GuardSettings {
            body: pace(self.body_grace),
            response: pace(self.response_grace),
            upgraded_idle: self.upgraded_idle,
            read_ahead_bytes: self.head_bytes,
        }
    }

    fn frames(&self) -> FrameLimits {
        FrameLimits {
            deadline: self.head_deadline,
            body: PaceLimits {
                grace: self.body_grace,
                bytes_per_second: self.min_bytes_per_second,
            },
            resets_per_minute: self.http2.resets_per_minute,
            control_frames_per_second: self.http2.control_frames_per_second,
            stream_window: self.http2.stream_window,
        }
    }

    fn h2_options(&self) -> H2Options {
        let mut options = H2Options::default();
        options
            .max_concurrent_streams(self.http2.concurrent_streams)
            .max_header_list_size(u32::try_from(self.head_bytes).unwrap_or(u32::MAX))
            .initial_window_size(self.http2.stream_window)
            .initial_connection_window_size(self.http2.connection_window)
            .max_send_buffer_size(self.http2.send_buffer)
            .max_frame_size(16 * 1024);
        options
    }
}

/// A request that was refused before Pingora saw it, or whose body was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EdgeRefusal {
    /// The status of the answer.
    pub status: u16,
    /// The code of section 2's table, or one beside it.
    pub code: &'static str,
    /// Why, for logs and metrics; its `Display` is the client's message.
    pub why: RefusedFor,
}

/// What a request was refused for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusedFor {
    /// It can be read in more than one way, or not at all.
    Ambiguity(Ambiguity),
    /// The head, or the body, was not there in time.
    Slow,
}

impl fmt::Display for RefusedFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RefusedFor::Ambiguity(ambiguity) => ambiguity.fmt(f),
            RefusedFor::Slow => f.write_str("The request took too long to arrive."),
        }
    }
}

impl From<Ambiguity> for EdgeRefusal {
    fn from(ambiguity: Ambiguity) -> Self {
        let (status, code) = match ambiguity {
            Ambiguity::MethodRefused => (405, "METHOD_NOT_ALLOWED"),
            Ambiguity::Version => (505, "HTTP_VERSION_NOT_SUPPORTED"),
            Ambiguity::TargetTooLong => (414, "URI_TOO_LONG"),
            Ambiguity::HeadTooLarge | Ambiguity::TooManyFields => (431, "HEADERS_TOO_LARGE"),
            Ambiguity::Expectation => (417, "EXPECTATION_FAILED"),
            _ => (400, "AMBIGUOUS_REQUEST"),
        };
        EdgeRefusal {
            status,
            code,
            why: RefusedFor::Ambiguity(ambiguity),
        }
    }
}

impl EdgeRefusal {
    /// 408.
    pub const SLOW: EdgeRefusal = EdgeRefusal {
        status: 408,
        code: "REQUEST_TIMEOUT",
        why: RefusedFor::Slow,
    };
}

/// Whom the edge tells what nobody behind it can know. All calls are quick and must not block.
pub trait EdgeObserver: Send + Sync {
    /// A request was answered with a refusal. `request_id` stands in the answer.
    fn refused(&self, client: Option<SocketAddr>, refusal: &EdgeRefusal, request_id: &str) {
        let _ = (client, refusal, request_id);
    }

    /// A connection has its place.
    fn connection_opened(&self) {}

    /// A connection that was opened is gone.
    fn connection_closed(&self) {}

    /// A connection was dropped, since there are too many.
    fn capped(&self, client: Option<SocketAddr>, why: Capped) {
        let _ = (client, why);
    }

    /// A TLS handshake or a PROXY header failed.
    fn handshake_failed(&self, client: Option<SocketAddr>, why: &str) {
        let _ = (client, why);
    }
}

/// Renders the body of the answer to a refused request: the envelope of section 2, as `application/json`.
pub type RenderRefusal = fn(&EdgeRefusal, request_id: &str) -> String;

/// Connections and requests that are open now, for shutdown and `/status`.
#[derive(Debug, Default)]
pub struct Activity {
    requests: AtomicUsize,
}

impl Activity {
    /// Requests that Pingora is working on.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }

    fn begin(self: &Arc<Self>) -> Active {
        self.requests.fetch_add(1, Ordering::AcqRel);
        Active(self.clone())
    }
}

struct Active(Arc<Activity>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The edge of one listener.
pub struct Edge<P> {
    settings: EdgeSettings,
    guard_settings: GuardSettings,
    limits: HeadLimits,
    trusted: TrustedProxies,
    proxy: Arc<HttpProxy<P>>,
    tls: Option<Arc<EdgeTls>>,
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
        tls: Option<Arc<EdgeTls>>,
        observer: Arc<dyn EdgeObserver>,
    ) -> Self {
        Edge {
            guard_settings: settings.guard(),
            limits: settings.head_limits(),
            trusted: TrustedProxies::new(settings.trusted_proxies.clone()),
            slots: Slots::new(settings.connections, settings.connections_per_address),
            settings,
            proxy,
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
            Some(tls) => match tokio::time::timeout_at(deadline, tls.acceptor().tls_handshake(wire)).await {
                Ok(Ok(stream)) => Box::new(stream),
                Ok(Err(error)) => return self.observer.handshake_failed(client, &error.to_string()),
                Err(_) => {
                    return self
                        .observer
                        .handshake_failed(client, "the TLS handshake did not finish in time");
                }
            },
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

    /// Whether the client starts HTTP/2 without TLS. `None` if it went away or said nothing.
    async fn starts_with_preface(&self, guard: &mut Guard) -> Option<bool> {
        let deadline = Instant::now() + self.settings.head_deadline;
        loop {
            let seen = guard.buffer().len().min(PREFACE.len());
            if guard.buffer()[..seen] != PREFACE[..seen] {
                return Some(false);
            }
            if seen == PREFACE.len() {
                return Some(true);
            }
            match tokio::time::timeout_at(deadline, guard.fill()).await {
                Ok(Ok(1..)) => {}
                // A part of the preface is no request that could be answered.
                Ok(Ok(0) | Err(_)) | Err(_) => return None,
            }
        }
    }

    async fn serve_http1(&self, mut guard: Box<Guard>, shutdown: &ShutdownWatch) {
        let mut waiting = HeadTimer::default();
        let mut shutdown_seen = shutdown.clone();
        let mut remaining = self.settings.requests_per_connection;
        let mut is_first = true;
        loop {
            let framing = match self
                .next_head(&mut guard, is_first, &mut waiting, &mut shutdown_seen)
                .await
            {
                Ok(Some(framing)) => framing,
                Ok(None) => return,
                Err(refusal) => return self.refuse(guard, refusal).await,
            };
            is_first = false;
            let message = match guard.begin(&framing) {
                Ok(message) => message,
                Err(ambiguity) => return self.refuse(guard, ambiguity.into()).await,
            };
            let active = self.activity.begin();
            let mut session = ServerSession::new_http1(guard);
            session.set_pipelined_prefix(message);
            session.set_keepalive_reuses_remaining(remaining);
            let reused = self.proxy.process_new_http(session, shutdown).await;
            drop(active);
            let Some(reused) = reused else { return };
            let (stream, _) = reused.consume();
            let Ok(returned) = stream.into_any().downcast::<Guard>() else {
                debug_assert!(false, "Pingora gave back another stream than it was given");
                return;
            };
            guard = returned;
            remaining = remaining.map(|left| left.saturating_sub(1));
            if !guard.is_reusable() || remaining == Some(0) {
                return;
            }
        }
    }

    /// Waits for the next head and checks it. `None` if none came.
    async fn next_head(
        &self,
        guard: &mut Guard,
        is_first: bool,
        waiting: &mut HeadTimer,
        shutdown: &mut ShutdownWatch,
    ) -> Result<Option<HeadFraming>, EdgeRefusal> {
        if guard.buffer().is_empty() {
            let patience = if is_first {
                self.settings.head_deadline
            } else {
                self.settings.idle_timeout
            };
            let mut deadline = Instant::now() + patience;
            if *shutdown.borrow() {
                deadline = deadline.min(Instant::now() + self.settings.shutdown_linger);
            }
            loop {
                let is_shutting_down = *shutdown.borrow();
                tokio::select! {
                    biased;
                    read = guard.fill() => match read {
                        Ok(1..) => break,
                        Ok(0) | Err(_) => return Ok(None),
                    },
                    () = waiting.until(deadline) => return Ok(None),
                    changed = shutdown.changed(), if !is_shutting_down => {
                        // A request may be on its way at this moment: answer it, and close then.
                        if changed.is_err() {
                            return Ok(None);
                        }
                        if *shutdown.borrow() {
                            deadline = deadline.min(Instant::now() + self.settings.shutdown_linger);
                        }
                    }
                }
            }
        }
        let mut deadline = None;
        let mut check = HeadCheck::new(self.limits);
        let mut may_skip_line = true;
        loop {
            // One empty line before a request line is what RFC 9112 section 2.2 asks to be ignored.
            if may_skip_line && guard.buffer().starts_with(b"\r\n") {
                guard.skip(2);
                may_skip_line = false;
            }
            let only_cr = may_skip_line && guard.buffer()[..] == *b"\r";
            if !only_cr && let Some(framing) = check.resume(guard.buffer())? {
                return Ok(Some(framing));
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + self.settings.head_deadline);
            tokio::select! {
                biased;
                read = guard.fill() => match read {
                    Ok(1..) => {}
                    Ok(0) | Err(_) => return Ok(None),
                },
                () = waiting.until(deadline) => {
                    return if guard.buffer().is_empty() { Ok(None) } else { Err(EdgeRefusal::SLOW) };
                }
            }
        }
    }

    /// Answers a refused request and closes the connection.
    async fn refuse(&self, mut guard: Box<Guard>, refusal: EdgeRefusal) {
        let request_id = request_id();
        self.observer.refused(guard.info().client, &refusal, &request_id);
        let body = (self.render)(&refusal, &request_id);
        let answer = refusal_head(&refusal, body.len(), &request_id) + &body;
        let io = guard.io_mut();
        let write = async {
            io.write_all(answer.as_bytes()).await?;
            io.flush().await
        };
        // The answer is small: where it does not fit into the socket at once, nobody is reading.
        if let Ok(Ok(())) = tokio::time::timeout(REFUSAL_DEADLINE, write).await {
            match refusal.why {
                // All that it sent was read: nothing can reset the answer, and it had its time.
                RefusedFor::Slow => close(guard.io_mut()).await,
                RefusedFor::Ambiguity(_) => close_lingering(guard.io_mut()).await,
            }
        }
    }

    /// Pingora's own accept loop for HTTP/2 (`accept_downstream_sessions`), with our deadlines and options.
    async fn serve_http2(&self, mut guard: Box<Guard>, socket: Option<Arc<SocketDigest>>, shutdown: &ShutdownWatch) {
        use pingora::protocols::{GetProxyDigest, Ssl};
        guard.begin_frames(FrameWatch::new(self.settings.frames()));
        let digest = Arc::new(Digest {
            ssl_digest: guard.get_ssl_digest(),
            timing_digest: Vec::new(),
            proxy_digest: guard.get_proxy_digest(),
            socket_digest: socket,
        });
        let handshaken = tokio::time::timeout(
            self.settings.head_deadline,
            handshake(guard, Some(self.settings.h2_options())),
        )
        .await;
        let Ok(Ok(mut connection)) = handshaken else { return };
        let mut shutdown_seen = shutdown.clone();
        let mut is_closing = false;
        let mut malformed = 0;
        let streams = Arc::new(Streams::default());
        if *shutdown_seen.borrow_and_update() {
            connection.graceful_shutdown();
            is_closing = true;
        }
        loop {
            let idle = async {
                streams.idle().await;
                tokio::time::sleep(self.settings.idle_timeout).await;
            };
            let accepted = tokio::select! {
                biased;
                accepted = Http2Session::from_h2_conn(&mut connection, digest.clone()) => accepted,
                changed = shutdown_seen.changed(), if !is_closing => {
                    if changed.is_ok() && !*shutdown_seen.borrow() {
                        continue;
                    }
                    connection.graceful_shutdown();
                    is_closing = true;
                    continue;
                }
                () = idle => {
                    if is_closing {
                        // The client was told, and does not go.
                        return;
                    }
                    connection.graceful_shutdown();
                    is_closing = true;
                    continue;
                }
            };
            match accepted {
                Ok(Some(H2Accept::Session(session))) => self.spawn_stream(session, streams.begin(), shutdown),
                Ok(Some(H2Accept::Rejected)) => {
                    malformed += 1;
                    if malformed >= MALFORMED_STREAMS {
                        return;
                    }
                }
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn spawn_stream(&self, session: Http2Session, stream: ActiveStream, shutdown: &ShutdownWatch) {
        let request = session.req_header();
        let active = self.activity.begin();
        if let Err(ambiguity) = check_request(&request.method, &request.uri, &request.headers, self.limits) {
            let request_id = request_id();
            let refusal = EdgeRefusal::from(ambiguity);
            let client = session.client_addr().and_then(|client| client.as_inet()).copied();
            self.observer.refused(client, &refusal, &request_id);
            let body = (self.render)(&refusal, &request_id);
            tokio::spawn(async move {
                let _held = (stream, active);
                refuse_stream(session, refusal, body, &request_id).await;
            });
            return;
        }
        let proxy = self.proxy.clone();
        let shutdown = shutdown.clone();
        let mut session = ServerSession::new_http2(session);
        session.set_write_timeout(Some(self.settings.response_grace));
        tokio::spawn(async move {
            let _held = (stream, active);
            proxy.process_new_http(session, &shutdown).await;
        });
    }
}

/// Answers a refused HTTP/2 request; the connection and its other streams go on. What RFC 9113 calls malformed is reset
/// as it asks for, where section 8 of the design does not ask for a 400.
async fn refuse_stream(mut session: Http2Session, refusal: EdgeRefusal, body: String, request_id: &str) {
    if refusal.why == RefusedFor::Ambiguity(Ambiguity::FieldPadded) {
        session.shutdown_with_reason(h2::Reason::PROTOCOL_ERROR);
        return;
    }
    let answer = async {
        let mut head = ResponseHeader::build_no_case(refusal.status, Some(4))?;
        head.insert_header(header::CONTENT_TYPE, "application/json")?;
        head.insert_header(header::CONTENT_LENGTH, body.len())?;
        head.insert_header(header::CACHE_CONTROL, "no-store")?;
        head.insert_header("x-request-id", request_id)?;
        session.write_response_header(Box::new(head), false)?;
        session.write_body(Bytes::from(body), true).await
    };
    // An error means that the client has gone, or does not take so little in time.
    let _ = tokio::time::timeout(REFUSAL_DEADLINE, answer).await;
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

/// The open streams of one HTTP/2 connection.
#[derive(Default)]
struct Streams {
    open: AtomicUsize,
    changed: Notify,
}

struct ActiveStream(Arc<Streams>);

impl Streams {
    fn begin(self: &Arc<Self>) -> ActiveStream {
        self.open.fetch_add(1, Ordering::AcqRel);
        ActiveStream(self.clone())
    }

    async fn idle(&self) {
        // One waiter only, and `notify_one` keeps its permit, so no change is missed.
        while self.open.load(Ordering::Acquire) != 0 {
            self.changed.notified().await;
        }
    }
}

impl Drop for ActiveStream {
    fn drop(&mut self) {
        if self.0.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.changed.notify_one();
        }
    }
}

/// A timer that is rarely reset: between two requests on a connection it usually has not fired yet, and only where
/// it has is it set to the deadline that really holds.
#[derive(Default)]
struct HeadTimer(Option<Pin<Box<Sleep>>>);

impl HeadTimer {
    async fn until(&mut self, deadline: Instant) {
        let timer = self
            .0
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if timer.deadline() > deadline || timer.is_elapsed() {
            timer.as_mut().reset(deadline);
        }
        loop {
            timer.as_mut().await;
            if timer.deadline() >= deadline {
                return;
            }
            timer.as_mut().reset(deadline);
        }
    }
}

/// Checks a request that came over HTTP/2, for a proxy that runs without an edge; an edge has done it before.
///
/// # Errors
/// The refusal to answer with.
pub fn check_http2(request: &RequestHeader, limits: HeadLimits) -> Result<(), EdgeRefusal> {
    check_request(&request.method, &request.uri, &request.headers, limits).map_err(EdgeRefusal::from)
}

/// To be called in `request_body_filter`. Pingora 0.9.1 would send the last chunk twice to an HTTP/1 upstream when a
/// body's end comes in an empty piece, as with an empty DATA frame: the second one would be read as the start of a
/// response to nobody, on a pooled connection.
pub fn end_body_once(body: &mut Option<Bytes>, end_of_stream: bool) {
    if end_of_stream && body.as_ref().is_some_and(|bytes| !bytes.has_remaining()) {
        *body = None;
    }
}

/// To be called in `early_request_filter`, once the rule is known at the latest in `request_filter`: leaves an
/// `Upgrade` only where the rule allows it and it is a WebSocket handshake (RFC 6455 section 4.1: GET, HTTP/1.1, no
/// body, named by `Connection`). Pingora itself takes any `Upgrade` field for an upgrade. Returns whether one is left.
pub fn filter_upgrade(request: &mut RequestHeader, is_allowed: bool) -> bool {
    if !request.headers.contains_key(header::UPGRADE) {
        request.remove_header(&HTTP2_SETTINGS);
        return false;
    }
    let mut upgrades = request.headers.get_all(header::UPGRADE).iter();
    let is_websocket = upgrades
        .next()
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"))
        && upgrades.next().is_none();
    let is_named = request.headers.get_all(header::CONNECTION).iter().any(|value| {
        value
            .as_bytes()
            .split(|b| *b == b',')
            .any(|option| option.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
    });
    let has_body = request.headers.contains_key(header::TRANSFER_ENCODING)
        || request
            .headers
            .get(header::CONTENT_LENGTH)
            .is_some_and(|length| length.as_bytes() != b"0");
    let is_kept = is_allowed
        && is_websocket
        && is_named
        && !has_body
        && request.method == http::Method::GET
        && request.version == http::Version::HTTP_11;
    if !is_kept {
        request.remove_header(&header::UPGRADE);
    }
    request.remove_header(&HTTP2_SETTINGS);
    is_kept
}

/// Removes every field in which a client could claim an address, host, path or method that is not its request's
/// own. What is true is set again afterwards, from [`super::client_address::forwarded_fields`] (which must be asked
/// before).
pub fn remove_claims(request: &mut RequestHeader) {
    // One pass over the few fields there are; most requests have no claim among them.
    while let Some(claim) = request.headers.keys().find(|name| is_claim(name)).cloned() {
        request.remove_header(&claim);
    }
}

/// The refusal behind an error that Pingora reports for a request's body, for `fail_to_proxy`: the guard found the
/// body malformed (400) or too slow (408).
pub fn guard_refusal(error: &pingora::Error) -> Option<EdgeRefusal> {
    let io = error.root_cause().downcast_ref::<std::io::Error>()?;
    match io.get_ref()?.downcast_ref::<GuardError>()? {
        GuardError::Body(ambiguity) => Some((*ambiguity).into()),
        GuardError::BodyTooSlow => Some(EdgeRefusal::SLOW),
        _ => None,
    }
}

/// 128 random bits in hexadecimal, as every request id.
fn request_id() -> String {
    let mut bytes = [0u8; 16];
    // Without randomness nothing here is at risk: the id only helps to find a log line.
    let _ = getrandom::fill(&mut bytes);
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn render_refusal(refusal: &EdgeRefusal, request_id: &str) -> String {
    format!(
        r#"{{"success":false,"error":{{"code":"{}","message":"{}","requestId":"{request_id}"}}}}"#,
        refusal.code, refusal.why
    )
}

/// The head of an HTTP/1 refusal.
fn refusal_head(refusal: &EdgeRefusal, body_bytes: usize, request_id: &str) -> String {
    let reason = http::StatusCode::from_u16(refusal.status)
        .ok()
        .and_then(|status| status.canonical_reason());
    format!(
        "HTTP/1.1 {} {}\r\nContent-Type: application/json\r\nContent-Length: {body_bytes}\r\n\
         Cache-Control: no-store\r\nX-Request-Id: {request_id}\r\nConnection: close\r\n\r\n",
        refusal.status,
        reason.unwrap_or("Refused"),
    )
}

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// For an answer of a few hundred bytes.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(1);
/// As Pingora's own loop.
const MALFORMED_STREAMS: u32 = 32;
