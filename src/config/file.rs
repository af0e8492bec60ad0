//! The shapes of the YAML file: what may be written, with its defaults. Checked against each other in `resolve`.
//!
//! The doc comments are the texts of the JSON Schema and of the reference page. A default says where it comes from.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::{Ipv4Addr, Ipv6Addr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::scalar::{BaseUrl, Bytes, ListenAddress, NetworkText, ServerAddress, Span};
use super::settings::Network;

/// 2^31 − 1: what a window can count (31 bits).
const MOST_PERMITS: u32 = 0x7fff_ffff;

/// The whole configuration of one process.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "Tollgate's configuration")]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    /// The version of this format: 1.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// The gate: listens for clients, checks keys and limits, forwards. Leave it out on a machine that is a control plane only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<Gate>,
    /// What keys look like and how they are rotated. Gate and control plane must agree on it.
    #[serde(default)]
    pub keys: Keys,
    /// Every scope that a key can hold: a list of names, or of `{name, description}`, or a mapping of names to descriptions.
    #[serde(default)]
    pub scopes: Scopes,
    /// Limits, by tier name. Each key has one window per tier. Routes that name no tier use `default`.
    #[serde(default)]
    pub tiers: Named<Tier>,
    /// Plans, by name: what an organisation's keys get instead of the tiers' own limits. Left out: one plan, `starter`, that changes nothing.
    #[serde(default)]
    pub plans: Named<Plan>,
    /// The servers behind the gate, by name. `control` means the control plane of the same process, unless it is defined here.
    #[serde(default)]
    pub upstreams: Named<Upstream>,
    /// The rules. The most specific one wins, whatever the order: a host before none, literal segments before `*` before `**`, methods before none.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// The control plane: issues keys, serves the feed, the API and the portal. Leave it out on a machine that is a gate only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<Control>,
    /// The operator's listener: `/metrics`, `/livez`, `/readyz`, `/status`, `POST /reload`. Keep it on loopback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<Admin>,
    /// Counts shared between gates through Valkey or Redis. Left out: each gate counts for itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<Cluster>,
    /// Logs of the process and of requests.
    #[serde(default)]
    pub log: Log,
}

/// The gate.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Gate {
    /// This gate's name, the same across restarts and different from every other gate's.
    #[serde(default = "gate_name")]
    pub name: String,
    /// Worker threads; `auto`: as many as cores.
    #[serde(default)]
    pub threads: Threads,
    /// Where to listen for clients.
    #[schemars(length(min = 1))]
    pub listen: Vec<Listener>,
    /// What the headers that the gate sets for the upstream begin with; the same headers from clients are removed.
    #[serde(default = "header_prefix")]
    pub header_prefix: String,
    /// The realm named in `WWW-Authenticate`.
    #[serde(default = "realm")]
    pub realm: String,
    /// Directory of spool, journal and `run/*.addr`. A relative path starts at the configuration file's directory, as every path here.
    #[serde(default = "state_dir")]
    pub state_dir: String,
    /// Where keys come from. May be left out where the same file has a `control` section: then from there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed: Option<Feed>,
    /// The upstream of requests that no route matches (any valid key, tier `default`). Left out: the upstream called `default`, or the only one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_upstream: Option<String>,
    /// Networks of proxies in front of the gate, whose forwarding headers (`X-Forwarded-For`, `Forwarded`) and PROXY protocol are believed.
    #[serde(default)]
    pub trusted_proxies: Vec<NetworkText>,
    /// Bounds on what one client can make the gate hold.
    #[serde(default)]
    pub limits: Limits,
    /// Bad credentials that one client address may send in a window before it is answered 429. Valid keys are never delayed.
    #[serde(default)]
    pub failed_attempts: FailedAttempts,
    /// Which rate limit headers answers carry.
    #[serde(default)]
    pub rate_limit_headers: RateLimitHeaders,
    /// `strict`: what two readers could read differently is refused. `relaxed`: for upstreams that need `//`, `;` or `%2F` in paths; dot segments, backslashes and control bytes are refused all the same.
    #[serde(default)]
    pub paths: Paths,
    /// How long requests in flight may take to finish after TERM. 30 s: what Kubernetes and Docker users expect before a KILL.
    #[serde(default = "shutdown_grace")]
    pub shutdown_grace: Span,
}

