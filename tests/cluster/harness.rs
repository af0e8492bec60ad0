//! Real gates, a real store, and what stands between them.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// How long anything may take to come about. Generous: the machines that run tests are slow and shared.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A child that is ended when dropped.
pub struct Process(Child);

impl Process {
    pub fn signal(&self, name: &str) {
        let id = self.0.id().to_string();
        let sent = Command::new("kill").args([format!("-{name}"), id]).status().unwrap();
        assert!(sent.success(), "kill -{name}");
    }

    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// A Redis of its own, without persistence.
pub struct Redis {
    pub port: u16,
    pub process: Process,
}

impl Redis {
    pub fn start(dir: &Path, port: u16, more: &[&str]) -> Self {
        let own = dir.join(format!("redis-{port}"));
        fs::create_dir_all(&own).unwrap();
        let process = Command::new("redis-server")
            .args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
            ])
            .args(more)
            .current_dir(&own)
            .stdout(fs::File::create(own.join("log")).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .expect("redis-server is installed (`make test` installs it)");
        let redis = Redis {
            port,
            process: Process(process),
        };
        until(
            || redis.try_run(&["PING"]).filter(|answer| answer.contains("PONG")),
            || "redis-server does not answer".into(),
        );
        redis
    }

    /// A Sentinel, which speaks the same language.
    pub fn sentinel(dir: &Path, config: &Path, port: u16) -> Self {
        let process = Command::new("redis-server")
            .arg(config)
            .args(["--sentinel", "--port", &port.to_string(), "--bind", "127.0.0.1"])
            .current_dir(dir)
            .stdout(fs::File::create(dir.join("sentinel.log")).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let sentinel = Redis {
            port,
            process: Process(process),
        };
        until(
            || sentinel.try_run(&["PING"]).filter(|answer| answer.contains("PONG")),
            || "no Sentinel answers".into(),
        );
        sentinel
    }

    pub fn try_run(&self, command: &[&str]) -> Option<String> {
        let cli = Command::new("redis-cli")
            .args(["-p", &self.port.to_string()])
            .args(command)
            .output()
            .unwrap();
        cli.status
            .success()
            .then(|| String::from_utf8_lossy(&cli.stdout).into_owned())
    }

    pub fn run(&self, command: &[&str]) -> String {
        self.try_run(command).unwrap()
    }
}

/// A gate.
pub struct Gate {
    pub process: Process,
    pub url: String,
    admin: String,
    dir: PathBuf,
    config: PathBuf,
    /// What an upgrade has started, by its number.
    successor: Option<u64>,
}

/// What gates are told.
pub struct Setup {
    pub dir: TempDir,
    pub secret: String,
    pub upstream: SocketAddr,
    pub limit: u32,
    pub window: Duration,
    pub on_loss: &'static str,
    pub wait: Duration,
}

impl Setup {
    pub async fn new(limit: u32, window: Duration, on_loss: &'static str, wait: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(|| async { "up" })).await });
        let dir = tempfile::tempdir().unwrap();
        let tollgate = |args: &[&str], input: Option<&Path>| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
            command
                .args(args)
                .stdin(input.map_or(Stdio::null(), |path| Stdio::from(fs::File::open(path).unwrap())));
            let output = command.output().unwrap();
            assert!(
                output.status.success(),
                "{args:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        };
        let secret = tollgate(&["keys", "new"], None).trim().to_owned();
        let key = dir.path().join("my.key");
        fs::write(&key, &secret).unwrap();
        fs::write(
            dir.path().join("keys.ndjson"),
            tollgate(&["keys", "hash", "--id", "key_me"], Some(&key)),
        )
        .unwrap();
        Setup {
            dir,
            secret,
            upstream,
            limit,
            window,
            on_loss,
            wait,
        }
    }

    /// Starts a gate that reaches the store at `url` (a part of the section `cluster`).
    pub fn gate(&self, name: &str, store: &str) -> Gate {
        let dir = self.dir.path().join(name);
        fs::create_dir_all(&dir).unwrap();
        let config = dir.join("tollgate.yaml");
        let text = format!(
            "version: 1\ngate:\n  name: {name}\n  threads: 1\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  state_dir: {}\n  \
             feed: {{file: \"{}\"}}\ntiers:\n  default: {{limit: {}, window: {}ms}}\nupstreams:\n  mine: {{servers: [\"{}\"]}}\n\
             admin: {{listen: \"127.0.0.1:0\"}}\ncluster: {{{store}, on_loss: {}, wait: {}ms, lost_after: 500ms, max_clock_skew: 5ms}}\n",
            dir.join("state").display(),
            self.dir.path().join("keys.ndjson").display(),
            self.limit,
            self.window.as_millis(),
            self.upstream,
            self.on_loss,
            self.wait.as_millis(),
        );
        fs::write(&config, text).unwrap();
        Gate::start(dir, config)
    }
}

impl Drop for Gate {
    /// A request whose task panicked gets no answer; from outside that looks like a fault of the network.
    fn drop(&mut self) {
        if let Some(successor) = self.successor {
            // It may have ended by itself.
            let _ = Command::new("kill").args(["-KILL", &successor.to_string()]).output();
        }
        for name in ["stdout", "stderr"] {
            let said = fs::read_to_string(self.dir.join(name)).unwrap_or_default();
            if let Some(at) = said.find("panicked") {
                let from = said[..at].rfind('\n').unwrap_or(0);
                eprintln!("a gate panicked: {}", &said[from..]);
                assert!(std::thread::panicking(), "a gate panicked");
            }
        }
    }
}

impl Gate {
    fn start(dir: PathBuf, config: PathBuf) -> Self {
        let address = |name: &str| dir.join(format!("state/run/{name}.addr"));
        for name in ["gate", "admin"] {
            let _ = fs::remove_file(address(name));
        }
        let file = |name: &str| {
            fs::File::options()
                .create(true)
                .append(true)
                .open(dir.join(name))
                .unwrap()
        };
        let process = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["run", "-c"])
            .arg(&config)
            .stdout(file("stdout"))
            .stderr(file("stderr"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let stderr = || fs::read_to_string(dir.join("stderr")).unwrap_or_default();
        let url = |name: &str| {
            let read = || {
                fs::read_to_string(address(name))
                    .ok()
                    .filter(|text| text.ends_with('\n'))
            };
            format!(
                "http://{}",
                until(read, || format!("no {name}.addr; stderr:\n{}", stderr())).trim()
            )
        };
        Gate {
            url: url("gate"),
            admin: url("admin"),
            process: Process(process),
            dir,
            config,
            successor: None,
        }
    }

    /// `tollgate upgrade`: another process takes over, and this one ends.
    pub fn upgrade(&mut self) {
        let output = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["upgrade", "--wait", "60s", "--json", "--admin", &self.admin])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}{why}");
        let answer: serde_json::Value = serde_json::from_str(&said).unwrap();
        let successor = [&answer["successor"], &answer["data"]["successor"]];
        self.successor = successor.into_iter().find_map(serde_json::Value::as_u64);
        assert!(self.successor.is_some(), "{said}");
        let admin = fs::read_to_string(self.dir.join("state/run/admin.addr")).unwrap();
        self.admin = format!("http://{}", admin.trim());
    }

