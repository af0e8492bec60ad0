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

mod close;
mod connection;
mod error;
mod http2;
mod message;
mod pace;
mod upgraded;

use close::reset_on_close;
pub(super) use close::{close, close_lingering};
pub use connection::ConnectionInfo;
pub use error::GuardError;
pub(super) use pace::LazyTimer;
pub use pace::{Pace, PaceLimits};

use std::any::Any;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
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
use tokio::time::Instant;

use super::frames::FrameWatch;
use message::{Body, ResponseState};
use pace::Waiting;
use upgraded::Tunnel;

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
    Upgraded(Tunnel),
    /// HTTP/2.
    Frames(Box<FrameWatch>),
    /// HTTP/2, after our GOAWAY.
    Ending(GuardError),
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

    /// From now on the connection speaks HTTP/2.
    pub(super) fn begin_frames(&mut self, watch: FrameWatch) {
        self.mode = Mode::Frames(Box::new(watch));
    }

    pub(super) fn info(&self) -> &Arc<ConnectionInfo> {
        &self.info
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
                    Mode::Upgraded(_) => self.tunnel_used(Instant::now()),
                    Mode::Frames(_) => self.frames_sent(cx, std::iter::once(&data[..written.min(data.len())])),
                }
                self.writing.progressed(written);
                Poll::Ready(Ok(written))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => self.poll_write_pending(cx).map(Err),
        }
    }

    fn poll_write_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if matches!(self.mode, Mode::Message { .. }) {
            // While a response waits for the client, Pingora does not read, so a body is not waited for.
            self.reading.pause();
        }
        ready!(self.writing.poll_too_slow(cx));
        self.gave_up = true;
        reset_on_close(&self.io);
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

impl AsyncRead for Guard {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match this.mode {
            Mode::Message { .. } => this.poll_read_message(cx, out),
            Mode::Upgraded(_) => this.poll_read_upgraded(cx, out),
            Mode::Frames(_) => this.poll_read_frames(cx, out),
            Mode::Ending(error) => this.poll_end(error, cx),
        }
    }
}

impl AsyncWrite for Guard {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if matches!(this.mode, Mode::Upgraded(_)) {
            // Nobody may be reading while the upstream takes nothing.
            this.look_at_tunnel(Instant::now())?;
        }
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
        let (Mode::Frames(_), Poll::Ready(Ok(written))) = (&this.mode, &result) else {
            // HTTP/1 heads are never written in pieces.
            let first = slices
                .iter()
                .find(|slice| !slice.is_empty())
                .map_or(&[][..], |slice| slice);
            return this.poll_written(cx, result, first);
        };
        let mut left = *written;
        let pieces = slices.iter().map(|slice| {
            let step = left.min(slice.len());
            left -= step;
            &slice[..step]
        });
        this.frames_sent(cx, pieces);
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

/// A head rarely needs more; Pingora starts with the same.
const HEAD_BUFFER: usize = 4096;
/// Less room than this is not worth a system call.
const MIN_READ: usize = 1024;
