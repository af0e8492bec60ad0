//! After a `101`: a tunnel, for as long as it is used and allowed.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Instant;

use super::{Guard, GuardError, Mode};

/// What is remembered of a tunnel.
pub(super) struct Tunnel {
    /// When something last passed, in either direction.
    used_at: Instant,
    /// When it was last asked whether the tunnel is still allowed.
    asked_at: Instant,
}

impl Tunnel {
    pub(super) fn new(now: Instant) -> Self {
        Tunnel {
            used_at: now,
            asked_at: now,
        }
    }
}

impl Guard {
    pub(super) fn poll_read_upgraded(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut now = Instant::now();
        // Before the read: a client that never pauses is asked for like any other.
        self.look_at_tunnel(now)?;
        if !self.buffer.is_empty() {
            let step = self.buffer.len().min(out.remaining());
            out.put_slice(&self.buffer[..step]);
            self.buffer.advance(step);
            return Poll::Ready(Ok(()));
        }
        let result = Pin::new(&mut self.io).poll_read(cx, out);
        if result.is_ready() {
            self.tunnel_used(now);
            return result;
        }
        loop {
            let Mode::Upgraded(tunnel) = &self.mode else {
                unreachable!("called for tunnels only")
            };
            let mut deadline = tunnel.used_at + self.settings.upgraded_idle;
            if self.info.keep_while.get().is_some() {
                deadline = deadline.min(tunnel.asked_at + ASK_EVERY);
            }
            ready!(self.reading.timer.poll_until(cx, deadline));
            now = now.max(Instant::now());
            self.look_at_tunnel(now)?;
        }
    }

    /// Something passed through the tunnel.
    pub(super) fn tunnel_used(&mut self, now: Instant) {
        if let Mode::Upgraded(tunnel) = &mut self.mode {
            tunnel.used_at = now;
        }
    }

    /// Whether the tunnel may go on; asks for it at most every [`ASK_EVERY`].
    pub(super) fn look_at_tunnel(&mut self, now: Instant) -> io::Result<()> {
        let Mode::Upgraded(tunnel) = &mut self.mode else {
            return Ok(());
        };
        let mut is_over = now.duration_since(tunnel.used_at) >= self.settings.upgraded_idle;
        if now.duration_since(tunnel.asked_at) >= ASK_EVERY
            && let Some(is_allowed) = self.info.keep_while.get()
        {
            tunnel.asked_at = now;
            is_over |= !is_allowed();
        }
        if is_over {
            Err(GuardError::UpgradedEnded.into())
        } else {
            Ok(())
        }
    }

    pub(super) fn became_upgraded(&mut self) {
        self.mode = Mode::Upgraded(Tunnel::new(Instant::now()));
        self.reading.end();
    }
}

/// How often it is asked whether an upgraded connection is still allowed: "closed within a second" with room to spare.
const ASK_EVERY: Duration = Duration::from_millis(400);
