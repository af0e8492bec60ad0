//! Where permitted requests go: which server is next, and which failures are worth another try.
//!
//! Everything that does not change from request to request is built once per settings: the peers, the order of the
//! turns. Choosing takes an atomic addition, a look at the health of one server as a rule, and the copy of the peer that
//! Pingora wants.
//!
//! A request is tried again only where nothing of it can have had an effect: no connection came about, or a pooled
//! connection turned out to be dead, not a byte of an answer came, and the method is safe (RFC 9110, section 9.2.1).
//! Idempotent methods that change something (PUT, DELETE) are not repeated: that doing a thing twice is as good as once
//! holds for one client alone, not for two of which the second came in between.

pub mod health;
mod peer;
mod pool;

pub(super) use peer::receive_buffer;
pub(super) use pool::Connection;

use ahash::HashMap;
use health::{Check, HealthSettings, ServerHealth};
use http::Method;
use pingora::upstreams::peer::{HttpPeer, Peer as _};
use pingora::{Error, ErrorType, OrErr as _};
use pool::Pool;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpSocket;

use crate::tls::ClientFiles;

/// One upstream: servers that do the same.
#[derive(Clone, Debug)]
pub struct UpstreamSettings {
    /// Its name.
    pub name: String,
    /// Its servers; at least one.
    pub servers: Vec<ServerSettings>,
    /// How the next server is chosen.
    pub balance: Balance,
    /// `None`: plain HTTP.
    pub tls: Option<UpstreamTls>,
    /// HTTP/2: by ALPN over TLS, by prior knowledge without.
    pub http2: bool,
    /// How long to wait for what.
    pub timeouts: Timeouts,
    /// Further tries after the first.
    pub retries: u32,
    /// `None`: every server counts as up.
    pub health: Option<HealthSettings>,
}

impl UpstreamSettings {
    /// Its servers speak HTTP/1, and not over TLS.
    fn is_plain(&self) -> bool {
        self.tls.is_none() && !self.http2
    }
}

/// A server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSettings {
    /// Its name or address as configured, without the port.
    pub host: String,
    /// Where it is.
    pub address: SocketAddr,
    /// Its share of the requests, at least 1.
    pub weight: u32,
}

/// How the next server is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// In turn, each as often as its weight says, evenly spread.
    RoundRobin,
    /// By chance, weighted: many gates that start together do not call the servers in step.
    Random,
}

/// TLS towards the servers.
#[derive(Clone, Debug, Default)]
pub struct UpstreamTls {
    /// The name to ask for and to verify; `None`: each server's own host.
    pub server_name: Option<String>,
    /// What is trusted and shown.
    pub files: ClientFiles,
    /// Accept any certificate. For tests only.
    pub danger_skip_verify: bool,
}

/// How long to wait for an upstream.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For a connection, the TLS handshake included.
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
pub struct Upstreams {
    by_name: HashMap<Box<str>, Upstream>,
    is_any_plain: bool,
    /// Of idle connections to each server.
    pool: usize,
}

#[derive(Debug)]
struct Upstream {
    servers: Box<[Arc<Server>]>,
    /// Indices of servers in the order of their turns: one of weight 3 is in here three times, evenly spread.
    turns: Box<[u32]>,
    balance: Balance,
    /// Whose turn it is, or the generator's state. Relaxed: turns need no order.
    state: AtomicU64,
    retries: u32,
    counts: Arc<Counts>,
    checks: Vec<Arc<Check>>,
}

/// A server, made ready for the request path.
#[derive(Debug)]
pub(super) struct Server {
    peer: HttpPeer,
    address: SocketAddr,
    timeouts: Timeouts,
    /// It speaks HTTP/1, and not over TLS.
    is_plain: bool,
    health: Arc<ServerHealth>,
    pool: Arc<Pool>,
}

/// What is counted of an upstream, over reloads. Relaxed: each stands for itself.
#[derive(Debug, Default)]
pub struct Counts {
    /// Connections that did not come about.
    pub connect_failures: AtomicU64,
    /// Requests that were tried once more.
    pub retries: AtomicU64,
}

