//! Permits set aside for one window of this gate, out of a limit that it shares with other gates.
//!
//! The decision spends from here; somebody else, off the request path, refills it. Neither waits for the other.
//!
//! # Protocol
//! One refiller at a time; any number of spenders.
//! - **Refill**: raise `until_ns`, then add to `left`. What is left already may be spent for as long as what is added: the
//!   refiller's side has seen to that. Both are releases, `left` is acquired before `until_ns` is read, so whoever
//!   sees the new permits sees their end too.
//! - **Spend**: while the clock is before `until_ns`, compare-and-swap `left` down. It is the only step that lowers it
//!   but for taking back, so nothing is spent twice.
//! - **Take back**: swap `left` to 0, then set `until_ns` to 0, so that what is added next has an end of its own. What the
//!   refiller gets, nobody spent. A spender that slept from before the take-back until after the next refill
//!   spends from that by the old end; but its clock reading is older than that refill, and so before the new end too.

use super::limit::Limit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Permits that may be spent without asking anybody.
#[derive(Debug)]
pub struct Reservation {
    left: AtomicU32,
    /// The instant from which nothing of `left` may be spent, in `clock::Now::elapsed_ns`.
    until_ns: AtomicU64,
    /// Below it, it is time to ask for more; 0: not before the last is spent and another is wanted.
    low_water: AtomicU32,
    /// Before it there is no use in asking: the limit was reached. Relaxed, as what follows: each stands for itself.
    nothing_until_ns: AtomicU64,
    /// When the oldest counted permit of any gate leaves the window.
    leaves_at_ns: AtomicU64,
    /// What the limit had left beside this reservation, when last heard.
    left_elsewhere: AtomicU32,
    /// Somebody was told that more is wanted, and has not got to it yet.
    asked: AtomicBool,
    /// The gate counts alone for now.
    alone: AtomicBool,
    /// Permits given while the gate counted alone.
    spent_alone: AtomicU64,
    /// Permits that requests wait for.
    waiting: AtomicU32,
    /// The limit's permits, for the refiller.
    limit: AtomicU32,
    /// The refiller's number for it.
    handle: AtomicU32,
    window_ms: u64,
    name: Arc<str>,
}

/// How spending ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spend {
    /// A permit was spent.
    Spent {
        /// More should be asked for, and nobody was told yet: tell the refiller.
        ask: bool,
    },
    /// None is set aside, and more may be had.
    Dry {
        /// Nobody was told yet: tell the refiller.
        ask: bool,
    },
    /// None is set aside, and none will be for a while: the limit is reached.
    Nothing,
    /// No permit was spent: the window's own count is to decide.
    Alone,
}

impl Reservation {
    /// With nothing in it, for a key's window in a tier.
    pub fn new(key_id: &str, tier: &str, limit: Limit) -> Self {
        Reservation {
            handle: AtomicU32::new(u32::MAX),
            window_ms: limit.window_ms(),
            name: format!("w:{}:{tier}:{key_id}", limit.window_ms()).into(),
            left: AtomicU32::new(0),
            until_ns: AtomicU64::new(0),
            low_water: AtomicU32::new(0),
            nothing_until_ns: AtomicU64::new(0),
            leaves_at_ns: AtomicU64::new(0),
            left_elsewhere: AtomicU32::new(0),
            asked: AtomicBool::new(false),
            alone: AtomicBool::new(false),
            spent_alone: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            limit: AtomicU32::new(limit.permits()),
        }
    }

    /// Spends `cost` permits, all or none, at the clock reading `now_ns`. Lock-free, allocates nothing.
    #[inline]
    pub fn spend(&self, limit: u32, cost: u32, now_ns: u64) -> Spend {
        if self.limit.load(Ordering::Relaxed) != limit {
            self.limit.store(limit, Ordering::Relaxed);
        }
        let mut left = self.left.load(Ordering::Acquire);
        while left >= cost && now_ns < self.until_ns.load(Ordering::Acquire) {
            let swapped = self
                .left
                .compare_exchange_weak(left, left - cost, Ordering::AcqRel, Ordering::Acquire);
            match swapped {
                Ok(_) => {
                    let low = left - cost < self.low_water.load(Ordering::Relaxed);
                    return Spend::Spent {
                        ask: low && now_ns >= self.nothing_until_ns.load(Ordering::Relaxed) && self.tell(),
                    };
                }
                Err(now_left) => left = now_left,
            }
        }
        if self.alone.load(Ordering::Relaxed) {
            return Spend::Alone;
        }
        if now_ns < self.nothing_until_ns.load(Ordering::Relaxed) {
            return Spend::Nothing;
        }
        Spend::Dry { ask: self.tell() }
    }

    /// A permit was given by the window's own count.
    pub fn spent_alone(&self, cost: u32) {
        self.spent_alone.fetch_add(u64::from(cost), Ordering::Relaxed);
    }

    /// What is left of the limit, as far as it is known here.
    pub fn remaining(&self) -> u32 {
        let elsewhere = self.left_elsewhere.load(Ordering::Relaxed);
        self.left.load(Ordering::Relaxed).saturating_add(elsewhere)
    }

    /// Whole seconds, rounded up, until the oldest counted permit leaves the window; at least one where it is not known.
    pub fn reset_s(&self, now_ns: u64) -> u32 {
        let wait_ns = self.leaves_at_ns.load(Ordering::Relaxed).saturating_sub(now_ns);
        u32::try_from(wait_ns.div_ceil(1_000_000_000))
            .unwrap_or(u32::MAX)
            .max(1)
    }

