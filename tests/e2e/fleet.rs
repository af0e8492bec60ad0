//! A control plane and gates as separate processes, which are killed, cut off and started again.

use crate::harness::{PATIENCE, Process, client, until};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use tempfile::TempDir;

pub const FEED_TOKEN: &str = "the-feed-token-of-this-fleet";
pub const ADMIN_TOKEN: &str = "the-admin-token-of-this-fleet";
pub const PASSWORD: &str = "your-secure-password";

/// The size that the promise names, where `TOLLGATE_PROOF=full` asks for it, or one that `make test` has time for.
pub fn size(full: usize, usual: usize) -> usize {
    if std::env::var("TOLLGATE_PROOF").is_ok_and(|size| size == "full") {
        full
    } else {
        usual
    }
}

/// Numbers that differ from run to run; the first is printed, so that a run can be told apart.
pub struct Random(u64);

impl Random {
    pub fn new() -> Self {
        let seed = getrandom::u64().unwrap() | 1;
        println!("seed {seed}");
        Random(seed)
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        // xorshift64* (Vigna 2016).
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}

/// Where everything of one control plane and its gates lies.
pub struct Fleet {
    directory: TempDir,
    upstream: SocketAddr,
    level: &'static str,
    control_port: Mutex<Option<u16>>,
}

/// A control plane's process.
pub struct Control {
    pub process: Process,
    pub url: String,
}

/// A gate's process.
pub struct Gate {
    pub process: Process,
    pub url: String,
    pub admin: String,
}

impl Fleet {
    pub async fn new() -> Self {
        Self::logging("info").await
    }

    pub async fn logging(level: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("feed.token"), FEED_TOKEN).unwrap();
        std::fs::write(directory.path().join("admin.token"), ADMIN_TOKEN).unwrap();
        Fleet {
            directory,
            upstream: crate::harness::standing_upstream().await,
            level,
            control_port: Mutex::new(None),
        }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn database(&self) -> String {
        format!("sqlite://{}/tollgate.db", self.path().display())
    }

    /// Starts the control plane: on a free port the first time, on the same one from then on.
    pub fn control(&self) -> Control {
        self.control_under(&[])
    }

    /// Starts the control plane through a command such as a shell that sets a limit.
    pub fn control_under(&self, command: &[&str]) -> Control {
        let mut port = self.control_port.lock().unwrap();
        let state = self.path().join("control");
        let file = self.path().join("control.yaml");
        let text = format!(
            "{common}control:\n  listen: {{address: \"127.0.0.1:{port}\"}}\n  database: {database}\n  state_dir: {state}\n  \
             feed_token_file: {directory}/feed.token\n  admin_token_file: {directory}/admin.token\n  \
             registrations_per_hour: 1000\n",
            common = self.common(),
            port = port.unwrap_or(0),
            database = self.database(),
            state = state.display(),
            directory = self.path().display(),
        );
        std::fs::write(&file, text).unwrap();
        let process = start(&file, &state, command);
        let address = address(&state, "control", &file);
        *port = Some(address.port());
        Control {
            process,
            url: format!("http://{address}"),
        }
    }

    /// Starts a gate that follows the feed at `feed_url`; whoever needs keys waits for them with [`Gate::ready`].
    pub fn gate(&self, name: &str, feed_url: &str) -> Gate {
        let state = self.path().join(name);
        let file = self.path().join(format!("{name}.yaml"));
        let text = format!(
            "{common}admin: {{listen: \"127.0.0.1:0\"}}\ngate:\n  name: {name}\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  \
             state_dir: {state}\n  feed: {{url: \"{feed_url}\", token_file: {directory}/feed.token}}\n\
             upstreams:\n  origin: {{servers: [\"{upstream}\"]}}\n  nobody: {{servers: [\"127.0.0.1:9\"]}}\n\
             routes:\n  - {{name: broken, match: {{path: \"/broken/**\"}}, upstream: nobody}}\n  \
             - {{name: checks, match: {{path: \"/checks/**\"}}, scope: permissions:check, tier: permissions:check, upstream: origin}}\n  \
             - {{name: live, match: {{path: \"/live/**\"}}, environments: [live], upstream: origin}}\n  \
             - {{name: rest, match: {{path: \"/**\"}}, upstream: origin}}\n",
            common = self.common(),
            state = state.display(),
            directory = self.path().display(),
            upstream = self.upstream,
        );
        std::fs::write(&file, text).unwrap();
        let process = start(&file, &state, &[]);
        Gate {
            process,
            url: format!("http://{}", address(&state, "gate", &file)),
            admin: format!("http://{}", address(&state, "admin", &file)),
        }
    }

    /// What the processes have logged.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    fn common(&self) -> String {
        format!(
            "version: 1\nkeys:\n  environments:\n    live: {{prefix: pxk_live_, billed: true}}\n    test: {{prefix: pxk_test_}}\n    \
             dev: {{prefix: pxk_dev_}}\nscopes: [permissions:check, identity:resolve]\n\
             tiers:\n  permissions:check: {{limit: 5000, window: 1h}}\n  default: {{limit: 1000000, window: 1h}}\n\
             plans: {{starter: {{}}}}\nlog: {{level: {}, access: {{format: json, path: {}/access.log}}}}\n",
            self.level,
            self.path().display()
        )
    }
}