/// A server as it is seen from outside.
#[derive(Clone, Debug)]
pub struct ServerState {
    /// The upstream's name.
    pub upstream: Box<str>,
    /// Where it is.
    pub address: SocketAddr,
    /// Whether it is asked by health checks.
    pub is_checked: bool,
    /// Its health.
    pub health: Arc<ServerHealth>,
}

/// What one request has tried so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attempts {
    made: u32,
    allowed: u32,
    /// A bit for each server that was tried; servers beyond the 64th are not remembered.
    tried: u64,
}

impl Upstreams {
    /// Builds the peers. At most `pool` idle connections are kept to each server that requests go to directly.
    pub fn new(settings: &[UpstreamSettings], pool: usize) -> Self {
        Self::with(settings, pool, None)
    }

    /// Other settings. Servers that were there before keep their health, their counts and their connections.
    pub fn changed_to(&self, settings: &[UpstreamSettings]) -> Self {
        Self::with(settings, self.pool, Some(self))
    }

    fn with(settings: &[UpstreamSettings], pool: usize, before: Option<&Upstreams>) -> Self {
        let built = settings.iter().map(|upstream| {
            let name: Box<str> = upstream.name.as_str().into();
            let before = before.and_then(|before| before.by_name.get(&name));
            (name, Upstream::new(upstream, pool, before))
        });
        Upstreams {
            is_any_plain: settings.iter().any(UpstreamSettings::is_plain),
            by_name: built.collect(),
            pool,
        }
    }

    /// The peer for the next try of a request to the upstream called `name`.
    pub fn next(&self, name: &str, attempts: &mut Attempts) -> Option<Box<HttpPeer>> {
        let upstream = self.by_name.get(name)?;
        Some(Box::new(upstream.next(attempts).peer.clone()))
    }

    /// Whether [`next_plain`](Upstreams::next_plain) can ever return a server.
    pub(super) fn is_any_plain(&self) -> bool {
        self.is_any_plain
    }

    /// The same, as a server to be asked directly; `None` too where the upstream does not speak HTTP/1 without TLS.
    pub(super) fn next_plain(&self, name: &str, attempts: &mut Attempts) -> Option<Arc<Server>> {
        let upstream = self.by_name.get(name)?;
        if !upstream.servers.first()?.is_plain {
            return None;
        }
        Some(upstream.next(attempts).clone())
    }

    /// Closes connections that were not used for as long as their upstream's settings say, or that servers have closed.
    pub fn close_old(&self, now_ns: u64) {
        for server in self.by_name.values().flat_map(|upstream| &upstream.servers) {
            server.pool.close_old(server.timeouts.idle, now_ns);
        }
    }

