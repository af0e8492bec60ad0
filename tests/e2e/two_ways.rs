//! Requests with a short body or none take a direct way to their upstream, all others Pingora's. Whatever an upstream
//! answers, neither it nor the client can tell which one it was.

use crate::alone::GateAlone;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// An upstream's answer, in the pieces in which it is written.
struct Answer {
    pieces: Vec<Vec<u8>>,
    /// Closes after it.
    closes: bool,
}

/// A field that goes no further, and that only Pingora's way takes off.
const PINGORAS_WAY: &str = "TE: trailers\r\n";
const DIRECT_WAY: &str = "";

/// Request line, fields and body.
type Request = (&'static str, &'static str, &'static str);

const REQUESTS: [Request; 3] = [
    (
        "GET /asked?a=b%20c",
        "Connection: keep-alive\r\nCookie: a\r\nX-Forwarded-For: 192.0.2.1\r\n",
        "",
    ),
    (
        "POST /asked",
        "Content-Type: text/plain\r\nContent-Length: 5\r\nX_Tollgate_Tier: mine\r\n",
        "hello",
    ),
    (
        "DELETE /asked/1",
        "Content-Length: 0\r\nAuthorization: Basic eDp5\r\n",
        "",
    ),
];

/// All that can be seen of one exchange from outside, and of a probe on the same connection behind it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// What came to the upstream, and on which of its connections.
    upstream: Vec<(usize, String)>,
    /// What came to the client, until the probe was answered or the connection ended.
    client: String,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_an_upstream_answers_both_ways_pass_it_on_alike() {
    let upstream = Scripted::start().await;
    let settings = format!(
        "origin: {{servers: [\"{}\"], timeouts: {{read: 5s}}}}",
        upstream.address
    );
    let gate = GateAlone::start(&settings).await;
    let mut kept = 0;
    for ((name, text, closes), request) in answers().into_iter().zip(REQUESTS.into_iter().cycle()) {
        // Each `|` ends a piece.
        let pieces = text.split(|byte| *byte == b'|').map(<[u8]>::to_vec).collect();
        let answer = Arc::new(Answer { pieces, closes });
        let direct = exchange(&gate, &upstream, answer.clone(), request, DIRECT_WAY).await;
        let pingoras = exchange(&gate, &upstream, answer, request, PINGORAS_WAY).await;
        assert_eq!(direct, pingoras, "{name}");
        if name.starts_with("101") {
            assert!(direct.client.starts_with("HTTP/1.1 502 "), "{}", direct.client);
        }
        assert!(direct.client.starts_with("HTTP/1.1 "), "{name}: {}", direct.client);
        kept += usize::from(matches!(&direct.upstream[..], [(one, _), (other, _)] if one == other));
    }
    assert!(kept >= 8, "connections of {kept} answers were used again");
}

/// Whose answer is ours: request line, fields, how much of the body of five bytes comes before the answer, and the answer.
const OURS: [(&str, &str, usize, &str); 8] = [
    ("POST /asked", "", 5, "401"),
    ("POST /asked", "", 2, "401"),
    ("POST /asked", "x-api-key: nonsense\r\n", 0, "401"),
    ("POST /asked", "KEYx-api-key: other\r\n", 2, "400"),
    ("POST /public;v=1", "", 5, "400"),
    ("POST /public;v=1", "", 2, "400"),
    ("POST /gone", "KEY", 5, "502"),
    ("GET /asked", "", 0, "401"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_gate_answers_itself_is_answered_and_logged_alike() {
    let upstream = Scripted::start().await;
    let refusing = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let settings = format!(
        "up: {{servers: [\"{}\"]}}, gone: {{servers: [\"{refusing}\"]}}",
        upstream.address
    );
    let rest = "routes:\n  - {name: public, match: {path: \"/public/**\"}, upstream: up, public: {}}\n  \
                - {name: gone, match: {path: /gone}, upstream: gone}\n  \
                - {name: rest, match: {path: \"/**\"}, upstream: up}\n";
    let gate = GateAlone::start_with(&settings, "", rest).await;
    let mut probed = 0;
    for (line, fields, at_first, status) in OURS {
        let direct = refused(&gate, line, fields, at_first, DIRECT_WAY).await;
        let pingoras = refused(&gate, line, fields, at_first, PINGORAS_WAY).await;
        assert_eq!(direct, pingoras, "{line} {fields} {at_first}");
        assert!(direct.starts_with(&format!("HTTP/1.1 {status} ")), "{line}: {direct}");
        // What could be read in two ways may not be followed by anything, nor what failed upstream.
        let keeps = direct.contains("connection: keep-alive\n");
        assert_eq!(keeps, direct.ends_with("probed"), "{direct}");
        assert_eq!(keeps, !line.contains("/public") && !line.contains("/gone"), "{direct}");
        probed += 2 * usize::from(keeps);
    }
    let log = gate.path().join("access.log");
    let expected = 2 * OURS.len() + probed;
    let lines = || std::fs::read_to_string(&log).unwrap_or_default().lines().count();
    crate::harness::until(
        || (lines() == expected).then_some(()),
        || format!("{} of {expected}", lines()),
    );
}

/// All that comes back for a request of which a part is held back until it is answered, and for a probe behind it.
async fn refused(gate: &GateAlone, line: &str, fields: &str, at_first: usize, field: &str) -> String {
    let mut client = TcpStream::connect(gate.url.strip_prefix("http://").unwrap())
        .await
        .unwrap();
    let key = format!("x-api-key: {}\r\n", gate.key);
    let body = if line.starts_with("GET") { "" } else { "hello" };
    let head = format!(
        "{line} HTTP/1.1\r\nHost: a\r\nX-Request-Id: same\r\nContent-Length: {}\r\n{field}{}\r\n",
        body.len(),
        fields.replace("KEY", &key)
    );
    let probe = format!("GET /probe HTTP/1.1\r\nHost: a\r\nX-Request-Id: same\r\n{key}\r\n");
    let (first, held_back) = body.split_at(at_first);
    client.write_all((head + first).as_bytes()).await.unwrap();
    let mut answered = Vec::new();
    let whole = async {
        while !answered.ends_with(b"}}") && matches!(client.read_buf(&mut answered).await, Ok(1..)) {}
        // A gate that has had enough may have closed.
        let _ = client.write_all((held_back.to_owned() + &probe).as_bytes()).await;
        while !answered.ends_with(b"probed") && matches!(client.read_buf(&mut answered).await, Ok(1..)) {}
    };
    tokio::time::timeout(Duration::from_secs(20), whole)
        .await
        .expect("an answer, and an end");
    in_comparable_form(&String::from_utf8_lossy(&answered))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_decided_goes_along_to_an_upstream_that_wants_pingoras_way() {
    let plain = Scripted::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http2 = listener.local_addr().unwrap();
    let echo = |request: axum::extract::Request| async move {
        let tier = request.headers()["x-tollgate-tier"].to_str().unwrap().to_owned();
        let body = axum::body::to_bytes(request.into_body(), 100).await.unwrap();
        format!("{tier} {}", String::from_utf8_lossy(&body))
    };
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(echo)).await });
    let settings = format!(
        "plain: {{servers: [\"{}\"]}}, http2: {{servers: [\"{http2}\"], protocol: http2}}",
        plain.address
    );
    let rest = "routes: [{name: rest, match: {path: \"/**\"}, upstream: http2}]\n";
    let gate = GateAlone::start_with(&settings, "", rest).await;
    let mut client = TcpStream::connect(gate.url.strip_prefix("http://").unwrap())
        .await
        .unwrap();
    for count in 1..=3 {
        let head = format!(
            "POST /a HTTP/1.1\r\nHost: api.example\r\nContent-Length: 8\r\nx-api-key: {}\r\n\r\nhalf",
            gate.key
        );
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(b" two").await.unwrap();
        let mut answered = Vec::new();
        while !answered.ends_with(b"default half two") {
            let read = client.read_buf(&mut answered).await.unwrap();
            assert_ne!(read, 0, "{}", String::from_utf8_lossy(&answered));
        }
        let left = format!("\r\nratelimit: \"default\";r={};", 1_000_000 - count);
        let answered = String::from_utf8(answered).unwrap().to_ascii_lowercase();
        assert!(answered.contains(&left), "counted once: {answered}");
    }
    gate.until_metric("tollgate_requests_total{code=\"PASSED\",tier=\"default\"}", 3.0)
        .await;
}

/// Name, answer, and whether the upstream closes after it.
fn answers() -> Vec<(&'static str, Vec<u8>, bool)> {
    let long = format!(
        "HTTP/1.1 200 OK\ncontent-length: 300000\n\n{}",
        "0123456789".repeat(30_000)
    );
    let long_chunks = format!(
        "HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\n{}0\n\n",
        format!("186a0\n{}\n", "0123456789".repeat(10_000)).repeat(3)
    );
    let many_fields: String = (0..150).map(|n| format!("x-{n}: {n}\n")).collect();
    let many_fields = format!("HTTP/1.1 200 OK\n{many_fields}content-length: 2\n\nok");
    let wide = format!(
        "HTTP/1.1 200 OK\nx-wide: {}\ncontent-length: 2\n\nok",
        "w".repeat(20_000)
    );
    let mut all: Vec<(&'static str, Vec<u8>, bool)> = [
        (
            "plain",
            "HTTP/1.1 200 OK\nContent-Type: text/plain\nContent-Length: 2\n\nok",
        ),
        ("in two", "HTTP/1.1 200 OK\nContent-Length: 2\n\n|ok"),
        ("body in two", "HTTP/1.1 200 OK\nContent-Length: 4\n\nok|ok"),
        ("head in two", "HTTP/1.1 200 OK\nContent-|Length: 2\n\nok"),
        ("byte by byte", "H|T|T|P/1.1 200 O|K\nContent-Length: 2|\n|\no|k"),
        ("empty", "HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
        (
            "reason of its own",
            "HTTP/1.1 404 Never Heard Of It\nContent-Length: 2\n\nno",
        ),
        ("no reason", "HTTP/1.1 200 \nContent-Length: 2\n\nok"),
        ("status of its own", "HTTP/1.1 299 Odd\nContent-Length: 2\n\nok"),
        (
            "several of a name",
            "HTTP/1.1 200 OK\nSet-Cookie: a=1\nX-Own: 1\nSet-Cookie: b=2\nContent-Length: 2\n\nok",
        ),
        (
            "claims of ours",
            "HTTP/1.1 200 OK\nRateLimit: x\nX-Request-Id: theirs\nContent-Length: 2\n\nok",
        ),
        (
            "bytes above ASCII",
            "HTTP/1.1 200 OK\nX-Name: é\nContent-Length: 2\n\nok",
        ),
        ("204", "HTTP/1.1 204 No Content\nX-Own: 1\n\n"),
        ("304", "HTTP/1.1 304 Not Modified\nETag: \"1\"\n\n"),
        (
            "304 with a length",
            "HTTP/1.1 304 Not Modified\nETag: \"1\"\nContent-Length: 1000\n\n",
        ),
        (
            "chunks",
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n|3\nyes\n0\n\n",
        ),
        (
            "chunks with a trailer",
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\nX-Sum: 1\n\n",
        ),
        ("no chunk", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n0\n\n"),
        (
            "chunks and a length",
            "HTTP/1.1 200 OK\nContent-Length: 9\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n",
        ),
        (
            "100 before it",
            "HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        ),
        (
            "103 before it",
            "HTTP/1.1 103 Early Hints\nLink: </a>\n\n|HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        ),
        (
            "HTTP/1.0 that stays",
            "HTTP/1.0 200 OK\nConnection: keep-alive\nContent-Length: 2\n\nok",
        ),
        (
            "length twice, the same",
            "HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 2\n\nok",
        ),
        ("folded", "HTTP/1.1 200 OK\nX-Folded: a\n b\nContent-Length: 2\n\nok"),
        (
            "space before a colon",
            "HTTP/1.1 200 OK\nX-Own : a\nContent-Length: 2\n\nok",
        ),
        (
            "keep-alive said",
            "HTTP/1.1 200 OK\nConnection: Keep-Alive\nKeep-Alive: timeout=5\nContent-Length: 2\n\nok",
        ),
    ]
    .into_iter()
    .map(|(name, text)| (name, wire(text), false))
    .collect();
    let closing = [
        (
            "says close",
            "HTTP/1.1 200 OK\nConnection: close\nContent-Length: 2\n\nok",
        ),
        ("until the end", "HTTP/1.1 200 OK\n\n|ok"),
        ("until the end, at once", "HTTP/1.1 200 OK\n\n"),
        ("HTTP/1.0", "HTTP/1.0 200 OK\nContent-Length: 2\n\nok"),
        ("HTTP/1.0 until the end", "HTTP/1.0 200 OK\n\nok"),
        (
            "names a field",
            "HTTP/1.1 200 OK\nConnection: X-Own\nX-Own: 1\nContent-Length: 2\n\nok",
        ),
        ("more than it said", "HTTP/1.1 200 OK\nContent-Length: 2\n\nok and more"),
        (
            "lengths that differ",
            "HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 3\n\nok",
        ),
        ("no length", "HTTP/1.1 200 OK\nContent-Length: two\n\nok"),
        (
            "101 that nobody asked for",
            "HTTP/1.1 101 Switching Protocols\nUpgrade: x\nConnection: upgrade\n\n",
        ),
        ("garbage", "\u{1}\u{2} what?\n\n"),
        ("half a head", "HTTP/1.1 200 OK\nContent-"),
        ("half a body", "HTTP/1.1 200 OK\nContent-Length: 20\n\nten bytes."),
        (
            "half a chunk",
            "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n14\nten bytes.",
        ),
        ("nothing", ""),
    ];
    all.extend(closing.map(|(name, text)| (name, wire(text), true)));
    for (name, text) in [
        ("long", long),
        ("long, in chunks", long_chunks),
        ("many fields", many_fields),
        ("a wide field", wide),
    ] {
        all.push((name, wire(&text), false));
    }
    all
}

fn wire(text: &str) -> Vec<u8> {
    text.replace('\n', "\r\n").into_bytes()
}

async fn exchange(gate: &GateAlone, upstream: &Scripted, answer: Arc<Answer>, request: Request, field: &str) -> Seen {
    *upstream.next.lock().unwrap() = Some(answer);
    let mut client = TcpStream::connect(gate.url.strip_prefix("http://").unwrap())
        .await
        .unwrap();
    let ask = |(line, fields, body): Request| {
        format!(
            "{line} HTTP/1.1\r\nHost: api.example\r\nX-Request-Id: same\r\nX-Own: 1\r\nx-api-key: {}\r\n{field}{fields}\r\n{body}",
            gate.key
        )
    };
    // Without a wait between the two: where an answer ends is told by where the next one begins.
    let both = ask(request) + &ask(("GET /probe", "", ""));
    client.write_all(both.as_bytes()).await.unwrap();
    let mut answered = Vec::new();
    let whole = async {
        // The end, or a reset by a gate that has closed already.
        while !answered.ends_with(b"probed") && matches!(client.read_buf(&mut answered).await, Ok(1..)) {}
    };
    let within = tokio::time::timeout(Duration::from_secs(20), whole).await;
    let answered = with_joined_chunks(&String::from_utf8_lossy(&answered));
    within.unwrap_or_else(|_| panic!("neither answered nor closed: {answered}"));
    let mut seen = std::mem::take(&mut *upstream.seen.lock().unwrap());
    let first = seen.first().map_or(0, |(connection, _)| *connection);
    seen.iter_mut().for_each(|(connection, _)| *connection -= first);
    Seen {
        upstream: seen,
        client: in_comparable_form(&answered),
    }
}

/// Answers without what may differ: the spelling and the order of names, when it was, and how often.
fn in_comparable_form(answers: &str) -> String {
    let stays = |line: &&str| {
        !["date:", "ratelimit:", "x-ratelimit-remaining:", "x-ratelimit-reset:"]
            .iter()
            .any(|name| line.to_ascii_lowercase().starts_with(name))
    };
    let lines: Vec<_> = answers.split("\r\n").filter(stays).collect();
    with_heads_in_order(&lines.join("\n"))
}

/// Answers whose fields are in the order of their names, which are in lower case: neither means anything. Those of one name
/// stay as they came.
fn with_heads_in_order(answers: &str) -> String {
    let mut ordered = String::new();
    for answer in answers.split_inclusive("\n\n") {
        let Some(head) = answer.find("HTTP/1.") else {
            ordered += answer;
            continue;
        };
        let (before, head) = answer.split_at(head);
        let mut lines: Vec<String> = head.lines().map(str::to_owned).collect();
        for field in &mut lines[1..] {
            let name = field.find(':').unwrap_or(0);
            field[..name].make_ascii_lowercase();
        }
        let name = |field: &String| field.split(':').next().map(str::to_owned);
        // The status line stays in front, the empty one at the end.
        let last = lines.len() - usize::from(head.ends_with("\n\n"));
        lines[1..last].sort_by_key(name);
        ordered += &format!("{before}{}\n", lines.join("\n"));
    }
    ordered
}

fn is_whole(request: &[u8]) -> bool {
    let text = std::str::from_utf8(request).unwrap().to_ascii_lowercase();
    text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        body.len() == length.map_or(0, |length| length.parse().unwrap())
    })
}

/// A request with its names in lower case and its fields in order: neither means anything.
fn in_order(request: &str) -> String {
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let mut lines = head.split("\r\n");
    let line = lines.next().unwrap();
    let mut fields: Vec<String> = lines
        .map(|field| {
            let (name, value) = field.split_once(": ").unwrap();
            format!("{}: {value}", name.to_ascii_lowercase())
        })
        .collect();
    fields.sort_unstable();
    format!("{line}\n{}\n\n{body}", fields.join("\n"))
}

/// The same with each chunked body in one chunk, as far as it has come: where one is cut says nothing.
fn with_joined_chunks(text: &str) -> String {
    let Some(head) = text.to_ascii_lowercase().find("transfer-encoding: chunked\r\n") else {
        return text.to_owned();
    };
    let body = head + text[head..].find("\r\n\r\n").unwrap() + 4;
    let (mut joined, mut rest) = (String::new(), &text[body..]);
    while let Some((size, behind)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 || behind.len() < size + 2 {
            break;
        }
        joined += &behind[..size];
        rest = &behind[size + 2..];
    }
    format!("{}{joined}\r\n{rest}", &text[..body])
}

/// An upstream that answers as it was told, and a probe always alike, after which it closes.
struct Scripted {
    address: std::net::SocketAddr,
    next: Arc<Mutex<Option<Arc<Answer>>>>,
    /// Each head, and the number of the connection that it came on.
    seen: Arc<Mutex<Vec<(usize, String)>>>,
}

impl Scripted {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scripted = Scripted {
            address: listener.local_addr().unwrap(),
            next: Arc::default(),
            seen: Arc::default(),
        };
        let (next, seen) = (scripted.next.clone(), scripted.seen.clone());
        tokio::spawn(async move {
            for connection in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, connection, next.clone(), seen.clone()));
            }
        });
        scripted
    }
}

async fn serve(
    mut stream: TcpStream,
    connection: usize,
    next: Arc<Mutex<Option<Arc<Answer>>>>,
    seen: Arc<Mutex<Vec<(usize, String)>>>,
) {
    stream.set_nodelay(true).unwrap();
    let mut buffer = Vec::new();
    loop {
        while !is_whole(&buffer) {
            if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
        }
        let request = String::from_utf8(std::mem::take(&mut buffer)).unwrap();
        let is_probe = request.starts_with("GET /probe");
        seen.lock().unwrap().push((connection, in_order(&request)));
        if is_probe {
            let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 6\r\n\r\nprobed";
            let _ = stream.write_all(answer.as_bytes()).await;
            return;
        }
        let answer = next.lock().unwrap().clone().unwrap();
        for piece in &answer.pieces {
            // A gate that has had enough may have closed.
            if stream.write_all(piece).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        if answer.closes {
            return;
        }
    }
}
