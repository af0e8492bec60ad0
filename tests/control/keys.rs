//! The life of keys over the API.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Answer, Harness, Tenant, fault_fields, text};

on_every_engine! {
    a_key_is_made_shown_changed_and_revoked,
    every_wrong_field_of_a_key_is_named,
    rotation_keeps_the_old_secret_for_its_grace_and_never_longer,
    an_expiry_is_inherited_and_ten_secrets_are_enough,
    a_replay_does_nothing_again_and_shows_no_secret,
    twenty_at_once_with_one_idempotency_key_make_one_key,
    lists_are_filtered_sorted_and_paged,
    the_status_filter_agrees_with_the_status_shown,
}

async fn create(harness: &Harness, tenant: &Tenant, idempotency_key: &str, body: Value) -> Answer {
    let headers = [
        ("authorization", tenant.bearer()),
        ("idempotency-key", idempotency_key.to_owned()),
    ];
    let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
    harness.send(Method::POST, "/api/v1/keys", &headers, Some(body)).await
}

async fn a_key_is_made_shown_changed_and_revoked() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let body = json!({"name": "billing", "environment": "live",
        "scopes": ["permissions:check", "messaging:send", "permissions:check"], "expiresAt": "2027-01-01T00:00:00+01:00"});
    let made = harness.post(&tenant, "/api/v1/keys", body).await.expect(201);
    let secret = text(&made["apiKey"]);
    assert!(secret.starts_with("pxk_live_"));
    assert_eq!(made["masked"], format!("pxk_live_…{}", &secret[secret.len() - 4..]));
    assert_eq!(
        made["scopes"],
        json!(["messaging:send", "permissions:check"]),
        "in the catalogue's order, once each"
    );
    assert_eq!(made["expiresAt"], "2026-12-31T23:00:00.000Z");
    assert_eq!(made["status"], "active");
    let path = format!("/api/v1/keys/{}", text(&made["id"]));
    let shown = harness.get(&tenant, &path).await;
    assert!(!shown.text.contains(&secret));
    assert_eq!(shown.expect(200)["name"], "billing");

    let changed = harness
        .patch(
            &tenant,
            &path,
            json!({"name": "b2", "scopes": [], "expiresAt": null, "disabled": true}),
        )
        .await
        .expect(200);
    assert_eq!(
        (changed["status"].as_str(), changed["expiresAt"].is_null()),
        (Some("disabled"), true)
    );
    assert!(changed["revision"].as_u64() > made["revision"].as_u64());
    let same = harness.patch(&tenant, &path, json!({"name": "b2"})).await.expect(200);
    assert_eq!(
        same["revision"], changed["revision"],
        "nothing changed, so nothing is told"
    );
    harness
        .patch(&tenant, &path, json!({"disabled": false}))
        .await
        .expect(200);

    let revoked = harness.delete(&tenant, &path).await.expect(200);
    assert_eq!(revoked["status"], "revoked");
    assert_eq!(revoked["secrets"][0]["state"], "dead", "as the portal has it");
    assert_eq!(
        harness.delete(&tenant, &path).await.expect(200)["revision"],
        revoked["revision"]
    );
    harness
        .patch(&tenant, &path, json!({"name": "b3"}))
        .await
        .refused(409, "KEY_REVOKED");
    harness
        .post(&tenant, &format!("{path}/rotate"), json!({}))
        .await
        .refused(409, "KEY_REVOKED");
    harness
        .post(&tenant, &format!("{path}/end-grace"), json!({}))
        .await
        .refused(409, "KEY_REVOKED");
}

async fn every_wrong_field_of_a_key_is_named() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let body = json!({"name": "", "environment": "prod", "scopes": ["permissions:check", "no:such", 7],
        "expiresAt": "2020-01-01T00:00:00Z", "expires_at": null});
    let error = harness
        .post(&tenant, "/api/v1/keys", body)
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(
        fault_fields(&error),
        [
            "environment",
            "expiresAt",
            "expires_at",
            "name",
            "scopes[1]",
            "scopes[2]"
        ]
    );
    let error = harness
        .post(&tenant, "/api/v1/keys", json!({}))
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["environment", "name", "scopes"]);
    let path = format!("/api/v1/keys/{}", tenant.key_id);
    let error = harness
        .patch(
            &tenant,
            &path,
            json!({"scopes": ["no:such"], "disabled": "yes", "name": "x".repeat(101)}),
        )
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["disabled", "name", "scopes[0]"]);
    let rotate = format!("{path}/rotate");
    for grace in [json!(-1), json!(2_592_001), json!(1.5), json!("1h")] {
        let body = json!({"gracePeriodSeconds": grace});
        let error = harness
            .post(&tenant, &rotate, body)
            .await
            .refused(422, "VALIDATION_ERROR");
        assert_eq!(fault_fields(&error), ["gracePeriodSeconds"]);
    }
    let error = harness
        .get(&tenant, "/api/v1/keys?limit=101&status=old&nope=1")
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["limit", "nope", "status"]);
}

