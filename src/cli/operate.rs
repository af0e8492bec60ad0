//! Starting processes, and talking to running ones over the operator's listener.

use std::path::Path;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::args::{AdminArgs, DevArgs, MigrateArgs, MigrateCommand, ReloadArgs, RunArgs, UpgradeArgs};
use super::client::Client;
use super::output::{Output, cell, shows_progress};
use super::{Exit, Failure};
use crate::app::{self, AppError, DevOptions, RunOptions};
use crate::config::{self, Database};
use crate::control;

/// Where the operator's listener is if nobody says otherwise.
const DEFAULT_ADMIN: &str = "http://127.0.0.1:9090";

pub fn dev(args: DevArgs) -> Result<(), Failure> {
    let DevArgs {
        data,
        listen,
        control,
        admin,
    } = args;
    app::dev(DevOptions {
        data,
        listen,
        control,
        admin,
    })
    .map_err(failed)
}

pub fn run(args: RunArgs) -> Result<(), Failure> {
    let config = config::load(&args.file.config, &config::process_env)?;
    app::run(
        config,
        RunOptions {
            config_path: args.file.config,
            upgrade: args.upgrade,
        },
    )
    .map_err(failed)
}

fn failed(error: AppError) -> Failure {
    match error {
        AppError::Config(faults) => faults.into(),
        other => Failure::new(Exit::Failure, other),
    }
}