fn gate_name() -> String {
    "gate-1".to_owned()
}

fn header_prefix() -> String {
    "x-tollgate-".to_owned()
}

fn realm() -> String {
    "tollgate".to_owned()
}

fn state_dir() -> String {
    "/var/lib/tollgate".to_owned()
}

fn shutdown_grace() -> Span {
    Span::secs(30)
}

/// `auto` or a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Threads {
    #[default]
    Auto,
    Number(u16),
}

impl Serialize for Threads {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Number(number) => serializer.serialize_u16(*number),
        }
    }
}

impl<'de> Deserialize<'de> for Threads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Auto {
            Auto,
        }
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u16),
            Auto(Auto),
        }
        Ok(match Either::deserialize(deserializer)? {
            Either::Number(number) => Self::Number(number),
            Either::Auto(Auto::Auto) => Self::Auto,
        })
    }
}

impl JsonSchema for Threads {
    fn schema_name() -> Cow<'static, str> {
        "Threads".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": 1024}]})
    }
}

/// One socket.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Listener {
    /// An IP address (or `localhost`) and a port; port 0 takes a free one.
    pub address: ListenAddress,
    /// Serve TLS here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,
    /// Offer HTTP/2: by ALPN over TLS, by prior knowledge (h2c) without.
    #[serde(default = "yes")]
    pub http2: bool,
    /// Every connection begins with a PROXY protocol v2 header; only from `gate.trusted_proxies`.
    #[serde(default)]
    pub proxy_protocol: bool,
}

fn yes() -> bool {
    true
}

/// TLS towards clients. Certificates are read again when their files change.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ListenerTls {
    /// The certificate chain, a PEM file. Together with `key`, or instead `certificates`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<String>,
    /// The private key, a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Several certificates, chosen by the name that the client asks for (SNI); the first serves all others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub certificates: Vec<Certificate>,
    /// The lowest version of TLS.
    #[serde(default)]
    pub min_version: TlsVersion,
    /// Ask clients for a certificate signed by one of these authorities, a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<String>,
}

/// A certificate chain and its private key, PEM files.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Certificate {
    /// The certificate chain, a PEM file.
    pub cert: String,
    /// The private key, a PEM file.
    pub key: String,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub(super) enum TlsVersion {
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    #[serde(rename = "1.3")]
    Tls13,
}

/// Where keys come from: a control plane (`url` and `token` or `token_file`) or a static file (`file`).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Feed {
    /// The control plane.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<BaseUrl>,
    /// The feed token. Better in a file (`token_file`) or as `${VARIABLE}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<SecretText>,
    /// A file that holds the feed token; white space around it does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<String>,
    /// TLS towards the control plane, also mutual.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ClientTls>,
    /// A file of key lines, read again when it changes; `tollgate keys hash` makes a line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Answer 503 when the control plane was not heard for this long. Left out: serve on from what is known, however old.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_staleness: Option<Span>,
}

/// TLS as a client.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ClientTls {
    /// The server's name, asked for and verified. Left out: the host of the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sni: Option<String>,
    /// Authorities to trust instead of the system's, a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// The certificate to show (mutual TLS), a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<String>,
    /// Its private key, a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Accept any certificate: for tests only.
    #[serde(default)]
    pub danger_skip_verify: bool,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Paths {
    #[default]
    Strict,
    Relaxed,
}

