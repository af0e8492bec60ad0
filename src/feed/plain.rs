//! A key's line in just the form in which the control plane writes it, read in one pass.
//!
//! A snapshot has millions of such lines, and a JSON parser takes as long for one as all the rest of the way into the gate.
//! Whatever deviates from the form, by a space or an escape, is not read here: [`Line::parse`](super::parse::Line::parse)
//! says what it means. What is read here is what that would have read.

use super::parse::{hex, is_name, unix_ms};
use super::record::{set, set_scope};
use crate::gate::{KeyUpdate, SecretUpdate};

/// Reads a key's line into `key`, whose texts stay where they are if they are the same: environment, plan and scopes are,
/// mostly. `None`: the line has another form, and what `key` says then is of no use.
pub fn read_key(line: &[u8], key: &mut KeyUpdate) -> Option<()> {
    let mut rest = Rest(line);
    rest.skip(br#"{"type":"key","revision":"#)?;
    key.revision = rest.number()?;
    rest.skip(br#","id":"#)?;
    set(&mut key.id, rest.name()?);
    rest.skip(br#","organization":"#)?;
    let organization = rest.text()?;
    if !organization.is_empty() && !is_name(organization) {
        return None;
    }
    set(&mut key.organization, organization);
    rest.skip(br#","environment":"#)?;
    set(&mut key.environment, rest.name()?);
    rest.skip(br#","scopes":["#)?;
    let mut scopes = 0;
    while !rest.ends_list(scopes)? {
        set_scope(key, scopes, rest.name()?);
        scopes += 1;
    }
    key.scopes.truncate(scopes);
    rest.skip(br#","plan":"#)?;
    set(&mut key.plan, rest.name()?);
    rest.skip(br#","secrets":["#)?;
    key.secrets.clear();
    while !rest.ends_list(key.secrets.len())? {
        key.secrets.push(rest.secret()?);
    }
    rest.skip(br#","expires_at":"#)?;
    key.expires_at_ms = match rest.skip(b"null") {
        Some(()) => None,
        None => Some(unix_ms(rest.text()?)?),
    };
    rest.skip(br#","disabled":"#)?;
    key.disabled = rest.truth()?;
    rest.skip(br#","revoked":"#)?;
    key.revoked = rest.truth()?;
    rest.skip(b"}")?;
    matches!(rest.0, b"" | b"\n").then_some(())
}

/// What is left of a line.
struct Rest<'l>(&'l [u8]);

impl<'l> Rest<'l> {
    fn skip(&mut self, text: &[u8]) -> Option<()> {
        self.0 = self.0.strip_prefix(text)?;
        Some(())
    }

    fn take(&mut self, count: usize) -> Option<&'l [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u64> {
        let count = self.0.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let digits = self.take(count)?;
        // JSON knows no leading zeros.
        if digits.starts_with(b"0") && count > 1 {
            return None;
        }
        str::from_utf8(digits).ok()?.parse().ok()
    }

    /// A text in quotes, of printable ASCII that needs no escape.
    fn text(&mut self) -> Option<&'l str> {
        self.skip(b"\"")?;
        let count = self
            .0
            .iter()
            .take_while(|byte| (b' '..=b'~').contains(byte) && !matches!(byte, b'"' | b'\\'))
            .count();
        let text = self.take(count)?;
        self.skip(b"\"")?;
        str::from_utf8(text).ok()
    }

    fn name(&mut self) -> Option<&'l str> {
        self.text().filter(|text| is_name(text))
    }

    fn truth(&mut self) -> Option<bool> {
        match self.skip(b"false") {
            Some(()) => Some(false),
            None => self.skip(b"true").map(|()| true),
        }
    }

    fn secret(&mut self) -> Option<SecretUpdate> {
        self.skip(br#"{"sha256":""#)?;
        let digest = hex(str::from_utf8(self.take(64)?).ok()?)?;
        self.skip(b"\"")?;
        let not_after_ms = match self.skip(br#","not_after":"#) {
            Some(()) => Some(unix_ms(self.text()?)?),
            None => None,
        };
        self.skip(b"}")?;
        Some(SecretUpdate { digest, not_after_ms })
    }

    /// Whether a list ends here, of which so many members were read; if not, its next one begins here.
    fn ends_list(&mut self, members: usize) -> Option<bool> {
        if self.skip(b"]").is_some() {
            return Some(true);
        }
        if members > 0 {
            self.skip(b",")?;
        }
        Some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::{Line, ParseError};
    use super::*;
    use crate::wire::{FeedLine, KeyLine, SecretLine};
    use proptest::prelude::*;

    fn empty() -> KeyUpdate {
        KeyUpdate {
            revision: 0,
            id: "another".into(),
            organization: "another".into(),
            environment: "another".into(),
            scopes: vec!["another".into(), "a:b".into(), "c".into()],
            plan: "another".into(),
            secrets: vec![],
            expires_at_ms: Some(1),
            disabled: true,
            revoked: true,
        }
    }

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![6 => "[a-z:_0-9 ]{1,20}", 1 => "[a-z\"\\\\\u{e9}]{0,4}", 1 => "[a-z]{254,257}"]
    }

    fn date() -> impl Strategy<Value = Option<String>> {
        prop_oneof![
            3 => Just(None),
            3 => Just(Some("2026-11-24T10:00:00.123Z".to_owned())),
            1 => Just(Some("tomorrow".to_owned())),
        ]
    }

    prop_compose! {
        fn key_line()(
            (revision, id, organization, environment) in (any::<u64>(), name(), name(), name()),
            scopes in prop::collection::vec(name(), 0..4),
            plan in name(),
            secrets in prop::collection::vec(("[0-9a-fA-F]{64}", date()), 0..3),
            expires_at in date(),
            (disabled, revoked) in any::<(bool, bool)>(),
        ) -> KeyLine {
            let secret = |(sha256, not_after)| SecretLine { sha256, not_after };
            let secrets = secrets.into_iter().map(secret).collect();
            KeyLine { revision, id, organization, environment, scopes, plan, secrets, expires_at, disabled, revoked }
        }
    }

    /// As the JSON parser has it.
    fn parsed(line: &[u8]) -> Result<KeyUpdate, Option<ParseError>> {
        match Line::parse(line) {
            Ok(Line::Key(key)) => Ok(key),
            Ok(_) => Err(None),
            Err(error) => Err(Some(error)),
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_the_json_parser_reads(line in key_line(), at in any::<prop::sample::Index>(), by in any::<u8>()) {
            let mut line = serde_json::to_vec(&FeedLine::Key(line)).unwrap();
            line.push(b'\n');
            let mut key = empty();
            if read_key(&line, &mut key).is_some() {
                prop_assert!(parsed(&line).as_ref() == Ok(&key));
            } else {
                // A text that needs an escape, or something that is no key at all.
                let escaped = line.iter().any(|byte| *byte == b'\\' || !byte.is_ascii());
                prop_assert!(escaped || parsed(&line).is_err());
            }
            let at = at.index(line.len());
            line[at] = by;
            if read_key(&line, &mut key).is_some() {
                prop_assert!(parsed(&line).as_ref() == Ok(&key));
            }
            // All but the newline, which may be missing, is needed.
            prop_assert!(read_key(&line[..at.min(line.len() - 2)], &mut key).is_none());
        }
    }

    #[test]
    fn a_space_makes_it_another_form() {
        let line = format!(
            r#"{{"type":"key","revision":7,"id":"k","organization":"o","environment":"live","scopes":[],"plan":"p","secrets":[{{"sha256":"{}"}}],"expires_at":null,"disabled":false,"revoked":false}}"#,
            "0a".repeat(32)
        );
        let mut key = empty();
        assert_eq!(read_key(line.as_bytes(), &mut key), Some(()));
        assert!(parsed(line.as_bytes()).as_ref() == Ok(&key) && key.secrets[0].digest == [10; 32]);
        assert_eq!(read_key(line.replace(":7", ": 7").as_bytes(), &mut key), None);
        assert_eq!(read_key(line.replace(":7", ":07").as_bytes(), &mut key), None);
        assert_eq!(read_key(format!("{line} ").as_bytes(), &mut key), None);
    }
}
