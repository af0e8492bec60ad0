//! What can be wished for, free of HTTP and of SQL: accounts, keys, tokens, usage. `api` and the portal call it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::hub::Hub;
use super::model::{Applied, Caller, Fault};
use super::password::Passwords;
use super::settings::Settings;
use super::store::{Stamp, Store};
use super::throttle::Throttle;
use crate::clock::Clock;

pub mod accounts;
pub mod admin;
pub mod check;
pub mod keys;
pub mod sessions;
pub mod tokens;
pub mod usage;

/// The control plane's rules over a store.
pub struct Service {
    pub settings: Settings,
    pub store: Arc<dyn Store>,
    pub clock: Clock,
    pub hub: Arc<Hub>,
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
            settings,
            store,
            clock,
        })
    }

    /// Wall time, in ms.
    pub fn now_ms(&self) -> i64 {
        self.clock.now().unix_ms
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

    /// What falls due with time: keys that gates may forget, outcomes, sessions; and what is known of the gates is saved.
    pub async fn maintain(&self) -> Result<(), Fault> {
        let revision = self.store.prune(self.now_ms()).await?;
        self.hub.publish(revision);
        self.save_gates().await
    }

    /// Writes down what is known of the gates.
    pub async fn save_gates(&self) -> Result<(), Fault> {
        let unsaved = self.hub.take_unsaved(self.now_ms());
        if unsaved.is_empty() {
            Ok(())
        } else {
            self.store.save_gates(&unsaved).await
        }
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

/// The window of the limits on signing in: 15 minutes.
const LOGIN_WINDOW_MS: i64 = 15 * 60_000;
