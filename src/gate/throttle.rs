//! Limits per client address: failed attempts, and public rules.
//!
//! Neither is consulted for a request that carries a valid key, so neither can delay one.

use super::limit::Limit;
use super::policy::FailedAttemptsSettings;
use super::scope::NameId;
use super::window::{Refused, Taken, Window};
use crate::clock::Now;
use dashmap::DashMap;
use pingora_limits::estimator::Estimator;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A client address as it is counted: an IPv6 client commands a whole /64, so that is what counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CountedAddress(u128);

impl From<IpAddr> for CountedAddress {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => CountedAddress(u128::from(v4.to_bits())),
            IpAddr::V6(v6) => CountedAddress(v6.to_bits() >> 64 | 1 << 127),
        }
    }
}

/// How many bad credentials came from an address in this window of time.
///
/// Built on the count-min sketch of pingora-limits, whose memory is fixed whatever an attacker sends. Its flaws,
/// and why they do no harm here: it never counts too little, but may count too much when addresses collide in all
/// rows, and then tells a *failing* client 429 instead of 401; a valid key is not asked about. Its `Rate` is not
/// used: it reads a clock of its own and panics below a second. Two sketches take turns instead, by the request's
/// one clock reading.
pub(super) struct FailedAttempts {
    sketches: [Estimator; 2],
    /// The interval that the current sketch counts, as its number since the clock's origin.
    interval: AtomicU64,
}

/// Two rows of 32,768 counters: 512 KiB a sketch. 1,000 failing addresses collide in both rows of a given one with a
/// probability of (1,000 / 32,768)^2, about 1 in 1,000. More rows of fewer counters would make that rarer, and every
/// failure dearer, which an attacker has many of.
const ROWS: usize = 2;
const COUNTERS: usize = 32_768;

impl FailedAttempts {
    pub fn new() -> Self {
        FailedAttempts {
            sketches: [Estimator::new(ROWS, COUNTERS), Estimator::new(ROWS, COUNTERS)],
            interval: AtomicU64::new(0),
        }
    }

    /// Counts a failed attempt. `Some(seconds until the address starts afresh)` once there were too many.
    pub fn record(&self, address: IpAddr, settings: &FailedAttemptsSettings, now: Now) -> Option<u32> {
        let (sketch, ends_in_s) = self.current(settings, now);
        let count = sketch.incr(CountedAddress::from(address), 1);
        (count > settings.limit as isize).then_some(ends_in_s)
    }

    fn current(&self, settings: &FailedAttemptsSettings, now: Now) -> (&Estimator, u32) {
        let window_ns = (settings.window.as_nanos() as u64).max(1_000_000_000);
        let interval = now.elapsed_ns / window_ns;
        let sketch = &self.sketches[(interval % 2) as usize];
        // Relaxed: the counters are estimates anyway, and a thread that still counts in the old sketch for a
        // moment loses an attempt at most. The swap lets one thread alone clear the sketch.
        if self.interval.load(Ordering::Relaxed) < interval
            && self.interval.fetch_max(interval, Ordering::Relaxed) < interval
        {
            sketch.reset();
        }
        let left_ns = window_ns - now.elapsed_ns % window_ns;
        (sketch, left_ns.div_ceil(1_000_000_000) as u32)
    }
}

impl fmt::Debug for FailedAttempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailedAttempts").finish_non_exhaustive()
    }
}

/// Exact windows of public rules, per address. Bounded: beyond [`AddressWindows::CAPACITY`] active addresses, all
/// further ones of a rule share one window, so that a flood from everywhere cannot fill the memory.
#[derive(Debug)]
pub(super) struct AddressWindows {
    windows: DashMap<(NameId, CountedAddress), Arc<Window>, ahash::RandomState>,
}

impl AddressWindows {
    pub const CAPACITY: usize = 65_536;
    const SHARED: CountedAddress = CountedAddress(u128::MAX);

    pub fn new() -> Self {
        AddressWindows {
            windows: DashMap::with_hasher(ahash::RandomState::new()),
        }
    }

