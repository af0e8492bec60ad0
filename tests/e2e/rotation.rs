//! Secrets that come and go under one key.

use crate::fleet::{Fleet, key};
use crate::harness::{Tollgate, client, error};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[tokio::test]
async fn old_and_new_secret_are_one_key_until_the_grace_ends() {
    let tollgate = Tollgate::start().await;
    let account = tollgate.register("rotate@example.com").await;
    let key = tollgate.create_key(&account, "live", &["permissions:audit"]).await;
    let path = "/api/v1/permissions/audit/logs";
    for _ in 0..60 {
        assert_eq!(tollgate.ask(path, &key.secret).await.status(), StatusCode::OK);
    }
    let rotate = format!("/keys/{}/rotate", key.id);
    let rotated = tollgate
        .call(&account, Method::POST, &rotate, json!({"gracePeriodSeconds": 3600}))
        .await;
    let answered = Instant::now();
    let new = rotated["apiKey"].as_str().unwrap();
    assert_ne!(new, key.secret);
    let mut statuses = vec![tollgate.ask(path, new).await.status()];
    assert!(
        answered.elapsed() < Duration::from_millis(100),
        "the new secret works at once"
    );
    for n in 1..41 {
        statuses.push(
            tollgate
                .ask(path, if n % 2 == 0 { new } else { &key.secret })
                .await
                .status(),
        );
    }
    assert_eq!(
        statuses.iter().filter(|status| **status == StatusCode::OK).count(),
        40,
        "60 of 100 were spent before"
    );
    assert_eq!(statuses[40], StatusCode::TOO_MANY_REQUESTS);
    let default = tollgate.call(&account, Method::POST, &rotate, json!({})).await;
    let ends: jiff::Timestamp = default["graceEndsAt"].as_str().unwrap().parse().unwrap();
    let hours = ends.duration_since(jiff::Timestamp::now()).as_secs_f64() / 3600.0;
    assert!((23.9..=24.0).contains(&hours), "24 h by default, not {hours}");
}

/// The gate's clock goes on from the time of its start, and the system's may be set or slewed meanwhile.
const CLOCKS_DIFFER: jiff::SignedDuration = jiff::SignedDuration::from_millis(50);

#[tokio::test]
async fn an_old_secret_dies_by_itself_when_its_grace_ends() {
    let tollgate = Tollgate::start().await;
    let account = tollgate.register("grace@example.com").await;
    let key = tollgate.create_key(&account, "live", &[]).await;
    let rotate = format!("/keys/{}/rotate?wait=all", key.id);
    let rotated = tollgate
        .call(&account, Method::POST, &rotate, json!({"gracePeriodSeconds": 2}))
        .await;
    let ends: jiff::Timestamp = rotated["graceEndsAt"].as_str().unwrap().parse().unwrap();
    let mut passed = 0;
    loop {
        let sent = jiff::Timestamp::now();
        let response = tollgate.ask("/any", &key.secret).await;
        let answered = jiff::Timestamp::now();
        if response.status() == StatusCode::OK {
            // The second's end is exact to the millisecond with a moved clock (gate/tests.rs); here it is real time.
            let late = sent.duration_since(ends);
            assert!(late < CLOCKS_DIFFER, "passed {late:?} after its grace");
            passed += 1;
            // At full speed the tier's 1,000 permits would not last the two seconds.
            tokio::time::sleep(Duration::from_millis(4)).await;
        } else {
            let early = ends.duration_since(answered);
            assert!(early < CLOCKS_DIFFER, "refused {early:?} before its grace ended");
            assert_eq!(error(response).await.0, "REVOKED_API_KEY");
            break;
        }
    }
    assert!(passed > 0);
    let new = rotated["apiKey"].as_str().unwrap();
    assert_eq!(tollgate.ask("/any", new).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_revoked_key_is_refused_within_a_tenth_of_a_second() {
    let tollgate = Tollgate::start().await;
    let account = tollgate.register("revoke@example.com").await;
    for wait in ["", "?wait=all"] {
        let key = tollgate.create_key(&account, "live", &[]).await;
        assert_eq!(tollgate.ask("/any", &key.secret).await.status(), StatusCode::OK);
        tollgate
            .call(
                &account,
                Method::DELETE,
                &format!("/keys/{}{wait}", key.id),
                Value::Null,
            )
            .await;
        let answered = Instant::now();
        loop {
            let response = tollgate.ask("/any", &key.secret).await;
            if response.status() == StatusCode::UNAUTHORIZED {
                assert_eq!(error(response).await.0, "REVOKED_API_KEY");
                break;
            }
            assert!(wait.is_empty(), "acknowledged, and passed all the same");
            assert!(answered.elapsed() < Duration::from_millis(100));
        }
    }
}

/// Spend 3,000 of 5,000, rotate, and let the two secrets take turns.
#[tokio::test]
async fn after_a_rotation_exactly_the_rest_of_the_quota_is_left_to_both_secrets_together() {
    const PATH: &str = "/checks/permissions";
    let fleet = Fleet::new().await;
    let control = fleet.control();
    let gate = fleet.gate("gate-1", &control.url);
    let account = control.account("quota@example.com").await;
    let old = account.create_key("key", "live").await;
    // In another tier.
    gate.until_it_says(StatusCode::OK, &old.secret).await;
    let asking = client();
    for _ in 0..3_000 {
        assert_eq!(gate.ask(&asking, PATH, &old.secret).await, StatusCode::OK);
    }
    let rotate = format!("/keys/{}/rotate?wait=all", old.id);
    let new = key(&account
        .call(Method::POST, &rotate, json!({"gracePeriodSeconds": 86_400}))
        .await);
    let mut passed = [0, 0];
    for n in 0..2_200 {
        let secret = if n % 2 == 0 { &new.secret } else { &old.secret };
        match gate.ask(&asking, PATH, secret).await {
            StatusCode::OK => passed[n % 2] += 1,
            status => assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "request {n}"),
        }
    }
    assert_eq!(passed, [1_000, 1_000], "exactly 2,000 more");
}
