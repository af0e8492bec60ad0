//! The database locked, full, closed; what was refused must have changed nothing.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use sqlx::{Connection as _, Executor as _};
use tollgate::control::{Settings, backup, migrate, migration_states};

use crate::harness::{Harness, settings, text};

#[tokio::test]
async fn a_locked_database_is_a_503_and_nothing_is_half_done() {
    let directory = tempfile::tempdir().unwrap();
    let database = format!("sqlite://{}", directory.path().join("tollgate.db").display());
    let harness = Harness::with(Settings {
        database: database.clone(),
        ..settings()
    })
    .await;
    let tenant = harness.tenant("dev@example.com").await;
    let mut other = sqlx::SqliteConnection::connect(&database).await.unwrap();
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let before = harness.plane.revision();
    let path = format!("/api/v1/keys/{}", tenant.key_id);
    let answer = harness.delete(&tenant, &path).await;
    assert_eq!(answer.headers["retry-after"], "1");
    answer.refused(503, "UNAVAILABLE");
    // Reading goes on.
    assert_eq!(harness.get(&tenant, &path).await.expect(200)["status"], "active");
    other.execute("ROLLBACK").await.unwrap();
    assert_eq!(harness.get(&tenant, &path).await.expect(200)["revision"], before);
    harness.delete(&tenant, &path).await.expect(200);
}

#[tokio::test]
async fn a_change_that_fails_in_the_middle_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let database = format!("sqlite://{}", directory.path().join("tollgate.db").display());
    let harness = Harness::with(Settings {
        database: database.clone(),
        ..settings()
    })
    .await;
    let tenant = harness.tenant("dev@example.com").await;
    // The audit line is written last but one: everything before it must go with it.
    let mut other = sqlx::SqliteConnection::connect(&database).await.unwrap();
    other
        .execute("CREATE TRIGGER broken BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'broken'); END")
        .await
        .unwrap();
    let before = harness.plane.revision();
    let body = json!({"name": "n", "environment": "live", "scopes": []});
    let refused = harness.post(&tenant, "/api/v1/keys", body.clone()).await;
    assert_eq!(
        refused.status.as_u16(),
        500,
        "a trigger's error is not the disk's, but the way back is the same"
    );
    let list = harness.get(&tenant, "/api/v1/keys").await.expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
    other.execute("DROP TRIGGER broken").await.unwrap();
    let made = harness.post(&tenant, "/api/v1/keys", body).await.expect(201);
    assert_eq!(made["revision"], before + 1, "no revision was lost");
}

#[tokio::test]
async fn every_acknowledged_change_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let database = format!("sqlite://{}", directory.path().join("tollgate.db").display());
    let with = || Settings {
        database: database.clone(),
        ..settings()
    };
    let harness = Harness::with(with()).await;
    let tenant = harness.tenant("dev@example.com").await;
    let mut ids = Vec::new();
    for i in 0..20 {
        ids.push(text(&harness.create_key(&tenant, &format!("k{i}")).await["id"]));
    }
    for id in &ids[..10] {
        harness.delete(&tenant, &format!("/api/v1/keys/{id}")).await.expect(200);
    }
    let revision = harness.plane.revision();
    // Not stopped: dropped where it is.
    drop(harness);
    let harness = Harness::with(with()).await;
    assert_eq!(harness.plane.revision(), revision);
    for (index, id) in ids.iter().enumerate() {
        let key = harness.get(&tenant, &format!("/api/v1/keys/{id}")).await.expect(200);
        assert_eq!(key["status"], if index < 10 { "revoked" } else { "active" });
    }
    let mut other = sqlx::SqliteConnection::connect(&database).await.unwrap();
    let check: String = sqlx::query_scalar("PRAGMA integrity_check")
        .fetch_one(&mut other)
        .await
        .unwrap();
    assert_eq!(check, "ok");
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_cut_a_change_in_two() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let client = reqwest::Client::builder().pool_max_idle_per_host(0).build().unwrap();
    for i in 0..60_u64 {
        let body = json!({"name": format!("k{i}"), "environment": "live", "scopes": []});
        let request = client
            .post(harness.url("/api/v1/keys"))
            .header("authorization", tenant.bearer())
            .header("idempotency-key", format!("i{i}"))
            .json(&body)
            .send();
        // Somewhere between the connection and the answer.
        let _ = tokio::time::timeout(Duration::from_micros(200 + 150 * i), request).await;
    }
    // The same again, to the end: each key exists exactly once, whichever way it went.
    for i in 0..60 {
        let body = json!({"name": format!("k{i}"), "environment": "live", "scopes": []});
        let (bearer, idempotency_key) = (tenant.bearer(), format!("i{i}"));
        let headers = [
            ("authorization", bearer.as_str()),
            ("idempotency-key", idempotency_key.as_str()),
        ];
        let answer = harness.send(Method::POST, "/api/v1/keys", &headers, Some(body)).await;
        assert!(answer.status.is_success(), "{}", answer.text);
    }
    let list = harness.get(&tenant, "/api/v1/keys?limit=100").await.expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 61);
    assert_eq!(harness.plane.revision(), 61);
}

