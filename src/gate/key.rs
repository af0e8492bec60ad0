//! The form of an API key, checked before any hashing, and its digest.
//!
//! A key is a prefix (`pxk_live_`), 30 random base62 characters (178 bits) and 6 base62 characters of checksum:
//! the CRC-32 (ISO-HDLC, as in zlib) of everything before it, most significant digit first, zero-padded, as
//! GitHub's tokens have it. Most junk is refused for the price of a CRC.

use sha2::block_api::compress256;
use sha2::{Digest as _, Sha256};
use std::cmp::Ordering;
use std::fmt;

/// Random characters of a key.
pub const RANDOM_LEN: usize = 30;
/// Checksum characters of a key: 62^6 > 2^32.
pub const CHECKSUM_LEN: usize = 6;
/// The digits of base62, in the order of their values.
pub const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Keys of another form (imported ones) are this long at least: fewer bytes could be guessed.
pub const FOREIGN_MIN_LEN: usize = 16;
/// Keys of another form are this long at most.
pub const FOREIGN_MAX_LEN: usize = 128;

/// The checksum of `payload`, which is the prefix and the random part.
pub fn checksum(payload: &[u8]) -> [u8; CHECKSUM_LEN] {
    let mut rest = crc32fast::hash(payload);
    let mut digits = [b'0'; CHECKSUM_LEN];
    for digit in digits.iter_mut().rev() {
        *digit = BASE62[(rest % 62) as usize];
        rest /= 62;
    }
    digits
}

/// SHA-256 of a secret: all that is ever stored of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SecretDigest(pub [u8; 32]);

impl SecretDigest {
    /// What is no secret's digest: finding one would be breaking SHA-256.
    pub(super) const NONE: SecretDigest = SecretDigest([0; 32]);

    /// The digest of a presented key. Our own keys, and all of up to 55 bytes, are one block with its padding (FIPS 180-4
    /// section 5.1.1), which is put together here: what a streaming hasher does about blocks costs a quarter of it.
    #[inline]
    pub fn of(presented: &[u8]) -> Self {
        const MOST: usize = 55;
        let mut blocks = [[0; 64]];
        let [block] = &mut blocks;
        if presented.len() > MOST {
            return SecretDigest(Sha256::digest(presented).into());
        }
        match (presented.split_first_chunk::<32>(), presented.last_chunk::<16>()) {
            // Our own keys. Words that are written whole can be read at once; bytes would have to reach the cache first.
            (Some((first, rest)), Some(last)) if (1..16).contains(&rest.len()) => {
                let rest_bits = rest.len() as u32 * 8;
                let word = u128::from_le_bytes(*last) >> (128 - rest_bits) | 0x80 << rest_bits;
                block[..32].copy_from_slice(first);
                block[32..48].copy_from_slice(&word.to_le_bytes());
            }
            _ => {
                block[..presented.len()].copy_from_slice(presented);
                block[presented.len()] = 0x80;
            }
        }
        let bits = presented.len() as u64 * 8;
        block[56..].copy_from_slice(&bits.to_be_bytes());
        let mut state = INITIAL;
        compress256(&mut state, &blocks);
        let mut digest = [0; 32];
        for (bytes, pair) in digest.chunks_exact_mut(8).zip(state.chunks_exact(2)) {
            let word = u64::from(pair[0]) << 32 | u64::from(pair[1]);
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        SecretDigest(digest)
    }
}

/// SHA-256's initial hash value (FIPS 180-4 section 5.3.3).
const INITIAL: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// Only the first four bytes: enough to tell two apart in a test's output.
impl fmt::Debug for SecretDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, ..] = self.0;
        write!(f, "SecretDigest({a:02x}{b:02x}{c:02x}{d:02x}…)")
    }
}

/// Whether keys that carry one of our prefixes must have a right checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// A wrong checksum is refused without a lookup.
    #[default]
    Required,
    /// Keys issued by an older system may carry our prefixes without it: they are looked up.
    Optional,
}

/// What becomes of keys without one of our prefixes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Foreign {
    /// They are refused without a lookup.
    #[default]
    Refuse,
    /// Imported keys of 16 to 128 visible ASCII characters are looked up.
    Accept,
}

