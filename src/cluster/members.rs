//! Who shares the limits, and whether the store knows all that they have spent.
//!
//! A store that was emptied, replaced or failed over to a lagging copy has forgotten permits that still count. So under
//! each new identity every gate tells its history again, says so in the list of gates, and counts no grant before
//! all have. *All* are those in the list, and those that any gate remembers from before; one that never comes back is
//! waited for until what it can have given has left the window in question ([`Settings::outlives_ms`]).
//!
//! - A gate that joins counts no grant before those that live have heard of it, so that they remember it.
//! - A gate that joins remembers nobody. It waits until a content that is young has been found by the gates that live
//!   ([`Settings::settle_ms`]), and each tells it whom it misses ([`Hello::unresolved_ms`]).
//! - A gate that was out of touch for so long that others may have joined without it
//!   ([`Settings::silent_ms`]) and comes back to a new identity does not trust its memory; while the policy is to be
//!   exact, it counts no grant for the length of the window.
//!
//! What that does not cover, because nobody is left who could know: a store that loses its content while every gate
//! that has given permits is cut off from it or dead, and that a new gate then finds. It is taken for a new one.

use super::ledger::MS;
use super::protocol::{Census, Entry, Hello, Identity};
use std::collections::HashMap;
use std::sync::Arc;

/// How gates know of each other.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub id: u64,
    pub name: Arc<str>,
    /// Whether the policy is to give nothing beyond the limit, come what may.
    pub is_exact: bool,
    /// A gate that was silent for so long is not waited for by those that join.
    pub silent_ms: u64,
    /// How old a content must be for those that know no other.
    pub settle_ms: u64,
    /// The longest window.
    pub longest_window_ms: u64,
    /// What clocks may differ by.
    pub keep_ms: u64,
}

/// The other gates, as this one knows them.
#[derive(Debug)]
pub(super) struct Members {
    settings: Settings,
    current: Option<Identity>,
    generation: u64,
    since_ns: u64,
    /// All of this gate's history was told to the current identity.
    refilled: bool,
    /// No other identity was known before.
    is_newcomer: bool,
    /// When the gate lost trust in its memory.
    doubts_since_ns: Option<u64>,
    census: Option<Heard>,
    /// When a hello was last answered.
    heard_ns: Option<u64>,
    seen: u64,
    gates: HashMap<u64, Known>,
    candidates: u64,
    pub left: bool,
}

#[derive(Clone, Copy, Debug)]
struct Heard {
    now_ms: u64,
    at_ns: u64,
    born_ms: u64,
    version: u64,
    joined: u64,
    listed: bool,
}

#[derive(Debug)]
struct Known {
    entry: Entry,
    /// For how long it had been silent when the list was read.
    silence_ms: u64,
    /// In the list of the current identity.
    listed: bool,
}

impl Settings {
    /// For how long after an identity was lost a gate that has not told its history may have permits in a window of this
    /// length. The last can have been granted by a deposed server: Redis lets one that has lost its replicas go on for
    /// `min-replicas-max-lag`, 10 s. A reservation can be spent for an eighth of the window and a sub-bucket.
    fn outlives_ms(&self, window_ms: u64) -> u64 {
        window_ms + window_ms / 4 + self.keep_ms + DEPOSED_MS
    }

    /// After so long without a sign of life a gate is forgotten.
    fn forget_ms(&self) -> u64 {
        self.outlives_ms(self.longest_window_ms) + 1_000
    }
}

/// See [`Settings::outlives_ms`].
const DEPOSED_MS: u64 = 10_000;

impl Members {
    pub fn new(settings: Settings) -> Self {
        Members {
            settings,
            current: None,
            generation: 0,
            since_ns: 0,
            refilled: false,
            is_newcomer: true,
            doubts_since_ns: None,
            census: None,
            heard_ns: None,
            seen: 0,
            gates: HashMap::new(),
            candidates: 0,
            left: false,
        }
    }

    pub fn current(&self) -> Option<&Identity> {
        self.current.as_ref()
    }

    /// The current identity's number.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All of this gate's history was told.
    pub fn set_refilled(&mut self) {
        self.refilled = true;
    }

    pub fn is_refilled(&self) -> bool {
        self.refilled
    }

    /// An answer to what was sent at `sent_ns` came from this identity. `true`: it is a new one, and has to be told
    /// everything.
    pub fn met(&mut self, identity: &Identity, sent_ns: u64, now_ns: u64) -> bool {
        if self.current.as_ref() == Some(identity) || (self.current.is_some() && sent_ns < self.since_ns) {
            return false;
        }
        self.is_newcomer = self.current.is_none();
        if !self.is_newcomer
            && self
                .heard_ns
                .is_none_or(|heard| heard + self.settings.silent_ms * MS < now_ns)
        {
            self.doubts_since_ns = Some(now_ns);
        }
        self.current = Some(identity.clone());
        self.generation += 1;
        self.since_ns = now_ns;
        self.refilled = false;
        self.census = None;
        self.seen = 0;
        for known in self.gates.values_mut() {
            known.listed = false;
        }
        true
    }

