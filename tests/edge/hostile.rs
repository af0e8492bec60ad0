//! What hostility costs: an edge in a process of its own, under Pingora's own listener, with nginx behind it.
//!
//! `TOLLGATE_RESULTS=1` writes the tables to `benches/results/hostile_cpu.md` and `hostile_memory.md`, and those of the
//! direct way to files of these names that end in `_directly`.
//! `serve` is not a test but the server, run by the tests here from this same binary; by hand:
//! `EDGE_UPSTREAM=PORT [EDGE_WAY=direct] cargo test --test edge hostile::serve -- --ignored --exact --nocapture`.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora::listeners::{L4BufferSettings, ListenerConfig};
use pingora::proxy::ProxyHttp;
use pingora::services::Service as _;
use pingora::services::listening::Service;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tollgate::proxy::edge::{Edge, EdgeSettings};

use crate::differential::nginx;
use crate::h2raw::{self, END_HEADERS, END_STREAM, H2, HEADERS, RST_STREAM, block, frame};
use crate::harness::{Observed, Reader};
use crate::ways::{Direct, Forwarder, Way, over_both_ways};

over_both_ways!(
    out_of_descriptors_it_neither_spins_nor_stays_shut,
    hostile_requests_cost_at_most_ten_honest_ones,
    connections_at_their_worst_take_little_memory,
    a_crowd_of_slow_clients_harms_nobody
);

const GET: &[u8] = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n";

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
#[ignore = "the server of the other tests here"]
fn serve() {
    let milliseconds = |name: &str, default: Duration| number(name).map_or(default, Duration::from_millis);
    let defaults = EdgeSettings::default();
    let settings = EdgeSettings {
        h2c: true,
        head_deadline: milliseconds("EDGE_HEAD_MS", defaults.head_deadline),
        body_grace: milliseconds("EDGE_BODY_MS", defaults.body_grace),
        response_grace: milliseconds("EDGE_RESPONSE_MS", defaults.response_grace),
        connections_per_address: 20_000,
        ..defaults
    };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let upstream = number("EDGE_UPSTREAM").expect("EDGE_UPSTREAM is a port") as u16;
    let observer = Arc::new(Observed::default());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    match std::env::var(EDGE_WAY).as_deref() {
        Ok("direct") => {
            let edge = Direct::new(&settings, upstream).edge(settings, None, observer);
            runtime.block_on(serve_until_told(edge, port));
        }
        _ => {
            let edge = Forwarder::new(&settings, upstream).edge(settings, None, observer);
            runtime.block_on(serve_until_told(edge, port));
        }
    }
    std::process::exit(0);
}

/// The variable that says which way the server lets plain requests go.
const EDGE_WAY: &str = "EDGE_WAY";

async fn serve_until_told<P>(edge: Edge<P>, port: u16)
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    let mut service = Service::new("edge".to_owned(), edge);
    let address = format!("127.0.0.1:{port}");
    // The edge reads into a buffer of its own; another one of 64 KiB before it would only cost memory and a copy.
    service.add_listener(ListenerConfig::tcp(&address).l4_buffer(L4BufferSettings::default().read(0)));
    let (_shutdown, watch) = tokio::sync::watch::channel(false);
    tokio::spawn(async move { service.start_service(None, watch, 1).await });
    while TcpStream::connect(&address).await.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("address {address}");
    std::io::stdout().flush().unwrap();
    // Until the test that started us closes our standard input.
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()))
        .await
        .unwrap()
        .unwrap();
}

