//! Starting processes, and talking to running ones over the operator's listener.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::Value;

use super::args::{AdminArgs, DevArgs, MigrateArgs, MigrateCommand, ReloadArgs, RunArgs};
use super::client::Client;
use super::output::Output;
use super::{Exit, Failure};
use crate::app::{self, AppError, DevOptions, MigrateAction, RunOptions};
use crate::config;

/// Where the operator's listener is if nobody says otherwise.
const DEFAULT_ADMIN: &str = "http://127.0.0.1:9090";

pub fn dev(args: DevArgs) -> Result<(), Failure> {
    let options = DevOptions {
        data: args.data,
        listen: args.listen,
        control: args.control,
        admin: args.admin,
    };
    app::dev(options).map_err(failed)
}

pub fn run(args: RunArgs) -> Result<(), Failure> {
    let config = config::load(&args.file.config, &config::process_env)?;
    app::run(
        config,
        RunOptions {
            config_path: args.file.config,
        },
    )
    .map_err(failed)
}

pub fn migrate(args: MigrateArgs, output: &Output) -> Result<(), Failure> {
    let (file, action) = match args.action {
        MigrateCommand::Status(file) => (file, MigrateAction::Status),
        MigrateCommand::Up(file) => (file, MigrateAction::Up),
        MigrateCommand::Backup { file, to } => (file, MigrateAction::Backup { to }),
    };
    let config = config::load(&file.config, &config::process_env)?;
    let report = app::migrate(config, action).map_err(failed)?;
    if output.is_json() {
        output.value(&report)
    } else {
        output.record(&report)
    }
}

fn failed(error: AppError) -> Failure {
    let exit = if error.is_invalid_configuration() {
        Exit::InvalidConfiguration
    } else {
        Exit::Failure
    };
    Failure::new(exit, error)
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
        output.text("Reloaded: the new configuration is in force.")?;
        return match &answer["data"] {
            Value::Object(fields) if !fields.is_empty() => output.record(&answer["data"]),
            _ => Ok(()),
        };
    }
    let error = &answer["error"];
    let mut message = error["message"].as_str().unwrap_or("the reload was refused").to_owned();
    for fault in error["faults"].as_array().into_iter().flatten() {
        let (line, column) = (&fault["line"], &fault["column"]);
        let (path, what) = (
            fault["path"].as_str().unwrap_or(""),
            fault["message"].as_str().unwrap_or(""),
        );
        message.push_str(&format!("\n  {line}:{column}: {path}: {what}"));
    }
    for needed in error["restartNeeded"].as_array().into_iter().flatten() {
        let path = needed["path"].as_str().or(needed.as_str()).unwrap_or("");
        message.push_str(&format!("\n  {path}: needs a restart"));
    }
    let invalid = error["faults"].as_array().is_some_and(|faults| !faults.is_empty());
    let exit = match (invalid, status.is_server_error()) {
        (true, _) => Exit::InvalidConfiguration,
        (false, true) => Exit::Failure,
        (false, false) => Exit::Refused,
    };
    Err(Failure {
        exit,
        message: format!("{message}\nNothing was changed."),
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
