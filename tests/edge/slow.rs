//! Slow clients, caps, the PROXY protocol and TLS.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tollgate::proxy::edge::EdgeSettings;
use tollgate::proxy::slots::Capped;
use tollgate::tls::{CertificateFiles, ListenerTls, TlsSettings};

use crate::h2raw::{GET as H2_GET, H2, Outcome};
use crate::harness::{Door, PATIENCE, Reader};
use crate::ways::{Way, over_both_ways};

over_both_ways!(
    a_dripping_head_has_one_deadline,
    silence_is_closed_without_a_word,
    a_dripping_body_runs_out_of_credit,
    a_steady_body_is_not_slow,
    a_client_that_does_not_read_is_dropped,
    connections_are_capped_and_places_come_back,
    the_proxy_protocol_names_the_client,
    tls_chooses_by_name_and_protocol_and_reloads,
    deadlines_hold_on_tls_too
);

const GET: &[u8] = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n";

fn quick() -> EdgeSettings {
    EdgeSettings {
        head_deadline: Duration::from_millis(400),
        handshake_deadline: Duration::from_millis(400),
        idle_timeout: Duration::from_millis(400),
        body_grace: Duration::from_millis(400),
        response_grace: Duration::from_millis(400),
        ..EdgeSettings::default()
    }
}

/// Sends a byte every 50 ms until the other side ends it; returns how long that took and what it said.
async fn drip<S: AsyncRead + AsyncWrite + Unpin>(client: &mut Reader<S>, bytes: &[u8]) -> (Duration, Option<u16>) {
    let started = Instant::now();
    for byte in bytes.iter().cycle() {
        client.send(&[*byte]).await;
        let mut answer = [0u8; 4096];
        match tokio::time::timeout(Duration::from_millis(50), client.stream.read(&mut answer)).await {
            Err(_) => assert!(started.elapsed() < Duration::from_secs(5), "never ended"),
            Ok(Ok(0) | Err(_)) => return (started.elapsed(), None),
            Ok(Ok(read)) => {
                client.buffer.extend(&answer[..read]);
                let response = client.response().await.unwrap();
                return (started.elapsed(), Some(response.status));
            }
        }
    }
    unreachable!("the bytes are cycled")
}

fn is_about(took: Duration, deadline_ms: u64) -> bool {
    (deadline_ms - 50..deadline_ms + 500).contains(&(took.as_millis() as u64))
}

async fn a_dripping_head_has_one_deadline(way: Way) {
    let door = Door::open(way, quick(), None).await;
    let _upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    let (took, status) = drip(&mut client, b"GET /aaaaaaaaaaaaaaaaaaaaaaaaaa").await;
    assert!(is_about(took, 400) && status == Some(408), "{took:?} {status:?}");
    // The second head on a connection, too.
    let mut client = Reader::new(door.connect().await);
    client.send(GET).await;
    assert_eq!(client.response().await.unwrap().status, 200);
    let (took, status) = drip(&mut client, b"GET /aaaaaaaaaaaaaaaaaaaaaaaaaa").await;
    assert!(is_about(took, 400) && status == Some(408), "{took:?} {status:?}");
    assert_eq!(door.observed.refused.load(Ordering::SeqCst), 2);
}

async fn silence_is_closed_without_a_word(way: Way) {
    let door = Door::open(way, quick(), None).await;
    let _upstream = door.upstream().await;
    let mut fresh = Reader::new(door.connect().await);
    let mut used = Reader::new(door.connect().await);
    used.send(GET).await;
    assert_eq!(used.response().await.unwrap().status, 200);
    let started = Instant::now();
    assert!(fresh.response().await.is_none());
    assert!(used.response().await.is_none());
    assert!(is_about(started.elapsed(), 400), "{:?}", started.elapsed());
}

async fn a_dripping_body_runs_out_of_credit(way: Way) {
    let door = Door::open(way, quick(), None).await;
    let _upstream = door.upstream().await;
    // The second one is short enough to go directly.
    for head in [
        "Content-Length: 100000",
        "Content-Length: 10000",
        "Transfer-Encoding: chunked",
    ] {
        let mut client = Reader::new(door.connect().await);
        client
            .send(format!("POST /a HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n").as_bytes())
            .await;
        if head.starts_with('T') {
            client.send(b"fff\r\n").await;
        }
        let (took, status) = drip(&mut client, b"x").await;
        assert!(
            is_about(took, 400) && status == Some(408),
            "{head}: {took:?} {status:?}"
        );
    }
}

