//! A gate with shared counts hands over to a new process.

use crate::harness::{Redis, Setup, client, free_port, offer};
use crate::{WAIT, statuses};
use std::time::Duration;

/// Two gates under load, each upgraded twice within one window. What the old process had reserved and not spent is given
/// back, what it had spent stays counted, and the new one asks for its own: exactly the limit passes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gates_that_are_upgraded_give_no_more_than_the_limit() {
    const LIMIT: usize = 600;
    let (client, window) = (client(), Duration::from_secs(600));
    let setup = Setup::new(LIMIT as u32, window, "closed", WAIT).await;
    let redis = Redis::start(setup.dir.path(), free_port(), &[]);
    let store = format!("url: \"redis://127.0.0.1:{}\"", redis.port);
    let mut gates: Vec<_> = (0..2).map(|n| setup.gate(&format!("gate-{n}"), &store)).collect();
    for gate in &gates {
        gate.usable(&client).await;
    }
    let urls: Vec<String> = gates.iter().map(|gate| gate.url.clone()).collect();
    let offering = |seconds| {
        let (load, urls, secret) = (client.clone(), urls.clone(), setup.secret.clone());
        tokio::spawn(async move { offer(&load, &urls, &secret, 60, Duration::from_secs(seconds)).await })
    };
    let mut asked = vec![];
    for _ in 0..2 {
        let offered = offering(4);
        tokio::time::sleep(Duration::from_millis(500)).await;
        for gate in &mut gates {
            tokio::task::block_in_place(|| gate.upgrade());
            gate.usable(&client).await;
        }
        asked.extend(offered.await.unwrap());
    }
    let within = asked.iter().filter(|asked| asked.status == 200).count();
    println!("{:?} while four processes handed over", statuses(&asked));
    // The rest, and then some.
    asked.extend(offering(6).await.unwrap());
    let passed = asked.iter().filter(|asked| asked.status == 200).count();
    println!(
        "{passed} of {LIMIT} passed, {within} of them while gates were upgraded: {:?}",
        statuses(&asked)
    );
    assert!(
        asked.iter().all(|asked| matches!(asked.status, 200 | 429)),
        "{:?}",
        statuses(&asked)
    );
    assert!(asked.len() > LIMIT + LIMIT / 10, "{} were offered", asked.len());
    assert!(passed <= LIMIT, "{passed} of {LIMIT}");
    assert!(passed >= LIMIT * 97 / 100, "{passed} of {LIMIT}");
}
