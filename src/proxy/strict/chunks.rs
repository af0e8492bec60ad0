//! The chunks of a body.

use super::Ambiguity;
use super::bytes::{CLASS, TOKEN, hex};

/// Follows the chunks of a body as they pass. See RFC 9112 section 7.1; narrower in that a size has at most 15 digits
/// and that nothing but `;` may follow it.
#[derive(Clone, Debug)]
pub struct ChunkCheck {
    state: ChunkState,
    /// Bytes of extensions, or of the trailer section, so far.
    extra_bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkState {
    Size { digits: u8, value: u64 },
    Extension { value: u64 },
    SizeLineFeed { value: u64 },
    Data { left: u64 },
    DataCarriageReturn,
    DataLineFeed,
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLineFeed,
    LastLineFeed,
    Done,
}

impl Default for ChunkCheck {
    fn default() -> Self {
        ChunkCheck {
            state: ChunkState::Size { digits: 0, value: 0 },
            extra_bytes: 0,
        }
    }
}

impl ChunkCheck {
    /// Looks at the next `bytes`, and returns how many of them belong to this body: all, unless it ends among them.
    ///
    /// # Errors
    /// What is wrong with the framing.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<usize, Ambiguity> {
        use ChunkState as S;
        let mut i = 0;
        while i < bytes.len() && self.state != S::Done {
            if let S::Data { left } = self.state {
                let step = left.min((bytes.len() - i) as u64);
                i += step as usize;
                self.state = if step == left {
                    S::DataCarriageReturn
                } else {
                    S::Data { left: left - step }
                };
                continue;
            }
            let b = bytes[i];
            i += 1;
            self.state = match self.state {
                S::Size { digits, value } => match (b, hex(b)) {
                    (_, Some(digit)) if digits < MAX_CHUNK_DIGITS => S::Size {
                        digits: digits + 1,
                        value: value << 4 | u64::from(digit),
                    },
                    (b'\r', _) if digits > 0 => S::SizeLineFeed { value },
                    (b';', _) if digits > 0 => S::Extension { value },
                    (b'\n', _) => return Err(Ambiguity::BareLineFeed),
                    _ => return Err(Ambiguity::ChunkSize),
                },
                S::Extension { value } => {
                    self.extra_bytes += 1;
                    match b {
                        b'\r' => S::SizeLineFeed { value },
                        b'\n' => return Err(Ambiguity::BareLineFeed),
                        b'\t' | 0x20..=0x7e if self.extra_bytes <= MAX_EXTENSION_BYTES => S::Extension { value },
                        _ => return Err(Ambiguity::ChunkExtension),
                    }
                }
                S::SizeLineFeed { value } => match (b, value) {
                    (b'\n', 0) => {
                        self.extra_bytes = 0;
                        S::TrailerStart
                    }
                    (b'\n', _) => S::Data { left: value },
                    _ => return Err(Ambiguity::BareCarriageReturn),
                },
                S::DataCarriageReturn => match b {
                    b'\r' => S::DataLineFeed,
                    _ => return Err(Ambiguity::ChunkEnd),
                },
                S::DataLineFeed => match b {
                    b'\n' => S::Size { digits: 0, value: 0 },
                    _ => return Err(Ambiguity::ChunkEnd),
                },
                S::LastLineFeed => match b {
                    b'\n' => S::Done,
                    _ => return Err(Ambiguity::BareCarriageReturn),
                },
                trailer => {
                    self.extra_bytes += 1;
                    if self.extra_bytes > MAX_TRAILER_BYTES {
                        return Err(Ambiguity::Trailer);
                    }
                    trailer_byte(trailer, b)?
                }
            };
            debug_assert!(!matches!(self.state, S::Data { left: 0 }));
        }
        Ok(i)
    }

    /// The body has ended, trailer section and all.
    pub fn is_done(&self) -> bool {
        self.state == ChunkState::Done
    }
}

fn trailer_byte(state: ChunkState, b: u8) -> Result<ChunkState, Ambiguity> {
    use ChunkState as S;
    let is_token = CLASS[b as usize] & TOKEN != 0;
    match (state, b) {
        (S::TrailerStart, b'\r') => Ok(S::LastLineFeed),
        (S::TrailerStart | S::TrailerName, _) if is_token => Ok(S::TrailerName),
        (S::TrailerName, b':') => Ok(S::TrailerValue),
        (S::TrailerValue, b'\r') => Ok(S::TrailerLineFeed),
        (S::TrailerValue, b'\t' | 0x20..=0x7e | 0x80..) => Ok(S::TrailerValue),
        (S::TrailerLineFeed, b'\n') => Ok(S::TrailerStart),
        (S::TrailerLineFeed, _) => Err(Ambiguity::BareCarriageReturn),
        (_, b'\n') => Err(Ambiguity::BareLineFeed),
        _ => Err(Ambiguity::Trailer),
    }
}

/// 15 hexadecimal digits stay within an i64.
const MAX_CHUNK_DIGITS: u8 = 15;
/// All chunk extensions of a body together. Nobody is known to send any.
const MAX_EXTENSION_BYTES: usize = 4096;
/// As nginx's buffer for one field line.
const MAX_TRAILER_BYTES: usize = 8192;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_end_where_they_say() {
        let body = b"5\r\nhello\r\n0a;x=\"y\"\r\n0123456789\r\n0\r\nTrailer: v\r\n\r\nGET /";
        for cut in 1..=body.len() {
            let mut check = ChunkCheck::default();
            let mut consumed = check.advance(&body[..cut]).unwrap();
            if cut < body.len() && !check.is_done() {
                assert_eq!(consumed, cut);
                consumed += check.advance(&body[cut..]).unwrap();
            }
            assert!(check.is_done());
            assert_eq!(&body[consumed..], b"GET /");
        }
        let bad: [(&[u8], Ambiguity); 14] = [
            (b"\r\n", Ambiguity::ChunkSize),
            (b" 5\r\n", Ambiguity::ChunkSize),
            (b"5 \r\n", Ambiguity::ChunkSize),
            (b"0x5\r\n", Ambiguity::ChunkSize),
            (b"-1\r\n", Ambiguity::ChunkSize),
            (b"1234567890123456\r\n", Ambiguity::ChunkSize),
            (b"5\nhello", Ambiguity::BareLineFeed),
            (b"5\rhello", Ambiguity::BareCarriageReturn),
            (b"5;x\nhello", Ambiguity::BareLineFeed),
            (b"5;\0\r\n", Ambiguity::ChunkExtension),
            (b"5\r\nhelloX", Ambiguity::ChunkEnd),
            (b"5\r\nhello\n", Ambiguity::ChunkEnd),
            (b"0\r\nX y\r\n\r\n", Ambiguity::Trailer),
            (b"0\r\nX: y\n\r\n", Ambiguity::BareLineFeed),
        ];
        for (bytes, why) in bad {
            assert_eq!(
                ChunkCheck::default().advance(bytes),
                Err(why),
                "{}",
                bytes.escape_ascii()
            );
        }
    }
}
