//! What a key may spend, and how it is told.

use crate::harness::{Tollgate, error};
use reqwest::{Response, StatusCode};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A `"name";a=1;b=2` structured field item with parameters (RFC 9651), as both RateLimit fields are.
fn parse(response: &Response, field: &str) -> (String, HashMap<String, u64>) {
    let value = response.headers()[field].to_str().unwrap();
    let (name, parameters) = value.strip_prefix('"').unwrap().split_once('"').unwrap();
    let parameters = parameters.split(';').filter(|part| !part.is_empty()).map(|part| {
        let (name, value) = part.split_once('=').unwrap();
        assert!(name.bytes().all(|b| b.is_ascii_lowercase()), "{value}");
        (name.to_owned(), value.parse().unwrap())
    });
    (name.to_owned(), parameters.collect())
}

#[tokio::test]
async fn exactly_one_hundred_audit_requests_pass_and_no_other_tier_or_key_is_touched() {
    let tollgate = Tollgate::start().await;
    let audit = "/api/v1/permissions/audit/logs";
    for left in (0..100).rev() {
        let response = tollgate.ask(audit, &tollgate.key).await;
        assert_eq!(response.status(), StatusCode::OK);
        let (policy, numbers) = parse(&response, "ratelimit-policy");
        assert_eq!(
            (policy.as_str(), numbers["q"], numbers["w"]),
            ("permissions:audit", 100, 3600)
        );
        let (name, numbers) = parse(&response, "ratelimit");
        assert_eq!((name.as_str(), numbers["r"]), ("permissions:audit", left));
        // The window and the sub-bucket that the oldest permit is counted in: 61/60 of an hour.
        assert!((1..=3660).contains(&numbers["t"]), "{numbers:?}");
    }
    let refused = tollgate.ask(audit, &tollgate.key).await;
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let retry_after: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=3660).contains(&retry_after));
    assert_eq!(parse(&refused, "ratelimit").1["r"], 0);
    let expected = format!("Rate limit exceeded. Retry after {retry_after} seconds.");
    assert_eq!(error(refused).await, ("RATE_LIMITED".to_owned(), expected));

    let tiers = [
        (reqwest::Method::POST, "/api/v1/permissions/check", 5000),
        (reqwest::Method::POST, "/api/v1/permissions/roles", 500),
        (reqwest::Method::GET, "/api/v1/identity/me", 1000),
    ];
    for (method, path, limit) in tiers {
        let response = tollgate
            .request(method, path)
            .header("x-api-key", &tollgate.key)
            .send()
            .await
            .unwrap();
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        assert_eq!(
            (
                parse(&response, "ratelimit-policy").1["q"],
                parse(&response, "ratelimit").1["r"]
            ),
            (limit, limit - 1)
        );
    }
    let account = tollgate.register("another@example.com").await;
    let response = tollgate.ask(audit, &account.key).await;
    assert_eq!(
        (response.status(), parse(&response, "ratelimit").1["r"]),
        (StatusCode::OK, 99)
    );
}

/// 1,000 keys, 1,000 requests each (their whole default tier), 64 connections: the sum of permits is the number of
/// 200s, in the metrics and in the ledger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_requests_of_a_thousand_keys_lose_no_count() {
    const KEYS: usize = 1000;
    const EACH: usize = 1000;
    let tollgate = Arc::new(Tollgate::start().await);
    let account = tollgate.register("load@example.com").await;
    let mut secrets = vec![];
    for _ in 0..KEYS {
        let wanted = serde_json::json!({"name": "load", "environment": "live", "scopes": []});
        let made = tollgate.call(&account, reqwest::Method::POST, "/keys", wanted).await;
        secrets.push(made["apiKey"].as_str().unwrap().to_owned());
    }
    let secrets = Arc::new(secrets);
    let next = Arc::new(AtomicUsize::new(0));
    let address = tollgate.gate.strip_prefix("http://").unwrap().to_owned();
    let workers: Vec<_> = (0..64)
        .map(|_| {
            let (secrets, next, address) = (secrets.clone(), next.clone(), address.clone());
            tokio::spawn(async move {
                let mut connection = raw::Connection::open(&address).await;
                let mut passed = 0;
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= KEYS * EACH {
                        return passed;
                    }
                    let status = connection.get("/load", &secrets[n % KEYS]).await;
                    assert_eq!(status, 200, "request {n}");
                    passed += 1;
                }
            })
        })
        .collect();
    let mut passed = 0;
    for worker in workers {
        passed += worker.await.unwrap();
    }
    assert_eq!(passed, KEYS * EACH);
    for secret in secrets.iter().step_by(100) {
        assert_eq!(
            tollgate.ask("/load", secret).await.status(),
            StatusCode::TOO_MANY_REQUESTS,
            "every permit was counted"
        );
    }
    let metrics = tollgate
        .client
        .get(format!("{}/metrics", tollgate.admin))
        .send()
        .await
        .unwrap()
        .text()
        .await
        .unwrap();
    let line = r#"tollgate_requests_total{code="PASSED",tier="default"} "#;
    let counted: f64 = metrics
        .lines()
        .find_map(|l| l.strip_prefix(line))
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(counted as usize, KEYS * EACH);
    let ledger = async || {
        let usage = tollgate
            .call(
                &account,
                reqwest::Method::GET,
                "/usage?groupBy=tier",
                serde_json::Value::Null,
            )
            .await;
        usage["totals"]["permits"].as_u64().unwrap_or_default() as usize
    };
    for _ in 0..200 {
        if ledger().await == KEYS * EACH {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(ledger().await, KEYS * EACH, "permits in the ledger");
}

/// The least of HTTP that a load generator needs: it costs less than the gate it drives.
mod raw {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    pub struct Connection {
        stream: TcpStream,
        buffer: Vec<u8>,
    }

    impl Connection {
        pub async fn open(address: &str) -> Self {
            Connection {
                stream: TcpStream::connect(address).await.unwrap(),
                buffer: vec![],
            }
        }

        pub async fn get(&mut self, path: &str, key: &str) -> u16 {
            let request = format!("GET {path} HTTP/1.1\r\nhost: h\r\nx-api-key: {key}\r\n\r\n");
            self.stream.write_all(request.as_bytes()).await.unwrap();
            self.buffer.clear();
            loop {
                let read = self.stream.read_buf(&mut self.buffer).await.unwrap();
                assert_ne!(read, 0, "the gate closed the connection");
                let Some(head) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") else {
                    continue;
                };
                let text = std::str::from_utf8(&self.buffer[..head]).unwrap();
                let length = text.lines().find_map(|line| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case("content-length")
                        .then(|| value.parse::<usize>().unwrap())
                });
                if self.buffer.len() == head + 4 + length.unwrap() {
                    return text[9..12].parse().unwrap();
                }
            }
        }
    }
}
