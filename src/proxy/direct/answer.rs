//! The head of a response that is plain.

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, response};
use std::mem::MaybeUninit;

/// A response that can be passed on without a second thought: HTTP/1.1, final, whole in its head, and of one length.
#[derive(Debug)]
pub(super) struct Plain {
    pub parts: response::Parts,
    /// Where it is not the status code's own.
    pub reason: Option<String>,
    /// Of the body, in bytes.
    pub length: u64,
    /// The server keeps the connection.
    pub keeps: bool,
    /// Of the head, in bytes.
    pub head_len: usize,
}

impl Plain {
    /// The response at the front of what was read, if it is plain. `room`: for how many more fields.
    pub fn of(read: &Bytes, room: usize) -> Option<Self> {
        let mut fields = [const { MaybeUninit::uninit() }; MOST_FIELDS];
        let mut head = httparse::Response::new(&mut []);
        // Strictly: what needs forbearance (folded lines, spaces before a colon) is not plain.
        let parsed = httparse::ParserConfig::default()
            .parse_response_with_uninit_headers(&mut head, read, &mut fields)
            .ok()?;
        let httparse::Status::Complete(head_len) = parsed else {
            return None;
        };
        let status = StatusCode::from_u16(head.code?).ok()?;
        if head.version != Some(1) || status.is_informational() {
            return None;
        }
        let mut parts = Response::new(()).into_parts().0;
        parts.status = status;
        parts.headers = HeaderMap::with_capacity(head.headers.len() + room);
        let mut length = None;
        let mut keeps = true;
        for field in head.headers.iter() {
            let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
            if name == TRANSFER_ENCODING {
                return None;
            } else if name == CONTENT_LENGTH {
                let one = decimal(field.value)?;
                if length.replace(one).is_some() {
                    return None;
                }
            } else if name == CONNECTION {
                // It stays in its place, where Pingora writes what holds for the client.
                keeps &= field.value.eq_ignore_ascii_case(b"keep-alive");
            }
            // Shares what was read.
            let value = HeaderValue::from_maybe_shared(read.slice_ref(field.value)).ok()?;
            parts.headers.append(name, value);
        }
        let length = match status {
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => 0,
            _ => length?,
        };
        let reason = head.reason.filter(|reason| Some(*reason) != status.canonical_reason());
        Some(Plain {
            reason: reason.map(str::to_owned),
            parts,
            length,
            keeps,
            head_len,
        })
    }
}

/// Digits and nothing else (RFC 9110 section 8.6).
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// More are not plain. On the stack, 32 bytes each.
const MOST_FIELDS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Bytes {
        Bytes::from(text.replace('\n', "\r\n"))
    }

    fn read(text: &str) -> Option<Plain> {
        Plain::of(&bytes(text), 0)
    }

    #[test]
    fn a_plain_response_is_read_whole() {
        let sent = bytes("HTTP/1.1 200 OK\nContent-Type: a/b\nX-One: 1\nx-one: 2\nContent-Length: 3\n\nabcd");
        let plain = Plain::of(&sent, 0).unwrap();
        assert_eq!((plain.length, plain.keeps, plain.reason), (3, true, None));
        assert_eq!(&sent[plain.head_len..], b"abcd");
        let fields: Vec<_> = plain
            .parts
            .headers
            .iter()
            .map(|(n, v)| (n.as_str(), v.to_str().unwrap()))
            .collect();
        assert_eq!(
            fields,
            [
                ("content-type", "a/b"),
                ("x-one", "1"),
                ("x-one", "2"),
                ("content-length", "3")
            ]
        );
        for (text, keeps) in [("close", false), ("Keep-Alive", true), ("keep-alive, close", false)] {
            let plain = read(&format!("HTTP/1.1 200 OK\nConnection: {text}\nContent-Length: 0\n\n")).unwrap();
            assert_eq!(plain.keeps, keeps, "{text}");
        }
        let other = read("HTTP/1.1 404 Nothing Here\nContent-Length: 0\n\n").unwrap();
        assert_eq!(
            (other.parts.status.as_u16(), other.reason.as_deref()),
            (404, Some("Nothing Here"))
        );
        assert_eq!(read("HTTP/1.1 204 No Content\n\n").unwrap().length, 0);
        assert_eq!(
            read("HTTP/1.1 304 Not Modified\nContent-Length: 1000\n\n")
                .unwrap()
                .length,
            0
        );
    }

    #[test]
    fn what_could_mean_two_things_is_not_plain() {
        for head in [
            "HTTP/1.0 200 OK\nContent-Length: 0",
            "HTTP/1.1 100 Continue",
            "HTTP/1.1 101 Switching Protocols\nContent-Length: 0",
            "HTTP/1.1 200 OK",
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked",
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nContent-Length: 0",
            "HTTP/1.1 204 No Content\nTransfer-Encoding: chunked",
            "HTTP/1.1 200 OK\nContent-Length: 0\nContent-Length: 0",
            "HTTP/1.1 200 OK\nContent-Length: 0, 0",
            "HTTP/1.1 200 OK\nContent-Length: +1",
            "HTTP/1.1 200 OK\nContent-Length: -1",
            "HTTP/1.1 200 OK\nContent-Length: 0x1",
            "HTTP/1.1 200 OK\nContent-Length:",
            "HTTP/1.1 200 OK\nContent-Length: 18446744073709551616",
            "HTTP/1.1 204 No Content\nContent-Length: a",
            "HTTP/1.1 200 OK\nContent-Length : 0",
            "HTTP/1.1 200 OK\nX-Folded: a\n b\nContent-Length: 0",
            "HTTP/1.1 200 OK\nX Y: a\nContent-Length: 0",
            "HTTP/1.1 99 Low\nContent-Length: 0",
            "HTTP/2 200 OK\nContent-Length: 0",
            "nonsense",
        ] {
            assert!(read(&format!("{head}\n\n")).is_none(), "{head}");
        }
        assert!(read("HTTP/1.1 200 OK\nContent-Length: 0\n").is_none(), "not whole");
        let many: String = (0..=MOST_FIELDS).map(|n| format!("x-{n}: 1\n")).collect();
        assert!(read(&format!("HTTP/1.1 200 OK\nContent-Length: 0\n{many}\n")).is_none());
    }
}
