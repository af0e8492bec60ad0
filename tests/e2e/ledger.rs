//! Every permit is in the ledger once: through a post that loses, repeats and re-orders, and when gates are killed.

use crate::between::Post;
use crate::fleet::{Account, Fleet, Gate, Key, Random, size};
use crate::harness::{PATIENCE, client};
use reqwest::StatusCode;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const ENVIRONMENTS: [&str; 3] = ["live", "test", "dev"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_has_every_permit_of_500_keys_whatever_happens_to_the_batches() {
    let requests = size(200_000, 20_000);
    let keys = size(500, 60);
    let fleet = Fleet::new().await;
    let control = fleet.control();
    let post = Post::to(&control.url).await;
    let gate = fleet.gate("gate-1", &post.url);
    let account = control.account("ledger@example.com").await;
    let keys = make_keys(&account, keys).await;
    gate.until_it_says(StatusCode::OK, &keys.last().unwrap().1.secret).await;
    // What was asked until then counts, too.
    let mut passed: BTreeMap<String, u64> = BTreeMap::new();
    let warm = settled(&account, &gate).await;

    let (next, keys) = (Arc::new(AtomicU64::new(0)), Arc::new(keys));
    let workers: Vec<_> = (0..8)
        .map(|worker| {
            let (next, keys, url) = (Arc::clone(&next), Arc::clone(&keys), gate.url.clone());
            tokio::spawn(async move {
                let client = client();
                let mut random = Random::new();
                let mut passed = [0_u64; 3];
                while next.fetch_add(1, Ordering::Relaxed) < requests as u64 {
                    let (environment, key) = &keys[random.below(keys.len() as u64) as usize];
                    let request = client.get(format!("{url}/any")).header("x-api-key", &key.secret);
                    let status = request.send().await.unwrap().status();
                    assert_eq!(status, StatusCode::OK, "worker {worker}");
                    passed[*environment] += 1;
                }
                passed
            })
        })
        .collect();
    for worker in workers {
        for (environment, count) in ENVIRONMENTS.iter().zip(worker.await.unwrap()) {
            *passed.entry((*environment).to_owned()).or_default() += count;
        }
    }
    // At some hundred requests a second a batch holds thousands; a few more make sure that every fault was met.
    let mut extra = 0;
    while post.counts().delivered_late == 0 || post.counts().repeated == 0 || post.counts().lost == 0 {
        let (environment, key) = &keys[extra % keys.len()];
        assert_eq!(gate.ask(&client(), "/any", &key.secret).await, StatusCode::OK);
        *passed.get_mut(ENVIRONMENTS[*environment]).unwrap() += 1;
        extra += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(extra < 3_000, "not every fault was met: {:?}", post.counts());
    }
    post.be_honest();
    for (environment, count) in &warm {
        *passed.entry(environment.clone()).or_default() += count;
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (in_ledger, billable) = account.permits().await;
        if in_ledger == passed {
            assert_eq!(billable, passed["live"], "only live is billable");
            break;
        }
        for (environment, count) in &in_ledger {
            assert!(
                *count <= passed[environment],
                "{environment} was counted twice: {in_ledger:?}"
            );
        }
        assert!(
            Instant::now() < deadline,
            "{in_ledger:?} in the ledger, {passed:?} passed"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Nothing comes late: one more flush, and the sums stay.
    assert_eq!(
        gate.ask(&client(), "/any", "pxk_live_nobody").await,
        StatusCode::UNAUTHORIZED
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(account.permits().await.0, passed);
    println!(
        "{} requests, {:?}: in the ledger {passed:?}",
        requests + extra,
        post.counts()
    );
}

async fn make_keys(account: &Account, count: usize) -> Vec<(usize, Key)> {
    let mut keys = vec![];
    for n in 0..count {
        let key = account.create_key(&format!("key {n}"), ENVIRONMENTS[n % 3]).await;
        keys.push((n % 3, key));
    }
    keys
}

/// What is in the ledger once every batch of the gate's has arrived.
async fn settled(account: &Account, gate: &Gate) -> BTreeMap<String, u64> {
    let counted = |text: &str| -> u64 {
        text.lines()
            .filter(|line| line.starts_with("tollgate_requests_total{code=\"PASSED\""))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>() as u64
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let passed = counted(&gate.metrics().await);
        let (permits, _) = account.permits().await;
        if permits.values().sum::<u64>() == passed {
            return permits;
        }
        assert!(Instant::now() < deadline, "{permits:?} in the ledger, {passed} passed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// One life of a gate under requests, from its start to its kill.
#[derive(Default)]
struct Life {
    /// When each request was answered with success.
    passed: Vec<Instant>,
    /// Requests that were under way: they may have been counted.
    unanswered: u64,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gate_killed_at_random_moments_loses_a_second_at_most_and_counts_nothing_twice() {
    let kills = size(50, 6);
    let fleet = Fleet::new().await;
    let control = fleet.control();
    let account = control.account("killed@example.com").await;
    let keys = make_keys(&account, 10).await;
    let mut gate = fleet.gate("gate-1", &control.url);
    gate.until_it_says(StatusCode::OK, &keys[9].1.secret).await;
    let mut random = Random::new();
    // Of the first life, what was asked to see that it is ready.
    let (mut before, mut asked_before) = (0, settled(&account, &gate).await.values().sum::<u64>());
    let (mut lost_in_all, mut passed_in_all, mut oldest) = (0, 0, Duration::ZERO);
    before += asked_before;
    for kill in 0..kills {
        let life = Duration::from_millis(100 + random.below(2_500));
        let (end, killed) = live(&gate, &keys, life).await;
        // The journal's and the outbox's files are as the kill left them.
        let mut dead = gate;
        let _ = dead.process.wait(PATIENCE);
        gate = fleet.gate("gate-1", &control.url);
        gate.ready().await;
        let after = quiet(&account).await;
        let counted = after - before;
        let passed = end.passed.len() as u64;
        assert!(
            counted <= passed + end.unanswered + asked_before,
            "life {kill}: {counted} counted, {passed} passed, {} under way: counted twice",
            end.unanswered
        );
        let lost = passed.saturating_sub(counted);
        if lost > 0 {
            let first_lost = end.passed[(passed - lost) as usize];
            oldest = oldest.max(killed.duration_since(first_lost));
        }
        (before, asked_before) = (after, 0);
        lost_in_all += lost;
        passed_in_all += passed;
    }
    println!(
        "{kills} kills: {passed_in_all} passed, {lost_in_all} of them lost; the oldest of those was answered {oldest:?} before its \
         kill"
    );
    if size(1, 0) == 1 {
        assert!(oldest <= Duration::from_secs(1), "{oldest:?}");
    }
}

/// Requests from four connections until the gate is killed; and when that was.
async fn live(gate: &Gate, keys: &[(usize, Key)], life: Duration) -> (Life, Instant) {
    let dead = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..4)
        .map(|worker| {
            let (url, dead, key) = (gate.url.clone(), Arc::clone(&dead), keys[worker].1.secret.clone());
            tokio::spawn(async move {
                let client = client();
                let mut life = Life::default();
                while !dead.load(Ordering::Relaxed) {
                    let request = client.get(format!("{url}/any")).header("x-api-key", &key);
                    match request.send().await {
                        Ok(answer) => {
                            assert_eq!(answer.status(), StatusCode::OK);
                            life.passed.push(Instant::now());
                        }
                        Err(_) => {
                            life.unanswered += 1;
                            break;
                        }
                    }
                    // A pace that the ledger's own work beside it does not notice.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                life
            })
        })
        .collect();
    tokio::time::sleep(life).await;
    let killed = Instant::now();
    gate.process.signal("KILL");
    dead.store(true, Ordering::Relaxed);
    let mut all = Life::default();
    for worker in workers {
        let life = worker.await.unwrap();
        all.passed.extend(life.passed);
        all.unanswered += life.unanswered;
    }
    all.passed.sort_unstable();
    (all, killed)
}

/// The ledger's sum once it has stood still for two seconds: whatever a gate had on its disk has arrived then.
async fn quiet(account: &Account) -> u64 {
    let (mut seen, mut since) = (0, Instant::now());
    while since.elapsed() < Duration::from_secs(2) {
        let sum = account.permits().await.0.values().sum();
        if sum != seen {
            (seen, since) = (sum, Instant::now());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    seen
}
