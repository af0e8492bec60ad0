//! WebSocket and gRPC through the gate, with peers that are not ours: Python's `websockets` and `grpcio`.

use crate::harness::{PATIENCE, Process};
use crate::own_gate::{Gate, key_line, secret};
use reqwest::StatusCode;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// A Python program of `peers/`, and what it says.
struct Peer {
    lines: std::io::Lines<BufReader<ChildStdout>>,
    _process: Process,
}

impl Peer {
    fn start(script: &str, arguments: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = root.join("target/tools/bin/python");
        let mut child = Command::new(&python)
            .arg(root.join("tests/e2e/peers").join(script))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{} ({error}): .ci/install-tools makes it", python.display()));
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Peer {
            lines,
            _process: Process::new(child),
        }
    }

    /// The next line; what the peer could not do is on the test's standard error.
    fn says(&mut self) -> String {
        self.lines.next().expect("the peer goes on").unwrap()
    }

    fn port(&mut self) -> u16 {
        self.says().strip_prefix("port ").unwrap().parse().unwrap()
    }
}

fn gate_before(websocket_port: u16) -> Gate {
    let routing = format!(
        "upstreams:\n  up: {{servers: [\"127.0.0.1:{websocket_port}\"]}}\n\
         routes:\n  - {{name: ws, match: {{path: \"/ws/**\"}}, upstream: up, upgrade: true}}\n  \
         - {{name: open, match: {{path: \"/open/**\"}}, upstream: up, upgrade: true, public: {{}}}}\n  \
         - {{name: default, match: {{path: \"/**\"}}, upstream: up}}\n"
    );
    let keys: Vec<String> = (0..2).map(|n| key_line(n, false)).collect();
    Gate::start("{address: \"127.0.0.1:0\"}", "", &routing, &keys)
}

fn client(gate: &Gate, path: &str, key: u32, how: &str) -> Peer {
    let url = format!("ws://{}{path}", gate.address);
    Peer::start("websocket.py", &["client", &url, &secret(key), how])
}

#[test]
fn a_websocket_passes_where_the_rule_allows_it() {
    let mut server = Peer::start("websocket.py", &["serve"]);
    let gate = gate_before(server.port());
    for path in ["/ws/a", "/open/a"] {
        let mut allowed = client(&gate, path, 0, "once");
        assert_eq!([allowed.says(), allowed.says()], ["open", "closed 1000"], "{path}");
    }
    // Without the rule's leave the upstream sees a plain request, and says so: 426 Upgrade Required.
    assert_eq!(client(&gate, "/other", 0, "once").says(), "refused 426");
    assert_eq!(client(&gate, "/ws/a", 9, "once").says(), "refused 401");
}

#[tokio::test]
async fn a_revoked_keys_websocket_ends_within_a_second() {
    let mut server = Peer::start("websocket.py", &["serve"]);
    let gate = gate_before(server.port());
    let mut doomed = [
        client(&gate, "/ws/a", 0, "quiet"),
        client(&gate, "/ws/a", 0, "chatty"),
        client(&gate, "/ws/push", 0, "pushed"),
    ];
    let mut spared = client(&gate, "/ws/a", 1, "quiet");
    for peer in doomed.iter_mut().chain([&mut spared]) {
        assert_eq!(peer.says(), "open");
    }
    // Longer than the interval at which open connections are asked for.
    tokio::time::sleep(Duration::from_millis(600)).await;
    gate.write_keys(&[key_line(0, true), key_line(1, false)]);
    let http = crate::harness::client();
    let asked = Instant::now();
    loop {
        let request = http.get(gate.url("/other")).header("x-api-key", secret(0));
        if request.send().await.unwrap().status() == StatusCode::UNAUTHORIZED {
            break;
        }
        assert!(asked.elapsed() < PATIENCE, "the revocation is not in force");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let in_force = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_millis();
    for peer in &mut doomed {
        let ended: u128 = peer.says().strip_prefix("ended ").unwrap().parse().unwrap();
        println!(
            "ended {} ms after the revocation was in force",
            ended.saturating_sub(in_force)
        );
        assert!(ended < in_force + 1000, "after {} ms", ended - in_force);
    }
    let mut other = client(&gate, "/ws/a", 1, "once");
    assert_eq!(other.says(), "open");
    gate.write_keys(&[key_line(0, true), key_line(1, true)]);
    assert!(
        spared.says().starts_with("ended "),
        "it was spared until its own key was revoked"
    );
}

#[test]
fn a_grpc_call_of_each_kind_passes() {
    let mut server = Peer::start("grpc_peer.py", &["serve"]);
    let routing = format!(
        "upstreams:\n  up: {{servers: [\"127.0.0.1:{}\"], protocol: http2}}\n\
         routes:\n  - {{name: default, match: {{path: \"/**\"}}, upstream: up}}\n",
        server.port()
    );
    let gate = Gate::start(
        "{address: \"127.0.0.1:0\", http2: true}",
        "",
        &routing,
        &[key_line(0, false)],
    );
    let mut client = Peer::start("grpc_peer.py", &["client", &gate.address.to_string(), &secret(0)]);
    assert!(
        client
            .says()
            .starts_with("unary hello x-tollgate-environment,x-tollgate-key-id")
    );
    assert_eq!(client.says(), "from server n0,n1,n2");
    assert_eq!(client.says(), "to server 1000000");
    assert_eq!(client.says(), "both ways A,B");
    assert_eq!(client.says(), "error FAILED_PRECONDITION", "trailers pass, too");
    assert_eq!(client.says(), "error UNAUTHENTICATED", "without a key");
}
