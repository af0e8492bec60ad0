//! Every route times every caller, taken from the served document: a new route cannot escape.

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{ADMIN_TOKEN, FEED_TOKEN, Harness, Tenant, text};

struct Operation {
    method: Method,
    path: String,
    id: String,
    security: Vec<String>,
    body: Option<Value>,
}

async fn operations(harness: &Harness) -> Vec<Operation> {
    let document: Value =
        serde_json::from_str(&harness.send(Method::GET, "/openapi.json", &[], None).await.text).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let security = operation["security"].as_array().unwrap();
            let security = security
                .iter()
                .flat_map(|s| s.as_object().unwrap().keys().cloned())
                .collect();
            assert!(operation["summary"].is_string(), "{method} {path} says what it does");
            for status in ["400", "422", "500", "503"] {
                assert!(
                    operation["responses"][status].is_object(),
                    "{method} {path} has no {status}"
                );
            }
            operations.push(Operation {
                method: method.to_uppercase().parse().unwrap(),
                path: path.clone(),
                id: text(&operation["operationId"]),
                security,
                body: operation
                    .get("requestBody")
                    .map(|_| valid_body(&text(&operation["operationId"]))),
            });
        }
    }
    operations
}

/// A body that the operation accepts, so that only the caller decides.
fn valid_body(id: &str) -> Value {
    match id {
        "register" => json!({"name": "n", "email": "new@example.com", "password": "your-secure-password"}),
        "login" => json!({"email": "a@example.com", "password": "your-secure-password"}),
        "changePassword" => json!({"currentPassword": "your-secure-password", "newPassword": "your-secure-password"}),
        "updateOrganization" | "updateKey" | "adminUpdateKey" | "adminUpdateOrganization" => json!({"name": "renamed"}),
        "createKey" => json!({"name": "n", "environment": "live", "scopes": []}),
        "rotateKey" => json!({"gracePeriodSeconds": 60}),
        "createToken" => json!({"name": "n"}),
        "adminCreateInvitation" => json!({"note": "n"}),
        "acknowledge" => json!({"gate": "gate-1", "revision": 1}),
        "postUsage" => json!({"gate": "gate-1", "run": "r", "sequence": 1}),
        other => panic!("the new operation {other} needs a valid body here"),
    }
}

/// Puts ids of `owner` into a path.
fn fill(path: &str, owner: &Tenant, session: &str) -> String {
    let id = if path.contains("/tokens/") {
        owner.token_id.as_str()
    } else if path.contains("/sessions/") {
        session
    } else if path.contains("/organizations/") {
        owner.organization.as_str()
    } else if path.contains("/keys/") {
        owner.key_id.as_str()
    } else {
        "unknown"
    };
    path.replace("{id}", id).replace("{name}", id)
}

#[tokio::test]
async fn every_route_refuses_everybody_it_is_not_for() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("a@example.com").await;
    let callers = [
        ("nobody", vec![]),
        ("a wrong token", vec![("authorization", "Bearer pxm_wrong".to_owned())]),
        ("a wrong cookie", vec![("cookie", "tollgate_session=wrong".to_owned())]),
        (
            "an API key",
            vec![("authorization", format!("Bearer {}", tenant.api_key))],
        ),
        ("session", vec![("cookie", tenant.cookie.clone())]),
        ("token", vec![("authorization", tenant.bearer())]),
        ("operator", vec![("authorization", format!("Bearer {ADMIN_TOKEN}"))]),
        ("gate", vec![("authorization", format!("Bearer {FEED_TOKEN}"))]),
    ];
    let before = harness.plane.revision();
    let mut checked = 0;
    for operation in operations(&harness).await {
        if operation.security.is_empty() {
            continue;
        }
        for (caller, headers) in &callers {
            if operation.security.iter().any(|s| s == caller) {
                continue;
            }
            let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
            let path = fill(&operation.path, &tenant, "ses_unknown");
            let answer = harness
                .send(operation.method.clone(), &path, &headers, operation.body.clone())
                .await;
            let expected = if *caller == "token" && operation.security == ["session"] {
                403
            } else {
                401
            };
            assert_eq!(
                answer.status.as_u16(),
                expected,
                "{} as {caller}: {}",
                operation.id,
                answer.text
            );
            checked += 1;
        }
    }
    assert!(checked > 150, "{checked}");
    assert_eq!(harness.plane.revision(), before, "nothing was changed by any of them");
}

