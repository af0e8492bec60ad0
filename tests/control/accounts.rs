//! Registering, signing in and out, passwords, access tokens, the operator.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tollgate::control::Registration;

use crate::harness::{Harness, fault_fields, settings, text};

on_every_engine! {
    the_seed_request_makes_an_organisation_and_a_key,
    every_wrong_field_is_named,
    what_is_not_json_or_too_large_is_told_apart,
    a_broken_body_is_not_quoted_back,
    signing_in_out_and_back,
    cookies_are_strict_under_tls,
    pages_of_other_sites_change_nothing,
    the_eleventh_attempt_is_throttled_by_account_and_by_address,
    a_new_password_ends_every_other_session,
    sessions_are_ended_one_by_one_or_all_others_and_by_time,
    tokens_act_for_their_organisation_until_they_end,
    registration_by_invitation_and_not_at_all,
    registrations_are_throttled_by_address,
    the_operator_sees_and_changes_every_organisation,
    the_audit_log_says_who_what_when_from_where,
}

async fn the_seed_request_makes_an_organisation_and_a_key() {
    let harness = Harness::start().await;
    let answer = harness.register("dev@example.com").await;
    assert_eq!(answer.headers["content-type"], "application/json");
    let data = answer.expect(201);
    assert!(text(&data["organizationId"]).starts_with("org_"));
    assert!(text(&data["organizationId"]).len() <= 23);
    let key = text(&data["apiKey"]);
    assert!(key.starts_with("pxk_dev_") && key.len() == 8 + 36, "{key}");
    let error = harness.register("DEV@example.com").await.refused(409, "EMAIL_TAKEN");
    assert!(error["message"].is_string());
    harness.stop().await;
}

async fn every_wrong_field_is_named() {
    let harness = Harness::start().await;
    let body = json!({"name": " ", "email": "no-address", "password": "short", "nmae": 1});
    let error = harness
        .send(Method::POST, "/api/v1/register", &[], Some(body))
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["email", "name", "nmae", "password"]);
    let error = harness
        .send(Method::POST, "/api/v1/register", &[], Some(json!({"name": 5})))
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["email", "name", "password"]);
}

async fn what_is_not_json_or_too_large_is_told_apart() {
    let harness = Harness::start().await;
    let post = |kind: &'static str, body: String| {
        harness
            .client
            .post(harness.url("/api/v1/register"))
            .header("content-type", kind)
            .body(body)
            .send()
    };
    let status = |response: reqwest::Response| response.status().as_u16();
    assert_eq!(status(post("text/plain", "{}".into()).await.unwrap()), 415);
    assert_eq!(status(post("application/json", "{".into()).await.unwrap()), 400);
    assert_eq!(status(post("application/json", "[]".into()).await.unwrap()), 400);
    assert_eq!(
        status(
            post("application/json", format!("\"{}\"", "x".repeat(70_000)))
                .await
                .unwrap()
        ),
        413
    );
    harness
        .send(Method::GET, "/nowhere", &[], None)
        .await
        .refused(404, "NOT_FOUND");
    let answer = harness.send(Method::PUT, "/api/v1/keys", &[], None).await;
    assert!(answer.headers["allow"].to_str().unwrap().contains("POST"));
    answer.refused(405, "METHOD_NOT_ALLOWED");
}

