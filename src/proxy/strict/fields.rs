//! The parts of a head that have a form of their own: method, host, length, names.

use super::Ambiguity;
use super::bytes::{CLASS, HOST_BYTE};

pub(super) fn check_method(method: &[u8]) -> Result<(), Ambiguity> {
    match method {
        b"GET" | b"POST" | b"PUT" | b"HEAD" | b"PATCH" | b"DELETE" | b"OPTIONS" => Ok(()),
        b"TRACE" | b"TRACK" | b"CONNECT" => Err(Ambiguity::MethodRefused),
        // Some frameworks upper-case methods: `delete` must not slip past a rule for DELETE.
        _ if !method.is_empty()
            && method.len() <= MAX_METHOD_BYTES
            && method.iter().all(|b| b.is_ascii_uppercase() || *b == b'-') =>
        {
            Ok(())
        }
        _ => Err(Ambiguity::MethodForm),
    }
}

/// RFC 3986's reg-name without its percent-encodings and sub-delimiters, IPv4 address or bracketed IPv6 address, and
/// an optional port of 1 to 65535.
pub(super) fn check_host(host: &[u8]) -> Result<(), Ambiguity> {
    let bad = Err(Ambiguity::HostForm);
    if host.is_empty() || host.len() > MAX_HOST_BYTES {
        return bad;
    }
    let port = if host[0] == b'[' {
        let Some(end) = memchr::memchr(b']', host) else {
            return bad;
        };
        let is_address =
            std::str::from_utf8(&host[1..end]).is_ok_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok());
        if !is_address {
            return bad;
        }
        match &host[end + 1..] {
            [] => return Ok(()),
            [b':', port @ ..] => port,
            _ => return bad,
        }
    } else {
        let mut label_bytes = 0;
        let mut port = None;
        for (i, &b) in host.iter().enumerate() {
            match b {
                b':' => {
                    port = Some(&host[i + 1..]);
                    break;
                }
                // An empty label: `.a`, `a..b`. One dot at the end is the root.
                b'.' if label_bytes == 0 => return bad,
                b'.' => label_bytes = 0,
                _ if CLASS[b as usize] & HOST_BYTE != 0 => label_bytes += 1,
                _ => return bad,
            }
            if label_bytes > MAX_LABEL_BYTES {
                return bad;
            }
        }
        match port {
            None => return Ok(()),
            Some(port) if host[0] != b':' => port,
            Some(_) => return bad,
        }
    };
    let is_port = (1..=5).contains(&port.len())
        && port.iter().all(u8::is_ascii_digit)
        && port[0] != b'0'
        && port.iter().fold(0u32, |sum, b| sum * 10 + u32::from(b - b'0')) <= 65_535;
    if is_port { Ok(()) } else { bad }
}

pub(super) fn content_length(value: &[u8]) -> Result<u64, Ambiguity> {
    let is_plain = (1..=MAX_LENGTH_DIGITS).contains(&value.len())
        && value.iter().all(u8::is_ascii_digit)
        && (value[0] != b'0' || value.len() == 1);
    if !is_plain {
        return Err(Ambiguity::LengthForm);
    }
    Ok(value.iter().fold(0, |sum, b| sum * 10 + u64::from(b - b'0')))
}

pub(super) fn is_disguised_framing(name: &[u8]) -> bool {
    DISGUISED.iter().any(|real| {
        real.len() == name.len()
            && name
                .iter()
                .zip(real.iter())
                .all(|(b, r)| b.eq_ignore_ascii_case(r) || (*b == b'_' && *r == b'-'))
    })
}

/// What CGI, WSGI and PHP read as these fields when `_` stands for `-`.
const DISGUISED: &[&[u8]] = &[b"content-length", b"transfer-encoding"];
/// Longer than any registered method (`UPDATEREDIRECTREF`, 17).
const MAX_METHOD_BYTES: usize = 32;
/// RFC 1035's limit for a name, with room for a port.
const MAX_HOST_BYTES: usize = 255 + 6;
/// RFC 1035.
const MAX_LABEL_BYTES: usize = 63;
/// 10^18 − 1 bytes: an exabyte, and far from the end of an i64, which other parsers use.
const MAX_LENGTH_DIGITS: usize = 18;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_names_or_addresses() {
        for good in [
            "a",
            "a.b",
            "a.b.",
            "127.0.0.1:80",
            "[::1]",
            "[2001:db8::1]:65535",
            "x_y-z~1",
        ] {
            assert_eq!(check_host(good.as_bytes()), Ok(()), "{good}");
        }
        for bad in [
            "", ":80", "a:", "a:0", "a:08", "a:65536", "a:123456", "a:8a", "a b", "a,b", "a@b", "a/b", "a?b", "a#b",
            "[::1", "[::1]x", "[::g]", "::1", "a..b", ".a", "a%41", "a\\b", "[]", "a:80:80",
        ] {
            assert_eq!(check_host(bad.as_bytes()), Err(Ambiguity::HostForm), "{bad}");
        }
    }
}
