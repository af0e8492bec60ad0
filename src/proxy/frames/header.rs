//! HTTP/2 frames as they lie in a connection's bytes (RFC 9113 sections 4.1 and 6), in whatever pieces these come.

use super::GuardError;

/// A frame's header, in whatever pieces it comes, and what is left of its payload.
#[derive(Default)]
pub(super) struct FrameHeader {
    bytes: [u8; FRAME_HEADER],
    filled: usize,
    payload_left: usize,
    /// What has come of a WINDOW_UPDATE's payload, or of one of SETTINGS' entries.
    payload: [u8; 6],
    payload_filled: usize,
}

/// What some bytes completed.
pub(super) enum Piece {
    Nothing,
    Header(Frame),
    WindowUpdate { stream: u32, increment: u32 },
    Setting { id: u16, value: u32 },
}

/// What a frame's header says.
#[derive(Clone, Copy)]
pub(super) struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub length: usize,
}

impl FrameHeader {
    /// The next byte is the first of a frame.
    pub fn is_between_frames(&self) -> bool {
        self.filled == 0
    }

    /// After how many more bytes the type of the next frame comes, or of this one; `None`: it has come.
    pub fn kind_in(&self) -> Option<usize> {
        KIND_AT.checked_sub(self.filled)
    }

    /// Takes some of `bytes`; returns how many, and what that completed.
    pub fn advance(&mut self, bytes: &[u8]) -> (usize, Piece) {
        if self.filled < FRAME_HEADER {
            let step = (FRAME_HEADER - self.filled).min(bytes.len());
            self.bytes[self.filled..self.filled + step].copy_from_slice(&bytes[..step]);
            self.filled += step;
            if self.filled < FRAME_HEADER {
                return (step, Piece::Nothing);
            }
            let frame = self.frame();
            self.payload_left = frame.length;
            self.payload_filled = 0;
            if frame.length == 0 {
                self.filled = 0;
            }
            return (step, Piece::Header(frame));
        }
        let entry = match self.bytes[KIND_AT] {
            WINDOW_UPDATE => 4,
            SETTINGS => 6,
            _ => 0,
        };
        let mut step = self.payload_left.min(bytes.len());
        let mut piece = Piece::Nothing;
        if entry > 0 {
            step = step.min(entry - self.payload_filled);
            self.payload[self.payload_filled..self.payload_filled + step].copy_from_slice(&bytes[..step]);
            self.payload_filled += step;
            if self.payload_filled == entry {
                self.payload_filled = 0;
                let [a, b, c, d, e, f] = self.payload;
                piece = if entry == 4 {
                    let increment = u32::from_be_bytes([a, b, c, d]) & MAX_WINDOW;
                    Piece::WindowUpdate {
                        stream: self.frame().stream,
                        increment,
                    }
                } else {
                    Piece::Setting {
                        id: u16::from_be_bytes([a, b]),
                        value: u32::from_be_bytes([c, d, e, f]),
                    }
                };
            }
        }
        self.payload_left -= step;
        if self.payload_left == 0 {
            self.filled = 0;
        }
        (step, piece)
    }

    fn frame(&self) -> Frame {
        let b = &self.bytes;
        Frame {
            length: usize::from(b[0]) << 16 | usize::from(b[1]) << 8 | usize::from(b[2]),
            kind: b[KIND_AT],
            flags: b[4],
            stream: u32::from_be_bytes([b[5], b[6], b[7], b[8]]) & 0x7fff_ffff,
        }
    }
}

/// RFC 9113 section 6: frames of these types have one length.
///
/// # Errors
/// [`GuardError::FrameInvalid`].
pub(super) fn check_length(frame: Frame) -> Result<(), GuardError> {
    let is_right = match frame.kind {
        PRIORITY => frame.length == 5,
        RST_STREAM | WINDOW_UPDATE => frame.length == 4,
        PING => frame.length == 8,
        GOAWAY => frame.length >= 8,
        SETTINGS if frame.flags & ACK != 0 => frame.length == 0,
        SETTINGS => frame.length.is_multiple_of(6),
        _ => true,
    };
    if is_right {
        Ok(())
    } else {
        Err(GuardError::FrameInvalid(FRAME_SIZE_ERROR))
    }
}

const FRAME_HEADER: usize = 9;
/// Where a frame's header has its type.
pub(super) const KIND_AT: usize = 3;
pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PUSH_PROMISE: u8 = 5;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;
/// A type that is not assigned; RFC 9113 section 5.5 wants such frames to be ignored.
pub(super) const IGNORED: u8 = 0xff;
pub(super) const END_STREAM: u8 = 1;
pub(super) const ACK: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
pub(super) const INITIAL_WINDOW_SIZE: u16 = 4;
pub(super) const PROTOCOL_ERROR: u32 = 1;
pub(super) const FLOW_CONTROL_ERROR: u32 = 3;
pub(super) const STREAM_CLOSED: u32 = 5;
pub(super) const FRAME_SIZE_ERROR: u32 = 6;
/// 2^31 - 1, and the mask that leaves out the reserved bit.
pub(super) const MAX_WINDOW: u32 = 0x7fff_ffff;
