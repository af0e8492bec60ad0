//! Starting, stopping, and living through the control plane's absence.

use crate::gate::{Gate, Spec, Upstream, eventually, secret};
use crate::harness::{PATIENCE, Process, Tollgate, until};
use reqwest::{Method, StatusCode};
use serde_json::json;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Starts `tollgate run` on a configuration; returns it and the gate's URL.
pub fn run(config: &Path, state_dir: &Path) -> (Process, String) {
    let process = start(config);
    let address = state_dir.join("run/gate.addr");
    let url = until(
        || std::fs::read_to_string(&address).ok(),
        || "the gate does not start".into(),
    );
    (process, format!("http://{}", url.trim()))
}

fn start(config: &Path) -> Process {
    let log = config.with_extension("log");
    let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .arg("run")
        .arg("-c")
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(log).unwrap())
        .spawn()
        .unwrap();
    Process::new(child)
}

#[tokio::test]
async fn started_again_on_the_same_data_the_old_key_still_works() {
    let first = Tollgate::start().await;
    let old = first.key.clone();
    assert_eq!(first.ask("/any", &old).await.status(), StatusCode::OK);
    let second = Tollgate::start_in(first.stop()).await;
    assert_ne!(second.key, old, "a fresh key is printed");
    assert_eq!(second.ask("/any", &old).await.status(), StatusCode::OK);
    let left = second.ask("/any", &old).await.headers()["ratelimit"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(left.contains(";r=997;"), "a restart forgives nothing: {left}");
}

/// The grace time is ten minutes, so a process that sleeps through it would never end here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn term_with_nothing_in_flight_ends_at_once_and_with_a_request_after_it() {
    let upstream = Upstream::start(1).await;
    let mut idle = Gate::start(Spec::new(upstream.address));
    // A kept-alive connection is nothing in flight.
    assert_eq!(idle.ask("/a", 0).await.status(), StatusCode::OK);
    let asked = Instant::now();
    idle.signal("TERM");
    tokio::task::block_in_place(|| idle.wait());
    println!("TERM with nothing in flight: ended after {:?}", asked.elapsed());

    let mut busy = Gate::start(Spec::new(upstream.address));
    let held = busy
        .client
        .get(format!("{}/held", busy.url))
        .header("x-api-key", secret(0));
    let held = tokio::spawn(held.send());
    upstream.await_held(1).await;
    busy.signal("TERM");
    eventually("the end of accepting", async || {
        tokio::net::TcpStream::connect(busy.address()).await.is_err() || busy.log().contains("TERM:")
    })
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(busy.is_running(), "a request is in flight");
    let released = Instant::now();
    upstream.release.send_replace(true);
    assert_eq!(held.await.unwrap().unwrap().text().await.unwrap(), "released");
    tokio::task::block_in_place(|| busy.wait());
    println!(
        "TERM with a request in flight for 5 s: ended {:?} after its end",
        released.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn int_ends_at_once_whatever_is_in_flight_and_after_term_too() {
    let upstream = Upstream::start(1).await;
    for first in ["", "TERM"] {
        let mut gate = Gate::start(Spec::new(upstream.address));
        let held = gate
            .client
            .get(format!("{}/held", gate.url))
            .header("x-api-key", secret(0));
        let held = tokio::spawn(held.send());
        upstream.await_held(1).await;
        upstream.held.send_replace(0);
        if !first.is_empty() {
            gate.signal(first);
            eventually("TERM", async || gate.log().contains("TERM: finishing")).await;
        }
        gate.signal("INT");
        tokio::task::block_in_place(|| gate.wait());
        assert!(held.await.unwrap().is_err(), "cut off");
        gate.start_again();
        assert_eq!(
            gate.left_after_one_more("/b", 0).await,
            1_000_000_000 - 2,
            "and counted all the same"
        );
    }
}

/// Two processes: a control plane, and a gate that follows it.
#[tokio::test]
async fn with_the_control_plane_stopped_the_gate_serves_on_and_catches_up_when_it_is_back() {
    let first = Tollgate::start().await;
    let account = first.register("outage@example.com").await;
    let key = first.create_key(&account, "live", &[]).await;
    let port = first.control.rsplit(':').next().unwrap().to_owned();
    let upstream = crate::harness::standing_upstream().await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(first.data().join("feed.token"), dir.path().join("feed.token")).unwrap();
    std::fs::copy(first.data().join("admin.token"), dir.path().join("admin.token")).unwrap();
    let common =
        "keys:\n  environments:\n    live: {{prefix: pxk_live_, billed: true}}\n    test: {{prefix: pxk_test_}}\n    dev: {{prefix: pxk_dev_}}\n\
         scopes: [identity:resolve]\ntiers:\n  default: {{limit: 1000, window: 1h}}\nplans: {{starter: {{}}}}\nlog: {{level: info, access: off}}\n"
            .replace("{{", "{").replace("}}", "}");
    let gate_file = dir.path().join("gate.yaml");
    std::fs::write(
        &gate_file,
        format!(
            "version: 1\n{common}gate:\n  name: edge-1\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  state_dir: {dir}/gate\n  \
             feed: {{url: \"http://127.0.0.1:{port}\", token_file: {dir}/feed.token}}\nupstreams:\n  origin: {{servers: [\"{upstream}\"]}}\n\
             routes:\n  - {{name: rest, match: {{path: \"/**\"}}, upstream: origin}}\n",
            dir = dir.path().display(),
        ),
    )
    .unwrap();
    let (gate_process, gate) = run(&gate_file, &dir.path().join("gate"));
    let status = async |secret: &str| {
        let request = first_client(&gate, secret);
        request.send().await.unwrap().status()
    };
    let eventually = async |secret: &str, expected: StatusCode| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = status(secret).await;
            if seen == expected {
                return;
            }
            assert!(Instant::now() < deadline, "still {seen}, not {expected}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    eventually(&key.secret, StatusCode::OK).await;
    let data = first.stop();
    for _ in 0..20 {
        assert_eq!(
            status(&key.secret).await,
            StatusCode::OK,
            "the control plane is down, the gate serves on"
        );
    }
    let spool = dir.path().join("gate/keys.spool");
    until(|| spool.exists().then_some(()), || "the gate writes no spool".into());
    drop(gate_process);
    let (_gate_process, gate) = run_again(&gate_file, &dir.path().join("gate"));
    let restarted = first_client(&gate, &key.secret).send().await.unwrap().status();
    assert_eq!(
        restarted,
        StatusCode::OK,
        "restarted with the control plane down, from its spool"
    );

    let control_file = dir.path().join("control.yaml");
    std::fs::write(
        &control_file,
        format!(
            "version: 1\n{common}control:\n  listen: {{address: \"127.0.0.1:{port}\"}}\n  database: sqlite://{data}/tollgate.db\n  \
             state_dir: {dir}/control\n  feed_token_file: {dir}/feed.token\n  admin_token_file: {dir}/admin.token\n",
            data = data.path().display(),
            dir = dir.path().display(),
        ),
    )
    .unwrap();
    let _control = start(&control_file);
    let control = format!("http://127.0.0.1:{port}");
    let answers = async || {
        crate::harness::client()
            .get(format!("{control}/api/v1/plans"))
            .send()
            .await
            .is_ok()
    };
    let deadline = Instant::now() + PATIENCE;
    while !answers().await {
        assert!(Instant::now() < deadline, "the control plane does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let sign_in = json!({"email": "outage@example.com", "password": "your-secure-password"});
    let client = crate::harness::client();
    let signed_in = client
        .post(format!("{control}/api/v1/login"))
        .json(&sign_in)
        .send()
        .await
        .unwrap();
    let cookie = signed_in.headers()["set-cookie"]
        .to_str()
        .unwrap()
        .split(';')
        .next()
        .unwrap()
        .to_owned();
    let revoke = client
        .request(Method::DELETE, format!("{control}/api/v1/keys/{}", key.id))
        .header("cookie", cookie);
    assert!(revoke.send().await.unwrap().status().is_success());
    let deadline = Instant::now() + PATIENCE;
    while first_client(&gate, &key.secret).send().await.unwrap().status() != StatusCode::UNAUTHORIZED {
        assert!(Instant::now() < deadline, "the gate does not catch up");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn run_again(config: &Path, state_dir: &Path) -> (Process, String) {
    std::fs::remove_file(state_dir.join("run/gate.addr")).unwrap();
    run(config, state_dir)
}

fn first_client(gate: &str, secret: &str) -> reqwest::RequestBuilder {
    crate::harness::client()
        .get(format!("{gate}/any"))
        .header("x-api-key", secret)
}
