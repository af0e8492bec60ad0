//! The head of an upstream's answer that is plain.

use http::StatusCode;
use httparse::Header;
use std::mem::MaybeUninit;

/// An answer that can be passed on without a second thought: HTTP/1.1, final, whole in its head, and of one length.
#[derive(Debug)]
pub(super) struct Plain<'a> {
    pub status: StatusCode,
    pub reason: &'a str,
    pub fields: &'a [Header<'a>],
    /// Of the body, in bytes.
    pub length: u64,
    /// The server keeps the connection.
    pub keeps: bool,
    /// Of the head, in bytes.
    pub head_bytes: usize,
}

/// Room for the fields of a plain answer: more are not plain. On the stack, 32 bytes each.
pub(super) type Room<'a> = [MaybeUninit<Header<'a>>; MOST_FIELDS];

/// Room that nothing has to be done for.
pub(super) const fn room<'a>() -> Room<'a> {
    [const { MaybeUninit::uninit() }; MOST_FIELDS]
}

impl<'a> Plain<'a> {
    /// The answer at the front of what was read, if it is plain.
    pub fn of(read: &'a [u8], room: &'a mut Room<'a>) -> Option<Self> {
        let mut head = httparse::Response::new(&mut []);
        // Strictly: what needs forbearance (folded lines, spaces before a colon) is not plain.
        let parsed = httparse::ParserConfig::default()
            .parse_response_with_uninit_headers(&mut head, read, room)
            .ok()?;
        let httparse::Status::Complete(head_bytes) = parsed else {
            return None;
        };
        let status = StatusCode::from_u16(head.code?).ok()?;
        if head.version != Some(1) || status.is_informational() {
            return None;
        }
        let fields: &'a [Header<'a>] = head.headers;
        let (mut length, mut keeps) = (None, true);
        for field in fields {
            match field.name.len() {
                17 if field.name.eq_ignore_ascii_case("transfer-encoding") => return None,
                14 if field.name.eq_ignore_ascii_case("content-length") => {
                    let more_than_one = length.replace(decimal(field.value)?).is_some();
                    if more_than_one {
                        return None;
                    }
                }
                10 if field.name.eq_ignore_ascii_case("connection") => {
                    keeps &= field.value.eq_ignore_ascii_case(b"keep-alive");
                }
                _ => {}
            }
        }
        let length = match status {
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => 0,
            _ => length?,
        };
        Some(Plain {
            status,
            reason: head.reason?,
            fields,
            length,
            keeps,
            head_bytes,
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

const MOST_FIELDS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    /// Length, whether the connection is kept, and what is behind the head.
    fn read(text: &str) -> Option<(u64, bool, String)> {
        let sent = text.replace('\n', "\r\n");
        let mut room = room();
        let plain = Plain::of(sent.as_bytes(), &mut room)?;
        Some((plain.length, plain.keeps, sent[plain.head_bytes..].to_owned()))
    }

    #[test]
    fn a_plain_answer_is_read_whole() {
        let sent =
            "HTTP/1.1 404 Nothing Here\r\nContent-Type: a/b\r\nX-One: 1 \r\nx-one: 2\r\nContent-Length: 3\r\n\r\nabcd";
        let mut room = room();
        let plain = Plain::of(sent.as_bytes(), &mut room).unwrap();
        assert_eq!((plain.status.as_u16(), plain.reason), (404, "Nothing Here"));
        assert_eq!(
            (plain.length, plain.keeps, &sent[plain.head_bytes..]),
            (3, true, "abcd")
        );
        let fields: Vec<_> = plain.fields.iter().map(|field| (field.name, field.value)).collect();
        assert_eq!(
            fields,
            [
                ("Content-Type", &b"a/b"[..]),
                ("X-One", b"1"),
                ("x-one", b"2"),
                ("Content-Length", b"3")
            ]
        );
        for (text, keeps) in [("close", false), ("Keep-Alive", true), ("keep-alive, close", false)] {
            let read = read(&format!("HTTP/1.1 200 OK\nConnection: {text}\nContent-Length: 0\n\n")).unwrap();
            assert_eq!(read.1, keeps, "{text}");
        }
        assert_eq!(read("HTTP/1.1 204 No Content\n\n").unwrap().0, 0);
        let not_modified = read("HTTP/1.1 304 Not Modified\nContent-Length: 1000\n\n").unwrap();
        assert_eq!(not_modified.0, 0);
        assert_eq!(read("HTTP/1.1 200 \nContent-Length: 0\n\n").unwrap().0, 0, "no reason");
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
