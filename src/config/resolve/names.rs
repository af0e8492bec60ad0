//! Keys, scopes, tiers and plans.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::fault::Path;
use super::super::file;
use super::super::settings::{Checksum, Environment, Foreign, Keys, Plan, Rotation, Scope, Tier};
use super::{Resolver, names_of};

/// Prefix (19) + 30 + 6 = 55 bytes: a key and its padding fit one SHA-256 block.
const MAX_PREFIX: usize = 19;

/// The longest grace: a secret that lives longer beside its successor was not rotated.
const MAX_GRACE: Duration = Duration::from_secs(30 * 24 * 3600);

impl Resolver {
    pub(super) fn keys(&mut self, keys: &file::Keys) -> Keys {
        let path = Path::root().key("keys");
        let environments = &keys.environments.0;
        let environments_path = path.key("environments");
        if environments.0.is_empty() {
            self.fault(
                &environments_path,
                "must not be empty; write for example live: {prefix: pxk_live_, billed: true}",
            );
        }
        let mut resolved: Vec<Environment> = Vec::new();
        for (name, environment) in &environments.0 {
            let path = environments_path.key(name);
            self.name(&path, "an environment", name);
            self.prefix(&path.key("prefix"), &environment.prefix);
            for other in &resolved {
                let (a, b) = (&other.prefix, &environment.prefix);
                let message = if a == b {
                    format!(
                        "\"{b}\" is the prefix of {} too; each environment needs its own",
                        other.name
                    )
                } else if b.starts_with(a.as_str()) {
                    format!(
                        "\"{b}\" begins with the prefix of {} (\"{a}\"), so its keys could be either's",
                        other.name
                    )
                } else if a.starts_with(b.as_str()) {
                    format!(
                        "the prefix of {} (\"{a}\") begins with \"{b}\", so its keys could be either's",
                        other.name
                    )
                } else {
                    continue;
                };
                self.fault(&path.key("prefix"), message);
            }
            let (name, prefix) = (name.clone(), environment.prefix.clone());
            resolved.push(Environment {
                name,
                prefix,
                billed: environment.billed,
            });
        }
        let rotation_path = path.key("rotation");
        let max_grace = self.span(
            &rotation_path.key("max_grace"),
            keys.rotation.max_grace,
            Duration::ZERO,
            MAX_GRACE,
        );
        let default_grace = keys.rotation.default_grace.0;
        if default_grace > max_grace {
            let message = format!(
                "{} is longer than max_grace ({})",
                keys.rotation.default_grace, keys.rotation.max_grace
            );
            let at = if self.places.was_written(&rotation_path.key("default_grace")) {
                "default_grace"
            } else {
                "max_grace"
            };
            self.fault(&rotation_path.key(at), message);
        }
        Keys {
            checksum: match keys.checksum {
                file::Checksum::Required => Checksum::Required,
                file::Checksum::Optional => Checksum::Optional,
            },
            foreign: match keys.foreign {
                file::Foreign::Refuse => Foreign::Refuse,
                file::Foreign::Accept => Foreign::Accept,
            },
            environments: resolved,
            rotation: Rotation {
                default_grace,
                max_grace,
            },
        }
    }

    fn prefix(&mut self, path: &Path, prefix: &str) {
        let message = if prefix.is_empty() {
            "empty; expected a prefix such as pxk_live_"
        } else if prefix.len() > MAX_PREFIX {
            "longer than 19 characters; a key must stay within one SHA-256 block"
        } else if !prefix.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            "letters, digits and _ only, so that a double click selects a whole key"
        } else if !prefix.ends_with('_') {
            "must end in _, so that it can be told from what follows"
        } else {
            return;
        };
        self.fault(path, format!("bad prefix \"{prefix}\": {message}"));
    }

    pub(super) fn scopes(&mut self, scopes: &file::Scopes) -> Vec<Scope> {
        let root = Path::root().key("scopes");
        let listed: Vec<(Path, Scope)> = match scopes {
            file::Scopes::List(list) => list
                .iter()
                .enumerate()
                .map(|(index, scope)| match scope {
                    file::Scope::Name(name) => (
                        root.index(index),
                        Scope {
                            name: name.clone(),
                            description: None,
                        },
                    ),
                    file::Scope::Described(file::DescribedScope { name, description }) => (
                        root.index(index).key("name"),
                        Scope {
                            name: name.clone(),
                            description: description.clone(),
                        },
                    ),
                })
                .collect(),
            file::Scopes::Described(named) => named
                .0
                .iter()
                .map(|(name, text)| {
                    let description = match text {
                        file::ScopeText::Text(text) => text.clone(),
                        file::ScopeText::Mapping(mapping) => mapping.description.clone(),
                    };
                    (
                        root.key(name),
                        Scope {
                            name: name.clone(),
                            description: Some(description),
                        },
                    )
                })
                .collect(),
        };
        let mut resolved: Vec<Scope> = Vec::new();
        for (path, scope) in listed {
            self.name(&path, "a scope", &scope.name);
            if resolved.iter().any(|other| other.name == scope.name) {
                self.fault(&path, format!("scope \"{}\" is listed twice", scope.name));
            } else {
                resolved.push(scope);
            }
        }
        resolved
    }

    pub(super) fn tiers(&mut self, tiers: &file::Named<file::Tier>) -> Vec<Tier> {
        let root = Path::root().key("tiers");
        let mut resolved = Vec::new();
        for (name, tier) in &tiers.0 {
            let path = root.key(name);
            self.name(&path, "a tier", name);
            let window = self.window(&path.key("window"), tier.window);
            resolved.push(Tier {
                name: name.clone(),
                limit: tier.limit,
                window,
            });
        }
        resolved
    }

    pub(super) fn plans(&mut self, plans: &file::Named<file::Plan>, tiers: &file::Named<file::Tier>) -> Vec<Plan> {
        let root = Path::root().key("plans");
        if !self.places.was_written(&root) {
            return vec![Plan {
                name: "starter".to_owned(),
                max_in_flight: None,
                limits: BTreeMap::new(),
            }];
        }
        let tier_names = names_of(tiers);
        let mut resolved = Vec::new();
        for (name, plan) in &plans.0 {
            let path = root.key(name);
            self.name(&path, "a plan", name);
            let mut limits = BTreeMap::new();
            for (tier, limit) in &plan.tiers.0 {
                self.known_key(&path.key("tiers").key(tier), "tier", tier, &tier_names);
                limits.insert(tier.clone(), limit.limit);
            }
            resolved.push(Plan {
                name: name.clone(),
                max_in_flight: plan.max_in_flight,
                limits,
            });
        }
        resolved
    }
}
