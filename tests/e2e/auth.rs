//! Who gets in, who does not, and how each is told.

use crate::harness::{Tollgate, client, error, standing_upstream};
use crate::life;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SEED: &str = r#"{"name":"My Company","email":"dev@example.com","password":"your-secure-password"}"#;

#[tokio::test]
async fn the_seed_request_registers_and_the_key_works_at_once_in_both_headers() {
    let tollgate = Tollgate::start().await;
    let post = tollgate
        .request(Method::POST, "/api/v1/register")
        .header("content-type", "application/json");
    let response = post.body(SEED).send().await.unwrap();
    let answered = Instant::now();
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(response.headers()["content-type"], "application/json");
    let body: Value = response.json().await.unwrap();
    let (organization, key) = (
        body["data"]["organizationId"].as_str().unwrap(),
        body["data"]["apiKey"].as_str().unwrap(),
    );
    assert_eq!(
        body,
        json!({"success": true, "data": {"organizationId": organization, "apiKey": key}})
    );
    assert!(organization.starts_with("org_") && key.starts_with("pxk_dev_") && key.len() == "pxk_dev_".len() + 36);

    let path = "/api/v1/messaging/email";
    let first = tollgate
        .request(Method::POST, path)
        .header("x-api-key", key)
        .send()
        .await
        .unwrap();
    let took = answered.elapsed();
    assert_eq!(first.status(), StatusCode::OK);
    assert!(took < Duration::from_millis(100), "in force after {took:?}");
    let second = tollgate
        .request(Method::POST, path)
        .header("authorization", format!("Bearer {key}"));
    let second = second.send().await.unwrap();
    assert_eq!(second.status(), StatusCode::OK);
    let names = |response: &reqwest::Response| {
        let mut names: Vec<String> = response.headers().keys().map(ToString::to_string).collect();
        names.sort();
        names
    };
    assert_eq!(names(&first), names(&second), "the same answer");
}