async fn rotation_keeps_the_old_secret_for_its_grace_and_never_longer() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let made = harness.create_key(&tenant, "k").await;
    let path = format!("/api/v1/keys/{}", text(&made["id"]));
    let rotate = format!("{path}/rotate");
    // The default is a day; no body is needed.
    let first = harness
        .send(Method::POST, &rotate, &[("authorization", &tenant.bearer())], None)
        .await
        .expect(201);
    assert_eq!(first["graceEndsAt"], "2026-11-25T10:00:00.000Z");
    assert_eq!(first["status"], "rotating");
    assert_ne!(first["apiKey"], made["apiKey"]);
    assert_eq!(first["id"], made["id"]);
    // A second rotation with a longer grace leaves the first secret's death alone.
    harness.clock.advance(Duration::from_secs(3_600));
    let second = harness
        .post(&tenant, &rotate, json!({"gracePeriodSeconds": 2_592_000}))
        .await
        .expect(201);
    let deaths: Vec<_> = second["secrets"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["notAfter"].clone())
        .collect();
    assert_eq!(
        deaths,
        [
            json!(null),
            json!("2026-12-24T11:00:00.000Z"),
            json!("2026-11-25T10:00:00.000Z")
        ]
    );
    // Grace 0 kills the one before at once.
    let third = harness
        .post(&tenant, &rotate, json!({"gracePeriodSeconds": 0}))
        .await
        .expect(201);
    assert_eq!(third["secrets"][1]["state"], "dead");
    assert_eq!(third["secrets"][2]["state"], "grace");
    // The boundary, to the millisecond.
    harness.clock.advance(Duration::from_millis(23 * 3_600_000 - 1));
    assert_eq!(
        harness.get(&tenant, &path).await.expect(200)["secrets"][3]["state"],
        "grace"
    );
    harness.clock.advance(Duration::from_millis(1));
    assert_eq!(
        harness.get(&tenant, &path).await.expect(200)["secrets"][3]["state"],
        "dead"
    );
    // And what is left of grace ends by word.
    let ended = harness
        .post(&tenant, &format!("{path}/end-grace"), json!({}))
        .await
        .expect(200);
    assert_eq!(ended["status"], "active");
    assert_eq!(ended["secrets"][2]["notAfter"], "2026-11-25T10:00:00.000Z");
    let again = harness
        .post(&tenant, &format!("{path}/end-grace"), json!({}))
        .await
        .expect(200);
    assert_eq!(again["revision"], ended["revision"]);
}

async fn an_expiry_is_inherited_and_ten_secrets_are_enough() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let body = json!({"name": "k", "environment": "test", "scopes": [], "expiresAt": "2026-11-25T00:00:00Z"});
    let made = harness.post(&tenant, "/api/v1/keys", body).await.expect(201);
    assert_eq!(made["status"], "expiring");
    let rotate = format!("/api/v1/keys/{}/rotate", text(&made["id"]));
    for _ in 0..9 {
        let rotated = harness
            .post(&tenant, &rotate, json!({"gracePeriodSeconds": 3600}))
            .await
            .expect(201);
        assert_eq!(rotated["expiresAt"], "2026-11-25T00:00:00.000Z");
    }
    harness
        .post(&tenant, &rotate, json!({"gracePeriodSeconds": 3600}))
        .await
        .refused(409, "TOO_MANY_SECRETS");
    harness
        .post(&tenant, &rotate, json!({"gracePeriodSeconds": 0}))
        .await
        .expect(201);
    harness.clock.advance(Duration::from_secs(3_600));
    harness
        .post(&tenant, &rotate, json!({"gracePeriodSeconds": 3600}))
        .await
        .expect(201);
    harness.clock.advance(Duration::from_secs(14 * 3_600));
    let path = format!("/api/v1/keys/{}", text(&made["id"]));
    assert_eq!(harness.get(&tenant, &path).await.expect(200)["status"], "expired");
}

