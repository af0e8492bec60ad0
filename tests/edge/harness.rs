//! An edge around a small Pingora proxy, a recording upstream, and a raw client.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pingora::apps::ServerApp;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::HttpPeer;
use pingora::protocols::l4::stream::Stream as L4Stream;
use pingora::protocols::{GetSocketDigest, SocketDigest};
use pingora::proxy::{FailToProxy, HttpProxy, ProxyHttp, Session, http_proxy};
use pingora::server::configuration::ServerConf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tollgate::proxy::client_address::{TrustedProxies, forwarded_fields};
use tollgate::proxy::edge::{
    Edge, EdgeObserver, EdgeRefusal, EdgeSettings, end_body_once, filter_upgrade, guard_refusal, remove_claims,
};
use tollgate::proxy::guard::ConnectionInfo;
use tollgate::proxy::slots::Capped;
use tollgate::tls::ListenerTls;

/// What a real `ProxyHttp` behind an edge has to do, and nothing else.
pub struct Forwarder {
    trusted: TrustedProxies,
    upstream: Arc<AtomicU16>,
    /// Upgraded connections are kept while this is 0.
    pub revoked: Arc<AtomicUsize>,
}

impl Forwarder {
    /// Forwards to this port of 127.0.0.1.
    pub fn new(settings: &EdgeSettings, upstream: u16) -> Self {
        Forwarder {
            trusted: TrustedProxies::new(settings.trusted_proxies.clone()),
            upstream: Arc::new(AtomicU16::new(upstream)),
            revoked: Arc::new(AtomicUsize::new(0)),
        }
    }
}

async fn answer(session: &mut Session, refusal: &EdgeRefusal) -> u16 {
    let mut head = ResponseHeader::build(refusal.status, Some(3)).unwrap();
    let body = format!(
        r#"{{"success":false,"error":{{"code":"{}","message":"{}"}}}}"#,
        refusal.code, refusal.why
    );
    head.insert_header("content-type", "application/json").unwrap();
    head.insert_header("content-length", body.len()).unwrap();
    let _ = session.write_response_header(Box::new(head), false).await;
    let _ = session.write_response_body(Some(Bytes::from(body)), true).await;
    refusal.status
}

#[async_trait]
impl ProxyHttp for Forwarder {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn request_filter(&self, session: &mut Session, _: &mut ()) -> pingora::Result<bool> {
        let peer = session
            .client_addr()
            .and_then(|addr| addr.as_inet())
            .expect("a TCP peer")
            .ip();
        let is_tls = ConnectionInfo::of(session.digest())
            .expect("the edge attaches it")
            .is_tls;
        let (_, chain, proto) = forwarded_fields(peer, is_tls, &session.req_header().headers, &self.trusted);
        let may_upgrade = session.req_header().uri.path().starts_with("/ws");
        let request = session.req_header_mut();
        let wants_forwarding = request.headers.contains_key("x-show-client");
        filter_upgrade(request, may_upgrade);
        remove_claims(request);
        if wants_forwarding {
            request.insert_header("x-forwarded-for", chain)?;
            request.insert_header("x-forwarded-proto", proto)?;
        }
        if may_upgrade {
            let revoked = self.revoked.clone();
            ConnectionInfo::of(session.digest())
                .expect("the edge attaches it")
                .keep_while(move || revoked.load(Ordering::Relaxed) == 0);
        }
        Ok(false)
    }

    async fn request_body_filter(
        &self,
        _: &mut Session,
        body: &mut Option<Bytes>,
        end_of_stream: bool,
        _: &mut (),
    ) -> pingora::Result<()> {
        end_body_once(body, end_of_stream);
        Ok(())
    }

    async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> pingora::Result<Box<HttpPeer>> {
        let port = self.upstream.load(Ordering::SeqCst);
        Ok(Box::new(HttpPeer::new(("127.0.0.1", port), false, String::new())))
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &pingora::Error, _: &mut ()) -> FailToProxy {
        let code = match guard_refusal(error) {
            Some(refusal) if session.response_written().is_none() => answer(session, &refusal).await,
            Some(_) => 0,
            None if *error.esource() == pingora::ErrorSource::Upstream => {
                let _ = session.respond_error(502).await;
                502
            }
            None => 0,
        };
        FailToProxy {
            error_code: code,
            can_reuse_downstream: false,
        }
    }

    async fn logging(&self, _: &mut Session, _: Option<&pingora::Error>, _: &mut ()) {}