async fn a_broken_body_is_not_quoted_back() {
    let harness = Harness::start().await;
    let response = harness
        .client
        .post(harness.url("/api/v1/login"))
        .header("content-type", "application/json")
        .body(r#"{"email":"a@b.example","password":"canary-in-the-body" x"#)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status().as_u16(), 400);
    assert!(!response.text().await.unwrap().contains("canary"));
}

async fn signing_in_out_and_back() {
    let harness = Harness::start().await;
    harness.register("dev@example.com").await.expect(201);
    let answer = harness.login("Dev@Example.com", "your-secure-password").await;
    let set = answer.headers["set-cookie"].to_str().unwrap().to_owned();
    assert!(
        set.contains("HttpOnly") && set.contains("SameSite=Lax") && set.contains("Path=/"),
        "{set}"
    );
    let cookie = answer.cookie();
    let session = harness
        .send(Method::GET, "/api/v1/session", &[("cookie", &cookie)], None)
        .await
        .expect(200);
    assert_eq!(session["email"], "dev@example.com");
    // Signing in again renews the id, and the one that was brought along ends.
    let body = json!({"email": "dev@example.com", "password": "your-secure-password"});
    let again = harness
        .send(Method::POST, "/api/v1/login", &[("cookie", &cookie)], Some(body))
        .await;
    let renewed = again.cookie();
    assert_ne!(renewed, cookie);
    harness
        .send(Method::GET, "/api/v1/session", &[("cookie", &cookie)], None)
        .await
        .refused(401, "UNAUTHENTICATED");
    let out = harness
        .send(Method::POST, "/api/v1/logout", &[("cookie", &renewed)], None)
        .await;
    assert!(out.headers["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    out.expect(200);
    harness
        .send(Method::GET, "/api/v1/session", &[("cookie", &renewed)], None)
        .await
        .refused(401, "UNAUTHENTICATED");
}

async fn cookies_are_strict_under_tls() {
    let public_url = Some("https://keys.example.com".to_owned());
    let harness = Harness::with(tollgate::control::Settings {
        public_url,
        ..settings()
    })
    .await;
    harness.register("dev@example.com").await.expect(201);
    let answer = harness.login("dev@example.com", "your-secure-password").await;
    let set = answer.headers["set-cookie"].to_str().unwrap();
    assert!(
        set.starts_with("__Host-tollgate_session=") && set.contains("; Secure"),
        "{set}"
    );
    assert!(answer.headers.contains_key("strict-transport-security"));
}

async fn pages_of_other_sites_change_nothing() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let host = harness.address.to_string();
    for headers in [
        vec![("sec-fetch-site", "cross-site")],
        vec![("sec-fetch-site", "same-site")],
        vec![("origin", "https://evil.example")],
        vec![("origin", "null")],
    ] {
        let mut all = vec![("cookie", tenant.cookie.as_str())];
        all.extend(headers);
        let body = Some(json!({"name": "x"}));
        harness
            .send(Method::POST, "/api/v1/tokens", &all, body)
            .await
            .refused(403, "CROSS_SITE_REQUEST");
    }
    let own = format!("http://{host}");
    let all = [
        ("cookie", tenant.cookie.as_str()),
        ("origin", own.as_str()),
        ("sec-fetch-site", "same-origin"),
    ];
    harness
        .send(Method::POST, "/api/v1/tokens", &all, Some(json!({"name": "x"})))
        .await
        .expect(201);
}

#[tokio::test]
async fn an_unknown_address_and_a_wrong_password_answer_the_same() {
    let harness = Harness::start().await;
    harness.register("dev@example.com").await.expect(201);
    let wrong = harness
        .login("dev@example.com", "wrong-password")
        .await
        .refused(401, "WRONG_CREDENTIALS");
    let unknown = harness
        .login("nobody@example.com", "wrong-password")
        .await
        .refused(401, "WRONG_CREDENTIALS");
    assert_eq!(wrong["message"], unknown["message"]);
    let mut seen = std::collections::BTreeSet::new();
    // The same work is done for both: one comparison with an argon2 hash of the same parameters. How long that takes is
    // only printed, since it varies with the machine's other work.
    let mut times = [vec![], vec![]];
    for round in 0..9 {
        harness.clock.advance(Duration::from_secs(3_600));
        for (n, email) in ["dev@example.com".to_owned(), format!("n{round}@example.com")]
            .iter()
            .enumerate()
        {
            let before = harness.plane.passwords_checked();
            let begun = std::time::Instant::now();
            let answer = harness.login(email, "wrong-password").await;
            times[n].push(begun.elapsed());
            let mut names: Vec<String> = answer.headers.keys().map(ToString::to_string).collect();
            names.sort();
            let length = answer.text.len();
            assert_eq!(answer.refused(401, "WRONG_CREDENTIALS")["message"], wrong["message"]);
            assert_eq!(harness.plane.passwords_checked() - before, 1, "{email}");
            seen.insert((names, length));
        }
    }
    assert_eq!(seen.len(), 1, "the same header fields and as many bytes: {seen:?}");
    times.iter_mut().for_each(|times| times.sort());
    println!(
        "medians: wrong password {:?}, unknown e-mail {:?}",
        times[0][4], times[1][4]
    );
}

async fn the_eleventh_attempt_is_throttled_by_account_and_by_address() {
    let harness = Harness::start().await;
    harness.register("dev@example.com").await.expect(201);
    // One account from many addresses.
    for i in 0..10 {
        let forwarded = format!("198.51.100.{i}");
        let body = json!({"email": "dev@example.com", "password": "wrong"});
        let headers = [("x-forwarded-for", forwarded.as_str())];
        harness
            .send(Method::POST, "/api/v1/login", &headers, Some(body))
            .await
            .refused(401, "WRONG_CREDENTIALS");
    }
    let answer = harness.login("dev@example.com", "your-secure-password").await;
    assert_eq!(answer.headers["retry-after"], "900");
    let error = answer.refused(429, "TOO_MANY_ATTEMPTS");
    assert_eq!(error["message"], "Too many attempts. Retry after 900 seconds.");
    // Many accounts from one address.
    for i in 0..10 {
        harness
            .login(&format!("n{i}@example.com"), "wrong")
            .await
            .refused(401, "WRONG_CREDENTIALS");
    }
    harness
        .login("n11@example.com", "wrong")
        .await
        .refused(429, "TOO_MANY_ATTEMPTS");
    // Not a millisecond before the time is over, and then at once.
    harness.clock.advance(Duration::from_millis(899_999));
    harness
        .login("dev@example.com", "your-secure-password")
        .await
        .refused(429, "TOO_MANY_ATTEMPTS");
    harness.clock.advance(Duration::from_millis(1));
    harness
        .login("dev@example.com", "your-secure-password")
        .await
        .expect(200);
    // Signing in well never counts.
    for _ in 0..12 {
        harness
            .login("dev@example.com", "your-secure-password")
            .await
            .expect(200);
    }
}

async fn a_new_password_ends_every_other_session() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let other = harness.login("dev@example.com", "your-secure-password").await.cookie();
    let list = harness
        .send(Method::GET, "/api/v1/sessions", &[("cookie", &other)], None)
        .await
        .expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 2);
    let body = json!({"currentPassword": "wrong", "newPassword": "short"});
    let error = harness
        .send(Method::POST, "/api/v1/password", &[("cookie", &other)], Some(body))
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["newPassword"]);
    let body = json!({"currentPassword": "wrong", "newPassword": "another-password"});
    let error = harness
        .send(Method::POST, "/api/v1/password", &[("cookie", &other)], Some(body))
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["currentPassword"]);
    let body = json!({"currentPassword": "your-secure-password", "newPassword": "another-password"});
    let changed = harness
        .send(Method::POST, "/api/v1/password", &[("cookie", &other)], Some(body))
        .await;
    let renewed = changed.cookie();
    changed.expect(200);
    for old in [&tenant.cookie, &other] {
        harness
            .send(Method::GET, "/api/v1/session", &[("cookie", old)], None)
            .await
            .refused(401, "UNAUTHENTICATED");
    }
    harness
        .send(Method::GET, "/api/v1/session", &[("cookie", &renewed)], None)
        .await
        .expect(200);
    harness
        .login("dev@example.com", "your-secure-password")
        .await
        .refused(401, "WRONG_CREDENTIALS");
    harness.login("dev@example.com", "another-password").await.expect(200);
}

