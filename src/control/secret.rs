//! Minting of everything that must not be guessed: API keys, access tokens, session cookies, ids.

use std::fmt;

use sha2::{Digest as _, Sha256};

use super::model::Fault;
use crate::gate::key::{BASE62, checksum};

/// A string that may be shown once and is otherwise never written anywhere. `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The string itself, for the one answer that shows it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What is stored in its place.
    pub fn digest(&self) -> Digest {
        digest(&self.0)
    }

    /// What lists show of it.
    pub fn last_four(&self) -> String {
        self.0[self.0.len() - 4..].to_owned()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// SHA-256 of a secret.
pub type Digest = [u8; 32];

/// The digest of what somebody presents.
pub fn digest(presented: &str) -> Digest {
    Sha256::digest(presented.as_bytes()).into()
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]])
        .map(char::from)
        .collect()
}

/// An API key's secret: the environment's prefix, 30 random base62 characters (178 bits) and 6 of checksum.
pub fn api_key(prefix: &str) -> Result<Secret, Fault> {
    with_checksum(prefix, 30)
}

/// An access token for the control API: `pxm_`, then as an API key.
pub fn access_token() -> Result<Secret, Fault> {
    with_checksum("pxm_", 30)
}

/// What a browser holds for a session: 43 base62 characters, 256 bits.
pub fn session() -> Result<Secret, Fault> {
    Ok(Secret(base62(43)?))
}

/// What an invited person types in at registration.
pub fn invitation() -> Result<Secret, Fault> {
    with_checksum("pxi_", 24)
}

/// An id such as `key_…`: 19 base62 characters, so that it fits into 23 bytes together with its prefix.
pub fn id(prefix: &str) -> Result<String, Fault> {
    Ok(format!("{prefix}{}", base62(19)?))
}

/// Whether two strings are equal, in a time that does not depend on where they differ.
pub fn equal_in_constant_time(left: &str, right: &str) -> bool {
    // Comparing digests hides the length too, and a digest cannot be steered byte by byte.
    let (left, right) = (digest(left), digest(right));
    left.iter().zip(right).fold(0, |different, (l, r)| different | (l ^ r)) == 0
}

fn with_checksum(prefix: &str, characters: usize) -> Result<Secret, Fault> {
    let mut text = prefix.to_owned();
    text.push_str(&base62(characters)?);
    let checksum = checksum(text.as_bytes());
    text.extend(checksum.map(char::from));
    Ok(Secret(text))
}

fn base62(characters: usize) -> Result<String, Fault> {
    let mut text = String::with_capacity(characters);
    let mut random = [0_u8; 64];
    while text.len() < characters {
        getrandom::fill(&mut random).map_err(|e| Fault::Internal(format!("the system gives no randomness: {e}")))?;
        // 248 = 4 · 62: bytes above it are thrown away, since keeping them would favour eight of the characters.
        let fair = random
            .iter()
            .filter(|b| **b < 248)
            .map(|b| char::from(BASE62[usize::from(b % 62)]));
        text.extend(fair.take(characters - text.len()));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_promised_form() {
        let key = api_key("pxk_live_").unwrap();
        let text = key.expose();
        assert_eq!(text.len(), "pxk_live_".len() + 36);
        assert!(text.len() <= 55, "a key is hashed in one block");
        let (body, sum) = text.split_at(text.len() - 6);
        assert_eq!(checksum(body.as_bytes()), sum.as_bytes());
        assert!(body["pxk_live_".len()..].bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_eq!(format!("{key:?}"), "Secret(…)");
    }

    #[test]
    fn every_character_is_as_likely_as_another() {
        let mut seen = [0_u32; 62];
        for c in base62(620_000).unwrap().bytes() {
            seen[BASE62.iter().position(|b| *b == c).unwrap()] += 1;
        }
        // Expected 10,000 each with a standard deviation of 99: six of them is once in 10^9 runs.
        for count in seen {
            assert!((9_400..10_600).contains(&count), "{count}");
        }
    }

    #[test]
    fn ids_fit_into_23_bytes() {
        assert_eq!(id("key_").unwrap().len(), 23);
    }

    #[test]
    fn constant_time_equality_is_equality() {
        assert!(equal_in_constant_time("token", "token"));
        assert!(!equal_in_constant_time("token", "tokeN"));
        assert!(!equal_in_constant_time("token", "tokens"));
    }
}
