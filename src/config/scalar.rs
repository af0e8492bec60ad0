//! Scalars with a form of their own: durations, sizes, addresses, networks, URLs.
//!
//! Each form is a parser that says what would be right; [`form`] finds it by the name that the schema carries as
//! `format`, so that the check of the whole file and the typed shapes cannot differ.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::settings::Network;

/// Says what is wrong with a text.
pub(super) type Check = fn(&str) -> Result<(), String>;

/// A form's check by its name in the schema.
pub(super) fn form(name: &str) -> Option<Check> {
    fn check<T: FromStr<Err = String>>(text: &str) -> Result<(), String> {
        T::from_str(text).map(|_| ())
    }
    Some(match name {
        "duration" => check::<Span>,
        "bytes" => check::<Bytes>,
        "listen-address" => check::<ListenAddress>,
        "server-address" => check::<ServerAddress>,
        "network" => check::<NetworkText>,
        "base-url" => check::<BaseUrl>,
        _ => return None,
    })
}

/// How a form is described in a message: `expected …`.
pub(super) fn describe_form(name: &str) -> Option<&'static str> {
    Some(match name {
        "duration" => "a duration such as 500ms, 30s, 5m, 1h or 30d",
        "bytes" => "a size in bytes such as 32768, 64KiB or 10MiB",
        "listen-address" => "an address such as \"127.0.0.1:8080\"",
        "server-address" => "an address such as \"127.0.0.1:9000\"",
        "network" => "a network such as 10.0.0.0/8",
        "secret" => "a secret",
        "url" => "a URL",
        "base-url" => "a URL such as https://keys.example.com",
        _ => return None,
    })
}

macro_rules! scalar {
    ($name:ident, $schema_name:literal, $format:literal) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                $schema_name.into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "format": $format})
            }
        }
    };
}

/// A length of time: a whole number and a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Span(pub Duration);
scalar!(Span, "Duration", "duration");

impl Span {
    pub const fn secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    pub const fn millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }
}

const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        if number.is_empty() {
            return Err("a duration is a whole number and a unit, such as 500ms, 30s, 5m, 1h or 30d".to_owned());
        }
        if unit.is_empty() {
            return Err(format!("a duration needs a unit: ms, s, m, h or d, such as {number}s"));
        }
        let Some((_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("unknown unit \"{unit}\"; the units are ms, s, m, h and d"));
        };
        // A thousand years: far above any use, far below where sums overflow.
        let most = 1_000 * 365 * 86_400_000;
        match number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(*factor))
        {
            Some(ms) if ms <= most => Ok(Self(Duration::from_millis(ms))),
            _ => Err("too long".to_owned()),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if ms == 0 {
            return out.write_str("0s");
        }
        let (unit, factor) = UNITS
            .iter()
            .rev()
            .find(|(_, factor)| ms.is_multiple_of(*factor))
            .copied()
            .unwrap_or(("ms", 1));
        // "1d" rather than "24h" would surprise where a file says 24h; both read the same.
        if unit == "d" && ms < 7 * factor {
            return write!(out, "{}h", ms / 3_600_000);
        }
        write!(out, "{}{unit}", ms / factor)
    }
}

/// A size: bytes, or a number with KiB, MiB or GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Bytes(pub u64);

const SIZES: [(&str, u64); 5] = [("", 1), ("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err("a size is a whole number of bytes, or one with KiB, MiB or GiB".to_owned());
        }
        let Some((_, factor)) = SIZES.iter().find(|(name, _)| *name == unit.trim_start()) else {
            return Err(format!(
                "unknown unit \"{}\"; the units are KiB, MiB and GiB",
                unit.trim_start()
            ));
        };
        match number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(*factor))
        {
            Some(bytes) if bytes <= 1 << 50 => Ok(Self(bytes)),
            _ => Err("too large".to_owned()),
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(bytes) => Ok(Self(bytes)),
            Either::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

impl JsonSchema for Bytes {
    fn schema_name() -> Cow<'static, str> {
        "Bytes".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["integer", "string"], "format": "bytes", "minimum": 0})
    }
}

