//! Requests by key, for whoever wants a series per key in the metrics: `admin.key_labels`.

use ahash::RandomState;
use dashmap::DashMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts by key id and decision. Only keys that the gate knows are in here, so no stranger makes it grow.
#[derive(Debug, Default)]
pub(super) struct KeyCounts(DashMap<Box<str>, Vec<(&'static str, AtomicU64)>, RandomState>);

impl KeyCounts {
    pub fn record(&self, key_id: &str, decision: &'static str) {
        if let Some(counts) = self.0.get(key_id)
            && let Some((_, count)) = counts.iter().find(|(code, _)| *code == decision)
        {
            count.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut counts = self.0.entry(key_id.into()).or_default();
        match counts.iter().find(|(code, _)| *code == decision) {
            Some((_, count)) => {
                count.fetch_add(1, Ordering::Relaxed);
            }
            None => counts.push((decision, AtomicU64::new(1))),
        }
    }

    /// Every key, decision and count.
    pub fn read(&self) -> Vec<(Box<str>, &'static str, u64)> {
        let mut read = vec![];
        for entry in &self.0 {
            let counts = entry.value().iter();
            read.extend(counts.map(|(code, count)| (entry.key().clone(), *code, count.load(Ordering::Relaxed))));
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_and_decision_is_counted_by_itself() {
        let counts = KeyCounts::default();
        for (key, decision) in [("a", "PASSED"), ("a", "PASSED"), ("a", "RATE_LIMITED"), ("b", "PASSED")] {
            counts.record(key, decision);
        }
        let mut read = counts.read();
        read.sort();
        let expected = [("a", "PASSED", 2), ("a", "RATE_LIMITED", 1), ("b", "PASSED", 1)];
        assert_eq!(read, expected.map(|(key, code, count)| (key.into(), code, count)));
    }
}