/// The server in its own process.
pub struct Served {
    child: Child,
    address: SocketAddr,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Served {
    /// `limit` is for `ulimit -n`.
    pub fn start(way: Way, upstream: u16, limit: Option<u32>, settings: &[(&str, &str)]) -> Self {
        let executable = std::env::current_exe().unwrap();
        let limit = limit.map_or(String::new(), |limit| format!("ulimit -n {limit}; "));
        let mut child = Command::new("sh")
            .arg("-c")
            .arg(format!(
                "{limit}exec \"{}\" hostile::serve --ignored --exact --nocapture",
                executable.display()
            ))
            .env("EDGE_UPSTREAM", upstream.to_string())
            .env(EDGE_WAY, if way == Way::Direct { "direct" } else { "pingora" })
            .envs(settings.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("the server says where it is").unwrap();
            if let Some((_, address)) = line.split_once("address ") {
                break address.parse().unwrap();
            }
        };
        // Nobody reads further; the pipe stays open so that printing does not fail.
        std::mem::forget(lines);
        Served { child, address }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// CPU time so far, in clock ticks of 10 ms.
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn descriptors(&self) -> usize {
        Path::new(&format!("/proc/{}/fd", self.child.id()))
            .read_dir()
            .unwrap()
            .count()
    }

    async fn is_well(&self) -> bool {
        let mut client = Reader::new(self.connect().await);
        client.send(GET).await;
        matches!(client.try_response().await, Ok(Some(response)) if response.status == 200)
    }
}

/// Without descriptors left, accepting rests instead of spinning, and goes on when some come back.
async fn out_of_descriptors_it_neither_spins_nor_stays_shut(way: Way) {
    let directory = tempfile::tempdir().unwrap();
    let nginx = nginx(directory.path());
    let served = Served::start(way, nginx.port(), Some(64), &[]);
    assert!(served.is_well().await);
    let mut held = Vec::new();
    for _ in 0..200 {
        held.push(served.connect().await);
    }
    let before = served.cpu();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let spent = served.cpu() - before;
    assert!(spent < Duration::from_millis(600), "{spent:?} of CPU in 3 s: it spins");
    drop(held);
    let started = Instant::now();
    while !served.is_well().await {
        assert!(started.elapsed() < Duration::from_secs(10), "it does not come back");
    }
}

/// Keeps a table where it was asked for.
fn record(way: Way, name: &str, title: &str, how: &str, table: &str) {
    println!("{title}, {way}:\n{table}");
    if std::env::var_os("TOLLGATE_RESULTS").is_none() {
        return;
    }
    let text = format!(
        "# {title}\n\nWritten by `TOLLGATE_RESULTS=1 CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo nextest run --test edge hostile::`. \
         {how}\n\n{table}"
    );
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    let suffix = match way {
        Way::Pingora => "",
        Way::Direct => "_directly",
    };
    std::fs::write(results.join(format!("{name}{suffix}.md")), text).unwrap();
}

/// One hostile request of a class, from connecting to the end.
type Attack = for<'a> fn(&'a Served) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

async fn raw(served: &Served, bytes: &[u8]) {
    let mut client = served.connect().await;
    let _ = client.write_all(bytes).await;
    let mut answer = [0u8; 4096];
    while matches!(
        tokio::time::timeout(Duration::from_secs(15), client.read(&mut answer)).await,
        Ok(Ok(1..))
    ) {}
}

async fn honest(served: &Served, bytes: &[u8]) {
    let mut client = Reader::new(served.connect().await);
    client.send(bytes).await;
    assert_eq!(client.response().await.expect("an answer").status, 200);
}

async fn h2_end(mut h2: H2<TcpStream>) {
    while h2.next_frame().await.is_some() {}
}

const HONEST: &str = "honest GET";
const RAPID_RESET: &str = "HTTP/2 rapid reset";

const CLASSES: &[(&str, Attack)] = &[
    (HONEST, |served| Box::pin(honest(served, GET))),
    ("no Host", |served| Box::pin(raw(served, b"GET / HTTP/1.1\r\n\r\n"))),
    ("length and encoding", |served| {
        Box::pin(raw(
            served,
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ))
    }),
    ("dots in the path", |served| {
        Box::pin(raw(served, b"GET /a/../../b HTTP/1.1\r\nHost: a\r\n\r\n"))
    }),
    ("TLS on a plain port", |served| {
        Box::pin(raw(served, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"))
    }),
    ("a line of 40 KiB", |served| {
        Box::pin(async move { raw(served, &[b'A'; 40 * 1024]).await })
    }),
    ("1,000 fields", |served| {
        Box::pin(async move {
            raw(
                served,
                format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(1000)).as_bytes(),
            )
            .await;
        })
    }),
    ("100 fields of 300 bytes", |served| {
        Box::pin(async move {
            let field = format!("X: {}\r\n", "y".repeat(300));
            honest(
                served,
                format!("GET /a HTTP/1.1\r\nHost: a\r\n{}\r\n", field.repeat(99)).as_bytes(),
            )
            .await;
        })
    }),
    ("a path of 8 KiB of encodings", |served| {
        Box::pin(async move {
            honest(
                served,
                format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "%C3%A9".repeat(1360)).as_bytes(),
            )
            .await;
        })
    }),
    ("a head in pieces of 1 byte", |served| {
        Box::pin(async move {
            let mut client = Reader::new(served.connect().await);
            for byte in GET {
                client.send(&[*byte]).await;
            }
            assert_eq!(client.response().await.expect("an answer").status, 200);
        })
    }),
    ("100 chunks of 1 byte", |served| {
        Box::pin(async move {
            let chunks = "1\r\nx\r\n".repeat(100);
            honest(
                served,
                format!("POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n")
                    .as_bytes(),
            )
            .await;
        })
    }),
    ("a malformed chunk", |served| {
        Box::pin(raw(
            served,
            b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n",
        ))
    }),
    ("HTTP/2 honest GET", |served| {
        Box::pin(async move {
            let mut h2 = H2::start(served.connect().await).await;
            h2.request(1, h2raw::GET, None).await;
            assert!(matches!(
                h2.outcome(1).await,
                h2raw::Outcome::Response { status: 200, .. }
            ));
        })
    }),
    ("HTTP/2 malformed block", |served| {
        Box::pin(async move {
            let mut h2 = H2::start(served.connect().await).await;
            h2.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff; 100]))
                .await;
            h2_end(h2).await;
        })
    }),
    ("HTTP/2 dots in the path", |served| {
        Box::pin(async move {
            let mut h2 = H2::start(served.connect().await).await;
            let fields = [
                (":method", "GET"),
                (":scheme", "http"),
                (":path", "/a/../b"),
                (":authority", "a"),
            ];
            h2.request(1, &fields, None).await;
            assert!(matches!(
                h2.outcome(1).await,
                h2raw::Outcome::Response { status: 400, .. }
            ));
        })
    }),
    ("HTTP/2 1,000 pings", |served| {
        Box::pin(async move {
            let mut h2 = H2::start(served.connect().await).await;
            h2.send(&frame(6, 0, 0, &[0; 8]).repeat(1010)).await;
            h2_end(h2).await;
        })
    }),
];

