//! Where permitted requests go.

use ahash::HashMap;
use pingora::upstreams::peer::HttpPeer;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// One upstream: servers that do the same.
#[derive(Clone, Debug)]
pub struct UpstreamSettings {
    /// Its name.
    pub name: String,
    /// Its servers, resolved; at least one.
    pub servers: Vec<std::net::SocketAddr>,
    /// The server name for TLS; `None` means plain HTTP.
    pub tls_server_name: Option<String>,
    /// How long to wait for what.
    pub timeouts: Timeouts,
}

/// How long to wait for an upstream.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For a connection.
    pub connect: Duration,
    /// Between two reads of a response.
    pub read: Duration,
    /// For one write of a request.
    pub write: Duration,
    /// Until an unused pooled connection is closed.
    pub idle: Duration,
}

/// All upstreams, their peers built once.
#[derive(Debug)]
pub struct Upstreams(HashMap<Box<str>, Upstream>);

#[derive(Debug)]
struct Upstream {
    peers: Vec<HttpPeer>,
    /// Whose turn it is. Relaxed: turns need no order.
    turn: AtomicUsize,
}

impl Upstreams {
    /// Builds the peers.
    pub fn new(settings: &[UpstreamSettings]) -> Self {
        Upstreams(
            settings
                .iter()
                .map(|upstream| (upstream.name.as_str().into(), Upstream::new(upstream)))
                .collect(),
        )
    }

    /// The peer for the next request to the upstream called `name`.
    pub fn next(&self, name: &str) -> Option<Box<HttpPeer>> {
        let upstream = self.0.get(name)?;
        let turn = match upstream.peers.len() {
            1 => 0,
            many => upstream.turn.fetch_add(1, Ordering::Relaxed) % many,
        };
        upstream.peers.get(turn).cloned().map(Box::new)
    }
}

impl Upstream {
    fn new(settings: &UpstreamSettings) -> Self {
        let peer = |address| {
            let name = settings.tls_server_name.clone();
            let mut peer = HttpPeer::new(address, name.is_some(), name.unwrap_or_default());
            peer.options.connection_timeout = Some(settings.timeouts.connect);
            peer.options.total_connection_timeout = Some(settings.timeouts.connect);
            peer.options.read_timeout = Some(settings.timeouts.read);
            peer.options.write_timeout = Some(settings.timeouts.write);
            peer.options.idle_timeout = Some(settings.timeouts.idle);
            peer
        };
        Upstream {
            peers: settings.servers.iter().map(peer).collect(),
            turn: AtomicUsize::new(0),
        }
    }
}
