//! The canary: marked keys, passwords and tokens go through everything, what goes wrong included, with the log at its
//! loudest; afterwards they are searched for in everything that was written or said.

use crate::fleet::{ADMIN_TOKEN, FEED_TOKEN, Fleet, Gate};
use crate::harness::{PATIENCE, Tollgate, client};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const PASSWORD: &str = "canary-password-Zq8fT3vWx1";
const SECOND_PASSWORD: &str = "canary-second-Lm4kR7sNc0";
const WRONG_PASSWORD: &str = "canary-wrong-Hy2gB9dJe5";
const WRONG_TOKEN: &str = "pxm_canaryWrongTokenPk6uV0aMi3xS8";

/// What must not be found, and what it is.
struct Canaries(Vec<(String, String)>);

impl Canaries {
    fn add(&mut self, what: &str, secret: &str) {
        self.0.push((what.to_owned(), secret.to_owned()));
    }

    /// The random part alone would be enough to rebuild a key: its prefix and checksum are no secret.
    fn add_key(&mut self, what: &str, key: &str) {
        let start = key.rfind('_').unwrap() + 1;
        self.add(what, &key[start..key.len() - 6]);
    }

    fn search(&self, place: &str, bytes: &[u8]) {
        for (what, needle) in &self.0 {
            if let Some(at) = bytes
                .windows(needle.len())
                .position(|window| window == needle.as_bytes())
            {
                let around = &bytes[at.saturating_sub(200)..(at + 20).min(bytes.len())];
                panic!("{what} is in {place}: …{}", String::from_utf8_lossy(around));
            }
        }
    }
}

/// Everything that was answered, but for the answers that are there to show a secret.
#[derive(Default)]
struct Heard(String);

impl Heard {
    /// Sends a request; what is answered is kept.
    async fn send(&mut self, request: reqwest::RequestBuilder) -> StatusCode {
        let (again, shown) = (request.try_clone().unwrap(), format!("{request:?}"));
        let response = match request.send().await {
            Ok(response) => response,
            // A connection that was kept has gone meanwhile: clients try once more (RFC 9112, 9.3.1).
            Err(error) => {
                println!("once more, after {error:?}: {shown}");
                again.send().await.unwrap()
            }
        };
        let status = response.status();
        self.0 += &format!("{:?}\n", response.headers());
        self.0 += &response.text().await.unwrap();
        self.0.push('\n');
        status
    }