    /// Counts a connection to the upstream called `name` that did not come about.
    pub fn count_connect_failure(&self, name: &str) {
        if let Some(upstream) = self.by_name.get(name) {
            upstream.counts.connect_failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Every upstream's name and counts.
    pub fn counts(&self) -> impl Iterator<Item = (&str, &Counts)> {
        self.by_name.iter().map(|(name, upstream)| (&**name, &*upstream.counts))
    }

    /// Every server, in the order of names and addresses.
    pub fn servers(&self) -> Vec<ServerState> {
        let states = self.by_name.iter().flat_map(|(name, upstream)| {
            upstream.servers.iter().map(|server| ServerState {
                upstream: name.clone(),
                address: server.address,
                is_checked: !upstream.checks.is_empty(),
                health: server.health.clone(),
            })
        });
        let mut states: Vec<ServerState> = states.collect();
        states.sort_by(|a, b| (&a.upstream, a.address).cmp(&(&b.upstream, b.address)));
        states
    }

    /// Every health check.
    pub(super) fn checks(&self) -> impl Iterator<Item = &Arc<Check>> {
        self.by_name.values().flat_map(|upstream| &upstream.checks)
    }
}

impl Attempts {
    /// Whether another try is allowed, for whatever failed.
    fn may_go_on(self) -> bool {
        self.made <= self.allowed
    }

    /// Whether to try again after no connection came about: nothing was sent.
    pub fn again_after_no_connection(self) -> bool {
        self.may_go_on()
    }

    /// Whether to try again after a connection ended without a byte of a response to a request that is whole here.
    pub fn again_after_silence(self, reused: bool, method: &Method) -> bool {
        reused && method.is_safe() && self.may_go_on()
    }

    /// Whether to try again after the exchange broke off. `body_is_kept`: all of the body that was read can be sent again.
    pub fn again_after(self, error: &mut Error, reused: bool, method: &Method, body_is_kept: bool) -> bool {
        // Pingora marks what a pooled connection's end may have caused, and what a server of HTTP/2 said it did not process.
        error.retry.decide_reuse(reused);
        error.retry.retry() && body_is_kept && no_byte_came(error) && self.again_after_silence(reused, method)
    }
}

/// Whether not a byte of a response had come. Pingora tells it in the text of the error alone; what is not told so counts as come.
fn no_byte_came(error: &Error) -> bool {
    let text = error.context.as_ref().map_or("", |context| context.as_str());
    text.ends_with("bytes already read: 0") || text == "while reading h2 header"
}

fn bit(server: usize) -> u64 {
    u32::try_from(server)
        .ok()
        .and_then(|server| 1_u64.checked_shl(server))
        .unwrap_or_default()
}

impl Upstream {
    fn new(settings: &UpstreamSettings, pool: usize, before: Option<&Upstream>) -> Self {
        let build = |server: &ServerSettings| {
            let peer = peer::build(settings, server);
            let same = before.and_then(|before| before.servers.iter().find(|other| other.address == server.address));
            Arc::new(Server {
                // Without checks nothing would ever bring a server back.
                health: same
                    .filter(|_| settings.health.is_some())
                    .map_or_else(Arc::default, |same| same.health.clone()),
                pool: same
                    .filter(|same| same.peer.reuse_hash() == peer.reuse_hash())
                    .map_or_else(|| Arc::new(Pool::new(pool)), |same| same.pool.clone()),
                peer,
                address: server.address,
                timeouts: settings.timeouts,
                is_plain: settings.is_plain(),
            })
        };
        let servers: Box<[Arc<Server>]> = settings.servers.iter().map(build).collect();
        let checks = settings.health.iter().flat_map(|health| {
            servers.iter().zip(&settings.servers).map(|(server, written)| {
                let (peer, state) = (server.peer.clone(), server.health.clone());
                Arc::new(Check::new(&settings.name, written, peer, health.clone(), state))
            })
        });
        let weights: Vec<u32> = settings.servers.iter().map(|server| server.weight.max(1)).collect();
        Upstream {
            checks: checks.collect(),
            turns: turns(&weights),
            servers,
            balance: settings.balance,
            state: AtomicU64::new(0),
            retries: settings.retries,
            counts: before.map_or_else(Arc::default, |before| before.counts.clone()),
        }
    }

    /// The server for a request's next try.
    fn next(&self, attempts: &mut Attempts) -> &Arc<Server> {
        let server = self.choose(attempts.tried);
        if attempts.made > 0 {
            self.counts.retries.fetch_add(1, Ordering::Relaxed);
        }
        attempts.made += 1;
        attempts.allowed = self.retries;
        attempts.tried |= bit(server);
        &self.servers[server]
    }

    /// The next server: one that is up and was not tried yet; where there is none, one that was not tried yet, since a
    /// check can be wrong where a request would get through; else whose turn it is.
    fn choose(&self, tried: u64) -> usize {
        let fresh = |server: usize| tried & bit(server) == 0;
        let first = self.draw();
        let mut drawn = first;
        // Drawn anew rather than the neighbour taken: the share of a server that is down goes to all others.
        for _ in 0..self.turns.len() {
            if fresh(drawn) && self.servers[drawn].health.is_up() {
                return drawn;
            }
            drawn = self.draw();
        }
        let all = || 0..self.servers.len();
        let up = all().find(|server| fresh(*server) && self.servers[*server].health.is_up());
        up.or_else(|| {
            if fresh(first) {
                Some(first)
            } else {
                all().find(|server| fresh(*server))
            }
        })
        .unwrap_or(first)
    }

    /// A server by the turns alone.
    fn draw(&self) -> usize {
        let count = self.turns.len();
        if count == 1 {
            return 0;
        }
        let turn = match self.balance {
            Balance::RoundRobin => (self.state.fetch_add(1, Ordering::Relaxed) % count as u64) as usize,
            Balance::Random => {
                let random = mix(self.state.fetch_add(GOLDEN_GAMMA, Ordering::Relaxed));
                // The high half of the product is uniform up to count / 2^64 (Lemire 2019).
                ((u128::from(random) * count as u128) >> 64) as usize
            }
        };
        self.turns[turn] as usize
    }
}

impl Server {
    /// A connection that was used before.
    pub fn take(&self, now_ns: u64) -> Option<Connection> {
        self.pool.take(self.timeouts.idle, now_ns)
    }

    /// Keeps a connection, all of whose response was read, for the next request.
    pub fn put(&self, connection: Connection, now_ns: u64) {
        self.pool.put(connection, now_ns);
    }

    /// A new connection. `receive_buffer`: what the kernel may hold of a response, in bytes.
    ///
    /// # Errors
    /// `ConnectTimedout`, `ConnectError`.
    pub async fn connect(&self, receive_buffer: usize) -> pingora::Result<Connection> {
        let connect = async {
            let socket = if self.address.is_ipv4() {
                TcpSocket::new_v4()?
            } else {
                TcpSocket::new_v6()?
            };
            socket.set_recv_buffer_size(u32::try_from(receive_buffer).unwrap_or(u32::MAX))?;
            let stream = socket.connect(self.address).await?;
            stream.set_nodelay(true)?;
            Ok::<_, std::io::Error>(stream)
        };
        let within = tokio::time::timeout(self.timeouts.connect, connect).await;
        let stream = within
            .or_err_with(ErrorType::ConnectTimedout, || format!("connecting to {}", self.address))?
            .or_err_with(ErrorType::ConnectError, || format!("connecting to {}", self.address))?;
        Ok(Connection::new(Box::new(stream.into())))
    }

    /// How long to wait for what.
    pub fn timeouts(&self) -> &Timeouts {
        &self.timeouts
    }
}

/// Each index as often as its weight, as evenly spread as can be: nginx's smooth weighted round robin, one round of it.
fn turns(weights: &[u32]) -> Box<[u32]> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let weights: Vec<i64> = weights.iter().map(|weight| i64::from(weight / divisor)).collect();
    let total: i64 = weights.iter().sum();
    let mut current = vec![0; weights.len()];
    (0..total)
        .filter_map(|_| {
            for (current, weight) in current.iter_mut().zip(&weights) {
                *current += weight;
            }
            // The first of the largest.
            let best = (0..current.len()).rev().max_by_key(|index| current[*index])?;
            current[best] -= total;
            u32::try_from(best).ok()
        })
        .collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// SplitMix64 (Steele, Lea and Flood 2014): a counter whose every value is scrambled, so that threads need nothing of
/// their own and share one addition.
fn mix(counter: u64) -> u64 {
    let z = (counter ^ (counter >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 2^64 divided by the golden ratio, odd.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;
    use pingora::{ErrorType, RetryType};

    fn upstream(weights: &[u32], balance: Balance) -> Upstream {
        let servers = weights.iter().enumerate().map(|(index, weight)| ServerSettings {
            host: "127.0.0.1".to_owned(),
            address: SocketAddr::from(([127, 0, 0, 1], 1000 + index as u16)),
            weight: *weight,
        });
        let settings = UpstreamSettings {
            name: "u".to_owned(),
            servers: servers.collect(),
            balance,
            tls: None,
            http2: false,
            timeouts: Timeouts {
                connect: Duration::from_secs(1),
                read: Duration::from_secs(1),
                write: Duration::from_secs(1),
                idle: Duration::from_secs(1),
            },
            retries: 1,
            health: None,
        };
        Upstream::new(&settings, 0, None)
    }

    fn shares(upstream: &Upstream, draws: usize) -> Vec<usize> {
        let mut shares = vec![0; upstream.servers.len()];
        for _ in 0..draws {
            shares[upstream.choose(0)] += 1;
        }
        shares
    }

    #[test]
    fn turns_are_shared_by_weight_and_evenly_spread() {
        assert_eq!(*turns(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(*turns(&[20, 10]), [0, 1, 0]);
        assert_eq!(shares(&upstream(&[3, 1], Balance::RoundRobin), 400), [300, 100]);
        let random = shares(&upstream(&[3, 1], Balance::Random), 100_000);
        // Six standard deviations of a binomial with n = 100,000 and p = 3/4 are 822.
        assert!((74_178..=75_822).contains(&random[0]), "{random:?}");
    }

    #[test]
    fn the_share_of_a_server_that_is_down_goes_to_all_others_and_all_down_are_tried_all_the_same() {
        for balance in [Balance::RoundRobin, Balance::Random] {
            let upstream = upstream(&[1, 1, 1], balance);
            upstream.servers[0].health.force(false);
            let shares = shares(&upstream, 3000);
            assert_eq!(shares[0], 0, "{balance:?}");
            assert!(shares[1].abs_diff(shares[2]) < 330, "{balance:?}: {shares:?}");
            for server in &upstream.servers {
                server.health.force(false);
            }
            assert!(
                self::shares(&upstream, 3000).iter().all(|share| *share > 500),
                "{balance:?}"
            );
        }
    }

    #[test]
    fn a_retry_goes_to_another_server_where_there_is_one() {
        let upstream = upstream(&[1, 100], Balance::RoundRobin);
        for _ in 0..300 {
            assert_eq!(upstream.choose(0b10), 0);
            assert_eq!(upstream.choose(0b01), 1);
        }
        upstream.servers[0].health.force(false);
        assert_eq!(upstream.choose(0b10), 0, "down, but not tried yet");
    }

    #[test]
    fn only_what_cannot_have_had_an_effect_is_tried_again() {
        let attempts = |made, allowed| Attempts {
            made,
            allowed,
            tried: 0,
        };
        assert!(attempts(1, 1).again_after_no_connection());
        assert!(!attempts(2, 1).again_after_no_connection());
        assert!(!attempts(1, 0).again_after_no_connection());
        let broke = |context: &'static str, retry| {
            let mut error = Error::explain(ErrorType::ConnectionClosed, context);
            error.retry = retry;
            error
        };
        let nothing = "while reading response headers, bytes already read: 0";
        let ten = "while reading response headers, bytes already read: 10";
        for (context, retry, reused, method, kept, again) in [
            (nothing, RetryType::ReusedOnly, true, Method::GET, true, true),
            (nothing, RetryType::ReusedOnly, true, Method::HEAD, true, true),
            (nothing, RetryType::ReusedOnly, false, Method::GET, true, false),
            (nothing, RetryType::ReusedOnly, true, Method::POST, true, false),
            (nothing, RetryType::ReusedOnly, true, Method::PUT, true, false),
            (nothing, RetryType::ReusedOnly, true, Method::DELETE, true, false),
            (nothing, RetryType::ReusedOnly, true, Method::GET, false, false),
            (nothing, RetryType::Decided(false), true, Method::GET, true, false),
            (ten, RetryType::ReusedOnly, true, Method::GET, true, false),
            ("something else", RetryType::ReusedOnly, true, Method::GET, true, false),
            (
                "while reading h2 header",
                RetryType::Decided(true),
                true,
                Method::GET,
                true,
                true,
            ),
        ] {
            let mut error = broke(context, retry);
            let decided = attempts(1, 1).again_after(&mut error, reused, &method, kept);
            assert_eq!(decided, again, "{context} {retry:?} {reused} {method} {kept}");
        }
        assert!(!attempts(2, 1).again_after(&mut broke(nothing, RetryType::ReusedOnly), true, &Method::GET, true));
    }
}
