//! A gate by itself, on a key file, that can be stopped, killed, upgraded and started again on the same state; and an
//! upstream that remembers what reached it.

use crate::harness::{PATIENCE, Process, client, until};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::watch;

/// A number from the environment's `TOLLGATE_PROOF=full`, or the usual one.
pub fn size(usual: usize, full: usize) -> usize {
    match std::env::var("TOLLGATE_PROOF").as_deref() {
        Ok("full") => full,
        _ => usual,
    }
}

/// The secret of key `n` of [`Gate::start`].
pub fn secret(n: usize) -> String {
    format!("a-key-from-elsewhere-{n:06}")
}

/// What a gate is to be like.
pub struct Spec {
    pub upstream: SocketAddr,
    pub keys: usize,
    /// Of tier `default`, in an hour.
    pub limit: u32,
    /// Of tier `probe`, in an hour: paths below `/probe`.
    pub probe_limit: u32,
    /// `off`, or the settings of the access log.
    pub access: String,
}

impl Spec {
    pub fn new(upstream: SocketAddr) -> Self {
        Spec {
            upstream,
            keys: 1,
            limit: 1_000_000_000,
            probe_limit: 1_000_000,
            access: "off".to_owned(),
        }
    }
}

/// A running gate and its directory.
pub struct Gate {
    pub spec: Spec,
    pub url: String,
    pub client: reqwest::Client,
    directory: TempDir,
    /// Ours, or what an upgrade has started: known by its number only.
    pid: u32,
    first: Option<Process>,
}

impl Gate {
    pub fn start(spec: Spec) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let lines = (0..spec.keys).map(|n| {
            let digest: String = Sha256::digest(secret(n))
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            json!({"type": "key", "id": format!("key_{n}"), "organization": "org_1", "environment": "live",
                   "scopes": [], "plan": "starter", "secrets": [{"sha256": digest}]})
            .to_string()
                + "\n"
        });
        fs::write(directory.path().join("keys.ndjson"), lines.collect::<String>()).unwrap();
        let mut gate = Gate {
            spec,
            url: String::new(),
            client: client(),
            directory,
            pid: 0,
            first: None,
        };
        gate.configure();
        gate.start_again();
        gate
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// Writes the configuration file for [`Gate::spec`] as it is now.
    pub fn configure(&self) {
        let Spec {
            upstream,
            limit,
            probe_limit,
            access,
            ..
        } = &self.spec;
        let dir = self.directory.path().display();
        let text = format!(
            "version: 1\n\
             keys: {{foreign: accept, environments: {{live: {{prefix: pxk_live_, billed: true}}}}}}\n\
             scopes: [any]\n\
             tiers:\n  default: {{limit: {limit}, window: 1h}}\n  probe: {{limit: {probe_limit}, window: 1h}}\n\
             plans: {{starter: {{}}}}\n\
             log: {{level: info, access: {access}}}\n\
             admin: {{listen: \"127.0.0.1:0\"}}\n\
             gate:\n  name: edge-1\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  state_dir: {dir}/state\n  \
             shutdown_grace: 10m\n  feed: {{file: keys.ndjson}}\n\
             upstreams: {{origin: {{servers: [\"{upstream}\"]}}}}\n\
             routes:\n  - {{name: probe, match: {{path: \"/probe/**\"}}, tier: probe, upstream: origin}}\n  \
             - {{name: rest, match: {{path: \"/**\"}}, upstream: origin}}\n"
        );
        fs::write(self.path("tollgate.yaml"), text).unwrap();
    }

    /// A configuration that no process accepts.
    pub fn break_configuration(&self) {
        let text = fs::read_to_string(self.path("tollgate.yaml")).unwrap();
        fs::write(self.path("tollgate.yaml"), text.replace("tiers:", "teirs:")).unwrap();
    }

    /// A process on the state that earlier ones left.
    pub fn start_again(&mut self) {
        for name in ["gate", "admin"] {
            let _ = fs::remove_file(self.state().join(format!("run/{name}.addr")));
        }
        let (pid, process) = self.spawn(&[]);
        (self.pid, self.first) = (pid, Some(process));
        let address = self.state().join("run/gate.addr");
        self.url = format!(
            "http://{}",
            until(|| fs::read_to_string(&address).ok(), || self.log()).trim()
        );
    }

    /// `tollgate run` on the configuration, not waited for.
    pub fn spawn(&self, arguments: &[&str]) -> (u32, Process) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .arg("run")
            .args(arguments)
            .arg("-c")
            .arg(self.path("tollgate.yaml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        (child.id(), Process::new(child))
    }

    /// Everything the processes have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn address(&self) -> &str {
        self.url.strip_prefix("http://").unwrap()
    }

    pub fn admin(&self) -> String {
        let address = fs::read_to_string(self.state().join("run/admin.addr")).unwrap();
        format!("http://{}", address.trim())
    }

    /// Runs a command that talks to the process.
    pub fn command(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(arguments)
            .arg("--admin")
            .arg(self.admin())
            .output()
            .unwrap()
    }

