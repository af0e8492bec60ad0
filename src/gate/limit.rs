//! Limits, and the arithmetic of the windows that enforce them. No atomics, no clock: every function is pure.
//!
//! A window of length W is cut into K sub-buckets of W/K. Time is counted in *ticks* of a third of a
//! nanosecond, so that W/60 is a whole number of ticks for every W in whole milliseconds and nothing is ever
//! rounded. The *epoch* of an instant is the number of the sub-bucket it falls in, from the clock's origin.

use std::fmt;

/// So many permits in any window of such a length.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Limit {
    permits: u32,
    /// At most 2,592,000,000, which 32 bits hold.
    window_ms: u32,
}

/// Why a [`Limit`] cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LimitError {
    /// The permits are not within 1 to [`Limit::MAX_PERMITS`].
    Permits(u32),
    /// The window's length is not within [`Limit::MIN_WINDOW_MS`] to [`Limit::MAX_WINDOW_MS`].
    WindowMs(u64),
}

impl Limit {
    /// The most permits a limit may have, 2^31 − 1: what a count's 31 bits hold.
    pub const MAX_PERMITS: u32 = MAX_COUNT;
    /// The shortest window, one second, in milliseconds.
    pub const MIN_WINDOW_MS: u64 = 1_000;
    /// The longest window, thirty days, in milliseconds.
    pub const MAX_WINDOW_MS: u64 = 30 * 24 * 3600 * 1_000;

    /// `permits` in any `window_ms` milliseconds.
    ///
    /// # Errors
    /// Where either lies outside its range.
    pub const fn new(permits: u32, window_ms: u64) -> Result<Self, LimitError> {
        if permits == 0 || permits > Self::MAX_PERMITS {
            return Err(LimitError::Permits(permits));
        }
        if window_ms < Self::MIN_WINDOW_MS || window_ms > Self::MAX_WINDOW_MS {
            return Err(LimitError::WindowMs(window_ms));
        }
        Ok(Limit {
            permits,
            window_ms: window_ms as u32,
        })
    }

    /// How many permits a window gives, 1 to 2^31 − 1.
    pub const fn permits(&self) -> u32 {
        self.permits
    }

    /// The window's length in milliseconds, 1,000 to 2,592,000,000.
    pub const fn window_ms(&self) -> u64 {
        self.window_ms as u64
    }

    /// The window's length in seconds, rounded up: what the `RateLimit-Policy` field carries.
    pub const fn window_s(&self) -> u32 {
        self.window_ms.div_ceil(1_000)
    }
}

impl fmt::Display for LimitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LimitError::Permits(given) => {
                write!(f, "{given} permits: a limit has 1 to {} of them", Limit::MAX_PERMITS)
            }
            LimitError::WindowMs(given) => {
                write!(
                    f,
                    "a window of {given} ms: it lasts from 1,000 ms (1 s) to 2,592,000,000 ms (30 days)"
                )
            }
        }
    }
}

impl std::error::Error for LimitError {}

/// Ticks per nanosecond.
const TICKS_PER_NS: u64 = 3;
/// Ticks per millisecond; every K that divides it cuts every window without a remainder.
const TICKS_PER_MS: u64 = 1_000_000 * TICKS_PER_NS;
/// Ticks per second.
const TICKS_PER_S: u64 = 1_000 * TICKS_PER_MS;
/// The latest instant told apart from later ones, 97 years after the clock's origin: beyond it time stands
/// still, which refuses. It leaves room above for the end of any window without overflow.
const MAX_NS: u64 = (1 << 63) / TICKS_PER_NS;

/// A reading of the clock in ticks.
#[inline]
pub(super) const fn ticks_at(now_ns: u64) -> u64 {
    let ns = if now_ns < MAX_NS { now_ns } else { MAX_NS };
    ns * TICKS_PER_NS
}

/// Whole seconds from `now` to `then` (both in ticks), rounded up; 0 where `then` has passed. They fit into 32 bits as
/// time stands still before its 2^32nd second.
#[inline]
pub(super) const fn seconds_until(then: u64, now: u64) -> u32 {
    if then > now {
        ((then - now - 1) / TICKS_PER_S + 1) as u32
    } else {
        0
    }
}

/// Where the sub-buckets of a window of one length begin and end, with K of them to the window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid<const K: u64> {
    /// The length of a sub-bucket, below 2^47 ticks.
    sub_bucket: u64,
}

impl<const K: u64> Grid<K> {
    #[inline]
    pub(super) const fn new(window_ms: u32) -> Self {
        const { assert!(K > 0 && K <= MOST_K && TICKS_PER_MS.is_multiple_of(K)) };
        Grid {
            sub_bucket: window_ms as u64 * (TICKS_PER_MS / K),
        }
    }

    /// The epoch that an instant (in ticks) falls in.
    #[inline]
    pub(super) const fn epoch_at(self, ticks: u64) -> u64 {
        ticks / self.sub_bucket
    }

