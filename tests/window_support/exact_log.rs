//! An exact log of permits, for windows of one length: what the sliding window promises to be as good as.

use std::collections::VecDeque;

/// Sub-buckets to a window, which the second promise speaks of and which define a late permit's time.
const K: u64 = 60;

/// Every permit of the last W·(1 + 1/60), with running sums, at a constant cost for each decision.
pub struct ExactLog {
    window: u64,
    sub_bucket: u64,
    /// `(time in ticks of a third of a nanosecond, permits)`, in the order of giving.
    permits: VecDeque<(u64, u64)>,
    /// The sum of all of them, and how many at the front are older than W, and the sum of those.
    sum: u64,
    old: usize,
    old_sum: u64,
    /// The latest epoch that any clock reading was in, and the start of it.
    epoch_start: u64,
    latest: u64,
    /// All permits there ever were, where times may come out of order.
    all: Option<Vec<(u64, u64)>>,
}

impl ExactLog {
    pub fn new(window_ms: u64) -> Self {
        let window = window_ms * 3_000_000;
        ExactLog {
            window,
            sub_bucket: window / K,
            permits: VecDeque::new(),
            sum: 0,
            old: 0,
            old_sum: 0,
            epoch_start: 0,
            latest: 0,
            all: None,
        }
    }

    /// For histories whose clock goes back: keeps all permits, to be sorted in the end.
    pub fn keep_all(&mut self) {
        self.all = Some(Vec::new());
    }

    /// A decision is made at this reading, so that no later permit is counted in an earlier sub-bucket.
    pub fn moved_to(&mut self, now_ns: u64) {
        let now = now_ns * 3;
        if now >= self.epoch_start + self.sub_bucket {
            self.epoch_start = now - now % self.sub_bucket;
        }
        assert!(
            now >= self.latest || self.all.is_some(),
            "times in order, or all of them kept"
        );
        self.latest = self.latest.max(now);
        // Where the clock went back, the permits that surely are within a window and a sub-bucket of any time
        // in this sub-bucket.
        let span = if self.all.is_some() {
            self.window
        } else {
            self.window + self.sub_bucket
        };
        let bound = if self.all.is_some() { self.epoch_start } else { now }.saturating_sub(span);
        while let Some(&(time, count)) = self.permits.front() {
            if time >= bound {
                break;
            }
            self.permits.pop_front();
            self.sum -= count;
            if self.old > 0 {
                self.old -= 1;
                self.old_sum -= count;
            }
        }
    }

    /// A permit was given. Returns how many were in the window that it ends, both ends included.
    pub fn given(&mut self, now_ns: u64, cost: u32) -> u64 {
        let time = (now_ns * 3).max(self.epoch_start);
        self.permits.push_back((time, u64::from(cost)));
        self.sum += u64::from(cost);
        if let Some(all) = &mut self.all {
            all.push((time, u64::from(cost)));
            return 0;
        }
        while self.permits[self.old].0 < time.saturating_sub(self.window) {
            self.old_sum += self.permits[self.old].1;
            self.old += 1;
        }
        self.sum - self.old_sum
    }

    /// The permits of the last W·(1 + 1/60) before the last decision.
    pub fn within_a_sub_bucket_more(&self) -> u64 {
        self.sum
    }

    /// The most permits in any interval of length W, where all were kept; else every permit was checked as it came.
    pub fn most_in_any_window_if_kept(self) -> Option<u64> {
        let mut all = self.all?;
        all.sort_unstable();
        let (mut first, mut within, mut most) = (0, 0, 0);
        for &(time, count) in &all {
            within += count;
            while all[first].0 < time.saturating_sub(self.window) {
                within -= all[first].1;
                first += 1;
            }
            most = most.max(within);
        }
        Some(most)
    }
}
