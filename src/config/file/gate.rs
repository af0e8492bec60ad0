//! The gate: listeners, feed, limits.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::super::scalar::{BaseUrl, Bytes, ListenAddress, NetworkText, Span};
use super::SecretText;

/// The gate.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Gate {
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

pub(in crate::config) fn state_dir() -> String {
    "/var/lib/tollgate".to_owned()
}

fn shutdown_grace() -> Span {
    Span::secs(30)
}

/// `auto` or a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::config) enum Threads {
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
pub(in crate::config) struct Listener {
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

/// TLS towards clients. Certificates are read again within two seconds of a change of their files; ones that cannot be used change nothing.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct ListenerTls {
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
pub(in crate::config) struct Certificate {
    /// The certificate chain, a PEM file.
    pub cert: String,
    /// The private key, a PEM file.
    pub key: String,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(inline)]
pub(in crate::config) enum TlsVersion {
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    #[serde(rename = "1.3")]
    Tls13,
}

/// Where keys come from: a control plane (`url` and `token` or `token_file`) or a static file (`file`).
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Feed {
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
pub(in crate::config) struct ClientTls {
    /// The server's name, asked for and verified. Left out: the host of the address. Not for the feed: there it is the host of `url`.
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
pub(in crate::config) enum Paths {
    #[default]
    Strict,
    Relaxed,
}

/// Bounds on what one client can make the gate hold.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::config) struct Limits {
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
    /// Idle connections kept to each upstream server that speaks HTTP/1 without TLS, for requests with a short body or none; and so many in all for the rest. 128: Pingora's default.
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
pub(in crate::config) struct FailedAttempts {
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
pub(in crate::config) struct RateLimitHeaders {
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