#[tokio::test]
async fn migrations_are_told_applied_and_backed_up() {
    let directory = tempfile::tempdir().unwrap();
    let database = format!("sqlite://{}", directory.path().join("tollgate.db").display());
    assert!(migration_states(&database).await.unwrap().iter().all(|m| !m.applied));
    migrate(&database).await.unwrap();
    assert!(migration_states(&database).await.unwrap().iter().all(|m| m.applied));
    let harness = Harness::with(Settings {
        database: database.clone(),
        ..settings()
    })
    .await;
    let tenant = harness.tenant("dev@example.com").await;
    let copy = directory.path().join("copy.db");
    backup(&database, &copy).await.unwrap();
    assert!(backup(&database, &copy).await.is_err(), "nothing is overwritten");
    harness.stop().await;
    for name in ["tollgate.db-wal", "tollgate.db-shm", "copy.db-wal"] {
        assert!(
            !directory.path().join(name).exists(),
            "{name}: what is stopped, or a copy, is one file"
        );
    }
    for _ in 0..2 {
        let harness = Harness::with(Settings {
            database: format!("sqlite://{}", copy.display()),
            ..settings()
        })
        .await;
        harness
            .get(&tenant, &format!("/api/v1/keys/{}", tenant.key_id))
            .await
            .expect(200);
        assert_eq!(
            harness.plane.revision(),
            (1 << 32) + 1,
            "beyond every revision that gates may have, and only once"
        );
        harness.stop().await;
    }
}

#[tokio::test]
async fn no_secret_is_in_any_file() {
    let directory = tempfile::tempdir().unwrap();
    let database = format!("sqlite://{}", directory.path().join("tollgate.db").display());
    let harness = Harness::with(Settings { database, ..settings() }).await;
    let tenant = harness.tenant("dev@example.com").await;
    let rotate = format!("/api/v1/keys/{}/rotate", tenant.key_id);
    let bearer = tenant.bearer();
    let headers = [("authorization", bearer.as_str()), ("idempotency-key", "i")];
    let rotated = harness.send(Method::POST, &rotate, &headers, None).await.expect(201);
    let cookie = tenant.cookie.split_once('=').unwrap().1.to_owned();
    let secrets = [
        tenant.api_key,
        tenant.token,
        cookie,
        text(&rotated["apiKey"]),
        "your-secure-password".to_owned(),
    ];
    let search = || {
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            let path = entry.unwrap().path();
            // SQLite's log and index files come and go while it runs; what is gone holds nothing.
            let bytes = match std::fs::read(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                read => read.unwrap(),
            };
            for secret in &secrets {
                let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
                assert!(!found, "{} holds a secret", path.display());
            }
        }
    };
    search();
    harness.stop().await;
    search();
}
