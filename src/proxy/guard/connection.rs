//! What a proxy can ask about the connection that a request came on.

use super::super::client_address::address_value;
use http::HeaderValue;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// What a `ProxyHttp` can ask about the connection that a request came on, by
/// `ConnectionInfo::of(session.digest())`.
pub struct ConnectionInfo {
    /// Who connected: the peer, or whom the PROXY protocol named.
    pub client: Option<std::net::SocketAddr>,
    /// The connection is encrypted.
    pub is_tls: bool,
    client_value: OnceLock<HeaderValue>,
    pub(super) keep_while: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

impl ConnectionInfo {
    pub(in crate::proxy) fn new(client: Option<std::net::SocketAddr>, is_tls: bool) -> Self {
        ConnectionInfo {
            client,
            is_tls,
            client_value: OnceLock::new(),
            keep_while: OnceLock::new(),
        }
    }

    /// The info that the edge attached to a session.
    pub fn of(digest: Option<&pingora::protocols::Digest>) -> Option<&ConnectionInfo> {
        digest?
            .proxy_digest
            .as_ref()?
            .user_data
            .as_ref()?
            .downcast_ref::<Arc<ConnectionInfo>>()
            .map(|info| &**info)
    }

    /// The client's address as a header value, written once for all requests of the connection.
    pub(in crate::proxy) fn client_value(&self) -> Option<&HeaderValue> {
        let client = self.client?;
        let write = || address_value(client.ip().to_canonical());
        Some(self.client_value.get_or_init(write))
    }

    /// Once the connection is upgraded, asks `is_allowed` every half second, and closes the connection when it says
    /// no: a revoked key's WebSocket does not outlive it. Only the first call on a connection counts, which is
    /// enough, since nothing follows an upgrade.
    pub fn keep_while(&self, is_allowed: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.keep_while.set(Box::new(is_allowed));
    }
}

impl fmt::Debug for ConnectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionInfo")
            .field("client", &self.client)
            .field("is_tls", &self.is_tls)
            .finish()
    }
}
