//! The only `ProxyHttp`: Pingora's phases, turned into the gate's steps.
//!
//! `request_filter` asks the gate and answers refusals; `upstream_request_filter` takes the credential and everything
//! of our namespace off the request and says whose it is; `response_filter` tells what is left of the limit. Plain
//! requests come to `request_filter` from the edge itself, and go on by the same functions without the other phases
//! (`direct`).

pub mod access_log;
mod at_once;
pub mod client_address;
mod deciding;
mod direct;
pub mod edge;
pub mod embed;
mod fields;
pub mod frames;
pub mod guard;
mod key_counts;
mod metrics;
mod passing_on;
mod phases;
mod recording;
mod request_id;
pub mod response;
mod shared;
pub mod slots;
mod steps;
pub mod strict;
mod telling;
pub mod upstream;
mod wire;

pub use embed::GateProxy;
pub use metrics::{BUCKETS_US, Durations, ProxyMetrics};
pub use response::{Answer, ResponseSettings};
pub use shared::SharedLimits;
pub use steps::refuse;
pub use upstream::health::HealthSettings;
pub use upstream::{Balance, ServerSettings, Timeouts, UpstreamSettings, UpstreamTls};

use crate::clock::{Clock, Now};
use crate::gate::{Gate, Permit, Refusal};
use access_log::{AccessLog, Entry};
use arc_swap::ArcSwap;
use client_address::TrustedProxies;
use http::HeaderValue;
use key_counts::KeyCounts;
use metrics::Times;
use passing_on::{Duty, Peer};
use pingora::connectors::http::Connector;
use pingora::upstreams::peer::HttpPeer;
use request_id::RequestIds;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use steps::OurHeaders;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use upstream::{Attempts, Counts, ServerState, Upstreams};

/// The proxy's settings. Another set can be put in force at any time ([`Proxy::reload`]).
#[derive(Clone, Debug)]
pub struct Settings {
    /// The namespace of our headers: lower case, ends in `-`.
    pub header_prefix: String,
    /// How answers look.
    pub response: ResponseSettings,
    /// Where permitted requests go.
    pub upstreams: Vec<UpstreamSettings>,
    /// How many idle connections are kept to each server that requests go to directly; a reload does not change it.
    pub upstream_pool: usize,
    /// Whose forwarding headers are believed.
    pub trusted_proxies: Vec<client_address::IpNet>,
    /// Count the requests of each key by itself. Decided when the proxy is made; a reload does not change it.
    pub count_keys: bool,
}

/// The proxy behind the strict edge. Clones are the same proxy.
#[derive(Clone, Debug)]
pub struct Proxy(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    gate: Arc<Gate>,
    clock: Clock,
    duty: ArcSwap<Duty>,
    compiled: ArcSwap<Compiled>,
    /// Health checks are begun anew with what a reload brought.
    reloaded: Notify,
    ids: RequestIds,
    access_log: Option<AccessLog>,
    metrics: Arc<ProxyMetrics>,
    key_counts: Option<KeyCounts>,
    in_flight: Arc<AtomicU64>,
    shared: OnceLock<Arc<dyn SharedLimits>>,
}

/// Settings, made ready for the request path.
#[derive(Debug)]
struct Compiled {
    names: OurHeaders,
    response: ResponseSettings,
    upstreams: Upstreams,
    trusted_proxies: TrustedProxies,
}

/// A header prefix that cannot start a header's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadHeaderPrefix(pub String);

impl Proxy {
    /// A proxy that asks `gate`.
    ///
    /// # Errors
    /// [`BadHeaderPrefix`].
    pub fn new(
        settings: &Settings,
        gate: Arc<Gate>,
        clock: Clock,
        access_log: Option<AccessLog>,
    ) -> Result<Self, BadHeaderPrefix> {
        Ok(Proxy(Arc::new(Inner {
            gate,
            clock,
            duty: ArcSwap::from_pointee(Duty::Decide),
            compiled: ArcSwap::from_pointee(Compiled::new(
                settings,
                Upstreams::new(&settings.upstreams, settings.upstream_pool),
            )?),
            reloaded: Notify::new(),
            ids: RequestIds::default(),
            access_log,
            metrics: Arc::new(ProxyMetrics::default()),
            key_counts: settings.count_keys.then(KeyCounts::default),
            in_flight: Arc::default(),
            shared: OnceLock::new(),
        })))
    }

    /// Puts other settings in force for requests that come from now on.
    ///
    /// # Errors
    /// [`BadHeaderPrefix`]; the old settings then stay.
    pub fn reload(&self, settings: &Settings) -> Result<(), BadHeaderPrefix> {
        let upstreams = self.0.compiled.load().upstreams.changed_to(&settings.upstreams);
        let compiled = Compiled::new(settings, upstreams)?;
        self.0.compiled.store(Arc::new(compiled));
        self.0.reloaded.notify_one();
        Ok(())
    }

    /// Requests by key id and decision, where they are counted.
    pub fn key_requests(&self) -> Vec<(Box<str>, &'static str, u64)> {
        self.0.key_counts.as_ref().map(KeyCounts::read).unwrap_or_default()
    }

    /// Every server of every upstream.
    pub fn servers(&self) -> Vec<ServerState> {
        self.0.compiled.load().upstreams.servers()
    }