    /// `tollgate upgrade`, which must work; returns its answer.
    pub fn upgrade(&mut self) -> Value {
        let output = self.command(&["upgrade", "--wait", "120s", "--json"]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{said}{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        let answer: Value = serde_json::from_str(&said).unwrap();
        let answer = if answer["data"].is_object() {
            answer["data"].clone()
        } else {
            answer
        };
        assert_eq!(answer["predecessor"], self.pid, "{answer}");
        self.became(u32::try_from(answer["successor"].as_u64().unwrap()).unwrap());
        answer
    }

    /// The process with this number has taken over.
    pub fn became(&mut self, pid: u32) {
        self.pid = pid;
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn signal(&self, name: &str) {
        signal(self.pid, name);
    }

    /// Waits until the process has ended. What is asked next goes over a connection of its own: the process closed those
    /// that were kept, and a client that has not heard of it yet would ask over one of them.
    pub fn wait(&mut self) {
        match self.first.take_if(|first| first.id() == self.pid) {
            Some(mut first) => drop(first.wait(PATIENCE)),
            None => until(|| (!is_running(self.pid)).then_some(()), || self.log()),
        }
        self.client = client();
    }

    pub fn is_running(&self) -> bool {
        is_running(self.pid)
    }

    pub async fn ask(&self, path: &str, key: usize) -> reqwest::Response {
        let request = self.client.get(format!("{}{path}", self.url));
        request.header("x-api-key", secret(key)).send().await.unwrap()
    }

    /// What is left of a key's limit, from the header of a request that spends one more.
    pub async fn left_after_one_more(&self, path: &str, key: usize) -> u64 {
        left(&self.ask(path, key).await)
    }

    pub async fn metric(&self, line: &str) -> f64 {
        let text = self
            .client
            .get(format!("{}/metrics", self.admin()))
            .send()
            .await
            .unwrap();
        let text = text.text().await.unwrap();
        let found = text
            .lines()
            .find_map(|l| l.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
        found.unwrap_or_else(|| panic!("no metric {line} in\n{text}"))
    }

    pub async fn status(&self) -> Value {
        let answer = self
            .client
            .get(format!("{}/status", self.admin()))
            .send()
            .await
            .unwrap();
        answer.json().await.unwrap()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // Ours by `first`; a successor only by its number, which is still its own while it runs.
        if self.first.as_ref().is_none_or(|first| first.id() != self.pid) && is_running(self.pid) {
            signal(self.pid, "KILL");
        }
    }
}

/// The `r` of `RateLimit`.
pub fn left(response: &reqwest::Response) -> u64 {
    let field = response.headers()["ratelimit"].to_str().unwrap();
    let number = field.split(";r=").nth(1).unwrap().split(';').next().unwrap();
    number.parse().unwrap()
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status()
        .unwrap();
    assert!(sent.success(), "kill -{name} {pid}");
}

/// Whether it runs: one that has ended and was not waited for does not.
fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap().trim_start().starts_with(['Z', 'X']))
}

/// An upstream that counts how often each numbered request reached it.
#[derive(Clone)]
pub struct Upstream {
    pub address: SocketAddr,
    pub seen: Arc<Vec<AtomicU8>>,
    pub body_bytes: Arc<AtomicU64>,
    /// `/held` is answered once this is true.
    pub release: watch::Sender<bool>,
    /// How many requests `/held` holds.
    pub held: watch::Sender<usize>,
}

impl Upstream {
    /// One for requests with ids `r-0` to `r-(most - 1)`.
    pub async fn start(most: usize) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream {
            address: listener.local_addr().unwrap(),
            seen: Arc::new((0..most).map(|_| AtomicU8::new(0)).collect()),
            body_bytes: Arc::default(),
            release: watch::Sender::new(false),
            held: watch::Sender::new(0),
        };
        let state = upstream.clone();
        let router = axum::Router::new().fallback(move |request: axum::extract::Request| state.clone().answer(request));
        tokio::spawn(async move { axum::serve(listener, router).await });
        upstream
    }

    async fn answer(self, request: axum::extract::Request) -> axum::response::Response {
        let (head, body) = request.into_parts();
        if let Some(n) = head
            .headers
            .get("x-request-id")
            .and_then(|id| number(id.to_str().ok()?))
        {
            self.seen[n].fetch_add(1, Ordering::Relaxed);
        }
        let mut body = body.into_data_stream();
        while let Some(Ok(piece)) = body.next().await {
            self.body_bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        match head.uri.path() {
            "/held" => {
                self.held.send_modify(|count| *count += 1);
                let mut release = self.release.subscribe();
                let _ = release.wait_for(|released| *released).await;
                axum::response::Response::new(axum::body::Body::from("released"))
            }
            "/slow" => {
                // 20 pieces over a quarter of a second.
                let pieces = futures_util::stream::unfold(0, |n| async move {
                    if n == 20 {
                        return None;
                    }
                    tokio::time::sleep(Duration::from_millis(12)).await;
                    Some((
                        Ok::<_, std::convert::Infallible>(Bytes::from_static(&[b'x'; 1000])),
                        n + 1,
                    ))
                });
                let mut response = axum::response::Response::new(axum::body::Body::from_stream(pieces));
                response.headers_mut().insert("content-length", 20_000.into());
                response
            }
            _ => axum::response::Response::new(axum::body::Body::from("up")),
        }
    }

    pub async fn await_held(&self, count: usize) {
        let mut held = self.held.subscribe();
        let waited = tokio::time::timeout(PATIENCE, held.wait_for(|held| *held >= count));
        waited.await.expect("the requests do not arrive").unwrap();
    }
}

/// The number in a request id of ours.
pub fn number(id: &str) -> Option<usize> {
    id.strip_prefix("r-")?.parse().ok()
}

/// Adds up how often each numbered request is in an access log.
pub fn count_logged(path: &Path, counts: &mut [u8]) {
    for line in fs::read_to_string(path).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        if let Some(n) = line["requestId"].as_str().and_then(number) {
            counts[n] += 1;
        }
    }
}

/// Asks again until it holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "{what} does not come about");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
