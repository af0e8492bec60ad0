//! Whether a request can be read in one way only.
//!
//! Whoever decides on one reading of a request and forwards another has no gate at all. So everything that two
//! readers could read differently is refused here, never repaired: the head of an HTTP/1 message
//! ([`HeadCheck`]), its chunks ([`ChunkCheck`]), the same rules for a head that came over HTTP/2
//! ([`check_request`]), and the path ([`check_target`]). This module does no I/O, knows no status codes, and
//! allocates nothing.
//!
//! The rules are RFC 9110, 9112 and 9113 where those say "MUST reject" or "MAY reject", and narrower where
//! deployed servers are known to disagree (the target's dots, slashes and encodings).

use std::fmt;

use http::header::{CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, Method, Uri};

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

/// How a path is read (`paths` in the configuration).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathRules {
    /// One spelling for each path: the one that is matched is the one that is forwarded.
    #[default]
    Strict,
    /// For upstreams that need `//`, `;`, `%2F` or encodings that are not UTF-8 in a path. Dot segments in any
    /// spelling, backslashes, control bytes and broken percent-encodings are refused all the same.
    Relaxed,
}

/// What a whole HTTP/1 head says about its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadFraming {
    /// Bytes of the head, the closing empty line included.
    pub head_bytes: usize,
    /// How the body is delimited.
    pub body: BodyFraming,
    /// The head has an `Upgrade` field, and `Connection` names it.
    pub upgrade: bool,
}

/// How the body of a request is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFraming {
    /// Exactly so many bytes; 0 where nothing was said.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

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
    /// A target that is neither a path nor `OPTIONS *`.
    TargetForm => "The target must start with a slash, as in /path?query; the host belongs in the Host field.",
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
    /// `;` in the path.
    PathSemicolon => "The path has a semicolon, which some servers cut off; encode it as %3B.",
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

/// Checks the head of an HTTP/1 request while it comes in.
///
/// Each line is looked at once, when it is complete, however the head is cut up: a head that drips in byte by byte
/// costs no more than one that comes whole.
#[derive(Clone, Debug)]
pub struct HeadCheck {
    limits: HeadLimits,
    /// Where the line starts that is not yet checked.
    line_start: usize,
    /// Up to where no line feed was found.
    searched: usize,
    fields: usize,
    version_10: bool,
    has_request_line: bool,
    host: Option<(usize, usize)>,
    /// The authority of an absolute-form target; such a target is refused, but the reason depends on `Host`.
    absolute: Option<(usize, usize)>,
    length: Option<u64>,
    chunked: bool,
    upgrade_field: bool,
    upgrade_option: bool,
}

impl HeadCheck {
    /// A check of one head.
    pub fn new(limits: HeadLimits) -> Self {
        HeadCheck {
            limits,
            line_start: 0,
            searched: 0,
            fields: 0,
            version_10: false,
            has_request_line: false,
            host: None,
            absolute: None,
            length: None,
            chunked: false,
            upgrade_field: false,
            upgrade_option: false,
        }
    }

    /// Goes on with `bytes`: all that has come of the head so far, from its first byte, and perhaps more behind it.
    /// `Ok(None)` asks for more.
    ///
    /// # Errors
    /// The first reason, in the order of the bytes, to refuse the request.
    pub fn resume(&mut self, bytes: &[u8]) -> Result<Option<HeadFraming>, Ambiguity> {
        if !self.has_request_line && bytes.first().is_some_and(|&b| CLASS[b as usize] & TOKEN == 0) {
            return Err(Ambiguity::NotHttp);
        }
        while let Some(found) = memchr::memchr(b'\n', &bytes[self.searched..]) {
            let line_feed = self.searched + found;
            if line_feed >= self.limits.bytes {
                return Err(self.too_large());
            }
            if line_feed == self.line_start || bytes[line_feed - 1] != b'\r' {
                return Err(Ambiguity::BareLineFeed);
            }
            let line = self.line_start..line_feed - 1;
            self.line_start = line_feed + 1;
            self.searched = self.line_start;
            if !self.has_request_line {
                self.request_line(&bytes[line])?;
                self.has_request_line = true;
            } else if line.is_empty() {
                return self.finish(bytes).map(Some);
            } else {
                self.fields += 1;
                if self.fields > self.limits.fields {
                    return Err(Ambiguity::TooManyFields);
                }
                self.field(bytes, line.start, line.end)?;
            }
        }
        self.searched = bytes.len();
        if bytes.len() >= self.limits.bytes {
            Err(self.too_large())
        } else {
            Ok(None)
        }
    }