    /// Whether some upstream can be reached on the direct way.
    fn has_direct_way(&self) -> bool {
        self.0.compiled.load().upstreams.is_any_plain()
    }

    /// What is counted of every upstream: its name, connections that did not come about, requests tried once more.
    pub fn upstream_counts(&self) -> Vec<(String, u64, u64)> {
        let compiled = self.0.compiled.load();
        let read = |(name, counts): (&str, &Counts)| {
            let failures = counts.connect_failures.load(Ordering::Relaxed);
            (name.to_owned(), failures, counts.retries.load(Ordering::Relaxed))
        };
        compiled.upstreams.counts().map(read).collect()
    }

    /// Looks after the upstreams of whatever settings are in force, until it is dropped: runs their health checks, and
    /// closes connections that have rested too long.
    pub async fn look_after_upstreams(&self) {
        let connector = Arc::new(Connector::new(None));
        let mut tick = tokio::time::interval(CLOSING_INTERVAL);
        loop {
            let compiled = self.0.compiled.load_full();
            let mut checks = JoinSet::new();
            for check in compiled.upstreams.checks() {
                checks.spawn(check.clone().run(connector.clone()));
            }
            loop {
                tokio::select! {
                    () = self.0.reloaded.notified() => break,
                    _ = tick.tick() => compiled.upstreams.close_old(self.0.clock.now().elapsed_ns),
                }
            }
        }
    }

    /// Lets requests wait for permits of limits that the gate shares with others ([`Gate::sharing_limits`]). Once.
    pub fn share_limits(&self, limits: Arc<dyn SharedLimits>) {
        // A second time would be a mistake of ours; the first one holds.
        let _ = self.0.shared.set(limits);
    }

    /// What has been counted.
    pub fn metrics(&self) -> Arc<ProxyMetrics> {
        self.0.metrics.clone()
    }

    /// How many requests are under way.
    pub fn in_flight(&self) -> Arc<AtomicU64> {
        self.0.in_flight.clone()
    }

    /// Logs and counts a request that the edge refused.
    pub fn log_refused_at_the_edge(&self, client: Option<SocketAddr>, refusal: &edge::EdgeRefusal, request_id: &str) {
        self.0.metrics.record(refusal.code, None, refusal.status, None);
        let Some(access_log) = &self.0.access_log else { return };
        access_log.log(&Entry {
            unix_ms: self.0.clock.now().unix_ms,
            client: client.map(|client| client.ip()),
            request_id,
            // Nothing that was sent is repeated: it could not be read in one way only.
            method: "-",
            host: "",
            path: "-",
            status: refusal.status,
            decision: refusal.code,
            route: "",
            tier: "",
            key_id: "",
            organization: "",
            duration_us: 0,
            upstream_us: 0,
            bytes_sent: 0,
            traceparent: "",
        });
    }
}

impl Compiled {
    fn new(settings: &Settings, upstreams: Upstreams) -> Result<Self, BadHeaderPrefix> {
        Ok(Compiled {
            names: OurHeaders::new(&settings.header_prefix)?,
            response: settings.response.clone(),
            upstreams,
            trusted_proxies: TrustedProxies::new(settings.trusted_proxies.clone()),
        })
    }
}

/// What is remembered of a request between the phases.
#[derive(Debug)]
pub struct Context {
    now: Now,
    peer: Option<Peer>,
    /// By what trusted proxies say, the peer itself where they say nothing.
    client: IpAddr,
    request_id: Option<HeaderValue>,
    permit: Option<Permit>,
    refusal: Option<Refusal>,
    decision: &'static str,
    upstream_started: Option<Now>,
    /// The head of the upstream's response, or its failure.
    upstream_answered: Option<Now>,
    /// The last byte of its response.
    upstream_ended: Option<Now>,
    attempts: Attempts,
    /// The process that this request is passed on to, instead of being decided here.
    passed_on: Option<Box<HttpPeer>>,
    _under_way: UnderWay,
}

impl Context {
    /// How long the parts of the request took that ends `now`.
    fn times(&self, now: Now) -> Times {
        let Some(started) = self.upstream_started else {
            return Times {
                decision_us: None,
                overhead_us: us_between(self.now, now),
                upstream_us: None,
            };
        };
        let decision_us = us_between(self.now, started);
        let answered = self.upstream_answered.unwrap_or(now);
        Times {
            decision_us: Some(decision_us),
            overhead_us: decision_us + us_between(self.upstream_ended.unwrap_or(answered), now),
            upstream_us: Some(us_between(started, answered)),
        }
    }
}

fn us_between(earlier: Now, later: Now) -> u64 {
    later.elapsed_ns.saturating_sub(earlier.elapsed_ns) / 1000
}

/// Counts a request as under way until it is dropped.
#[derive(Debug)]
struct UnderWay(Arc<AtomicU64>);

impl UnderWay {
    fn new(count: &Arc<AtomicU64>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        UnderWay(count.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How often idle connections are looked at: a server's end stays unanswered for no longer.
const CLOSING_INTERVAL: Duration = Duration::from_secs(1);

/// How many fields a response gets: at most six of ours, and the two that Pingora adds.
const FIELDS_ADDED: usize = 8;

/// The decision of a request that passed.
pub const PASSED: &str = "PASSED";

/// How long a refused request's body is read on, so that the connection stays usable.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// The longest body that is read on so. More takes longer than a new connection.
pub const DRAINED_BYTES: u64 = 64 * 1024;