/// Bounds on what one client can make the gate hold.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Limits {
    /// Largest request head. 32 KiB: nginx has 4 × 8 KiB.
    pub head_bytes: Bytes,
    /// Most header fields of a request. 100: Apache's `LimitRequestFields`.
    #[schemars(range(min = 1, max = 1000))]
    pub head_fields: u32,
    /// Longest request target. 8 KiB: nginx's limit, and what RFC 9112 asks every server to support.
    pub target_bytes: Bytes,
    /// From the first byte of a request head to its last, in all, on TLS and plain. 10 s: a slow mobile link sends 32 KiB in that time.
    pub head_deadline: Span,
    /// For the whole TLS handshake, and for a PROXY header. 10 s, as for the head.
    pub handshake_deadline: Span,
    /// A kept-alive connection without a request is closed after this. 60 s: Pingora's default.
    pub idle_timeout: Span,
    /// Longest pause within a request body. 20 s: Apache's `mod_reqtimeout`.
    pub body_grace: Span,
    /// Longest time in which a client takes nothing of an answer. 60 s: nginx's `send_timeout`.
    pub response_grace: Span,
    /// Bytes a second that a request body, or an answer being taken, must keep up. 500: Apache's `mod_reqtimeout`.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub min_bytes_per_second: u32,
    /// Longest silence, in both directions, of an upgraded connection (WebSocket). 1 h: longer than any heartbeat in use.
    pub upgraded_idle: Span,
    /// Client connections in all. 20,000: about 120 MB at rest.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections: u32,
    /// Client connections of one IPv4 address or IPv6 /64; trusted proxies are exempt. 1,000: an office behind one address, not a flood.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections_per_address: u32,
    /// Requests on one connection before it is closed. Left out: no limit, since nothing grows with their number.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub requests_per_connection: Option<u32>,
    /// Streams of one HTTP/2 connection at once. 100: the least that RFC 9113 recommends.
    #[schemars(range(min = 1, max = 10_000))]
    pub h2_streams: u32,
    /// Streams that a client may reset in a minute before its connection is closed. 1,000: no browser comes near, a rapid-reset attack needs more in a second.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub h2_resets_per_minute: u32,
    /// HTTP/2 frames without content that a client may send in a second. 1,000: an upload that opens its window with every frame needs less.
    #[schemars(range(min = 10, max = 1_000_000))]
    pub h2_control_frames_per_second: u32,
    /// Idle upstream connections kept. 128: Pingora's default.
    #[schemars(range(min = 0, max = 100_000))]
    pub upstream_pool: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_bytes: Bytes(32 * 1024),
            head_fields: 100,
            target_bytes: Bytes(8 * 1024),
            head_deadline: Span::secs(10),
            handshake_deadline: Span::secs(10),
            idle_timeout: Span::secs(60),
            body_grace: Span::secs(20),
            response_grace: Span::secs(60),
            min_bytes_per_second: 500,
            upgraded_idle: Span::secs(3600),
            connections: 20_000,
            connections_per_address: 1_000,
            requests_per_connection: None,
            h2_streams: 100,
            h2_resets_per_minute: 1_000,
            h2_control_frames_per_second: 1_000,
            upstream_pool: 128,
        }
    }
}

/// A throttle of failures. 30 a minute: a person who mistypes never meets it, a guesser gains nothing.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct FailedAttempts {
    /// Failures in a window.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub limit: u32,
    /// 1 s to 1 h.
    pub window: Span,
}

impl Default for FailedAttempts {
    fn default() -> Self {
        Self {
            limit: 30,
            window: Span::secs(60),
        }
    }
}

/// Rate limit headers.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RateLimitHeaders {
    /// `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10).
    pub standard: bool,
    /// `X-RateLimit-Limit`, `X-RateLimit-Remaining` and `X-RateLimit-Reset` (delta seconds), for older clients.
    pub legacy: bool,
}

impl Default for RateLimitHeaders {
    fn default() -> Self {
        Self {
            standard: true,
            legacy: false,
        }
    }
}

