//! The control plane, the operator's listener, the cluster.

use std::net::{Ipv4Addr, Ipv6Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::scalar::{BaseUrl, ListenAddress, NetworkText, Span};
use super::super::settings::Network;
use super::{ListenerTls, SecretText, UrlText};

/// The control plane.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Control {
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
    /// How long what grows without end is kept.
    #[serde(default)]
    pub retention: Retention,
}

/// How long what grows without end is kept.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::config) struct Retention {
    /// Lines of the audit log; at least 1d. 0: for ever.
    pub audit: Span,
    /// Usage by the minute; at least 31d. Then it is kept by the hour, for ever: totals by hour and day stay what they are. 90 days: a quarter's bill can be looked into to the minute. 0: for ever.
    pub usage_by_minute: Span,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            audit: Span::secs(0),
            usage_by_minute: Span::secs(90 * 24 * 3600),
        }
    }
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
pub(in crate::config) enum ControlListen {
    Address(ListenAddress),
    Listener(ControlListener),
}

/// Where the control plane listens.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct ControlListener {
    /// An IP address (or `localhost`) and a port; port 0 takes a free one.
    pub address: ListenAddress,
    /// Serve TLS here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(in crate::config) enum Registration {
    #[default]
    Open,
    Invite,
    Off,
}

/// The operator's listener.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Admin {
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
pub(in crate::config) struct Cluster {
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
pub(in crate::config) enum ClusterUrls {
    One(UrlText),
    Several(Vec<UrlText>),
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(in crate::config) enum OnLoss {
    #[default]
    Share,
    Closed,
    Local,
}
