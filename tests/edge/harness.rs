//! An edge in front of either way, a recording upstream, and a raw client.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pingora::apps::ServerApp;
use pingora::protocols::l4::stream::Stream as L4Stream;
use pingora::protocols::{GetSocketDigest, SocketDigest};
use pingora::proxy::ProxyHttp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tollgate::proxy::edge::{Activity, Edge, EdgeObserver, EdgeRefusal, EdgeSettings};
use tollgate::proxy::slots::{Capped, Slots};
use tollgate::tls::ListenerTls;

use crate::ways::{Direct, Forwarder, Way};

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
    pub activity: Arc<Activity>,
    pub slots: Arc<Slots>,
    pub shutdown: watch::Sender<bool>,
    /// Connections that the [`Forwarder`] upgraded are kept while this is 0.
    pub revoked: Arc<AtomicUsize>,
    forward_to: Box<dyn Fn(u16) + Send + Sync>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Door {
    pub async fn open(way: Way, settings: EdgeSettings, tls: Option<Arc<ListenerTls>>) -> Self {
        let observed = Arc::new(Observed::default());
        match way {
            Way::Pingora => {
                let forwarder = Forwarder::new(&settings, 1);
                let (upstream, revoked) = (forwarder.upstream.clone(), forwarder.revoked.clone());
                let edge = forwarder.edge(settings, tls, observed.clone());
                let forward_to = move |port| upstream.store(port, Ordering::SeqCst);
                Self::before(edge, observed, revoked, Box::new(forward_to)).await
            }
            Way::Direct => {
                let direct = Direct::new(&settings, 1);
                let edge = direct.edge(settings, tls, observed.clone());
                let forward_to = move |port| direct.forward_to(port);
                Self::before(edge, observed, Arc::default(), Box::new(forward_to)).await
            }
        }
    }

    async fn before<P>(
        edge: Edge<P>,
        observed: Arc<Observed>,
        revoked: Arc<AtomicUsize>,
        forward_to: Box<dyn Fn(u16) + Send + Sync>,
    ) -> Self
    where
        P: ProxyHttp + Send + Sync + 'static,
        P::CTX: Send + Sync,
    {
        let edge = Arc::new(edge);
        let (activity, slots) = (edge.activity().clone(), edge.slots().clone());
        let (shutdown, watch) = watch::channel(false);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((stream, peer)) = listener.accept().await else {
                    continue;
                };
                let edge = edge.clone();
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
            activity,
            slots,
            shutdown,
            revoked,
            forward_to,
            accepting,
        }
    }

    /// A fresh upstream, to which requests go from now on.
    pub async fn upstream(&self) -> Upstream {
        let upstream = Upstream::start().await;
        self.forward_to(upstream.port);
        upstream
    }

    /// Requests go to this port from now on.
    pub fn forward_to(&self, port: u16) {
        (self.forward_to)(port);
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
                // Head and body are written apart, and would wait for each other's acknowledgement.
                stream.set_nodelay(true).unwrap();
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

/// Answers `/early` before it reads the body, `/never` not at all, `/ws…` with a 101 and an echo, `/big` with 16 MiB,
/// `/echo…` with its path, and everything else with the usual body when the whole message is there.
async fn serve_recording(mut stream: TcpStream, record: Arc<Mutex<Vec<Vec<u8>>>>, usual: &str) {
    let mut buffer = Vec::new();
    loop {
        let head_end = loop {
            if let Some(end) = find(&buffer, b"\r\n\r\n") {
                break end + 4;
            }
            if read_some(&mut stream, &mut buffer).await == 0 {
                record.lock().unwrap().push(buffer);
                return;
            }
        };
        // Only now, so that messages on several connections are in the order in which they came.
        let at = {
            let mut all = record.lock().unwrap();
            all.push(Vec::new());
            all.len() - 1
        };
        let note = |bytes: &[u8]| record.lock().unwrap()[at].extend_from_slice(bytes);
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
        } else if path.starts_with("/echo") {
            path.into_bytes()
        } else {
            usual.as_bytes().to_vec()
        };
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        let body = if head.starts_with("head ") { &[][..] } else { &body };
        if stream.write_all(answer.as_bytes()).await.is_err() || stream.write_all(body).await.is_err() {
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

pub fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
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
        tokio::time::timeout(PATIENCE, self.read_response(true)).await
    }

    /// The next response, which is one to HEAD: whatever length it announces, nothing is behind it.
    pub async fn response_to_head(&mut self) -> Option<Response> {
        let read = tokio::time::timeout(PATIENCE, self.read_response(false)).await;
        read.expect("a response, or the end, in time")
    }

    async fn read_response(&mut self, has_body: bool) -> Option<Response> {
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
            .filter(|_| has_body)
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