async fn sessions_are_ended_one_by_one_or_all_others_and_by_time() {
    let harness = Harness::start().await;
    harness.register("dev@example.com").await.expect(201);
    let mut cookies = Vec::new();
    for _ in 0..4 {
        cookies.push(harness.login("dev@example.com", "your-secure-password").await.cookie());
        harness.clock.advance(Duration::from_secs(1));
    }
    let me = [("cookie", cookies[3].as_str())];
    let list = harness
        .send(Method::GET, "/api/v1/sessions", &me, None)
        .await
        .expect(200);
    let oldest = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .find(|s| s["createdAt"] == "2026-11-24T10:00:00.000Z")
        .unwrap();
    let path = format!("/api/v1/sessions/{}", text(&oldest["id"]));
    harness.send(Method::DELETE, &path, &me, None).await.expect(200);
    harness
        .send(Method::DELETE, &path, &me, None)
        .await
        .refused(404, "NOT_FOUND");
    let ended = harness
        .send(Method::DELETE, "/api/v1/sessions", &me, None)
        .await
        .expect(200);
    assert_eq!(ended["ended"], 2);
    harness.clock.advance(Duration::from_secs(7 * 24 * 3_600));
    harness
        .send(Method::GET, "/api/v1/session", &me, None)
        .await
        .refused(401, "UNAUTHENTICATED");
}

