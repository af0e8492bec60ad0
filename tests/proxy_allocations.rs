//! What a request costs in heap allocations: the whole proxy, from the strict edge to the upstream and back, beside a
//! bare Pingora proxy that checks nothing.
//!
//! Times on a shared machine say little; these counts are the same on every one, so they guard against regressions.
//! An allocator that counts stands under everything. All runs on one thread, where nothing is left to chance, and what
//! client and upstream ask for is left out.

#[path = "gate_support/mod.rs"]
mod gate_support;

use async_trait::async_trait;
use gate_support::{hourly, key, keyed, secret, settings};
use pingora::apps::ServerApp;
use pingora::protocols::l4::stream::Stream;
use pingora::proxy::{ProxyHttp, Session, http_proxy};
use pingora::server::configuration::ServerConf;
use pingora::upstreams::peer::HttpPeer;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tollgate::clock::Clock;
use tollgate::proxy::edge::{Edge, EdgeObserver, EdgeSettings};
use tollgate::proxy::{Balance, Proxy, ResponseSettings, ServerSettings, Settings, Timeouts, UpstreamSettings};

/// Allocations of a request that passes. Lower them with pride; raising them needs a reason.
const PASSED: u64 = 9;
/// Of one whose key cannot be a key.
const MALFORMED_KEY: u64 = 18;
/// Of one over its limit.
const RATE_LIMITED: u64 = 24;

/// Requests that are counted; the figure is their mean, rounded down.
const REQUESTS: u64 = 200;
/// Requests before that, until buffers, timers and the key's window are there.
const WARM_UP: u64 = 50;
const LIMIT: u32 = 1_000;

struct Counting;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
    static IS_ASIDE: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if !IS_ASIDE.get() {
        CALLS.set(CALLS.get() + 1);
    }
}

/// A future whose allocations do not count.
async fn aside<F: Future>(future: F) -> F::Output {
    let mut future = Box::pin(future);
    poll_fn(|context| {
        IS_ASIDE.set(true);
        let polled = future.as_mut().poll(context);
        IS_ASIDE.set(false);
        polled
    })
    .await
}

// SAFETY: every method hands its arguments unchanged to `System`, which keeps the trait's contract, and returns what
// that returns; the caller's duties are the same. Counting touches constant-initialised thread-local cells without
// destructors only, which neither allocate nor unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller vouches for `layout`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller vouches for `layout`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller got `memory` from this allocator, that is from `System`, with this layout.
        unsafe { System.realloc(memory, layout, new_size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller got `memory` from this allocator, that is from `System`, with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[tokio::test(flavor = "current_thread")]
async fn a_request_allocates_no_more_than_one_through_bare_pingora() {
    let upstream = upstream().await;
    let bare = serve(Arc::new(http_proxy(&conf(), Bare(upstream)))).await;
    let tollgate = serve(Arc::new(edge(upstream))).await;
    let key = format!("x-api-key: {}\r\n", secret(1));

    let through_bare = aside(allocations(bare, &key, "200")).await;
    let passed = aside(allocations(tollgate, &key, "200")).await;
    let malformed = aside(allocations(tollgate, "x-api-key: junk\r\n", "401")).await;
    aside(spend_the_rest(tollgate, &key)).await;
    let limited = aside(allocations(tollgate, &key, "429")).await;

    println!("bare Pingora {through_bare}, passed {passed}, malformed key {malformed}, over the limit {limited}");
    assert!(
        passed <= through_bare,
        "a passing request allocates {passed} times, one through bare Pingora {through_bare} times"
    );
    for (what, counted, kept) in [
        ("a passing request", passed, PASSED),
        ("a malformed key", malformed, MALFORMED_KEY),
        ("a request over its limit", limited, RATE_LIMITED),
    ] {
        assert!(
            counted <= kept,
            "{what} allocates {counted} times; the figure kept in this file is {kept}"
        );
    }
}

/// The smallest Pingora proxy, default modules and all.
struct Bare(SocketAddr);

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> pingora::Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.0, false, String::new())))
    }
}

struct Nobody;

impl EdgeObserver for Nobody {}

fn conf() -> Arc<ServerConf> {
    Arc::new(ServerConf::default())
}

