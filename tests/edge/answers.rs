//! Whatever an upstream answers, the client gets what it means, and the connection goes on where it can.

use std::fmt::Write as _;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tollgate::proxy::edge::EdgeSettings;

use crate::harness::{Door, PATIENCE, find, header};
use crate::ways::{Way, over_both_ways};

over_both_ways!(
    what_an_upstream_answers_reaches_the_client,
    the_last_answer_on_a_connection_says_so_whatever_it_is,
    an_answer_may_have_many_fields
);

/// Name, answer, whether the upstream closes after it, and what the client gets: each answer with its body, that of a
/// probe behind it included.
const ANSWERS: [(&str, &str, bool, &str); 23] = [
    (
        "plain",
        "HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        false,
        "200 ok, 200 probed",
    ),
    (
        "closes after it",
        "HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        true,
        "200 ok, 200 probed",
    ),
    (
        "says close",
        "HTTP/1.1 200 OK\nConnection: close\nContent-Length: 2\n\nok",
        true,
        "200 ok, 200 probed",
    ),
    ("closes without a word", "", true, "502"),
    ("half a head", "HTTP/1.1 200 OK\nContent-", true, "502"),
    ("half a status line", "HTT", true, "502"),
    ("garbage", "\u{1}\u{2} what?\n\n", true, "502"),
    ("another protocol", "SSH-2.0-OpenSSH_9.9\n", true, "502"),
    (
        "half a body",
        "HTTP/1.1 200 OK\nContent-Length: 20\n\nten bytes.",
        true,
        "200 ten bytes.<cut>",
    ),
    (
        "no body of one announced",
        "HTTP/1.1 200 OK\nContent-Length: 20\n\n",
        true,
        "200 <cut>",
    ),
    (
        "half a chunk",
        "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n14\nten bytes.",
        true,
        "200 ten bytes.<cut>",
    ),
    (
        "no last chunk",
        "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n",
        true,
        "200 ok<cut>",
    ),
    (
        "more than it said",
        "HTTP/1.1 200 OK\nContent-Length: 2\n\nok and more",
        false,
        "200 ok, 200 probed",
    ),
    (
        "100 before it",
        "HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        false,
        "100, 200 ok, 200 probed",
    ),
    (
        "103 before it",
        "HTTP/1.1 103 Early Hints\nLink: </a>\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        false,
        "103, 200 ok, 200 probed",
    ),
    (
        "two before it",
        "HTTP/1.1 103 Early Hints\n\nHTTP/1.1 103 Early Hints\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        false,
        "103, 103, 200 ok, 200 probed",
    ),
    ("204", "HTTP/1.1 204 No Content\n\n", false, "204, 200 probed"),
    (
        "304",
        "HTTP/1.1 304 Not Modified\nETag: \"1\"\n\n",
        false,
        "304, 200 probed",
    ),
    (
        "304 with a length",
        "HTTP/1.1 304 Not Modified\nContent-Length: 1000\n\n",
        false,
        "304, 200 probed",
    ),
    ("until the end", "HTTP/1.1 200 OK\n\nok", true, "200 ok, 200 probed"),
    (
        "HTTP/1.0 until the end",
        "HTTP/1.0 200 OK\n\nok",
        true,
        "200 ok, 200 probed",
    ),
    (
        "chunks with a trailer",
        "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n3\nyes\n0\nX-Sum: 1\n\n",
        false,
        "200 okyes, 200 probed",
    ),
    (
        "no chunk",
        "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n0\n\n",
        false,
        "200 , 200 probed",
    ),
];

async fn what_an_upstream_answers_reaches_the_client(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    let mut wrong = Vec::new();
    for (name, answer, closes, expected) in ANSWERS {
        door.forward_to(answering(answer.replace('\n', "\r\n"), closes).await);
        let got = read_all(&exchange(&door, "").await);
        if got != expected {
            wrong.push(format!("{name}: {got} for {expected}"));
        }
    }
    assert!(wrong.is_empty(), "{way}:\n{}", wrong.join("\n"));
}

/// Because the client wants it so, because the connection may carry no more, because the process is about to end.
async fn the_last_answer_on_a_connection_says_so_whatever_it_is(way: Way) {
    let settings = |requests_per_connection| EdgeSettings {
        requests_per_connection,
        ..EdgeSettings::default()
    };
    let mut wrong = Vec::new();
    for (why, most, fields, is_leaving) in [
        ("the client's wish", None, "Connection: close\r\n", false),
        ("the limit", Some(1), "", false),
        ("shutdown", None, "", true),
    ] {
        let door = Door::open(way, settings(most), None).await;
        door.shutdown.send(is_leaving).unwrap();
        for (name, answer, closes, expected) in ANSWERS {
            door.forward_to(answering(answer.replace('\n', "\r\n"), closes).await);
            let came = exchange(&door, fields).await;
            let got = read_all(&came);
            let text = String::from_utf8_lossy(&came).to_ascii_lowercase();
            let says_so = text.matches("\r\nconnection: close\r\n").count() == 1;
            if got != expected.trim_end_matches(PROBED) || !says_so || text.contains("keep-alive") {
                wrong.push(format!("{name}, {why}: {got} in {}", text.escape_default()));
            }
        }
    }
    assert!(wrong.is_empty(), "{way}:\n{}", wrong.join("\n"));
}

