//! Whatever target the edge forwards, nginx, HAProxy, a Python and a Node server behind it all see a path that falls
//! under the rule that the gate chose.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use http::{HeaderMap, Method};
use tollgate::clock::Clock;
use tollgate::gate::{Gate, RequestHead};
use tollgate::proxy::edge::EdgeSettings;
use tollgate::proxy::strict::{PathRules, check_target, without_parameters};

use crate::harness::{Door, Reader};
use crate::ways::{BOTH_WAYS, Way, gate, public_rules};

/// How many targets are generated; few of them pass.
const TARGETS: usize = 100_000;

/// The rules: a name, and a pattern of the gate's.
const RULES: &[(&str, &str)] = &[
    ("register", "/api/v1/register"),
    ("check", "/api/v1/permissions/check"),
    ("roles", "/api/v1/permissions/roles/**"),
    ("exports", "/api/v1/exports/**"),
    ("messaging", "/api/v1/messaging/**"),
    ("one", "/api/v1/users/*/keys"),
    ("admin", "/admin/**"),
    ("colon", "/api/v1/things:check"),
    ("cafe", "/café/**"),
];

/// A rule for a path that is decoded already: the plainest reading of the patterns, written apart from the gate's.
fn rule_of_decoded(path: &[u8]) -> &'static str {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let seen: Vec<&[u8]> = path.split(|b| *b == b'/').skip(1).collect();
    let matches = |pattern: &str| {
        let wanted: Vec<&[u8]> = pattern.as_bytes().split(|b| *b == b'/').skip(1).collect();
        let is_open = wanted.last() == Some(&&b"**"[..]);
        let fixed = if is_open {
            &wanted[..wanted.len() - 1]
        } else {
            &wanted[..]
        };
        (seen.len() == fixed.len() || (is_open && seen.len() > fixed.len()))
            && fixed
                .iter()
                .zip(&seen)
                .all(|(want, have)| *want == b"*" || want == have)
    };
    RULES
        .iter()
        .find(|(_, pattern)| matches(pattern))
        .map_or("default", |(name, _)| name)
}

/// The rule of what a servlet container sees: each segment without its parameters, then decoded.
fn as_servlet(target: &str) -> Option<&'static str> {
    let [stems, _] = without_parameters(target.split('?').next().unwrap())?;
    let mut decoded = Vec::new();
    let mut rest = stems.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        let pair = (*byte == b'%').then(|| std::str::from_utf8(&after[..2]).unwrap());
        decoded.push(pair.map_or(*byte, |pair| u8::from_str_radix(pair, 16).unwrap()));
        rest = &rest[2 * usize::from(pair.is_some())..];
    }
    Some(rule_of_decoded(&decoded))
}

fn rule_of_gate(gate: &Gate, target: &str) -> String {
    let headers = HeaderMap::new();
    let head = RequestHead {
        method: &Method::GET,
        host: "a",
        path: target.split('?').next().unwrap(),
        headers: &headers,
        client: Ipv4Addr::LOCALHOST.into(),
    };
    gate.check(&head, Clock::manual(0).now())
        .expect("public rules")
        .route()
        .name
        .to_string()
}

/// Whether the gate lets it through: not if cutting parameters off makes it fall under another rule.
fn is_sure(gate: &Gate, target: &str) -> bool {
    let path = target.split('?').next().unwrap();
    without_parameters(path).is_none_or(|readings| {
        readings
            .iter()
            .all(|reading| gate.is_same_rule("a", &Method::GET, path, reading))
    })
}

/// xorshift64*.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

