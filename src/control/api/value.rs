//! Small values of the wire: dates, and the marks of pages.

use serde::{Serialize, Serializer};
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, SchemaFormat, SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::control::time::rfc3339;

/// A point in time: milliseconds since the epoch here, RFC 3339 in UTC with milliseconds on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date(pub i64);

impl Serialize for Date {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&rfc3339(self.0))
    }
}

impl PartialSchema for Date {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(SchemaType::new(Type::String))
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)))
            .examples([serde_json::json!("2026-11-24T10:00:00.000Z")])
            .into()
    }
}

impl ToSchema for Date {}

/// The mark of where a page ended: opaque to clients, `value` and `id` of its last entry to us.
pub fn cursor(value: &str, id: &str) -> String {
    crate::control::secret::hex(format!("{value}\n{id}").as_bytes())
}

/// Reads a mark back.
pub fn read_cursor(text: &str) -> Option<(String, String)> {
    if text.is_empty() || text.len() > 1_024 || !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    let bytes: Option<Vec<u8>> = text
        .as_bytes()
        .chunks(2)
        .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
        .collect();
    let text = String::from_utf8(bytes?).ok()?;
    let (value, id) = text.rsplit_once('\n')?;
    Some((value.to_owned(), id.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_come_back_and_nonsense_does_not() {
        let text = cursor("a \u{e9} name", "key_1");
        assert_eq!(
            read_cursor(&text),
            Some(("a \u{e9} name".to_owned(), "key_1".to_owned()))
        );
        for bad in ["", "0", "zz", "ff", "616263"] {
            assert_eq!(read_cursor(bad), None, "{bad}");
        }
    }
}
