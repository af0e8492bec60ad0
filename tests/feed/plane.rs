//! A control plane made of a TCP listener, so that it can do what no HTTP library would let it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tollgate::wire::{Ack, FeedLine, KeyLine, UsageBatch};
use xxhash_rust::xxh3::xxh3_64;

use super::FEED_TOKEN;

/// What happens on the next connection for keys, instead of what should.
#[derive(Clone, Debug)]
pub enum Fault {
    /// These bytes as the stream, then its proper end.
    Say(Vec<u8>),
    /// These bytes, then the connection is cut.
    SayAndCut(Vec<u8>),
    /// These bytes, then silence.
    SayAndHang(Vec<u8>),
    /// These bytes again and again until the gate hangs up.
    Repeat(Vec<u8>),
    /// These bytes one by one with a pause before each.
    Drip(Vec<u8>, Duration),
    /// An answer of this status.
    Status(u16),
    /// Not HTTP at all.
    Raw(Vec<u8>),
    /// No answer.
    NoAnswer,
    /// What should happen, after a delay.
    Late(Duration),
}

/// What happens to the next batch of usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageFault {
    /// The batch is applied, its answer is lost.
    LoseAnswer,
    /// The batch is lost.
    LoseBatch,
    /// Applied twice, the second time later than what follows.
    RepeatLate,
    Refuse(u16),
}

pub type OnAck = Box<dyn FnMut(&Ack) + Send>;

#[derive(Default)]
pub struct State {
    pub revision: u64,
    pub keys: BTreeMap<String, KeyLine>,
    changes: Vec<(u64, FeedLine)>,
    pub faults: VecDeque<Fault>,
    pub usage_faults: VecDeque<UsageFault>,
    pub acks: Vec<Ack>,
    /// Called with each acknowledgement, before it is answered.
    pub on_ack: Option<OnAck>,
    /// `after` and the gate's name, of each connection.
    pub connections: Vec<(Option<u64>, String)>,
    /// Applied batches, each once.
    pub ledger: Vec<UsageBatch>,
    applied: BTreeSet<(String, String, u64)>,
    late: Vec<UsageBatch>,
    pub received: usize,
    pub down: bool,
    pub zstd: bool,
    /// When the last answer of a stream began.
    pub began: Option<Instant>,
    prepared: Option<Vec<u8>>,
}

/// A control plane on a port of its own. It stops with the test's runtime.
#[derive(Clone)]
pub struct Plane {
    pub url: String,
    state: Arc<Mutex<State>>,
    changed: Arc<watch::Sender<u64>>,
    /// Goes up to end all connections.
    kicked: Arc<watch::Sender<u64>>,
}

