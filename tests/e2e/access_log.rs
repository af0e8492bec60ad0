//! The access log loses nothing on a disk that works, and holds up nobody on one that does not.

use crate::gate::{Gate, Spec, Upstream, count_logged, eventually, size};
use crate::load::{Kind, Load};
use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

async fn drive(gate: &Gate, requests: usize) -> Arc<Load> {
    let load = Load::new(gate.address(), requests, 1);
    for client in (0..16).map(|_| load.client(Kind::KeptAlive)).collect::<Vec<_>>() {
        client.await.unwrap();
    }
    load
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_request_is_logged_once_while_the_log_is_rotated() {
    let requests = size(10_000, 200_000);
    let upstream = Upstream::start(requests).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let mut spec = Spec::new(upstream.address);
    spec.access = format!("{{format: json, path: {}}}", path.display());
    let mut gate = Gate::start(spec);
    let load = Load::new(gate.address(), requests, 1);
    let clients: Vec<_> = (0..16).map(|_| load.client(Kind::KeptAlive)).collect();
    let mut rotated = vec![];
    for turn in 1..=5 {
        while load.done.load(Ordering::Relaxed) < turn * requests / 6 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let to = directory.path().join(format!("access.log.{turn}"));
        std::fs::rename(&path, &to).unwrap();
        let reload = tokio::task::block_in_place(|| gate.command(&["reload"]));
        assert!(reload.status.success(), "{reload:?}");
        // Whoever compresses it now compresses all of it.
        rotated.push((to.clone(), std::fs::metadata(&to).unwrap().len()));
    }
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(gate.metric("tollgate_access_log_dropped_total").await, 0.0);
    gate.signal("TERM");
    tokio::task::block_in_place(|| gate.wait());
    let mut logged = vec![0_u8; requests];
    for (path, length) in &rotated {
        assert_eq!(
            std::fs::metadata(path).unwrap().len(),
            *length,
            "nothing was written to it after the reload"
        );
        count_logged(path, &mut logged);
    }
    count_logged(&path, &mut logged);
    assert_eq!(logged.iter().position(|count| *count != 1), None);
    println!("{requests} requests, 5 rotations, each logged once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_holds_up_nobody_and_every_line_is_counted_as_dropped() {
    const REQUESTS: usize = 2_000;
    let upstream = Upstream::start(REQUESTS).await;
    let mut spec = Spec::new(upstream.address);
    spec.access = "{format: json, path: /dev/full}".to_owned();
    let gate = Gate::start(spec);
    drive(&gate, REQUESTS).await;
    let dropped = "tollgate_access_log_dropped_total";
    eventually("the count", async || gate.metric(dropped).await == REQUESTS as f64).await;
    assert_eq!(gate.metric("tollgate_access_log_lines_total").await, 0.0);
    assert_eq!(
        gate.log().matches("the access log cannot be written").count(),
        1,
        "said once"
    );
}

/// A pipe that nobody reads is the worst disk: it does not even fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_holds_up_nobody_and_every_line_is_accounted_for() {
    const REQUESTS: usize = 3_000;
    let upstream = Upstream::start(REQUESTS).await;
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let mut spec = Spec::new(upstream.address);
    spec.access = format!("{{format: json, path: {}, buffer_lines: 100}}", pipe.display());
    let mut gate = Gate::start(spec);
    drive(&gate, REQUESTS).await;
    // An answer comes before its line.
    eventually("the last line", async || gate.status().await["gate"]["inFlight"] == 0).await;
    let dropped = gate.metric("tollgate_access_log_dropped_total").await as usize;
    assert!(dropped > 0, "a pipe and the buffer hold some hundred lines");
    // It heals: now somebody reads.
    let mut reader = std::fs::OpenOptions::new().read(true).write(true).open(&pipe).unwrap();
    let (mut lines, mut buffer) = (0, [0; 64 << 10]);
    while lines + dropped < REQUESTS {
        let read = tokio::task::block_in_place(|| reader.read(&mut buffer)).unwrap();
        lines += buffer[..read].iter().filter(|byte| **byte == b'\n').count();
    }
    println!("{REQUESTS} requests: {lines} lines in the pipe, {dropped} dropped");
    assert_eq!(gate.metric("tollgate_access_log_lines_total").await as usize, lines);
    // And its end is not held up either.
    drive(&gate, REQUESTS).await;
    gate.signal("TERM");
    tokio::task::block_in_place(|| gate.wait());
}
