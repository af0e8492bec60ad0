//! What a reload can change, and what needs a restart: one table, for the reload itself, the schema and the reference page.

use serde::Serialize;

use super::settings::Config;

/// What a change of a setting needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applies {
    /// Takes effect at a reload, without dropping a request or a count.
    Reload,
    /// Takes effect at a restart; a reload applies the rest and names it.
    Restart,
}

/// A changed setting that a reload cannot apply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestartNeeded {
    /// The setting, such as `gate.listen`.
    pub path: String,
}

/// A setting that needs a restart: its path, and whether two configurations agree in it.
type Row = (&'static str, fn(&Config, &Config) -> bool);

/// Everything that needs a restart, with everything below it. What is not listed is applied by a reload.
const RESTART: &[Row] = &[
    // Roles are services, and services are made at the start.
    ("gate", |a, b| a.gate.is_some() == b.gate.is_some()),
    ("control", |a, b| a.control == b.control),
    ("admin", |a, b| a.admin == b.admin),
    ("cluster", |a, b| a.cluster == b.cluster),
    // The name is in spool, journal, acknowledgements and the cluster.
    ("gate.name", |a, b| gate(a, b, |gate| &gate.name)),
    ("gate.threads", |a, b| gate(a, b, |gate| &gate.threads)),
    // Sockets are opened before privileges are dropped. Certificates are read again without any reload.
    ("gate.listen", |a, b| gate(a, b, |gate| &gate.listen)),
    ("gate.state_dir", |a, b| gate(a, b, |gate| &gate.state_dir)),
    ("gate.feed", |a, b| gate(a, b, |gate| &gate.feed)),
    // The runtime is told once how long to drain.
    ("gate.shutdown_grace", |a, b| gate(a, b, |gate| &gate.shutdown_grace)),
    // The edge keeps the settings it was made with.
    ("gate.limits", |a, b| gate(a, b, |gate| &gate.limits)),
    ("gate.trusted_proxies", |a, b| gate(a, b, |gate| &gate.trusted_proxies)),
    ("gate.paths", |a, b| gate(a, b, |gate| &gate.paths)),
    // Keys are stored and indexed by their environment.
    ("keys.environments", |a, b| a.keys.environments == b.keys.environments),
    ("log.format", |a, b| a.log.format == b.log.format),
    ("log.path", |a, b| a.log.path == b.log.path),
    // A file is opened again at each reload, for whoever rotates it.
    ("log.access", |a, b| a.log.access == b.log.access),
];

fn gate<T: PartialEq>(a: &Config, b: &Config, field: fn(&super::settings::Gate) -> &T) -> bool {
    match (&a.gate, &b.gate) {
        (Some(a), Some(b)) => field(a) == field(b),
        _ => true, // Told as a change of the role.
    }
}

/// What a change of the setting at `path` (`gate.listen[].tls`, `tiers.*.limit`) needs.
pub fn applies(path: &str) -> Applies {
    let within = |row: &&Row| {
        // `gate` and `control` as a whole mean the role; only `control`, `admin` and `cluster` cover what is below.
        let covers_below = row.0 != "gate";
        path == row.0
            || (covers_below
                && path
                    .strip_prefix(row.0)
                    .is_some_and(|rest| rest.starts_with(['.', '['])))
    };
    if RESTART.iter().any(|row| within(&row)) {
        Applies::Restart
    } else {
        Applies::Reload
    }
}

/// The settings in which `new` differs from `old` and that a reload cannot apply.
pub fn diff(old: &Config, new: &Config) -> Vec<RestartNeeded> {
    RESTART
        .iter()
        .filter(|(_, same)| !same(old, new))
        .map(|(path, _)| RestartNeeded {
            path: (*path).to_owned(),
        })
        .collect()
}

/// The settings that need a restart, each with everything below it.
pub fn restart_paths() -> impl Iterator<Item = &'static str> {
    RESTART.iter().map(|(path, _)| *path)
}
