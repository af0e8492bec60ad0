//! Several requests on one connection, some of which go directly and some not; and exchanges that end early.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tollgate::proxy::edge::EdgeSettings;

use crate::harness::{Door, Reader, Upstream};
use crate::ways::{Way, over_both_ways, went_directly};

over_both_ways!(
    short_and_long_bodies_arrive,
    a_client_that_closes_its_side_is_gone,
    a_connection_carries_no_more_requests_than_it_may,
    shutdown_lets_either_body_come_to_its_end
);

/// A request, the status of its answer, and whether it arrives directly, if at all.
struct Step {
    sent: String,
    status: u16,
    arrives_directly: Option<bool>,
}

impl Step {
    fn new(status: u16, arrives_directly: Option<bool>, line: &str, fields: &str, body: &str) -> Self {
        Step {
            sent: format!("{line} HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}"),
            status,
            arrives_directly,
        }
    }

    fn path(&self) -> &str {
        self.sent.split(' ').nth(1).unwrap()
    }

    async fn is_answered_on(&self, client: &mut Reader<tokio::net::TcpStream>) {
        let is_head = self.sent.starts_with("HEAD ");
        let response = match is_head {
            true => client.response_to_head().await,
            false => client.response().await,
        };
        let response = response.unwrap_or_else(|| panic!("no answer to {}", self.sent));
        assert_eq!(response.status, self.status, "{}", self.sent);
        assert!(
            response.head.contains("Connection: keep-alive\r\n"),
            "{}",
            response.head
        );
        if self.status == 200 && !is_head {
            assert_eq!(response.body, self.path().as_bytes(), "{}", self.sent);
        }
    }
}

/// Refused ones, plain ones, and such as go Pingora's way, so that each kind follows each other.
fn steps() -> Vec<Step> {
    let (directly, by_pingora) = (Some(true), Some(false));
    let kinds = [
        Step::new(401, None, "GET /keyed/1", "", ""),
        Step::new(200, directly, "GET /echo/2", "", ""),
        Step::new(200, by_pingora, "GET /echo/3", "TE: trailers\r\n", ""),
        Step::new(200, by_pingora, "HEAD /echo/4", "", ""),
        Step::new(
            200,
            by_pingora,
            "POST /echo/5",
            "Transfer-Encoding: chunked\r\n",
            "5\r\nhello\r\n0\r\n\r\n",
        ),
        Step::new(401, None, "POST /keyed/6", "Content-Length: 5\r\n", "hello"),
        Step::new(
            401,
            None,
            "POST /keyed/7",
            "Transfer-Encoding: chunked\r\n",
            "5\r\nhello\r\n0\r\n\r\n",
        ),
        Step::new(200, directly, "POST /echo/8", "Content-Length: 5\r\n", "hello"),
        Step::new(401, None, "HEAD /keyed/9", "", ""),
    ];
    let again = |kind: &Step| Step {
        sent: kind.sent.clone(),
        ..*kind
    };
    let pairs = kinds
        .iter()
        .flat_map(|one| kinds.iter().flat_map(move |other| [again(one), again(other)]));
    pairs.collect()
}

fn assert_arrived(upstream: &Upstream, steps: &[Step]) {
    let seen: Vec<_> = upstream.seen().iter().map(|message| arrived(message)).collect();
    let expected: Vec<_> = steps
        .iter()
        .filter_map(|step| Some((step.path().to_owned(), step.arrives_directly?)))
        .collect();
    assert_eq!(seen, expected);
}

