//! Counts shared between real gates through a real Redis, in order and in every disorder.
//!
//! `TOLLGATE_RESULTS=1` writes the tables to `benches/results/cluster.md`.

mod cost;
#[path = "../gate_support/mod.rs"]
mod gate_support;
mod harness;
mod healing;
mod lateness;
mod sharded;
mod sharing_gate;
mod upgrade;

use harness::{Asked, Gate, PATIENCE, Redis, Setup, Wire, client, free_port, most_in_a_window, offer, until};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// All gates together, offered ten times the limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_gates_give_no_more_than_one() {
    const LIMIT: u32 = 100;
    let (window, client) = (Duration::from_secs(2), client());
    let mut table = String::from(
        "| gates | demand | offered | admitted | most in a window | limit | under-admission | waited | calls a request |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut everything = vec![];
    for gates in [2, 4, 8] {
        let setup = Setup::new(LIMIT, window, "closed", WAIT).await;
        let redis = Redis::start(setup.dir.path(), free_port(), &[]);
        let store = format!("url: \"redis://127.0.0.1:{}\"", redis.port);
        let gates: Vec<Gate> = (0..gates).map(|n| setup.gate(&format!("gate-{n}"), &store)).collect();
        for gate in &gates {
            gate.usable(&client).await;
        }
        let all: Vec<String> = gates.iter().map(|gate| gate.url.clone()).collect();
        for (demand, urls) in [("even", &all[..]), ("all on one", &all[..1])] {
            // What went before has left the window.
            tokio::time::sleep(window * 3 / 2).await;
            let before = sums(&client, &gates).await;
            let asked = offer(
                &client,
                urls,
                &setup.secret,
                LIMIT * 10 / window.as_secs() as u32,
                window * 3,
            )
            .await;
            let after = sums(&client, &gates).await;
            everything.push(gates[0].metrics(&client).await);
            let passed = asked.iter().filter(|asked| asked.status == 200).count();
            assert!(
                asked.iter().all(|asked| matches!(asked.status, 200 | 429)),
                "{:?}",
                statuses(&asked)
            );
            let most = most_in_a_window(&asked, window);
            assert!(
                most <= LIMIT as usize,
                "{most} in a window, {} gates, {demand}",
                gates.len()
            );
            assert!(passed > LIMIT as usize, "{passed} passed");
            writeln!(
                table,
                "| {} | {demand} | {} | {passed} | {most} | {LIMIT} | {:.1} % | {:.1} % | {:.3} |",
                gates.len(),
                asked.len(),
                100.0 * (1.0 - passed as f64 / (3.0 * f64::from(LIMIT))),
                100.0 * (after.0 - before.0) / asked.len() as f64,
                (after.1 - before.1) / asked.len() as f64,
            )
            .unwrap();
        }
    }
    println!("{table}");
    let text = everything.join("\n");
    for (name, _) in tollgate::app::metric_names()
        .into_iter()
        .filter(|(name, _)| name.starts_with("tollgate_cluster_"))
    {
        assert!(text.contains(&format!("\n{name} ")), "{name} is not among the metrics");
    }
    if std::env::var_os("TOLLGATE_RESULTS").is_some() {
        let text = format!(
            "# Gates that share a limit through Redis\n\nWritten by `TOLLGATE_RESULTS=1 cargo nextest run --test cluster many_gates`. Real processes on one machine, a limit of {LIMIT} \
             in 2 s, ten times as much offered for three windows. Under-admission is against three times the limit.\n\n{table}"
        );
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/results/cluster.md"), text).unwrap();
    }
}

/// How many requests waited, and how many calls were made.
async fn sums(client: &reqwest::Client, gates: &[Gate]) -> (f64, f64) {
    let mut sums = (0.0, 0.0);
    for gate in gates {
        sums.0 += gate.metric(client, "cluster_waited_total").await;
        sums.1 += gate.metric(client, "cluster_calls_total").await;
    }
    sums
}

