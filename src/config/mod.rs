//! The configuration file: read, checked whole, and resolved to plain data.
//!
//! `tree` (YAML with positions) → `expand` (`${…}`) → `check` (the tree against the schema of the shapes in `file`)
//! → `resolve` (names, ranges, combinations) → [`Config`], which needs no further checking. Every stage goes on after a
//! fault, so that one run tells them all. Nothing here starts, connects or listens.

mod check;
mod expand;
mod fault;
mod file;
mod reload;
mod resolve;
mod scalar;
mod schema;
mod settings;
mod tree;

use std::io::Read;
use std::path::Path as FilePath;

use fault::Path;
pub use fault::{Fault, Faults};
pub use reload::{Applies, RestartNeeded, applies, diff, restart_paths};
pub use schema::{json_schema, reference};
pub use settings::*;

/// PlatformXe's own configuration, which `tollgate dev` runs and `tollgate config init` prints.
pub const PLATFORMXE: &str = include_str!("../../conf/tollgate.yaml");

/// The smallest useful configuration: one upstream, one file of keys.
pub const MINIMAL: &str = include_str!("../../conf/minimal.yaml");

/// What a configuration file may be at most; a file of 10,000 routes is a tenth of it.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;

/// Reads, checks and resolves a file. `env` answers `${NAME}`; relative paths start at the file's directory.
///
/// # Errors
/// Every fault of the file.
pub fn load(path: &FilePath, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, Faults> {
    load_both(path, env).map(|(_, config)| config)
}

/// As [`load`], of a text that stands for a file called `name` in the directory `base`.
///
/// # Errors
/// Every fault of the text.
pub fn load_text(
    name: &str,
    text: &str,
    base: &FilePath,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Config, Faults> {
    resolve_text(name, text, base, env).map(|(_, config)| config)
}

/// The settings of a file with all variables replaced and all defaults filled in, as YAML. Secrets are shown as `…`.
///
/// # Errors
/// Every fault of the file.
pub fn show(path: &FilePath, env: &dyn Fn(&str) -> Option<String>) -> Result<String, Faults> {
    let (file, _) = load_both(path, env)?;
    serde_yaml::to_string(&file).map_err(|error| whole(path.display().to_string(), format!("cannot be shown: {error}")))
}

/// As [`show`], as JSON.
///
/// # Errors
/// Every fault of the file.
pub fn show_json(path: &FilePath, env: &dyn Fn(&str) -> Option<String>) -> Result<serde_json::Value, Faults> {
    let (file, _) = load_both(path, env)?;
    serde_json::to_value(&file).map_err(|error| whole(path.display().to_string(), format!("cannot be shown: {error}")))
}

/// A duration as the file has it: `500ms`, `30s`, `5m`, `24h`, `30d`.
///
/// # Errors
/// What would be right.
pub fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    text.parse::<scalar::Span>().map(|span| span.0)
}

/// A server's `HOST:PORT` as the file has it.
///
/// # Errors
/// What would be right.
pub fn parse_server_address(text: &str) -> Result<String, String> {
    text.parse::<scalar::ServerAddress>().map(|address| address.0)
}

/// A configuration to begin with: PlatformXe's, or the smallest useful one; `upstream` (`HOST:PORT`) is what it protects.
pub fn beginning(full: bool, upstream: Option<&str>) -> String {
    let text = if full { PLATFORMXE } else { MINIMAL };
    match upstream {
        None => text.to_owned(),
        Some(address) => text.replace("UPSTREAM:-127.0.0.1:9000", &format!("UPSTREAM:-{address}")),
    }
}

/// What the process's environment answers for `${NAME}`.
pub fn process_env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// What `tollgate dev` sets in the built-in configuration.
#[derive(Clone, Debug)]
pub struct DevOverrides {
    /// `HOST:PORT`, port 0 allowed, of the gate's, the control plane's and the operator's listeners.
    pub gate_listen: String,
    pub control_listen: String,
    pub admin_listen: String,
    /// Where spool, journal, database and `run/*.addr` go.
    pub data_dir: std::path::PathBuf,
    /// `HOST:PORT` of the demo upstream, in use for the sandbox too.
    pub upstream: String,
    pub feed_token_file: std::path::PathBuf,
    pub admin_token_file: std::path::PathBuf,
}

impl Config {
    /// The built-in configuration, PlatformXe's, with what `tollgate dev` sets.
    ///
    /// # Errors
    /// What is wrong with the overrides; the token files must exist.
    pub fn dev(overrides: &DevOverrides) -> Result<Self, Faults> {
        let text = |path: &FilePath| path.to_string_lossy().into_owned();
        let data = std::path::absolute(&overrides.data_dir).unwrap_or_else(|_| overrides.data_dir.clone());
        let feed_token =
            std::path::absolute(&overrides.feed_token_file).unwrap_or_else(|_| overrides.feed_token_file.clone());
        let admin_token =
            std::path::absolute(&overrides.admin_token_file).unwrap_or_else(|_| overrides.admin_token_file.clone());
        let variables = [
            ("TOLLGATE_LISTEN", overrides.gate_listen.clone()),
            ("TOLLGATE_CONTROL_LISTEN", overrides.control_listen.clone()),
            ("TOLLGATE_ADMIN_LISTEN", overrides.admin_listen.clone()),
            ("TOLLGATE_STATE_DIR", text(&data)),
            (
                "TOLLGATE_DATABASE",
                format!("sqlite://{}", text(&data.join("tollgate.db"))),
            ),
            ("TOLLGATE_FEED_TOKEN_FILE", text(&feed_token)),
            ("TOLLGATE_ADMIN_TOKEN_FILE", text(&admin_token)),
            ("TOLLGATE_UPSTREAM", overrides.upstream.clone()),
            ("TOLLGATE_SANDBOX_UPSTREAM", overrides.upstream.clone()),
        ];
        let env = move |name: &str| {
            variables
                .iter()
                .find(|(variable, _)| *variable == name)
                .map(|(_, value)| value.clone())
        };
        load_text("the built-in configuration", PLATFORMXE, FilePath::new("."), &env)
    }
}

fn load_both(path: &FilePath, env: &dyn Fn(&str) -> Option<String>) -> Result<(file::File, Config), Faults> {
    let name = path.display().to_string();
    let text = read(path).map_err(|fault| Faults {
        file: name.clone(),
        faults: vec![fault],
    })?;
    let base = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(FilePath::new("."));
    resolve_text(&name, &text, base, env)
}

fn read(path: &FilePath) -> Result<String, Fault> {
    let fault = |message: String| Fault {
        line: 0,
        column: 0,
        path: String::new(),
        message,
    };
    let mut bytes = Vec::new();
    let file =
        std::fs::File::open(path).map_err(|error| fault(format!("cannot be read: {}", expand::plain(&error))))?;
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| fault(format!("cannot be read: {}", expand::plain(&error))))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(fault(format!(
            "larger than {MAX_FILE_BYTES} bytes; is it the right file?"
        )));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
        let column = String::from_utf8_lossy(good)
            .rsplit('\n')
            .next()
            .map_or(0, |last| last.chars().count())
            + 1;
        Fault {
            line,
            column,
            path: String::new(),
            message: "not UTF-8 text; save the file as UTF-8".to_owned(),
        }
    })
}

