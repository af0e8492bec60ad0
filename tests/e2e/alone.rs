//! A gate by itself: `tollgate run` on a file of keys, in front of upstreams that a test holds in its hand.

use crate::harness::{PATIENCE, Process, client, until};
use reqwest::{Method, RequestBuilder};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;
use tempfile::TempDir;

pub struct GateAlone {
    pub client: reqwest::Client,
    pub url: String,
    pub admin: String,
    /// A key that may pass everywhere.
    pub key: String,
    dir: TempDir,
    _process: Process,
}

impl GateAlone {
    /// `upstreams`: the section's content in YAML's flow style, `one: {servers: […]}`; the first is everybody's.
    pub async fn start(upstreams: &str) -> Self {
        Self::start_with(upstreams, "", "").await
    }

    /// As [`GateAlone::start`], with lines for the section `gate` (two spaces before each) and for the whole file.
    pub async fn start_with(upstreams: &str, gate: &str, rest: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_in(dir, upstreams, gate, rest).await
    }

    /// As [`GateAlone::start_with`], in a directory that has files of the test in it already.
    pub async fn start_in(dir: TempDir, upstreams: &str, gate: &str, rest: &str) -> Self {
        let key = tollgate(&["keys", "new"], "");
        let line = tollgate(&["keys", "hash", "--id", "key_alone"], &key);
        std::fs::write(dir.path().join("keys.ndjson"), line).unwrap();
        let process = {
            write_config(dir.path(), upstreams, gate, rest);
            run(dir.path())
        };
        let address = |name: &str| {
            let file = dir.path().join(format!("state/run/{name}.addr"));
            let log = dir.path().join("stderr");
            until(
                || std::fs::read_to_string(&file).ok(),
                || format!("no {name}: {}", std::fs::read_to_string(&log).unwrap_or_default()),
            )
        };
        let gate = GateAlone {
            client: client(),
            url: format!("http://{}", address("gate").trim()),
            admin: format!("http://{}", address("admin").trim()),
            key: key.trim().to_owned(),
            _process: process,
            dir,
        };
        let deadline = Instant::now() + PATIENCE;
        while !gate.is_ready().await {
            assert!(Instant::now() < deadline, "not ready:\n{}", gate.log());
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        gate
    }

    async fn is_ready(&self) -> bool {
        let asked = self.client.get(format!("{}/readyz", self.admin)).send().await;
        asked.is_ok_and(|response| response.status().is_success())
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// What the process has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.url));
        request.header("x-api-key", &self.key)
    }

    /// The status of a request without a body.
    pub async fn status(&self, method: Method, path: &str) -> u16 {
        self.request(method, path).send().await.unwrap().status().as_u16()
    }

    /// Puts other settings in force by a reload, and returns the answer's status and text.
    pub async fn reload_with(&self, upstreams: &str, gate: &str, rest: &str) -> (u16, String) {
        write_config(self.dir.path(), upstreams, gate, rest);
        let answer = self.client.post(format!("{}/reload", self.admin)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    pub async fn metrics(&self) -> Samples {
        Samples::read(&self.client, &self.admin).await
    }

    /// Waits until a sample has the value.
    pub async fn until_metric(&self, sample: &str, value: f64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.metrics().await.get(sample);
            if seen == Some(value) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{sample} is {seen:?}, not {value}\n{}",
                self.log()
            );
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

/// What `/metrics` said: each sample as it is written, labels included, and its value.
#[derive(Debug)]
pub struct Samples(pub BTreeMap<String, f64>);

impl Samples {
    pub async fn read(client: &reqwest::Client, admin: &str) -> Self {
        let text = client
            .get(format!("{admin}/metrics"))
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        let samples = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"));
            (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line:?}")))
        });
        Samples(samples.collect())
    }

    pub fn get(&self, sample: &str) -> Option<f64> {
        self.0.get(sample).copied()
    }

    /// The sum of all samples of a metric, whatever their labels; `None`: it has none.
    pub fn sum(&self, name: &str) -> Option<f64> {
        let mut of_it = self
            .0
            .iter()
            .filter(|(sample, _)| sample.split('{').next() == Some(name))
            .peekable();
        of_it.peek()?;
        Some(of_it.map(|(_, value)| value).sum())
    }
}

fn write_config(dir: &Path, upstreams: &str, gate: &str, rest: &str) {
    let listen = if gate.contains("listen:") {
        ""
    } else {
        "  listen: [{address: \"127.0.0.1:0\"}]\n"
    };
    let admin = if rest.contains("admin:") {
        ""
    } else {
        "admin: {listen: \"127.0.0.1:0\"}\n"
    };
    let log = if rest.contains("log:") {
        ""
    } else {
        "log: {level: info, access: {path: access.log}}\n"
    };
    let upstream = upstreams.split(':').next().unwrap().trim_start_matches(['{', ' ']);
    let routes = if rest.contains("routes:") {
        String::new()
    } else {
        format!("routes: [{{name: rest, match: {{path: \"/**\"}}, upstream: {upstream}}}]\n")
    };
    let text = format!(
        "version: 1\ngate:\n  name: alone\n{listen}  state_dir: state\n  feed: {{file: keys.ndjson}}\n{gate}\
         tiers: {{default: {{limit: 1000000, window: 1h}}}}\nupstreams: {{{upstreams}}}\n{routes}{admin}{log}{rest}"
    );
    std::fs::write(dir.join("gate.yaml"), text).unwrap();
}

fn run(dir: &Path) -> Process {
    let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .arg("run")
        .arg("-c")
        .arg(dir.join("gate.yaml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(dir.join("stderr")).unwrap())
        .spawn()
        .unwrap();
    Process::new(child)
}

/// What a command prints; it must succeed.
pub fn tollgate(args: &[&str], input: &str) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "tollgate {args:?}");
    String::from_utf8(output.stdout).unwrap()
}
