//! What the operator has laid down: key forms, tiers, plans and routes, checked and compiled for the hot path.

use super::key::{Checksum, Foreign, KeyForms};
use super::limit::Limit;
use super::route::{Access, Pattern, PublicLimit, RequiredScope, Route, RouteId, Routes, Tier};
use super::scope::{NameId, NameSet, Names, TooManyNames};
use http::HeaderValue;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The tier of rules that name none, and of requests that fall under no rule.
pub const DEFAULT_TIER: &str = "default";

/// The gate's settings. A new set can be put in force at any time ([`super::Gate::reload`]); what has been
/// counted stays counted.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The environments that keys belong to.
    pub environments: Vec<EnvironmentSettings>,
    /// Whether our own keys need a right checksum.
    pub checksum: Checksum,
    /// Whether keys of another form are looked up.
    pub foreign: Foreign,
    /// The tiers and their limits. One is called `default`.
    pub tiers: Vec<(String, Limit)>,
    /// The plans and what they change.
    pub plans: Vec<PlanSettings>,
    /// The rules.
    pub routes: Vec<RouteSettings>,
    /// The upstream of requests that fall under no rule.
    pub default_upstream: String,
    /// When an address with bad credentials is slowed.
    pub failed_attempts: FailedAttemptsSettings,
}

impl Default for Settings {
    /// Checksums required, foreign keys refused, no rules, and nothing that only an operator can know: without an
    /// environment no key is ours, and without a tier called `default` a gate does not start.
    fn default() -> Self {
        Settings {
            environments: vec![],
            checksum: Checksum::default(),
            foreign: Foreign::default(),
            tiers: vec![],
            plans: vec![],
            routes: vec![],
            default_upstream: String::new(),
            failed_attempts: FailedAttemptsSettings::default(),
        }
    }
}

/// One environment.
#[derive(Clone, Debug)]
pub struct EnvironmentSettings {
    /// Its name: `live`.
    pub name: String,
    /// The prefix of its keys: `pxk_live_`.
    pub prefix: String,
    /// Whether its requests are billed. Those of the others go to a rule's sandbox upstream.
    pub billed: bool,
}

/// One plan.
#[derive(Clone, Debug, Default)]
pub struct PlanSettings {
    /// Its name: `starter`.
    pub name: String,
    /// How many requests of one key may be under way at once, or any number.
    pub max_in_flight: Option<u32>,
    /// Tiers whose limit differs from the common one.
    pub tiers: Vec<(String, Limit)>,
}

/// One rule.
#[derive(Clone, Debug)]
pub struct RouteSettings {
    /// Its name, for logs and errors.
    pub name: String,
    /// Which requests fall under it.
    pub pattern: Pattern,
    /// Who may pass.
    pub access: AccessSettings,
    /// Where they go.
    pub upstream: String,
    /// Where requests of environments that are not billed go instead.
    pub sandbox_upstream: Option<String>,
    /// Whether `Upgrade` is let through.
    pub upgrade: bool,
}

/// Who may pass a rule.
#[derive(Clone, Debug)]
pub enum AccessSettings {
    /// Anybody, up to the limit per client address.
    Public {
        /// The limit, or none.
        limit: Option<Limit>,
    },
    /// Holders of a key.
    Keyed {
        /// The scope that the key must hold, or any key.
        scope: Option<String>,
        /// The tier that it is counted in.
        tier: String,
        /// The environments whose keys may pass; `None` means all.
        environments: Option<Vec<String>>,
    },
}

/// When an address that presents bad credentials is slowed.
#[derive(Clone, Copy, Debug)]
pub struct FailedAttemptsSettings {
    /// Bad credentials per window, from one address, before it is told 429.
    pub limit: u32,
    /// The window's length.
    pub window: Duration,
}

impl Default for FailedAttemptsSettings {
    /// 30 a minute: a deployment with a wrong key in it that retries each second is noticed, not locked out for long.
    fn default() -> Self {
        FailedAttemptsSettings {
            limit: 30,
            window: Duration::from_secs(60),
        }
    }
}

