//! The HTTP/2 conformance tests of httpwg (the successor of h2spec), as a ratchet.
//!
//! Needs `httpwg` on the path: `cargo install --locked httpwg-cli --version 0.2.5`, and a kernel with io_uring. Not
//! part of a plain run, because building it takes minutes: `cargo test --test edge httpwg -- --ignored`.

use std::process::Command;

use crate::differential::nginx_that_says;
use crate::hostile::Served;

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
#[ignore = "needs httpwg-cli, which takes minutes to build"]
async fn at_least_103_of_107_pass() {
    let directory = tempfile::tempdir().unwrap();
    // Flow control is tested with the response's body, which must have a few bytes.
    let nginx = nginx_that_says(directory.path(), "a body of a few dozen bytes, all the same");
    let served = Served::start(nginx.port(), None, &[]);
    let output = Command::new("httpwg")
        .args([
            "-a",
            &served.address().to_string(),
            "--connect-timeout",
            "1000",
            "--frame-timeout",
            "1000",
        ])
        .args(["--", "sleep", "60"])
        .output()
        .expect("this test needs httpwg: cargo install --locked httpwg-cli --version 0.2.5");
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
    println!("{passed} of 107 passed");
    let failed: Vec<&str> = text.lines().filter(|line| line.contains("Test failed:")).collect();
    let unknown: Vec<_> = failed
        .iter()
        .filter(|line| !KNOWN.iter().any(|(name, _)| line.contains(name)))
        .collect();
    assert!(unknown.is_empty(), "{unknown:#?}");
    assert!(passed >= 103, "{passed} passed\n{text}");
}
