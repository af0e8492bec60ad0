//! What a window has counted, on its way to the journal or into the window that succeeds it.

use super::super::limit::{CLOSED, Grid, LAST_EPOCH, Lanes, Limit, MAX_COUNT, count_of, epoch_of, pack, ticks_at};
use super::super::sync::Ordering;
use super::{SlidingWindow, WindowRef, window_ms};

/// What was counted in a window, by sub-bucket.
///
/// A sub-bucket is named by the last nanosecond that falls in it: the latest that its permits can have been given.
/// Whoever converts that to a coarser unit rounds up.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct WindowCounts {
    /// `(last_ns, count)`, oldest first.
    entries: Vec<(u64, u32)>,
    /// When the newest sub-bucket began, or 0: no clock that counts in it is earlier.
    pub(super) first_ns: u64,
}

impl WindowCounts {
    /// Counts read back from a journal: `(last_ns, count)` in the present clock's nanoseconds, in any order.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (u64, u32)>) -> Self {
        let mut counts = WindowCounts {
            entries: pairs.into_iter().collect(),
            first_ns: 0,
        };
        counts.sort();
        counts
    }

    /// The sub-buckets with permits in them, oldest first: the last nanosecond of each, and how many.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u64, u32)> {
        self.entries.iter().copied()
    }

    /// Adds what was counted elsewhere, such as in the same key's window before a restart.
    pub fn merge(&mut self, other: &WindowCounts) {
        self.entries.extend_from_slice(&other.entries);
        self.first_ns = self.first_ns.max(other.first_ns);
        self.sort();
    }

    /// All permits.
    pub fn total(&self) -> u64 {
        self.entries.iter().map(|&(_, count)| u64::from(count)).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn add(&mut self, first_ns: u64, last_ns: u64, count: u32) {
        self.entries.push((last_ns, count));
        self.first_ns = self.first_ns.max(first_ns);
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.first_ns = 0;
    }

    pub(super) fn sort(&mut self) {
        self.entries.sort_unstable();
    }
}

impl<const K: u64> SlidingWindow<K> {
    /// Closes the window, if nobody did so before, and returns what was counted in it. No permit is taken after.
    ///
    /// Every caller gets the same counts, so that a thread that finds a closed window can replace it itself: build
    /// the new one from these counts, and install it where the old one still stands. Only one must win that.
    pub fn close_and_export(&self) -> WindowCounts {
        self.by_ref().close_and_export()
    }

    /// What counts now, by sub-bucket. Never less than what was given before the call began.
    pub fn export(&self, now_ns: u64) -> WindowCounts {
        self.by_ref().export(now_ns)
    }

    /// [`SlidingWindow::export`] into counts that were used before, which spares an allocation.
    pub fn export_into(&self, now_ns: u64, counts: &mut WindowCounts) {
        self.by_ref().export_into(now_ns, counts);
    }

    /// A window that begins with these counts, each at the end of its sub-bucket (never later than the clock), so
    /// that none is forgiven early. Wide enough for the limit and for the counts, whichever is more.
    pub fn import(limit: Limit, counts: &WindowCounts, now_ns: u64) -> Self {
        let grid = Grid::<K>::new(window_ms(limit));
        let now_ns = now_ns.max(counts.first_ns);
        let head_epoch = grid.epoch_at(ticks_at(now_ns)).min(LAST_EPOCH);
        let first_epoch = head_epoch.saturating_sub(K);

        // By age: the youngest are kept first where the sum is beyond what can be counted at all. The sum is then at
        // or above every limit for as long as anything left out could have mattered.
        let mut by_age = vec![0_u64; K as usize + 1];
        for (last_ns, count) in counts.iter() {
            let epoch = grid.epoch_at(ticks_at(last_ns.min(now_ns))).min(head_epoch);
            if epoch >= first_epoch {
                by_age[(head_epoch - epoch) as usize] += u64::from(count);
            }
        }
        let mut sum = 0;
        for count in &mut by_age {
            *count = (*count).min(u64::from(MAX_COUNT) - sum);
            sum += *count;
        }

        let window = Self::at(window_ms(limit), limit.permits().max(sum as u32), head_epoch);
        for (age, &count) in by_age.iter().enumerate().skip(1).filter(|&(_, &count)| count > 0) {
            window.by_ref().record(head_epoch - age as u64, count as u32);
        }
        // Nobody else has the window yet; whoever hands it over synchronises.
        let head = pack(head_epoch, by_age[0] as u32);
        window.words.head.store(head, Ordering::Relaxed);
        let prior = pack(head_epoch, (sum - by_age[0]) as u32);
        window.words.prior.store(prior, Ordering::Relaxed);
        window
    }
}

impl<const K: u64> WindowRef<'_, K> {
    /// [`SlidingWindow::close_and_export`].
    pub fn close_and_export(self) -> WindowCounts {
        loop {
            let head = self.words.head.load(Ordering::Acquire);
            if head == CLOSED || self.close(head) {
                let mut counts = WindowCounts::default();
                self.collect(None, &mut counts);
                return counts;
            }
        }
    }

    /// [`SlidingWindow::export`].
    pub fn export(self, now_ns: u64) -> WindowCounts {
        let mut counts = WindowCounts::default();
        self.export_into(now_ns, &mut counts);
        counts
    }

    /// [`SlidingWindow::export_into`].
    pub fn export_into(self, now_ns: u64, counts: &mut WindowCounts) {
        let now_epoch = Grid::<K>::new(self.shape.window_ms).epoch_at(ticks_at(now_ns));
        loop {
            let head = self.words.head.load(Ordering::Acquire);
            counts.clear();
            if head == CLOSED {
                self.collect(None, counts);
                return;
            }
            self.collect(Some((head, now_epoch)), counts);
            if self.still_in(epoch_of(head)) {
                return;
            }
        }
    }

    /// Collects the counts under `head` that still count at `now_epoch`; of a closed window all that the slots have.
    fn collect(self, open: Option<(u64, u64)>, counts: &mut WindowCounts) {
        let grid = Grid::<K>::new(self.shape.window_ms);
        match open {
            Some((head, now_epoch)) => {
                let epoch = epoch_of(head);
                let from = now_epoch.max(epoch).saturating_sub(K);
                self.walk(from, epoch, |slot, count| {
                    counts.add(grid.first_ns(slot), grid.last_ns(slot), count);
                    true
                });
                if count_of(head) > 0 && epoch >= from {
                    counts.add(grid.first_ns(epoch), grid.last_ns(epoch), count_of(head));
                }
            }
            None => match self.lanes() {
                5 => self.collect_all::<5>(grid, counts),
                3 => self.collect_all::<3>(grid, counts),
                2 => self.collect_all::<2>(grid, counts),
                _ => self.collect_all::<1>(grid, counts),
            },
        }
    }

    fn collect_all<const N: u64>(self, grid: Grid<K>, counts: &mut WindowCounts) {
        let lanes = Lanes::<N>::of(self.shape.window_ms);
        for word in self.ring() {
            let word = word.load(Ordering::Acquire);
            let group = lanes.group_of(word);
            for epoch in group * N..(group + 1) * N {
                let count = lanes.count_in(word, epoch);
                if count > 0 {
                    counts.add(grid.first_ns(epoch), grid.last_ns(epoch), count);
                }
            }
        }
        counts.sort();
    }
}
