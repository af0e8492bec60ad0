//! What an operator sees: `/livez`, `/readyz` and `/status`, the log's level, trace contexts.

use crate::alone::GateAlone;
use crate::certificates::Authority;
use crate::harness::{Tollgate, client, reached, standing_upstream, until};
use crate::metrics::start;
use serde_json::{Value, json};
use std::io::Write as _;
use std::process::Command;

#[tokio::test]
async fn what_the_operator_s_listener_says_is_true() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("feed.token"), "a-feed-token-for-tests").unwrap();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let gate = start(
        dir.path(),
        "edge",
        "gate",
        &format!(
            "version: 1\ngate:\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  state_dir: edge\n  feed: {{url: \"http://{nobody}\", token_file: feed.token}}\n\
             tiers: {{default: {{limit: 5, window: 1h}}}}\nupstreams: {{one: {{servers: [\"{nobody}\"]}}}}\nadmin: {{listen: \"127.0.0.1:0\"}}\n"
        ),
    );
    let get = async |path: &str| {
        let response = client().get(format!("{}{path}", gate.admin)).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    assert_eq!(get("/livez").await, (200, "ok\n".to_owned()), "it lives");
    assert_eq!(
        get("/readyz").await,
        (503, "not ready: no snapshot of the keys, or one too old\n".to_owned())
    );
    let status: Value = serde_json::from_str(&get("/status").await.1).unwrap();
    let of_gate = &status["gate"];
    assert_eq!(
        (&of_gate["ready"], &of_gate["feed"]["connected"]),
        (&json!(false), &json!(false)),
        "{status}"
    );
    let healthcheck = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .args(["healthcheck", "--admin", &gate.admin])
        .output()
        .unwrap();
    assert_eq!(healthcheck.status.code(), Some(1));
    let (code, said) = get("/nonsense").await;
    assert!(
        code == 404 && said.contains("GET /metrics, /livez, /readyz, /status and POST /reload"),
        "{said}"
    );

    let ready = GateAlone::start(&format!("one: {{servers: [\"{}\"]}}", standing_upstream().await)).await;
    let status: Value = ready
        .client
        .get(format!("{}/status", ready.admin))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let of_gate = &status["gate"];
    assert_eq!(
        (&of_gate["ready"], &of_gate["keys"], &of_gate["name"]),
        (&json!(true), &json!(1), &json!("alone")),
        "{status}"
    );
    let healthcheck = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .args(["healthcheck", "--admin", &ready.admin])
        .output()
        .unwrap();
    assert_eq!(healthcheck.status.code(), Some(0));
}

#[tokio::test]
async fn the_log_s_level_changes_with_a_reload() {
    let dir = tempfile::tempdir().unwrap();
    Authority::new("Ours").issue(dir.path(), "front", &["localhost"]);
    let upstreams = format!("one: {{servers: [\"{}\"]}}", standing_upstream().await);
    let listen = "  listen: [{address: \"127.0.0.1:0\", tls: {cert: front.crt, key: front.key}}]\n";
    let log = |level: &str| format!("log: {{level: {level}, access: off}}\n");
    let gate = GateAlone::start_in(dir, &upstreams, listen, &log("info")).await;
    let address = gate.url.trim_start_matches("http://").to_owned();
    let mut failed = 0.0;
    let mut fail_a_handshake = async || {
        std::net::TcpStream::connect(&address)
            .unwrap()
            .write_all(b"this is no TLS\r\n\r\n")
            .unwrap();
        failed += 1.0;
        gate.until_metric("tollgate_handshakes_failed_total", failed).await;
        gate.log().matches(" DEBUG the handshake of ").count()
    };
    assert_eq!(fail_a_handshake().await, 0);
    assert_eq!(gate.reload_with(&upstreams, listen, &log("debug")).await.0, 200);
    // Counted before it is logged, by a hair.
    assert!(fail_a_handshake().await <= 1);
    until(
        || (gate.log().matches(" DEBUG the handshake of ").count() == 1).then_some(()),
        || gate.log(),
    );
    assert_eq!(gate.reload_with(&upstreams, listen, &log("warn")).await.0, 200);
    assert_eq!(fail_a_handshake().await, 1);
}

#[tokio::test]
async fn a_trace_context_passes_and_is_logged() {
    let tollgate = Tollgate::start().await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = tollgate.get("/api/v1/identity/me").header("x-api-key", &tollgate.key);
    let request = request
        .header("traceparent", trace)
        .header("tracestate", "vendor=1")
        .header("x-request-id", "traced-1");
    let headers = reached(request.send().await.unwrap()).await;
    for (name, value) in [("traceparent", trace), ("tracestate", "vendor=1")] {
        assert!(
            headers.contains(&(name.to_owned(), value.to_owned())),
            "{name}: {headers:?}"
        );
    }
    let line = until(
        || {
            tollgate
                .output()
                .lines()
                .find(|line| line.contains("traced-1"))
                .map(str::to_owned)
        },
        || tollgate.output(),
    );
    let line: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["traceparent"], trace, "{line}");
}