/// Settings that cannot be put in force. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SettingsError {
    /// A rule or a plan names a tier that is not among the tiers, or `default` is missing.
    UnknownTier {
        /// Who names it.
        named_by: String,
        /// The name.
        tier: String,
    },
    /// A rule names an environment that is not among the environments.
    UnknownEnvironment {
        /// The rule.
        route: String,
        /// The name.
        environment: String,
    },
    /// Two rules match the same requests.
    RouteClash {
        /// One.
        one: String,
        /// The other.
        other: String,
    },
    /// A tier's name cannot stand in a header field.
    TierName(String),
    /// More than 65,535 different names since the process started.
    TooManyNames,
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SettingsError::UnknownTier { named_by, tier } => write!(f, "{named_by} names the unknown tier {tier:?}"),
            SettingsError::UnknownEnvironment { route, environment } => {
                write!(f, "route {route:?} names the unknown environment {environment:?}")
            }
            SettingsError::RouteClash { one, other } => {
                write!(f, "routes {one:?} and {other:?} match the same requests")
            }
            SettingsError::TierName(name) => {
                write!(
                    f,
                    "the tier name {name:?} must be printable ASCII without quotes and backslashes"
                )
            }
            SettingsError::TooManyNames => f.write_str("more than 65,535 different names since the process started"),
        }
    }
}

impl std::error::Error for SettingsError {}

impl From<TooManyNames> for SettingsError {
    fn from(_: TooManyNames) -> Self {
        SettingsError::TooManyNames
    }
}

/// The numbers that names have for the life of the process.
#[derive(Debug, Default)]
pub(super) struct NameTables {
    pub scopes: Names,
    pub tiers: Names,
    pub plans: Names,
    pub environments: Names,
}

/// Compiled settings.
#[derive(Debug)]
pub(super) struct Policy {
    pub forms: KeyForms,
    pub routes: Routes,
    pub fallback: Arc<Route>,
    /// By their numbers; the fallback is the last.
    all_routes: Box<[Arc<Route>]>,
    pub failed_attempts: FailedAttemptsSettings,
    pub sandboxes: NameSet,
    /// By plan number; keys whose plan is not among them get `base`.
    plans: Vec<Option<Plan>>,
    base: Plan,
}

/// The limits of one plan, by tier number.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub max_in_flight: Option<u32>,
    limits: Box<[Option<Limit>]>,
}

impl Plan {
    /// The limit of a tier; `None` only for a tier that is in no settings in force.
    #[inline]
    pub fn limit(&self, tier: NameId) -> Option<Limit> {
        self.limits.get(tier.index()).copied().flatten()
    }
}

