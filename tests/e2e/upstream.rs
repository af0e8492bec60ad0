//! What reaches the upstream, and what must not.

use crate::harness::{Tollgate, reached};
use reqwest::{Method, StatusCode};

fn value<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let mut found = headers
        .iter()
        .filter(|(held, _)| held == name)
        .map(|(_, value)| value.as_str());
    let first = found.next();
    assert_eq!(found.next(), None, "{name} twice");
    first
}

#[tokio::test]
async fn the_credential_never_travels_and_only_we_say_whose_request_it_is() {
    let tollgate = Tollgate::start().await;
    let account = tollgate.register("strip@example.com").await;
    let key = tollgate
        .create_key(&account, "live", &["identity:resolve", "events:read"])
        .await;
    let forged = [
        "x-platformxe-key-id",
        "X-PlatformXe-Scopes",
        "x_platformxe_tier",
        "x-platformxe_environment",
        "X_PLATFORMXE-ORGANIZATION-ID",
        "x-platformxe-anything",
        "x-tollgate-key-id",
        "x_tollgate_scopes",
        "x_api_key",
        "x_request_id",
        "x-http-method-override",
    ];
    for credential in ["x-api-key", "authorization", "both"] {
        let mut request = tollgate
            .get("/api/v1/identity/me?q=1")
            .header("x-request-id", "client-chosen-1");
        if credential != "authorization" {
            request = request.header("x-api-key", &key.secret);
        }
        if credential != "x-api-key" {
            request = request.header("authorization", format!("Bearer {}", key.secret));
        }
        for name in forged {
            request = request.header(name, "forged");
        }
        let headers = reached(request.header("x-mine", "kept").send().await.unwrap()).await;
        for (name, held) in &headers {
            assert!(!held.contains(&key.secret) && held != "forged", "{name}: {held}");
        }
        assert_eq!(value(&headers, "authorization"), None);
        for (name, expected) in [
            ("x-platformxe-key-id", key.id.as_str()),
            ("x-platformxe-organization-id", &account.organization),
            ("x-platformxe-environment", "live"),
            ("x-platformxe-tier", "default"),
            ("x-request-id", "client-chosen-1"),
            ("x-mine", "kept"),
        ] {
            assert_eq!(value(&headers, name), Some(expected), "{name}");
        }
        let mut scopes: Vec<&str> = value(&headers, "x-platformxe-scopes").unwrap().split(' ').collect();
        scopes.sort_unstable();
        assert_eq!(scopes, ["events:read", "identity:resolve"]);
    }
    let other = tollgate
        .get("/api/v1/identity/me")
        .header("x-api-key", &key.secret)
        .header("authorization", "Basic eDp5");
    assert_eq!(
        value(&reached(other.send().await.unwrap()).await, "authorization"),
        Some("Basic eDp5"),
        "not ours, passes on"
    );
}

/// `dev` serves both from one process, so it is told apart by a configuration of two upstreams.
#[tokio::test]
async fn sandbox_keys_go_to_the_sandbox_where_the_rule_has_one() {
    let tollgate = Tollgate::start().await;
    let account = tollgate.register("sandbox@example.com").await;
    let (live, sandbox) = (echo("platform").await, echo("sandbox").await);
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("feed.token");
    std::fs::copy(tollgate.data().join("feed.token"), &token).unwrap();
    let config = dir.path().join("gate.yaml");
    std::fs::write(
        &config,
        format!(
            "version: 1\ngate:\n  name: second\n  listen: [{{address: \"127.0.0.1:0\"}}]\n  state_dir: {dir}/state\n  \
             feed: {{url: \"{control}\", token_file: {dir}/feed.token}}\nkeys:\n  environments:\n    live: {{prefix: pxk_live_, billed: true}}\n    \
             test: {{prefix: pxk_test_}}\n    dev: {{prefix: pxk_dev_}}\nscopes: [identity:resolve]\ntiers:\n  default: {{limit: 1000, window: 1h}}\n\
             plans: {{starter: {{}}}}\nupstreams:\n  platform: {{servers: [\"{live}\"]}}\n  sandbox: {{servers: [\"{sandbox}\"]}}\nroutes:\n  \
             - {{name: both, match: {{path: \"/both/**\"}}, upstream: platform, sandbox_upstream: sandbox}}\n  \
             - {{name: rest, match: {{path: \"/**\"}}, upstream: platform}}\nadmin: {{listen: \"127.0.0.1:0\"}}\nlog: {{level: info, access: off}}\n",
            dir = dir.path().display(),
            control = tollgate.control,
        ),
    )
    .unwrap();
    let (_process, gate) = crate::life::run(&config, &dir.path().join("state"));
    for (environment, both) in [("live", "platform"), ("test", "sandbox"), ("dev", "sandbox")] {
        let key = tollgate.create_key(&account, environment, &[]).await;
        for (path, expected) in [("/both/x", both), ("/rest", "platform")] {
            let mut answer = String::new();
            for _ in 0..300 {
                let response = tollgate
                    .client
                    .request(Method::GET, format!("{gate}{path}"))
                    .header("x-api-key", &key.secret)
                    .send()
                    .await
                    .unwrap();
                let status = response.status();
                answer = response.text().await.unwrap();
                if status == StatusCode::OK {
                    break;
                }
                // The second gate may still be reading its first snapshot.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            assert_eq!(answer, expected, "{environment} {path}");
        }
    }
}

async fn echo(name: &'static str) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(move || async move { name })).await });
    address
}
