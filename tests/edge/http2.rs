//! HTTP/2, by preface: bodies, bounds and floods.

use std::time::{Duration, Instant};

use tollgate::proxy::edge::EdgeSettings;

use crate::h2raw::*;
use crate::harness::{Door, Reader};
use crate::ways::Way;

fn settings() -> EdgeSettings {
    EdgeSettings {
        h2c: true,
        ..EdgeSettings::default()
    }
}

async fn door(settings: EdgeSettings) -> (Door, crate::harness::Upstream) {
    let door = Door::open(Way::Pingora, settings, None).await;
    let upstream = door.upstream().await;
    (door, upstream)
}

fn post(path: &'static str) -> Vec<(&'static str, &'static str)> {
    vec![
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "a"),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_share_a_connection() {
    let (door, upstream) = door(settings()).await;
    let mut h2 = H2::start(door.connect().await).await;
    for i in 0..20 {
        let stream = i * 2 + 1;
        h2.request(stream, &post("/a"), Some(b"hello")).await;
        assert_eq!(
            h2.outcome(stream).await,
            Outcome::Response {
                status: 200,
                body: b"ok".to_vec()
            }
        );
    }
    assert_eq!(upstream.seen().len(), 20);
    // And HTTP/1.1 is spoken on the same port.
    let mut client = Reader::new(door.connect().await);
    client.send(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.response().await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_ends_in_an_empty_frame_has_one_last_chunk() {
    let (door, upstream) = door(settings()).await;
    let mut h2 = H2::start(door.connect().await).await;
    for i in 0..10 {
        let stream = i * 2 + 1;
        let mut bytes = frame(HEADERS, END_HEADERS, stream, &block(&post("/a")));
        bytes.extend(frame(DATA, 0, stream, b"hello"));
        h2.send(&bytes).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        h2.send(&frame(DATA, END_STREAM, stream, b"")).await;
        assert_eq!(
            h2.outcome(stream).await,
            Outcome::Response {
                status: 200,
                body: b"ok".to_vec()
            }
        );
    }
    let seen = upstream.seen();
    assert_eq!(seen.len(), 10, "{seen:?}");
    for message in seen {
        assert_eq!(message.matches("0\\r\\n\\r\\n").count(), 1, "{message}");
        assert!(message.starts_with("POST /a HTTP/1.1"), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partial_frame_is_closed_at_the_deadline() {
    let limits = EdgeSettings {
        head_deadline: Duration::from_millis(300),
        ..settings()
    };
    let (door, _upstream) = door(limits).await;
    let block = frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(GET));
    let open_block = frame(HEADERS, END_STREAM, 1, &crate::h2raw::block(GET));
    for start in [&block[..5], &block[..20], &open_block[..]] {
        let mut h2 = H2::start(door.connect().await).await;
        let started = Instant::now();
        h2.send(start).await;
        while h2.next_frame().await.is_some() {}
        let took = started.elapsed();
        assert!(
            took > Duration::from_millis(250) && took < Duration::from_millis(2500),
            "{took:?}"
        );
    }
    // Nothing at all, and half a preface.
    for start in [&b""[..], b"PRI * HTTP/2.0\r\n"] {
        let mut client = Reader::new(door.connect().await);
        client.send(start).await;
        assert!(client.is_closed().await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_body_is_ended_and_an_idle_connection_is_not() {
    let limits = EdgeSettings {
        body_grace: Duration::from_millis(300),
        ..settings()
    };
    let (door, upstream) = door(limits).await;
    let mut h2 = H2::start(door.connect().await).await;
    h2.request(1, GET, None).await;
    assert!(matches!(h2.outcome(1).await, Outcome::Response { status: 200, .. }));
    tokio::time::sleep(Duration::from_millis(700)).await;
    h2.request(3, GET, None).await;
    assert!(
        matches!(h2.outcome(3).await, Outcome::Response { status: 200, .. }),
        "idle is not slow"
    );
    let started = Instant::now();
    h2.send(&frame(HEADERS, END_HEADERS, 5, &block(&post("/a")))).await;
    h2.send(&frame(DATA, 0, 5, b"x")).await;
    assert!(matches!(
        h2.outcome(5).await,
        Outcome::Closed | Outcome::Goaway(_) | Outcome::Reset(_)
    ));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(upstream.seen().len() <= 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_upstream_is_not_the_clients_fault() {
    let limits = EdgeSettings {
        body_grace: Duration::from_millis(200),
        ..settings()
    };
    let (door, _upstream) = door(limits).await;
    let mut h2 = H2::start(door.connect().await).await;
    h2.request(
        1,
        &[
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/delay/900"),
            (":authority", "a"),
        ],
        Some(b"x"),
    )
    .await;
    assert!(matches!(h2.outcome(1).await, Outcome::Response { status: 200, .. }));
    // HTTP/1.1 likewise.
    let mut client = Reader::new(door.connect().await);
    client
        .send(b"POST /delay/900 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
        .await;
    assert_eq!(client.response().await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_says_goaway_is_still_answered() {
    let (door, _upstream) = door(settings()).await;
    let mut h2 = H2::start(door.connect().await).await;
    // NO_ERROR, and a code that nobody knows.
    for (stream, code) in [(1, 0u32), (3, 0xff)] {
        h2.send(&frame(GOAWAY, 0, 0, &[0u32.to_be_bytes(), code.to_be_bytes()].concat()))
            .await;
        // Long enough to be read by itself.
        tokio::time::sleep(Duration::from_millis(50)).await;
        h2.request(stream, GET, None).await;
        assert!(matches!(
            h2.outcome(stream).await,
            Outcome::Response { status: 200, .. }
        ));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_close_the_connection() {
    let (door, upstream) = door(settings()).await;
    let mut resets = H2::start(door.connect().await).await;
    let mut bytes = Vec::new();
    for i in 0..3000u32 {
        bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, i * 2 + 1, &block(GET)));
        bytes.extend(frame(RST_STREAM, 0, i * 2 + 1, &8u32.to_be_bytes()));
    }
    resets.send(&bytes).await;
    while resets.next_frame().await.is_some() {}
    assert!(upstream.seen().len() <= 1001, "{}", upstream.seen().len());

    let mut pings = H2::start(door.connect().await).await;
    pings.send(&frame(PING, 0, 0, &[0; 8]).repeat(5000)).await;
    let mut answered = 0;
    while pings.next_frame().await.is_some() {
        answered += 1;
    }
    assert!(answered < 2000, "{answered}");

    let mut empty = H2::start(door.connect().await).await;
    empty.send(&frame(HEADERS, END_HEADERS, 1, &block(&post("/a")))).await;
    empty.send(&frame(DATA, 0, 1, b"").repeat(5000)).await;
    while empty.next_frame().await.is_some() {}

    let mut continuations = H2::start(door.connect().await).await;
    continuations.send(&frame(HEADERS, END_STREAM, 1, &block(GET))).await;
    continuations
        .send(&frame(CONTINUATION, 0, 1, &block(&[("a", "b")])).repeat(20_000))
        .await;
    while continuations.next_frame().await.is_some() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_beyond_the_limit_are_refused() {
    let mut limits = settings();
    limits.http2.concurrent_streams = 10;
    let (door, _upstream) = door(limits).await;
    let mut h2 = H2::start(door.connect().await).await;
    h2.next_frame().await.expect("the server's settings");
    h2.send(&frame(SETTINGS, 1, 0, &[])).await;
    for i in 0..11 {
        h2.request(
            i * 2 + 1,
            &[
                (":method", "GET"),
                (":scheme", "http"),
                (":path", "/delay/500"),
                (":authority", "a"),
            ],
            None,
        )
        .await;
    }
    assert_eq!(h2.outcome(21).await, Outcome::Reset(7), "REFUSED_STREAM");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_finishes_streams_and_says_goaway() {
    let (door, _upstream) = door(settings()).await;
    let mut h2 = H2::start(door.connect().await).await;
    h2.request(
        1,
        &[
            (":method", "GET"),
            (":scheme", "http"),
            (":path", "/delay/400"),
            (":authority", "a"),
        ],
        None,
    )
    .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    door.shutdown.send(true).unwrap();
    let (mut goaways, mut answered) = (0, false);
    while let Some((kind, flags, stream, payload)) = h2.next_frame().await {
        match kind {
            GOAWAY => goaways += 1,
            PING if flags & 1 == 0 => h2.send(&frame(PING, 1, 0, &payload)).await,
            DATA if stream == 1 && flags & END_STREAM != 0 => answered = true,
            _ => {}
        }
    }
    assert!(goaways >= 1 && answered, "{goaways} {answered}");
}
