//! One HTTP/1 message, and what follows it.

use std::future::Future as _;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut as _, BytesMut};
use pingora::protocols::Stream;
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};

use super::super::strict::{Ambiguity, BodyFraming, ChunkCheck, HeadFraming};
use super::{Guard, GuardError, MIN_READ, Mode};

pub(super) enum Body {
    /// So many bytes are still to come.
    Length(u64),
    /// Boxed: few requests are chunked, and the guard moves once per request.
    Chunked(Box<ChunkCheck>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ResponseState {
    /// Nothing but informational responses so far.
    Start,
    Started,
}

impl Guard {
    /// Starts the message whose head lies whole at the front of the buffer, and returns what Pingora may parse at
    /// once: the head, and as much of its body as has come.
    pub(in crate::proxy) fn begin(&mut self, framing: &HeadFraming) -> Result<BytesMut, Ambiguity> {
        let rest = &self.buffer[framing.head_bytes..];
        let (taken, body) = match framing.body {
            BodyFraming::Length(length) => {
                let taken = length.min(rest.len() as u64);
                (taken as usize, Body::Length(length - taken))
            }
            BodyFraming::Chunked => {
                let mut check = ChunkCheck::default();
                let taken = check.advance(rest)?;
                if check.is_done() {
                    (taken, Body::Length(0))
                } else {
                    (taken, Body::Chunked(Box::new(check)))
                }
            }
        };
        self.mode = Mode::Message {
            body,
            upgrade: framing.upgrade,
            response: ResponseState::Start,
            had_eof: false,
        };
        self.reading.restart();
        self.writing.restart();
        let mut message = self.buffer.split_to(framing.head_bytes + taken);
        if let Some((start, end)) = framing.authority {
            // Rare: only proxies are asked in absolute-form, as a rule.
            let rest = message.split_off(end);
            message.truncate(start);
            message.extend_from_slice(&rest);
        }
        Ok(message)
    }

    /// The last message was read to its end, and the client is still there: a next one may follow.
    pub(in crate::proxy) fn is_reusable(&self) -> bool {
        matches!(
            self.mode,
            Mode::Message {
                body: Body::Length(0),
                had_eof: false,
                ..
            }
        )
    }

    pub(super) fn poll_read_message(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Mode::Message { body, had_eof, .. } = &mut self.mode else {
            unreachable!("called for messages only")
        };
        let before = out.filled().len();
        let result = match body {
            Body::Length(0) => {
                return poll_read_ahead(
                    &mut self.io,
                    &mut self.buffer,
                    had_eof,
                    self.settings.read_ahead_bytes,
                    cx,
                );
            }
            Body::Length(left) => {
                let result = if !self.buffer.is_empty() {
                    let most = usize::try_from(*left).unwrap_or(usize::MAX).min(out.remaining());
                    let step = most.min(self.buffer.len());
                    out.put_slice(&self.buffer[..step]);
                    self.buffer.advance(step);
                    Poll::Ready(Ok(()))
                } else if *left >= out.remaining() as u64 {
                    Pin::new(&mut self.io).poll_read(cx, out)
                } else {
                    // What follows the body must stay in the socket. Less than `remaining`, so it fits a usize.
                    let mut part = ReadBuf::new(out.initialize_unfilled_to(*left as usize));
                    let result = Pin::new(&mut self.io).poll_read(cx, &mut part);
                    let read = part.filled().len();
                    out.advance(read);
                    result
                };
                *left -= (out.filled().len() - before) as u64;
                result
            }
            Body::Chunked(check) => {
                let mut result = Poll::Ready(Ok(()));
                if self.buffer.is_empty() {
                    result = poll_fill(&mut self.io, &mut self.buffer, cx, CHUNK_READ).map_ok(drop);
                }
                if !self.buffer.is_empty() {
                    let most = self.buffer.len().min(out.remaining());
                    match check.advance(&self.buffer[..most]) {
                        Ok(taken) => {
                            out.put_slice(&self.buffer[..taken]);
                            self.buffer.advance(taken);
                            if check.is_done() {
                                *body = Body::Length(0);
                            }
                        }
                        Err(ambiguity) => return Poll::Ready(Err(GuardError::Body(ambiguity).into())),
                    }
                }
                result
            }
        };
        match result {
            Poll::Ready(Ok(())) => {
                let read = out.filled().len() - before;
                if read == 0 {
                    *had_eof = true;
                }
                self.reading.progressed(read);
                Poll::Ready(Ok(()))
            }
            Poll::Pending => match self.reading.poll_too_slow(cx) {
                Poll::Ready(()) => {
                    self.gave_up = true;
                    Poll::Ready(Err(GuardError::BodyTooSlow.into()))
                }
                Poll::Pending => Poll::Pending,
            },
            error => error,
        }
    }
}

/// Between messages: notices that the client has gone, and reads ahead a little of what it sends next, without
/// showing it to Pingora, which would take it for garbage behind the body.
fn poll_read_ahead(
    io: &mut Stream,
    buffer: &mut BytesMut,
    had_eof: &mut bool,
    most: usize,
    cx: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    if *had_eof {
        return Poll::Ready(Ok(()));
    }
    loop {
        if buffer.len() >= most {
            // Nobody is woken for this read: the message ends by its response.
            return Poll::Pending;
        }
        if ready!(poll_fill(io, buffer, cx, MIN_READ))? == 0 {
            *had_eof = true;
            return Poll::Ready(Ok(()));
        }
    }
}

/// Reads up to `most` bytes into the buffer's end.
fn poll_fill(io: &mut Stream, buffer: &mut BytesMut, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
    buffer.reserve(most);
    // Into memory that nobody has to zero first. A read that is given up has read nothing.
    pin!(io.read_buf(&mut buffer.limit(most))).poll(cx)
}

/// At once for a chunked body, which must be looked at before it is passed on.
const CHUNK_READ: usize = 16 * 1024;
