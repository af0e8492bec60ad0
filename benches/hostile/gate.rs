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
    /// What stands behind it.
    pub upstream: SocketAddr,
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
            upstream,
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

    /// How much it takes now.
    pub fn look(&self) -> Look {
        let of_process = |name: &str| format!("/proc/{}/{name}", self.process.id());
        let status = std::fs::read_to_string(of_process("status")).unwrap_or_default();
        let sockets = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
        let number_after = |text: &str, name: &str| {
            text.split_once(name)
                .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
                .unwrap_or(0)
        };
        let tcp = sockets
            .lines()
            .find(|line| line.starts_with("TCP:"))
            .unwrap_or_default();
        Look {
            descriptors: Path::new(&of_process("fd")).read_dir().map_or(0, Iterator::count),
            resident_kib: number_after(&status, "VmRSS:"),
            // In pages.
            sockets_kib: number_after(tcp, " mem ") * 4,
        }
    }

    /// The processor time that it has taken so far.
    pub fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap_or_default();
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        // In its own mode and the kernel's, in hundredths of a second.
        let ticks: u64 = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse::<u64>().ok())
            .sum();
        Duration::from_millis(ticks * 10)
    }
}

/// What the gate's process, and the kernel for it, hold at one moment.
#[derive(Clone, Copy, Default)]
pub struct Look {
    pub descriptors: usize,
    pub resident_kib: u64,
    pub sockets_kib: u64,
}

impl Look {
    /// The most of each.
    pub fn max(self, other: Look) -> Look {
        Look {
            descriptors: self.descriptors.max(other.descriptors),
            resident_kib: self.resident_kib.max(other.resident_kib),
            sockets_kib: self.sockets_kib.max(other.sockets_kib),
        }
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
