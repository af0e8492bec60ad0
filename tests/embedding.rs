//! Somebody's plain Pingora proxy gets the gate by adding fewer than thirty lines; end to end on real sockets.

use async_trait::async_trait;
use pingora::apps::ServerApp;
use pingora::http::ResponseHeader;
use pingora::proxy::{ProxyHttp, Session, http_proxy};
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;
use reqwest::{Client, Method, Response};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tollgate::gate::key::{SecretDigest, checksum};

/// The service as it was before.
struct Plain {
    upstream: SocketAddr,
    seen: Arc<AtomicUsize>,
}

#[async_trait]
impl ProxyHttp for Plain {
    type CTX = u32;

    fn new_ctx(&self) -> u32 {
        7
    }

    async fn request_filter(&self, _session: &mut Session, ctx: &mut u32) -> pingora::Result<bool> {
        self.seen.fetch_add(1, Ordering::Relaxed);
        *ctx += 1;
        Ok(false)
    }

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut u32) -> pingora::Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.upstream, false, String::new())))
    }

    async fn response_filter(
        &self,
        _session: &mut Session,
        response: &mut ResponseHeader,
        ctx: &mut u32,
    ) -> pingora::Result<()> {
        response.insert_header("x-plain", ctx.to_string())?;
        Ok(())
    }
}

type BoxError = Box<dyn std::error::Error>;

#[rustfmt::skip]
fn gated(service: Plain, key_file: PathBuf) -> Result<impl ProxyHttp<CTX: Send + Sync> + Send + Sync, BoxError> {
    // <added>
    use std::sync::Arc;
    use tollgate::clock::Clock;
    use tollgate::feed::{self, Feed};
    use tollgate::gate::limit::Limit;
    use tollgate::gate::{AccessSettings, EnvironmentSettings, Gate, Pattern, RouteSettings, Settings};
    use tollgate::proxy::GateProxy;

    let settings = Settings {
        environments: vec![EnvironmentSettings { name: "live".into(), prefix: "acme_live_".into(), billed: true }],
        tiers: vec![("default".into(), Limit::new(3, 3_600_000).map_err(|e| e.to_string())?)],
        routes: vec![RouteSettings {
            name: "administration".into(),
            pattern: Pattern { path: "/admin/**".into(), ..Pattern::default() },
            access: AccessSettings::Keyed { scope: Some("admin:all".into()), tier: "default".into(), environments: None },
            upstream: String::new(),
            sandbox_upstream: None,
            upgrade: false,
        }],
        ..Settings::default()
    };
    let (gate, clock) = (Arc::new(Gate::new(settings)?), Clock::system());
    let keys = feed::Settings::new("edge-1", feed::Source::File(key_file), "state");
    Feed::new(keys, gate.clone(), clock.clone()).load();
    let service = GateProxy::new(service, gate, clock).map_err(|e| e.0)?;
    // </added>
    Ok(service)
}

#[test]
fn fewer_than_thirty_lines_are_added_and_the_manual_has_them() {
    let source = include_str!("embedding.rs");
    // Split so that this line is not one of the markers.
    let (begin, end) = (concat!("// <", "added>"), concat!("// </", "added>"));
    let added = source.split_once(begin).unwrap().1.split_once(end).unwrap().0;
    let lines: Vec<&str> = added.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    println!("{} lines added", lines.len());
    assert!((10..30).contains(&lines.len()), "{} lines", lines.len());
    let manual = include_str!("../src/manual/embedding.md");
    let mut rest = manual.lines().map(str::trim);
    for line in lines {
        assert!(rest.any(|told| told == line), "the manual lacks, in this place: {line}");
    }
}

/// An upstream that keeps what it was sent.
async fn upstream() -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let heads = Arc::new(Mutex::new(vec![]));
    let kept = heads.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let kept = kept.clone();
            tokio::spawn(async move {
                let (mut head, mut buffer) = (vec![], [0; 4096]);
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    head.extend_from_slice(&buffer[..read]);
                    if head.ends_with(b"\r\n\r\n") {
                        kept.lock()
                            .unwrap()
                            .push(String::from_utf8(std::mem::take(&mut head)).unwrap());
                        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
                        if stream.write_all(answer).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    (address, heads)
}

/// Serves like `http_proxy_service` does, on a port of the system's choice.
async fn serve<P>(service: P) -> (SocketAddr, tokio::sync::watch::Sender<bool>)
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    let app = Arc::new(http_proxy(&Arc::new(ServerConf::default()), service));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (app, stopped) = (app.clone(), stopped.clone());
            tokio::spawn(async move {
                let mut stream = Some(pingora::protocols::l4::stream::Stream::from(stream));
                // What is left of a connection after a request is the connection for the next.
                if let Some(stream) = stream.take() {
                    let mut next = app.process_new(Box::new(stream), &stopped).await;
                    while let Some(stream) = next {
                        next = app.process_new(stream, &stopped).await;
                    }
                }
            });
        }
    });
    (address, stop)
}