    /// A request begins to wait for `cost` permits; [`Reservation::waited`] ends it.
    pub fn wait(&self, cost: u32) {
        self.waiting.fetch_add(cost, Ordering::Relaxed);
    }

    /// A request no longer waits.
    pub fn waited(&self, cost: u32) {
        self.waiting.fetch_sub(cost, Ordering::Relaxed);
    }

    /// Whether a request's next look is worth while: there are permits, or an answer that there are none.
    pub fn is_decided(&self, now_ns: u64) -> bool {
        let has_permits = self.left.load(Ordering::Acquire) > 0 && now_ns < self.until_ns.load(Ordering::Acquire);
        has_permits || now_ns < self.nothing_until_ns.load(Ordering::Relaxed) || self.alone.load(Ordering::Relaxed)
    }

    /// Whether it was this call that has to tell the refiller.
    fn tell(&self) -> bool {
        !self.asked.load(Ordering::Relaxed) && !self.asked.swap(true, Ordering::AcqRel)
    }
}

/// The refiller's side.
impl Reservation {
    /// What all gates call the window: `w:WINDOW_MS:TIER:KEY_ID`.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The window's length in milliseconds.
    pub fn window_ms(&self) -> u64 {
        self.window_ms
    }

    /// The refiller's number for it, `u32::MAX` at first.
    pub fn handle(&self) -> u32 {
        self.handle.load(Ordering::Relaxed)
    }

    /// Sets the refiller's number.
    pub fn set_handle(&self, handle: u32) {
        self.handle.store(handle, Ordering::Relaxed);
    }

    /// The limit that the last decision went by.
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Permits that are left, whether they may still be spent or not.
    pub fn left(&self) -> u32 {
        self.left.load(Ordering::Acquire)
    }

    /// How many permits are waited for.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// How many permits were given alone.
    pub fn total_alone(&self) -> u64 {
        self.spent_alone.load(Ordering::Relaxed)
    }

    /// The instant from which nothing of what is left may be spent.
    pub fn until_ns(&self) -> u64 {
        self.until_ns.load(Ordering::Acquire)
    }

    /// Takes note that more is wanted: the next one who wants more tells again.
    pub fn heard(&self) -> bool {
        self.asked.swap(false, Ordering::AcqRel)
    }

    /// Adds permits. All that is left may now be spent until `until_ns`, or until an end that was set before, if later.
    pub fn refill(&self, permits: u32, until_ns: u64, low_water: u32) {
        self.low_water.store(low_water, Ordering::Relaxed);
        self.until_ns.fetch_max(until_ns, Ordering::AcqRel);
        self.left.fetch_add(permits, Ordering::AcqRel);
    }

    /// Takes what is left.
    pub fn take_back(&self) -> u32 {
        let left = self.left.swap(0, Ordering::AcqRel);
        self.until_ns.store(0, Ordering::Release);
        left
    }

    /// Says what was heard of the whole window.
    pub fn note(&self, left_elsewhere: u32, leaves_at_ns: u64) {
        self.left_elsewhere.store(left_elsewhere, Ordering::Relaxed);
        self.leaves_at_ns.store(leaves_at_ns, Ordering::Relaxed);
    }

    /// Says that nothing can be had before `until_ns`; 0 ends that.
    pub fn nothing_until(&self, until_ns: u64) {
        self.nothing_until_ns.store(until_ns, Ordering::Relaxed);
    }

    /// From now on the window's own count decides, or no longer.
    pub fn count_alone(&self, alone: bool) {
        self.alone.store(alone, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_aside_is_spent_once_and_in_time() {
        let reservation = Reservation::new("key_1", "default", Limit::new(10, 1_000).unwrap());
        assert_eq!(reservation.spend(10, 1, 5), Spend::Dry { ask: true });
        assert_eq!(reservation.spend(10, 1, 5), Spend::Dry { ask: false }, "told once");
        assert!(reservation.heard());
        reservation.refill(3, 100, 2);
        assert_eq!(reservation.spend(10, 1, 6), Spend::Spent { ask: false });
        assert_eq!(
            reservation.spend(10, 1, 99),
            Spend::Spent { ask: true },
            "one left is low"
        );
        assert_eq!(reservation.spend(10, 1, 100), Spend::Dry { ask: false }, "too late");
        reservation.refill(1, 90, 0);
        assert_eq!(reservation.until_ns(), 100, "an end never moves back");
        assert_eq!(reservation.take_back(), 2);
        reservation.nothing_until(200);
        assert_eq!(reservation.spend(10, 1, 199), Spend::Nothing);
        reservation.count_alone(true);
        assert_eq!(reservation.spend(10, 1, 199), Spend::Alone);
    }

    #[test]
    fn threads_spend_no_more_than_is_there() {
        let reservation = Reservation::new("key_1", "default", Limit::new(1, 1_000).unwrap());
        let spent = AtomicU64::new(0);
        std::thread::scope(|threads| {
            for _ in 0..4 {
                threads.spawn(|| {
                    for _ in 0..20_000 {
                        if matches!(reservation.spend(1, 1, 0), Spend::Spent { .. }) {
                            spent.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
            for _ in 0..1_000 {
                reservation.refill(7, 1, 0);
            }
        });
        let spent = spent.into_inner();
        assert_eq!(spent + u64::from(reservation.left()), 7_000);
    }
}
