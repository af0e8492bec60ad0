//! The control plane as the rest of the program sees it.

use std::convert::Infallible;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::api;
use super::model::{Actor, Caller, Fault, Origin};
use super::serve;
use super::service::Service;
use super::settings::Settings;
use super::store::copy::{Copied, Progress};
use super::store::{self, MigrationState};
use crate::clock::Clock;
use crate::tls::ListenerTls;

/// A running control plane. Clones share everything.
#[derive(Clone)]
pub struct ControlPlane(Arc<Service>);

impl ControlPlane {
    /// Opens the database, brings its schema up to date, and is ready to serve.
    ///
    /// # Errors
    /// If a setting makes no sense, or the database cannot be opened.
    pub async fn open(settings: Settings, clock: Clock) -> Result<Self, ControlError> {
        check(&settings)?;
        let store = store::open(&settings.database).await?;
        Ok(Self(Arc::new(Service::new(settings, store, clock).await?)))
    }

    /// All routes: the API, the feed, its documents.
    pub fn router(&self) -> axum::Router {
        api::router(Arc::clone(&self.0))
    }

    /// Serves, over TLS if it is given any, until `shutdown`, then ends the feed's connections, finishes what is under way, and
    /// closes the database.
    pub async fn serve(
        &self,
        listener: tokio::net::TcpListener,
        tls: Option<Arc<ListenerTls>>,
        shutdown: impl Future<Output = ()>,
    ) -> std::io::Result<()> {
        let (ended, end) = tokio::sync::watch::channel(false);
        let upkeep = tokio::spawn(keep_up(Arc::clone(&self.0), end));
        let hub = Arc::clone(&self.0.hub);
        // The feed's connections never end by themselves: they are told first, or the others' end would wait for them.
        let shutdown = async move {
            shutdown.await;
            hub.close();
        };
        serve::serve(listener, tls, self.router(), shutdown).await;
        ended.send_replace(true);
        if let Err(error) = upkeep.await {
            log::error!("the control plane's upkeep ended badly: {error}");
        }
        self.0.store.close().await;
        Ok(())
    }

    /// For the `dev` command: makes a demo organisation once, and a fresh live key each time.
    pub async fn dev_key(&self) -> Result<DevKey, ControlError> {
        let caller = Caller {
            actor: Actor::System,
            origin: Origin::default(),
        };
        let made = self.0.dev_key(&caller).await?;
        Ok(DevKey {
            organization_id: made.organization_id,
            key_id: made.key_id,
            secret: made.secret.expose().to_owned(),
        })
    }

    /// Does what falls due with time: lets gates forget keys that were revoked 30 days ago, forgets old sessions and
    /// outcomes, and what the settings say is kept for a while only. [`ControlPlane::serve`] calls it each minute; tests with a clock of their own call it themselves.
    pub async fn maintain(&self) -> Result<(), ControlError> {
        Ok(self.0.maintain().await?)
    }

    /// Each live gate's name and the revision that it has acknowledged.
    pub fn gate_revisions(&self, now_ms: i64) -> Vec<(String, u64)> {
        let states = self.0.hub.states(now_ms).into_iter();
        states.map(|gate| (gate.name, gate.revision)).collect()
    }

    /// How often a password was compared with a hash since the start: the same work is done for an e-mail address that
    /// nobody has.
    pub fn passwords_checked(&self) -> u64 {
        self.0.passwords_checked()
    }

    /// The newest feed revision.
    pub fn revision(&self) -> u64 {
        self.0.hub.revision()
    }
}

/// A fresh key for `tollgate dev`. The secret is for the terminal.
pub struct DevKey {
    pub organization_id: String,
    pub key_id: String,
    pub secret: String,
}

impl fmt::Debug for DevKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevKey")
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

/// Why the control plane cannot start or do what `app` asked of it.
#[derive(Debug)]
pub enum ControlError {
    /// A setting makes no sense.
    Setting(String),
    /// The database cannot be used.
    Database(String),
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ControlError::Setting(why) => write!(f, "control plane: {why}"),
            ControlError::Database(why) => write!(f, "control plane: {why}"),
        }
    }
}

impl std::error::Error for ControlError {}

impl From<Fault> for ControlError {
    fn from(fault: Fault) -> Self {
        ControlError::Database(fault.to_string())
    }
}

/// Which migrations the database at `url` has and lacks.
pub async fn migration_states(url: &str) -> Result<Vec<MigrationState>, ControlError> {
    Ok(store::migration_states(url).await?)
}

/// Brings the schema of the database at `url` up to date.
pub async fn migrate(url: &str) -> Result<(), ControlError> {
    Ok(store::migrate(url).await?)
}

/// Copies the SQLite database at `url` to the new file `target`, consistently and while it is in use.
pub async fn backup(url: &str, target: &Path) -> Result<(), ControlError> {
    Ok(store::backup(url, target).await?)
}

/// Copies the SQLite database at `from` into the empty PostgreSQL database at `to`, as [`store::copy`] has it.
pub async fn copy(
    from: &str,
    to: &str,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Vec<Copied>, ControlError> {
    Ok(store::copy::copy(from, to, progress).await?)
}

async fn keep_up(service: Arc<Service>, mut ended: tokio::sync::watch::Receiver<bool>) {
    tokio::select! {
        never = maintain_each_minute(&service) => match never {},
        never = save_gates(&service) => match never {},
        () = service.follow_others() => {}
        _ = ended.wait_for(|ended| *ended) => {}
    }
    if let Err(fault) = service.save_gates(true).await {
        log::warn!("the gates' states were not saved: {fault}");
    }
}

async fn maintain_each_minute(service: &Service) -> Infallible {
    let mut minutes = tokio::time::interval(Duration::from_secs(60));
    minutes.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        minutes.tick().await;
        if let Err(fault) = service.maintain().await {
            log::warn!("the control plane's upkeep will be tried again: {fault}");
        }
    }
}

/// Gates are saved often, because a restart believes what was saved; and at once where other processes want to know it.
/// Those that speak while others are being saved are saved together.
async fn save_gates(service: &Service) -> Infallible {
    let mut ticks = tokio::time::interval(Duration::from_secs(5));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let is_tick = tokio::select! {
            _ = ticks.tick() => true,
            () = service.hub.unsaved(), if service.is_shared => false,
        };
        let mut saved = service.save_gates(is_tick).await;
        if is_tick && service.is_shared && saved.is_ok() {
            saved = service.look_around().await;
        }
        if let Err(fault) = saved {
            log::warn!("what is known of the gates will be saved again: {fault}");
        }
    }
}

fn check(settings: &Settings) -> Result<(), ControlError> {
    let wrong = |why: &str| Err(ControlError::Setting(why.to_owned()));
    if settings.environments.is_empty() {
        return wrong("there is no environment");
    }
    if settings
        .environments
        .iter()
        .any(|e| e.prefix.is_empty() || e.prefix.len() > 19)
    {
        return wrong("an environment's prefix must have 1 to 19 characters: a key must fit into 55");
    }
    if !settings.plans.iter().any(|p| p.name == settings.default_plan) {
        return wrong("the default plan is not among the plans");
    }
    if !(0..=settings.max_grace_ms).contains(&settings.default_grace_ms) {
        return wrong("the default grace must lie between 0 and the longest grace");
    }
    if settings.feed_token.is_empty() {
        return wrong("the feed's token is empty");
    }
    Ok(())
}
