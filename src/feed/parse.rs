//! One line of the feed or of a key file → what it says. Pure: no I/O, no clock, no gate.
//!
//! The lines are those of [`crate::wire::FeedLine`]. They are read into the gate's own types straight away,
//! without the wire types in between, because a first snapshot can have millions of them.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, Visitor};

use crate::gate::{KeyUpdate, SecretUpdate};
use crate::wire::default_plan;

/// Longest line accepted, in bytes with its newline. A key with a hundred scopes has some 5 KiB.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// Longest id, organisation, environment, plan or scope, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// What one line of the feed says.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    Snapshot {
        revision: u64,
        keys: u64,
    },
    Key(KeyUpdate),
    Gone {
        revision: u64,
        id: Box<str>,
    },
    End {
        xxh3: u64,
    },
    Heartbeat {
        revision: u64,
    },
    /// A type that this version does not know. Newer control planes may send them; they are passed over.
    Unknown,
}

/// Why a line was not understood. Never quotes the line: a garbled one could hold anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError(String);

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ParseError {}

impl Line {
    /// Reads one line of the feed, with or without its newline.
    pub fn parse(line: &[u8]) -> Result<Line, ParseError> {
        let raw: RawLine = serde_json::from_slice(line).map_err(json_error)?;
        match raw.kind.as_ref().ok_or_else(|| missing("type"))? {
            Kind::Snapshot => Ok(Line::Snapshot {
                revision: raw.feed_revision()?,
                keys: raw.keys.ok_or_else(|| missing("keys"))?,
            }),
            Kind::Key => {
                let revision = raw.feed_revision()?;
                raw.into_key(revision).map(Line::Key)
            }
            Kind::Gone => Ok(Line::Gone {
                revision: raw.feed_revision()?,
                id: checked_name(raw.id, "id")?,
            }),
            Kind::End => {
                let digits = raw.xxh3.as_deref().ok_or_else(|| missing("xxh3"))?;
                let bytes: [u8; 8] = hex(digits).ok_or_else(|| ParseError("\"xxh3\" is not 16 hex digits".into()))?;
                Ok(Line::End {
                    xxh3: u64::from_be_bytes(bytes),
                })
            }
            Kind::Heartbeat => Ok(Line::Heartbeat {
                revision: raw.feed_revision()?,
            }),
            Kind::Unknown => Ok(Line::Unknown),
        }
    }
}

/// Reads one line of a key file: a key line whose `type` and `revision` may be left out.
/// `revision` is the one that this version of the file is given.
pub fn parse_key_file_line(line: &[u8], revision: u64) -> Result<KeyUpdate, ParseError> {
    let raw: RawLine = serde_json::from_slice(line).map_err(json_error)?;
    match raw.kind {
        None | Some(Kind::Key) => {}
        Some(_) => return Err(ParseError("a key file has lines of type \"key\" only".into())),
    }
    let key = raw.into_key(revision)?;
    if key.secrets.is_empty() {
        return Err(ParseError("\"secrets\" is empty: the key could never be used".into()));
    }
    Ok(key)
}

/// All fields of all line types, flat: serde's tagged enums would buffer each line a second time.
#[derive(Deserialize)]
struct RawLine {
    #[serde(rename = "type", default)]
    kind: Option<Kind>,
    #[serde(default)]
    revision: Option<u64>,
    #[serde(default)]
    keys: Option<u64>,
    #[serde(default)]
    xxh3: Option<Box<str>>,
    #[serde(default)]
    id: Option<Box<str>>,
    #[serde(default)]
    organization: Option<Box<str>>,
    #[serde(default)]
    environment: Option<Box<str>>,
    #[serde(default)]
    scopes: Option<Vec<Box<str>>>,
    #[serde(default)]
    plan: Option<Box<str>>,
    #[serde(default)]
    secrets: Option<Vec<RawSecret>>,
    #[serde(default)]
    expires_at: Option<UnixMs>,
    #[serde(default)]
    disabled: Option<bool>,
    #[serde(default)]
    revoked: Option<bool>,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Snapshot,
    Key,
    Gone,
    End,
    Heartbeat,
    #[serde(other)]
    Unknown,
}

#[derive(Deserialize)]
struct RawSecret {
    sha256: Digest,
    #[serde(default)]
    not_after: Option<UnixMs>,
}

impl RawLine {
    fn feed_revision(&self) -> Result<u64, ParseError> {
        self.revision.ok_or_else(|| missing("revision"))
    }