/// A path of one of the rules, taken apart and put together with what makes servers disagree.
fn generate(numbers: &mut Numbers) -> String {
    const ODD: &[&str] = &[
        "/",
        "//",
        ".",
        "..",
        "./",
        "../",
        "/.",
        "/..",
        "%2e",
        "%2E%2e",
        "%2f",
        "%5c",
        "\\",
        "%00",
        "%25",
        "%252e",
        "%20",
        "%3b",
        "%3B",
        ";",
        ";x=1",
        "..;",
        "%3f",
        "%23",
        "#",
        "?",
        "%c3%a9",
        "%C3%A9",
        "%c0%af",
        "%e9",
        "%61",
        "%41",
        "%2d",
        "%5f",
        "%7e",
        "~",
        "%3a",
        ":",
        "%40",
        "@",
        "%2a",
        "*",
        "**",
        "%2c",
        ",",
        "+",
        "%2b",
        "&",
        "=",
        "!",
        "'",
        "(",
        ")",
        "%26",
        "x",
        "X",
        "0",
        "-",
        "_",
        "%7b",
        "{",
        "|",
        "%",
        "%zz",
        "%u002e",
        "%ef%bc%8f",
        "%E2%80%AE",
        "check",
        "admin",
        "roles",
        "api",
        "v1",
        "%EF%BC%8E",
        "é",
        "\t",
        "[",
        "]",
        "^",
        "`",
        "\"",
        "<",
        "$",
    ];
    let mut path = RULES[numbers.below(RULES.len())]
        .1
        .replace("/**", "/a/b")
        .replace("/*/", "/u1/")
        .replace('é', "%C3%A9");
    for _ in 0..numbers.below(4) {
        let boundaries: Vec<usize> = path.char_indices().map(|(i, _)| i).chain([path.len()]).collect();
        let at = boundaries[numbers.below(boundaries.len())];
        match numbers.below(5) {
            0 => {
                let mut swapped = String::new();
                for (i, c) in path.chars().enumerate() {
                    if i == at % path.len().max(1) && c.is_ascii_alphanumeric() {
                        swapped += &format!("%{:02x}", c as u32);
                    } else {
                        swapped.push(c);
                    }
                }
                path = swapped;
            }
            1 => path.truncate(at),
            _ => path.insert_str(at, ODD[numbers.below(ODD.len())]),
        }
    }
    if numbers.below(4) == 0 {
        path += "?a=/../b&c=%2f";
    }
    path
}

/// A server in a process of its own; killed when dropped.
pub struct Server {
    name: &'static str,
    child: Child,
    port: u16,
}

