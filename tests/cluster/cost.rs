//! What shared counts cost the store, per active key: real gates of this process decide, over a real Redis.
//!
//! Run in full by `TOLLGATE_PROOF=full`, which takes minutes; `TOLLGATE_RESULTS=1` then writes `benches/results/cluster_keys.md`.

use crate::gate_support::{CLIENT, ask, gate, key, settings, with_secret};
use crate::harness::{Redis, free_port};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tollgate::clock::Clock;
use tollgate::cluster::Cluster;
use tollgate::cluster::coordinator::Settings;
use tollgate::cluster::protocol::OnLoss;
use tollgate::cluster::valkey::{Place, Valkey};
use tollgate::gate::Gate;
use tollgate::gate::limit::Limit;

/// Who asks how often.
struct Traffic {
    name: &'static str,
    /// Requests of a key that come together, at one gate.
    burst: u32,
    /// How often all keys come round.
    rounds: u32,
    /// How long a round takes, at least.
    every: Duration,
}

const WINDOW_MS: u64 = 10_000;
const GATES: usize = 4;
/// Keys that are used at the same time.
const AT_ONCE: u32 = 256;

/// A gate of this process that shares its limits.
struct Sharing {
    gate: Gate,
    cluster: Cluster,
    clock: Clock,
    running: JoinHandle<()>,
    end: Option<oneshot::Sender<()>>,
}

impl Sharing {
    fn start(number: usize, keys: u32, port: u16) -> Self {
        let mut rules = settings(100);
        rules.tiers = vec![("default".into(), Limit::new(100, WINDOW_MS).unwrap())];
        let gate = gate(rules, (0..keys).map(|n| key(n, 1))).sharing_limits();
        let place = Place::Server(format!("redis://127.0.0.1:{port}"));
        let lost_after = Duration::from_secs(5);
        let store = Valkey::new(&place, "tollgate:", lost_after).unwrap();
        let sharing = Settings {
            id: 1 + number as u64,
            name: format!("gate-{number}").into(),
            on_loss: OnLoss::Closed,
            lost_after,
            max_clock_skew: Duration::from_millis(50),
            longest_window_ms: WINDOW_MS,
        };
        let clock = Clock::system();
        // A busy machine is no reason for a refusal here: what is measured is what the store does.
        let cluster = Cluster::new(&sharing, Duration::from_secs(4), Arc::new(store), clock.clone());
        let (end, ended) = oneshot::channel::<()>();
        let own = cluster.clone();
        let running = tokio::spawn(async move { own.run(async { drop(ended.await) }).await });
        Sharing {
            gate,
            cluster,
            clock,
            running,
            end: Some(end),
        }
    }

    /// What the proxy does with a request.
    async fn decide(&self, secret: u32) -> bool {
        let headers = with_secret(secret);
        let mut deadline = None;
        loop {
            let refusal = match ask(&self.gate, "/", &headers, CLIENT, self.clock.now()) {
                Ok(permit) => {
                    permit
                        .wanted()
                        .into_iter()
                        .for_each(|reservation| self.cluster.want(reservation));
                    return true;
                }
                Err(refusal) => refusal,
            };
            let Some(wanted) = refusal.wanted() else { return false };
            let until = *deadline.get_or_insert_with(|| self.cluster.deadline());
            let reservation = wanted.reservation.clone();
            if Instant::now() >= until || !self.cluster.wait(&reservation, until).await {
                return false;
            }
        }
    }

    async fn end(mut self) {
        let _ = self.end.take().map(|end| end.send(()));
        self.running.await.unwrap();
    }
}

/// What the server says of itself.
#[derive(Clone, Copy)]
struct Reading {
    scripts: f64,
    cpu_s: f64,
    bytes_in: f64,
    bytes_out: f64,
    memory: f64,
    asks: u64,
    granted: u64,
}

impl Reading {
    fn of(redis: &Redis, gates: &[Arc<Sharing>]) -> Self {
        let info = redis.run(&["INFO", "all"]);
        let numbers: HashMap<&str, &str> = info.lines().filter_map(|line| line.trim().split_once(':')).collect();
        let number = |name: &str| numbers[name].parse::<f64>().unwrap();
        let scripts = numbers.get("cmdstat_evalsha").map_or("0", |stat| {
            let calls = stat.strip_prefix("calls=").unwrap();
            calls.split(',').next().unwrap()
        });
        let counts = |of: fn(&Sharing) -> u64| gates.iter().map(|gate| of(gate)).sum();
        Reading {
            scripts: scripts.parse().unwrap(),
            cpu_s: number("used_cpu_user") + number("used_cpu_sys"),
            bytes_in: number("total_net_input_bytes"),
            bytes_out: number("total_net_output_bytes"),
            memory: number("used_memory"),
            asks: counts(|gate| gate.cluster.status().counts.asks),
            granted: counts(|gate| gate.cluster.status().counts.granted),
        }
    }
}

