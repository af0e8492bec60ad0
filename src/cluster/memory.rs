//! A store in memory with the semantics of the scripts, for simulation and tests. Time is an argument.

use super::protocol::{Answer, Ask, Batch, BatchAnswer, Census, Entry, FieldId, Grant, Hello, buckets};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// A store. A clone is a copy of its content.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    /// What a server's run id is.
    pub run_id: String,
    windows: HashMap<Arc<str>, Hash>,
    gates: Gates,
}

impl MemoryStore {
    /// An empty one.
    pub fn new(run_id: &str) -> Self {
        MemoryStore {
            run_id: run_id.to_owned(),
            ..MemoryStore::default()
        }
    }

    /// Carries a batch out, at a time in milliseconds.
    pub fn exchange(&mut self, batch: &Batch, now_ms: u64) -> BatchAnswer {
        let census = batch.hello.as_ref().map(|hello| self.gates.hello(hello, now_ms));
        let answers = batch
            .asks
            .iter()
            .map(|(name, ask)| Some(self.ask(name, ask, now_ms)))
            .collect();
        BatchAnswer {
            token: self.gates.token.clone(),
            run_id: self.run_id.clone(),
            census,
            answers,
        }
    }

    /// Loses everything.
    pub fn flush(&mut self) {
        self.windows.clear();
        self.gates = Gates::default();
    }

    fn ask(&mut self, name: &Arc<str>, ask: &Ask, now_ms: u64) -> Answer {
        if self.windows.get(name).is_some_and(|hash| hash.is_over(now_ms)) {
            self.windows.remove(name);
        }
        if let Some(hash) = self.windows.get_mut(name) {
            return hash.apply(ask, now_ms);
        }
        let mut hash = Hash::default();
        let answer = hash.apply(ask, now_ms);
        if matches!(answer, Answer::Done(_)) {
            self.windows.insert(name.clone(), hash);
        }
        answer
    }
}

/// One window, as `script.lua` has it.
#[derive(Clone, Debug, Default)]
pub struct Hash {
    meta: Option<Meta>,
    counts: BTreeMap<u64, i64>,
    fields: HashMap<FieldId, Field>,
    expires_ms: u64,
}

#[derive(Clone, Copy, Debug)]
struct Meta {
    last_ms: u64,
    swept: u64,
}

#[derive(Clone, Copy, Debug)]
struct Field {
    sequence: u64,
    spent: u64,
    label: u64,
    reserved: u32,
    granted: u64,
}

impl Hash {
    /// Whether it has expired, as a key does. One in which nothing counts any more does at once.
    pub fn is_over(&self, now_ms: u64) -> bool {
        self.expires_ms <= now_ms
    }

