//! Watches an HTTP/2 connection's frames as they pass, for what the HTTP/2 library leaves unbounded.
//!
//! Only the nine bytes of each frame's header are looked at (RFC 9113 section 4.1), and a window update's four. That
//! is enough to know whether a frame or a header block is incomplete, which request bodies are open, whether the
//! client could send more of them, and how many resets and control frames came.

mod header;

use std::time::{Duration, Instant};

use self::header::*;
use super::guard::{GuardError, Pace, PaceLimits};

/// What one connection may do.
#[derive(Clone, Copy, Debug)]
pub struct FrameLimits {
    /// From a frame's first byte to its last; for a header block, to the last of its CONTINUATION frames.
    pub deadline: Duration,
    /// The pace of each request body, while no response to it has begun and its window is open.
    pub body: PaceLimits,
    /// RST_STREAM frames in a minute.
    pub resets_per_minute: u32,
    /// Frames that carry no request: PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty DATA; in a second.
    pub control_frames_per_second: u32,
    /// The receive window of a new stream, as we announce it.
    pub stream_window: u32,
}

/// The watch over one connection.
pub struct FrameWatch {
    limits: FrameLimits,
    preface_left: usize,
    received: FrameHeader,
    sent: FrameHeader,
    in_header_block: bool,
    incomplete_for: Duration,
    connection_window: i64,
    /// The highest stream that the client has opened.
    highest: u32,
    /// The streams that it opened last: a frame on one of them that has ended is another error than one on a stream
    /// that was passed over.
    opened: [u32; REMEMBERED],
    opened_next: usize,
    /// Streams whose request has not ended.
    uploads: Vec<Upload>,
    resets: Rate,
    control_frames: Rate,
}

/// A request whose body has not ended.
struct Upload {
    stream: u32,
    window: i64,
    pace: Pace,
    /// We have answered or reset it: no more is awaited, though some may still be on its way.
    is_settled: bool,
}

impl Upload {
    fn is_awaited(&self) -> bool {
        !self.is_settled && self.window > 0
    }
}

/// At most `limit` events in each `period`, counted in fixed periods.
struct Rate {
    limit: u32,
    period: Duration,
    count: u32,
    since: Instant,
}

impl FrameWatch {
    /// A watch that expects the client's preface first.
    pub fn new(limits: FrameLimits) -> Self {
        FrameWatch {
            limits,
            preface_left: PREFACE.len(),
            received: FrameHeader::default(),
            sent: FrameHeader::default(),
            in_header_block: false,
            incomplete_for: Duration::ZERO,
            connection_window: DEFAULT_WINDOW,
            highest: 0,
            opened: [0; REMEMBERED],
            opened_next: 0,
            uploads: Vec::new(),
            resets: Rate::new(limits.resets_per_minute, Duration::from_secs(60)),
            control_frames: Rate::new(limits.control_frames_per_second, Duration::from_secs(1)),
        }
    }

    /// The highest stream that the client has opened, for a GOAWAY.
    pub fn highest_stream(&self) -> u32 {
        self.highest
    }

    /// What we send stands at the end of a frame: another may follow.
    pub fn is_between_sent_frames(&self) -> bool {
        self.sent.is_between_frames()
    }

    /// The client sent `bytes`. A GOAWAY among them becomes a frame of a type that nobody knows, and so ignores: it
    /// speaks of streams that a server opened, of which there are none here, but the HTTP/2 library takes it for a
    /// reason to hang up, whatever the client has still to say.
    ///
    /// # Errors
    /// [`GuardError::FrameFlood`]; [`GuardError::FrameInvalid`] for what the HTTP/2 library would end the connection
    /// for, too, but with another error code than RFC 9113 asks for.
    pub fn received(&mut self, bytes: &mut [u8]) -> Result<(), GuardError> {
        let mut at = self.preface_left.min(bytes.len());
        self.preface_left -= at;
        while at < bytes.len() {
            let kind_at = self.received.kind_in().map(|ahead| at + ahead);
            let (used, piece) = self.received.advance(&bytes[at..]);
            at += used;
            if let Some(kind) = kind_at.filter(|kind_at| *kind_at < at)
                && bytes[kind] == GOAWAY
            {
                bytes[kind] = IGNORED;
            }
            match piece {
                Piece::Header(frame) => {
                    check_length(frame)?;
                    self.received_frame(frame)?;
                }
                Piece::Setting {
                    id: INITIAL_WINDOW_SIZE,
                    value,
                } if value > MAX_WINDOW => {
                    return Err(GuardError::FrameInvalid(FLOW_CONTROL_ERROR));
                }
                _ => {}
            }
            if !self.is_incomplete() {
                self.incomplete_for = Duration::ZERO;
            }
        }
        Ok(())
    }