    fn into_key(self, revision: u64) -> Result<KeyUpdate, ParseError> {
        let scopes = self.scopes.unwrap_or_default();
        if scopes.iter().any(|scope| !is_name(scope)) {
            return Err(ParseError(format!("a scope is not 1 to {MAX_NAME_BYTES} bytes long")));
        }
        let organization = self.organization.unwrap_or_default();
        if organization.len() > MAX_NAME_BYTES {
            return Err(ParseError(format!(
                "\"organization\" is longer than {MAX_NAME_BYTES} bytes"
            )));
        }
        let plan = match self.plan {
            Some(plan) => checked_name(Some(plan), "plan")?,
            None => default_plan().into_boxed_str(),
        };
        let secrets = self.secrets.ok_or_else(|| missing("secrets"))?;
        Ok(KeyUpdate {
            revision,
            id: checked_name(self.id, "id")?,
            organization,
            environment: checked_name(self.environment, "environment")?,
            scopes,
            plan,
            secrets: secrets
                .into_iter()
                .map(|secret| SecretUpdate {
                    digest: secret.sha256.0,
                    not_after_ms: secret.not_after.map(|at| at.0),
                })
                .collect(),
            expires_at_ms: self.expires_at.map(|at| at.0),
            disabled: self.disabled.unwrap_or(false),
            revoked: self.revoked.unwrap_or(false),
        })
    }
}

/// Whether it is as long as a name may be.
pub(super) fn is_name(text: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&text.len())
}

fn checked_name(name: Option<Box<str>>, field: &str) -> Result<Box<str>, ParseError> {
    let name = name.ok_or_else(|| missing(field))?;
    if !is_name(&name) {
        return Err(ParseError(format!(
            "\"{field}\" is not 1 to {MAX_NAME_BYTES} bytes long"
        )));
    }
    Ok(name)
}

fn missing(field: &str) -> ParseError {
    ParseError(format!("\"{field}\" is missing"))
}

/// serde's messages can quote the value they stumbled on, which may be a digest or worse: only what is known
/// to be harmless is kept.
fn json_error(error: serde_json::Error) -> ParseError {
    let message = error.to_string();
    let what = match error.classify() {
        serde_json::error::Category::Eof => "the line is cut off".to_owned(),
        serde_json::error::Category::Data if !message.starts_with("invalid ") => {
            message.split(" at line ").next().unwrap_or_default().to_owned()
        }
        serde_json::error::Category::Data => "a field has the wrong type".to_owned(),
        _ => "not JSON".to_owned(),
    };
    ParseError(format!("{what} (column {})", error.column()))
}

/// A SHA-256 digest, from 64 hex digits.
struct Digest([u8; 32]);

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Hex;
        impl Visitor<'_> for Hex {
            type Value = Digest;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("64 hex digits")
            }
            fn visit_str<E: serde::de::Error>(self, digits: &str) -> Result<Digest, E> {
                hex(digits)
                    .map(Digest)
                    .ok_or_else(|| E::custom("\"sha256\" is not 64 hex digits"))
            }
        }
        deserializer.deserialize_str(Hex)
    }
}

/// An instant, from RFC 3339.
struct UnixMs(i64);

impl<'de> Deserialize<'de> for UnixMs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Rfc3339;
        impl Visitor<'_> for Rfc3339 {
            type Value = UnixMs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an RFC 3339 time")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<UnixMs, E> {
                unix_ms(text)
                    .map(UnixMs)
                    .ok_or_else(|| E::custom("a time is not RFC 3339, such as 2026-11-24T10:00:00.000Z"))
            }
        }
        deserializer.deserialize_str(Rfc3339).map_err(D::Error::custom)
    }
}

/// An RFC 3339 time in Unix milliseconds, rounded down, so that a key never outlives its date.
pub(super) fn unix_ms(text: &str) -> Option<i64> {
    let at = text.parse::<jiff::Timestamp>().ok()?;
    Some(at.as_nanosecond().div_euclid(1_000_000) as i64)
}

/// Exactly 2·N hex digits of either case.
pub(super) fn hex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let digits = digits.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0_u8; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let (high, low) = (HEX_VALUE[usize::from(pair[0])], HEX_VALUE[usize::from(pair[1])]);
        if high > 15 || low > 15 {
            return None;
        }
        *byte = high << 4 | low;
    }
    Some(bytes)
}