/// What keys look like and how they are rotated.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Keys {
    /// `required`: keys with our prefixes must carry a right checksum. `optional`: older ones without it are looked up too.
    pub checksum: Checksum,
    /// `refuse`: only keys with our prefixes. `accept`: imported keys of any form, 16 to 128 visible ASCII characters.
    pub foreign: Foreign,
    /// Environments by name, each with the prefix of its keys. Left out: `live` (billed), `test` and `dev` with `pxk_live_`, `pxk_test_`, `pxk_dev_`.
    #[schemars(with = "Named<Environment>")]
    pub environments: Environments,
    /// How long an old secret lives beside the new one.
    pub rotation: Rotation,
}

/// The environments, with those of section `keys` if none are given.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Environments(pub Named<Environment>);

impl Default for Environments {
    fn default() -> Self {
        let environment = |name: &str, billed| {
            (
                name.to_owned(),
                Environment {
                    prefix: format!("pxk_{name}_"),
                    billed,
                },
            )
        };
        Self(Named(vec![
            environment("live", true),
            environment("test", false),
            environment("dev", false),
        ]))
    }
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Checksum {
    #[default]
    Required,
    Optional,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Foreign {
    #[default]
    Refuse,
    Accept,
}

/// One environment.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Environment {
    /// What its keys begin with: letters, digits and `_`, at most 19 characters (a key stays within one SHA-256 block), ending in `_`.
    pub prefix: String,
    /// Its requests are billed. Environments that are not billed are sandboxes: they go to a route's `sandbox_upstream`.
    #[serde(default)]
    pub billed: bool,
}

/// Rotation of keys.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Rotation {
    /// How long the old secret lives if the caller does not say. 24 h: what PlatformXe documents.
    pub default_grace: Span,
    /// The most that a caller may ask for; at most 30d.
    pub max_grace: Span,
}

impl Default for Rotation {
    fn default() -> Self {
        Self {
            default_grace: Span::secs(24 * 3600),
            max_grace: Span::secs(30 * 24 * 3600),
        }
    }
}

/// Scopes in any of their forms.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub(super) enum Scopes {
    List(Vec<Scope>),
    Described(Named<ScopeText>),
}

impl Default for Scopes {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

/// A scope in a list.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub(super) enum Scope {
    Name(String),
    Described(DescribedScope),
}

/// A scope and what it grants.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct DescribedScope {
    /// Such as `messaging:send`: what comes before the colon groups scopes in the portal.
    pub name: String,
    /// What it grants, for the portal and `GET /api/v1/scopes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// What a scope grants: the text, or `{description: …}`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub(super) enum ScopeText {
    Text(String),
    Mapping(ScopeDescription),
}

/// What a scope grants.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ScopeDescription {
    /// What the scope grants.
    pub description: String,
}

/// A limit: in no interval of length `window` are more than `limit` permits given to one key.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Tier {
    /// Permits in a window.
    #[schemars(range(min = 1, max = MOST_PERMITS))]
    pub limit: u32,
    /// 1 s to 30 days.
    pub window: Span,
}

/// What the keys of an organisation on this plan get.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Plan {
    /// Requests of one key in flight at once. Left out: no cap.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_in_flight: Option<u32>,
    /// Limits by tier, instead of the tiers' own; their windows stay.
    pub tiers: Named<PlanTier>,
}

/// A plan's limit in one tier.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PlanTier {
    /// Permits in the tier's window.
    #[schemars(range(min = 1, max = MOST_PERMITS))]
    pub limit: u32,
}

/// Servers that answer the same requests.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Upstream {
    /// `HOST:PORT`, or `{address, weight}`.
    #[schemars(length(min = 1))]
    pub servers: Vec<Server>,
    /// How the next server is chosen.
    #[serde(default)]
    pub balance: Balance,
    /// Active health checks. Left out: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// How long a server may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// TLS towards the servers; `{}` is enough where the address is the certificate's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ClientTls>,
    /// `http1`, or `http2` (which gRPC needs): by ALPN over TLS, by prior knowledge without.
    #[serde(default)]
    pub protocol: Protocol,
    /// Further tries of a request that could not be connected, or that is safe to repeat. 1: covers one dead server.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 10))]
    pub retries: u32,
}

