//! Clients: so many connections, each sending its next request when the last was answered.

use super::gate::RunningGate;
use super::gate_support::secret;
use super::scenario::{Credential, Protocol, Scenario};
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

pub const CONNECTIONS: u32 = 64;
/// Requests at once on each HTTP/2 connection; there are fewer of those.
const STREAMS: u32 = 8;

/// What came back.
#[derive(Debug, Default)]
pub struct Tally {
    pub answered: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
}

impl Tally {
    fn of(mut times_us: Vec<u32>) -> Self {
        times_us.sort_unstable();
        let at = |share: f64| {
            let place = ((times_us.len() as f64 * share) as usize).min(times_us.len().saturating_sub(1));
            times_us.get(place).map_or(0.0, |us| f64::from(*us))
        };
        Tally {
            answered: times_us.len() as u64,
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
        }
    }
}

/// Which key the next request shows: all in turn, but in no order that caches could guess.
struct Keys {
    next: u64,
    count: u64,
    credential: Credential,
}

impl Keys {
    fn new(scenario: &Scenario, gate: &RunningGate, connection: u32, round: usize) -> Self {
        Keys {
            next: u64::from(connection) * 7_919 + round as u64 * 104_729,
            count: u64::from(gate.keys),
            credential: scenario.credential,
        }
    }

    fn header(&mut self) -> Option<String> {
        // A prime beyond every count of keys: its multiples visit all of them.
        self.next = self.next.wrapping_add(2_147_483_647);
        let n = (self.next % self.count) as u32;
        match self.credential {
            Credential::Valid => Some(secret(n)),
            Credential::Unknown => Some(secret(1_000_000_000 + n)),
            Credential::Junk => Some(format!("junk-{n}")),
            Credential::None => None,
        }
    }
}

/// Sends for so long, from this thread.
pub fn run(scenario: &Scenario, gate: &RunningGate, time: Duration, round: usize) -> Tally {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (mut tasks, until) = (JoinSet::new(), Instant::now() + time);
        let connections = match scenario.protocol {
            Protocol::Http2 => CONNECTIONS / STREAMS,
            _ => CONNECTIONS,
        };
        for connection in 0..connections {
            let keys = Keys::new(scenario, gate, connection, round);
            let (scenario, plain, tls) = (scenario.clone(), gate.program.address, gate.tls);
            let certificate = gate.certificate.clone();
            tasks.spawn(async move {
                let address = if scenario.protocol.is_tls() { tls } else { plain };
                let stream = TcpStream::connect(address).await.expect("a gate that listens");
                stream.set_nodelay(true).expect("a socket of ours");
                match scenario.protocol {
                    Protocol::Http1 => http1(stream, &scenario, keys, until).await,
                    Protocol::Http1Tls => {
                        http1(
                            encrypted(stream, &certificate, b"http/1.1").await,
                            &scenario,
                            keys,
                            until,
                        )
                        .await
                    }
                    Protocol::Http2 => {
                        http2(encrypted(stream, &certificate, b"h2").await, &scenario, keys, until).await
                    }
                }
            });
        }
        let mut times_us = Vec::new();
        while let Some(some) = tasks.join_next().await {
            times_us.extend(some.expect("a client without faults"));
        }
        Tally::of(times_us)
    })
}

async fn encrypted(
    stream: TcpStream,
    certificate: &Path,
    protocol: &[u8],
) -> impl AsyncRead + AsyncWrite + Unpin + Send + use<> {
    let mut roots = rustls::RootCertStore::empty();
    let certificate = CertificateDer::from_pem_file(certificate).expect("the certificate that was just made");
    roots.add(certificate).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions that ring has")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    let name = ServerName::try_from("load.test").expect("a name");
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.expect("a handshake")
}

/// Requests one after the other; how long each took.
async fn http1(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    scenario: &Scenario,
    mut keys: Keys,
    until: Instant,
) -> Vec<u32> {
    let (mut times_us, mut request, mut answer) = (Vec::new(), Vec::new(), Vec::with_capacity(128 * 1024));
    let wanted = scenario
        .status
        .map_or("HTTP/1.1 ".to_owned(), |status| format!("HTTP/1.1 {status} "));
    while Instant::now() < until {
        request.clear();
        let _ = write!(request, "GET {} HTTP/1.1\r\nHost: load.test\r\n", scenario.path);
        if let Some(key) = keys.header() {
            let _ = write!(request, "x-api-key: {key}\r\n");
        }
        request.extend_from_slice(b"\r\n");
        let begun = Instant::now();
        stream.write_all(&request).await.expect("a gate that reads");
        answer.clear();
        loop {
            let read = stream.read_buf(&mut answer).await.expect("a gate that answers");
            assert_ne!(read, 0, "the gate closed the connection");
            if is_whole(&answer) {
                break;
            }
        }
        times_us.push(begun.elapsed().as_micros() as u32);
        assert!(
            answer.starts_with(wanted.as_bytes()),
            "{}: {}",
            scenario.name,
            String::from_utf8_lossy(&answer[..answer.len().min(300)])
        );
    }
    times_us
}

