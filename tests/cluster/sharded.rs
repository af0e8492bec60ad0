//! A real Redis Cluster: three masters, each with a replica.

use crate::harness::{Gate, PATIENCE, Redis, Setup, client, free_port, most_in_a_window, offer, until};
use crate::{LIMIT, WAIT, WINDOW, answered_by_policy, heals, statuses};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Its nodes. The first three were masters when it was made.
struct Nodes(Vec<Redis>);

impl Nodes {
    fn start(dir: &Path) -> Self {
        let nodes: Vec<Redis> = (0..6)
            .map(|_| {
                let (port, bus) = (free_port(), free_port().to_string());
                let settings = [
                    "--cluster-enabled",
                    "yes",
                    "--cluster-node-timeout",
                    "1000",
                    "--cluster-port",
                    &bus,
                ];
                Redis::start(dir, port, &settings)
            })
            .collect();
        let mut create = Command::new("redis-cli");
        create.args(["--cluster", "create"]);
        create.args(nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)));
        let created = create
            .args(["--cluster-replicas", "1", "--cluster-yes"])
            .output()
            .unwrap();
        assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stdout));
        let nodes = Nodes(nodes);
        let follows = |node: &Redis| {
            let info = node.run(&["INFO", "replication"]);
            info.contains("role:master") || info.contains("master_link_status:up")
        };
        until(
            || {
                let all_ok = nodes
                    .0
                    .iter()
                    .all(|node| node.run(&["CLUSTER", "INFO"]).contains("cluster_state:ok"));
                (all_ok && nodes.0.iter().all(follows)).then_some(())
            },
            || "the Cluster does not come up".into(),
        );
        nodes
    }

    /// What a gate is told of it: any two nodes lead to the others.
    fn store(&self) -> String {
        let (a, b) = (self.0[0].port, self.0[1].port);
        format!("url: [\"redis://127.0.0.1:{a}\", \"redis://127.0.0.1:{b}\"], cluster_mode: true")
    }

    fn is_master(node: &Redis) -> bool {
        node.try_run(&["ROLE"]).is_some_and(|role| role.starts_with("master"))
    }

    /// The master that has a window of ours.
    fn holds_the_count(&self) -> usize {
        let holds = |node: &Redis| Self::is_master(node) && node.run(&["KEYS", "*w:2000:*"]).contains("key_me");
        self.0.iter().position(holds).expect("the count lies somewhere")
    }
}

/// Three gates, offered ten times the limit, evenly and on one, through a Cluster.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gates_share_their_counts_through_a_cluster() {
    let client = client();
    let setup = Setup::new(LIMIT, WINDOW, "closed", WAIT).await;
    let mut nodes = Nodes::start(setup.dir.path());
    let gates: Vec<Gate> = (0..3)
        .map(|n| setup.gate(&format!("gate-{n}"), &nodes.store()))
        .collect();
    for gate in &gates {
        gate.usable(&client).await;
    }
    let urls: Vec<String> = gates.iter().map(|gate| gate.url.clone()).collect();
    let windows = 3;
    for (demand, urls) in [("even", &urls[..]), ("all on one", &urls[..1])] {
        tokio::time::sleep(WINDOW * 3 / 2).await;
        let per_second = LIMIT * 10 / WINDOW.as_secs() as u32;
        let asked = offer(&client, urls, &setup.secret, per_second, WINDOW * windows).await;
        let (most, passed) = (most_in_a_window(&asked, WINDOW), passed(&asked));
        println!(
            "Cluster, {demand}: {:?}, most in a window {most} of {LIMIT}",
            statuses(&asked)
        );
        answered_by_policy(demand, &gates, &asked).await;
        assert!(most <= LIMIT as usize, "{most} in a window");
        assert!(passed > LIMIT as usize, "{passed} passed");
    }
    // The master that has the count dies for good, and its replica takes over.
    let offered = {
        let (load, urls, secret) = (client.clone(), urls.clone(), setup.secret.clone());
        tokio::spawn(async move { offer(&load, &urls, &secret, 100, Duration::from_secs(10)).await })
    };
    tokio::time::sleep(WINDOW).await;
    let dead = nodes.holds_the_count();
    let masters = nodes.0.iter().filter(|node| Nodes::is_master(node)).count();
    nodes.0[dead].process.kill();
    let killed = Instant::now();
    let promoted = || {
        let alive = nodes.0.iter().enumerate().filter(|(n, _)| *n != dead);
        (alive.filter(|(_, node)| Nodes::is_master(node)).count() == masters).then_some(())
    };
    tokio::task::block_in_place(|| until(promoted, || "no replica takes over".into()));
    let took_over = killed.elapsed();
    let (usable, granted) = heals(&client, &gates).await;
    let asked = offered.await.unwrap();
    let (most, passed) = (most_in_a_window(&asked, WINDOW), passed(&asked));
    println!(
        "Cluster, a master killed: taken over after {took_over:?}, usable {usable:?} later, granted again after {granted:?}; \
         {:?}, most in a window {most} of {LIMIT}",
        statuses(&asked)
    );
    answered_by_policy("a master killed", &gates, &asked).await;
    assert!(most <= LIMIT as usize, "{most} in a window");
    assert!(passed > LIMIT as usize, "{passed} passed");
    assert!(granted < PATIENCE);
}

fn passed(asked: &[crate::Asked]) -> usize {
    asked.iter().filter(|asked| asked.status == 200).count()
}
