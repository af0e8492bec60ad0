//! HTTP/2: frames are watched as they pass, and what breaks the rules ends the connection with a GOAWAY.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::close::{LINGER, LINGER_BYTES};
use super::{Guard, GuardError, Mode};

impl Guard {
    pub(super) fn poll_read_frames(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Mode::Frames(watch) = &mut self.mode else {
            unreachable!("called for HTTP/2 only")
        };
        let before = out.filled().len();
        let outcome = if !self.buffer.is_empty() {
            let step = self.buffer.len().min(out.remaining());
            out.put_slice(&self.buffer[..step]);
            self.buffer.advance(step);
            watch.received(&mut out.filled_mut()[before..])
        } else {
            match Pin::new(&mut self.io).poll_read(cx, out) {
                Poll::Ready(Ok(())) => {
                    let waited = self.reading.end();
                    watch
                        .waited(waited)
                        .and_then(|()| watch.received(&mut out.filled_mut()[before..]))
                }
                Poll::Pending => loop {
                    let Some(patience) = watch.patience() else {
                        // The quiet from here on is not waiting.
                        self.reading.end();
                        return Poll::Pending;
                    };
                    let waited = ready!(self.reading.poll_for(cx, patience));
                    if let Err(error) = watch.waited(waited) {
                        break Err(error);
                    }
                },
                error => return error,
            }
        };
        let Err(error) = outcome else {
            return Poll::Ready(Ok(()));
        };
        let mut goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        goaway[9..13].copy_from_slice(&watch.highest_stream().to_be_bytes());
        goaway[13..].copy_from_slice(&error.goaway_code().to_be_bytes());
        if watch.is_between_sent_frames() {
            // A courtesy: where it does not fit into the socket, nobody reads.
            let _ = Pin::new(&mut self.io).poll_write(cx, &goaway);
            let _ = Pin::new(&mut self.io).poll_flush(cx);
        }
        self.mode = Mode::Ending(error);
        self.reading.end();
        out.set_filled(before);
        self.poll_end(error, cx)
    }

    /// After a GOAWAY of our own: reads for a short while, so that what is still coming does not reset the connection
    /// before the client has seen it.
    pub(super) fn poll_end(&mut self, error: GuardError, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = Pin::new(&mut self.io).poll_shutdown(cx);
        let mut scratch = [0u8; 4096];
        loop {
            let mut space = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.io).poll_read(cx, &mut space) {
                Poll::Ready(Ok(())) if !space.filled().is_empty() => {
                    self.drained += space.filled().len();
                    if self.drained > LINGER_BYTES {
                        return Poll::Ready(Err(error.into()));
                    }
                }
                Poll::Ready(_) => return Poll::Ready(Err(error.into())),
                Poll::Pending => {
                    ready!(self.reading.poll_for(cx, LINGER));
                    return Poll::Ready(Err(error.into()));
                }
            }
        }
    }

    /// Follows what we send. It can change what is awaited from the client (a window opens, a response begins), so the
    /// wait until now counts under what held until now, and the timer is set for what holds next: nobody may read
    /// again before it fires.
    pub(super) fn frames_sent<'a>(&mut self, cx: &mut Context<'_>, pieces: impl Iterator<Item = &'a [u8]>) {
        let Mode::Frames(watch) = &mut self.mode else {
            return;
        };
        let waited = self.reading.end();
        let was_too_slow = watch.waited(waited).is_err();
        for piece in pieces {
            watch.sent(piece);
        }
        let is_over = watch
            .patience()
            .is_some_and(|patience| was_too_slow || self.reading.poll_for(cx, patience).is_ready());
        if is_over {
            // The next read says so.
            cx.waker().wake_by_ref();
        }
    }
}
