//! How long to wait before the next try: doubling, jittered, so that many gates do not come back in step.

use std::time::Duration;

/// From 50 ms, which a restarted control plane is not hurt by, to 5 s, which bounds how late a gate notices it is back.
#[derive(Debug)]
pub struct Backoff {
    ceiling: Duration,
}

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(5);

impl Backoff {
    pub fn new() -> Self {
        Backoff { ceiling: FIRST }
    }

    pub fn reset(&mut self) {
        self.ceiling = FIRST;
    }

    /// The next delay: between half the ceiling and the ceiling, which doubles.
    pub fn delay(&mut self) -> Duration {
        let half = self.ceiling / 2;
        self.ceiling = (self.ceiling * 2).min(LAST);
        // Without randomness the delay is merely not jittered.
        let fraction = f64::from(getrandom::u32().unwrap_or(u32::MAX)) / f64::from(u32::MAX);
        half + half.mul_f64(fraction)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_within_its_bounds_and_starts_again() {
        let mut backoff = Backoff::new();
        assert!((50..=100).contains(&backoff.delay().as_millis()));
        let delays: Vec<_> = (0..20).map(|_| backoff.delay().as_millis()).collect();
        assert!(
            delays[0] >= 100 && delays.iter().all(|delay| *delay <= 5_000),
            "{delays:?}"
        );
        assert!(delays[19] >= 2_500);
        backoff.reset();
        assert!(backoff.delay().as_millis() <= 100);
    }
}
