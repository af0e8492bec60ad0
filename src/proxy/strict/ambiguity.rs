//! Why a request was refused.

use std::fmt;

macro_rules! ambiguities {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)+) => {
        /// Why a request was refused. `Display` says what is wrong and what would be right, for the client; it
        /// never repeats what the client sent.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Ambiguity { $($(#[$doc])* $name,)+ }

        impl Ambiguity {
            /// Every kind, for tests and for metrics that want all labels from the start.
            pub const ALL: &[Ambiguity] = &[$(Ambiguity::$name,)+];
        }

        impl fmt::Display for Ambiguity {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Ambiguity::$name => $text,)+ })
            }
        }
    };
}

ambiguities! {
    /// The request line is not `METHOD SP target SP version CRLF`.
    RequestLine => "The request line must be a method, one space, a target, one space and HTTP/1.1.",
    /// A method with other characters than capitals and hyphens.
    MethodForm => "The method must consist of capital letters, as in GET or M-SEARCH.",
    /// TRACE, TRACK or CONNECT.
    MethodRefused => "This method is not served here.",
    /// Neither HTTP/1.1 nor HTTP/1.0.
    Version => "Only HTTP/1.0, HTTP/1.1 and HTTP/2 are spoken here.",
    /// Bytes that are no HTTP at all, such as a TLS handshake on a plain port.
    NotHttp => "This is not HTTP. Is it TLS on a plain port?",
    /// A target that is neither a path, nor an `http` or `https` URL with a path, nor `OPTIONS *`.
    TargetForm => "The target must start with a slash, as in /path?query, or be the whole URL with its path.",
    /// An absolute-form target that names another authority than `Host`.
    TargetAuthority => "The target names another host than the Host field.",
    /// The target is longer than the limit.
    TargetTooLong => "The request target is too long.",
    /// A byte that RFC 3986 does not allow in a target.
    TargetByte => "The target has a byte that must be percent-encoded.",
    /// `#` in a target.
    TargetFragment => "The target has a fragment; leave out # and what follows, or encode it as %23.",
    /// `\` or `%5C` in the path.
    PathBackslash => "The path has a backslash; use a slash.",
    /// `.` or `..` segments, or a segment of dots alone.
    PathDots => "The path has a segment of dots; send the path that it resolves to.",
    /// `//`.
    PathEmptySegment => "The path has an empty segment (//); send a single slash.",
    /// `;` at the start of a segment, or in a path that falls under another rule without what follows its `;`.
    PathSemicolon => "The path has a semicolon, and is another path to servers that cut it off there; encode it as %3B.",
    /// `%2F`.
    PathEncodedSlash => "The path has an encoded slash (%2F).",
    /// `%2E`.
    PathEncodedDot => "The path has an encoded dot (%2E); send the dot itself.",
    /// `%00` to `%1F`, `%7F`.
    PathEncodedControl => "The path has an encoded control character.",
    /// A letter, digit, `-` or `_` that is encoded without need.
    PathEncodedPlain => "The path encodes a letter, digit, hyphen or underscore; send it as it is.",
    /// `%` without two hexadecimal digits.
    PercentForm => "A percent sign must be followed by two hexadecimal digits.",
    /// `%25` before two hexadecimal digits.
    PercentDouble => "The path is percent-encoded twice.",
    /// Percent-encoded bytes that are not UTF-8.
    PercentUtf8 => "The path's percent-encoding is not UTF-8.",
    /// LF without CR.
    BareLineFeed => "A line ends with LF alone; lines must end with CRLF.",
    /// CR without LF.
    BareCarriageReturn => "A CR stands without LF; lines must end with CRLF.",
    /// NUL or another control byte.
    ControlByte => "A field has a control byte.",
    /// A field name with other bytes than RFC 9110's token.
    FieldName => "A field name is empty or has a byte that may not stand in one.",
    /// Whitespace between name and colon.
    FieldSpace => "There is whitespace between a field's name and its colon.",
    /// HTTP/2: a value that starts or ends with whitespace.
    FieldPadded => "A field's value starts or ends with whitespace.",
    /// A continuation line.
    FieldFolded => "A field is folded over several lines; send it on one line.",
    /// A framing field spelled with underscores, which CGI-like servers read as the real one.
    FieldDisguised => "A field that frames the message is spelled with underscores.",
    /// No `Host`.
    HostMissing => "The Host field is missing.",
    /// More than one `Host`.
    HostRepeated => "There is more than one Host field.",
    /// A `Host` that is no host name or address with an optional port.
    HostForm => "The Host field must be a host name or address, with an optional port.",
    /// `Host` and `:authority` differ.
    HostAuthority => "The Host field and :authority name different hosts.",
    /// More than one `Content-Length`.
    LengthRepeated => "There is more than one Content-Length.",
    /// A `Content-Length` that is not plain digits.
    LengthForm => "Content-Length must be decimal digits, without sign, padding or list.",
    /// `Content-Length` together with `Transfer-Encoding`.
    LengthAndEncoding => "Content-Length and Transfer-Encoding exclude each other.",
    /// More than one `Transfer-Encoding`.
    EncodingRepeated => "There is more than one Transfer-Encoding.",
    /// Anything but `chunked`.
    EncodingForm => "Transfer-Encoding must be exactly chunked.",
    /// `Transfer-Encoding` in HTTP/1.0 or HTTP/2.
    EncodingVersion => "Transfer-Encoding exists in HTTP/1.1 only.",
    /// A `Connection` option that would take fields away from the request.
    ConnectionOption => "Connection may name close, keep-alive, upgrade, te and http2-settings only.",
    /// An `Expect` other than `100-continue`.
    Expectation => "Expect may only be 100-continue.",
    /// The head is larger than the limit.
    HeadTooLarge => "The request head is too large.",
    /// There are more fields than the limit.
    TooManyFields => "The request has too many fields.",
    /// A chunk size that is not plain hexadecimal digits.
    ChunkSize => "A chunk size must be 1 to 15 hexadecimal digits.",
    /// Chunk extensions that are too long or have control bytes.
    ChunkExtension => "A chunk extension is malformed or too long.",
    /// Chunk data that is not followed by CRLF.
    ChunkEnd => "A chunk's data must be followed by CRLF.",
    /// A malformed or too long trailer section.
    Trailer => "The trailer section is malformed or too long.",
}

impl std::error::Error for Ambiguity {}
