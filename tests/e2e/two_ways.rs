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
    // These say when, and how often.
    let varies = |line: &&str| {
        !["date:", "ratelimit:", "x-ratelimit-remaining:", "x-ratelimit-reset:"]
            .iter()
            .any(|name| line.to_ascii_lowercase().starts_with(name))
    };
    Seen {
        upstream: seen,
        client: answered.split("\r\n").filter(varies).collect::<Vec<_>>().join("\n"),
    }
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
