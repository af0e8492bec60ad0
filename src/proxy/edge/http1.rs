//! HTTP/1 connections: one checked message after the other.

use std::future::Future;
use std::pin::{Pin, pin};

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{Fuse, FusedFuture as _};
use pingora::apps::HttpServerApp;
use pingora::protocols::http::ServerSession;
use pingora::proxy::ProxyHttp;
use pingora::server::ShutdownWatch;
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;

use super::super::Proxy;
use super::super::direct::{DirectWay, PlainRequest, Served};
use super::super::guard::{Guard, LazyTimer, close, close_lingering};
use super::super::strict::{HeadCheck, HeadFraming};
use super::refusal::{refusal_head, request_id};
use super::{Edge, EdgeRefusal, REFUSAL_DEADLINE, RefusedFor};

/// Ready when the process begins to leave.
async fn leaving(mut shutdown: ShutdownWatch) {
    // An error: nobody is left who could say so, and the process is about to end.
    let _ = shutdown.wait_for(|is_leaving| *is_leaving).await;
}

impl<P> Edge<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    pub(super) async fn serve_http1(&self, mut guard: Box<Guard>, shutdown: &ShutdownWatch) {
        let mut waiting = LazyTimer::default();
        // One for the whole connection: each that waits takes a place in a list, under a lock.
        let mut leaving = pin!(leaving(shutdown.clone()).fuse());
        let mut remaining = self.settings.requests_per_connection;
        let mut is_first = true;
        let mut direct = None;
        loop {
            let mut check = HeadCheck::new(self.limits);
            let framing = match self
                .next_head(&mut guard, &mut check, is_first, &mut waiting, leaving.as_mut())
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
            let _active = self.activity.begin();
            let is_last = remaining.is_some_and(|left| left <= 1) || *shutdown.borrow();
            let message = message.freeze();
            let served = match self.plain_request(&message, &framing, &check) {
                Some((proxy, request)) => {
                    let way = direct.get_or_insert_with(|| DirectWay::new(proxy.clone(), &guard));
                    way.serve(guard, request, !framing.closes && !is_last).await
                }
                None => Served::Undone(guard, message, None),
            };
            let kept = match served {
                Served::Kept(guard) => Some(guard),
                Served::Ended => None,
                Served::Undone(guard, message, begun) => {
                    let mut session = ServerSession::new_http1(guard);
                    session.set_pipelined_prefix(message.into());
                    session.set_keepalive_reuses_remaining(remaining.map(|left| left.saturating_sub(1)));
                    session.set_connection_user_context(begun);
                    // With what is left of this task's turn Pingora might not read even what is there already, and it drops
                    // that once the process ends.
                    tokio::task::consume_budget().await;
                    self.serve_by_pingora(session, shutdown).await
                }
            };
            let Some(kept) = kept else { return };
            guard = kept;
            remaining = remaining.map(|left| left.saturating_sub(1));
            if !guard.is_reusable() || remaining == Some(0) {
                return;
            }
        }
    }

    /// The request, if it may go the direct way.
    fn plain_request(
        &self,
        message: &Bytes,
        framing: &HeadFraming,
        check: &HeadCheck,
    ) -> Option<(&Proxy, PlainRequest)> {
        let proxy = self.direct.as_ref()?;
        if !framing.is_plain || !proxy.has_direct_way() {
            return None;
        }
        Some((proxy, PlainRequest::new(message.clone(), framing, check)?))
    }

    /// Returns the connection, if it can carry another request.
    async fn serve_by_pingora(&self, session: ServerSession, shutdown: &ShutdownWatch) -> Option<Box<Guard>> {
        let (stream, _) = self.proxy.process_new_http(session, shutdown).await?.consume();
        let returned = stream.into_any().downcast();
        debug_assert!(returned.is_ok(), "Pingora gave back another stream than it was given");
        returned.ok()
    }

    /// Waits for the next head and checks it. `None` if none came.
    async fn next_head(
        &self,
        guard: &mut Guard,
        check: &mut HeadCheck,
        is_first: bool,
        waiting: &mut LazyTimer,
        mut leaving: Pin<&mut Fuse<impl Future<Output = ()>>>,
    ) -> Result<Option<HeadFraming>, EdgeRefusal> {
        if guard.buffer().is_empty() {
            let patience = if is_first {
                self.settings.head_deadline
            } else {
                self.settings.idle_timeout
            };
            let mut deadline = Instant::now() + patience;
            let linger = || Instant::now() + self.activity.linger_or(self.settings.shutdown_linger);
            if leaving.is_terminated() {
                deadline = deadline.min(linger());
            }
            loop {
                tokio::select! {
                    biased;
                    read = guard.fill() => match read {
                        Ok(1..) => break,
                        Ok(0) | Err(_) => return Ok(None),
                    },
                    () = waiting.until(deadline) => return Ok(None),
                    // A request may be on its way at this moment: answer it, and close then.
                    () = leaving.as_mut(), if !leaving.is_terminated() => deadline = deadline.min(linger()),
                }
            }
        }
        let mut deadline = None;
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
}
