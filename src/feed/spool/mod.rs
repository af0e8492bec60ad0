//! The spool: the gate's copy of its keys on disk, so that it starts with the control plane down.
//!
//! One file, `keys.spool`, for its owner only:
//!
//! | part | bytes |
//! |---|---|
//! | header | magic, revision, number of keys, their length, when the source was last heard |
//! | keys | one record after the other |
//! | seal | XXH3-64 of keys and header (damage), HMAC-SHA256 of those (forgery) |
//! | changes | each: length, record, 16 bytes of HMAC-SHA256 over the MAC before it and the record |
//!
//! The MAC's key is derived from the feed token. A change is appended as soon as it is in force and forced to the disk
//! within a second, without writing the keys again, so that a revoked key stays revoked after a crash with the control
//! plane down. Each change's MAC includes the one before it: none can be left out, moved or brought from another
//! spool; what remains after damage is the state as it was at some moment. Once the changes outgrow the keys the file is
//! written anew beside the old one, forced to the disk, and renamed over it.
//!
//! After a full snapshot the old file no longer fits: [`Spool::detach`] stops appending to it until it is rewritten.
//! Until then a crash goes back to the state before the snapshot, and nothing of it is acknowledged.

mod format;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::Change;
use super::{LoadOutcome, Token};
use crate::clock::Now;
use crate::gate::Gate;
use format::{Log, MacKey, ReadError, write_keys};

/// The spool of one gate. Appending costs one `write`; everything slow happens in [`Spool::keep`].
pub struct Spool {
    path: PathBuf,
    key: MacKey,
    state: Mutex<State>,
    /// Held through [`Spool::keep`]: one rewrite at a time.
    keeping: Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Where changes are appended; `None`: the file does not have the state in force, and a rewrite is due.
    log: Option<Log>,
    /// Changes since the rewrite under way began.
    pending: Option<Vec<Vec<u8>>>,
    /// Goes up whenever a rewrite under way must be thrown away.
    generation: u64,
    unsynced: bool,
    error: Option<String>,
    /// No rewrite is tried before this time (monotonic), after one failed.
    retry_at_ns: u64,
    heard_at_ms: i64,
}

impl Spool {
    pub fn new(state_dir: &Path, token: &Token) -> Self {
        Spool {
            path: state_dir.join("keys.spool"),
            key: MacKey::derive(token.as_bytes()),
            state: Mutex::new(State::default()),
            keeping: Mutex::new(()),
        }
    }

