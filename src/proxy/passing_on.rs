//! Passing requests on to the process that has taken over, and receiving them from the one before.
//!
//! A process that has handed over decides nothing more ([`Proxy::pass_on_to`]). What still comes on its connections goes
//! as it came to the new process, through a Unix socket, with one header that says whose connection it is. Only
//! there is that header believed: a client that sends it over the network says nothing.

use super::Proxy;
use super::guard::ConnectionInfo;
use http::HeaderName;
use pingora::http::RequestHeader;
use pingora::protocols::l4::socket::SocketAddr as AnySocketAddr;
use pingora::proxy::Session;
use pingora::upstreams::peer::HttpPeer;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

/// What this process does with a request.
#[derive(Debug)]
pub(super) enum Duty {
    Decide,
    /// The process that decides is there.
    PassOn(Box<HttpPeer>),
}

impl Proxy {
    /// From the return of this on no request is decided here any more: each goes to the process that listens on
    /// `passage`. What was decided before is counted already, and is finished.
    ///
    /// # Errors
    /// The path is too long for a socket; then nothing has changed.
    pub fn pass_on_to(&self, passage: &Path) -> pingora::Result<()> {
        let mut peer = HttpPeer::new_uds(&passage.display().to_string(), false, String::new())?;
        peer.options.connection_timeout = Some(CONNECT_WITHIN);
        // However long a response takes is for the other process to say.
        peer.options.idle_timeout = Some(IDLE);
        let mut before = self.0.duty.swap(Arc::new(Duty::PassOn(Box::new(peer))));
        // A reader of the old duty holds it for one decision: microseconds, or as long as a request may wait for permits
        // of a limit that gates share.
        while Arc::get_mut(&mut before).is_none() {
            std::thread::sleep(Duration::from_micros(50));
        }
        // A reader that was done before the swap looked gave its loan back by a release that `get_mut` need not have seen.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Nobody has taken over after all: decides again.
    pub fn decide_again(&self) {
        self.0.duty.store(Arc::new(Duty::Decide));
    }
}

/// Who connected, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub address: SocketAddr,
    pub is_tls: bool,
}

impl Peer {
    /// Whom the PROXY protocol named, or the peer itself; through the passage, whom the process before names.
    pub fn of(session: &Session) -> Option<Self> {
        Self::of_connection(session).or_else(|| {
            came_through_passage(session)
                .then(|| Peer::parse(session.req_header().headers.get(PASSED_ON)?.to_str().ok()?))
                .flatten()
        })
    }

    /// Whom the PROXY protocol named, or the peer itself.
    pub fn of_connection(session: &Session) -> Option<Self> {
        let connection = ConnectionInfo::of(session.digest());
        let named = connection.and_then(|connection| connection.client);
        let address = named.or_else(|| session.client_addr()?.as_inet().copied())?;
        Some(Peer {
            address,
            is_tls: connection.is_some_and(|connection| connection.is_tls),
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let (address, scheme) = text.split_once(' ')?;
        Some(Peer {
            address: address.parse().ok()?,
            is_tls: scheme == "https",
        })
    }

    fn text(&self) -> String {
        let scheme = if self.is_tls { "https" } else { "http" };
        format!("{} {scheme}", self.address)
    }
}

/// Tells the process that decides whose connection the request came on.
pub(super) fn name_client(session: &Session, request: &mut RequestHeader) -> pingora::Result<()> {
    request.remove_header(&PASSED_ON);
    match Peer::of(session) {
        Some(peer) => request.insert_header(PASSED_ON, peer.text()),
        None => Ok(()),
    }
}

fn came_through_passage(session: &Session) -> bool {
    matches!(session.client_addr(), Some(AnySocketAddr::Unix(_)))
}

/// In the namespace that no client's field gets through.
const PASSED_ON: HeaderName = HeaderName::from_static("x-tollgate-passed-on");
/// The queue of a Unix socket takes a connection at once, or is full.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Below the 60 s after which the other side closes an idle connection.
const IDLE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_named_and_understood() {
        for (address, is_tls) in [("192.0.2.1:5", true), ("[2001:db8::1]:65535", false)] {
            let peer = Peer {
                address: address.parse().unwrap(),
                is_tls,
            };
            assert_eq!(Peer::parse(&peer.text()), Some(peer));
        }
        for nonsense in ["", "192.0.2.1:5", "192.0.2.1 http", "host:80 http"] {
            assert_eq!(Peer::parse(nonsense), None);
        }
    }
}
