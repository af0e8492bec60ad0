//! Who a request comes from, when proxies of ours stand in front.
//!
//! What a client writes into `X-Forwarded-For` or `Forwarded` is worth nothing; what a proxy of ours appended is.
//! So the chain is read from its end, and only as long as each hop is one of [`TrustedProxies`]. Towards the upstream
//! the chain is always set afresh from what was verified. For TCP proxies there is version 2 of the PROXY protocol.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::{AsyncRead, AsyncReadExt};

/// A network in CIDR notation, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpNet {
    address: IpAddr,
    prefix_bits: u8,
}

impl IpNet {
    /// Whether `address` lies in this network. IPv4 addresses in IPv6 clothes count as IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_bits)).unwrap_or(0);
                network.to_bits() & mask == address.to_bits() & mask
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_bits)).unwrap_or(0);
                network.to_bits() & mask == address.to_bits() & mask
            }
            _ => false,
        }
    }
}

/// What is wrong with the notation of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpNetError;

impl fmt::Display for IpNetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "must be an address or a network such as 10.0.0.0/8 or 2001:db8::/32, without bits beyond its prefix",
        )
    }
}

impl std::error::Error for IpNetError {}

impl FromStr for IpNet {
    type Err = IpNetError;

    fn from_str(text: &str) -> Result<Self, IpNetError> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| IpNetError)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match prefix {
            None => most,
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().map_err(|_| IpNetError)?,
            Some(_) => return Err(IpNetError),
        };
        // `10.0.0.1/8` is more likely a slip than a wish.
        let host_bits_are_zero = match address {
            _ if prefix_bits > most => false,
            IpAddr::V4(v4) => v4.to_bits().checked_shl(u32::from(prefix_bits)).unwrap_or(0) == 0,
            IpAddr::V6(v6) => v6.to_bits().checked_shl(u32::from(prefix_bits)).unwrap_or(0) == 0,
        };
        if host_bits_are_zero {
            Ok(IpNet { address, prefix_bits })
        } else {
            Err(IpNetError)
        }
    }
}

impl fmt::Display for IpNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

/// The proxies whose word on a client's address is taken. Few, so a list is looked through.
#[derive(Clone, Debug, Default)]
pub struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    /// Trusts these networks and nobody else.
    pub fn new(networks: Vec<IpNet>) -> Self {
        TrustedProxies(networks)
    }

    /// Whether `address` is one of them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }
}

/// Who a request comes from, as far as it can be verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientAddress {
    /// The first address from the end of the chain that is not a proxy of ours; what limits and logs go by.
    pub client: IpAddr,
    /// How many trusted proxies the request came through, the peer included.
    pub trusted_hops: usize,
}

/// The address that a request comes from. `peer` is who connected (or whom the PROXY protocol named).
///
/// A chain that cannot be read any further ends there: the last hop that was read is taken for the client, so that
/// garbage cannot frame somebody else.
pub fn client_address(peer: IpAddr, headers: &HeaderMap, trusted: &TrustedProxies) -> ClientAddress {
    let peer = peer.to_canonical();
    let mut found = ClientAddress {
        client: peer,
        trusted_hops: 0,
    };
    if trusted.0.is_empty() || !trusted.contains(peer) {
        return found;
    }
    found.trusted_hops = 1;
    let name = if headers.contains_key(X_FORWARDED_FOR) {
        &X_FORWARDED_FOR
    } else {
        &FORWARDED
    };
    // The last value of the last field is the most recent hop.
    for value in headers.get_all(name).iter().rev() {
        let Ok(text) = value.to_str() else { return found };
        for element in text.rsplit(',') {
            let hop = if *name == X_FORWARDED_FOR {
                parse_node(element.trim())
            } else {
                forwarded_for(element)
            };
            let Some(hop) = hop else { return found };
            found.client = hop;
            if found.trusted_hops >= MAX_HOPS || !trusted.contains(hop) {
                return found;
            }
            found.trusted_hops += 1;
        }
    }
    found
}