    pub fn take(&self, rule: NameId, address: IpAddr, limit: Limit, now: Now) -> Result<Taken, Refused> {
        let mut key = (rule, CountedAddress::from(address));
        loop {
            let found = self.windows.get(&key).map(|window| window.clone());
            let window = match found {
                Some(window) => window,
                None => {
                    if self.windows.len() >= Self::CAPACITY && key.1 != Self::SHARED {
                        key.1 = Self::SHARED;
                        continue;
                    }
                    self.windows
                        .entry(key)
                        .or_insert_with(|| Arc::new(Window::new(limit, now.elapsed_ns)))
                        .clone()
                }
            };
            match window.take(limit, 1, now.elapsed_ns) {
                Err(Refused::Retired | Refused::Outgrown) => self.replace(key, &window, limit, now),
                decided => return decided,
            }
        }
    }

    /// Closing comes first and the successor is put in under the entry's lock, so no permit is lost or given twice.
    fn replace(&self, key: (NameId, CountedAddress), old: &Arc<Window>, limit: Limit, now: Now) {
        let counts = old.close_and_export();
        if let Some(mut entry) = self.windows.get_mut(&key)
            && Arc::ptr_eq(&entry, old)
        {
            *entry = Arc::new(Window::import(limit, &counts, now.elapsed_ns));
        }
    }

    /// Forgets addresses whose windows are idle. Called now and then, off the request path. One at a time, so that no
    /// request waits for longer than one takes.
    pub fn forget_idle(&self, now: Now) {
        let is_idle = |window: &Window| window.used(now.elapsed_ns) == 0;
        let idle = self.windows.iter().filter(|entry| is_idle(entry.value()));
        let idle: Vec<_> = idle.map(|entry| *entry.key()).collect();
        for address in idle {
            self.windows
                .remove_if(&address, |_, window| window.retire_if_idle(now.elapsed_ns));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use std::time::Duration;

    const SETTINGS: FailedAttemptsSettings = FailedAttemptsSettings {
        limit: 3,
        window: Duration::from_secs(60),
    };

    #[test]
    fn an_address_is_slowed_after_its_limit_and_starts_afresh_when_told() {
        let clock = Clock::manual(1_700_000_000_000);
        let attempts = FailedAttempts::new();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        for _ in 0..3 {
            assert_eq!(attempts.record(address, &SETTINGS, clock.now()), None);
        }
        let wait_s = attempts.record(address, &SETTINGS, clock.now()).unwrap();
        assert!((1..=60).contains(&wait_s));
        assert_eq!(
            attempts.record("192.0.2.2".parse().unwrap(), &SETTINGS, clock.now()),
            None
        );
        clock.advance(Duration::from_secs(u64::from(wait_s)));
        assert_eq!(attempts.record(address, &SETTINGS, clock.now()), None);
    }

    #[test]
    fn an_ipv6_client_is_its_64_and_a_mapped_ipv4_one_is_itself() {
        let counted = |text: &str| CountedAddress::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(counted("2001:db8::1"), counted("2001:db8::ffff:1"));
        assert_ne!(counted("2001:db8::1"), counted("2001:db8:0:1::1"));
        assert_eq!(counted("::ffff:192.0.2.1"), counted("192.0.2.1"));
    }

    #[test]
    fn public_rules_count_each_address_for_itself() {
        let clock = Clock::manual(1_700_000_000_000);
        let windows = AddressWindows::new();
        let limit = Limit::new(2, 60_000).unwrap();
        let take = |address: &str| {
            windows
                .take(NameId(0), address.parse().unwrap(), limit, clock.now())
                .is_ok()
        };
        assert_eq!(
            [take("192.0.2.1"), take("192.0.2.1"), take("192.0.2.1")],
            [true, true, false]
        );
        assert!(take("192.0.2.2"));
        clock.advance(Duration::from_secs(120));
        windows.forget_idle(clock.now());
        assert!(windows.windows.is_empty());
        assert!(take("192.0.2.1"));
    }
}
