//! Honest requests at a steady rate, whatever happens beside them.

use crate::gate::{Gate, KEYS, secret};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Instant;

pub const KEPT_CONNECTIONS: u32 = 8;
pub const REQUESTS_PER_SECOND: u32 = 400;
pub const CONNECTIONS_PER_SECOND: u32 = 50;

/// How long requests took, in µs from when they were due.
#[derive(Default)]
pub struct Series {
    us: Vec<u64>,
    /// When each was due, for a time line.
    due: Vec<Instant>,
    pub failed: usize,
}

impl Series {
    pub fn answered(&self) -> usize {
        self.us.len()
    }

    pub fn percentile(&self, p: f64) -> u64 {
        let mut us = self.us.clone();
        us.sort_unstable();
        let at = ((us.len() as f64 * p).ceil() as usize).clamp(1, us.len().max(1)) - 1;
        us.get(at).copied().unwrap_or(0)
    }

    fn add(&mut self, due: Instant, answered: bool) {
        if answered {
            self.us.push(due.elapsed().as_micros() as u64);
            self.due.push(due);
        } else {
            self.failed += 1;
        }
    }

    fn extend(&mut self, more: Series) {
        self.us.extend(more.us);
        self.due.extend(more.due);
        self.failed += more.failed;
    }

    /// One line for each: its name, when it was due, in ms since `start`, and its µs.
    pub fn trace(&self, name: &str, start: Instant, to: &mut String) {
        for (due, us) in self.due.iter().zip(&self.us) {
            let _ = writeln!(to, "{name}\t{}\t{us}", due.duration_since(start).as_millis());
        }
    }
}

/// What was measured beside each other, by one thread.
#[derive(Default)]
pub struct Latencies {
    /// Requests on connections that last.
    pub kept: Series,
    /// Requests on a connection each.
    pub fresh: Series,
    /// The same on kept connections past the gate, straight to the upstream: what the machine makes of it.
    pub past_the_gate: Series,
    /// Nothing at all, on time: how late the measuring thread itself was.
    pub timer: Series,
}

impl Latencies {
    pub fn add(&mut self, more: Latencies) {
        self.kept.extend(more.kept);
        self.fresh.extend(more.fresh);
        self.past_the_gate.extend(more.past_the_gate);
        self.timer.extend(more.timer);
    }

    /// By the gate.
    pub fn answered(&self) -> usize {
        self.kept.answered() + self.fresh.answered()
    }
}

/// Sends honest requests for as long as `meanwhile` lasts.
pub fn honest(gate: &Gate, meanwhile: impl FnOnce()) -> Latencies {
    let stop = Arc::new(AtomicBool::new(false));
    let (address, upstream, until) = (gate.address, gate.upstream, stop.clone());
    let clients = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async move {
            let kept = |to: SocketAddr| -> Vec<_> {
                (0..KEPT_CONNECTIONS)
                    .map(|n| tokio::spawn(keep(to, n, until.clone())))
                    .collect()
            };
            let (through, past) = (kept(address), kept(upstream));
            let fresh = tokio::spawn(reconnect(address, until.clone()));
            let timer = tokio::spawn(be_on_time(until.clone()));
            let mut latencies = Latencies::default();
            for task in through {
                latencies.kept.extend(task.await.expect("a client does not panic"));
            }
            for task in past {
                latencies
                    .past_the_gate
                    .extend(task.await.expect("a client does not panic"));
            }
            latencies.fresh = fresh.await.expect("a client does not panic");
            latencies.timer = timer.await.expect("a client does not panic");
            latencies
        })
    });
    meanwhile();
    stop.store(true, Ordering::Relaxed);
    clients.join().expect("the clients do not panic")
}

/// Whether an unknown key from the address of the honest clients is answered 401: nothing is held against it.
pub fn is_unsuspected(gate: &Gate) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let head = format!(
        "GET /a HTTP/1.1\r\nHost: gate\r\nx-api-key: {}\r\nConnection: close\r\n\r\n",
        secret(KEYS)
    );
    runtime.block_on(async {
        let mut stream = connect(gate.address).await.expect("a connection");
        stream.write_all(head.as_bytes()).await.expect("the request is written");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        answer.starts_with(b"HTTP/1.1 401")
    })
}

async fn keep(gate: SocketAddr, n: u32, stop: Arc<AtomicBool>) -> Series {
    let every = Duration::from_secs(1) * KEPT_CONNECTIONS / REQUESTS_PER_SECOND;
    let mut due = Instant::now() + every * n / KEPT_CONNECTIONS;
    let mut series = Series::default();
    let mut stream = connect(gate).await;
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep_until(due).await;
        let answered = match &mut stream {
            Some(stream) => request(stream, u64::from(n)).await,
            None => false,
        };
        series.add(due, answered);
        if !answered {
            stream = connect(gate).await;
        }
        due += every;
    }
    series
}

async fn be_on_time(stop: Arc<AtomicBool>) -> Series {
    let every = Duration::from_secs(1) / REQUESTS_PER_SECOND;
    let mut due = Instant::now();
    let mut series = Series::default();
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep_until(due).await;
        series.add(due, true);
        due += every;
    }
    series
}

async fn reconnect(gate: SocketAddr, stop: Arc<AtomicBool>) -> Series {
    let every = Duration::from_secs(1) / CONNECTIONS_PER_SECOND;
    let mut due = Instant::now();
    let mut series = Series::default();
    while !stop.load(Ordering::Relaxed) {
        tokio::time::sleep_until(due).await;
        let answered = match connect(gate).await {
            Some(mut stream) => request(&mut stream, 40).await,
            None => false,
        };
        series.add(due, answered);
        due += every;
    }
    series
}

/// From an address that no attacker has.
async fn connect(gate: SocketAddr) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().ok()?;
    let ours = IpAddr::V4(Ipv4Addr::new(127, 0, 1, 1));
    socket.bind(SocketAddr::new(ours, 0)).ok()?;
    let stream = socket.connect(gate).await.ok()?;
    stream.set_nodelay(true).ok()?;
    Some(stream)
}

/// Whether it was answered 200.
async fn request(stream: &mut TcpStream, key: u64) -> bool {
    let head = format!(
        "GET /a HTTP/1.1\r\nHost: gate\r\nx-api-key: {}\r\n\r\n",
        secret(key % KEYS)
    );
    let exchange = async {
        stream.write_all(head.as_bytes()).await.ok()?;
        let mut answer = Vec::with_capacity(1024);
        while !answer.windows(6).any(|bytes| bytes == b"\r\n\r\nok") {
            if stream.read_buf(&mut answer).await.ok()? == 0 {
                return None;
            }
        }
        Some(answer.starts_with(b"HTTP/1.1 200"))
    };
    tokio::time::timeout(Duration::from_secs(30), exchange)
        .await
        .ok()
        .flatten()
        == Some(true)
}