/// Sets what an upstream is told about the client, and removes what the client said about itself: `X-Forwarded-For`
/// has the client, then each trusted proxy in order, the peer last; `X-Forwarded-Proto` is `https` if this connection or a
/// trusted proxy's was encrypted, and `Forwarded`, `X-Real-IP` and their like are gone.
pub fn forwarded_fields(
    peer: IpAddr,
    is_tls: bool,
    headers: &HeaderMap,
    trusted: &TrustedProxies,
) -> (ClientAddress, HeaderValue, &'static str) {
    let found = client_address(peer, headers, trusted);
    if found.trusted_hops == 0 {
        return (
            found,
            address_value(found.client),
            if is_tls { "https" } else { "http" },
        );
    }
    // The verified part of the chain, oldest hop first, the peer last.
    let mut hops: Vec<IpAddr> = vec![peer.to_canonical()];
    let name = if headers.contains_key(X_FORWARDED_FOR) {
        &X_FORWARDED_FOR
    } else {
        &FORWARDED
    };
    'chain: for value in headers.get_all(name).iter().rev() {
        let Ok(text) = value.to_str() else { break };
        for element in text.rsplit(',') {
            let hop = if *name == X_FORWARDED_FOR {
                parse_node(element.trim())
            } else {
                forwarded_for(element)
            };
            match hop {
                Some(hop) if hops.len() <= found.trusted_hops => hops.push(hop),
                _ => break 'chain,
            }
        }
    }
    let chain = hops
        .iter()
        .rev()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let value = HeaderValue::from_str(&chain).unwrap_or_else(|_| address_value(found.client));
    let is_https = is_tls
        || headers
            .get_all(X_FORWARDED_PROTO)
            .iter()
            .next_back()
            .is_some_and(|proto| {
                proto
                    .as_bytes()
                    .rsplit(|b| *b == b',')
                    .next()
                    .is_some_and(|last| last.trim_ascii() == b"https")
            });
    (found, value, if is_https { "https" } else { "http" })
}

/// Whether a field is one in which a client could claim an address, a host, a path or a method that is not its
/// request's own. All of these are removed from every request; `x-forwarded-for` and `x-forwarded-proto` are set again
/// from what was verified.
pub fn is_claim(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "forwarded"
            | "x-forwarded-for"
            | "x-forwarded-proto"
            | "x-forwarded-host"
            | "x-forwarded-port"
            | "x-forwarded-server"
            | "x-forwarded-scheme"
            | "x-forwarded-prefix"
            | "x-forwarded-uri"
            | "x-forwarded-method"
            | "x-forwarded-ssl"
            | "x-real-ip"
            | "x-client-ip"
            | "client-ip"
            | "true-client-ip"
            | "cf-connecting-ip"
            | "x-cluster-client-ip"
            | "x-original-url"
            | "x-original-uri"
            | "x-original-host"
            | "x-rewrite-url"
            | "x-host"
            | "x-http-method-override"
            | "x-http-method"
            | "x-method-override"
    )
}

/// Removes every field in which a client could claim what is not its request's own.
pub(super) fn remove_claims(fields: &mut HeaderMap) {
    // One pass over the few fields there are; most requests have no claim among them.
    while let Some(claim) = fields.keys().find(|name| is_claim(name)).cloned() {
        fields.remove(claim);
    }
}

const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// More proxies in a row are a loop.
const MAX_HOPS: usize = 32;

/// An address, written as a header value without formatting machinery's heap.
pub(super) fn address_value(address: IpAddr) -> HeaderValue {
    use std::io::Write;
    let mut text = [0u8; 48];
    let mut rest = &mut text[..];
    let written = match write!(rest, "{address}") {
        Ok(()) => 48 - rest.len(),
        Err(_) => 0,
    };
    HeaderValue::from_bytes(&text[..written]).expect("an address is hexadecimal digits, dots and colons")
}

/// `192.0.2.1`, `192.0.2.1:1234`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:1234`.
fn parse_node(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address.to_canonical());
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some(address.ip().to_canonical());
    }
    let bracketed = text.strip_prefix('[')?.strip_suffix(']')?;
    bracketed
        .parse::<Ipv6Addr>()
        .ok()
        .map(|address| IpAddr::V6(address).to_canonical())
}

/// The `for=` of one element of RFC 7239's `Forwarded`.
fn forwarded_for(element: &str) -> Option<IpAddr> {
    let node = element.split(';').find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        name.eq_ignore_ascii_case("for").then_some(value)
    })?;
    let node = node.trim();
    parse_node(
        node.strip_prefix('"')
            .and_then(|node| node.strip_suffix('"'))
            .unwrap_or(node),
    )
}