/// The value of each ASCII hex digit; 255 for every other byte.
const HEX_VALUE: [u8; 256] = {
    let mut table = [255_u8; 256];
    let mut i = 0;
    while i < 10 {
        table[b'0' as usize + i] = i as u8;
        i += 1;
    }
    while i < 16 {
        table[b'a' as usize + i - 10] = i as u8;
        table[b'A' as usize + i - 10] = i as u8;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{FeedLine, KeyLine, SecretLine};

    fn wire_key() -> KeyLine {
        KeyLine {
            revision: 17,
            id: "key_1".into(),
            organization: "org_1".into(),
            environment: "live".into(),
            scopes: vec!["permissions:check".into(), "with \"quotes\" and \u{fc}".into()],
            plan: "starter".into(),
            secrets: vec![
                SecretLine {
                    sha256: "0123456789abcdef".repeat(4),
                    not_after: None,
                },
                SecretLine {
                    sha256: "FF".repeat(32),
                    not_after: Some("2026-11-24T10:00:00.123Z".into()),
                },
            ],
            expires_at: Some("2027-01-01T00:00:00.000Z".into()),
            disabled: true,
            revoked: false,
        }
    }

    fn parse_wire(line: &FeedLine) -> Line {
        Line::parse(&serde_json::to_vec(line).unwrap()).unwrap()
    }

    #[test]
    fn every_line_of_the_wire_is_understood() {
        assert_eq!(
            parse_wire(&FeedLine::Snapshot { revision: 3, keys: 2 }),
            Line::Snapshot { revision: 3, keys: 2 }
        );
        assert_eq!(
            parse_wire(&FeedLine::Gone {
                revision: 4,
                id: "key_9".into()
            }),
            Line::Gone {
                revision: 4,
                id: "key_9".into()
            }
        );
        assert_eq!(
            parse_wire(&FeedLine::Heartbeat { revision: 4 }),
            Line::Heartbeat { revision: 4 }
        );
        assert_eq!(
            parse_wire(&FeedLine::End {
                xxh3: format!("{:016x}", 0xabc)
            }),
            Line::End { xxh3: 0xabc }
        );
        let Line::Key(key) = parse_wire(&FeedLine::Key(wire_key())) else {
            panic!("not a key")
        };
        assert_eq!(
            (key.revision, &*key.id, &*key.organization, &*key.plan),
            (17, "key_1", "org_1", "starter")
        );
        assert_eq!(key.scopes[1].as_ref(), "with \"quotes\" and \u{fc}");
        assert_eq!(key.secrets[0].digest[..3], [0x01, 0x23, 0x45]);
        assert_eq!(key.secrets[0].not_after_ms, None);
        assert_eq!(key.secrets[1].not_after_ms, Some(1_795_514_400_123));
        assert_eq!(key.expires_at_ms, Some(1_798_761_600_000));
        assert!(key.disabled && !key.revoked);
    }

    #[test]
    fn an_unknown_type_is_passed_over_and_an_unknown_field_too() {
        assert_eq!(
            Line::parse(br#"{"type":"weather","revision":"sunny"}"#)
                .unwrap_err()
                .to_string(),
            "a field has the wrong type (column 36)"
        );
        assert_eq!(Line::parse(br#"{"type":"weather","sunny":[1,{}]}"#), Ok(Line::Unknown));
        assert_eq!(
            Line::parse(br#"{"type":"heartbeat","revision":1,"new":null}"#),
            Ok(Line::Heartbeat { revision: 1 })
        );
    }

    #[test]
    fn what_is_wrong_is_said_without_quoting_the_line() {
        for (line, message) in [
            (
                r#"{"type":"key","revision":1,"id":"k","environment":"live"}"#,
                "\"secrets\" is missing",
            ),
            (
                r#"{"type":"key","id":"k","environment":"live","secrets":[]}"#,
                "\"revision\" is missing",
            ),
            (
                r#"{"type":"key","revision":1,"environment":"live","secrets":[]}"#,
                "\"id\" is missing",
            ),
            (
                r#"{"type":"key","revision":1,"id":"","environment":"live","secrets":[]}"#,
                "\"id\" is not 1 to 255 bytes long",
            ),
            (r#"{"revision":1}"#, "\"type\" is missing"),
            (r#"{"type":"end","xxh3":"12"}"#, "\"xxh3\" is not 16 hex digits"),
            (
                r#"{"type":"end","xxh3":"zzzzzzzzzzzzzzzz"}"#,
                "\"xxh3\" is not 16 hex digits",
            ),
            (
                r#"{"type":"heartbeat","revision":-1}"#,
                "a field has the wrong type (column 33)",
            ),
            (r#"{"type":"heartbeat","revis"#, "the line is cut off (column 26)"),
            ("<html>", "not JSON (column 1)"),
            ("", "the line is cut off (column 0)"),
        ] {
            assert_eq!(Line::parse(line.as_bytes()).unwrap_err().to_string(), message, "{line}");
        }
        let secret = "5ecre7".repeat(11);
        let line =
            format!(r#"{{"type":"key","revision":1,"id":"k","environment":"e","secrets":[{{"sha256":"{secret}"}}]}}"#);
        let message = Line::parse(line.as_bytes()).unwrap_err().to_string();
        assert!(
            message.starts_with("\"sha256\" is not 64 hex digits") && !message.contains("5ecre7"),
            "{message}"
        );
    }

    #[test]
    fn a_key_file_line_may_leave_out_what_has_a_default() {
        let line = format!(
            r#"{{"id":"k","environment":"live","secrets":[{{"sha256":"{}"}}]}}"#,
            "ab".repeat(32)
        );
        let key = parse_key_file_line(line.as_bytes(), 5).unwrap();
        assert_eq!(
            (key.revision, &*key.plan, &*key.organization, key.scopes.len()),
            (5, "starter", "", 0)
        );
        let empty = parse_key_file_line(br#"{"id":"k","environment":"live","secrets":[]}"#, 5).unwrap_err();
        assert_eq!(empty.to_string(), "\"secrets\" is empty: the key could never be used");
        let gone = parse_key_file_line(br#"{"type":"gone","revision":1,"id":"k"}"#, 5).unwrap_err();
        assert_eq!(gone.to_string(), "a key file has lines of type \"key\" only");
    }
}
