//! Milliseconds since the Unix epoch, and how they are written: RFC 3339 in UTC with milliseconds.

use jiff::Timestamp;

/// The last instant that is taken, 9999-12-30T00:00:00Z, in milliseconds: it can be written with any offset.
pub const LAST_MS: i64 = 253_402_128_000_000;

/// `2026-11-24T10:00:00.000Z`.
pub fn rfc3339(unix_ms: i64) -> String {
    match Timestamp::from_millisecond(unix_ms.clamp(0, LAST_MS)) {
        Ok(timestamp) => format!("{timestamp:.3}"),
        // Clamped above, so this cannot be reached; a wrong date would be worse than an early one.
        Err(_) => "1970-01-01T00:00:00.000Z".to_owned(),
    }
}

/// Reads an RFC 3339 date with any offset; parts of a millisecond are cut off.
pub fn parse(text: &str) -> Option<i64> {
    // RFC 3339 wants the offset in full; jiff would also take other forms, such as a name in brackets.
    if text.len() > 40 || text.contains(['[', ']']) {
        return None;
    }
    text.parse::<Timestamp>()
        .ok()
        .map(|t| t.as_millisecond())
        .filter(|ms| (0..=LAST_MS).contains(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_with_milliseconds_and_read_back() {
        assert_eq!(rfc3339(1_795_514_400_000), "2026-11-24T10:00:00.000Z");
        assert_eq!(rfc3339(1_795_514_400_007), "2026-11-24T10:00:00.007Z");
        assert_eq!(parse("2026-11-24T10:00:00.007Z"), Some(1_795_514_400_007));
        assert_eq!(parse("2026-11-24T11:00:00+01:00"), Some(1_795_514_400_000));
        assert_eq!(parse(&rfc3339(LAST_MS)), Some(LAST_MS));
        assert_eq!(parse("2026-11-24"), None);
        assert_eq!(parse("tomorrow"), None);
    }
}
