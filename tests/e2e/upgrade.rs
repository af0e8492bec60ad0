//! Reloads and upgrades of the program under load: no request fails, and every count goes over.

use crate::gate::{Gate, Spec, Upstream, count_logged, eventually, left, secret, size};
use crate::load::{Kind, Load};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Every client here is served by the processes that follow each other, with reloads good and bad in turn. Each request
/// is answered once, reaches the upstream once, and is logged once; each key's window has every one of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reloads_and_upgrades_under_load_lose_nothing() {
    let requests = size(60_000, 1_000_000);
    let (reloads, upgrades) = (size(6, 50), size(3, 10));
    const KEYS: usize = 50;
    let upstream = Upstream::start(requests).await;
    let mut spec = Spec::new(upstream.address);
    spec.keys = KEYS;
    let log = tempfile::tempdir().unwrap();
    let access_log = log.path().join("access.log");
    spec.access = format!("{{format: json, path: {}, buffer_lines: 65536}}", access_log.display());
    let limit = u64::from(spec.limit);
    let mut gate = Gate::start(spec);

    let load = Load::new(gate.address(), requests, KEYS);
    let kinds = [
        (Kind::KeptAlive, 24),
        (Kind::Http2, 8),
        (Kind::LongBody, 2),
        (Kind::Slow, 8),
    ];
    let clients: Vec<_> = kinds
        .iter()
        .flat_map(|(kind, count)| std::iter::repeat_n(*kind, *count))
        .map(|kind| load.client(kind))
        .collect();
    // Upgrades spread evenly among the reloads, all of it over the time of the load.
    let steps = reloads + upgrades;
    let is_upgrade = |step: usize| (step + 1) * upgrades / steps > step * upgrades / steps;
    let (mut good, mut bad, mut pauses) = (0_u32, 0_u32, vec![]);
    let begun = Instant::now();
    for step in 0..steps {
        let from = requests / 20 + step * (requests * 8 / 10) / steps;
        while load.done.load(Ordering::Relaxed) < from {
            assert!(
                !clients.iter().any(|client| client.is_finished()),
                "a client has ended early:\n{}",
                gate.log()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if is_upgrade(step) {
            let answer = tokio::task::block_in_place(|| gate.upgrade());
            pauses.push(answer["pauseMs"].as_f64().unwrap());
        } else if bad < good {
            bad += 1;
            gate.break_configuration();
            let output = tokio::task::block_in_place(|| gate.command(&["reload"]));
            assert_eq!(output.status.code(), Some(3), "{output:?}");
            gate.configure();
            let policy = gate.ask("/probe/policy", 0).await;
            let policy = policy.headers()["ratelimit-policy"].to_str().unwrap().to_owned();
            assert!(policy.contains(&format!(";q={};", gate.spec.probe_limit)), "{policy}");
        } else {
            good += 1;
            gate.spec.probe_limit = 1_000_000 + good;
            gate.configure();
            let output = tokio::task::block_in_place(|| gate.command(&["reload"]));
            assert!(output.status.success(), "{output:?}");
            // In force for what was counted already, as soon as the command is back.
            let before = u64::from(gate.spec.probe_limit);
            let probe = gate.ask("/probe/limit", 0).await;
            let policy = probe.headers()["ratelimit-policy"].to_str().unwrap();
            assert!(policy.contains(&format!(";q={before};")), "{policy}");
            assert!(left(&probe) < before);
        }
    }
    for client in clients {
        client.await.unwrap_or_else(|error| panic!("{error}\n{}", gate.log()));
    }
    let took = begun.elapsed();

    // The windows first: one more request of each key says what is left.
    for key in 0..KEYS {
        let spent = (requests / KEYS + usize::from(key < requests % KEYS)) as u64;
        assert_eq!(
            gate.left_after_one_more("/count", key).await,
            limit - spent - 1,
            "key {key} after {} processes",
            upgrades + 1
        );
    }
    gate.signal("TERM");
    tokio::task::block_in_place(|| gate.wait());
    let mut logged = vec![0_u8; requests];
    count_logged(&access_log, &mut logged);
    for (n, logged) in logged.iter().enumerate() {
        let counts = [
            load.answered[n].load(Ordering::Relaxed),
            upstream.seen[n].load(Ordering::Relaxed),
            *logged,
        ];
        assert_eq!(counts, [1, 1, 1], "request {n}: answered, reached the upstream, logged");
    }
    let kinds = load.by_kind.each_ref().map(|count| count.load(Ordering::Relaxed));
    println!(
        "{requests} requests in {took:.1?}: kept-alive, HTTP/2, long bodies, slow: {kinds:?}; {} connections of HTTP/1; \
         {reloads} reloads, {upgrades} upgrades, pauses in ms: {pauses:.0?}; 0 failed",
        load.connections.load(Ordering::Relaxed)
    );
    assert!(kinds.iter().all(|count| *count > 0), "{kinds:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_limit_applies_at_once_to_what_is_counted() {
    let upstream = Upstream::start(1).await;
    let mut spec = Spec::new(upstream.address);
    spec.probe_limit = 10;
    let mut gate = Gate::start(spec);
    for left in (5..10).rev() {
        assert_eq!(gate.left_after_one_more("/probe/a", 0).await, left);
    }
    for (limit, answer) in [(5, 429), (6, 200), (6, 429), (20, 200)] {
        gate.spec.probe_limit = limit;
        gate.configure();
        assert!(gate.command(&["reload"]).status.success());
        assert_eq!(gate.ask("/probe/a", 0).await.status().as_u16(), answer, "limit {limit}");
    }
    // And a limit that only the new process's configuration has.
    gate.spec.probe_limit = 8;
    gate.configure();
    tokio::task::block_in_place(|| gate.upgrade());
    assert_eq!(gate.left_after_one_more("/probe/a", 0).await, 0);
    assert_eq!(gate.ask("/probe/a", 0).await.status().as_u16(), 429);
}

/// A request on a connection that the old process accepted is decided by the new one; what was under way is finished.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_process_finishes_what_is_under_way_and_decides_nothing_more() {
    let upstream = Upstream::start(1).await;
    let mut spec = Spec::new(upstream.address);
    spec.probe_limit = 10;
    let mut gate = Gate::start(spec);
    let held = gate
        .client
        .get(format!("{}/held", gate.url))
        .header("x-api-key", secret(0));
    let held = tokio::spawn(held.send());
    upstream.await_held(1).await;
    let (idle, url) = (crate::harness::client(), gate.url.clone());
    let on_idle = async |path: &str| {
        let request = idle.get(format!("{}{path}", url)).header("x-api-key", secret(0));
        request.send().await.unwrap()
    };
    assert_eq!(left(&on_idle("/probe/before").await), 9);
    let old = gate.pid();
    let new = {
        let output = tokio::task::block_in_place(|| gate.command(&["upgrade", "--json"]));
        assert!(output.status.success(), "{output:?}");
        gate.status().await["pid"].as_u64().unwrap() as u32
    };
    assert_ne!(old, new);
    assert!(
        gate.is_running(),
        "the old process waits for the request that is under way"
    );
    let after = on_idle("/probe/after").await;
    assert_eq!(
        (after.status().as_u16(), left(&after)),
        (200, 8),
        "the counts are the new process's"
    );
    // A third one has to wait until the first has gone.
    let refused = gate
        .client
        .post(format!("{}/upgrade", gate.admin()))
        .send()
        .await
        .unwrap();
    assert_eq!(refused.status().as_u16(), 422);
    assert!(
        refused
            .text()
            .await
            .unwrap()
            .contains("the process before this one has not ended yet")
    );
    upstream.release.send_replace(true);
    assert_eq!(held.await.unwrap().unwrap().text().await.unwrap(), "released");
    tokio::task::block_in_place(|| gate.wait());
    gate.became(new);
    assert_eq!(left(&on_idle("/probe/after").await), 7);
    eventually("being alone", async || {
        gate.status().await["predecessorDraining"] == false
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quit_hands_over_to_the_process_that_waits() {
    let upstream = Upstream::start(1).await;
    let mut gate = Gate::start(Spec::new(upstream.address));
    let before = gate.left_after_one_more("/a", 0).await;
    let (pid, _process) = gate.spawn(&["--upgrade"]);
    let place = gate.state().join("run/upgrade/new.sock");
    eventually("a waiting process", async || place.exists()).await;
    gate.signal("QUIT");
    tokio::task::block_in_place(|| gate.wait());
    gate.became(pid);
    assert_eq!(gate.left_after_one_more("/a", 0).await, before - 1);
    assert_eq!(gate.status().await["pid"], pid);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quit_without_a_successor_keeps_serving() {
    let upstream = Upstream::start(1).await;
    let gate = Gate::start(Spec::new(upstream.address));
    let before = gate.left_after_one_more("/a", 0).await;
    gate.signal("QUIT");
    eventually("a word about it", async || {
        gate.log().contains("QUIT: nobody waits to take over")
    })
    .await;
    for n in 1..=20 {
        assert_eq!(gate.left_after_one_more("/a", 0).await, before - n);
    }
    assert!(gate.is_running());
}

/// Whatever is wrong with the new process, the old one takes its work up again, its counts included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_process_that_fails_changes_nothing() {
    use std::io::{BufRead as _, BufReader, Write as _};
    let upstream = Upstream::start(1).await;
    let mut gate = Gate::start(Spec::new(upstream.address));
    let before = gate.left_after_one_more("/a", 0).await;

    gate.break_configuration();
    let output = gate.command(&["upgrade"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("the new process ended with exit status: 3"), "{said}");
    gate.configure();

    // One that dies after the old process has stopped deciding.
    let place = gate.state().join("run/upgrade/new.sock");
    for says in ["", "{\"taken\":{}}\n"] {
        let listener = std::os::unix::net::UnixListener::bind(&place).unwrap();
        let passage = gate.state().join("run/upgrade/nowhere.sock");
        let listening = std::os::unix::net::UnixListener::bind(&passage).unwrap();
        gate.signal("QUIT");
        let (mut stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        assert!(lines.next().unwrap().unwrap().contains("\"listeners\""));
        let ready = serde_json::json!({"ready": {"pid": std::process::id(), "passage": passage}});
        stream.write_all(format!("{ready}\n").as_bytes()).unwrap();
        assert!(lines.next().unwrap().unwrap().contains("\"go\""));
        stream.write_all(says.as_bytes()).unwrap();
        if !says.is_empty() {
            assert!(lines.next().unwrap().unwrap().contains("\"yours\""));
        }
        drop((stream, lines, listening));
        std::fs::remove_file(&place).unwrap();
        std::fs::remove_file(&passage).unwrap();
        let gave_up = "this process serves on";
        eventually("serving on", async || {
            gate.log().matches(gave_up).count() >= if says.is_empty() { 2 } else { 3 }
        })
        .await;
    }
    assert_eq!(gate.left_after_one_more("/a", 0).await, before - 1);
    // It is well, and a right one can take over.
    tokio::task::block_in_place(|| gate.upgrade());
    assert_eq!(gate.left_after_one_more("/a", 0).await, before - 2);
}
