//! Guessers and slow clients against the whole program. `benches/hostile` measures what they do to others.

use crate::harness::error;
use crate::own_gate::{Gate, key_line, secret};
use reqwest::{Client, StatusCode};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// From `address`, which is ours as all of 127.0.0.0/8 is.
fn client(address: &str) -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .no_proxy()
        .local_address(address.parse::<IpAddr>().unwrap())
        .build()
        .unwrap()
}

/// A gate that believes 127.0.0.3, with one key, `secret(0)`.
async fn gate() -> Gate {
    let upstream = crate::harness::standing_upstream().await;
    let routing = format!(
        "upstreams:\n  up: {{servers: [\"{upstream}\"]}}\n\
         routes:\n  - {{name: default, match: {{path: \"/**\"}}, upstream: up}}\n"
    );
    let settings = "  trusted_proxies: [127.0.0.3]\n";
    Gate::start("{address: \"127.0.0.1:0\"}", settings, &routing, &[key_line(0, false)])
}

/// The code of the answer, or `PASSED`.
async fn answer(client: &Client, gate: &Gate, key: u32, forwarded_for: Option<&str>) -> String {
    let mut request = client.get(gate.url("/a")).header("x-api-key", secret(key));
    if let Some(forwarded_for) = forwarded_for {
        request = request.header("x-forwarded-for", forwarded_for);
    }
    let response = request.send().await.unwrap();
    match response.status() {
        StatusCode::OK => "PASSED".into(),
        StatusCode::TOO_MANY_REQUESTS => {
            let wait: u32 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert!((1..=60).contains(&wait));
            error(response).await.0
        }
        _ => error(response).await.0,
    }
}

const UNKNOWN: &str = "INVALID_API_KEY";
const SLOWED: &str = "TOO_MANY_FAILED_ATTEMPTS";

/// Fails until the address that `forwarded_for` names is slowed.
async fn fail_until_slowed(client: &Client, gate: &Gate, forwarded_for: Option<&str>) {
    // Two windows of 30, should one end in between.
    for attempt in 0..=60 {
        if answer(client, gate, 1000 + attempt, forwarded_for).await == SLOWED {
            assert!(attempt >= 30, "slowed after {attempt}");
            return;
        }
    }
    panic!("never slowed");
}

#[tokio::test]
async fn a_header_neither_lets_a_guesser_escape_nor_frames_another() {
    let gate = gate().await;
    let (guesser, victim, proxy) = (client("127.0.0.2"), client("127.0.0.9"), client("127.0.0.3"));
    fail_until_slowed(&guesser, &gate, Some("127.0.0.9")).await;
    for name in ["127.0.0.9", "10.0.0.1", "127.0.0.2", "127.0.0.3", "unknown"] {
        assert_eq!(answer(&guesser, &gate, 2000, Some(name)).await, SLOWED, "{name}");
    }
    assert_eq!(answer(&victim, &gate, 2000, None).await, UNKNOWN, "it was not framed");
    assert_eq!(
        answer(&guesser, &gate, 0, None).await,
        "PASSED",
        "a valid key is never delayed"
    );
    // Through a proxy that is believed, each client counts for itself.
    fail_until_slowed(&proxy, &gate, Some("192.0.2.1")).await;
    assert_eq!(answer(&proxy, &gate, 2000, Some("192.0.2.2")).await, UNKNOWN);
    // What the client itself put in front does not count, for better or worse.
    assert_eq!(answer(&proxy, &gate, 2000, Some("192.0.2.1, 192.0.2.3")).await, UNKNOWN);
    assert_eq!(answer(&proxy, &gate, 2000, Some("192.0.2.4, 192.0.2.1")).await, SLOWED);
    assert_eq!(answer(&proxy, &gate, 2000, None).await, UNKNOWN, "the proxy itself");
}

#[tokio::test]
async fn unknown_keys_take_no_memory() {
    let guesses = if std::env::var("TOLLGATE_PROOF").is_ok_and(|size| size == "full") {
        1_000_000
    } else {
        10_000
    };
    let gate = gate().await;
    let guesser = client("127.0.0.2");
    let some = |from: u32, to: u32| {
        let (guesser, gate) = (&guesser, &gate);
        async move {
            for n in from..to {
                let code = answer(guesser, gate, n, None).await;
                assert!(code == UNKNOWN || code == SLOWED, "{code}");
            }
        }
    };
    some(1, 1000).await;
    let before = gate.resident_kib();
    some(1000, guesses).await;
    let after = gate.resident_kib();
    println!("{guesses} unknown keys: {before} KiB before, {after} KiB after");
    assert!(after < before + 4096, "{before} KiB before, {after} KiB after");
    assert_eq!(answer(&client("127.0.0.9"), &gate, 0, None).await, "PASSED");
}

