//! What the gate has counted, made durable: window counts in the journal, so that a restart forgives nothing, and
//! usage in batches for the control plane's ledger, each applied there exactly once.
//!
//! Read `journal` for the first, `usage` (what a batch is made of) and `outbox` (batches on disk until they are
//! acknowledged) for the second. Everything here happens off the request path: the gate is drained about once a
//! second on a blocking thread.
//!
//! What a crash costs: counts since the last flush, never more, and never a count twice.

mod journal;
mod outbox;
mod usage;

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use tokio::sync::Notify;

use crate::clock::Clock;
use crate::gate::Gate;
use journal::Journal;
use outbox::{Outbox, Parcel};
use usage::Tally;

pub use journal::JournalOutcome;

/// How the gate's counts are kept.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This gate's stable name; the ledger tells gates apart by it.
    pub gate_name: String,
    /// Where usage is posted; `None`: nowhere (keys come from a file), it is then seen in metrics only.
    pub control: Option<Control>,
    /// Where the journal and the batches lie. Created if missing.
    pub state_dir: PathBuf,
    /// How often the gate is drained.
    pub flush_interval: Duration,
    /// Batches waiting for the control plane are made coarser in time, minutes to hours to days, so as to stay below
    /// this many bytes on disk. Their sums stay what they are.
    pub outbox_bytes: u64,
}

impl Settings {
    /// Settings with every default.
    pub fn new(gate_name: impl Into<String>, control: Option<Control>, state_dir: impl Into<PathBuf>) -> Self {
        Settings {
            gate_name: gate_name.into(),
            control,
            state_dir: state_dir.into(),
            // The promise is one second at most; the rest of it is for the disk.
            flush_interval: Duration::from_millis(900),
            // A day of 1,000 keys in 4 tiers by the minute.
            outbox_bytes: 512 << 20,
        }
    }
}

/// The control plane that usage is posted to.
#[derive(Clone, Debug)]
pub struct Control {
    /// Base URL; `/feed/v1/usage` is appended.
    pub url: String,
    /// The `Authorization` header with the feed token, marked as sensitive.
    pub authorization: HeaderValue,
    pub client: reqwest::Client,
}

/// Drains a gate and keeps what it counted.
pub struct Meter {
    shared: Arc<Shared>,
    control: Option<Control>,
    flush_interval: Duration,
}

/// How the meter is doing, for metrics and `/status`. Counters are since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MeterStatus {
    /// Permits drained from the gate.
    pub permits: u64,
    /// Refusals drained from the gate, by code.
    pub refusals: BTreeMap<String, u64>,
    /// Batches that wait for the control plane's acknowledgement.
    pub unsent_batches: u64,
    pub unsent_bytes: u64,
    pub sent_batches: u64,
    pub journal_bytes: u64,
    /// Why usage could not be posted last, until it can be again.
    pub post_error: Option<String>,
    /// Why something could not be written last, until it can be again.
    pub disk_error: Option<String>,
}

struct Shared {
    gate: Arc<Gate>,
    clock: Clock,
    flush_interval: Duration,
    journal: Mutex<Journal>,
    outbox: Option<Mutex<Outbox>>,
    /// Drained, but not in the outbox yet.
    tally: Mutex<Tally>,
    permits: AtomicU64,
    sent_batches: AtomicU64,
    report: Mutex<Report>,
    more_to_send: Notify,
}

#[derive(Default)]
struct Report {
    refusals: BTreeMap<&'static str, u64>,
    post_error: Option<String>,
    disk_error: Option<String>,
    journal_bytes: u64,
}

impl Meter {
    /// # Errors
    /// The state directory cannot be made, or read.
    pub fn new(settings: Settings, gate: Arc<Gate>, clock: Clock) -> io::Result<Meter> {
        std::fs::create_dir_all(&settings.state_dir)?;
        let outbox = match &settings.control {
            None => None,
            Some(_) => Some(Mutex::new(Outbox::open(
                settings.state_dir.join("usage"),
                settings.gate_name.clone(),
                settings.outbox_bytes,
                clock.now(),
            )?)),
        };
        Ok(Meter {
            shared: Arc::new(Shared {
                gate,
                clock,
                flush_interval: settings.flush_interval,
                journal: Mutex::new(Journal::new(settings.state_dir.join("windows.journal"))),
                outbox,
                tally: Mutex::default(),
                permits: AtomicU64::new(0),
                sent_batches: AtomicU64::new(0),
                report: Mutex::default(),
                more_to_send: Notify::new(),
            }),
            control: settings.control,
            flush_interval: settings.flush_interval,
        })
    }

