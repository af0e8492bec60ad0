//! The checked configuration: plain data that needs no further checking.
//!
//! Every name in here refers to something that exists, every address is well formed, every number is within its
//! range. [`crate::app`] maps it to each module's own settings.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Everything that one process is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The gate's role; absent where the process is a control plane only.
    pub gate: Option<Gate>,
    pub keys: Keys,
    /// In the order of the file, without repetition.
    pub scopes: Vec<Scope>,
    /// In the order of the file.
    pub tiers: Vec<Tier>,
    pub plans: Vec<Plan>,
    pub upstreams: Vec<Upstream>,
    /// In the order of the file; with a gate there is always one that matches every request (see [`Route::is_catch_all`]).
    pub routes: Vec<Route>,
    /// The control plane's role; absent where the process is a gate only.
    pub control: Option<Control>,
    pub admin: Option<Admin>,
    pub cluster: Option<Cluster>,
    pub log: Log,
}

/// The gate and its edge.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    /// This gate's name towards the control plane, the spool and the cluster; stable across restarts.
    pub name: String,
    /// Worker threads; `None`: as many as cores.
    pub threads: Option<usize>,
    /// At least one.
    pub listen: Vec<Listener>,
    /// Lower case, ends in `-`: the namespace of the headers that the gate sets and clients may not.
    pub header_prefix: String,
    /// The realm in `WWW-Authenticate`.
    pub realm: String,
    /// Spool, journal and `run/*.addr`.
    pub state_dir: PathBuf,
    pub feed: Feed,
    /// The name of the upstream of requests that no route matches; the same as that of the route that matches all.
    pub default_upstream: String,
    /// Networks whose forwarding headers are believed.
    pub trusted_proxies: Vec<Network>,
    pub limits: Limits,
    pub failed_attempts: FailedAttempts,
    pub rate_limit_headers: RateLimitHeaders,
    pub paths: Paths,
    /// How long requests in flight may take to finish after TERM.
    pub shutdown_grace: Duration,
}

/// One socket that the gate listens on.
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    /// `HOST:PORT`, an IP address literal or `localhost`; port 0 is allowed.
    pub address: String,
    pub tls: Option<ListenerTls>,
    /// HTTP/2: by ALPN over TLS, by prior knowledge (h2c) without.
    pub http2: bool,
    /// Each connection starts with a PROXY protocol v2 header from a trusted proxy.
    pub proxy_protocol: bool,
}

/// TLS towards clients.
#[derive(Clone, Debug, PartialEq)]
pub struct ListenerTls {
    /// At least one; the first is shown to clients whose SNI fits none. Names are read from the certificates.
    pub certificates: Vec<Certificate>,
    pub min_version: TlsVersion,
    /// Clients must show a certificate signed by one of these.
    pub client_ca: Option<PathBuf>,
}

/// A certificate chain and its key, as PEM files, re-read when they change.
#[derive(Clone, Debug, PartialEq)]
pub struct Certificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    Tls12,
    Tls13,
}

/// Where the gate's keys come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Feed {
    pub source: FeedSource,
    /// Answer 503 when the snapshot has not been confirmed for this long; `None`: never.
    pub max_staleness: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum FeedSource {
    /// A control endpoint, `http://` or `https://` without a path.
    Url {
        url: String,
        token: Secret,
        tls: Option<ClientTls>,
    },
    /// A static key file, re-read when it changes.
    File { path: PathBuf },
    /// The control plane of this process, over HTTP all the same; the token is [`Control::feed_token`].
    Control,
}

/// TLS as a client.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientTls {
    /// Server name to ask for and to verify; `None`: the host of the address.
    pub sni: Option<String>,
    /// Certificate authorities (PEM) to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// What we show for mutual TLS.
    pub certificate: Option<Certificate>,
    /// Accept any certificate. For tests only.
    pub danger_skip_verify: bool,
}

/// An address block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    pub address: std::net::IpAddr,
    /// Leading bits that count, at most 32 (IPv4) or 128 (IPv6). Bits of `address` beyond it are 0.
    pub prefix_length: u8,
}