/// Where to listen: an IP address or `localhost`, and a port that may be 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ListenAddress(pub String);
scalar!(ListenAddress, "ListenAddress", "listen-address");

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, _) = host_and_port(text, "127.0.0.1:8080")?;
        if host == "localhost" || host.parse::<IpAddr>().is_ok() {
            return Ok(Self(text.to_owned()));
        }
        if host == "*" {
            return Err("write 0.0.0.0 (every IPv4 address) or [::] (every address) instead of *".to_owned());
        }
        Err(format!(
            "\"{host}\" is not an IP address; a listener needs one, such as 127.0.0.1 or 0.0.0.0"
        ))
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Where an upstream server is: a name or an IP address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServerAddress(pub String);
scalar!(ServerAddress, "ServerAddress", "server-address");

impl FromStr for ServerAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = host_and_port(text, "127.0.0.1:9000")?;
        if host.parse::<IpAddr>().is_err() {
            host_name(&host)?;
        }
        if port == 0 {
            return Err("nobody can be reached at port 0".to_owned());
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

fn host_and_port(text: &str, example: &str) -> Result<(String, u16), String> {
    if let Some((scheme, rest)) = text.split_once("://") {
        return Err(format!(
            "an address is HOST:PORT, without \"{scheme}://\": write \"{}\"",
            rest.trim_end_matches('/')
        ));
    }
    if text.chars().filter(|c| *c == ':').count() > 1 && !text.starts_with('[') {
        return Err("an IPv6 address goes into brackets, such as \"[::1]:8080\"".to_owned());
    }
    let Some((host, port)) = text
        .rsplit_once(':')
        .filter(|(host, _)| !host.starts_with('[') || host.ends_with(']'))
    else {
        return Err(format!("no port; write HOST:PORT, such as \"{example}\""));
    };
    let Some(port) = port
        .parse::<u16>()
        .ok()
        .filter(|_| port.bytes().all(|b| b.is_ascii_digit()))
    else {
        return Err(format!("\"{port}\" is not a port; ports are numbers up to 65535"));
    };
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(inner) if inner.parse::<std::net::Ipv6Addr>().is_ok() => inner,
        Some(inner) => return Err(format!("\"{inner}\" is not an IPv6 address")),
        None => host,
    };
    if host.is_empty() {
        return Err(format!("no host; write HOST:PORT, such as \"{example}\""));
    }
    Ok((host.to_owned(), port))
}

/// A host name by RFC 1123 (and `_`, which container networks use).
pub(super) fn host_name(host: &str) -> Result<(), String> {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let digits_and_dots = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if digits_and_dots {
        return Err(format!("\"{host}\" is not an IP address"));
    }
    if host.len() <= 253 && host.split('.').all(label) {
        return Ok(());
    }
    Err(format!("\"{host}\" is not a host name"))
}

/// A network in CIDR form, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NetworkText(pub Network);
scalar!(NetworkText, "Network", "network");

impl FromStr for NetworkText {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let Ok(address) = address.parse::<IpAddr>() else {
            return Err(format!(
                "\"{address}\" is not an IP address; write a network such as 10.0.0.0/8"
            ));
        };
        let most = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => most,
            Some(length) => match length.parse::<u8>() {
                Ok(length) if length <= most => length,
                _ => {
                    return Err(format!(
                        "\"/{length}\" is not a prefix length; they go from /0 to /{most}"
                    ));
                }
            },
        };
        let masked = match address {
            IpAddr::V4(address) => {
                IpAddr::V4((u32::from(address) & u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)).into())
            }
            IpAddr::V6(address) => {
                IpAddr::V6((u128::from(address) & u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)).into())
            }
        };
        if masked != address {
            return Err(format!(
                "{address} has bits set beyond /{length}; write {masked}/{length}"
            ));
        }
        Ok(Self(Network {
            address,
            prefix_length: length,
        }))
    }
}