#[tokio::test]
async fn every_wrong_credential_has_its_status_code_and_challenge() {
    let tollgate = Tollgate::start().await;
    let account = tollgate.register("table@example.com").await;
    let create = async |environment: &str, scopes: &[&str]| tollgate.create_key(&account, environment, scopes).await;
    let patch = async |id: &str, change: Value| {
        tollgate
            .call(&account, Method::PATCH, &format!("/keys/{id}?wait=all"), change)
            .await;
    };
    let good = create("live", &["permissions:check"]).await;
    let disabled = create("live", &[]).await;
    patch(&disabled.id, json!({"disabled": true})).await;
    let revoked = create("live", &[]).await;
    tollgate
        .call(
            &account,
            Method::DELETE,
            &format!("/keys/{}?wait=all", revoked.id),
            Value::Null,
        )
        .await;
    let expired = create("live", &[]).await;
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_millis(400);
    patch(&expired.id, json!({"expiresAt": format!("{soon:.3}")})).await;
    let at_once = tollgate.ask("/any", &expired.secret).await.status();
    let unknown = Tollgate::start().await.key.clone();

    let invalid = r#"Bearer realm="tollgate", error="invalid_token""#;
    let scope = r#"Bearer realm="tollgate", error="insufficient_scope", scope="exports:create""#;
    let conflict = r#"Bearer realm="tollgate", error="invalid_request""#;
    let x = |key: &str| vec![("x-api-key", key.to_owned())];
    let bearer = |key: &str| vec![("authorization", format!("Bearer {key}"))];
    let (most, last) = good.secret.split_at(good.secret.len() - 1);
    let broken = format!("{most}{}", if last == "0" { "1" } else { "0" });
    /// Name, path, credential headers, status, code, challenge.
    type Case<'a> = (&'a str, &'a str, Vec<(&'a str, String)>, u16, &'a str, Option<&'a str>);
    let cases: Vec<Case<'_>> = vec![
        (
            "nothing",
            "/any",
            vec![],
            401,
            "MISSING_API_KEY",
            Some(r#"Bearer realm="tollgate""#),
        ),
        (
            "another scheme",
            "/any",
            vec![("authorization", "Basic eDp5".into())],
            401,
            "MISSING_API_KEY",
            Some(r#"Bearer realm="tollgate""#),
        ),
        ("junk", "/any", x("junk"), 401, "INVALID_API_KEY", Some(invalid)),
        ("empty", "/any", x(""), 401, "INVALID_API_KEY", Some(invalid)),
        (
            "wrong checksum",
            "/any",
            bearer(&broken),
            401,
            "INVALID_API_KEY",
            Some(invalid),
        ),
        ("unknown", "/any", x(&unknown), 401, "INVALID_API_KEY", Some(invalid)),
        (
            "disabled",
            "/any",
            bearer(&disabled.secret),
            401,
            "DISABLED_API_KEY",
            Some(invalid),
        ),
        (
            "revoked",
            "/any",
            x(&revoked.secret),
            401,
            "REVOKED_API_KEY",
            Some(invalid),
        ),
        (
            "wrong scope",
            "/api/v1/exports/1",
            x(&good.secret),
            403,
            "INSUFFICIENT_SCOPE",
            Some(scope),
        ),
        (
            "two keys",
            "/any",
            [x(&good.secret), bearer(&unknown)].concat(),
            400,
            "CONFLICTING_CREDENTIALS",
            Some(conflict),
        ),
        (
            "one header twice",
            "/any",
            [x(&good.secret), x(&good.secret)].concat(),
            400,
            "CONFLICTING_CREDENTIALS",
            Some(conflict),
        ),
        (
            "bearer twice",
            "/any",
            [bearer(&good.secret), bearer(&good.secret)].concat(),
            400,
            "CONFLICTING_CREDENTIALS",
            Some(conflict),
        ),
    ];
    for (name, path, headers, status, code, challenge) in cases {
        let mut request = tollgate.request(Method::POST, path);
        for (header, value) in headers {
            request = request.header(header, value);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status().as_u16(), status, "{name}");
        let challenged = response
            .headers()
            .get("www-authenticate")
            .map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(challenged.as_deref(), challenge, "{name}");
        assert_eq!(error(response).await.0, code, "{name}");
    }
    assert_eq!(at_once, StatusCode::OK, "not expired yet");
    crate::harness::until(
        || (jiff::Timestamp::now() >= soon).then_some(()),
        || "time stands still".into(),
    );
    let response = tollgate.ask("/any", &expired.secret).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(response.headers()["www-authenticate"], invalid);
    assert_eq!(error(response).await.0, "EXPIRED_API_KEY");
    let both = tollgate
        .get("/any")
        .header("x-api-key", &good.secret)
        .header("authorization", format!("bearer  {}", good.secret));
    assert_eq!(
        both.send().await.unwrap().status(),
        StatusCode::OK,
        "the same key twice is one credential"
    );
}

#[tokio::test]
async fn trace_is_refused_and_problem_details_come_to_those_who_prefer_them() {
    let tollgate = Tollgate::start().await;
    let response = tollgate.request(Method::TRACE, "/any").send().await.unwrap();
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    let response = tollgate
        .get("/any")
        .header("accept", "application/problem+json")
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let body: Value = response.json().await.unwrap();
    assert_eq!(
        (&body["status"], &body["code"]),
        (&json!(401), &json!("MISSING_API_KEY"))
    );
}

#[tokio::test]
async fn a_refusal_leaves_the_connection_usable() {
    let tollgate = Tollgate::start().await;
    let mut connection = TcpStream::connect(tollgate.gate.strip_prefix("http://").unwrap()).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut exchange = |headers: &str| {
        write!(
            connection,
            "POST /any HTTP/1.1\r\nhost: h\r\n{headers}content-length: 5\r\n\r\nhello"
        )
        .unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let head_len = seen.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4);
            if let Some(head_len) = head_len {
                let head = String::from_utf8_lossy(&seen[..head_len]).to_lowercase();
                let length = head
                    .split("content-length: ")
                    .nth(1)
                    .unwrap()
                    .split("\r\n")
                    .next()
                    .unwrap();
                if seen.len() == head_len + length.parse::<usize>().unwrap() {
                    return head;
                }
            }
            let read = connection.read(&mut buffer).unwrap();
            assert_ne!(read, 0, "the gate closed the connection");
            seen.extend_from_slice(&buffer[..read]);
        }
    };
    let key = format!("x-api-key: {}\r\n", tollgate.key);
    for (headers, status) in [
        ("", "401"),
        ("x-api-key: junk\r\n", "401"),
        (key.as_str(), "200"),
        ("", "401"),
        (key.as_str(), "200"),
    ] {
        let head = exchange(headers);
        assert!(head.starts_with(&format!("http/1.1 {status}")), "{head}");
    }
}