/// Resets count as requests: each opened a stream.
async fn rapid_reset(served: &Served, requests: u32) {
    let mut h2 = H2::start(served.connect().await).await;
    let block = block(h2raw::GET);
    let mut bytes = Vec::new();
    for i in 0..requests {
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, i * 2 + 1, &block));
        bytes.extend(frame(RST_STREAM, 0, i * 2 + 1, &8u32.to_be_bytes()));
    }
    h2.send(&bytes).await;
    h2.send(&frame(6, 0, 0, &[0; 8])).await;
    while let Some((kind, flags, ..)) = h2.next_frame().await {
        if kind == 6 && flags & 1 == 1 {
            break;
        }
    }
}

async fn hostile_requests_cost_at_most_ten_honest_ones(way: Way) {
    const REQUESTS: u32 = 300;
    let directory = tempfile::tempdir().unwrap();
    let nginx = nginx(directory.path());
    let served = Served::start(way, nginx.port(), None, &[]);
    for _ in 0..100 {
        honest(&served, GET).await;
    }
    let mut table = String::from("| class | CPU µs a request | × honest |\n|---|---|---|\n");
    let mut honest_us = 0.0;
    let mut too_dear = Vec::new();
    let mut rows: Vec<(&str, Duration, u32)> = Vec::new();
    // What never goes directly is compared with an honest one that does not either.
    let is_compared = |name: &str| way == Way::Pingora || !(name.starts_with("HTTP/2") || name.contains("chunk"));
    for (name, attack) in CLASSES.iter().filter(|(name, _)| is_compared(name)) {
        // The kernel counts in steps of 10 ms: what all others are divided by has to be many of them.
        let requests = match *name {
            HONEST => 10 * REQUESTS,
            _ => REQUESTS,
        };
        let before = served.cpu();
        for _ in 0..requests / 10 {
            let batch: Vec<_> = (0..10).map(|_| attack(&served)).collect();
            futures_util::future::join_all(batch).await;
        }
        rows.push((name, served.cpu() - before, requests));
    }
    if is_compared(RAPID_RESET) {
        let before = served.cpu();
        for _ in 0..3 {
            rapid_reset(&served, 300).await;
        }
        rows.push((RAPID_RESET, served.cpu() - before, 900));
    }
    for (name, cpu, requests) in rows {
        let us = cpu.as_secs_f64() * 1e6 / f64::from(requests);
        if name == HONEST {
            honest_us = us;
        }
        let ratio = us / honest_us;
        table += &format!("| {name} | {us:.0} | {ratio:.2} |\n");
        // A thousand control frames are a thousand times one.
        if ratio > 10.0 {
            too_dear.push(name);
        }
    }
    record(
        way,
        "hostile_cpu",
        "What a hostile request costs beside an honest one",
        "An edge in a process of its own, nginx behind it; each request on a connection of its own, so \"honest GET\" \
         includes connecting and closing. Resets are counted one by one, a thousand pings as one request.",
        &table,
    );
    assert!(too_dear.is_empty(), "{too_dear:?}\n{table}");
    assert!(served.is_well().await);
}

