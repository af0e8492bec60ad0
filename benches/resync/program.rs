//! The real binary as a gate, and how long it takes from its start to the first answer.

use super::TOKEN;
use super::gate_support::secret;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Program {
    process: Child,
    pub address: SocketAddr,
    /// From the start of the process to its first 200.
    pub first_answer_after: Duration,
}

impl Program {
    /// Starts a gate that follows the control plane at `plane`, with the spool that lies in `home/gate`.
    pub fn start(home: &Path, plane: &str, origin: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        // The gate takes it a moment later.
        drop(listener);
        let configuration = home.join("tollgate.yaml");
        fs::write(home.join("feed.token"), TOKEN).expect("a directory of ours");
        fs::write(&configuration, configured(home, plane, origin, address)).expect("a directory of ours");
        let begun = Instant::now();
        let process = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["run", "-c"])
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(home.join("stderr")).expect("a directory of ours"))
            .spawn()
            .expect("the gate's binary can be started");
        let mut program = Program {
            process,
            address,
            first_answer_after: Duration::ZERO,
        };
        while !program.answers() {
            let said = || fs::read_to_string(home.join("stderr")).unwrap_or_default();
            assert!(begun.elapsed() < Duration::from_secs(60), "no answer: {}", said());
            if let Ok(Some(status)) = program.process.try_wait() {
                panic!("the gate ended, {status}: {}", said());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        program.first_answer_after = begun.elapsed();
        program
    }

    fn answers(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(self.address) else {
            return false;
        };
        let request = format!(
            "GET /v1/0 HTTP/1.1\r\nHost: bench.test\r\nx-api-key: {}\r\nConnection: close\r\n\r\n",
            secret(0)
        );
        let mut answer = String::new();
        stream.write_all(request.as_bytes()).is_ok()
            && stream.read_to_string(&mut answer).is_ok()
            && answer.starts_with("HTTP/1.1 200")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Only this process, which was started here.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn configured(home: &Path, plane: &str, origin: SocketAddr, address: SocketAddr) -> String {
    let home = home.display();
    format!(
        r#"version: 1
gate:
  name: gate-1
  threads: 2
  listen: [{{address: "{address}"}}]
  state_dir: {home}/gate
  feed: {{url: "{plane}", token_file: {home}/feed.token}}
keys: {{environments: {{live: {{prefix: pxk_live_, billed: true}}, test: {{prefix: pxk_test_, billed: false}}}}}}
scopes: ["permissions:check", "storage:read"]
tiers: {{default: {{limit: 1000000000, window: 1h}}}}
plans: {{starter: {{}}}}
upstreams: {{origin: {{servers: ["{origin}"]}}}}
routes:
  - {{name: things, match: {{path: "/v1/**"}}, scope: "storage:read", upstream: origin}}
admin: {{listen: "127.0.0.1:0"}}
log: {{level: info, access: off}}
"#
    )
}