/// The proxy behind its strict edge, as `app` puts it together.
fn edge(upstream: SocketAddr) -> Edge<Proxy> {
    let mut policy = settings(LIMIT);
    policy.tiers.push(("things".into(), hourly(LIMIT)));
    policy.routes.push(keyed("/v1/**", Some("things:read"), "things", None));
    let gate = Arc::new(gate_support::gate(policy, [key(1, 1)]));
    let minute = Duration::from_secs(60);
    let settings = Settings {
        header_prefix: "x-tollgate-".into(),
        response: ResponseSettings::default(),
        upstreams: vec![UpstreamSettings {
            name: "up".into(),
            servers: vec![ServerSettings {
                host: upstream.ip().to_string(),
                address: upstream,
                weight: 1,
            }],
            balance: Balance::RoundRobin,
            tls: None,
            http2: false,
            timeouts: Timeouts {
                connect: minute,
                read: minute,
                write: minute,
                idle: minute,
            },
            retries: 1,
            health: None,
        }],
        trusted_proxies: vec![],
        upstream_pool: 16,
        count_keys: false,
    };
    let proxy = Proxy::new(&settings, gate, Clock::system(), None).expect("a prefix that is fit for a header");
    let whole = Arc::new(http_proxy(&conf(), proxy.clone()));
    Edge::new(EdgeSettings::default(), whole, None, Arc::new(Nobody)).going_directly(proxy)
}

/// Serves for as long as the test lasts.
async fn serve<A: ServerApp + Send + Sync + 'static>(app: Arc<A>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound address");
    tokio::spawn(async move {
        let (_stop, stopped) = watch::channel(false);
        while let Ok((stream, _)) = listener.accept().await {
            // As Pingora's listeners do; otherwise each answer waits for a delayed acknowledgement.
            stream.set_nodelay(true).expect("a socket of ours");
            let (app, stopped) = (app.clone(), stopped.clone());
            tokio::spawn(async move { app.process_new(Box::new(Stream::from(stream)), &stopped).await });
        }
    });
    address
}

/// Answers every request with the same 36 bytes.
async fn upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound address");
    let answer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 36\r\n\r\n\
                  {\"ok\":true,\"data\":\"0123456789abcde\"}";
    tokio::spawn(aside(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(aside(async move {
                let mut seen = Vec::new();
                while let Ok(1..) = stream.read_buf(&mut seen).await {
                    if seen.ends_with(b"\r\n\r\n") {
                        seen.clear();
                        stream.write_all(answer.as_bytes()).await.expect("a reader");
                    }
                }
            }));
        }
    }));
    address
}

/// Allocations of one request on a kept-alive connection.
async fn allocations(server: SocketAddr, credential: &str, status: &str) -> u64 {
    let mut client = Client::connect(server).await;
    for _ in 0..WARM_UP {
        assert_eq!(client.request(credential).await, status);
    }
    let before = CALLS.get();
    for _ in 0..REQUESTS {
        assert_eq!(client.request(credential).await, status);
    }
    // The first request's start and the last one's end do not make up a whole one.
    (CALLS.get() - before) / REQUESTS
}

async fn spend_the_rest(server: SocketAddr, credential: &str) {
    let mut client = Client::connect(server).await;
    for _ in 0..LIMIT {
        if client.request(credential).await != "200" {
            return;
        }
    }
    panic!("the limit was never reached");
}

struct Client(TcpStream);

impl Client {
    async fn connect(server: SocketAddr) -> Self {
        Client(TcpStream::connect(server).await.expect("a server that listens"))
    }

    /// Sends a request; the status of its answer, which is read whole.
    async fn request(&mut self, credential: &str) -> String {
        let head = format!(
            "GET /v1/things?page=2 HTTP/1.1\r\nHost: api.example\r\nUser-Agent: test/1\r\nAccept: */*\r\n{credential}\r\n"
        );
        self.0.write_all(head.as_bytes()).await.expect("a server that reads");
        let mut answer = Vec::new();
        loop {
            let read = self.0.read_buf(&mut answer).await.expect("an answer");
            assert_ne!(read, 0, "the server closed the connection");
            let text = String::from_utf8_lossy(&answer);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
                if body.len() == length.expect("a length").parse::<usize>().expect("a number") {
                    return head[9..12].to_owned();
                }
            }
        }
    }
}