pub fn migrate(args: MigrateArgs, output: &Output) -> Result<(), Failure> {
    let (MigrateCommand::Status(file)
    | MigrateCommand::Up(file)
    | MigrateCommand::Backup { file, .. }
    | MigrateCommand::Copy { file, .. }) = &args.action;
    let config = config::load(&file.config, &config::process_env)?;
    let url = match config.control.map(|control| control.database) {
        Some(Database::Sqlite { path }) => format!("sqlite://{}", path.display()),
        Some(Database::Postgres { url }) => url.expose().to_owned(),
        None => {
            let message = format!(
                "{} has no section `control`, so there is no database",
                file.config.display()
            );
            return Err(Failure::new(Exit::Usage, message));
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let failed = |error: control::ControlError| Failure::new(Exit::Failure, error);
    match &args.action {
        MigrateCommand::Status(_) => {}
        MigrateCommand::Up(_) => {
            let bar = working("migrating");
            let done = runtime.block_on(control::migrate(&url));
            bar.inspect(indicatif::ProgressBar::finish_and_clear);
            done.map_err(failed)?;
        }
        MigrateCommand::Backup { to, .. } => {
            let bar = working("copying");
            let done = runtime.block_on(control::backup(&url, to));
            bar.inspect(indicatif::ProgressBar::finish_and_clear);
            done.map_err(failed)?;
            if output.is_json() {
                return output.value(&serde_json::json!({"backup": to.display().to_string()}));
            }
            return output.text(&format!("Copied the database to {}.", to.display()));
        }
        MigrateCommand::Copy { from, .. } => {
            let copied = copy(&runtime, from, &url)?;
            return report_copied(&copied, output);
        }
    }
    let states = runtime.block_on(control::migration_states(&url)).map_err(failed)?;
    migration_states(&states, output)
}

/// From a SQLite file to the database at `url`, with a bar on a terminal.
fn copy(runtime: &tokio::runtime::Runtime, from: &Path, url: &str) -> Result<Vec<control::Copied>, Failure> {
    let bar = shows_progress().then(|| {
        let bar = indicatif::ProgressBar::no_length();
        // A template that cannot be read would be a mistake of ours; the default one shows as much.
        if let Ok(style) = indicatif::ProgressStyle::with_template("{msg:28} {wide_bar} {human_pos}/{human_len} {eta}")
        {
            bar.set_style(style);
        }
        bar
    });
    let mut show = |progress: control::Progress| {
        if let Some(bar) = &bar {
            let what = if progress.is_verifying { "verifying" } else { "copying" };
            bar.set_message(format!("{what} {}", progress.table));
            bar.set_length(progress.total);
            bar.set_position(progress.done);
        }
    };
    let copied = runtime.block_on(control::copy(&format!("sqlite://{}", from.display()), url, &mut show));
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    copied.map_err(|error| Failure::new(Exit::Failure, error))
}

fn report_copied(copied: &[control::Copied], output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        let tables = copied
            .iter()
            .map(|table| serde_json::json!({"table": table.table, "rows": table.rows, "sha256": table.sha256}));
        return output.value(&tables.collect());
    }
    let row = |table: &control::Copied| vec![table.table.to_owned(), table.rows.to_string(), table.sha256.clone()];
    output.table(
        &["table", "rows", "sha256"],
        &copied.iter().map(row).collect::<Vec<_>>(),
    )?;
    output.text("Copied, read back, and found the same.")
}

/// A sign of life on a terminal, for work whose length is not known.
fn working(what: &'static str) -> Option<indicatif::ProgressBar> {
    shows_progress().then(|| {
        let bar = indicatif::ProgressBar::new_spinner().with_message(what);
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    })
}

fn migration_states(states: &[control::MigrationState], output: &Output) -> Result<(), Failure> {
    if output.is_json() {
        let states = states.iter().map(|state| {
            serde_json::json!({"version": state.version, "description": state.description, "applied": state.applied})
        });
        return output.value(&states.collect());
    }
    let row = |state: &control::MigrationState| {
        let applied = if state.applied { "applied" } else { "missing" };
        vec![state.version.to_string(), state.description.clone(), applied.to_owned()]
    };
    output.table(
        &["version", "description", "state"],
        &states.iter().map(row).collect::<Vec<_>>(),
    )
}

/// `POST /reload`: its answer comes when the new configuration is in force, or when it was refused.
pub fn reload(args: &ReloadArgs, output: &Output) -> Result<(), Failure> {
    if let Some(path) = &args.admin.config {
        // Told here already, with every place: the running process would say the same.
        config::load(path, &config::process_env)?;
    }
    let client = admin(&args.admin, args.wait.max(Duration::from_secs(1)))?;
    let (status, text) = client.send(Method::POST, "/reload", &[], None, None)?;
    let answer: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    if status.is_success() {
        if output.is_json() {
            return output.value(&answer["data"]);
        }
        output.text("Reloaded: what a reload can change is in force.")?;
        for path in answer["data"]["needsRestart"].as_array().into_iter().flatten() {
            output.text(&format!("{}: has changed, and takes effect at a restart", cell(path)))?;
        }
        return Ok(());
    }
    let error = &answer["error"];
    let message = error["message"].as_str().unwrap_or("the reload was refused");
    let exit = match error["code"].as_str() {
        Some("INVALID_CONFIGURATION") => Exit::InvalidConfiguration,
        _ if status.is_server_error() => Exit::Failure,
        _ => Exit::Refused,
    };
    Err(Failure {
        exit,
        message: format!("{message}\nNothing was changed."),
        json: Some(answer),
    })
}

/// `POST /upgrade`: its answer comes when the new process serves, or when the old one serves on.
pub fn upgrade(args: &UpgradeArgs, output: &Output) -> Result<(), Failure> {
    if let Some(path) = &args.admin.config {
        // With this program, which is the new one.
        config::load(path, &config::process_env)?;
    }
    let deadline = std::time::Instant::now() + args.wait;
    let left = || {
        deadline
            .saturating_duration_since(std::time::Instant::now())
            .max(Duration::from_secs(1))
    };
    // The process before may still finish long requests; until it has, another upgrade would be refused.
    while admin(&args.admin, Duration::from_secs(10))?.call(Method::GET, "/status", &[], None)?["predecessorDraining"]
        == Value::Bool(true)
    {
        if std::time::Instant::now() >= deadline {
            let message = "the process before the running one has not ended yet: try again when it has";
            return Err(Failure::new(Exit::Refused, message));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let (status, text) = admin(&args.admin, left())?.send(Method::POST, "/upgrade", &[], None, None)?;
    let answer: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
    if status.is_success() {
        let data = &answer["data"];
        if output.is_json() {
            return output.value(data);
        }
        return output.text(&format!(
            "Process {} serves; {} finishes what is under way and ends. Requests waited for {} ms.",
            cell(&data["successor"]),
            cell(&data["predecessor"]),
            data["pauseMs"].as_f64().unwrap_or_default().round()
        ));
    }
    let message = answer["error"]["message"].as_str().unwrap_or("the upgrade was refused");
    Err(Failure {
        exit: Exit::Failure,
        message: format!("{message}\nThe running process serves on."),
        json: Some(answer),
    })
}

pub fn status(args: &AdminArgs, output: &Output) -> Result<(), Failure> {
    let status = admin(args, Duration::from_secs(10))?.call(Method::GET, "/status", &[], None)?;
    if output.is_json() {
        output.value(&status)
    } else {
        output.record(&status)
    }
}

pub fn healthcheck(args: &AdminArgs, output: &Output) -> Result<(), Failure> {
    let (status, text) = admin(args, Duration::from_secs(5))?.send(Method::GET, "/readyz", &[], None, None)?;
    let said: String = text.trim().chars().filter(|c| !c.is_control()).take(200).collect();
    if status == StatusCode::OK {
        return if output.is_json() {
            output.value(&serde_json::json!({"ready": true}))
        } else {
            output.text("ready")
        };
    }
    Err(Failure {
        exit: Exit::Failure,
        message: if said.is_empty() {
            format!("not ready: {status}")
        } else {
            said.clone()
        },
        json: Some(serde_json::json!({"ready": false, "reason": said})),
    })
}

/// The operator's listener: as given, or where the configuration's process has written its address, or as configured.
fn admin(args: &AdminArgs, timeout: Duration) -> Result<Client, Failure> {
    let url = match (&args.admin, &args.config) {
        (Some(url), _) if url.contains("://") => url.clone(),
        (Some(address), _) => format!("http://{address}"),
        (None, None) => DEFAULT_ADMIN.to_owned(),
        (None, Some(path)) => {
            let config = config::load(path, &config::process_env)?;
            let Some(admin) = config.admin else {
                return Err(Failure::new(
                    Exit::Usage,
                    format!("{} has no section `admin`", path.display()),
                ));
            };
            let state_dir = config
                .gate
                .map(|gate| gate.state_dir)
                .or(config.control.map(|control| control.state_dir));
            let written = state_dir.and_then(|dir| std::fs::read_to_string(dir.join("run/admin.addr")).ok());
            let address = written
                .map(|text| text.trim().to_owned())
                .filter(|text| !text.is_empty());
            format!("http://{}", reachable(&address.unwrap_or(admin.address)))
        }
    };
    Client::open(&url, timeout)
}

/// An address to listen on as one to connect to.
fn reachable(address: &str) -> String {
    match address.rsplit_once(':') {
        Some(("0.0.0.0", port)) => format!("127.0.0.1:{port}"),
        Some(("[::]", port)) => format!("[::1]:{port}"),
        _ => address.to_owned(),
    }
}