    /// Killed at once and started again.
    pub fn kill_and_start_again(&mut self) {
        self.process.kill();
        *self = Gate::start(self.dir.clone(), self.config.clone());
    }

    /// Everything that its metrics say; nothing where it does not answer.
    pub async fn metrics(&self, client: &reqwest::Client) -> String {
        match client.get(format!("{}/metrics", self.admin)).send().await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        }
    }

    pub async fn metric(&self, client: &reqwest::Client, name: &str) -> f64 {
        let text = self.metrics(client).await;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("tollgate_{name} ")));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    /// Waits until grants of the store count.
    pub async fn usable(&self, client: &reqwest::Client) {
        let deadline = Instant::now() + PATIENCE;
        while self.metric(client, "cluster_usable").await != 1.0 {
            assert!(
                Instant::now() < deadline,
                "not usable; stderr:\n{}",
                fs::read_to_string(self.dir.join("stderr")).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Between one gate and the store: it can be cut and slowed.
#[derive(Clone)]
pub struct Wire {
    pub port: u16,
    cut: Arc<AtomicBool>,
    delay_ms: Arc<AtomicU64>,
}

impl Wire {
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let wire = Wire {
            port: listener.local_addr().unwrap().port(),
            cut: Arc::default(),
            delay_ms: Arc::default(),
        };
        let own = wire.clone();
        tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let own = own.clone();
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(("127.0.0.1", port)).await else {
                        return;
                    };
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    tokio::select! {
                        () = own.carry(near_in, far_out) => {}
                        () = own.carry(far_in, near_out) => {}
                    }
                });
            }
        });
        wire
    }

    /// What is on its way vanishes, without a word to either end.
    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }

    /// Each way takes so much longer.
    pub fn delay(&self, by: Duration) {
        self.delay_ms.store(by.as_millis() as u64, Ordering::Relaxed);
    }

    async fn carry(&self, mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin) {
        let (queue, mut queued) = tokio::sync::mpsc::unbounded_channel::<(tokio::time::Instant, Vec<u8>)>();
        let read = async {
            let mut buffer = vec![0; 65_536];
            while let Ok(n @ 1..) = from.read(&mut buffer).await {
                let at = tokio::time::Instant::now() + Duration::from_millis(self.delay_ms.load(Ordering::Relaxed));
                if self.cut.load(Ordering::Relaxed) {
                    // A stream with a gap is none: the connection hangs until it is given up.
                    std::future::pending::<()>().await;
                }
                let _ = queue.send((at, buffer[..n].to_vec()));
            }
        };
        let write = async {
            while let Some((at, bytes)) = queued.recv().await {
                tokio::time::sleep_until(at).await;
                if to.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! { () = read => {}, () = write => {} }
    }
}

/// One request: when it was sent, when it was answered, and how.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// Which of the gates.
    pub gate: usize,
    /// How much later than planned it was sent: how busy the machine is.
    pub late: Duration,
    pub sent: Instant,
    pub answered: Instant,
    pub status: u16,
}

