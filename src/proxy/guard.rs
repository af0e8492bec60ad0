//! The stream that stands between a client's connection and Pingora's parser.
//!
//! [`Guard`] hands Pingora exactly one checked message at a time: the edge gives it a head that
//! [`super::strict`] let pass, and the guard lets through as many body bytes as that head declared, watching
//! chunks as they pass. Whatever comes behind the message waits in the guard's buffer until the edge has checked it
//! as a head of its own. So Pingora never sees a byte whose place in the stream is in doubt.
//!
//! It is also where slowness is measured ([`Pace`]), in both directions, because only the stream knows whether one
//! waits for the client or for the upstream. After a `101` the guard is transparent; for HTTP/2 it watches frames
//! ([`super::frames`]).

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::tls::{SslDigest, TlsRef};
use pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest,
    UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::frames::FrameWatch;
use super::strict::{Ambiguity, BodyFraming, ChunkCheck, HeadFraming};

/// What the guard of a connection must know.
#[derive(Clone, Copy, Debug)]
pub struct GuardSettings {
    /// The pace that the client must keep while it sends a body.
    pub body: PaceLimits,
    /// The pace at which the client must take a response.
    pub response: PaceLimits,
    /// How long an upgraded connection may be silent in both directions.
    pub upgraded_idle: Duration,
    /// How many bytes that follow a message are read ahead while it is being answered.
    pub read_ahead_bytes: usize,
}

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

/// Why the guard ended a transfer. Found behind the `io::Error`s that Pingora passes on: see
/// [`super::edge::guard_refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuardError {
    /// The body's framing is malformed.
    Body(Ambiguity),
    /// The client sends its body too slowly.
    BodyTooSlow,
    /// The client takes the response too slowly.
    ResponseTooSlow,
    /// An upgraded connection was silent for too long, or is no longer allowed.
    UpgradedEnded,
    /// HTTP/2: a frame, a header block or a request body came too slowly.
    FrameTooSlow,
    /// HTTP/2: too many resets or control frames.
    FrameFlood,
    /// HTTP/2: a frame that is a connection error of this code (RFC 9113 section 7).
    FrameInvalid(u32),
}

impl GuardError {
    /// The code of the GOAWAY that ends an HTTP/2 connection for this.
    fn goaway_code(self) -> u32 {
        const ENHANCE_YOUR_CALM: u32 = 11;
        match self {
            GuardError::FrameInvalid(code) => code,
            _ => ENHANCE_YOUR_CALM,
        }
    }
}

impl fmt::Display for GuardError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuardError::Body(ambiguity) => ambiguity.fmt(f),
            GuardError::BodyTooSlow => f.write_str("the request body came too slowly"),
            GuardError::ResponseTooSlow => f.write_str("the response was taken too slowly"),
            GuardError::UpgradedEnded => f.write_str("the upgraded connection was ended"),
            GuardError::FrameTooSlow => f.write_str("an HTTP/2 frame or body came too slowly"),
            GuardError::FrameFlood => f.write_str("too many HTTP/2 resets or control frames"),
            GuardError::FrameInvalid(code) => write!(f, "an HTTP/2 connection error of code {code}"),
        }
    }
}

impl std::error::Error for GuardError {}

impl From<GuardError> for io::Error {
    fn from(error: GuardError) -> Self {
        let kind = match error {
            GuardError::Body(_) => io::ErrorKind::InvalidData,
            GuardError::UpgradedEnded | GuardError::FrameFlood | GuardError::FrameInvalid(_) => {
                io::ErrorKind::ConnectionAborted
            }
            _ => io::ErrorKind::TimedOut,
        };
        io::Error::new(kind, error)
    }
}

/// What a `ProxyHttp` can ask about the connection that a request came on, by
/// `ConnectionInfo::of(session.digest())`.
pub struct ConnectionInfo {
    /// Who connected: the peer, or whom the PROXY protocol named.
    pub client: Option<std::net::SocketAddr>,
    /// The connection is encrypted.
    pub is_tls: bool,
    keep_while: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
}

