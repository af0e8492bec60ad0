//! A `tollgate run` with a configuration and a key file of the test's own.

use crate::harness::{PATIENCE, Process, until};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;
use tollgate::gate::key::{SecretDigest, checksum};

pub struct Gate {
    pub address: SocketAddr,
    directory: TempDir,
    pid: u32,
    _process: Process,
}

/// A well-formed secret.
pub fn secret(n: u32) -> String {
    let payload = format!("pxk_live_{n:030}");
    let digits = checksum(payload.as_bytes());
    payload + std::str::from_utf8(&digits).unwrap()
}

/// The line of a key file for it.
pub fn key_line(n: u32, revoked: bool) -> String {
    let digest = SecretDigest::of(secret(n).as_bytes());
    let sha256 = digest.0.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    format!(
        r#"{{"id":"key_{n}","organization":"org_{n}","environment":"live","scopes":[],"secrets":[{{"sha256":"{sha256}"}}],"revoked":{revoked}}}"#
    ) + "\n"
}

impl Gate {
    /// `settings` are lines of the section `gate`; `routing` are whole sections.
    pub fn start(listen: &str, settings: &str, routing: &str, keys: &[String]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), listen, settings, routing, keys)
    }

    /// In a directory that may hold what `listen` names.
    pub fn start_in(directory: TempDir, listen: &str, settings: &str, routing: &str, keys: &[String]) -> Self {
        let at = |name: &str| directory.path().join(name);
        let config = format!(
            "version: 1\n\
             gate:\n  listen: [{listen}]\n  state_dir: {}\n  feed: {{file: keys.ndjson}}\n{settings}\
             keys:\n  environments:\n    live: {{prefix: pxk_live_, billed: true}}\n\
             tiers:\n  default: {{limit: 1000000000, window: 1h}}\n\
             {routing}\
             admin: {{listen: \"127.0.0.1:0\"}}\n\
             log: {{level: warn, access: {{path: access.log}}}}\n",
            directory.path().display()
        );
        std::fs::write(at("tollgate.yaml"), config).unwrap();
        std::fs::write(at("keys.ndjson"), keys.concat()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["run", "-c"])
            .arg(at("tollgate.yaml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(at("stderr")).unwrap())
            .spawn()
            .unwrap();
        let pid = child.id();
        let process = Process::new(child);
        let address = until(
            || std::fs::read_to_string(at("run/gate.addr")).ok()?.trim().parse().ok(),
            || {
                format!(
                    "no gate after {PATIENCE:?}: {}",
                    std::fs::read_to_string(at("stderr")).unwrap()
                )
            },
        );
        until(
            || std::net::TcpStream::connect(address).ok(),
            || "it does not listen".into(),
        );
        Gate {
            address,
            directory,
            pid,
            _process: process,
        }
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Puts other keys in force, as an editor would.
    pub fn write_keys(&self, keys: &[String]) {
        let draft = self.directory().join("keys.new");
        std::fs::write(&draft, keys.concat()).unwrap();
        std::fs::rename(draft, self.directory().join("keys.ndjson")).unwrap();
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Its resident memory.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}