    /// We sent `bytes`.
    pub fn sent(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (used, piece) = self.sent.advance(bytes);
            bytes = &bytes[used..];
            match piece {
                // The response has begun, or the stream is gone: from here on the upstream's timeouts hold.
                Piece::Header(Frame {
                    kind: HEADERS | RST_STREAM,
                    stream,
                    ..
                }) => {
                    if let Some(upload) = self.upload(stream) {
                        upload.is_settled = true;
                    }
                }
                Piece::WindowUpdate { stream: 0, increment } => self.connection_window += i64::from(increment),
                Piece::WindowUpdate { stream, increment } => {
                    if let Some(upload) = self.upload(stream) {
                        upload.window += i64::from(increment);
                    }
                }
                _ => {}
            }
        }
    }

    /// How much longer we wait if nothing comes; `None` while nothing is awaited from the client.
    pub fn patience(&self) -> Option<Duration> {
        let frame = self
            .is_incomplete()
            .then(|| self.limits.deadline.saturating_sub(self.incomplete_for));
        let body = self.awaited().map(|upload| upload.pace.left()).min();
        match (frame, body) {
            (Some(frame), Some(body)) => Some(frame.min(body)),
            (frame, body) => frame.or(body),
        }
    }

    /// Nothing came for another `waited`.
    ///
    /// # Errors
    /// [`GuardError::FrameTooSlow`].
    pub fn waited(&mut self, waited: Duration) -> Result<(), GuardError> {
        if self.is_incomplete() {
            self.incomplete_for += waited;
            if self.incomplete_for > self.limits.deadline {
                return Err(GuardError::FrameTooSlow);
            }
        }
        if self.connection_window > 0 {
            for upload in self.uploads.iter_mut().filter(|upload| upload.is_awaited()) {
                if !upload.pace.spend(waited) {
                    return Err(GuardError::FrameTooSlow);
                }
            }
        }
        Ok(())
    }

    /// The bodies of which the client could send more now.
    fn awaited(&self) -> impl Iterator<Item = &Upload> {
        let may_send = self.connection_window > 0;
        self.uploads
            .iter()
            .filter(move |upload| may_send && upload.is_awaited())
    }

    fn upload(&mut self, stream: u32) -> Option<&mut Upload> {
        self.uploads.iter_mut().find(|upload| upload.stream == stream)
    }

    fn is_incomplete(&self) -> bool {
        self.preface_left > 0 || self.in_header_block || !self.received.is_between_frames()
    }

    fn received_frame(&mut self, frame: Frame) -> Result<(), GuardError> {
        let ends_stream = frame.flags & END_STREAM != 0;
        let has_ended = frame.stream > 0
            && !self.in_header_block
            && self.opened.contains(&frame.stream)
            && self.upload(frame.stream).is_none();
        match frame.kind {
            DATA | HEADERS if has_ended => return Err(GuardError::FrameInvalid(STREAM_CLOSED)),
            DATA => {
                self.connection_window -= frame.length as i64;
                if frame.length == 0 && !ends_stream {
                    self.control_frames.count()?;
                }
                if ends_stream {
                    self.forget(frame.stream);
                } else if let Some(upload) = self.upload(frame.stream) {
                    upload.window -= frame.length as i64;
                    upload.pace.earn(frame.length);
                }
            }
            HEADERS => {
                self.in_header_block = frame.flags & END_HEADERS == 0;
                if self.upload(frame.stream).is_some() {
                    // Trailers.
                    if ends_stream {
                        self.forget(frame.stream);
                    }
                } else {
                    self.highest = self.highest.max(frame.stream);
                    self.opened[self.opened_next % REMEMBERED] = frame.stream;
                    self.opened_next += 1;
                    if !ends_stream {
                        self.open(frame.stream)?;
                    }
                }
            }
            // RFC 9113 section 8.4: a client cannot push. Without its end the HTTP/2 library would wait for the rest.
            PUSH_PROMISE => return Err(GuardError::FrameInvalid(PROTOCOL_ERROR)),
            GOAWAY if frame.stream != 0 => return Err(GuardError::FrameInvalid(PROTOCOL_ERROR)),
            CONTINUATION => self.in_header_block = frame.flags & END_HEADERS == 0,
            RST_STREAM => {
                self.forget(frame.stream);
                self.resets.count()?;
            }
            _ => self.control_frames.count()?,
        }
        Ok(())
    }

    fn open(&mut self, stream: u32) -> Result<(), GuardError> {
        if self.uploads.len() >= MAX_UPLOADS {
            // Streams that we ended and the client never did go first.
            let settled = self.uploads.iter().position(|upload| upload.is_settled);
            self.uploads.remove(settled.ok_or(GuardError::FrameFlood)?);
        }
        self.uploads.push(Upload {
            stream,
            window: i64::from(self.limits.stream_window),
            pace: Pace::new(self.limits.body),
            is_settled: false,
        });
        Ok(())
    }

    fn forget(&mut self, stream: u32) {
        self.uploads.retain(|upload| upload.stream != stream);
    }
}

