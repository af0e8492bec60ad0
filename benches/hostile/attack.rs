//! The attacker: this same binary as a process of its own, on processors only while nobody else wants them.

use crate::gate::{Gate, KEYS, secret};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, MissedTickBehavior};

/// 1,000 connections are what one address may have.
pub const ADDRESSES: u32 = 20;
/// After this all connections are open. They come one after the other at even distances, and an attacker that was kept from
/// the processor does not make up for it, as one on a machine of its own would not have to; who is let wait longest comes
/// first, or some would be gone by then.
pub const RAMP: Duration = Duration::from_secs(24);
/// How many unknown keys are tried.
pub const GUESSES: u64 = 1_000_000;
/// How fast. More would only show that one machine is too small for the gate and those who load it.
pub const GUESSES_PER_SECOND: u32 = 5_000;
/// On how many connections.
pub const GUESSERS: u32 = 16;
/// A slow client sends or takes a byte this often.
const DRIP: Duration = Duration::from_secs(5);
/// What is not closed then, after its rule, counts as not gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// What became of the connections of one kind.
pub struct Closed {
    pub kind: String,
    pub opened: usize,
    pub gone: usize,
    pub median_ms: u64,
    pub longest_ms: u64,
}

/// What the guesses were answered.
#[derive(Default)]
pub struct Guesses {
    pub seconds: f64,
    pub unknown: u64,
    pub throttled: u64,
    pub others: u64,
}

impl Guesses {
    pub fn add(&mut self, more: Guesses) {
        self.seconds += more.seconds;
        self.unknown += more.unknown;
        self.throttled += more.throttled;
        self.others += more.others;
    }
}

/// What became of the connections of two attacks: the worse of both medians, too.
pub fn together(some: Vec<Closed>, more: Vec<Closed>) -> Vec<Closed> {
    if some.is_empty() {
        return more;
    }
    let both = |(some, more): (Closed, Closed)| Closed {
        kind: some.kind,
        opened: some.opened + more.opened,
        gone: some.gone + more.gone,
        median_ms: some.median_ms.max(more.median_ms),
        longest_ms: some.longest_ms.max(more.longest_ms),
    };
    some.into_iter().zip(more).map(both).collect()
}

pub struct Attacker(Child);

impl Drop for Attacker {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Attacker {
    fn start(gate: &Gate, kind: &str, numbers: &[u64]) -> Self {
        let ourselves = std::env::current_exe().expect("a binary knows its path");
        let child = Command::new("chrt")
            .args(["--idle", "0"])
            .arg(ourselves)
            .args(["attacker", kind, &gate.address.to_string()])
            .args(numbers.iter().map(u64::to_string))
            .stdout(Stdio::piped())
            .spawn()
            .expect("the attacker starts");
        Attacker(child)
    }

    pub fn has_ended(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(Some(_)))
    }

    fn lines(&mut self) -> Vec<Vec<String>> {
        let output = self.0.stdout.take().expect("its output is a pipe");
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        lines
            .map(|line| line.split('\t').map(str::to_owned).collect())
            .collect()
    }

    pub fn report(mut self) -> Vec<Closed> {
        let number = |text: &String| text.parse().expect("a number");
        let closed = |line: Vec<String>| Closed {
            kind: line[0].clone(),
            opened: number(&line[1]) as usize,
            gone: number(&line[2]) as usize,
            median_ms: number(&line[3]),
            longest_ms: number(&line[4]),
        };
        self.lines().into_iter().map(closed).collect()
    }
}

/// Opens slow connections of all kinds.
pub fn slow(gate: &Gate, connections: usize) -> Attacker {
    Attacker::start(gate, "slow", &[connections as u64])
}

/// Tries so many keys, from the `first` of those that nobody has, until all were answered.
pub fn guess(gate: &Gate, first: u64, guesses: u64) -> Guesses {
    let mut attacker = Attacker::start(gate, "guess", &[first, guesses]);
    let line = attacker.lines().pop().expect("the attacker reports");
    let number = |at: usize| line[at].parse::<u64>().expect("a number");
    Guesses {
        seconds: number(0) as f64 / 1000.0,
        unknown: number(1),
        throttled: number(2),
        others: number(3),
    }
}

/// The attacker's own process.
pub fn attacker(arguments: &[String]) {
    let gate: SocketAddr = arguments[1].parse().expect("the gate's address");
    let number = |at: usize| arguments[at].parse::<u64>().expect("a number");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        match arguments[0].as_str() {
            "slow" => slow_clients(gate, number(2) as usize).await,
            _ => guesses(gate, KEYS + number(2), number(3)).await,
        }
    });
}

/// In the order in which they come: those that are let wait 60 s, 20 s and 10 s.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Body,
    Head,
}

async fn slow_clients(gate: SocketAddr, connections: usize) {
    // A sixth is left for being late.
    let mut pace = tokio::time::interval(RAMP * 5 / 6 / connections as u32);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut clients = Vec::new();
    for n in 0..connections {
        let kind = [Kind::Read, Kind::Body, Kind::Head][n * 3 / connections];
        pace.tick().await;
        clients.push((kind, tokio::spawn(slow_client(gate, n as u32, kind))));
    }
    let mut over = [const { Vec::new() }; 3];
    let mut opened = [0; 3];
    for (kind, client) in clients {
        opened[kind as usize] += 1;
        if let Some(ms) = client.await.expect("a client does not panic") {
            over[kind as usize].push(ms);
        }
    }
    for (kind, name) in ["slow read", "slow body", "slow head"].iter().enumerate() {
        let over = &mut over[kind];
        over.sort_unstable();
        let median = over.get(over.len() / 2).copied().unwrap_or(0);
        let longest = over.last().copied().unwrap_or(0);
        println!("{name}\t{}\t{}\t{median}\t{longest}", opened[kind], over.len());
    }
}