    fn suppress_error_log(&self, _: &Session, _: &(), _: &pingora::Error) -> bool {
        true
    }

    fn request_summary(&self, _: &Session, _: &()) -> String {
        String::new()
    }

    async fn upstream_request_filter(&self, _: &mut Session, _: &mut RequestHeader, _: &mut ()) -> pingora::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
pub struct Observed {
    pub refused: AtomicUsize,
    pub capped: Mutex<Vec<Capped>>,
    pub open: AtomicUsize,
    pub handshakes_failed: Mutex<Vec<String>>,
}

impl EdgeObserver for Observed {
    fn refused(&self, _: Option<SocketAddr>, _: &EdgeRefusal, request_id: &str) {
        assert_eq!(request_id.len(), 32);
        self.refused.fetch_add(1, Ordering::SeqCst);
    }

    fn connection_opened(&self) {
        self.open.fetch_add(1, Ordering::SeqCst);
    }

    fn connection_closed(&self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }

    fn capped(&self, _: Option<SocketAddr>, why: Capped) {
        self.capped.lock().unwrap().push(why);
    }

    fn handshake_failed(&self, _: Option<SocketAddr>, why: &str) {
        self.handshakes_failed.lock().unwrap().push(why.to_owned());
    }
}

/// A running edge. Dropping it stops accepting.
pub struct Door {
    pub address: SocketAddr,
    pub observed: Arc<Observed>,
    pub edge: Arc<Edge<Forwarder>>,
    pub shutdown: watch::Sender<bool>,
    pub revoked: Arc<AtomicUsize>,
    upstream: Arc<AtomicU16>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Door {
    pub async fn open(settings: EdgeSettings, tls: Option<Arc<ListenerTls>>) -> Self {
        let forwarder = Forwarder::new(&settings, 1);
        let (upstream, revoked) = (forwarder.upstream.clone(), forwarder.revoked.clone());
        let conf = Arc::new(ServerConf {
            threads: 1,
            ..ServerConf::default()
        });
        let proxy: HttpProxy<Forwarder> = http_proxy(&conf, forwarder);
        let observed = Arc::new(Observed::default());
        let edge = Arc::new(Edge::new(settings, Arc::new(proxy), tls, observed.clone()));
        let (shutdown, watch) = watch::channel(false);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepted_by = edge.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, peer)) = listener.accept().await else {
                    continue;
                };
                let edge = accepted_by.clone();
                let watch = watch.clone();
                tokio::spawn(async move {
                    use std::os::fd::AsRawFd;
                    stream.set_nodelay(true).unwrap();
                    let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
                    digest.peer_addr.set(Some(peer.into())).unwrap();
                    let mut stream = L4Stream::from(stream);
                    stream.set_socket_digest(digest);
                    edge.process_new(Box::new(stream), &watch).await;
                });
            }
        });
        Door {
            address,
            observed,
            edge,
            shutdown,
            revoked,
            upstream,
            accepting,
        }
    }

    /// A fresh upstream, to which requests go from now on.
    pub async fn upstream(&self) -> Upstream {
        let upstream = Upstream::start().await;
        self.upstream.store(upstream.port, Ordering::SeqCst);
        upstream
    }

    /// Requests go to this port from now on.
    pub fn forward_to(&self, port: u16) {
        self.upstream.store(port, Ordering::SeqCst);
    }

    pub async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }
}

/// Records every byte that it is sent, cut into messages as a strict HTTP/1.1 server would cut them.
pub struct Upstream {
    pub port: u16,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Upstream {
    pub async fn start() -> Self {
        Self::saying("ok").await
    }

    pub async fn saying(usual: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let record = seen.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                tokio::spawn(serve_recording(stream, record.clone(), usual));
            }
        });
        Upstream { port, seen, accepting }
    }

    /// What came, message by message.
    pub fn seen(&self) -> Vec<String> {
        let all = self.seen.lock().unwrap();
        all.iter()
            .filter(|message| !message.is_empty())
            .map(|message| message.escape_ascii().to_string())
            .collect()
    }
}

