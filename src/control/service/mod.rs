//! What can be wished for, free of HTTP and of SQL: accounts, keys, tokens, usage. `api` and the portal call it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::hub::{Connected, Hub};
use super::model::{Applied, Caller, Fault};
use super::password::Passwords;
use super::settings::Settings;
use super::store::{News, Stamp, Store};
use super::throttle::Throttle;
use crate::clock::Clock;

pub mod accounts;
pub mod admin;
pub mod check;
pub mod keys;
mod retention;
pub mod sessions;
pub mod tokens;
pub mod usage;

/// The control plane's rules over a store.
pub struct Service {
    pub settings: Settings,
    pub store: Arc<dyn Store>,
    pub clock: Clock,
    pub hub: Arc<Hub>,
    /// Whether other processes may use the store too.
    pub is_shared: bool,
    passwords: Passwords,
    registrations: Throttle,
    logins_by_address: Throttle,
    logins_by_account: Throttle,
}

impl Service {
    /// Over an open store.
    pub async fn new(settings: Settings, store: Arc<dyn Store>, clock: Clock) -> Result<Self, Fault> {
        let hub = Hub::new(store.revision().await?, store.gates().await?, settings.gate_live_for);
        Ok(Self {
            passwords: Passwords::new().await?,
            registrations: Throttle::new(settings.registrations_per_hour, 3_600_000),
            logins_by_address: Throttle::new(settings.login_attempts, LOGIN_WINDOW_MS),
            logins_by_account: Throttle::new(settings.login_attempts, LOGIN_WINDOW_MS),
            hub: Arc::new(hub),
            is_shared: store.is_shared(),
            settings,
            store,
            clock,
        })
    }

    /// Wall time, in ms.
    pub fn now_ms(&self) -> i64 {
        self.clock.now().unix_ms
    }

    /// How often a password was compared with a hash.
    pub fn passwords_checked(&self) -> u64 {
        self.passwords.checked()
    }

    /// Waits until every live gate has applied `revision`, or until `wait` is over; says who has.
    pub async fn wait_until_applied(&self, revision: u64, wait: Duration) -> Applied {
        let deadline = Instant::now() + wait;
        let mut news = self.hub.news();
        loop {
            news.borrow_and_update();
            let applied = self.hub.applied(revision, self.now_ms());
            if applied.pending.is_empty() {
                return applied;
            }
            // A gate also leaves the list by falling silent, of which there is no news: look again each second.
            let until = deadline.min(Instant::now() + Duration::from_secs(1));
            let woken = tokio::time::timeout_at(until, news.changed()).await;
            if woken.is_err() && Instant::now() >= deadline {
                return self.hub.applied(revision, self.now_ms());
            }
        }
    }

    /// What falls due with time: keys that gates may forget, outcomes, sessions, and what is kept for a while only.
    pub async fn maintain(&self) -> Result<(), Fault> {
        let revision = self.store.prune(self.now_ms()).await?;
        self.hub.publish(revision);
        self.forget_old().await
    }

    /// A gate has connected and says that it has `revision`. Written down before it is answered: what it acknowledges
    /// next, perhaps to another process, comes after.
    pub async fn gate_connected(&self, name: &str, revision: u64) -> Connected {
        let connected = self.hub.connect(name, revision, self.now_ms());
        if self.is_shared
            && let Err(fault) = self.save_gates(false).await
        {
            log::warn!("that {name} has connected is not written down yet: {fault}");
        }
        connected
    }

    /// A gate has applied everything up to `revision`.
    pub async fn gate_acknowledged(&self, name: &str, revision: u64, version: Option<String>) -> Result<(), Fault> {
        // It may have heard of it from another process sooner than this one did.
        if self.is_shared && revision > self.hub.revision() {
            self.hub.publish(self.store.revision().await?);
        }
        self.hub.acknowledge(name, revision, version, self.now_ms());
        Ok(())
    }

    /// Writes down what gates have said; and, if `refresh`, that those that are connected still are.
    pub async fn save_gates(&self, refresh: bool) -> Result<(), Fault> {
        let unsaved = self.hub.take_unsaved(refresh, self.now_ms());
        if unsaved.is_empty() {
            return Ok(());
        }
        self.store.save_gates(&unsaved).await?;
        unsaved.saved();
        Ok(())
    }

    /// Follows what other processes change, as long as it is polled; at once where the store announces it, and by looking
    /// each second in any case. Never ends, also where nobody else shares the store.
    pub async fn follow_others(&self) {
        let Some(mut news) = self.store.news() else {
            return std::future::pending().await;
        };
        loop {
            let followed = match tokio::time::timeout(LOOK_EVERY, news.recv()).await {
                Ok(Some(News::Revision(revision))) => {
                    self.hub.publish(revision);
                    Ok(())
                }
                Ok(Some(News::Gates(states))) => {
                    self.hub.merge(states);
                    Ok(())
                }
                Ok(Some(News::Unknown)) => self.look_around().await,
                Ok(None) => return std::future::pending().await,
                Err(_) => self.store.revision().await.map(|revision| self.hub.publish(revision)),
            };
            if let Err(fault) = followed {
                log::debug!("what others have changed is not known yet: {fault}");
            }
        }
    }

    /// Looks at everything that another process may have changed.
    pub async fn look_around(&self) -> Result<(), Fault> {
        self.hub.publish(self.store.revision().await?);
        self.hub.merge_all(self.store.gates().await?);
        Ok(())
    }

    /// Writes down that something was used, beside the request that used it: reading goes on while nothing can be
    /// written.
    fn note_use(&self, write: impl Future<Output = Result<(), Fault>> + Send + 'static) {
        tokio::spawn(async move {
            if let Err(fault) = write.await {
                log::debug!("a last use was not written down: {fault}");
            }
        });
    }

    fn stamp<'a>(&self, caller: &'a Caller) -> Stamp<'a> {
        Stamp {
            caller,
            now_ms: self.now_ms(),
        }
    }
}

/// How often it is looked for changes that were not announced. With this, a change takes effect within about a second
/// though every announcement is lost.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The window of the limits on signing in: 15 minutes.
const LOGIN_WINDOW_MS: i64 = 15 * 60_000;