#[tokio::test]
async fn a_refused_upload_is_told_that_nobody_reads_it() {
    let tollgate = Tollgate::start().await;
    for (headers, connection) in [
        ("content-length: 100000000\r\n", "close"),
        ("content-length: 5\r\nexpect: 100-continue\r\n", "close"),
        ("content-length: 5\r\n", "keep-alive"),
    ] {
        let mut stream = TcpStream::connect(tollgate.gate.strip_prefix("http://").unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        write!(stream, "POST /any HTTP/1.1\r\nhost: h\r\n{headers}\r\n").unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while !seen.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
            let read = stream.read(&mut buffer).unwrap();
            assert_ne!(read, 0, "{headers}: closed without an answer");
            seen.extend_from_slice(&buffer[..read]);
        }
        let head = String::from_utf8_lossy(&seen).to_lowercase();
        assert!(head.starts_with("http/1.1 401"), "{head}");
        assert!(
            head.contains(&format!("connection: {connection}\r\n")),
            "{headers}: {head}"
        );
    }
}

#[tokio::test]
async fn a_route_for_live_keys_refuses_those_of_a_sandbox_and_spends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (live, test) = (new_key("pxk_live_"), new_key("pxk_test_"));
    let lines = [("key_live", "live", &live), ("key_test", "test", &test)]
        .map(|(id, environment, secret)| key_line(id, environment, secret));
    std::fs::write(dir.path().join("keys.ndjson"), lines.concat()).unwrap();
    let config = dir.path().join("gate.yaml");
    let upstream = standing_upstream().await;
    let text = format!(
        r#"version: 1
gate:
  listen: [{{address: "127.0.0.1:0"}}]
  state_dir: {state}
  feed: {{file: keys.ndjson}}
keys: {{environments: {{live: {{prefix: pxk_live_, billed: true}}, test: {{prefix: pxk_test_}}}}}}
tiers: {{default: {{limit: 2, window: 1h}}}}
upstreams: {{origin: {{servers: ["{upstream}"]}}}}
routes:
  - {{name: exports, match: {{path: "/exports/**"}}, environments: [live], upstream: origin}}
  - {{name: rest, match: {{path: "/**"}}, upstream: origin}}
log: {{access: off}}
"#,
        state = dir.path().display(),
    );
    std::fs::write(&config, text).unwrap();
    let (_process, gate) = life::run(&config, dir.path());
    let client = client();
    let ask = async |path: &str, key: &str| {
        let request = client.get(format!("{gate}{path}")).header("x-api-key", key);
        request.send().await.unwrap()
    };
    for _ in 0..5 {
        let refused = ask("/exports/1", &test).await;
        assert_eq!(refused.status(), StatusCode::FORBIDDEN);
        assert!(!refused.headers().contains_key("www-authenticate"));
        let expected = "Keys of the environment 'test' are not allowed here.";
        assert_eq!(
            error(refused).await,
            ("ENVIRONMENT_NOT_ALLOWED".to_owned(), expected.to_owned())
        );
    }
    assert_eq!(ask("/exports/1", &live).await.status(), StatusCode::OK);
    for expected in [StatusCode::OK, StatusCode::OK, StatusCode::TOO_MANY_REQUESTS] {
        assert_eq!(ask("/other", &test).await.status(), expected, "refusals spent nothing");
    }
}

/// A fresh secret, as `tollgate keys new` prints it.
fn new_key(prefix: &str) -> String {
    let made = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .args(["keys", "new", "--prefix", prefix])
        .output()
        .unwrap();
    assert!(made.status.success());
    String::from_utf8(made.stdout).unwrap().trim().to_owned()
}

/// Its line for a key file, as `tollgate keys hash` prints it.
fn key_line(id: &str, environment: &str, secret: &str) -> String {
    let mut hash = Command::new(env!("CARGO_BIN_EXE_tollgate"))
        .args(["keys", "hash", "--id", id, "--environment", environment])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    hash.stdin.take().unwrap().write_all(secret.as_bytes()).unwrap();
    String::from_utf8(hash.wait_with_output().unwrap().stdout).unwrap()
}