    /// Puts the counts of earlier processes back into the gate, before the first request is served. To be called
    /// once, and best after the keys are loaded, because their plans say how long a window is; blocks. Says what it found in one log line.
    pub fn load_journal(&self) -> JournalOutcome {
        let shared = &self.shared;
        let now = shared.clock.now();
        let outcome = locked(&shared.journal).load(&shared.gate, now);
        match &outcome {
            JournalOutcome::Missing => log::info!("meter: no journal; every window starts empty"),
            JournalOutcome::Restored {
                windows,
                permits,
                damage: None,
            } => {
                log::info!("meter: {windows} windows with {permits} permits restored from the journal");
            }
            JournalOutcome::Restored {
                windows,
                permits,
                damage: Some(damage),
            } => {
                log::warn!("meter: {windows} windows with {permits} permits restored from the journal; {damage}");
            }
            JournalOutcome::Unusable { reason } => log::error!("meter: {reason}; every window starts empty"),
        }
        outcome
    }

    /// Drains the gate about once a second and posts its usage, until `shutdown`. What is counted after that is for
    /// [`Meter::stop`].
    pub async fn run(&self, shutdown: impl Future<Output = ()> + Send) {
        tokio::select! {
            () = shutdown => {}
            () = self.flush_for_ever() => {}
            () = self.post_for_ever() => {}
        }
    }

    /// Makes durable whatever was counted so far. Returns once it is on the disk, or could not be put there.
    pub async fn flush(&self) {
        let shared = Arc::clone(&self.shared);
        if tokio::task::spawn_blocking(move || shared.flush()).await.is_err() {
            log::error!("meter: a flush broke off; trying again");
        }
    }

    /// To be called at a stop, after the last request: the journal exactly, and one bounded try to post the usage.
    pub async fn stop(&self) {
        self.flush().await;
        let Some(control) = &self.control else { return };
        self.shared.release().await;
        let posted = tokio::time::timeout(LAST_POST_TIMEOUT, async {
            while let Some(parcel) = self.shared.next_parcel().await {
                if self.post(control, parcel).await.is_err() {
                    break;
                }
            }
        });
        if posted.await.is_err() {
            log::warn!("meter: the control plane takes too long to take the usage: kept for the next start");
        }
    }

    pub fn status(&self) -> MeterStatus {
        let shared = &self.shared;
        let (unsent_batches, unsent_bytes) = shared.outbox.as_ref().map_or((0, 0), |outbox| locked(outbox).waiting());
        let report = locked(&shared.report);
        MeterStatus {
            permits: shared.permits.load(Ordering::Relaxed),
            refusals: report
                .refusals
                .iter()
                .map(|(code, count)| ((*code).to_owned(), *count))
                .collect(),
            unsent_batches,
            unsent_bytes,
            sent_batches: shared.sent_batches.load(Ordering::Relaxed),
            journal_bytes: report.journal_bytes,
            post_error: report.post_error.clone(),
            disk_error: report.disk_error.clone(),
        }
    }

    async fn flush_for_ever(&self) {
        let mut ticks = tokio::time::interval(self.flush_interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.flush().await;
        }
    }

    async fn post_for_ever(&self) {
        let Some(control) = &self.control else {
            return std::future::pending().await;
        };
        let mut delay = FIRST_RETRY;
        loop {
            let Some(parcel) = self.shared.next_parcel().await else {
                // Woken by a flush; by the clock because a refused batch may be tried again.
                let _ = tokio::time::timeout(LOOK_AGAIN, self.shared.more_to_send.notified()).await;
                continue;
            };
            if self.post(control, parcel).await.is_ok() {
                delay = FIRST_RETRY;
            } else {
                let jitter = f64::from(getrandom::u32().unwrap_or(0)) / f64::from(u32::MAX);
                tokio::time::sleep(delay.mul_f64(0.5 + 0.5 * jitter)).await;
                delay = (delay * 2).min(LAST_RETRY);
            }
        }
    }

    /// Posts one batch. `Err`: the control plane cannot be reached, or will not take any.
    async fn post(&self, control: &Control, mut parcel: Parcel) -> Result<(), ()> {
        let sent = control
            .client
            .post(format!("{}/feed/v1/usage", control.url.trim_end_matches('/')))
            .header(AUTHORIZATION, control.authorization.clone())
            .header(CONTENT_TYPE, "application/json")
            .timeout(POST_TIMEOUT)
            .body(std::mem::take(&mut parcel.body))
            .send()
            .await;
        let shared = &self.shared;
        match sent {
            Ok(response) if response.status().is_success() => {
                shared.delivered(parcel).await;
                Ok(())
            }
            // This batch is at fault, not the connection: the others need not wait for it. It is kept.
            Ok(response) if matches!(response.status().as_u16(), 400 | 413 | 422) => {
                let status = response.status().as_u16();
                log::error!(
                    "meter: batch {} is refused with status {status}: kept, tried again later",
                    parcel.name
                );
                shared.set_aside(&parcel);
                Ok(())
            }
            Ok(response) => {
                shared.cannot_post(format!("status {}", response.status().as_u16()));
                Err(())
            }
            Err(error) => {
                shared.cannot_post(cause(&error));
                Err(())
            }
        }
    }
}

