//! The ring of closed sub-buckets, in which several may share a word, and the memory of many such rings.

use super::super::limit::Lanes;
use super::super::sync::{AtomicU64, Ordering};
use super::WindowRef;

/// Rings of one length, one after the other.
pub(in super::super) struct Rings {
    words: Box<[AtomicU64]>,
    len: usize,
}

impl Rings {
    /// So many rings of `len` words, in which nothing was counted.
    pub fn new(rings: usize, len: usize) -> Self {
        Rings {
            words: (0..rings * len).map(|_| AtomicU64::new(0)).collect(),
            len,
        }
    }

    /// The words of each.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The ring with the index.
    pub fn get(&self, index: usize) -> &[AtomicU64] {
        let words = index * self.len..(index + 1) * self.len;
        self.words.get(words).unwrap_or_default()
    }
}

impl<const K: u64> WindowRef<'_, K> {
    /// The first epoch in `from..to` with a permit in its slot.
    pub(super) fn first_counted(self, from: u64, to: u64) -> Option<u64> {
        let mut first = None;
        self.walk(from, to, |slot, _| {
            first = Some(slot);
            false
        });
        first
    }

    pub(super) fn sum_of_slots(self, from: u64, to: u64) -> u32 {
        let mut sum = 0;
        self.walk(from, to, |_, count| {
            sum += count;
            true
        });
        sum
    }

    /// Visits the slots of the epochs `from..to` that have a count, oldest first, for as long as `visit` says so.
    #[inline]
    pub(super) fn walk(self, from: u64, to: u64, visit: impl FnMut(u64, u32) -> bool) {
        match self.lanes() {
            5 => self.walk_lanes::<5>(from, to, visit),
            3 => self.walk_lanes::<3>(from, to, visit),
            2 => self.walk_lanes::<2>(from, to, visit),
            _ => self.walk_lanes::<1>(from, to, visit),
        }
    }

    #[inline]
    fn walk_lanes<const N: u64>(self, from: u64, to: u64, mut visit: impl FnMut(u64, u32) -> bool) {
        let lanes = Lanes::<N>::of(self.shape.window_ms);
        let ring = self.ring();
        let mut epoch = from;
        let mut index = (from / N % (K / N + 1)) as usize;
        while epoch < to {
            let group = epoch / N;
            let word = ring[index].load(Ordering::Acquire); // a release by `record` precedes it
            let end = to.min((group + 1) * N);
            if lanes.group_of(word) == group {
                for slot in epoch..end {
                    let count = lanes.count_in(word, slot);
                    if count > 0 && !visit(slot, count) {
                        return;
                    }
                }
            }
            epoch = end;
            index = if index + 1 == ring.len() { 0 } else { index + 1 };
        }
    }

    /// (3) Raises the slot of `epoch` to `count`. An absent slot is a count of 0 already.
    pub(super) fn record(self, epoch: u64, count: u32) {
        if count > 0 {
            match self.lanes() {
                5 => self.record_lane::<5>(epoch, count),
                3 => self.record_lane::<3>(epoch, count),
                2 => self.record_lane::<2>(epoch, count),
                _ => self.record_lane::<1>(epoch, count),
            }
        }
    }

    fn record_lane<const N: u64>(self, epoch: u64, count: u32) {
        let slot = &self.ring()[(epoch / N % (K / N + 1)) as usize];
        let lanes = Lanes::<N>::of(self.shape.window_ms);
        let mut word = slot.load(Ordering::Relaxed); // what it leads to is checked by the swap
        while let Some(raised) = lanes.record(word, epoch, count) {
            match slot.compare_exchange_weak(word, raised, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(found) => word = found,
            }
        }
    }
}
