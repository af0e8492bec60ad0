//! What each byte may be part of.

pub(super) const TOKEN: u8 = 1;
pub(super) const PLAIN_PATH: u8 = 2;
pub(super) const QUERY: u8 = 4;
pub(super) const HOST_BYTE: u8 = 8;
pub(super) const UNDERSCORE: u8 = 16;

/// What each byte may be part of.
pub(super) static CLASS: [u8; 256] = {
    let mut table = [0u8; 256];
    let mut b = 0x21;
    while b < 0x7f {
        let byte = b as u8;
        let alphanumeric = byte.is_ascii_alphanumeric();
        let mut class = QUERY;
        // RFC 9110: tchar.
        if alphanumeric || in_set(byte, b"!#$%&'*+-.^_`|~") {
            class |= TOKEN;
        }
        // RFC 3986: pchar without percent-encodings, and without `;`.
        if alphanumeric || in_set(byte, b"-._~!$&'()*+,=:@") {
            class |= PLAIN_PATH;
        }
        if alphanumeric || in_set(byte, b"-_~") {
            class |= HOST_BYTE;
        }
        if byte == b'_' {
            class |= UNDERSCORE;
        }
        // What HTTP libraries refuse in a query, too; other bytes that RFC 3986 excludes are in wide use there.
        if in_set(byte, b"#\"<>") {
            class &= !QUERY;
        }
        table[b] = class;
        b += 1;
    }
    table
};

const fn in_set(byte: u8, set: &[u8]) -> bool {
    let mut i = 0;
    while i < set.len() {
        if set[i] == byte {
            return true;
        }
        i += 1;
    }
    false
}

pub(super) fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}

pub(super) fn is_space(b: u8) -> bool {
    b == b' ' || b == b'\t'
}

pub(super) fn trim(value: &[u8]) -> &[u8] {
    let start = value.iter().take_while(|b| is_space(**b)).count();
    let end = value.len() - value[start..].iter().rev().take_while(|b| is_space(**b)).count();
    &value[start..end]
}

/// Without an early exit, so that the compiler can look at 16 bytes at a time.
pub(super) fn has_control(value: &[u8]) -> bool {
    value
        .iter()
        .fold(false, |bad, &b| bad | ((b < 0x20) & (b != b'\t')) | (b == 0x7f))
}
