//! Time, read once per request and passed down as a value.
//!
//! One reading, [`Now`], carries both the monotonic time that windows count in and the wall time that
//! expiry dates are compared with. The wall time is *anchored*: it is the wall clock at the last
//! [`Clock::anchor`] plus the monotonic time since, so that one request never sees two clocks disagree.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How far before the start of the process a clock's zero lies: 32 days, in nanoseconds.
///
/// The longest window is 30 days. Counts that an earlier process journalled lie before this process
/// started, and need times that can be written down.
pub const ORIGIN_BEFORE_START_NS: u64 = 32 * 24 * 3600 * 1_000_000_000;

/// One reading of a [`Clock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic nanoseconds since the clock's origin, which lies [`ORIGIN_BEFORE_START_NS`] before its start.
    pub elapsed_ns: u64,
    /// Milliseconds since 1970-01-01T00:00:00Z, without leap seconds.
    pub unix_ms: i64,
}

impl Now {
    /// The wall time, in milliseconds since the Unix epoch, of a monotonic time near this reading.
    pub fn unix_ms_at(&self, elapsed_ns: u64) -> i64 {
        let delta_ns = i128::from(elapsed_ns) - i128::from(self.elapsed_ns);
        self.unix_ms + (delta_ns.div_euclid(1_000_000)) as i64
    }

    /// The monotonic time of a wall time, or 0 where that lies before the clock's origin.
    pub fn elapsed_ns_at(&self, unix_ms: i64) -> u64 {
        let ns = i128::from(self.elapsed_ns) + (i128::from(unix_ms) - i128::from(self.unix_ms)) * 1_000_000;
        u64::try_from(ns).unwrap_or(0)
    }
}

/// The source of [`Now`]: the system's clocks, or one that a test moves by hand. Clones share their time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System(Arc<System>),
    Manual(Arc<Manual>),
}

#[derive(Debug)]
struct System {
    start: Instant,
    /// Wall time at the clock's origin, in ms. Relaxed: a stale anchor is off by what the wall clock was
    /// corrected by, which every reader must tolerate anyway.
    unix_ms_at_origin: AtomicI64,
}

#[derive(Debug)]
struct Manual {
    elapsed_ns: AtomicU64,
    unix_ms_at_origin: AtomicI64,
}

impl Clock {
    /// The system's monotonic clock, anchored to its wall clock now.
    pub fn system() -> Self {
        let clock = Clock(Source::System(Arc::new(System {
            start: Instant::now(),
            unix_ms_at_origin: AtomicI64::new(0),
        })));
        clock.anchor();
        clock
    }

    /// A clock that stands still at `unix_ms` until it is moved.
    pub fn manual(unix_ms: i64) -> Self {
        Clock(Source::Manual(Arc::new(Manual {
            elapsed_ns: AtomicU64::new(ORIGIN_BEFORE_START_NS),
            unix_ms_at_origin: AtomicI64::new(unix_ms - (ORIGIN_BEFORE_START_NS / 1_000_000) as i64),
        })))
    }

    /// Reads the clock.
    #[inline]
    pub fn now(&self) -> Now {
        let (elapsed_ns, origin_ms) = match &self.0 {
            Source::System(s) => (s.elapsed_ns(), s.unix_ms_at_origin.load(Ordering::Relaxed)),
            Source::Manual(m) => (
                m.elapsed_ns.load(Ordering::Relaxed),
                m.unix_ms_at_origin.load(Ordering::Relaxed),
            ),
        };
        Now {
            elapsed_ns,
            unix_ms: origin_ms + (elapsed_ns / 1_000_000) as i64,
        }
    }

    /// Takes over the system's wall time again, so that corrections to it (NTP, an operator) are followed.
    /// Called once a second outside the request path. A manual clock is left as it is.
    pub fn anchor(&self) {
        if let Source::System(s) = &self.0 {
            let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
            s.unix_ms_at_origin.store(
                wall.as_millis() as i64 - (s.elapsed_ns() / 1_000_000) as i64,
                Ordering::Relaxed,
            );
        }
    }

    /// Moves a manual clock forward.
    ///
    /// # Panics
    /// On a system clock: only tests move time, and they made the clock themselves.
    pub fn advance(&self, by: Duration) {
        self.manual_part()
            .elapsed_ns
            .fetch_add(by.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Sets a manual clock's monotonic reading, backwards too; the wall time moves with it.
    ///
    /// # Panics
    /// On a system clock, as [`Clock::advance`].
    pub fn set_elapsed_ns(&self, elapsed_ns: u64) {
        self.manual_part().elapsed_ns.store(elapsed_ns, Ordering::Relaxed);
    }

    fn manual_part(&self) -> &Manual {
        match &self.0 {
            Source::Manual(m) => m,
            Source::System(_) => panic!("only a manual clock can be moved"),
        }
    }
}

impl System {
    fn elapsed_ns(&self) -> u64 {
        // 2^64 ns are 584 years: the cast cannot wrap in a process's life.
        ORIGIN_BEFORE_START_NS + self.start.elapsed().as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_and_monotonic_move_together() {
        let clock = Clock::manual(1_700_000_000_000);
        let before = clock.now();
        clock.advance(Duration::from_millis(1_500));
        let after = clock.now();
        assert_eq!(after.unix_ms - before.unix_ms, 1_500);
        assert_eq!(after.elapsed_ns - before.elapsed_ns, 1_500_000_000);
        assert_eq!(before.elapsed_ns_at(after.unix_ms), after.elapsed_ns);
        assert_eq!(before.unix_ms_at(after.elapsed_ns), after.unix_ms);
    }

    #[test]
    fn the_system_clock_is_anchored_to_the_wall() {
        let clock = Clock::system();
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64;
        assert!((clock.now().unix_ms - wall).abs() < 5_000);
    }
}
