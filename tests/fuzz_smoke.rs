//! Every fuzz target, on stable: driven by a generator that mutates and splices the corpora in `fuzz/corpus`.
//!
//! A bounded run of what `cargo +nightly fuzz run TARGET` does at length. `FUZZ_TARGET` chooses one target;
//! `FUZZ_EXECUTIONS` sets how many inputs each quick target gets, and `FUZZ_SECONDS` ends each after so much time on a
//! processor. A seed is
//! printed with every failure, and `FUZZ_SEED` runs it again. The long run is in `fuzz/README.md`.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// A small generator of numbers (xorshift64*): the same inputs everywhere for the same seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit.max(1)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// What is worth inserting anywhere.
const WORDS: &[&[u8]] = &[
    b"/",
    b"//",
    b".",
    b"..",
    b"/./",
    b"/../",
    b"%2e",
    b"%2f",
    b"%5c",
    b"%00",
    b"%25",
    b"%252e",
    b"%c0%af",
    b"%C3%A9",
    b"%",
    b";",
    b"\\",
    b"?",
    b"#",
    b"*",
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b"\t",
    b" ",
    b": ",
    b":",
    b",",
    b"\r\n\r\n",
    b"GET ",
    b"POST ",
    b"TRACE ",
    b" HTTP/1.1",
    b" HTTP/1.0",
    b" HTTP/2.0",
    b"Host: a\r\n",
    b"Host: b\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Upgrade: websocket\r\n",
    b"Expect: 100-continue\r\n",
    b"http://a/",
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b";x=y",
    b"ffffffffffffffff",
    b"10.0.0.1",
    b"192.0.2.1",
    b"[2001:db8::1]:80",
    b"for=",
    b"\"",
    b"Bearer ",
    b"bearer  ",
    b"pxk_live_",
    b"K",
    b"A",
    b"{",
    b"}",
    b"\"type\":\"key\"",
    b"null",
    b"[]",
    b"- ",
    b"  ",
    b"${X}",
    b"version: 1\n",
    b"\xff",
    b"\x7f",
    b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
];

fn mutate(numbers: &mut Numbers, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = numbers.pick(corpus).clone();
    for _ in 0..=numbers.below(6) {
        let at = numbers.below(input.len() + 1);
        match numbers.below(8) {
            0 if !input.is_empty() => {
                let at = at % input.len();
                input[at] ^= 1 << numbers.below(8);
            }
            1 if !input.is_empty() => {
                let at = at % input.len();
                input[at] = numbers.next() as u8;
            }
            2 => {
                let end = (at + numbers.below(16)).min(input.len());
                input.drain(at..end);
            }
            3 => input.truncate(at),
            4 => {
                let other = numbers.pick(corpus);
                let from = numbers.below(other.len() + 1);
                input.splice(at.., other[from..].iter().copied());
            }
            5 => {
                let end = (at + numbers.below(32)).min(input.len());
                let copy = input[at..end].to_vec();
                input.splice(at..at, copy);
            }
            _ => {
                let word = *numbers.pick(WORDS);
                input.splice(at..at, word.iter().copied());
            }
        }
        input.truncate(64 * 1024);
    }
    input
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let mut inputs: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    assert!(!inputs.is_empty(), "{target} has a corpus");
    inputs.push(Vec::new());
    inputs
}

fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// How long this thread has run: on a busy machine that is much less than has passed.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells it");
    let ns = text.split(' ').next().and_then(|ns| ns.parse().ok());
    Duration::from_nanos(ns.expect("its first number"))
}

#[test]
fn no_target_fails() {
    let quick = env_number("FUZZ_EXECUTIONS", 100_000);
    let seed = env_number("FUZZ_SEED", 0x746f_6c6c_6761_7465);
    let patience = Duration::from_secs(env_number("FUZZ_SECONDS", u64::from(u32::MAX)));
    let only = std::env::var("FUZZ_TARGET").ok();
    let chosen = |name: &str| only.as_ref().is_none_or(|only| only == name);
    for (name, target) in targets::TARGETS.iter().filter(|(name, _)| chosen(name)) {
        let corpus = corpus(name);
        // Those that touch files, or parse YAML, are a hundred times slower.
        let wanted = if matches!(*name, "config" | "spool" | "journal") {
            quick / 100
        } else {
            quick
        };
        let mut numbers = Numbers(seed);
        for input in &corpus {
            target(input);
        }
        let (started, begun) = (Instant::now(), processor_time());
        let mut executions = 0;
        while executions < wanted && (executions % 256 != 0 || processor_time() - begun < patience) {
            let state = numbers.0;
            let input = mutate(&mut numbers, &corpus);
            if catch_unwind(AssertUnwindSafe(|| target(&input))).is_err() {
                panic!(
                    "{name} fails on execution {executions}, FUZZ_SEED={state}: {}",
                    input.escape_ascii()
                );
            }
            executions += 1;
        }
        println!(
            "{name}: {executions} executions in {:.0?}, {:.0?} of it on a processor, {} seeds",
            started.elapsed(),
            processor_time() - begun,
            corpus.len()
        );
    }
}