    fn too_large(&self) -> Ambiguity {
        if self.has_request_line {
            Ambiguity::HeadTooLarge
        } else {
            Ambiguity::TargetTooLong
        }
    }

    fn request_line(&mut self, line: &[u8]) -> Result<(), Ambiguity> {
        let method_end = memchr::memchr(b' ', line).ok_or(Ambiguity::RequestLine)?;
        let (method, rest) = (&line[..method_end], &line[method_end + 1..]);
        let target_end = memchr::memchr(b' ', rest).ok_or(Ambiguity::RequestLine)?;
        let (target, version) = (&rest[..target_end], &rest[target_end + 1..]);
        match version {
            b"HTTP/1.1" => {}
            b"HTTP/1.0" => self.version_10 = true,
            _ => {
                let named = version.strip_prefix(b"HTTP/").is_some_and(|number| {
                    !number.is_empty() && number.len() <= 3 && number.iter().all(|b| b.is_ascii_digit() || *b == b'.')
                });
                return Err(if named {
                    Ambiguity::Version
                } else {
                    Ambiguity::RequestLine
                });
            }
        }
        check_method(method)?;
        if target.len() > self.limits.target_bytes {
            return Err(Ambiguity::TargetTooLong);
        }
        match target.first() {
            Some(b'/') => check_target(target, self.limits.paths),
            Some(b'*') if target == b"*" && method == b"OPTIONS" => Ok(()),
            _ => {
                let scheme = [&b"http://"[..], b"https://"]
                    .into_iter()
                    .find(|scheme| target.len() > scheme.len() && target[..scheme.len()].eq_ignore_ascii_case(scheme));
                let Some(scheme) = scheme else {
                    return Err(Ambiguity::TargetForm);
                };
                let start = method_end + 1 + scheme.len();
                let rest = &target[scheme.len()..];
                let end = rest
                    .iter()
                    .position(|b| matches!(b, b'/' | b'?' | b'#'))
                    .unwrap_or(rest.len());
                self.absolute = Some((start, start + end));
                Ok(())
            }
        }
    }