/// Answers `/early` before it reads the body, `/never` not at all, `/ws…` with a 101 and an echo, `/big` with a
/// megabyte, and everything else with the usual body when the whole message is there.
async fn serve_recording(mut stream: TcpStream, record: Arc<Mutex<Vec<Vec<u8>>>>, usual: &str) {
    let mut buffer = Vec::new();
    loop {
        let at = {
            let mut all = record.lock().unwrap();
            all.push(Vec::new());
            all.len() - 1
        };
        let note = |bytes: &[u8]| record.lock().unwrap()[at].extend_from_slice(bytes);
        let head_end = loop {
            if let Some(end) = find(&buffer, b"\r\n\r\n") {
                break end + 4;
            }
            if read_some(&mut stream, &mut buffer).await == 0 {
                note(&buffer);
                return;
            }
        };
        let head = String::from_utf8_lossy(&buffer[..head_end]).to_ascii_lowercase();
        note(&buffer[..head_end]);
        buffer.drain(..head_end);
        let path = head.split(' ').nth(1).unwrap_or("").to_owned();
        if path.starts_with("/early") {
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly")
                .await;
        }
        if path.starts_with("/ws") && head.contains("upgrade: websocket") {
            let _ = stream
                .write_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
                .await;
            loop {
                note(&buffer);
                if stream.write_all(&buffer).await.is_err() {
                    return;
                }
                buffer.clear();
                if read_some(&mut stream, &mut buffer).await == 0 {
                    return;
                }
            }
        }
        if head.contains("expect: 100-continue") {
            let _ = stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await;
        }
        let length = header(&head, "content-length").and_then(|value| value.parse::<usize>().ok());
        let chunked = header(&head, "transfer-encoding").is_some();
        loop {
            let end = if chunked {
                chunked_end(&buffer)
            } else {
                Some(length.unwrap_or(0))
            };
            match end {
                Some(end) if end <= buffer.len() => {
                    note(&buffer[..end]);
                    buffer.drain(..end);
                    break;
                }
                _ => {}
            }
            if read_some(&mut stream, &mut buffer).await == 0 {
                note(&buffer);
                note(b"<cut>");
                return;
            }
        }
        if path.starts_with("/never") {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
        let wait = path
            .strip_prefix("/delay/")
            .and_then(|ms| ms.parse::<u64>().ok())
            .unwrap_or(0);
        tokio::time::sleep(Duration::from_millis(wait)).await;
        if path.starts_with("/early") {
            continue;
        }
        let body = if path.starts_with("/big") {
            vec![b'x'; 16 << 20]
        } else {
            usual.as_bytes().to_vec()
        };
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        if stream.write_all(head.as_bytes()).await.is_err() || stream.write_all(&body).await.is_err() {
            return;
        }
    }
}

/// Where a chunked body without extensions and trailers ends.
fn chunked_end(body: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let line = find(&body[at..], b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&body[at..at + line]).ok()?, 16).ok()?;
        at += line + 2 + size + 2;
        if at > body.len() {
            return None;
        }
        if size == 0 {
            return Some(at);
        }
    }
}

async fn read_some(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> usize {
    stream.read_buf(buffer).await.unwrap_or(0)
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// One response, as a client with no opinions reads it.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

/// Reads responses off a stream.
pub struct Reader<S> {
    pub stream: S,
    pub buffer: Vec<u8>,
}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Reader<S> {
    pub fn new(stream: S) -> Self {
        Reader {
            stream,
            buffer: Vec::new(),
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        // A refused request may find its connection closed before it is all written.
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    /// The next response; `None` at the end of the connection.
    pub async fn response(&mut self) -> Option<Response> {
        self.try_response().await.expect("a response, or the end, in time")
    }

    /// The next response, unless it takes too long.
    pub async fn try_response(&mut self) -> Result<Option<Response>, tokio::time::error::Elapsed> {
        tokio::time::timeout(PATIENCE, self.read_response()).await
    }

    async fn read_response(&mut self) -> Option<Response> {
        let end = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break end + 4;
            }
            if self.stream.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                return None;
            }
        };
        let head = String::from_utf8(self.buffer[..end].to_vec()).expect("a head is ASCII");
        self.buffer.drain(..end);
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .expect("a status line");
        let length = header(&head.to_ascii_lowercase(), "content-length")
            .and_then(|v| v.parse().ok())
            .unwrap_or(0);
        while self.buffer.len() < length {
            if self.stream.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                break;
            }
        }
        let body = self.buffer.drain(..length.min(self.buffer.len())).collect();
        Some(Response { status, head, body })
    }

    /// Whether the other side closes now.
    pub async fn is_closed(&mut self) -> bool {
        let mut byte = [0u8; 1];
        matches!(
            tokio::time::timeout(PATIENCE, self.stream.read(&mut byte)).await,
            Ok(Ok(0) | Err(_))
        )
    }
}

/// No test waits longer than this for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(5);