impl Plane {
    pub async fn start(keys: impl IntoIterator<Item = KeyLine>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let plane = Plane {
            url: format!("http://{}", listener.local_addr().unwrap()),
            state: Arc::default(),
            changed: Arc::new(watch::Sender::new(0)),
            kicked: Arc::new(watch::Sender::new(0)),
        };
        {
            let mut state = plane.state();
            state.revision = 10;
            state.keys = keys
                .into_iter()
                .map(|key| (key.id.clone(), KeyLine { revision: 10, ..key }))
                .collect();
        }
        let serving = plane.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let plane = serving.clone();
                tokio::spawn(async move {
                    let mut kicked = plane.kicked.subscribe();
                    kicked.mark_unchanged();
                    tokio::select! {
                        _ = plane.serve(stream) => {}
                        _ = kicked.changed() => {}
                    }
                });
            }
        });
        plane
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Changes a key, and tells everyone. Returns the revision.
    pub fn change(&self, key: KeyLine) -> u64 {
        let mut state = self.state();
        state.revision += 1;
        let revision = state.revision;
        let key = KeyLine { revision, ..key };
        state.keys.insert(key.id.clone(), key.clone());
        state.changes.push((revision, FeedLine::Key(key)));
        drop(state);
        self.changed.send_replace(revision);
        revision
    }

    /// Makes the next snapshot ready; its size.
    pub fn prepare(&self) -> usize {
        let mut state = self.state();
        let prepared = snapshot(state.revision, state.keys.values());
        let bytes = prepared.len();
        state.prepared = Some(prepared);
        bytes
    }

    pub fn forget(&self, id: &str) -> u64 {
        let mut state = self.state();
        state.revision += 1;
        let revision = state.revision;
        state.keys.remove(id);
        state.changes.push((
            revision,
            FeedLine::Gone {
                revision,
                id: id.to_owned(),
            },
        ));
        drop(state);
        self.changed.send_replace(revision);
        revision
    }

    /// Ends every connection.
    pub fn kick(&self) {
        self.kicked.send_modify(|count| *count += 1);
    }

    /// Goes back to an earlier time, as a database restored from a backup does.
    pub fn restore(&self, revision: u64, keys: impl IntoIterator<Item = KeyLine>) {
        let mut state = self.state();
        state.revision = revision;
        state.changes.clear();
        state.keys = keys.into_iter().map(|key| (key.id.clone(), key)).collect();
    }

    pub fn set_down(&self, down: bool) {
        self.state().down = down;
        if down {
            self.kick();
        }
    }

    async fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        loop {
            let Some((head, body)) = read_request(&mut stream).await? else {
                return Ok(());
            };
            if self.state().down {
                return Ok(());
            }
            let authorized = head.lines().any(|line| {
                line.to_ascii_lowercase().starts_with("authorization:")
                    && line.ends_with(&format!("Bearer {FEED_TOKEN}"))
            });
            if !authorized {
                answer(&mut stream, 401).await?;
            } else if head.starts_with("GET /feed/v1/keys") {
                return self.serve_keys(&mut stream, &head).await;
            } else if head.starts_with("POST /feed/v1/acks") {
                self.take_ack(serde_json::from_slice(&body).unwrap());
                answer(&mut stream, 204).await?;
            } else if head.starts_with("POST /feed/v1/usage") {
                match self.take_usage(serde_json::from_slice(&body).unwrap()) {
                    Some(status) => answer(&mut stream, status).await?,
                    None => return Ok(()),
                }
            } else {
                answer(&mut stream, 404).await?;
            }
        }
    }

    fn take_ack(&self, ack: Ack) {
        let mut state = self.state();
        if let Some(on_ack) = &mut state.on_ack {
            on_ack(&ack);
        }
        state.acks.push(ack);
    }

    /// Applies a batch; what to answer, if anything.
    fn take_usage(&self, batch: UsageBatch) -> Option<u16> {
        let mut state = self.state();
        state.received += 1;
        let fault = state.usage_faults.pop_front();
        match fault {
            Some(UsageFault::LoseBatch) => return None,
            Some(UsageFault::Refuse(status)) => return Some(status),
            _ => {}
        }
        let late = std::mem::take(&mut state.late);
        if fault == Some(UsageFault::RepeatLate) {
            state.late.push(batch.clone());
        }
        for batch in std::iter::once(batch).chain(late) {
            if state
                .applied
                .insert((batch.gate.clone(), batch.run.clone(), batch.sequence))
            {
                state.ledger.push(batch);
            }
        }
        (fault != Some(UsageFault::LoseAnswer)).then_some(200)
    }

    async fn serve_keys(&self, stream: &mut TcpStream, head: &str) -> std::io::Result<()> {
        let target = head.split(' ').nth(1).unwrap_or_default();
        let after = target
            .split_once("after=")
            .map(|(_, revision)| revision.parse().unwrap());
        let name = head
            .lines()
            .find_map(|line| line.strip_prefix("x-tollgate-gate: "))
            .unwrap_or_default()
            .to_owned();
        let zstd = head.to_ascii_lowercase().contains("accept-encoding: zstd") && self.state().zstd;
        let fault = {
            let mut state = self.state();
            state.connections.push((after, name));
            state.faults.pop_front()
        };
        let mut stream = Stream {
            stream,
            encoder: zstd.then(|| zstd::stream::Encoder::new(Vec::new(), 1).unwrap()),
        };
        match fault {
            None => {}
            Some(Fault::Late(delay)) => tokio::time::sleep(delay).await,
            Some(Fault::Status(status)) => return answer(stream.stream, status).await,
            Some(Fault::Raw(bytes)) => return stream.stream.write_all(&bytes).await,
            Some(Fault::NoAnswer) => return std::future::pending().await,
            Some(Fault::Say(bytes)) => {
                stream.begin().await?;
                stream.send(&bytes).await?;
                return stream.end().await;
            }
            Some(Fault::SayAndCut(bytes)) => {
                stream.begin().await?;
                return stream.send(&bytes).await;
            }
            Some(Fault::SayAndHang(bytes)) => {
                stream.begin().await?;
                stream.send(&bytes).await?;
                return std::future::pending().await;
            }
            Some(Fault::Repeat(bytes)) => {
                stream.begin().await?;
                loop {
                    stream.send(&bytes).await?;
                }
            }
            Some(Fault::Drip(bytes, pause)) => {
                stream.begin().await?;
                for byte in bytes {
                    tokio::time::sleep(pause).await;
                    stream.send(&[byte]).await?;
                }
                return std::future::pending().await;
            }
        }
        self.follow(&mut stream, after).await
    }

    /// What a control plane should do.
    async fn follow(&self, stream: &mut Stream<'_>, after: Option<u64>) -> std::io::Result<()> {
        stream.begin().await?;
        let mut changed = self.changed.subscribe();
        let (mut sent, snapshot) = {
            let mut state = self.state();
            state.began = Some(Instant::now());
            let oldest = state
                .changes
                .first()
                .map_or(state.revision, |(revision, _)| revision - 1);
            match after {
                Some(after) if (oldest..=state.revision).contains(&after) => (after, None),
                _ => {
                    let prepared = state.prepared.take();
                    (
                        state.revision,
                        Some(prepared.unwrap_or_else(|| snapshot(state.revision, state.keys.values()))),
                    )
                }
            }
        };
        if let Some(snapshot) = snapshot {
            stream.send(&snapshot).await?;
        }
        loop {
            let lines: Vec<u8> = {
                let state = self.state();
                let new = state.changes.iter().filter(|(revision, _)| *revision > sent);
                let lines = new.flat_map(|(_, change)| line(change)).collect();
                sent = sent.max(state.revision);
                lines
            };
            if !lines.is_empty() {
                stream.send(&lines).await?;
            }
            if tokio::time::timeout(Duration::from_millis(50), changed.changed())
                .await
                .is_err()
            {
                let revision = self.state().revision;
                stream.send(&line(&FeedLine::Heartbeat { revision })).await?;
            }
        }
    }
}

