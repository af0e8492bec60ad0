//! The composition root: configuration → running services. The only place that wires modules together.
//!
//! A process is a gate, a control plane, or both; the sections of its configuration decide. Whatever the roles, the
//! gate follows the control plane over HTTP, also within one process: there is one way for keys to arrive.

mod cluster;
mod demo;
mod dev;
mod gate_role;
mod lifecycle;
mod listeners;
mod metrics;
mod process;
mod reload;
mod settings;
mod upgrade;

use crate::config::{self, Config};
use crate::telemetry::logs;
use crate::tls::TlsError;
use dev::token_file;
use process::Process;
use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

/// What `tollgate run` is told beside the configuration.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// The file that a reload reads again.
    pub config_path: PathBuf,
    /// Take over from the process that runs on this configuration's state directory.
    pub upgrade: bool,
}

/// What `tollgate dev` is told.
#[derive(Clone, Debug)]
pub struct DevOptions {
    /// Where everything is kept.
    pub data: PathBuf,
    /// The gate's address.
    pub listen: String,
    /// The control plane's and the portal's.
    pub control: String,
    /// The operator's.
    pub admin: String,
}

/// Why a process did not start.
#[derive(Debug)]
pub enum AppError {
    /// The configuration is at fault.
    Config(config::Faults),
    /// Something else; the text says what, and what would help.
    Failed(String),
}

impl AppError {
    /// Whether the configuration is at fault.
    pub fn is_invalid_configuration(&self) -> bool {
        matches!(self, AppError::Config(_))
    }

    /// A combination of settings that the configuration's own checks should have refused.
    fn internal(what: impl fmt::Display) -> Self {
        AppError::Failed(format!(
            "{what} (this should have been refused when the configuration was checked)"
        ))
    }
}

impl fmt::Display for AppError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AppError::Config(faults) => faults.fmt(f),
            AppError::Failed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for AppError {}

impl From<io::Error> for AppError {
    fn from(error: io::Error) -> Self {
        AppError::Failed(error.to_string())
    }
}

impl From<TlsError> for AppError {
    fn from(error: TlsError) -> Self {
        AppError::Failed(error.to_string())
    }
}

impl From<config::Faults> for AppError {
    fn from(faults: config::Faults) -> Self {
        AppError::Config(faults)
    }
}

/// Runs the roles that the configuration has sections for, until a signal ends the process.
///
/// # Errors
/// [`AppError`] where it cannot start. Once started it does not return.
pub fn run(config: Config, options: RunOptions) -> Result<(), AppError> {
    start_logging(&config.log)?;
    Process::assemble(config, Some(options.config_path), None, options.upgrade)?.run()
}

/// The reference page of all metrics, as `src/manual/metrics.md` has it.
pub fn metrics_reference() -> String {
    metrics::reference()
}

/// The names of all metrics and of their labels.
pub fn metric_names() -> Vec<(&'static str, &'static [&'static str])> {
    let all = metrics::GROUPS.iter().flat_map(|(_, metrics)| *metrics);
    all.map(|metric| (metric.name, metric.labels)).collect()
}

/// Runs everything in one process on the built-in configuration, with a demo upstream, and prints a key.
///
/// # Errors
/// [`AppError`] where it cannot start.
pub fn dev(options: DevOptions) -> Result<(), AppError> {
    let data = &options.data;
    fs::create_dir_all(data).map_err(|error| AppError::Failed(format!("cannot make {}: {error}", data.display())))?;
    let (upstream, upstream_address) = listeners::bind("127.0.0.1:0")?;
    let overrides = config::DevOverrides {
        gate_listen: options.listen,
        control_listen: options.control,
        admin_listen: options.admin,
        data_dir: data.clone(),
        upstream: upstream_address.to_string(),
        feed_token_file: token_file(data, "feed.token")?,
        admin_token_file: token_file(data, "admin.token")?,
    };
    let config = Config::dev(&overrides)?;
    start_logging(&config.log)?;
    Process::assemble(config, None, Some((upstream, upstream_address)), false)?.run()
}

fn start_logging(log: &config::Log) -> Result<(), AppError> {
    let path = match &log.path {
        config::Output::File(path) => Some(path.clone()),
        config::Output::Stdout | config::Output::Stderr => None,
    };
    let settings = logs::Settings {
        level: level(log.level),
        json: log.format == config::Format::Json,
        path,
    };
    logs::start(&settings).map_err(|error| AppError::Failed(format!("cannot log: {error}")))
}

fn level(level: config::Level) -> log::LevelFilter {
    match level {
        config::Level::Off => log::LevelFilter::Off,
        config::Level::Error => log::LevelFilter::Error,
        config::Level::Warn => log::LevelFilter::Warn,
        config::Level::Info => log::LevelFilter::Info,
        config::Level::Debug => log::LevelFilter::Debug,
        config::Level::Trace => log::LevelFilter::Trace,
    }
}
