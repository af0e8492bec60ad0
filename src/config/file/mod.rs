//! The shapes of the YAML file: what may be written, with its defaults. Checked against each other in `resolve`.
//!
//! The doc comments are the texts of the JSON Schema and of the reference page. A default says where it comes from.

mod control;
mod gate;
mod keys;
mod log;
mod parts;
mod routing;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub(super) use self::control::*;
pub(super) use self::gate::*;
pub(super) use self::keys::*;
pub(super) use self::log::*;
pub(super) use self::parts::*;
pub(super) use self::routing::*;

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