fn start(file: &Path, state: &Path, command: &[&str]) -> Process {
    for name in ["gate", "control", "admin"] {
        // None is there the first time.
        let _ = std::fs::remove_file(state.join(format!("run/{name}.addr")));
    }
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(file.with_extension("log"))
        .unwrap();
    let binary = env!("CARGO_BIN_EXE_tollgate");
    let words: Vec<&str> = command.iter().copied().chain([binary]).collect();
    let child = Command::new(words[0])
        .args(&words[1..])
        .args(["run", "-c"])
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::from(log.try_clone().unwrap()))
        .stderr(Stdio::from(log))
        .spawn()
        .unwrap();
    Process::new(child)
}

fn address(state: &Path, name: &str, file: &Path) -> SocketAddr {
    let path: PathBuf = state.join(format!("run/{name}.addr"));
    let log = || std::fs::read_to_string(file.with_extension("log")).unwrap_or_default();
    until(
        || std::fs::read_to_string(&path).ok()?.trim().parse().ok(),
        || format!("{} does not appear; its log:\n{}", path.display(), log()),
    )
}

impl Control {
    /// Registers somebody, signs in, and makes an access token to act with.
    pub async fn account(&self, email: &str) -> Account {
        let anybody = Account {
            url: self.url.clone(),
            client: client(),
            credential: ("x-none", String::new()),
        };
        let body = json!({"name": "My Company", "email": email, "password": PASSWORD});
        anybody.call(Method::POST, "/register", body).await;
        let credentials = json!({"email": email, "password": PASSWORD});
        let response = anybody.send(Method::POST, "/login", credentials).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let cookie = response.headers()["set-cookie"].to_str().unwrap();
        let cookie = cookie.split(';').next().unwrap().to_owned();
        let person = Account {
            credential: ("cookie", cookie),
            ..anybody
        };
        let token = person.call(Method::POST, "/tokens", json!({"name": "proof"})).await;
        Account {
            credential: ("authorization", format!("Bearer {}", token["token"].as_str().unwrap())),
            ..person
        }
    }

    /// What the operator is told of the gates.
    pub async fn gates(&self) -> Value {
        let operator = Account {
            url: self.url.clone(),
            client: client(),
            credential: ("authorization", format!("Bearer {ADMIN_TOKEN}")),
        };
        operator.call(Method::GET, "/admin/gates", Value::Null).await
    }
}

impl Gate {
    /// Waits until the gate has keys.
    pub async fn ready(&self) {
        let client = client();
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let answer = client.get(format!("{}/readyz", self.admin)).send().await;
            if answer.is_ok_and(|answer| answer.status() == StatusCode::OK) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "the gate gets no keys");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    pub async fn metrics(&self) -> String {
        let answer = client().get(format!("{}/metrics", self.admin)).send().await.unwrap();
        answer.text().await.unwrap()
    }

    /// What the gate says to a request with this key.
    pub async fn ask(&self, client: &reqwest::Client, path: &str, key: &str) -> StatusCode {
        let request = client.get(format!("{}{path}", self.url)).header("x-api-key", key);
        request.send().await.unwrap().status()
    }

    /// Waits until the gate says this to a request with this key.
    pub async fn until_it_says(&self, status: StatusCode, key: &str) {
        let client = client();
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let seen = self.ask(&client, "/any", key).await;
            if seen == status {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "still {seen}, not {status}");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }
}

/// Somebody who calls the control API.
#[derive(Clone)]
pub struct Account {
    url: String,
    client: reqwest::Client,
    credential: (&'static str, String),
}

/// A key as its creation answered.
#[derive(Clone, Debug)]
pub struct Key {
    pub id: String,
    pub secret: String,
    pub revision: u64,
}

impl Account {
    pub async fn send(&self, method: Method, path: &str, body: Value) -> reqwest::Result<reqwest::Response> {
        let request = self.client.request(method, format!("{}/api/v1{path}", self.url));
        let request = request.header(self.credential.0, &self.credential.1);
        let request = match body {
            Value::Null => request,
            body => request.json(&body),
        };
        request.send().await
    }

    /// The data of an answer that must be one.
    pub async fn call(&self, method: Method, path: &str, body: Value) -> Value {
        let response = self.send(method, path, body).await.unwrap();
        let (status, text) = (response.status(), response.text().await.unwrap());
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str::<Value>(&text).unwrap()["data"].take()
    }

    /// The data of an answer, if there was one and it is a good one: the control plane may be killed meanwhile.
    pub async fn attempt(&self, method: Method, path: &str, body: Value) -> Option<Value> {
        let response = self.send(method, path, body).await.ok()?;
        let good = response.status().is_success();
        let mut envelope: Value = response.json().await.ok()?;
        good.then(|| envelope["data"].take())
    }

    pub async fn create_key(&self, name: &str, environment: &str) -> Key {
        let wanted = json!({"name": name, "environment": environment, "scopes": ["permissions:check"]});
        key(&self.call(Method::POST, "/keys", wanted).await)
    }

    /// Permits in the ledger, by environment, and how many of all are billable.
    pub async fn permits(&self) -> (std::collections::BTreeMap<String, u64>, u64) {
        let usage = self
            .call(Method::GET, "/usage?groupBy=environment&granularity=day", Value::Null)
            .await;
        let mut permits = std::collections::BTreeMap::new();
        for row in usage["rows"].as_array().unwrap() {
            let environment = row["environment"].as_str().unwrap().to_owned();
            *permits.entry(environment).or_default() += row["permits"].as_u64().unwrap();
        }
        (permits, usage["totals"]["billable"].as_u64().unwrap())
    }
}

/// A key from what its creation or rotation answered.
pub fn key(answer: &Value) -> Key {
    Key {
        id: answer["id"].as_str().unwrap().to_owned(),
        secret: answer["apiKey"].as_str().unwrap().to_owned(),
        revision: answer["revision"].as_u64().unwrap(),
    }
}