impl ConnectionInfo {
    pub(super) fn new(client: Option<std::net::SocketAddr>, is_tls: bool) -> Self {
        ConnectionInfo {
            client,
            is_tls,
            keep_while: OnceLock::new(),
        }
    }

    /// The info that the edge attached to a session.
    pub fn of(digest: Option<&pingora::protocols::Digest>) -> Option<&ConnectionInfo> {
        digest?
            .proxy_digest
            .as_ref()?
            .user_data
            .as_ref()?
            .downcast_ref::<Arc<ConnectionInfo>>()
            .map(|info| &**info)
    }

    /// Once the connection is upgraded, asks `is_allowed` every half second, and closes the connection when it says
    /// no: a revoked key's WebSocket does not outlive it. Only the first call on a connection counts, which is
    /// enough, since nothing follows an upgrade.
    pub fn keep_while(&self, is_allowed: impl Fn() -> bool + Send + Sync + 'static) {
        let _ = self.keep_while.set(Box::new(is_allowed));
    }
}

impl fmt::Debug for ConnectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionInfo")
            .field("client", &self.client)
            .field("is_tls", &self.is_tls)
            .finish()
    }
}

/// The stream itself. It lives as long as the connection, and Pingora's session borrows it for one message.
pub struct Guard {
    io: Stream,
    /// Read, and not yet handed on.
    buffer: BytesMut,
    mode: Mode,
    settings: GuardSettings,
    info: Arc<ConnectionInfo>,
    digest: Arc<ProxyDigest>,
    socket: Option<Arc<SocketDigest>>,
    reading: Waiting,
    writing: Waiting,
    /// The client was too slow: nothing more is waited for.
    gave_up: bool,
    /// Bytes that were thrown away after our GOAWAY.
    drained: usize,
}

enum Mode {
    /// HTTP/1: what the current message still owes.
    Message {
        body: Body,
        upgrade: bool,
        response: ResponseState,
        had_eof: bool,
    },
    /// After a `101`.
    Upgraded,
    /// HTTP/2.
    Frames(Box<FrameWatch>),
    /// HTTP/2, after our GOAWAY.
    Ending(GuardError),
}