fn one() -> u32 {
    1
}

/// A server, with or without a weight.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub(super) enum Server {
    Address(ServerAddress),
    Weighted(WeightedServer),
}

/// A server and its share.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightedServer {
    /// `HOST:PORT`.
    pub address: ServerAddress,
    /// Its share of the requests, against the other servers'.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1000))]
    pub weight: u32,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Balance {
    #[default]
    RoundRobin,
    Random,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Protocol {
    #[default]
    Http1,
    Http2,
}

/// Active health checks of each server.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Health {
    /// Asked with GET; 200 to 299 is healthy.
    pub path: String,
    /// Time between two checks. 5 s: finds a dead server soon at no load worth naming.
    #[serde(default = "health_every")]
    pub every: Span,
    /// Longest wait for an answer; at most `every`.
    #[serde(default = "health_timeout")]
    pub timeout: Span,
    /// Failures in a row that take a server out. 3: one lost packet is none.
    #[serde(default = "unhealthy_after")]
    #[schemars(range(min = 1, max = 100))]
    pub unhealthy_after: u32,
    /// Successes in a row that bring it back. 2: not at the first answer of a start.
    #[serde(default = "healthy_after")]
    #[schemars(range(min = 1, max = 100))]
    pub healthy_after: u32,
}

fn health_every() -> Span {
    Span::secs(5)
}

fn health_timeout() -> Span {
    Span::secs(1)
}

fn unhealthy_after() -> u32 {
    3
}

fn healthy_after() -> u32 {
    2
}

/// How long a server may take.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Timeouts {
    /// To connect, the TLS handshake included. 2 s: one lost SYN is repeated after 1 s.
    pub connect: Span,
    /// Longest pause of the server within an answer, and before it. 30 s.
    pub read: Span,
    /// Longest pause of the server in taking a request. 30 s.
    pub write: Span,
    /// A pooled connection that was not used for so long is closed. 50 s: below the 60 s after which many servers close theirs.
    pub idle: Span,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Span::secs(2),
            read: Span::secs(30),
            write: Span::secs(30),
            idle: Span::secs(50),
        }
    }
}

/// A rule.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Route {
    /// Names the rule in logs and faults.
    pub name: String,
    /// Which requests it is for.
    #[serde(rename = "match")]
    pub matches: Match,
    /// The scope that a key must hold. Left out: any valid key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// The tier whose window a request is counted in. Left out: `default`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// Environments whose keys may pass. Left out: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environments: Option<Vec<String>>,
    /// No key is asked for. `{}`: no limit either; `{limit, window}`: that many requests of one client address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public: Option<Public>,
    /// Where requests go; `control`: to the control plane of this process. Left out: the default upstream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// Where requests with keys of sandbox environments go instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox_upstream: Option<String>,
    /// Let `Upgrade` (WebSocket) through.
    #[serde(default)]
    pub upgrade: bool,
}

/// Which requests a rule is for.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Match {
    /// A host name, without a port. Left out: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Left out: all methods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub methods: Option<Vec<String>>,
    /// Segments; `*` stands for one segment, `/**` at the end for the prefix itself and everything below it.
    pub path: String,
}

/// A rule that asks for no key.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Public {
    /// Requests of one client address in a window. Left out: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MOST_PERMITS))]
    pub limit: Option<u32>,
    /// 1 s to 30 days; together with `limit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Span>,
}

