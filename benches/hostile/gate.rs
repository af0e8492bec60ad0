//! The `tollgate` binary with a key file, on a port of its own.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tollgate::gate::key::{SecretDigest, checksum};

pub struct Gate {
    pub address: SocketAddr,
    process: Child,
    _directory: TempDir,
}

impl Drop for Gate {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A well-formed secret; those below [`KEYS`] are in the key file.
pub fn secret(n: u64) -> String {
    let payload = format!("pxk_live_{n:030}");
    let digits = checksum(payload.as_bytes());
    payload + std::str::from_utf8(&digits).expect("base62")
}

/// How many keys there are.
pub const KEYS: u64 = 64;

impl Gate {
    pub fn start(upstream: SocketAddr) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let mut lines = String::new();
        for n in 0..KEYS {
            let digest = SecretDigest::of(secret(n).as_bytes());
            let sha256 = digest.0.iter().fold(String::new(), |mut text, byte| {
                let _ = write!(text, "{byte:02x}");
                text
            });
            let _ = writeln!(
                lines,
                r#"{{"id":"key_{n}","organization":"org_{n}","environment":"live","scopes":[],"secrets":[{{"sha256":"{sha256}"}}]}}"#
            );
        }
        std::fs::write(at("keys.ndjson"), lines).expect("the key file");
        let config = format!(
            "version: 1\n\
             gate:\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  state_dir: {}\n  feed: {{file: keys.ndjson}}\n\
             keys:\n  environments:\n    live: {{prefix: pxk_live_, billed: true}}\n\
             tiers:\n  default: {{limit: 2000000000, window: 1h}}\n\
             plans:\n  starter: {{max_in_flight: 20000}}\n\
             upstreams:\n  up: {{servers: [\"{upstream}\"]}}\n\
             routes:\n  - {{name: default, match: {{path: \"/**\"}}, upstream: up}}\n\
             admin: {{listen: \"127.0.0.1:0\"}}\n\
             log: {{level: error, access: {{path: /dev/null}}}}\n",
            directory.path().display()
        );
        std::fs::write(at("tollgate.yaml"), config).expect("the configuration");
        let process = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["run", "-c"])
            .arg(at("tollgate.yaml"))
            .stdout(Stdio::null())
            .spawn()
            .expect("the binary starts");
        let address = wait_for(&at("run/gate.addr"));
        let gate = Gate {
            address,
            process,
            _directory: directory,
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "the gate does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        gate
    }

    /// How many descriptors the gate has open.
    pub fn descriptors(&self) -> usize {
        Path::new(&format!("/proc/{}/fd", self.process.id()))
            .read_dir()
            .map_or(0, Iterator::count)
    }

    /// Its resident memory.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap_or_default();
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok())
            .unwrap_or(0)
    }
}

fn wait_for(file: &Path) -> SocketAddr {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Ok(text) = std::fs::read_to_string(file)
            && let Ok(address) = text.trim().parse()
        {
            return address;
        }
        assert!(Instant::now() < deadline, "{} does not come", file.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}
