//! How often somebody may try: at most so many times in any interval of the window's length, kept exactly.
//!
//! Each process counts by itself, also where several share a database: a shared count would be a write for everybody who
//! knocks, before it is known who it is, and that is a way to load the database. With N processes an address or an account
//! has N times the attempts, which is still far too few to guess a password.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::model::Fault;

/// A limit on attempts by name. Its memory is bounded: at [`MOST_NAMES`] names, those whose time is over go first, then
/// the one that tried the longest ago.
pub struct Throttle {
    limit: usize,
    window_ms: i64,
    attempts: Mutex<HashMap<String, VecDeque<i64>>>,
}

impl Throttle {
    /// At most `limit` attempts in `window_ms`.
    pub fn new(limit: u32, window_ms: i64) -> Self {
        Self {
            limit: limit as usize,
            window_ms,
            attempts: Mutex::new(HashMap::new()),
        }
    }

    /// Counts an attempt, or says when the next one may come. A refused attempt does not count: waiting always helps.
    pub fn attempt(&self, name: &str, now_ms: i64) -> Result<(), Fault> {
        let mut attempts = self.lock();
        if attempts.len() >= MOST_NAMES && !attempts.contains_key(name) {
            self.make_room(&mut attempts, now_ms);
        }
        let times = attempts.entry(name.to_owned()).or_default();
        while times.front().is_some_and(|at| *at + self.window_ms <= now_ms) {
            times.pop_front();
        }
        if times.len() >= self.limit {
            let free_at_ms = times.front().map_or(now_ms + self.window_ms, |at| at + self.window_ms);
            let wait_ms = (free_at_ms - now_ms).max(1);
            return Err(Fault::Throttled {
                retry_after_s: wait_ms.unsigned_abs().div_ceil(1_000),
            });
        }
        times.push_back(now_ms);
        Ok(())
    }

    /// Takes back an attempt that turned out well.
    pub fn refund(&self, name: &str, at_ms: i64) {
        let mut attempts = self.lock();
        if let Some(times) = attempts.get_mut(name) {
            if let Some(index) = times.iter().rposition(|at| *at == at_ms) {
                times.remove(index);
            }
            if times.is_empty() {
                attempts.remove(name);
            }
        }
    }

    fn make_room(&self, attempts: &mut HashMap<String, VecDeque<i64>>, now_ms: i64) {
        attempts.retain(|_, times| times.back().is_some_and(|at| *at + self.window_ms > now_ms));
        if attempts.len() >= MOST_NAMES
            && let Some(oldest) = attempts
                .iter()
                .min_by_key(|(_, times)| times.back().copied())
                .map(|(n, _)| n.clone())
        {
            attempts.remove(&oldest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, VecDeque<i64>>> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of an address: an IPv6 host has a whole /64 to choose from, so that is what counts.
pub fn address_name(address: Option<IpAddr>) -> String {
    match address.map(|a| a.to_canonical()) {
        Some(IpAddr::V6(v6)) => {
            let network = v6.to_bits() >> 64 << 64;
            format!("{}/64", std::net::Ipv6Addr::from_bits(network))
        }
        Some(v4) => v4.to_string(),
        None => "unknown".to_owned(),
    }
}

/// About 20 MB at worst.
const MOST_NAMES: usize = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_eleventh_attempt_waits_exactly_as_long_as_it_must() {
        let throttle = Throttle::new(10, 900_000);
        for i in 0..10 {
            throttle.attempt("a", i * 1_000).unwrap();
        }
        assert_eq!(
            throttle.attempt("a", 10_000),
            Err(Fault::Throttled { retry_after_s: 890 })
        );
        assert_eq!(
            throttle.attempt("a", 899_999),
            Err(Fault::Throttled { retry_after_s: 1 })
        );
        throttle.attempt("a", 900_000).unwrap();
        assert!(throttle.attempt("a", 900_000).is_err());
        throttle.attempt("b", 10_000).unwrap();
    }

    #[test]
    fn a_success_does_not_count_and_leaves_nothing_behind() {
        let throttle = Throttle::new(1, 1_000);
        throttle.attempt("a", 5).unwrap();
        throttle.refund("a", 5);
        throttle.attempt("a", 6).unwrap();
        throttle.refund("a", 6);
        assert!(throttle.lock().is_empty());
    }

    #[test]
    fn hosts_of_one_ipv6_network_are_one() {
        let name = |text: &str| address_name(Some(text.parse().unwrap()));
        assert_eq!(name("2001:db8::1"), name("2001:db8::ffff"));
        assert_ne!(name("2001:db8::1"), name("2001:db8:0:1::1"));
        assert_eq!(name("::ffff:192.0.2.1"), "192.0.2.1");
    }
}