const PROBED: &str = ", 200 probed";

/// 64 are what a plain answer has room for, its length among them.
async fn an_answer_may_have_many_fields(way: Way) {
    let door = Door::open(way, EdgeSettings::default(), None).await;
    for count in [63, 64, 65, 150] {
        let fields: String = (1..count).map(|n| format!("X-{n}: {n}\r\n")).collect();
        let answer = format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 2\r\n\r\nok");
        door.forward_to(answering(answer, false).await);
        let came = exchange(&door, "").await;
        assert_eq!(read_all(&came), "200 ok, 200 probed", "{count} fields {way}");
        let text = String::from_utf8_lossy(&came).to_ascii_lowercase();
        for n in 1..count {
            let field = format!("\r\nx-{n}: {n}\r\n");
            assert_eq!(text.matches(&field).count(), 1, "{count} fields {way}: {text}");
        }
    }
}

/// An upstream that answers so, and a probe always alike. Returns its port.
async fn answering(answer: String, closes: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer_on(stream, answer.clone(), closes));
        }
    });
    port
}

async fn answer_on(mut stream: TcpStream, answer: String, closes: bool) {
    let mut asked = Vec::new();
    while let Ok(1..) = stream.read_buf(&mut asked).await {
        if !asked.ends_with(b"\r\n\r\n") {
            continue;
        }
        let is_probe = asked.starts_with(b"GET /probe");
        asked.clear();
        let answer = match is_probe {
            true => "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nprobed",
            false => &answer,
        };
        if stream.write_all(answer.as_bytes()).await.is_err() || (closes && !is_probe) {
            return;
        }
    }
}

/// All that comes for a request with these fields, and for a probe right behind it.
async fn exchange(door: &Door, fields: &str) -> Vec<u8> {
    let mut client = door.connect().await;
    let both = format!("GET /asked HTTP/1.1\r\nHost: a\r\n{fields}\r\nGET /probe HTTP/1.1\r\nHost: a\r\n\r\n");
    client.write_all(both.as_bytes()).await.unwrap();
    let mut came = Vec::new();
    let whole = async { while !came.ends_with(b"probed") && matches!(client.read_buf(&mut came).await, Ok(1..)) {} };
    let in_time = tokio::time::timeout(PATIENCE, whole).await;
    assert!(in_time.is_ok(), "neither answered nor closed: {}", came.escape_ascii());
    came
}

/// The answers in these bytes: each with its status and its body; that of an error is ours and left out.
fn read_all(bytes: &[u8]) -> String {
    let mut answers: Vec<String> = Vec::new();
    let mut rest = bytes;
    while let Some(end) = find(rest, b"\r\n\r\n") {
        let head = String::from_utf8_lossy(&rest[..end + 4]).to_ascii_lowercase();
        rest = &rest[end + 4..];
        let status: u16 = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .expect("a status");
        let mut answer = status.to_string();
        if !matches!(status, 100..200 | 204 | 304) {
            let (body, behind) = match header(&head, "transfer-encoding") {
                Some(_) => chunked_body(rest),
                None => sized_body(
                    rest,
                    header(&head, "content-length").map_or(0, |length| length.parse().unwrap()),
                ),
            };
            rest = behind;
            if status < 500 {
                write!(answer, " {body}").unwrap();
            }
        }
        answers.push(answer);
    }
    assert!(rest.is_empty(), "{}", bytes.escape_ascii());
    answers.join(", ")
}

fn sized_body(rest: &[u8], length: usize) -> (String, &[u8]) {
    let (body, behind) = rest.split_at(length.min(rest.len()));
    let cut = if body.len() < length { "<cut>" } else { "" };
    (String::from_utf8_lossy(body).into_owned() + cut, behind)
}

fn chunked_body(mut rest: &[u8]) -> (String, &[u8]) {
    let mut body = String::new();
    while let Some(line) = find(rest, b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).expect("a chunk's size");
        let (data, behind) = rest[line + 2..].split_at(size.min(rest.len() - line - 2));
        body += &String::from_utf8_lossy(data);
        if size == 0 {
            let end = find(behind, b"\r\n").expect("an end, and no trailers") + 2;
            return (body, &behind[end..]);
        }
        rest = behind.strip_prefix(b"\r\n").unwrap_or_default();
    }
    (body + "<cut>", &[])
}
