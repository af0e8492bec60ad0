//! What the proxy counts, for `/metrics`.
//!
//! Each thread counts in a shard of its own, so that workers do not pass cache lines around; a reader adds the shards
//! up. Relaxed everywhere: each counter stands for itself.

use crate::gate::Tier;
use ahash::RandomState;
use dashmap::DashMap;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Upper bounds of the duration histograms, in microseconds: 100 µs to 10 s.
pub const BUCKETS_US: [u64; 14] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 2_500_000, 10_000_000,
];

/// Requests and how long they took.
#[derive(Debug)]
pub struct ProxyMetrics {
    shards: [Shard; SHARDS],
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

/// A histogram of durations: the count of each bucket, the last for what is beyond all bounds, and the sum.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Durations {
    /// One count for each of [`BUCKETS_US`], and one more.
    pub counts: [u64; BUCKETS_US.len() + 1],
    /// The sum in microseconds.
    pub sum_us: u64,
}

/// What some of the threads counted. Its alignment keeps shards off each other's cache lines, which come in pairs.
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    requests: DashMap<(&'static str, u32), Requests, RandomState>,
    decision: Histogram,
    overhead: Histogram,
    upstream: Histogram,
    by_class: [AtomicU64; 6],
}

#[derive(Debug)]
struct Requests {
    tier: Box<str>,
    count: AtomicU64,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BUCKETS_US.len() + 1],
    sum_us: AtomicU64,
}

/// More workers than this share shards, which costs them time and nothing else.
const SHARDS: usize = 16;
/// Stands for "no tier": numbers of tiers are smaller.
const NO_TIER: u32 = u32::MAX;

impl Default for ProxyMetrics {
    fn default() -> Self {
        ProxyMetrics {
            shards: std::array::from_fn(|_| Shard::new()),
        }
    }
}

impl ProxyMetrics {
    /// `times`: `None` where the edge refused and nothing was timed.
    pub(super) fn record(&self, decision: &'static str, tier: Option<&Tier>, status: u16, times: Option<&Times>) {
        let shard = &self.shards[shard_of_this_thread()];
        let number = tier.map_or(NO_TIER, |tier| tier.id.index() as u32);
        match shard.requests.get(&(decision, number)) {
            Some(requests) => add(&requests.count, 1),
            None => {
                let first = || Requests {
                    tier: tier.map_or_else(Box::default, |tier| tier.name.clone()),
                    count: AtomicU64::new(0),
                };
                let requests = shard.requests.entry((decision, number)).or_insert_with(first);
                add(&requests.count, 1);
            }
        }
        if let Some(times) = times {
            shard.overhead.observe(times.overhead_us);
            if let Some(us) = times.decision_us {
                shard.decision.observe(us);
            }
            if let Some(us) = times.upstream_us {
                shard.upstream.observe(us);
            }
        }
        add(&shard.by_class[usize::from(status / 100).min(5)], 1);
    }

    /// Every (decision, tier) and its count.
    pub fn requests(&self) -> Vec<(&'static str, Box<str>, u64)> {
        let mut sums: HashMap<(&'static str, Box<str>), u64> = HashMap::new();
        for entry in self.shards.iter().flat_map(|shard| &shard.requests) {
            let label = (entry.key().0, entry.value().tier.clone());
            *sums.entry(label).or_default() += entry.value().count.load(Ordering::Relaxed);
        }
        sums.into_iter()
            .map(|((code, tier), count)| (code, tier, count))
            .collect()
    }

    /// Responses by the hundreds of their status; 0: none was sent.
    pub fn by_class(&self) -> [u64; 6] {
        std::array::from_fn(|class| {
            let counts = self.shards.iter().map(|shard| &shard.by_class[class]);
            counts.map(|count| count.load(Ordering::Relaxed)).sum()
        })
    }

    /// From the head of a request to the decision that it passes.
    pub fn decision(&self) -> Durations {
        Durations::sum(self.shards.iter().map(|shard| &shard.decision))
    }

    /// Time within Tollgate itself: the whole of a request less what its upstream took and the transfer of its body.
    pub fn overhead(&self) -> Durations {
        Durations::sum(self.shards.iter().map(|shard| &shard.overhead))
    }

    /// From choosing the upstream to the head of its response, or to its failure.
    pub fn upstream(&self) -> Durations {
        Durations::sum(self.shards.iter().map(|shard| &shard.upstream))
    }
}

impl Shard {
    fn new() -> Self {
        Shard {
            // The smallest number of its own shards that a DashMap allows: one thread writes here.
            requests: DashMap::with_capacity_and_hasher_and_shard_amount(0, RandomState::new(), 2),
            decision: Histogram::default(),
            overhead: Histogram::default(),
            upstream: Histogram::default(),
            by_class: Default::default(),
        }
    }
}

impl Histogram {
    fn observe(&self, us: u64) {
        let bucket = BUCKETS_US
            .iter()
            .position(|bound| us <= *bound)
            .unwrap_or(BUCKETS_US.len());
        add(&self.buckets[bucket], 1);
        add(&self.sum_us, us);
    }
}

impl Durations {
    fn sum<'a>(parts: impl Iterator<Item = &'a Histogram>) -> Self {
        let mut sum = Durations::default();
        for part in parts {
            for (count, more) in sum.counts.iter_mut().zip(&part.buckets) {
                *count += more.load(Ordering::Relaxed);
            }
            sum.sum_us += part.sum_us.load(Ordering::Relaxed);
        }
        sum
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Threads are told apart by where their own variables lie, so nobody has to hand out numbers.
fn shard_of_this_thread() -> usize {
    thread_local! {
        static HERE: u8 = const { 0 };
    }
    let address = HERE.with(|here| std::ptr::from_ref(here) as usize);
    // Fibonacci hashing: the upper half of the product depends on every bit of the address.
    ((address as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize % SHARDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_threads_count_is_added_up() {
        let metrics = ProxyMetrics::default();
        let passed = Times {
            decision_us: Some(1),
            overhead_us: 200,
            upstream_us: Some(100),
        };
        let refused = Times {
            decision_us: None,
            overhead_us: 20_000_000,
            upstream_us: None,
        };
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..100).for_each(|_| metrics.record("PASSED", None, 200, Some(&passed))));
            }
        });
        metrics.record("RATE_LIMITED", None, 429, Some(&refused));
        metrics.record("AMBIGUOUS_REQUEST", None, 400, None);
        let mut requests = metrics.requests();
        requests.sort_unstable();
        let expected = [("AMBIGUOUS_REQUEST", 1), ("PASSED", 800), ("RATE_LIMITED", 1)];
        assert_eq!(requests, expected.map(|(code, count)| (code, "".into(), count)));
        assert_eq!(metrics.by_class(), [0, 0, 800, 0, 2, 0]);
        let (overhead, upstream) = (metrics.overhead(), metrics.upstream());
        assert_eq!((overhead.counts[1], overhead.counts[14]), (800, 1));
        assert_eq!(overhead.sum_us, 800 * 200 + 20_000_000);
        assert_eq!((upstream.counts[0], upstream.sum_us), (800, 80_000));
        assert_eq!(metrics.decision().counts.iter().sum::<u64>(), 800);
    }
}
