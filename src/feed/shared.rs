//! What the feed's parts share: how the source is doing, and what may be acknowledged to it.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::{LoadOutcome, spool};
use crate::clock::{Clock, Now};
use crate::gate::Gate;

pub struct Shared {
    pub gate: Arc<Gate>,
    pub clock: Clock,
    pub spool: Option<spool::Spool>,
    pub max_staleness: Option<Duration>,
    pub source: String,
    /// Monotonic time of the last good word from the source, on the clock's scale; 0: none.
    pub heard_at_ns: AtomicU64,
    pub newest_revision: AtomicU64,
    pub stale: AtomicBool,
    pub counts: Counts,
    pub behind: AtomicBool,
    /// Whether keys came with the last snapshot or since.
    pub holds_keys: AtomicBool,
    pub connection: Mutex<Connection>,
    /// The newest revision that is in force and that the spool was told of.
    pub kept_revision: Mutex<Option<u64>>,
    /// The revision to acknowledge.
    pub applied: watch::Sender<Option<u64>>,
    /// The spool is to be written anew now, and not only when its time comes.
    pub spool_due: Notify,
}

#[derive(Default)]
pub struct Counts {
    pub connections: AtomicU64,
    pub snapshots: AtomicU64,
    pub changes: AtomicU64,
    pub refused: AtomicU64,
    pub unusable_keys: AtomicU64,
}

#[derive(Default)]
pub struct Connection {
    pub connected: bool,
    pub last_error: Option<String>,
    pub housekeeping: Duration,
}

impl Shared {
    pub fn connection(&self) -> MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn set_housekeeping(&self, interval: Duration) {
        self.connection().housekeeping = interval;
    }

    /// Something good was read from the source just now.
    pub fn heard(&self) {
        self.heard_at_ns
            .fetch_max(self.clock.now().elapsed_ns, Ordering::Relaxed);
        if self.stale.load(Ordering::Relaxed) {
            self.update_staleness();
        }
    }

    pub fn is_stale(&self, now: Now) -> bool {
        let heard_at_ns = self.heard_at_ns.load(Ordering::Relaxed);
        self.max_staleness.is_some_and(|max| {
            heard_at_ns == 0 || Duration::from_nanos(now.elapsed_ns.saturating_sub(heard_at_ns)) > max
        })
    }

    pub fn update_staleness(&self) {
        let stale = self.is_stale(self.clock.now());
        if self.stale.swap(stale, Ordering::Relaxed) != stale {
            self.gate.set_stale(stale);
            if stale {
                log::error!(
                    "feed: {} was not heard for longer than max_staleness: refusing requests",
                    self.source
                );
            } else {
                log::info!("feed: {} is heard again: serving requests", self.source);
            }
        }
    }

    /// Acknowledges what is in force, once a restart would not undo it: after a full snapshot that is when the spool has been
    /// written anew. A spool that cannot be written keeps nothing back, or a broken disk would silence the gate; its error
    /// is in the log, in the status and in the metrics.
    pub fn acknowledge(&self) {
        let kept = *self.kept();
        if kept.is_some() && self.spool.as_ref().is_none_or(spool::Spool::keeps_up) {
            self.applied.send_replace(kept);
        }
    }

    pub fn kept(&self) -> MutexGuard<'_, Option<u64>> {
        self.kept_revision
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The source is being followed again, or for the first time.
    pub fn followed(&self) {
        let was = {
            let mut connection = self.connection();
            connection.connected = true;
            connection.last_error.take()
        };
        if was.is_some() {
            log::info!(
                "feed: {} is followed again, revision {}",
                self.source,
                Revision(self.gate.revision())
            );
        }
    }

    /// The source cannot be followed. Said once for each reason, not for each try.
    pub fn lost(&self, reason: &str) {
        let mut connection = self.connection();
        connection.connected = false;
        if connection.last_error.as_deref() != Some(reason) {
            connection.last_error = Some(reason.to_owned());
            drop(connection);
            log::warn!(
                "feed: {} cannot be followed: {reason}; serving on from revision {}, trying again",
                self.source,
                Revision(self.gate.revision())
            );
        }
    }

    pub fn say_loaded(&self, outcome: &LoadOutcome) {
        let source = &self.source;
        match outcome {
            LoadOutcome::Loaded {
                revision,
                keys,
                damage: None,
                ..
            } => {
                log::info!("feed: {keys} keys at revision {revision} loaded from disk; source {source}");
            }
            LoadOutcome::Loaded {
                revision,
                keys,
                damage: Some(damage),
                ..
            } => {
                log::warn!("feed: {keys} keys at revision {revision} loaded from disk; {damage}; source {source}");
            }
            LoadOutcome::Missing => {
                log::info!("feed: no keys on disk; not ready until {source} has been read");
            }
            LoadOutcome::Refused { reason } => {
                log::warn!("feed: {reason}; not ready until {source} has been read");
            }
        }
    }

    /// Every second, and when a snapshot has come: the spool to the disk, the staleness, what may be acknowledged since.
    pub async fn housekeep(self: &Arc<Self>) {
        let mut ticks = tokio::time::interval(self.connection().housekeeping);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.spool_due.notified() => {}
            }
            self.update_staleness();
            self.keep_spool().await;
        }
    }

    pub async fn keep_spool(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        let kept = tokio::task::spawn_blocking(move || {
            if let Some(spool) = &shared.spool {
                let heard_at_ns = shared.heard_at_ns.load(Ordering::Relaxed);
                let now = shared.clock.now();
                spool.keep(
                    &shared.gate,
                    now,
                    (heard_at_ns > 0).then(|| now.unix_ms_at(heard_at_ns)),
                );
            }
        });
        if kept.await.is_err() {
            log::error!("feed: keeping the spool failed; trying again");
        }
        self.acknowledge();
    }
}

/// A revision for a log line.
struct Revision(Option<u64>);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(revision) => write!(f, "{revision}"),
            None => f.write_str("none"),
        }
    }
}