/// The body of an answer, in chunks.
struct Stream<'s> {
    stream: &'s mut TcpStream,
    encoder: Option<zstd::stream::Encoder<'static, Vec<u8>>>,
}

impl Stream<'_> {
    async fn begin(&mut self) -> std::io::Result<()> {
        let encoding = if self.encoder.is_some() {
            "content-encoding: zstd\r\n"
        } else {
            ""
        };
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n{encoding}transfer-encoding: chunked\r\n\r\n"
        );
        self.stream.write_all(head.as_bytes()).await
    }

    async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let encoded;
        let bytes = match &mut self.encoder {
            None => bytes,
            Some(encoder) => {
                std::io::Write::write_all(encoder, bytes)?;
                std::io::Write::flush(encoder)?;
                encoded = std::mem::take(encoder.get_mut());
                &encoded
            }
        };
        if bytes.is_empty() {
            return Ok(());
        }
        self.stream
            .write_all(format!("{:x}\r\n", bytes.len()).as_bytes())
            .await?;
        self.stream.write_all(bytes).await?;
        self.stream.write_all(b"\r\n").await
    }

    async fn end(&mut self) -> std::io::Result<()> {
        self.stream.write_all(b"0\r\n\r\n").await
    }
}

pub fn line(line: &FeedLine) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(line).unwrap();
    bytes.push(b'\n');
    bytes
}

/// A whole snapshot with the right checksum.
pub fn snapshot<'k>(revision: u64, keys: impl IntoIterator<Item = &'k KeyLine>) -> Vec<u8> {
    let keys: Vec<Vec<u8>> = keys.into_iter().map(|key| line(&FeedLine::Key(key.clone()))).collect();
    let mut bytes = line(&FeedLine::Snapshot {
        revision,
        keys: keys.len() as u64,
    });
    let lines = keys.concat();
    bytes.extend_from_slice(&lines);
    bytes.extend(line(&FeedLine::End {
        xxh3: format!("{:016x}", xxh3_64(&lines)),
    }));
    bytes
}

async fn read_request(stream: &mut TcpStream) -> std::io::Result<Option<(String, Vec<u8>)>> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]).into_owned();
    let length = head
        .lines()
        .find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("content-length: ")
                .map(|n| n.parse::<usize>().unwrap())
        })
        .unwrap_or(0);
    let mut body = bytes.split_off(head_end + 4);
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Ok(None);
        }
    }
    Ok(Some((head, body)))
}

async fn answer(stream: &mut TcpStream, status: u16) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 {status} So\r\ncontent-length: 0\r\n\r\n");
    let head = if status == 204 {
        "HTTP/1.1 204 So\r\n\r\n".to_owned()
    } else {
        head
    };
    stream.write_all(head.as_bytes()).await
}