    /// Sends bytes as they are.
    async fn send_raw(&mut self, gate: &Gate, bytes: &str) {
        let address = gate.url.strip_prefix("http://").unwrap();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        // Refused in the middle, the rest cannot be sent.
        let _ = stream.write_all(bytes.as_bytes()).await;
        let mut answer = vec![];
        let _ = tokio::time::timeout(Duration::from_millis(300), stream.read_to_end(&mut answer)).await;
        self.0 += &String::from_utf8_lossy(&answer);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_in_any_log_at_trace_metric_answer_database_spool_or_journal() {
    let fleet = Fleet::logging("trace").await;
    let mut control = fleet.control();
    let gate = fleet.gate("gate-1", &control.url);
    let client = client();
    let (mut heard, mut canaries) = (Heard::default(), Canaries(vec![]));
    for (what, secret) in [
        ("the password", PASSWORD),
        ("the second password", SECOND_PASSWORD),
        ("a wrong password", WRONG_PASSWORD),
        ("a wrong token", &WRONG_TOKEN[4..]),
        ("the admin token", ADMIN_TOKEN),
        ("the feed token", FEED_TOKEN),
    ] {
        canaries.add(what, secret);
    }
    let at = |path: &str| format!("{}{path}", control.url);

    // Accounts, right and wrong.
    let person = json!({"name": "Canary", "email": "canary@example.com", "password": PASSWORD});
    let registered: Value = client
        .post(at("/api/v1/register"))
        .json(&person)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let first_key = registered["data"]["apiKey"].as_str().unwrap().to_owned();
    canaries.add_key("the first key", &first_key);
    let again = heard.send(client.post(at("/api/v1/register")).json(&person)).await;
    assert_eq!(again, StatusCode::CONFLICT);
    for body in [
        format!("{{\"email\": \"canary@example.com\", \"password\": \"{PASSWORD}\" \"broken\""),
        format!("{{\"email\": 5, \"password\": [\"{PASSWORD}\"]}}"),
        format!("{{\"password\": \"{PASSWORD}\", \"e-mail\": \"{WRONG_PASSWORD}\"}}"),
        format!("\"{PASSWORD}\""),
        format!("{{\"email\": \"{PASSWORD}\", \"password\": \"{}\"}}", "x".repeat(2_000)),
    ] {
        for path in ["/api/v1/register", "/api/v1/login"] {
            let request = client
                .post(at(path))
                .header("content-type", "application/json")
                .body(body.clone());
            let status = heard.send(request).await;
            assert!(status.is_client_error(), "{path} {body}: {status}");
            let _ = heard
                .send(
                    client
                        .post(at(path))
                        .header("content-type", "text/plain")
                        .body(body.clone()),
                )
                .await;
        }
    }
    let sign_in = |password: &str| {
        client
            .post(at("/api/v1/login"))
            .json(&json!({"email": "canary@example.com", "password": password}))
    };
    assert_eq!(heard.send(sign_in(WRONG_PASSWORD)).await, StatusCode::UNAUTHORIZED);
    let mut cookies = vec![];
    for _ in 0..2 {
        let response = sign_in(PASSWORD).send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let cookie = response.headers()["set-cookie"]
            .to_str()
            .unwrap()
            .split(';')
            .next()
            .unwrap()
            .to_owned();
        canaries.add("a session's cookie", cookie.split_once('=').unwrap().1);
        cookies.push(cookie);
    }
    let new = json!({"currentPassword": WRONG_PASSWORD, "newPassword": SECOND_PASSWORD});
    let change = client
        .post(at("/api/v1/password"))
        .header("cookie", &cookies[0])
        .json(&new);
    assert!(heard.send(change).await.is_client_error());
    let new = json!({"currentPassword": PASSWORD, "newPassword": SECOND_PASSWORD});
    let change = client
        .post(at("/api/v1/password"))
        .header("cookie", &cookies[0])
        .json(&new);
    let changed = change.send().await.unwrap();
    assert_eq!(changed.status(), StatusCode::OK, "{:?}", changed.text().await);
    let cookie = changed.headers()["set-cookie"]
        .to_str()
        .unwrap()
        .split(';')
        .next()
        .unwrap()
        .to_owned();
    canaries.add("the new session's cookie", cookie.split_once('=').unwrap().1);

    // The portal's forms, right and wrong.
    for (path, form) in [
        (
            "/login",
            [("email", "canary@example.com"), ("password", WRONG_PASSWORD)].as_slice(),
        ),
        (
            "/register",
            &[("name", ""), ("email", "canary"), ("password", WRONG_PASSWORD)],
        ),
        ("/operator/login", &[("token", WRONG_TOKEN)]),
    ] {
        let body: String = form.iter().map(|(name, value)| format!("{name}={value}&")).collect();
        let request = client
            .post(at(path))
            .header("content-type", "application/x-www-form-urlencoded");
        let status = heard.send(request.body(body)).await;
        assert!(status.is_client_error() || status == StatusCode::OK, "{path}: {status}");
    }
    let form = format!("currentPassword={WRONG_PASSWORD}&newPassword={SECOND_PASSWORD}");
    let request = client.post(at("/settings/password")).header("cookie", &cookie);
    let request = request
        .header("content-type", "application/x-www-form-urlencoded")
        .body(form);
    let _ = heard.send(request).await;

    // Keys and tokens.
    let call = async |method: Method, path: &str, body: Value| -> Value {
        let request = client
            .request(method, at(&format!("/api/v1{path}")))
            .header("cookie", &cookie);
        let request = request.header("idempotency-key", "canary").json(&body);
        let response = request.send().await.unwrap();
        assert!(response.status().is_success(), "{path}: {}", response.status());
        response.json::<Value>().await.unwrap()["data"].take()
    };
    let wanted = json!({"name": "canary", "environment": "test", "scopes": []});
    let made = call(Method::POST, "/keys", wanted.clone()).await;
    let (id, old) = (
        made["id"].as_str().unwrap().to_owned(),
        made["apiKey"].as_str().unwrap().to_owned(),
    );
    canaries.add_key("the key", &old);
    let replayed = call(Method::POST, "/keys", wanted).await;
    assert!(replayed["apiKey"].is_null(), "a replay shows no secret");
    heard.0 += &replayed.to_string();
    let rotated = call(
        Method::POST,
        &format!("/keys/{id}/rotate"),
        json!({"gracePeriodSeconds": 3_600}),
    )
    .await;
    let secret = rotated["apiKey"].as_str().unwrap().to_owned();
    canaries.add_key("the rotated key", &secret);
    let token = call(Method::POST, "/tokens", json!({"name": "canary"})).await["token"]
        .as_str()
        .unwrap()
        .to_owned();
    canaries.add("the access token", token.strip_prefix("pxm_").unwrap());
    let invitation = client
        .post(at("/api/v1/admin/invitations"))
        .bearer_auth(ADMIN_TOKEN)
        .json(&json!({"note": "n"}));
    let invitation: Value = invitation.send().await.unwrap().json().await.unwrap();
    if let Some(invitation) = invitation["data"]["token"].as_str() {
        canaries.add("the invitation", invitation);
    }
    for path in [
        "/api/v1/keys",
        "/api/v1/tokens",
        "/api/v1/audit?limit=100",
        "/api/v1/usage",
        "/api/v1/sessions",
    ] {
        let _ = heard.send(client.get(at(path)).bearer_auth(&token)).await;
        let _ = heard.send(client.get(at(path)).header("cookie", &cookie)).await;
    }
    // Credentials where they do not belong, on the control plane.
    for bearer in [
        &token,
        &secret,
        ADMIN_TOKEN,
        FEED_TOKEN,
        WRONG_TOKEN,
        PASSWORD,
        "two words",
    ] {
        for path in [
            "/api/v1/keys",
            "/api/v1/admin/keys",
            "/feed/v1/keys?after=x",
            "/nowhere",
        ] {
            let _ = heard.send(client.get(at(path)).bearer_auth(bearer)).await;
        }
        let ack = json!({"gate": "gate-9", "revision": "x"});
        let _ = heard
            .send(client.post(at("/feed/v1/acks")).bearer_auth(bearer).json(&ack))
            .await;
    }
    for path in [
        format!("/api/v1/keys/{secret}"),
        format!("/api/v1/audit?target={secret}"),
        format!("/keys/{token}"),
    ] {
        let _ = heard.send(client.get(at(&path)).header("cookie", &cookie)).await;
    }

    // The gate, with the key as it should be and in every wrong way.
    gate.until_it_says(StatusCode::OK, &secret).await;
    let go = |path: &str| client.get(format!("{}{path}", gate.url));
    let known = &secret;
    let (most, last) = known.split_at(known.len() - 1);
    let broken = format!("{most}{}", if last == "x" { "y" } else { "x" });
    for (request, expected) in [
        (go("/any").header("x-api-key", known), 200),
        (go("/any").header("authorization", format!("Bearer {known}")), 200),
        (go("/any").header("x-api-key", &old), 200),
        (go("/any").header("x-api-key", &broken), 401),
        (
            go("/any")
                .header("x-api-key", known)
                .header("authorization", format!("Bearer {old}")),
            400,
        ),
        (go("/any").header("x-api-key", known).header("x-api-key", known), 400),
        (go("/any").header("authorization", format!("Basic {known}")), 401),
        (go("/any").header("cookie", format!("key={known}")), 401),
        (go(&format!("/any?api_key={known}")), 401),
        (go(&format!("/any?api_key={known}")).header("x-api-key", known), 200),
        (go("/live/any").header("x-api-key", known), 403),
        (go("/checks/any").header("x-api-key", known), 403),
        (go("/broken/any").header("x-api-key", known), 502),
        (
            go("/any")
                .header("accept", "application/problem+json")
                .header("x-api-key", &broken),
            401,
        ),
        (
            client
                .request(Method::TRACE, format!("{}/any", gate.url))
                .header("x-api-key", known),
            405,
        ),
        (
            client
                .post(format!("{}/any", gate.url))
                .header("x-api-key", known)
                .body(known.clone()),
            200,
        ),
    ] {
        let shown = format!("{request:?}");
        let status = heard.send(request).await;
        assert_eq!(status.as_u16(), expected, "{}", shown.replace(known.as_str(), "KEY"));
    }
    let http2 = reqwest::Client::builder()
        .no_proxy()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    for key in [known, &broken] {
        let _ = heard
            .send(http2.get(format!("{}/any", gate.url)).header("x-api-key", key))
            .await;
    }
    for raw in [
        format!("GET /a/%2e%2e/any HTTP/1.1\r\nhost: h\r\nx-api-key: {known}\r\n\r\n"),
        format!("GET /any HTTP/1.1\nhost: h\nx-api-key: {known}\n\n"),
        format!("GET /any HTTP/1.1\r\nhost: h\r\nx-api-key: {known}\r\n x\r\n\r\n"),
        format!("GET /any HTTP/1.1\r\nhost: h\r\nx-api-key {known}\r\n\r\n"),
        format!("GET /any HTTP/1.1\r\nx-api-key: {known}\r\n\r\n"),
        format!("POST /any HTTP/1.1\r\nhost: h\r\nx-api-key: {known}\r\ncontent-length: 5, 5\r\n\r\nabcde"),
        format!("{known} / HTTP/1.1\r\n\r\n"),
        // A head that is too large: the refusal comes while it is still being sent.
        format!(
            "GET /any HTTP/1.1\r\nhost: h\r\nx-api-key: {known}{}\r\n\r\n",
            "x".repeat(40_000)
        ),
        format!("GET /any HTTP/1.1\r\nhost: h\r\nx-api-key: {known}"),
    ] {
        heard.send_raw(&gate, &raw).await;
    }

    // The control plane goes, with a feed that breaks and usage that stays on the disk; the gate starts again.
    control.process.signal("KILL");
    let _ = control.process.wait(PATIENCE);
    for _ in 0..20 {
        let _ = heard.send(go("/any").header("x-api-key", known)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for path in ["/metrics", "/status", "/readyz"] {
        let _ = heard.send(client.get(format!("{}{path}", gate.admin))).await;
    }
    search_files(&canaries, fleet.path());
    let mut dead = gate;
    dead.process.signal("KILL");
    let _ = dead.process.wait(PATIENCE);
    let gate = fleet.gate("gate-1", "http://127.0.0.1:9");
    let _ = heard
        .send(client.get(format!("{}/any", gate.url)).header("x-api-key", known))
        .await;
    let control = fleet.control();
    let revoke = client
        .delete(format!("{}/api/v1/keys/{id}", control.url))
        .bearer_auth(&token);
    assert_eq!(heard.send(revoke).await, StatusCode::OK);

    let files = search_files(&canaries, fleet.path());
    assert!(files.len() > 12, "{files:?}");
    for must in [
        "tollgate.db",
        "gate-1/keys.spool",
        "gate-1/windows.journal",
        "gate-1.log",
        "control.log",
        "access.log",
    ] {
        assert!(
            files.iter().any(|file| file == must),
            "{must} was not searched: {files:?}"
        );
    }
    for loud in ["gate-1", "control"] {
        println!("{loud}.log: {} lines", fleet.log(loud).lines().count());
    }
    canaries.search("an answer", heard.0.as_bytes());
    println!(
        "{} secrets, {} files, {} bytes of answers",
        canaries.0.len(),
        files.len(),
        heard.0.len()
    );
}

/// Searches every file but those that are there to hold a token; answers which.
fn search_files(canaries: &Canaries, directory: &Path) -> Vec<String> {
    let mut searched = vec![];
    each_file(directory, &mut |path, bytes| {
        let name = path.strip_prefix(directory).unwrap().display().to_string();
        if !matches!(name.as_str(), "feed.token" | "admin.token") {
            canaries.search(&name, bytes);
            searched.push(name);
        }
    });
    searched
}

/// `dev` prints a key of its own on standard output, once: that is where it is for, and it is nowhere else.
#[tokio::test]
async fn the_key_that_dev_prints_is_nowhere_else() {
    let tollgate = Tollgate::start().await;
    let mut canaries = Canaries(vec![]);
    canaries.add_key("the printed key", &tollgate.key);
    assert_eq!(tollgate.ask("/any", &tollgate.key).await.status(), StatusCode::OK);
    let begun = Instant::now();
    while !tollgate.data().join("keys.spool").exists() && begun.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let data = tollgate.stop();
    let mut files = 0;
    each_file(data.path(), &mut |path, bytes| {
        files += 1;
        if !path.ends_with("stdout") {
            canaries.search(&path.display().to_string(), bytes);
        }
    });
    assert!(files > 5, "{files}");
}

fn each_file(dir: &Path, each: &mut dyn FnMut(&Path, &[u8])) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            each_file(&path, each);
        } else if path.is_file() {
            // SQLite's log and index files come and go while it runs; what is gone holds nothing.
            match fs::read(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                read => each(&path, &read.unwrap()),
            }
        }
    }
}
