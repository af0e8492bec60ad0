//! Against a control plane within the test: ten thousand keys, gates that lag, and what TLS changes about cookies.

use std::time::{Duration, Instant};

use sqlx::Connection as _;
use tollgate::clock::Clock;
use tollgate::control::{ControlPlane, Environment, Plan, Scope, Settings, Tier};

use super::program::{PASSWORD, Visitor};

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_keys_are_listed_and_searched_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.db");
    let base = serve(Settings {
        database: format!("sqlite://{}", path.display()),
        ..settings()
    })
    .await;
    let visitor = Visitor::new(&base);
    visitor.register("Large", "large@example.com").await;
    let organization = format!(
        "org_{}",
        visitor.get("/settings").await.between("<code>org_", "</code>")
    );
    insert_keys(&path, &organization).await;

    let mut slowest = Duration::ZERO;
    let paths = [
        "/keys",
        "/keys?sort=name",
        "/keys?sort=-used",
        "/keys?q=worker+77",
        "/keys?q=z999",
        "/keys?q=nothing",
        "/keys?status=active&scope=storage:read&sort=-expires",
        "/keys?status=rotating&environment=test",
    ];
    for path in paths {
        visitor.get(path).await.expect(200);
        let mut times = Vec::new();
        for _ in 0..5 {
            let begin = Instant::now();
            visitor.get(path).await.expect(200);
            times.push(begin.elapsed());
        }
        times.sort();
        println!("{path}: {:?}", times[2]);
        slowest = slowest.max(times[2]);
    }
    // The goal is 100 ms in a release build on a quiet machine; tests run unoptimised beside each other.
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");

    // Pages lead through all of them and back.
    let page = visitor.get("/keys?q=worker+1234").await.expect(200);
    assert_eq!(page.body.matches("<td class=\"name\">").count(), 1);
    let mut path = "/keys?sort=name".to_owned();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..5 {
        let page = visitor.get(&path).await.expect(200);
        for row in page.body.split("<td class=\"name\"><a href=\"/keys/").skip(1) {
            assert!(seen.insert(row[..23].to_owned()), "a key came twice");
        }
        let next = page.body.rsplit("<a class=\"button\" href=\"").next().unwrap();
        path = next.split('"').next().unwrap().replace("&#38;", "&");
    }
    assert_eq!(seen.len(), 5 * 25);
    let back = visitor
        .get(&path)
        .await
        .expect(200)
        .between("<a class=\"button\" href=\"", "\" rel=\"prev\"");
    let page = visitor.get(&back.replace("&#38;", "&")).await.expect(200);
    let first = page.between("<td class=\"name\"><a href=\"/keys/", "\"");
    assert!(seen.contains(&first), "the page before is the one that was seen last");
}

