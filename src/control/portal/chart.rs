//! Usage over time and in groups, as pages show it.

use std::collections::BTreeMap;

use super::Shared;
use super::parts::{count, format_time};
use crate::control::model::Fault;
use crate::control::service::usage::{Granularity, UsageDraft};
use crate::control::store::{UsageQuery, UsageRow};

/// A span of time that pages offer.
pub struct Range {
    /// In addresses.
    pub word: &'static str,
    pub text: &'static str,
    pub granularity: Granularity,
    pub buckets: i64,
}

/// What pages offer.
pub const RANGES: [Range; 4] = [
    Range {
        word: "1h",
        text: "1 hour",
        granularity: Granularity::Minute,
        buckets: 60,
    },
    Range {
        word: "24h",
        text: "24 hours",
        granularity: Granularity::Hour,
        buckets: 24,
    },
    Range {
        word: "7d",
        text: "7 days",
        granularity: Granularity::Hour,
        buckets: 168,
    },
    Range {
        word: "30d",
        text: "30 days",
        granularity: Granularity::Day,
        buckets: 30,
    },
];

/// The range of 24 hours.
pub const DAY: usize = 1;

impl Range {
    /// The first instant of its first bucket; its last bucket is the one that is under way.
    pub fn start_ms(&self, now_ms: i64) -> i64 {
        let step_ms = self.granularity.minutes() * 60_000;
        (now_ms.div_euclid(step_ms) + 1 - self.buckets) * step_ms
    }
}

/// Restricts what is counted.
#[derive(Clone, Default)]
pub struct Filter {
    pub key: Option<String>,
    pub tier: Option<String>,
    pub environment: Option<String>,
}

/// Passed and refused requests by bucket, without gaps.
pub struct Series {
    pub points: Vec<Point>,
    pub totals: Totals,
    granularity: Granularity,
}

/// One bucket.
pub struct Point {
    pub start_ms: i64,
    pub totals: Totals,
}

/// Counts.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    pub passed: u64,
    pub billable: u64,
    pub refused: u64,
    pub codes: BTreeMap<String, u64>,
}

impl Totals {
    pub fn is_empty(&self) -> bool {
        self.passed == 0 && self.refused == 0
    }

    pub fn passed_text(&self) -> String {
        count(self.passed)
    }

    pub fn refused_text(&self) -> String {
        count(self.refused)
    }

    pub fn billable_text(&self) -> String {
        count(self.billable)
    }

    /// Refusals by code, the most frequent first.
    pub fn by_code(&self) -> Vec<(&str, String)> {
        let mut codes: Vec<_> = self.codes.iter().collect();
        codes.sort_by_key(|(_, number)| std::cmp::Reverse(**number));
        codes
            .into_iter()
            .map(|(code, number)| (code.as_str(), count(*number)))
            .collect()
    }
}

impl Series {
    /// What the script draws.
    pub fn json(&self) -> String {
        let starts: Vec<_> = self.points.iter().map(|p| p.start_ms / 1_000).collect();
        let passed: Vec<_> = self.points.iter().map(|p| p.totals.passed).collect();
        let refused: Vec<_> = self.points.iter().map(|p| p.totals.refused).collect();
        serde_json::json!([starts, passed, refused]).to_string()
    }

    /// A bucket's start as tables show it, in UTC.
    pub fn label(&self, point: &Point) -> String {
        let format = match self.granularity {
            Granularity::Day => "%a %-d %b",
            Granularity::Minute | Granularity::Hour => "%-d %b %H:%M",
        };
        format_time(point.start_ms, format)
    }

    /// Buckets in which something happened, newest first.
    pub fn busy(&self) -> Vec<&Point> {
        self.points.iter().rev().filter(|p| !p.totals.is_empty()).collect()
    }

    /// The chart in a sentence.
    pub fn summary(&self) -> String {
        let step = match self.granularity {
            Granularity::Minute => "minute",
            Granularity::Hour => "hour",
            Granularity::Day => "day",
        };
        format!(
            "Requests by the {step}: {} passed, {} refused. The table has the numbers.",
            self.totals.passed_text(),
            self.totals.refused_text()
        )
    }
}

/// Reads the ledger by bucket.
pub async fn series(portal: &Shared, organization: &str, range: &Range, filter: &Filter) -> Result<Series, Fault> {
    let now_ms = portal.app.now_ms();
    let (from_ms, granularity) = (range.start_ms(now_ms), range.granularity);
    let draft = UsageDraft {
        from_ms: Some(from_ms),
        to_ms: Some(now_ms + 1),
        granularity: Some(granularity),
        key: filter.key.clone(),
        tier: filter.tier.clone(),
        environment: filter.environment.clone(),
        ..Default::default()
    };
    let usage = portal.app.usage(organization, draft).await?;
    let step_ms = granularity.minutes() * 60_000;
    let point = |index| Point {
        start_ms: from_ms + index * step_ms,
        totals: Totals::default(),
    };
    let mut points: Vec<Point> = (0..range.buckets).map(point).collect();
    let mut all = Totals::default();
    for entry in usage.rows {
        let index = usize::try_from((entry.start_ms - from_ms).div_euclid(step_ms)).ok();
        let Some(point) = index.and_then(|index| points.get_mut(index)) else {
            continue;
        };
        for totals in [&mut point.totals, &mut all] {
            totals.passed += entry.permits;
            totals.billable += entry.billable;
            totals.refused += entry.refusals.values().sum::<u64>();
            for (code, number) in &entry.refusals {
                *totals.codes.entry(code.clone()).or_default() += number;
            }
        }
    }
    Ok(Series {
        points,
        totals: all,
        granularity,
    })
}

/// What totals are told apart by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Group {
    Nothing,
    Tier,
    Key,
    Environment,
}

/// Reads the ledger from a minute on, in groups; and whether there were too many of them to tell all.
pub async fn totals(
    portal: &Shared,
    organization: &str,
    from_ms: i64,
    group: Group,
    filter: &Filter,
) -> Result<(BTreeMap<String, Totals>, bool), Fault> {
    let app = &portal.app;
    let query = UsageQuery {
        organization: organization.to_owned(),
        from_minute: from_ms.div_euclid(60_000),
        to_minute: app.now_ms().div_euclid(60_000) + 1,
        // Longer than all of time: one bucket.
        bucket_minutes: 1 << 40,
        by_key: group == Group::Key,
        by_tier: group == Group::Tier,
        key: filter.key.clone(),
        tier: filter.tier.clone(),
        environment: filter.environment.clone(),
        limit: MOST_ROWS,
    };
    let rows = app.store.usage(&query).await?;
    let is_cut = rows.permits.len() > MOST_ROWS as usize || rows.refusals.len() > MOST_ROWS as usize;
    let name = |row: &UsageRow| match group {
        Group::Nothing => String::new(),
        Group::Tier => row.tier.clone(),
        Group::Key => row.key.clone(),
        Group::Environment => row.environment.clone(),
    };
    let billed = |name: &str| app.settings.environments.iter().any(|e| e.name == name && e.billed);
    let mut groups: BTreeMap<String, Totals> = BTreeMap::new();
    for row in &rows.permits {
        let totals = groups.entry(name(row)).or_default();
        totals.passed += row.count;
        totals.billable += if billed(&row.environment) { row.count } else { 0 };
    }
    for (row, code) in &rows.refusals {
        let totals = groups.entry(name(row)).or_default();
        totals.refused += row.count;
        *totals.codes.entry(code.clone()).or_default() += row.count;
    }
    Ok((groups, is_cut))
}

/// Several thousand keys in every environment.
const MOST_ROWS: u32 = 20_000;