/// Bounds on what one client can make the gate hold. Durations and sizes are never 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub head_bytes: usize,
    pub head_fields: usize,
    pub target_bytes: usize,
    /// From the first byte of a request head to its last, in all.
    pub head_deadline: Duration,
    /// For the TLS handshake, and for a PROXY header.
    pub handshake_deadline: Duration,
    /// Between two requests on a kept-alive connection.
    pub idle_timeout: Duration,
    /// The longest pause in a request body.
    pub body_grace: Duration,
    /// The longest time in which a client takes nothing of a response.
    pub response_grace: Duration,
    /// What a body, or a response being taken, must keep up.
    pub min_bytes_per_second: u32,
    /// Silence in both directions of an upgraded connection.
    pub upgraded_idle: Duration,
    pub connections: usize,
    pub connections_per_address: usize,
    /// Requests on one connection before it is closed; `None`: no limit.
    pub requests_per_connection: Option<u32>,
    /// Concurrent streams of one HTTP/2 connection.
    pub h2_streams: u32,
    pub h2_resets_per_minute: u32,
    pub h2_control_frames_per_second: u32,
    /// Idle connections kept to upstreams.
    pub upstream_pool: usize,
}

/// Bad credentials that one client address may send in a window before it is answered 429.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedAttempts {
    pub limit: u32,
    pub window: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimitHeaders {
    /// `RateLimit-Policy` and `RateLimit`.
    pub standard: bool,
    /// `X-RateLimit-Limit`, `-Remaining` and `-Reset` (delta seconds).
    pub legacy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paths {
    /// Refuse what two readers could read differently.
    Strict,
    /// Let `//`, `;` and encoded slashes pass.
    Relaxed,
}

/// What a key looks like, and how it is rotated.
#[derive(Clone, Debug, PartialEq)]
pub struct Keys {
    pub checksum: Checksum,
    pub foreign: Foreign,
    /// At least one, in the order of the file; no prefix is the start of another.
    pub environments: Vec<Environment>,
    pub rotation: Rotation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    Required,
    /// Keys with our prefixes but without a right checksum are looked up too.
    Optional,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    Refuse,
    /// Keys of any form, 16 to 128 visible ASCII characters, are looked up.
    Accept,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    pub name: String,
    pub prefix: String,
    /// Environments that are not billed are sandboxes: they go to a route's `sandbox_upstream`.
    pub billed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    /// At most `max_grace`; may be 0.
    pub default_grace: Duration,
    /// At most 30 days.
    pub max_grace: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    pub name: String,
    pub description: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    pub name: String,
    /// 1 to 2^31 − 1 permits in any `window`.
    pub limit: u32,
    /// 1 s to 30 days, whole milliseconds.
    pub window: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub name: String,
    /// Requests of one key in flight at once; `None`: no cap.
    pub max_in_flight: Option<u32>,
    /// Limits by tier name that differ from the tiers' own; 1 to 2^31 − 1.
    pub limits: BTreeMap<String, u32>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    pub name: String,
    pub target: UpstreamTarget,
    pub timeouts: Timeouts,
    /// Other servers tried for a request that has had no effect yet: it could not be connected, or is safe to repeat.
    pub retries: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub enum UpstreamTarget {
    /// The control plane of this process.
    Control,
    Servers(Servers),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Servers {
    /// At least one.
    pub servers: Vec<Server>,
    pub balance: Balance,
    pub health: Option<Health>,
    pub tls: Option<ClientTls>,
    pub protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// `HOST:PORT`; the host may be a name.
    pub address: String,
    /// 1 to 1,000: its share of the requests.
    pub weight: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    RoundRobin,
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    /// HTTP/2: by ALPN over TLS, by prior knowledge without.
    Http2,
}

/// Active health checks of each server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Answered with 200 to 299 by a healthy server.
    pub path: String,
    pub every: Duration,
    /// At most `every`.
    pub timeout: Duration,
    /// Failures in a row that take a server out.
    pub unhealthy_after: u32,
    /// Successes in a row that bring it back.
    pub healthy_after: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    /// Between two reads of a response.
    pub read: Duration,
    pub write: Duration,
    /// An unused pooled connection is closed after this.
    pub idle: Duration,
}

/// One rule: what it matches and what it asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    pub name: String,
    /// Lower case, without a port; `None`: any host.
    pub host: Option<String>,
    /// Upper case, without repetition; empty: any method.
    pub methods: Vec<String>,
    pub path: PathPattern,
    pub access: Access,
    /// The name of an upstream.
    pub upstream: String,
    /// The name of the upstream for environments that are not billed.
    pub sandbox_upstream: Option<String>,
    /// Let `Upgrade` (WebSocket) through.
    pub upgrade: bool,
}

impl Route {
    /// Matches every request.
    pub fn is_catch_all(&self) -> bool {
        self.host.is_none() && self.methods.is_empty() && self.path.segments.is_empty() && self.path.and_below
    }
}

/// `/a/*/c/**`: segments, and whether everything below matches too.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathPattern {
    pub segments: Vec<Segment>,
    /// Ends in `/**`: matches the prefix itself and everything below it.
    pub and_below: bool,
    /// Ends in `/`: a pattern `/a/` differs from `/a`. Never together with `and_below`.
    pub trailing_slash: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Segment {
    /// As it stands in a canonical path, compared byte for byte.
    Literal(String),
    /// `*`: exactly one segment, not empty.
    Any,
}

impl fmt::Display for PathPattern {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for segment in &self.segments {
            match segment {
                Segment::Literal(text) => write!(out, "/{text}")?,
                Segment::Any => out.write_str("/*")?,
            }
        }
        match (self.and_below, self.trailing_slash || self.segments.is_empty()) {
            (true, _) => out.write_str("/**"),
            (false, true) => out.write_str("/"),
            (false, false) => Ok(()),
        }
    }
}