/// How long after its rule's end the connection was gone, in ms; `None` if it was not.
async fn slow_client(gate: SocketAddr, n: u32, kind: Kind) -> Option<u64> {
    let socket = TcpSocket::new_v4().ok()?;
    if kind == Kind::Read {
        // As slowhttptest: what it does not read stays with the gate.
        socket.set_recv_buffer_size(4096).ok()?;
    }
    let address = Ipv4Addr::new(127, 0, 2, 1 + (n % ADDRESSES) as u8);
    socket.bind((address, 0).into()).ok()?;
    let mut stream = socket.connect(gate).await.ok()?;
    let key = secret(u64::from(n) % KEYS);
    let (bytes, allowed) = match kind {
        Kind::Head => ("GET /a HTTP/1.1\r\nHost: gate\r\nX-Slow: ".to_owned(), 10),
        Kind::Body => (
            format!("POST /a HTTP/1.1\r\nHost: gate\r\nx-api-key: {key}\r\nContent-Length: 100000\r\n\r\n"),
            20,
        ),
        Kind::Read => (
            format!("GET /big HTTP/1.1\r\nHost: gate\r\nx-api-key: {key}\r\n\r\n"),
            60,
        ),
    };
    let ends = Instant::now() + Duration::from_secs(allowed);
    let gone = async {
        if stream.write_all(bytes.as_bytes()).await.is_err() {
            return;
        }
        drip(&mut stream, kind).await;
    };
    let ended = tokio::time::timeout_at(ends + PATIENCE, gone).await;
    let over = Instant::now().saturating_duration_since(ends).as_millis() as u64;
    ended.ok().map(|()| over)
}

/// Returns once the connection has ended.
async fn drip(stream: &mut TcpStream, kind: Kind) {
    let mut byte = [0u8; 1];
    loop {
        if kind == Kind::Read {
            // What was received before stays readable after the end, so the end is asked for by itself.
            tokio::select! {
                _ = stream.ready(Interest::ERROR) => return,
                () = tokio::time::sleep(DRIP) => {}
            }
            if matches!(stream.read(&mut byte).await, Ok(0) | Err(_)) {
                return;
            }
        } else {
            match tokio::time::timeout(DRIP, stream.read(&mut byte)).await {
                // An answer is followed by the end.
                Ok(Ok(1..)) => {}
                Ok(Ok(0) | Err(_)) => return,
                Err(_) => {
                    if stream.write_all(b"x").await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

async fn guesses(gate: SocketAddr, first: u64, number: u64) {
    let started = Instant::now();
    let clients: Vec<_> = (0..GUESSERS)
        .map(|n| tokio::spawn(guesser(gate, first + u64::from(n), first + number)))
        .collect();
    let mut answers = [0; 3];
    for client in clients {
        let [unknown, throttled, others] = client.await.expect("a client does not panic");
        answers[0] += unknown;
        answers[1] += throttled;
        answers[2] += others;
    }
    let [unknown, throttled, others] = answers;
    println!("{}\t{unknown}\t{throttled}\t{others}", started.elapsed().as_millis());
}

async fn guesser(gate: SocketAddr, from: u64, to: u64) -> [u64; 3] {
    let every = Duration::from_secs(1) * GUESSERS / GUESSES_PER_SECOND;
    let mut due = Instant::now();
    let mut answers = [0; 3];
    let socket = TcpSocket::new_v4().expect("a socket");
    socket
        .bind((Ipv4Addr::new(127, 0, 2, 1), 0).into())
        .expect("an address of the loopback network");
    let mut stream = socket.connect(gate).await.expect("a connection");
    let _ = stream.set_nodelay(true);
    let mut answer = Vec::with_capacity(2048);
    let mut n = from;
    while n < to {
        tokio::time::sleep_until(due).await;
        due += every;
        // Each claims to be somebody else, which no proxy of ours has said.
        let head = format!(
            "GET /a HTTP/1.1\r\nHost: gate\r\nx-api-key: {}\r\nX-Forwarded-For: 127.0.1.{}\r\n\r\n",
            secret(n),
            n % 250
        );
        stream.write_all(head.as_bytes()).await.expect("the connection lasts");
        answer.clear();
        while !answer.ends_with(b"}}") {
            let read = stream.read_buf(&mut answer).await.expect("the connection lasts");
            assert!(read > 0, "the connection lasts");
        }
        let has = |text: &[u8]| answer.windows(text.len()).any(|bytes| bytes == text);
        let at = match &answer[..12] {
            b"HTTP/1.1 401" if has(b"INVALID_API_KEY") => 0,
            b"HTTP/1.1 429" if has(b"TOO_MANY_FAILED_ATTEMPTS") => 1,
            _ => 2,
        };
        answers[at] += 1;
        n += u64::from(GUESSERS);
    }
    answers
}
