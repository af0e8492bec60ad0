//! The ledger: every permit once, whatever the network does to the batches.

use reqwest::Method;
use serde_json::{Value, json};
use std::time::Duration;
use tollgate::control::{Retention, Settings};

use crate::harness::{Harness, START_MS, Tenant, settings, text};

on_every_engine! {
    batches_count_once_in_any_order,
    the_same_batch_from_twenty_connections_at_once_counts_once,
    only_billed_environments_are_billable_and_refusals_are_apart,
    buckets_are_whole_and_csv_says_the_same,
    the_last_use_of_keys_and_secrets_only_moves_forward,
    a_broken_batch_is_refused_whole,
    old_usage_is_kept_by_the_hour_and_every_total_stays,
    old_lines_of_the_audit_log_are_forgotten_where_it_is_wished,
}

const MINUTE: i64 = START_MS / 60_000;

fn batch(run: &str, sequence: u64, permits: Value) -> Value {
    json!({"gate": "gate-1", "run": run, "sequence": sequence, "permits": permits})
}

fn permits(key: &str, environment: &str, minute: i64, count: u64) -> Value {
    json!([{"key": key, "tier": "default", "environment": environment, "minute": minute, "count": count}])
}

async fn totals(harness: &Harness, tenant: &Tenant, query: &str) -> Value {
    harness.get(tenant, &format!("/api/v1/usage?{query}")).await.expect(200)["totals"].clone()
}

async fn batches_count_once_in_any_order() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    // A fixed shuffle with every batch sent one to three times (a linear congruential generator, so that it is the same
    // in every run).
    let mut state = 7_u64;
    let mut next = |bound: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    };
    let mut sends: Vec<u64> = (1..=200)
        .flat_map(|sequence| vec![sequence; 1 + next(3) as usize])
        .collect();
    for i in (1..sends.len()).rev() {
        sends.swap(i, next(i as u64 + 1) as usize);
    }
    let mut applied = 0;
    for sequence in sends {
        let body = batch("run-1", sequence, permits(&tenant.key_id, "live", MINUTE, sequence));
        let taken = harness.gate("/feed/v1/usage", body).await.expect(200);
        applied += u64::from(taken["applied"].as_bool().unwrap());
    }
    assert_eq!(applied, 200);
    assert_eq!(totals(&harness, &tenant, "").await["permits"], 200 * 201 / 2);
    // Another life of the gate counts from 1 again.
    let body = batch("run-2", 1, permits(&tenant.key_id, "live", MINUTE, 5));
    assert_eq!(
        harness.gate("/feed/v1/usage", body.clone()).await.expect(200)["applied"],
        true
    );
    assert_eq!(harness.gate("/feed/v1/usage", body).await.expect(200)["applied"], false);
    assert_eq!(totals(&harness, &tenant, "").await["permits"], 200 * 201 / 2 + 5);
}

async fn the_same_batch_from_twenty_connections_at_once_counts_once() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let body = batch("run-1", 1, permits(&tenant.key_id, "live", MINUTE, 3));
    let answers = futures_util::future::join_all((0..20).map(|_| harness.gate("/feed/v1/usage", body.clone()))).await;
    let applied = answers
        .into_iter()
        .filter(|a| a.body["data"]["applied"] == true)
        .count();
    assert_eq!(applied, 1);
    assert_eq!(totals(&harness, &tenant, "").await["permits"], 3);
}

async fn only_billed_environments_are_billable_and_refusals_are_apart() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let body = json!({"gate": "gate-1", "run": "r", "sequence": 1,
    "permits": [
        {"key": tenant.key_id, "tier": "default", "environment": "live", "minute": MINUTE, "count": 10},
        {"key": tenant.key_id, "tier": "permissions:check", "environment": "dev", "minute": MINUTE, "count": 4},
        {"key": "key_of_nobody", "tier": "default", "environment": "live", "minute": MINUTE, "count": 99},
    ],
    "refusals": [
        {"key": tenant.key_id, "environment": "live", "tier": "default", "code": "RATE_LIMITED", "minute": MINUTE, "count": 3},
        {"key": tenant.key_id, "environment": "live", "tier": "default", "code": "INSUFFICIENT_SCOPE", "minute": MINUTE, "count": 2},
        {"tier": "default", "code": "INVALID_API_KEY", "minute": MINUTE, "count": 50},
    ]});
    harness.gate("/feed/v1/usage", body).await.expect(200);
    let usage = harness
        .get(&tenant, "/api/v1/usage?groupBy=environment&granularity=minute")
        .await
        .expect(200);
    assert_eq!(
        usage["rows"],
        json!([
            {"start": "2026-11-24T10:00:00.000Z", "environment": "dev", "permits": 4, "billable": 0, "refused": 0, "refusals": {}},
            {"start": "2026-11-24T10:00:00.000Z", "environment": "live", "permits": 10, "billable": 10, "refused": 5,
             "refusals": {"INSUFFICIENT_SCOPE": 2, "RATE_LIMITED": 3}},
        ])
    );
    assert_eq!(usage["totals"]["permits"], 14);
    let all = harness
        .get(&tenant, "/api/v1/usage?groupBy=key,tier,environment")
        .await
        .expect(200);
    assert_eq!(all["rows"].as_array().unwrap().len(), 2);
    assert_eq!(all["rows"][0]["key"], tenant.key_id);
    assert_eq!(totals(&harness, &tenant, "tier=default").await["permits"], 10);
    assert_eq!(totals(&harness, &tenant, "environment=dev").await["permits"], 4);
    // Nobody else sees it.
    let neighbour = harness.tenant("other@example.com").await;
    assert_eq!(
        totals(&harness, &neighbour, &format!("key={}", tenant.key_id)).await["permits"],
        0
    );
}