    /// Puts the spool's keys into force, if all of it is as it was written; blocks.
    pub fn load(&self, gate: &Gate, now: Now) -> LoadOutcome {
        let file = match OpenOptions::new().read(true).write(true).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return LoadOutcome::Missing,
            Err(error) => return self.refused(&error.to_string()),
        };
        match format::read(file, &self.key, gate) {
            Ok(loaded) => {
                let mut state = self.state();
                // Damage is not written behind: the next rewrite makes a new file.
                state.log = loaded.log;
                state.heard_at_ms = loaded.saved_at_ms;
                LoadOutcome::Loaded {
                    revision: gate.revision().unwrap_or(0),
                    keys: gate.key_count(),
                    saved_at_ms: loaded.saved_at_ms.min(now.unix_ms),
                    damage: loaded.damage,
                }
            }
            Err(ReadError::Io(error)) => self.refused(&error.to_string()),
            Err(ReadError::Unusable(reason)) => self.refused(reason),
            Err(ReadError::Gate(error)) => self.refused(&error.to_string()),
        }
    }

    fn refused(&self, reason: &str) -> LoadOutcome {
        LoadOutcome::Refused {
            reason: format!("the spool {} is not used: {reason}", self.path.display()),
        }
    }

    /// Appends a change that is in force already.
    pub fn append(&self, record: Vec<u8>) {
        let mut guard = self.state();
        let state = &mut *guard;
        if let Some(log) = &mut state.log {
            match log.append(&self.key, &record) {
                Ok(()) => state.unsynced = true,
                Err(error) => self.log_failed(state, "append to", &error),
            }
        }
        // Without either the next rewrite takes the key from the gate.
        if let Some(pending) = &mut state.pending {
            pending.push(record);
        }
    }

    /// A snapshot replaces, or may have replaced, what the file's changes build on.
    pub fn detach(&self) {
        let mut state = self.state();
        state.log = None;
        state.pending = None;
        state.generation += 1;
        state.retry_at_ns = 0;
    }

    fn flush(&self) {
        let file = {
            let mut state = self.state();
            if !std::mem::take(&mut state.unsynced) {
                return;
            }
            state.log.as_ref().map(|log| Arc::clone(&log.file))
        };
        if let Some(Err(error)) = file.map(|file| file.sync_data()) {
            self.log_failed(&mut self.state(), "sync", &error);
        }
    }

    /// Once a second, and at a stop: the changes to the disk, and the file written anew where that is due; blocks.
    /// `heard_at_ms`: when the source was last heard.
    pub fn keep(&self, gate: &Gate, now: Now, heard_at_ms: Option<i64>) {
        let _keeping = self.keeping.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(heard_at_ms) = heard_at_ms {
            let mut state = self.state();
            if state.log.is_some() && heard_at_ms - state.heard_at_ms >= HEARD_EVERY_MS {
                state.heard_at_ms = heard_at_ms;
                drop(state);
                self.append(Change::Heard { unix_ms: heard_at_ms }.encode());
            }
        }
        self.flush();
        let due = {
            let state = self.state();
            let outgrown = state.log.as_ref().is_none_or(Log::is_outgrown);
            outgrown && now.elapsed_ns >= state.retry_at_ns
        };
        if due && gate.revision().is_some() {
            self.rewrite(gate, now, heard_at_ms.unwrap_or(now.unix_ms));
        }
    }

    /// Whether a restart would find what is in force: not between a snapshot and the rewrite after it. While the disk
    /// fails the answer is yes, for there is nothing to wait for.
    pub fn keeps_up(&self) -> bool {
        let state = self.state();
        state.log.is_some() || state.error.is_some()
    }

    /// Why the spool is not up to date, while it is not.
    pub fn error(&self) -> Option<String> {
        self.state().error.clone()
    }

    fn rewrite(&self, gate: &Gate, now: Now, heard_at_ms: i64) {
        let generation = {
            let mut state = self.state();
            state.pending = Some(Vec::new());
            state.generation
        };
        let beside = self.path.with_extension("spool.new");
        let written = write_keys(&beside, &self.key, gate, heard_at_ms);
        let mut guard = self.state();
        let state = &mut *guard;
        if state.generation != generation {
            return;
        }
        let pending = state.pending.take().unwrap_or_default();
        let replaced = written.and_then(|log| {
            let Some(mut log) = log else { return Ok(None) };
            for record in pending {
                log.append(&self.key, &record)?;
            }
            log.file.sync_data()?;
            fs::rename(&beside, &self.path)?;
            Ok(Some(log))
        });
        match replaced {
            Ok(None) => {}
            Ok(Some(log)) => {
                state.log = Some(log);
                state.heard_at_ms = heard_at_ms;
                state.unsynced = false;
                if state.error.take().is_some() {
                    log::info!("feed: the spool {} is up to date again", self.path.display());
                }
                drop(guard);
                // The rename itself; until then a power failure brings the old spool back, whole.
                if let Some(directory) = self.path.parent()
                    && let Err(error) = File::open(directory).and_then(|directory| directory.sync_all())
                {
                    log::warn!("feed: cannot sync {}: {error}", directory.display());
                }
            }
            Err(error) => {
                state.retry_at_ns = now.elapsed_ns + RETRY_AFTER_NS;
                self.say_failed(state, "rewrite", &error);
            }
        }
    }

    /// The file no longer has what is in force: it is written anew as soon as that works.
    fn log_failed(&self, state: &mut State, what: &str, error: &io::Error) {
        state.log = None;
        self.say_failed(state, what, error);
    }

    /// Said once, until it works again.
    fn say_failed(&self, state: &mut State, what: &str, error: &io::Error) {
        let message = format!("cannot {what} the spool {}: {error}", self.path.display());
        if state.error.replace(message.clone()).is_none() {
            log::error!("feed: {message}; a restart may go back to an earlier state until that is mended");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const RETRY_AFTER_NS: u64 = 5_000_000_000;
/// How exactly a restarted gate knows when its source was last heard.
const HEARD_EVERY_MS: i64 = 60_000;
