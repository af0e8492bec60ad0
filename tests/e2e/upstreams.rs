//! Upstreams that die, dawdle or talk nonsense; which of them is asked; what is tried again and what never is.

use crate::alone::{GateAlone, Samples};
use crate::certificates::{Authority, server_config, tls_upstream};
use crate::harness::{PATIENCE, error};
use crate::origin::{Manner, Origin};
use reqwest::Method;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A port where nobody listens.
fn refusing() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

/// A listener whose queue is full: further connections are not answered, as by a machine that is gone.
fn unreachable() -> (SocketAddr, Vec<std::net::TcpStream>, socket2::Socket) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let mut waiting = vec![];
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
        waiting.push(stream);
        assert!(waiting.len() < 100, "the queue does not fill up");
    }
    (address, waiting, socket)
}

#[tokio::test]
async fn each_failure_has_its_status_and_nothing_that_was_sent_is_sent_again() {
    let origin = Origin::start("origin", Manner::Answers).await;
    let (gone, _waiting, _socket) = unreachable();
    let timeouts = "timeouts: {connect: 400ms, read: 400ms}, retries: 3";
    let gate = GateAlone::start_with(
        &format!(
            "origin: {{servers: [\"{}\"], {timeouts}}}, refusing: {{servers: [\"{}\"], {timeouts}}}, gone: {{servers: [\"{gone}\"], {timeouts}}}",
            origin.address,
            refusing(),
        ),
        "",
        "routes:\n  - {name: refusing, match: {path: /refusing}, upstream: refusing}\n  - {name: gone, match: {path: /gone}, upstream: gone}\n  \
         - {name: rest, match: {path: \"/**\"}, upstream: origin}\n",
    )
    .await;
    for (manner, status, code) in [
        (Manner::IsSilent, 504, "UPSTREAM_TIMEOUT"),
        (Manner::Closes, 502, "BAD_GATEWAY"),
        (Manner::BreaksHead, 502, "BAD_GATEWAY"),
        (Manner::TalksGarbage, 502, "BAD_GATEWAY"),
    ] {
        origin.behave(manner);
        for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE] {
            let response = gate.request(method.clone(), "/x").body("a body").send().await.unwrap();
            assert_eq!(response.status().as_u16(), status, "{manner:?} {method}");
            assert_eq!(
                response.headers()["connection"],
                "close",
                "a client must not reuse what is closed"
            );
            assert_eq!(error(response).await.0, code);
            assert_eq!(
                origin.take_seen(),
                [format!("{method} /x HTTP/1.1")],
                "{manner:?}: once"
            );
        }
    }
    for status in [200, 404, 500, 502, 503, 504] {
        origin.behave(Manner::Status(status));
        assert_eq!(gate.status(Method::GET, "/x").await, status, "an answer is an answer");
        assert_eq!(origin.take_seen().len(), 1);
    }
    origin.behave(Manner::BreaksBody);
    let response = gate.request(Method::GET, "/x").send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(
        response.bytes().await.is_err(),
        "a body that broke off must not look whole"
    );
    assert_eq!(origin.take_seen().len(), 1);
    for method in [Method::GET, Method::POST] {
        assert_eq!(gate.status(method.clone(), "/refusing").await, 502);
        assert_eq!(gate.status(method, "/gone").await, 504);
    }
    let metrics = gate.metrics().await;
    let of = |name: &str, upstream: &str| metrics.get(&format!("{name}{{upstream=\"{upstream}\"}}")).unwrap();
    for upstream in ["refusing", "gone"] {
        assert_eq!(
            of("tollgate_upstream_connect_failures_total", upstream),
            8.0,
            "{upstream}: two requests, four tries"
        );
        assert_eq!(of("tollgate_upstream_retries_total", upstream), 6.0);
    }
    assert_eq!(of("tollgate_upstream_retries_total", "origin"), 0.0);
}

