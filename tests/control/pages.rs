//! Every page of the portal times every caller, taken from where its router is made: a new page cannot escape. And no
//! route is made anywhere else than where these tests and those of `routes` look.

use std::fs;
use std::path::{Path, PathBuf};

use reqwest::{Method, StatusCode};

use crate::harness::{Harness, Tenant, text};

/// Where routes may be made by hand: the documents and the portal. All others are made by `routes!`, and so are in the
/// document.
const BY_HAND: [&str; 3] = ["api/document.rs", "portal/mod.rs", "portal/operator.rs"];

fn control() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/control")
}

#[test]
fn no_route_is_made_where_the_document_and_these_tests_do_not_see_it() {
    let mut directories = vec![control()];
    let mut made = 0;
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let source = fs::read_to_string(&path).unwrap();
            let name = path.strip_prefix(control()).unwrap().display().to_string();
            made += source.matches(".route(").count();
            for way in [
                ".route(",
                ".route_service(",
                ".nest(",
                ".nest_service(",
                ".fallback_service(",
            ] {
                let fine = way == ".route(" && BY_HAND.contains(&name.as_str());
                assert!(
                    fine || !source.contains(way),
                    "{name} makes a route by `{way}…)`: use `routes!`"
                );
            }
        }
    }
    assert_eq!(
        made,
        3 + pages().len(),
        "three documents, and the pages that were found"
    );
}

struct Page {
    path: String,
    methods: Vec<Method>,
}

fn pages() -> Vec<Page> {
    let mut pages = vec![];
    for file in ["portal/mod.rs", "portal/operator.rs"] {
        let source = fs::read_to_string(control().join(file)).unwrap();
        for made in source.split(".route(").skip(1) {
            let path = made.split('"').nth(1).unwrap().to_owned();
            let rest = made.split_once(&format!("{path}\"")).unwrap().1;
            // Up to the parenthesis that ends it.
            let mut depth = 1;
            let handlers: String = rest
                .chars()
                .take_while(|c| {
                    depth += i32::from(*c == '(') - i32::from(*c == ')');
                    depth > 0
                })
                .collect();
            let methods: Vec<Method> = [(Method::GET, "get("), (Method::POST, "post(")]
                .into_iter()
                .filter(|(_, word)| handlers.contains(word))
                .map(|(method, _)| method)
                .collect();
            assert!(!methods.is_empty(), "{path}: {handlers}");
            pages.push(Page { path, methods });
        }
    }
    assert!(pages.len() > 35, "{}", pages.len());
    pages
}

/// What anybody may ask for.
const PUBLIC: [&str; 7] = [
    "/",
    "/register",
    "/login",
    "/logout",
    "/assets/{name}",
    "/operator/login",
    "/operator/logout",
];

/// Puts ids of `owner` into a path.
fn fill(path: &str, owner: &Tenant, session: &str) -> String {
    let id = if path.starts_with("/tokens") {
        &owner.token_id
    } else if path.starts_with("/settings/sessions") {
        session
    } else if path.starts_with("/operator/organizations") {
        &owner.organization
    } else {
        &owner.key_id
    };
    path.replace("{id}", id).replace("{name}", "gate-1")
}

struct Visit {
    status: StatusCode,
    location: String,
    text: String,
}

async fn visit(harness: &Harness, method: &Method, path: &str, cookie: &str) -> Visit {
    let client = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .unwrap();
    let mut request = client
        .request(method.clone(), harness.url(path))
        .header("accept", "text/html");
    if !cookie.is_empty() {
        request = request.header("cookie", cookie);
    }
    if *method == Method::POST {
        request = request
            .header("content-type", "application/x-www-form-urlencoded")
            .body("name=n&confirm=yes");
    }
    let response = request.send().await.unwrap();
    let location = response.headers().get("location");
    Visit {
        status: response.status(),
        location: location.map_or(String::new(), |value| value.to_str().unwrap().to_owned()),
        text: response.text().await.unwrap(),
    }
}

/// Sent away to sign in, or refused.
fn is_turned_away(visit: &Visit) -> bool {
    visit.status.is_client_error() || visit.status.is_redirection() && visit.location.contains("login")
}

#[tokio::test]
async fn every_page_is_only_for_whom_it_is_for() {
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
    for page in pages() {
        let path = fill(&page.path, &owner, &session);
        let of_operator = page.path.starts_with("/operator");
        for method in &page.methods {
            if !PUBLIC.contains(&page.path.as_str()) {
                for cookie in ["", "tollgate_session=wrong", "tollgate_operator=wrong"] {
                    let seen = visit(&harness, method, &path, cookie).await;
                    assert!(is_turned_away(&seen), "{method} {path} by nobody: {}", seen.status);
                    checked += 1;
                }
            }
            if of_operator && !PUBLIC.contains(&page.path.as_str()) {
                let seen = visit(&harness, method, &path, &owner.cookie).await;
                assert!(is_turned_away(&seen), "{method} {path} by a tenant: {}", seen.status);
                checked += 1;
            }
            if !of_operator && page.path.contains("{id}") {
                let seen = visit(&harness, method, &path, &intruder.cookie).await;
                let unseen = if *method == Method::GET {
                    seen.status == StatusCode::NOT_FOUND
                } else {
                    seen.status.is_client_error()
                };
                assert!(unseen, "{method} {path} by another tenant: {}", seen.status);
                for foreign in [&owner.organization, &owner.email] {
                    assert!(!seen.text.contains(foreign.as_str()), "{method} {path}");
                }
                checked += 1;
            }
        }
    }
    assert!(checked > 120, "{checked}");
    // Nothing was changed by any of it: the owner's key, session and token are what they were.
    assert_eq!(harness.plane.revision(), before);
    let still = [("cookie", owner.cookie.as_str())];
    harness
        .send(Method::GET, "/api/v1/session", &still, None)
        .await
        .expect(200);
    harness.get(&owner, "/api/v1/keys").await.expect(200);
}
