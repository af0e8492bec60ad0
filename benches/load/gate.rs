//! A gate to measure: the real binary with a key file.

use super::gate_support::secret;
use super::program::{BINARY, Program, free_address};
use super::scenario::Setup;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tollgate::gate::key::SecretDigest;

pub struct RunningGate {
    pub program: Program,
    pub tls: SocketAddr,
    pub certificate: PathBuf,
    pub keys: u32,
}

impl RunningGate {
    /// Starts a gate; with a processor of its own if `pinned`.
    pub fn start(directory: &Path, setup: Setup, origin: SocketAddr, pinned: bool) -> Self {
        let home = directory.join(format!("{}-{}-{}", setup.keys, setup.workers, setup.access_log));
        fs::create_dir(&home).expect("a fresh directory");
        let certificate = write_certificate(&home);
        write_keys(&home.join("keys.ndjson"), setup.keys);
        let (plain, tls) = (free_address(), free_address());
        // Two workers need more than one processor.
        let command = if pinned && setup.workers == 1 {
            let mut command = Command::new("taskset");
            command.args(["-c", "0", BINARY]);
            command
        } else if pinned {
            let mut command = Command::new("taskset");
            command.args(["-c", &format!("0-{}", processors() - 1), BINARY]);
            command
        } else {
            Command::new(BINARY)
        };
        let configuration = configured(&home, setup, origin, plain, tls);
        RunningGate {
            program: Program::start(command, &home, &configuration, plain),
            tls,
            certificate,
            keys: setup.keys,
        }
    }

    /// CPU time of all threads so far.
    pub fn cpu(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.program.process.id())).expect("a running gate");
        let on_cpu_ns = |task: fs::DirEntry| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split(' ').next()?.parse::<u64>().ok()
        };
        Duration::from_nanos(tasks.flatten().filter_map(on_cpu_ns).sum())
    }

    /// Memory that is the gate's alone, and its share of what is not.
    pub fn resident_mib(&self) -> u64 {
        let rollup =
            fs::read_to_string(format!("/proc/{}/smaps_rollup", self.program.process.id())).unwrap_or_default();
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
        kib.unwrap_or_default() / 1024
    }
}

/// Loads may run for long; nobody's limit but that of `/spent` is to be reached.
fn configured(home: &Path, setup: Setup, origin: SocketAddr, plain: SocketAddr, tls: SocketAddr) -> String {
    let home = home.display();
    let mut text = format!(
        r#"version: 1
gate:
  name: load
  threads: {workers}
  listen:
    - {{address: "{plain}"}}
    - {{address: "{tls}", tls: {{cert: {home}/cert.pem, key: {home}/key.pem}}}}
  state_dir: {home}/state
  feed: {{file: {home}/keys.ndjson}}
  limits: {{connections_per_address: 20000}}
  failed_attempts: {{limit: 1000000}}
keys: {{environments: {{live: {{prefix: pxk_live_, billed: true}}}}}}
scopes: [things:read, admin:all]
tiers:
  default: {{limit: 1000000000, window: 1h}}
  spent: {{limit: 1, window: 24h}}
plans: {{starter: {{}}}}
upstreams: {{origin: {{servers: ["{origin}"]}}}}
routes:
  - {{name: public, match: {{path: "/public/**"}}, public: {{}}, upstream: origin}}
  - {{name: things, match: {{path: "/v1/**"}}, scope: things:read, upstream: origin}}
  - {{name: admin, match: {{path: "/admin/**"}}, scope: admin:all, upstream: origin}}
  - {{name: spent, match: {{path: "/spent/**"}}, scope: things:read, tier: spent, upstream: origin}}
admin: {{listen: "127.0.0.1:0"}}
"#,
        workers = setup.workers,
    );
    let log = if setup.access_log {
        format!("log: {{level: warn, access: {{path: {home}/access.log}}}}\n")
    } else {
        "log: {level: warn, access: off}\n".to_owned()
    };
    // Counts shared through a cluster would be one more setup: a `cluster` section here, and rows in `scenario`.
    text.push_str(&log);
    text
}

fn write_keys(path: &Path, keys: u32) {
    let mut file = BufWriter::new(File::create(path).expect("a directory of ours"));
    let mut hex = String::new();
    for n in 0..keys {
        hex.clear();
        for byte in SecretDigest::of(secret(n).as_bytes()).0 {
            let _ = write!(hex, "{byte:02x}");
        }
        let revision = n + 1;
        writeln!(
            file,
            r#"{{"type":"key","revision":{revision},"id":"key_{n}","organization":"org_load","environment":"live","scopes":["things:read"],"plan":"starter","secrets":[{{"sha256":"{hex}"}}]}}"#
        )
        .expect("room on the disk");
    }
    file.flush().expect("room on the disk");
}

fn write_certificate(home: &Path) -> PathBuf {
    let made = rcgen::generate_simple_self_signed(["load.test".to_owned()]).expect("a name that is fit for one");
    let path = home.join("cert.pem");
    fs::write(&path, made.cert.pem()).expect("a directory of ours");
    fs::write(home.join("key.pem"), made.signing_key.serialize_pem()).expect("a directory of ours");
    path
}

fn processors() -> usize {
    std::thread::available_parallelism()
        .map_or(1, usize::from)
        // Pinned ourselves, we see one only.
        .max(2)
}