#[tokio::test(flavor = "multi_thread")]
async fn under_tls_cookies_are_bound_to_the_host() {
    let base = serve(Settings {
        public_url: Some("https://keys.example.com".into()),
        gate_url: Some("https://api.example.com/".into()),
        ..settings()
    })
    .await;
    let visitor = Visitor::new(&base);
    let fields = [("name", "Acme"), ("email", "tls@example.com"), ("password", PASSWORD)];
    let page = visitor.post("/register", &fields).await.expect(200);
    let line = page.headers["set-cookie"].to_str().unwrap();
    assert!(
        line.starts_with("__Host-tollgate_session=") && line.contains("; Secure"),
        "{line}"
    );
    assert!(page.headers.contains_key("strict-transport-security"));
    // The line to paste has the gate's address and the key.
    page.says("curl -i &#39;https://api.example.com/&#39; -H &#39;x-api-key: pxk_dev_");
    visitor.get("/keys").await.expect(200);
    let page = visitor.post("/operator/login", &[("token", "admin")]).await;
    let line = page.headers["set-cookie"].to_str().unwrap();
    assert!(
        line.starts_with("__Host-tollgate_operator=") && line.contains("; Secure"),
        "{line}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_says_which_gates_have_not_followed_yet() {
    let base = serve(settings()).await;
    let visitor = Visitor::new(&base);
    visitor.register("Acme", "lag@example.com").await;
    let (id, _) = visitor.create_key("k", "live", &[]).await;
    let acknowledge = |revision: u64| {
        let request = visitor
            .client
            .post(format!("{base}/feed/v1/acks"))
            .header("authorization", "Bearer feed");
        request
            .json(&serde_json::json!({"gate": "gate-7", "revision": revision}))
            .send()
    };
    let disable = format!("/keys/{id}/disable");
    let target = visitor.post(&disable, &[]).await.redirected();
    visitor.get(&target).await.expect(200).says("No gate is connected.");
    assert_eq!(acknowledge(1).await.unwrap().status(), 200);
    let target = visitor.post(&format!("/keys/{id}/enable"), &[]).await.redirected();
    let page = visitor.get(&target).await.expect(200);
    page.says("Confirmed by 0 of 1 gates. Waiting for gate-7.");
    // The page asks again by itself, for this part only, until there is nothing left to wait for.
    let part = page.between("hx-get=\"", "\"").replace("&#38;", "&");
    visitor.get(&part).await.expect(200).says("hx-trigger=\"every 1s\"");
    let revision = part.rsplit('=').next().unwrap().parse().unwrap();
    assert_eq!(acknowledge(revision).await.unwrap().status(), 200);
    let page = visitor.get(&part).await.expect(200);
    page.says("Confirmed by 1 of 1 gate.");
    assert!(!page.body.contains("hx-get"), "it would ask for ever");
}

async fn serve(settings: Settings) -> String {
    let plane = ControlPlane::open(settings, Clock::system()).await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { plane.serve(listener, None, std::future::pending()).await });
    base
}

fn settings() -> Settings {
    let environment = |name: &str, billed| Environment {
        name: name.into(),
        prefix: format!("pxk_{name}_"),
        billed,
    };
    let scope = |name: &str| Scope {
        name: name.into(),
        description: String::new(),
    };
    let tiers = vec![Tier {
        name: "default".into(),
        limit: 1_000,
        window_ms: 3_600_000,
    }];
    Settings {
        feed_token: "feed".into(),
        admin_token: "admin".into(),
        environments: vec![
            environment("live", true),
            environment("test", false),
            environment("dev", false),
        ],
        scopes: vec![scope("storage:read"), scope("storage:upload")],
        plans: vec![Plan {
            name: "starter".into(),
            max_in_flight: None,
            tiers: tiers.clone(),
        }],
        tiers,
        ..Settings::default()
    }
}

async fn insert_keys(path: &std::path::Path, organization: &str) {
    let mut database = sqlx::SqliteConnection::connect(&format!("sqlite://{}", path.display()))
        .await
        .unwrap();
    let numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)";
    let keys = format!(
        "{numbers} INSERT INTO keys (id, organization_id, name, environment, prefix, scopes, created_at_ms, expires_at_ms,
            disabled, revoked_at_ms, last_used_at_ms, revision)
         SELECT printf('key_%019d', i), ?, printf('worker %d', i), iif(i % 3, 'live', 'test'), 'pxk_live_',
            '[\"storage:read\"]', 1790000000000 + i, iif(i % 5, NULL, 1890000000000 + i), i % 11 = 0, NULL,
            iif(i % 2, 1791000000000 + i * 7, NULL), i + 100 FROM n"
    );
    let secrets = format!(
        "{numbers} INSERT INTO key_secrets (key_id, digest, last_four, created_at_ms)
         SELECT printf('key_%019d', i), randomblob(32), printf('z%03d', i % 1000), 1790000000000 FROM n"
    );
    let mut transaction = database.begin().await.unwrap();
    sqlx::query(sqlx::AssertSqlSafe(keys))
        .bind(organization)
        .execute(&mut *transaction)
        .await
        .unwrap();
    sqlx::query(sqlx::AssertSqlSafe(secrets))
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
}
