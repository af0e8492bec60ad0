//! Keep-alive, pipelining, bodies and upgrades over HTTP/1.1.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tollgate::proxy::edge::EdgeSettings;

use crate::harness::{Door, Reader};
use crate::ways::{Way, over_both_ways, went_directly};

over_both_ways!(
    a_connection_serves_many_requests,
    every_pipelined_head_is_checked,
    a_request_may_come_in_any_pieces,
    a_malformed_chunk_ends_both_sides,
    an_early_answer_reaches_a_client_that_is_still_sending,
    shutdown_answers_what_is_on_its_way_and_closes_what_is_idle
);

const GET: &[u8] = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n";

async fn a_connection_serves_many_requests(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    for i in 0..50 {
        let body = "x".repeat(i * 37);
        let request = format!(
            "POST /{i} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        client.send(request.as_bytes()).await;
        let response = client.response().await.unwrap();
        assert_eq!((response.status, &*response.body), (200, &b"ok"[..]));
        let seen = &upstream.seen()[i];
        assert_eq!(went_directly(seen), way == Way::Direct, "{seen}");
        let sent = request.as_bytes().escape_ascii().to_string();
        assert_eq!(way.comparable(seen), way.comparable(&sent));
    }
    assert_eq!(door.observed.open.load(Ordering::SeqCst), 1);
}

async fn every_pipelined_head_is_checked(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    let mut requests = Vec::new();
    for i in 0..3 {
        requests.extend(format!("POST /{i} HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc").into_bytes());
    }
    requests.extend(b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n");
    requests.extend(b"GET /bad HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n");
    requests.extend(GET);
    client.send(&requests).await;
    for _ in 0..4 {
        assert_eq!(client.response().await.unwrap().status, 200);
    }
    assert_eq!(client.response().await.unwrap().status, 400);
    assert!(client.is_closed().await);
    assert_eq!(upstream.seen().len(), 4);
}

async fn a_request_may_come_in_any_pieces(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let request =
        b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n1;x\r\n!\r\n0\r\nT: v\r\n\r\n";
    let mut client = Reader::new(door.connect().await);
    for piece in [1, 2, 7, 1000] {
        for part in request.chunks(piece) {
            client.send(part).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(client.response().await.unwrap().status, 200, "pieces of {piece}");
    }
    for seen in upstream.seen() {
        assert!(
            seen.ends_with("0\\r\\n\\r\\n") && !seen.contains(";x") && !seen.contains("T: v"),
            "{seen}"
        );
    }
    assert_eq!(upstream.seen().len(), 4);
}

async fn a_malformed_chunk_ends_both_sides(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    client
        .send(b"POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.send(b"5\nhello\r\n0\r\n\r\n").await;
    assert_eq!(client.response().await.unwrap().status, 400);
    assert!(client.is_closed().await);
    let seen = upstream.seen();
    assert!(
        seen.len() == 1 && !seen[0].contains("0\\r\\n\\r\\n"),
        "the upstream must not take it for whole: {seen:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_is_a_tunnel_where_it_is_allowed() {
    let door = Door::open(Way::Pingora, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let upgrade = |path: &str| {
        format!(
            "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
        )
    };
    // Pingora 0.9.1 ends a tunnel at once when it reads the upstream's 101 before it has noticed the end of the request's
    // (empty) body; which comes first is chance.
    let mut tries = 0;
    let mut client = loop {
        let mut client = Reader::new(door.connect().await);
        client.send(upgrade("/ws").as_bytes()).await;
        assert_eq!(client.response().await.unwrap().status, 101);
        // What would be a refused head is just bytes now.
        client.send(b"GET / HTTP/1.1\nTRACE \0").await;
        let mut echoed = Vec::new();
        while echoed.len() < 22 {
            use tokio::io::AsyncReadExt;
            if client.stream.read_buf(&mut echoed).await.unwrap_or(0) == 0 {
                break;
            }
        }
        if !echoed.is_empty() {
            assert_eq!(echoed, b"GET / HTTP/1.1\nTRACE \0");
            break client;
        }
        tries += 1;
        assert!(tries < 10, "no tunnel");
    };
    door.revoked.store(1, Ordering::SeqCst);
    let started = std::time::Instant::now();
    assert!(client.is_closed().await);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());

    let mut client = Reader::new(door.connect().await);
    client.send(upgrade("/plain").as_bytes()).await;
    assert_eq!(client.response().await.unwrap().status, 200);
    let seen = upstream.seen();
    assert!(!seen.last().unwrap().to_lowercase().contains("upgrade"), "{seen:?}");
}

async fn an_early_answer_reaches_a_client_that_is_still_sending(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let _upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    // Of a request that goes directly nothing is sent before its body is whole: only a longer one can be answered early.
    let length = match way {
        Way::Pingora => 10,
        Way::Direct => 16 * 1024 + 1,
    };
    client
        .send(format!("POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n123").as_bytes())
        .await;
    let response = client.response().await.unwrap();
    assert_eq!((response.status, &*response.body), (200, &b"early"[..]));
}

async fn shutdown_answers_what_is_on_its_way_and_closes_what_is_idle(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let _upstream = door.upstream().await;
    let mut idle = Reader::new(door.connect().await);
    let mut busy = Reader::new(door.connect().await);
    let mut late = Reader::new(door.connect().await);
    for client in [&mut idle, &mut late] {
        client.send(GET).await;
        assert_eq!(client.response().await.unwrap().status, 200);
    }
    busy.send(b"GET /delay/400 HTTP/1.1\r\nHost: a\r\n\r\n").await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(door.activity.requests(), 1);
    door.shutdown.send(true).unwrap();
    late.send(GET).await;
    let response = late.response().await.unwrap();
    assert!(
        response.status == 200 && response.head.contains("Connection: close"),
        "{}",
        response.head
    );
    assert!(idle.is_closed().await);
    assert_eq!(busy.response().await.unwrap().status, 200);
    assert!(busy.is_closed().await);
    assert_eq!(door.activity.requests(), 0);
}