async fn connections_at_their_worst_take_little_memory(way: Way) {
    const CONNECTIONS: u64 = 400;
    let directory = tempfile::tempdir().unwrap();
    let nginx = nginx(directory.path());
    let mut table = String::from("| connection | KiB each |\n|---|---|\n");
    let mut cost = Vec::new();
    let half_head = format!("GET /a HTTP/1.1\r\nHost: a\r\nX: {}", "y".repeat(32_000)).into_bytes();
    let half_body = format!(
        "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{}",
        "y".repeat(60_000)
    )
    .into_bytes();
    let half_short_body = format!(
        "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 16384\r\n\r\n{}",
        "y".repeat(16_000)
    )
    .into_bytes();
    let pipelined = GET.repeat(1000);
    let kinds: [(&str, &[u8]); 6] = [
        ("idle after an honest request", GET),
        ("a head of 32 KiB without end", &half_head),
        ("a body without end", &half_body),
        ("a body of 16 KiB without end", &half_short_body),
        ("1,000 requests pipelined, not read", &pipelined),
        ("silent", b""),
    ];
    for (name, bytes) in kinds {
        let served = Served::start(way, nginx.port(), None, &[]);
        assert!(served.is_well().await);
        let before = served.resident_kib();
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut client = served.connect().await;
            client.write_all(bytes).await.unwrap();
            held.push(client);
        }
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let each = served.resident_kib().saturating_sub(before) as f64 / CONNECTIONS as f64;
        table += &format!("| {name} | {each:.1} |\n");
        cost.push(each);
    }
    record(
        way,
        "hostile_memory",
        "What a hostile connection holds beside an honest one",
        "Resident memory of an edge in a process of its own, divided by 400 connections that were all brought to the same \
         point.",
        &table,
    );
    let honest = cost[0].max(8.0);
    assert!(cost.iter().all(|each| *each <= honest * 10.0), "{table}");
}

/// Ten thousand slow clients, as many as descriptors allow: every one is gone after its deadline, no descriptor is left,
/// and requests beside them are answered. How fast is measured by `benches/hostile`.
async fn a_crowd_of_slow_clients_harms_nobody(way: Way) {
    let directory = tempfile::tempdir().unwrap();
    let nginx = nginx(directory.path());
    let settings = [
        ("EDGE_HEAD_MS", "4000"),
        ("EDGE_BODY_MS", "4000"),
        ("EDGE_RESPONSE_MS", "4000"),
    ];
    let served = Arc::new(Served::start(way, nginx.port(), None, &settings));
    let quiet = percentile(&served, Duration::from_secs(2)).await;
    let before = served.descriptors();
    // The test's own process needs a descriptor for each, too; bodies another one in the server.
    let allowed = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = allowed.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let most: usize = line.split_whitespace().nth(3).unwrap().parse().unwrap_or(1 << 20);
    let crowd = 10_000.min((most - 500) / 2);
    let started = Instant::now();
    // They come within four seconds, so that the first go while the last come.
    let coming = tokio::spawn({
        let served = served.clone();
        async move {
            let mut held = Vec::new();
            for i in 0..crowd {
                let mut client = served.connect().await;
                let start: &[u8] = match i % 10 {
                    0..=7 => b"GET /a HTTP/1.1\r\nHo",
                    8 => b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\nx",
                    _ => b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 10000\r\n\r\nx",
                };
                client.write_all(start).await.unwrap();
                held.push(client);
                if i % 25 == 0 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            held
        }
    });
    let busy = percentile(&served, Duration::from_secs(4)).await;
    let held = coming.await.unwrap();
    let connected = started.elapsed();
    let deadline = Instant::now() + Duration::from_secs(12);
    while served.descriptors() > before + 20 {
        assert!(
            Instant::now() < deadline,
            "{} descriptors, {before} before",
            served.descriptors()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!(
        "{crowd} slow connections {way} in {connected:?}, all gone {:?} after the first came; p99 {quiet:?} quiet, {busy:?} beside them",
        started.elapsed()
    );
    drop(held);
    assert!(served.is_well().await);
}

/// The p99 of requests one after the other.
async fn percentile(served: &Served, time: Duration) -> Duration {
    let mut client = Reader::new(served.connect().await);
    let mut took = Vec::new();
    let started = Instant::now();
    while started.elapsed() < time {
        let one = Instant::now();
        client.send(GET).await;
        assert_eq!(client.response().await.expect("an answer").status, 200);
        took.push(one.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    took.sort_unstable();
    took[took.len() * 99 / 100]
}
