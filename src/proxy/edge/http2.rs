//! HTTP/2 connections: Pingora's accept loop with our limits.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http::header;
use pingora::apps::HttpServerApp;
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v2::server::{H2Accept, HttpSession as Http2Session, handshake};
use pingora::protocols::{Digest, SocketDigest};
use pingora::proxy::ProxyHttp;
use pingora::server::ShutdownWatch;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::super::frames::{FrameWatch, PREFACE};
use super::super::guard::Guard;
use super::super::strict::{Ambiguity, check_request};
use super::refusal::request_id;
use super::{Edge, EdgeRefusal, REFUSAL_DEADLINE, RefusedFor};

impl<P> Edge<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    /// Whether the client starts HTTP/2 without TLS. `None` if it went away or said nothing.
    pub(super) async fn starts_with_preface(&self, guard: &mut Guard) -> Option<bool> {
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

    /// Pingora's own accept loop for HTTP/2 (`accept_downstream_sessions`), with our deadlines and options.
    pub(super) async fn serve_http2(
        &self,
        mut guard: Box<Guard>,
        socket: Option<Arc<SocketDigest>>,
        shutdown: &ShutdownWatch,
    ) {
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

/// As Pingora's own loop.
const MALFORMED_STREAMS: u32 = 32;