/// What a PROXY header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyHeader {
    /// The proxy speaks for itself (a health check).
    Local,
    /// The client's address, and the one it connected to.
    Proxied { client: SocketAddr, server: SocketAddr },
}

/// Why a PROXY header was not accepted.
#[derive(Debug)]
pub enum ProxyHeaderError {
    /// The connection broke.
    Io(std::io::Error),
    /// It is not version 2 of the protocol, or contradicts itself.
    Malformed(&'static str),
}

impl fmt::Display for ProxyHeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProxyHeaderError::Io(error) => write!(f, "the connection broke in the PROXY header: {error}"),
            ProxyHeaderError::Malformed(why) => write!(f, "malformed PROXY header: {why}"),
        }
    }
}

impl std::error::Error for ProxyHeaderError {}

/// Reads version 2 of HAProxy's PROXY protocol (its specification's section 2.2), and not a byte more.
///
/// # Errors
/// [`ProxyHeaderError`]; the stream is then of no use any more.
pub async fn read_proxy_header(stream: &mut (impl AsyncRead + Unpin)) -> Result<ProxyHeader, ProxyHeaderError> {
    let mut fixed = [0u8; 16];
    stream.read_exact(&mut fixed).await.map_err(ProxyHeaderError::Io)?;
    let length = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > MAX_PROXY_PAYLOAD {
        return Err(ProxyHeaderError::Malformed("longer than 1024 bytes"));
    }
    let mut payload = [0u8; MAX_PROXY_PAYLOAD];
    let payload = &mut payload[..length];
    stream.read_exact(payload).await.map_err(ProxyHeaderError::Io)?;
    parse_proxy_header(&fixed, payload).map_err(ProxyHeaderError::Malformed)
}

/// The pure half of [`read_proxy_header`].
///
/// # Errors
/// What is wrong with the header.
pub fn parse_proxy_header(fixed: &[u8; 16], payload: &[u8]) -> Result<ProxyHeader, &'static str> {
    if fixed[..12] != *b"\r\n\r\n\0\r\nQUIT\n" {
        return Err("no signature of version 2");
    }
    let port = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
    match (fixed[12], fixed[13]) {
        (0x20, _) => Ok(ProxyHeader::Local),
        (0x21, 0x11) if payload.len() >= 12 => {
            let address = |at: usize| {
                IpAddr::V4(Ipv4Addr::new(
                    payload[at],
                    payload[at + 1],
                    payload[at + 2],
                    payload[at + 3],
                ))
            };
            Ok(ProxyHeader::Proxied {
                client: SocketAddr::new(address(0), port(8)),
                server: SocketAddr::new(address(4), port(10)),
            })
        }
        (0x21, 0x21) if payload.len() >= 36 => {
            let address = |at: usize| {
                let mut octets = [0u8; 16];
                octets.copy_from_slice(&payload[at..at + 16]);
                IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()
            };
            Ok(ProxyHeader::Proxied {
                client: SocketAddr::new(address(0), port(32)),
                server: SocketAddr::new(address(16), port(34)),
            })
        }
        // AF_UNSPEC and Unix sockets: no address that could be used.
        (0x21, 0x00 | 0x31 | 0x32) => Ok(ProxyHeader::Local),
        (0x21, 0x11 | 0x21) => Err("shorter than its addresses"),
        (0x21, _) => Err("not TCP"),
        _ => Err("unknown version or command"),
    }
}

