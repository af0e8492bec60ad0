//! Load as well-behaved clients make it: they honour `Connection: close` and GOAWAY, and retry nothing.

use crate::gate::secret;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Requests numbered 0 to `most` − 1, request n with key n modulo `keys`.
pub struct Load {
    address: String,
    most: usize,
    keys: usize,
    next: AtomicUsize,
    pub done: AtomicUsize,
    /// How often each request was answered 200.
    pub answered: Vec<AtomicU8>,
    /// By kind of client.
    pub by_kind: [AtomicUsize; 4],
    pub connections: AtomicUsize,
}

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    KeptAlive,
    Http2,
    LongBody,
    Slow,
}

impl Load {
    pub fn new(address: &str, most: usize, keys: usize) -> Arc<Self> {
        Arc::new(Load {
            address: address.to_owned(),
            most,
            keys,
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            answered: (0..most).map(|_| AtomicU8::new(0)).collect(),
            by_kind: Default::default(),
            connections: AtomicUsize::new(0),
        })
    }

    /// A client of this kind, until all requests are made. It panics at the first that fails.
    pub fn client(self: &Arc<Self>, kind: Kind) -> JoinHandle<()> {
        let load = self.clone();
        tokio::spawn(async move {
            match kind {
                Kind::Http2 => load.http2().await,
                _ => load.http1(kind).await,
            }
        })
    }

    fn take(&self) -> Option<usize> {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        (n < self.most).then_some(n)
    }

    fn answered(&self, n: usize, kind: Kind) {
        self.answered[n].fetch_add(1, Ordering::Relaxed);
        self.by_kind[kind as usize].fetch_add(1, Ordering::Relaxed);
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    async fn http1(&self, kind: Kind) {
        let mut connection = None;
        while let Some(n) = self.take() {
            let mut open = match connection.take() {
                Some(open) => open,
                None => {
                    self.connections.fetch_add(1, Ordering::Relaxed);
                    Connection::open(&self.address).await
                }
            };
            let answer = open.exchange(kind, n, &secret(n % self.keys)).await;
            let answer = answer.unwrap_or_else(|error| panic!("request {n} ({kind:?}): {error}"));
            assert_eq!(answer.status, 200, "request {n} ({kind:?})");
            self.answered(n, kind);
            if !answer.closes {
                connection = Some(open);
            }
        }
    }

    async fn http2(&self) {
        let client = reqwest::Client::builder()
            .no_proxy()
            .http2_prior_knowledge()
            .retry(reqwest::retry::never())
            .build()
            .unwrap();
        while let Some(n) = self.take() {
            let request = client
                .get(format!("http://{}/h2", self.address))
                .header("x-api-key", secret(n % self.keys))
                .header("x-request-id", format!("r-{n}"));
            let response = request.send().await;
            let response = response.unwrap_or_else(|error| panic!("request {n} over HTTP/2: {error:?}"));
            assert_eq!(response.status(), 200, "request {n} over HTTP/2");
            let body = response.bytes().await;
            body.unwrap_or_else(|error| panic!("the answer to {n} over HTTP/2: {error:?}"));
            self.answered(n, Kind::Http2);
        }
    }
}

/// The least of HTTP/1 that a load generator needs: it costs less than the gate it drives.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

struct Answer {
    status: u16,
    closes: bool,
}

impl Connection {
    async fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Connection { stream, buffer: vec![] }
    }

    async fn exchange(&mut self, kind: Kind, n: usize, key: &str) -> std::io::Result<Answer> {
        let (line, body) = match kind {
            Kind::LongBody => ("POST /body", BODY_BYTES),
            Kind::Slow => ("GET /slow", 0),
            _ => ("GET /small", 0),
        };
        let length = if body > 0 {
            format!("content-length: {body}\r\n")
        } else {
            String::new()
        };
        let head = format!("{line} HTTP/1.1\r\nhost: h\r\nx-api-key: {key}\r\nx-request-id: r-{n}\r\n{length}\r\n");
        self.stream.write_all(head.as_bytes()).await?;
        if body > 0 {
            self.stream.write_all(&vec![b'b'; body]).await?;
        }
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(std::io::Error::other("the connection was closed before the answer"));
            }
            let Some(head) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") else {
                continue;
            };
            let text = std::str::from_utf8(&self.buffer[..head]).map_err(std::io::Error::other)?;
            let field = |name: &str| {
                text.lines().skip(1).find_map(|line| {
                    let (its, value) = line.split_once(':')?;
                    its.eq_ignore_ascii_case(name)
                        .then(|| value.trim().to_ascii_lowercase())
                })
            };
            let length: usize = field("content-length").and_then(|value| value.parse().ok()).unwrap();
            if self.buffer.len() >= head + 4 + length {
                return Ok(Answer {
                    status: text[9..12].parse().map_err(std::io::Error::other)?,
                    closes: field("connection").is_some_and(|value| value == "close"),
                });
            }
        }
    }
}

const BODY_BYTES: usize = 512 << 10;
