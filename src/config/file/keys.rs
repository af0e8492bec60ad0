//! Keys, scopes, tiers, plans.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::scalar::Span;
use super::{MOST_PERMITS, Named};

/// What keys look like and how they are rotated.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::config) struct Keys {
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
pub(in crate::config) struct Environments(pub Named<Environment>);

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
pub(in crate::config) enum Checksum {
    #[default]
    Required,
    Optional,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub(in crate::config) enum Foreign {
    #[default]
    Refuse,
    Accept,
}

/// One environment.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Environment {
    /// What its keys begin with: letters, digits and `_`, at most 19 characters (a key stays within one SHA-256 block), ending in `_`.
    pub prefix: String,
    /// Its requests are billed. Environments that are not billed are sandboxes: they go to a route's `sandbox_upstream`.
    #[serde(default)]
    pub billed: bool,
}

/// Rotation of keys.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::config) struct Rotation {
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
pub(in crate::config) enum Scopes {
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
pub(in crate::config) enum Scope {
    Name(String),
    Described(DescribedScope),
}

/// A scope and what it grants.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct DescribedScope {
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
pub(in crate::config) enum ScopeText {
    Text(String),
    Mapping(ScopeDescription),
}

/// What a scope grants.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct ScopeDescription {
    /// What the scope grants.
    pub description: String,
}

/// A limit: in no interval of length `window` are more than `limit` permits given to one key.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct Tier {
    /// Permits in a window.
    #[schemars(range(min = 1, max = MOST_PERMITS))]
    pub limit: u32,
    /// 1 s to 30 days.
    pub window: Span,
}

/// What the keys of an organisation on this plan get.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::config) struct Plan {
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
pub(in crate::config) struct PlanTier {
    /// Permits in the tier's window.
    #[schemars(range(min = 1, max = MOST_PERMITS))]
    pub limit: u32,
}
