//! Watches an HTTP/2 connection's frames as they pass, for what the HTTP/2 library leaves unbounded.
//!
//! Only the nine bytes of each frame's header are looked at (RFC 9113 section 4.1), and a window update's four. That
//! is enough to know whether a frame or a header block is incomplete, which request bodies are open, whether the
//! client could send more of them, and how many resets and control frames came.

use std::time::{Duration, Instant};

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
    uploads: Vec<Upload>,
    resets: Rate,
    control_frames: Rate,
}

/// A request whose body has not ended, and to which no response has begun.
struct Upload {
    stream: u32,
    window: i64,
    pace: Pace,
}

/// A frame's header, in whatever pieces it comes, and what is left of its payload.
#[derive(Default)]
struct FrameHeader {
    bytes: [u8; FRAME_HEADER],
    filled: usize,
    payload_left: usize,
    /// The first bytes of a WINDOW_UPDATE's payload.
    payload: [u8; 4],
    payload_filled: usize,
}

/// At most `limit` events in each `period`, counted in fixed periods.
struct Rate {
    limit: u32,
    period: Duration,
    count: u32,
    since: Instant,
}

#[derive(Clone, Copy)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    length: usize,
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
            uploads: Vec::new(),
            resets: Rate::new(limits.resets_per_minute, Duration::from_secs(60)),
            control_frames: Rate::new(limits.control_frames_per_second, Duration::from_secs(1)),
        }
    }

    /// The client sent `bytes`.
    ///
    /// # Errors
    /// [`GuardError::FrameFlood`].
    pub fn received(&mut self, mut bytes: &[u8]) -> Result<(), GuardError> {
        let preface = self.preface_left.min(bytes.len());
        self.preface_left -= preface;
        bytes = &bytes[preface..];
        while !bytes.is_empty() {
            let (used, frame, _) = self.received.advance(bytes);
            bytes = &bytes[used..];
            if let Some(frame) = frame {
                self.received_frame(frame)?;
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
            let (used, frame, update) = self.sent.advance(bytes);
            bytes = &bytes[used..];
            // The response has begun, or the stream is gone: from here on the upstream's timeouts hold.
            if let Some(Frame {
                kind: HEADERS | RST_STREAM,
                stream,
                ..
            }) = frame
            {
                self.forget(stream);
            }
            match update {
                Some((0, increment)) => self.connection_window += i64::from(increment),
                Some((stream, increment)) => {
                    if let Some(upload) = self.uploads.iter_mut().find(|upload| upload.stream == stream) {
                        upload.window += i64::from(increment);
                    }
                }
                None => {}
            }
        }
    }

    /// Something is awaited from the client, so that time matters.
    pub fn is_waiting(&self) -> bool {
        self.is_incomplete() || !self.uploads.is_empty()
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
            for upload in &mut self.uploads {
                if upload.window > 0 && !upload.pace.spend(waited) {
                    return Err(GuardError::FrameTooSlow);
                }
            }
        }
        Ok(())
    }

    fn is_incomplete(&self) -> bool {
        self.preface_left > 0 || self.in_header_block || self.received.filled > 0
    }

    fn received_frame(&mut self, frame: Frame) -> Result<(), GuardError> {
        let ends_stream = frame.flags & END_STREAM != 0;
        match frame.kind {
            DATA => {
                self.connection_window -= frame.length as i64;
                if frame.length == 0 && !ends_stream {
                    self.control_frames.count()?;
                }
                if ends_stream {
                    self.forget(frame.stream);
                } else if let Some(upload) = self.uploads.iter_mut().find(|upload| upload.stream == frame.stream) {
                    upload.window -= frame.length as i64;
                    upload.pace.earn(frame.length);
                }
            }
            HEADERS => {
                self.in_header_block = frame.flags & END_HEADERS == 0;
                if ends_stream {
                    self.forget(frame.stream);
                } else if self.uploads.iter().all(|upload| upload.stream != frame.stream) {
                    // The library refuses streams beyond its limit; a few more than it allows may be seen here first.
                    if self.uploads.len() >= MAX_UPLOADS {
                        return Err(GuardError::FrameFlood);
                    }
                    self.uploads.push(Upload {
                        stream: frame.stream,
                        window: i64::from(self.limits.stream_window),
                        pace: Pace::new(self.limits.body),
                    });
                }
            }
            CONTINUATION => self.in_header_block = frame.flags & END_HEADERS == 0,
            RST_STREAM => {
                self.forget(frame.stream);
                self.resets.count()?;
            }
            _ => self.control_frames.count()?,
        }
        Ok(())
    }

    fn forget(&mut self, stream: u32) {
        self.uploads.retain(|upload| upload.stream != stream);
    }
}

