//! Starts a whole Tollgate in a directory of its own, on ports of its own, and talks to it.

use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take to come about. Generous: the machines that run tests are slow and shared.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running `tollgate dev`.
pub struct Tollgate {
    pub client: reqwest::Client,
    pub gate: String,
    pub control: String,
    pub admin: String,
    /// The key that `dev` printed.
    pub key: String,
    data: TempDir,
    process: Process,
}

/// A child that is ended when dropped.
pub struct Process(Child);

impl Process {
    pub fn new(child: Child) -> Self {
        Process(child)
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .arg(format!("-{name}"))
            .arg(self.0.id().to_string())
            .status()
            .unwrap();
        assert!(sent.success(), "kill -{name}");
    }

    /// Waits for the end; panics if it does not come in time.
    pub fn wait(&mut self, within: Duration) -> std::process::ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "still running after {within:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Tollgate {
    /// A fresh one, ready to serve.
    pub async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    /// One on a data directory that may have been used before.
    pub async fn start_in(data: TempDir) -> Self {
        let process = spawn_dev(data.path());
        let address = |name: &str| wait_for_file(&data.path().join(format!("run/{name}.addr")));
        let url = |name: &str| format!("http://{}", address(name).trim());
        let key = wait_for_key(data.path());
        Tollgate {
            client: client(),
            gate: url("gate"),
            control: url("control"),
            admin: url("admin"),
            key,
            data,
            process,
        }
    }

    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// Ends it by TERM and gives the data directory back.
    pub fn stop(mut self) -> TempDir {
        self.process.signal("TERM");
        assert!(self.process.wait(PATIENCE).success());
        self.data
    }

    /// Everything the process has printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(self.data().join("stdout")).unwrap()
            + &fs::read_to_string(self.data().join("stderr")).unwrap()
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.request(Method::GET, path)
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.gate))
    }

    pub async fn ask(&self, path: &str, key: &str) -> Response {
        self.get(path).header("x-api-key", key).send().await.unwrap()
    }

    /// Registers through the gate.
    pub async fn register(&self, email: &str) -> Account {
        let seed = json!({"name": "My Company", "email": email, "password": "your-secure-password"});
        let response = self
            .request(Method::POST, "/api/v1/register")
            .json(&seed)
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), StatusCode::CREATED);
        let data = data(response).await;
        let text = |name: &str| data[name].as_str().unwrap().to_owned();
        Account {
            organization: text("organizationId"),
            key: text("apiKey"),
            session: self.login(email).await,
        }
    }

    async fn login(&self, email: &str) -> String {
        let credentials = json!({"email": email, "password": "your-secure-password"});
        let response = self
            .client
            .post(format!("{}/api/v1/login", self.control))
            .json(&credentials)
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let cookie = response.headers()["set-cookie"].to_str().unwrap();
        cookie.split(';').next().unwrap().to_owned()
    }

    /// A call of the control API in an account's session.
    pub async fn call(&self, account: &Account, method: Method, path: &str, body: Value) -> Value {
        let url = format!("{}/api/v1{path}", self.control);
        let mut request = self.client.request(method, url).header("cookie", &account.session);
        if !body.is_null() {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        let status = response.status();
        let text = response.text().await.unwrap();
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str::<Value>(&text).unwrap()["data"].take()
    }

    /// A new key.
    pub async fn create_key(&self, account: &Account, environment: &str, scopes: &[&str]) -> Key {
        let wanted = json!({"name": "a key", "environment": environment, "scopes": scopes});
        let made = self.call(account, Method::POST, "/keys?wait=all", wanted).await;
        Key {
            id: made["id"].as_str().unwrap().into(),
            secret: made["apiKey"].as_str().unwrap().into(),
        }
    }
}

pub struct Account {
    pub organization: String,
    pub key: String,
    session: String,
}

pub struct Key {
    pub id: String,
    pub secret: String,
}

/// Starts `tollgate dev`, its output in files of the data directory.
pub fn spawn_dev(data: &Path) -> Process {
    let addresses = ["gate", "control", "admin", "upstream"].map(|name| data.join(format!("run/{name}.addr")));
    for stale in addresses {
        let _ = fs::remove_file(stale);
    }
    let file = |name: &str| Stdio::from(fs::File::create(data.join(name)).unwrap());
    let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .args([
            "dev",
            "--listen",
            "127.0.0.1:0",
            "--control",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
            "--data",
        ])
        .arg(data)
        .stdout(file("stdout"))
        .stderr(file("stderr"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Process(child)
}

fn wait_for_file(path: &PathBuf) -> String {
    until(
        || fs::read_to_string(path).ok(),
        || format!("{} does not appear", path.display()),
    )
}

fn wait_for_key(data: &Path) -> String {
    let printed = || {
        let text = fs::read_to_string(data.join("stdout")).ok()?;
        let line = text.lines().find(|line| line.trim_start().starts_with("curl "))?;
        let start = line.find("pxk_")?;
        Some(
            line[start..]
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect(),
        )
    };
    until(printed, || {
        let stderr = fs::read_to_string(data.join("stderr")).unwrap_or_default();
        format!("no key is printed; stderr:\n{stderr}")
    })
}

/// Polls for something that another process brings about.
pub fn until<T>(mut ready: impl FnMut() -> Option<T>, otherwise: impl Fn() -> String) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "{}", otherwise());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A client that pools its connections and believes nothing that it is not told.
pub fn client() -> reqwest::Client {
    // The test process may have done it before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .unwrap()
}

/// The envelope's data.
pub async fn data(response: Response) -> Value {
    let mut body: Value = response.json().await.unwrap();
    assert_eq!(body["success"], true, "{body}");
    body["data"].take()
}

/// The envelope's error code and message, after checking its form.
pub async fn error(response: Response) -> (String, String) {
    assert_eq!(response.headers()["content-type"], "application/json");
    assert_eq!(response.headers()["cache-control"], "no-store");
    let request_id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let body: Value = response.json().await.unwrap();
    let error = &body["error"];
    let expected = json!({"success": false, "error": {"code": error["code"], "message": error["message"], "requestId": request_id}});
    assert_eq!(body, expected);
    (
        error["code"].as_str().unwrap().to_owned(),
        error["message"].as_str().unwrap().to_owned(),
    )
}

/// The headers that reached the demo upstream, names in lower case.
pub async fn reached(response: Response) -> Vec<(String, String)> {
    assert_eq!(response.status(), StatusCode::OK);
    let body: Value = response.json().await.unwrap();
    let pairs = body["headers"].as_array().unwrap().iter();
    pairs
        .map(|pair| {
            (
                pair[0].as_str().unwrap().to_lowercase(),
                pair[1].as_str().unwrap().to_owned(),
            )
        })
        .collect()
}

/// An upstream that outlives any Tollgate of the test.
pub async fn standing_upstream() -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(|| async { "up" })).await });
    address
}