async fn a_replay_does_nothing_again_and_shows_no_secret() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let body = json!({"name": "once", "environment": "live", "scopes": [], "expiresAt": "2026-11-24T11:00:00Z"});
    let made = create(&harness, &tenant, "a-1", body.clone()).await.expect(201);
    assert_eq!(made["replayed"], false);
    // Also after the expiry that it asked for.
    harness.clock.advance(Duration::from_secs(7_200));
    let replay = create(&harness, &tenant, "a-1", body.clone()).await;
    assert!(!replay.text.contains(&text(&made["apiKey"])));
    let replay = replay.expect(200);
    assert_eq!((&replay["id"], &replay["revision"]), (&made["id"], &made["revision"]));
    assert_eq!(
        (replay["apiKey"].is_null(), replay["replayed"].as_bool()),
        (true, Some(true))
    );
    let other = json!({"name": "other", "environment": "live", "scopes": []});
    create(&harness, &tenant, "a-1", other.clone())
        .await
        .refused(409, "IDEMPOTENCY_KEY_REUSED");
    // Another tenant's is another key; a day later it is forgotten.
    let neighbour = harness.tenant("other@example.com").await;
    create(&harness, &neighbour, "a-1", other.clone()).await.expect(201);
    harness.clock.advance(Duration::from_secs(22 * 3_600));
    assert_eq!(
        create(&harness, &tenant, "a-1", other.clone()).await.expect(201)["replayed"],
        false
    );
    create(&harness, &tenant, "\u{e9}", other.clone())
        .await
        .refused(422, "VALIDATION_ERROR");

    let rotate = format!("/api/v1/keys/{}/rotate", tenant.key_id);
    let bearer = tenant.bearer();
    let headers = [("authorization", bearer.as_str()), ("idempotency-key", "r-1")];
    let rotated = harness.send(Method::POST, &rotate, &headers, None).await.expect(201);
    let replay = harness.send(Method::POST, &rotate, &headers, None).await.expect(200);
    assert_eq!(replay["graceEndsAt"], rotated["graceEndsAt"]);
    assert!(replay["apiKey"].is_null());
    let body = Some(json!({"gracePeriodSeconds": 5}));
    harness
        .send(Method::POST, &rotate, &headers, body)
        .await
        .refused(409, "IDEMPOTENCY_KEY_REUSED");
    let shown = harness
        .get(&tenant, &format!("/api/v1/keys/{}", tenant.key_id))
        .await
        .expect(200);
    assert_eq!(shown["secrets"].as_array().unwrap().len(), 2);
}

async fn twenty_at_once_with_one_idempotency_key_make_one_key() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let body = json!({"name": "race", "environment": "live", "scopes": []});
    let calls = (0..20).map(|_| create(&harness, &tenant, "race", body.clone()));
    let answers = futures_util::future::join_all(calls).await;
    let created = answers.iter().filter(|a| a.status.as_u16() == 201).count();
    let replayed = answers.iter().filter(|a| a.status.as_u16() == 200).count();
    assert_eq!((created, replayed), (1, 19));
    let list = harness.get(&tenant, "/api/v1/keys?q=race").await.expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
}