    fn field(&mut self, bytes: &[u8], start: usize, end: usize) -> Result<(), Ambiguity> {
        let line = &bytes[start..end];
        let mut classes = 0;
        let mut name_end = line.len();
        for (i, &b) in line.iter().enumerate() {
            let class = CLASS[b as usize];
            if class & TOKEN == 0 {
                name_end = i;
                break;
            }
            classes |= class;
        }
        match line.get(name_end) {
            Some(b':') if name_end > 0 => {}
            Some(b' ' | b'\t') if name_end == 0 => return Err(Ambiguity::FieldFolded),
            Some(b' ' | b'\t') => return Err(Ambiguity::FieldSpace),
            Some(b'\r') => return Err(Ambiguity::BareCarriageReturn),
            _ => return Err(Ambiguity::FieldName),
        }
        let (name, raw) = (&line[..name_end], &line[name_end + 1..]);
        if has_control(raw) {
            let carriage_return = memchr::memchr(b'\r', raw).is_some();
            return Err(if carriage_return {
                Ambiguity::BareCarriageReturn
            } else {
                Ambiguity::ControlByte
            });
        }
        if classes & UNDERSCORE != 0 && is_disguised_framing(name) {
            return Err(Ambiguity::FieldDisguised);
        }
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => {
                if self.host.is_some() {
                    return Err(Ambiguity::HostRepeated);
                }
                let value = trim(raw);
                check_host(value)?;
                let value_start = start + name_end + 1 + raw.iter().take_while(|b| is_space(**b)).count();
                self.host = Some((value_start, value_start + value.len()));
            }
            6 if name.eq_ignore_ascii_case(b"expect") && !trim(raw).eq_ignore_ascii_case(b"100-continue") => {
                return Err(Ambiguity::Expectation);
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => self.upgrade_field = true,
            10 if name.eq_ignore_ascii_case(b"connection") => self.connection(raw)?,
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                if self.length.is_some() {
                    return Err(Ambiguity::LengthRepeated);
                }
                self.length = Some(content_length(raw.strip_prefix(b" ").unwrap_or(raw))?);
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.chunked {
                    return Err(Ambiguity::EncodingRepeated);
                }
                if raw.strip_prefix(b" ").unwrap_or(raw) != b"chunked" {
                    return Err(Ambiguity::EncodingForm);
                }
                self.chunked = true;
            }
            _ => {}
        }
        Ok(())
    }

    /// `Connection` makes proxies drop the fields it names. Naming `x-api-key` or `content-length` there would make
    /// the next server see another request than the one that was decided on.
    fn connection(&mut self, value: &[u8]) -> Result<(), Ambiguity> {
        for option in value.split(|b| *b == b',') {
            let option = trim(option);
            if option.eq_ignore_ascii_case(b"upgrade") {
                self.upgrade_option = true;
            } else if !option.is_empty()
                && !CONNECTION_OPTIONS
                    .iter()
                    .any(|known| option.eq_ignore_ascii_case(known))
            {
                return Err(Ambiguity::ConnectionOption);
            }
        }
        Ok(())
    }

    fn finish(&self, bytes: &[u8]) -> Result<HeadFraming, Ambiguity> {
        let (host_start, host_end) = self.host.ok_or(Ambiguity::HostMissing)?;
        if let Some((start, end)) = self.absolute {
            // The request line's own offsets: it starts the head.
            let agrees = bytes[start..end].eq_ignore_ascii_case(&bytes[host_start..host_end]);
            return Err(if agrees {
                Ambiguity::TargetForm
            } else {
                Ambiguity::TargetAuthority
            });
        }
        let body = match (self.chunked, self.length) {
            (true, Some(_)) => return Err(Ambiguity::LengthAndEncoding),
            (true, None) if self.version_10 => return Err(Ambiguity::EncodingVersion),
            (true, None) => BodyFraming::Chunked,
            (false, length) => BodyFraming::Length(length.unwrap_or(0)),
        };
        Ok(HeadFraming {
            head_bytes: self.line_start,
            body,
            upgrade: self.upgrade_field && self.upgrade_option,
        })
    }
}

/// Checks a whole HTTP/1 head at once.
///
/// # Errors
/// As [`HeadCheck::resume`]; a head without its closing empty line is a [`Ambiguity::RequestLine`].
pub fn check_head(bytes: &[u8], limits: HeadLimits) -> Result<HeadFraming, Ambiguity> {
    HeadCheck::new(limits).resume(bytes)?.ok_or(Ambiguity::RequestLine)
}