/// One byte every 5 s; when it was closed, and whether it was told 408.
async fn drip(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> (Duration, bool) {
    let started = Instant::now();
    let mut answer = Vec::new();
    for byte in b"GET /aaaaaaaaaaaaaa" {
        let _ = stream.write_all(&[*byte]).await;
        let _ = stream.flush().await;
        let end = async { while matches!(stream.read_buf(&mut answer).await, Ok(1..)) {} };
        if tokio::time::timeout(Duration::from_secs(5), end).await.is_ok() {
            return (started.elapsed(), answer.starts_with(b"HTTP/1.1 408 "));
        }
    }
    panic!("never closed");
}

#[tokio::test]
async fn a_head_of_a_byte_every_five_seconds_ends_after_ten_on_tls_too() {
    let plain = gate().await;
    let directory = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let parameters = rcgen::CertificateParams::new(vec!["gate.example".to_owned()]).unwrap();
    let certificate = parameters.self_signed(&key).unwrap();
    std::fs::write(directory.path().join("gate.crt"), certificate.pem()).unwrap();
    std::fs::write(directory.path().join("gate.key"), key.serialize_pem()).unwrap();
    let listen = "{address: \"127.0.0.1:0\", tls: {cert: gate.crt, key: gate.key}}";
    let routing = "upstreams:\n  up: {servers: [\"127.0.0.1:9\"]}\n\
                   routes:\n  - {name: default, match: {path: \"/**\"}, upstream: up}\n";
    let encrypted = Gate::start_in(directory, listen, "", routing, &[key_line(0, false)]);
    let connect = |address: SocketAddr| async move { TcpStream::connect(address).await.unwrap() };
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let handshaken = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect("gate.example".try_into().unwrap(), connect(encrypted.address).await)
        .await
        .unwrap();
    let (plain, encrypted) = tokio::join!(drip(connect(plain.address).await), drip(handshaken));
    for (on, (took, told)) in [("plain", plain), ("TLS", encrypted)] {
        println!("{on}: closed after {took:?}");
        assert!(told, "{on}: 408");
        assert!(took >= Duration::from_millis(9_900), "{on}: {took:?}");
        // The third byte comes at 10 s, the fourth would at 15 s.
        assert!(took < Duration::from_secs(15), "{on}: {took:?}");
    }
}

#[tokio::test]
async fn path_parameters_pass_where_no_reader_sees_another_rule() {
    let upstream = crate::harness::standing_upstream().await;
    let routing = format!(
        "upstreams:\n  up: {{servers: [\"{upstream}\"]}}\n\
         routes:\n  - {{name: public, match: {{path: \"/public/**\"}}, upstream: up, public: {{}}}}\n  \
         - {{name: default, match: {{path: \"/**\"}}, upstream: up}}\n"
    );
    let gate = Gate::start("{address: \"127.0.0.1:0\"}", "", &routing, &[key_line(0, false)]);
    let client = client("127.0.0.2");
    for (path, expected) in [
        ("/public/a;v=1/b", StatusCode::OK),
        ("/public/a/b;v=1;w", StatusCode::OK),
        // `/public` to a servlet container, and to whoever cuts the path: there no key is needed.
        ("/public;v=1/b", StatusCode::BAD_REQUEST),
        ("/public;v=1", StatusCode::BAD_REQUEST),
        ("/public/;v=1/b", StatusCode::BAD_REQUEST),
        ("/other;v=1/b", StatusCode::UNAUTHORIZED),
    ] {
        let response = client.get(gate.url(path)).send().await.unwrap();
        assert_eq!(response.status(), expected, "{path}");
        if expected == StatusCode::BAD_REQUEST {
            assert_eq!(error(response).await.0, "AMBIGUOUS_REQUEST", "{path}");
        }
    }
    assert_eq!(answer(&client, &gate, 0, None).await, "PASSED");
}