/// A client that believes nothing that it is not told.
pub fn client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .no_proxy()
        // Well before a gate would close an idle connection that is about to be used.
        .pool_idle_timeout(Duration::from_millis(500))
        .build()
        .unwrap()
}

/// Asks the gates at `urls`, one after the other, `per_second` times, for so long.
pub async fn offer(
    client: &reqwest::Client,
    urls: &[String],
    secret: &str,
    per_second: u32,
    lasting: Duration,
) -> Vec<Asked> {
    let (begin, mut under_way, mut n) = (tokio::time::Instant::now(), tokio::task::JoinSet::new(), 0_u32);
    while begin.elapsed() < lasting {
        let due = begin + Duration::from_secs(1) * n / per_second;
        tokio::time::sleep_until(due).await;
        let gate = n as usize % urls.len();
        let request = client.get(&urls[gate]).header("x-api-key", secret);
        under_way.spawn(async move {
            let sent = Instant::now();
            let status = match request.send().await {
                Ok(answer) => answer.status().as_u16(),
                Err(error) => {
                    eprintln!("no answer: {error:?}");
                    0
                }
            };
            Asked {
                gate,
                late: sent - due.into_std(),
                sent,
                answered: Instant::now(),
                status,
            }
        });
        n += 1;
    }
    under_way.join_all().await
}

/// The most that surely passed within one window: what was sent and answered in it. When exactly a gate let a request pass,
/// between the two, cannot be seen from outside.
pub fn most_in_a_window(asked: &[Asked], window: Duration) -> usize {
    let passed: Vec<&Asked> = asked.iter().filter(|asked| asked.status == 200).collect();
    let within = |from: Instant| {
        passed
            .iter()
            .filter(|asked| asked.sent >= from && asked.answered < from + window)
            .count()
    };
    passed.iter().map(|asked| within(asked.sent)).max().unwrap_or(0)
}

/// Polls for something that another process brings about.
pub fn until<T>(mut ready: impl FnMut() -> Option<T>, otherwise: impl Fn() -> String) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{}", otherwise());
        std::thread::sleep(Duration::from_millis(5));
    }
}
