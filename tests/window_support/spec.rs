//! The window as a sequential program: what each call answers if the calls come one after another.
//!
//! It keeps a count for every sub-bucket there ever was, so that it has no ring, no sums and no hints to get wrong.

use std::collections::BTreeMap;

use super::limit::Limit;
use super::window::{Refused, Taken};

#[derive(Clone)]
pub struct Spec {
    k: u64,
    window_ns: u64,
    pub head: u64,
    pub counts: BTreeMap<u64, u64>,
    pub closed: bool,
}

impl Spec {
    pub fn new(k: u64, limit: Limit, now_ns: u64) -> Self {
        let window_ns = limit.window_ms() * 1_000_000;
        let mut spec = Spec {
            k,
            window_ns,
            head: 0,
            counts: BTreeMap::new(),
            closed: false,
        };
        spec.head = spec.epoch_at(now_ns);
        spec
    }

    pub fn epoch_at(&self, now_ns: u64) -> u64 {
        (u128::from(now_ns) * u128::from(self.k) / u128::from(self.window_ns)) as u64
    }

    /// The first of a call's two steps: time moves on. A refused call may be seen to have done this alone.
    pub fn tick(&mut self, now_ns: u64) {
        if !self.closed {
            self.head = self.head.max(self.epoch_at(now_ns));
        }
    }

    pub fn counted(&self) -> u64 {
        self.counts
            .range(self.head.saturating_sub(self.k)..=self.head)
            .map(|(_, count)| count)
            .sum()
    }

    /// The second step.
    pub fn take(&mut self, limit: Limit, cost: u32, now_ns: u64) -> Result<Taken, Refused> {
        let (permits, cost) = (u64::from(limit.permits()), u64::from(cost));
        if cost > permits {
            return Err(Refused::NeverFits);
        }
        if self.closed {
            return Err(Refused::Retired);
        }
        if self.counted() + cost <= permits {
            if cost > 0 {
                *self.counts.entry(self.head).or_default() += cost;
            }
            let reset_s = self
                .oldest()
                .map_or(0, |oldest| self.seconds_until_gone(oldest, now_ns));
            return Ok(Taken {
                remaining: (permits - self.counted()) as u32,
                reset_s,
            });
        }
        let mut left = self.counted();
        let first = self.head.saturating_sub(self.k);
        for (&epoch, count) in self.counts.range(first..) {
            left -= count;
            if left + cost <= permits {
                return Err(Refused::Limited {
                    retry_after_s: self.seconds_until_gone(epoch, now_ns),
                    reset_s: self.seconds_until_gone(self.oldest().unwrap(), now_ns),
                });
            }
        }
        unreachable!("with nothing counted, a cost within the limit fits")
    }

    fn oldest(&self) -> Option<u64> {
        self.counts
            .range(self.head.saturating_sub(self.k)..=self.head)
            .map(|(&epoch, _)| epoch)
            .next()
    }

    fn seconds_until_gone(&self, epoch: u64, now_ns: u64) -> u32 {
        // (epoch + K + 1) · W / K is an instant in fractions of a nanosecond: compare multiplied by K.
        let k = u128::from(self.k);
        let gone = u128::from(epoch + self.k + 1) * u128::from(self.window_ns);
        gone.saturating_sub(u128::from(now_ns) * k).div_ceil(1_000_000_000 * k) as u32
    }
}