/// Checks a request that came over HTTP/2, whose framing its own parser has already checked.
///
/// # Errors
/// The same reasons as for HTTP/1, so that neither protocol is a way around the other.
pub fn check_request(method: &Method, uri: &Uri, headers: &HeaderMap, limits: HeadLimits) -> Result<(), Ambiguity> {
    check_method(method.as_str().as_bytes())?;
    let target = uri.path_and_query().map_or("", |target| target.as_str()).as_bytes();
    if target.len() > limits.target_bytes {
        return Err(Ambiguity::TargetTooLong);
    }
    match target.first() {
        Some(b'/') => check_target(target, limits.paths)?,
        Some(b'*') if target == b"*" && method == Method::OPTIONS => {}
        _ => return Err(Ambiguity::TargetForm),
    }
    if headers.len() > limits.fields {
        return Err(Ambiguity::TooManyFields);
    }
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Ambiguity::HostRepeated);
    }
    match (uri.authority(), host) {
        (None, None) => return Err(Ambiguity::HostMissing),
        (Some(authority), None) => check_host(authority.as_str().as_bytes())?,
        (None, Some(host)) => check_host(host.as_bytes())?,
        (Some(authority), Some(host)) => {
            check_host(host.as_bytes())?;
            if !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) {
                return Err(Ambiguity::HostAuthority);
            }
        }
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        return Err(Ambiguity::EncodingVersion);
    }
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    if let Some(length) = lengths.next() {
        content_length(length.as_bytes())?;
    }
    if lengths.next().is_some() {
        return Err(Ambiguity::LengthRepeated);
    }
    if headers
        .get(EXPECT)
        .is_some_and(|expect| !expect.as_bytes().eq_ignore_ascii_case(b"100-continue"))
    {
        return Err(Ambiguity::Expectation);
    }
    for (name, value) in headers {
        let name = name.as_str().as_bytes();
        if name.contains(&b'_') && is_disguised_framing(name) {
            return Err(Ambiguity::FieldDisguised);
        }
        let value = value.as_bytes();
        if has_control(value) {
            return Err(Ambiguity::ControlByte);
        }
        // RFC 9113 section 8.2.1. Forwarded over HTTP/1.1 it would change its meaning.
        if value.first().is_some_and(|b| is_space(*b)) || value.last().is_some_and(|b| is_space(*b)) {
            return Err(Ambiguity::FieldPadded);
        }
    }
    Ok(())
}

/// Checks an origin-form target, `/path?query`: section 8's canonical path. The query may be anything visible but `#`.
///
/// # Errors
/// Why the path could be read as another one.
pub fn check_target(target: &[u8], rules: PathRules) -> Result<(), Ambiguity> {
    if target.first() != Some(&b'/') {
        return Err(Ambiguity::TargetForm);
    }
    let path_end = memchr::memchr(b'?', target).unwrap_or(target.len());
    check_path(&target[..path_end], rules)?;
    for &b in &target[path_end..] {
        if CLASS[b as usize] & QUERY == 0 {
            return Err(if b == b'#' {
                Ambiguity::TargetFragment
            } else {
                Ambiguity::TargetByte
            });
        }
    }
    Ok(())
}

fn check_path(path: &[u8], rules: PathRules) -> Result<(), Ambiguity> {
    let strict = rules == PathRules::Strict;
    let mut i = 0;
    let mut segment_start = 0;
    let mut utf8 = Utf8::default();
    while i < path.len() {
        let b = path[i];
        if b != b'%' && !utf8.is_whole() {
            return Err(Ambiguity::PercentUtf8);
        }
        if CLASS[b as usize] & PLAIN_PATH != 0 {
            i += 1;
            continue;
        }
        match b {
            b'/' => {
                if i > 0 {
                    check_segment(&path[segment_start..i], strict)?;
                }
                segment_start = i + 1;
            }
            b'%' => {
                let byte = percent_byte(path, i)?;
                if strict {
                    utf8 = utf8.push(byte)?;
                }
                match byte {
                    b'\\' => return Err(Ambiguity::PathBackslash),
                    b'.' => return Err(Ambiguity::PathEncodedDot),
                    0..0x20 | 0x7f => return Err(Ambiguity::PathEncodedControl),
                    b'/' if strict => return Err(Ambiguity::PathEncodedSlash),
                    b'/' => {
                        // A slash to whoever decodes before it looks for dots.
                        check_segment(&path[segment_start..i], strict)?;
                        segment_start = i + 3;
                    }
                    b'%' if strict && is_hex_pair(path, i + 3) => return Err(Ambiguity::PercentDouble),
                    b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' if strict => {
                        return Err(Ambiguity::PathEncodedPlain);
                    }
                    _ => {}
                }
                i += 2;
            }
            b'\\' => return Err(Ambiguity::PathBackslash),
            b'#' => return Err(Ambiguity::TargetFragment),
            b';' if strict => return Err(Ambiguity::PathSemicolon),
            b';' => {}
            _ => return Err(Ambiguity::TargetByte),
        }
        i += 1;
    }
    let last = &path[segment_start..];
    if !last.is_empty() {
        check_segment(last, strict)?;
    }
    if utf8.is_whole() {
        Ok(())
    } else {
        Err(Ambiguity::PercentUtf8)
    }
}