async fn buckets_are_whole_and_csv_says_the_same() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    for (sequence, minute) in [MINUTE - 1, MINUTE, MINUTE + 59, MINUTE + 60, MINUTE + 14 * 60]
        .into_iter()
        .enumerate()
    {
        let body = batch(
            "r",
            sequence as u64 + 1,
            permits(&tenant.key_id, "live", minute, 1 << sequence),
        );
        harness.gate("/feed/v1/usage", body).await.expect(200);
    }
    let query = "from=2026-11-24T10:30:00Z&to=2026-11-24T11:00:01Z";
    let usage = harness
        .get(&tenant, &format!("/api/v1/usage?{query}&granularity=hour"))
        .await
        .expect(200);
    assert_eq!(
        (usage["from"].as_str(), usage["to"].as_str()),
        (Some("2026-11-24T10:00:00.000Z"), Some("2026-11-24T12:00:00.000Z"))
    );
    let counts: Vec<_> = usage["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["permits"].as_u64().unwrap())
        .collect();
    assert_eq!(counts, [2 + 4, 8]);
    let day = harness
        .get(&tenant, &format!("/api/v1/usage?{query}&granularity=day"))
        .await
        .expect(200);
    assert_eq!(day["rows"][0]["permits"], 1 + 2 + 4 + 8);

    let csv = harness
        .get(
            &tenant,
            &format!("/api/v1/usage?{query}&granularity=hour&format=csv&groupBy=key"),
        )
        .await;
    assert_eq!(csv.headers["content-type"], "text/csv; charset=utf-8; header=present");
    let lines: Vec<_> = csv.text.split("\r\n").collect();
    assert_eq!(lines[0], "start,key,tier,environment,permits,billable,refused,refusals");
    assert_eq!(lines[1], format!("2026-11-24T10:00:00.000Z,{},,,6,6,0,", tenant.key_id));
    assert_eq!(lines.len(), 4);
    let bearer = tenant.bearer();
    let headers = [("authorization", bearer.as_str()), ("accept", "text/csv")];
    let csv = harness.send(Method::GET, "/api/v1/usage", &headers, None).await;
    assert!(csv.text.starts_with("start,"));
    harness
        .get(
            &tenant,
            "/api/v1/usage?from=2026-11-25T00:00:00Z&to=2026-11-24T00:00:00Z",
        )
        .await
        .refused(422, "VALIDATION_ERROR");
    harness
        .get(&tenant, "/api/v1/usage?groupBy=colour")
        .await
        .refused(422, "VALIDATION_ERROR");
}

async fn the_last_use_of_keys_and_secrets_only_moves_forward() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let path = format!("/api/v1/keys/{}", tenant.key_id);
    harness
        .post(&tenant, &format!("{path}/rotate"), json!({}))
        .await
        .expect(201);
    let key = harness.get(&tenant, &path).await.expect(200);
    let (new, old) = (text(&key["secrets"][0]["id"]), text(&key["secrets"][1]["id"]));
    let used = |sequence: u64, secret: &str, at_ms: i64| {
        json!({"gate": "g", "run": "r", "sequence": sequence,
            "last_used": [{"key": tenant.key_id, "secret": secret, "at_ms": at_ms}]})
    };
    harness
        .gate("/feed/v1/usage", used(1, &new, START_MS + 2_000))
        .await
        .expect(200);
    harness
        .gate("/feed/v1/usage", used(2, &old, START_MS + 5_000))
        .await
        .expect(200);
    harness
        .gate("/feed/v1/usage", used(3, &old, START_MS + 1_000))
        .await
        .expect(200);
    let key = harness.get(&tenant, &path).await.expect(200);
    assert_eq!(key["lastUsedAt"], "2026-11-24T10:00:05.000Z");
    assert_eq!(key["secrets"][0]["lastUsedAt"], "2026-11-24T10:00:02.000Z");
    assert_eq!(key["secrets"][1]["lastUsedAt"], "2026-11-24T10:00:05.000Z");
}

async fn a_broken_batch_is_refused_whole() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    for body in [
        batch("r", 0, json!([])),
        batch("", 1, json!([])),
        batch("r", 1, permits(&tenant.key_id, "live", -1, 1)),
        json!({"gate": "g", "run": "r", "sequence": 1, "permits": [
            permits(&tenant.key_id, "live", MINUTE, 1)[0], permits("", "live", MINUTE, 1)[0]]}),
        json!({"gate": "g", "run": "r", "sequence": -1}),
        json!({"gate": "g"}),
    ] {
        harness
            .gate("/feed/v1/usage", body)
            .await
            .refused(422, "VALIDATION_ERROR");
    }
    assert_eq!(totals(&harness, &tenant, "").await["permits"], 0);
}