impl fmt::Display for NetworkText {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.0.address, self.0.prefix_length)
    }
}

/// `http://` or `https://`, a host, a port or none, and nothing after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BaseUrl(pub String);
scalar!(BaseUrl, "BaseUrl", "base-url");

impl FromStr for BaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(authority) = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")) else {
            return Err("a URL begins with http:// or https://".to_owned());
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        if authority.contains(['/', '?', '#']) {
            return Err("a URL here is a scheme and a host alone, without a path".to_owned());
        }
        if authority.contains('@') {
            return Err("a URL here holds no user or password".to_owned());
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
        let address = if has_port {
            authority.to_owned()
        } else {
            format!("{authority}:80")
        };
        address.parse::<ServerAddress>()?;
        Ok(Self(text.strip_suffix('/').unwrap_or(text).to_owned()))
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_written() {
        for (text, ms) in [
            ("500ms", 500),
            ("5s", 5_000),
            ("1h", 3_600_000),
            ("24h", 86_400_000),
            ("30d", 2_592_000_000),
            ("0s", 0),
            ("0", 0),
        ] {
            assert_eq!(text.parse::<Span>().unwrap().0, Duration::from_millis(ms), "{text}");
        }
        for text in ["24h", "30d", "1500ms", "90m", "1h", "0s"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "s",
            "5",
            "5 s",
            "1.5s",
            "-1s",
            "1w",
            "99999999999999999999d",
            "1h30m",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn addresses() {
        for text in ["127.0.0.1:0", "0.0.0.0:8080", "[::1]:80", "localhost:1"] {
            assert!(text.parse::<ListenAddress>().is_ok(), "{text}");
        }
        for text in [
            "8080",
            ":8080",
            "127.0.0.1",
            "127.0.0.1:65536",
            "127.0.0.1:+1",
            "::1:80",
            "[::1]",
            "example.com:80",
            "*:80",
            "http://127.0.0.1:80",
            "300.0.0.1:80",
            "[zz]:1",
        ] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
        for text in ["api.internal:9000", "10.0.0.1:1", "[2001:db8::1]:443", "my_service:80"] {
            assert!(text.parse::<ServerAddress>().is_ok(), "{text}");
        }
        for text in ["api.internal", "a b:1", "-a:1", "a..b:1", "host:0", "1.2.3:80", ""] {
            assert!(text.parse::<ServerAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn networks() {
        let network = |text: &str| text.parse::<NetworkText>();
        assert_eq!(network("10.0.0.0/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(network("192.0.2.7").unwrap().0.prefix_length, 32);
        assert!(network("::/0").is_ok() && network("0.0.0.0/0").is_ok());
        assert_eq!(
            network("10.1.2.3/8").unwrap_err(),
            "10.1.2.3 has bits set beyond /8; write 10.0.0.0/8"
        );
        for text in ["10.0.0.0/33", "10.0.0/8", "x", "::1/129", "10.0.0.0/"] {
            assert!(network(text).is_err(), "{text}");
        }
    }

    #[test]
    fn base_urls() {
        for text in ["http://127.0.0.1:8081", "https://keys.example.com", "http://[::1]:80/"] {
            assert!(text.parse::<BaseUrl>().is_ok(), "{text}");
        }
        assert_eq!("http://a/".parse::<BaseUrl>().unwrap().0, "http://a");
        for text in [
            "127.0.0.1:8081",
            "ftp://x",
            "http://",
            "http://a/b",
            "http://u:p@a",
            "http://a:0",
            "http://a?x",
        ] {
            assert!(text.parse::<BaseUrl>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!("64KiB".parse::<Bytes>().unwrap().0, 65_536);
        assert_eq!("32768".parse::<Bytes>().unwrap().0, 32_768);
        for text in ["", "KiB", "1kb", "-1", "1.5MiB", "99999999GiB"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }
}
