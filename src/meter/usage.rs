//! What a batch is made of: sums by key, tier, environment and minute. Pure, but for draining the gate.

use std::collections::{BTreeMap, HashMap};

use crate::courtesy::Courtesy;
use crate::gate::Gate;
use crate::wire::{LastUsed, PermitCount, RefusalCount, UsageBatch};

/// Sums that belong into the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    permits: HashMap<Use, u64>,
    refusals: HashMap<Refused, u64>,
    /// By key and secret.
    last_used_ms: HashMap<(Box<str>, Box<str>), i64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Use {
    key: Box<str>,
    tier: Box<str>,
    environment: Box<str>,
    minute: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Refused {
    key: Option<Box<str>>,
    environment: Option<Box<str>>,
    tier: Box<str>,
    code: Box<str>,
    minute: i64,
}

/// What one drain brought, for metrics.
#[derive(Debug, Default)]
pub struct Drained {
    pub permits: u64,
    pub refusals: BTreeMap<String, u64>,
}

/// Takes the gate's counts since the last time into `tally`, under `minute` (since the Unix epoch).
pub fn drain(gate: &Gate, minute: i64, tally: &mut Tally) -> Drained {
    let mut drained = Drained::default();
    let mut last_used = Vec::new();
    let mut courtesy = Courtesy::every(KEYS_AT_ONCE);
    gate.drain_permits(
        &mut |used| {
            courtesy.step();
            if used.limited > 0 {
                *drained.refusals.entry(RATE_LIMITED.to_owned()).or_default() += used.limited;
                let refused = Refused {
                    key: Some(used.key_id.clone()),
                    environment: Some(used.environment.clone()),
                    tier: used.tier.clone(),
                    code: RATE_LIMITED.into(),
                    minute,
                };
                *tally.refusals.entry(refused).or_default() += used.limited;
            }
            if used.permits > 0 {
                drained.permits += used.permits;
                let key = Use {
                    key: used.key_id,
                    tier: used.tier,
                    environment: used.environment,
                    minute,
                };
                *tally.permits.entry(key).or_default() += used.permits;
            }
        },
        &mut |secret| {
            let prefix: String = secret.digest_prefix.iter().map(|byte| format!("{byte:02x}")).collect();
            last_used.push(((secret.key_id, prefix.into_boxed_str()), i64::from(secret.at_s) * 1_000));
        },
    );
    for (secret, at_ms) in last_used {
        tally.used(secret, at_ms);
    }
    gate.drain_refusals(&mut |refused| {
        *drained.refusals.entry(refused.code.to_owned()).or_default() += refused.count;
        let key = Refused {
            key: None,
            environment: None,
            tier: Box::default(),
            code: refused.code.into(),
            minute,
        };
        *tally.refusals.entry(key).or_default() += refused.count;
    });
    drained
}

impl Tally {
    pub fn is_empty(&self) -> bool {
        self.permits.is_empty() && self.refusals.is_empty() && self.last_used_ms.is_empty()
    }

    /// How many lines of a ledger it makes.
    pub fn entries(&self) -> usize {
        self.permits.len() + self.refusals.len() + self.last_used_ms.len()
    }

    pub fn clear(&mut self) {
        *self = Tally::default();
    }

    /// Adds what a batch holds.
    pub fn add(&mut self, batch: UsageBatch) {
        for PermitCount {
            key,
            tier,
            environment,
            minute,
            count,
        } in batch.permits
        {
            let key = Use {
                key: key.into(),
                tier: tier.into(),
                environment: environment.into(),
                minute,
            };
            *self.permits.entry(key).or_default() += count;
        }
        for RefusalCount {
            key,
            environment,
            tier,
            code,
            minute,
            count,
        } in batch.refusals
        {
            let key = Refused {
                key: key.map(Into::into),
                environment: environment.map(Into::into),
                tier: tier.into(),
                code: code.into(),
                minute,
            };
            *self.refusals.entry(key).or_default() += count;
        }
        for LastUsed { key, secret, at_ms } in batch.last_used {
            self.used((key.into(), secret.into()), at_ms);
        }
    }

    /// Sums up what lies before minute `before` by spans of `span` minutes, each under its first minute.
    pub fn coarsen(&mut self, span: i64, before: i64) {
        let coarse = |minute: i64| {
            if minute < before {
                minute - minute.rem_euclid(span)
            } else {
                minute
            }
        };
        for (mut key, count) in std::mem::take(&mut self.permits) {
            key.minute = coarse(key.minute);
            *self.permits.entry(key).or_default() += count;
        }
        for (mut key, count) in std::mem::take(&mut self.refusals) {
            key.minute = coarse(key.minute);
            *self.refusals.entry(key).or_default() += count;
        }
    }

    /// The tally as batches of at most `entries` entries, numbered from `sequence`. In a fixed order, so that the same
    /// tally gives the same bytes.
    pub fn batches(&self, gate: &str, run: &str, sequence: u64, entries: usize) -> Vec<UsageBatch> {
        let mut courtesy = Courtesy::every(ENTRIES_AT_ONCE);
        let mut permits: Vec<PermitCount> = self
            .permits
            .iter()
            .inspect(|_| courtesy.step())
            .map(|(key, count)| PermitCount {
                key: key.key.to_string(),
                tier: key.tier.to_string(),
                environment: key.environment.to_string(),
                minute: key.minute,
                count: *count,
            })
            .collect();
        permits.sort_by(|a, b| {
            (&a.key, &a.tier, &a.environment, a.minute).cmp(&(&b.key, &b.tier, &b.environment, b.minute))
        });
        let mut refusals: Vec<RefusalCount> = self
            .refusals
            .iter()
            .map(|(key, count)| RefusalCount {
                key: key.key.as_deref().map(str::to_owned),
                environment: key.environment.as_deref().map(str::to_owned),
                tier: key.tier.to_string(),
                code: key.code.to_string(),
                minute: key.minute,
                count: *count,
            })
            .collect();
        refusals.sort_by(|a, b| (&a.key, &a.tier, &a.code, a.minute).cmp(&(&b.key, &b.tier, &b.code, b.minute)));
        let mut last_used: Vec<LastUsed> = self
            .last_used_ms
            .iter()
            .inspect(|_| courtesy.step())
            .map(|((key, secret), at_ms)| LastUsed {
                key: key.to_string(),
                secret: secret.to_string(),
                at_ms: *at_ms,
            })
            .collect();
        last_used.sort_by(|a, b| (&a.key, &a.secret).cmp(&(&b.key, &b.secret)));

        let mut batches = Vec::new();
        while !(permits.is_empty() && refusals.is_empty() && last_used.is_empty()) {
            let mut room = entries.max(1);
            batches.push(UsageBatch {
                gate: gate.to_owned(),
                run: run.to_owned(),
                sequence: sequence + batches.len() as u64,
                permits: take(&mut permits, &mut room),
                refusals: take(&mut refusals, &mut room),
                last_used: take(&mut last_used, &mut room),
            });
        }
        batches
    }

    fn used(&mut self, secret: (Box<str>, Box<str>), at_ms: i64) {
        let latest = self.last_used_ms.entry(secret).or_insert(at_ms);
        *latest = at_ms.max(*latest);
    }
}

/// Moves as many as there is room for out of `from`.
fn take<T>(from: &mut Vec<T>, room: &mut usize) -> Vec<T> {
    let count = from.len().min(*room);
    *room -= count;
    let rest = from.split_off(count);
    std::mem::replace(from, rest)
}

/// The gate counts these with the key's windows, not among the other refusals.
const RATE_LIMITED: &str = "RATE_LIMITED";
/// Keys that are drained between two offers of the processor.
const KEYS_AT_ONCE: u32 = 64;
/// Entries of a batch that are made between two.
const ENTRIES_AT_ONCE: u32 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(key: &str, minute: i64, count: u64) -> UsageBatch {
        UsageBatch {
            gate: "g".into(),
            run: "r".into(),
            sequence: 1,
            permits: vec![PermitCount {
                key: key.into(),
                tier: "default".into(),
                environment: "live".into(),
                minute,
                count,
            }],
            refusals: vec![RefusalCount {
                key: None,
                environment: None,
                tier: String::new(),
                code: "MISSING_API_KEY".into(),
                minute,
                count: 2 * count,
            }],
            last_used: vec![LastUsed {
                key: key.into(),
                secret: "00".repeat(8),
                at_ms: minute * 60_000,
            }],
        }
    }

    fn sums(batches: &[UsageBatch]) -> (u64, u64) {
        let permits = batches.iter().flat_map(|b| &b.permits).map(|p| p.count).sum();
        let refusals = batches.iter().flat_map(|b| &b.refusals).map(|r| r.count).sum();
        (permits, refusals)
    }

    #[test]
    fn sums_survive_merging_coarsening_and_splitting() {
        let mut tally = Tally::default();
        for minute in 0..300 {
            tally.add(batch(if minute % 2 == 0 { "a" } else { "b" }, minute, 3));
        }
        let fine = tally.batches("g", "r", 1, 10_000);
        assert_eq!((fine.len(), sums(&fine)), (1, (900, 1800)));
        tally.coarsen(60, 240);
        let coarse = tally.batches("g", "r", 7, 50);
        assert_eq!(sums(&coarse), (900, 1800));
        let minutes: Vec<i64> = coarse
            .iter()
            .flat_map(|b| &b.permits)
            .filter(|p| p.key == "a")
            .map(|p| p.minute)
            .collect();
        assert_eq!(minutes[..5], [0, 60, 120, 180, 240]);
        assert_eq!(minutes.len(), 4 + 30, "the last hour keeps its minutes");
        assert_eq!(
            coarse.iter().map(|b| b.sequence).collect::<Vec<_>>(),
            (7..7 + coarse.len() as u64).collect::<Vec<_>>()
        );
        assert!(
            coarse
                .iter()
                .all(|b| b.permits.len() + b.refusals.len() + b.last_used.len() <= 50)
        );
        let mut again = Tally::default();
        coarse.into_iter().for_each(|batch| again.add(batch));
        assert_eq!(again, tally);
    }

    #[test]
    fn the_latest_use_of_a_secret_wins() {
        let mut tally = Tally::default();
        tally.add(batch("a", 5, 1));
        tally.add(batch("a", 3, 1));
        let last_used = &tally.batches("g", "r", 1, 100)[0].last_used;
        assert_eq!(last_used.iter().map(|used| used.at_ms).collect::<Vec<_>>(), [300_000]);
    }
}