impl Policy {
    pub fn compile(settings: Settings, names: &NameTables) -> Result<Self, SettingsError> {
        let mut tiers = HashMap::new();
        let mut limits = vec![];
        for (name, limit) in &settings.tiers {
            let tier = tier(name, &names.tiers)?;
            put(&mut limits, tier.id, *limit);
            tiers.insert(name.clone(), tier);
        }
        let tier_named = |name: &str, named_by: &dyn Fn() -> String| {
            tiers.get(name).cloned().ok_or_else(|| SettingsError::UnknownTier {
                named_by: named_by(),
                tier: name.to_owned(),
            })
        };
        let base = Plan {
            max_in_flight: None,
            limits: limits.clone().into(),
        };
        let mut plans = vec![];
        for plan in &settings.plans {
            let mut own = limits.clone();
            for (name, limit) in &plan.tiers {
                put(
                    &mut own,
                    tier_named(name, &|| format!("plan {:?}", plan.name))?.id,
                    *limit,
                );
            }
            put(
                &mut plans,
                names.plans.number(&plan.name)?,
                Plan {
                    max_in_flight: plan.max_in_flight,
                    limits: own.into(),
                },
            );
        }
        let mut environments = HashMap::new();
        for environment in &settings.environments {
            environments.insert(&environment.name, names.environments.number(&environment.name)?);
        }
        let mut rules = vec![];
        for route in settings.routes {
            let access = match route.access {
                AccessSettings::Public { limit } => {
                    let limited = limit.map(|limit| Ok::<_, SettingsError>((limit, tier(&route.name, &names.tiers)?)));
                    Access::Public(limited.transpose()?.map(|(limit, tier)| PublicLimit { limit, tier }))
                }
                AccessSettings::Keyed {
                    scope,
                    tier,
                    environments: allowed,
                } => {
                    let number = |name: &String| {
                        environments
                            .get(name)
                            .copied()
                            .ok_or_else(|| SettingsError::UnknownEnvironment {
                                route: route.name.clone(),
                                environment: name.clone(),
                            })
                    };
                    let scope = match scope {
                        Some(name) => Some(RequiredScope {
                            id: names.scopes.number(&name)?,
                            name: name.into(),
                        }),
                        None => None,
                    };
                    Access::Keyed {
                        scope,
                        tier: tier_named(&tier, &|| format!("route {:?}", route.name))?,
                        environments: match allowed {
                            Some(allowed) => Some(allowed.iter().map(number).collect::<Result<NameSet, _>>()?),
                            None => None,
                        },
                    }
                }
            };
            let compiled = Arc::new(Route {
                id: RouteId(rules.len() as u32),
                name: route.name.into(),
                access,
                upstream: route.upstream.into(),
                sandbox_upstream: route.sandbox_upstream.map(Into::into),
                upgrade: route.upgrade,
            });
            rules.push((route.pattern, compiled));
        }
        let fallback = Arc::new(Route {
            id: RouteId(rules.len() as u32),
            name: "default".into(),
            access: Access::Keyed {
                scope: None,
                tier: tier_named(DEFAULT_TIER, &|| "the rule for everything else".to_owned())?,
                environments: None,
            },
            upstream: settings.default_upstream.into(),
            sandbox_upstream: None,
            upgrade: false,
        });
        let all_routes = rules
            .iter()
            .map(|(_, route)| route)
            .chain([&fallback])
            .cloned()
            .collect();
        Ok(Policy {
            forms: KeyForms::new(
                settings.environments.iter().map(|environment| &environment.prefix),
                settings.checksum,
                settings.foreign,
            ),
            routes: Routes::new(rules).map_err(|clash| SettingsError::RouteClash {
                one: clash.routes.0.into(),
                other: clash.routes.1.into(),
            })?,
            fallback,
            all_routes,
            failed_attempts: settings.failed_attempts,
            sandboxes: settings
                .environments
                .iter()
                .filter(|environment| !environment.billed)
                .filter_map(|environment| environments.get(&environment.name).copied())
                .collect(),
            plans,
            base,
        })
    }

    /// The rule with this number, which one of this policy's rules has.
    pub fn route(&self, id: RouteId) -> &Arc<Route> {
        self.all_routes.get(id.0 as usize).unwrap_or(&self.fallback)
    }

    /// The limits that hold for every plan unless it says otherwise.
    pub fn base(&self) -> &Plan {
        &self.base
    }

    /// The plan with this number, or the tiers' common limits where no plan in force has it: a key whose plan the
    /// gate was not told about is limited like any other, not let through unlimited.
    #[inline]
    pub fn plan(&self, id: NameId) -> &Plan {
        self.plans
            .get(id.index())
            .and_then(Option::as_ref)
            .unwrap_or(&self.base)
    }
}

fn tier(name: &str, names: &Names) -> Result<Arc<Tier>, SettingsError> {
    // The name becomes a structured field string (RFC 9651 section 3.3.3), which cannot hold other characters.
    let plain = name
        .bytes()
        .all(|b| (b' '..=b'~').contains(&b) && b != b'"' && b != b'\\');
    let header = HeaderValue::from_str(name).ok().filter(|_| plain && !name.is_empty());
    let header = header.ok_or_else(|| SettingsError::TierName(name.to_owned()))?;
    Ok(Arc::new(Tier {
        name: name.into(),
        header,
        id: names.number(name)?,
    }))
}

fn put<T: Clone>(table: &mut Vec<Option<T>>, id: NameId, value: T) {
    if table.len() <= id.index() {
        table.resize(id.index() + 1, None);
    }
    table[id.index()] = Some(value);
}