async fn lists_are_filtered_sorted_and_paged() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let mut ids = vec![tenant.key_id.clone()];
    for i in 0..12 {
        harness.clock.advance(Duration::from_secs(1));
        let environment = ["live", "test", "dev"][i % 3];
        let scopes = if i % 2 == 0 { json!(["storage:read"]) } else { json!([]) };
        // `%` and `_` are letters here, not patterns.
        let body = json!({"name": format!("key_{i:02}%"), "environment": environment, "scopes": scopes});
        ids.push(text(
            &harness.post(&tenant, "/api/v1/keys", body).await.expect(201)["id"],
        ));
    }
    for sort in [
        "createdAt",
        "-createdAt",
        "name",
        "-name",
        "lastUsedAt",
        "-lastUsedAt",
        "expiresAt",
        "-expiresAt",
    ] {
        let mut seen = Vec::new();
        let mut path = format!("/api/v1/keys?limit=5&sort={sort}");
        loop {
            let page = harness.get(&tenant, &path).await.expect(200);
            seen.extend(page["items"].as_array().unwrap().iter().map(|k| text(&k["id"])));
            assert!(seen.len() <= 13, "{sort}");
            let Some(next) = page["nextCursor"].as_str() else { break };
            path = format!("/api/v1/keys?limit=5&sort={sort}&cursor={next}");
        }
        if sort == "createdAt" {
            assert_eq!(seen, ids);
        }
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 13, "{sort}");
    }
    let count = async |query: &str| {
        let page = harness
            .get(&tenant, &format!("/api/v1/keys?limit=100&{query}"))
            .await
            .expect(200);
        page["items"].as_array().unwrap().len()
    };
    assert_eq!(count("environment=live").await, 4);
    assert_eq!(count("scope=storage:read").await, 7);
    assert_eq!(count("q=key_0").await, 10);
    assert_eq!(count("q=%25").await, 12);
    assert_eq!(count("q=%25%25").await, 0);
    assert_eq!(count(&format!("q={}", ids[3])).await, 1);
    let shown = harness
        .get(&tenant, &format!("/api/v1/keys/{}", ids[3]))
        .await
        .expect(200);
    let masked = text(&shown["masked"]);
    assert!(count(&format!("q={}", &masked[masked.len() - 4..])).await >= 1);
    harness
        .get(&tenant, "/api/v1/keys?cursor=00")
        .await
        .refused(422, "VALIDATION_ERROR");
}

async fn the_status_filter_agrees_with_the_status_shown() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let make = async |name: &str, expires: Value| {
        let body = json!({"name": name, "environment": "live", "scopes": [], "expiresAt": expires});
        format!(
            "/api/v1/keys/{}",
            text(&harness.post(&tenant, "/api/v1/keys", body).await.expect(201)["id"])
        )
    };
    make("expires in an hour", json!("2026-11-24T11:00:00Z")).await;
    make("expires in a week and 2 s", json!("2026-12-01T10:00:02Z")).await;
    let rotating = make("rotating, expires soon", json!("2026-11-26T10:00:00Z")).await;
    harness
        .post(
            &tenant,
            &format!("{rotating}/rotate"),
            json!({"gracePeriodSeconds": 7200}),
        )
        .await
        .expect(201);
    let disabled = make("disabled, rotating", json!(null)).await;
    harness
        .post(&tenant, &format!("{disabled}/rotate"), json!({}))
        .await
        .expect(201);
    harness
        .patch(&tenant, &disabled, json!({"disabled": true}))
        .await
        .expect(200);
    let revoked = make("revoked, disabled", json!(null)).await;
    harness
        .patch(&tenant, &revoked, json!({"disabled": true}))
        .await
        .expect(200);
    harness.delete(&tenant, &revoked).await.expect(200);
    for step_ms in [0, 1_999, 1, 3_598_000, 3_600_000, 40 * 3_600_000, 200 * 3_600_000] {
        harness.clock.advance(Duration::from_millis(step_ms));
        let all = harness.get(&tenant, "/api/v1/keys").await.expect(200);
        let mut filtered = 0;
        for status in ["active", "rotating", "expiring", "expired", "disabled", "revoked"] {
            let page = harness
                .get(&tenant, &format!("/api/v1/keys?status={status}"))
                .await
                .expect(200);
            for key in page["items"].as_array().unwrap() {
                assert_eq!(key["status"], status, "{} after {step_ms} ms", key["name"]);
                filtered += 1;
            }
        }
        assert_eq!(filtered, all["items"].as_array().unwrap().len());
    }
}

#[tokio::test]
async fn two_thousand_keys_are_listed_and_searched_in_time() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let calls = (0..2_000).map(|i| {
        let (harness, tenant) = (&harness, &tenant);
        async move {
            harness.create_key(tenant, &format!("load {i}")).await;
        }
    });
    use futures_util::StreamExt as _;
    futures_util::stream::iter(calls)
        .buffer_unordered(16)
        .collect::<Vec<()>>()
        .await;
    let begun = std::time::Instant::now();
    for query in [
        "sort=name",
        "q=load%201999",
        "status=rotating",
        "scope=permissions:check&sort=-lastUsedAt",
    ] {
        harness.get(&tenant, &format!("/api/v1/keys?{query}")).await.expect(200);
    }
    // 100 ms each is promised for five times as many; a busy test machine gets as much again.
    assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
}