#[tokio::test]
async fn a_dead_pooled_connection_is_tried_again_for_safe_methods_only() {
    let origin = Origin::start("origin", Manner::AnswersOncePerConnection).await;
    let gate = GateAlone::start(&format!("origin: {{servers: [\"{}\"], retries: 1}}", origin.address)).await;
    for (method, status, seen) in [
        (Method::GET, 200, 2),
        (Method::OPTIONS, 200, 2),
        (Method::POST, 502, 1),
        (Method::PUT, 502, 1),
        (Method::PATCH, 502, 1),
        (Method::DELETE, 502, 1),
    ] {
        // The first leaves a connection in the pool that will die of its second request.
        origin.behave(Manner::Answers);
        assert_eq!(gate.status(Method::GET, "/first").await, 200);
        origin.take_seen();
        origin.behave(Manner::AnswersOncePerConnection);
        assert_eq!(gate.status(method.clone(), "/second").await, status, "{method}");
        assert_eq!(origin.take_seen().len(), seen, "{method}");
    }
}

#[tokio::test]
async fn a_connection_is_used_again_until_it_has_rested_for_its_time() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let gate = GateAlone::start(&format!("origin: {{servers: [\"{address}\"], timeouts: {{idle: 2s}}}}")).await;
    // A field that only Pingora's way takes off, or none.
    for field in ["accept", "te"] {
        let serve = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            for _ in 0..3 {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    assert!(
                        stream.read_buf(&mut head).await.unwrap() > 0,
                        "{field}: closed too early"
                    );
                }
                let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            let end = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut [0])).await;
            assert_eq!(end.expect("closed in time").unwrap(), 0, "{field}");
        };
        let ask = async {
            for _ in 0..3 {
                let request = gate.request(Method::GET, "/x").header(field, "trailers");
                assert_eq!(request.send().await.unwrap().status(), 200, "{field}");
            }
        };
        tokio::join!(serve, ask);
    }
}

#[tokio::test]
async fn a_killed_server_is_passed_over_and_asked_again_once_it_is_back() {
    let (one, two) = (
        Origin::start("one", Manner::Answers).await,
        Origin::start("two", Manner::Answers).await,
    );
    let servers = format!("servers: [\"{}\", \"{}\"]", one.address, two.address);
    let gate = GateAlone::start(&format!("origin: {{{servers}, retries: 1}}")).await;
    one.kill().await;
    for method in [Method::POST, Method::GET].into_iter().cycle().take(20) {
        assert_eq!(gate.status(method, "/x").await, 200, "nothing was sent to the dead one");
    }
    let one = one.revive().await;
    two.take_seen();
    for _ in 0..20 {
        assert_eq!(gate.status(Method::POST, "/x").await, 200);
    }
    assert_eq!((one.take_seen().len(), two.take_seen().len()), (10, 10));
    // Without a further try every other request meets the dead one.
    two.kill().await;
    let (status, said) = gate
        .reload_with(&format!("origin: {{{servers}, retries: 0}}"), "", "")
        .await;
    assert_eq!(status, 200, "{said}");
    let mut statuses = BTreeMap::new();
    for _ in 0..20 {
        *statuses.entry(gate.status(Method::POST, "/x").await).or_insert(0) += 1;
    }
    assert_eq!(statuses, BTreeMap::from([(200, 10), (502, 10)]));
}

