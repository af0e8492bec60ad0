//! What a batch is made of: sums by key, tier, environment and minute. Pure, but for draining the gate.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::courtesy::{self, Courtesy};
use crate::gate::Gate;
use crate::gate::key::KeyId;
use crate::wire::{LastUsed, PermitCount, RefusalCount, UsageBatch};

/// Sums that belong into the ledger. Lists rather than maps: a drain names each key once, in a tier, and what is drained
/// a second later goes into another file. [`Tally::sum_up`] makes one entry of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    permits: Vec<(Use, u64)>,
    refusals: Vec<(Refused, u64)>,
    /// Unix milliseconds.
    last_used: Vec<(Secret, i64)>,
}

/// In the order of the ledger, so that what comes to it together lies together there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Use {
    minute: i64,
    tier: Arc<str>,
    environment: Arc<str>,
    key: KeyId,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Refused {
    minute: i64,
    code: Cow<'static, str>,
    tier: Arc<str>,
    environment: Option<Arc<str>>,
    key: Option<KeyId>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Secret {
    key: KeyId,
    /// Hex digits.
    prefix: [u8; PREFIX_DIGITS],
}

/// What one drain brought, for metrics.
#[derive(Debug, Default)]
pub struct Drained {
    pub permits: u64,
    pub refusals: BTreeMap<&'static str, u64>,
}

/// Takes the gate's counts since the last time into `tally`, under `minute` (since the Unix epoch).
pub fn drain(gate: &Gate, minute: i64, tally: &mut Tally) -> Drained {
    let mut drained = Drained::default();
    let mut courtesy = Courtesy::every(KEYS_AT_ONCE);
    let Tally {
        permits,
        refusals,
        last_used,
    } = tally;
    gate.drain_permits(
        &mut |used| {
            courtesy.step();
            if used.limited > 0 {
                *drained.refusals.entry(RATE_LIMITED).or_default() += used.limited;
                let refused = Refused {
                    minute,
                    code: RATE_LIMITED.into(),
                    tier: used.tier.clone(),
                    environment: Some(used.environment.clone()),
                    key: Some(used.key_id.clone()),
                };
                refusals.push((refused, used.limited));
            }
            if used.permits > 0 {
                drained.permits += used.permits;
                let used_in = Use {
                    minute,
                    tier: used.tier,
                    environment: used.environment,
                    key: used.key_id,
                };
                permits.push((used_in, used.permits));
            }
        },
        &mut |secret| {
            let used = Secret {
                key: secret.key_id,
                prefix: hex(secret.digest_prefix),
            };
            last_used.push((used, i64::from(secret.at_s) * 1_000));
        },
    );
    gate.drain_refusals(&mut |refused| {
        *drained.refusals.entry(refused.code).or_default() += refused.count;
        let anybody = Refused {
            minute,
            code: refused.code.into(),
            tier: Arc::default(),
            environment: None,
            key: None,
        };
        refusals.push((anybody, refused.count));
    });
    tally.sum_up();
    drained
}

impl Tally {
    pub fn is_empty(&self) -> bool {
        self.entries() == 0
    }

    /// How many lines of a ledger it makes.
    pub fn entries(&self) -> usize {
        self.permits.len() + self.refusals.len() + self.last_used.len()
    }

    /// Adds what another one holds. To be followed by [`Tally::sum_up`].
    pub fn append(&mut self, mut other: Tally) {
        self.permits.append(&mut other.permits);
        self.refusals.append(&mut other.refusals);
        self.last_used.append(&mut other.last_used);
    }

    /// Adds what a batch holds. To be followed by [`Tally::sum_up`].
    pub fn add(&mut self, batch: UsageBatch) {
        self.permits.extend(batch.permits.into_iter().map(|permit| {
            let used = Use {
                minute: permit.minute,
                tier: permit.tier.into(),
                environment: permit.environment.into(),
                key: permit.key.as_str().into(),
            };
            (used, permit.count)
        }));
        self.refusals.extend(batch.refusals.into_iter().map(|refusal| {
            let refused = Refused {
                minute: refusal.minute,
                code: refusal.code.into(),
                tier: refusal.tier.into(),
                environment: refusal.environment.map(Into::into),
                key: refusal.key.as_deref().map(KeyId::from),
            };
            (refused, refusal.count)
        }));
        self.last_used.extend(batch.last_used.into_iter().filter_map(|used| {
            let secret = Secret {
                key: used.key.as_str().into(),
                // Every version has written so many digits; other names are nobody's.
                prefix: used.secret.as_bytes().try_into().ok()?,
            };
            Some((secret, used.at_ms))
        }));
    }

    /// Makes one entry of all that are about the same, and puts them into a fixed order, so that the same tally gives the
    /// same bytes.
    pub fn sum_up(&mut self) {
        sum_up(&mut self.permits, |sum, count| *sum += count);
        sum_up(&mut self.refusals, |sum, count| *sum += count);
        sum_up(&mut self.last_used, |latest, at_ms| *latest = at_ms.max(*latest));
    }

    /// Sums up what lies before minute `before` by spans of `span` minutes, each under its first minute.
    pub fn coarsen(&mut self, span: i64, before: i64) {
        let permits = self.permits.iter_mut().map(|(used, _)| &mut used.minute);
        let refusals = self.refusals.iter_mut().map(|(refused, _)| &mut refused.minute);
        for minute in permits.chain(refusals).filter(|minute| **minute < before) {
            *minute -= minute.rem_euclid(span);
        }
        self.sum_up();
    }

    /// The tally as batches of at most `entries` entries, numbered from `sequence`.
    pub fn batches<'t>(
        &'t self,
        gate: &'t str,
        run: &'t str,
        sequence: u64,
        entries: usize,
    ) -> impl Iterator<Item = UsageBatch<&'t str>> {
        let (mut permits, mut refusals, mut last_used) = (&*self.permits, &*self.refusals, &*self.last_used);
        (sequence..).map_while(move |sequence| {
            let mut room = entries.max(1);
            let batch = UsageBatch {
                gate,
                run,
                sequence,
                permits: take(&mut permits, &mut room).map(permit).collect(),
                refusals: take(&mut refusals, &mut room).map(refusal).collect(),
                last_used: take(&mut last_used, &mut room).map(last_use).collect(),
            };
            (room < entries.max(1)).then_some(batch)
        })
    }
}

