//! The ledger: taking batches in, and answering what was used.

use std::collections::BTreeMap;

use super::Service;
use super::check::Check;
use crate::control::model::{Fault, FieldFault};
use crate::control::store::{UsageQuery, UsageRow};
use crate::wire::UsageBatch;

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct UsageDraft {
    pub faults: Vec<FieldFault>,
    pub from_ms: Option<i64>,
    pub to_ms: Option<i64>,
    pub granularity: Option<Granularity>,
    pub by_key: bool,
    pub by_tier: bool,
    pub by_environment: bool,
    pub key: Option<String>,
    pub tier: Option<String>,
    pub environment: Option<String>,
}

/// The length of a bucket. Days are UTC days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    Minute,
    Hour,
    Day,
}

impl Granularity {
    pub fn minutes(self) -> i64 {
        match self {
            Granularity::Minute => 1,
            Granularity::Hour => 60,
            Granularity::Day => 1_440,
        }
    }
}

/// The answer.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    pub from_ms: i64,
    pub to_ms: i64,
    pub rows: Vec<UsageEntry>,
}

/// One bucket of one group; what was not grouped by is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageEntry {
    pub start_ms: i64,
    pub key: Option<String>,
    pub tier: Option<String>,
    pub environment: Option<String>,
    pub permits: u64,
    /// Of the permits, those in billed environments.
    pub billable: u64,
    /// By code.
    pub refusals: BTreeMap<String, u64>,
}

impl Service {
    /// Takes a batch in, once. Answers whether it was new.
    pub async fn apply_usage(&self, batch: &UsageBatch) -> Result<bool, Fault> {
        check_batch(batch)?;
        self.hub.heard(&batch.gate, self.now_ms());
        self.store.apply_usage(batch, self.now_ms()).await
    }

    /// Totals of an organisation. The last 24 hours by the hour, unless the question says otherwise.
    pub async fn usage(&self, organization: &str, draft: UsageDraft) -> Result<Usage, Fault> {
        let now_ms = self.now_ms();
        let granularity = draft.granularity.unwrap_or(Granularity::Hour);
        let to_ms = draft.to_ms.unwrap_or(now_ms + 60_000);
        let from_ms = draft.from_ms.unwrap_or(to_ms - 24 * 3_600_000);
        let mut check = Check::new(draft.faults);
        if from_ms >= to_ms {
            check.fault("from", "must lie before `to`");
        }
        check.finish()?;
        let bucket = granularity.minutes();
        // A bucket that is touched is counted whole: half an hour of an hourly total would be no total.
        let from_minute = from_ms.div_euclid(60_000) / bucket * bucket;
        let to_minute = (to_ms + 60_000 * bucket - 1).div_euclid(60_000 * bucket) * bucket;
        let query = UsageQuery {
            organization: organization.to_owned(),
            from_minute,
            to_minute,
            bucket_minutes: bucket,
            by_key: draft.by_key,
            by_tier: draft.by_tier,
            key: draft.key,
            tier: draft.tier,
            environment: draft.environment,
            limit: MOST_ROWS,
        };
        let found = self.store.usage(&query).await?;
        if found.permits.len() > MOST_ROWS as usize || found.refusals.len() > MOST_ROWS as usize {
            let message = format!("makes more than {MOST_ROWS} rows: ask for less time or a coarser granularity");
            return Err(Fault::field("from", message));
        }
        let mut entries: BTreeMap<(i64, String, String, String), UsageEntry> = BTreeMap::new();
        let mut place = |row: &UsageRow| -> (i64, String, String, String) {
            let environment = if draft.by_environment {
                row.environment.clone()
            } else {
                String::new()
            };
            let place = (row.minute, row.key.clone(), row.tier.clone(), environment);
            entries.entry(place.clone()).or_insert_with(|| UsageEntry {
                start_ms: row.minute * 60_000,
                key: draft.by_key.then(|| row.key.clone()),
                tier: draft.by_tier.then(|| row.tier.clone()),
                environment: draft.by_environment.then(|| row.environment.clone()),
                permits: 0,
                billable: 0,
                refusals: BTreeMap::new(),
            });
            place
        };
        let permits: Vec<_> = found.permits.iter().map(|row| (place(row), row)).collect();
        let refusals: Vec<_> = found
            .refusals
            .iter()
            .map(|(row, code)| (place(row), row, code))
            .collect();
        for (place, row) in permits {
            let Some(entry) = entries.get_mut(&place) else { continue };
            entry.permits += row.count;
            entry.billable += if self.is_billed(&row.environment) { row.count } else { 0 };
        }
        for (place, row, code) in refusals {
            let Some(entry) = entries.get_mut(&place) else { continue };
            *entry.refusals.entry(code.clone()).or_default() += row.count;
        }
        Ok(Usage {
            from_ms: from_minute * 60_000,
            to_ms: to_minute * 60_000,
            rows: entries.into_values().collect(),
        })
    }

    fn is_billed(&self, environment: &str) -> bool {
        self.settings
            .environments
            .iter()
            .any(|e| e.name == environment && e.billed)
    }
}

/// A gate is trusted, but a broken one must not break the ledger.
fn check_batch(batch: &UsageBatch) -> Result<(), Fault> {
    let mut check = Check::new(Vec::new());
    let visible = |text: &str| text.bytes().all(|b| b.is_ascii_graphic());
    let short = |text: &str, most: usize| (1..=most).contains(&text.len()) && visible(text);
    let maybe = |text: &str, most: usize| text.is_empty() || short(text, most);
    if !short(&batch.gate, 64) {
        check.fault("gate", "must have 1 to 64 visible ASCII characters");
    }
    if !short(&batch.run, 64) {
        check.fault("run", "must have 1 to 64 visible ASCII characters");
    }
    if !(1..=LARGEST_COUNT).contains(&batch.sequence) {
        check.fault("sequence", "must be from 1 to 2^53");
    }
    let minute_is_fine = |minute: i64| (0..=LAST_MINUTE).contains(&minute);
    for (index, permit) in batch.permits.iter().enumerate() {
        let fine = short(&permit.key, 128) && short(&permit.tier, 128) && short(&permit.environment, 32);
        if !fine || !minute_is_fine(permit.minute) || permit.count > LARGEST_COUNT {
            check.fault(&format!("permits[{index}]"), "is out of range");
        }
    }
    for (index, refusal) in batch.refusals.iter().enumerate() {
        let key = refusal.key.as_deref().is_none_or(|key| short(key, 128));
        let environment = refusal
            .environment
            .as_deref()
            .is_none_or(|environment| maybe(environment, 32));
        let fine = key && environment && maybe(&refusal.tier, 128) && short(&refusal.code, 64);
        if !fine || !minute_is_fine(refusal.minute) || refusal.count > LARGEST_COUNT {
            check.fault(&format!("refusals[{index}]"), "is out of range");
        }
    }
    for (index, used) in batch.last_used.iter().enumerate() {
        let fine = short(&used.key, 128) && short(&used.secret, 64);
        if !(0..=crate::control::time::LAST_MS).contains(&used.at_ms) || !fine {
            check.fault(&format!("last_used[{index}]"), "is out of range");
        }
    }
    check.finish()
}

/// 2^53: what JSON's numbers hold exactly everywhere, and far below where a sum of them could overflow.
const LARGEST_COUNT: u64 = 1 << 53;
/// The year 9575, in minutes since the Unix epoch: far enough, and every minute up to it can be written as a date.
const LAST_MINUTE: i64 = 4_000_000_000;
/// A month of one key by the hour is 744 rows.
const MOST_ROWS: u32 = 10_000;
