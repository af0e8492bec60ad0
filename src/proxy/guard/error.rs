//! Why a transfer ended before its time.

use std::{fmt, io};

use super::super::strict::Ambiguity;

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
    pub(super) fn goaway_code(self) -> u32 {
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
