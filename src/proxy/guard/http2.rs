//! HTTP/2: frames are watched as they pass, and what breaks the rules ends the connection with a GOAWAY.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::close::{LINGER, LINGER_BYTES};
use super::pace::tick;
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
            watch.received(&out.filled()[before..])
        } else {
            match Pin::new(&mut self.io).poll_read(cx, out) {
                Poll::Ready(Ok(())) => watch.received(&out.filled()[before..]),
                Poll::Pending => loop {
                    if !watch.is_waiting() {
                        // A tick that nobody polls would count the quiet time as waiting once something is awaited
                        // again.
                        self.reading.ticking_since = None;
                        return Poll::Pending;
                    }
                    let waited = ready!(self.reading.poll_tick(cx, tick(self.settings.body)));
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
        self.reading.ticking_since = None;
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
                    ready!(self.reading.poll_tick(cx, LINGER / 2));
                    return Poll::Ready(Err(error.into()));
                }
            }
        }
    }
}