async fn tokens_act_for_their_organisation_until_they_end() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    assert!(tenant.token.starts_with("pxm_"));
    let list = harness.get(&tenant, "/api/v1/tokens").await;
    assert!(!list.text.contains(&tenant.token));
    assert_eq!(list.expect(200)["items"][0]["id"], tenant.token_id);
    // A token is not a person.
    harness
        .get(&tenant, "/api/v1/session")
        .await
        .refused(403, "SESSION_REQUIRED");
    let body = json!({"name": "soon", "expiresAt": "2026-11-24T10:00:01.000Z"});
    let soon = text(&harness.post(&tenant, "/api/v1/tokens", body).await.expect(201)["token"]);
    let bearer = format!("Bearer {soon}");
    let as_soon = [("authorization", bearer.as_str())];
    harness
        .send(Method::GET, "/api/v1/keys", &as_soon, None)
        .await
        .expect(200);
    harness.clock.advance(Duration::from_millis(999));
    harness
        .send(Method::GET, "/api/v1/keys", &as_soon, None)
        .await
        .expect(200);
    harness.clock.advance(Duration::from_millis(1));
    harness
        .send(Method::GET, "/api/v1/keys", &as_soon, None)
        .await
        .refused(401, "UNAUTHENTICATED");
    harness
        .delete(&tenant, &format!("/api/v1/tokens/{}", tenant.token_id))
        .await
        .expect(200);
    let gone = harness.get(&tenant, "/api/v1/keys").await;
    assert_eq!(gone.headers["www-authenticate"], "Bearer realm=\"tollgate control\"");
    gone.refused(401, "UNAUTHENTICATED");
}

async fn registration_by_invitation_and_not_at_all() {
    let invite = tollgate::control::Settings {
        registration: Registration::Invite,
        ..settings()
    };
    let harness = Harness::with(invite).await;
    let error = harness
        .register("dev@example.com")
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["invitation"]);
    let made = harness
        .admin(
            Method::POST,
            "/api/v1/admin/invitations",
            Some(json!({"note": "for a friend"})),
        )
        .await
        .expect(201);
    let with = |email: &str, invitation: &str| {
        Some(json!({"name": "n", "email": email, "password": "your-secure-password", "invitation": invitation}))
    };
    let path = "/api/v1/register";
    harness
        .send(Method::POST, path, &[], with("a@example.com", "pxi_no"))
        .await
        .refused(403, "INVITATION_INVALID");
    let invitation = text(&made["invitation"]);
    let registered = harness
        .send(Method::POST, path, &[], with("a@example.com", &invitation))
        .await
        .expect(201);
    harness
        .send(Method::POST, path, &[], with("b@example.com", &invitation))
        .await
        .refused(403, "INVITATION_INVALID");
    let list = harness.admin(Method::GET, "/api/v1/admin/invitations", None).await;
    assert!(!list.text.contains(&invitation));
    assert_eq!(list.expect(200)["items"][0]["usedBy"], registered["organizationId"]);

    let off = tollgate::control::Settings {
        registration: Registration::Off,
        ..settings()
    };
    let harness = Harness::with(off).await;
    harness
        .register("dev@example.com")
        .await
        .refused(403, "REGISTRATION_CLOSED");
}

async fn registrations_are_throttled_by_address() {
    let harness = Harness::with(tollgate::control::Settings {
        registrations_per_hour: 2,
        ..settings()
    })
    .await;
    harness.register("a@example.com").await.expect(201);
    harness.register("b@example.com").await.expect(201);
    let answer = harness.register("c@example.com").await;
    assert_eq!(answer.headers["retry-after"], "3600");
    answer.refused(429, "TOO_MANY_ATTEMPTS");
    harness.clock.advance(Duration::from_secs(3_600));
    harness.register("c@example.com").await.expect(201);
}

