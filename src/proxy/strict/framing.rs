//! What a head says about its message.

/// What a whole HTTP/1 head says about its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadFraming {
    /// Bytes of the head, the closing empty line included.
    pub head_bytes: usize,
    /// How the body is delimited.
    pub body: BodyFraming,
    /// Where scheme and authority of an absolute-form target stand, which agrees with `Host`: they do not travel, since
    /// upstreams are asked in origin-form (RFC 9112 section 3.2.1).
    pub authority: Option<(usize, usize)>,
    /// The head has an `Upgrade` field, and `Connection` names it.
    pub upgrade: bool,
    /// An HTTP/1.1 request with a short body or none, in origin-form, of which nothing concerns the connection but
    /// whether it is kept.
    pub is_plain: bool,
    /// `Connection: close` is said.
    pub closes: bool,
}

/// How the body of a request is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFraming {
    /// Exactly so many bytes; 0 where nothing was said.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}