fn statuses(asked: &[Asked]) -> std::collections::BTreeMap<u16, usize> {
    let mut counts = std::collections::BTreeMap::new();
    asked
        .iter()
        .for_each(|asked| *counts.entry(asked.status).or_default() += 1);
    counts
}

const LIMIT: u32 = 60;
const WINDOW: Duration = Duration::from_secs(2);
const WAIT: Duration = Duration::from_millis(20);
/// What a busy machine may add: timers that are late, and nothing else (`lateness.rs`; `cluster_sim` has the wait in virtual
/// time).
const SCHEDULING: Duration = Duration::from_millis(250);

/// Two gates under load while `disorder` befalls the store; all of it is checked against the limit.
async fn through(what: &str, setup: &Setup, gates: &[Gate], disorder: impl AsyncFnOnce()) {
    let client = client();
    for gate in gates {
        gate.usable(&client).await;
    }
    let urls: Vec<String> = gates.iter().map(|gate| gate.url.clone()).collect();
    let (load, secret) = (client.clone(), setup.secret.clone());
    let offered = tokio::spawn(async move { offer(&load, &urls, &secret, 150, Duration::from_secs(6)).await });
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    disorder().await;
    let (usable, granted) = heals(&client, gates).await;
    let asked = offered.await.unwrap();
    let passed = asked.iter().filter(|asked| asked.status == 200).count();
    let most = most_in_a_window(&asked, WINDOW);
    println!(
        "{what}: {:?}, most in a window {most} of {LIMIT}, usable after {usable:?}, granted again after {granted:?}",
        statuses(&asked)
    );
    answered_by_policy(what, gates, &asked).await;
    assert!(most <= LIMIT as usize, "{what}: {most} in a window");
    assert!(passed > LIMIT as usize / 2, "{what}: {passed} passed");
    // The window may be full of what was given before; `healing.rs` looks at how soon grants go on where it is not.
    assert!(
        granted <= WINDOW + Duration::from_secs(1),
        "{what}: granted again after {granted:?}"
    );
}

