//! How slow a client may be.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// How slow a client may be: it starts with `grace` of waiting time, earns a second for every `bytes_per_second`
/// that it transfers, and can never save up more than `grace`. So `grace` is also the longest pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PaceLimits {
    /// The longest pause, and what a client has at the start.
    pub grace: Duration,
    /// The rate that is sustained for ever, in bytes per second. 0 counts as 1.
    pub bytes_per_second: u32,
}

/// Waiting time that is left to one side of one transfer.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    limits: PaceLimits,
    credit: Duration,
}

impl Pace {
    /// A transfer that is about to start.
    pub fn new(limits: PaceLimits) -> Self {
        Pace {
            limits,
            credit: limits.grace,
        }
    }

    /// `bytes` were transferred.
    pub fn earn(&mut self, bytes: usize) {
        let earned = Duration::from_secs_f64(bytes as f64 / f64::from(self.limits.bytes_per_second.max(1)));
        self.credit = self.limits.grace.min(self.credit.saturating_add(earned));
    }

    /// We waited for the client for so long. `false` once that was too long.
    pub fn spend(&mut self, waited: Duration) -> bool {
        match self.credit.checked_sub(waited) {
            Some(left) => {
                self.credit = left;
                true
            }
            None => {
                self.credit = Duration::ZERO;
                false
            }
        }
    }
}

/// Waiting in one direction: a pace, and a timer that ticks only while somebody polls.
pub(super) struct Waiting {
    pub(super) pace: Pace,
    /// Lives on after its first use, and is reset rather than made anew.
    pub(super) timer: Option<Pin<Box<Sleep>>>,
    pub(super) ticking_since: Option<Instant>,
}

impl Waiting {
    pub(super) fn new(limits: PaceLimits) -> Self {
        Waiting {
            pace: Pace::new(limits),
            timer: None,
            ticking_since: None,
        }
    }

    pub(super) fn restart(&mut self) {
        self.pace = Pace::new(self.pace.limits);
        self.ticking_since = None;
    }

    pub(super) fn progressed(&mut self, bytes: usize) {
        if let Some(since) = self.ticking_since.take() {
            // A tick that was never polled to its end was not spent waiting for the client: Pingora had stopped
            // reading because the upstream was full.
            let waited = since.elapsed().min(tick(self.pace.limits));
            self.pace.spend(waited);
            self.pace.earn(bytes);
        }
    }

    /// Called when nothing could be transferred. Ready once the pace is broken.
    pub(super) fn poll_too_slow(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let tick = tick(self.pace.limits);
        loop {
            let waited = ready!(self.poll_tick(cx, tick));
            if !self.pace.spend(waited) {
                return Poll::Ready(());
            }
        }
    }

    /// Ready every `tick` while it is polled, with the time that this tick took: at most twice the tick, since a
    /// tick that nobody polled in time was not spent waiting for the client.
    pub(super) fn poll_tick(&mut self, cx: &mut Context<'_>, tick: Duration) -> Poll<Duration> {
        let since = match self.ticking_since {
            Some(since) => since,
            None => {
                let now = Instant::now();
                self.ticking_since = Some(now);
                match &mut self.timer {
                    Some(timer) => timer.as_mut().reset(now + tick),
                    None => self.timer = Some(Box::pin(tokio::time::sleep_until(now + tick))),
                }
                now
            }
        };
        if let Some(timer) = &mut self.timer {
            ready!(timer.as_mut().poll(cx));
        }
        self.ticking_since = None;
        Poll::Ready(since.elapsed().min(tick * 2))
    }
}

/// Fine enough that a deadline is met within a twentieth, coarse enough to cost nothing.
pub(super) fn tick(limits: PaceLimits) -> Duration {
    (limits.grace / 20).clamp(Duration::from_millis(5), Duration::from_millis(500))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_allows_pauses_up_to_its_grace() {
        let limits = PaceLimits {
            grace: Duration::from_secs(10),
            bytes_per_second: 100,
        };
        let mut pace = Pace::new(limits);
        assert!(pace.spend(Duration::from_secs(10)));
        assert!(!pace.spend(Duration::from_millis(1)));
        pace.earn(100);
        assert!(pace.spend(Duration::from_secs(1)));
        pace.earn(1_000_000_000);
        assert!(pace.spend(Duration::from_secs(10)), "what was saved up is capped");
        assert!(!pace.spend(Duration::from_millis(1)));
    }

    #[test]
    fn a_drip_runs_out_of_credit() {
        let mut pace = Pace::new(PaceLimits {
            grace: Duration::from_secs(10),
            bytes_per_second: 500,
        });
        let mut seconds = 0;
        while pace.spend(Duration::from_secs(1)) {
            pace.earn(1);
            seconds += 1;
            assert!(seconds < 12, "one byte a second must not live on");
        }
        assert!(seconds >= 10);
    }
}