/// Who may pass a route.
#[derive(Clone, Debug, PartialEq)]
pub enum Access {
    /// Without a key.
    Public {
        /// Requests of one client address in a window; `None`: no limit.
        limit: Option<PublicLimit>,
    },
    /// With a valid key.
    Key {
        /// The scope that the key must hold; `None`: any valid key.
        scope: Option<String>,
        /// The name of a tier.
        tier: String,
        /// Names of environments; empty: all.
        environments: Vec<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublicLimit {
    pub limit: u32,
    pub window: Duration,
}

/// The control plane.
#[derive(Clone, Debug, PartialEq)]
pub struct Control {
    /// `HOST:PORT`; port 0 is allowed.
    pub address: String,
    pub tls: Option<ListenerTls>,
    pub database: Database,
    pub feed_token: Secret,
    pub admin_token: Secret,
    /// `http://` or `https://`, no path, no trailing slash; `None`: what the client used.
    pub public_url: Option<String>,
    pub registration: Registration,
    /// `run/control.addr`; the gate's state directory where the process is a gate too.
    pub state_dir: PathBuf,
    /// The plan of a new organisation; the name of a plan.
    pub default_plan: String,
    pub registrations_per_hour: u32,
    /// Failed sign-ins of one account, and of one address, in 15 minutes.
    pub login_attempts: u32,
    /// Proxies whose forwarding headers are believed, as in [`Gate::trusted_proxies`].
    pub trusted_proxies: Vec<Network>,
    pub retention: Retention,
}

/// How long what grows without end is kept; `None`: for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Lines of the audit log.
    pub audit: Option<Duration>,
    /// Usage by the minute, which is then kept by the hour.
    pub usage_by_minute: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Database {
    Sqlite {
        path: PathBuf,
    },
    /// The whole `postgres://` URL, which may hold a password.
    Postgres {
        url: Secret,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    Open,
    Invite,
    Off,
}

/// The operator's listener.
#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    /// `HOST:PORT`; port 0 is allowed.
    pub address: String,
    /// Put key ids into metrics.
    pub key_labels: bool,
}

/// Counts shared between gates.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// `redis://` or `rediss://`, at least one; may hold a password.
    pub urls: Vec<Secret>,
    pub mode: ClusterMode,
    pub on_loss: OnLoss,
    /// How long a request waits for a reservation.
    pub wait: Duration,
    /// Without a full answer for so long the store counts as lost; longer than `wait`.
    pub lost_after: Duration,
    /// The largest difference between the clocks of two gates.
    pub max_clock_skew: Duration,
    /// What the names of our keys in the store start with.
    pub key_prefix: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterMode {
    Single,
    /// `urls` name Sentinels that watch this master.
    Sentinel {
        master: String,
    },
    Cluster,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    Share,
    Closed,
    Local,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    pub level: Level,
    pub format: Format,
    pub path: Output,
    /// `None`: no access log.
    pub access: Option<AccessLog>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    pub format: Format,
    pub path: Output,
    /// Lines that may wait to be written before more are dropped (and counted).
    pub buffer_lines: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Text,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Stdout,
    Stderr,
    File(PathBuf),
}

/// A value that is never shown: not by `Debug`, not by `config show`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself. Named so that every place where it leaves the type can be found.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret(…)")
    }
}

impl serde::Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("…")
    }
}
