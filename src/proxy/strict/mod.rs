//! Whether a request can be read in one way only.
//!
//! Whoever decides on one reading of a request and forwards another has no gate at all. So everything that two
//! readers could read differently is refused here, never repaired: the head of an HTTP/1 message
//! ([`HeadCheck`]), its chunks ([`ChunkCheck`]), the same rules for a head that came over HTTP/2
//! ([`check_request`]), and the path ([`check_target`]). This module does no I/O, knows no status codes, and
//! allocates nothing, but for a path with parameters ([`without_parameters`]).
//!
//! The rules are RFC 9110, 9112 and 9113 where those say "MUST reject" or "MAY reject", and narrower where
//! deployed servers are known to disagree (the target's dots, slashes and encodings). The manual's chapter
//! [`crate::strict_edge`] has them all, each with its reason.

mod ambiguity;
mod bytes;
mod chunks;
mod fields;
mod framing;
mod head;
mod path;
mod request;

pub use ambiguity::Ambiguity;
pub use chunks::ChunkCheck;
pub use framing::{BodyFraming, HeadFraming};
pub use head::{HeadCheck, PlainHead, check_head};
pub use path::{PathRules, check_target, without_parameters};
pub use request::check_request;

/// How large a head may be. The edge's settings say where the defaults come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// Bytes of the whole head, request line and closing empty line included.
    pub bytes: usize,
    /// Field lines.
    pub fields: usize,
    /// Bytes of the request target.
    pub target_bytes: usize,
    /// What a path may contain.
    pub paths: PathRules,
}