async fn a_steady_body_is_not_slow(way: Way) {
    let door = Door::open(way, quick(), None).await;
    let upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    client
        .send(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 2000\r\n\r\n")
        .await;
    for _ in 0..20 {
        // 1,000 bytes per second, twice what is asked for.
        tokio::time::sleep(Duration::from_millis(100)).await;
        client.send(&[b'x'; 100]).await;
    }
    assert_eq!(client.response().await.unwrap().status, 200);
    assert_eq!(upstream.seen().len(), 1);
}

async fn a_client_that_does_not_read_is_dropped(way: Way) {
    let door = Door::open(way, quick(), None).await;
    let _upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    client.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let started = Instant::now();
    while door.activity.requests() == 0 {
        assert!(started.elapsed() < Duration::from_secs(4), "never came");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    while door.slots.open() > 0 {
        assert!(started.elapsed() < Duration::from_secs(4), "still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        started.elapsed() > Duration::from_millis(350),
        "{:?}",
        started.elapsed()
    );
}

async fn connections_are_capped_and_places_come_back(way: Way) {
    let settings = EdgeSettings {
        connections: 8,
        connections_per_address: 5,
        ..EdgeSettings::default()
    };
    let door = Door::open(way, settings, None).await;
    let _upstream = door.upstream().await;
    let mut clients = Vec::new();
    for _ in 0..5 {
        let mut client = Reader::new(door.connect().await);
        client.send(GET).await;
        assert_eq!(client.response().await.unwrap().status, 200);
        clients.push(client);
    }
    let mut sixth = Reader::new(door.connect().await);
    assert!(sixth.is_closed().await);
    assert_eq!(*door.observed.capped.lock().unwrap(), [Capped::Address]);
    drop(clients);
    for _ in 0..200 {
        if door.slots.open() == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((door.slots.open(), door.slots.addresses()), (0, 0));
    let mut again = Reader::new(door.connect().await);
    again.send(GET).await;
    assert_eq!(again.response().await.unwrap().status, 200);
}

fn proxy_header(client: SocketAddr) -> Vec<u8> {
    let SocketAddr::V4(v4) = client else {
        panic!("IPv4 in this test")
    };
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    bytes.extend(v4.ip().octets());
    bytes.extend([127, 0, 0, 1]);
    bytes.extend(v4.port().to_be_bytes());
    bytes.extend([0, 80]);
    bytes
}

async fn the_proxy_protocol_names_the_client(way: Way) {
    let settings = EdgeSettings {
        proxy_protocol: true,
        trusted_proxies: vec!["127.0.0.0/8".parse().unwrap()],
        ..quick()
    };
    let door = Door::open(way, settings, None).await;
    let upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    client.send(&proxy_header("192.0.2.9:4711".parse().unwrap())).await;
    client
        .send(b"GET /a HTTP/1.1\r\nHost: a\r\nX-Show-Client: 1\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n")
        .await;
    assert_eq!(client.response().await.unwrap().status, 200);
    let seen = upstream.seen();
    assert!(
        seen[0].contains("x-forwarded-for: 192.0.2.9\\r\\n") && !seen[0].contains("6.6.6.6"),
        "{seen:?}"
    );
    // Without the header, with half of it, and with garbage: closed.
    for bytes in [
        GET,
        &proxy_header("192.0.2.9:1".parse().unwrap())[..20],
        b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
    ] {
        let mut client = Reader::new(door.connect().await);
        client.send(bytes).await;
        assert!(client.response().await.is_none());
    }
    assert_eq!(door.observed.handshakes_failed.lock().unwrap().len(), 3);
    let stranger = Door::open(
        way,
        EdgeSettings {
            proxy_protocol: true,
            ..quick()
        },
        None,
    )
    .await;
    let mut client = Reader::new(stranger.connect().await);
    client.send(&proxy_header("192.0.2.9:1".parse().unwrap())).await;
    assert!(
        client.response().await.is_none(),
        "only trusted proxies may say who the client is"
    );
}

fn certificate(directory: &Path, name: &str, names: &[&str]) -> (CertificateFiles, CertificateDer<'static>) {
    let key = rcgen::KeyPair::generate().unwrap();
    let parameters = rcgen::CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
    let certificate = parameters.self_signed(&key).unwrap();
    let files = CertificateFiles {
        chain: directory.join(format!("{name}.crt")),
        key: directory.join(format!("{name}.key")),
    };
    std::fs::write(&files.chain, certificate.pem()).unwrap();
    std::fs::write(&files.key, key.serialize_pem()).unwrap();
    (files, certificate.der().clone())
}

async fn tls(door: &Door, trusted: &[&CertificateDer<'static>], name: &str, alpn: &[&[u8]]) -> TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in trusted {
        roots.add((*certificate).clone()).unwrap();
    }
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let connector = TlsConnector::from(Arc::new(config));
    connector
        .connect(ServerName::try_from(name.to_owned()).unwrap(), door.connect().await)
        .await
        .unwrap()
}

async fn tls_chooses_by_name_and_protocol_and_reloads(way: Way) {
    let directory = tempfile::tempdir().unwrap();
    let (one, one_der) = certificate(directory.path(), "one", &["one.example"]);
    let (two, two_der) = certificate(directory.path(), "two", &["two.example", "*.two.example"]);
    let settings = TlsSettings {
        certificates: vec![one, two],
        http2: true,
        only_tls13: false,
        client_authorities: None,
    };
    let edge_tls = Arc::new(ListenerTls::load(settings).unwrap());
    let door = Door::open(way, EdgeSettings::default(), Some(edge_tls.clone())).await;
    let upstream = door.upstream().await;
    for (der, name) in [
        (&one_der, "one.example"),
        (&two_der, "two.example"),
        (&two_der, "x.two.example"),
    ] {
        let mut client = Reader::new(tls(&door, &[der], name, &[]).await);
        client
            .send(b"GET /a HTTP/1.1\r\nHost: a\r\nX-Show-Client: 1\r\n\r\n")
            .await;
        assert_eq!(client.response().await.unwrap().status, 200, "{name}");
    }
    assert!(upstream.seen()[0].contains("x-forwarded-proto: https"));
    let mut h2 = H2::start(tls(&door, &[&one_der], "one.example", &[b"h2"]).await).await;
    h2.request(1, H2_GET, None).await;
    assert!(matches!(h2.outcome(1).await, Outcome::Response { status: 200, .. }));
    // A connection that was open stays; a new one sees the new certificate.
    let mut open = Reader::new(tls(&door, &[&one_der], "one.example", &[]).await);
    let (_, renewed) = certificate(directory.path(), "one", &["one.example"]);
    edge_tls.reload().unwrap();
    let mut client = Reader::new(tls(&door, &[&renewed], "one.example", &[]).await);
    for client in [&mut open, &mut client] {
        client.send(GET).await;
        assert_eq!(client.response().await.unwrap().status, 200);
    }
    std::fs::write(directory.path().join("one.crt"), "garbage").unwrap();
    assert!(edge_tls.reload().unwrap_err().to_string().contains("one.crt"));
    let mut client = Reader::new(tls(&door, &[&renewed], "one.example", &[]).await);
    client.send(GET).await;
    assert_eq!(
        client.response().await.unwrap().status,
        200,
        "a bad file changes nothing"
    );
}

async fn deadlines_hold_on_tls_too(way: Way) {
    let directory = tempfile::tempdir().unwrap();
    let (files, der) = certificate(directory.path(), "one", &["one.example"]);
    let settings = TlsSettings {
        certificates: vec![files],
        http2: true,
        only_tls13: false,
        client_authorities: None,
    };
    let door = Door::open(way, quick(), Some(Arc::new(ListenerTls::load(settings).unwrap()))).await;
    let _upstream = door.upstream().await;
    let mut client = Reader::new(tls(&door, &[&der], "one.example", &[]).await);
    let (took, status) = drip(&mut client, b"GET /aaaaaaaaaaaaaaaaaaaaaaaaaa").await;
    assert!(is_about(took, 400) && status == Some(408), "{took:?} {status:?}");
    // A handshake that does not go on, byte by byte.
    let mut raw = door.connect().await;
    let started = Instant::now();
    for byte in [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3].iter().cycle() {
        if raw.write_all(&[*byte]).await.is_err() || started.elapsed() > Duration::from_secs(3) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    // Plain HTTP on a TLS port.
    let mut plain = Reader::new(door.connect().await);
    plain.send(GET).await;
    let mut alert = Vec::new();
    let end = tokio::time::timeout(PATIENCE, plain.stream.read_to_end(&mut alert))
        .await
        .expect("closed in time");
    assert!(end.is_err() || alert.len() < 10, "an alert at most");
}
