//! Two threads of requests beside whatever else goes on, and how long each took, by phase: decisions of a gate in this
//! process, or HTTP requests to one in another.

use super::KEYS;
use super::gate_support::{CLIENT, ask, secret, with_secret};
use http::HeaderMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tollgate::clock::Clock;
use tollgate::gate::Gate;

pub const THREADS: u32 = 2;
/// Decisions of one thread at once, and its pause after them: 20,000 a second at most, which leaves the processors
/// something to do the rest with.
pub const BURST: usize = 20;
/// The pause also lies between the HTTP requests of one thread.
pub const PAUSE: Duration = Duration::from_millis(1);
/// Different keys that one thread asks with.
pub const ASKED: u32 = 50_000;

/// Threads that ask until they are told to stop.
pub struct Requests {
    phase: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Vec<Vec<u32>>>>,
}

impl Requests {
    /// Decisions, in bursts.
    pub fn decisions(gate: &Arc<Gate>, phases: usize) -> Self {
        let gate = Arc::clone(gate);
        Self::start(phases, move |thread| {
            let (gate, clock) = (Arc::clone(&gate), Clock::system());
            let keys: Vec<HeaderMap> = keys_of(thread).map(with_secret).collect();
            let mut next = 0;
            move |times: &mut Vec<u32>| {
                for _ in 0..BURST {
                    let headers = &keys[next % keys.len()];
                    next += 1;
                    let begun = Instant::now();
                    let permit = ask(&gate, "/things", headers, CLIENT, clock.now());
                    times.push(nanoseconds(begun.elapsed()));
                    assert!(permit.is_ok(), "every key is valid throughout");
                }
            }
        })
    }

    /// HTTP requests, one at a time on a connection of each thread's own.
    pub fn http(gate: SocketAddr, phases: usize) -> Self {
        Self::start(phases, move |thread| {
            let mut stream = TcpStream::connect(gate).expect("a gate that listens");
            stream.set_nodelay(true).expect("a socket of ours");
            let requests: Vec<String> = keys_of(thread)
                .map(|n| {
                    format!(
                        "GET /v1/0 HTTP/1.1\r\nHost: bench.test\r\nx-api-key: {}\r\n\r\n",
                        secret(n)
                    )
                })
                .collect();
            let (mut next, mut answer) = (0, vec![0; 4096]);
            move |times: &mut Vec<u32>| {
                let request = &requests[next % requests.len()];
                next += 1;
                let begun = Instant::now();
                stream.write_all(request.as_bytes()).expect("a gate that reads");
                let mut read = 0;
                // The origin's answer has no body.
                while !answer[..read].ends_with(b"\r\n\r\n") {
                    match stream.read(&mut answer[read..]) {
                        Ok(count @ 1..) => read += count,
                        ended => panic!("the gate answered {read} bytes, then {ended:?}"),
                    }
                }
                times.push(nanoseconds(begun.elapsed()));
                assert!(answer.starts_with(b"HTTP/1.1 200"), "every key is valid throughout");
            }
        })
    }

    fn start<A: FnMut(&mut Vec<u32>)>(phases: usize, asker: impl Fn(u32) -> A + Clone + Send + 'static) -> Self {
        let (phase, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let threads = (0..THREADS).map(|thread| {
            let (asker, phase, stop) = (asker.clone(), Arc::clone(&phase), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut ask = asker(thread);
                let mut times = vec![Vec::with_capacity(1_000_000); phases];
                while !stop.load(Ordering::Relaxed) {
                    ask(&mut times[phase.load(Ordering::Relaxed)]);
                    std::thread::sleep(PAUSE);
                }
                times
            })
        });
        Requests {
            threads: threads.collect(),
            phase,
            stop,
        }
    }

    pub fn enter(&self, phase: usize) {
        self.phase.store(phase, Ordering::Relaxed);
    }

    /// The times of every phase.
    pub fn end(self) -> Vec<Times> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all: Vec<Times> = vec![];
        for thread in self.threads {
            let times = thread.join().expect("no panic");
            all.resize_with(times.len(), Times::default);
            for (all, times) in all.iter_mut().zip(times) {
                all.0.extend(times);
            }
        }
        all.iter_mut().for_each(|times| times.0.sort_unstable());
        all
    }
}

/// Spread over all keys.
fn keys_of(thread: u32) -> impl Iterator<Item = u32> {
    (0..ASKED).map(move |n| (n * 20 + thread) % KEYS)
}

fn nanoseconds(time: Duration) -> u32 {
    time.as_nanos().min(u128::from(u32::MAX)) as u32
}

/// Sorted, in nanoseconds.
#[derive(Default)]
pub struct Times(Vec<u32>);

impl Times {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The time that so large a part of all requests took at most.
    pub fn at(&self, part: f64) -> u32 {
        self.0.get((self.0.len() as f64 * part) as usize).copied().unwrap_or(0)
    }
}
