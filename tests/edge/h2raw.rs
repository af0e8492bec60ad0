//! HTTP/2 by hand: frames and header blocks as the test wants them, valid or not.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::harness::PATIENCE;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A header block of literals without indexing (RFC 7541 section 6.2.2), names and values unchecked.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let string = |text: &str, bytes: &mut Vec<u8>| {
        if text.len() < 127 {
            bytes.push(text.len() as u8);
        } else {
            bytes.push(127);
            let mut rest = text.len() - 127;
            while rest >= 128 {
                bytes.push((rest % 128) as u8 | 0x80);
                rest /= 128;
            }
            bytes.push(rest as u8);
        }
        bytes.extend(text.bytes());
    };
    for (name, value) in fields {
        bytes.push(0);
        string(name, &mut bytes);
        string(value, &mut bytes);
    }
    bytes
}

pub const GET: &[(&str, &str)] = &[
    (":method", "GET"),
    (":scheme", "http"),
    (":path", "/a"),
    (":authority", "a"),
];

/// How a stream, or the connection, ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Response { status: u16, body: Vec<u8> },
    Reset(u32),
    Goaway(u32),
    Closed,
}

pub struct H2<S> {
    pub stream: S,
    buffer: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> H2<S> {
    /// Sends the preface and empty settings.
    pub async fn start(stream: S) -> Self {
        let mut h2 = H2 {
            stream,
            buffer: Vec::new(),
        };
        h2.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        h2.send(&frame(SETTINGS, 0, 0, &[])).await;
        h2
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    /// A whole request on `stream`; `body` in one DATA frame.
    pub async fn request(&mut self, stream: u32, fields: &[(&str, &str)], body: Option<&[u8]>) {
        let flags = END_HEADERS | if body.is_none() { END_STREAM } else { 0 };
        let mut bytes = frame(HEADERS, flags, stream, &block(fields));
        if let Some(body) = body {
            bytes.extend(frame(DATA, END_STREAM, stream, body));
        }
        self.send(&bytes).await;
    }

    pub async fn next_frame(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let read = async {
            loop {
                if self.buffer.len() >= 9 {
                    let length = u32::from_be_bytes([0, self.buffer[0], self.buffer[1], self.buffer[2]]) as usize;
                    if self.buffer.len() >= 9 + length {
                        let frame: Vec<u8> = self.buffer.drain(..9 + length).collect();
                        let stream = u32::from_be_bytes([frame[5], frame[6], frame[7], frame[8]]);
                        return Some((frame[3], frame[4], stream, frame[9..].to_vec()));
                    }
                }
                if self.stream.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                    return None;
                }
            }
        };
        tokio::time::timeout(PATIENCE, read)
            .await
            .expect("a frame, or the end, in time")
    }

    /// Reads until `stream` has ended, acknowledging what must be.
    pub async fn outcome(&mut self, stream: u32) -> Outcome {
        let mut status = 0;
        let mut body = Vec::new();
        loop {
            let Some((kind, flags, id, payload)) = self.next_frame().await else {
                return Outcome::Closed;
            };
            match kind {
                SETTINGS if flags & 1 == 0 => self.send(&frame(SETTINGS, 1, 0, &[])).await,
                PING if flags & 1 == 0 => self.send(&frame(PING, 1, 0, &payload)).await,
                GOAWAY => {
                    let code = u32::from_be_bytes([payload[4], payload[5], payload[6], payload[7]]);
                    // A graceful one says nothing about this stream.
                    if code != 0 {
                        return Outcome::Goaway(code);
                    }
                }
                RST_STREAM if id == stream => {
                    let code = u32::from_be_bytes([payload[0], payload[1], payload[2], payload[3]]);
                    // NO_ERROR after a whole response: the rest of the request is not wanted.
                    return if code == 0 && status != 0 {
                        Outcome::Response { status, body }
                    } else {
                        Outcome::Reset(code)
                    };
                }
                HEADERS if id == stream => status = status_of(&payload),
                DATA if id == stream => body.extend(payload),
                _ => {}
            }
            if matches!(kind, HEADERS | DATA) && id == stream && flags & END_STREAM != 0 {
                return Outcome::Response { status, body };
            }
        }
    }
}

/// The `:status` that starts a response's header block: indexed, or a literal of digits, Huffman-coded or not.
fn status_of(block: &[u8]) -> u16 {
    // A dynamic table size update may come first.
    let block = if block[0] & 0xe0 == 0x20 { &block[1..] } else { block };
    match block[0] {
        0x88 => 200,
        0x89 => 204,
        0x8a => 206,
        0x8b => 304,
        0x8c => 400,
        0x8d => 404,
        0x8e => 500,
        0x48 | 0x08 | 0x18 => {
            let length = usize::from(block[1] & 0x7f);
            let bytes = &block[2..2 + length];
            if block[1] & 0x80 == 0 {
                return std::str::from_utf8(bytes).unwrap().parse().unwrap();
            }
            let bits: Vec<u8> = bytes
                .iter()
                .flat_map(|b| (0..8).rev().map(move |i| b >> i & 1))
                .collect();
            let take = |at: usize, n: usize| {
                bits[at..at + n]
                    .iter()
                    .fold(0u16, |sum, bit| sum << 1 | u16::from(*bit))
            };
            let (mut at, mut status) = (0, 0);
            for _ in 0..3 {
                // 0, 1, 2 have five bits; 3 to 9 have six, from 0x19 on.
                let (digit, bits) = match take(at, 5) {
                    short @ 0..=2 => (short, 5),
                    _ => (take(at, 6) - 0x19 + 3, 6),
                };
                status = status * 10 + digit;
                at += bits;
            }
            status
        }
        other => panic!("a block that starts with {other:#x}"),
    }
}
