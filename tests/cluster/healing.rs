//! How soon a store that was away grants again. The limit is never reached here, so that nothing but the store's return is
//! waited for.

use crate::harness::{Gate, PATIENCE, Redis, Setup, client, free_port, offer};
use crate::{WAIT, answered_by_policy, two_gates};
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// Two gates under load while `disorder` befalls the store; how long after its end each was granted permits again.
async fn healed(what: &str, setup: &Setup, gates: &[Gate], disorder: impl AsyncFnOnce()) {
    let client = client();
    for gate in gates {
        gate.usable(&client).await;
    }
    let urls: Vec<String> = gates.iter().map(|gate| gate.url.clone()).collect();
    let (load, secret) = (client.clone(), setup.secret.clone());
    let offered = tokio::spawn(async move { offer(&load, &urls, &secret, 100, SECOND * 5).await });
    tokio::time::sleep(SECOND / 2).await;
    disorder().await;
    let back = Instant::now();
    let mut before = vec![];
    for gate in gates {
        before.push(gate.metric(&client, "cluster_granted_total").await);
    }
    for (gate, before) in gates.iter().zip(before) {
        while gate.metric(&client, "cluster_granted_total").await <= before
            || gate.metric(&client, "cluster_usable").await != 1.0
        {
            assert!(back.elapsed() < PATIENCE, "{what}: {}", gate.metrics(&client).await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let took = back.elapsed();
    let asked = offered.await.unwrap();
    println!("{what}: granted again after {took:?}");
    answered_by_policy(what, gates, &asked).await;
    assert!(took < SECOND, "{what}: granted again after {took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_returns_grants_within_a_second() {
    for on_loss in ["closed", "share", "local"] {
        // So long a window that a share, once given, would last for minutes.
        let setup = Setup::new(1_000_000, SECOND * 3_600, on_loss, WAIT).await;
        let mut redis = Redis::start(setup.dir.path(), free_port(), &[]);
        let (gates, wires) = two_gates(&setup, &redis).await;
        healed(&format!("{on_loss}, stopped"), &setup, &gates, async || {
            redis.process.signal("STOP");
            tokio::time::sleep(SECOND * 2).await;
            redis.process.signal("CONT");
        })
        .await;
        healed(
            &format!("{on_loss}, cut off from one gate"),
            &setup,
            &gates,
            async || {
                wires[0].cut(true);
                tokio::time::sleep(SECOND * 2).await;
                wires[0].cut(false);
            },
        )
        .await;
        healed(&format!("{on_loss}, flushed"), &setup, &gates, async || {
            redis.run(&["FLUSHALL"]);
        })
        .await;
        let port = redis.port;
        healed(
            &format!("{on_loss}, replaced by an empty one"),
            &setup,
            &gates,
            async || {
                redis.process.kill();
                tokio::time::sleep(SECOND * 2).await;
                redis = Redis::start(setup.dir.path(), port, &[]);
            },
        )
        .await;
    }
}