#[tokio::test]
async fn health_checks_take_a_server_out_and_bring_it_back() {
    let (one, two) = (
        Origin::start("one", Manner::Answers).await,
        Origin::start("two", Manner::Answers).await,
    );
    let upstreams = format!(
        "origin: {{servers: [\"{}\", \"{}\"], retries: 0, health: {{path: /healthz, every: 400ms, unhealthy_after: 2, healthy_after: 2}}}}",
        one.address, two.address,
    );
    let gate = GateAlone::start(&upstreams).await;
    let up = |origin: &Origin| {
        format!(
            "tollgate_upstream_up{{upstream=\"origin\",server=\"{}\"}}",
            origin.address
        )
    };
    gate.until_metric(&up(&one), 1.0).await;
    for manner in [
        Manner::Status(503),
        Manner::IsSilent,
        Manner::TalksGarbage,
        Manner::Closes,
    ] {
        one.behave_towards_checks(manner);
        gate.until_metric(&up(&one), 0.0).await;
        one.take_seen();
        for _ in 0..10 {
            assert_eq!(gate.status(Method::POST, "/x").await, 200);
        }
        assert_eq!(one.take_seen(), [""; 0], "{manner:?}: out");
        one.behave_towards_checks(Manner::Answers);
        gate.until_metric(&up(&one), 1.0).await;
        two.take_seen();
        for _ in 0..10 {
            assert_eq!(gate.status(Method::POST, "/x").await, 200);
        }
        assert_eq!(
            (one.take_seen().len(), two.take_seen().len()),
            (5, 5),
            "{manner:?}: back"
        );
    }
    // A killed one is found out too, and a reload forgets nothing of it.
    one.kill().await;
    gate.until_metric(&up(&one), 0.0).await;
    let (status, said) = gate.reload_with(&upstreams, "", "").await;
    assert_eq!(status, 200, "{said}");
    assert_eq!(gate.metrics().await.get(&up(&one)), Some(0.0));
    assert_eq!(gate.status(Method::POST, "/x").await, 200);
    // While all are out, requests are tried all the same: a check can be wrong.
    two.behave_towards_checks(Manner::Status(500));
    gate.until_metric(&up(&two), 0.0).await;
    let mut answered = 0;
    for _ in 0..10 {
        answered += usize::from(gate.status(Method::POST, "/x").await == 200);
    }
    assert_eq!(answered, 5, "the one of the two that lives");
    let status: serde_json::Value = gate
        .client
        .get(format!("{}/status", gate.admin))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let servers = status["gate"]["servers"].as_array().unwrap();
    assert!(
        servers.len() == 2 && servers.iter().all(|server| server["up"] == false),
        "{status}"
    );
    let log = gate.log();
    for line in [
        format!("{} is out after 2 failed", one.address),
        format!("{} is back after 2 successful", one.address),
    ] {
        assert!(log.contains(&line), "{line}:\n{log}");
    }
}

#[tokio::test]
async fn servers_are_asked_by_weight_in_turn_or_by_chance() {
    let (one, two) = (
        Origin::start("one", Manner::Answers).await,
        Origin::start("two", Manner::Answers).await,
    );
    let upstreams = |balance: &str| {
        format!(
            "origin: {{servers: [{{address: \"{}\", weight: 3}}, \"{}\"], balance: {balance}}}",
            one.address, two.address
        )
    };
    let gate = GateAlone::start(&upstreams("round_robin")).await;
    for _ in 0..80 {
        assert_eq!(gate.status(Method::GET, "/x").await, 200);
    }
    assert_eq!((one.take_seen().len(), two.take_seen().len()), (60, 20));
    let (status, said) = gate.reload_with(&upstreams("random"), "", "").await;
    assert_eq!(status, 200, "{said}");
    for _ in 0..200 {
        assert_eq!(gate.status(Method::GET, "/x").await, 200);
    }
    // Six standard deviations of a binomial with n = 200 and p = 3/4 are 37.
    let (one, two) = (one.take_seen().len(), two.take_seen().len());
    assert!(one + two == 200 && (113..=187).contains(&one), "{one} and {two}");
}