/// Waits until the store has granted every gate permits again. How long it took until grants counted, and until there
/// was one: the window may be full when the store returns.
async fn heals(client: &reqwest::Client, gates: &[Gate]) -> (Duration, Duration) {
    let back = Instant::now();
    let mut before = vec![];
    for gate in gates {
        before.push(gate.metric(client, "cluster_granted_total").await);
    }
    for gate in gates {
        gate.usable(client).await;
    }
    let usable = back.elapsed();
    for (gate, before) in gates.iter().zip(before) {
        while gate.metric(client, "cluster_granted_total").await <= before {
            assert!(
                back.elapsed() < PATIENCE,
                "the store grants nothing any more: {}",
                gate.metrics(client).await
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    (usable, back.elapsed())
}

/// Every request was answered, as the policy says, and none waited for permits longer than it may, by the gates' own
/// clocks. What the client sees is longer: it shares two cores with all of this.
async fn answered_by_policy(what: &str, gates: &[Gate], asked: &[Asked]) {
    let mut waited = Duration::ZERO;
    for gate in gates {
        let longest = gate.metric(&client(), "cluster_longest_wait_seconds").await;
        waited = waited.max(Duration::from_secs_f64(longest));
    }
    let late = asked.iter().map(|asked| asked.late).max().unwrap();
    let longest = asked.iter().map(|asked| asked.answered - asked.sent).max().unwrap();
    println!("{what}: longest wait {waited:?}; longest answer {longest:?}, latest request {late:?}");
    assert!(
        asked.iter().all(|asked| matches!(asked.status, 200 | 429)),
        "{what}: {:?}",
        statuses(asked)
    );
    assert!(waited <= WAIT + SCHEDULING, "{what}: a request waited for {waited:?}");
}

async fn two_gates(setup: &Setup, redis: &Redis) -> (Vec<Gate>, Vec<Wire>) {
    let wires = [Wire::to(redis.port).await, Wire::to(redis.port).await];
    let gates = wires.iter().enumerate().map(|(n, wire)| {
        setup.gate(
            &format!("gate-{n}"),
            &format!("url: \"redis://127.0.0.1:{}\"", wire.port),
        )
    });
    (gates.collect(), wires.to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_fails_forgives_nothing() {
    let setup = Setup::new(LIMIT, WINDOW, "closed", WAIT).await;
    let mut redis = Redis::start(setup.dir.path(), free_port(), &[]);
    let (gates, wires) = two_gates(&setup, &redis).await;
    let second = Duration::from_secs(1);
    through("stopped", &setup, &gates, async || {
        redis.process.signal("STOP");
        tokio::time::sleep(second).await;
        redis.process.signal("CONT");
    })
    .await;
    through("slow by 300 ms", &setup, &gates, async || {
        wires.iter().for_each(|wire| wire.delay(Duration::from_millis(150)));
        tokio::time::sleep(second * 2).await;
        wires.iter().for_each(|wire| wire.delay(Duration::ZERO));
    })
    .await;
    through("cut off from one gate", &setup, &gates, async || {
        wires[0].cut(true);
        tokio::time::sleep(second).await;
        wires[0].cut(false);
    })
    .await;
    through("flushed", &setup, &gates, async || {
        redis.run(&["FLUSHALL"]);
    })
    .await;
    let port = redis.port;
    through("killed, and replaced by an empty one", &setup, &gates, async || {
        redis.process.kill();
        tokio::time::sleep(second).await;
        redis = Redis::start(setup.dir.path(), port, &[]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fail_over_by_sentinel_forgives_nothing() {
    let setup = Setup::new(LIMIT, WINDOW, "closed", WAIT).await;
    let dir = setup.dir.path();
    let mut master = Redis::start(dir, free_port(), &[]);
    let replica = Redis::start(
        dir,
        free_port(),
        &["--replicaof", "127.0.0.1", &master.port.to_string()],
    );
    let linked = || {
        replica
            .run(&["INFO", "replication"])
            .contains("master_link_status:up")
            .then_some(())
    };
    until(linked, || "the replica does not follow".into());
    let config = dir.join("sentinel.conf");
    let text = format!(
        "sentinel monitor m 127.0.0.1 {} 1\nsentinel down-after-milliseconds m 500\nsentinel failover-timeout m 3000\n",
        master.port
    );
    std::fs::write(&config, text).unwrap();
    let port = free_port();
    let process = Redis::sentinel(dir, &config, port);
    let known = || {
        process
            .run(&["SENTINEL", "replicas", "m"])
            .contains(&replica.port.to_string())
            .then_some(())
    };
    until(known, || "the Sentinel does not know the replica".into());
    let store = format!("url: \"redis://127.0.0.1:{port}\", sentinel_master: m");
    let gates: Vec<Gate> = (0..2).map(|n| setup.gate(&format!("gate-{n}"), &store)).collect();
    through("failed over", &setup, &gates, async || {
        master.process.kill();
        // The Sentinel disconnects everybody from the server that it promotes: an answer may be missing.
        let promoted = || replica.try_run(&["ROLE"]).filter(|role| role.starts_with("master"));
        tokio::task::block_in_place(|| until(promoted, || "no fail-over".into()));
    })
    .await;
}

/// Two gates under load that lose the store for two windows; when that began and ended, and what came of the requests.
async fn cut_off(on_loss: &'static str) -> (Vec<Asked>, Instant, Instant) {
    let client = client();
    let setup = Setup::new(LIMIT, WINDOW, on_loss, WAIT).await;
    let redis = Redis::start(setup.dir.path(), free_port(), &[]);
    let (gates, wires) = two_gates(&setup, &redis).await;
    for gate in &gates {
        gate.usable(&client).await;
    }
    // Both know that they are two.
    for gate in &gates {
        while gate.metric(&client, "cluster_gates").await < 2.0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let urls: Vec<String> = gates.iter().map(|gate| gate.url.clone()).collect();
    let (load, secret) = (client.clone(), setup.secret.clone());
    let offered = tokio::spawn(async move { offer(&load, &urls, &secret, 150, Duration::from_secs(10)).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let lost = Instant::now();
    wires.iter().for_each(|wire| wire.cut(true));
    tokio::time::sleep(WINDOW * 5 / 2).await;
    let back = Instant::now();
    wires.iter().for_each(|wire| wire.cut(false));
    let (usable, granted) = heals(&client, &gates).await;
    println!("{on_loss}: usable after {usable:?}, granted again after {granted:?}");
    let asked = offered.await.unwrap();
    answered_by_policy(on_loss, &gates, &asked).await;
    (asked, lost, back)
}

/// Of the requests, those that were sent and answered between two times.
fn between(asked: &[Asked], from: Instant, to: Instant) -> Vec<Asked> {
    let within = asked.iter().filter(|asked| asked.sent >= from && asked.answered < to);
    within.copied().collect()
}

fn of_gate(asked: &[Asked], gate: usize) -> Vec<Asked> {
    asked.iter().filter(|asked| asked.gate == gate).copied().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_share_a_gate_that_loses_the_store_gives_its_share() {
    let (asked, lost, back) = cut_off("share").await;
    let most = most_in_a_window(&asked, WINDOW);
    // What was given in the shared window has left it.
    let late = between(&asked, lost + WINDOW * 3 / 2, back);
    let each = [0, 1].map(|gate| most_in_a_window(&of_gate(&late, gate), WINDOW));
    println!("share: most in a window {most} of {LIMIT}, while lost {each:?}");
    assert!(most <= 2 * LIMIT as usize, "{most} in a window");
    assert!(
        each.iter()
            .all(|most| (LIMIT as usize / 4..=LIMIT as usize / 2).contains(most)),
        "{each:?} in a window"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_local_a_gate_that_loses_the_store_counts_alone() {
    let (asked, lost, back) = cut_off("local").await;
    let whole = [0, 1].map(|gate| most_in_a_window(&of_gate(&asked, gate), WINDOW));
    let late = between(&asked, lost + WINDOW, back);
    let each = [0, 1].map(|gate| most_in_a_window(&of_gate(&late, gate), WINDOW));
    println!("local: most in a window at each gate {whole:?} of {LIMIT}, while lost {each:?}");
    assert!(
        whole.iter().all(|most| *most <= LIMIT as usize),
        "{whole:?} in a window"
    );
    assert!(
        each.iter().all(|most| *most > LIMIT as usize / 2),
        "{each:?} in a window"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gate_killed_and_started_again_forgives_nothing() {
    let (client, window) = (client(), Duration::from_secs(60));
    let setup = Setup::new(40, window, "share", WAIT).await;
    let redis = Redis::start(setup.dir.path(), free_port(), &[]);
    let mut gate = setup.gate("gate-0", &format!("url: \"redis://127.0.0.1:{}\"", redis.port));
    let mut passed = 0;
    for _ in 0..3 {
        gate.usable(&client).await;
        let asked = offer(
            &client,
            std::slice::from_ref(&gate.url),
            &setup.secret,
            100,
            Duration::from_millis(150),
        )
        .await;
        passed += asked.iter().filter(|asked| asked.status == 200).count();
        gate.kill_and_start_again();
    }
    gate.usable(&client).await;
    let asked = offer(
        &client,
        std::slice::from_ref(&gate.url),
        &setup.secret,
        100,
        Duration::from_secs(1),
    )
    .await;
    passed += asked.iter().filter(|asked| asked.status == 200).count();
    // What a killed gate had reserved and not spent counts as spent: a few, and never the other way.
    assert!((20..=40).contains(&passed), "{passed} of 40 over three kills");
}