fn arrived(message: &str) -> (String, bool) {
    let path = message.split(' ').nth(1).unwrap_or_default();
    (path.to_owned(), went_directly(message))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_kind_of_request_follows_any_other() {
    let door = Door::open(Way::Direct, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    let steps = steps();
    for step in &steps {
        client.send(step.sent.as_bytes()).await;
        step.is_answered_on(&mut client).await;
    }
    assert_arrived(&upstream, &steps);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_kind_of_request_is_pipelined_behind_any_other() {
    let door = Door::open(Way::Direct, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    let steps = steps();
    let all: String = steps.iter().map(|step| step.sent.as_str()).collect();
    client.send(all.as_bytes()).await;
    for step in &steps {
        step.is_answered_on(&mut client).await;
    }
    assert_arrived(&upstream, &steps);
}

/// 16 KiB are the longest body that goes directly, and 32 fields the most.
async fn short_and_long_bodies_arrive(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let mut client = Reader::new(door.connect().await);
    let mut arrived = 0;
    let mut check = async |fields: String, body: &str, is_plain: bool| {
        let sent = format!(
            "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n{fields}\r\n{body}",
            body.len()
        );
        // In two pieces: the end of a body that goes directly is waited for.
        let (one, two) = sent.as_bytes().split_at(sent.len() - 1);
        client.send(one).await;
        tokio::task::yield_now().await;
        client.send(two).await;
        assert_eq!(client.response().await.expect("an answer").status, 200);
        let seen = &upstream.seen()[arrived];
        assert_eq!(
            went_directly(seen),
            is_plain && way == Way::Direct,
            "{way}: {} bytes",
            body.len()
        );
        let sent = sent.as_bytes().escape_ascii().to_string();
        assert_eq!(way.comparable(seen), way.comparable(&sent), "{way}");
        arrived += 1;
    };
    for (length, is_plain) in [(16_383, true), (16_384, true), (16_385, false), (100_000, false)] {
        check(String::new(), &"x".repeat(length), is_plain).await;
    }
    for (fields, is_plain) in [(31, true), (32, true), (33, false)] {
        let own: String = (2..fields).map(|n| format!("X-{n}: {n}\r\n")).collect();
        check(own, "hello", is_plain).await;
    }
}

/// It may have left for good: nothing is done for it any more.
async fn a_client_that_closes_its_side_is_gone(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    for (sent, arrives) in [
        ("GET /never HTTP/1.1\r\nHost: a\r\n\r\n", true),
        ("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf ", false),
        (
            "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 20000\r\n\r\nhalf ",
            false,
        ),
    ] {
        let before = upstream.seen().len();
        let mut client = Reader::new(door.connect().await);
        client.send(sent.as_bytes()).await;
        if arrives {
            until(|| upstream.seen().len() > before).await;
        }
        client.stream.shutdown().await.unwrap();
        assert!(client.response().await.is_none(), "{way}: {sent}");
        until(|| door.slots.open() == 0).await;
        // The upstream may notice a little later that a body does not go on.
        let are_cut = |seen: &[String]| seen.iter().all(|message| message.ends_with("<cut>"));
        until(|| arrives || are_cut(&upstream.seen()[before..])).await;
    }
    assert_eq!(door.activity.requests(), 0);
}

async fn a_connection_carries_no_more_requests_than_it_may(way: Way) {
    for most in [1, 2, 3] {
        let settings = EdgeSettings {
            requests_per_connection: Some(most),
            ..EdgeSettings::default()
        };
        let door = Door::open(way, settings, None).await;
        let upstream = door.upstream().await;
        let is_answered = async |client: &mut Reader<_>, nth: u32| {
            let response = client.response().await.expect("an answer");
            assert_eq!(response.status, 200);
            let connection = if nth == most { "close" } else { "keep-alive" };
            let told = format!("Connection: {connection}\r\n");
            assert!(
                response.head.contains(&told),
                "{way}, {nth} of {most}: {}",
                response.head
            );
        };
        let post = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi";
        let mut client = Reader::new(door.connect().await);
        for nth in 1..=most {
            client.send(post).await;
            is_answered(&mut client, nth).await;
        }
        assert!(client.is_closed().await, "{way}, {most}");
        // One too many, at once with the others.
        let mut client = Reader::new(door.connect().await);
        client.send(&post.repeat(most as usize + 1)).await;
        for nth in 1..=most {
            is_answered(&mut client, nth).await;
        }
        assert!(client.is_closed().await, "{way}, {most}");
        assert_eq!(upstream.seen().len(), 2 * most as usize);
    }
}

async fn shutdown_lets_either_body_come_to_its_end(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    let mut sending = Reader::new(door.connect().await);
    let mut taking = Reader::new(door.connect().await);
    sending
        .send(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf ")
        .await;
    taking.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n").await;
    // 16 MiB do not fit into what is between, so that its answer is under way until it is read.
    until(|| door.activity.requests() == 2 && upstream.seen().iter().any(|message| message.contains("/big"))).await;
    door.shutdown.send(true).unwrap();
    tokio::time::sleep(2 * EdgeSettings::default().shutdown_linger).await;
    assert_eq!(door.activity.requests(), 2, "{way}");
    sending.send(b"whole").await;
    assert_eq!(sending.response().await.expect("an answer").status, 200, "{way}");
    assert!(sending.is_closed().await, "{way}");
    let taken = taking.response().await.expect("an answer");
    assert_eq!((taken.status, taken.body.len()), (200, 16 << 20), "{way}");
    assert!(taking.is_closed().await, "{way}");
    until(|| door.activity.requests() == 0).await;
}

async fn until(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + crate::harness::PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in time");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
