//! A server's settings → the peer that Pingora connects to.

use pingora::listeners::ALPN;
use pingora::protocols::tls::CaType;
use pingora::upstreams::peer::HttpPeer;
use pingora::utils::tls::{CertKey, WrappedX509, parse_x509};
use std::sync::Arc;
use xxhash_rust::xxh3::Xxh3;

use super::{ServerSettings, UpstreamSettings, UpstreamTls};

/// The peer of one server.
pub(super) fn build(settings: &UpstreamSettings, server: &ServerSettings) -> HttpPeer {
    let server_name = settings.tls.as_ref().map(|tls| match &tls.server_name {
        Some(name) => name.clone(),
        None => server.host.trim_matches(['[', ']']).to_owned(),
    });
    let is_tls = server_name.is_some();
    let mut peer = HttpPeer::new(server.address, is_tls, server_name.unwrap_or_default());
    let options = &mut peer.options;
    options.connection_timeout = Some(settings.timeouts.connect);
    options.total_connection_timeout = Some(settings.timeouts.connect);
    options.read_timeout = Some(settings.timeouts.read);
    options.write_timeout = Some(settings.timeouts.write);
    options.idle_timeout = Some(settings.timeouts.idle);
    if settings.http2 {
        options.alpn = ALPN::H2;
        options.max_h2_streams = MOST_STREAMS;
    }
    if let Some(tls) = &settings.tls {
        options.verify_cert = !tls.danger_skip_verify;
        options.verify_hostname = !tls.danger_skip_verify;
        options.ca = tls.files.authorities.as_ref().map(|authorities| {
            let parsed = authorities.iter().map(|der| WrappedX509::new(der.clone(), parse_x509));
            let parsed: Box<CaType> = parsed.collect();
            Arc::from(parsed)
        });
        // What cannot be parsed would be a panic in there; `tls::ClientFiles` has parsed all of it.
        let identity = tls.files.identity.as_ref();
        peer.client_cert_key = identity.map(|own| Arc::new(CertKey::new(own.chain.clone(), own.key.clone())));
    }
    peer.group_key = group(settings);
    peer
}

/// What the kernel may hold of a response on a connection that is made now, in bytes, while so many requests are under
/// way. Connections with one and the other are shared.
pub(in crate::proxy) fn receive_buffer(in_flight: u64) -> usize {
    if in_flight > CROWD {
        RECEIVE_BUFFER_IN_A_CROWD
    } else {
        RECEIVE_BUFFER
    }
}

/// Upstreams share no pooled connections, and neither do settings before and after a reload that differ in what a
/// connection was checked against: Pingora's own key does not tell the authorities or the protocol.
fn group(settings: &UpstreamSettings) -> u64 {
    let mut hash = Xxh3::new();
    let mut add = |part: &[u8]| {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(settings.name.as_bytes());
    add(&[u8::from(settings.http2)]);
    if let Some(UpstreamTls { files, .. }) = &settings.tls {
        for authority in files.authorities.iter().flatten() {
            add(authority);
        }
        for certificate in files.identity.iter().flat_map(|identity| &identity.chain) {
            add(certificate);
        }
    }
    hash.digest()
}

/// What the kernel may hold of a response that nobody takes yet, in bytes (it allows itself twice as much). By itself it
/// grows this to megabytes for every client that stops reading, as the pipe on Pingora's way swallows a response's start at
/// once. Enough for 125 MB/s from a server 1 ms away.
const RECEIVE_BUFFER: usize = 128 * 1024;

/// The same for connections that are made while many requests are under way. Pingora's pipe takes about ten reads of up
/// to 64 KiB before it waits for the client, so this bounds its memory, too: of a response that nobody takes it holds
/// 130 KiB with this buffer, and 480 with the other one (measured). Enough for 16 MB/s from a server 1 ms away.
const RECEIVE_BUFFER_IN_A_CROWD: usize = 16 * 1024;

/// More requests than this under way at once are a crowd.
const CROWD: u64 = 512;

/// Requests at once on one HTTP/2 connection, where the server allows as many: what RFC 9113 recommends as the least.
const MOST_STREAMS: usize = 100;

#[cfg(test)]
mod tests {
    use super::super::{Balance, Timeouts};
    use super::*;
    use pingora::upstreams::peer::Peer as _;
    use std::time::Duration;

    fn settings() -> UpstreamSettings {
        let second = Duration::from_secs(1);
        UpstreamSettings {
            name: "a".to_owned(),
            servers: vec![],
            balance: Balance::RoundRobin,
            tls: Some(UpstreamTls::default()),
            http2: false,
            timeouts: Timeouts {
                connect: second,
                read: second,
                write: second,
                idle: second,
            },
            retries: 0,
            health: None,
        }
    }

    #[test]
    fn connections_that_hold_little_are_shared_with_the_others() {
        let server = ServerSettings {
            host: "a".to_owned(),
            address: ([127, 0, 0, 1], 443).into(),
            weight: 1,
        };
        let ordinary = build(&settings(), &server);
        let mut little = ordinary.clone();
        little.options.tcp_recv_buf = Some(receive_buffer(CROWD + 1));
        assert!(little.options.tcp_recv_buf < Some(receive_buffer(CROWD)));
        assert_eq!(little.reuse_hash(), ordinary.reuse_hash());
    }

    #[test]
    fn the_name_is_verified_and_connections_are_shared_only_where_all_is_the_same() {
        let server = |host: &str| ServerSettings {
            host: host.to_owned(),
            address: ([127, 0, 0, 1], 443).into(),
            weight: 1,
        };
        let one = build(&settings(), &server("api.internal"));
        assert!(one.verify_cert() && one.verify_hostname());
        assert_eq!((one.sni(), one.is_tls()), ("api.internal", true));
        // An empty name would turn verification off in Pingora.
        assert_eq!(build(&settings(), &server("[::1]")).sni(), "::1");
        assert_eq!(
            build(&settings(), &server("api.internal")).reuse_hash(),
            one.reuse_hash()
        );
        let differs = |change: fn(&mut UpstreamSettings)| {
            let mut other = settings();
            change(&mut other);
            assert_ne!(build(&other, &server("api.internal")).reuse_hash(), one.reuse_hash());
        };
        differs(|other| other.name = "b".to_owned());
        differs(|other| other.http2 = true);
        differs(|other| other.tls = None);
        differs(|other| other.tls.as_mut().unwrap().danger_skip_verify = true);
        differs(|other| other.tls.as_mut().unwrap().server_name = Some("other.internal".to_owned()));
        let rcgen = rcgen::generate_simple_self_signed(["ca.internal".to_owned()]).unwrap();
        let mut other = settings();
        other.tls.as_mut().unwrap().files.authorities = Some(vec![rcgen.cert.der().to_vec()]);
        assert_ne!(build(&other, &server("api.internal")).reuse_hash(), one.reuse_hash());
    }
}