async fn the_operator_sees_and_changes_every_organisation() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    let path = format!("/api/v1/admin/organizations/{}", tenant.organization);
    harness
        .send(Method::GET, &path, &[("authorization", "Bearer wrong")], None)
        .await
        .refused(401, "UNAUTHENTICATED");
    assert_eq!(
        harness.admin(Method::GET, &path, None).await.expect(200)["plan"],
        "starter"
    );
    let error = harness
        .admin(Method::PATCH, &path, Some(json!({"plan": "none"})))
        .await
        .refused(422, "VALIDATION_ERROR");
    assert_eq!(fault_fields(&error), ["plan"]);
    let changed = harness
        .admin(Method::PATCH, &path, Some(json!({"plan": "business"})))
        .await
        .expect(200);
    assert_eq!(changed["plan"], "business");
    let key = harness
        .admin(Method::GET, &format!("/api/v1/admin/keys/{}", tenant.key_id), None)
        .await
        .expect(200);
    assert_eq!(key["revision"], changed["revision"], "the key's line was told anew");
    let plans = harness.get(&tenant, "/api/v1/plans").await.expect(200);
    assert_eq!(plans["items"][1]["current"], true);
    let revoked = harness
        .admin(Method::DELETE, &format!("/api/v1/admin/keys/{}", tenant.key_id), None)
        .await
        .expect(200);
    assert_eq!(revoked["status"], "revoked");
    let log = harness.get(&tenant, "/api/v1/audit").await.expect(200);
    assert_eq!(log["items"][0]["action"], "key.revoke");
    assert_eq!(log["items"][0]["actor"]["kind"], "operator");
}

async fn the_audit_log_says_who_what_when_from_where() {
    let harness = Harness::start().await;
    let tenant = harness.tenant("dev@example.com").await;
    harness.clock.advance(Duration::from_secs(60));
    let headers = [
        ("authorization", tenant.bearer()),
        ("x-forwarded-for", "203.0.113.9".to_owned()),
        ("user-agent", "tests/1".to_owned()),
        ("x-request-id", "my-request".to_owned()),
    ];
    let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
    let body = json!({"name": "renamed"});
    let path = format!("/api/v1/keys/{}", tenant.key_id);
    harness
        .send(Method::PATCH, &path, &headers, Some(body))
        .await
        .expect(200);
    let log = harness.get(&tenant, "/api/v1/audit?limit=2").await.expect(200);
    let line = &log["items"][0];
    assert_eq!(line["action"], "key.update");
    assert_eq!(
        line["actor"],
        json!({"kind": "token", "id": tenant.token_id, "name": "tests"})
    );
    assert_eq!(line["target"], json!({"kind": "key", "id": tenant.key_id}));
    assert_eq!(
        line["detail"],
        json!({"name": {"from": "Default key", "to": "renamed"}})
    );
    assert_eq!(line["address"], "203.0.113.9");
    assert_eq!(line["userAgent"], "tests/1");
    assert_eq!(line["requestId"], "my-request");
    assert_eq!(line["at"], "2026-11-24T10:01:00.000Z");
    // The rest by pages: token, session, registration.
    let next = text(&log["nextCursor"]);
    let rest = harness
        .get(&tenant, &format!("/api/v1/audit?limit=2&cursor={next}"))
        .await
        .expect(200);
    let actions: Vec<_> = log["items"]
        .as_array()
        .unwrap()
        .iter()
        .chain(rest["items"].as_array().unwrap())
        .map(|l| text(&l["action"]))
        .collect();
    assert_eq!(
        actions,
        ["key.update", "token.create", "session.begin", "organization.register"]
    );
    assert_eq!(rest["nextCursor"], json!(null));
    let found = harness
        .get(&tenant, "/api/v1/audit?action=token.create")
        .await
        .expect(200);
    assert_eq!(found["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn dev_keys_share_one_organisation_across_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let database = format!("sqlite://{}", directory.path().join("tollgate.db").display());
    let with = || tollgate::control::Settings {
        database: database.clone(),
        ..settings()
    };
    let first = {
        let harness = Harness::with(with()).await;
        let key = harness.plane.dev_key().await.unwrap();
        harness.stop().await;
        key
    };
    let harness = Harness::with(with()).await;
    let second = harness.plane.dev_key().await.unwrap();
    assert_eq!(first.organization_id, second.organization_id);
    assert_ne!(first.secret, second.secret);
    assert!(second.secret.starts_with("pxk_live_"));
    let path = format!("/api/v1/admin/keys?organization={}", first.organization_id);
    let keys = harness.admin(Method::GET, &path, None).await.expect(200);
    assert_eq!(keys["items"].as_array().unwrap().len(), 2);
    // No file holds a secret.
    harness.stop().await;
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for secret in [&first.secret, &second.secret] {
            assert!(!bytes.windows(secret.len()).any(|w| w == secret.as_bytes()));
        }
    }
}
