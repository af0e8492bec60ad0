//! The real binary as a gate, from its start to its end.

use super::gate_support::secret;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What Cargo built beside the bench.
pub const BINARY: &str = env!("CARGO_BIN_EXE_tollgate");

pub struct Program {
    pub process: Child,
    pub address: SocketAddr,
    /// From the start of the process to its first 200.
    pub first_answer_after: Duration,
}

impl Program {
    /// Has `command`, which is the binary or runs it, start a gate with this `configuration`, which listens at `address` and
    /// lets key 0 through. Its files are in `home`.
    pub fn start(mut command: Command, home: &Path, configuration: &str, address: SocketAddr) -> Self {
        let file = home.join("tollgate.yaml");
        fs::write(&file, configuration).expect("a directory of ours");
        let begun = Instant::now();
        let process = command
            .args(["run", "-c"])
            .arg(&file)
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
            assert!(begun.elapsed() < Duration::from_secs(120), "no answer: {}", said());
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

/// Free when asked; the gate takes it a moment later.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound address")
}
