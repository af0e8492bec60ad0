//! The HTTP/2 conformance tests of httpwg (the successor of h2spec), as a ratchet.
//!
//! Needs `target/tools/bin/httpwg`, which `.ci/install-tools` builds, and a kernel with io_uring.

use std::path::Path;
use std::process::Command;

use crate::harness::Upstream;
use crate::hostile::Served;
use crate::ways::Way;

/// What does not pass, and why it stays so.
const KNOWN: &[(&str, &str)] = &[
    (
        "invalid header block fragment",
        "the HTTP/2 library answers a broken HPACK block with PROTOCOL_ERROR",
    ),
    (
        "sends connect without authority",
        "Pingora answers 400 instead of resetting the stream",
    ),
    (
        "sends headers frame with mismatched host authority",
        "answered 400, as the design's section 8 asks for",
    ),
    (
        "sends headers frame with pseudo header in trailer",
        "trailers are dropped before anybody looks at them",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_known_ones_fail() {
    // Flow control is tested with the response's body, which must have a few bytes. And with requests that never end:
    // what answers those early has its stream's sending side closed, on which RFC 9113 asks for nothing any more.
    let upstream = Upstream::saying("a body of a few dozen bytes, all the same").await;
    let served = Served::start(Way::Pingora, upstream.port, None, &[]);
    let httpwg = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin/httpwg");
    let (passed, unknown, text) = run(&httpwg, &served);
    println!("{passed} of 107 passed");
    assert!(unknown.is_empty(), "{unknown:#?}");
    assert!(passed as usize >= 107 - KNOWN.len(), "{text}");
}

/// How many tests passed, which failed that are not known to, and all that was said.
fn run(httpwg: &Path, served: &Served) -> (u32, Vec<String>, String) {
    let output = Command::new(httpwg)
        .args(["-a", &served.address().to_string()])
        .args(["--connect-timeout", "5000", "--frame-timeout", "5000"])
        .args(["--", "sleep", "60"])
        .output()
        .unwrap_or_else(|error| panic!("{} ({error}): .ci/install-tools builds it", httpwg.display()));
    let colored = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let text: String = colored
        .split('\u{1b}')
        .enumerate()
        .map(|(i, part)| {
            if i == 0 {
                part
            } else {
                part.split_once('m').map_or(part, |(_, rest)| rest)
            }
        })
        .collect();
    let passed = text
        .split_once("Passed ")
        .and_then(|(_, rest)| rest.split_once("/107"))
        .and_then(|(number, _)| number.parse::<u32>().ok())
        .unwrap_or(0);
    let unknown = text
        .lines()
        .filter(|line| line.contains("Test failed:") && !KNOWN.iter().any(|(name, _)| line.contains(name)))
        .map(str::to_owned)
        .collect();
    (passed, unknown, text)
}