/// All keys, `rounds` times. How many requests passed, and how long it took.
async fn run(traffic: &Traffic, keys: u32, gates: &[Arc<Sharing>]) -> (u64, Duration) {
    let passed = Arc::new(AtomicU64::new(0));
    let begin = Instant::now();
    for round in 0..traffic.rounds {
        let (start, mut workers) = (Instant::now(), JoinSet::new());
        for worker in 0..AT_ONCE {
            let (gates, passed, every, burst) = (gates.to_vec(), passed.clone(), traffic.every, traffic.burst);
            workers.spawn(async move {
                for key in (worker..keys).step_by(AT_ONCE as usize) {
                    tokio::time::sleep_until(start + every * key / keys).await;
                    // Each time at another gate, as behind a balancer.
                    let gate = &gates[(key + round) as usize % GATES];
                    for _ in 0..burst {
                        passed.fetch_add(u64::from(gate.decide(key).await), Ordering::Relaxed);
                    }
                }
            });
        }
        workers.join_all().await;
    }
    (passed.load(Ordering::Relaxed), begin.elapsed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_active_keys_cost_the_store() {
    let is_full = std::env::var("TOLLGATE_PROOF").is_ok_and(|proof| proof == "full");
    let keys: u32 = if is_full { 100_000 } else { 2_000 };
    let every = Duration::from_secs(10) * keys / 100_000;
    let mut table = String::from(
        "| traffic | keys | requests | seconds | calls of windows | calls a request | all scripts | server CPU s | CPU µs a call | \
         bytes in, out a call | bytes of memory a key |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let traffics = [
        Traffic {
            name: "single requests, far apart",
            burst: 1,
            rounds: 3,
            every,
        },
        Traffic {
            name: "ten together",
            burst: 10,
            rounds: 2,
            every,
        },
    ];
    for traffic in traffics {
        let dir = tempfile::tempdir().unwrap();
        let redis = Redis::start(dir.path(), free_port(), &[]);
        let gates: Vec<Arc<Sharing>> = (0..GATES)
            .map(|n| Arc::new(Sharing::start(n, keys, redis.port)))
            .collect();
        while !gates
            .iter()
            .all(|gate| gate.cluster.status().is_usable && gate.cluster.status().gates == GATES as u32)
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let before = Reading::of(&redis, &gates);
        let (passed, took) = run(&traffic, keys, &gates).await;
        // What was asked for ahead lapses, and is given back: that is part of the cost.
        let at_the_end = Reading::of(&redis, &gates);
        tokio::time::sleep(Duration::from_millis(2 * WINDOW_MS / 8)).await;
        let after = Reading::of(&redis, &gates);
        let requests = u64::from(keys * traffic.burst * traffic.rounds);
        let asks = (after.asks - before.asks) as f64;
        let (scripts, cpu_s) = (after.scripts - before.scripts, after.cpu_s - before.cpu_s);
        let (bytes_in, bytes_out) = (after.bytes_in - before.bytes_in, after.bytes_out - before.bytes_out);
        writeln!(
            table,
            "| {} | {keys} | {requests} | {:.1} | {asks} | {:.3} | {scripts} | {cpu_s:.2} | {:.1} | {:.0}, {:.0} | {:.0} |",
            traffic.name,
            took.as_secs_f64(),
            asks / requests as f64,
            cpu_s * 1e6 / asks,
            bytes_in / asks,
            bytes_out / asks,
            (at_the_end.memory - before.memory) / f64::from(keys),
        )
        .unwrap();
        assert_eq!(passed, requests, "no limit is reached, and nothing is lost");
        assert!(
            after.granted - before.granted >= requests,
            "what passed was granted before"
        );
        assert!(
            scripts >= asks && asks >= f64::from(keys),
            "{scripts} scripts, {asks} calls"
        );
        assert!(asks <= 2.0 * requests as f64, "{asks} calls for {requests} requests");
        assert!(
            (100.0..600.0).contains(&(bytes_in / asks)),
            "{} bytes a call",
            bytes_in / asks
        );
        for gate in gates {
            Arc::into_inner(gate).expect("all requests have ended").end().await;
        }
    }
    println!("{table}");
    if is_full && std::env::var_os("TOLLGATE_RESULTS").is_some() {
        let text = format!(
            "# What active keys cost the store, through gates\n\nWritten by `TOLLGATE_PROOF=full TOLLGATE_RESULTS=1 cargo nextest run --profile proof --test cluster what_active_keys`. \
             {GATES} gates in one process make real decisions over one Redis 7.0 without persistence, on 2 shared cores (2026-11-26): CPU is \
             the server's own (`INFO cpu`), bytes are `total_net_*`, and hellos, the check of who answers and what is given back are in them. A limit of 100 in {} s; \
             all keys come round once in 10 s, or as fast as the machine lets them (seconds). Memory is at the end, when keys of an early round may have expired.\n\n{table}",
            WINDOW_MS / 1000
        );
        std::fs::write(
            concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/cluster_keys.md"),
            text,
        )
        .unwrap();
    }
}
