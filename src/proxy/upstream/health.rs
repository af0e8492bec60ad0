//! Active health checks: each server is asked at intervals, the way requests go to it; so many failures in a row take it
//! out, so many successes bring it back. A server counts as up until its checks have failed.

use pingora::connectors::http::Connector;
use pingora::http::RequestHeader;
use pingora::upstreams::peer::HttpPeer;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::MissedTickBehavior;

use super::ServerSettings;

/// How servers are asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthSettings {
    /// Asked with GET; 200 to 299 is healthy.
    pub path: String,
    /// Time between two checks.
    pub every: Duration,
    /// Longest wait for an answer, the connection included; at most `every`.
    pub timeout: Duration,
    /// Failures in a row that take a server out; at least 1.
    pub unhealthy_after: u32,
    /// Successes in a row that bring it back; at least 1.
    pub healthy_after: u32,
}

/// The health of one server. Relaxed everywhere: a request that looks a moment too early is one more of those before.
#[derive(Debug)]
pub struct ServerHealth {
    up: AtomicBool,
    succeeded: AtomicU64,
    failed: AtomicU64,
}

impl Default for ServerHealth {
    fn default() -> Self {
        ServerHealth {
            up: AtomicBool::new(true),
            succeeded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }
}

impl ServerHealth {
    /// Whether requests go to it.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Checks that succeeded, and that failed.
    pub fn checks(&self) -> (u64, u64) {
        (
            self.succeeded.load(Ordering::Relaxed),
            self.failed.load(Ordering::Relaxed),
        )
    }

    #[cfg(test)]
    pub(super) fn force(&self, up: bool) {
        self.up.store(up, Ordering::Relaxed);
    }
}

/// The checks of one server.
#[derive(Debug)]
pub struct Check {
    upstream: String,
    address: SocketAddr,
    peer: HttpPeer,
    /// The request for HTTP/1.1, and for HTTP/2, which wants the authority in its target.
    requests: Option<[RequestHeader; 2]>,
    settings: HealthSettings,
    health: Arc<ServerHealth>,
}

impl Check {
    pub(super) fn new(
        upstream: &str,
        server: &ServerSettings,
        mut peer: HttpPeer,
        settings: HealthSettings,
        health: Arc<ServerHealth>,
    ) -> Self {
        peer.options.read_timeout = Some(settings.timeout);
        Check {
            upstream: upstream.to_owned(),
            address: server.address,
            requests: requests(&server.host, server.address.port(), &peer, &settings.path),
            peer,
            settings,
            health,
        }
    }

    /// Asks again and again, until it is dropped.
    pub async fn run(self: Arc<Self>, connector: Arc<Connector>) {
        let mut streak = 0;
        let mut ticks = tokio::time::interval(self.settings.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let asked = tokio::time::timeout(self.settings.timeout, self.ask(&connector)).await;
            let outcome = asked.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.settings.timeout)));
            self.note(outcome, &mut streak);
        }
    }

    /// One check, on a connection of its own: an established one may hide that no other can be made.
    async fn ask(&self, connector: &Connector) -> Result<(), String> {
        let [http1, http2] = self.requests.as_ref().ok_or("the path makes no request")?;
        let told = |error: Box<pingora::Error>| error.to_string().trim().to_owned();
        let (mut session, _) = connector.get_http_session(&self.peer).await.map_err(told)?;
        let request = if session.as_http2().is_some() { http2 } else { http1 };
        session
            .write_request_header(Box::new(request.clone()))
            .await
            .map_err(told)?;
        session.finish_request_body().await.map_err(told)?;
        session.read_response_header().await.map_err(told)?;
        let status = session.response_header().map(|response| response.status);
        session.shutdown().await;
        match status {
            Some(status) if status.is_success() => Ok(()),
            Some(status) => Err(format!("answered {status}")),
            None => Err("no response".to_owned()),
        }
    }

    /// `streak`: outcomes in a row that speak against the state in force.
    fn note(&self, outcome: Result<(), String>, streak: &mut u32) {
        let (health, is_up) = (&self.health, self.health.is_up());
        let count = if outcome.is_ok() {
            &health.succeeded
        } else {
            &health.failed
        };
        count.fetch_add(1, Ordering::Relaxed);
        *streak = if outcome.is_ok() == is_up { 0 } else { *streak + 1 };
        let (upstream, address) = (&self.upstream, self.address);
        match outcome {
            Err(why) if is_up && *streak >= self.settings.unhealthy_after => {
                log::warn!(
                    "upstream {upstream}: {address} is out after {streak} failed health checks, the last: {why}"
                );
                health.up.store(false, Ordering::Relaxed);
                *streak = 0;
            }
            Ok(()) if !is_up && *streak >= self.settings.healthy_after => {
                log::info!("upstream {upstream}: {address} is back after {streak} successful health checks");
                health.up.store(true, Ordering::Relaxed);
                *streak = 0;
            }
            _ => {}
        }
    }
}

fn requests(host: &str, port: u16, peer: &HttpPeer, path: &str) -> Option<[RequestHeader; 2]> {
    let (scheme, usual) = if peer.is_tls() { ("https", 443) } else { ("http", 80) };
    let name = if peer.sni.is_empty() { host } else { peer.sni.as_str() };
    let name = if name.contains(':') && !name.starts_with('[') {
        format!("[{name}]")
    } else {
        name.to_owned()
    };
    let authority = if port == usual { name } else { format!("{name}:{port}") };
    let build = |version| {
        let mut request = RequestHeader::build("GET", path.as_bytes(), None).ok()?;
        request.insert_header("user-agent", USER_AGENT).ok()?;
        request.set_version(version);
        Some(request)
    };
    let mut http1 = build(http::Version::HTTP_11)?;
    http1.insert_header("host", &authority).ok()?;
    let mut http2 = build(http::Version::HTTP_2)?;
    http2.set_uri(format!("{scheme}://{authority}{path}").parse().ok()?);
    Some([http1, http2])
}

const USER_AGENT: &str = concat!("tollgate-health/", env!("CARGO_PKG_VERSION"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_row_of_outcomes_changes_the_state() {
        let server = ServerSettings {
            host: "127.0.0.1".to_owned(),
            address: ([127, 0, 0, 1], 8080).into(),
            weight: 1,
        };
        let settings = HealthSettings {
            path: "/healthz".to_owned(),
            every: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            unhealthy_after: 3,
            healthy_after: 2,
        };
        let peer = HttpPeer::new(server.address, false, String::new());
        let check = Check::new("u", &server, peer, settings, Arc::default());
        let mut streak = 0;
        let mut note = |ok: bool| {
            check.note(if ok { Ok(()) } else { Err("no".to_owned()) }, &mut streak);
            check.health.is_up()
        };
        assert_eq!(
            [false, false, true, false, false].map(&mut note),
            [true; 5],
            "never three in a row"
        );
        assert!(!note(false));
        assert_eq!([true, false, true].map(&mut note), [false; 3], "never two in a row");
        assert!(note(true));
        assert_eq!(check.health.checks(), (4, 6));
        let [http1, http2] = check.requests.unwrap();
        assert_eq!(http1.headers["host"], "127.0.0.1:8080");
        assert_eq!(http2.uri.to_string(), "http://127.0.0.1:8080/healthz");
    }
}
