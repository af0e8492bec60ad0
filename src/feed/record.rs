//! Keys and changes as bytes, for the spool. Compact, because a spool can hold millions; written and read nowhere else.
//!
//! Integers are little-endian or LEB128 varints, strings are preceded by their length. Reading trusts nothing: every
//! length is checked against what is there, so damaged bytes are refused and never cost memory.

use crate::gate::{Gate, KeyError, KeyUpdate, SecretUpdate};

/// A change to one key, or a sign of life, as the spool's change log holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Key(KeyUpdate),
    Gone {
        revision: u64,
        id: Box<str>,
    },
    /// The source was last heard at this time; nothing changed.
    Heard {
        unix_ms: i64,
    },
}

impl Change {
    /// The revision that the change makes; 0 for a sign of life.
    pub fn revision(&self) -> u64 {
        match self {
            Change::Key(key) => key.revision,
            Change::Gone { revision, .. } => *revision,
            Change::Heard { .. } => 0,
        }
    }

    /// Puts the change into force. A key that the gate cannot use is forgotten, because its earlier form must not live
    /// on; the answer is then `false`.
    ///
    /// # Errors
    /// The gate takes no change at all now.
    pub fn apply(self, gate: &Gate) -> Result<bool, KeyError> {
        match self {
            Change::Key(key) => {
                let (id, revision) = (key.id.clone(), key.revision);
                match gate.apply(key) {
                    Ok(()) => Ok(true),
                    Err(error @ (KeyError::Busy | KeyError::NoSnapshot)) => Err(error),
                    Err(error) => {
                        log::error!("feed: a key at revision {revision} cannot be used and is left out: {error}");
                        gate.forget(&id, revision)?;
                        Ok(false)
                    }
                }
            }
            Change::Gone { revision, id } => gate.forget(&id, revision).map(|()| true),
            Change::Heard { .. } => Ok(true),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(192);
        match self {
            Change::Key(key) => {
                bytes.push(KEY);
                encode_key(key, &mut bytes);
            }
            Change::Gone { revision, id } => {
                bytes.push(GONE);
                put_varint(&mut bytes, *revision);
                put_str(&mut bytes, id);
            }
            Change::Heard { unix_ms } => {
                bytes.push(HEARD);
                bytes.extend_from_slice(&unix_ms.to_le_bytes());
            }
        }
        bytes
    }

    /// `None`: damaged.
    pub fn decode(mut bytes: &[u8]) -> Option<Change> {
        let bytes = &mut bytes;
        let change = match take(bytes, 1)?[0] {
            KEY => {
                let mut key = KeyUpdate::default();
                decode_key(bytes, &mut key)?;
                Change::Key(key)
            }
            GONE => Change::Gone {
                revision: take_varint(bytes)?,
                id: take_str(bytes)?.into(),
            },
            HEARD => Change::Heard {
                unix_ms: take_i64(bytes)?,
            },
            _ => return None,
        };
        bytes.is_empty().then_some(change)
    }
}

/// Whether the gate can tell an upstream about the key: what it says of it goes into header fields.
pub fn is_usable(key: &KeyUpdate) -> bool {
    let printable = |text: &str| text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    printable(&key.organization) && printable(&key.environment) && key.scopes.iter().all(|scope| printable(scope))
}

const KEY: u8 = 1;
const GONE: u8 = 2;
const HEARD: u8 = 3;

const DISABLED: u8 = 1;
const REVOKED: u8 = 2;
const EXPIRES: u8 = 4;

pub fn encode_key(key: &KeyUpdate, bytes: &mut Vec<u8>) {
    let mut flags = 0;
    if key.disabled {
        flags |= DISABLED;
    }
    if key.revoked {
        flags |= REVOKED;
    }
    if key.expires_at_ms.is_some() {
        flags |= EXPIRES;
    }
    bytes.push(flags);
    if let Some(at) = key.expires_at_ms {
        bytes.extend_from_slice(&at.to_le_bytes());
    }
    put_varint(bytes, key.revision);
    put_str(bytes, &key.id);
    put_str(bytes, &key.organization);
    put_str(bytes, &key.environment);
    put_str(bytes, &key.plan);
    put_varint(bytes, key.scopes.len() as u64);
    for scope in &key.scopes {
        put_str(bytes, scope);
    }
    put_varint(bytes, key.secrets.len() as u64);
    for secret in &key.secrets {
        bytes.extend_from_slice(&secret.digest);
        match secret.not_after_ms {
            None => bytes.push(0),
            Some(at) => {
                bytes.push(1);
                bytes.extend_from_slice(&at.to_le_bytes());
            }
        }
    }
}

/// Takes one key off the front of `bytes`, into `key`, whose texts stay where they are if they are the same. `None`: damaged
/// or cut off; what `key` says then is of no use.
pub fn decode_key(bytes: &mut &[u8], key: &mut KeyUpdate) -> Option<()> {
    let flags = take(bytes, 1)?[0];
    if flags & !(DISABLED | REVOKED | EXPIRES) != 0 {
        return None;
    }
    key.disabled = flags & DISABLED != 0;
    key.revoked = flags & REVOKED != 0;
    key.expires_at_ms = if flags & EXPIRES != 0 {
        Some(take_i64(bytes)?)
    } else {
        None
    };
    key.revision = take_varint(bytes)?;
    set(&mut key.id, take_str(bytes)?);
    set(&mut key.organization, take_str(bytes)?);
    set(&mut key.environment, take_str(bytes)?);
    set(&mut key.plan, take_str(bytes)?);
    let scopes = take_count(bytes)?;
    key.scopes.truncate(scopes);
    for scope in 0..scopes {
        set_scope(key, scope, take_str(bytes)?);
    }
    key.secrets.clear();
    for _ in 0..take_count(bytes)? {
        key.secrets.push(take_secret(bytes)?);
    }
    Some(())
}

/// Puts a text where another one is held, or the same.
pub fn set(held: &mut Box<str>, text: &str) {
    if **held != *text {
        *held = text.into();
    }
}

/// The same for the scope with this number, which may be the one after the last.
pub fn set_scope(key: &mut KeyUpdate, number: usize, scope: &str) {
    match key.scopes.get_mut(number) {
        Some(held) => set(held, scope),
        None => key.scopes.push(scope.into()),
    }
}

fn take_secret(bytes: &mut &[u8]) -> Option<SecretUpdate> {
    let digest = take(bytes, 32)?.try_into().ok()?;
    let not_after_ms = match take(bytes, 1)?[0] {
        0 => None,
        1 => Some(take_i64(bytes)?),
        _ => return None,
    };
    Some(SecretUpdate { digest, not_after_ms })
}

pub fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

pub fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put_str(bytes: &mut Vec<u8>, text: &str) {
    put_varint(bytes, text.len() as u64);
    bytes.extend_from_slice(text.as_bytes());
}

fn take_str<'b>(bytes: &mut &'b [u8]) -> Option<&'b str> {
    let length = take_count(bytes)?;
    std::str::from_utf8(take(bytes, length)?).ok()
}