impl Shared {
    fn flush(&self) {
        let now = self.clock.now();
        // A count belongs to the minute it was made in; on average that is half a flush ago.
        let minute = (now.unix_ms - self.flush_interval.as_millis() as i64 / 2).div_euclid(60_000);
        // Until the end, so that of two flushes, as there may be at a stop, the later one is the last to touch a file:
        // after it the files are the next process's.
        let mut tally = locked(&self.tally);
        let drained = usage::drain(&self.gate, minute, &mut tally);
        self.permits.fetch_add(drained.permits, Ordering::Relaxed);
        {
            let mut report = locked(&self.report);
            for (code, count) in drained.refusals {
                *report.refusals.entry(code).or_default() += count;
            }
        }
        // After the permits: draining them marks their windows as changed.
        let journalled = {
            let mut journal = locked(&self.journal);
            let journalled = journal.append(&self.gate, now);
            locked(&self.report).journal_bytes = journal.bytes();
            journalled.map_err(|error| format!("cannot write the journal: {error}"))
        };
        let stored = self
            .store(&mut tally)
            .map_err(|error| format!("cannot write usage: {error}"));
        let disk_error = journalled.and(stored).err();
        let before = std::mem::replace(&mut locked(&self.report).disk_error, disk_error.clone());
        match (before, disk_error) {
            (None, Some(error)) => log::error!("meter: {error}; kept in memory, trying again"),
            (Some(_), None) => log::info!("meter: counts are written to disk again"),
            _ => {}
        }
    }

    /// Moves what was drained into the outbox. What cannot be written stays for the next time.
    fn store(&self, tally: &mut Tally) -> io::Result<()> {
        let Some(outbox) = &self.outbox else {
            *tally = Tally::default();
            return Ok(());
        };
        let mut outbox = locked(outbox);
        let now = self.clock.now();
        if !tally.is_empty() {
            outbox.push(tally, now)?;
        }
        if outbox.flushed(now)? {
            self.more_to_send.notify_one();
        }
        outbox.merge_if_many(now)
    }

    /// Lets everything be posted that is in the outbox.
    async fn release(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        let release = move || match &shared.outbox {
            Some(outbox) => locked(outbox).release(shared.clock.now()),
            None => Ok(()),
        };
        if !matches!(tokio::task::spawn_blocking(release).await, Ok(Ok(()))) {
            log::warn!("meter: the last usage cannot be put together: kept for the next start");
        }
    }

    async fn next_parcel(self: &Arc<Self>) -> Option<Parcel> {
        let shared = Arc::clone(self);
        let next = tokio::task::spawn_blocking(move || locked(shared.outbox.as_ref()?).next(shared.clock.now()));
        next.await.unwrap_or_else(|error| {
            log::error!("meter: reading a batch broke off: {error}");
            None
        })
    }

    async fn delivered(self: &Arc<Self>, parcel: Parcel) {
        self.sent_batches.fetch_add(1, Ordering::Relaxed);
        if locked(&self.report).post_error.take().is_some() {
            log::info!("meter: usage is posted again");
        }
        let shared = Arc::clone(self);
        let forgotten = tokio::task::spawn_blocking(move || {
            if let Some(outbox) = &shared.outbox {
                locked(outbox).delivered(&parcel);
            }
        });
        if forgotten.await.is_err() {
            log::error!("meter: a posted batch could not be removed; posting it again does no harm");
        }
    }

    fn set_aside(&self, parcel: &Parcel) {
        if let Some(outbox) = &self.outbox {
            locked(outbox).set_aside(parcel, self.clock.now());
        }
    }

    fn cannot_post(&self, problem: String) {
        let mut report = locked(&self.report);
        if report.post_error.as_deref() != Some(&problem) {
            log::warn!("meter: usage cannot be posted: {problem}; kept on disk, trying again");
            report.post_error = Some(problem);
        }
    }
}

/// What the lock guards is whole at every step, so a panic elsewhere does not spoil it.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The innermost cause of an error, without the URL, which may hold a password.
fn cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "timed out".to_owned();
    }
    let mut innermost = std::error::Error::source(error);
    while let Some(deeper) = innermost.and_then(std::error::Error::source) {
        innermost = Some(deeper);
    }
    innermost.map_or_else(|| "the request failed".to_owned(), ToString::to_string)
}

const POST_TIMEOUT: Duration = Duration::from_secs(10);
const LAST_POST_TIMEOUT: Duration = Duration::from_secs(2);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_secs(10);
