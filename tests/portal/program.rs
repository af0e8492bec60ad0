//! The real program, and a visitor who speaks HTTP only.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Client, StatusCode, redirect};
use serde_json::{Value, json};
use tempfile::TempDir;

/// `tollgate dev` on ports of its own.
pub struct Program {
    child: Child,
    pub data: TempDir,
    /// `http://127.0.0.1:PORT`
    pub portal: String,
    pub gate: String,
}

impl Program {
    pub async fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["dev", "--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"])
            .args(["--admin", "127.0.0.1:0", "--data"])
            .arg(data.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let portal = format!("http://{}", address(data.path(), "control").await);
        let gate = format!("http://{}", address(data.path(), "gate").await);
        let program = Self {
            child,
            data,
            portal,
            gate,
        };
        let visitor = Visitor::new(&program.portal);
        for _ in 0..300 {
            if visitor
                .client
                .get(format!("{}/login", program.portal))
                .send()
                .await
                .is_ok()
            {
                return program;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("the portal does not answer");
    }

    pub fn token(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.data.path().join(format!("{name}.token"))).unwrap();
        text.trim().to_owned()
    }

    /// A request through the gate: its status and the code of a refusal.
    pub async fn request(&self, key: &str) -> (u16, String) {
        let client = Client::new();
        let url = format!("{}/", self.gate);
        let answer = client.get(url).header("x-api-key", key).send().await.unwrap();
        let status = answer.status().as_u16();
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap_or_default();
        (status, body["error"]["code"].as_str().unwrap_or_default().to_owned())
    }

    /// The name of the gate that follows the feed.
    pub async fn gate_name(&self) -> String {
        let url = format!("{}/api/v1/admin/gates", self.portal);
        for _ in 0..100 {
            let bearer = format!("Bearer {}", self.token("admin"));
            let text = Client::new()
                .get(&url)
                .header("authorization", bearer)
                .send()
                .await
                .unwrap()
                .text()
                .await
                .unwrap();
            let answer: Value = serde_json::from_str(&text).unwrap();
            if let Some(name) = answer["data"]["items"][0]["name"].as_str() {
                return name.to_owned();
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("no gate connected");
    }

    /// Writes into the ledger what a gate would have counted.
    pub async fn count(&self, gate: &str, sequence: u64, permits: Value, refusals: Value) {
        let body = json!({
            "gate": gate, "run": "tests", "sequence": sequence, "permits": permits, "refusals": refusals,
        });
        let client = Client::new();
        let request = client.post(format!("{}/feed/v1/usage", self.portal)).json(&body);
        let answer = request
            .header("authorization", format!("Bearer {}", self.token("feed")))
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn address(data: &Path, name: &str) -> String {
    let path = data.join("run").join(format!("{name}.addr"));
    for _ in 0..600 {
        if let Ok(text) = std::fs::read_to_string(&path)
            && text.trim().contains(':')
        {
            return text.trim().to_owned();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{} was not written: did the program start?", path.display());
}

/// A browser without JavaScript: it has cookies, follows nothing by itself, and posts forms.
pub struct Visitor {
    pub client: Client,
    pub base: String,
    pub cookie: std::sync::Mutex<String>,
}

pub struct Page {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl Visitor {
    pub fn new(base: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        headers.insert("accept", HeaderValue::from_static("text/html,application/xhtml+xml"));
        let client = Client::builder()
            .default_headers(headers)
            .redirect(redirect::Policy::none())
            .timeout(Duration::from_secs(60))
            .build()
            .unwrap();
        Self {
            client,
            base: base.to_owned(),
            cookie: std::sync::Mutex::default(),
        }
    }

    pub async fn get(&self, path: &str) -> Page {
        self.send(self.client.get(format!("{}{path}", self.base))).await
    }

    pub async fn post(&self, path: &str, fields: &[(&str, &str)]) -> Page {
        self.post_with(path, fields, &[]).await
    }

    pub async fn post_with(&self, path: &str, fields: &[(&str, &str)], headers: &[(&str, &str)]) -> Page {
        let body: Vec<_> = fields
            .iter()
            .map(|(n, v)| format!("{}={}", encode(n), encode(v)))
            .collect();
        let mut request = self
            .client
            .post(format!("{}{path}", self.base))
            .header("content-type", "application/x-www-form-urlencoded")
            .body(body.join("&"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request).await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Page {
        let cookie = self.cookie.lock().unwrap().clone();
        let request = if cookie.is_empty() {
            request
        } else {
            request.header("cookie", cookie)
        };
        let answer = request.send().await.unwrap();
        let (status, headers) = (answer.status(), answer.headers().clone());
        if let Some(line) = headers.get("set-cookie") {
            let pair = line.to_str().unwrap().split(';').next().unwrap();
            *self.cookie.lock().unwrap() = pair.to_owned();
        }
        Page {
            status,
            headers,
            body: answer.text().await.unwrap(),
        }
    }

    /// Registers, and gives the secret that was revealed.
    pub async fn register(&self, name: &str, email: &str) -> String {
        let fields = [("name", name), ("email", email), ("password", PASSWORD)];
        self.post("/register", &fields).await.expect(200).secret()
    }

    /// The token of the form at `path`.
    pub async fn form_token(&self, path: &str) -> String {
        self.get(path)
            .await
            .expect(200)
            .between("name=\"form_token\" value=\"", "\"")
    }

    /// Makes a key, and gives its id and secret.
    pub async fn create_key(&self, name: &str, environment: &str, scopes: &[&str]) -> (String, String) {
        let token = self.form_token("/keys/new").await;
        let mut fields = vec![
            ("form_token", token.as_str()),
            ("name", name),
            ("environment", environment),
            ("expiry", "never"),
        ];
        fields.extend(scopes.iter().map(|scope| ("scope", *scope)));
        let page = self.post("/keys/new", &fields).await.expect(200);
        (page.between("primary\" href=\"/keys/", "\""), page.secret())
    }
}

impl Page {
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{}", self.body);
        if self.status.is_success() {
            let policy = self.headers["content-security-policy"].to_str().unwrap();
            assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
            assert_eq!(self.headers["cache-control"], "no-store");
        }
        self
    }

    /// Asserts a redirect, and gives its target.
    #[track_caller]
    pub fn redirected(self) -> String {
        assert_eq!(self.status, 303, "{}", self.body);
        self.headers["location"].to_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn secret(&self) -> String {
        self.between("id=\"secret\" readonly value=\"", "\"")
    }

    #[track_caller]
    pub fn between(&self, before: &str, after: &str) -> String {
        let found = self
            .body
            .split_once(before)
            .and_then(|(_, rest)| rest.split_once(after));
        found
            .unwrap_or_else(|| panic!("no {before:?} in {}", self.body))
            .0
            .to_owned()
    }

    #[track_caller]
    pub fn says(&self, text: &str) {
        assert!(self.body.contains(text), "no {text:?} in {}", self.body);
    }
}

pub fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(b).to_string(),
            _ => format!("%{b:02X}"),
        })
        .collect()
}

pub const PASSWORD: &str = "correct horse battery staple";