/// A count of things that take a byte each at least, so never more than there are bytes left.
fn take_count(bytes: &mut &[u8]) -> Option<usize> {
    let count = usize::try_from(take_varint(bytes)?).ok()?;
    (count <= bytes.len()).then_some(count)
}

fn take_i64(bytes: &mut &[u8]) -> Option<i64> {
    Some(i64::from_le_bytes(take(bytes, 8)?.try_into().ok()?))
}

fn take<'b>(bytes: &mut &'b [u8], count: usize) -> Option<&'b [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> KeyUpdate {
        KeyUpdate {
            revision: u64::MAX,
            id: "key_1".into(),
            organization: "".into(),
            environment: "live".into(),
            scopes: vec!["a:b".into(), "\u{fc}".into()],
            plan: "starter".into(),
            secrets: vec![
                SecretUpdate {
                    digest: [7; 32],
                    not_after_ms: None,
                },
                SecretUpdate {
                    digest: [9; 32],
                    not_after_ms: Some(-1),
                },
            ],
            expires_at_ms: Some(i64::MAX),
            disabled: true,
            revoked: false,
        }
    }

    #[test]
    fn comes_back_as_it_was() {
        for change in [
            Change::Key(key()),
            Change::Gone {
                revision: 300,
                id: "key_2".into(),
            },
            Change::Heard { unix_ms: 5 },
        ] {
            let bytes = change.encode();
            assert_eq!(Change::decode(&bytes), Some(change.clone()));
            assert!((0..bytes.len()).all(|cut| Change::decode(&bytes[..cut]).is_none()));
            assert_eq!(Change::decode(&[&bytes[..], &[0]].concat()), None);
        }
    }

    #[test]
    fn flipped_bytes_are_refused_or_read_but_never_panic() {
        let bytes = Change::Key(key()).encode();
        for (i, bit) in (0..bytes.len()).flat_map(|i| (0..8).map(move |bit| (i, bit))) {
            let mut damaged = bytes.clone();
            damaged[i] ^= 1 << bit;
            assert_ne!(Change::decode(&damaged), Some(Change::Key(key())));
        }
    }
}