#[tokio::test]
async fn no_route_reads_or_writes_what_belongs_to_another_organisation() {
    let harness = Harness::start().await;
    let owner = harness.tenant("a@example.com").await;
    let intruder = harness.tenant("b@example.com").await;
    let sessions = harness
        .send(Method::GET, "/api/v1/sessions", &[("cookie", &owner.cookie)], None)
        .await
        .expect(200);
    let session = text(&sessions["items"][0]["id"]);
    let before = harness.plane.revision();
    let mut checked = 0;
    for operation in operations(&harness).await {
        if !operation.path.contains('{') || operation.security.iter().any(|s| s == "operator") {
            continue;
        }
        for kind in &operation.security {
            let header = match kind.as_str() {
                "session" => ("cookie", intruder.cookie.clone()),
                "token" => ("authorization", intruder.bearer()),
                other => panic!("{other} on a path with an id needs a look"),
            };
            let path = fill(&operation.path, &owner, &session);
            let headers = [(header.0, header.1.as_str())];
            let answer = harness
                .send(operation.method.clone(), &path, &headers, operation.body.clone())
                .await;
            answer.refused(404, "NOT_FOUND");
            // The same as for what does not exist at all: existence is not told either.
            let path = operation.path.replace("{id}", "key_0000000000000000000");
            let answer = harness
                .send(operation.method.clone(), &path, &headers, operation.body.clone())
                .await;
            answer.refused(404, "NOT_FOUND");
            checked += 1;
        }
    }
    assert!(checked >= 13, "{checked}");
    assert_eq!(harness.plane.revision(), before);
    for list in [
        "/api/v1/keys",
        "/api/v1/tokens",
        "/api/v1/audit",
        "/api/v1/usage?groupBy=key",
    ] {
        let answer = harness.get(&intruder, list).await;
        for foreign in [&owner.organization, &owner.key_id, &owner.token_id, &owner.email] {
            assert!(!answer.text.contains(foreign.as_str()), "{list}");
        }
    }
    for filter in [format!("target={}", owner.key_id), format!("actor={}", owner.token_id)] {
        let found = harness
            .get(&intruder, &format!("/api/v1/audit?{filter}"))
            .await
            .expect(200);
        assert_eq!(found["items"], json!([]));
    }
    let found = harness
        .get(&intruder, &format!("/api/v1/keys?q={}", owner.key_id))
        .await
        .expect(200);
    assert_eq!(found["items"], json!([]));
    // Nor by a mark of a page that the owner was given.
    for _ in 0..2 {
        harness.create_key(&owner, "k").await;
    }
    let page = harness.get(&owner, "/api/v1/keys?limit=1").await.expect(200);
    let cursor = text(&page["nextCursor"]);
    let stolen = harness.get(&intruder, &format!("/api/v1/keys?cursor={cursor}")).await;
    assert!(!stolen.text.contains(&owner.organization));
}

#[tokio::test]
async fn the_documents_load_nothing_from_elsewhere() {
    let harness = Harness::start().await;
    let page = harness.send(Method::GET, "/docs", &[], None).await;
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    let policy = page.headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; style-src 'self'"));
    assert!(!page.text.contains("<script") && !page.text.contains("style=") && !page.text.contains("src="));
    assert!(page.text.contains("href=\"/docs/style.css\""));
    for operation in operations(&harness).await {
        assert!(
            page.text.contains(&format!("<article id=\"{}\">", operation.id)),
            "{}",
            operation.id
        );
    }
    let style = harness.send(Method::GET, "/docs/style.css", &[], None).await;
    assert!(!style.text.contains("url(") && !style.text.contains("@import"));
}

#[tokio::test]
async fn every_answer_carries_the_security_headers() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("a@example.com").await;
    for answer in [
        harness.get(&tenant, "/api/v1/keys").await,
        harness.send(Method::GET, "/nowhere", &[], None).await,
        harness.send(Method::GET, "/docs", &[], None).await,
        harness.send(Method::GET, "/healthz", &[], None).await,
    ] {
        assert_eq!(answer.headers["x-content-type-options"], "nosniff");
        assert_eq!(answer.headers["x-frame-options"], "DENY");
        assert_eq!(answer.headers["referrer-policy"], "no-referrer");
        assert!(
            answer.headers["content-security-policy"]
                .to_str()
                .unwrap()
                .starts_with("default-src 'none'")
        );
        assert!(answer.headers["x-request-id"].to_str().unwrap().starts_with("req_"));
    }
    assert_eq!(
        harness.get(&tenant, "/api/v1/keys").await.headers["cache-control"],
        "no-store"
    );
    let odd = [("x-request-id", "with spaces in it")];
    let answer = harness.send(Method::GET, "/healthz", &odd, None).await;
    assert_ne!(answer.headers["x-request-id"], "with spaces in it");
}
