//! The id of a request: the client's if it sent a well-formed one, else a new one.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use std::sync::atomic::{AtomicU64, Ordering};

use super::response::X_REQUEST_ID;

/// Longest id that is taken over from a client, in bytes.
pub const MAX_LEN: usize = 128;

/// Makes ids that are unique within a process and, by 64 random bits, across processes. They are names, not secrets.
#[derive(Debug)]
pub struct RequestIds {
    process: u64,
    next: AtomicU64,
}

impl Default for RequestIds {
    fn default() -> Self {
        let random = ahash::RandomState::new();
        RequestIds {
            process: random.hash_one(0),
            next: AtomicU64::new(random.hash_one(1)),
        }
    }
}

impl RequestIds {
    /// The id of a request with these header fields.
    pub fn of(&self, headers: &HeaderMap) -> HeaderValue {
        let mut sent = headers.get_all(&X_REQUEST_ID).iter();
        match (sent.next(), sent.next()) {
            (Some(id), None) if is_well_formed(id.as_bytes()) => id.clone(),
            _ => self.next(),
        }
    }

    /// A new id: 32 hexadecimal digits.
    pub fn next(&self) -> HeaderValue {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        // Relaxed: only uniqueness matters.
        let low = self.next.fetch_add(1, Ordering::Relaxed);
        let bytes = (u128::from(self.process) << 64 | u128::from(low)).to_be_bytes();
        let mut digits = [0; 32];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(bytes) {
            pair[0] = HEX[usize::from(byte >> 4)];
            pair[1] = HEX[usize::from(byte & 15)];
        }
        // Owned so, it is shared between request, response and log without another allocation.
        HeaderValue::from_maybe_shared(Bytes::from_owner(digits)).unwrap_or(HeaderValue::from_static("-"))
    }
}

/// Letters, digits and `-._~:/+=@`: nothing that could break a log line, a header or JSON.
fn is_well_formed(id: &[u8]) -> bool {
    (1..=MAX_LEN).contains(&id.len()) && id.iter().all(|b| b.is_ascii_alphanumeric() || b"-._~:/+=@".contains(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_well_formed_id_is_kept_and_any_other_replaced() {
        let ids = RequestIds::default();
        let of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(X_REQUEST_ID, HeaderValue::from_bytes(value.as_bytes()).unwrap());
            }
            ids.of(&headers).to_str().unwrap().to_owned()
        };
        assert_eq!(of(&["abc-123"]), "abc-123");
        let long = "x".repeat(MAX_LEN + 1);
        for bad in [&[][..], &[""], &["a b"], &["a\"b"], &[long.as_str()], &["one", "two"]] {
            let id = of(bad);
            assert_eq!(id.len(), 32, "{bad:?}");
            assert!(id.bytes().all(|b| b.is_ascii_hexdigit()));
        }
        assert_ne!(of(&[]), of(&[]));
    }
}