/// A segment that is not the path's (possibly empty) last one, or that is not empty.
fn check_segment(segment: &[u8], strict: bool) -> Result<(), Ambiguity> {
    match segment.first() {
        None => {
            if strict {
                return Err(Ambiguity::PathEmptySegment);
            }
        }
        Some(b'.') => {
            // What stands before a `;`, encoded or not, is the segment to servers that know path parameters.
            let dots = segment.iter().take_while(|b| **b == b'.').count();
            if matches!(&segment[dots..], [] | [b';', ..] | [b'%', b'3', b'b' | b'B', ..]) {
                return Err(Ambiguity::PathDots);
            }
        }
        Some(_) => {}
    }
    Ok(())
}

/// The byte that the percent sign at `at` encodes.
fn percent_byte(path: &[u8], at: usize) -> Result<u8, Ambiguity> {
    match (path.get(at), path.get(at + 1), path.get(at + 2)) {
        (Some(b'%'), Some(high), Some(low)) => match (hex(*high), hex(*low)) {
            (Some(high), Some(low)) => Ok(high << 4 | low),
            _ => Err(Ambiguity::PercentForm),
        },
        _ => Err(Ambiguity::PercentForm),
    }
}

fn is_hex_pair(path: &[u8], at: usize) -> bool {
    path.get(at).is_some_and(u8::is_ascii_hexdigit) && path.get(at + 1).is_some_and(u8::is_ascii_hexdigit)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

/// Where in a UTF-8 sequence of percent-encoded bytes a path is. Overlong forms such as `%C0%AF` are slashes to some
/// decoders and garbage to others, so only what Unicode's table 3-7 has as well-formed passes.
#[derive(Clone, Copy, Default)]
struct Utf8 {
    /// Continuation bytes to come.
    left: u8,
    /// What the next one may be: `low..=high`. Only the first is ever narrower than 80 to BF.
    low: u8,
    high: u8,
}

impl Utf8 {
    fn is_whole(self) -> bool {
        self.left == 0
    }

    fn push(self, byte: u8) -> Result<Self, Ambiguity> {
        if self.left > 0 {
            return if (self.low..=self.high).contains(&byte) {
                Ok(Utf8 {
                    left: self.left - 1,
                    low: 0x80,
                    high: 0xbf,
                })
            } else {
                Err(Ambiguity::PercentUtf8)
            };
        }
        let (left, low, high) = match byte {
            0..=0x7f => (0, 0, 0),
            0xc2..=0xdf => (1, 0x80, 0xbf),
            0xe0 => (2, 0xa0, 0xbf),
            0xed => (2, 0x80, 0x9f),
            0xe1..=0xef => (2, 0x80, 0xbf),
            0xf0 => (3, 0x90, 0xbf),
            0xf1..=0xf3 => (3, 0x80, 0xbf),
            0xf4 => (3, 0x80, 0x8f),
            _ => return Err(Ambiguity::PercentUtf8),
        };
        Ok(Utf8 { left, low, high })
    }
}

fn check_method(method: &[u8]) -> Result<(), Ambiguity> {
    match method {
        b"GET" | b"POST" | b"PUT" | b"HEAD" | b"PATCH" | b"DELETE" | b"OPTIONS" => Ok(()),
        b"TRACE" | b"TRACK" | b"CONNECT" => Err(Ambiguity::MethodRefused),
        // Some frameworks upper-case methods: `delete` must not slip past a rule for DELETE.
        _ if !method.is_empty()
            && method.len() <= MAX_METHOD_BYTES
            && method.iter().all(|b| b.is_ascii_uppercase() || *b == b'-') =>
        {
            Ok(())
        }
        _ => Err(Ambiguity::MethodForm),
    }
}

/// RFC 3986's reg-name without its percent-encodings and sub-delimiters, IPv4 address or bracketed IPv6 address, and
/// an optional port of 1 to 65535.
fn check_host(host: &[u8]) -> Result<(), Ambiguity> {
    let bad = Err(Ambiguity::HostForm);
    if host.is_empty() || host.len() > MAX_HOST_BYTES {
        return bad;
    }
    let port = if host[0] == b'[' {
        let Some(end) = memchr::memchr(b']', host) else {
            return bad;
        };
        let is_address =
            std::str::from_utf8(&host[1..end]).is_ok_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
        if !is_address {
            return bad;
        }
        match &host[end + 1..] {
            [] => return Ok(()),
            [b':', port @ ..] => port,
            _ => return bad,
        }
    } else {
        let mut label_bytes = 0;
        let mut port = None;
        for (i, &b) in host.iter().enumerate() {
            match b {
                b':' => {
                    port = Some(&host[i + 1..]);
                    break;
                }
                // An empty label: `.a`, `a..b`. One dot at the end is the root.
                b'.' if label_bytes == 0 => return bad,
                b'.' => label_bytes = 0,
                _ if CLASS[b as usize] & HOST_BYTE != 0 => label_bytes += 1,
                _ => return bad,
            }
            if label_bytes > MAX_LABEL_BYTES {
                return bad;
            }
        }
        match port {
            None => return Ok(()),
            Some(port) if host[0] != b':' => port,
            Some(_) => return bad,
        }
    };
    let is_port = (1..=5).contains(&port.len())
        && port.iter().all(u8::is_ascii_digit)
        && port[0] != b'0'
        && port.iter().fold(0u32, |sum, b| sum * 10 + u32::from(b - b'0')) <= 65_535;
    if is_port { Ok(()) } else { bad }
}

fn content_length(value: &[u8]) -> Result<u64, Ambiguity> {
    let is_plain = (1..=MAX_LENGTH_DIGITS).contains(&value.len())
        && value.iter().all(u8::is_ascii_digit)
        && (value[0] != b'0' || value.len() == 1);
    if !is_plain {
        return Err(Ambiguity::LengthForm);
    }
    Ok(value.iter().fold(0, |sum, b| sum * 10 + u64::from(b - b'0')))
}

fn is_disguised_framing(name: &[u8]) -> bool {
    DISGUISED.iter().any(|real| {
        real.len() == name.len()
            && name
                .iter()
                .zip(real.iter())
                .all(|(b, r)| b.eq_ignore_ascii_case(r) || (*b == b'_' && *r == b'-'))
    })
}

fn trim(value: &[u8]) -> &[u8] {
    let start = value.iter().take_while(|b| is_space(**b)).count();
    let end = value.len() - value[start..].iter().rev().take_while(|b| is_space(**b)).count();
    &value[start..end]
}

fn is_space(b: u8) -> bool {
    b == b' ' || b == b'\t'
}

/// Without an early exit, so that the compiler can look at 16 bytes at a time.
fn has_control(value: &[u8]) -> bool {
    value
        .iter()
        .fold(false, |bad, &b| bad | ((b < 0x20) & (b != b'\t')) | (b == 0x7f))
}

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

/// Options that take no end-to-end field away. `proxy-connection` and `trailers` are seen in the wild beside them.
const CONNECTION_OPTIONS: &[&[u8]] = &[
    b"keep-alive",
    b"close",
    b"te",
    b"trailers",
    b"http2-settings",
    b"proxy-connection",
];

/// What CGI, WSGI and PHP read as these fields when `_` stands for `-`.
const DISGUISED: &[&[u8]] = &[b"content-length", b"transfer-encoding"];

/// Longer than any registered method (`UPDATEREDIRECTREF`, 17).
const MAX_METHOD_BYTES: usize = 32;
/// RFC 1035's limit for a name, with room for a port.
const MAX_HOST_BYTES: usize = 255 + 6;
/// RFC 1035.
const MAX_LABEL_BYTES: usize = 63;
/// 10^18 − 1 bytes: an exabyte, and far from the end of an i64, which other parsers use.
const MAX_LENGTH_DIGITS: usize = 18;
/// 15 hexadecimal digits stay within an i64.
const MAX_CHUNK_DIGITS: u8 = 15;
/// All chunk extensions of a body together. Nobody is known to send any.
const MAX_EXTENSION_BYTES: usize = 4096;
/// As nginx's buffer for one field line.
const MAX_TRAILER_BYTES: usize = 8192;

const TOKEN: u8 = 1;
const PLAIN_PATH: u8 = 2;
const QUERY: u8 = 4;
const HOST_BYTE: u8 = 8;
const UNDERSCORE: u8 = 16;

/// What each byte may be part of.
static CLASS: [u8; 256] = {
    let mut table = [0u8; 256];
    let mut b = 0x21;
    while b < 0x7f {
        let byte = b as u8;
        let alphanumeric = byte.is_ascii_alphanumeric();
        let mut class = QUERY;
        // RFC 9110: tchar.
        if alphanumeric || in_set(byte, b"!#$%&'*+-.^_`|~") {
            class |= TOKEN;
        }
        // RFC 3986: pchar without percent-encodings, and without `;`.
        if alphanumeric || in_set(byte, b"-._~!$&'()*+,=:@") {
            class |= PLAIN_PATH;
        }
        if alphanumeric || in_set(byte, b"-_~") {
            class |= HOST_BYTE;
        }
        if byte == b'_' {
            class |= UNDERSCORE;
        }
        // What HTTP libraries refuse in a query, too; other bytes that RFC 3986 excludes are in wide use there.
        if in_set(byte, b"#\"<>") {
            class &= !QUERY;
        }
        table[b] = class;
        b += 1;
    }
    table
};

const fn in_set(byte: u8, set: &[u8]) -> bool {
    let mut i = 0;
    while i < set.len() {
        if set[i] == byte {
            return true;
        }
        i += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeadLimits = HeadLimits {
        bytes: 32 * 1024,
        fields: 100,
        target_bytes: 8192,
        paths: PathRules::Strict,
    };

    fn head(text: &str) -> Result<HeadFraming, Ambiguity> {
        check_head(text.as_bytes(), LIMITS)
    }

    fn path(text: &str) -> Result<(), Ambiguity> {
        check_target(text.as_bytes(), PathRules::Strict)
    }

    #[test]
    fn a_plain_head_passes() {
        let framing = head("GET /a?b=c HTTP/1.1\r\nHost: example.com:8080\r\nx-api-key: k\r\n\r\nrest").unwrap();
        assert_eq!(framing.body, BodyFraming::Length(0));
        assert_eq!(
            framing.head_bytes,
            "GET /a?b=c HTTP/1.1\r\nHost: example.com:8080\r\nx-api-key: k\r\n\r\n".len()
        );
        assert!(!framing.upgrade);
        let chunked = head("POST / HTTP/1.1\r\nHost: [::1]:80\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
        assert_eq!(chunked.body, BodyFraming::Chunked);
        let upgrade =
            head("GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n");
        assert!(upgrade.unwrap().upgrade);
    }

    #[test]
    fn a_head_gives_the_same_answer_however_it_is_cut() {
        let heads = [
            "GET /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
            "GET /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\nX: y\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        ];
        for text in heads {
            let whole = check_head(text.as_bytes(), LIMITS);
            let mut check = HeadCheck::new(LIMITS);
            let mut dripped = Err(Ambiguity::RequestLine);
            for end in 1..=text.len() {
                match check.resume(&text.as_bytes()[..end]) {
                    Ok(None) => continue,
                    Ok(Some(framing)) => dripped = Ok(framing),
                    Err(error) => dripped = Err(error),
                }
                break;
            }
            assert_eq!(dripped, whole, "{text:?}");
        }
    }

    #[test]
    fn paths_have_one_spelling() {
        for good in [
            "/",
            "/a",
            "/a/",
            "/a/b.c",
            "/.well-known/x",
            "/a..b/...c",
            "/caf%C3%A9",
            "/a%20b",
            "/u/a%40b.c",
            "/a%3Ab",
            "/100%25",
            "/a:b@c,d=e!f$g&h'i(j)k*l+m~n",
            "/a?x=//..%2f;%zz\\",
        ] {
            assert_eq!(path(good), Ok(()), "{good}");
        }
        let bad = [
            ("a", Ambiguity::TargetForm),
            ("//", Ambiguity::PathEmptySegment),
            ("/a//b", Ambiguity::PathEmptySegment),
            ("/a//", Ambiguity::PathEmptySegment),
            ("/.", Ambiguity::PathDots),
            ("/..", Ambiguity::PathDots),
            ("/a/./b", Ambiguity::PathDots),
            ("/a/../b", Ambiguity::PathDots),
            ("/a/.../b", Ambiguity::PathDots),
            ("/a/..?x", Ambiguity::PathDots),
            ("/a/..;/b", Ambiguity::PathSemicolon),
            ("/a/..%3B/b", Ambiguity::PathDots),
            ("/a;x=1", Ambiguity::PathSemicolon),
            ("/a\\b", Ambiguity::PathBackslash),
            ("/a%5cb", Ambiguity::PathBackslash),
            ("/a%2Fb", Ambiguity::PathEncodedSlash),
            ("/a%2e%2e/b", Ambiguity::PathEncodedDot),
            ("/a%00", Ambiguity::PathEncodedControl),
            ("/a%0d", Ambiguity::PathEncodedControl),
            ("/a%7f", Ambiguity::PathEncodedControl),
            ("/%61", Ambiguity::PathEncodedPlain),
            ("/a%", Ambiguity::PercentForm),
            ("/a%2", Ambiguity::PercentForm),
            ("/a%zz", Ambiguity::PercentForm),
            ("/a%u002f", Ambiguity::PercentForm),
            ("/a%252f", Ambiguity::PercentDouble),
            ("/a%25%32%66", Ambiguity::PathEncodedPlain),
            ("/a%c0%af", Ambiguity::PercentUtf8),
            ("/a%e9", Ambiguity::PercentUtf8),
            ("/a%ed%a0%80", Ambiguity::PercentUtf8),
            ("/a#b", Ambiguity::TargetFragment),
            ("/a?b#c", Ambiguity::TargetFragment),
            ("/a\"b", Ambiguity::TargetByte),
            ("/a\u{e9}", Ambiguity::TargetByte),
            ("/a?\u{e9}", Ambiguity::TargetByte),
            ("/a|b", Ambiguity::TargetByte),
        ];
        for (text, why) in bad {
            assert_eq!(path(text), Err(why), "{text}");
        }
    }

    #[test]
    fn relaxed_paths_still_have_no_dots() {
        let relaxed = |text: &str| check_target(text.as_bytes(), PathRules::Relaxed);
        for good in ["/a//b", "/a;x=1/b", "/a%2Fb", "/%61", "/a%252f", "/a%e9"] {
            assert_eq!(relaxed(good), Ok(()), "{good}");
        }
        for bad in [
            "/a/../b",
            "/a/..;x/b",
            "/.;/",
            "/a%2e",
            "/a\\b",
            "/a%5c",
            "/a%00",
            "/a%4",
        ] {
            assert!(relaxed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts_are_names_or_addresses() {
        for good in [
            "a",
            "a.b",
            "a.b.",
            "127.0.0.1:80",
            "[::1]",
            "[2001:db8::1]:65535",
            "x_y-z~1",
        ] {
            assert_eq!(check_host(good.as_bytes()), Ok(()), "{good}");
        }
        for bad in [
            "", ":80", "a:", "a:0", "a:08", "a:65536", "a:123456", "a:8a", "a b", "a,b", "a@b", "a/b", "a?b", "a#b",
            "[::1", "[::1]x", "[::g]", "::1", "a..b", ".a", "a%41", "a\\b", "[]", "a:80:80",
        ] {
            assert_eq!(check_host(bad.as_bytes()), Err(Ambiguity::HostForm), "{bad}");
        }
    }

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
