//! The head of an HTTP/1 request, as it comes in.

use super::bytes::{CLASS, TOKEN, UNDERSCORE, has_control, is_space, trim};
use super::fields::{check_host, check_method, content_length, is_disguised_framing};
use super::{Ambiguity, BodyFraming, HeadFraming, HeadLimits, check_target};

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
    /// Where the scheme and the authority of an absolute-form target begin, and where the authority ends.
    absolute: Option<(usize, usize, usize)>,
    length: Option<u64>,
    chunked: bool,
    upgrade_field: bool,
    upgrade_option: bool,
    close_option: bool,
    is_plain: bool,
    /// Where the target begins and ends, in a head that may be plain.
    target: (usize, usize),
    /// Where fields stand, as long as the head may be plain.
    spans: [FieldSpan; MOST_PLAIN_FIELDS],
}

/// Where a field stands in its head: from `start` to `colon` its name, then to `end` its value and the space around it.
#[derive(Clone, Copy, Debug, Default)]
struct FieldSpan {
    start: u32,
    colon: u32,
    end: u32,
}

/// A plain head that was checked, cut into its parts.
#[derive(Clone, Copy, Debug)]
pub struct PlainHead<'a> {
    bytes: &'a [u8],
    check: &'a HeadCheck,
}

impl<'a> PlainHead<'a> {
    /// The method.
    pub fn method(self) -> &'a [u8] {
        &self.bytes[..self.check.target.0 - 1]
    }

    /// The target, in origin-form or `*`.
    pub fn target(self) -> &'a [u8] {
        &self.bytes[self.check.target.0..self.check.target.1]
    }

    /// How many fields there are.
    pub fn field_count(self) -> usize {
        self.check.fields
    }

    /// Names and values in their order, without the space around values.
    pub fn fields(self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        self.check.spans[..self.check.fields].iter().map(move |span| {
            let [start, colon, end] = [span.start, span.colon, span.end].map(|at| at as usize);
            (&self.bytes[start..colon], trim(&self.bytes[colon + 1..end]))
        })
    }
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
            close_option: false,
            is_plain: true,
            target: (0, 0),
            spans: [FieldSpan::default(); MOST_PLAIN_FIELDS],
        }
    }

    /// The parts of a head that this check has just found to be plain ([`HeadFraming::is_plain`]); `bytes` begin with it.
    pub fn plain_head<'a>(&'a self, bytes: &'a [u8]) -> Option<PlainHead<'a>> {
        (self.is_plain && self.has_request_line).then_some(PlainHead { bytes, check: self })
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
                let colon = self.field(bytes, line.start, line.end)?;
                self.note_span(line.start, colon, line.end);
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
            b"HTTP/1.0" => {
                self.version_10 = true;
                self.is_plain = false;
            }
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
        // No answer to HEAD has the length that its head says.
        self.is_plain &= method != b"HEAD";
        self.target = (method_end + 1, method_end + 1 + target_end);
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
                // Without a path the origin-form would have another target than was sent.
                let slash = memchr::memchr(b'/', &target[scheme.len()..]).ok_or(Ambiguity::TargetForm)?;
                let (start, authority) = (method_end + 1, method_end + 1 + scheme.len());
                self.absolute = Some((start, authority, authority + slash));
                self.is_plain = false;
                check_target(&target[scheme.len() + slash..], self.limits.paths)
            }
        }
    }

    fn note_span(&mut self, start: usize, colon: usize, end: usize) {
        let span = [start, colon, end].map(u32::try_from);
        match (self.spans.get_mut(self.fields - 1), span) {
            (Some(place), [Ok(start), Ok(colon), Ok(end)]) => *place = FieldSpan { start, colon, end },
            _ => self.is_plain = false,
        }
    }

    /// Checks one field, and says where its colon stands.
    fn field(&mut self, bytes: &[u8], start: usize, end: usize) -> Result<usize, Ambiguity> {
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
            6 if name.eq_ignore_ascii_case(b"expect") => {
                if !trim(raw).eq_ignore_ascii_case(b"100-continue") {
                    return Err(Ambiguity::Expectation);
                }
                self.is_plain = false;
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                self.upgrade_field = true;
                self.is_plain = false;
            }
            10 if name.eq_ignore_ascii_case(b"connection") => self.connection(raw)?,
            14 if name.eq_ignore_ascii_case(b"content-length") => {
                if self.length.is_some() {
                    return Err(Ambiguity::LengthRepeated);
                }
                let length = content_length(raw.strip_prefix(b" ").unwrap_or(raw))?;
                self.length = Some(length);
                self.is_plain &= length <= MOST_PLAIN_BODY;
            }
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                if self.chunked {
                    return Err(Ambiguity::EncodingRepeated);
                }
                if raw.strip_prefix(b" ").unwrap_or(raw) != b"chunked" {
                    return Err(Ambiguity::EncodingForm);
                }
                self.chunked = true;
                self.is_plain = false;
            }
            _ if CONNECTION_FIELDS.iter().any(|known| name.eq_ignore_ascii_case(known)) => self.is_plain = false,
            _ => {}
        }
        Ok(start + name_end)
    }

    /// `Connection` makes proxies drop the fields it names. Naming `x-api-key` or `content-length` there would make
    /// the next server see another request than the one that was decided on.
    fn connection(&mut self, value: &[u8]) -> Result<(), Ambiguity> {
        let only = trim(value);
        self.is_plain &= only.eq_ignore_ascii_case(b"keep-alive") || only.eq_ignore_ascii_case(b"close");
        for option in value.split(|b| *b == b',') {
            let option = trim(option);
            if option.eq_ignore_ascii_case(b"upgrade") {
                self.upgrade_option = true;
            } else if option.eq_ignore_ascii_case(b"close") {
                self.close_option = true;
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
        let authority = match self.absolute {
            None => None,
            // The request line's own offsets: it starts the head.
            Some((start, authority, end))
                if bytes[authority..end].eq_ignore_ascii_case(&bytes[host_start..host_end]) =>
            {
                Some((start, end))
            }
            Some(_) => return Err(Ambiguity::TargetAuthority),
        };
        let body = match (self.chunked, self.length) {
            (true, Some(_)) => return Err(Ambiguity::LengthAndEncoding),
            (true, None) if self.version_10 => return Err(Ambiguity::EncodingVersion),
            (true, None) => BodyFraming::Chunked,
            (false, length) => BodyFraming::Length(length.unwrap_or(0)),
        };
        Ok(HeadFraming {
            head_bytes: self.line_start,
            body,
            authority,
            upgrade: self.upgrade_field && self.upgrade_option,
            is_plain: self.is_plain && self.line_start <= MOST_PLAIN_HEAD,
            closes: self.close_option,
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

/// Options that take no end-to-end field away. `proxy-connection` and `trailers` are seen in the wild beside them.
const CONNECTION_OPTIONS: &[&[u8]] = &[
    b"keep-alive",
    b"close",
    b"te",
    b"trailers",
    b"http2-settings",
    b"proxy-connection",
];

/// Fields that concern the connection and not the request (RFC 9110 section 7.6.1, and those seen in the wild), beside
/// those that are looked at by themselves.
const CONNECTION_FIELDS: &[&[u8]] = &[
    b"http2-settings",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
];

/// A head with more fields is not plain.
const MOST_PLAIN_FIELDS: usize = 32;
/// Nor is a longer one, in bytes: Pingora has to be able to read it, too.
const MOST_PLAIN_HEAD: usize = 64 * 1024;
/// Nor is one that announces a longer body, in bytes: it is read whole, and sent again whole where a server fails.
const MOST_PLAIN_BODY: u64 = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::super::PathRules;
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
        let absolute = head("GET http://A:80/b?c HTTP/1.1\r\nHost: a:80\r\n\r\n").unwrap();
        assert_eq!(absolute.authority, Some((4, 15)), "what is left is /b?c");
        let upgrade =
            head("GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n");
        assert!(upgrade.unwrap().upgrade);
    }

    #[test]
    fn a_plain_head_is_cut_into_its_parts() {
        let text = "POST /a?b HTTP/1.1\r\nHost:a\r\nX-Two:  1 \r\nx-two:\r\nContent-Length: 16384\r\nConnection: Close\r\n\r\nrest";
        let mut check = HeadCheck::new(LIMITS);
        let framing = check.resume(text.as_bytes()).unwrap().unwrap();
        assert!(framing.is_plain && framing.closes);
        let head = check.plain_head(text.as_bytes()).unwrap();
        assert_eq!((head.method(), head.target()), (&b"POST"[..], &b"/a?b"[..]));
        let fields: Vec<_> = head.fields().map(|(name, value)| (str(name), str(value))).collect();
        assert_eq!(
            fields,
            [
                ("Host", "a"),
                ("X-Two", "1"),
                ("x-two", ""),
                ("Content-Length", "16384"),
                ("Connection", "Close")
            ]
        );
        assert_eq!(head.field_count(), fields.len());
    }

    fn str(bytes: &[u8]) -> &str {
        std::str::from_utf8(bytes).unwrap()
    }

    #[test]
    fn what_concerns_the_connection_is_not_plain() {
        let plain = |line: &str, field: &str| {
            let framing = head(&format!("{line}\r\nHost: a\r\n{field}\r\n")).unwrap();
            assert_eq!(framing.closes, field == "Connection: keep-alive, close\r\n", "{field}");
            framing.is_plain
        };
        assert!(plain("GET / HTTP/1.1", ""));
        assert!(plain("OPTIONS * HTTP/1.1", "Connection: Keep-Alive\r\n"));
        assert!(plain("GET / HTTP/1.1", &"X: y\r\n".repeat(MOST_PLAIN_FIELDS - 1)));
        let limits = HeadLimits {
            bytes: usize::MAX,
            ..LIMITS
        };
        let long = format!(
            "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
            "y".repeat(MOST_PLAIN_HEAD)
        );
        assert!(!check_head(long.as_bytes(), limits).unwrap().is_plain);
        for (line, field) in [
            ("HEAD / HTTP/1.1", ""),
            ("GET / HTTP/1.0", ""),
            ("GET http://a/ HTTP/1.1", ""),
            ("GET / HTTP/1.1", "Content-Length: 16385\r\n"),
            ("GET / HTTP/1.1", "Connection: keep-alive, close\r\n"),
            ("GET / HTTP/1.1", "Connection: TE\r\n"),
            ("GET / HTTP/1.1", "Connection:\r\n"),
            ("GET / HTTP/1.1", "Expect: 100-continue\r\n"),
            ("GET / HTTP/1.1", "HTTP2-Settings: a\r\n"),
            ("GET / HTTP/1.1", "Keep-Alive: timeout=1\r\n"),
            ("GET / HTTP/1.1", "Proxy-Authenticate: a\r\n"),
            ("GET / HTTP/1.1", "Proxy-Authorization: a\r\n"),
            ("GET / HTTP/1.1", "Proxy-Connection: close\r\n"),
            ("GET / HTTP/1.1", "te: trailers\r\n"),
            ("GET / HTTP/1.1", "Trailer: a\r\n"),
            ("POST / HTTP/1.1", "Transfer-Encoding: chunked\r\n"),
            ("GET / HTTP/1.1", "Upgrade: websocket\r\n"),
            ("GET / HTTP/1.1", &"X: y\r\n".repeat(MOST_PLAIN_FIELDS)),
        ] {
            assert!(!plain(line, field), "{line} {field}");
        }
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
}