#[tokio::test]
async fn tls_to_an_upstream_is_verified_by_name_and_authority_and_shows_our_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let (authority, stranger) = (Authority::new("Ours"), Authority::new("Somebody"));
    authority.write(&dir.path().join("ca.crt"));
    stranger.write(&dir.path().join("stranger.crt"));
    let server = authority.issue(dir.path(), "server", &["api.internal", "127.0.0.1"]);
    authority.issue(dir.path(), "client", &["gate.internal"]);
    stranger.issue(dir.path(), "other", &["gate.internal"]);
    let plain = tls_upstream(server_config(&server, None, &["http/1.1"])).await;
    let mutual = tls_upstream(server_config(&server, Some(&authority), &["http/1.1"])).await;
    let cases = [
        ("named", plain, "sni: api.internal, ca: ca.crt", 200),
        ("address", plain, "ca: ca.crt", 200),
        ("wrong-name", plain, "sni: other.internal, ca: ca.crt", 502),
        ("wrong-authority", plain, "sni: api.internal, ca: stranger.crt", 502),
        ("system-authorities", plain, "sni: api.internal", 502),
        (
            "unverified",
            plain,
            "sni: other.internal, danger_skip_verify: true",
            200,
        ),
        (
            "mutual",
            mutual,
            "sni: api.internal, ca: ca.crt, cert: client.crt, key: client.key",
            200,
        ),
        ("mutual-without", mutual, "sni: api.internal, ca: ca.crt", 502),
        (
            "mutual-wrong",
            mutual,
            "sni: api.internal, ca: ca.crt, cert: other.crt, key: other.key",
            502,
        ),
    ];
    let upstreams =
        cases.map(|(name, address, tls, _)| format!("{name}: {{servers: [\"{address}\"], tls: {{{tls}}}}}"));
    let routes = cases.map(|(name, ..)| format!("  - {{name: {name}, match: {{path: /{name}}}, upstream: {name}}}\n"));
    let rest = format!(
        "routes:\n{}  - {{name: rest, match: {{path: \"/**\"}}, upstream: named}}\n",
        routes.concat()
    );
    let gate = GateAlone::start_in(dir, &upstreams.join(", "), "", &rest).await;
    // Twice, and all of them in between: what was verified for one is not reused for another.
    for (name, _, _, expected) in cases.iter().chain(&cases) {
        assert_eq!(
            gate.status(Method::GET, &format!("/{name}")).await,
            *expected,
            "{name}\n{}",
            gate.log()
        );
    }
    assert!(
        gate.log().contains("upstreams.unverified.tls.danger_skip_verify"),
        "{}",
        gate.log()
    );
    // Files that cannot be used refuse a reload, and change nothing.
    std::fs::write(gate.path().join("ca.crt"), "garbage").unwrap();
    let (status, said) = gate.reload_with(&upstreams.join(", "), "", &rest).await;
    assert!(status == 422 && said.contains("ca.crt"), "{status} {said}");
    assert_eq!(gate.status(Method::GET, "/named").await, 200);
}