/// The specification asks for at least 536; extensions (TLVs) beyond that are read over.
const MAX_PROXY_PAYLOAD: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn trusted() -> TrustedProxies {
        TrustedProxies::new(vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()])
    }

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    fn found(peer: &str, fields: &[(&'static str, &str)]) -> String {
        client_address(peer.parse().unwrap(), &headers(fields), &trusted())
            .client
            .to_string()
    }

    #[test]
    fn networks_are_read_and_matched() {
        for good in [
            "10.0.0.0/8",
            "0.0.0.0/0",
            "::/0",
            "192.0.2.1",
            "192.0.2.1/32",
            "2001:db8::/32",
            "::1/128",
        ] {
            assert!(good.parse::<IpNet>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0/8",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "::1/129",
            "a/8",
            "2001:db8::1/32",
        ] {
            assert!(bad.parse::<IpNet>().is_err(), "{bad}");
        }
        let network: IpNet = "10.0.0.0/8".parse().unwrap();
        assert!(network.contains("10.255.0.1".parse().unwrap()));
        assert!(network.contains("::ffff:10.1.1.1".parse().unwrap()));
        assert!(!network.contains("11.0.0.1".parse().unwrap()));
        assert!(
            "0.0.0.0/0"
                .parse::<IpNet>()
                .unwrap()
                .contains("1.2.3.4".parse().unwrap())
        );
    }

    #[test]
    fn a_stranger_cannot_say_who_it_is() {
        assert_eq!(
            found(
                "192.0.2.7",
                &[("x-forwarded-for", "1.1.1.1"), ("forwarded", "for=1.1.1.1")]
            ),
            "192.0.2.7"
        );
    }

    #[test]
    fn the_chain_is_read_from_its_end() {
        assert_eq!(found("10.0.0.1", &[("x-forwarded-for", "6.6.6.6, 1.1.1.1")]), "1.1.1.1");
        assert_eq!(
            found("10.0.0.1", &[("x-forwarded-for", "6.6.6.6, 1.1.1.1, 10.0.0.2")]),
            "1.1.1.1"
        );
        assert_eq!(
            found(
                "10.0.0.1",
                &[("x-forwarded-for", "1.1.1.1"), ("x-forwarded-for", "2.2.2.2")]
            ),
            "2.2.2.2"
        );
        assert_eq!(
            found("10.0.0.1", &[("x-forwarded-for", "1.1.1.1, garbage")]),
            "10.0.0.1"
        );
        assert_eq!(
            found("10.0.0.1", &[("x-forwarded-for", "1.1.1.1, garbage, 10.0.0.9")]),
            "10.0.0.9"
        );
        assert_eq!(found("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(found("10.0.0.1", &[("x-forwarded-for", "10.0.0.5")]), "10.0.0.5");
        assert_eq!(
            found("10.0.0.1", &[("x-forwarded-for", "[2001:db9::1]:99")]),
            "2001:db9::1"
        );
        assert_eq!(
            found(
                "10.0.0.1",
                &[("forwarded", "for=\"[2001:db9::1]:99\";proto=https, for=10.0.0.2")]
            ),
            "2001:db9::1"
        );
        assert_eq!(found("2001:db8::5", &[("forwarded", "by=x; For=1.1.1.1")]), "1.1.1.1");
    }

    #[test]
    fn the_upstream_is_told_what_was_verified() {
        let peer = "10.0.0.1".parse().unwrap();
        let fields = headers(&[
            ("x-forwarded-for", "6.6.6.6, 1.1.1.1, 10.0.0.2"),
            ("x-forwarded-proto", "https"),
        ]);
        let (address, chain, proto) = forwarded_fields(peer, false, &fields, &trusted());
        assert_eq!(address.client.to_string(), "1.1.1.1");
        assert_eq!(chain, "1.1.1.1, 10.0.0.2, 10.0.0.1");
        assert_eq!(proto, "https");
        let stranger = "192.0.2.1".parse().unwrap();
        let (_, chain, proto) = forwarded_fields(stranger, false, &fields, &trusted());
        assert_eq!((chain.to_str().unwrap(), proto), ("192.0.2.1", "http"));
    }

    #[test]
    fn proxy_headers_of_version_2() {
        let mut fixed = *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c";
        let payload = [192, 0, 2, 1, 198, 51, 100, 2, 0x1f, 0x90, 0, 80];
        let header = parse_proxy_header(&fixed, &payload).unwrap();
        assert_eq!(
            header,
            ProxyHeader::Proxied {
                client: "192.0.2.1:8080".parse().unwrap(),
                server: "198.51.100.2:80".parse().unwrap()
            }
        );
        assert!(parse_proxy_header(&fixed, &payload[..11]).is_err());
        fixed[12] = 0x20;
        assert_eq!(parse_proxy_header(&fixed, &[]).unwrap(), ProxyHeader::Local);
        fixed[12] = 0x11;
        assert!(parse_proxy_header(&fixed, &payload).is_err());
        fixed[0] = b'P';
        assert!(parse_proxy_header(&fixed, &payload).is_err());
    }
}