impl Rate {
    fn new(limit: u32, period: Duration) -> Self {
        Rate {
            limit,
            period,
            count: 0,
            since: Instant::now(),
        }
    }

    /// Reads the clock only when the limit is reached, which honest connections rarely do.
    fn count(&mut self) -> Result<(), GuardError> {
        self.count += 1;
        if self.count > self.limit {
            let now = Instant::now();
            if now.duration_since(self.since) < self.period {
                return Err(GuardError::FrameFlood);
            }
            self.since = now;
            self.count = 1;
        }
        Ok(())
    }
}

/// What every HTTP/2 client sends first.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// RFC 9113's initial connection window.
const DEFAULT_WINDOW: i64 = 65_535;
/// Streams whose end is remembered.
const REMEMBERED: usize = 32;
/// More open bodies than any stream limit that makes sense here.
const MAX_UPLOADS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: FrameLimits = FrameLimits {
        deadline: Duration::from_secs(10),
        body: PaceLimits {
            grace: Duration::from_secs(20),
            bytes_per_second: 500,
        },
        resets_per_minute: 5,
        control_frames_per_second: 10,
        stream_window: 100,
    };

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn watch() -> FrameWatch {
        let mut watch = FrameWatch::new(LIMITS);
        watch.received(&mut PREFACE.clone()).unwrap();
        watch
    }

    #[test]
    fn a_partial_frame_has_a_deadline_and_a_whole_one_has_none() {
        let mut ping = frame(6, 0, 0, &[0; 8]);
        for cut in 1..ping.len() {
            let mut watch = watch();
            watch.received(&mut ping[..cut]).unwrap();
            assert!(watch.patience().is_some());
            watch.waited(Duration::from_secs(10)).unwrap();
            assert_eq!(watch.waited(Duration::from_secs(1)), Err(GuardError::FrameTooSlow));
            watch.received(&mut ping[cut..]).unwrap();
            assert!(watch.patience().is_none());
        }
    }

    #[test]
    fn a_header_block_has_one_deadline() {
        let mut watch = watch();
        watch.received(&mut frame(HEADERS, END_STREAM, 1, b"x")).unwrap();
        watch.waited(Duration::from_secs(6)).unwrap();
        watch.received(&mut frame(CONTINUATION, 0, 1, b"x")).unwrap();
        assert_eq!(watch.waited(Duration::from_secs(6)), Err(GuardError::FrameTooSlow));
        watch.received(&mut frame(CONTINUATION, END_HEADERS, 1, b"x")).unwrap();
        assert!(watch.patience().is_none());
    }

    #[test]
    fn a_stalled_body_counts_only_while_its_window_is_open() {
        let mut watch = watch();
        watch.received(&mut frame(HEADERS, END_HEADERS, 1, b"x")).unwrap();
        watch.received(&mut frame(DATA, 0, 1, &[0; 100])).unwrap();
        for _ in 0..100 {
            watch.waited(Duration::from_secs(1)).unwrap();
        }
        watch.sent(&frame(WINDOW_UPDATE, 0, 1, &10u32.to_be_bytes()));
        watch.waited(Duration::from_secs(20)).unwrap();
        assert_eq!(watch.waited(Duration::from_secs(1)), Err(GuardError::FrameTooSlow));
        watch.sent(&frame(HEADERS, END_HEADERS, 1, b"x"));
        assert!(watch.patience().is_none(), "a response has begun");
    }

    #[test]
    fn errors_have_their_own_codes() {
        let invalid = |mut bytes: Vec<u8>| watch().received(&mut bytes);
        for (kind, length) in [
            (PING, 7),
            (RST_STREAM, 3),
            (PRIORITY, 4),
            (WINDOW_UPDATE, 5),
            (SETTINGS, 7),
        ] {
            let frame = frame(kind, 0, 1, &vec![0; length]);
            assert_eq!(
                invalid(frame),
                Err(GuardError::FrameInvalid(FRAME_SIZE_ERROR)),
                "{kind}"
            );
        }
        let promise = frame(PUSH_PROMISE, 0, 1, &[0, 0, 0, 2]);
        assert_eq!(invalid(promise), Err(GuardError::FrameInvalid(PROTOCOL_ERROR)));
        let window = frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 1, 0, 4, 0x80, 0, 0, 0]);
        assert_eq!(invalid(window), Err(GuardError::FrameInvalid(FLOW_CONTROL_ERROR)));
        let mut watch = watch();
        watch
            .received(&mut frame(HEADERS, END_HEADERS | END_STREAM, 1, b"x"))
            .unwrap();
        assert_eq!(
            watch.received(&mut frame(DATA, 0, 1, b"x")),
            Err(GuardError::FrameInvalid(STREAM_CLOSED))
        );
    }

    #[test]
    fn what_was_on_its_way_when_we_reset_a_stream_is_no_error() {
        let mut watch = watch();
        watch.received(&mut frame(HEADERS, END_HEADERS, 1, b"x")).unwrap();
        watch.sent(&frame(RST_STREAM, 0, 1, &[0; 4]));
        watch.received(&mut frame(DATA, 0, 1, b"x")).unwrap();
        watch.received(&mut frame(DATA, END_STREAM, 1, b"x")).unwrap();
        assert!(watch.patience().is_none());
    }

    #[test]
    fn a_goaway_becomes_a_frame_that_is_ignored() {
        let sent = [frame(GOAWAY, 0, 0, &[0; 8]), frame(PING, 0, 0, &[GOAWAY; 8])].concat();
        let mut expected = sent.clone();
        expected[KIND_AT] = IGNORED;
        for size in 1..sent.len() {
            let mut watch = watch();
            let mut bytes = sent.clone();
            for part in bytes.chunks_mut(size) {
                watch.received(part).unwrap();
            }
            assert_eq!(bytes, expected, "in pieces of {size}");
        }
        for (stream, length, error) in [(1, 8, PROTOCOL_ERROR), (0, 7, FRAME_SIZE_ERROR)] {
            let mut wrong = frame(GOAWAY, 0, stream, &vec![0; length]);
            assert_eq!(
                watch().received(&mut wrong),
                Err(GuardError::FrameInvalid(error)),
                "stream {stream}, {length} bytes"
            );
        }
    }

    #[test]
    fn floods_are_seen() {
        let mut watch = watch();
        let mut reset = frame(RST_STREAM, 0, 1, &[0; 4]);
        assert_eq!(
            (0..6)
                .map(|_| watch.received(&mut reset))
                .filter(Result::is_err)
                .count(),
            1
        );
        let mut watch = self::watch();
        let mut ping = frame(6, 0, 0, &[0; 8]);
        assert_eq!(
            (0..11)
                .map(|_| watch.received(&mut ping))
                .filter(Result::is_err)
                .count(),
            1
        );
    }
}
