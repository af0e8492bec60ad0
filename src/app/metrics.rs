//! Which metrics a process has, and where each is read.

use super::GateRole;
use crate::clock::Clock;
use crate::proxy::ProxyMetrics;
use crate::telemetry::metrics::{HistogramSample, Metrics, Sample};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// All metrics of a process.
pub fn registry(gate: Option<&GateRole>, clock: &Clock) -> Metrics {
    let mut metrics = Metrics::default();
    metrics.gauge("build_info", "The version that runs.", || {
        vec![(vec![("version", env!("CARGO_PKG_VERSION").to_owned())], 1.0)]
    });
    let Some(role) = gate else { return metrics };
    let proxy = role.proxy.metrics();
    let read = proxy.clone();
    metrics.counter("requests", "Requests, by what was decided and the tier.", move || {
        requests(&read)
    });
    let read = proxy.clone();
    metrics.counter(
        "responses",
        "Responses, by the class of their status; none: no response was sent.",
        move || {
            let class = |n: usize| if n == 0 { "none".to_owned() } else { format!("{n}xx") };
            let count = |(n, count): (usize, &std::sync::atomic::AtomicU64)| {
                (vec![("class", class(n))], count.load(Ordering::Relaxed) as f64)
            };
            read.by_class.iter().enumerate().map(count).collect()
        },
    );
    let read = proxy.clone();
    metrics.histogram(
        "own_overhead",
        "Time of a request without the upstream's part.",
        move || histogram(read.own.read()),
    );
    metrics.histogram(
        "upstream",
        "From choosing the upstream to the head of its response.",
        move || histogram(proxy.upstream.read()),
    );
    let in_flight = role.in_flight.clone();
    metrics.gauge("requests_in_flight", "Requests under way.", move || {
        one(in_flight.load(Ordering::Relaxed) as f64)
    });
    let gate = role.gate.clone();
    metrics.gauge("snapshot_keys", "Keys that the gate knows.", move || {
        one(gate.key_count() as f64)
    });
    let gate = role.gate.clone();
    metrics.gauge("snapshot_revision", "Revision of the keys in force.", move || {
        one(gate.revision().unwrap_or_default() as f64)
    });
    let feed = role.feed.clone();
    metrics.gauge(
        "feed_connected",
        "1 while the source of the keys is connected.",
        move || one(f64::from(u8::from(feed.status().connected))),
    );
    let (feed, clock) = (role.feed.clone(), clock.clone());
    metrics.gauge(
        "snapshot_age_seconds",
        "Time since the source of the keys was last heard.",
        move || {
            let age_ms = |heard_ms: i64| (clock.now().unix_ms - heard_ms).max(0);
            feed.status()
                .last_heard_unix_ms
                .map_or(vec![], |heard_ms| one(age_ms(heard_ms) as f64 / 1000.0))
        },
    );
    let feed = role.feed.clone();
    metrics.counter("feed_changes", "Changes of keys that were applied.", move || {
        one(feed.status().changes as f64)
    });
    let feed = role.feed.clone();
    metrics.counter(
        "feed_refused",
        "Snapshots and lines of the feed that were refused.",
        move || one(feed.status().refused as f64),
    );
    let feed = role.feed.clone();
    metrics.counter(
        "feed_unusable_keys",
        "Keys that could not be taken over, and were left out.",
        move || one(feed.status().unusable_keys as f64),
    );
    let feed = role.feed.clone();
    metrics.gauge(
        "feed_source_is_behind",
        "1 while the source has an older revision than the gate.",
        move || one(f64::from(u8::from(feed.status().source_is_behind))),
    );
    let feed = role.feed.clone();
    metrics.gauge(
        "spool_failing",
        "1 while the copy of the keys on disk cannot be written.",
        move || one(f64::from(u8::from(feed.status().spool_error.is_some()))),
    );
    if let Some((log, _)) = &role.access_log {
        let read = log.clone();
        metrics.counter("access_log_lines", "Lines written to the access log.", move || {
            one(read.written() as f64)
        });
        let read = log.clone();
        metrics.counter("access_log_dropped", "Lines that could not be written.", move || {
            one(read.dropped() as f64)
        });
    }
    metrics
}

fn requests(proxy: &Arc<ProxyMetrics>) -> Vec<Sample> {
    let sample = |(code, tier, count): (&str, Box<str>, u64)| {
        (vec![("code", code.to_owned()), ("tier", tier.into())], count as f64)
    };
    proxy.requests().into_iter().map(sample).collect()
}

fn histogram((counts, sum_us): (Vec<u64>, u64)) -> HistogramSample {
    let bounds = crate::proxy::BUCKETS_US
        .iter()
        .map(|us| *us as f64 / 1e6)
        .chain([f64::INFINITY]);
    HistogramSample {
        buckets: bounds.zip(counts).collect(),
        sum: sum_us as f64 / 1e6,
    }
}

fn one(value: f64) -> Vec<Sample> {
    vec![(vec![], value)]
}
