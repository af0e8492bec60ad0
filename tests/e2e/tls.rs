//! TLS at the front and between gate and control plane: graded, exchanged without a restart, mutual.

use crate::alone::{GateAlone, Samples, tollgate};
use crate::certificates::{Authority, shown_certificate};
use crate::harness::{PATIENCE, Process, client, until};
use crate::origin::{Manner, Origin};
use reqwest::Method;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn der(file: &Path) -> Vec<u8> {
    CertificateDer::from_pem_file(file).unwrap().to_vec()
}

/// Waits until the server shows this certificate.
async fn until_shown(address: SocketAddr, name: &str, file: &Path, log: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while shown_certificate(address, name).await != der(file) {
        assert!(
            Instant::now() < deadline,
            "{} is not served:\n{}",
            file.display(),
            log()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The addresses in the log: the first listener's comes first.
fn addresses(log: &str) -> Vec<SocketAddr> {
    let lines = log.lines().filter_map(|line| line.split("gate listens on ").nth(1));
    lines.map(|address| address.trim().parse().unwrap()).collect()
}

/// `target/tools` is where `.ci/install-tools` puts it.
fn grade(address: SocketAddr, authority: &Path, report: &Path) -> (bool, String, Value) {
    let output = Command::new("target/tools/bin/sslyze")
        .arg(format!("--json_out={}", report.display()))
        .arg(format!("--certinfo_ca_file={}", authority.display()))
        .args(["--mozilla_config=intermediate", "--reneg", "--resum", "--early_data"])
        .arg(format!("localhost:{}", address.port()))
        .output()
        .expect("sslyze is installed by `make test`");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let report = std::fs::read_to_string(report).unwrap_or_else(|error| panic!("{error}: {text}"));
    let report: Value = serde_json::from_str(&report).unwrap();
    (
        output.status.success(),
        text,
        report["server_scan_results"][0]["scan_result"].clone(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sslyze_finds_no_weakness() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("Ours");
    authority.write(&dir.path().join("ca.crt"));
    authority.issue(dir.path(), "front", &["localhost", "127.0.0.1"]);
    let origin = Origin::start("origin", Manner::Answers).await;
    let listen =
        "  listen: [{address: \"127.0.0.1:0\"}, {address: \"127.0.0.1:0\", tls: {cert: front.crt, key: front.key}}]\n";
    let gate = GateAlone::start_in(
        dir,
        &format!("origin: {{servers: [\"{}\"]}}", origin.address),
        listen,
        "",
    )
    .await;
    let address = addresses(&gate.log())[1];
    let (authority, report) = (gate.path().join("ca.crt"), gate.path().join("report.json"));
    let (compliant, text, found) = tokio::task::spawn_blocking(move || grade(address, &authority, &report))
        .await
        .unwrap();
    assert!(compliant && text.contains("OK - Compliant"), "{text}");
    let of = |scan: &str| {
        assert_eq!(found[scan]["status"], "COMPLETED", "{scan}: {text}");
        &found[scan]["result"]
    };
    for (scan, supported) in [
        ("ssl_2_0_cipher_suites", false),
        ("ssl_3_0_cipher_suites", false),
        ("tls_1_0_cipher_suites", false),
        ("tls_1_1_cipher_suites", false),
        ("tls_1_2_cipher_suites", true),
        ("tls_1_3_cipher_suites", true),
    ] {
        assert_eq!(of(scan)["is_tls_version_supported"], supported, "{scan}");
        for suite in of(scan)["accepted_cipher_suites"].as_array().unwrap() {
            let name = suite["cipher_suite"]["name"].as_str().unwrap();
            let forward_secret = name.contains("_ECDHE_") || scan == "tls_1_3_cipher_suites";
            let authenticated = ["_GCM_", "_POLY1305_"].iter().any(|mode| name.contains(mode));
            assert!(forward_secret && authenticated, "{name}");
        }
    }
    for (scan, what, expected) in [
        ("tls_compression", "supports_compression", false),
        ("tls_1_3_early_data", "supports_early_data", false),
        ("openssl_ccs_injection", "is_vulnerable_to_ccs_injection", false),
        ("heartbleed", "is_vulnerable_to_heartbleed", false),
        (
            "session_renegotiation",
            "is_vulnerable_to_client_renegotiation_dos",
            false,
        ),
        ("tls_extended_master_secret", "supports_ems_extension", true),
    ] {
        assert_eq!(of(scan)[what], expected, "{what}");
    }
    assert_eq!(of("robot")["robot_result"], "NOT_VULNERABLE_RSA_NOT_SUPPORTED");
    let curves: Vec<&str> = of("elliptic_curves")["supported_curves"]
        .as_array()
        .unwrap()
        .iter()
        .map(|curve| curve["name"].as_str().unwrap())
        .collect();
    assert_eq!(curves, ["X25519", "secp256r1", "secp384r1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_chosen_by_name_and_exchanged_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("Ours");
    authority.write(&dir.path().join("ca.crt"));
    let (one, _) = authority.issue(dir.path(), "one", &["one.example", "localhost"]);
    let (two, _) = authority.issue(dir.path(), "two", &["two.example"]);
    let origin = Origin::start("origin", Manner::Answers).await;
    let listen = "  listen:\n    - {address: \"127.0.0.1:0\"}\n    - {address: \"127.0.0.1:0\", tls: {certificates: [{cert: one.crt, key: one.key}, {cert: two.crt, key: two.key}]}}\n    \
                  - {address: \"127.0.0.1:0\", tls: {cert: two.crt, key: two.key, min_version: \"1.3\"}}\n";
    let gate = GateAlone::start_in(
        dir,
        &format!("origin: {{servers: [\"{}\"]}}", origin.address),
        listen,
        "",
    )
    .await;
    let (both, newest) = (addresses(&gate.log())[1], addresses(&gate.log())[2]);
    for (name, file) in [
        ("one.example", &one),
        ("two.example", &two),
        ("unknown.example", &one),
        ("127.0.0.1", &one),
    ] {
        assert_eq!(shown_certificate(both, name).await, der(file), "{name}");
    }
    let https = |version: reqwest::tls::Version, http2: bool| {
        let ca = reqwest::Certificate::from_pem(authority.pem.as_bytes()).unwrap();
        let builder = reqwest::Client::builder().no_proxy().tls_certs_only([ca]);
        let builder = builder.tls_version_min(version).tls_version_max(version);
        let builder = builder.resolve("one.example", both).resolve("two.example", newest);
        let builder = if http2 { builder } else { builder.http1_only() };
        builder.build().unwrap()
    };
    let (tls12, tls13) = (reqwest::tls::Version::TLS_1_2, reqwest::tls::Version::TLS_1_3);
    let key = gate.key.clone();
    let ask =
        |client: reqwest::Client, name: &str| client.get(format!("https://{name}/x")).header("x-api-key", &key).send();
    for version in [tls12, tls13] {
        for (http2, expected) in [(true, reqwest::Version::HTTP_2), (false, reqwest::Version::HTTP_11)] {
            let response = ask(https(version, http2), &format!("one.example:{}", both.port()))
                .await
                .unwrap();
            assert_eq!((response.status().as_u16(), response.version()), (200, expected));
        }
    }
    let only_newest = format!("two.example:{}", newest.port());
    assert_eq!(ask(https(tls13, true), &only_newest).await.unwrap().status(), 200);
    assert!(
        ask(https(tls12, true), &only_newest).await.is_err(),
        "TLS 1.2 where 1.3 is the least"
    );

    // Somebody renews: the new files are moved into place, as certbot does. A connection that was open stays.
    let open = https(tls13, false);
    let one_example = format!("one.example:{}", both.port());
    assert_eq!(ask(open.clone(), &one_example).await.unwrap().status(), 200);
    let renewed = tempfile::tempdir_in(gate.path()).unwrap();
    let (new_cert, new_key) = authority.issue(renewed.path(), "one", &["one.example", "localhost"]);
    std::fs::rename(&new_cert, &one).unwrap();
    std::fs::rename(&new_key, one.with_extension("key")).unwrap();
    until_shown(both, "one.example", &one, || gate.log()).await;
    assert_eq!(ask(open, &one_example).await.unwrap().status(), 200);
    assert_eq!(shown_certificate(both, "two.example").await, der(&two));
    assert!(
        gate.log()
            .contains("one.crt has changed: the new certificate is served, valid until "),
        "{}",
        gate.log()
    );

    // Somebody renews badly: what was served is served on, and the log says why; the next good pair is taken.
    let served = der(&one);
    std::fs::write(&one, "garbage").unwrap();
    until(
        || {
            gate.log()
                .contains("certificates were not exchanged, the old ones are served on: ")
                .then_some(())
        },
        || gate.log(),
    );
    assert_eq!(shown_certificate(both, "one.example").await, served);
    let (status, said) = reload(&gate).await;
    assert!(
        status == 422 && said.contains("one.crt"),
        "a reload says it too: {status} {said}"
    );
    authority.issue(gate.path(), "one", &["one.example", "localhost"]);
    until_shown(both, "one.example", &one, || gate.log()).await;
    let metrics = gate.metrics().await;
    let expiry = format!(
        "tollgate_certificate_expiry_timestamp_seconds{{file=\"{}\"}}",
        one.display()
    );
    let left = metrics.get(&expiry).unwrap() - metrics.get("process_start_time_seconds").unwrap();
    assert!((88.0..90.0).contains(&(left / 86_400.0)), "{left}");
}

async fn reload(gate: &GateAlone) -> (u16, String) {
    let answer = gate.client.post(format!("{}/reload", gate.admin)).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

/// A control plane that demands client certificates.
struct Control {
    address: SocketAddr,
    dir: PathBuf,
    _process: Process,
}

impl Control {
    fn start(dir: &Path) -> Self {
        let text = "version: 1\ncontrol:\n  listen: {address: \"127.0.0.1:0\", tls: {cert: control.crt, key: control.key, client_ca: ca.crt}}\n  \
             database: sqlite://control.db\n  state_dir: control\n  feed_token_file: feed.token\n  admin_token_file: admin.token\n  \
             public_url: https://localhost\nadmin: {listen: \"127.0.0.1:0\"}\ntiers: {default: {limit: 1000000, window: 1h}}\n";
        std::fs::write(dir.join("control.yaml"), text).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .arg("run")
            .arg("-c")
            .arg(dir.join("control.yaml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.join("control.log")).unwrap())
            .spawn()
            .unwrap();
        let process = Process::new(child);
        let log = || std::fs::read_to_string(dir.join("control.log")).unwrap_or_default();
        let address = until(
            || std::fs::read_to_string(dir.join("control/run/control.addr")).ok(),
            log,
        );
        Control {
            address: address.trim().parse().unwrap(),
            dir: dir.to_owned(),
            _process: process,
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("control.log")).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gate_and_control_plane_trust_each_other_by_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let (authority, stranger) = (Authority::new("Ours"), Authority::new("Somebody"));
    authority.write(&dir.path().join("ca.crt"));
    stranger.write(&dir.path().join("stranger.crt"));
    let (served, _) = authority.issue(dir.path(), "control", &["localhost"]);
    authority.issue(dir.path(), "gate", &["gate-1"]);
    stranger.issue(dir.path(), "other", &["gate-1"]);
    std::fs::write(dir.path().join("feed.token"), "a-feed-token-for-tests").unwrap();
    std::fs::write(dir.path().join("admin.token"), "an-admin-token-for-tests").unwrap();
    let control = Control::start(dir.path());
    let upstream = crate::harness::standing_upstream().await;
    let gate = |name: &str, tls: &str| {
        let text = format!(
            "version: 1\ngate:\n  name: {name}\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  state_dir: {name}\n  \
             feed: {{url: \"https://localhost:{}\", token_file: feed.token, tls: {{{tls}}}}}\n\
             tiers: {{default: {{limit: 1000000, window: 1h}}}}\nupstreams: {{one: {{servers: [\"{upstream}\"]}}}}\nadmin: {{listen: \"127.0.0.1:0\"}}\n",
            control.address.port(),
        );
        let config = dir.path().join(format!("{name}.yaml"));
        std::fs::write(&config, text).unwrap();
        let (process, url) = crate::life::run(&config, &dir.path().join(name));
        let admin = until(
            || std::fs::read_to_string(dir.path().join(name).join("run/admin.addr")).ok(),
            || name.to_owned(),
        );
        (process, url, format!("http://{}", admin.trim()))
    };
    let log = |name: &str| std::fs::read_to_string(dir.path().join(format!("{name}.log"))).unwrap();
    // The right certificate: keys arrive, and usage goes back.
    let (_good, url, admin) = gate("good", "ca: ca.crt, cert: gate.crt, key: gate.key");
    until_metric(&admin, "tollgate_feed_connected", 1.0, || log("good") + &control.log()).await;
    let unknown = client()
        .get(format!("{url}/x"))
        .header("x-api-key", tollgate(&["keys", "new"], "").trim());
    assert_eq!(
        unknown.send().await.unwrap().status(),
        401,
        "it knows its keys, and this is none"
    );
    // None, a stranger's, and a control plane that the gate does not trust: refused, and said so on both sides.
    for (name, tls, of_gate, of_control) in [
        ("none", "ca: ca.crt", "CertificateRequired", "peer sent no certificates"),
        (
            "wrong",
            "ca: ca.crt, cert: other.crt, key: other.key",
            "UnknownCA",
            "invalid peer certificate",
        ),
        (
            "distrustful",
            "ca: stranger.crt, cert: gate.crt, key: gate.key",
            "UnknownIssuer",
            "UnknownCA",
        ),
    ] {
        let (_process, url, admin) = gate(name, tls);
        until(
            || log(name).contains(of_gate).then_some(()),
            || format!("{name}: no {of_gate} in\n{}", log(name)),
        );
        until(
            || control.log().contains(of_control).then_some(()),
            || format!("{name}: no {of_control} in\n{}", control.log()),
        );
        assert_eq!(
            Samples::read(&client(), &admin).await.get("tollgate_feed_connected"),
            Some(0.0)
        );
        let refused = client()
            .get(format!("{url}/x"))
            .header("x-api-key", tollgate(&["keys", "new"], "").trim());
        assert_eq!(
            refused.send().await.unwrap().status(),
            503,
            "{name}: no keys, no requests"
        );
        assert!(!log(name).contains("a-feed-token"), "{name}");
    }
    // The control plane's certificate is exchanged while it runs, too.
    authority.issue(dir.path(), "control", &["localhost"]);
    until(
        || {
            control
                .log()
                .contains("control.crt has changed: the new certificate is served")
                .then_some(())
        },
        || control.log(),
    );
    let (_again, _, admin) = gate("again", "ca: ca.crt, cert: gate.crt, key: gate.key");
    until_metric(&admin, "tollgate_feed_connected", 1.0, || log("again")).await;
    assert!(served.exists());
}

async fn until_metric(admin: &str, name: &str, value: f64, log: impl Fn() -> String) {
    let deadline = Instant::now() + PATIENCE;
    while Samples::read(&client(), admin).await.get(name) != Some(value) {
        assert!(Instant::now() < deadline, "{name} is not {value}:\n{}", log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Both roles in one process, over TLS: the feed, and a route to the control plane.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_process_reaches_its_own_control_plane_over_mutual_tls() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("Ours");
    authority.write(&dir.path().join("ca.crt"));
    authority.issue(dir.path(), "control", &["localhost"]);
    authority.issue(dir.path(), "gate", &["gate-1"]);
    std::fs::write(dir.path().join("feed.token"), "a-feed-token-for-tests").unwrap();
    std::fs::write(dir.path().join("admin.token"), "an-admin-token-for-tests").unwrap();
    // Its own port must be known to the feed's URL; one that was just free mostly still is.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let upstream = crate::harness::standing_upstream().await;
    let text = format!(
        "version: 1\ngate:\n  name: both\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  state_dir: both\n  \
         feed: {{url: \"https://localhost:{port}\", token_file: feed.token, tls: {{ca: ca.crt, cert: gate.crt, key: gate.key}}}}\n\
         tiers: {{default: {{limit: 1000000, window: 1h}}}}\nupstreams: {{one: {{servers: [\"{upstream}\"]}}}}\n\
         routes:\n  - {{name: plans, match: {{path: /openapi.json}}, upstream: control, public: {{}}}}\n  - {{name: rest, match: {{path: \"/**\"}}, upstream: one}}\n\
         control:\n  listen: {{address: \"127.0.0.1:{port}\", tls: {{cert: control.crt, key: control.key, client_ca: ca.crt}}}}\n  \
         database: sqlite://control.db\n  feed_token_file: feed.token\n  admin_token_file: admin.token\n  public_url: https://localhost:{port}\n\
         admin: {{listen: \"127.0.0.1:0\"}}\n",
    );
    let config = dir.path().join("both.yaml");
    std::fs::write(&config, text).unwrap();
    let (_process, url) = crate::life::run(&config, &dir.path().join("both"));
    let log = || std::fs::read_to_string(dir.path().join("both.log")).unwrap();
    let admin = until(
        || std::fs::read_to_string(dir.path().join("both/run/admin.addr")).ok(),
        log,
    );
    until_metric(&format!("http://{}", admin.trim()), "tollgate_feed_connected", 1.0, log).await;
    let document = client()
        .request(Method::GET, format!("{url}/openapi.json"))
        .send()
        .await
        .unwrap();
    assert_eq!(document.status(), 200, "{}", log());
    let document: Value = document.json().await.unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
}