/// Which forms of key are worth a lookup.
#[derive(Clone, Debug)]
pub struct KeyForms {
    prefixes: Box<[Box<[u8]>]>,
    checksum: Checksum,
    foreign: Foreign,
}

impl KeyForms {
    /// The forms for these prefixes.
    pub fn new<P: AsRef<[u8]>>(prefixes: impl IntoIterator<Item = P>, checksum: Checksum, foreign: Foreign) -> Self {
        KeyForms {
            prefixes: prefixes.into_iter().map(|p| p.as_ref().into()).collect(),
            checksum,
            foreign,
        }
    }

    /// Whether a presented key can be one that this gate knows. Costs a CRC at most, no hashing and no lookup.
    #[inline]
    pub fn admits(&self, presented: &[u8]) -> bool {
        match self.prefixes.iter().find(|prefix| presented.starts_with(prefix)) {
            Some(prefix) => {
                let form = presented.len() == prefix.len() + RANDOM_LEN + CHECKSUM_LEN
                    && are_all(&presented[prefix.len()..], u8::is_ascii_alphanumeric);
                match self.checksum {
                    Checksum::Required => form && has_checksum(presented),
                    Checksum::Optional => (form && has_checksum(presented)) || foreign_form(presented),
                }
            }
            None => self.foreign == Foreign::Accept && foreign_form(presented),
        }
    }
}

/// Whether the last characters, which are known to be alphanumeric, are the checksum of all before them. The digits are
/// read rather than made: a multiplication each, not a division.
fn has_checksum(key: &[u8]) -> bool {
    let (payload, digits) = key.split_at(key.len() - CHECKSUM_LEN);
    let value = |digit: &u8| u64::from(BASE62_VALUES[usize::from(*digit)]);
    let claimed = digits.iter().fold(0, |sum, digit| sum * 62 + value(digit));
    claimed == u64::from(crc32fast::hash(payload))
}

/// The values of base62's digits, by byte.
const BASE62_VALUES: [u8; 256] = {
    let mut values = [0; 256];
    let mut value = 0;
    while value < BASE62.len() {
        values[BASE62[value] as usize] = value as u8;
        value += 1;
    }
    values
};

/// Without a way out in the middle, so that the compiler looks at many bytes at once.
fn are_all(bytes: &[u8], fit: impl Fn(&u8) -> bool) -> bool {
    bytes.iter().fold(true, |all, byte| all & fit(byte))
}

fn foreign_form(presented: &[u8]) -> bool {
    (FOREIGN_MIN_LEN..=FOREIGN_MAX_LEN).contains(&presented.len()) && are_all(presented, u8::is_ascii_graphic)
}

/// The id of a key (`key_…`): not a secret.
#[derive(Clone)]
pub enum KeyId {
    #[doc(hidden)]
    Short(ShortId),
    #[doc(hidden)]
    Long(std::sync::Arc<str>),
}

/// An id of up to 23 bytes: its length, then the id, in the words in which it is copied.
#[derive(Clone, Copy)]
pub struct ShortId(pub(super) [[u8; 8]; 3]);

impl ShortId {
    /// The empty id, which is no key's.
    pub(super) const NONE: ShortId = ShortId([[0; 8]; 3]);

    /// The id as text.
    pub fn as_str(&self) -> &str {
        let (len, id) = self.0.as_flattened().split_first().unwrap_or((&0, &[]));
        let id = id.get(..usize::from(*len)).unwrap_or_default();
        // It was copied from a `str` whole, so it is UTF-8.
        std::str::from_utf8(id).unwrap_or_default()
    }
}

impl fmt::Debug for ShortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl KeyId {
    /// The longest id that is held in words, in bytes.
    pub const SHORT: usize = 23;

    /// The id as text.
    pub fn as_str(&self) -> &str {
        match self {
            KeyId::Short(id) => id.as_str(),
            KeyId::Long(id) => id,
        }
    }
}