    /// Does what `script.lua` does, at `now_ms`.
    pub fn apply(&mut self, ask: &Ask, now_ms: u64) -> Answer {
        let (window, buckets) = (ask.window_ms, buckets(ask.window_ms));
        let epoch_at = |ms: u64| ms * buckets / window;
        let known = self.fields.get(&ask.id).copied();
        if known.is_some_and(|known| known.sequence >= ask.sequence) {
            return Answer::Overtaken;
        }
        let now = self.meta.map_or(now_ms, |meta| meta.last_ms.max(now_ms));
        let epoch = epoch_at(now);
        let mut swept = self.meta.map_or(epoch, |meta| meta.swept);
        let horizon = |slack: u64| epoch_at(now.saturating_sub(slack)).saturating_sub(buckets + 1);
        let (gone, past) = (horizon(ask.keep_ms), horizon(ask.slack_ms));

        let mut change: BTreeMap<u64, i64> = BTreeMap::new();
        let mut add = |epoch: u64, count: i64| {
            if epoch > gone {
                *change.entry(epoch).or_default() += count;
            }
        };
        let fresh = match (&known, &ask.history) {
            (None, None) => return Answer::Unknown,
            (Some(known), _) => {
                add(known.label, -i64::from(known.reserved));
                ask.spent as i64 - known.spent as i64
            }
            (None, Some(history)) => {
                history
                    .counts
                    .iter()
                    .for_each(|(epoch, count)| add(*epoch, *count as i64));
                ask.spent as i64 - history.base as i64
            }
        };
        let stamp = if ask.spent_until > 0 {
            epoch.min(ask.spent_until)
        } else {
            epoch
        };
        add(stamp, fresh);
        self.counts.retain(|epoch, _| *epoch > gone);
        let counted = |counts: &BTreeMap<u64, i64>| counts.range(past + 1..).map(|(_, count)| count).sum::<i64>();
        let live = counted(&self.counts) + counted(&change);

        let unheard = match known {
            Some(known) if !ask.afresh => known.granted.saturating_sub(ask.granted) as u32,
            _ => 0,
        };
        let want = ask.want.saturating_sub(unheard);
        let (mut reserved, mut label, mut permits) = (ask.reserved + unheard, ask.held_until, 0);
        if let Some(known) = known
            && reserved > 0
        {
            label = label.max(known.label);
        }
        if reserved == 0 || label >= epoch {
            label = label.max(epoch_at(now + ask.hold_ms));
            let free = i64::from(ask.limit) - live - i64::from(reserved);
            permits = i64::from(want).min(free).max(0) as u32;
        }
        reserved += permits;
        let granted = ask.granted + u64::from(unheard) + u64::from(permits);
        if label > gone {
            *change.entry(label).or_default() += i64::from(reserved);
        }
        for (epoch, count) in change {
            *self.counts.entry(epoch).or_default() += count;
        }
        self.counts.retain(|_, count| *count != 0);

        let oldest = self.counts.first_key_value().map(|(epoch, _)| *epoch);
        let leaves_ms = oldest.map_or(0, |oldest| {
            let leaves = ((oldest + buckets + 1) * window).div_ceil(buckets) + ask.slack_ms;
            leaves.saturating_sub(now).max(1)
        });
        if epoch - swept > 2 * buckets {
            swept = epoch;
            self.fields.retain(|id, field| *id == ask.id || field.label > gone);
        }
        self.meta = Some(Meta { last_ms: now, swept });
        let field = Field {
            sequence: ask.sequence,
            spent: ask.spent,
            label,
            reserved,
            granted,
        };
        self.fields.insert(ask.id, field);
        let newest = self
            .counts
            .last_key_value()
            .map_or(label, |(epoch, _)| label.max(*epoch));
        self.expires_ms = now_ms + ((newest + buckets + 2) * window).div_ceil(buckets) - now + ask.keep_ms;
        Answer::Done(Grant {
            granted,
            label,
            valid_ms: ((label + 1) * window / buckets) as i64 - now as i64 - 1,
            total: live + if label > past { i64::from(reserved) } else { 0 },
            leaves_ms,
            stamp,
        })
    }
}

/// The gates, as `gates.lua` has them.
#[derive(Clone, Debug, Default)]
struct Gates {
    token: Option<String>,
    born_ms: u64,
    joins: u64,
    version: u64,
    entries: HashMap<u64, Entry>,
}

impl Gates {
    fn hello(&mut self, hello: &Hello, now_ms: u64) -> Census {
        if self.token.is_none() {
            self.token = Some(hello.candidate.clone());
            self.born_ms = now_ms;
        }
        let joined = match self.entries.get(&hello.id) {
            Some(entry) => {
                self.version += u64::from(entry.left != hello.left);
                entry.joined
            }
            None => {
                self.joins += 1;
                self.version += 1;
                self.joins
            }
        };
        let entry = Entry {
            id: hello.id,
            joined,
            seen: hello.seen,
            last_ms: now_ms,
            unresolved_ms: hello.unresolved_ms,
            left: hello.left,
            refilled: hello.refilled.clone(),
            name: hello.name.to_string(),
        };
        self.entries.insert(hello.id, entry);
        let gates = (hello.version != Some(self.version)).then(|| {
            self.entries
                .retain(|_, entry| now_ms.saturating_sub(entry.last_ms) <= hello.forget_ms);
            let mut gates: Vec<_> = self.entries.values().cloned().collect();
            gates.sort_by_key(|entry| entry.joined);
            gates
        });
        Census {
            now_ms,
            born_ms: self.born_ms,
            version: self.version,
            joined,
            joins: self.joins,
            gates,
        }
    }
}