/// Whether the answer is there to its last byte. All answers here have a `Content-Length`.
fn is_whole(answer: &[u8]) -> bool {
    let Some(end) = memchr::memmem::find(answer, b"\r\n\r\n") else {
        return false;
    };
    let head = std::str::from_utf8(&answer[..end]).expect("a head in ASCII");
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.parse::<usize>().ok())?
    });
    answer.len() >= end + 4 + length.expect("a length")
}

async fn http2(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    scenario: &Scenario,
    keys: Keys,
    until: Instant,
) -> Vec<u32> {
    let (sender, connection) = h2::client::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(8 << 20)
        .handshake::<_, bytes::Bytes>(stream)
        .await
        .expect("an HTTP/2 gate");
    let connection = tokio::spawn(async move { drop(connection.await) });
    let keys = Arc::new(std::sync::Mutex::new(keys));
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let (mut sender, keys, scenario) = (sender.clone(), keys.clone(), scenario.clone());
        streams.spawn(async move {
            let mut times_us = Vec::new();
            while Instant::now() < until {
                let key = keys.lock().unwrap_or_else(|e| e.into_inner()).header();
                let mut request = http::Request::get(format!("https://load.test{}", scenario.path));
                if let Some(key) = key {
                    request = request.header("x-api-key", key);
                }
                let begun = Instant::now();
                sender = sender.ready().await.expect("a gate that takes requests");
                let request = request.body(()).expect("a request without faults");
                let (response, _) = sender.send_request(request, true).expect("a gate that reads");
                let response = response.await.expect("a gate that answers");
                let status = response.status().as_u16();
                assert_eq!(status, scenario.status.unwrap_or(status), "{}", scenario.name);
                let mut body = response.into_body();
                while let Some(data) = body.data().await {
                    let length = data.expect("a whole body").len();
                    body.flow_control()
                        .release_capacity(length)
                        .expect("what was just received");
                }
                times_us.push(begun.elapsed().as_micros() as u32);
            }
            times_us
        });
    }
    let mut times_us = Vec::new();
    while let Some(some) = streams.join_next().await {
        times_us.extend(some.expect("a client without faults"));
    }
    connection.abort();
    times_us
}

/// `wrk`, where it is installed.
pub struct Wrk {
    pub version: String,
    directory: PathBuf,
}

/// `wrk`, if it is on the PATH and wanted.
pub fn wrk(directory: &Path) -> Option<Wrk> {
    if std::env::var("LOAD_GENERATOR").is_ok_and(|generator| generator == "own") {
        return None;
    }
    let told = Command::new("wrk").arg("--version").output().ok()?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let version = told.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    std::fs::write(directory.join("wrk.lua"), include_str!("wrk.lua")).ok()?;
    Some(Wrk {
        version,
        directory: directory.to_owned(),
    })
}

impl Wrk {
    pub fn run(&self, scenario: &Scenario, gate: &RunningGate, time: Duration, round: usize) -> Tally {
        // As many keys as `wrk` sends in the time, roughly; it goes round if they are too few.
        let mut keys = Keys::new(scenario, gate, 0, round);
        let lines: String = (0..50_000).map(|_| keys.header().unwrap_or_default() + "\n").collect();
        let file = self.directory.join("keys");
        std::fs::write(&file, lines).expect("a directory of ours");
        let (scheme, address) = if scenario.protocol.is_tls() {
            ("https", gate.tls)
        } else {
            ("http", gate.program.address)
        };
        let output = Command::new("wrk")
            .args(["-t1", &format!("-c{CONNECTIONS}"), "-s"])
            .arg(self.directory.join("wrk.lua"))
            .arg(format!("-d{}s", time.as_secs().max(1)))
            .arg(format!("{scheme}://{address}{}", scenario.path))
            .arg("--")
            .arg(file)
            .output()
            .expect("wrk, which told its version before");
        let told = String::from_utf8_lossy(&output.stdout);
        let line = told.lines().find_map(|line| line.strip_prefix("tally "));
        let numbers: Vec<f64> = line.map_or(vec![], |line| line.split(' ').filter_map(|n| n.parse().ok()).collect());
        let [answered, refused, p50_us, p99_us, p999_us] = numbers[..] else {
            panic!("wrk told no tally: {told} {}", String::from_utf8_lossy(&output.stderr));
        };
        if let Some(status) = scenario.status {
            let wanted = if status == 200 { 0.0 } else { answered };
            assert_eq!(
                refused, wanted,
                "{}: answers with another status than {status}",
                scenario.name
            );
        }
        Tally {
            answered: answered as u64,
            p50_us,
            p99_us,
            p999_us,
        }
    }
}
