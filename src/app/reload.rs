//! A reload: the configuration is read again, and what can change while running is put in force.

use super::metrics::Reloads;
use super::process::Process;
use super::settings::Bound;
use super::{AppError, level, settings};
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::gate::Gate;
use crate::proxy::Proxy;
use crate::proxy::access_log::AccessLog;
use crate::telemetry::logs;
use crate::tls::ListenerTls;
use serde_json::{Value, json};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// Reads the configuration again and puts what can be changed while running in force: whole or not at all.
pub struct Reloader {
    path: Option<PathBuf>,
    bound: Bound,
    in_force: Mutex<Config>,
    gate: Option<(Arc<Gate>, Proxy, Option<AccessLog>)>,
    certificates: Vec<Arc<ListenerTls>>,
    pub outcomes: Arc<Reloads>,
    clock: Clock,
}

impl Reloader {
    pub fn new(process: &Process) -> Self {
        Reloader {
            path: process.config_path.clone(),
            bound: process.bound,
            in_force: Mutex::new(process.config.clone()),
            certificates: process.certificates(),
            outcomes: Arc::new(Reloads {
                in_force_since_unix_ms: (process.clock.now().unix_ms.unsigned_abs()).into(),
                ..Reloads::default()
            }),
            clock: process.clock.clone(),
            gate: process.gate.as_ref().map(|gate| {
                (
                    gate.gate.clone(),
                    gate.proxy.clone(),
                    gate.access_log.as_ref().map(|(log, _)| log.clone()),
                )
            }),
        }
    }

    pub async fn reload(self: &Arc<Self>) -> Result<Value, Value> {
        let this = self.clone();
        let outcome = tokio::task::spawn_blocking(move || this.reload_now()).await;
        let outcome = outcome.unwrap_or_else(|error| Err(AppError::Failed(error.to_string())));
        self.count(outcome.is_ok());
        match outcome {
            Ok(restart) => {
                log::info!("the configuration was reloaded");
                for path in &restart {
                    log::warn!("{path} has changed and needs a restart");
                }
                Ok(json!({"reloaded": true, "needsRestart": restart}))
            }
            Err(error) => {
                log::error!("the configuration was not reloaded, the old one stays in force: {error}");
                let code = if error.is_invalid_configuration() {
                    "INVALID_CONFIGURATION"
                } else {
                    "NOT_RELOADED"
                };
                Err(json!({"code": code, "message": error.to_string()}))
            }
        }
    }

    fn count(&self, succeeded: bool) {
        let outcomes = &self.outcomes;
        let count = if succeeded {
            &outcomes.succeeded
        } else {
            &outcomes.failed
        };
        count.fetch_add(1, Ordering::Relaxed);
        outcomes.last_failed.store(u64::from(!succeeded), Ordering::Relaxed);
        if succeeded {
            let now_ms = self.clock.now().unix_ms.unsigned_abs();
            outcomes.in_force_since_unix_ms.store(now_ms, Ordering::Relaxed);
        }
    }

    fn reload_now(&self) -> Result<Vec<String>, AppError> {
        let Some(path) = &self.path else {
            return Err(AppError::Failed(
                "this process runs on the built-in configuration".to_owned(),
            ));
        };
        let config = config::load(path, &config::process_env)?;
        let mut in_force = self.in_force.lock().unwrap_or_else(|e| e.into_inner());
        let restart = config::diff(&in_force, &config)
            .into_iter()
            .map(|needed| needed.path)
            .collect();
        // Certificates are read again by themselves; a reload does not wait for that, and says what is wrong with one.
        for tls in &self.certificates {
            tls.check()?;
        }
        if let (Some((gate, proxy, access_log)), Some(_)) = (&self.gate, &config.gate) {
            // What can fail comes before the first change.
            let proxy_settings = settings::proxy(&config, self.bound)?;
            let failed = |error: &dyn fmt::Display| AppError::Failed(error.to_string());
            gate.reload(settings::gate(&config)?).map_err(|error| failed(&error))?;
            proxy.reload(&proxy_settings).map_err(|bad| AppError::internal(bad.0))?;
            if let Some(access_log) = access_log {
                access_log.reopen(REOPEN_WITHIN);
            }
        }
        for tls in &self.certificates {
            tls.reload()?;
        }
        logs::set_level(level(config.log.level));
        *in_force = config;
        Ok(restart)
    }
}

/// A reload does not wait longer than this for a disk that hangs.
const REOPEN_WITHIN: std::time::Duration = std::time::Duration::from_secs(1);