    /// The first tick of an epoch. For epochs within some windows of a clock reading, so that the product fits.
    #[inline]
    pub(super) const fn start_of(self, epoch: u64) -> u64 {
        epoch * self.sub_bucket
    }

    /// The instant, in ticks, from which a permit counted in `epoch` no longer counts: a whole window after the
    /// end of its sub-bucket, so a whole window after any instant within it.
    #[inline]
    pub(super) const fn leaves_at(self, epoch: u64) -> u64 {
        self.start_of(epoch + K + 1)
    }

    /// The first whole nanosecond that falls in `epoch`.
    pub(super) const fn first_ns(self, epoch: u64) -> u64 {
        self.start_of(epoch).div_ceil(TICKS_PER_NS)
    }

    /// The last whole nanosecond that falls in `epoch`: no permit counted there was given later.
    pub(super) const fn last_ns(self, epoch: u64) -> u64 {
        self.start_of(epoch + 1).div_ceil(TICKS_PER_NS) - 1
    }
}

/// Bits of a word's lower part, that holds a count or several.
const COUNT_BITS: u32 = 31;
/// The largest count.
pub(super) const MAX_COUNT: u32 = (1 << COUNT_BITS) - 1;
/// The last epoch that can be told from its followers: all of the upper 33 bits but the value that marks a
/// closed window. At the shortest window it comes 4.5 years after the clock's origin.
pub(super) const LAST_EPOCH: u64 = (1 << (64 - COUNT_BITS)) - 2;
/// A head that no instant has: the window is closed.
pub(super) const CLOSED: u64 = pack(LAST_EPOCH + 1, 0);

/// `[epoch:33 | count:31]`. Ordered by epoch first, as words.
#[inline]
pub(super) const fn pack(epoch: u64, count: u32) -> u64 {
    epoch << COUNT_BITS | count as u64
}

/// The upper 33 bits of a word.
#[inline]
pub(super) const fn epoch_of(word: u64) -> u64 {
    word >> COUNT_BITS
}

/// The lower 31 bits of a word.
#[inline]
pub(super) const fn count_of(word: u64) -> u32 {
    word as u32 & MAX_COUNT
}

/// `LANES` consecutive epochs, a *group*, share a word of the ring: `[group | counts of so many bits each]`.
///
/// In a long window fewer groups can ever be, so that their numbers leave more bits for the counts.
#[derive(Clone, Copy)]
pub(super) struct Lanes<const LANES: u64> {
    bits: u32,
}

/// Windows of an hour and longer are long.
const LONG_MS: u32 = 3_600_000;
/// The most sub-buckets that a window can have.
const MOST_K: u64 = 60;

impl<const LANES: u64> Lanes<LANES> {
    const SHORT: u32 = COUNT_BITS / LANES as u32;
    const LONG: u32 = match LANES {
        5 => 8,
        3 => 13,
        2 => 19,
        _ => COUNT_BITS,
    };

    /// As windows of this length have them.
    #[inline]
    pub(super) const fn of(window_ms: u32) -> Self {
        const {
            let last_group = ticks_at(u64::MAX) / (LONG_MS as u64 * (TICKS_PER_MS / MOST_K)) / LANES;
            assert!(last_group >> (64 - Self::LONG * LANES as u32) == 0);
        }
        Lanes {
            bits: if window_ms < LONG_MS { Self::SHORT } else { Self::LONG },
        }
    }

    /// The largest count that a lane holds.
    #[inline]
    pub(super) const fn capacity(self) -> u32 {
        (1 << self.bits) - 1
    }

    /// The number of the group that a word is of.
    #[inline]
    pub(super) const fn group_of(self, word: u64) -> u64 {
        word >> (self.bits * LANES as u32)
    }

    /// The count of `epoch` in `word`, 0 unless the word is that of the epoch's group.
    #[inline]
    pub(super) const fn count_in(self, word: u64, epoch: u64) -> u32 {
        if self.group_of(word) == epoch / LANES {
            (word >> ((epoch % LANES) as u32 * self.bits)) as u32 & self.capacity()
        } else {
            0
        }
    }

    /// `word` with `count` recorded for `epoch`, or `None` where it holds that already, a larger count or a later
    /// group. A word of an earlier group is begun afresh.
    #[inline]
    pub(super) const fn record(self, word: u64, epoch: u64, count: u32) -> Option<u64> {
        let group = epoch / LANES;
        let shift = (epoch % LANES) as u32 * self.bits;
        if self.group_of(word) > group {
            None
        } else if self.group_of(word) < group {
            Some(group << (self.bits * LANES as u32) | (count as u64) << shift)
        } else if self.count_in(word, epoch) >= count {
            None
        } else {
            Some(word & !((self.capacity() as u64) << shift) | (count as u64) << shift)
        }
    }
}

/// The lanes to a word that a K-sub-bucket ring can have, from the most compact on: those that divide K, so that
/// K / lanes + 1 words hold any K + 1 consecutive epochs.
pub(super) const LANES: [u64; 4] = [5, 3, 2, 1];