impl Server {
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// An nginx that answers everything with the path it saw.
pub fn nginx(directory: &Path) -> Server {
    let prefix = format!("{}/", directory.display());
    start("nginx", "nginx-light", directory, NGINX, &["-p", &prefix, "-c"])
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const NGINX: &str = r#"
daemon off; master_process off; pid nginx.pid; error_log stderr crit;
events { worker_connections 20000; }
http {
    access_log off; client_body_temp_path .; proxy_temp_path .; fastcgi_temp_path .; uwsgi_temp_path .; scgi_temp_path .;
    server { listen 127.0.0.1:PORT; keepalive_requests 1000000; location / { default_type text/plain; return 200 "$uri"; } }
}
"#;

const HAPROXY: &str = r#"
defaults
    mode http
    timeout client 60s
    timeout connect 5s
    timeout server 60s
frontend seen
    bind 127.0.0.1:PORT
    http-request return status 200 content-type text/plain lf-string "%[path,url_dec]"
"#;

const PYTHON: &str = r#"
import http.server, sys, urllib.parse
class Seen(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 65536
    def do_GET(self):
        body = urllib.parse.unquote_to_bytes(urllib.parse.urlsplit(self.path).path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Seen).serve_forever()
"#;

const NODE: &str = r#"
require('http').createServer((request, response) => {
    const body = Buffer.from(decodeURIComponent(new URL(request.url, 'http://a').pathname));
    response.writeHead(200, {'Content-Length': body.length});
    response.end(body);
}).listen(PORT, '127.0.0.1');
"#;

fn start(name: &'static str, package: &str, directory: &Path, script: &str, arguments: &[&str]) -> Server {
    // Free now, and nobody else on this machine binds ports by number.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let file = directory.join(format!("{name}.conf"));
    std::fs::File::create(&file)
        .unwrap()
        .write_all(script.replace("PORT", &port.to_string()).as_bytes())
        .unwrap();
    let child = Command::new(name)
        .args(arguments)
        .arg(&file)
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("this test needs {name} ({error}): apt-get install {package}"));
    let mut server = Server { name, child, port };
    let started = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        if let Some(status) = server.child.try_wait().unwrap() {
            panic!("{name} did not start: {status}");
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{name} does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    server
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_server_behind_the_edge_sees_the_rule_that_was_chosen() {
    let directory = tempfile::tempdir().unwrap();
    let servers = [
        nginx(directory.path()),
        start("haproxy", "haproxy", directory.path(), HAPROXY, &["-db", "-f"]),
        start("python3", "python3", directory.path(), PYTHON, &[]),
        start("node", "nodejs", directory.path(), NODE, &[]),
    ];
    let gate = gate(public_rules(&[RULES, &[("default", "/**")]].concat()));
    let mut numbers = Numbers(0x746f_6c6c_6761_7465);
    let mut passing = BTreeSet::new();
    let mut refused = BTreeSet::new();
    let mut unsure = 0;
    for _ in 0..TARGETS {
        let target = generate(&mut numbers);
        if check_target(target.as_bytes(), PathRules::Strict).is_err() {
            refused.insert(target);
        } else if is_sure(&gate, &target) {
            passing.insert(target);
        } else {
            unsure += 1;
        }
    }
    let mut disagreements = Vec::new();
    for (server, way) in servers.iter().flat_map(|server| BOTH_WAYS.map(|way| (server, way))) {
        let door = Door::open(way, EdgeSettings::default(), None).await;
        door.forward_to(server.port);
        let mut client = Reader::new(door.connect().await);
        let mut answered = 0;
        for target in &passing {
            client
                .send(format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
                .await;
            let Some(response) = client.response().await else {
                client = Reader::new(door.connect().await);
                continue;
            };
            if response.status != 200 {
                // It refuses what we let through: nothing is served under a wrong rule.
                if response.head.to_ascii_lowercase().contains("connection: close") {
                    client = Reader::new(door.connect().await);
                }
                continue;
            }
            answered += 1;
            let chosen = rule_of_gate(&gate, target);
            // What it saw, and what a servlet container would have made of that.
            let seen = std::iter::once(rule_of_decoded(&response.body)).chain(as_servlet(target));
            for seen in seen.filter(|seen| *seen != chosen) {
                let body = response.body.escape_ascii();
                disagreements.push(format!(
                    "{}, {way}: {target} was let through as {chosen}, seen as {seen}: {body}",
                    server.name
                ));
            }
        }
        println!(
            "{}, {way}: {answered} of {} forwarded targets answered",
            server.name,
            passing.len()
        );
        assert!(
            answered * 10 > passing.len() * 9,
            "{} answers too few {way}",
            server.name
        );
    }
    println!(
        "{TARGETS} generated: {} distinct ones forwarded ({} with parameters), {} refused, {unsure} fall under another rule \
         without their parameters",
        passing.len(),
        passing.iter().filter(|target| target.contains(';')).count(),
        refused.len()
    );
    assert!(
        disagreements.is_empty(),
        "{} disagreements\n{}",
        disagreements.len(),
        disagreements[..disagreements.len().min(20)].join("\n")
    );
    assert!(passing.len() > 1000 && refused.len() > 1000 && unsure > 10);
    // What the check refuses is refused over a socket, too.
    let door = Door::open(Way::Direct, EdgeSettings::default(), None).await;
    let upstream = door.upstream().await;
    for target in refused.iter().step_by(refused.len() / 500) {
        let mut client = Reader::new(door.connect().await);
        client
            .send(format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .await;
        assert_eq!(client.response().await.expect("an answer").status, 400, "{target}");
    }
    assert_eq!(upstream.seen(), Vec::<String>::new());
}
