//! Upstreams and routes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::scalar::{ServerAddress, Span};
use super::{ClientTls, MOST_PERMITS};

/// Servers that answer the same requests.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Upstream {
    /// `HOST:PORT`, or `{address, weight}`.
    #[schemars(length(min = 1))]
    pub servers: Vec<Server>,
    /// How the next server is chosen: in turn, or by chance; both by weight.
    #[serde(default)]
    pub balance: Balance,
    /// Active health checks. While all servers are out, requests are tried on them all the same. Left out: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// How long a server may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// TLS towards the servers; `{}` is enough where the address is the certificate's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ClientTls>,
    /// `http1`, or `http2` (which gRPC needs): by ALPN over TLS, where a server that offers HTTP/1.1 only is refused; by prior knowledge without.
    #[serde(default)]
    pub protocol: Protocol,
    /// Further tries, on another server where there is one, of a request that cannot have had an effect: no connection came about, or a pooled connection turned out to be dead before a byte of an answer and the method is safe (GET, HEAD, OPTIONS). 1: covers one dead server.
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
pub(in crate::config) enum Server {
    Address(ServerAddress),
    Weighted(WeightedServer),
}

/// A server and its share.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct WeightedServer {
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
pub(in crate::config) enum Balance {
    #[default]
    RoundRobin,
    Random,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(in crate::config) enum Protocol {
    #[default]
    Http1,
    Http2,
}

/// Active health checks of each server.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Health {
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
pub(in crate::config) struct Timeouts {
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
pub(in crate::config) struct Route {
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
pub(in crate::config) struct Match {
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
pub(in crate::config) struct Public {
    /// Requests of one client address in a window. Left out: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MOST_PERMITS))]
    pub limit: Option<u32>,
    /// 1 s to 30 days; together with `limit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Span>,
}