fn secret(n: u32) -> String {
    let payload = format!("acme_live_{n:030}");
    let digits = checksum(payload.as_bytes());
    payload + std::str::from_utf8(&digits).unwrap()
}

fn key_line(n: u32, scopes: &str) -> String {
    let sha256 = SecretDigest::of(secret(n).as_bytes())
        .0
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
    format!(
        r#"{{"id":"key_{n}","organization":"org_{n}","environment":"live","scopes":{scopes},"secrets":[{{"sha256":"{sha256}"}}]}}"#
    )
}

fn header<'r>(response: &'r Response, name: &str) -> &'r str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_proxy_gets_the_gate() {
    let dir = tempfile::tempdir().unwrap();
    let key_file = dir.path().join("keys");
    std::fs::write(
        &key_file,
        format!("{}\n{}\n", key_line(1, "[]"), key_line(2, r#"["admin:all"]"#)),
    )
    .unwrap();
    let (upstream, heads) = upstream().await;
    let seen = Arc::new(AtomicUsize::new(0));
    let plain = Plain {
        upstream,
        seen: seen.clone(),
    };
    let (address, _stop) = serve(gated(plain, key_file).unwrap()).await;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::new();
    let ask = |path: &str, key: Option<String>| {
        let mut request = client
            .request(Method::GET, format!("http://{address}{path}"))
            .header("x-tollgate-organization-id", "org_of_somebody_else")
            .header("x_tollgate_scopes", "admin:all");
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.send()
    };

    let missing = ask("/things", None).await.unwrap();
    assert_eq!(missing.status(), 401);
    assert_eq!(header(&missing, "www-authenticate"), r#"Bearer realm="tollgate""#);
    assert_eq!(header(&missing, "content-type"), "application/json");
    assert!(missing.text().await.unwrap().contains("MISSING_API_KEY"));
    let unknown = ask("/things", Some(secret(3))).await.unwrap();
    assert_eq!(unknown.status(), 401);
    assert!(header(&unknown, "www-authenticate").contains("invalid_token"));
    let forbidden = ask("/admin/users", Some(secret(1))).await.unwrap();
    assert_eq!(forbidden.status(), 403);
    assert!(header(&forbidden, "www-authenticate").contains(r#"scope="admin:all""#));
    assert_eq!(ask("/admin%2fusers", Some(secret(1))).await.unwrap().status(), 400);
    assert_eq!(seen.load(Ordering::Relaxed), 0, "the service saw a refused request");
    assert!(heads.lock().unwrap().is_empty(), "a refused request went upstream");

    let allowed = ask("/admin/users", Some(secret(2))).await.unwrap();
    assert_eq!(allowed.status(), 200);
    for left in [2, 1, 0] {
        let passed = ask("/things", Some(secret(1))).await.unwrap();
        assert_eq!(passed.status(), 200);
        assert_eq!(header(&passed, "ratelimit-policy"), r#""default";q=3;w=3600"#);
        let expected = format!(r#""default";r={left};t="#);
        assert!(
            header(&passed, "ratelimit").starts_with(&expected),
            "{:?}",
            passed.headers()
        );
        assert_eq!(
            header(&passed, "x-plain"),
            "8",
            "the service's own hooks, with its own context"
        );
        assert!(!header(&passed, "x-request-id").is_empty());
        assert_eq!(passed.text().await.unwrap(), "hi");
    }
    let limited = ask("/things", Some(secret(1))).await.unwrap();
    assert_eq!(limited.status(), 429);
    let wait_s: u32 = header(&limited, "retry-after").parse().unwrap();
    assert!((3_500..=3_661).contains(&wait_s), "{wait_s}");
    assert!(header(&limited, "ratelimit").starts_with(r#""default";r=0"#));
    assert_eq!(
        ask("/things", Some(secret(2))).await.unwrap().status(),
        200,
        "another key's limit is its own"
    );

    let heads = heads.lock().unwrap();
    assert_eq!((heads.len(), seen.load(Ordering::Relaxed)), (5, 5));
    for head in &*heads {
        let head = head.to_ascii_lowercase();
        assert!(
            !head.contains("acme_live_") && !head.contains("authorization"),
            "{head}"
        );
        assert!(
            !head.contains("somebody_else") && !head.contains("x_tollgate"),
            "{head}"
        );
        assert!(
            head.contains("x-tollgate-organization-id: org_") && head.contains("x-request-id: "),
            "{head}"
        );
        assert!(
            head.contains("x-tollgate-tier: default") && head.contains("x-tollgate-environment: live"),
            "{head}"
        );
    }
    assert!(
        heads[1].to_ascii_lowercase().contains("x-tollgate-key-id: key_1"),
        "{}",
        heads[1]
    );
}