const DAY: Duration = Duration::from_secs(24 * 3_600);

async fn keeping(retention: Retention) -> Harness {
    Harness::with(Settings {
        retention,
        ..settings()
    })
    .await
}

async fn old_usage_is_kept_by_the_hour_and_every_total_stays() {
    let harness = keeping(Retention {
        usage_by_minute: Some(31 * DAY),
        ..Retention::default()
    })
    .await;
    let tenant = harness.tenant("dev@example.com").await;
    let count = |key: &str, tier: &str, minute: i64, count: u64| json!({"key": key, "tier": tier, "environment": "live", "minute": MINUTE + minute, "count": count});
    let refused = |minute: i64, count: u64| {
        json!({"key": tenant.key_id, "environment": "live", "tier": "default", "code": "RATE_LIMITED",
            "minute": MINUTE + minute, "count": count})
    };
    let key = tenant.key_id.as_str();
    let body = json!({"gate": "gate-1", "run": "r", "sequence": 1, "permits": [
        count(key, "default", 0, 1), count(key, "default", 7, 2), count(key, "default", 59, 4), count(key, "default", 60, 8),
        count(key, "permissions:check", 7, 16), count("key_of_nobody", "default", 7, 99)],
        "refusals": [refused(3, 1), refused(5, 2)]});
    harness.gate("/feed/v1/usage", body).await.expect(200);
    let day = "from=2026-11-24T00:00:00Z&to=2026-11-25T00:00:00Z&groupBy=tier";
    let by = async |granularity: &str| {
        let path = format!("/api/v1/usage?{day}&granularity={granularity}");
        harness.get(&tenant, &path).await.expect(200)
    };
    let minutes = async || by("minute").await["rows"].as_array().unwrap().len();
    let (by_hour, by_day) = (by("hour").await, by("day").await);
    assert_eq!(minutes().await, 7);
    // The hour from 10 to 11 ended 31 days ago only when the clock shows 11.
    harness.clock.advance(31 * DAY + Duration::from_secs(3_599));
    harness.plane.maintain().await.unwrap();
    assert_eq!(minutes().await, 7);
    harness.clock.advance(Duration::from_secs(1));
    for _ in 0..2 {
        harness.plane.maintain().await.unwrap();
        let rows = by("minute").await["rows"].clone();
        let row = |start: &str, tier: &str, permits: u64, refused: u64| {
            let refusals = if refused > 0 {
                json!({"RATE_LIMITED": refused})
            } else {
                json!({})
            };
            json!({"start": start, "tier": tier, "permits": permits, "billable": permits, "refused": refused,
                "refusals": refusals})
        };
        assert_eq!(
            rows,
            json!([
                row("2026-11-24T10:00:00.000Z", "default", 7, 3),
                row("2026-11-24T10:00:00.000Z", "permissions:check", 16, 0),
                row("2026-11-24T11:00:00.000Z", "default", 8, 0),
            ])
        );
    }
    assert_eq!((by("hour").await, by("day").await), (by_hour, by_day));
    // A gate that was away for long delivers what it has: it counts, to the minute.
    let body = json!({"gate": "gate-2", "run": "r", "sequence": 1, "permits": [count(key, "default", 7, 32)]});
    harness.gate("/feed/v1/usage", body).await.expect(200);
    harness.plane.maintain().await.unwrap();
    assert_eq!(by("day").await["totals"]["permits"], 1 + 2 + 4 + 8 + 16 + 32);
    // Hours that end later are folded in their turn.
    harness.clock.advance(Duration::from_secs(3_600));
    harness.plane.maintain().await.unwrap();
    assert_eq!(by("day").await["totals"]["permits"], 1 + 2 + 4 + 8 + 16 + 32);
}

async fn old_lines_of_the_audit_log_are_forgotten_where_it_is_wished() {
    for (kept, left) in [(None, 2), (Some(30 * DAY), 1)] {
        let harness = keeping(Retention {
            audit: kept,
            ..Retention::default()
        })
        .await;
        let tenant = harness.tenant("dev@example.com").await;
        let path = format!("/api/v1/keys/{}", tenant.key_id);
        let audit = async |action: &str| {
            let lines = harness
                .get(&tenant, &format!("/api/v1/audit?action={action}"))
                .await
                .expect(200);
            lines["items"].as_array().unwrap().len()
        };
        let rename = async |name: &str| harness.patch(&tenant, &path, json!({"name": name})).await.expect(200);
        rename("first").await;
        harness.clock.advance(DAY);
        rename("second").await;
        harness.clock.advance(29 * DAY);
        harness.plane.maintain().await.unwrap();
        assert_eq!(audit("key.update").await, 2, "the first is 30 days old, not older");
        harness.clock.advance(Duration::from_millis(1));
        harness.plane.maintain().await.unwrap();
        assert_eq!(audit("key.update").await, left);
    }
}