/// The largest count a lane holds where a word of a window of this length has so many of them.
#[inline]
pub(super) const fn capacity(lanes: u64, window_ms: u32) -> u32 {
    match lanes {
        5 => Lanes::<5>::of(window_ms).capacity(),
        3 => Lanes::<3>::of(window_ms).capacity(),
        2 => Lanes::<2>::of(window_ms).capacity(),
        _ => Lanes::<1>::of(window_ms).capacity(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_their_ranges() {
        assert_eq!(Limit::new(0, 1_000), Err(LimitError::Permits(0)));
        assert_eq!(Limit::new(1 << 31, 1_000), Err(LimitError::Permits(1 << 31)));
        assert_eq!(Limit::new(1, 999), Err(LimitError::WindowMs(999)));
        assert_eq!(Limit::new(1, 2_592_000_001), Err(LimitError::WindowMs(2_592_000_001)));
        let most = Limit::new(Limit::MAX_PERMITS, Limit::MAX_WINDOW_MS).unwrap();
        assert_eq!(
            (most.permits(), most.window_ms(), most.window_s()),
            ((1 << 31) - 1, 2_592_000_000, 2_592_000)
        );
        assert_eq!(Limit::new(5, 1_001).unwrap().window_s(), 2);
    }

    #[test]
    fn sub_buckets_tile_time_without_gaps() {
        for window_ms in [1_000, 1_001, 59_999, 3_600_000, 2_592_000_000] {
            let grid = Grid::<60>::new(window_ms);
            assert_eq!(
                grid.start_of(60),
                ticks_at(u64::from(window_ms) * 1_000_000),
                "60 of them are the window"
            );
            for epoch in [0, 1, 59, 60, 12_345] {
                assert_eq!(grid.epoch_at(grid.start_of(epoch)), epoch);
                assert_eq!(grid.epoch_at(grid.start_of(epoch + 1) - 1), epoch);
                assert_eq!(grid.epoch_at(ticks_at(grid.first_ns(epoch))), epoch);
                assert_eq!(grid.epoch_at(ticks_at(grid.last_ns(epoch))), epoch);
                assert_eq!(grid.last_ns(epoch) + 1, grid.first_ns(epoch + 1));
            }
        }
    }

    #[test]
    fn time_that_cannot_be_told_apart_stands_still() {
        assert_eq!(ticks_at(u64::MAX), ticks_at(MAX_NS));
        let grid = Grid::<60>::new(2_592_000_000);
        let last = grid.epoch_at(ticks_at(u64::MAX));
        assert!(
            grid.leaves_at(last) > ticks_at(u64::MAX),
            "the window's end does not overflow"
        );
    }

    #[test]
    fn waits_are_rounded_up() {
        assert_eq!(seconds_until(TICKS_PER_S, 0), 1);
        assert_eq!(seconds_until(TICKS_PER_S + 1, 0), 2);
        assert_eq!(seconds_until(1, 0), 1);
        assert_eq!(seconds_until(5, 5), 0);
        assert_eq!(seconds_until(4, 5), 0);
        assert_eq!(seconds_until(ticks_at(u64::MAX), 0), 3_074_457_346);
    }

    #[test]
    fn lanes_hold_their_counts_apart() {
        fn check<const N: u64>(window_ms: u32, capacity: u32) {
            let lanes = Lanes::<N>::of(window_ms);
            assert_eq!(lanes.capacity(), capacity);
            assert_eq!(super::capacity(N, window_ms), capacity);
            let last = (ticks_at(u64::MAX) / (u64::from(window_ms) * (TICKS_PER_MS / 60))).min(LAST_EPOCH) / N;
            for group in [7, last] {
                let mut word = lanes.record(0, (group - 1) * N, capacity).unwrap();
                for lane in 0..N {
                    let count = capacity - lane as u32;
                    word = lanes.record(word, group * N + lane, count).unwrap();
                }
                for lane in 0..N {
                    let epoch = group * N + lane;
                    assert_eq!(lanes.count_in(word, epoch), capacity - lane as u32);
                    assert_eq!(lanes.count_in(word, epoch + N), 0, "of another group");
                    assert_eq!(
                        lanes.record(word, epoch, capacity - lane as u32 - 1),
                        None,
                        "never lowered"
                    );
                    assert_eq!(lanes.record(word, epoch - N, 1), None, "never for an earlier group");
                }
            }
        }
        for window_ms in [1_000, LONG_MS - 1] {
            check::<1>(window_ms, 2_147_483_647);
            check::<2>(window_ms, 32_767);
            check::<3>(window_ms, 1_023);
            check::<5>(window_ms, 63);
        }
        for window_ms in [LONG_MS, 2_592_000_000] {
            check::<1>(window_ms, 2_147_483_647);
            check::<2>(window_ms, 524_287);
            check::<3>(window_ms, 8_191);
            check::<5>(window_ms, 255);
        }
    }
}