fn permit((used, count): &(Use, u64)) -> PermitCount<&str> {
    PermitCount {
        key: used.key.as_str(),
        tier: &used.tier,
        environment: &used.environment,
        minute: used.minute,
        count: *count,
    }
}

fn refusal((refused, count): &(Refused, u64)) -> RefusalCount<&str> {
    RefusalCount {
        key: refused.key.as_ref().map(KeyId::as_str),
        environment: refused.environment.as_deref(),
        tier: &refused.tier,
        code: &refused.code,
        minute: refused.minute,
        count: *count,
    }
}

fn last_use((secret, at_ms): &(Secret, i64)) -> LastUsed<&str> {
    LastUsed {
        key: secret.key.as_str(),
        secret: std::str::from_utf8(&secret.prefix).unwrap_or_default(),
        at_ms: *at_ms,
    }
}

fn sum_up<K: Ord, V: Copy>(entries: &mut Vec<(K, V)>, add: impl Fn(&mut V, V)) {
    courtesy::sort_by(entries, |(one, _), (other, _)| one.cmp(other));
    entries.dedup_by(|(key, value), (kept, sum)| {
        let is_same = key == kept;
        if is_same {
            add(sum, *value);
        }
        is_same
    });
}

/// As many as there is room for, off the front of `from`.
fn take<'t, T>(from: &mut &'t [T], room: &mut usize) -> std::slice::Iter<'t, T> {
    let (taken, rest) = from.split_at(from.len().min(*room));
    *from = rest;
    *room -= taken.len();
    taken.iter()
}

fn hex(bytes: [u8; PREFIX_DIGITS / 2]) -> [u8; PREFIX_DIGITS] {
    let digit = |nibble: u8| b"0123456789abcdef"[usize::from(nibble & 15)];
    std::array::from_fn(|place| digit(bytes[place / 2] >> (4 * (1 - place % 2))))
}

/// The gate counts these with the key's windows, not among the other refusals.
const RATE_LIMITED: &str = "RATE_LIMITED";
/// Of a secret's digest, in its name on the wire.
const PREFIX_DIGITS: usize = 16;
/// Keys that are drained between two offers of the processor.
const KEYS_AT_ONCE: u32 = 64;

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

    /// As they come out of a file.
    fn batches(tally: &Tally, sequence: u64, entries: usize) -> Vec<UsageBatch> {
        let json = |batch| serde_json::to_vec(&batch).unwrap();
        let read = |json: Vec<u8>| serde_json::from_slice(&json).unwrap();
        tally.batches("g", "r", sequence, entries).map(json).map(read).collect()
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
        tally.sum_up();
        let fine = batches(&tally, 1, 10_000);
        assert_eq!((fine.len(), sums(&fine)), (1, (900, 1800)));
        tally.coarsen(60, 240);
        let coarse = batches(&tally, 7, 50);
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
        again.sum_up();
        assert_eq!(again, tally);
    }

    #[test]
    fn the_latest_use_of_a_secret_wins() {
        let mut tally = Tally::default();
        tally.add(batch("a", 5, 1));
        tally.add(batch("a", 3, 1));
        tally.sum_up();
        let last_used = &batches(&tally, 1, 100)[0].last_used;
        assert_eq!(last_used.iter().map(|used| used.at_ms).collect::<Vec<_>>(), [300_000]);
    }
}