/// The control plane.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Control {
    /// An address, or `{address, tls}`.
    pub listen: ControlListen,
    /// `sqlite:///PATH` or `postgres://USER:PASSWORD@HOST/NAME`.
    pub database: UrlText,
    /// The token that gates show to read keys and to report usage. Better in a file (`feed_token_file`) or as `${VARIABLE}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_token: Option<SecretText>,
    /// A file that holds the feed token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feed_token_file: Option<String>,
    /// The operator's token, for `/api/v1/admin/…`. Better in a file (`admin_token_file`) or as `${VARIABLE}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_token: Option<SecretText>,
    /// A file that holds the operator's token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_token_file: Option<String>,
    /// Where people reach the portal and the API, for links and cookies. Left out: what the request names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_url: Option<BaseUrl>,
    /// Who may register: anybody, people with an invitation, or nobody.
    #[serde(default)]
    pub registration: Registration,
    /// Directory of `run/control.addr`. Left out: the gate's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<String>,
    /// The plan of a new organisation.
    #[serde(default = "default_plan")]
    pub default_plan: String,
    /// Registrations that one address may make in an hour. 100: a classroom behind one address.
    #[serde(default = "registrations_per_hour")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub registrations_per_hour: u32,
    /// Failed sign-ins of one account, and of one address, in 15 minutes before more are answered 429. 10: room for a forgotten password.
    #[serde(default = "login_attempts")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub login_attempts: u32,
    /// Networks of proxies in front of the control plane, whose `X-Forwarded-For` is believed. The gate of the same machine is one.
    #[serde(default = "loopback")]
    pub trusted_proxies: Vec<NetworkText>,
}

fn default_plan() -> String {
    "starter".to_owned()
}

fn registrations_per_hour() -> u32 {
    100
}

fn login_attempts() -> u32 {
    10
}

fn loopback() -> Vec<NetworkText> {
    let v4 = Network {
        address: Ipv4Addr::new(127, 0, 0, 0).into(),
        prefix_length: 8,
    };
    let v6 = Network {
        address: Ipv6Addr::LOCALHOST.into(),
        prefix_length: 128,
    };
    vec![NetworkText(v4), NetworkText(v6)]
}

/// Where the control plane listens.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub(super) enum ControlListen {
    Address(ListenAddress),
    Listener(ControlListener),
}

/// Where the control plane listens.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ControlListener {
    /// An IP address (or `localhost`) and a port; port 0 takes a free one.
    pub address: ListenAddress,
    /// Serve TLS here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Registration {
    #[default]
    Open,
    Invite,
    Off,
}

/// The operator's listener.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Admin {
    /// An IP address (or `localhost`) and a port. It asks for no credential: loopback, or a network of your own.
    #[serde(default = "admin_listen")]
    pub listen: ListenAddress,
    /// Put key ids into metrics: one more series per key.
    #[serde(default)]
    pub key_labels: bool,
}

fn admin_listen() -> ListenAddress {
    ListenAddress("127.0.0.1:9090".to_owned())
}

/// Counts shared between gates.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Cluster {
    /// `redis://` or `rediss://` (TLS); a list for Sentinel and Cluster.
    pub url: ClusterUrls,
    /// The name of the master that the Sentinels at `url` watch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sentinel_master: Option<String>,
    /// `url` names nodes of a Redis Cluster.
    #[serde(default)]
    pub cluster_mode: bool,
    /// What a gate does while the store is lost: keep to its share, spend reservations only, or count alone.
    #[serde(default)]
    pub on_loss: OnLoss,
    /// How long a request waits for a reservation. Set it above the store's p99. 5 ms: ten times that of a store in the same room.
    #[serde(default = "cluster_wait")]
    pub wait: Span,
    /// Without a full answer for so long the store counts as lost. 500 ms: longer than a pause of the store, shorter than a person notices.
    #[serde(default = "lost_after")]
    pub lost_after: Span,
    /// The largest difference between the clocks of two gates. 50 ms: NTP keeps machines within a tenth of it.
    #[serde(default = "max_clock_skew")]
    pub max_clock_skew: Span,
    /// What our keys in the store begin with.
    #[serde(default = "key_prefix")]
    pub key_prefix: String,
}

fn cluster_wait() -> Span {
    Span::millis(5)
}

fn lost_after() -> Span {
    Span::millis(500)
}

fn max_clock_skew() -> Span {
    Span::millis(50)
}

