//! After a `101`: a tunnel, for as long as it is used and allowed.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf;
use tokio::io::{AsyncRead, ReadBuf};

use super::pace::Pace;
use super::{Guard, GuardError, Mode, PaceLimits};

impl Guard {
    pub(super) fn poll_read_upgraded(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.buffer.is_empty() {
            let step = self.buffer.len().min(out.remaining());
            out.put_slice(&self.buffer[..step]);
            self.buffer.advance(step);
            return Poll::Ready(Ok(()));
        }
        let result = Pin::new(&mut self.io).poll_read(cx, out);
        if result.is_ready() {
            self.reading.restart();
            return result;
        }
        loop {
            let waited = ready!(self.reading.poll_tick(cx, UPGRADED_TICK));
            let is_allowed = self.info.keep_while.get().is_none_or(|is_allowed| is_allowed());
            if !is_allowed || !self.reading.pace.spend(waited) {
                return Poll::Ready(Err(GuardError::UpgradedEnded.into()));
            }
        }
    }

    pub(super) fn became_upgraded(&mut self) {
        self.mode = Mode::Upgraded;
        let limits = PaceLimits {
            grace: self.settings.upgraded_idle,
            bytes_per_second: 1,
        };
        self.reading.pace = Pace::new(limits);
        self.reading.ticking_since = None;
    }
}

/// How often an upgraded connection is asked for: "closed within a second" with room to spare.
const UPGRADED_TICK: Duration = Duration::from_millis(400);
