//! What the proxy counts, for `/metrics`.

use ahash::RandomState;
use dashmap::DashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the duration histograms, in microseconds: 100 µs to 10 s.
pub const BUCKETS_US: [u64; 14] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 2_500_000, 10_000_000,
];

/// Requests and how long they took. Relaxed everywhere: each counter stands for itself.
#[derive(Debug, Default)]
pub struct ProxyMetrics {
    requests: DashMap<(&'static str, Box<str>), AtomicU64, RandomState>,
    /// From the head of a request to the decision that it passes.
    pub decision: Histogram,
    /// Time within Tollgate itself: the whole of a request less what its upstream took and the transfer of its body.
    pub overhead: Histogram,
    /// From choosing the upstream to the head of its response, or to its failure.
    pub upstream: Histogram,
    /// Responses by the hundreds of their status; 0: none was sent.
    pub by_class: [AtomicU64; 6],
}

/// How long the parts of one request took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// To the decision that it passes; `None`: it was refused.
    pub decision_us: Option<u64>,
    pub overhead_us: u64,
    /// `None`: no upstream was asked.
    pub upstream_us: Option<u64>,
}

/// A histogram of durations.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS_US.len() + 1],
    sum_us: AtomicU64,
}

impl ProxyMetrics {
    /// `times`: `None` where the edge refused and nothing was timed.
    pub(super) fn record(&self, decision: &'static str, tier: &str, status: u16, times: Option<&Times>) {
        // Looked up by a borrowed pair through a raw key would need a wrapper type; the tier's name is short.
        match self.requests.get(&(decision, Box::from(tier))) {
            Some(count) => {
                count.fetch_add(1, Ordering::Relaxed);
            }
            None => {
                self.requests
                    .entry((decision, tier.into()))
                    .or_default()
                    .fetch_add(1, Ordering::Relaxed);
            }
        }
        if let Some(times) = times {
            self.overhead.observe(times.overhead_us);
            if let Some(us) = times.decision_us {
                self.decision.observe(us);
            }
            if let Some(us) = times.upstream_us {
                self.upstream.observe(us);
            }
        }
        self.by_class[usize::from(status / 100).min(5)].fetch_add(1, Ordering::Relaxed);
    }

    /// Every (decision, tier) and its count.
    pub fn requests(&self) -> Vec<(&'static str, Box<str>, u64)> {
        self.requests
            .iter()
            .map(|entry| {
                (
                    entry.key().0,
                    entry.key().1.clone(),
                    entry.value().load(Ordering::Relaxed),
                )
            })
            .collect()
    }
}

impl Histogram {
    fn observe(&self, us: u64) {
        let bucket = BUCKETS_US
            .iter()
            .position(|bound| us <= *bound)
            .unwrap_or(BUCKETS_US.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// The counts of each bucket, the last for what is beyond all bounds, and the sum in microseconds.
    pub fn read(&self) -> (Vec<u64>, u64) {
        (
            self.buckets
                .iter()
                .map(|bucket| bucket.load(Ordering::Relaxed))
                .collect(),
            self.sum_us.load(Ordering::Relaxed),
        )
    }
}