fn key_prefix() -> String {
    "tollgate:".to_owned()
}

/// One store or several.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub(super) enum ClusterUrls {
    One(UrlText),
    Several(Vec<UrlText>),
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum OnLoss {
    #[default]
    Share,
    Closed,
    Local,
}

/// Logs.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Log {
    /// The least important lines that are written.
    pub level: Level,
    /// Of the process's own lines.
    pub format: LogFormat,
    /// Where the process's own lines go: `stderr`, `stdout` or a file.
    pub path: LogPath,
    /// One line a request: `off`, or `{format, path}`.
    pub access: Access,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum Level {
    Off,
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// Format of the process's own lines; text, since a person reads them first.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Format of access lines; JSON, since a machine reads them first.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(super) enum AccessFormat {
    #[default]
    Json,
    Text,
}

/// `stderr` by default.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
pub(super) struct LogPath(pub String);

impl Default for LogPath {
    fn default() -> Self {
        Self("stderr".to_owned())
    }
}

/// The access log.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
#[schemars(inline)]
pub(super) enum Access {
    Switch(Switch),
    Settings(AccessSettings),
}

impl Default for Access {
    fn default() -> Self {
        Self::Settings(AccessSettings::default())
    }
}

/// `on` or `off`; YAML 1.1 reads both as truth values, so those are taken too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switch {
    On,
    Off,
}

impl Serialize for Switch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if *self == Self::On { "on" } else { "off" })
    }
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Truth(bool),
            Word(Word),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Word {
            On,
            Off,
        }
        Ok(match Either::deserialize(deserializer)? {
            Either::Truth(true) | Either::Word(Word::On) => Self::On,
            Either::Truth(false) | Either::Word(Word::Off) => Self::Off,
        })
    }
}

impl JsonSchema for Switch {
    fn schema_name() -> Cow<'static, str> {
        "Switch".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"enum": ["on", "off", true, false]})
    }
}

/// The access log.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct AccessSettings {
    /// `json` or `text`.
    pub format: AccessFormat,
    /// `stdout`, `stderr` or a file, opened again on reload.
    pub path: String,
    /// Lines that may wait to be written before more are dropped (and counted). 8,192: a second of a slow disk at full load.
    #[schemars(range(min = 16, max = 1_000_000))]
    pub buffer_lines: u32,
}

impl Default for AccessSettings {
    fn default() -> Self {
        Self {
            format: AccessFormat::Json,
            path: "stdout".to_owned(),
            buffer_lines: 8_192,
        }
    }
}

/// A mapping of names to values, in the order of the file.
#[derive(Clone, Debug)]
pub(super) struct Named<T>(pub Vec<(String, T)>);

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Serialize> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Named<T>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a mapping of names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Named(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for Named<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("Named{}", T::schema_name()).into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object", "additionalProperties": generator.subschema_for::<T>()})
    }
}

/// A secret in the file itself: shown as `…` wherever the settings are shown.
#[derive(Clone)]
pub(super) struct SecretText(pub String);

impl fmt::Debug for SecretText {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("…")
    }
}

impl Serialize for SecretText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("…")
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl JsonSchema for SecretText {
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "secret"})
    }
}

/// A URL that may hold a password, which is shown as `…`.
#[derive(Clone)]
pub(super) struct UrlText(pub String);

impl fmt::Display for UrlText {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((scheme, rest)) = self.0.split_once("://") else {
            return out.write_str(&self.0);
        };
        match rest.rsplit_once('@') {
            Some((user, host)) => match user.split_once(':') {
                Some((user, _)) => write!(out, "{scheme}://{user}:…@{host}"),
                None => write!(out, "{scheme}://{user}@{host}"),
            },
            None => out.write_str(&self.0),
        }
    }
}

impl fmt::Debug for UrlText {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl Serialize for UrlText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for UrlText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl JsonSchema for UrlText {
    fn schema_name() -> Cow<'static, str> {
        "Url".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "url"})
    }
}