fn resolve_text(
    name: &str,
    text: &str,
    base: &FilePath,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<(file::File, Config), Faults> {
    let failed = |mut faults: Vec<Fault>| {
        faults.sort_by(|a, b| (a.line, a.column, &a.path).cmp(&(b.line, b.column, &b.path)));
        faults.dedup();
        Faults {
            file: name.to_owned(),
            faults,
        }
    };
    let mut tree = tree::parse(text).map_err(failed)?;
    let (mut faults, mut faulty) = (Vec::new(), Vec::new());
    expand::expand(&mut tree, &Path::root(), base, env, &mut faults, &mut faulty);
    let checked = check::check(&tree, schema::raw(), faults, faulty);
    let file: file::File = match serde_path_to_error::deserialize(checked.value.clone()) {
        Ok(file) => file,
        Err(error) => {
            // The check before left nothing to refuse, so this is a difference between schema and shapes: still told, not thrown.
            let mut faults = checked.faults;
            let path = error.path().to_string();
            faults.push(Fault {
                line: 1,
                column: 1,
                path,
                message: error.into_inner().to_string(),
            });
            return Err(failed(faults));
        }
    };
    match resolve::resolve(&file, checked, base) {
        Ok(config) => Ok((file, config)),
        Err(faults) => Err(failed(faults)),
    }
}

fn whole(file: String, message: String) -> Faults {
    Faults {
        file,
        faults: vec![Fault {
            line: 0,
            column: 0,
            path: String::new(),
            message,
        }],
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn token_files() -> (tempfile::TempDir, DevOverrides) {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("feed.token"), "feed-token-0123456789abcdef\n").unwrap();
        std::fs::write(at("admin.token"), "admin-token-0123456789abcdef\n").unwrap();
        let overrides = DevOverrides {
            gate_listen: "127.0.0.1:0".to_owned(),
            control_listen: "127.0.0.1:0".to_owned(),
            admin_listen: "127.0.0.1:0".to_owned(),
            data_dir: directory.path().to_owned(),
            upstream: "127.0.0.1:9".to_owned(),
            feed_token_file: at("feed.token"),
            admin_token_file: at("admin.token"),
        };
        (directory, overrides)
    }

    #[test]
    fn the_built_in_configuration_is_platformxes() {
        let (directory, overrides) = token_files();
        let config = Config::dev(&overrides).unwrap_or_else(|faults| panic!("{faults}"));
        assert_eq!(config.scopes.len(), 15);
        let tiers: Vec<(&str, u32)> = config
            .tiers
            .iter()
            .map(|tier| (tier.name.as_str(), tier.limit))
            .collect();
        assert_eq!(
            tiers,
            [
                ("permissions:check", 5000),
                ("permissions:manage", 500),
                ("permissions:audit", 100),
                ("default", 1000)
            ]
        );
        assert!(config.tiers.iter().all(|tier| tier.window == Duration::from_secs(3600)));
        assert_eq!(config.keys.environments.len(), 3);
        let used = |scope: &Scope| {
            config
                .routes
                .iter()
                .any(|route| matches!(&route.access, Access::Key { scope: Some(name), .. } if *name == scope.name))
        };
        assert!(config.scopes.iter().all(used), "a route for every scope");
        let control = config.control.unwrap();
        assert_eq!(
            control.database,
            Database::Sqlite {
                path: directory.path().join("tollgate.db")
            }
        );
        assert_eq!(control.feed_token.expose(), "feed-token-0123456789abcdef");
        let gate = config.gate.unwrap();
        assert_eq!(gate.listen[0].address, "127.0.0.1:0");
        assert_eq!(gate.feed.source, FeedSource::Control);
        assert_eq!(gate.header_prefix, "x-platformxe-");
        assert_eq!(gate.default_upstream, "platform");
    }

    #[test]
    fn a_missing_token_file_is_named() {
        let (_directory, mut overrides) = token_files();
        overrides.feed_token_file = "/nowhere/feed.token".into();
        let faults = Config::dev(&overrides).unwrap_err();
        assert_eq!(faults.faults.len(), 1, "{faults}");
        assert_eq!(faults.faults[0].path, "control.feed_token_file");
        assert!(
            faults.faults[0]
                .message
                .contains("cannot read /nowhere/feed.token: no such file"),
            "{faults}"
        );
    }

    #[test]
    fn secrets_are_never_shown() {
        let (_directory, overrides) = token_files();
        let config = Config::dev(&overrides).unwrap();
        assert!(!format!("{config:?}").contains("0123456789abcdef"));
    }

    #[test]
    fn only_what_needs_a_restart_is_named_by_a_diff() {
        let (_directory, overrides) = token_files();
        let old = Config::dev(&overrides).unwrap();
        let mut new = old.clone();
        new.tiers[0].limit = 1;
        new.routes.pop();
        assert_eq!(diff(&old, &new), []);
        new.gate.as_mut().unwrap().name = "other".to_owned();
        new.keys.environments.pop();
        let paths: Vec<String> = diff(&old, &new).into_iter().map(|needed| needed.path).collect();
        assert_eq!(paths, ["gate.name", "keys.environments"]);
        assert_eq!(applies("gate.listen[].tls"), Applies::Restart);
        assert_eq!(applies("tiers.*.limit"), Applies::Reload);
        assert_eq!(applies("gate.limits.head_bytes"), Applies::Restart);
        assert_eq!(applies("gate.failed_attempts.limit"), Applies::Reload);
    }
}
