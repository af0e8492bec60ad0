//! A request as a line of bytes, written in place: no tree, no text in between.

use std::fmt::{self, Display, Formatter};
use std::io::Write as _;
use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Serialize, Serializer};

/// The form of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One JSON object.
    Json,
    /// `TIME CLIENT "METHOD PATH" STATUS CODE KEY TIER DURATION REQUEST-ID`.
    Text,
}

/// What is said of one request. The fields of a JSON line come in this order, that of their names.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry<'a> {
    /// Bytes of the response's body.
    pub bytes_sent: usize,
    /// Whom it came from, where that is known.
    #[serde(serialize_with = "address")]
    pub client: Option<IpAddr>,
    /// `PASSED`, or the code of the refusal.
    pub decision: &'a str,
    /// From the head to the end of the response.
    pub duration_us: u64,
    /// Its host.
    pub host: &'a str,
    /// The key's id, or empty.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub key_id: &'a str,
    /// Its method.
    pub method: &'a str,
    /// The organisation, or empty.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub organization: &'a str,
    /// Its path, without the query.
    pub path: &'a str,
    /// Its id.
    pub request_id: &'a str,
    /// The rule it fell under.
    pub route: &'a str,
    /// The response's status; 0 where none was sent.
    pub status: u16,
    /// The tier it was counted in, or empty.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub tier: &'a str,
    /// When it came, Unix milliseconds.
    #[serde(rename = "time", serialize_with = "time")]
    pub unix_ms: i64,
    /// W3C trace context, or empty.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub traceparent: &'a str,
    /// Of which the upstream took.
    pub upstream_us: u64,
}

impl Entry<'_> {
    /// Appends the line, its end included: the only line feed in it.
    pub(super) fn append_to(&self, line: &mut Vec<u8>, format: Format) {
        let appended = match format {
            Format::Json => serde_json::to_writer(&mut *line, self).map_err(Into::into),
            Format::Text => self.append_text(line),
        };
        appended.expect("a vector takes every byte, and an entry has nothing that JSON cannot say");
        line.push(b'\n');
    }

    fn append_text(&self, line: &mut Vec<u8>) -> std::io::Result<()> {
        write!(line, "{} ", Time(self.unix_ms))?;
        if let Some(client) = self.client {
            write!(line, "{client}")?;
        }
        write!(
            line,
            " \"{} {}\" {} {} {} {} {}us {}",
            self.method.escape_debug(),
            self.path.escape_debug(),
            self.status,
            self.decision,
            OrDash(self.key_id),
            OrDash(self.tier),
            self.duration_us,
            self.request_id
        )
    }
}

fn address<S: Serializer>(client: &Option<IpAddr>, serializer: S) -> Result<S::Ok, S::Error> {
    match client {
        Some(client) => client.serialize(serializer),
        None => serializer.serialize_str(""),
    }
}

fn time<S: Serializer>(unix_ms: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Time(*unix_ms))
}

/// Unix milliseconds as RFC 3339 has them, or the bare number beyond the year 9999.
struct Time(i64);

impl Display for Time {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        match Timestamp::from_millisecond(self.0) {
            Ok(time) => write!(to, "{time:.3}"),
            Err(_) => self.0.fmt(to),
        }
    }
}

/// A word that may be missing, so that columns stay where they are.
struct OrDash<'a>(&'a str);

impl Display for OrDash<'_> {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            to.write_str("-")
        } else {
            self.0.escape_debug().fmt(to)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(entry: &Entry<'_>, format: Format) -> String {
        let mut line = vec![];
        entry.append_to(&mut line, format);
        String::from_utf8(line).unwrap()
    }

    const FULL: Entry<'_> = Entry {
        bytes_sent: 36,
        client: Some(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1))),
        decision: "PASSED",
        duration_us: 5,
        host: "h\u{7f}é",
        key_id: "key_1",
        method: "GET",
        organization: "org",
        path: "/a\"b\\\u{1}\n/é",
        request_id: "r1",
        route: "things",
        status: 200,
        tier: "default",
        unix_ms: 1_795_470_245_123,
        traceparent: "00-1-2-01",
        upstream_us: 3,
    };

    const BARE: Entry<'_> = Entry {
        bytes_sent: 0,
        client: None,
        decision: "BAD_REQUEST",
        duration_us: 0,
        host: "",
        key_id: "",
        method: "-",
        organization: "",
        path: "-",
        request_id: "r2",
        route: "",
        status: 400,
        tier: "",
        unix_ms: i64::MAX,
        traceparent: "",
        upstream_us: 0,
    };

    #[test]
    fn a_json_line_has_these_bytes() {
        assert_eq!(
            line(&FULL, Format::Json),
            concat!(
                r#"{"bytesSent":36,"client":"192.0.2.1","decision":"PASSED","durationUs":5,"host":"h"#,
                "\u{7f}",
                r#"é","keyId":"key_1","method":"GET","organization":"org","path":"/a\"b\\\u0001\n/é","requestId":"r1","#,
                r#""route":"things","status":200,"tier":"default","time":"2026-11-23T21:44:05.123Z","#,
                r#""traceparent":"00-1-2-01","upstreamUs":3}"#,
                "\n"
            )
        );
        assert_eq!(
            line(&BARE, Format::Json),
            concat!(
                r#"{"bytesSent":0,"client":"","decision":"BAD_REQUEST","durationUs":0,"host":"","method":"-","path":"-","#,
                r#""requestId":"r2","route":"","status":400,"time":"9223372036854775807","upstreamUs":0}"#,
                "\n"
            )
        );
    }

    #[test]
    fn a_text_line_has_these_bytes() {
        assert_eq!(
            line(&FULL, Format::Text),
            "2026-11-23T21:44:05.123Z 192.0.2.1 \"GET /a\\\"b\\\\\\u{1}\\n/é\" 200 PASSED key_1 default 5us r1\n"
        );
        assert_eq!(
            line(&BARE, Format::Text),
            "9223372036854775807  \"- -\" 400 BAD_REQUEST - - 0us r2\n"
        );
    }

    #[test]
    fn an_address_is_written_as_it_is_said() {
        for address in ["::1", "2001:db8::7", "::ffff:192.0.2.1"] {
            let client = Some(address.parse().unwrap());
            let json = line(&Entry { client, ..FULL }, Format::Json);
            assert!(json.contains(&format!("\"client\":\"{address}\"")), "{json}");
        }
    }
}