enum Body {
    /// So many bytes are still to come.
    Length(u64),
    /// Boxed: few requests are chunked, and the guard moves once per request.
    Chunked(Box<ChunkCheck>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ResponseState {
    /// Nothing but informational responses so far.
    Start,
    Started,
}

/// Waiting in one direction: a pace, and a timer that ticks only while somebody polls.
struct Waiting {
    pace: Pace,
    /// Lives on after its first use, and is reset rather than made anew.
    timer: Option<Pin<Box<Sleep>>>,
    ticking_since: Option<Instant>,
}

impl Waiting {
    fn new(limits: PaceLimits) -> Self {
        Waiting {
            pace: Pace::new(limits),
            timer: None,
            ticking_since: None,
        }
    }

    fn restart(&mut self) {
        self.pace = Pace::new(self.pace.limits);
        self.ticking_since = None;
    }

    fn progressed(&mut self, bytes: usize) {
        if let Some(since) = self.ticking_since.take() {
            // A tick that was never polled to its end was not spent waiting for the client: Pingora had stopped
            // reading because the upstream was full.
            let waited = since.elapsed().min(tick(self.pace.limits));
            self.pace.spend(waited);
            self.pace.earn(bytes);
        }
    }

    /// Called when nothing could be transferred. Ready once the pace is broken.
    fn poll_too_slow(&mut self, cx: &mut Context<'_>) -> Poll<()> {
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
    fn poll_tick(&mut self, cx: &mut Context<'_>, tick: Duration) -> Poll<Duration> {
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
fn tick(limits: PaceLimits) -> Duration {
    (limits.grace / 20).clamp(Duration::from_millis(5), Duration::from_millis(500))
}

impl Guard {
    pub(super) fn new(
        io: Stream,
        settings: GuardSettings,
        info: Arc<ConnectionInfo>,
        socket: Option<Arc<SocketDigest>>,
    ) -> Self {
        // Pingora's digests have one field that takes data of one's own; the response beside it is never read.
        let response = pingora::http::ResponseHeader::build_no_case(200, Some(0))
            .expect("200 is a status code, and no headers are a valid number of headers");
        let user_data: Box<dyn Any + Send + Sync> = Box::new(info.clone());
        Guard {
            io,
            buffer: BytesMut::new(),
            mode: Mode::idle(),
            settings,
            info,
            digest: Arc::new(ProxyDigest::new(Box::new(response), Some(user_data))),
            socket,
            reading: Waiting::new(settings.body),
            writing: Waiting::new(settings.response),
            gave_up: false,
            drained: 0,
        }
    }

    /// What was read and not handed on: the next head, as far as it has come.
    pub(super) fn buffer(&self) -> &BytesMut {
        &self.buffer
    }

    /// Forgets the first `bytes` of the buffer.
    pub(super) fn skip(&mut self, bytes: usize) {
        self.buffer.advance(bytes);
    }

    /// Reads some more into the buffer. 0 is the client's end.
    pub(super) async fn fill(&mut self) -> io::Result<usize> {
        if self.buffer.capacity() - self.buffer.len() < MIN_READ {
            self.buffer.reserve(HEAD_BUFFER);
        }
        self.io.read_buf(&mut self.buffer).await
    }

    /// The stream below, for a refusal.
    pub(super) fn io_mut(&mut self) -> &mut Stream {
        &mut self.io
    }

    /// Starts the message whose head lies whole at the front of the buffer, and returns what Pingora may parse at
    /// once: the head, and as much of its body as has come.
    pub(super) fn begin(&mut self, framing: &HeadFraming) -> Result<BytesMut, Ambiguity> {
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
        Ok(self.buffer.split_to(framing.head_bytes + taken))
    }

    /// From now on the connection speaks HTTP/2.
    pub(super) fn begin_frames(&mut self, watch: FrameWatch) {
        self.mode = Mode::Frames(Box::new(watch));
    }

    /// The last message was read to its end, and the client is still there: a next one may follow.
    pub(super) fn is_reusable(&self) -> bool {
        matches!(
            self.mode,
            Mode::Message {
                body: Body::Length(0),
                had_eof: false,
                ..
            }
        )
    }

    pub(super) fn info(&self) -> &Arc<ConnectionInfo> {
        &self.info
    }

    fn poll_read_message(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
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

    fn poll_read_upgraded(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
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

    fn poll_read_frames(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
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
    fn poll_end(&mut self, error: GuardError, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
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

    fn became_upgraded(&mut self) {
        self.mode = Mode::Upgraded;
        let limits = PaceLimits {
            grace: self.settings.upgraded_idle,
            bytes_per_second: 1,
        };
        self.reading.pace = Pace::new(limits);
        self.reading.ticking_since = None;
    }

    fn poll_written(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match result {
            Poll::Ready(Ok(written)) => {
                match &mut self.mode {
                    Mode::Message { upgrade, response, .. } if *response == ResponseState::Start => {
                        // Pingora writes each head in one piece. An informational one leaves us at the start.
                        if *upgrade && data.starts_with(b"HTTP/1.1 101") {
                            self.became_upgraded();
                        } else if !data.starts_with(b"HTTP/1.1 1") {
                            *response = ResponseState::Started;
                        }
                    }
                    Mode::Message { .. } | Mode::Ending(_) => {}
                    // The tunnel is alive; its silence starts anew.
                    Mode::Upgraded => self.reading.pace = Pace::new(self.reading.pace.limits),
                    Mode::Frames(watch) => watch.sent(&data[..written.min(data.len())]),
                }
                self.writing.progressed(written);
                Poll::Ready(Ok(written))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => self.poll_write_pending(cx).map(Err),
        }
    }

    fn poll_write_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        ready!(self.writing.poll_too_slow(cx));
        self.gave_up = true;
        Poll::Ready(GuardError::ResponseTooSlow.into())
    }
}

impl Mode {
    fn idle() -> Self {
        Mode::Message {
            body: Body::Length(0),
            upgrade: false,
            response: ResponseState::Start,
            had_eof: false,
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
    let before = buffer.len();
    buffer.resize(before + most, 0);
    let mut space = ReadBuf::new(&mut buffer[before..]);
    let result = Pin::new(io).poll_read(cx, &mut space);
    let read = space.filled().len();
    buffer.truncate(before + read);
    result.map_ok(|()| read)
}

/// A head rarely needs more; Pingora starts with the same.
const HEAD_BUFFER: usize = 4096;
/// Less room than this is not worth a system call.
const MIN_READ: usize = 1024;
/// At once for a chunked body, which must be looked at before it is passed on.
const CHUNK_READ: usize = 16 * 1024;
/// How often an upgraded connection is asked for: "closed within a second" with room to spare.
const UPGRADED_TICK: Duration = Duration::from_millis(400);
/// After a response that came before the request's end: how long and how much is still read, so that the client gets
/// to see the response instead of a reset.
pub(super) const LINGER: Duration = Duration::from_secs(1);
pub(super) const LINGER_BYTES: usize = 1024 * 1024;

/// Says that no more will be written. That takes a flush, for which a client that does not read is not waited for.
pub(super) async fn close(io: &mut Stream) {
    let _ = tokio::time::timeout(LINGER, io.shutdown()).await;
}

/// Says that no more will be written, then reads on for a while and throws it away.
pub(super) async fn close_lingering(io: &mut Stream) {
    close(io).await;
    let drain = async {
        let mut scratch = [0u8; 4096];
        let mut total = 0;
        while total < LINGER_BYTES {
            match io.read(&mut scratch).await {
                Ok(0) | Err(_) => return,
                Ok(read) => total += read,
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

impl AsyncRead for Guard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match this.mode {
            Mode::Message { .. } => this.poll_read_message(cx, out),
            Mode::Upgraded => this.poll_read_upgraded(cx, out),
            Mode::Frames(_) => this.poll_read_frames(cx, out),
            Mode::Ending(error) => this.poll_end(error, cx),
        }
    }
}

impl AsyncWrite for Guard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_write(cx, data);
        this.poll_written(cx, result, data)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_write_vectored(cx, slices);
        let (Mode::Frames(watch), Poll::Ready(Ok(written))) = (&mut this.mode, &result) else {
            // HTTP/1 heads are never written in pieces.
            let first = slices
                .iter()
                .find(|slice| !slice.is_empty())
                .map_or(&[][..], |slice| slice);
            return this.poll_written(cx, result, first);
        };
        let mut left = *written;
        for slice in slices {
            let step = left.min(slice.len());
            watch.sent(&slice[..step]);
            left -= step;
        }
        this.writing.progressed(*written);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match Pin::new(&mut this.io).poll_flush(cx) {
            Poll::Ready(result) => {
                this.writing.progressed(0);
                Poll::Ready(result)
            }
            Poll::Pending => this.poll_write_pending(cx).map(Err),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[async_trait]
impl Shutdown for Guard {
    async fn shutdown(&mut self) {
        if self.gave_up || (self.is_reusable() && self.buffer.is_empty()) {
            close(&mut self.io).await;
        } else {
            // The client is still sending; a reset now could overtake the response.
            close_lingering(&mut self.io).await;
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the buffer: it may hold a credential.
        f.debug_struct("Guard")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

impl UniqueID for Guard {
    fn id(&self) -> UniqueIDType {
        self.io.id()
    }
}

impl Ssl for Guard {
    fn get_ssl(&self) -> Option<&TlsRef> {
        self.io.get_ssl()
    }

    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.io.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.io.selected_alpn_proto()
    }
}

impl GetTimingDigest for Guard {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        // Asked for once per request, and used by nobody here: an empty list costs no allocation.
        Vec::new()
    }
}

impl GetProxyDigest for Guard {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        Some(self.digest.clone())
    }
}

impl GetSocketDigest for Guard {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.socket.clone()
    }
}

impl Peek for Guard {}

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
