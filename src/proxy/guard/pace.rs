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

    /// How much longer we would wait if nothing came.
    pub fn left(&self) -> Duration {
        self.credit
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

/// Waiting in one direction: a pace, and when the wait that is going on began.
///
/// One timer stands for the end of the credit, so a slow client wakes nobody until its time is up: ten thousand of
/// them cost the others nothing while they are waited for.
pub(super) struct Waiting {
    pace: Pace,
    since: Option<Instant>,
    pub(super) timer: LazyTimer,
}

impl Waiting {
    pub(super) fn new(limits: PaceLimits) -> Self {
        Waiting {
            pace: Pace::new(limits),
            since: None,
            timer: LazyTimer::default(),
        }
    }

    /// Another transfer begins.
    pub(super) fn restart(&mut self) {
        self.pace = Pace::new(self.pace.limits);
        self.since = None;
    }

    /// The wait that was going on, if any, has ended.
    pub(super) fn end(&mut self) -> Duration {
        self.since.take().map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// What was waited for is no longer, though nothing came: the time until now counts, what follows does not.
    pub(super) fn pause(&mut self) {
        let waited = self.end();
        self.pace.spend(waited);
    }

    /// `bytes` were transferred.
    pub(super) fn progressed(&mut self, bytes: usize) {
        // What came without a wait neither costs nor earns: the credit is whole, or was spent by a wait that counted.
        if self.since.is_some() {
            self.pause();
            self.pace.earn(bytes);
        }
    }

    /// Called when nothing could be transferred. Ready once the pace is broken.
    pub(super) fn poll_too_slow(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let waited = ready!(self.poll_for(cx, self.pace.credit));
            if !self.pace.spend(waited) {
                return Poll::Ready(());
            }
        }
    }

    /// Ready when the wait that is going on, or begins now, has lasted for `patience`; says how long it was.
    pub(super) fn poll_for(&mut self, cx: &mut Context<'_>, patience: Duration) -> Poll<Duration> {
        let since = *self.since.get_or_insert_with(Instant::now);
        ready!(self.timer.poll_until(cx, since + patience));
        Poll::Ready(self.end())
    }
}

/// A timer that is rarely reset: where its deadline moves away, it fires at the old one first, and only then is it set
/// to the one that holds. Between two requests on a busy connection it usually has not fired yet.
#[derive(Default)]
pub(in crate::proxy) struct LazyTimer(Option<Pin<Box<Sleep>>>);

impl LazyTimer {
    /// Ready at `deadline`.
    pub(in crate::proxy) fn poll_until(&mut self, cx: &mut Context<'_>, deadline: Instant) -> Poll<()> {
        let timer = self
            .0
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if timer.deadline() > deadline || timer.is_elapsed() {
            timer.as_mut().reset(deadline);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
    }

    /// Waits until `deadline`.
    pub(in crate::proxy) async fn until(&mut self, deadline: Instant) {
        std::future::poll_fn(|cx| self.poll_until(cx, deadline)).await;
    }
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
