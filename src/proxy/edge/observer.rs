//! Who is told what nobody behind the edge can know, and what is in flight.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::super::slots::Capped;
use super::EdgeRefusal;

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

/// Connections and requests that are open now, for shutdown and `/status`.
#[derive(Debug, Default)]
pub struct Activity {
    requests: AtomicUsize,
    /// 0: as the settings say.
    linger_ms: AtomicU64,
}

impl Activity {
    /// Requests that are being worked on.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Acquire)
    }

    /// Says how long idle connections are served once shutdown has begun, instead of what the settings say.
    pub fn linger(&self, how_long: Duration) {
        self.linger_ms.store(how_long.as_millis() as u64, Ordering::Release);
    }

    pub(super) fn linger_or(&self, usual: Duration) -> Duration {
        match self.linger_ms.load(Ordering::Acquire) {
            0 => usual,
            linger_ms => Duration::from_millis(linger_ms),
        }
    }

    pub(super) fn begin(self: &Arc<Self>) -> Active {
        self.requests.fetch_add(1, Ordering::AcqRel);
        Active(self.clone())
    }
}

pub(super) struct Active(Arc<Activity>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::AcqRel);
    }
}