#[tokio::test]
async fn http2_goes_to_upstreams_with_and_without_tls() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new("Ours");
    authority.write(&dir.path().join("ca.crt"));
    let server = authority.issue(dir.path(), "server", &["127.0.0.1"]);
    let both = tls_upstream(server_config(&server, None, &["h2", "http/1.1"])).await;
    let old = tls_upstream(server_config(&server, None, &["http/1.1"])).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let h2c = listener.local_addr().unwrap();
    // The body is read first: where an answer comes before it, the gate has to close the client's connection.
    let answer = |request: axum::extract::Request| async move {
        let version = request.version();
        let _ = axum::body::to_bytes(request.into_body(), 1000).await;
        format!("{version:?}")
    };
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(answer)).await });
    let upstreams = format!(
        "h2c: {{servers: [\"{h2c}\"], protocol: http2, health: {{path: /healthz, every: 400ms}}}}, \
         h2: {{servers: [\"{both}\"], protocol: http2, tls: {{ca: ca.crt}}, health: {{path: /healthz, every: 400ms}}}}, \
         old: {{servers: [\"{old}\"], protocol: http2, tls: {{ca: ca.crt}}}}, h1: {{servers: [\"{both}\"], tls: {{ca: ca.crt}}}}"
    );
    let routes = ["h2c", "h2", "old", "h1"]
        .map(|name| format!("  - {{name: {name}, match: {{path: /{name}}}, upstream: {name}}}\n"));
    let rest = format!(
        "routes:\n{}  - {{name: rest, match: {{path: \"/**\"}}, upstream: h2c}}\n",
        routes.concat()
    );
    let gate = GateAlone::start_in(dir, &upstreams, "", &rest).await;
    assert_eq!(gate.status(Method::GET, "/old").await, 502, "a server without HTTP/2");
    for (path, version) in [("/h2c", "HTTP/2.0"), ("/h2", "HTTP/2.0"), ("/h1", "HTTP/1.1")] {
        for method in [Method::GET, Method::POST] {
            let mut all = tokio::task::JoinSet::new();
            for _ in 0..8 {
                all.spawn(gate.request(method.clone(), path).body("a body").send());
            }
            while let Some(response) = all.join_next().await {
                let response = response.unwrap().unwrap();
                assert_eq!(response.status(), 200, "{method} {path}\n{}", gate.log());
                assert_eq!(response.text().await.unwrap(), version, "{method} {path}");
            }
        }
    }
    // HTTP/1.0 in front, HTTP/2 behind.
    let mut old = tokio::net::TcpStream::connect(gate.url.trim_start_matches("http://"))
        .await
        .unwrap();
    let request = format!("GET /h2c HTTP/1.0\r\nHost: x\r\nX-Api-Key: {}\r\n\r\n", gate.key);
    old.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, old.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    assert!(answer.contains(" 200 ") && answer.ends_with("HTTP/2.0"), "{answer}");
    // Checks speak the same protocol.
    for (upstream, address) in [("h2c", h2c), ("h2", both)] {
        let checks =
            format!("tollgate_upstream_health_checks_total{{upstream=\"{upstream}\",server=\"{address}\",result=");
        let deadline = Instant::now() + PATIENCE;
        while gate.metrics().await.get(&format!("{checks}\"success\"}}")).unwrap() < 2.0 {
            assert!(Instant::now() < deadline, "{upstream}: {}", gate.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn what_the_upstream_takes_and_our_own_overhead_are_two_things() {
    let origin = Origin::start("origin", Manner::Answers).await;
    let gate = GateAlone::start(&format!(
        "origin: {{servers: [\"{}\"], timeouts: {{read: 900ms}}}}",
        origin.address
    ))
    .await;
    let sum = |metrics: &Samples, part: &str| metrics.get(&format!("tollgate_{part}_seconds_sum")).unwrap();
    let count = |metrics: &Samples, part: &str| metrics.get(&format!("tollgate_{part}_seconds_count")).unwrap();
    // Counted when the response is through, which may be just after it has come.
    let settled = async |overhead: f64| {
        gate.until_metric("tollgate_overhead_seconds_count", overhead).await;
        gate.metrics().await
    };
    origin.behave(Manner::Delays(Duration::from_millis(700)));
    assert_eq!(gate.status(Method::GET, "/x").await, 200);
    let slow = settled(1.0).await;
    assert!(
        sum(&slow, "upstream") >= 0.7 && sum(&slow, "overhead") < sum(&slow, "upstream"),
        "{slow:?}"
    );
    assert_eq!((count(&slow, "upstream"), count(&slow, "decision")), (1.0, 1.0));
    // A timeout is the upstream's time, not ours.
    origin.behave(Manner::IsSilent);
    assert_eq!(gate.status(Method::GET, "/x").await, 504);
    let silent = settled(2.0).await;
    assert!(sum(&silent, "upstream") - sum(&slow, "upstream") >= 0.9, "{silent:?}");
    assert!(sum(&silent, "overhead") - sum(&slow, "overhead") < 0.9, "{silent:?}");
    // A refusal is ours alone.
    let refused = gate.client.get(format!("{}/x", gate.url)).send().await.unwrap();
    assert_eq!(refused.status(), 401);
    let refused = settled(3.0).await;
    assert!(sum(&refused, "overhead") > sum(&silent, "overhead"));
    assert_eq!(
        (sum(&refused, "upstream"), count(&refused, "upstream")),
        (sum(&silent, "upstream"), 2.0)
    );
    assert_eq!(count(&refused, "decision"), 2.0);
}