    /// A hello to be sent.
    pub fn hello(&mut self, now_ns: u64, whole_list: bool) -> Hello {
        self.candidates += 1;
        // Whom it misses goes with it, and is known once the list was heard; a newcomer misses nobody.
        let knows_whom_it_misses = self.is_newcomer || self.census.is_some_and(|heard| heard.listed);
        let refilled = match &self.current {
            Some(identity) if self.refilled && knows_whom_it_misses => identity.0.to_string(),
            _ => "-".to_owned(),
        };
        Hello {
            id: self.settings.id,
            name: self.settings.name.clone(),
            candidate: format!("{:016x}{:x}", self.settings.id, self.candidates),
            refilled,
            seen: self.seen,
            unresolved_ms: self.unresolved_ms(now_ns),
            left: self.left,
            version: self
                .census
                .filter(|heard| heard.listed && !whole_list)
                .map(|heard| heard.version),
            forget_ms: self.settings.forget_ms(),
        }
    }

    /// What a hello that was sent at `sent_ns` to the current identity heard. `true`: there are gates that wait to be heard of.
    pub fn heard(&mut self, census: &Census, sent_ns: u64, now_ns: u64) -> bool {
        if self.heard_ns.is_some_and(|before| before > sent_ns) {
            return false;
        }
        self.heard_ns = Some(sent_ns);
        let listed = census.gates.is_some() || self.census.is_some_and(|before| before.listed);
        self.census = Some(Heard {
            now_ms: census.now_ms,
            at_ns: now_ns,
            born_ms: census.born_ms,
            version: census.version,
            joined: census.joined,
            listed,
        });
        let Some(gates) = &census.gates else { return false };
        for known in self.gates.values_mut() {
            known.listed = false;
        }
        for entry in gates.iter().filter(|entry| entry.id != self.settings.id) {
            let known = Known {
                entry: entry.clone(),
                silence_ms: census.now_ms.saturating_sub(entry.last_ms),
                listed: true,
            };
            self.gates.insert(entry.id, known);
        }
        let (forget_ms, lost_ms) = (self.settings.forget_ms(), (now_ns - self.since_ns) / MS);
        self.gates.retain(|_, known| {
            if known.listed {
                known.silence_ms <= forget_ms
            } else {
                lost_ms <= forget_ms
            }
        });
        let seen = gates.iter().map(|entry| entry.joined).max().unwrap_or(0);
        let news = seen > self.seen;
        self.seen = self.seen.max(seen);
        news
    }

    /// How many gates share the limits of this length of window, this one included; `None` where that was never heard.
    pub fn count(&self, window_ms: u64, now_ns: u64) -> Option<u32> {
        self.heard_ns?;
        let within = self.settings.outlives_ms(window_ms);
        let counts = |known: &&Known| {
            let silent_ms = if known.listed {
                known.silence_ms
            } else {
                (now_ns - self.since_ns) / MS
            };
            !known.entry.left && silent_ms <= within
        };
        Some(1 + self.gates.values().filter(counts).count() as u32)
    }

    /// Whether grants of the current identity count, for windows of this length.
    pub fn grants_count(&self, window_ms: u64, now_ns: u64) -> bool {
        let (Some(current), Some(heard)) = (&self.current, self.census) else {
            return false;
        };
        if !self.refilled || !heard.listed {
            return false;
        }
        if self.is_newcomer && heard.now_ms + (now_ns - heard.at_ns) / MS < heard.born_ms + self.settings.settle_ms {
            return false;
        }
        let within = self.settings.outlives_ms(window_ms);
        if self.settings.is_exact && self.doubts_since_ns.is_some_and(|since| now_ns <= since + within * MS) {
            return false;
        }
        let lost_ms = (now_ns - self.since_ns) / MS;
        self.gates.values().all(|known| {
            let entry = &known.entry;
            if !known.is_told(current) {
                // What it gave has left the window: since the old identity was lost, or since long before.
                return (!self.is_newcomer && lost_ms > within) || (known.listed && known.silence_ms > within);
            }
            let misses_some = entry.unresolved_ms > 0 && heard.now_ms <= entry.unresolved_ms + within;
            let lives =
                !entry.left && known.silence_ms <= self.settings.silent_ms && *entry.name != *self.settings.name;
            let knows_us = !lives || entry.seen >= heard.joined;
            (entry.left || !misses_some) && knows_us
        })
    }

    /// For how much longer than W permits count, in milliseconds: the clock of a new store may be another one.
    pub fn slack_ms(&self, window_ms: u64, now_ns: u64) -> u64 {
        let within_ns = (window_ms + self.settings.keep_ms) * MS * 61 / 60;
        if now_ns < self.since_ns + within_ns {
            self.settings.keep_ms
        } else {
            0
        }
    }

    /// When an identity was lost under which gates were known that are missed now, in the store's time.
    fn unresolved_ms(&self, now_ns: u64) -> u64 {
        let Some(heard) = self.census else { return 0 };
        let misses_some = self.gates.values().any(|known| !known.listed);
        let since_ns = self.doubts_since_ns.max(misses_some.then_some(self.since_ns));
        let now_ms = heard.now_ms + (now_ns - heard.at_ns) / MS;
        since_ns.map_or(0, |since_ns| now_ms.saturating_sub((now_ns - since_ns) / MS))
    }
}

impl Known {
    /// Whether the store knows all that it spent. One that left had nothing under way, so that its leaving is listed
    /// says that all it ever told is there.
    fn is_told(&self, current: &Identity) -> bool {
        self.listed && (self.entry.left || self.entry.refilled == *current.0)
    }
}