impl FrameHeader {
    /// Takes some of `bytes`; returns how many, the frame whose header that completed, and the window update (stream
    /// and increment) whose payload it completed.
    fn advance(&mut self, bytes: &[u8]) -> (usize, Option<Frame>, Option<(u32, u32)>) {
        if self.filled < FRAME_HEADER {
            let step = (FRAME_HEADER - self.filled).min(bytes.len());
            self.bytes[self.filled..self.filled + step].copy_from_slice(&bytes[..step]);
            self.filled += step;
            if self.filled < FRAME_HEADER {
                return (step, None, None);
            }
            let frame = self.frame();
            self.payload_left = frame.length;
            self.payload_filled = 0;
            if frame.length == 0 {
                self.filled = 0;
            }
            return (step, Some(frame), None);
        }
        let step = self.payload_left.min(bytes.len());
        self.payload_left -= step;
        let mut update = None;
        if self.bytes[3] == WINDOW_UPDATE {
            let keep = step.min(self.payload.len() - self.payload_filled);
            self.payload[self.payload_filled..self.payload_filled + keep].copy_from_slice(&bytes[..keep]);
            self.payload_filled += keep;
            if self.payload_left == 0 {
                update = Some((self.frame().stream, u32::from_be_bytes(self.payload) & 0x7fff_ffff));
            }
        }
        if self.payload_left == 0 {
            self.filled = 0;
        }
        (step, None, update)
    }

    fn frame(&self) -> Frame {
        let b = &self.bytes;
        Frame {
            length: usize::from(b[0]) << 16 | usize::from(b[1]) << 8 | usize::from(b[2]),
            kind: b[3],
            flags: b[4],
            stream: u32::from_be_bytes([b[5], b[6], b[7], b[8]]) & 0x7fff_ffff,
        }
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

const FRAME_HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// RFC 9113's initial connection window.
const DEFAULT_WINDOW: i64 = 65_535;
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
        watch.received(PREFACE).unwrap();
        watch
    }

    #[test]
    fn a_partial_frame_has_a_deadline_and_a_whole_one_has_none() {
        let ping = frame(6, 0, 0, &[0; 8]);
        for cut in 1..ping.len() {
            let mut watch = watch();
            watch.received(&ping[..cut]).unwrap();
            assert!(watch.is_waiting());
            watch.waited(Duration::from_secs(10)).unwrap();
            assert_eq!(watch.waited(Duration::from_secs(1)), Err(GuardError::FrameTooSlow));
            watch.received(&ping[cut..]).unwrap();
            assert!(!watch.is_waiting());
        }
    }

    #[test]
    fn a_header_block_has_one_deadline() {
        let mut watch = watch();
        watch.received(&frame(HEADERS, END_STREAM, 1, b"x")).unwrap();
        watch.waited(Duration::from_secs(6)).unwrap();
        watch.received(&frame(CONTINUATION, 0, 1, b"x")).unwrap();
        assert_eq!(watch.waited(Duration::from_secs(6)), Err(GuardError::FrameTooSlow));
        watch.received(&frame(CONTINUATION, END_HEADERS, 1, b"x")).unwrap();
        assert!(!watch.is_waiting());
    }

    #[test]
    fn a_stalled_body_counts_only_while_its_window_is_open() {
        let mut watch = watch();
        watch.received(&frame(HEADERS, END_HEADERS, 1, b"x")).unwrap();
        watch.received(&frame(DATA, 0, 1, &[0; 100])).unwrap();
        for _ in 0..100 {
            watch.waited(Duration::from_secs(1)).unwrap();
        }
        watch.sent(&frame(WINDOW_UPDATE, 0, 1, &10u32.to_be_bytes()));
        watch.waited(Duration::from_secs(20)).unwrap();
        assert_eq!(watch.waited(Duration::from_secs(1)), Err(GuardError::FrameTooSlow));
        watch.sent(&frame(HEADERS, END_HEADERS, 1, b"x"));
        assert!(!watch.is_waiting(), "a response has begun");
    }

    #[test]
    fn floods_are_seen() {
        let mut watch = watch();
        let reset = frame(RST_STREAM, 0, 1, &[0; 4]);
        assert_eq!((0..6).map(|_| watch.received(&reset)).filter(Result::is_err).count(), 1);
        let mut watch = self::watch();
        let ping = frame(6, 0, 0, &[0; 8]);
        assert_eq!((0..11).map(|_| watch.received(&ping)).filter(Result::is_err).count(), 1);
    }
}