impl From<&str> for KeyId {
    fn from(id: &str) -> Self {
        let mut words = [[0; 8]; 3];
        let [len, inline @ ..] = words.as_flattened_mut() else {
            return KeyId::Long(id.into());
        };
        match inline.get_mut(..id.len()) {
            Some(inline) => {
                inline.copy_from_slice(id.as_bytes());
                *len = id.len() as u8;
                KeyId::Short(ShortId(words))
            }
            None => KeyId::Long(id.into()),
        }
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl PartialEq for KeyId {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Eq for KeyId {}

/// By length and then as text, which for ids of one form is as text, and costs three comparisons of numbers.
impl Ord for KeyId {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (KeyId::Short(one), KeyId::Short(other)) => {
                one.0.map(u64::from_be_bytes).cmp(&other.0.map(u64::from_be_bytes))
            }
            _ => {
                let (one, other) = (self.as_str(), other.as_str());
                (one.len(), one).cmp(&(other.len(), other))
            }
        }
    }
}

impl PartialOrd for KeyId {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(prefix: &str, random: char) -> String {
        let payload = format!("{prefix}{}", random.to_string().repeat(RANDOM_LEN));
        let digits = checksum(payload.as_bytes());
        payload + std::str::from_utf8(&digits).unwrap()
    }

    fn forms(checksum: Checksum, foreign: Foreign) -> KeyForms {
        KeyForms::new(["pxk_live_", "pxk_test_"], checksum, foreign)
    }

    #[test]
    fn the_checksum_is_crc32_in_base62_with_leading_zeros() {
        // CRC-32/ISO-HDLC("123456789") = 0xCBF43926 = 3421780262, the check value of the CRC catalogue.
        let mut expected = 3_421_780_262_u64;
        let mut digits = vec![];
        for _ in 0..CHECKSUM_LEN {
            digits.insert(0, BASE62[(expected % 62) as usize]);
            expected /= 62;
        }
        assert_eq!(checksum(b"123456789").to_vec(), digits);
        assert_eq!(&checksum(b""), b"000000");
    }

    #[test]
    fn a_well_formed_key_is_admitted_and_any_changed_character_is_not() {
        let forms = forms(Checksum::Required, Foreign::Refuse);
        let good = key("pxk_live_", 'a');
        assert!(forms.admits(good.as_bytes()));
        for at in 0..good.len() {
            let mut bad = good.clone().into_bytes();
            bad[at] = if bad[at] == b'x' { b'y' } else { b'x' };
            assert!(!forms.admits(&bad), "{at}");
        }
        for bad in [
            "",
            "pxk_live_",
            &good[..good.len() - 1],
            &format!("{good}0"),
            &good.to_uppercase(),
        ] {
            assert!(!forms.admits(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn older_keys_and_foreign_keys_only_where_the_settings_say_so() {
        let old = b"pxk_live_issued-by-an-older-system";
        assert!(!forms(Checksum::Required, Foreign::Accept).admits(old));
        assert!(forms(Checksum::Optional, Foreign::Refuse).admits(old));
        let foreign = b"ak_0123456789abcdef0123456789abcdef";
        assert!(!forms(Checksum::Optional, Foreign::Refuse).admits(foreign));
        assert!(forms(Checksum::Required, Foreign::Accept).admits(foreign));
        for bad in [
            &b"fifteen-bytes-x"[..],
            &[b'a'; 129],
            b"sixteen bytes ok",
            b"sixteen\x7fbytes-ok!",
        ] {
            assert!(!forms(Checksum::Required, Foreign::Accept).admits(bad));
        }
    }

    #[test]
    fn digests_are_those_of_sha_256() {
        let message: Vec<u8> = (0..200).collect();
        for len in 0..message.len() {
            let expected: [u8; 32] = Sha256::digest(&message[..len]).into();
            assert!(SecretDigest::of(&message[..len]).0 == expected, "{len} bytes");
        }
    }

    #[test]
    fn ids_of_any_length_come_back_whole() {
        for len in [0, 1, 22, 23, 24, 25, 64, 200] {
            let id = "k".repeat(len);
            assert_eq!(KeyId::from(id.as_str()).as_str(), id);
        }
    }
}
